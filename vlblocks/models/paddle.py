"""PaddlePaddle's weight files without PaddlePaddle: a binary file per parameter, and pickled dictionaries of arrays.

Sizes that a file claims are held against its length before anything is allocated, and pickled code is not run.
"""

from __future__ import annotations

import math
import os
import struct
from pathlib import Path

import torch
from torch import Tensor

from vlblocks.errors import UserError
from vlblocks.models.pickled import PickledArray, read_pickled, within_reach

__all__ = ["read_lod_tensor", "read_paddle", "read_parameter_folder", "read_pdparams"]

# VarType.Type of Paddle's framework.proto.
_TYPES = {
    0: torch.bool,
    1: torch.int16,
    2: torch.int32,
    3: torch.int64,
    4: torch.float16,
    5: torch.float32,
    6: torch.float64,
    19: torch.int64,  # size_t
    20: torch.uint8,
    21: torch.int8,
    22: torch.bfloat16,
    23: torch.complex64,
    24: torch.complex128,
}
_STRUCTURED_NAMES = "StructuredToParameterName@@"  # Paddle's own note beside the parameters
_MOST_DIMENSIONS = 16
_DAMAGED = "copy it again or use an older one"


def read_paddle(source: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by name, from a folder with a binary file per parameter or from a ``.pdparams`` file.

    Raises:
        UserError: it is neither, or damaged, or a pickle that does more than hold arrays; names the file.
    """
    path = Path(source)
    if path.is_dir():
        return read_parameter_folder(path)
    if not path.is_file():
        raise UserError(f"{path}: no such file or folder: check the path")
    if path.suffix != ".pdparams":
        raise UserError(
            f"{path}: not PaddlePaddle weights: give a folder with a file for each parameter, or a .pdparams file"
        )
    return read_pdparams(path)


def read_parameter_folder(folder: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by file name, from a folder that holds one binary file per parameter and nothing else; sorted.

    Raises:
        UserError: naming the entry that is no such file, or the folder that holds none.
    """
    folder = Path(folder)
    entries = sorted(entry for entry in folder.iterdir() if not entry.name.startswith("."))
    if not entries:
        raise UserError(f"{folder}: holds no files: give the folder with a file for each parameter")
    for entry in entries:
        if not entry.is_file():
            raise UserError(f"{entry}: not a parameter's file: give the folder that holds those alone")
    return {entry.name: read_lod_tensor(entry) for entry in entries}


def read_lod_tensor(path: str | os.PathLike[str]) -> Tensor:
    """The tensor of one binary file: version and level-of-detail header, a protobuf description, little-endian data.

    Raises:
        UserError: the file is not of that format, cut short, or longer than its tensor.
    """
    path = Path(path)
    content = _Bytes(path, path.read_bytes())
    if content.number("<I") != 0:
        raise content.foreign("its version is not 0")
    for _ in range(content.number("<Q")):
        content.take(content.number("<Q"))
    if content.number("<I") != 0:
        raise content.foreign("its tensor's version is not 0")
    described = content.number("<i")
    if described < 0:
        raise content.foreign("its description has a negative length")
    kind, shape = _describe(content, content.take(described))
    dtype = _TYPES.get(kind)
    if dtype is None:
        raise content.foreign(f"it has elements of the unknown type {kind}")
    needed, left = math.prod(shape) * dtype.itemsize, content.left
    if left < needed:
        raise UserError(f"{path}: cut short ({left} of {needed} bytes of a tensor {list(shape)}): {_DAMAGED}")
    if left > needed:
        raise UserError(
            f"{path}: {left - needed} bytes more than its tensor {list(shape)} has; if it joins several parameters, "
            "save them with a file for each"
        )
    if not within_reach(shape):
        raise content.foreign(f"no tensor can be of shape {list(shape)}")
    # A copy, since the file's data does not begin where its elements may.
    return (
        torch.frombuffer(bytearray(content.take(needed)), dtype=dtype).reshape(shape)
        if needed
        else torch.empty(shape, dtype=dtype)
    )


class _Bytes:
    """A file's content, taken from front to back."""

    def __init__(self, path: Path, data: bytes) -> None:
        self.path, self.data, self.place = path, data, 0

    @property
    def left(self) -> int:
        return len(self.data) - self.place

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise UserError(
                f"{self.path}: cut short ({len(self.data)} bytes, and its header asks for {count} at {self.place}), "
                f"or not a Paddle parameter: {_DAMAGED}"
            )
        self.place += count
        return self.data[self.place - count : self.place]

    def number(self, form: str) -> int:
        return struct.unpack(form, self.take(struct.calcsize(form)))[0]

    def foreign(self, reason: str) -> UserError:
        return UserError(f"{self.path}: not a Paddle parameter ({reason}): give files that Paddle saved one by one")


def _describe(content: _Bytes, message: bytes) -> tuple[int, tuple[int, ...]]:
    """Element type and shape of a protobuf TensorDesc: 1: type, 2: dimensions, packed or not."""
    kind: int | None = None
    shape: list[int] = []
    place = 0

    def varint() -> int:
        nonlocal place
        value = shift = 0
        while place < len(message) and shift < 70:
            byte = message[place]
            place, value, shift = place + 1, value | (byte & 0x7F) << shift, shift + 7
            if byte < 0x80:
                return value - (1 << 64) if value >> 63 else value
        raise content.foreign("its description is damaged")

    while place < len(message):
        tag = varint()
        if tag == 0x08:
            kind = varint()
        elif tag == 0x10:
            shape.append(varint())
        elif tag == 0x12:
            end = varint() + place
            if not place <= end <= len(message):
                raise content.foreign("its description is damaged")
            while place < end:
                shape.append(varint())
        else:
            raise content.foreign("its description has an unknown field")
    if kind is None or len(shape) > _MOST_DIMENSIONS or any(size < 0 for size in shape):
        raise content.foreign(f"it describes no tensor: type {kind}, shape {shape[: _MOST_DIMENSIONS + 1]}")
    return kind, tuple(shape)


def read_pdparams(path: str | os.PathLike[str]) -> dict[str, Tensor]:
    """Weights by name from a pickled dictionary of arrays, none of whose code is run.

    A value may also be a pair of the parameter's own name and its array; the dictionary's key counts. Paddle's note of
    structured names is left out.

    Raises:
        UserError: the file is no such dictionary, cut short, or asks for anything but arrays and plain containers.
    """
    path = Path(path)
    found = read_pickled(path)
    if not isinstance(found, dict):
        raise UserError(f"{path}: holds no dictionary of arrays: give what paddle.save made of a state dict")
    tensors: dict[str, Tensor] = {}
    for name, value in found.items():
        if name == _STRUCTURED_NAMES:
            continue
        if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
            value = value[1]
        if not isinstance(value, PickledArray) or value.tensor is None:
            raise UserError(f"{path}: {name} is no array: give what paddle.save made of a state dict")
        tensors[name] = value.tensor
    return tensors
