"""Contrastive sums over all pairs of two sets of features, tile by tile: the matrix of pairs is never whole.

Rows are left [m, D], columns right [n, D]. A tile of logits z[i, j] = scale <left_i, right_j> serves its rows and its
columns, and is made again in the backward: memory beside the features is O(m + n) numbers and one tile. Softmax logits
are in bits, their softmax is 2^z / sum 2^z: a caller multiplies scale by log2(e) and what comes out by ln(2).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .grounding import accumulation_dtype
from .registration import INTERPRETED, operation

LOG2E = math.log2(math.e)
LN2 = math.log(2)

CACHE_BYTES = 2**20
"""Size of a tile of logits on a CPU: it stays in a core's cache while it is worked on."""

CHUNK_BYTES = 2**28
"""Size of the logits held at once on a GPU: large enough that the columns' gradient is written few times."""


class Pairing(NamedTuple):
    """What relates a row to a column besides their similarity.

    A row's others are the columns of its id, its partner aside: further positives, or no candidates at all.
    """

    partner: Tensor | None = None  # [m] long, the column that is a row's own, none twice; out of range: it has none
    row_ids: Tensor | None = None  # [m] int32, at least 0; None: there are no others
    column_ids: Tensor | None = None  # [n] int32
    captions: Tensor | None = None  # [n] int32, column_ids as rows see them (-1: of no row), if that differs
    exclude: bool = False  # others are no candidates

    def partners(self, columns: int) -> tuple[Tensor, Tensor] | None:
        """A column [m] within range for each row, and whether [m] it is the row's partner."""
        if self.partner is None or columns == 0:
            return None
        return self.partner.clamp(0, columns - 1), (self.partner >= 0) & (self.partner < columns)


class Side(NamedTuple):
    """What one pass over the tiles gives rows, or columns."""

    lse: Tensor  # [m] log2 of the sum over candidates of 2^z; -inf without any
    others: Tensor | None  # [m] sum of the others' z; None without ids
    teacher: Tensor | None  # [2, m] the teacher's lse, and the mean of z under its softmax


class Sums(NamedTuple):
    """What one pass over the tiles gives."""

    rows: Side
    columns: Side | None  # None if only rows are asked for
    own: Tensor | None  # [m] the partner's z, 0 without one; None where no row has one


class Weights(NamedTuple):
    """What rows, or columns, add to the logits' gradient.

    dz = lse_grad 2^(z - lse) + own (at the partner) + others (at others) + teacher_grad 2^(teacher's z - its lse)
    """

    lse: Tensor  # [m], as all
    lse_grad: Tensor
    own: Tensor
    others: Tensor
    teacher_lse: Tensor | None
    teacher_grad: Tensor | None


class Tile(NamedTuple):
    """Part of the matrix of pairs."""

    rows: slice
    columns: slice
    others: tuple[Tensor | None, Tensor | None]  # [r, c] bool as rows and as columns see them; None: surely none


def tile_shape(rows: int, columns: int, item: int, chunk_bytes: int | None, on_gpu: bool) -> tuple[int, int]:
    """Rows and columns of a tile of logits of at most `chunk_bytes`, so far as one pair allows it."""
    fits = max(1, (chunk_bytes or (CHUNK_BYTES if on_gpu else CACHE_BYTES)) // item)
    if on_gpu:
        c = max(1, min(columns, fits))
        return max(1, min(rows, fits // c)), c
    # Four times as wide as high: the columns' gradient is read and written once per tile, as are the rows'.
    r = max(1, min(rows, math.isqrt(fits) // 2))
    c = max(1, min(columns, fits // r))
    return max(1, min(rows, fits // c)), c


def tiles(rows: int, columns: int, shape: tuple[int, int], pairing: Pairing) -> Iterator[Tile]:
    """The whole matrix in tiles, row by row."""
    for top in range(0, rows, shape[0]):
        r = slice(top, min(top + shape[0], rows))
        known: Tensor | None = None
        if pairing.row_ids is not None and pairing.column_ids is not None and not pairing.row_ids.is_cuda:
            # Few tiles have equal ids in them; on a GPU, finding out would make the CPU wait.
            known = torch.isin(pairing.column_ids, pairing.row_ids[r])
        for first in range(0, columns, shape[1]):
            c = slice(first, min(first + shape[1], columns))
            known_none = known is not None and not known[c].any()
            yield Tile(r, c, (None, None) if known_none else _others(pairing, r, c))


def _others(pairing: Pairing, r: slice, c: slice) -> tuple[Tensor | None, Tensor | None]:
    ids, column_ids, captions = pairing.row_ids, pairing.column_ids, pairing.captions
    if ids is None or column_ids is None:
        return None, None
    of_columns = ids[r, None] == column_ids[None, c]
    of_rows = of_columns if captions is None else ids[r, None] == captions[None, c]
    if pairing.partner is not None:
        stranger = pairing.partner[r, None] != torch.arange(c.start, c.stop, device=ids.device)
        of_rows, of_columns = of_rows & stranger, of_columns & stranger
    return of_rows, of_columns


def product_into(buffer: Tensor, left: Tensor, right: Tensor) -> Tensor:
    """The logits left right^T in a flat buffer that is at least as large."""
    z = buffer[: len(left) * len(right)].view(len(left), len(right))
    return torch.mm(left, right.T, out=z)


def _powers(z: Tensor, dim: int, hidden: Tensor | None, out: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """2^(z - top) of the candidates, their sums along `dim`, and top."""
    if hidden is not None:
        z = z.masked_fill(hidden, -math.inf)
    top = z.amax(dim, keepdim=True)
    if hidden is not None:
        top.masked_fill_(top == -math.inf, 0)
    powers = torch.sub(z, top, out=out.view_as(z)).exp2_()
    return powers, powers.sum(dim), top.squeeze(dim)


def _add_to_side(
    side: Side, at: slice, dim: int, z: Tensor, zt: Tensor | None, others: Tensor | None, exclude: bool, scratch: Tensor
) -> None:
    hidden = others if exclude else None
    scratch = scratch[: z.numel()]
    _, total, top = _powers(z, dim, hidden, scratch)
    side.lse[at] = torch.logaddexp2(side.lse[at], total.log2_().add_(top))
    if side.others is not None and others is not None:
        side.others[at] += (z * others).sum(dim)
    if side.teacher is not None and zt is not None:
        powers, total, top = _powers(zt, dim, hidden, scratch)
        mean = powers.mul_(z).sum(dim) / total.clamp_min(torch.finfo(z.dtype).tiny)
        found = torch.stack([total.log2_().add_(top), mean])
        side.teacher[:, at] = _merge_means(side.teacher[:, at], found)


def _merge_means(first: Tensor, second: Tensor) -> Tensor:
    """Log-sum-exps and means [2, m] of two sets of candidates -> of both; the log-sum-exps are constants."""
    a, b = first[0].detach(), second[0].detach()
    both = torch.logaddexp2(a, b)
    # Neither may have a candidate.
    safe = both.masked_fill(both == -math.inf, 0)
    return torch.stack([both, first[1] * torch.exp2(a - safe) + second[1] * torch.exp2(b - safe)])


def merge(first: Tensor, second: Tensor) -> Tensor:
    """Results [k, m] of `contrast` over two sets of candidates -> those over both."""
    sums = torch.stack([torch.logaddexp2(first[0], second[0]), first[1] + second[1]])
    return sums if len(first) == 2 else torch.cat([sums, _merge_means(first[2:], second[2:])])


def sums_chunked(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    pairing: Pairing,
    teacher: tuple[Tensor, Tensor] | None,
    columns: bool,
    chunk_bytes: int | None,
) -> Sums:
    """The sums in PyTorch."""
    dtype = accumulation_dtype(left, right)
    left, right = left.to(dtype) * scale, right.to(dtype)
    if teacher is not None:
        teacher = (teacher[0].to(dtype) * scale, teacher[1].to(dtype))
    m, n = len(left), len(right)

    def empty_side(size: int) -> Side:
        nothing = left.new_full((size,), -math.inf)
        zeros = left.new_zeros(size)
        others = None if pairing.row_ids is None else zeros
        return Side(nothing.clone(), others, None if teacher is None else torch.stack([nothing, zeros]))

    rows, side_of_columns = empty_side(m), empty_side(n) if columns else None
    partners = pairing.partners(n)
    own = None if partners is None else left.new_zeros(m)
    shape = tile_shape(m, n, left.element_size(), chunk_bytes, left.is_cuda)
    logits, scratch, taught = (left.new_empty(shape[0] * shape[1] if n < 2 or teacher else 0) for n in range(3))
    for r, c, (row_others, column_others) in tiles(m, n, shape, pairing):
        z = product_into(logits, left[r], right[c])
        zt = None if teacher is None else product_into(taught, teacher[0][r], teacher[1][c])
        if own is not None and pairing.partner is not None:
            place = pairing.partner[r, None] - c.start
            inside = (place >= 0) & (place < z.shape[1])
            own[r] += (z.gather(1, place.clamp(0, z.shape[1] - 1)) * inside)[:, 0]
        _add_to_side(rows, r, 1, z, zt, row_others, pairing.exclude, scratch)
        if side_of_columns is not None:
            _add_to_side(side_of_columns, c, 0, z, zt, column_others, pairing.exclude, scratch)
    return Sums(rows, side_of_columns, own)


@torch.no_grad()
def draw_pairs(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    ids: Tensor,
    generator: torch.Generator | None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """A column for each row and a row for each column, drawn by the softmax of scale <left_i, right_j> over unlike ids.

    Independent draws, in one pass over the tiles: of competing clocks that ring at rates e^z, each is first with the
    probability of the softmax, and of the first of each tile the first is first of all. NaN counts as 0, an infinity as
    the largest number. What is drawn depends on the size of the tiles, its distribution does not.

    Args:
        left: [n, D].
        right: [n, D].
        scale: [1].
        ids: [n] integers. Where all are alike, what is drawn means nothing.
        generator: makes the draw repeatable; on left's device.
        chunk_bytes: size of the logits held at once; None: what suits the device.
    """
    dtype = accumulation_dtype(left, right)
    left, right = left.to(dtype) * scale.to(dtype), right.to(dtype)
    earliest = [left.new_full((len(left),), -math.inf) for _ in range(2)]
    drawn = [torch.zeros(len(left), dtype=torch.long, device=left.device) for _ in range(2)]
    shape = tile_shape(len(left), len(right), left.element_size(), chunk_bytes, left.is_cuda)
    logits, clocks = (left.new_empty(shape[0] * shape[1]) for _ in range(2))
    for r, c, (alike, _) in tiles(len(left), len(right), shape, Pairing(None, ids, ids)):
        z = product_into(logits, left[r], right[c]).nan_to_num_()
        if alike is not None:
            z.masked_fill_(alike, -math.inf)
        for side, at, start in ((0, r, c.start), (1, c, r.start)):
            times = clocks[: z.numel()].view_as(z).exponential_(generator=generator)
            top, place = torch.sub(z, times.log_(), out=times).max(1 - side)
            sooner = top > earliest[side][at]
            earliest[side][at] = torch.where(sooner, top, earliest[side][at])
            drawn[side][at] = torch.where(sooner, place + start, drawn[side][at])
    return drawn[0], drawn[1]


class Products:
    """Gradients to both sides' features, from tiles of the logits' gradient as they come."""

    def __init__(self, left: Tensor, right: Tensor, needed: tuple[bool, bool]) -> None:
        self.left, self.right = left, right
        dtype = accumulation_dtype(left, right)
        self.left_grad = left.new_zeros(left.shape if needed[0] else 0, dtype=dtype)
        self.right_grad = right.new_zeros(right.shape if needed[1] else 0, dtype=dtype)
        self.needed = needed

    def add(self, dz: Tensor, r: slice, c: slice) -> None:
        """Adds a tile of dz."""
        if self.needed[0]:
            _add_product(self.left_grad[r], dz, self.right[c])
        if self.needed[1]:
            _add_product(self.right_grad[c], dz.T, self.left[r])

    def add_even(self, row: Tensor, column: Tensor | None) -> None:
        """Adds dz[i, j] = row[i] + column[j]."""
        dtype = row.dtype
        if self.needed[0]:
            self.left_grad += torch.outer(row, self.right.sum(0, dtype=dtype))
            if column is not None:
                self.left_grad += column @ self.right.to(dtype)
        if self.needed[1]:
            self.right_grad += row @ self.left.to(dtype)
            if column is not None:
                self.right_grad += torch.outer(column, self.left.sum(0, dtype=dtype))

    def finish(self, scale: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients to left, right (empty where not needed) and scale [1]."""
        if not any(self.needed):
            return self.left_grad, self.right_grad, scale.new_zeros(1)
        of, grad = (self.left, self.left_grad) if self.needed[0] else (self.right, self.right_grad)
        # sum of dz z / scale, without dividing by a scale that may be 0.
        scale_grad = (of.to(grad.dtype) * grad).sum().reshape(1)
        return self.left_grad.mul_(scale), self.right_grad.mul_(scale), scale_grad


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    if a.dtype == total.dtype:
        total.addmm_(a, b)
    elif a.is_cuda:
        total += torch.mm(a, b, out_dtype=total.dtype)
    else:
        total += a.to(total.dtype) @ b.to(total.dtype)


def gradients_chunked(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    pairing: Pairing,
    teacher: tuple[Tensor, Tensor] | None,
    rows: Weights,
    columns: Weights | None,
    needed: tuple[bool, bool],
    chunk_bytes: int | None,
) -> Products:
    """Adds up the gradients in PyTorch."""
    dtype = accumulation_dtype(left, right)
    left, right = left.to(dtype), right.to(dtype)
    made = Products(left, right, needed)
    scaled = left * scale
    if teacher is not None:
        teacher = (teacher[0].to(dtype) * scale, teacher[1].to(dtype))
    shape = tile_shape(len(left), len(right), left.element_size(), chunk_bytes, left.is_cuda)
    logits, total, taught, scratch = (left.new_empty(shape[0] * shape[1] if n < 2 or teacher else 0) for n in range(4))
    for r, c, others in tiles(len(left), len(right), shape, pairing):
        z = product_into(logits, scaled[r], right[c])
        zt = None if teacher is None else product_into(taught, teacher[0][r], teacher[1][c])
        dz = total[: z.numel()].view_as(z)
        first = _part(rows, r, 1)
        _softmax_grad(z, first.lse, first.lse_grad, others[0] if pairing.exclude else None, dz)
        parts = [(first, others[0])]
        if columns is not None:
            second = _part(columns, c, 0)
            parts.append((second, others[1]))
            dz += _softmax_grad(z, second.lse, second.lse_grad, others[1] if pairing.exclude else None, z)
        for weights, equal in parts:
            if equal is not None:
                dz += equal * weights.others
            if zt is not None and weights.teacher_lse is not None and weights.teacher_grad is not None:
                hidden = equal if pairing.exclude else None
                out = scratch[: z.numel()].view_as(z)
                dz += _softmax_grad(zt, weights.teacher_lse, weights.teacher_grad, hidden, out)
        if pairing.partner is not None:
            place = pairing.partner[r, None] - c.start
            inside = (place >= 0) & (place < z.shape[1])
            place = place.clamp_(0, z.shape[1] - 1)
            value = first.own if columns is None else first.own + columns.own[c][place]
            dz.scatter_(1, place, dz.gather(1, place) + value * inside)
        made.add(dz, r, c)
    return made


def _part(weights: Weights, at: slice, dim: int) -> Weights:
    return Weights(*(None if x is None else x[at].unsqueeze(dim) for x in weights))


def _softmax_grad(z: Tensor, lse: Tensor, grad: Tensor, hidden: Tensor | None, out: Tensor) -> Tensor:
    p = torch.sub(z, lse, out=out)
    if hidden is None:
        return p.exp2_().mul_(grad)
    # What is hidden may be far above the candidates.
    return p.clamp_(max=0).exp2_().mul_(grad).masked_fill_(hidden, 0)


def _results(
    sums: Sums, left: Tensor, right: Tensor, scale: Tensor, terms: list[Tensor], pairing: Pairing, smooth: bool
) -> tuple[Tensor, Tensor]:
    """Sums -> what `contrast` returns."""
    dtype = accumulation_dtype(left, right)
    partners = pairing.partners(len(right))
    found = []
    for number, side in enumerate((sums.rows, sums.columns)):
        if side is None:
            continue
        own, others, even = terms[number]
        linear = torch.zeros_like(side.lse)
        if sums.own is not None and partners is not None:
            if number == 0:
                linear += own * sums.own
            else:
                # One partner each: in whatever order, a column gets one number that is not 0.
                linear.index_add_(0, partners[0], own[partners[0]] * (sums.own * partners[1]))
        if side.others is not None:
            linear += others * side.others
        if smooth:
            of, to = (left, right) if number == 0 else (right, left)
            linear += even * scale * (of.to(dtype) @ to.sum(0, dtype=dtype))
        parts = torch.stack([side.lse, linear])
        found.append(parts if side.teacher is None else torch.cat([parts, side.teacher]))
    return found[0], found[1] if len(found) == 2 else found[0].new_empty(len(found[0]), 0)


def _weights(grad: Tensor, result: Tensor, terms: Tensor) -> Weights:
    lse = result[0].masked_fill(result[0] == -math.inf, 0)
    if len(result) == 2:
        return Weights(lse, grad[0], grad[1] * terms[0], grad[1] * terms[1], None, None)
    taught = result[2].masked_fill(result[2] == -math.inf, 0)
    return Weights(lse, grad[0], grad[1] * terms[0], grad[1] * terms[1], taught, grad[3])


def in_triton(left: Tensor, right: Tensor, triton_kernel: bool) -> bool:
    """Whether Triton makes the logits."""
    if not triton_kernel or not (left.is_cuda or INTERPRETED) or left.dtype != right.dtype:
        return False
    from .grounding_triton import runs_on

    return left.numel() > 0 and right.numel() > 0 and runs_on(left)


def _fake_contrast(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    captions: Tensor | None,
    exclude: bool,
    row_terms: Tensor,
    column_terms: Tensor | None,
    smooth: bool,
    teacher_left: Tensor | None,
    teacher_right: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor]:
    kept, dtype = 2 if teacher_left is None else 4, accumulation_dtype(left, right)
    columns = 0 if column_terms is None else right.shape[0]
    return left.new_empty((kept, left.shape[0]), dtype=dtype), left.new_empty((kept, columns), dtype=dtype)


def _products(args: tuple, kwargs: dict, teacher: int) -> int:
    """How many matrices of logits a call makes: one, and the teacher's."""
    given = kwargs.get("teacher_left", args[teacher] if len(args) > teacher else None)
    return 1 if given is None else 2


def _contrast_flops(left, right, *args, out_shape=None, **kwargs) -> int:
    return 2 * _products(args, kwargs, 9) * left[0] * left[1] * right[0]


@operation("contrast", fake=_fake_contrast, flops=_contrast_flops)
def contrast(
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    captions: Tensor | None,
    exclude: bool,
    row_terms: Tensor,
    column_terms: Tensor | None,
    smooth: bool,
    teacher_left: Tensor | None,
    teacher_right: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
) -> tuple[Tensor, Tensor]:
    """Log-sum-exps and weighted sums of the logits z = scale <left_i, right_j>, of rows and of columns, in bits.

    Results are [2, m] and [2, n]: log2 of the sum over a row's (column's) candidates of 2^z; and
    own z[partner] + others (sum of z over the others) + even (sum of z over all), with own, others, even the three rows
    of `row_terms` and `column_terms`. With a teacher [4, m] and [4, n]: also the log-sum-exp of the teacher's
    logits over the same candidates, and the mean of z under their softmax. The teacher's logits have no gradient.

    Args:
        left: [m, D].
        right: [n, D].
        scale: [1], float32 (float64 for float64).
        partner: see `Pairing`, as for the four that follow.
        row_terms: [3, m].
        column_terms: [3, n]; None: only rows are wanted, and the columns' result is [k, 0].
        smooth: whether any `even` is not 0.
        teacher_left: [m, E], with teacher_right [n, E].
        chunk_bytes: size of the logits held at once; None: what suits the device.
        triton_kernel: whether Triton makes them, where it can; a teacher's are made in PyTorch always.
    """
    pairing = Pairing(partner, row_ids, column_ids, captions, exclude)
    teacher = None if teacher_left is None or teacher_right is None else (teacher_left, teacher_right)
    columns = column_terms is not None
    if in_triton(left, right, triton_kernel) and teacher is None:
        from .contrastive_triton import sums_triton

        sums = sums_triton(left, right, scale, pairing, columns, chunk_bytes)
    else:
        sums = sums_chunked(left, right, scale, pairing, teacher, columns, chunk_bytes)
    terms = [row_terms] if column_terms is None else [row_terms, column_terms]
    return _results(sums, left, right, scale, terms, pairing, smooth)


def _fake_contrast_backward(
    row_grad: Tensor,
    column_grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    captions: Tensor | None,
    exclude: bool,
    row_terms: Tensor,
    column_terms: Tensor | None,
    smooth: bool,
    teacher_left: Tensor | None,
    teacher_right: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
    need_left: bool,
    need_right: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    dtype = accumulation_dtype(left, right)
    return (
        left.new_empty(left.shape if need_left else (0,), dtype=dtype),
        right.new_empty(right.shape if need_right else (0,), dtype=dtype),
        left.new_empty((1,), dtype=dtype),
    )


def _contrast_backward_flops(row_grad, column_grad, rows, columns, left, right, *args, out_shape=None, **kw) -> int:
    return 2 * sum(bool(need) for need in args[-2:]) * left[0] * left[1] * right[0]


@operation("contrast_backward", fake=_fake_contrast_backward, flops=_contrast_backward_flops)
def contrast_backward(
    row_grad: Tensor,
    column_grad: Tensor,
    rows: Tensor,
    columns: Tensor,
    left: Tensor,
    right: Tensor,
    scale: Tensor,
    partner: Tensor | None,
    row_ids: Tensor | None,
    column_ids: Tensor | None,
    captions: Tensor | None,
    exclude: bool,
    row_terms: Tensor,
    column_terms: Tensor | None,
    smooth: bool,
    teacher_left: Tensor | None,
    teacher_right: Tensor | None,
    chunk_bytes: int | None,
    triton_kernel: bool,
    need_left: bool,
    need_right: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of `contrast` to left, right (one of them must be needed; empty if not) and scale [1], in float32.

    `rows` and `columns` are its results, over these candidates or, merged, over more: then these candidates' share.
    """
    pairing = Pairing(partner, row_ids, column_ids, captions, exclude)
    teacher = None if teacher_left is None or teacher_right is None else (teacher_left, teacher_right)
    of_rows = _weights(row_grad, rows, row_terms)
    of_columns = None if column_terms is None else _weights(column_grad, columns, column_terms)
    needed = (need_left, need_right)
    if in_triton(left, right, triton_kernel) and teacher is None:
        from .contrastive_triton import gradients_triton

        made = gradients_triton(left, right, scale, pairing, of_rows, of_columns, needed, chunk_bytes)
    else:
        made = gradients_chunked(left, right, scale, pairing, teacher, of_rows, of_columns, needed, chunk_bytes)
    if smooth:
        even = None if column_terms is None else column_grad[1] * column_terms[2]
        made.add_even(row_grad[1] * row_terms[2], even)
    return made.finish(scale)


def _keep_contrast(ctx, inputs, output) -> None:
    tensors = [inputs[i] for i in _CONTRAST_TENSORS]
    ctx.save_for_backward(*tensors, *output)
    ctx.exclude, ctx.smooth, ctx.settings = inputs[7], inputs[10], inputs[13:15]


_CONTRAST_TENSORS = (0, 1, 2, 3, 4, 5, 6, 8, 9, 11, 12)


def _contrast_backward(ctx, row_grad, column_grad):
    left, right, scale, *ids, row_terms, column_terms, teacher_left, teacher_right, rows, columns = ctx.saved_tensors
    need_left, need_right, need_scale = ctx.needs_input_grad[:3]
    left_grad, right_grad, scale_grad = contrast_backward(
        row_grad,
        column_grad,
        rows,
        columns,
        left,
        right,
        scale,
        *ids,
        ctx.exclude,
        row_terms,
        column_terms,
        ctx.smooth,
        teacher_left,
        teacher_right,
        *ctx.settings,
        need_left or (need_scale and not need_right),
        need_right,
    )
    return (
        left_grad.to(left.dtype) if need_left else None,
        right_grad.to(right.dtype) if need_right else None,
        scale_grad.to(scale.dtype) if need_scale else None,
        *[None] * 12,
    )


contrast.register_autograd(_contrast_backward, setup_context=_keep_contrast)
