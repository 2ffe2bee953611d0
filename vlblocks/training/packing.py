"""Nested Python state as JSON plus named tensors, and back without loss: what a pickle would be used for."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["pack", "unpack"]


def pack(tree: Any, prefix: str) -> tuple[Any, dict[str, Tensor]]:
    """Split `tree` into a JSON-able part and its tensors, named by their path under `prefix`.

    Dicts with any plain keys, lists, tuples, tensors, strings, booleans, integers, floats (also not finite)
    and None come back from `unpack` as they were.

    Raises: TypeError naming the path of a value of any other type.
    """
    tensors: dict[str, Tensor] = {}
    return _pack(tree, prefix, tensors), tensors


def _pack(value: Any, path: str, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, Tensor):
        tensors[path] = value
        return {"$tensor": path}
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return {"$float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    if isinstance(value, Mapping):
        packed = {key: _pack(item, f"{path}.{key}", tensors) for key, item in value.items()}
        # A key that JSON would turn into a string, or take for one of our marks, goes into a list of pairs.
        if all(type(key) is str and not key.startswith("$") for key in packed):
            return packed
        for key in packed:
            if key is not None and type(key) not in (bool, int, float, str):
                raise TypeError(f"{path}: a key of type {type(key).__name__} cannot be stored")
        return {"$items": [[key, item] for key, item in packed.items()]}
    if isinstance(value, (list, tuple)):
        items = [_pack(item, f"{path}.{index}", tensors) for index, item in enumerate(value)]
        return {"$tuple": items} if isinstance(value, tuple) else items
    raise TypeError(f"{path}: a {type(value).__name__} cannot be stored")


def unpack(packed: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The tree that `pack` split into `packed` and `tensors`.

    Raises: KeyError when a tensor is missing.
    """
    if isinstance(packed, list):
        return [unpack(item, tensors) for item in packed]
    if not isinstance(packed, dict):
        return packed
    if len(packed) == 1:
        mark, content = next(iter(packed.items()))
        if mark == "$tensor":
            return tensors[content]
        if mark == "$float":
            return float(content)
        if mark == "$tuple":
            return tuple(unpack(item, tensors) for item in content)
        if mark == "$items":
            return {key: unpack(item, tensors) for key, item in content}
    return {key: unpack(item, tensors) for key, item in packed.items()}
