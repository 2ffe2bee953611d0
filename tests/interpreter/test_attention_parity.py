"""The original model's numbers, all of `shared/golden/unimo2`, with attention by the kernels in the interpreter."""

from pathlib import Path

import pytest

from vlblocks_kernels import attention_triton
from vlblocks_kernels.launch import Config
from vlblocks_recipes.unimo2 import parity

TESTS = Path(__file__).resolve().parents[1]
SHIPPED = ("image_topk", "pairs_no_grounding", "text_topk")
OTHERS = (
    *("caption_seq2seq", "pairs_image256", "pairs_nearest", "pairs_positions", "pairs_projection", "pairs_topk"),
    "pairs_topk_padded",
)


@pytest.fixture(autouse=True)
def launches(monkeypatch):
    """Few large tiles, which the interpreter takes in fewer steps; counts the kernels' launches."""
    counts = dict.fromkeys(("forward", "q_grad", "kv_grad"), 0)

    def config_of(kernel, *args):
        counts[kernel] += 1
        return Config({"BLOCK_M": 512, "BLOCK_N": 512})

    monkeypatch.setattr(attention_triton, "config_of", config_of)
    return counts


def check(path, launches):
    golden = parity.read_golden(path)
    rows = list(parity.compare(golden, backend="triton"))
    assert rows and [row for row in rows if not row.ok] == []
    layers = sum(golden.config[f"{tower}num_hidden_layers"] for tower in ("vit_", "text_", ""))
    assert 4 <= launches["forward"] <= layers
    # Single-tower layers have a gradient only where a loss reads them.
    assert launches["q_grad"] == launches["kv_grad"] <= launches["forward"]
    assert (launches["q_grad"] >= 2) == bool(golden.grads)


@pytest.mark.parametrize("case", SHIPPED)
def test_shipped_files_hold(case, launches):
    check(TESTS / f"golden/{case}.npz", launches)


@pytest.mark.parametrize("case", OTHERS)
def test_other_files_hold(reference, case, launches):
    check(reference / f"golden/unimo2/{case}.npz", launches)


def test_every_file_is_listed(reference):
    assert sorted(path.stem for path in (reference / "golden/unimo2").glob("*.npz")) == sorted((*SHIPPED, *OTHERS))
