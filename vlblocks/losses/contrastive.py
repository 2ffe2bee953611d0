"""Contrastive objectives over features of all ranks: InfoNCE, SigLIP and two views of one image.

Features are used as they are given: normalise them first if the objective shall see cosines. Candidates come from all
ranks, with gradient; each rank computes the losses of its own rows only. `weight` is one number per own row: a row of
weight 0 has no loss, and stays a candidate for the others. Reductions of the losses l of a rank's b rows:

    "mean"      sum(weight * l) / b             full batch: ops.collectives.rank_share(b)
    "weighted"  sum(weight * l) / sum(weight)   full batch: rank_share(weight.sum())
    "sum"       sum(weight * l)
    "none"      weight * l, [b]

The right-hand column is the factor with which losses and gradients, averaged over ranks, equal the full batch's. A
number's gradient (temperature, bias) is a rank's share of it: only the average over ranks means something.

The matrix of similarities is never whole: tiles of it come and go, see `ops.contrastive` for `exchange` and `backend`.
backend="reference" is the plain twin that holds it, for comparison. Gradients are taken once: there is no second
derivative. On a GPU products run in the features' own type (give half types for speed), sums in float32; on a CPU all
is float32, or float64.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import torch
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.losses._reduce import Reduction, check_rows, reduce_rows, upcast
from vlblocks.losses._whole import info_nce_whole, siglip_whole, two_view_whole
from vlblocks.ops.contrastive import (
    Exchange,
    Ranks,
    SameId,
    info_nce_rows,
    siglip_total,
    takes_triton,
    two_view_rows,
)

ContrastiveBackend = Literal["auto", "chunked", "triton", "reference"]


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
    queue_image: Tensor | None = None,
    queue_text: Tensor | None = None,
    queue_valid: Tensor | None = None,
    teacher_image: Tensor | None = None,
    teacher_text: Tensor | None = None,
    alpha: float = 0.4,
    label_smoothing: float = 0.0,
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastiveBackend = "auto",
) -> Tensor:
    """Cross-entropy of each image against all texts and of each text against all images, halved.

    Several positives. Rows of one `image_ids` are captions of one picture. With same_id="positive" the target is
    uniform over them: loss = logsumexp(logits) - mean of the positives' logits (the mean stands outside the logarithm,
    as in supervised contrastive learning's L_out). With "exclude" only the row's own partner is positive, and the
    others are no candidates. A text of weight 0 is taken to be no caption of its image: it is a negative for that
    image's other rows.

    Soft targets. With a momentum teacher's features the target is alpha * softmax(the teacher's logits, at the same
    temperature) + (1 - alpha) * the hard one. The teacher's own candidates are its features of all ranks and the queue.

    Args:
        image: [b, D] features; b may differ between ranks.
        text: [b, D] features; row i is image i's text.
        temperature: what similarities are divided by (scalar or [1]); give it or logit_scale.
        logit_scale: what similarities are multiplied by, 1 / temperature.
        weight: [b], see the module's text; all 1 if None.
        image_ids: [b] integers, equal for equal pictures.
        reduction: of the rows' losses, see the module's text. UNIMO-2 uses "mean" with weight = label * is_multimodal.
        gather: take candidates from all ranks. False where only some ranks compute the loss.
        queue_image: [Q, D] further negatives for texts, the same on all ranks, without gradient; with queue_text.
        queue_text: [Q, D] further negatives for images.
        queue_valid: [Q] bool, True = the queues hold a feature; all if None (`nn.momentum.FeatureQueue.valid`).
        teacher_image: [b, E] the teacher's features, without gradient; with teacher_text. E = D with a queue.
        teacher_text: [b, E].
        alpha: the teacher's share of the target.
        label_smoothing: share of the hard target that is spread over all candidates.
        exchange: "gather" features of all ranks, or pass them round a "ring".
        chunk_bytes: size of the logits that are held at once; None: what suits the device.
        backend: "chunked" (PyTorch), "triton", "reference" or "auto", see the module's text.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64.

    Raises:
        UserError: shapes that do not fit, not exactly one of temperature and logit_scale, or an unknown setting.

    Source: van den Oord et al. 2018 (CPC); Radford et al. 2021 (CLIP); Khosla et al. 2020 (several positives);
        He et al. 2020 (queue); Li et al. 2021 (ALBEF: teacher).
    """
    _check_features("image", image, "text", text)
    rows = image.shape[0]
    check_rows("weight", weight, rows)
    check_rows("image_ids", image_ids, rows)
    if same_id not in ("positive", "exclude"):
        raise UserError(f'same_id is {same_id!r}: use "positive" or "exclude"')
    if (temperature is None) == (logit_scale is None):
        raise UserError("temperature, logit_scale: give exactly one of them")
    _check_queue(image, queue_image, queue_text, queue_valid)
    _check_teacher(image, teacher_image, teacher_text, queue_image)
    for name, value in (("alpha", alpha), ("label_smoothing", label_smoothing)):
        if not 0 <= value <= 1:
            raise UserError(f"{name} is {value}: give a number from 0 to 1")
    _check_settings(exchange, chunk_bytes, reduction)

    with _no_autocast(image):
        image, text = _features(image, text, backend)
        options: dict[str, Any] = {
            "ranks": Ranks.of(rows, image.device, gather),
            "ids": image_ids,
            "weight": weight,
            "same_id": same_id,
            "queue_image": queue_image,
            "queue_text": queue_text,
            "queue_valid": queue_valid,
            "teacher_image": None if teacher_image is None else upcast(teacher_image.detach()),
            "teacher_text": None if teacher_text is None else upcast(teacher_text.detach()),
            "alpha": alpha,
            "label_smoothing": label_smoothing,
        }
        scale = _scale(temperature, logit_scale, image)
        if backend == "reference":
            losses = info_nce_whole(image, text, scale, **options)
        else:
            losses = info_nce_rows(
                image, text, scale, **options, exchange=exchange, chunk_bytes=chunk_bytes, backend=backend
            )
        return reduce_rows((losses[0] + losses[1]) / 2, weight, reduction)


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
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastiveBackend = "auto",
) -> Tensor:
    """Sigmoid loss: every image with every text is one binary decision, matched or not.

    A row's loss is the sum over all texts of -log sigmoid(z (scale image.text + bias)) with z = 1 for the row's own
    text and -1 for others, so that "mean" is the paper's sum over all pairs divided by the batch. Gradients are made in
    the forward, except with reduction="none", a weight that has a gradient, or around a ring.

    Args:
        image: [b, D] features; b may differ between ranks.
        text: [b, D] features; row i is image i's text.
        scale: factor of the similarities (scalar or [1]).
        bias: added to the logits (scalar or [1]).
        weight: [b], weight of an image's row of decisions; all 1 if None.
        image_ids: [b] integers, equal for equal pictures: a picture matches all its texts of non-zero weight.
        reduction: of the rows' losses, see the module's text.
        gather: take texts from all ranks. False where only some ranks compute the loss.
        exchange: "gather" texts of all ranks, or pass them round a "ring".
        chunk_bytes: size of the logits that are held at once; None: what suits the device.
        backend: "chunked" (PyTorch), "triton", "reference" or "auto", see the module's text.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64.

    Raises:
        UserError: shapes that do not fit, or an unknown setting.

    Source: Zhai et al. 2023, Sigmoid Loss for Language Image Pre-Training.
    """
    _check_features("image", image, "text", text)
    rows = image.shape[0]
    check_rows("weight", weight, rows)
    check_rows("image_ids", image_ids, rows)
    _check_settings(exchange, chunk_bytes, reduction)
    with _no_autocast(image):
        image, text = _features(image, text, backend)
        numbers = _number(scale, image), _number(bias, image)
        options: dict[str, Any] = {"ranks": Ranks.of(rows, image.device, gather), "ids": image_ids, "weight": weight}
        if backend == "reference":
            return reduce_rows(siglip_whole(image, text, *numbers, **options), weight, reduction)
        row_weight = None
        if reduction != "none" and not (weight is not None and weight.requires_grad):
            row_weight = _row_weight(weight, numbers[0].new_ones(rows), reduction)
        found = siglip_total(
            image, text, *numbers, row_weight, **options, exchange=exchange, chunk_bytes=chunk_bytes, backend=backend
        )
        return found if row_weight is not None else reduce_rows(found, weight, reduction)


def two_view_contrast(
    view1: Tensor,
    view2: Tensor,
    *,
    temperature: Tensor | float,
    weight: Tensor | None = None,
    reduction: Reduction = "mean",
    gather: bool = True,
    exchange: Exchange = "gather",
    chunk_bytes: int | None = None,
    backend: ContrastiveBackend = "auto",
) -> Tensor:
    """NT-Xent: each view against its other view, among both views of the whole batch except itself.

    Args:
        view1: [b, D] features of one augmented view; b may differ between ranks.
        view2: [b, D] features of the other view of the same images.
        temperature: what similarities are divided by (scalar or [1]).
        weight: [b], see the module's text; all 1 if None.
        reduction: of an image's loss, the mean of its two views' losses; see the module's text.
        gather: take candidates from all ranks. False where only some ranks compute the loss.
        exchange: "gather" features of all ranks, or pass them round a "ring".
        chunk_bytes: size of the logits that are held at once; None: what suits the device.
        backend: "chunked" (PyTorch), "triton", "reference" or "auto", see the module's text.

    Returns:
        Scalar, or [b] with reduction="none"; float32 or float64. A batch of one image gives 0.

    Raises:
        UserError: shapes that do not fit, or an unknown setting.

    Source: Chen et al. 2020 (SimCLR).
    """
    _check_features("view1", view1, "view2", view2)
    rows = view1.shape[0]
    check_rows("weight", weight, rows)
    _check_settings(exchange, chunk_bytes, reduction)
    with _no_autocast(view1):
        view1, view2 = _features(view1, view2, backend)
        ranks, scale = Ranks.of(rows, view1.device, gather), _scale(temperature, None, view1)
        if backend == "reference":
            losses = two_view_whole(view1, view2, scale, ranks=ranks)
        else:
            losses = two_view_rows(
                view1, view2, scale, ranks=ranks, exchange=exchange, chunk_bytes=chunk_bytes, backend=backend
            )
        return reduce_rows((losses[0] + losses[1]) / 2, weight, reduction)


class InfoNCE(nn.Module):
    """`info_nce` with a learnable temperature.

    Parameter `temperature` [1] is the temperature itself, as in UNIMO-2, and is clipped to `temperature_range` in use.

    Args:
        temperature: initial value.
        temperature_range: limits; UNIMO-2's by default.
        learnable: False keeps the temperature constant (a buffer).
        same_id: what other rows of the same picture are, see `info_nce`.
        label_smoothing: share of the hard target that is spread over all candidates.
        exchange: "gather" features of all ranks, or pass them round a "ring".
        chunk_bytes: size of the logits that are held at once; None: what suits the device.

    Raises:
        UserError: a temperature outside of its range. What `info_nce` refuses, it refuses when it is called.

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
        label_smoothing: float = 0.0,
        exchange: Exchange = "gather",
        chunk_bytes: int | None = None,
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
        self.label_smoothing, self.chunk_bytes = label_smoothing, chunk_bytes
        self.exchange: Exchange = exchange
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
            label_smoothing=self.label_smoothing,
            exchange=self.exchange,
            chunk_bytes=self.chunk_bytes,
        )


class SigLIP(nn.Module):
    """`siglip` with learnable scale and bias; parameters `log_scale` [1] and `bias` [1], the paper's t' and b.

    Args:
        scale: initial factor of the similarities.
        bias: initial bias: -10 starts near the fraction of matched pairs.
        exchange: "gather" texts of all ranks, or pass them round a "ring".
        chunk_bytes: size of the logits that are held at once; None: what suits the device.

    Raises:
        UserError: a scale that is not positive. What `siglip` refuses, it refuses when it is called.

    Source: Zhai et al. 2023.
    """

    def __init__(
        self,
        *,
        scale: float = 10.0,
        bias: float = -10.0,
        exchange: Exchange = "gather",
        chunk_bytes: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if scale <= 0:
            raise UserError(f"scale is {scale}: give a positive number")
        self.exchange: Exchange = exchange
        self.chunk_bytes = chunk_bytes
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
        return siglip(
            image,
            text,
            scale=scale,
            bias=self.bias,
            weight=weight,
            image_ids=image_ids,
            reduction=reduction,
            exchange=self.exchange,
            chunk_bytes=self.chunk_bytes,
        )


def _check_features(first_name: str, first: Tensor, second_name: str, second: Tensor) -> None:
    if first.ndim != 2 or first.shape != second.shape:
        raise UserError(
            f"{first_name} {list(first.shape)} and {second_name} {list(second.shape)}: give both the same shape [b, D]"
        )


def _check_queue(image: Tensor, queue_image: Tensor | None, queue_text: Tensor | None, valid: Tensor | None) -> None:
    if queue_image is None or queue_text is None:
        if queue_image is not queue_text or valid is not None:
            raise UserError("queue_image, queue_text: give both of them, or neither and no queue_valid")
        return
    _check_features("queue_image", queue_image, "queue_text", queue_text)
    if queue_image.shape[1] != image.shape[1]:
        raise UserError(f"queue_image {list(queue_image.shape)}: give features of width {image.shape[1]}, as image's")
    if valid is not None and (valid.shape != queue_image.shape[:1] or valid.dtype != torch.bool):
        raise UserError(f"queue_valid {list(valid.shape)} {valid.dtype}: give bool [{queue_image.shape[0]}]")


def _check_teacher(
    image: Tensor, teacher_image: Tensor | None, teacher_text: Tensor | None, queue: Tensor | None
) -> None:
    if teacher_image is None or teacher_text is None:
        if teacher_image is not teacher_text:
            raise UserError("teacher_image, teacher_text: give both of them, or neither")
        return
    _check_features("teacher_image", teacher_image, "teacher_text", teacher_text)
    width = teacher_image.shape[1] if queue is None else queue.shape[1]
    if teacher_image.shape != (image.shape[0], width):
        raise UserError(f"teacher_image {list(teacher_image.shape)}: give [{image.shape[0]}, {width}]")


def _check_settings(exchange: str, chunk_bytes: int | None, reduction: str) -> None:
    if exchange not in ("gather", "ring"):
        raise UserError(f'exchange is {exchange!r}: use "gather" or "ring"')
    if chunk_bytes is not None and chunk_bytes < 1:
        raise UserError(f"chunk_bytes is {chunk_bytes}: give at least 1")
    if reduction not in ("mean", "weighted", "sum", "none"):
        raise UserError(f'reduction is {reduction!r}: use "mean", "weighted", "sum" or "none"')


def _no_autocast(x: Tensor) -> torch.autocast:
    # Autocast would take the products of similarities back to half precision.
    return torch.autocast(x.device.type, enabled=False)


def _features(first: Tensor, second: Tensor, backend: ContrastiveBackend) -> tuple[Tensor, Tensor]:
    """Both features in the dtype to multiply them in."""
    dtype = torch.promote_types(first.dtype, second.dtype)
    if backend == "reference" or not takes_triton(first, backend):
        dtype = torch.promote_types(dtype, torch.float32)
    return first.to(dtype), second.to(dtype)


def _number(x: Tensor | float, features: Tensor) -> Tensor:
    """[1] of the dtype in which features' sums are taken."""
    dtype = torch.promote_types(features.dtype, torch.float32)
    if isinstance(x, Tensor):
        return x.to(features.device, dtype).reshape(1)
    # A copy from the CPU would be a device sync.
    return torch.full((1,), x, dtype=dtype, device=features.device)


def _scale(temperature: Tensor | float | None, logit_scale: Tensor | float | None, features: Tensor) -> Tensor:
    if temperature is not None:
        return 1 / _number(temperature, features)
    assert logit_scale is not None
    return _number(logit_scale, features)


def _row_weight(weight: Tensor | None, ones: Tensor, reduction: Reduction) -> Tensor:
    """What a row's loss weighs in the reduced one, [b]."""
    rows = ones.shape[0]
    given = ones if weight is None else weight.to(ones.dtype)
    if reduction == "sum":
        return given
    if reduction == "mean" or weight is None:
        return given / max(rows, 1)
    total = given.sum()
    return given / torch.where(total > 0, total, torch.ones_like(total))
