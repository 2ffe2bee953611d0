"""GLUE's files: which column is what, what is malformed, and what does not fit a checkpoint."""

import pytest

from vlblocks.data import GLUE, BadData, GlueFormat, glue_format, read_glue
from vlblocks.errors import UserError


def write(path, *rows, end="\n"):
    path.write_bytes(end.join("\t".join(row) for row in rows).encode() + end.encode())
    return path


# Two rows of each data set in its own layout, and what they say.
FILES = {
    "sst2": ([("sentence", "label"), ("a fine film ", "1"), ('so "bad" it hurts', "0")], ["1", "0"]),
    "cola": ([("gj04", "1", "", "They drank the pub dry."), ("gj04", "0", "*", "They drank the pub.")], ["1", "0"]),
    "mnli": (
        [
            ("index", "genre", "sentence1", "sentence2", "label1", "gold_label"),
            ("0", "fiction", "He sat.", "He did not stand.", "neutral", "entailment"),
            ("1", "travel", "It rains.", "It is dry.", "neutral", "contradiction"),
        ],
        ["entailment", "contradiction"],
    ),
    "mrpc": (
        [("Quality", "#1 ID", "#2 ID", "#1 String", "#2 String"), ("1", "7", "8", "A ran.", "A was running."),
         ("0", "9", "3", "B ran.", "C sat.")],
        ["1", "0"],
    ),
    "qqp": (
        [("id", "qid1", "qid2", "question1", "question2", "is_duplicate"), ("1", "2", "3", "Why?", "How come?", "1"),
         ("4", "5", "6", "Who?", "Where?", "0")],
        ["1", "0"],
    ),
    "qnli": (
        [("index", "question", "sentence", "label"), ("0", "Who ran?", "A ran.", "entailment"),
         ("1", "Who ran?", "It rains.", "not_entailment")],
        ["entailment", "not_entailment"],
    ),
    "rte": (
        [("index", "sentence1", "sentence2", "label"), ("0", "A ran.", "A moved.", "entailment"),
         ("1", "A ran.", "A sat.", "not_entailment")],
        ["entailment", "not_entailment"],
    ),
    "stsb": (
        [("index", "genre", "sentence1", "sentence2", "score"), ("0", "news", "A ran.", "A was running.", "4.750"),
         ("1", "news", "A ran.", "It rains.", "0.000")],
        [4.75, 0.0],
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", FILES)
def test_every_data_set_is_read_by_its_columns(tmp_path, name):
    rows, expected = FILES[name]
    path = write(tmp_path / "train.tsv", *rows)
    form = glue_format(name, path)
    assert form is GLUE[name]
    found = read_glue(path, form)
    body = rows if form.columns else rows[1:]
    places = [(form.columns or rows[0]).index(column) for column in form.texts]
    assert found.first == [row[places[0]].strip() for row in body]
    assert found.second == (None if len(places) == 1 else [row[places[1]] for row in body])
    given = [label if form.regression else form.labels[int(label)] for label in found.labels]
    assert given == expected and found.rows == [0, 1]


@pytest.mark.parametrize("name", ["mnli", "mrpc", "qqp"])
def test_a_header_that_only_one_data_set_has_names_it(tmp_path, name):
    assert glue_format("auto", write(tmp_path / "train.tsv", *FILES[name][0])) is GLUE[name]


def test_a_file_of_ones_own(tmp_path):
    rows = [("id", "label", "sentence"), ("a", "10", "x"), ("b", "9", "y"), ("c", "10", "z")]
    form = glue_format("auto", write(tmp_path / "own.tsv", *rows))
    assert (form.texts, form.labels, form.regression) == (("sentence",), ("9", "10"), False)
    assert read_glue(tmp_path / "own.tsv", form).labels == [1.0, 0.0, 1.0]
    scores = write(tmp_path / "scores.tsv", ("score", "sentence"), ("-1.5", "x"), ("2e1", "y"))
    form = glue_format("auto", scores)
    assert form.regression and form.texts == ("sentence",) and form.metric == "pearson_spearman"
    assert read_glue(scores, form).labels == [-1.5, 20.0]


def test_windows_line_ends_a_byte_order_mark_and_blank_lines(tmp_path):
    path = tmp_path / "train.tsv"
    path.write_bytes(b"\xef\xbb\xbfsentence\tlabel\r\n\r\nfine\t1\r\nbad\t0\r\n")
    found = read_glue(path, glue_format("auto", path))
    assert found.first == ["fine", "bad"] and found.labels == [1.0, 0.0]


def test_a_test_file_has_no_labels(tmp_path):
    path = write(tmp_path / "test.tsv", ("index", "sentence"), ("0", "x"), ("1", "y"))
    for name in ("sst2", "cola"):
        assert read_glue(path, GLUE[name], labelled=False).labels is None
    with pytest.raises(UserError, match=r"test.tsv: has no column 'label'"):
        read_glue(path, GLUE["sst2"])


def test_malformed_rows_are_skipped_counted_and_named(tmp_path):
    good = [(f"sentence {number}", str(number % 2)) for number in range(96)]
    spoiled = [("no label",), ("", "1"), ("what", "2"), ("spaces", " ")]
    path = write(tmp_path / "train.tsv", ("sentence", "label"), *good[:5], *spoiled, *good[5:])
    bad = BadData(share=0.05)
    found = read_glue(path, GLUE["sst2"], bad=bad)
    assert len(found.first) == 96 and bad.counts() == {"train.tsv/row": 4}
    # A submission counts the file's own rows.
    assert found.rows == [*range(5), *range(9, 100)]
    named = next(iter(bad.state_dict().values()))
    assert {name.rpartition(": ")[2]: reason for name, reason in named.items()} == {
        "line 7": "1 fields where at least 2 are needed",
        "line 8": "an empty sentence",
        "line 9": "label '2' is none of 0, 1",
        "line 10": "label '' is none of 0, 1",
    }
    with pytest.raises(UserError, match=r"train.tsv: line 8: an empty sentence; 2 of 100 .* max_bad_share"):
        read_glue(path, GLUE["sst2"], bad=BadData(share=0.01))


@pytest.mark.parametrize("word", ["high", "nan", "inf", ""])
def test_scores_are_finite_numbers(tmp_path, word):
    rows = [(f"{number}", "a", "b", "1.0") for number in range(9)]
    path = write(tmp_path / "dev.tsv", ("index", "sentence1", "sentence2", "score"), *rows, ("9", "a", "b", word))
    bad = BadData(share=0.1)
    assert len(read_glue(path, GLUE["stsb"], bad=bad).labels) == 9 and bad.total == 1


def test_labels_of_another_data_set_stop_the_run(tmp_path):
    path = write(tmp_path / "dev.tsv", ("sentence", "label"), ("x", "positive"), ("y", "negative"))
    with pytest.raises(UserError, match=r"label 'positive' is none of 0, 1"):
        read_glue(path, GLUE["sst2"])


@pytest.mark.parametrize(
    ("name", "rows", "words"),
    [
        ("auto", [("text", "class"), ("x", "1")], ["header (text, class)", "sentence"]),
        ("auto", [("sentence",), ("x",)], ["header (sentence)", "label"]),
        ("auto", [("sentence", "label"), ("x", "1"), ("y", "1")], ["labels has 1 different"]),
        ("auto", [("sentence", "label"), *[(f"{n}", f"{n}") for n in range(1001)]], ["1001 different", "1000"]),
        ("mnli", [("sentence", "label"), ("x", "1")], ["no column 'sentence1'", "mnli"]),
        ("sst2", [("sentence", "label")], ["no row"]),
        ("glue", [("sentence", "label"), ("x", "1")], ["'glue'", "sst2", "cola"]),
    ],
)
def test_files_that_do_not_fit(tmp_path, name, rows, words):
    path = write(tmp_path / "train.tsv", *rows)
    with pytest.raises(UserError) as error:
        read_glue(path, glue_format(name, path))
    for word in words:
        assert word in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_and_an_empty_file(tmp_path):
    (tmp_path / "empty.tsv").write_text("\n")
    for name, words in (("none.tsv", "no such file"), ("empty.tsv", "is empty")):
        with pytest.raises(UserError, match=f"{name}: {words}"):
            glue_format("auto", tmp_path / name)


def test_sst2(reference):
    path = reference / "data/sst2/dev.tsv"
    form = glue_format("auto", path)
    bad = BadData()
    found = read_glue(path, form, bad=bad)
    assert form == GlueFormat("auto", ("sentence",), "label", ("0", "1"))
    assert (len(found.first), bad.total, found.second) == (6735, 0, None)
    assert found.first[:2] == ["the expressive power of the camera", "well-conceived"]
    assert found.labels[:4] == [1.0, 1.0, 0.0, 0.0]
