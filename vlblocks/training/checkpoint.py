"""Checkpoints of safetensors and JSON that are either whole or absent, whatever kills the process.

A checkpoint is a folder `step-00001200` (a second one of the same step: `step-00001200-1`) with
`model.safetensors`, `optimizer.safetensors`, `state.safetensors` and `state.json`. It is written under a temporary
name, synced, renamed in one step, and only then are older ones removed. `state.json` lists every file's size, so a
folder that lost a part (by a copy, say) is recognised and passed over.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.training.distributed import broadcast_object, gather_objects, is_main
from vlblocks.training.files import (
    disk_full_as_user_error,
    read_json,
    read_tensors,
    sync_file,
    sync_folder,
    write_tensors,
)
from vlblocks.training.packing import pack, unpack
from vlblocks.training.random_state import get_rng_state

__all__ = [
    "Checkpoint",
    "latest_checkpoint",
    "load_checkpoint",
    "load_optimizer",
    "load_weights",
    "save_checkpoint",
]

FORMAT = 1
_NAME = re.compile(r"step-(\d{8,})(?:-(\d+))?")
_TEMPORARY = ".tmp-"
_SHOWN = 3


class Checkpoint(NamedTuple):
    """What `save_checkpoint` stored.

    Attributes:
        path: its folder.
        step: optimiser steps taken.
        model: name -> weights.
        optimizer: a torch optimiser's state_dict.
        state: the caller's own.
        ranks: one per process: its generators ("rng") and what its caller added.
    """

    path: Path
    step: int
    model: dict[str, Tensor]
    optimizer: dict[str, Any] | None
    state: dict[str, Any]
    ranks: list[dict[str, Any]]

    def of_rank(self, rank: int, world_size: int) -> dict[str, Any]:
        """The state that this rank had.

        Raises: UserError when the run had another number of processes.
        """
        if len(self.ranks) != world_size:
            raise UserError(
                f"{self.path}: saved by {len(self.ranks)} processes, resumed by {world_size}: "
                f"start {len(self.ranks)}, or begin anew with --restart"
            )
        return self.ranks[rank]


def _order(path: Path) -> tuple[int, int] | None:
    match = _NAME.fullmatch(path.name)
    return (int(match[1]), int(match[2] or 0)) if match else None


def _checkpoints(folder: Path) -> list[Path]:
    """Every folder named like a checkpoint, whole or not, newest first."""
    if not folder.is_dir():
        return []
    found = [(order, path) for path in folder.iterdir() if (order := _order(path)) is not None and path.is_dir()]
    return [path for _, path in sorted(found, reverse=True)]


def _broken(path: Path) -> str | None:
    """Why a checkpoint folder is not whole, or None."""
    try:
        head = read_json(path / "state.json")
    except UserError as error:
        return str(error)
    files = head.get("files") if isinstance(head, dict) else None
    if not isinstance(files, dict):
        return f"{path / 'state.json'}: not a checkpoint's state"
    for name, size in files.items():
        file = path / name
        if not file.is_file():
            return f"{file}: missing"
        if file.stat().st_size != size:
            return f"{file}: cut short ({file.stat().st_size} of {size} bytes)"
    return None


def latest_checkpoint(folder: str | os.PathLike[str]) -> Path | None:
    """The newest checkpoint in `folder` that is whole, or None."""
    return next((path for path in _checkpoints(Path(folder)) if _broken(path) is None), None)


def save_checkpoint(
    folder: str | os.PathLike[str],
    step: int,
    *,
    model: Mapping[str, Tensor],
    optimizer: torch.optim.Optimizer | Mapping[str, Any] | None = None,
    state: Mapping[str, Any] | None = None,
    rank_state: Mapping[str, Any] | None = None,
    keep: int = 3,
) -> Path:
    """Write a checkpoint in `folder` and, once it is whole, remove all but the last `keep`; returns its folder.

    Call it on every process: each adds its random state and its `rank_state` (a loader's, say), and the main one
    writes. `optimizer` is anything with a `state_dict()`, or the state dict. `state` and `rank_state` hold dicts,
    lists, tuples, numbers, strings, None and tensors.

    Raises: UserError on every process when the disk is full, with all older checkpoints kept.
    """
    if keep < 1:
        raise UserError(f"keep={keep}: keep at least 1 checkpoint")
    folder = Path(folder)
    ranks = gather_objects({"rng": get_rng_state(), **(rank_state or {})})
    path: Path | None = None
    failure: UserError | None = None
    if is_main():
        raw = getattr(optimizer, "state_dict", None)
        parts = {"optimizer": raw() if callable(raw) else optimizer, "state": dict(state or {}), "ranks": ranks}
        try:
            path = _write(folder, step, model, parts)
            _prune(folder, path, keep)
        except UserError as error:
            failure = error
    # Without this the other ranks would wait for ever at their next collective.
    path, failure = broadcast_object((path, failure))
    if failure is not None:
        raise failure
    assert path is not None
    return path


def _write(folder: Path, step: int, model: Mapping[str, Tensor], parts: Mapping[str, Any]) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(leftover, ignore_errors=True)
    name = f"step-{step:08d}"
    path, attempt = folder / name, 0
    # Beside, never over: a folder cannot be replaced in one step, and the old one may be the only one.
    while path.exists():
        attempt += 1
        path = folder / f"{name}-{attempt}"
    older = latest_checkpoint(folder)
    kept = f"{older.name} is kept" if older else "no checkpoint was there before"
    temporary = folder / f"{_TEMPORARY}{path.name}-{os.getpid()}"
    try:
        with disk_full_as_user_error(path, kept):
            temporary.mkdir()
            packed = {key: pack(part, key) for key, part in parts.items()}
            files = {
                "model.safetensors": model,
                "optimizer.safetensors": packed["optimizer"][1],
                "state.safetensors": {**packed["state"][1], **packed["ranks"][1]},
            }
            for file, tensors in files.items():
                write_tensors(temporary / file, tensors)
            head = {
                "format": FORMAT,
                "step": step,
                "files": {file: (temporary / file).stat().st_size for file in files},
                **{key: part[0] for key, part in packed.items()},
            }
            (temporary / "state.json").write_text(json.dumps(head, allow_nan=False), encoding="utf-8")
            sync_file(temporary / "state.json")
            sync_folder(temporary)
            os.rename(temporary, path)
            sync_folder(folder)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    return path


def _prune(folder: Path, newest: Path, keep: int) -> None:
    """Remove all but `newest` and the last whole ones before it, up to `keep` in all."""
    kept = {newest}
    steps = {_order(newest)[0]}  # type: ignore[index]
    for path in _checkpoints(folder):
        step = _order(path)[0]  # type: ignore[index]
        # One that is newer than the one just written belongs to a course that the run has left.
        if len(kept) < keep and step < min(steps) and _broken(path) is None:
            kept.add(path)
            steps.add(step)
    for path in _checkpoints(folder):
        if path not in kept:
            # Renamed first: a process killed while it removes files leaves nothing that looks like a checkpoint.
            doomed = folder / f"{_TEMPORARY}removed-{path.name}-{os.getpid()}"
            os.rename(path, doomed)
            shutil.rmtree(doomed, ignore_errors=True)


def load_checkpoint(path: str | os.PathLike[str], *, device: str | torch.device = "cpu") -> Checkpoint:
    """Read the checkpoint in the folder `path`; the model's tensors go to `device`, all else to the CPU.

    Raises: UserError naming the file that is missing, cut short, not JSON, not safetensors or of a later format.
    """
    path = Path(path)
    if not path.is_dir():
        raise UserError(f"{path}: no such checkpoint folder: check the path")
    broken = _broken(path)
    if broken is not None:
        raise UserError(f"{broken}: use an older checkpoint")
    head = read_json(path / "state.json")
    if head.get("format") != FORMAT:
        raise UserError(
            f"{path / 'state.json'}: checkpoint format {head.get('format')}, this version reads {FORMAT}: "
            "use the version of vlblocks that wrote it"
        )
    model = read_tensors(path / "model.safetensors", device=device)
    tensors = {**read_tensors(path / "optimizer.safetensors"), **read_tensors(path / "state.safetensors")}
    try:
        parts = {key: unpack(head[key], tensors) for key in ("optimizer", "state", "ranks")}
        return Checkpoint(path=path, step=int(head["step"]), model=model, **parts)
    except KeyError as error:
        raise UserError(f"{path / 'state.json'}: {error} is missing: use an older checkpoint") from None


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:_SHOWN])
    return shown + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def load_weights(module: nn.Module, tensors: Mapping[str, Tensor], *, source: str | os.PathLike[str]) -> None:
    """Copy `tensors` into every parameter and persistent buffer of `module`; `source` is the file they came from.

    Raises: UserError naming `source` and the unknown, missing or misshapen keys; `module` is then unchanged.
    """
    own = module.state_dict()
    unknown = sorted(set(tensors) - set(own))
    missing = sorted(set(own) - set(tensors))
    if unknown or missing:
        found = [f"{kind} keys {_some(names)}" for kind, names in (("unknown", unknown), ("missing", missing)) if names]
        raise UserError(f"{source}: {'; '.join(found)}: use the configuration that the file was saved with")
    wrong = [name for name in own if own[name].shape != tensors[name].shape]
    if wrong:
        first = wrong[0]
        more = f" (and {len(wrong) - 1} more keys)" if len(wrong) > 1 else ""
        raise UserError(
            f"{source}: {first} is {list(tensors[first].shape)} in the file but {list(own[first].shape)} in the "
            f"model{more}: use the configuration that the file was saved with"
        )
    module.load_state_dict(dict(tensors), strict=True)


def load_optimizer(
    optimizer: torch.optim.Optimizer, saved: Mapping[str, Any], *, source: str | os.PathLike[str]
) -> None:
    """Restore an optimiser's state, after a check that its parameters are those that were saved.

    Raises: UserError naming `source` when the groups hold other parameters.
    """
    own, theirs = optimizer.state_dict()["param_groups"], saved["param_groups"]
    if [len(group["params"]) for group in own] != [len(group["params"]) for group in theirs]:
        sizes = [[len(group["params"]) for group in groups] for groups in (theirs, own)]
        raise UserError(
            f"{source}: its optimiser holds groups of {sizes[0]} parameters, this run's of {sizes[1]}: "
            "use the configuration that the file was saved with"
        )
    for mine, other in zip(own, theirs, strict=True):
        pairs = zip(mine.get("names", ()), other.get("names", ()), strict=False)
        differing = next(((new, old) for new, old in pairs if new != old), None)
        if differing:
            raise UserError(
                f"{source}: its optimiser has {differing[1]} where this run has {differing[0]}: "
                "use the configuration that the file was saved with"
            )
    optimizer.load_state_dict(dict(saved))
