"""A small checkpoint that every task's tests start from, and the flags of a run of seconds."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from vlblocks.data import SceneCorpus, train_tokenizer
from vlblocks.training import config_to_dict, write_json_atomic, write_tensors_atomic
from vlblocks_recipes.unimo2.configs import PRESETS, ContrastConfig, GroundingConfig, TowerConfig
from vlblocks_recipes.unimo2.model import Unimo2


def write_checkpoint(folder: Path, **changes) -> Path:
    """A folder as pre-training leaves it, of one small layer per tower with random weights."""
    tower = TowerConfig(layers=1, heads=2, hidden=32, dropout=0.0)
    preset = PRESETS["tiny"]
    model = replace(
        preset.model,
        **{
            **{"width": 32, "image": tower, "text": tower, "joint": tower, "image_size": 32, "patch_size": 16},
            **{"grounding": GroundingConfig(codes=32, picks=4), "contrast": ContrastConfig(pool="mean", width=32)},
            **changes,
        },
    )
    folder.mkdir(parents=True, exist_ok=True)
    captions = [caption for written in SceneCorpus(pairs=100, test=0).pairs.captions for caption in written]
    tokenizer = train_tokenizer(captions, 400, lowercase=True)
    tokenizer.save(folder / "tokenizer.json")
    torch.manual_seed(0)
    model = replace(model, vocab=tokenizer.vocab_size)
    config = replace(preset, model=model, out=folder, data=replace(preset.data, scenes=200))
    write_json_atomic(folder / "config.json", config_to_dict(config))
    write_tensors_atomic(folder / "model.safetensors", Unimo2(model).state_dict())
    return folder


@pytest.fixture(scope="session")
def make_checkpoint():
    """make_checkpoint(folder, width=..., ...): a random model's folder with another configuration."""
    return write_checkpoint


@pytest.fixture(scope="session")
def checkpoint(tmp_path_factory) -> Path:
    """A random model's folder; not to be changed."""
    return write_checkpoint(tmp_path_factory.mktemp("checkpoint") / "run")


@pytest.fixture(scope="session")
def quick(checkpoint) -> tuple[str, ...]:
    """Flags of a fine-tuning of seconds on the generated corpus; add --task and --out."""
    return (
        *("--init", str(checkpoint), "--data.embedded", "--data.scenes", "200", "--data.held-out", "40"),
        *("--max-steps", "6", "--evaluate-every", "3", "--batch", "16", "--precision", "fp32"),
    )
