"""What only a GPU can show of the grounded space's kernels: named functions that raise on failure.

On a CPU the same code runs at small sizes, through the references or Triton's interpreter: a dry run.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from vlblocks.ops.grounding import grounding_losses, grounding_scores, nearest_code, segment_sum
from vlblocks_kernels.grounding import grounding_losses_reference, grounding_scores_reference
from vlblocks_kernels.nearest import segment_sum_reference

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"

TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}

# Examples, tokens, width, codes, picks.
SMALL = [(2, 19, 24, 21, 18), (3, 5, 17, 9, 2)]
REAL = [(16, 324, 768, 2048, 100), (5, 197, 1024, 3001, 100), (3, 900, 768, 1000, 130), (2, 33, 1536, 70, 1)]
MANY_CODES = (2, 197, 768, 65536, 100)
ODD = [(7, 20, 776, 515, 17), (1, 1, 1, 1, 1), (4, 131, 100, 65, 64)]


def checks(device: str, quick: bool) -> list[tuple[str, Callable[[], None]]]:
    """(what holds, function that raises if it does not)."""
    on_gpu = torch.device(device).type == "cuda"
    shapes = [*REAL, MANY_CODES, *ODD] if on_gpu else SMALL
    found: list[tuple[str, Callable[[], None]]] = []
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in shapes:
            size = "x".join(map(str, shape))
            found.append((f"scores equal float64, {name} {size}", _bind(scores_hold, device, shape, dtype)))
            found.append(
                (f"losses and gradients equal float64, {name} {size}", _bind(losses_hold, device, shape, dtype))
            )
            found.append(
                (f"nearest codes and sums equal float64, {name} {size}", _bind(nearest_holds, device, shape, dtype))
            )
    for case in ("image_topk", "text_topk"):
        found.append((f"the original's numbers, {case}", _bind(golden_holds, device, case)))
    repeats = 3 if quick or not on_gpu else 40
    for shape in shapes[-2:] if not on_gpu else [REAL[0], *ODD]:
        for dtype in TYPES[1:] if on_gpu else TYPES[:1]:
            size = "x".join(map(str, shape))
            found.append(
                (f"equal bits {repeats} times, {dtype} {size}", _bind(bits_hold, device, shape, dtype, repeats))
            )
    found.append(("a code that took all tokens", _bind(skew_holds, device, 80000 if on_gpu else 600)))
    if on_gpu:
        found.append(("no device sync", _bind(nothing_syncs, device)))
        found.append(("no device sync in a quantizer", _bind(quantizer_does_not_sync, device)))
        if not quick:
            found.append(("offsets past 2^31", _bind(far_offsets_hold, device)))
    return found


def scores_hold(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for share in (None, 0.7, 0.0):
        x, codes, _, t, valid = draw(device, shape, dtype, share)
        with poisoned():
            found = grounding_scores(x, codes, t, valid, backend="triton")
        expected = grounding_scores_reference(x.double(), codes.double(), t.double(), valid)
        # Products of half types are exact in float32: the kernels lose nothing more in them.
        at_most("scores", found, expected, 1e-5 if x.is_cuda else LIMIT[dtype])
        clean = x if valid is None else x.where(valid[..., None], 0)
        similarity = torch.sigmoid(t.to(dtype) * (clean @ codes.T))
        eager = (similarity if valid is None else similarity * valid[..., None]).sum(1)
        no_worse("scores", found, eager, expected)
        picks = shape[4]
        best, own = (s.topk(picks).indices for s in (expected, found))
        regret = expected.gather(1, best).sum(1) - expected.gather(1, own).sum(1)
        if regret.max() > 1e-5 * shape[1] * picks:
            raise AssertionError(f"picked codes score {float(regret.max()):.2e} less than the best")


def losses_hold(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for share in (None, 0.7, 0.0):
        x, codes, indices, t, valid = draw(device, shape, dtype, share)
        with poisoned():
            found = gradients(triton_losses, x, codes, indices, t, valid)
        expected = gradients(grounding_losses_reference, x.double(), codes.double(), indices, t.double(), valid)
        eager = gradients(eager_losses, x, codes, indices, t, valid)
        for name, ours, theirs, right in zip(
            ("token loss", "code loss", "gradient of x", "gradient of codes", "gradient of temperature"),
            found, eager, expected, strict=True,
        ):  # fmt: skip
            if min(shape) == 1 and right.numel() == 1:
                # One token or one pick: differences of equals.
                continue
            at_most(name, ours, right, LIMIT[dtype])
            no_worse(name, ours, theirs, right, slack=LIMIT[dtype] / 5 if right.numel() == 1 else 1e-6)


def nearest_holds(device: str, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    x, codes, _, _, valid = draw(device, shape, dtype, 0.8)
    rows, real = x.flatten(0, 1), valid.flatten()
    clean = rows.where(real[:, None], 0)
    for metric in ("l2", "cosine"):
        with poisoned():
            # NaN comes to nothing, but Triton's interpreter does not compare it.
            found = nearest_code(rows if x.is_cuda else clean, codes, metric=metric, backend="triton")
        if not ((found >= 0) & (found < len(codes))).all():
            raise AssertionError(f"{metric}: an index outside of the codebook")
        wide = codes.double()
        if metric == "l2":
            near = clean.double() @ wide.T - wide.square().sum(1) / 2
        else:
            near = clean.double() @ torch.nn.functional.normalize(wide, dim=1).T
        regret = (near.max(1).values - near.gather(1, found[:, None])[:, 0])[real]
        if real.any() and regret.max() > 1e-5 * near.abs().max():
            raise AssertionError(f"{metric}: a code is nearer than the one found, by {float(regret.max()):.2e}")
    with poisoned():
        sums, counts = segment_sum(rows, found, len(codes), real, backend="triton")
    expected = segment_sum_reference(clean.double(), found, len(codes), real)
    at_most("sums by code", sums, expected.sums, 1e-5)
    if not torch.equal(counts, expected.counts):
        raise AssertionError("counts by code differ")


def golden_holds(device: str, case: str) -> None:
    """Scores' picks and the grounding loss from the states that the original's towers gave."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        states = file["out.vit_out" if "out.vit_out" in file.files else "out.text_out"][:, 1:]
        arrays = [
            states,
            file["param.vq_emb"],
            file["out.indices"],
            file["out.vq_loss"],
            file["param.topk_temperature"],
        ]
    x, codes, indices, loss, t = (torch.from_numpy(np.ascontiguousarray(array)).to(device) for array in arrays)
    indices = indices.reshape(len(x), -1).long()
    t = t.reshape(1).clamp(1, 10000)
    picked = grounding_scores(x, codes, t, backend="triton").topk(indices.shape[1]).indices
    if not torch.equal(picked, indices):
        raise AssertionError(f"picked {picked.tolist()}, the original {indices.tolist()}")
    q, e = grounding_losses(x, codes, indices, t, backend="triton")
    at_most("the loss", (q + 0.25 * e).reshape(1), loss.double().reshape(1), 1e-5)


def bits_hold(device: str, shape: tuple[int, ...], dtype: torch.dtype, repeats: int) -> None:
    x, codes, indices, t, valid = draw(device, shape, dtype, 0.8)
    indices = indices % max(1, len(codes) // 3)  # examples share codes, and pick some twice
    rows = x.flatten(0, 1)

    def run() -> list[Tensor]:
        nearest = nearest_code(rows.nan_to_num(0), codes, backend="triton")
        sums = segment_sum(rows, nearest, len(codes), valid.flatten(), backend="triton")
        scores = grounding_scores(x, codes, t, valid, backend="triton")
        return [nearest, *sums, scores, *gradients(triton_losses, x, codes, indices, t, valid)]

    first = run()
    for i in range(repeats):
        noise = torch.randn(1 + i * 4099, device=device)  # other addresses, other neighbours
        for a, b in zip(first, run(), strict=True):
            if not torch.equal(a, b):
                raise AssertionError(f"run {i + 2} differs by {float((a.double() - b.double()).abs().max()):.2e}")
        del noise


def skew_holds(device: str, rows: int) -> None:
    x = torch.randn(rows, 64, device=device)
    for indices in (torch.full((rows,), 6), torch.arange(rows) // (rows // 2 + 1), torch.arange(rows) % 7):
        sums, counts = segment_sum(x, indices.to(device), 9, backend="triton")
        expected = segment_sum_reference(x.double(), indices.to(device), 9)
        at_most("sums", sums, expected.sums, 1e-5)
        if not torch.equal(counts, expected.counts):
            raise AssertionError("counts differ")


def nothing_syncs(device: str) -> None:
    x, codes, _, t, valid = draw(device, REAL[0], torch.bfloat16, 0.8)
    leaves = [tensor.requires_grad_() for tensor in (x.nan_to_num(0), codes, t)]
    rows = leaves[0].detach().flatten(0, 1)

    def run() -> None:
        for number, known in ((leaves[2], valid), (leaves[2], None), (10.0, valid)):
            picked = grounding_scores(leaves[0], codes, number, known).topk(100).indices
            q, e = grounding_losses(leaves[0], leaves[1], picked, number, known)
            torch.autograd.grad(q + e, leaves[:2])
        for metric in ("l2", "cosine"):
            found = nearest_code(rows, codes, metric=metric)
        segment_sum(rows, found, len(codes), valid.flatten())

    without_sync(run)


def quantizer_does_not_sync(device: str) -> None:
    """`VectorQuantizer` without reviving, which reads the device."""
    from vlblocks.nn import VectorQuantizer

    x, _, _, _, valid = draw(device, REAL[0], torch.bfloat16, 0.8)
    for metric in ("l2", "cosine"):
        quantizer = VectorQuantizer(width=x.shape[2], codes=2048, metric=metric, codebook="ema", device=device)

        def run(quantizer: VectorQuantizer = quantizer) -> None:
            for known in (valid, None):
                tokens = x.nan_to_num(0).requires_grad_()
                out = quantizer(tokens, known, straight_through=True)
                torch.autograd.grad(out.codes.sum() + out.loss, tokens)
                quantizer.update(tokens, out.indices, known, modality="image")

        without_sync(run)


def without_sync(run: Callable[[], None]) -> None:
    """Once to compile, once where waiting for the device is an error."""
    run()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        run()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def far_offsets_hold(device: str) -> None:
    """Tensors of more than 2^31 elements: the last rows get what they get on their own."""
    batch, tokens, width = 3200, 900, 768
    x = torch.randn(batch, tokens, width, device=device, dtype=torch.bfloat16)
    codes = torch.randn(130, width, device=device, dtype=torch.bfloat16)
    t, indices = torch.full((1,), 0.1, device=device), torch.randint(130, (batch, 8), device=device)
    last = slice(batch - 2, batch)
    at_most(
        "scores",
        grounding_scores(x, codes, t, backend="triton")[last],
        grounding_scores_reference(x[last].double(), codes.double(), t.double()),
        1e-5,
    )
    rows = x.flatten(0, 1)
    found = nearest_code(rows, codes, backend="triton")[-500:]
    if not torch.equal(found, nearest_code(rows[-500:].clone(), codes, backend="triton")):
        raise AssertionError("nearest codes of the last rows differ")
    whole = gradients(triton_losses, x, codes, indices, t, None)[2][last].double()
    alone = gradients(triton_losses, x[last], codes, indices[last], t, None)[2].double()
    at_most("gradient of x", whole, alone, 1e-2)


def draw(device: str, shape: tuple[int, ...], dtype: torch.dtype, share: float | None) -> tuple:
    """x, codes, indices, temperature, valid; tokens that are not valid are NaN."""
    batch, tokens, width, codes, picks = shape
    g = torch.Generator().manual_seed(sum(shape))
    x = torch.randn(batch, tokens, width, generator=g)
    e = torch.randn(codes, width, generator=g) * (3 / width**0.5)
    indices = torch.rand(batch, codes, generator=g).topk(picks).indices.to(device)
    x, e = x.to(device, dtype), e.to(device, dtype)
    t, valid = torch.full((1,), 1.3, device=device), None
    if share is not None:
        valid = (torch.rand(batch, tokens, generator=g) < share).to(device)
        x = x.masked_fill(~valid[..., None], float("nan"))
    return x, e, indices, t, valid


def triton_losses(*args) -> tuple[Tensor, Tensor]:
    return grounding_losses(*args, backend="triton")


def eager_losses(x: Tensor, codes: Tensor, indices: Tensor, t: Tensor, valid: Tensor | None) -> tuple[Tensor, Tensor]:
    """The losses written plainly, every step but the means in the inputs' type."""
    if valid is None:
        valid = torch.ones(x.shape[:2], dtype=torch.bool, device=x.device)
    x, picked = x.where(valid[..., None], 0), codes[indices]
    a = torch.sigmoid(t.to(x.dtype) * (x @ picked.mT)) * valid[..., None]
    guard = 1e-7 if x.dtype == torch.float16 else 1e-18
    u = a @ picked / (a.sum(2, keepdim=True) + guard)
    v = a.mT @ x / (a.sum(1)[..., None] + guard)
    present = valid.any(1)
    tokens, examples = valid.sum().clamp_min(1), present.sum().clamp_min(1)
    q = ((u - x.detach()) * valid[..., None]).float().square().sum() / (tokens * x.shape[2])
    e = ((v - picked.detach()) * present[:, None, None]).float().square().sum()
    return q, e / (examples * picked[0].numel())


def gradients(losses: Callable, x: Tensor, codes: Tensor, indices: Tensor, t: Tensor, valid: Tensor | None) -> list:
    """Both losses, then the gradients to x, codes and temperature of the loss times x's size: float16 holds those."""
    leaves = [tensor.detach().clone().requires_grad_() for tensor in (x, codes, t)]
    q, e = losses(leaves[0], leaves[1], indices, leaves[2], valid)
    return [q.detach(), e.detach(), *torch.autograd.grad((q + 0.25 * e) * x.numel(), leaves)]


def at_most(name: str, found: Tensor, expected: Tensor, limit: float) -> None:
    """Relative norm of the difference from float64."""
    wrong = distance(found, expected)
    if not wrong <= limit:
        raise AssertionError(f"{name}: off by {wrong:.2e}, at most {limit:.0e} allowed")


def no_worse(name: str, found: Tensor, eager: Tensor, expected: Tensor, slack: float = 1e-6) -> None:
    """At most twice eager's error, which in float16 may be infinite."""
    ours, theirs = distance(found, expected), distance(eager, expected)
    if theirs == theirs and not ours <= 2 * theirs + slack:
        raise AssertionError(f"{name}: off by {ours:.2e}, eager by {theirs:.2e}")


def distance(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected).norm() / expected.norm().clamp_min(1e-30))


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Fresh memory holds NaN, or the largest integer."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


def _bind(function: Callable[..., None], *arguments: object) -> Callable[[], None]:
    return lambda: function(*arguments)
