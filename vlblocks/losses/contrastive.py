"""Contrastive objectives over features of all ranks: InfoNCE, SigLIP and two views of one image.

Features are used as they are given: normalise them first if the objective shall see cosines. Candidates come from all
ranks, with gradient; each rank computes the losses of its own rows only. `weight` is one number per own row: a row of
weight 0 has no loss, and stays a candidate for the others. Reductions of the losses l of a rank's b rows:

    "mean"      sum(weight * l) / b             full batch: ops.collectives.rank_share(b)
    "weighted"  sum(weight * l) / sum(weight)   full batch: rank_share(weight.sum())
    "sum"       sum(weight * l)
    "none"      weight * l, [b]

The right-hand column is the factor with which losses and gradients, averaged over ranks, equal the full batch's.
"""

from __future__ import annotations

import math
from typing import Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.losses._reduce import Reduction, check_rows, reduce_rows, upcast
from vlblocks.ops import collectives

SameId = Literal["positive", "exclude"]


def clip_temperature(temperature: Tensor, low: float = 0.001, high: float = 0.5) -> Tensor:
    """Temperature limited to [low, high]; UNIMO-2's range by default. Beyond the limits the gradient is zero."""
    return temperature.clamp(low, high)


def info_nce(
    image: Tensor,
    text: Tensor,
    *,
    temperature: Tensor | float | None = None,
    logit_scale: Tensor | float | None = None,
    weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    same_id: SameId = "positive",
    reduction: Reduction = "mean",
    gather: bool = True,
) -> Tensor:
    """Cross-entropy of each image against all texts and of each text against all images, halved.

    Several positives. Rows of one `image_ids` are captions of one picture. With same_id="positive" the target is
    uniform over them: loss = logsumexp(logits) - mean of the positives' logits (the mean stands outside the logarithm,
    as in supervised contrastive learning's L_out). With "exclude" only the row's own partner is positive, and the
    others are no candidates. A text of weight 0 is taken to be no caption of its image: it is a negative for that
    image's other rows.

    Args:
        image: [b, D] features; b may differ between ranks.
        text: [b, D] features; row i is image i's text.
        temperature: what similarities are divided by (scalar or [1]); give it or logit_scale.
        logit_scale: what similarities are multiplied by, 1 / temperature.
        weight: [b], see the module's text; all 1 if None.
        image_ids: [b] integers, equal for equal pictures.
        reduction: of the rows' losses, see the module's text. UNIMO-2 uses "mean" with weight = label * is_multimodal.
        gather: take candidates from all ranks. False where only some ranks compute the loss.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64.

    Raises:
        UserError: shapes that do not fit, or not exactly one of temperature and logit_scale.

    Source: van den Oord et al. 2018 (CPC); Radford et al. 2021 (CLIP); Khosla et al. 2020 (several positives).
    """
    _check_features("image", image, "text", text)
    rows = image.shape[0]
    check_rows("weight", weight, rows)
    check_rows("image_ids", image_ids, rows)
    if same_id not in ("positive", "exclude"):
        raise UserError(f'same_id is {same_id!r}: use "positive" or "exclude"')
    if (temperature is None) == (logit_scale is None):
        raise UserError("temperature, logit_scale: give exactly one of them")

    with _no_autocast(image):
        image, text = upcast(image), upcast(text)
        every = _Ranks.of(rows, image.device, gather)
        similarity = image @ every.candidates(text).t()
        if every.alone:
            backward_similarity = similarity.t()
        else:
            backward_similarity = text @ every.candidates(image).t()
        own = every.offset + torch.arange(rows, device=image.device)
        same = None
        counts_as_caption = None
        if image_ids is not None:
            same = image_ids[:, None] == every.constants(image_ids)[None, :]
            if weight is not None:
                counts_as_caption = every.constants(weight) != 0
        forward_losses = _row_losses(
            _scaled(similarity, temperature, logit_scale), own, same, counts_as_caption, same_id
        )
        backward_losses = _row_losses(_scaled(backward_similarity, temperature, logit_scale), own, same, None, same_id)
        return reduce_rows((forward_losses + backward_losses) / 2, weight, reduction)


def siglip(
    image: Tensor,
    text: Tensor,
    *,
    scale: Tensor | float,
    bias: Tensor | float,
    weight: Tensor | None = None,
    image_ids: Tensor | None = None,
    reduction: Reduction = "mean",
    gather: bool = True,
) -> Tensor:
    """Sigmoid loss: every image with every text is one binary decision, matched or not.

    A row's loss is the sum over all texts of -log sigmoid(z (scale image.text + bias)) with z = 1 for the row's own
    text and -1 for others, so that "mean" is the paper's sum over all pairs divided by the batch.

    Args:
        image: [b, D] features; b may differ between ranks.
        text: [b, D] features; row i is image i's text.
        scale: factor of the similarities (scalar or [1]).
        bias: added to the logits (scalar or [1]).
        weight: [b], weight of an image's row of decisions; all 1 if None.
        image_ids: [b] integers, equal for equal pictures: a picture matches all its texts of non-zero weight.
        reduction: of the rows' losses, see the module's text.
        gather: take texts from all ranks. False where only some ranks compute the loss.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64.

    Raises:
        UserError: shapes that do not fit.

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training.
    """
    _check_features("image", image, "text", text)
    rows = image.shape[0]
    check_rows("weight", weight, rows)
    check_rows("image_ids", image_ids, rows)
    with _no_autocast(image):
        image, text = upcast(image), upcast(text)
        every = _Ranks.of(rows, image.device, gather)
        logits = image @ every.candidates(text).t() * _broadcastable(scale) + _broadcastable(bias)
        own = every.offset + torch.arange(rows, device=image.device)
        matched = own[:, None] == torch.arange(every.total, device=image.device)[None, :]
        if image_ids is not None:
            same = image_ids[:, None] == every.constants(image_ids)[None, :]
            if weight is not None:
                same = same & (every.constants(weight) != 0)[None, :]
            matched = matched | same
        losses = -F.logsigmoid(torch.where(matched, logits, -logits)).sum(dim=1)
        return reduce_rows(losses, weight, reduction)


def two_view_contrast(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Tensor | float,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    gather: bool = True,
) -> Tensor:
    """NT-Xent: each view against its other view, among both views of the whole batch except itself.

    Args:
        view1: [b, D] features of one augmented view; b may differ between ranks.
        view2: [b, D] features of the other view of the same images.
        temperature: what similarities are divided by (scalar or [1]).
        weight: [b], see the module's text; all 1 if None.
        reduction: of an image's loss, the mean of its two views' losses; see the module's text.
        gather: take candidates from all ranks. False where only some ranks compute the loss.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64. A batch of one image gives 0.

    Raises:
        UserError: shapes that do not fit.

    Source: Chen et al. 2020 (SimCLR).
    """
    _check_features("view1", view1, "view2", view2)
    rows = view1.shape[0]
    check_rows("weight", weight, rows)
    with _no_autocast(view1):
        view1, view2 = upcast(view1), upcast(view2)
        every = _Ranks.of(rows, view1.device, gather)
        candidates = torch.cat([every.candidates(view1), every.candidates(view2)])
        first = every.offset + torch.arange(rows, device=view1.device)
        second = first + every.total
        logits = _scaled(torch.cat([view1, view2]) @ candidates.t(), temperature, None)
        itself = torch.cat([first, second])[:, None] == torch.arange(2 * every.total, device=view1.device)[None, :]
        logits = logits.masked_fill(itself, -math.inf)
        losses = F.cross_entropy(logits, torch.cat([second, first]), reduction="none")
        return reduce_rows(losses.unflatten(0, (2, rows)).mean(dim=0), weight, reduction)


class InfoNCE(nn.Module):
    """`info_nce` with a learnable temperature.

    Parameter `temperature` [1] is the temperature itself, as in UNIMO-2, and is clipped to `temperature_range` in use.

    Args:
        temperature: initial value.
        temperature_range: limits; UNIMO-2's by default.
        learnable: False keeps the temperature constant (a buffer).
        same_id: what other rows of the same picture are, see `info_nce`.

    Source: unimo2_spec item 25.
    """

    temperature: Tensor

    def __init__(
        self,
        *,
        temperature: float = 0.07,
        temperature_range: tuple[float, float] = (0.001, 0.5),
        learnable: bool = True,
        same_id: SameId = "positive",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        low, high = temperature_range
        if not 0 < low <= temperature <= high:
            raise UserError(
                f"temperature {temperature} is outside temperature_range {temperature_range}: change either"
            )
        self.temperature_range = temperature_range
        self.same_id: SameId = same_id
        value = torch.full((1,), temperature, device=device, dtype=dtype)
        if learnable:
            self.temperature = nn.Parameter(value)
        else:
            self.register_buffer("temperature", value)

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        weight: Tensor | None = None,
        image_ids: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """image [b, D], text [b, D], weight [b], image_ids [b] -> scalar, or [b] with reduction="none"."""
        return info_nce(
            image,
            text,
            temperature=clip_temperature(self.temperature, *self.temperature_range),
            weight=weight,
            image_ids=image_ids,
            same_id=self.same_id,
            reduction=reduction,
        )


class SigLIP(nn.Module):
    """`siglip` with learnable scale and bias; parameters `log_scale` [1] and `bias` [1], the paper's t' and b.

    Args:
        scale: initial factor of the similarities.
        bias: initial bias: -10 starts near the fraction of matched pairs.

    Source: Zhai et al. 2023.
    """

    def __init__(
        self,
        *,
        scale: float = 10.0,
        bias: float = -10.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise UserError(f"scale is {scale}: give a positive number")
        self.log_scale = nn.Parameter(torch.full((1,), math.log(scale), device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((1,), bias, device=device, dtype=dtype))

    def forward(
        self,
        image: Tensor,
        text: Tensor,
        *,
        weight: Tensor | None = None,
        image_ids: Tensor | None = None,
        reduction: Reduction = "mean",
    ) -> Tensor:
        """image [b, D], text [b, D], weight [b], image_ids [b] -> scalar, or [b] with reduction="none"."""
        scale = upcast(self.log_scale).exp()
        return siglip(image, text, scale=scale, bias=self.bias, weight=weight, image_ids=image_ids, reduction=reduction)


class _Ranks(NamedTuple):
    """Where this rank's rows stand among all candidates."""

    sizes: list[int] | None  # rows of every rank; None: this rank's own only
    offset: int
    total: int

    @classmethod
    def of(cls, rows: int, device: torch.device, gather: bool) -> _Ranks:
        if not gather or collectives.world_size() == 1:
            return cls(None, 0, rows)
        sizes = collectives.gather_sizes(rows, device=device)
        return cls(sizes, collectives.row_offset(sizes), sum(sizes))

    @property
    def alone(self) -> bool:
        return self.sizes is None

    def candidates(self, x: Tensor) -> Tensor:
        return x if self.sizes is None else collectives.gather_with_grad(x, sizes=self.sizes)

    def constants(self, x: Tensor) -> Tensor:
        return x.detach() if self.sizes is None else collectives.gather(x, sizes=self.sizes)


def _check_features(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise UserError(
            f"{first_name} {list(first.shape)} and {second_name} {list(second.shape)}: give both the same shape [b, D]"
        )


def _no_autocast(x: Tensor) -> torch.autocast:
    # Autocast would take the products of similarities back to half precision.
    return torch.autocast(x.device.type, enabled=False)


def _broadcastable(x: Tensor | float) -> Tensor | float:
    return upcast(x) if isinstance(x, Tensor) else x


def _scaled(similarity: Tensor, temperature: Tensor | float | None, logit_scale: Tensor | float | None) -> Tensor:
    if temperature is not None:
        return similarity / _broadcastable(temperature)
    assert logit_scale is not None
    return similarity * _broadcastable(logit_scale)


def _row_losses(logits: Tensor, own: Tensor, same: Tensor | None, countable: Tensor | None, same_id: SameId) -> Tensor:
    """Losses [b] of logits [b, N] whose partner is at own [b]; same [b, N] marks rows of the same picture."""
    if same is None:
        return F.cross_entropy(logits, own, reduction="none")
    partner = own[:, None] == torch.arange(logits.shape[1], device=logits.device)[None, :]
    if countable is not None:
        same = same & countable[None, :]
    if same_id == "exclude":
        return F.cross_entropy(logits.masked_fill(same & ~partner, -math.inf), own, reduction="none")
    positive = (same | partner).to(logits.dtype)
    return logits.logsumexp(dim=1) - (logits * positive).sum(dim=1) / positive.sum(dim=1)
