"""Pickled arrays and plain containers, without running what a pickle asks for.

A pickle is a program. Here it is never run: its instructions are followed on inert values; those that make arrays and
plain containers are known, and every other is refused by name. Nothing is imported for a pickle, and nothing allocated
that its file's length does not account for.
"""

from __future__ import annotations

import math
import mmap
import os
import pickletools
import struct
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from vlblocks.errors import UserError

__all__ = ["PickledArray", "read_pickled", "within_reach"]

# NumPy's names of what Paddle pickles. NumPy has no bfloat16: Paddle pickles its bits as unsigned numbers.
_ARRAY_TYPES = {
    "b1": torch.bool,
    "i1": torch.int8,
    "i2": torch.int16,
    "i4": torch.int32,
    "i8": torch.int64,
    "u1": torch.uint8,
    "u2": torch.bfloat16,
    "f2": torch.float16,
    "f4": torch.float32,
    "f8": torch.float64,
    "c8": torch.complex64,
    "c16": torch.complex128,
}
_MOST_DIMENSIONS = 16
_LONGEST_CODE = 7  # of a type
_DAMAGED = "copy it again or use an older one"


def read_pickled(path: str | os.PathLike[str]) -> Any:
    """What a pickle builds of dictionaries with keys of text, lists, tuples, text, numbers and `PickledArray`.

    Raises:
        UserError: the file is cut short, garbled or no pickle, or asks for anything else.
    """
    path = Path(path)
    if path.stat().st_size == 0:
        raise UserError(f"{path}: empty: {_DAMAGED}")
    with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        return _Machine(path, len(mapped)).run(mapped)


def within_reach(sizes: Iterable[int]) -> bool:
    """Whether a tensor can have these sizes: one without elements still has strides, which must not overflow."""
    return math.prod(size for size in sizes if size) < 1 << 56


class _Global(NamedTuple):
    """A name that the pickle mentions; nothing is imported for it."""

    module: str
    name: str


class _Type:
    """numpy.dtype, as far as it is known."""

    def __init__(self, code: str) -> None:
        self.order, self.code = (code[0], code[1:]) if code[:1] in "<>|=" else ("=", code)


class PickledArray:
    """A pickled array: without a tensor until the pickle has told its state."""

    tensor: Tensor | None = None


_ARRAYS = ("numpy.core.multiarray", "numpy._core.multiarray")
_NUMERIC = ("numpy.core.numeric", "numpy._core.numeric")
_BUILTINS = ("builtins", "__builtin__")
_MARK = object()


class _Machine:
    """Follows a pickle's instructions on a stack of inert values."""

    def __init__(self, path: Path, size: int) -> None:
        self.path, self.size = path, size
        self.stack: list[Any] = []
        self.memo: dict[int, Any] = {}
        self.array_bytes = self.encoded_bytes = 0

    def run(self, file: Any) -> Any:
        """What the pickle builds."""
        try:
            for opcode, argument, _ in pickletools.genops(file):
                if opcode.name == "STOP":
                    (found,) = self.stack
                    return found
                self.step(opcode.name, argument)
        except UserError:
            raise
        except (ValueError, IndexError, KeyError, TypeError, EOFError, OverflowError, struct.error) as error:
            reason = (str(error).splitlines() or [type(error).__name__])[0][:80]
            raise UserError(f"{self.path}: cut short, garbled or no pickle ({reason}): {_DAMAGED}") from None
        raise UserError(f"{self.path}: cut short: {_DAMAGED}")

    def step(self, name: str, argument: Any) -> None:
        if name in _IGNORED:
            return
        if name in _CONSTANTS:
            self.stack.append(_CONSTANTS[name]())
        elif name in _LITERALS:
            self.stack.append(argument)
        elif name in _ACTIONS:
            _ACTIONS[name](self, argument)
        else:
            raise self.refusal(f"the instruction {name}")

    def refusal(self, what: str) -> UserError:
        return UserError(
            f"{self.path}: this pickle asks for {what}, which weights have no need of, and was not run: "
            "take the file from where you trust it"
        )

    def since_mark(self) -> list[Any]:
        for place in range(len(self.stack) - 1, -1, -1):
            if self.stack[place] is _MARK:
                values = self.stack[place + 1 :]
                del self.stack[place:]
                return values
        raise ValueError("no mark on the stack")

    def several(self, count: int) -> None:
        values = [self.stack.pop() for _ in range(count)]
        self.stack.append(tuple(reversed(values)))

    def extend(self, values: list[Any]) -> None:
        self.container(list).extend(values)

    def update(self, values: list[Any]) -> None:
        into = self.container(dict)
        for key, value in zip(values[::2], values[1::2], strict=True):
            # Hashing tuples in tuples without end would overflow the stack.
            if not isinstance(key, str) or not key.isprintable():
                raise ValueError("a key that is no text")
            into[key] = value

    def dictionary(self) -> None:
        values = self.since_mark()
        self.stack.append({})
        self.update(values)

    def container(self, kind: type) -> Any:
        if not isinstance(self.stack[-1], kind):
            raise ValueError(f"no {kind.__name__} where one is needed")
        return self.stack[-1]

    def name(self, module: Any, name: Any) -> None:
        if not isinstance(module, str) or not isinstance(name, str):
            raise ValueError("a name that is no text")
        found = _Global(module, name)
        if found not in _KNOWN:
            raise self.refusal(f"{module}.{name}".encode("unicode_escape").decode()[:100])
        self.stack.append(found)

    def recall(self, place: Any) -> None:
        self.stack.append(self.memo[int(place)])

    def remember(self, place: Any = None) -> None:
        self.memo[len(self.memo) if place is None else int(place)] = self.stack[-1]

    def call(self) -> None:
        """What a known name makes of its arguments."""
        arguments, function = self.stack.pop(), self.stack.pop()
        if not isinstance(function, _Global) or not isinstance(arguments, tuple):
            raise self.refusal("a call of something else than a name")
        made = _KNOWN[function]
        if made is None:
            raise self.refusal(f"a call of {function.module}.{function.name}")
        self.stack.append(made(self, *arguments))

    def build(self) -> None:
        """Give the array or the type on the stack its state."""
        state, target = self.stack.pop(), self.stack[-1]
        if isinstance(target, _Type) and isinstance(state, tuple) and len(state) >= 5:
            if state[2:5] != (None, None, None):
                raise self.refusal("arrays of records")
            target.order = state[1]
        elif (
            isinstance(target, PickledArray)
            and target.tensor is None
            and isinstance(state, tuple)
            and len(state) in (4, 5)
        ):
            shape, kind, fortran, data = state[-4:]
            target.tensor = self.tensor(shape, kind, "F" if fortran else "C", data)
        else:
            raise self.refusal("an object with a state of its own")

    def tensor(self, shape: Any, kind: Any, order: str, data: Any) -> Tensor:
        if isinstance(data, str):
            data = data.encode("latin-1")  # a pickle of Python 2
        dtype = _ARRAY_TYPES.get(kind.code) if isinstance(kind, _Type) else None
        if dtype is None or not isinstance(data, (bytes, bytearray)):
            raise self.refusal(f"an array of {'objects' if isinstance(data, list) else 'an unknown type'}")
        sizes = tuple(shape) if isinstance(shape, tuple) else (shape,)
        if any(type(size) is not int or not 0 <= size < 1 << 63 for size in sizes) or len(sizes) > _MOST_DIMENSIONS:
            raise ValueError("an array without a shape")
        if not within_reach(sizes):
            raise ValueError("an array larger than any")
        if math.prod(sizes) * dtype.itemsize != len(data):
            raise ValueError(f"an array {list(sizes)} of {len(data)} bytes")
        self.array_bytes += len(data)
        if self.array_bytes > self.size:
            raise ValueError("arrays with more bytes than the file")
        if kind.order not in ("<", ">", "|", "="):
            raise ValueError("an array without a byte order")
        if not data:
            return torch.empty(sizes, dtype=dtype)
        written = np.frombuffer(data, dtype=np.dtype(kind.order + kind.code)).reshape(sizes, order=order)  # type: ignore[call-overload]
        array = np.array(written, dtype=written.dtype.newbyteorder("="), order="C")
        return torch.from_numpy(array.view(np.int16)).view(dtype) if kind.code == "u2" else torch.from_numpy(array)


def _blank_array(machine: _Machine, kind: Any, shape: Any, code: Any) -> PickledArray:
    # The state that follows says the shape; a large one here would only be memory.
    if kind != _Global("numpy", "ndarray") or shape != (0,):
        raise machine.refusal("an array of another class or with room of its own")
    return PickledArray()


def _from_buffer(machine: _Machine, data: Any, kind: Any, shape: Any, order: Any) -> PickledArray:
    array = PickledArray()
    array.tensor = machine.tensor(shape, kind, "F" if order == "F" else "C", data)
    return array


def _encode(machine: _Machine, text: Any, encoding: Any = "utf-8") -> bytes:
    if not isinstance(text, str) or encoding not in ("latin1", "latin-1"):
        raise machine.refusal("an unknown encoding")
    # One text, recalled again and again, would be as many copies.
    machine.encoded_bytes += len(text)
    if machine.encoded_bytes > machine.size:
        raise ValueError("more bytes than the file")
    return text.encode("latin-1")


def _type(machine: _Machine, code: Any, *rest: Any) -> _Type:
    # Anything may stand here, such as tuples in tuples, whose text would be without end.
    if not isinstance(code, str) or len(code) > _LONGEST_CODE:
        raise machine.refusal("an array of an unknown type")
    return _Type(code)


def _no_bytes(machine: _Machine) -> bytes:
    return b""


def _pair(machine: _Machine, values: Any) -> tuple:
    if not isinstance(values, tuple):
        raise machine.refusal("a tuple of something else")
    return values


# What a pickle may mention, and what a call of it makes; None: it may be mentioned, not called.
_KNOWN: Mapping[_Global, Callable[..., Any] | None] = {
    **{_Global(module, "_reconstruct"): _blank_array for module in _ARRAYS},
    **{_Global(module, "_frombuffer"): _from_buffer for module in _NUMERIC},
    **{_Global(module, "bytes"): _no_bytes for module in _BUILTINS},
    **{_Global(module, "tuple"): _pair for module in _BUILTINS},
    _Global("numpy", "ndarray"): None,
    _Global("numpy", "dtype"): _type,
    _Global("collections", "OrderedDict"): lambda machine: {},
    _Global("_codecs", "encode"): _encode,
}
_IGNORED = {"PROTO", "FRAME"}
_CONSTANTS: Mapping[str, Callable[[], Any]] = {
    "NONE": lambda: None,
    "NEWTRUE": lambda: True,
    "NEWFALSE": lambda: False,
    "EMPTY_DICT": dict,
    "EMPTY_LIST": list,
    "EMPTY_TUPLE": tuple,
    "MARK": lambda: _MARK,
}
_LITERALS = {
    *("INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT"),
    *("STRING", "BINSTRING", "SHORT_BINSTRING", "UNICODE", "SHORT_BINUNICODE", "BINUNICODE", "BINUNICODE8"),
    *("BINBYTES", "SHORT_BINBYTES", "BINBYTES8", "BYTEARRAY8"),
}
_ACTIONS: Mapping[str, Callable[[_Machine, Any], Any]] = {
    "POP": lambda machine, _: machine.stack.pop(),
    "POP_MARK": lambda machine, _: machine.since_mark(),
    "DUP": lambda machine, _: machine.stack.append(machine.stack[-1]),
    "TUPLE": lambda machine, _: machine.stack.append(tuple(machine.since_mark())),
    "TUPLE1": lambda machine, _: machine.several(1),
    "TUPLE2": lambda machine, _: machine.several(2),
    "TUPLE3": lambda machine, _: machine.several(3),
    "APPEND": lambda machine, _: machine.extend([machine.stack.pop()]),
    "APPENDS": lambda machine, _: machine.extend(machine.since_mark()),
    "SETITEM": lambda machine, _: machine.update([machine.stack.pop(-2), machine.stack.pop()]),
    "SETITEMS": lambda machine, _: machine.update(machine.since_mark()),
    "DICT": lambda machine, _: machine.dictionary(),
    "LIST": lambda machine, _: machine.stack.append(machine.since_mark()),
    "PUT": _Machine.remember,
    "BINPUT": _Machine.remember,
    "LONG_BINPUT": _Machine.remember,
    "MEMOIZE": lambda machine, _: machine.remember(),
    "GET": _Machine.recall,
    "BINGET": _Machine.recall,
    "LONG_BINGET": _Machine.recall,
    "GLOBAL": lambda machine, names: machine.name(*names.split(" ", 1)),
    "STACK_GLOBAL": lambda machine, _: machine.name(machine.stack.pop(-2), machine.stack.pop()),
    "REDUCE": lambda machine, _: machine.call(),
    "BUILD": lambda machine, _: machine.build(),
}
