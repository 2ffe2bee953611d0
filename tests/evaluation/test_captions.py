import json
import math
import shutil
import subprocess
from importlib.util import find_spec

import pytest

from vlblocks.errors import UserError
from vlblocks.evaluation import captions
from vlblocks.evaluation.captions import CaptionFile, caption_metrics, ptb_tokens, simple_tokens

coco = pytest.mark.skipif(
    find_spec("pycocoevalcap") is None,
    reason="needs pycocoevalcap: pip install 'vlblocks[tasks]'",
)
java = pytest.mark.skipif(shutil.which("java") is None, reason="needs Java")


SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")


def scores(found, references, **options):
    return caption_metrics(found, references, tokenizer="simple", slow=False, **options)


@coco
def test_bleu_by_hand():
    # Of six words five agree, of five pairs ab, bc, cd, of four triples abc, bcd, of three quadruples abcd.
    got = scores({0: "a b c d e f"}, {0: ["a b c d x f"]})
    assert got["bleu_4"] == pytest.approx((5 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25, rel=1e-6)
    # All agrees, but five words stand for ten: the brevity penalty is exp(1 - 10 / 5).
    assert scores({0: "a b c d e"}, {0: ["a b c d e f g h i j"]})["bleu_4"] == pytest.approx(math.exp(-1), rel=1e-6)
    # Counts add up over the images, and the reference closest in length is the one that counts.
    got = scores({0: "a b c d e f", 1: "p q r s"}, {0: ["a b c d x f"], 1: ["p q r s", "p q r s t u v w"]})
    assert got["bleu_4"] == pytest.approx((9 / 10 * 6 / 8 * 4 / 6 * 2 / 4) ** 0.25, rel=1e-6)
    # A word counts no more often than one reference has it: one "the" of four, and no pair.
    assert scores({0: "the the the the"}, {0: ["the cat sat here"]})["bleu_4"] < 1e-3


@coco
def test_rouge_l_by_hand():
    # The longest common subsequence, a c d, is 3 of 4 words found and of 5 written; beta is 1.2.
    precision, recall, weight = 3 / 4, 3 / 5, 1.2**2
    want = (1 + weight) * precision * recall / (recall + weight * precision)
    assert scores({0: "a b c d"}, {0: ["a c d e f"]})["rouge_l"] == pytest.approx(want)
    # The best precision and the best recall may be of different references, and images are averaged.
    best = (1 + weight) * 1.0 * recall / (recall + weight * 1.0)
    got = scores({0: "a b c d", 1: "x"}, {0: ["a c d e f", "a b c d y z z z z z"], 1: ["q"]})
    assert got["rouge_l"] == pytest.approx(best / 2)


@coco
def test_cider_by_hand():
    # Two images, so that every n-gram of one has the weight log 2. The first caption is perfect in 1- and 2-grams and
    # has no longer ones: 10 (1 + 1 + 0 + 0) / 4. The second shares one word of two: 10 * 0.5 / 4.
    got = scores({0: "a b", 1: "c x"}, {0: ["a b"], 1: ["c d"]})
    assert got["cider"] == pytest.approx((5.0 + 1.25) / 2)
    # c d c against c d: counts (2, 1) clipped to (1, 1), one pair of two, and one pair longer (sigma 6).
    cosines = 2 / math.sqrt(5 * 2) + 1 / math.sqrt(2)
    second = 10 * cosines / 4 * math.exp(-1 / 72)
    assert scores({0: "a b", 1: "c d c"}, {0: ["a b"], 1: ["c d"]})["cider"] == pytest.approx((5.0 + second) / 2)
    # A word that every image has says nothing; and references are averaged.
    got = scores({0: "the a", 1: "the b"}, {0: ["the a", "the q"], 1: ["the b"]})
    first = 10 * ((1 + 1) / 4 + (0 + 0) / 4) / 2
    assert got["cider"] == pytest.approx((first + 5.0) / 2)


@coco
def test_the_result_names_its_tokenizer_and_what_is_absent(monkeypatch):
    found, references = {7: "A red dog's ball!"}, {7: ["a red dog's ball"]}
    got = caption_metrics(found, references, tokenizer="simple", slow=False)
    assert got["tokenizer"] == "simple" and got["rouge_l"] == 1.0 and "absent" not in got and "meteor" not in got
    monkeypatch.setenv("PATH", "")
    got = caption_metrics(found, references)
    assert got["tokenizer"] == "simple" and got["bleu_4"] > 0.99
    assert got["absent"].startswith("meteor: needs Java") and "spice: needs Java" in got["absent"]
    with pytest.raises(UserError, match="tokenizer 'ptb' needs Java"):
        caption_metrics(found, references, tokenizer="ptb")
    with pytest.raises(UserError, match="PTB tokenizer needs Java"):
        ptb_tokens(["a"])


@coco
@java
def test_ptb_tokens_are_those_of_the_fields_class():
    from pycocoevalcap.tokenizer.ptbtokenizer import PTBTokenizer

    texts = [
        "A man's dog, don't run (fast)!",
        "",
        'He said: "no" -- twice...',
        "Straße 2.5 km; und so?",
        "x\ny\u2028z",
        "",
    ]
    got = ptb_tokens(texts)
    assert got[:2] == [["a", "man", "'s", "dog", "do", "n't", "run", "-lrb-", "fast", "-rrb-"], []]
    assert got[4:] == [["x", "y", "z"], []]
    theirs = PTBTokenizer().tokenize({i: [{"caption": text}] for i, text in enumerate(texts[:4])})
    assert [" ".join(tokens) for tokens in got[:4]] == [theirs[i][0] for i in range(4)]
    metrics = caption_metrics({1: "Two dogs."}, {1: ["two dogs"]}, slow=False)
    assert metrics["tokenizer"] == "ptb" and metrics["rouge_l"] == 1.0


@coco
@java
def test_a_verbatim_caption_is_perfect_by_ptb_tokens_and_meteor():
    text = "A man's dog runs across the green field."
    got = caption_metrics({1: text}, {1: ["Something else is here.", text]})
    assert got["tokenizer"] == "ptb" and got["meteor"] == pytest.approx(1.0) and got["bleu_4"] == pytest.approx(1.0)


@coco
@pytest.mark.parametrize("there", [(), ("stanford-corenlp-4.0.0.jar",), (SPICE_FILES[0],), (SPICE_FILES[1],)])
def test_spice_downloads_nothing_unasked(tmp_path, monkeypatch, there):
    from pycocoevalcap.spice import get_stanford_models, spice

    def download(*_, **__):
        raise AssertionError("a download")

    monkeypatch.setattr("vlblocks.evaluation.captions.shutil.which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(spice, "get_stanford_models", download)
    monkeypatch.setattr(get_stanford_models, "get_stanford_models", download)
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    (tmp_path / "lib").mkdir()
    for name in there:
        (tmp_path / "lib" / name).touch()
    said = captions._spice({0: ["a dog"]}, {0: ["a dog"]})
    assert said.startswith("needs stanford-corenlp-3.6.0.jar and stanford-corenlp-3.6.0-models.jar in " + str(tmp_path))


@coco
def test_what_spice_prints_does_not_go_to_stdout(tmp_path, monkeypatch, capfd):
    from pycocoevalcap.spice import spice

    class Noisy:
        def compute_score(self, wanted, results):
            subprocess.check_call(["echo", "parsing"])
            return 0.5, []

    monkeypatch.setattr("vlblocks.evaluation.captions.shutil.which", lambda name: "/usr/bin/java")
    monkeypatch.setattr(spice, "__file__", str(tmp_path / "spice.py"))
    monkeypatch.setattr(spice, "Spice", Noisy)
    (tmp_path / "lib").mkdir()
    for name in SPICE_FILES:
        (tmp_path / "lib" / name).touch()
    assert captions._spice({0: ["a dog"]}, {0: ["a dog"]}) == 0.5
    print("done", flush=True)
    out, err = capfd.readouterr()
    assert out == "done\n" and "parsing" in err


@coco
@java
def test_a_java_that_fails_is_named(tmp_path, monkeypatch):
    broken = tmp_path / "java"
    broken.write_text("#!/bin/sh\necho no memory >&2\nexit 1\n")
    broken.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(UserError, match="failed \\(no memory\\): repair Java"):
        ptb_tokens(["a dog"])
    got = caption_metrics({0: "a dog"}, {0: ["a dog"]}, tokenizer="simple")
    assert "meteor: its Java program failed" in got["absent"] and "meteor" not in got


def test_simple_tokens_are_lower_case_words():
    assert simple_tokens("A man's dog, don't run (fast)! 2nd-best.") == [
        *("a", "man's", "dog", "don't", "run", "fast", "2nd", "best"),
    ]


@coco
def test_captions_without_references_are_refused():
    with pytest.raises(UserError, match="other images \\(2 is in one only\\)"):
        scores({1: "a", 2: "b"}, {1: ["a"]})
    with pytest.raises(UserError, match="image 1 has none"):
        scores({1: "a"}, {1: []})


def test_a_missing_library_is_one_line(monkeypatch):
    monkeypatch.setattr("vlblocks.evaluation.captions.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'vlblocks\[tasks\]'"):
        scores({1: "a"}, {1: ["a"]})


def test_captions_stream_and_end_as_one_list(tmp_path):
    path = tmp_path / "new" / "captions.json"
    with CaptionFile(path, {"seed": 1}) as file:
        file.add({3: 'a "red" dog', "x.jpg": "größer"})
        written = file.part.read_text(encoding="utf-8").splitlines()
        assert json.loads(written[2]) == {"image_id": "x.jpg", "caption": "größer"} and not path.exists()
        file.add({4: "c"})
    assert json.loads(path.read_text(encoding="utf-8")) == [
        {"image_id": 3, "caption": 'a "red" dog'},
        {"image_id": "x.jpg", "caption": "größer"},
        {"image_id": 4, "caption": "c"},
    ]
    assert [entry.name for entry in path.parent.iterdir()] == ["captions.json"]
    with CaptionFile(path, {"seed": 1}) as file:
        assert file.captions == {}
    assert json.loads(path.read_text()) == []


@pytest.mark.parametrize("torn", ['{"image_id": 3, "capt', '{"image_id": 3, "caption": "whole but for its end"}', ""])
def test_a_killed_run_is_taken_up_at_its_last_whole_line(tmp_path, torn):
    path = tmp_path / "captions.json"
    with pytest.raises(KeyboardInterrupt), CaptionFile(path, {"seed": 1}) as file:
        file.add({1: "a", 2: "b"})
        raise KeyboardInterrupt
    assert not path.exists()
    with open(file.part, "a", encoding="utf-8") as part:
        part.write(torn)
    with CaptionFile(path, {"seed": 1}) as file:
        assert file.captions == {1: "a", 2: "b"}
        file.add({3: "c"})
    assert [entry["caption"] for entry in json.loads(path.read_text())] == ["a", "b", "c"]


def test_captions_of_something_else_are_begun_anew(tmp_path):
    path = tmp_path / "captions.json"
    with pytest.raises(KeyboardInterrupt), CaptionFile(path, {"seed": 1}) as file:
        file.add({1: "a"})
        raise KeyboardInterrupt
    with CaptionFile(path, {"seed": 2}) as file:
        assert file.captions == {}
        file.add({1: "b"})
    assert json.loads(path.read_text()) == [{"image_id": 1, "caption": "b"}]
