"""Byte-level BPE with RoBERTa's layout of special ids, by the `tokenizers` package."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, decoders, models, normalizers, pre_tokenizers, processors, trainers
from tokenizers import Tokenizer as Backend

from vlblocks.errors import UserError

CLS_ID, PAD_ID, SEP_ID, UNK_ID = 0, 1, 2, 3

# What the field calls ids 0, 1, 2, 3 and the last one; the first name is ours.
_SPECIAL_NAMES = (("<s>", "[CLS]"), ("<pad>", "[PAD]"), ("</s>", "[SEP]"), ("<unk>", "[UNK]"), ("<mask>", "[MASK]"))
_OUR_NAMES = tuple(names[0] for names in _SPECIAL_NAMES)
_WORD_OPENERS = ("\u0120", "\u010a", "\u0109", "\u010d")  # how byte-level BPE writes space, newline, tab, return


class Tokenizer:
    """Text to ids and back: CLS 0, pad 1, SEP 2, unk 3, mask last. Text never yields a special id ("<mask>" is text).

    Made by :func:`train_tokenizer`, :func:`load_roberta_bpe`, :func:`load_hf_bpe` or :meth:`Tokenizer.load`.

    Args:
        backend: a byte-level BPE of the `tokenizers` package whose special ids are laid out so.
        origin: the file to name in errors.

    Raises:
        UserError: the ids are laid out otherwise, or this is no byte-level BPE.
    """

    cls_id, pad_id, sep_id, unk_id = CLS_ID, PAD_ID, SEP_ID, UNK_ID

    def __init__(self, backend: Backend, *, origin: str = "tokenizer") -> None:
        self.vocab_size: int = backend.get_vocab_size(with_added_tokens=True)
        self.mask_id: int = self.vocab_size - 1
        names = [backend.id_to_token(i) or "" for i in range(self.vocab_size)]
        for index, wanted in zip((CLS_ID, PAD_ID, SEP_ID, UNK_ID, self.mask_id), _SPECIAL_NAMES, strict=True):
            if not 0 <= index < len(names) or names[index] not in wanted:
                raise UserError(
                    f"{origin}: id {index} must be {' or '.join(wanted)}; use a tokenizer in RoBERTa's layout "
                    "(<s> 0, <pad> 1, </s> 2, <unk> 3, <mask> last) or train one"
                )
        if "" in names:
            raise UserError(f"{origin}: no token has id {names.index('')}; use a vocabulary without gaps")
        opens = np.array([name.startswith(_WORD_OPENERS) for name in names], dtype=bool)
        if not opens.any():
            raise UserError(f"{origin} is not a byte-level BPE; use GPT-2's or RoBERTa's files or train one")
        self._special = np.zeros(len(names), dtype=bool)
        self._special[[CLS_ID, PAD_ID, SEP_ID, UNK_ID, self.mask_id]] = True
        self._opens_word = opens
        self._backend = _with_specials_as_text(backend)

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_backend": self._backend.to_str()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._backend = _with_specials_as_text(Backend.from_str(state["_backend"]))

    def __len__(self) -> int:
        return self.vocab_size

    @property
    def special_ids(self) -> tuple[int, ...]:
        """CLS, pad, SEP, unk, mask."""
        return (CLS_ID, PAD_ID, SEP_ID, UNK_ID, self.mask_id)

    def encode(self, text: str, max_length: int | None = None) -> list[int]:
        """Ids of one text as CLS ... SEP, cut at its end to `max_length` ids in all."""
        return _framed(self._backend.encode(text, add_special_tokens=False).ids, max_length)

    def encode_batch(self, texts: Sequence[str], max_length: int | None = None) -> list[list[int]]:
        """:meth:`encode` of many texts at once, on all cores."""
        found = self._backend.encode_batch(list(texts), add_special_tokens=False)
        return [_framed(item.ids, max_length) for item in found]

    def tokens(self, ids: Iterable[int]) -> list[str]:
        """The vocabulary's spelling of each id, for reading."""
        return [self._backend.id_to_token(int(i)) or "" for i in ids]

    def decode(self, ids: Iterable[int]) -> str:
        """The text of ids, without the special ones; with `add_prefix_space`, without one leading space either."""
        kept = [int(i) for i in ids if not self._special[int(i)]]
        text = self._backend.decode(kept, skip_special_tokens=False)
        added_space = getattr(self._backend.pre_tokenizer, "add_prefix_space", False)
        return text[1:] if added_space and text.startswith(" ") else text

    def word_starts(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
        """Which tokens begin a word: [T] ids to [T] bool. Words are parted by white space, as in RoBERTa's masking.

        A special token is a word of its own, and so the token after it begins one.
        """
        array = np.asarray(ids, dtype=np.int64)
        special = self._special[array]
        starts = self._opens_word[array] | special
        starts[:1] = True
        starts[1:] |= special[:-1]
        return starts

    def save(self, path: str | Path) -> None:
        """Write a `tokenizer.json` that any user of `tokenizers` reads; the file appears whole or not at all.

        Raises:
            UserError: it cannot be written.
        """
        path = Path(path)
        scratch = path.with_name(f".{path.name}.{os.getpid()}")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            with open(scratch, "w", encoding="utf-8") as file:
                file.write(self._backend.to_str(pretty=True))
                file.flush()
                os.fsync(file.fileno())
            os.replace(scratch, path)
        except OSError as error:
            scratch.unlink(missing_ok=True)
            raise UserError(
                f"{path}: cannot be written ({error.strerror}); free space or choose another folder"
            ) from None

    @classmethod
    def load(cls, path: str | Path) -> Tokenizer:
        """Read a `tokenizer.json` (or the folder it lies in), ours or another project's in RoBERTa's layout.

        Raises:
            UserError: it is missing, is no tokenizer, or has another layout.
        """
        path = Path(path)
        path = path / "tokenizer.json" if path.is_dir() else path
        text = _read_text(path)
        try:
            backend = Backend.from_str(text)
        except Exception as error:  # `tokenizers` raises bare Exception
            raise UserError(
                f"{path}: is not a tokenizer.json ({_first_line(error)}); pass a file `save` wrote"
            ) from None
        backend.no_truncation()
        backend.no_padding()
        return cls(backend, origin=str(path))


def train_tokenizer(
    texts: Iterable[str], vocab_size: int, *, lowercase: bool = False, add_prefix_space: bool = True
) -> Tokenizer:
    """Train a byte-level BPE (Sennrich et al. 2016, Radford et al. 2019) of at most `vocab_size` ids.

    Args:
        lowercase: fold case in training and ever after; kept in the saved file.
        add_prefix_space: give a text's first word the ids it has elsewhere; kept in the saved file.

    Raises:
        UserError: `vocab_size` does not hold the 256 bytes and 5 special ids, or there is no text.
    """
    smallest = 256 + len(_OUR_NAMES)
    if vocab_size < smallest:
        raise UserError(f"vocab_size {vocab_size} is too small for 256 bytes and 5 special ids; use {smallest} or more")
    learner = Backend(models.BPE())
    if lowercase:
        learner.normalizer = normalizers.Lowercase()
    learner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(_OUR_NAMES),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    seen = False

    def some_text() -> Iterable[str]:
        nonlocal seen
        for text in texts:
            seen = seen or bool(text.strip())
            yield text

    learner.train_from_iterator(some_text(), trainer)
    if not seen:
        raise UserError("texts to train a tokenizer on are empty; pass at least one sentence")
    model = json.loads(learner.to_str())["model"]
    # Strings in old versions of `tokenizers`, pairs in new ones.
    pairs = [pair.split(" ") if isinstance(pair, str) else pair for pair in model["merges"]]
    words = sorted(model["vocab"], key=model["vocab"].__getitem__)
    vocab = {word: index for index, word in enumerate((*_OUR_NAMES[:4], *words, _OUR_NAMES[4]))}
    return _assemble(
        vocab, [(a, b) for a, b in pairs], lowercase=lowercase, add_prefix_space=add_prefix_space, origin="tokenizer"
    )


def load_roberta_bpe(folder: str | Path) -> Tokenizer:
    """GPT-2's BPE under RoBERTa's ids, case kept: `encoder.json`, `vocab.bpe`, `dict.txt` in `folder`.

    `dict.txt` lists GPT-2 ids (a count may follow each); a token's id is its line's number, from 0. Where it does not
    list the special tokens itself, as in fairseq's release, they stand before and after its lines.

    Raises:
        UserError: a file is missing, empty or does not match the others.
    """
    folder = Path(folder)
    encoder = _read_json_vocab(folder / "encoder.json")
    merges = _read_merges(folder / "vocab.bpe")
    path = folder / "dict.txt"
    entries = [line.split()[0] for line in _read_text(path).splitlines() if line.strip()]
    if not entries:
        raise UserError(f"{path}: is empty; download it again")
    if entries[0] not in _SPECIAL_NAMES[0]:
        entries = [*_OUR_NAMES[:4], *entries]
    if entries[-1] not in _SPECIAL_NAMES[4]:
        entries = [*entries, _OUR_NAMES[4]]
    spelling = {str(index): token for token, index in encoder.items()}
    unknown = [entry for entry in entries if entry.isdigit() and entry not in spelling]
    if unknown:
        raise UserError(f"{path}: GPT-2 id {unknown[0]} is not in encoder.json; take all three files from one release")
    absent = spelling.keys() - set(entries)
    if absent:
        raise UserError(f"{path}: lacks GPT-2 id {min(absent, key=int)}; take all three files from one release")
    vocab = {spelling.get(entry, entry): index for index, entry in enumerate(entries)}
    if len(vocab) != len(entries):
        raise UserError(f"{path}: lists an id twice; download it again")
    return _assemble(vocab, merges, lowercase=False, add_prefix_space=False, origin=str(path))


def load_hf_bpe(folder: str | Path) -> Tokenizer:
    """A RoBERTa tokenizer in the Hugging Face layout: `vocab.json` and `merges.txt` in `folder`, case kept.

    Raises:
        UserError: a file is missing, or the special ids are not RoBERTa's (GPT-2's own files have none).
    """
    folder = Path(folder)
    vocab = _read_json_vocab(folder / "vocab.json")
    merges = _read_merges(folder / "merges.txt")
    return _assemble(vocab, merges, lowercase=False, add_prefix_space=False, origin=str(folder / "vocab.json"))


def _assemble(
    vocab: Mapping[str, int],
    merges: Sequence[tuple[str, str]],
    *,
    lowercase: bool,
    add_prefix_space: bool,
    origin: str,
) -> Tokenizer:
    try:
        backend = Backend(models.BPE(vocab=dict(vocab), merges=list(merges)))
    except Exception as error:  # `tokenizers` raises bare Exception
        raise UserError(
            f"{origin}: its merges do not match ({_first_line(error)}); take both from one release"
        ) from None
    if lowercase:
        backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=add_prefix_space)
    backend.decoder = decoders.ByteLevel()
    names = [next((name for name in options if name in vocab), None) for options in _SPECIAL_NAMES]
    cls, _, sep, _, _ = names
    if cls is not None and sep is not None:
        backend.add_special_tokens([AddedToken(n, special=True, normalized=False) for n in names if n is not None])
        backend.post_processor = processors.TemplateProcessing(
            single=f"{cls} $A {sep}",
            pair=f"{cls} $A {sep} {sep} $B {sep}",
            special_tokens=[(cls, vocab[cls]), (sep, vocab[sep])],
        )
    return Tokenizer(backend, origin=origin)


def _with_specials_as_text(backend: Backend) -> Backend:
    # Neither saved nor pickled by `tokenizers`, hence set again on every start.
    backend.encode_special_tokens = True
    return backend


def _framed(ids: list[int], max_length: int | None) -> list[int]:
    if max_length is not None:
        if max_length < 2:
            raise UserError(f"max_length {max_length} leaves no room for <s> and </s>; use 2 or more")
        ids = ids[: max_length - 2]
    return [CLS_ID, *ids, SEP_ID]


def _read_text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file; check the path") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: is not UTF-8 text; download it again") from None
    except OSError as error:
        raise UserError(f"{path}: cannot be read ({error.strerror}); check the path and its permissions") from None


def _read_json_vocab(path: Path) -> dict[str, int]:
    try:
        vocab = json.loads(_read_text(path))
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: is not JSON ({_first_line(error)}); download it again") from None
    if not isinstance(vocab, dict) or not vocab or not all(isinstance(index, int) for index in vocab.values()):
        raise UserError(f"{path}: is not a mapping of tokens to ids; download it again")
    return vocab


def _read_merges(path: Path) -> list[tuple[str, str]]:
    lines = _read_text(path).split("\n")
    pairs = [line.split() for line in lines[int(lines[0].startswith("#version")) :] if line.strip()]
    if any(len(pair) != 2 for pair in pairs):
        raise UserError(f"{path}: a line does not hold two tokens; download it again")
    return [(first, second) for first, second in pairs]


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
