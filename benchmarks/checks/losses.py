"""What only a GPU can show of the losses' kernels: named functions that raise on failure.

On a CPU the same code runs at small sizes, through PyTorch or Triton's interpreter: a dry run.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from checks.grounding import at_most, no_worse, poisoned
from torch import Tensor

from vlblocks.losses import draw_hard_negatives, info_nce, linear_cross_entropy, siglip, two_view_contrast
from vlblocks.losses._whole import info_nce_whole, siglip_whole, two_view_whole
from vlblocks.ops.contrastive import Ranks
from vlblocks_kernels.linear_cross_entropy import Settings, linear_cross_entropy_reference

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}

# Rows, vocabulary, width.
WORDS = {
    "small": [(13, 37, 24), (1, 1, 1)],
    "real": [(1152, 30522, 768), (2048, 50265, 1024)],
    "odd": [(517, 5003, 100), (33, 129, 17), (1, 1, 1), (3, 2, 1)],
}
# Rows, width.
PAIRS = {
    "small": [(23, 24), (2, 5)],
    "real": [(2048, 256), (3072, 512)],
    "odd": [(1031, 256), (517, 100), (129, 72), (65, 17), (2, 1)],
}
VIEWS = "two views"
KINDS = (
    *("plain", "captions", "captions excluded", "smoothed, queue", "teacher, queue"),
    *("siglip", "siglip, captions", VIEWS),
)


def checks(device: str, quick: bool) -> list[tuple[str, Callable[[], None]]]:
    """(what holds, function that raises if it does not)."""
    on_gpu = torch.device(device).type == "cuda"
    words, pairs = ([*sizes["real"], *sizes["odd"]] if on_gpu else sizes["small"] for sizes in (WORDS, PAIRS))
    found: list[tuple[str, Callable[[], None]]] = []
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in words:
            what = f"linear cross-entropy equals float64, {name} {_text(shape)}"
            found.append((what, partial(vocabulary_holds, device, shape, dtype)))
        for shape in pairs:
            for kind in KINDS:
                what = f"{kind} equals float64, {name} {_text(shape)}"
                found.append((what, partial(contrast_holds, device, shape, dtype, kind)))
        found.append((f"extreme logits, {name}", partial(extremes_hold, device, dtype, on_gpu)))
        found.append((f"one pair, nothing to predict, no rows, {name}", partial(edges_hold, device, dtype)))
    found.append(("the original's numbers", partial(golden_holds, device)))
    found.append(("drawn negatives are of other pictures", partial(draws_hold, device, 1031 if on_gpu else 23)))
    repeats = 3 if quick or not on_gpu else 40
    for dtype in TYPES[1:] if on_gpu else TYPES[:1]:
        for shape in words:
            what = f"linear cross-entropy: equal bits {repeats} times, {dtype} {_text(shape)}"
            found.append((what, partial(bits_hold, partial(vocabulary_run, device, shape, dtype), device, repeats)))
        for shape in pairs:
            what = f"contrasts: equal bits {repeats} times, {dtype} {_text(shape)}"
            found.append((what, partial(bits_hold, partial(contrast_run, device, shape, dtype), device, repeats)))
    if on_gpu:
        found.append(("no device sync, and one for the rows to predict", partial(nothing_syncs, device)))
        if not quick:
            found.append(("offsets past 2^31", partial(far_offsets_hold, device)))
    return found


def _text(shape: Sequence[int]) -> str:
    return "x".join(map(str, shape))


# Over a vocabulary.


def draw_words(device: str, shape: tuple[int, ...], dtype: torch.dtype, size: float = 3.0) -> tuple[list[Tensor], Any]:
    """[x, weight, bias], target, of which some rows are ignored; logits' standard deviation is about `size`."""
    rows, vocab, width = shape
    g = torch.Generator().manual_seed(sum(shape))
    x, weight = torch.randn(rows, width, generator=g), torch.randn(vocab, width, generator=g) * (size / width**0.5)
    target = torch.randint(vocab, (rows,), generator=g)
    target[1::5] = -100
    bias = 0.5 * torch.randn(vocab, generator=g)
    return [part.to(device, dtype) for part in (x, weight, bias)], target.to(device)


def run(loss: Callable[..., Tensor], leaves: Sequence[Tensor]) -> list[Tensor]:
    """Loss and gradients."""
    leaves = [x.detach().requires_grad_() for x in leaves]
    value = loss(*leaves)
    return [value.detach(), *torch.autograd.grad(value, leaves)]


def vocabulary_holds(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Summed, so that half types hold the gradients; by rows, with a weight each; in several chunks."""
    leaves, target = draw_words(device, shape, dtype)
    weight = torch.rand(len(target), generator=torch.Generator().manual_seed(0)).to(device)
    chunk = max(1, shape[0] // 3) * shape[1] * dtype.itemsize
    # Of a vocabulary of one, z-loss alone would have a gradient, a small one beside what rounds to 0.
    z = 1e-3 if shape[1] > 1 else 0.0
    for smoothing, z_loss, by_rows, biased in ((0.0, 0.0, False, True), (0.1, z, False, False), (0.1, z, True, True)):
        parts = leaves if biased else leaves[:2]
        options: dict[str, Any] = {"label_smoothing": smoothing, "z_loss": z_loss, "chunk_bytes": chunk}

        def ours(x: Tensor, table: Tensor, bias: Tensor | None = None, by_rows=by_rows, options=options) -> Tensor:
            reduction = "none" if by_rows else "sum"
            found = linear_cross_entropy(x, table, bias, target, reduction=reduction, backend="triton", **options)
            return (weight * found).sum() if by_rows else found

        def plain(x: Tensor, table: Tensor, bias: Tensor | None = None, by_rows=by_rows, options=options) -> Tensor:
            settings = Settings(-100, options["label_smoothing"], options["z_loss"])
            found = linear_cross_entropy_reference(x, table, bias, target, settings)
            return (weight * found).sum() if by_rows else found.sum()

        with poisoned():
            found = run(ours, parts)
        names = ("loss", "gradient of x", "gradient of weight", "gradient of bias")
        compare(names, found, run(plain, parts), run(plain, [part.double() for part in parts]), LIMIT[dtype])


def vocabulary_run(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    leaves, target = draw_words(device, shape, dtype)
    options: dict[str, Any] = {"label_smoothing": 0.1, "chunk_bytes": max(1, shape[0] // 3) * shape[1] * dtype.itemsize}

    def mean(*parts: Tensor) -> Tensor:
        return linear_cross_entropy(*parts, target, backend="triton", **options)

    def rows(*parts: Tensor) -> Tensor:
        return linear_cross_entropy(*parts, target, reduction="none", backend="triton", **options).square().sum()

    return [*run(mean, leaves), *run(rows, leaves)]


# Over pairs.


def draw_pairs(device: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> tuple[list[Tensor], dict]:
    """[image, text, scale] or [image, text, scale, bias]; and options with ids, weights, queues, a teacher."""
    rows, width = shape
    g = torch.Generator().manual_seed(sum(shape))

    def features(count: int) -> Tensor:
        return F.normalize(torch.randn(count, width, generator=g), dim=1)

    image = features(rows)
    text = F.normalize(image + 0.8 * features(rows), dim=1)
    leaves = [
        image.to(device, dtype),
        text.to(device, dtype),
        torch.full((1,), 8.0 if rows > 9 else 1.0, device=device),
    ]
    options: dict[str, Any] = {}
    if kind.startswith("siglip"):
        leaves.append(torch.full((1,), -3.0, device=device))
    if "captions" in kind:
        ids = torch.randint(1 + rows // 3, (rows,), generator=g)
        weight = torch.rand(rows, generator=g) * (torch.rand(rows, generator=g) < 0.8)
        options |= {"ids": ids.to(device), "weight": weight.to(device)}
    if "excluded" in kind:
        options["same_id"] = "exclude"
    if "queue" in kind:
        size = rows // 2 + 3
        options |= {f"queue_{name}": features(size).to(device, dtype) for name in ("image", "text")}
        options["queue_valid"] = (torch.rand(size, generator=g) < 0.7).to(device)
    if "smoothed" in kind:
        options["label_smoothing"] = 0.1
    if "teacher" in kind:
        options |= {f"teacher_{name}": features(rows).to(device) for name in ("image", "text")}
        options["alpha"] = 0.4
    return leaves, options


def ours_of(kind: str, options: dict, **settings: Any) -> Callable[..., Tensor]:
    """The sum of the rows' losses, by Triton."""
    given = {"image_ids" if name == "ids" else name: value for name, value in options.items()}
    given |= {"reduction": "sum", "backend": "triton", **settings}
    if kind.startswith("siglip"):
        return lambda image, text, scale, bias: siglip(image, text, scale=scale, bias=bias, **given)
    if kind == VIEWS:
        return lambda first, second, scale: two_view_contrast(first, second, temperature=1 / scale, **given)
    return lambda image, text, scale: info_nce(image, text, logit_scale=scale, **given)


def plain_of(kind: str, options: dict) -> Callable[..., Tensor]:
    """The same from the whole matrix of logits, its products in the features' type."""
    whole = siglip_whole if kind.startswith("siglip") else two_view_whole if kind == VIEWS else info_nce_whole

    def plain(first: Tensor, second: Tensor, *numbers: Tensor) -> Tensor:
        same = {name: x.to(first.dtype) if name.startswith("teacher") else x for name, x in options.items()}
        losses = whole(first, second, *numbers, ranks=Ranks(None, 0, len(first)), **same)
        losses = losses if isinstance(losses, Tensor) else (losses[0] + losses[1]) / 2
        weight = options.get("weight")
        return (losses if weight is None else losses * weight.to(losses.dtype)).sum()

    return plain


def contrast_holds(device: str, shape: tuple[int, ...], dtype: torch.dtype, kind: str) -> None:
    leaves, options = draw_pairs(device, shape, dtype, kind)
    # Several chunks of the logits' gradient.
    with poisoned():
        found = run(ours_of(kind, options, chunk_bytes=max(1, shape[0] // 2) * shape[0] * 4), leaves)
    plain = plain_of(kind, options)
    exact = run(plain, [x.double() for x in leaves])
    compare(PAIR_NAMES, found, run(plain, leaves), exact, LIMIT[dtype])
    with poisoned():
        whole = run(ours_of(kind, options), leaves)
    compare(PAIR_NAMES, whole, run(plain, leaves), exact, LIMIT[dtype])


PAIR_NAMES = ("loss", "gradient of image", "gradient of text", "gradient of scale", "gradient of bias")


def contrast_run(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
    found = []
    for kind in KINDS:
        leaves, options = draw_pairs(device, shape, dtype, kind)
        for settings in ({}, {"chunk_bytes": max(1, shape[0] // 2) * shape[0] * 4}):
            found += run(ours_of(kind, options, **settings), leaves)
        if kind != VIEWS:
            found += run(lambda *x, k=kind, o=options: ours_of(k, o, reduction="none")(*x).square().sum(), leaves)
    return found


def extremes_hold(device: str, dtype: torch.dtype, on_gpu: bool) -> None:
    """Logits of hundreds, of which a float32 holds four digits: then eager's error is the measure."""
    leaves, target = draw_words(device, (130, 1001, 64) if on_gpu else (13, 37, 24), dtype, size=100.0)
    names = ("loss", "gradient of x", "gradient of weight", "gradient of bias")

    def ours(*parts: Tensor) -> Tensor:
        return linear_cross_entropy(*parts, target, reduction="sum", backend="triton")

    def plain(*parts: Tensor) -> Tensor:
        return linear_cross_entropy_reference(*parts, target, Settings()).sum()

    with poisoned():
        found = run(ours, leaves)
    # Logits in a half type, here as in eager, are off by more than a hundredth.
    limit = 1e-3 if dtype == torch.float32 else 1.0
    compare(names, found, run(plain, leaves), run(plain, [x.double() for x in leaves]), limit)
    for kind in KINDS:
        leaves, options = draw_pairs(device, (259, 64) if on_gpu else (23, 24), dtype, kind)
        leaves[2] = torch.full((1,), 1000.0, device=device)
        with poisoned():
            found = run(ours_of(kind, options), leaves)
        plain_pairs = plain_of(kind, options)
        exact = run(plain_pairs, [x.double() for x in leaves])
        compare(PAIR_NAMES, found, run(plain_pairs, leaves), exact, 1e-3 if dtype == torch.float32 else 1e-2)


def edges_hold(device: str, dtype: torch.dtype) -> None:
    """What must be 0, and finite, to the last bit or nearly so."""
    leaves, target = draw_words(device, (7, 19, 8), dtype)
    ignored = torch.full_like(target, -100)
    for reduction in ("mean", "sum", "none"):

        def loss(*parts: Tensor, reduction=reduction) -> Tensor:
            return linear_cross_entropy(*parts, ignored, reduction=reduction, backend="triton").sum()

        with poisoned():
            nothing(f"all ignored, {reduction}", run(loss, leaves), 0.0)
    with poisoned():
        no_rows = [leaves[0][:0], *leaves[1:]]
        nothing("no rows", run(lambda *p: linear_cross_entropy(*p, target[:0], backend="triton"), no_rows), 0.0)
    for kind in ("plain", "captions", VIEWS):
        leaves, options = draw_pairs(device, (1, 16), dtype, kind)
        with poisoned():
            nothing(f"one pair, {kind}", run(ours_of(kind, options), leaves), 1e-5)
    one, options = draw_pairs(device, (1, 16), dtype, "siglip")
    with poisoned():
        found = run(ours_of("siglip", options), one)
    plain = plain_of("siglip", options)
    compare(PAIR_NAMES, found, run(plain, one), run(plain, [x.double() for x in one]), LIMIT[dtype])


def nothing(what: str, found: list[Tensor], limit: float) -> None:
    for part in found:
        if not bool((part.abs() <= limit).all()):
            raise AssertionError(f"{what}: {float(part.abs().max()):.2e} where 0 should be")


def compare(names: Sequence[str], found: list[Tensor], eager: list[Tensor], exact: list[Tensor], limit: float) -> None:
    for name, ours, theirs, right in zip(names, found, eager, exact, strict=False):
        if not bool(ours.isfinite().all()):
            raise AssertionError(f"{name}: not finite")
        if float(right.norm()) < 1e-6:
            # One candidate: nothing to learn, and a difference of equals.
            nothing(name, [ours], 1e-3 if ours.dtype != torch.float32 else 1e-5)
            continue
        # Rounding of what a single number sums up may cancel in either by luck.
        slack = limit / 5 if right.numel() == 1 else limit / 10
        at_most(name, ours, right, limit)
        no_worse(name, ours, theirs, right, slack=slack)


def golden_holds(device: str) -> None:
    """The contrast of the first states of its towers, which this model of the original's does not normalise."""
    with np.load(GOLDEN / "pairs_no_grounding.npz", allow_pickle=False) as file:
        names = ("out.vit_out", "out.text_out", "param.cmcl_temperature", "in.labels", "out.cmcl_loss")
        image, text, temperature, labels, expected = (torch.from_numpy(file[name]).to(device) for name in names)
    weight = labels[:, 0].float()
    found = info_nce(image[:, 0], text[:, 0], temperature=temperature, weight=weight, backend="triton")
    at_most("the loss", found.reshape(1), expected.double().reshape(1), 1e-5)


def draws_hold(device: str, rows: int) -> None:
    (image, text, _), _ = draw_pairs(device, (rows, 24), torch.float32, "plain")
    ids = (torch.arange(rows) // 3).to(device)

    def draw() -> tuple[Tensor, ...]:
        generator = torch.Generator(device).manual_seed(0)
        return tuple(draw_hard_negatives(image, text, temperature=0.05, image_ids=ids, generator=generator))

    with poisoned():
        first = draw()
    for name, drawn in zip(("text", "image"), first[:2], strict=True):
        if not first[2].all() or (ids[drawn] == ids).any():
            raise AssertionError(f"a drawn {name} is of the same picture")
    if not all(torch.equal(a, b) for a, b in zip(first, draw(), strict=True)):
        raise AssertionError("one seed draws different negatives")


def bits_hold(function: Callable[[], list[Tensor]], device: str, repeats: int) -> None:
    first = function()
    for i in range(repeats):
        noise = torch.randn(1 + i * 4099, device=device)  # other addresses, other neighbours
        for a, b in zip(first, function(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"run {i + 2} differs by {float((a.double() - b.double()).abs().max()):.2e}")
        del noise


def nothing_syncs(device: str) -> None:
    shape, dtype = PAIRS["real"][0], torch.bfloat16
    drawn = [(kind, *draw_pairs(device, shape, dtype, kind)) for kind in KINDS]

    def contrasts() -> None:
        for kind, leaves, options in drawn:
            run(ours_of(kind, options), leaves)
        image, text = drawn[0][1][:2]
        draw_hard_negatives(image, text, temperature=0.07)
        draw_hard_negatives(image, text, temperature=0.07, image_ids=drawn[1][2]["ids"])

    leaves, target = draw_words(device, WORDS["real"][0], dtype)

    def vocabulary() -> None:
        run(lambda *parts: linear_cross_entropy(*parts, target), leaves)

    contrasts()
    vocabulary()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        contrasts()
        torch.cuda.set_sync_debug_mode("warn")
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            vocabulary()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    syncs = [warning for warning in seen if "synchroniz" in str(warning.message)]
    if len(syncs) > 1:
        raise AssertionError(f"{len(syncs)} syncs where only the rows to predict are counted")


def far_offsets_hold(device: str) -> None:
    """More than 2^31 logits in one chunk: what many small chunks give."""
    for kind in ("plain", "siglip"):
        leaves, options = draw_pairs(device, (66000, 64), torch.bfloat16, kind)
        once = run(ours_of(kind, options, chunk_bytes=2**34), leaves)
        often = run(ours_of(kind, options), leaves)
        for name, a, b in zip(PAIR_NAMES, once, often, strict=False):
            at_most(f"{kind}, {name}", a, b.double(), 1e-3)
    leaves, target = draw_words(device, (66000, 50265, 64), torch.bfloat16)
    once, often = (
        run(lambda *parts, size=size: linear_cross_entropy(*parts, target, reduction="sum", chunk_bytes=size), leaves)
        for size in (2**34, 2**28)
    )
    for name, a, b in zip(("loss", "x", "weight", "bias"), once, often, strict=True):
        at_most(name, a, b.double(), 1e-3)
