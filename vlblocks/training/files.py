"""Files that are either whole or absent: JSON and safetensors written beside their place, then renamed into it."""

import errno
import json
import math
import os
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from vlblocks.errors import UserError

__all__ = [
    "disk_full_as_user_error",
    "is_disk_full",
    "json_text",
    "read_json",
    "read_tensors",
    "sync_file",
    "sync_folder",
    "write_atomic",
    "write_json_atomic",
    "write_tensors",
    "write_tensors_atomic",
]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_PICKLE_SUFFIXES = {".pt", ".pth", ".bin", ".ckpt", ".pkl", ".pickle"}


def is_disk_full(error: BaseException) -> bool:
    """True when `error` says that the disk, or the user's share of it, is used up."""
    if isinstance(error, OSError):
        return error.errno in _FULL
    # The Rust writer reports the system's error only as text.
    return isinstance(error, SafetensorError) and any(f"(os error {code})" in str(error) for code in _FULL)


@contextmanager
def disk_full_as_user_error(path: Path, kept: str = "nothing that was there before is lost") -> Iterator[None]:
    """Turn a full disk into a UserError that names `path` and says what is `kept`."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        if not is_disk_full(error):
            raise
        raise UserError(f"{path}: the disk is full: free some space or choose another folder ({kept})") from error


def sync_folder(folder: Path) -> None:
    """Make renames and new names inside `folder` survive a power cut."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as error:
        # Some network file systems cannot sync a folder; the rename itself is still atomic there.
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EBADF):
            raise
    finally:
        os.close(handle)


def sync_file(path: Path) -> None:
    """Make a file's content survive a power cut."""
    with open(path, "rb+") as file:
        os.fsync(file.fileno())


def write_atomic(path: str | os.PathLike[str], write: Callable[[Path], object]) -> None:
    """Let `write` fill a temporary file in `path`'s folder, then put it in `path`'s place in one step.

    Raises: UserError when the disk is full; `path` then holds what it held before.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with disk_full_as_user_error(path):
        # The suffix stays, since writers such as matplotlib choose their format by it.
        temporary = path.parent / f".{path.stem}-{os.getpid()}-{uuid.uuid4().hex[:8]}{path.suffix}"
        try:
            write(temporary)
            sync_file(temporary)
            os.replace(temporary, path)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise
        sync_folder(path.parent)


def _finite(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None
    if isinstance(value, Mapping):
        return {str(key): _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return value


def json_text(data: Any, *, indent: int | None = 2) -> str:
    """`data` as strict JSON; a number that is not finite becomes null, since JSON has no word for it."""
    return json.dumps(_finite(data), indent=indent, ensure_ascii=False, allow_nan=False)


def write_json_atomic(path: str | os.PathLike[str], data: Any, *, indent: int | None = 2) -> None:
    """Write what `json_text` makes of `data`."""
    text = json_text(data, indent=indent) + "\n"
    write_atomic(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def read_json(path: str | os.PathLike[str]) -> Any:
    """The content of a JSON file.

    Raises: UserError naming the file when it is missing, is a folder or holds no JSON.
    """
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path}: no such file: check the path") from None
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder: name a JSON file") from None
    except UnicodeDecodeError:
        raise UserError(f"{path}: not text, so not JSON: check the path") from None
    except json.JSONDecodeError as error:
        raise UserError(f"{path}: not valid JSON (line {error.lineno}: {error.msg}): repair or replace it") from None


def write_tensors(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None) -> None:
    """Write `tensors` as safetensors and sync the file; not atomic, for use inside a temporary place.

    Tensors that share memory are written under each of their names, so that any reader finds every key.
    """
    flat: dict[str, Tensor] = {}
    seen: set[int] = set()
    for name, tensor in tensors.items():
        tensor = tensor.detach()
        storage = tensor.untyped_storage().data_ptr()
        flat[name] = tensor.clone(memory_format=torch.contiguous_format) if storage in seen else tensor.contiguous()
        if storage != 0:
            seen.add(storage)
    save_file(flat, str(path), metadata=dict(metadata) if metadata else None)
    sync_file(path)


def write_tensors_atomic(
    path: str | os.PathLike[str], tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write named tensors as one safetensors file.

    Raises: UserError when the disk is full; `path` then holds what it held before.
    """
    write_atomic(path, lambda temporary: write_tensors(temporary, tensors, metadata))


def _is_pickle(path: Path) -> bool:
    with open(path, "rb") as file:
        start = file.read(4)
    zipped = start == b"PK\x03\x04"
    protocol = len(start) >= 2 and start[0] == 0x80 and 1 <= start[1] <= 5
    return zipped or protocol or path.suffix.lower() in _PICKLE_SUFFIXES


def _cut_short(path: Path) -> str | None:
    """How many bytes of how many a safetensors file holds, when its header promises more than there are."""
    size = path.stat().st_size
    with open(path, "rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > 100_000_000:
            return None
        try:
            header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, IndexError, AttributeError):
            return f"{size} bytes" if 8 + length > size else None
    whole = 8 + length + max(ends, default=0)
    return f"{size} of {whole} bytes" if size < whole else None


def read_tensors(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> dict[str, Tensor]:
    """The named tensors of a safetensors file.

    Raises: UserError naming the file when it is missing, a folder, a pickle, cut short or no safetensors file.
    """
    path = Path(path)
    if path.is_dir():
        raise UserError(f"{path}: is a folder: name the .safetensors file in it")
    if not path.is_file():
        raise UserError(f"{path}: no such file: check the path")
    try:
        with safe_open(str(path), framework="pt", device=str(device)) as file:
            return {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a dict)
    except SafetensorError as error:
        if _is_pickle(path):
            raise UserError(
                f"{path}: a pickle, not safetensors, and a pickle can run code: convert it once, where you trust it, "
                "with safetensors.torch.save_file(torch.load(FILE, weights_only=True), 'model.safetensors')"
            ) from None
        found = _cut_short(path)
        if found is not None:
            raise UserError(f"{path}: cut short ({found}): copy it again or use an older one") from None
        raise UserError(f"{path}: not a safetensors file ({error}): check the path") from None
