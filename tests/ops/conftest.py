import pytest
import torch
from hypothesis import strategies as st

from vlblocks.ops.segments import SegmentMask

NAMES = ("image", "codes", "text", "extra")


@st.composite
def _segment_masks(draw, masked_rows=("zeros", "open"), longest=6):
    names = NAMES[: draw(st.integers(1, 4))]
    lengths = {name: draw(st.integers(0, longest)) for name in names}
    table = {name: draw(st.sets(st.sampled_from(names))) for name in names if draw(st.booleans()) or name == names[0]}
    batch = draw(st.integers(1, 3))
    valid = {}
    for name in names:
        if draw(st.booleans()):
            bits = draw(st.lists(st.booleans(), min_size=batch * lengths[name], max_size=batch * lengths[name]))
            valid[name] = torch.tensor(bits, dtype=torch.bool).reshape(batch, lengths[name])
    causal = sorted(draw(st.sets(st.sampled_from(names), max_size=2)))
    if draw(st.booleans()):
        for name in causal:
            table[name] = table.get(name, set()) | {name}
    prefix = None
    if causal and draw(st.booleans()):
        prefix = torch.tensor(draw(st.lists(st.integers(0, longest + 1), min_size=batch, max_size=batch)))
    mask = SegmentMask.build(
        lengths, table, valid=valid, causal=causal, prefix=prefix, masked_rows=draw(st.sampled_from(masked_rows))
    )
    if draw(st.booleans()):
        mask = mask.last_queries(draw(st.integers(0, mask.total)))
    return mask


@pytest.fixture(scope="session")
def segment_masks():
    """A strategy of masks: any table, padding anywhere, any causal segments and prefix, any number of last queries."""
    return _segment_masks
