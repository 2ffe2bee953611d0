"""Losses of the picked codes in Triton, forward and backward, by the formulas of `grounding_gradients_reference`.

Weights A over tokens and picks [B, N, K] are written once for each pass, in the inputs' type, and freed after it; they
are not saved. The means, which have the inputs' width, are never written in the forward: their squared errors leave the
kernels as one number per program. Every sum over programs is one of partial sums, in an order that is fixed.

In half types, what is written is scaled: weights by a power of two, so that small ones keep their digits in float16;
gradients by the losses' own factors (`_factors`), which are as small as one over the number of summands.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
from torch import Tensor

from . import grounding_losses_kernels as kernels
from .grounding import GroundingTerms, accumulation_dtype, grounding_gradients_reference, grounding_terms_reference
from .grounding_triton import aligned, kind_of, runs_on
from .launch import TYPE_NAMES, CompileCase, Config, operation, sm_of, sm_row
from .nearest_triton import sum_segments

# At 128 registers two blocks of 8 warps fit on a multiprocessor; the sums over picks and tokens are short, so that one
# block must have loads in flight while the other computes.
_WIDE = {
    "over_width": Config({"BN": 128, "BK": 128, "BD": 64}, warps=8, stages=3),
    "slopes": Config({"BN": 64, "BK": 64, "BD": 64}, warps=8, stages=3, registers=168),
    "over_picks": Config({"BN": 128, "BK": 64, "BD": 64}, warps=8, stages=3),
    "over_tokens": Config({"BN": 64, "BK": 128, "BD": 64}, warps=8, stages=3),
}
_SLIM = {
    "over_width": Config({"BN": 64, "BK": 128, "BD": 32}, warps=8, stages=3),
    "slopes": Config({"BN": 32, "BK": 64, "BD": 32}, warps=8, stages=3, registers=128),
    "over_picks": Config({"BN": 128, "BK": 32, "BD": 64}, warps=8, stages=3),
    "over_tokens": Config({"BN": 32, "BK": 128, "BD": 64}, warps=8, stages=3),
}
_IEEE = {
    "over_width": Config({"BN": 64, "BK": 64, "BD": 16}, warps=8, stages=2, registers=128),
    "slopes": Config({"BN": 32, "BK": 32, "BD": 16}, warps=8, stages=2, registers=128),
    "over_picks": Config({"BN": 64, "BK": 16, "BD": 64}, warps=8, stages=2, registers=128),
    "over_tokens": Config({"BN": 16, "BK": 64, "BD": 64}, warps=8, stages=2, registers=128),
}
_TMEM = _WIDE | {
    "over_picks": _WIDE["over_picks"]._replace(registers=255),
    "over_tokens": _WIDE["over_tokens"]._replace(registers=128),
}
LOSSES = {
    80: {"half": _SLIM, "fp32": _IEEE},
    89: {"half": _SLIM, "fp32": _IEEE},
    90: {"half": _WIDE, "fp32": _IEEE},
    100: {"half": _TMEM, "fp32": _IEEE},
    120: {"half": _SLIM, "fp32": _IEEE},
}
"""Tiles by chip, type and what the product runs over: BN tokens, BK picks, BD of the width."""


WEIGHT_SCALE = 2.0**15
"""Of float16 weights: 1 becomes half of the largest power of two, the least of full precision 2e-9 instead of 6e-5."""


class _Step(NamedTuple):
    """A kernel, its row of the table, and the two axes whose tiles make its programs: (size, block)."""

    kernel: Any
    over: str
    first: tuple[str, str]
    second: tuple[str, str]

    def tiles(self, values: dict[str, Any], axis: tuple[str, str]) -> int:
        return triton.cdiv(values[axis[0]], values["table"][self.over].blocks[axis[1]])

    def programs(self, values: dict[str, Any]) -> int:
        return self.tiles(values, self.first) * self.tiles(values, self.second) * values["batch"]

    def launch(self, values: dict[str, Any], **more: Tensor | int) -> None:
        """With the values, of a problem and of this launch, that have the kernel's arguments' names."""
        config, known = values["table"][self.over], values | more
        arguments = {name: known[name] for name in self.kernel.arg_names if name in known}
        self.kernel[(self.programs(values),)](**arguments, **config.blocks, **config.options())


_WEIGHTS = _Step(kernels.weights, "over_width", ("picks", "BK"), ("tokens", "BN"))
_TOKEN_ERRORS = _Step(kernels.token_errors, "over_picks", ("width", "BD"), ("tokens", "BN"))
_CODE_ERRORS = _Step(kernels.code_errors, "over_tokens", ("width", "BD"), ("picks", "BK"))
_PRODUCTS = _Step(kernels.products_of_picks, "over_width", ("picks", "BK"), ("picks", "BN"))
_SLOPES = _Step(kernels.slopes, "slopes", ("picks", "BK"), ("tokens", "BN"))
_OVERLAPS = _Step(kernels.overlaps, "over_tokens", ("picks", "BD"), ("picks", "BK"))
_TOKEN_GRADIENTS = _Step(kernels.token_gradients, "over_picks", ("width", "BD"), ("tokens", "BN"))
_PICK_GRADIENTS = _Step(kernels.pick_gradients, "over_tokens", ("width", "BD"), ("picks", "BK"))


_STEPS = (
    _WEIGHTS,
    _TOKEN_ERRORS,
    _CODE_ERRORS,
    _PRODUCTS,
    _SLOPES,
    _OVERLAPS,
    _TOKEN_GRADIENTS,
    _PICK_GRADIENTS,
)


def _problem(x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None) -> dict[str, Any]:
    """What all kernels take, by their arguments' names."""
    picks = indices.shape[1]
    flat = aligned(x.flatten(0, 1))
    return {
        "x": flat,
        "codes": aligned(codes),
        "indices": indices.contiguous(),
        "temperature": temperature,
        "valid": x.new_ones(1, dtype=torch.bool) if valid is None else valid.contiguous(),
        "valid_step": int(valid is not None),
        "batch": x.shape[0],
        "tokens": x.shape[1],
        "picks": picks,
        "pitch": picks + -picks % 16,
        "width": flat.shape[1],
        "SCALE": WEIGHT_SCALE if x.dtype == torch.float16 else 1.0,
        "table": LOSSES[sm_row(sm_of(x))][kind_of(x.dtype)],
    }


def _weigh(p: dict[str, Any]) -> tuple[Tensor, Tensor, Tensor]:
    """Weights [B, N, pitch], and parts of their sums over picks [parts, B, N] and over tokens [parts, B, K]."""
    x, batch, tokens, picks = p["x"], p["batch"], p["tokens"], p["picks"]
    weights = x.new_empty((batch, tokens, p["pitch"]))
    row_parts = x.new_empty((_WEIGHTS.tiles(p, ("picks", "BK")), batch, tokens), dtype=torch.float32)
    pick_parts = x.new_empty((_WEIGHTS.tiles(p, ("tokens", "BN")), batch, picks), dtype=torch.float32)
    _WEIGHTS.launch(p, weights=weights, row_parts=row_parts, pick_parts=pick_parts)
    return weights, row_parts, pick_parts


def _compare(p: dict[str, Any], step: _Step, shape: tuple[int, int], **more: Tensor | int) -> tuple[Tensor, Tensor]:
    """Parts of the squared errors' and of the terms' sums, both [parts, *shape]."""
    errors = p["x"].new_empty((step.tiles(p, ("width", "BD")), *shape), dtype=torch.float32)
    terms = torch.empty_like(errors)
    step.launch(p, error_parts=errors, term_parts=terms, **more)
    return errors, terms


def _present(x: Tensor, valid: Tensor | None) -> Tensor:
    return x.new_ones(x.shape[0], dtype=torch.bool) if valid is None else valid.any(1)


def _fake_forward(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of = {"dtype": accumulation_dtype(x, codes)}
    rows, picks = x.shape[:2], indices.shape
    return (
        x.new_empty((), **of),
        x.new_empty((), **of),
        x.new_empty(rows, **of),
        x.new_empty(picks, **of),
        x.new_empty(rows, **of),
        x.new_empty(picks, **of),
        x.new_empty((2,), **of),
    )


def _forward_reference(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    return tuple(grounding_terms_reference(x, codes, indices, temperature, valid))


def _forward_flops(x: list[int], codes: list[int], indices: list[int], *_args: object, **_kwargs: object) -> int:
    return 6 * x[0] * x[1] * x[2] * indices[1]


@operation("grounding_losses", fake=_fake_forward, reference=_forward_reference, flops=_forward_flops)
def grounding_losses(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """`grounding_terms_reference` of x [B, N, D] and codes [C, D] of one dtype, temperature [1] in float32."""
    if not runs_on(x) or x.numel() == 0 or indices.numel() == 0:
        return _forward_reference(x, codes, indices, temperature, valid)
    p = _problem(x, codes, indices, temperature, valid)
    batch, tokens, picks, width = p["batch"], p["tokens"], p["picks"], x.shape[2]
    present = _present(x, valid)
    if valid is None:
        denominators = torch.full((2,), float(batch * tokens * width), dtype=torch.float32, device=x.device)
        denominators[1:].fill_(batch * picks * width)
    else:
        denominators = torch.stack((valid.sum() * width, present.sum() * (picks * width))).clamp_min(1).float()
    weights, row_parts, pick_parts = _weigh(p)
    row_sums, pick_sums = row_parts.sum(0), pick_parts.sum(0)
    token_errors, token_parts = _compare(p, _TOKEN_ERRORS, (batch, tokens), weights=weights, row_sums=row_sums)
    code_errors, code_parts = _compare(
        p,
        _CODE_ERRORS,
        (batch, picks),
        weights=weights,
        pick_sums=pick_sums,
        present=present,
        residuals=weights,
        keep=0,
    )
    token_loss, code_loss = token_errors.sum() / denominators[0], code_errors.sum() / denominators[1]
    return token_loss, code_loss, row_sums, pick_sums, token_parts.sum(0), code_parts.sum(0), denominators


def _fake_backward(
    token_grad: Tensor,
    code_grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    row_sums: Tensor,
    pick_sums: Tensor,
    token_terms: Tensor,
    code_terms: Tensor,
    denominators: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    # Dense ones, whatever the inputs' strides are.
    return x.new_empty(x.shape), codes.new_empty(codes.shape), temperature.new_empty(temperature.shape)


def _backward_reference(
    token_grad: Tensor,
    code_grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    row_sums: Tensor,
    pick_sums: Tensor,
    token_terms: Tensor,
    code_terms: Tensor,
    denominators: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    terms = GroundingTerms(token_grad, code_grad, row_sums, pick_sums, token_terms, code_terms, denominators)
    return grounding_gradients_reference(token_grad, code_grad, x, codes, indices, temperature, valid, terms)


def _backward_flops(
    token_grad: list[int], code_grad: list[int], x: list[int], codes: list[int], indices: list[int], *_args: object,
    **_kwargs: object,
) -> int:  # fmt: skip
    return 12 * x[0] * x[1] * x[2] * indices[1]


@operation("grounding_losses_backward", fake=_fake_backward, reference=_backward_reference, flops=_backward_flops)
def _grounding_losses_backward(
    token_grad: Tensor,
    code_grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    row_sums: Tensor,
    pick_sums: Tensor,
    token_terms: Tensor,
    code_terms: Tensor,
    denominators: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients to x, codes and temperature, from the gradients of both losses and what the forward kept."""
    saved = (row_sums, pick_sums, token_terms, code_terms, denominators)
    if not runs_on(x) or x.numel() == 0 or indices.numel() == 0:
        return _backward_reference(token_grad, code_grad, x, codes, indices, temperature, valid, *saved)
    names = ("row_sums", "pick_sums", "token_terms", "code_terms", "denominators")
    p = _problem(x, codes, indices, temperature, valid)
    p |= {"token_grad": token_grad, "code_grad": code_grad, **dict(zip(names, saved, strict=True))}
    rows, batch, picks, pitch = p["x"], p["batch"], p["picks"], p["pitch"]
    weights, _, _ = _weigh(p)
    residuals = rows.new_empty((batch, picks, p["width"]))
    _compare(p, _CODE_ERRORS, (batch, picks), weights=weights, present=_present(x, valid), residuals=residuals, keep=1)
    gram = rows.new_empty((batch, picks, 2 * pitch))
    _PRODUCTS.launch(p, gram=gram)
    slopes, pulls = torch.empty_like(weights), torch.empty_like(weights)
    heats = rows.new_empty((_SLOPES.tiles(p, ("picks", "BK")), batch, p["tokens"]), dtype=torch.float32)
    _SLOPES.launch(
        p, weights=weights, gram=gram, residuals=residuals, slopes=slopes, pulls=pulls, temperature_parts=heats
    )
    overlaps = rows.new_empty((batch, picks, pitch))
    _OVERLAPS.launch(p, weights=weights, overlaps=overlaps)
    x_grad = torch.empty_like(rows)
    _TOKEN_GRADIENTS.launch(p, weights=weights, slopes=slopes, residuals=residuals, gradients=x_grad)
    del weights, slopes
    pick_grad, size = residuals, rows.new_empty(1, dtype=torch.float32)  # nor are these residuals
    _PICK_GRADIENTS.launch(p, pulls=pulls, overlaps=overlaps, gradients=pick_grad, sizes=size)
    code_grads, _ = sum_segments(
        pick_grad.flatten(0, 1), indices.flatten(), codes.shape[0], scale=size, dtype=codes.dtype
    )
    return (
        x_grad[:, : x.shape[2]].contiguous().view(x.shape),
        code_grads[:, : codes.shape[1]].contiguous(),
        heats.sum().reshape(1),
    )


def _keep_for_backward(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    ctx.save_for_backward(*inputs, *output[2:])
    ctx.mark_non_differentiable(*output[2:])
    ctx.set_materialize_grads(False)


def _backward(ctx: Any, token_grad: Tensor | None, code_grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    x, codes, indices, temperature, valid, *kept = ctx.saved_tensors
    nothing = kept[-1].new_zeros(())
    grads = _grounding_losses_backward(
        nothing if token_grad is None else token_grad,
        nothing if code_grad is None else code_grad,
        x,
        codes,
        indices,
        temperature,
        valid,
        *kept,
    )
    return grads[0], grads[1], None, grads[2], None


grounding_losses.register_autograd(_backward, setup_context=_keep_for_backward)


MATRICES = ("x", "codes", "weights", "gram", "residuals", "slopes", "pulls", "overlaps", "gradients")
COUNTS = ("batch", "tokens", "picks", "pitch", "width", "valid_step", "keep")
TYPES = {"indices": "*i64", "valid": "*i1", "present": "*i1", **dict.fromkeys(COUNTS, "i32")}
"""Of the kernels' arguments; matrices have the inputs' type, all others are float32."""


def compile_cases(sm: int) -> list[CompileCase]:
    """Every configuration that a launch can pick on a chip."""
    cases = []
    for dtype in (torch.float16, torch.bfloat16, torch.float32):
        kind, name = kind_of(dtype), TYPE_NAMES[dtype]
        types = TYPES | dict.fromkeys(MATRICES, f"*{name}")
        for step in _STEPS:
            config, names = LOSSES[sm][kind][step.over], step.kernel.arg_names
            known = {**config.blocks, "SCALE": WEIGHT_SCALE if dtype == torch.float16 else 1.0}
            constants = {key: known[key] for key in names if key in known}
            cases.append(
                CompileCase(
                    kernel=step.kernel,
                    label=name,
                    signature={key: types.get(key, "*fp32") for key in names if key not in constants},
                    constants=constants,
                    warps=config.warps,
                    stages=config.stages,
                    registers=config.registers,
                    divisible=tuple(key for key in ("pitch", "width") if key in names),
                    tensor_cores=kind == "half",
                )
            )
    return cases
