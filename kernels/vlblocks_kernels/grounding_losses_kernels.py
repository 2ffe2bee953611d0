"""Kernels of the picked codes' losses; `grounding_losses_triton` says how they work together.

In all: x [B, tokens, width], codes [C, width], indices [B, picks], validity [B, tokens] or one element with a step of
0, weights [B, tokens, pitch], times SCALE. Every matrix is dense; `pitch` and `width` are multiples of 16.
"""

from __future__ import annotations

import triton
import triton.language as tl

GUARD = tl.constexpr(1e-18)
"""That of the reference."""


@triton.jit
def _place(first, second):
    """(tile of the first, tile of the second, example) of this program, the first fastest."""
    program = tl.program_id(0)
    return program % first, program // first % second, (program // (first * second)).to(tl.int64)


@triton.jit
def _tile(base, row, column, known, width, COLUMNS: tl.constexpr):
    """Rows [R] of a dense matrix of this width, COLUMNS from `column` on; 0 where not known."""
    c = column + tl.arange(0, COLUMNS)
    at = base + row[:, None].to(tl.int64) * width + c[None, :]
    return tl.load(at, mask=known[:, None] & (c < width)[None, :], other=0.0)


@triton.jit
def _store_tile(base, row, column, known, width, tile, COLUMNS: tl.constexpr):
    c = column + tl.arange(0, COLUMNS)
    at = base + row[:, None].to(tl.int64) * width + c[None, :]
    tl.store(at, tile.to(base.dtype.element_ty), mask=known[:, None] & (c < width)[None, :])


@triton.jit
def _factors(token_grad, code_grad, denominators):
    """(token loss's share, code loss's share, size): what d loss / d squared error is for both, over `size`."""
    of_tokens = 2.0 * tl.load(token_grad) / tl.load(denominators)
    of_codes = 2.0 * tl.load(code_grad) / tl.load(denominators + 1)
    size = tl.abs(of_tokens) + tl.abs(of_codes)
    size = tl.where(size == 0.0, 1.0, size)
    return of_tokens / size, of_codes / size, size


@triton.jit
def _steepness(temperature):
    """(t, max(1, |t|)): slopes are written over the second, which keeps them in float16's range."""
    t = tl.load(temperature)
    return t, tl.maximum(tl.abs(t), 1.0)


@triton.jit
def _sigmoid(similarity, t, known):
    """Weights; 0 where not known."""
    return tl.where(known, 1.0 / (1.0 + tl.exp2(similarity * (t * -1.4426950408889634))), 0.0)


@triton.jit
def _rounded(weight, SCALE: tl.constexpr, dtype: tl.constexpr):
    """Weights as they come back from memory: with sums of these, a mean's weights add up to 1."""
    return (weight * SCALE).to(dtype).to(tl.float32) / SCALE


@triton.jit(do_not_specialize=["batch", "tokens", "picks", "valid_step"])
def weights(
    x,  # [B, tokens, width]
    codes,  # [C, width]
    indices,  # [B, picks]
    temperature,
    valid,  # [B, tokens], or one element with a step of 0
    weights,  # [B, tokens, pitch], times SCALE
    row_parts,  # [pick tiles, B, tokens]
    pick_parts,  # [token tiles, B, picks]
    batch,
    tokens,
    picks,
    pitch,
    width,
    valid_step,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Weights of a tile, and its part of the sums of both ways."""
    pick_tile, token_tile, b = _place(tl.cdiv(picks, BK), tl.cdiv(tokens, BN))
    n = token_tile * BN + tl.arange(0, BN)
    k = pick_tile * BK + tl.arange(0, BK)
    code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
    similarity = tl.zeros((BN, BK), tl.float32)
    for d in range(0, width, BD):
        token = _tile(x, b * tokens + n, d, n < tokens, width, BD)
        picked = _tile(codes, code, d, k < picks, width, BD)
        similarity = tl.dot(token, picked.T, similarity, input_precision="ieee")
    real = tl.load(valid + (b * tokens + n) * valid_step, mask=n < tokens, other=0) != 0
    weight = _sigmoid(similarity, tl.load(temperature), real[:, None] & (k < picks)[None, :])
    weight = _rounded(weight, SCALE, weights.dtype.element_ty)
    _store_tile(weights, b * tokens + n, pick_tile * BK, n < tokens, pitch, weight * SCALE, BK)
    row_place = (pick_tile * batch + b) * tokens + n
    tl.store(row_parts + row_place, tl.sum(weight, 1), mask=n < tokens)
    pick_place = (token_tile * batch + b) * picks + k
    tl.store(pick_parts + pick_place, tl.sum(weight, 0), mask=k < picks)


@triton.jit(do_not_specialize=["batch", "tokens", "picks", "valid_step"])
def token_errors(
    x,
    codes,
    indices,
    valid,
    weights,
    row_sums,  # [B, tokens]
    error_parts,  # [width tiles, B, tokens]
    term_parts,  # likewise
    batch,
    tokens,
    picks,
    pitch,
    width,
    valid_step,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Squared errors of the tokens' means u, and <u - x, u>."""
    width_tile, token_tile, b = _place(tl.cdiv(width, BD), tl.cdiv(tokens, BN))
    n = token_tile * BN + tl.arange(0, BN)
    d = width_tile * BD
    mean = tl.zeros((BN, BD), tl.float32)
    for first in range(0, picks, BK):
        k = first + tl.arange(0, BK)
        code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
        weight = _tile(weights, b * tokens + n, first, n < tokens, pitch, BK)
        picked = _tile(codes, code, d, k < picks, width, BD)
        mean = tl.dot(weight, picked, mean, input_precision="ieee")
    real = tl.load(valid + (b * tokens + n) * valid_step, mask=n < tokens, other=0) != 0
    total = tl.load(row_sums + b * tokens + n, mask=n < tokens, other=1.0)
    mean = mean / SCALE / (total + GUARD)[:, None]
    error = mean - _tile(x, b * tokens + n, d, real, width, BD).to(tl.float32)
    place = (width_tile * batch + b) * tokens + n
    tl.store(error_parts + place, tl.sum(error * error, 1), mask=n < tokens)
    tl.store(term_parts + place, tl.sum(error * mean, 1), mask=n < tokens)


@triton.jit(do_not_specialize=["batch", "tokens", "picks", "valid_step", "keep"])
def code_errors(
    x,
    codes,
    indices,
    valid,
    present,  # [B], whether any token is valid
    weights,
    pick_sums,  # [B, picks]
    error_parts,  # [width tiles, B, picks]
    term_parts,  # likewise
    residuals,  # [B, picks, width]
    batch,
    tokens,
    picks,
    pitch,
    width,
    valid_step,
    keep,  # 1: write the residuals, 0: do not
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Squared errors of the codes' means v, <v - code, v>, and v - code."""
    width_tile, pick_tile, b = _place(tl.cdiv(width, BD), tl.cdiv(picks, BK))
    k = pick_tile * BK + tl.arange(0, BK)
    d = width_tile * BD
    mean = tl.zeros((BK, BD), tl.float32)
    for start in range(0, tokens, BN):
        n = start + tl.arange(0, BN)
        # Masked, for a weight of 0 does not silence a NaN.
        real = tl.load(valid + (b * tokens + n) * valid_step, mask=n < tokens, other=0) != 0
        weight = _tile(weights, b * tokens + n, pick_tile * BK, n < tokens, pitch, BK)
        token = _tile(x, b * tokens + n, d, real, width, BD)
        mean = tl.dot(weight.T, token, mean, input_precision="ieee")
    total = tl.load(pick_sums + b * picks + k, mask=k < picks, other=1.0)
    mean = mean / SCALE / (total + GUARD)[:, None]
    code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
    # An example without tokens has no error.
    counts = k < tl.where(tl.load(present + b) != 0, picks, 0)
    error = mean - _tile(codes, code, d, counts, width, BD).to(tl.float32)
    place = (width_tile * batch + b) * picks + k
    tl.store(error_parts + place, tl.sum(error * error, 1), mask=k < picks)
    # Of the error as the backward reads it: what rounding adds to all its products with tokens goes off with this.
    error = error.to(residuals.dtype.element_ty)
    tl.store(term_parts + place, tl.sum(error.to(tl.float32) * mean, 1), mask=k < picks)
    _store_tile(residuals, b * picks + k, d, k < picks * keep, width, error, BD)


@triton.jit(do_not_specialize=["picks"])
def products_of_picks(
    codes,
    indices,
    gram,  # [B, picks, 2 * pitch]
    picks,
    pitch,
    width,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """<code, code> of an example's picks, then what rounding took of it: similar codes differ in that."""
    other_tile, pick_tile, b = _place(tl.cdiv(picks, BK), tl.cdiv(picks, BN))
    k = pick_tile * BN + tl.arange(0, BN)
    j = other_tile * BK + tl.arange(0, BK)
    code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
    other = tl.load(indices + b * picks + j, mask=j < picks, other=0)
    product = tl.zeros((BN, BK), tl.float32)
    for d in range(0, width, BD):
        left = _tile(codes, code, d, k < picks, width, BD)
        right = _tile(codes, other, d, j < picks, width, BD)
        product = tl.dot(left, right.T, product, input_precision="ieee")
    main = product.to(gram.dtype.element_ty)
    inside = (k < picks)[:, None] & (j < pitch)[None, :]
    at = gram + (b * picks + k)[:, None] * (2 * pitch) + j[None, :]
    tl.store(at, main, mask=inside)
    tl.store(at + pitch, (product - main.to(tl.float32)).to(gram.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["batch", "tokens", "picks", "valid_step"])
def slopes(
    x,
    codes,
    indices,
    temperature,
    valid,
    weights,
    gram,
    residuals,
    row_sums,
    pick_sums,
    token_terms,
    code_terms,
    token_grad,
    code_grad,
    denominators,
    slopes,  # [B, tokens, pitch], gradient of the similarities
    pulls,  # [B, tokens, pitch], what a token's x adds to the gradient of its pick
    temperature_parts,  # [pick tiles, B, tokens]
    batch,
    tokens,
    picks,
    pitch,
    width,
    valid_step,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    pick_tile, token_tile, b = _place(tl.cdiv(picks, BK), tl.cdiv(tokens, BN))
    n = token_tile * BN + tl.arange(0, BN)
    k = pick_tile * BK + tl.arange(0, BK)
    code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
    # <u, code>, with u as a mean of codes.
    by_mean = tl.zeros((BN, BK), tl.float32)
    for first in range(0, picks, BD):
        j = first + tl.arange(0, BD)
        weight = _tile(weights, b * tokens + n, first, n < tokens, pitch, BD)
        at = gram + (b * picks + j)[:, None] * (2 * pitch) + k[None, :]
        inside = (j < picks)[:, None] & (k < picks)[None, :]
        by_mean = tl.dot(weight, tl.load(at, mask=inside, other=0.0), by_mean, input_precision="ieee")
        by_mean = tl.dot(weight, tl.load(at + pitch, mask=inside, other=0.0), by_mean, input_precision="ieee")
    row_total = tl.load(row_sums + b * tokens + n, mask=n < tokens, other=1.0) + GUARD
    by_mean = by_mean / SCALE / row_total[:, None]
    similarity = tl.zeros((BN, BK), tl.float32)
    by_residual = tl.zeros((BN, BK), tl.float32)
    for d in range(0, width, BD):
        token = _tile(x, b * tokens + n, d, n < tokens, width, BD)
        picked = _tile(codes, code, d, k < picks, width, BD)
        residual = _tile(residuals, b * picks + k, d, k < picks, width, BD)
        similarity = tl.dot(token, picked.T, similarity, input_precision="ieee")
        by_residual = tl.dot(token, residual.T, by_residual, input_precision="ieee")
    t, steep = _steepness(temperature)
    of_tokens, of_codes, size = _factors(token_grad, code_grad, denominators)
    pick_total = tl.load(pick_sums + b * picks + k, mask=k < picks, other=1.0) + GUARD
    token_term = tl.load(token_terms + b * tokens + n, mask=n < tokens, other=0.0)
    code_term = tl.load(code_terms + b * picks + k, mask=k < picks, other=0.0)
    real = tl.load(valid + (b * tokens + n) * valid_step, mask=n < tokens, other=0) != 0
    known = real[:, None] & (k < picks)[None, :]
    weight = _sigmoid(similarity, t, known)
    slope = weight / row_total[:, None] * of_tokens * (by_mean - similarity - token_term[:, None])
    slope += weight / pick_total[None, :] * of_codes * (by_residual - code_term[None, :])
    slope *= 1.0 - weight
    heat = tl.where(known, slope * similarity, 0.0)
    place = (pick_tile * batch + b) * tokens + n
    tl.store(temperature_parts + place, tl.sum(heat, 1) * size, mask=n < tokens)
    slope = tl.where(known, slope * (t / steep), 0.0)
    _store_tile(slopes, b * tokens + n, pick_tile * BK, n < tokens, pitch, slope, BK)
    share = _rounded(weight, SCALE, weights.dtype.element_ty) / row_total[:, None]
    pull = slope - share * (of_tokens / steep)
    _store_tile(pulls, b * tokens + n, pick_tile * BK, n < tokens, pitch, pull, BK)


@triton.jit(do_not_specialize=["tokens", "picks"])
def overlaps(
    weights,
    row_sums,
    overlaps,  # [B, picks, pitch]
    tokens,
    picks,
    pitch,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    """Sum over tokens of both picks' shares of the token."""
    other_tile, pick_tile, b = _place(tl.cdiv(picks, BD), tl.cdiv(picks, BK))
    k = pick_tile * BK + tl.arange(0, BK)
    overlap = tl.zeros((BK, BD), tl.float32)
    for start in range(0, tokens, BN):
        n = start + tl.arange(0, BN)
        total = tl.load(row_sums + b * tokens + n, mask=n < tokens, other=1.0)
        share = (1.0 / SCALE) / (total + GUARD)
        left = _tile(weights, b * tokens + n, pick_tile * BK, n < tokens, pitch, BK)
        right = _tile(weights, b * tokens + n, other_tile * BD, n < tokens, pitch, BD)
        left = (left.to(tl.float32) * share[:, None]).to(weights.dtype.element_ty)
        right = (right.to(tl.float32) * share[:, None]).to(weights.dtype.element_ty)
        overlap = tl.dot(left.T, right, overlap, input_precision="ieee")
    _store_tile(overlaps, b * picks + k, other_tile * BD, k < picks, pitch, overlap, BD)


@triton.jit(do_not_specialize=["tokens", "picks"])
def token_gradients(
    codes,
    indices,
    temperature,
    weights,
    pick_sums,
    slopes,
    residuals,
    token_grad,
    code_grad,
    denominators,
    gradients,  # [B, tokens, width]
    tokens,
    picks,
    pitch,
    width,
    SCALE: tl.constexpr,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    width_tile, token_tile, b = _place(tl.cdiv(width, BD), tl.cdiv(tokens, BN))
    n = token_tile * BN + tl.arange(0, BN)
    d = width_tile * BD
    by_slope = tl.zeros((BN, BD), tl.float32)
    by_weight = tl.zeros((BN, BD), tl.float32)
    for first in range(0, picks, BK):
        k = first + tl.arange(0, BK)
        code = tl.load(indices + b * picks + k, mask=k < picks, other=0)
        total = tl.load(pick_sums + b * picks + k, mask=k < picks, other=1.0)
        slope = _tile(slopes, b * tokens + n, first, n < tokens, pitch, BK)
        weight = _tile(weights, b * tokens + n, first, n < tokens, pitch, BK)
        picked = _tile(codes, code, d, k < picks, width, BD)
        residual = _tile(residuals, b * picks + k, d, k < picks, width, BD)
        share = weight.to(tl.float32) * ((1.0 / SCALE) / (total + GUARD))[None, :]
        by_slope = tl.dot(slope, picked, by_slope, input_precision="ieee")
        by_weight = tl.dot(share.to(weights.dtype.element_ty), residual, by_weight, input_precision="ieee")
    _, steep = _steepness(temperature)
    _, of_codes, size = _factors(token_grad, code_grad, denominators)
    gradient = size * (steep * by_slope + of_codes * by_weight)
    _store_tile(gradients, b * tokens + n, d, n < tokens, width, gradient, BD)


@triton.jit(do_not_specialize=["tokens", "picks", "valid_step"])
def pick_gradients(
    x,
    codes,
    indices,
    temperature,
    valid,
    pulls,
    overlaps,
    token_grad,
    code_grad,
    denominators,
    gradients,  # [B, picks, width], over `size` of `_factors`
    sizes,  # [1], that size
    tokens,
    picks,
    pitch,
    width,
    valid_step,
    BN: tl.constexpr,
    BK: tl.constexpr,
    BD: tl.constexpr,
):
    width_tile, pick_tile, b = _place(tl.cdiv(width, BD), tl.cdiv(picks, BK))
    k = pick_tile * BK + tl.arange(0, BK)
    d = width_tile * BD
    by_pull = tl.zeros((BK, BD), tl.float32)
    for start in range(0, tokens, BN):
        n = start + tl.arange(0, BN)
        real = tl.load(valid + (b * tokens + n) * valid_step, mask=n < tokens, other=0) != 0
        pull = _tile(pulls, b * tokens + n, pick_tile * BK, n < tokens, pitch, BK)
        token = _tile(x, b * tokens + n, d, real, width, BD)
        by_pull = tl.dot(pull.T, token, by_pull, input_precision="ieee")
    _, steep = _steepness(temperature)
    of_tokens, _, size = _factors(token_grad, code_grad, denominators)
    by_overlap = tl.zeros((BK, BD), tl.float32)
    for first in range(0, picks, BN):
        j = first + tl.arange(0, BN)
        code = tl.load(indices + b * picks + j, mask=j < picks, other=0)
        overlap = _tile(overlaps, b * picks + k, first, k < picks, pitch, BN)
        picked = _tile(codes, code, d, j < picks, width, BD)
        by_overlap = tl.dot(overlap, picked, by_overlap, input_precision="ieee")
    gradient = steep * by_pull + of_tokens * by_overlap
    _store_tile(gradients, b * picks + k, d, k < picks, width, gradient, BD)
    if tl.program_id(0) == 0:
        tl.store(sizes, size)
