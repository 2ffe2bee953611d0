"""The softmax of `linear_cross_entropy` in Triton: a program per row turns logits into their gradient in place."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from .grounding import accumulation_dtype
from .launch import SMS, TYPE_NAMES, CompileCase, Config
from .linear_cross_entropy import Settings, Softmaxed

# Rows are streamed: more warps keep more loads in flight, and a row of a vocabulary is long enough for them.
CONFIG = Config({"BLOCK": 2048}, warps=8, stages=2)


@triton.jit
def _softmax_rows(
    logits,
    target,
    lse_in,
    grads,
    losses,
    lse_out,
    pitch,
    vocab,
    grad_stride,
    smoothing,
    z_loss,
    KNOWN: tl.constexpr,
    GRADIENT: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """One row: its loss and log-sum-exp; then, if asked for, its gradient over its logits."""
    row = tl.program_id(0)
    z_row = logits + row.to(tl.int64) * pitch
    place = tl.load(target + row)
    real = (place >= 0) & (place < vocab)
    # A target outside of the vocabulary lies in another row, or in nobody's memory.
    chosen = tl.load(z_row + place, mask=real, other=float("nan")).to(losses.dtype.element_ty)
    columns = tl.arange(0, BLOCK)
    wide: tl.constexpr = losses.dtype.element_ty
    total = tl.zeros((BLOCK,), wide)
    if KNOWN:
        lse = tl.load(lse_in + row)
    else:
        top = tl.full((BLOCK,), float("-inf"), wide)
        sums = tl.zeros((BLOCK,), wide)
        for start in range(0, vocab, BLOCK):
            inside = start + columns < vocab
            z = tl.load(z_row + start + columns, mask=inside, other=float("-inf")).to(wide)
            new = tl.maximum(top, z)
            # A lane that has seen nothing yet has -inf twice.
            safe = tl.where(new == float("-inf"), 0.0, new)
            sums = sums * tl.exp(top - safe) + tl.exp(z - safe)
            top = new
            total += tl.where(inside, z, 0.0)
        best = tl.max(top, 0)
        lse = best + tl.log(tl.sum(sums * tl.exp(top - best), 0))
        loss = (1 - smoothing) * (lse - chosen) + z_loss * lse * lse
        # A logit of -inf, which has no share of a hard target, has a mean of -inf.
        loss += tl.where(smoothing > 0, smoothing * (lse - tl.sum(total, 0) / vocab), 0.0)
        tl.store(losses + row, loss)
        tl.store(lse_out + row, lse)
    if GRADIENT:
        scale = tl.where(real, tl.load(grads + row * grad_stride), float("nan"))
        factor = scale * (1 + 2 * z_loss * lse)
        for start in range(0, vocab, BLOCK):
            column = start + columns
            inside = column < vocab
            z = tl.load(z_row + column, mask=inside, other=0.0).to(wide)
            gradient = factor * tl.exp(z - lse) - smoothing / vocab * scale
            gradient = tl.where(column == place, gradient - (1 - smoothing) * scale, gradient)
            tl.store(z_row + column, gradient.to(logits.dtype.element_ty), mask=inside)


def softmax_rows_triton(
    logits: Tensor, target: Tensor, lse: Tensor | None, grads: Tensor | None, settings: Settings
) -> Softmaxed:
    """`softmax_rows` on a GPU; a backward, which knows the log-sum-exps, has no use for losses and gets zeros."""
    dtype = accumulation_dtype(logits)
    losses = logits.new_zeros(len(target), dtype=dtype)
    lses = logits.new_empty(len(target), dtype=dtype) if lse is None else lse
    if grads is not None:
        grads = grads.to(dtype)
    _softmax_rows[(len(target),)](
        logits,
        target,
        lses,
        lses if grads is None else grads,
        losses,
        lses,
        logits.stride(0),
        logits.shape[1],
        0 if grads is None else grads.stride(0),
        settings.label_smoothing,
        settings.z_loss,
        KNOWN=lse is not None,
        GRADIENT=grads is not None,
        num_warps=CONFIG.warps,
        num_stages=CONFIG.stages,
        **CONFIG.blocks,
    )
    return Softmaxed(losses, lses)


def compile_cases(sm: int) -> list[CompileCase]:
    """Every variant that a launch can pick."""
    assert sm in SMS
    cases = []
    for dtype, name in TYPE_NAMES.items():
        if dtype == torch.float64:
            continue
        for known, gradient in ((False, False), (False, True), (True, True)):
            numbers = dict.fromkeys(("lse_in", "grads", "losses", "lse_out"), "*fp32")
            sizes = dict.fromkeys(("pitch", "vocab", "grad_stride"), "i32")
            signature = {
                "logits": f"*{name}",
                "target": "*i64",
                **numbers,
                **sizes,
                "smoothing": "fp32",
                "z_loss": "fp32",
            }
            cases.append(
                CompileCase(
                    _softmax_rows,
                    f"{name}{', known' if known else ''}{', gradient' if gradient else ''}",
                    signature,
                    {"KNOWN": known, "GRADIENT": gradient, **CONFIG.blocks},
                    CONFIG.warps,
                    CONFIG.stages,
                    divisible=("pitch",),
                )
            )
    return cases
