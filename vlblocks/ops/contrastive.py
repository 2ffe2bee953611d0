"""Contrastive losses over the pairs of all ranks, without the matrix of pairs, and hard negatives from the same tiles.

`backend`: "auto" takes Triton on a GPU and chunked PyTorch on a CPU. `exchange`: how features of other ranks come by.
"gather" holds those of all ranks; "ring" those of two at a time, the next ones on their way while the present ones are
computed with. Either way a rank makes the logits of its own images with all texts once: of a text's column it has its
own images' part, and parts are put together by a few numbers per text.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from vlblocks.errors import UserError
from vlblocks.ops import collectives
from vlblocks_kernels.contrastive import LN2, LOG2E, Pairing, contrast, contrast_backward, draw_pairs, merge
from vlblocks_kernels.sigmoid_contrast import sigmoid_contrast, sigmoid_contrast_rows

ContrastBackend = Literal["auto", "chunked", "triton"]
Exchange = Literal["gather", "ring"]
SameId = Literal["positive", "exclude"]


class Ranks(NamedTuple):
    """Where this rank's rows stand among those of all ranks that take part."""

    sizes: list[int] | None  # rows of every rank; None: this rank's own only
    offset: int
    total: int

    @classmethod
    def of(cls, rows: int, device: torch.device, gather: bool) -> Ranks:
        """All ranks, or this one alone."""
        if not gather or collectives.world_size() == 1:
            return cls(None, 0, rows)
        sizes = collectives.gather_sizes(rows, device=device)
        return cls(sizes, collectives.row_offset(sizes), sum(sizes))

    def candidates(self, x: Tensor) -> Tensor:
        """Rows of all ranks, with gradient."""
        return x if self.sizes is None else collectives.gather_with_grad(x, sizes=self.sizes)

    def constants(self, x: Tensor) -> Tensor:
        """Rows of all ranks, without gradient."""
        return x.detach() if self.sizes is None else collectives.gather(x, sizes=self.sizes)

    def own(self, device: torch.device, rows: int) -> Tensor:
        """[rows] long, the places of this rank's rows."""
        return self.offset + torch.arange(rows, device=device)


class Groups(NamedTuple):
    """Which rows show one picture."""

    codes: Tensor  # [N] int32, at least 0, equal for equal pictures
    captions: Tensor | None  # [N] int32, codes, or -1 for a text that counts as no caption; None: all count
    texts: Tensor  # [N] how many captions a row's picture has
    images: Tensor  # [N] how many rows its picture has

    @classmethod
    def of(cls, ids: Tensor, counted: Tensor | None) -> Groups:
        """From the ids [N] of all rows, and whether [N] their texts count as captions."""
        ordered, order = ids.sort()
        first, end = torch.searchsorted(ordered, ids), torch.searchsorted(ordered, ids, right=True)
        codes = first.to(torch.int32)
        if counted is None:
            return cls(codes, None, end - first, end - first)
        # No device sync, and sums of integers have no order.
        before = torch.nn.functional.pad(counted[order].long().cumsum(0), (1, 0))
        return cls(codes, torch.where(counted, codes, -1), before[end] - before[first], end - first)


def takes_triton(x: Tensor, backend: ContrastBackend) -> bool:
    """Whether the Triton kernels are wanted.

    Raises:
        UserError: an unknown back end, or one that is not installed.
    """
    if backend not in ("auto", "chunked", "triton"):
        raise UserError(f'backend is {backend!r}: use "auto", "chunked" or "triton"')
    installed = backend != "chunked" and importlib.util.find_spec("triton") is not None
    if backend == "triton" and not installed:
        raise UserError("backend='triton': Triton is not installed; use backend='chunked'")
    return installed and x.dtype != torch.float64 and (backend == "triton" or x.is_cuda)


def info_nce_rows(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    *,
    ranks: Ranks,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    same_id: SameId = "positive",
    queue_image: Tensor | None = None,
    queue_text: Tensor | None = None,
    queue_valid: Tensor | None = None,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float = 0.0,
    label_smoothing: float = 0.0,
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [b] of own images against all texts, and of own texts against all images.

    See `losses.info_nce`, which checks the arguments. Products of half types run in that type where Triton makes them,
    in float32 otherwise.

    Args:
        image: [b, D], and text [b, D], of one dtype.
        scale: [1], what similarities are multiplied by.
        ranks: whose rows are candidates.
    """
    triton = takes_triton(image, backend)
    device, rows = image.device, image.shape[0]
    dtype = torch.promote_types(image.dtype, torch.float32)
    bits = scale.to(dtype) * LOG2E
    pairing = Pairing(ranks.own(device, rows))
    groups = None
    own = slice(ranks.offset, ranks.offset + rows)
    if ids is not None:
        counted = None if weight is None else ranks.constants(weight) != 0
        groups = Groups.of(ranks.constants(ids), counted)
        pairing = Pairing(
            pairing.partner, groups.codes[own], groups.codes, groups.captions, exclude=same_id == "exclude"
        )
    queued: Tensor | int = 0
    if queue_text is not None:
        queued = len(queue_text) if queue_valid is None else queue_valid.sum()
    share = 1.0 if teacher_image is None else 1.0 - alpha
    row_terms, column_terms = _terms(groups, ranks.total, queued, label_smoothing, same_id, bits)
    row_terms, column_terms = share * row_terms[:, own], share * column_terms
    teacher = None if teacher_image is None or teacher_text is None else (teacher_image, teacher_text)
    settings = _Settings(label_smoothing > 0, exchange, chunk_bytes, triton)
    images, texts = _pairs(image, text, bits, ranks, pairing, row_terms, column_terms, teacher, settings)
    if queue_text is not None and queue_image is not None:
        own_terms = column_terms[:, own]
        sides = (
            (image, queue_text, row_terms, teacher_image, images),
            (text, queue_image, own_terms, teacher_text, texts),
        )
        images, texts = (
            merge(found, _queued(x, queue.to(x.dtype), bits, terms[2], queue_valid, taught, settings))
            for x, queue, terms, taught, found in sides
        )
    return _losses(images, alpha), _losses(texts, alpha)


def two_view_rows(
    view1: Tensor,
    view2: Tensor,
    scale: Tensor,
    *,
    ranks: Ranks,
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastBackend = "auto",
) -> tuple[Tensor, Tensor]:
    """Cross-entropies [b] of own first views and of own second views, see `losses.two_view_contrast`."""
    triton = takes_triton(view1, backend)
    rows, device = view1.shape[0], view1.device
    both = torch.cat([view1, view2])
    doubled = Ranks(None if ranks.sizes is None else [2 * n for n in ranks.sizes], 2 * ranks.offset, 2 * ranks.total)
    own = doubled.own(device, 2 * rows)
    # A view's own place is the only "other" of its id, and so no candidate.
    everything = torch.arange(doubled.total, device=device, dtype=torch.int32)
    pairing = Pairing(own.roll(rows), own.to(torch.int32), everything, exclude=True)
    bits = scale.to(torch.promote_types(view1.dtype, torch.float32)) * LOG2E
    terms = bits.new_zeros(3, 2 * rows)
    terms[0] = 1
    settings = _Settings(False, exchange, chunk_bytes, triton)
    found, _ = _pairs(both, both, bits, doubled, pairing, terms, None, None, settings)
    first, second = _losses(found, 0.0).unflatten(0, (2, rows))
    return first, second


def siglip_total(
    image: Tensor,
    text: Tensor,
    scale: Tensor,
    bias: Tensor,
    row_weight: Tensor | None,
    *,
    ranks: Ranks,
    ids: Tensor | None = None,
    weight: Tensor | None = None,
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastBackend = "auto",
) -> Tensor:
    """Losses [b] of own images with all texts, see `losses.siglip`; or sum(row_weight * losses), scalar.

    With row_weight [b], a constant, gradients are made in the forward, except around a ring.
    """
    triton = takes_triton(image, backend)
    dtype = torch.promote_types(image.dtype, torch.float32)
    scale, bias = scale.to(dtype), bias.to(dtype)
    pairing = Pairing(ranks.own(image.device, image.shape[0]))
    if ids is not None:
        counted = None if weight is None else ranks.constants(weight) != 0
        groups = Groups.of(ranks.constants(ids), counted)
        captions = groups.codes if groups.captions is None else groups.captions
        own = groups.codes[ranks.offset : ranks.offset + image.shape[0]]
        pairing = Pairing(pairing.partner, own, captions)
    if exchange == "ring" and ranks.sizes is not None:
        losses = _SigmoidRing.apply(image, text, scale, bias, ranks.sizes, pairing, chunk_bytes, triton)
        return losses if row_weight is None else (losses * row_weight).sum()
    text = ranks.candidates(text)
    settings = (*pairing[:3], chunk_bytes, triton)
    if row_weight is None:
        return sigmoid_contrast_rows(image, text, scale, bias, *settings)
    grad = torch.is_grad_enabled()
    need_left = grad and (image.requires_grad or scale.requires_grad or bias.requires_grad)
    need_right = grad and text.requires_grad
    return sigmoid_contrast(image, text, scale, bias, row_weight.to(dtype), *settings, need_left, need_right)[0]


@torch.no_grad()
def hard_pairs(
    image: Tensor,
    text: Tensor,
    temperature: Tensor | float,
    ids: Tensor | None,
    generator: torch.Generator | None,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """A text [b] for each image, an image [b] for each text, and whether [b] there are any of another picture.

    See `losses.draw_hard_negatives`. Where there are none, both are the row itself.
    """
    rows, device = image.shape[0], image.device
    own = torch.arange(rows, device=device)
    if ids is None:
        found, codes = (own < rows) if rows > 1 else (own < 0), own
    else:
        groups = Groups.of(ids, None)
        found, codes = groups.texts < rows, groups.codes
    with torch.autocast(device.type, enabled=False):
        wide = torch.promote_types(image.dtype, torch.float32)
        number = (
            temperature.to(wide) if isinstance(temperature, Tensor) else image.new_full((1,), temperature, dtype=wide)
        )
        texts, images = draw_pairs(image, text, 1 / number.reshape(1), codes, generator, chunk_bytes)
    return torch.where(found, texts, own), torch.where(found, images, own), found


class _Settings(NamedTuple):
    smooth: bool
    exchange: Exchange
    chunk_bytes: int | None
    triton: bool


def _terms(
    groups: Groups | None, total: int, queued: Tensor | int, smoothing: float, same_id: SameId, like: Tensor
) -> tuple[Tensor, Tensor]:
    """`row_terms` and `column_terms` [3, total] of `contrast`: the targets' weight of logits."""
    found = []
    for texts in (True, False):
        positives: Tensor | int = 1
        candidates = like.new_full((total,), float(total)) + queued
        if groups is not None:
            count = groups.texts if texts else groups.images
            if texts and groups.captions is not None:
                # The own text is a positive though it may count as no caption.
                count = count + (groups.captions < 0)
            if same_id == "positive":
                positives = count
            else:
                candidates = candidates - (count - 1)
        own = like.new_full((total,), 1 - smoothing) / positives
        even = smoothing / candidates
        found.append(torch.stack([own, own if same_id == "positive" else -even, even]))
    return found[0], found[1]


def _losses(found: Tensor, alpha: float) -> Tensor:
    loss = found[0] - found[1]
    return LN2 * (loss if len(found) == 2 else loss - alpha * found[3])


def _queued(
    x: Tensor,
    queue: Tensor,
    bits: Tensor,
    even: Tensor,
    valid: Tensor | None,
    teacher: Tensor | None,
    settings: _Settings,
) -> Tensor:
    """Sums [k, b] over the queue's features, which are nobody's own and have no gradient."""
    ids = known = None
    if valid is not None:
        # What is no feature has every row's id, and is excluded by it.
        ids = torch.zeros(len(x), dtype=torch.int32, device=x.device)
        known = torch.where(valid, -1, 0).to(torch.int32)
    terms = torch.stack([torch.zeros_like(even), -even, even])
    taught = None if teacher is None else queue.detach().to(teacher.dtype)
    return contrast(
        x,
        queue.detach(),
        bits,
        None,
        ids,
        known,
        None,
        True,
        terms,
        None,
        settings.smooth,
        teacher,
        taught,
        settings.chunk_bytes,
        settings.triton,
    )[0]


def _pairs(
    left: Tensor,
    right: Tensor,
    bits: Tensor,
    ranks: Ranks,
    pairing: Pairing,
    row_terms: Tensor,
    column_terms: Tensor | None,
    teacher: tuple[Tensor, Tensor] | None,
    settings: _Settings,
) -> tuple[Tensor, Tensor]:
    """Sums [k, b] of own rows over all columns, and of own columns over all rows ([k, 0] without column_terms)."""
    if ranks.sizes is not None:
        plan = _Plan(ranks.sizes, pairing, row_terms, column_terms, teacher, settings)
        return _AcrossRanks.apply(left, right, bits, plan)
    taught = (None, None) if teacher is None else teacher
    return contrast(
        left,
        right,
        bits,
        *pairing,
        row_terms,
        column_terms,
        settings.smooth,
        *taught,
        settings.chunk_bytes,
        settings.triton,
    )


class _Plan(NamedTuple):
    """What `_AcrossRanks` needs besides what has a gradient; tensors of columns are about those of all ranks."""

    sizes: list[int]
    pairing: Pairing
    row_terms: Tensor
    column_terms: Tensor | None
    teacher: tuple[Tensor, Tensor] | None  # own rows' and own columns'
    settings: _Settings

    def blocks(self, right: Tensor, gathered: list[Tensor] | None) -> Iterator[tuple[int, slice, list[Tensor]]]:
        """Owner, place among all columns, and features (the teacher's after them) of the columns, block by block."""
        if gathered is not None:
            yield 0, slice(0, sum(self.sizes)), gathered
            return
        for owner, block in collectives.ring(self.parts(right), sizes=self.sizes):
            start = sum(self.sizes[:owner])
            yield owner, slice(start, start + self.sizes[owner]), block

    def parts(self, right: Tensor) -> list[Tensor]:
        """What is exchanged."""
        return [right.detach()] if self.teacher is None else [right.detach(), self.teacher[1].detach()]

    def arguments(self, left: Tensor, scale: Tensor, at: slice, block: list[Tensor]) -> tuple[Any, ...]:
        """Arguments of `contrast` for own rows with one block of columns."""
        partner, row_ids, column_ids, captions, exclude = self.pairing
        return (
            left,
            block[0],
            scale,
            None if partner is None else partner - at.start,
            row_ids,
            None if column_ids is None else column_ids[at],
            None if captions is None else captions[at],
            exclude,
            self.row_terms,
            None if self.column_terms is None else self.column_terms[:, at],
            self.settings.smooth,
            None if self.teacher is None else self.teacher[0],
            block[1] if len(block) == 2 else None,
            self.settings.chunk_bytes,
            self.settings.triton,
        )


class _AcrossRanks(torch.autograd.Function):
    """Sums of this rank's rows and columns, whose candidates are those of all ranks.

    A rank makes the tiles of its own rows. Its part of the other ranks' columns goes to them; in the backward it gets
    these columns' sums and gradients, and returns its part of their features' gradient.
    """

    @staticmethod
    def forward(ctx: Any, left: Tensor, right: Tensor, scale: Tensor, plan: _Plan) -> tuple[Tensor, Tensor]:
        gathered = None
        if plan.settings.exchange == "gather":
            gathered = [collectives.gather(part, sizes=plan.sizes) for part in plan.parts(right)]
        rows: Tensor | None = None
        columns = scale.new_zeros(sum(plan.sizes), 2 if plan.teacher is None else 4)
        for _, at, block in plan.blocks(right, gathered):
            found, of_columns = contrast(*plan.arguments(left, scale, at, block))
            rows = found if rows is None else merge(rows, found)
            if plan.column_terms is not None:
                columns[at] = of_columns.T
        assert rows is not None
        own = columns[:0].T.contiguous()
        if plan.column_terms is not None:
            parts = collectives.exchange_rows(columns, sizes=plan.sizes).mT.contiguous()
            own = parts[0]
            for part in parts[1:]:
                own = merge(own, part)
        ctx.plan = plan
        ctx.save_for_backward(left, right, scale, rows, own, *(gathered or []))
        return rows, own

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, row_grad: Tensor, own_grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, rows, own, *gathered = ctx.saved_tensors
        plan, (need_left, need_right, need_scale, _) = ctx.plan, ctx.needs_input_grad
        both = None
        if plan.column_terms is not None:
            both = collectives.gather(torch.cat([own, own_grad]).T.contiguous(), sizes=plan.sizes).T
        left_grad, scale_grad = torch.zeros_like(left, dtype=scale.dtype), torch.zeros_like(scale)
        sums = collectives.RingSum(sizes=plan.sizes)
        right_grad: Tensor | None = None
        for owner, at, block in plan.blocks(right, gathered or None):
            sides = own.new_empty(2 * len(own), 0) if both is None else both[:, at].contiguous()
            arguments = plan.arguments(left, scale, at, block)
            need = need_left or (need_scale and not need_right)
            found = contrast_backward(
                row_grad, sides[len(own) :], rows, sides[: len(own)], *arguments, need, need_right
            )
            if need_left:
                left_grad += found[0]
            scale_grad += found[2]
            if need_right and gathered:
                right_grad = collectives.reduce_scatter(found[1], sizes=plan.sizes)
            elif need_right:
                sums.add(owner, found[1])
        if need_right and not gathered:
            right_grad = sums.finish()
        return (
            left_grad.to(left.dtype) if need_left else None,
            None if right_grad is None else right_grad.to(right.dtype),
            scale_grad if need_scale else None,
            None,
        )


class _SigmoidRing(torch.autograd.Function):
    """Sigmoid losses [b] of this rank's rows with the columns of all ranks, which come round a ring."""

    @staticmethod
    def forward(
        ctx: Any,
        left: Tensor,
        right: Tensor,
        scale: Tensor,
        bias: Tensor,
        sizes: list[int],
        pairing: Pairing,
        chunk_bytes: int | None,
        triton: bool,
    ) -> Tensor:
        ctx.save_for_backward(left, right, scale, bias)
        ctx.sizes, ctx.pairing, ctx.settings = sizes, pairing, (chunk_bytes, triton)
        losses = scale.new_zeros(len(left))
        for _, ids, block in _ring_blocks(right, sizes, pairing):
            losses += sigmoid_contrast_rows(left, block, scale, bias, *ids, chunk_bytes, triton)
        return losses

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        left, right, scale, bias = ctx.saved_tensors
        sums = collectives.RingSum(sizes=ctx.sizes)
        totals = [torch.zeros_like(x, dtype=scale.dtype) for x in (left, scale, bias)]
        for owner, ids, block in _ring_blocks(right, ctx.sizes, ctx.pairing):
            _, left_grad, right_grad, *numbers = sigmoid_contrast(
                left, block, scale, bias, grad, *ids, *ctx.settings, True, True
            )
            for total, part in zip(totals, (left_grad, *numbers), strict=True):
                total += part
            sums.add(owner, right_grad)
        right_grad = sums.finish()
        return totals[0].to(left.dtype), right_grad.to(right.dtype), totals[1], totals[2], None, None, None, None


def _ring_blocks(
    right: Tensor, sizes: list[int], pairing: Pairing
) -> Iterator[tuple[int, tuple[Tensor | None, ...], Tensor]]:
    for owner, (block,) in collectives.ring([right], sizes=sizes):
        start = sum(sizes[:owner])
        ids = None if pairing.column_ids is None else pairing.column_ids[start : start + sizes[owner]]
        yield owner, (None if pairing.partner is None else pairing.partner - start, pairing.row_ids, ids), block
