"""Byte-level BPE: trained, and from the field's files; ids, words, files."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
from tokenizers import Tokenizer as Backend
from tokenizers import models

from vlblocks.data import Tokenizer, load_hf_bpe, load_roberta_bpe, train_tokenizer
from vlblocks.errors import UserError

TEXTS = ["A small dog runs.", "a small cat sleeps", "The small cat, and the dog!"] * 4


@pytest.fixture(scope="module")
def trained() -> Tokenizer:
    return train_tokenizer(TEXTS, 300)


def bpe_files(folder: Path, *, specials_in_dict: bool = True) -> tuple[list[str], list[int]]:
    """A GPT-2 vocabulary of ours: single letters, and the merges that make " dog" and "dog"."""
    letters = ["d", "o", "g", "a", "\u0120", "!", "s"]
    merges = [("d", "o"), ("do", "g"), ("\u0120", "dog")]
    tokens = [*letters, *("".join(pair) for pair in merges)]
    (folder / "encoder.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
    (folder / "vocab.bpe").write_text("#version: 0.2\n" + "".join(f"{a} {b}\n" for a, b in merges))
    # Most frequent first, as fairseq writes it: not GPT-2's order.
    order = [9, 8, 7, 6, 5, 4, 3, 2, 1, 0]
    lines = [f"{i}" for i in order] if specials_in_dict else [f"{i} {100 - i}" for i in order]
    if specials_in_dict:
        lines = ["[CLS]", "[PAD]", "[SEP]", "[UNK]", *lines, "madeupword0000", "[MASK]"]
    (folder / "dict.txt").write_text("\n".join(lines) + "\n")
    return tokens, order


@pytest.mark.parametrize("specials_in_dict", [True, False])
def test_a_gpt2_id_becomes_its_line_in_the_dictionary(tmp_path: Path, specials_in_dict: bool) -> None:
    tokens, order = bpe_files(tmp_path, specials_in_dict=specials_in_dict)
    tokenizer = load_roberta_bpe(tmp_path)
    line = {tokens[number]: 4 + place for place, number in enumerate(order)}
    assert tokenizer.encode("dog dogs") == [0, line["dog"], line["\u0120dog"], line["s"], 2]
    assert tokenizer.encode("a!") == [0, line["a"], line["!"], 2]
    assert tokenizer.vocab_size == (16 if specials_in_dict else 15)
    assert tokenizer.mask_id == tokenizer.vocab_size - 1
    assert tokenizer.decode(tokenizer.encode("dog dogs")) == "dog dogs"


def test_original_bpe_ids(reference: Path) -> None:
    golden = json.loads((reference / "golden" / "roberta_bpe_cases.json").read_text())
    tokenizer = load_roberta_bpe(reference / "data" / "roberta_bpe")
    special = golden["special"]
    assert tokenizer.vocab_size == golden["vocab_size"]
    assert tokenizer.special_ids == tuple(special[name] for name in ("cls", "pad", "sep", "unk", "mask"))
    assert golden["cases"]
    for case in golden["cases"]:
        assert tokenizer.encode(case["text"]) == [0, *case["ids"], 2], case["text"]
        assert tokenizer.decode(case["ids"]) == case["text"]


def test_hugging_face_files(tmp_path: Path) -> None:
    tokens, _ = bpe_files(tmp_path)
    names = ["<s>", "<pad>", "</s>", "<unk>", *tokens, "<mask>"]
    (tmp_path / "vocab.json").write_text(json.dumps({name: i for i, name in enumerate(names)}))
    (tmp_path / "merges.txt").write_text((tmp_path / "vocab.bpe").read_text())
    tokenizer = load_hf_bpe(tmp_path)
    assert tokenizer.encode("dog dog") == [0, names.index("dog"), names.index("\u0120dog"), 2]
    (tmp_path / "vocab.json").write_text((tmp_path / "encoder.json").read_text())
    with pytest.raises(UserError, match=r"vocab\.json.*RoBERTa"):
        load_hf_bpe(tmp_path)


def test_trained_ids_have_the_layout_and_round_trip(trained: Tokenizer) -> None:
    assert trained.special_ids == (0, 1, 2, 3, trained.vocab_size - 1)
    assert trained.tokens(trained.special_ids) == ["<s>", "<pad>", "</s>", "<unk>", "<mask>"]
    assert 261 < trained.vocab_size <= 300
    bare = train_tokenizer(TEXTS, 300, add_prefix_space=False)
    for text in (*TEXTS, "naïve café 日本語 😀", "  two  spaces ", "", "tab\tnew\nline"):
        ids = trained.encode(text)
        assert (ids[0], ids[-1]) == (0, 2)
        # With a space put before the first word, one that was there cannot be told from it.
        assert trained.decode(ids) == text.removeprefix(" ")
        assert bare.decode(bare.encode(text)) == text


def test_text_never_yields_a_special_id(trained: Tokenizer, tmp_path: Path) -> None:
    trained.save(tmp_path / "tokenizer.json")
    for tokenizer in (trained, Tokenizer.load(tmp_path), pickle.loads(pickle.dumps(trained))):
        body = tokenizer.encode("<mask> <s> </s> <pad> <unk>")[1:-1]
        assert not set(body) & set(tokenizer.special_ids)
        assert tokenizer.decode(body) == "<mask> <s> </s> <pad> <unk>"


def test_case_folds_only_when_asked(tmp_path: Path) -> None:
    folded = train_tokenizer(TEXTS, 300, lowercase=True)
    assert folded.encode("SMALL Dog") == folded.encode("small dog")
    folded.save(tmp_path / "tokenizer.json")
    assert Tokenizer.load(tmp_path / "tokenizer.json").encode("SMALL Dog") == folded.encode("small dog")
    plain = train_tokenizer(TEXTS, 300)
    assert plain.encode("SMALL") != plain.encode("small")


def test_a_first_word_has_the_ids_it_has_elsewhere(trained: Tokenizer) -> None:
    assert trained.encode("small cat")[1] == trained.encode("a small cat")[2]
    bare = train_tokenizer(TEXTS, 300, add_prefix_space=False)
    assert bare.encode("small cat")[1] != bare.encode("a small cat")[2]
    assert bare.decode(bare.encode("small cat")) == "small cat"


def test_long_texts_are_cut_and_batches_equal_single_texts(trained: Tokenizer) -> None:
    whole = trained.encode(TEXTS[2])
    cut = trained.encode(TEXTS[2], max_length=6)
    assert cut == [*whole[:5], 2]
    assert trained.encode_batch(TEXTS[:3], max_length=6) == [trained.encode(text, 6) for text in TEXTS[:3]]
    with pytest.raises(UserError, match="max_length"):
        trained.encode("a", max_length=1)


def test_words_begin_after_white_space_and_specials(trained: Tokenizer) -> None:
    ids = trained.encode("a zebra, zq")
    starts = trained.word_starts(ids)
    spelled = trained.tokens(ids)
    assert starts[[0, 1, len(ids) - 1]].all()
    for token, begins in zip(spelled[2:-1], starts[2:-1], strict=True):
        assert begins == token.startswith("\u0120")
    assert starts.sum() == 2 + 3
    bare = train_tokenizer(TEXTS, 300, add_prefix_space=False)
    ids = bare.encode("zebra")
    assert bare.word_starts(ids).tolist() == [True, True, *[False] * (len(ids) - 3), True]


def test_saved_files_are_read_by_others_and_equal_ours(trained: Tokenizer, tmp_path: Path) -> None:
    path = tmp_path / "deep" / "tokenizer.json"
    trained.save(path)
    assert [file.name for file in path.parent.iterdir()] == ["tokenizer.json"]
    assert Backend.from_file(str(path)).encode(TEXTS[0]).ids == trained.encode(TEXTS[0])
    loaded = Tokenizer.load(path)
    assert loaded.encode(TEXTS[1]) == trained.encode(TEXTS[1])
    assert len(loaded) == len(trained)
    assert np.array_equal(loaded.word_starts(loaded.encode(TEXTS[1])), trained.word_starts(trained.encode(TEXTS[1])))


def test_training_is_repeatable() -> None:
    first, again = (train_tokenizer(iter(TEXTS), 290) for _ in range(2))
    assert first.tokens(range(len(first))) == again.tokens(range(len(again)))


def test_mistakes_are_told_in_one_line(tmp_path: Path) -> None:
    def told(act, match: str) -> None:
        with pytest.raises(UserError, match=match) as caught:
            act()
        assert "\n" not in str(caught.value)

    told(lambda: train_tokenizer(TEXTS, 100), "vocab_size 100")
    told(lambda: train_tokenizer([], 300), "empty")
    told(lambda: Tokenizer.load(tmp_path / "none.json"), r"none\.json: no such file")
    (tmp_path / "bad.json").write_text("{}")
    told(lambda: Tokenizer.load(tmp_path / "bad.json"), r"bad\.json")
    told(lambda: load_roberta_bpe(tmp_path), r"encoder\.json: no such file")
    bpe_files(tmp_path)
    (tmp_path / "dict.txt").write_text("[CLS]\n[PAD]\n[SEP]\n[UNK]\n77\n[MASK]\n")
    told(lambda: load_roberta_bpe(tmp_path), r"dict\.txt: GPT-2 id 77")
    (tmp_path / "dict.txt").write_text("9\n8\n")
    told(lambda: load_roberta_bpe(tmp_path), r"dict\.txt: lacks GPT-2 id 0")
    bpe_files(tmp_path)
    (tmp_path / "vocab.bpe").write_text("x y\n")
    told(lambda: load_roberta_bpe(tmp_path), r"dict\.txt: its merges")
    word_level = Backend(
        models.WordLevel({"<s>": 0, "<pad>": 1, "</s>": 2, "<unk>": 3, "<mask>": 4}, unk_token="<unk>")
    )
    told(lambda: Tokenizer(word_level, origin="w.json"), r"w\.json is not a byte-level BPE")
    told(lambda: Tokenizer(Backend(models.BPE()), origin="e.json"), r"e\.json")
