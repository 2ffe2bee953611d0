import json
import math
from contextlib import nullcontext
from dataclasses import replace
from importlib.util import find_spec

import pytest
import torch

from vlblocks.data import BadData, SceneCorpus, Tokenizer, eval_transform, train_tokenizer
from vlblocks.generation import Recompute, Rules, beam_search, greedy
from vlblocks.models import import_unimo2
from vlblocks_recipes.unimo2 import eval as evaluation
from vlblocks_recipes.unimo2 import train
from vlblocks_recipes.unimo2.configs import ContrastConfig, GroundingConfig, ModelConfig, TowerConfig
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.original import measure, model_config
from vlblocks_recipes.unimo2.parity import read_golden
from vlblocks_recipes.unimo2.tasks import captioning
from vlblocks_recipes.unimo2.tasks.base import TaskModel
from vlblocks_recipes.unimo2.tasks.captioning import (
    CaptionConfig,
    CaptionData,
    CaptionDecoder,
    Captioning,
    caption,
    caption_states,
    image_and_codes,
    image_ids,
)

pytestmark = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None, reason="needs pycocoevalcap: pip install 'vlblocks[tasks]'"
)
VOCAB = 40
RULES = Rules(eos_id=2, min_length=2, max_length=14, no_repeat=3, banned=(0, 1, 3, VOCAB - 1))


@pytest.fixture(autouse=True)
def without_java(monkeypatch):
    """The same numbers on machines with and without it, and METEOR's dictionary takes ten seconds to load."""
    monkeypatch.setattr("vlblocks.evaluation.captions.shutil.which", lambda name: None)
    torch.set_num_threads(1)


def tiny(*, vocab=VOCAB, width=32, grounding=None, masked_rows="zeros", lively=True):
    tower = TowerConfig(layers=2, heads=4, hidden=48, dropout=0.0)
    config = ModelConfig(
        **{"width": width, "image": tower, "text": tower, "joint": tower, "image_size": 32, "patch_size": 8},
        **{"vocab": vocab, "positions": 66, "masked_rows": masked_rows},
        grounding=grounding or GroundingConfig(codes=24, picks=5),
        contrast=ContrastConfig(width=width),
    )
    torch.manual_seed(0)
    model = Unimo2(config).eval()
    if lively:
        # As they start, all weights are so small that every picture has one and the same caption.
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if parameter.ndim > 1 and "positions" not in name:
                    parameter.mul_(6.0)
            model.masked_token.bias[2] = 1.0
    return model


def uncached(model, images):
    def score(tokens, *before):
        return model.token_logits(caption_states(model, tokens, *before, *(() if len(before) == 2 else (None,)))[:, -1])

    image, codes = image_and_codes(model, images)
    return Recompute(score, *(state for state in (image, codes) if state is not None))


def starts(images):
    return torch.zeros(len(images), 1, dtype=torch.long)


GROUNDINGS = {
    "topk": GroundingConfig(codes=24, picks=5),
    "positions": GroundingConfig(codes=24, picks=5, positions=True, project=True),
    "nearest": GroundingConfig(method="nearest", codes=24),
    "none": GroundingConfig(method="none"),
}


@pytest.mark.parametrize("masked_rows", ["zeros", "open"])
@pytest.mark.parametrize("grounding", GROUNDINGS)
@torch.no_grad()
def test_cached_decoding_chooses_the_tokens_of_uncached(grounding, masked_rows):
    model, images = tiny(grounding=GROUNDINGS[grounding], masked_rows=masked_rows), 3 * torch.randn(6, 3, 32, 32)
    seen = set()
    for decode in (greedy, lambda *given: beam_search(*given, beams=4, length_penalty=0.6, returned=4)):
        cached = decode(CaptionDecoder(model, images), starts(images), RULES)
        plain = decode(uncached(model, images), starts(images), RULES)
        assert torch.equal(cached.tokens, plain.tokens) and torch.equal(cached.lengths, plain.lengths)
        torch.testing.assert_close(cached.scores, plain.scores, rtol=1e-4, atol=1e-4)
        seen |= {tuple(text) for texts in cached.texts() for text in texts}
    assert len(seen) > 6 and len({len(text) for text in seen}) > 1


@torch.no_grad()
def test_image_and_codes_are_computed_once_and_each_token_once():
    model, images = tiny(), torch.randn(3, 3, 32, 32)
    joint, text, towers = [], [], []
    model.joint.transformer.register_forward_pre_hook(lambda _, given: joint.append(given[0].shape[:2]))
    model.text.transformer.register_forward_pre_hook(lambda _, given: text.append(given[0].shape[:2]))
    model.image.register_forward_hook(lambda *_: towers.append(1))
    found = beam_search(CaptionDecoder(model, images), starts(images), RULES, beams=4)
    # 17 image states and 5 codes for each picture; then single tokens, of one row a picture at first.
    assert joint[0] == (3, 22) and joint[1] == (3, 1) and len(towers) == 1
    assert all(length == 1 and rows <= 12 for rows, length in joint[1:]) and joint[1:] == text
    assert len(text) > int(found.lengths.max())


@torch.no_grad()
def test_a_batch_of_pictures_has_the_captions_of_each_alone():
    model, images = tiny(), torch.randn(7, 3, 32, 32)
    for decode in (greedy, lambda *given: beam_search(*given, beams=3, length_penalty=0.6)):
        whole = decode(CaptionDecoder(model, images), starts(images), RULES).texts()
        for i in range(7):
            assert decode(CaptionDecoder(model, images[i : i + 1]), starts(images[:1]), RULES).texts()[0] == whole[i]


def test_the_original_computes_the_same_states(reference):
    golden = read_golden(reference / "golden/unimo2/caption_seq2seq.npz")
    model = Unimo2(model_config(golden.config, measure(golden.params))).eval()
    model.load_state_dict(import_unimo2(golden.params).state, strict=False)
    pixels = golden.inputs["image_u8"].permute(0, 3, 1, 2).float() / 127.5 - 1
    tokens = golden.inputs["src_ids"][..., 0]
    with torch.no_grad():
        image, codes = image_and_codes(model, pixels)
        states = caption_states(model, tokens, image, codes)
        decoder, steps = CaptionDecoder(model, pixels), []
        for length in range(1, tokens.shape[1] + 1):
            steps.append(decoder.step(tokens[:, :length]))
    torch.testing.assert_close(codes, golden.outputs["grounded"], rtol=0, atol=2e-5)
    torch.testing.assert_close(states, golden.outputs["enc_l"], rtol=0, atol=2e-5)
    wanted = model.token_logits(golden.outputs["enc_l"])
    torch.testing.assert_close(torch.stack(steps, 1), wanted, rtol=0, atol=2e-5)


def make_task(config=None, tokenizer=None, image_size=32):
    config = config or CaptionConfig(data=CaptionData(embedded=True, scenes=8, min_crop=1.0))
    if tokenizer is None:
        texts = [text for texts in SceneCorpus(pairs=50, test=0).pairs.captions for text in texts]
        tokenizer = train_tokenizer(texts, 400, lowercase=True)
    return Captioning(config, tokenizer, image_size, BadData())


@torch.no_grad()
def test_the_loss_predicts_each_next_token_and_no_padding():
    task = make_task()
    model = tiny(vocab=task.tokenizer.vocab_size)
    examples = task.dataset("train")
    assert len(examples) == 40
    rows = [examples[0, index] for index in (0, 6, 39)]
    batch = task.collate(rows)
    got = task.loss(TaskModel(model, torch.nn.Identity()), batch, torch.Generator())
    total, count = 0.0, 0
    for row in rows:
        tokens = torch.tensor([row["tokens"]])
        assert tokens[0, 0] == task.tokenizer.cls_id and tokens[0, -1] == task.tokenizer.sep_id
        image, codes = image_and_codes(model, row["image"][None])
        for n in range(1, tokens.shape[1]):
            logits = model.token_logits(caption_states(model, tokens[:, :n], image, codes)[0, -1])
            shares = logits.double().log_softmax(0)
            total -= float(0.9 * shares[tokens[0, n]] + 0.1 * shares.mean())
            count += 1
    assert batch["valid"].sum() - 3 == count < batch["tokens"].numel()
    assert float(got) == pytest.approx(total / count, rel=1e-5)


def test_a_few_pictures_can_be_learned_by_heart():
    task = make_task()
    model = tiny(vocab=task.tokenizer.vocab_size, width=48, lively=False).train()
    examples = task.dataset("train")
    rows = [examples[0, 5 * image] for image in range(6)]
    batch, net = task.collate(rows), TaskModel(model, torch.nn.Identity())
    optimiser = torch.optim.Adam(model.parameters(), lr=6e-3)
    for _ in range(130):
        optimiser.zero_grad()
        loss = task.loss(net, batch, torch.Generator())
        loss.backward()
        optimiser.step()
    for decode in ("beam", "greedy"):
        config = replace(task.config, decode=decode)
        found = caption(model.eval(), batch["image"], config, task.tokenizer)
        assert found == [task.tokenizer.decode(row["tokens"]) for row in rows]
    # Of grey pictures it can say only one thing.
    blind = make_task(replace(task.config, blind="image"), task.tokenizer)
    grey = blind.batch([{"image": row["image"]} for row in rows])["image"]
    assert len(set(caption(model, grey, task.config, task.tokenizer))) == 1


def test_training_draws_every_caption_of_a_picture_and_evaluation_all_pictures():
    task = make_task(CaptionConfig(data=CaptionData(embedded=True, scenes=8, held_out=20, val_images=15)))
    examples, part = task.dataset("train"), SceneCorpus(pairs=8, test=1000, image_size=32).pair_part
    decoded = [task.tokenizer.decode(examples[0, index]["tokens"]) for index in range(40)]
    assert decoded == [text for i in range(8) for text in part.captions[i]]
    again = examples[0, 3]
    assert torch.equal(again["image"], examples[0, 3]["image"])
    assert not torch.equal(again["image"], examples[1, 3]["image"])
    assert len(task.dataset("val")) == 15 and len(task.dataset("test")) == 20
    pictures = task.pictures("test")
    assert torch.equal(task.dataset("test")[7]["image"], eval_transform(32)(pictures.images[7]))
    assert all(len(texts) == 5 for texts in pictures.references) and len(set(pictures.ids)) == 20


@pytest.fixture
def tuned(quick, tmp_path, call):
    def run(*flags, name="run"):
        small = ("--max-length", "12", "--data.held-out", "20", "--decode-batch", "8")
        return call(train, "--task", "captioning", *quick, *small, "--out", tmp_path / name, *flags), tmp_path / name

    return run


def test_a_run_evaluates_streams_its_captions_and_takes_up_what_was_cut(tuned, tmp_path, call, monkeypatch):
    done, folder = tuned()
    assert done.code == 0, done.err
    metrics = json.loads((folder / "metrics.json").read_text())
    assert metrics["val/tokenizer"] == "simple" and metrics["val/images"] == 20
    assert 0 <= metrics["val/bleu_4"] <= 1 and 0 <= metrics["val/rouge_l"] <= 1 and "val/meteor" not in metrics

    def evaluate(*flags):
        return call(evaluation, "--run", folder, "--split", "val", "--precision", "fp32", *flags)

    shown = json.loads(evaluate().out)
    assert shown["cider"] == metrics["val/cider"] and shown["task"] == "captioning"

    sizes, made, real = [], [], caption

    def counting(model, images, *rest, **options):
        sizes.append(len(images))
        if len(sizes) == 2:
            raise KeyboardInterrupt
        made.extend(found := real(model, images, *rest, **options))
        return found

    monkeypatch.setattr(captioning, "caption", counting)
    out = tmp_path / "out"
    assert evaluate("--out", out).code != 0
    assert len((out / "captions_val.json.part").read_text().splitlines()) == 1 + 8
    shown = json.loads(evaluate("--out", out).out)
    assert sizes == [8, 8, 8, 4] and shown["bleu_4"] == metrics["val/bleu_4"]
    assert "meteor: needs Java" in shown["absent"] and "spice: needs Java" in shown["absent"]
    rows = json.loads((out / "captions_val.json").read_text())
    assert [row["caption"] for row in rows] == made and [path.name for path in out.iterdir()] == ["captions_val.json"]
    assert [row["image_id"] for row in rows] == [f"images scene {i}" for i in range(20)]
    # Other settings, other captions: nothing is taken up.
    sizes[:] = [0] * 2
    assert evaluate("--out", out, "--beams", "1", "--decode", "greedy").code == 0
    assert sizes[2:] == [8, 8, 4]


def test_samples_do_not_depend_on_where_a_run_was_stopped(tuned, tmp_path, call):
    done, folder = tuned("--max-steps", "1", "--evaluate-every", "1")
    assert done.code == 0, done.err
    flags = ("--run", folder, "--split", "val", "--precision", "fp32", "--decode", "sample", "--out")
    assert call(evaluation, *flags, tmp_path / "whole").code == 0
    whole = json.loads((tmp_path / "whole/captions_val.json").read_text())
    # Killed while it wrote the second batch of eight.
    own = captioning.CaptionFile.add

    def cut(self, captions):
        own(self, dict(list(captions.items())[: 3 if len(self.captions) else 8]))
        if len(self.captions) > 8:
            raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(captioning.CaptionFile, "add", cut)
        assert call(evaluation, *flags, tmp_path / "cut").code == 130
    assert len((tmp_path / "cut/captions_val.json.part").read_text().splitlines()) == 1 + 11
    assert call(evaluation, *flags, tmp_path / "cut").code == 0
    assert json.loads((tmp_path / "cut/captions_val.json").read_text()) == whole
    assert len({row["caption"] for row in whole}) > 10


def test_every_batch_draws_its_own_samples(checkpoint, tmp_path):
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    data = CaptionData(embedded=True, scenes=8, held_out=6)
    # To a blind model all pictures are one.
    config = CaptionConfig(decode="sample", max_length=12, decode_batch=2, blind="image", data=data)
    net = TaskModel(tiny(vocab=tokenizer.vocab_size), torch.nn.Identity())
    make_task(config, tokenizer).evaluate(net, "val", autocast=nullcontext, out=tmp_path)
    texts = [row["caption"] for row in json.loads((tmp_path / "captions_val.json").read_text())]
    assert len({tuple(texts[first : first + 2]) for first in (0, 2, 4)}) == 3


def test_the_same_seed_draws_the_same_samples(checkpoint):
    tokenizer = Tokenizer.load(checkpoint / "tokenizer.json")
    task = make_task(CaptionConfig(decode="sample", top_p=0.9, max_length=10), tokenizer)
    model, images = tiny(vocab=tokenizer.vocab_size), torch.randn(3, 3, 32, 32)

    def draw(seed):
        return caption(model, images, task.config, tokenizer, generator=torch.Generator().manual_seed(seed))

    assert draw(1) == draw(1) != draw(2)


def test_a_karpathy_folder_trains_and_a_broken_picture_is_named(make_checkpoint, own_squares, tmp_path, call):
    squares, start = own_squares, make_checkpoint(tmp_path / "start")
    (squares / "images" / "val_03.png").write_bytes(b"no picture")
    (squares / "images" / "train_05.png").unlink()
    flags = ("--task", "captioning", "--init", start, "--data.root", squares, "--max-steps", "6", "--batch", "16")
    flags += ("--max-length", "12", "--out", tmp_path / "run", "--precision", "fp32")
    done = call(train, *flags)
    assert done.code == 2 and "1 of 10" in done.err and "val_03.png" in done.err
    done = call(train, *flags, "--data.max-bad-share", "0.2", "--restart")
    assert done.code == 0, done.err
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    assert metrics["val/images"] == 9 and metrics["data/skipped"] == 2
    shown = call(evaluation, "--run", tmp_path / "run", "--out", tmp_path / "out", "--precision", "fp32")
    rows = json.loads((tmp_path / "out" / "captions_test.json").read_text())
    assert [row["image_id"] for row in rows] == [f"test_{i:02d}.png" for i in range(12)]
    assert json.loads(shown.out)["images"] == 12


def test_a_malformed_entry_is_skipped_and_counted(make_checkpoint, own_squares, tmp_path, call):
    path = own_squares / "dataset_squares.json"
    content = json.loads(path.read_text())
    del content["images"][3]["sentences"]
    path.write_text(json.dumps(content))
    flags = ("--task", "captioning", "--init", make_checkpoint(tmp_path / "start"), "--data.root", own_squares)
    flags += ("--max-steps", "1", "--batch", "8", "--max-length", "8", "--out", tmp_path / "run")
    done = call(train, *flags)
    assert done.code == 2 and "images[3]: has no list 'sentences'" in done.err and "max_bad_share" in done.err
    done = call(train, *flags, "--data.max-bad-share", "0.03")
    assert done.code == 0, done.err
    # One for all of the file's splits.
    assert json.loads((tmp_path / "run/metrics.json").read_text())["data/skipped"] == 1


def test_pictures_go_by_cocos_numbers(tmp_path):
    class Files:
        def __init__(self, *names):
            self.names = names

        def __len__(self):
            return len(self.names)

        def name(self, index):
            return self.names[index]

    assert image_ids(Files("/d/val2014/COCO_val2014_000000391895.jpg", "/d/9.jpg")) == [391895, "9.jpg"]
    assert image_ids(Files("/d/a/1.jpg", "/d/b/1.jpg")) == ["/d/a/1.jpg", "/d/b/1.jpg"]


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (("--blind", "text"), ("--blind text", "captioning reads no text", "give image")),
        (("--max-length", "70"), ("--max-length: 70", "63")),
        (("--min-length", "13"), ("min_length 13", "max_length 12")),
        (("--data.no-embedded",), ("--data.root", "--data.embedded")),
        (("--data.no-embedded", "--data.root", "nowhere"), ("nowhere", "no such folder")),
    ],
)
def test_mistakes_are_one_line(tuned, flags, words):
    done, _ = tuned(*flags)
    assert done.code == 2 and done.err.count("\n") == 1 and all(word in done.err for word in words), done.err


def test_missing_metrics_are_told_before_training(tuned, monkeypatch):
    monkeypatch.setattr("vlblocks.evaluation.captions.find_spec", lambda name: None)
    done, folder = tuned()
    assert done.code == 2 and "vlblocks[tasks]" in done.err and not (folder / "history.jsonl").exists()


def test_greedy_of_a_trained_step_is_the_argmax_of_the_loss_path():
    model, images = tiny(), torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        found = greedy(CaptionDecoder(model, images), starts(images), Rules(eos_id=2, max_length=8))
        image, codes = image_and_codes(model, images)
        for row, [text] in enumerate(found.texts()):
            tokens = torch.tensor([[0, *text]])
            logits = model.token_logits(caption_states(model, tokens, image[row : row + 1], codes[row : row + 1])[0])
            assert logits.argmax(1).tolist()[: len(text)] == text
            assert math.isfinite(float(found.scores[row]))
