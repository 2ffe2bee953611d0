"""Caption metrics by pycocoevalcap, and a file that captions stream into.

BLEU-4, CIDEr (CIDEr-D, as the field reports it) and ROUGE-L always; METEOR and SPICE where Java and their files are
there. Texts are tokenized by Stanford's PTB tokenizer, which needs Java; without it by a simple one of our own, whose
numbers cannot be compared with published ones, so that the result names the tokenizer.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import TracebackType
from typing import Any, Literal

from vlblocks.errors import UserError

__all__ = ["CaptionFile", "caption_metrics", "check_caption_metrics", "ptb_tokens", "simple_tokens"]

Id = int | str
_SPICE_FILES = ("stanford-corenlp-3.6.0.jar", "stanford-corenlp-3.6.0-models.jar")
_WORD = re.compile("\\w+(?:['\u2019]\\w+)*")


def check_caption_metrics() -> None:
    """Raises UserError unless pycocoevalcap is installed."""
    if find_spec("pycocoevalcap") is None:
        raise UserError("caption metrics need pycocoevalcap: pip install 'vlblocks[tasks]'")


def caption_metrics(
    found: Mapping[Id, str],
    references: Mapping[Id, Sequence[str]],
    *,
    tokenizer: Literal["auto", "ptb", "simple"] = "auto",
    slow: bool = True,
) -> dict[str, float | str]:
    """How captions agree with those that people wrote.

    Args:
        found: a caption for each image.
        references: for the same images, what was written.
        tokenizer: "ptb" (needs Java), "simple" (`simple_tokens`), or "auto": the first if it can be had.
        slow: METEOR and SPICE too, which take Java some seconds to minutes.

    Returns:
        bleu_4, rouge_l, meteor, spice in [0, 1]; cider, which is not a share (papers report 100 times each). A metric
        that could not be had is not there, and "absent" says why. "tokenizer" is "ptb" or "simple".

    Raises:
        UserError: pycocoevalcap is missing, the images differ or one has no reference, or "ptb" cannot be had.
    """
    check_caption_metrics()
    if found.keys() != references.keys() or not found:
        odd = next(iter(found.keys() ^ references.keys()), None)
        raise UserError(f"captions and references are of other images ({odd!r} is in one only): give both for each")
    bare = next((image for image, texts in references.items() if not texts), None)
    if bare is not None:
        raise UserError(f"references: image {bare!r} has none: leave it out")
    images = list(found)
    texts = [found[image] for image in images] + [text for image in images for text in references[image]]
    lacking = _lacking_java() if tokenizer != "simple" else None
    if lacking is not None and tokenizer == "ptb":
        raise UserError(f"tokenizer 'ptb' {lacking}: choose 'auto' or 'simple'")
    used = "simple" if tokenizer == "simple" or lacking else "ptb"
    tokens = iter(ptb_tokens(texts) if used == "ptb" else [simple_tokens(text) for text in texts])
    results = {image: [" ".join(next(tokens))] for image in images}
    wanted = {image: [" ".join(next(tokens)) for _ in references[image]] for image in images}

    from pycocoevalcap.bleu.bleu import Bleu
    from pycocoevalcap.cider.cider import Cider
    from pycocoevalcap.rouge.rouge import Rouge

    metrics: dict[str, float | str] = {
        "bleu_4": float(Bleu(4).compute_score(wanted, results, verbose=0)[0][3]),
        "cider": float(Cider().compute_score(wanted, results)[0]),
        "rouge_l": float(Rouge().compute_score(wanted, results)[0]),
    }
    if slow:
        absent = []
        for name, measure in (("meteor", _meteor), ("spice", _spice)):
            value = measure(wanted, results)
            if isinstance(value, str):
                absent.append(f"{name}: {value}")
            else:
                metrics[name] = value
        if absent:
            metrics["absent"] = "; ".join(absent)
    return {**metrics, "tokenizer": used}


def simple_tokens(text: str) -> list[str]:
    """Words in lower case, without punctuation; an apostrophe inside a word stays."""
    return _WORD.findall(text.lower())


def ptb_tokens(texts: Sequence[str]) -> list[list[str]]:
    """Tokens by Stanford's PTB tokenizer in lower case, without punctuation, as COCO's evaluation has them.

    Raises:
        UserError: it cannot be run.
    """
    lacking = _lacking_java()
    if lacking is not None:
        raise UserError(f"the PTB tokenizer {lacking}: use the simple one")
    from pycocoevalcap.tokenizer import ptbtokenizer

    # One line a text, whatever white space it holds. Not by their class, which writes into the package's folder.
    lines = "".join(" ".join(text.split()) + "\n" for text in texts)
    jar = Path(ptbtokenizer.__file__).parent / ptbtokenizer.STANFORD_CORENLP_3_4_1_JAR
    command = ["java", "-Dfile.encoding=UTF-8", "-cp", str(jar), "edu.stanford.nlp.process.PTBTokenizer"]
    options = ["-preserveLines", "-lowerCase", "-encoding", "UTF-8"]
    ran = subprocess.run([*command, *options], input=lines.encode(), capture_output=True, check=False)
    found = ran.stdout.decode().split("\n")[: len(texts)]
    if ran.returncode or len(found) != len(texts):
        said = (ran.stderr.decode(errors="replace").strip().splitlines() or ["no message"])[0]
        raise UserError(f"java: the PTB tokenizer failed ({said}): repair Java, or use the simple tokenizer")
    dropped = set(ptbtokenizer.PUNCTUATIONS)
    return [[word for word in line.split() if word not in dropped] for line in found]


def _lacking_java() -> str | None:
    return None if shutil.which("java") else "needs Java, and there is no `java` on the path"


def _meteor(wanted: dict[Id, list[str]], results: dict[Id, list[str]]) -> float | str:
    """The score, or why there is none."""
    if lacking := _lacking_java():
        return lacking
    from pycocoevalcap.meteor.meteor import Meteor

    measure = Meteor()
    try:
        return float(measure.compute_score(wanted, results)[0])
    except (OSError, ValueError) as error:
        # Left locked, it would wait for itself for ever when it is deleted.
        measure.lock.release()
        with suppress(OSError):
            measure.meteor_p.stdin.close()
        return f"its Java program failed ({error})"


def _spice(wanted: dict[Id, list[str]], results: dict[Id, list[str]]) -> float | str:
    """The score, or why there is none."""
    if lacking := _lacking_java():
        return lacking
    from pycocoevalcap.spice import spice

    # Making a Spice without exactly these would download half a gigabyte unasked.
    folder = Path(spice.__file__).parent / "lib"
    if not all((folder / name).is_file() for name in _SPICE_FILES):
        return f"needs {' and '.join(_SPICE_FILES)} in {folder}; pycocoevalcap.spice.get_stanford_models downloads them"
    try:
        with _stdout_to_stderr():
            return float(spice.Spice().compute_score(wanted, results)[0])
    except (OSError, ValueError, subprocess.CalledProcessError) as error:
        return f"its Java program failed ({error})"


@contextmanager
def _stdout_to_stderr() -> Iterator[None]:
    """What child processes print goes to stderr, for stdout may be a program's own JSON."""
    sys.stdout.flush()
    kept = os.dup(1)
    os.dup2(2, 1)
    try:
        yield
    finally:
        sys.stdout.flush()
        os.dup2(kept, 1)
        os.close(kept)


class CaptionFile:
    """Captions as they come: lines beside the file while it is written, then a JSON list in one step.

    The list is COCO's result format, [{"image_id": ..., "caption": ...}, ...]. Until then `NAME.json.part` holds a line
    for each caption, after one that says what they are of; killed at any time, the next run takes up its whole lines.

    Args:
        path: the JSON file.
        of: what decides the captions (weights, settings, data), for JSON; lines of something else are begun anew.

    Attributes:
        captions: by image id, in the order in which they came.
    """

    def __init__(self, path: str | os.PathLike[str], of: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.part = self.path.with_name(f"{self.path.name}.part")
        self.captions: dict[Id, str] = {}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        head = json.dumps({"of": of}, sort_keys=True) + "\n"
        kept = self._take_up(head)
        with open(self.part, "rb+" if kept else "wb") as file:
            file.truncate(kept)
        self._file = open(self.part, "a", encoding="utf-8")  # noqa: SIM115  (closed by __exit__)
        if not kept:
            self._file.write(head)
            self._file.flush()

    def __enter__(self) -> CaptionFile:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._file.close()
        if kind is None:
            self._finish()

    def add(self, captions: Mapping[Id, str]) -> None:
        """Write some more."""
        self._file.writelines(_line(image, caption) for image, caption in captions.items())
        self._file.flush()
        self.captions.update(captions)

    def _take_up(self, head: str) -> int:
        """Read what an earlier run left; returns how many bytes of it to keep."""
        if not self.part.is_file():
            return 0
        lines = self.part.read_bytes().splitlines(keepends=True)
        if not lines or lines[0] != head.encode():
            return 0
        kept = len(lines[0])
        for line in lines[1:]:
            try:
                entry = json.loads(line)
                self.captions[entry["image_id"]] = entry["caption"]
            except (ValueError, KeyError, TypeError):
                break
            if not line.endswith(b"\n"):
                del self.captions[entry["image_id"]]
                break
            kept += len(line)
        return kept

    def _finish(self) -> None:
        rows = ",\n".join(_line(image, caption).rstrip("\n") for image, caption in self.captions.items())
        scratch = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        with open(scratch, "w", encoding="utf-8") as file:
            file.write(f"[\n{rows}\n]\n" if rows else "[]\n")
            file.flush()
            os.fsync(file.fileno())
        os.replace(scratch, self.path)
        self.part.unlink()


def _line(image: Id, caption: str) -> str:
    return json.dumps({"image_id": image, "caption": caption}, ensure_ascii=False) + "\n"
