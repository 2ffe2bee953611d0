"""Fixtures that every test may use."""

import os
import random
from pathlib import Path

import numpy as np
import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="session")
def reference() -> Path:
    """The folder of reference data (golden files, real data sets), which only the authors' machines hold."""
    named = os.environ.get("VLBLOCKS_REFERENCE")
    folder = Path(named) if named else ROOT.parent / "shared"
    if not folder.is_dir():
        pytest.skip(f"reference data not found at {folder}: set VLBLOCKS_REFERENCE to its folder")
    return folder.resolve()


@pytest.fixture(scope="session")
def root() -> Path:
    """The repository's root."""
    return ROOT


@pytest.fixture(autouse=True)
def fixed_seed() -> None:
    """Every test starts from the same random state, whichever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
