"""Around every task: train and evaluate in seconds, last and best weights, what a run may start from, strict JSON."""

import json
import math
import shutil
import time
from importlib.util import find_spec

import pytest
import torch
from safetensors.torch import load_file, save_file

from vlblocks.evaluation import captions
from vlblocks.training import latest_checkpoint, read_history
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import finetune, predict, train
from vlblocks_recipes.unimo2.tasks import TASKS
from vlblocks_recipes.unimo2.tasks.text_classification import TextClassification

SMALL = {"captioning": ("--max-length", "12")}


@pytest.fixture
def tuned(quick, tmp_path, call, monkeypatch):
    """tuned(task, *flags, name="run") -> (outcome, folder)."""
    torch.set_num_threads(1)
    monkeypatch.setattr(finetune, "plot_curves", lambda *_, **__: None)

    def run(task, *flags, name="run"):
        return call(train, "--task", task, *quick, *flags, "--out", tmp_path / name), tmp_path / name

    return run


def one_line(outcome, *words):
    assert outcome.code == 2, outcome
    assert outcome.err.startswith("error: ") and outcome.err.count("\n") == 1, outcome.err
    for word in words:
        assert str(word) in outcome.err, outcome.err


def evaluated(call, folder, *flags):
    done = call(evaluation, "--run", folder, "--split", "val", *flags)
    assert done.code == 0, done.err
    return json.loads(done.out)


@pytest.mark.parametrize("name", sorted(TASKS))
def test_a_task_trains_and_evaluates_in_half_a_minute(tuned, call, monkeypatch, name):
    if name == "captioning" and find_spec("pycocoevalcap") is None:
        pytest.skip("needs pycocoevalcap: pip install 'vlblocks[tasks]'")
    # METEOR's dictionary is Java's time, not ours.
    monkeypatch.setattr(captions.shutil, "which", lambda name: None)
    # Of the processor: what a clock shows where nothing else runs. Beside other work the clock would blame us for that.
    began = time.process_time()
    done, folder = tuned(name, *SMALL.get(name, ()))
    assert done.code == 0, done.err
    found = evaluated(call, folder)
    assert time.process_time() - began < 30
    assert found["task"] == name and found["split"] == "val" and found["skipped"] == 0
    # The mean over recalls is training's own.
    watch = "text_to_image_r1" if name == "retrieval" else TASKS[name].watch
    assert found[watch] == json.loads((folder / "metrics.json").read_text())[f"val/{watch}"]


@pytest.mark.parametrize(("task", "metric"), [("text", "accuracy"), ("retrieval", "code_perplexity_image")])
def test_the_last_weights_are_those_of_the_last_step(tuned, call, task, metric):
    # The first evaluation is the best: its weights are kept, and the last checkpoint's are others.
    watch = ("--watch=-never", "--optim.lr", "0.02", "--evaluate-every", "3", "--max-steps", "9")
    own = finetune.finetune
    with pytest.MonkeyPatch.context() as patch:

        def falling(*args, **options):
            calls, evaluate = [], options["evaluate"]

            def look():
                calls.append(1)
                return {**evaluate(), "never": float(len(calls))}

            return own(*args, **{**options, "evaluate": look})

        patch.setattr(finetune, "finetune", falling)
        done, folder = tuned(task, *watch)
    assert done.code == 0, done.err
    values = read_history(folder / "history.jsonl")[f"val/{metric}"][1]
    flags = ("--precision", "fp32") if task == "text" else ()
    best, last = (evaluated(call, folder, "--weights", which, *flags)[metric] for which in ("best", "last"))
    assert best == evaluated(call, folder, *flags)[metric]
    assert (best, last) == (values[0], values[-1]) and (task == "text" or best != last)
    saved = [load_file(path) for path in (folder / "model.safetensors", weights_of(folder))]
    assert any(not torch.equal(value, saved[1][name]) for name, value in saved[0].items())
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.unlink()
    one_line(call(evaluation, "--run", folder, "--weights", "last"), "--weights last", folder / "checkpoints")


def weights_of(folder):
    return latest_checkpoint(folder / "checkpoints") / "model.safetensors"


def test_a_checkpoint_s_file_or_folder_starts_another_run(tuned, tmp_path):
    done, first = tuned("text", "--max-steps", "2", "--evaluate-every", "1", "--optim.lr", "0.02", name="first")
    assert done.code == 0, done.err
    file = weights_of(first)
    before = {name: value for name, value in load_file(file).items() if name.startswith("base.")}
    (best,) = first.glob("checkpoints/best-*.safetensors")
    for name, init in (("file", file), ("folder", file.parent), ("best", best)):
        done, folder = tuned("text", "--init", init, "--max-steps", "1", "--optim.lr", "0", name=name)
        assert done.code == 0, done.err
        if init == best:
            before = {name: value for name, value in load_file(best).items() if name.startswith("base.")}
        after = load_file(folder / "model.safetensors")
        assert all(torch.equal(after[key], value) for key, value in before.items())
        assert (folder / "tokenizer.json").read_bytes() == (first / "tokenizer.json").read_bytes()
    # Further up there may be anything.
    deep = first / "checkpoints/a/b"
    deep.mkdir(parents=True)
    save_file(load_file(file), deep / "model.safetensors")
    one_line(tuned("text", "--init", deep / "model.safetensors", name="deep")[0], deep / "config.json", "no such file")


def test_other_scenes_than_the_pre_training_s_are_told(tuned, checkpoint, tmp_path):
    start = shutil.copytree(checkpoint, tmp_path / "start")
    fewer = ("--max-steps", "1", "--init", start, "--data.scenes", "150")
    # As after a conversion, whose settings are a preset's.
    done, _ = tuned("text", *fewer, name="converted")
    assert done.code == 0 and "--data.scenes" not in done.out
    (start / "history.jsonl").write_text("")
    done, _ = tuned("text", "--max-steps", "1", "--init", start)
    assert done.code == 0 and "--data.scenes" not in done.out
    done, folder = tuned("text", *fewer, name="fewer")
    (line,) = [line for line in done.out.splitlines() if "--data.scenes" in line]
    assert line.startswith("--data.scenes 150: ") and "pre-trained on 200" in line
    # Of a run that was fine-tuned it is not known.
    done, _ = tuned("text", "--max-steps", "1", "--init", folder, name="again")
    assert done.code == 0 and "--data.scenes" not in done.out


@pytest.mark.parametrize(("task", "side"), [("text", "image"), ("image", "text"), ("captioning", "text")])
def test_a_side_that_a_task_does_not_read_cannot_be_hidden(tuned, call, task, side):
    done, folder = tuned(task, "--blind", side)
    one_line(done, f"--blind {side}", f"{task} reads no {side}", "none")
    assert not (folder / "config.json").exists()
    if task == "text":
        assert tuned(task, "--max-steps", "1")[0].code == 0
        one_line(call(evaluation, "--run", folder, "--blind", side), f"--blind {side}")


def test_a_number_that_is_none_is_null(tuned, call, monkeypatch, checkpoint):
    done, folder = tuned("text", "--max-steps", "1")
    assert done.code == 0, done.err
    monkeypatch.setattr(TextClassification, "evaluate", lambda *_, **__: {"accuracy": math.nan, "loss": math.inf})

    def refuse(word):
        raise AssertionError(word)

    shown = call(evaluation, "--run", folder).out
    assert json.loads(shown, parse_constant=refuse) == {
        **{"task": "text", "split": "test", "skipped": 0, "accuracy": None, "loss": None}
    }
    monkeypatch.setitem(predict.COMMANDS, "score", (predict.ScoreOptions, lambda options: [{"score": math.nan}]))
    assert json.loads(call(predict, "score").out, parse_constant=refuse) == [{"score": None}]


def test_the_other_tasks_that_retrieval_takes_name_its_own_flags(tuned, call, squares):
    done, folder = tuned("text", "--max-steps", "1")
    assert done.code == 0, done.err
    done = call(evaluation, "--run", folder, "--task", "retrieval")
    one_line(done, "--pairs, --images", "trained for text")
    assert "--data" not in done.err
    where = ("--pairs", squares / "dataset_squares.json", "--images", squares / "images")
    shown = json.loads(call(evaluation, "--run", folder, "--task", "retrieval", *where).out)
    assert shown["task"] == "retrieval" and shown["split"] == "test" and shown["gallery_size"] == 12
