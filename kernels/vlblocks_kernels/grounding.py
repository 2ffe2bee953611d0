"""Grounding lookup: which codes of a codebook a set of tokens picks, and how well the picked codes explain the tokens.

Tokens x [B, N, D], codebook [C, D], temperature t (one number), validity [B, N] (True = real). Sums and losses are
float32 for half types, float64 for float64.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK_BYTES = 2**22
"""Size of the largest temporary tensor of a chunked function: small enough to stay in a CPU core's cache."""

GUARD = 1e-18
"""Added to the sums that are divided by. Changes no float32 sum above 1e-11, and makes the mean over nothing 0."""


class SoftMeans(NamedTuple):
    """What the picked codes say of each token, and the tokens of each picked code."""

    tokens: Tensor  # [B, N, D] mean of the picked codes, weighted by their similarity with the token; 0 if invalid
    codes: Tensor  # [B, K, D] mean of the valid tokens, weighted by their similarity with the code; 0 if none is valid


class GroundingLosses(NamedTuple):
    """Mean squared errors of both means, scalars."""

    token_loss: Tensor  # q, over valid tokens and D
    code_loss: Tensor  # e, over examples with a valid token, K and D


class GroundingTerms(NamedTuple):
    """The losses, and what their gradients need beside the inputs."""

    token_loss: Tensor  # scalar
    code_loss: Tensor  # scalar
    row_sums: Tensor  # [B, N] sums of the weights over picks
    pick_sums: Tensor  # [B, K] sums of the weights over tokens
    token_terms: Tensor  # [B, N] <mean - token, mean>
    code_terms: Tensor  # [B, K] <mean - code, mean>
    denominators: Tensor  # [2] number of summands of both losses, at least 1


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """float64 if any tensor is, float32 otherwise."""
    return torch.float64 if any(tensor.dtype == torch.float64 for tensor in tensors) else torch.float32


def as_temperature(temperature: Tensor | float, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The temperature as a [1] tensor on x's device; a number, or a tensor that lives there, makes no device sync."""
    if not isinstance(temperature, Tensor):
        return torch.full((1,), temperature, dtype=dtype, device=x.device)
    return temperature.to(device=x.device, dtype=dtype).reshape(1)


@torch.no_grad()
def grounding_scores_reference(
    x: Tensor,
    codes: Tensor,
    temperature: Tensor | float,
    valid: Tensor | None = None,
    *,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Accumulated similarity S[b, c] = sum over valid n of sigmoid(t <x[b, n], codes[c]>), without gradient.

    Holds chunks of [b, N, c] only. The product runs in the dtype of x and codes, all that follows in float32.

    Args:
        x: [B, N, D]; what invalid tokens hold, NaN included, reaches nothing.
        codes: [C, D].
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool; all real if None.
        chunk_bytes: upper bound on a temporary tensor's size, so far as one code and example allow it.

    Returns:
        [B, C] float32 (float64 for float64). Scores of an example without valid tokens are 0.

    Source: Li et al. 2022 (UNIMO-2), section 2.2; unimo2_spec item 13.
    """
    batch, tokens, width = x.shape
    total = codes.shape[0]
    dtype = accumulation_dtype(x, codes)
    product = torch.promote_types(x.dtype, codes.dtype)
    x, codes = x.to(product), codes.to(product)
    t = as_temperature(temperature, x, dtype)

    column_bytes = max(1, tokens) * dtype.itemsize
    columns = min(max(1, total), max(1, chunk_bytes // column_bytes))
    rows = max(1, chunk_bytes // (column_bytes * columns))
    scores = x.new_empty((batch, total), dtype=dtype)
    for start in range(0, batch, rows):
        part, counts = x[start : start + rows], None
        if valid is not None:
            counts = valid[start : start + rows, :, None].to(dtype)
            part = _zero_invalid(part, valid[start : start + rows])
        flat = part.reshape(-1, width)
        for first in range(0, total, columns):
            similarity = (flat @ codes[first : first + columns].T).to(dtype).unflatten(0, part.shape[:2])
            similarity.mul_(t).sigmoid_()
            if counts is not None:
                # A masked fill takes ten times as long on a CPU, and a matrix product may round to tf32.
                similarity.mul_(counts)
            torch.sum(similarity, dim=1, out=scores[start : start + rows, first : first + columns])
    return scores


def soft_means_reference(
    x: Tensor, picked: Tensor, temperature: Tensor | float, valid: Tensor | None = None
) -> SoftMeans:
    """Soft assignment of tokens to their example's picked codes, both ways, with gradients to all three.

    With A = sigmoid(t x picked^T): tokens = A picked / (row sums of A), codes = A^T x / (column sums of A).

    Args:
        x: [B, N, D]; invalid tokens get and give nothing.
        picked: [B, K, D] code vectors.
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool; all real if None.

    Source: unimo2_spec items 15 and 16.
    """
    if valid is not None:
        x = _zero_invalid(x, valid)
    return _soft_means(x, picked, as_temperature(temperature, x, x.dtype), valid)


def _zero_invalid(x: Tensor, valid: Tensor) -> Tensor:
    return torch.where(valid[..., None], x, 0)


def _soft_means(x: Tensor, picked: Tensor, t: Tensor, valid: Tensor | None) -> SoftMeans:
    """Soft means of tokens that are 0 where invalid."""
    weights = torch.sigmoid(t * (x @ picked.mT))
    if valid is not None:
        weights = weights * valid[..., None].to(weights.dtype)
    # Dividing [B, N, K] weights is cheaper than dividing the [B, N, D] means.
    of_token = weights / (weights.sum(2, keepdim=True) + GUARD)
    of_code = weights / (weights.sum(1, keepdim=True) + GUARD)
    return SoftMeans(of_token @ picked, of_code.mT @ x)


def grounding_losses_reference(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor | float, valid: Tensor | None = None
) -> GroundingLosses:
    """How far tokens lie from what their example's picked codes say of them, and the codes from their tokens.

    token_loss q = mean (tokens' means - stopgrad(x))^2, code_loss e = mean (codes' means - stopgrad(picked))^2, with
    `soft_means_reference`. Only the targets are cut: the weights carry gradients to x, codes and temperature. The
    largest tensors are [B, N, K], [B, N, D] and [B, K, D].

    Args:
        x: [B, N, D].
        codes: [C, D] codebook.
        indices: [B, K] picked codes of each example.
        temperature: t, a number or a tensor of one element.
        valid: [B, N] bool; all real if None.

    Source: Li et al. 2022 (UNIMO-2), section 2.2; unimo2_spec items 15 to 17.
    """
    dtype = accumulation_dtype(x, codes)
    # F.embedding: the backward of an indexing expression adds in no fixed order.
    picked = F.embedding(indices, codes).to(dtype)
    x = x.to(dtype)
    targets = picked.detach()
    token_count: Tensor | int
    example_count: Tensor | int
    if valid is None:
        token_count, example_count = max(1, x.shape[0] * x.shape[1]), max(1, x.shape[0])
        present = None if x.shape[1] else x.new_zeros(x.shape[0], dtype=torch.bool)
    else:
        x = _zero_invalid(x, valid)
        present = valid.any(1)
        token_count, example_count = valid.sum().clamp_min(1), present.sum().clamp_min(1)
    if present is not None:
        # An example without tokens has means of 0; with targets of 0 it adds no error and no gradient.
        targets = targets.masked_fill(~present[:, None, None], 0)
    means = _soft_means(x, picked, as_temperature(temperature, x, dtype), valid)
    token_error = F.mse_loss(means.tokens, x.detach(), reduction="sum")
    code_error = F.mse_loss(means.codes, targets, reduction="sum")
    width = max(1, x.shape[2])
    return GroundingLosses(
        token_error / (token_count * width), code_error / (example_count * (max(1, indices.shape[1]) * width))
    )


@torch.no_grad()
def grounding_terms_reference(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None = None
) -> GroundingTerms:
    """`grounding_losses_reference` without gradient, with what `grounding_gradients_reference` needs of it."""
    x, picked, weights, present = _weighed(x, codes, indices, temperature, valid)
    real = present.new_ones(x.shape[:2]) if valid is None else valid
    row_sums, pick_sums = weights.sum(2), weights.sum(1)
    of_tokens, of_codes = _residuals(x, picked, weights, row_sums, pick_sums, present)
    sizes = torch.stack((real.sum() * x.shape[2], present.sum() * (picked.shape[1] * picked.shape[2])))
    denominators = sizes.clamp_min(1).to(x.dtype)
    return GroundingTerms(
        of_tokens.square().sum() / denominators[0],
        of_codes.square().sum() / denominators[1],
        row_sums,
        pick_sums,
        (of_tokens * (of_tokens + x)).sum(2),
        (of_codes * (of_codes + picked)).sum(2),
        denominators,
    )


@torch.no_grad()
def grounding_gradients_reference(
    token_grad: Tensor,
    code_grad: Tensor,
    x: Tensor,
    codes: Tensor,
    indices: Tensor,
    temperature: Tensor,
    valid: Tensor | None,
    terms: GroundingTerms,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of the losses to x, codes and temperature, written out.

    With similarities L = x picked^T, weights A = sigmoid(t L), their sums r over picks and s over tokens, means
    u = A picked / r and v = A^T x / s, and the losses' gradients to them, p = 2 q' (u - x) / (tokens D) and likewise o:

        dA = (<p, picked> - <p, u>) / r + (<x, o> - <o, v>) / s
        dL = t dA A (1 - A)
        dx = dL picked + A o / s,  dpicked = dL^T x + A^T p / r,  dt = sum dL L / t

    Args:
        token_grad, code_grad: gradients of the two losses, scalars.
        terms: of the forward.

    Returns:
        Gradients of x [B, N, D], codes [C, D] and temperature [1], each in its input's dtype.
    """
    types = x.dtype, codes.dtype, temperature.dtype
    x, picked, weights, present = _weighed(x, codes, indices, temperature, valid)
    of_tokens, of_codes = _residuals(x, picked, weights, terms.row_sums, terms.pick_sums, present)
    token_scale, code_scale = 2 * torch.stack((token_grad, code_grad)) / terms.denominators
    of_row = weights / (terms.row_sums + GUARD)[:, :, None]
    of_pick = weights / (terms.pick_sums + GUARD)[:, None, :]
    slopes = token_scale * of_row * (of_tokens @ picked.mT - terms.token_terms[:, :, None])
    slopes += code_scale * of_pick * (x @ of_codes.mT - terms.code_terms[:, None, :])
    slopes *= 1 - weights
    heat = (slopes * (x @ picked.mT)).sum().reshape(1)
    slopes *= temperature.to(x.dtype)
    x_grad = slopes @ picked + code_scale * (of_pick @ of_codes)
    picked_grad = slopes.mT @ x + token_scale * (of_row.mT @ of_tokens)
    code_grads = torch.ops.aten.embedding_dense_backward(picked_grad, indices, codes.shape[0], -1, False)
    return x_grad.to(types[0]), code_grads.to(types[1]), heat.to(types[2])


def _weighed(
    x: Tensor, codes: Tensor, indices: Tensor, temperature: Tensor, valid: Tensor | None
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(x, picked [B, K, D], weights [B, N, K], which examples have a token [B]), 0 where invalid."""
    dtype = accumulation_dtype(x, codes)
    x, picked = x.to(dtype), F.embedding(indices, codes).to(dtype)
    if valid is None:
        weights = torch.sigmoid(temperature.to(dtype) * (x @ picked.mT))
        return x, picked, weights, torch.full((x.shape[0],), x.shape[1] > 0, device=x.device)
    x = _zero_invalid(x, valid)
    weights = torch.sigmoid(temperature.to(dtype) * (x @ picked.mT)) * valid[..., None].to(dtype)
    return x, picked, weights, valid.any(1)


def _residuals(
    x: Tensor, picked: Tensor, weights: Tensor, row_sums: Tensor, pick_sums: Tensor, present: Tensor
) -> tuple[Tensor, Tensor]:
    """The means' distances from their tokens [B, N, D] and from their codes [B, K, D]."""
    of_tokens = (weights @ picked) / (row_sums + GUARD)[:, :, None] - x
    of_codes = (weights.mT @ x) / (pick_sums + GUARD)[:, :, None] - picked
    return of_tokens, of_codes.masked_fill(~present[:, None, None], 0)
