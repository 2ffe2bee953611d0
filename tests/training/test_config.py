"""Resuming with another configuration names the field, both values and the remedy."""

import json
from dataclasses import dataclass, replace
from enum import Enum
from pathlib import Path

import pytest

from vlblocks.errors import UserError
from vlblocks.training import compare_configs, config_to_dict, require_same_config


class Kind(Enum):
    FIRST = 1


@dataclass(frozen=True)
class Model:
    width: int = 64
    sizes: tuple[int, ...] = (1, 2)


@dataclass(frozen=True)
class Config:
    model: Model = Model()
    out: Path = Path("runs/a")
    weights: tuple[tuple[str, float], ...] = (("itc", 1.0),)
    kind: Kind = Kind.FIRST
    max_steps: int | None = None


def test_a_config_equals_itself_after_json():
    saved = json.loads(json.dumps(config_to_dict(Config())))
    assert compare_configs(saved, Config()) == []
    require_same_config(saved, Config(), source="config.json")


def test_differences_are_named_by_dotted_fields_in_order():
    current = replace(Config(), model=Model(width=32, sizes=(1, 3)), max_steps=4, out=Path("b"))
    assert compare_configs(Config(), current) == ["model.width", "model.sizes", "out", "max_steps"]
    assert compare_configs(Config(), current, ignore=("out", "max_steps")) == ["model.width", "model.sizes"]
    assert compare_configs(Config(), current, ignore=("model", "out")) == ["max_steps"]
    assert compare_configs({"a": 1, "b": {"c": 2}}, {"a": 1, "d": None}) == ["d", "b.c"]
    assert compare_configs({"optimizer": 1, "out": 1}, {"optimizer": 2, "out": 2}, ignore=("o", "out")) == ["optimizer"]


def test_the_error_is_one_line_with_values_and_remedy():
    current = replace(Config(), model=Model(width=32, sizes=(1, 3)), max_steps=4, out=Path("b"))
    with pytest.raises(UserError) as error:
        require_same_config(config_to_dict(Config()), current, source="runs/a/config.json")
    text = str(error.value)
    assert "\n" not in text and text.startswith("runs/a/config.json: ")
    assert "model.width was 64, now 32; model.sizes was [1, 2], now [1, 3]" in text
    assert "and 1 more" in text and "--restart" in text and "--out" in text


def test_fields_that_came_or_went_are_absent_on_one_side():
    with pytest.raises(UserError, match="b was absent, now 1; a was null, now absent"):
        require_same_config({"a": None}, {"b": 1}, source="c")
