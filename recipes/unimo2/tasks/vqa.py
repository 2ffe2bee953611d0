"""Questions on pictures: a classifier over the answers that the training data holds, VQA accuracy."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.data import (
    VqaFiles,
    VqaQuestion,
    answer_list,
    check_answer_list,
    locate_vqa,
    read_answer_list,
    read_vqa,
    soft_targets,
)
from vlblocks.data.scene_tasks import ANSWERS, QUESTION_KINDS, Question, ask
from vlblocks.data.world import Scene
from vlblocks.errors import UserError
from vlblocks.evaluation import normalize_answer, vqa_metrics
from vlblocks.training import write_json_atomic

from ..model import Unimo2
from .base import Autocast, Examples, Split, Task, TaskConfig, TaskModel, scene_splits
from .image_text import (
    ImageTextData,
    Pairs,
    classify_pairs,
    collate_pairs,
    pair_examples,
    pair_head,
    pair_logits,
    unspoiled,
)

SCENE_ANSWERS = [normalize_answer(answer) for answer in ANSWERS]
PEOPLE = 10  # who all give a generated question its one answer


@dataclass(frozen=True)
class VqaData(ImageTextData):
    root: Path | None = None
    """Folder of VQA v2: *train2014_questions.json, *train2014_annotations.json and so on, images/ or train2014/ ..."""
    train_questions: Path | None = None
    """JSON in place of the root's, as are the following."""
    train_annotations: Path | None = None
    val_questions: Path | None = None
    val_annotations: Path | None = None
    test_questions: Path | None = None
    test_annotations: Path | None = None
    """VQA's own test has none: eval.py --out DIR then writes the submission alone."""
    images: Path | None = None
    """Folder of COCO's pictures, or of folders of them, in place of the root's."""
    answers: Path | None = None
    """JSON list of the answers to choose from, or an object answer: place; None: built from the training data."""
    min_count: int = 9
    """Questions whose commonest answer one of the list must be."""
    max_answers: int | None = None
    """Keep only so many of the most frequent ones; None: all."""


@dataclass(frozen=True)
class VqaConfig(TaskConfig):
    task: str = "vqa"
    epochs: float = 8.0
    batch: int = 64
    data: VqaData = field(default_factory=VqaData)


class VisualQuestionAnswering(Task):
    """Answers to questions on pictures, out of a list that the training data gives (VQA v2).

    A question whose answers are all outside the list trains with zeros at every answer (Teney et al., 2018) and counts
    in every evaluation.
    """

    Config = VqaConfig
    watch = "accuracy"

    def __init__(self, config: VqaConfig, *context: Any) -> None:
        super().__init__(config, *context)
        self.answers: list[str] | None = None
        self.questions = cache(self.questions)

    def facts(self) -> dict[str, Any]:
        if self.answers is None:
            self.answers = self._answers()
        return {"answers": self.answers}

    def adopt(self, saved: dict[str, Any], source: Path) -> None:
        self.answers = check_answer_list(saved.get("answers"), source)
        data = self.config.data
        given = SCENE_ANSWERS if data.embedded else self.answers
        # A run's folder may have travelled without the file.
        if data.answers is not None and data.answers.exists():
            given = read_answer_list(data.answers)
        if given != self.answers:
            what = "the generated corpus" if data.embedded else data.answers
            raise UserError(
                f"{source}: has {len(self.answers)} answers, which are not the {len(given)} of {what}; "
                "the run answers only what it was trained for"
            )

    def make_head(self, model: Unimo2) -> nn.Module:
        head = pair_head(model.config.width, len(self.answers), dropout=self.head_dropout)
        # One answer of the list at a time is right: to begin with even odds would waste the first steps on saying no.
        nn.init.constant_(head[-1].bias, -math.log(max(1, len(self.answers) - 1)))
        return head

    def dataset(self, split: Split) -> Examples:
        pairs, places = self.questions(split), self._places()
        if split != "train":
            self._check(split, pairs, places)

        def entry(row: VqaQuestion) -> tuple[str, dict[str, Any]]:
            return row.text, {"targets": soft_targets(row.answers or (), places)}

        return pair_examples(self, split, pairs, entry)

    def collate(self, examples: list[dict[str, Any]]) -> dict[str, Tensor]:
        targets = torch.zeros(len(examples), len(self.answers))
        for row, example in zip(targets, examples, strict=True):
            for place, value in example["targets"].items():
                row[place] = value
        return {**collate_pairs(examples), "targets": targets}

    def loss(self, net: TaskModel, batch: dict[str, Tensor], generator: torch.Generator) -> Tensor:
        """Binary cross-entropy with the soft targets: a sum over the answers, a mean over the questions."""
        logits = pair_logits(net, batch)
        return F.binary_cross_entropy_with_logits(logits, batch["targets"], reduction="sum") / len(logits)

    def evaluate(self, net: TaskModel, split: Split, *, autocast: Autocast, out: Path | None) -> dict[str, float | str]:
        """accuracy, and that of each kind of answer; with `out` the submission in vqa_SPLIT.json.

        VQA's server wants an answer to every question: those on pictures that cannot be read have one too, and count in
        no accuracy.
        """
        row = self.questions(split).row
        said = classify_pairs(self, net, split, autocast)
        rows = [row(index, self.rng(split, 0, index)) for index in range(len(said.classes))]
        answers = [self.answers[place] for place in said.classes]
        if out is not None:
            written = [{"question_id": r.id, "answer": a} for r, a in zip(rows, answers, strict=True)]
            write_json_atomic(out / f"vqa_{split}.json", written, indent=None)
        elif any(r.answers is None for r in rows):
            raise UserError(
                f"--data.{split}-annotations: names no file to compare with; --out DIR writes the submission instead"
            )
        counts = {"questions": len(said.seen), "questions_unseen": len(rows) - len(said.seen)}
        rows, answers = [rows[index] for index in said.seen], [answers[index] for index in said.seen]
        if any(r.answers is None for r in rows):
            return counts
        metrics = vqa_metrics(answers, [r.answers for r in rows], [r.kind for r in rows])
        known = self._places().keys()
        reachable = sum(not known.isdisjoint(r.answers) for r in rows) / max(1, len(rows))
        return {**metrics, "answerable": reachable, **counts}

    def questions(self, split: Split) -> Pairs:
        """The questions of a split."""
        data = self.config.data
        if data.embedded:
            return self._scenes(split)
        asked = read_vqa(self._files(split), bad=self.bad, clean=normalize_answer, resolution=self.image_size)
        return Pairs(asked.images, asked.owners, lambda index, rng: asked.rows[index])

    def _answers(self) -> list[str]:
        data = self.config.data
        if data.answers is not None:
            return read_answer_list(data.answers)
        if data.embedded:
            return list(SCENE_ANSWERS)
        if data.min_count < 1 or (data.max_answers is not None and data.max_answers < 1):
            raise UserError("--data.min-count, --data.max-answers: must be 1 or more")
        pairs = self.questions("train")
        rows = [pairs.row(index, np.random.default_rng(0)) for index in range(len(pairs.owners))]
        try:
            return answer_list(rows, min_count=data.min_count, most=data.max_answers)
        except UserError as error:
            raise UserError(f"--data.min-count: {error}") from None

    def _places(self) -> dict[str, int]:
        """The answers by place, as people's are written; of two that come to the same the more frequent one."""
        return {normalize_answer(self.answers[place]): place for place in reversed(range(len(self.answers)))}

    def _files(self, split: Split) -> VqaFiles:
        data = self.config.data
        questions, annotations = getattr(data, f"{split}_questions"), getattr(data, f"{split}_annotations")
        if questions is None and data.root is None:
            raise UserError(
                f"--data.{split}-questions: names no file, nor does --data.root a folder; or add --data.embedded"
            )
        if questions is None:
            files = locate_vqa(data.root, split)
            return VqaFiles(files.questions, annotations or files.annotations, data.images or files.images)
        if annotations is None and split != "test":
            raise UserError(f"--data.{split}-annotations: names no file; give the one of {questions.name}")
        images = data.images or data.root
        if images is None:
            raise UserError("--data.images: names no folder; give the one with COCO's pictures")
        return VqaFiles(questions, annotations, images)

    def _check(self, split: Split, pairs: Pairs, places: dict[str, int]) -> None:
        """That the data asks for something which the checkpoint can answer."""
        answers = [pairs.row(index, self.rng(split, 0, index)).answers for index in range(len(pairs.owners))]
        if None not in answers and not any(places.keys() & given for given in answers):
            raise UserError(
                f"{self.config.task} {split} data: none of its {len(answers)} questions has an answer among the "
                f"checkpoint's {len(places)} ({', '.join(self.answers[:3])}, ...); evaluate on data of its kind"
            )

    def _scenes(self, split: Split) -> Pairs:
        """In training a new question on every scene each epoch; else one of each kind that the scene allows."""
        part = scene_splits(self.config.data, self.image_size)[split]
        if split == "train":

            def row(index: int, rng: np.random.Generator) -> VqaQuestion:
                scene = part.scenes[index]
                return _question(index, unspoiled(partial(ask, scene), lambda found: found.question)(rng))

            return Pairs(part.images, range(len(part.scenes)), row)
        owners, rows = [], []
        for index, scene in enumerate(part.scenes):
            rng = self.rng(split, 1, index)
            for found in _one_of_each(scene, rng, spoiled=split == "test"):
                owners.append(index)
                rows.append(_question(len(rows), found))
        return Pairs(part.images, owners, lambda index, rng: rows[index])


def _one_of_each(scene: Scene, rng: np.random.Generator, *, spoiled: bool) -> Sequence[Question]:
    """A question of each kind that the scene allows; `spoiled` ones may name combinations that training does not."""
    found = []
    for kind in QUESTION_KINDS:
        draw = partial(ask, scene, kind=kind)
        try:
            found.append(draw(rng) if spoiled else unspoiled(draw, lambda question: question.question)(rng))
        except UserError:
            continue
    return found


def _question(number: int, found: Question) -> VqaQuestion:
    answer = normalize_answer(found.answer)
    return VqaQuestion(number, found.question, (answer,) * PEOPLE, answer, found.kind)
