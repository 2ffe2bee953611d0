"""Every downstream task by name: one file each, imported when it is asked for."""

from __future__ import annotations

import importlib
from collections.abc import Iterator, Mapping

from vlblocks.errors import UserError

from .base import Task

_WHERE = {
    "retrieval": "retrieval:Retrieval",
    "captioning": "captioning:Captioning",
    "vqa": "vqa:VisualQuestionAnswering",
    "entailment": "entailment:VisualEntailment",
    "text": "text_classification:TextClassification",
    "image": "image_classification:ImageClassification",
}


class Registry(Mapping[str, type[Task]]):
    """Task classes by name.

    Raises:
        UserError: there is no task of that name.
    """

    def __init__(self, where: Mapping[str, str]) -> None:
        self._where = dict(where)
        self._added: dict[str, type[Task]] = {}

    def add(self, name: str, task: type[Task]) -> None:
        """Make a task of your own known to train.py and eval.py."""
        self._added[name] = task

    def __getitem__(self, name: str) -> type[Task]:
        if name in self._added:
            return self._added[name]
        if name not in self._where:
            raise UserError(f"--task {name}: there is no such task; choose one of {', '.join(self)}")
        module, _, kind = self._where[name].partition(":")
        return getattr(importlib.import_module(f".{module}", __name__), kind)

    def __iter__(self) -> Iterator[str]:
        return iter([*self._where, *(name for name in self._added if name not in self._where)])

    def __len__(self) -> int:
        return len(list(iter(self)))

    def __contains__(self, name: object) -> bool:
        return name in self._where or name in self._added


TASKS = Registry(_WHERE)
