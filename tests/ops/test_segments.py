import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.nn.attention.flex_attention import create_block_mask, create_mask

from vlblocks.errors import UserError
from vlblocks.ops.segments import SegmentMask
from vlblocks_kernels.attention import GRAIN, dense_of, packed_runs

PAIRS = {"image": ["image", "codes"], "codes": ["image", "codes", "text"], "text": ["codes", "text"]}
some_masks = settings(derandomize=True, deadline=None, max_examples=40)


def by_definition(mask):
    """The mask position by position, straight from its definition."""
    batch = mask.batch or 1
    allowed = torch.zeros(batch, mask.total, mask.total, dtype=torch.bool)
    where = [(s, i) for s, n in enumerate(mask.lengths) for i in range(n)]
    real = [[mask.valid[s] is None or bool(mask.valid[s][b, i]) for s, i in where] for b in range(batch)]
    for b in range(batch):
        for q, (sq, iq) in enumerate(where):
            for k, (sk, ik) in enumerate(where):
                seen = mask.table[sq][sk] and real[b][q] and real[b][k]
                if sq == sk and mask.names[sq] in mask.causal:
                    seen = seen and (ik <= iq or (mask.prefix is not None and ik < int(mask.prefix[b])))
                allowed[b, q, k] = seen
            if mask.masked_rows == "open" and not allowed[b, q].any():
                allowed[b, q] = True
    return allowed[:, None, mask.total - mask.queries :]


def same(mask, rendered, expected):
    assert rendered.dtype == torch.bool
    assert rendered.shape[0] in (1, mask.batch)
    assert rendered.shape[1:] == (1, mask.queries, mask.total)
    assert torch.equal(rendered.expand_as(expected), expected)


@some_masks
@given(data=st.data())
def test_dense_and_key_runs_are_the_definition(data, segment_masks):
    mask = data.draw(segment_masks())
    expected = by_definition(mask)
    same(mask, mask.dense(), expected)
    runs = mask.key_runs()
    same(mask, runs.dense(), expected)
    assert runs.starts.dtype == runs.stops.dtype == runs.counts.dtype == torch.int32
    unused = torch.arange(runs.starts.shape[-1]) >= runs.counts[..., None]
    assert torch.equal(runs.starts >= runs.stops, unused), "a run is empty, or one past the last is not"


@pytest.mark.parametrize("free", [True, False], ids=["free to read", "on an accelerator"])
def test_kernel_runs_are_the_definition(free, segment_masks, monkeypatch):
    if not free:
        monkeypatch.setattr("vlblocks.ops.segments.is_free_to_read", lambda x: False)

    @some_masks
    @given(mask=segment_masks(masked_rows=("zeros",)))
    def check(mask):
        expected = by_definition(mask)
        same(mask, mask.key_runs().dense(), expected)
        runs = mask.kernel_runs()
        same(mask, dense_of(runs, mask.queries, mask.total), expected)
        seers = expected[:, 0].any(-1, keepdim=True) & expected[:, 0]
        for grain, start in enumerate(range(0, mask.total, GRAIN)):
            keys = slice(start, start + GRAIN)
            for s, (first, last) in enumerate(mask.key_runs().query_bounds):
                first_seer, past_seer = runs.seen_by[..., grain, :].expand(len(seers), 2).unbind(-1)
                sees = seers[:, first:last, keys].flatten(1).any(1)
                assert (~sees | ((first_seer <= s) & (s < past_seer))).all()

    check()


def test_seen_by_names_few_segments_of_many():
    mask = SegmentMask.packed([40] * 8)
    assert mask.kernel_runs().seen_by.tolist() == [[[0, 2], [1, 4], [3, 5], [4, 7], [6, 8]]]


def test_runs_wait_for_no_device():
    """Tensors without values: to read one is an error."""
    valid = {"text": torch.arange(5) < torch.tensor([[5], [2]])}
    sizes = {"image": 3, "text": 5}
    mask = SegmentMask.build(
        sizes, {"image": sizes, "text": sizes}, valid=valid, causal="text", prefix=torch.tensor([1, 0])
    ).to("meta")
    runs = mask.key_runs()
    assert runs.starts.shape == (2, 2, 4) and runs.starts.device.type == "meta"
    assert mask.kernel_runs().runs.shape == (2, 2, 4, 2)
    assert mask.block_mask().kv_indices.device.type == "meta" and mask.dense().shape == (2, 1, 8, 8)


def test_counted_pairs_are_those_of_the_dense_mask():
    sizes = {"image": 4, "codes": 3, "text": 5}
    sees = {"image": ["image", "codes"], "codes": ["image", "codes"], "text": ["image", "codes", "text"]}
    mask = SegmentMask.build(sizes, sees, causal="text")
    for n in range(13):
        last = mask.last_queries(n)
        assert last.kernel_runs().pairs == int(last.dense().sum())


@pytest.mark.parametrize("causal", [False, True])
def test_packed_examples_see_themselves(causal):
    mask = SegmentMask.packed([3, 0, 2], causal=causal)
    whole = torch.block_diag(torch.ones(3, 3), torch.ones(2, 2)).bool()
    assert torch.equal(mask.dense()[0, 0], whole.tril() if causal else whole)
    bounds = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    # The same from lengths that live on a device.
    runs = packed_runs(bounds, keys=5, causal=causal)
    assert torch.equal(dense_of(runs, 5, 5), mask.dense()) and torch.equal(runs.bounds, mask.kernel_runs().bounds)


@some_masks
@given(data=st.data())
def test_block_mask_is_the_definition(data, segment_masks):
    mask = data.draw(segment_masks().filter(lambda mask: mask.queries > 0))
    size = data.draw(st.integers(1, 5))
    expected = by_definition(mask)
    block = mask.block_mask(block_size=size)
    assert block.shape[-2:] == (mask.queries, mask.total)
    same(mask, create_mask(block.mask_mod, mask.batch, 1, mask.queries, mask.total, "cpu"), expected)

    eager = create_block_mask(block.mask_mod, mask.batch, None, mask.queries, mask.total, device="cpu", BLOCK_SIZE=size)
    assert torch.equal(*torch.broadcast_tensors(block.to_dense(), eager.to_dense())), "blocks that are visited"
    full = block.full_kv_num_blocks.sum(-1), eager.full_kv_num_blocks.sum(-1)
    if mask.masked_rows == "zeros":
        assert torch.equal(*torch.broadcast_tensors(*full)), "blocks that need no mask"
    else:
        assert (full[0] <= full[1]).all()


@some_masks
@given(data=st.data())
def test_validity_and_masked_queries_agree_with_dense(data, segment_masks):
    mask = data.draw(segment_masks(masked_rows=("zeros",)))
    dense = by_definition(mask)
    valid = mask.valid_tokens()
    expected = torch.cat(
        [
            torch.ones(mask.batch or 1, n, dtype=torch.bool) if v is None else v
            for n, v in zip(mask.lengths, mask.valid, strict=True)
        ],
        dim=1,
    )
    if valid is None:
        assert expected.all()
    else:
        assert torch.equal(valid, expected) and not valid.all()
        assert torch.equal(mask.valid_queries(), expected[:, mask.total - mask.queries :])
    for name in mask.names:
        rows = mask.query_slice(name)
        masked = mask.masked_queries(name)
        nothing = ~dense[:, 0, rows].any(dim=-1)
        assert not nothing.any() if masked is None else torch.equal(masked.expand_as(nothing), nothing)


@some_masks
@given(data=st.data())
def test_last_queries_are_the_last_rows(data, segment_masks):
    mask = data.draw(segment_masks())
    n = data.draw(st.integers(0, mask.total))
    assert torch.equal(
        mask.last_queries(mask.total).last_queries(n).dense(),
        mask.last_queries(mask.total).dense()[:, :, mask.total - n :],
    )


def test_the_table_of_pairs():
    valid = {"text": torch.tensor([[True, True], [True, False]])}
    mask = SegmentMask.build({"image": 2, "codes": 1, "text": 2}, PAIRS, valid=valid)
    assert (mask.total, mask.batch, mask.names, mask.lengths) == (5, 2, ("image", "codes", "text"), (2, 1, 2))
    assert mask.offset("text") == 3 and mask.slice("text") == slice(3, 5)
    first = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [0, 0, 1, 1, 1], [0, 0, 1, 1, 1]]
    second = [[1, 1, 1, 0, 0], [1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [0, 0, 1, 1, 0], [0, 0, 0, 0, 0]]
    assert mask.dense()[:, 0].int().tolist() == [first, second]


def test_a_padded_pair_is_one_run_per_segment():
    valid = {"text": torch.arange(4) < torch.tensor([[4], [1]])}
    runs = SegmentMask.build({"image": 5, "codes": 3, "text": 4}, PAIRS, valid=valid).key_runs()
    assert runs.starts[..., 0].tolist() == [[0, 0, 5], [0, 0, 5]]
    assert runs.stops[..., 0].tolist() == [[8, 12, 12], [8, 9, 9]]
    assert runs.counts.tolist() == [[1, 1, 1], [1, 1, 1]]
    assert runs.query_bounds == ((0, 5), (5, 8), (8, 12))


def test_padding_inside_a_segment_is_several_runs():
    valid = torch.tensor([[True, False, True, True, False, True]])
    runs = SegmentMask.single(length=6, valid=valid).key_runs()
    assert runs.starts.tolist() == [[[0, 2, 5]]] and runs.stops.tolist() == [[[1, 4, 6]]]


def test_a_causal_run_does_not_reach_past_its_segment():
    mask = SegmentMask.build({"a": 2, "b": 3, "c": 2}, {"b": ["a", "b", "c"]}, causal="b")
    runs = mask.key_runs()
    assert runs.starts[0, 1].tolist() == [0, 5] and runs.stops[0, 1].tolist() == [5, 7]
    assert runs.causal == ((0, 0), (2, 5), (0, 0))
    assert runs.dense()[0, 0, 2].int().tolist() == [1, 1, 1, 0, 0, 1, 1]


def test_prefix_opens_the_first_tokens():
    mask = SegmentMask.single(length=3, causal=True, prefix=torch.tensor([0, 2]))
    lower, opened = [[1, 0, 0], [1, 1, 0], [1, 1, 1]], [[1, 1, 0], [1, 1, 0], [1, 1, 1]]
    assert mask.dense()[:, 0].int().tolist() == [lower, opened]


def test_renderings_are_kept_and_usable_after_inference_mode():
    valid = torch.tensor([[True, True, False]])
    mask = SegmentMask.single(length=3, valid=valid)
    with torch.inference_mode():
        dense = mask.dense()
    assert mask.dense() is dense and not dense.is_inference()
    assert mask.block_mask() is mask.block_mask() and mask.key_runs() is mask.key_runs()
    assert mask.last_queries(1).dense() is not dense


def test_to_moves_the_tensors_only():
    mask = SegmentMask.single(length=2, valid=torch.tensor([[True, False]]), causal=True, prefix=torch.tensor([1]))
    moved = mask.to("meta")
    assert moved.device.type == "meta" and moved.prefix.device.type == "meta" and moved.names == mask.names
    assert mask.to("cpu") is mask
    plain = SegmentMask.single(length=2)
    assert plain.to("meta") is plain and plain.device is None and plain.batch is None
    assert plain.dense("meta").device.type == "meta"
    with pytest.raises(UserError, match=r"use mask\.to"):
        mask.dense("meta")


def test_validity_that_is_all_true_counts_as_none():
    mask = SegmentMask.single(length=3, valid=torch.ones(2, 3, dtype=torch.bool))
    assert mask.batch == 2 and mask.valid_tokens() is None and mask.dense().shape == (1, 1, 3, 3)


def ok(n=2, b=2):
    return torch.ones(b, n, dtype=torch.bool)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (dict(sees={"image": ["txt"]}), r"sees\['image'\] names 'txt'.*choose from image, text"),
        (dict(sees={"img": ["text"]}), "sees has 'img'"),
        (dict(sees={"image": "text"}), r"is the string 'text'.*\['text'\]"),
        (dict(segments={"image": -1, "text": 2}), r"segments\['image'\] is -1"),
        (dict(segments={"image": 1.5, "text": 2}), r"segments\['image'\] is 1.5"),
        (dict(valid={"words": ok()}), "valid has 'words'"),
        (dict(valid={"text": ok(3)}), r"valid\['text'\] has shape \[2, 3\]: give \[batch, 2\]"),
        (dict(valid={"text": ok()[0]}), r"valid\['text'\] has shape \[2\]"),
        (dict(valid={"text": ok().long()}), r"valid\['text'\] has dtype torch.int64"),
        (dict(valid={"image": ok(3), "text": ok(b=3)}), r"valid\['text'\] has batch 3 but valid\['image'\] has 2"),
        (dict(valid={"image": ok(3), "text": ok().to("meta")}), r"valid\['text'\] is on meta"),
        (dict(causal="words"), "causal='words' is not a segment"),
        (dict(prefix=torch.tensor([1, 2])), "prefix is given without causal"),
        (dict(causal="text", prefix=torch.tensor([1.0])), "prefix is torch.float32"),
        (dict(causal="text", prefix=torch.tensor(1)), r"give integers of shape \[batch\]"),
        (dict(causal="text", prefix=torch.tensor([1]), valid={"text": ok()}), "prefix has batch 1"),
        (dict(masked_rows="ones"), "masked_rows='ones'"),
    ],
)
def test_mistakes_are_named_in_one_line(arguments, message):
    arguments = {"segments": {"image": 3, "text": 2}, "sees": {"image": ["image"]}} | arguments
    with pytest.raises(UserError, match=message) as error:
        SegmentMask.build(**arguments)
    assert "\n" not in str(error.value)


def test_other_mistakes():
    mask = SegmentMask.single(length=3)
    for call in (lambda: mask.last_queries(4), lambda: mask.last_queries(-1), lambda: mask.slice("image")):
        with pytest.raises(UserError):
            call()
