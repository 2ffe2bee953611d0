"""Nearest code of each token, and sums of tokens by code, without a [tokens, codes] matrix or a one-hot one.

Tokens x [M, D], codebook [C, D].
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from .grounding import CHUNK_BYTES, accumulation_dtype

METRICS = ("l2", "cosine")

COLUMNS = 4096
"""Codes in a chunk at most, so that with large codebooks a chunk still has the rows that a matrix product needs."""


class SegmentSums(NamedTuple):
    """Sums of rows by segment."""

    sums: Tensor  # [C, D] float32 (float64 for float64)
    counts: Tensor  # [C] long, rows that went into each sum


@torch.no_grad()
def nearest_code_reference(x: Tensor, codes: Tensor, metric: str = "l2", *, chunk_bytes: int = CHUNK_BYTES) -> Tensor:
    """Index of the nearest code of each token; the lowest one among equals.

    l2 maximises <x, e> - |e|^2 / 2, which is the order of |x - e|^2; cosine maximises <x, e / |e|>. Half types are
    compared in float32: a distance rounded to 8 bits would confuse close codes.

    Args:
        x: [..., D].
        codes: [C, D], C >= 1.
        metric: "l2" or "cosine".
        chunk_bytes: upper bound on a temporary tensor's size, so far as one token allows it.

    Returns:
        [...] long.

    Source: van den Oord et al. 2017 (VQ-VAE); unimo2_spec item 18.
    """
    dtype = accumulation_dtype(x, codes)
    codes = codes.to(dtype)
    if metric == "l2":
        offset = codes.square().sum(1).mul_(-0.5)
    elif metric == "cosine":
        codes, offset = F.normalize(codes, dim=1), None
    else:
        raise ValueError(f"metric is {metric!r}: choose one of {', '.join(METRICS)}")
    flat = x.reshape(-1, x.shape[-1])
    columns = min(codes.shape[0], COLUMNS)
    rows = max(1, chunk_bytes // (columns * dtype.itemsize))
    indices = torch.empty(flat.shape[0], dtype=torch.long, device=x.device)
    for start in range(0, flat.shape[0], rows):
        part = flat[start : start + rows].to(dtype)
        best: Tensor | None = None
        index = indices[start : start + rows]
        for first in range(0, codes.shape[0], columns):
            similarity = part @ codes[first : first + columns].T
            if offset is not None:
                similarity += offset[first : first + columns]
            value, at = similarity.max(dim=1)
            if best is None:
                best = value
                index.copy_(at)
            else:
                # Strictly greater: of equals the earlier chunk keeps the token.
                closer = value > best
                best = torch.where(closer, value, best)
                index.copy_(torch.where(closer, at + first, index))
    return indices.view(x.shape[:-1])


@torch.no_grad()
def segment_sum_reference(x: Tensor, indices: Tensor, segments: int, valid: Tensor | None = None) -> SegmentSums:
    """Sum and number of the rows of each segment, by sorting the indices: x is read once, in an order that is fixed.

    Args:
        x: [M, D].
        indices: [M] long, 0 <= index < segments where valid.
        segments: C.
        valid: [M] bool; rows that are not valid, NaN included, reach nothing.
    """
    if valid is not None:
        indices = indices.masked_fill(~valid, segments)
    ordered, order = torch.sort(indices, stable=True)
    bounds = torch.searchsorted(ordered, torch.arange(segments + 2, device=x.device))
    # The last bag takes the rows that do not count.
    sums = F.embedding_bag(order, x.to(accumulation_dtype(x)), bounds, mode="sum", include_last_offset=True)
    return SegmentSums(sums[:segments], bounds.diff()[:segments])
