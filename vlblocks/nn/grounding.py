"""The grounded space: a codebook that images and texts share, and the codes that an example picks from it."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from vlblocks.errors import UserError
from vlblocks.ops.grounding import GroundingBackend, grounding_losses, grounding_scores

from .usage import CodeUsage, CodeUsageTracker


class PickedCodes(NamedTuple):
    """The codes of each example, by descending score.

    Attributes:
        codes: [B, K, D] code vectors.
        indices: [B, K] long.
    """

    codes: Tensor
    indices: Tensor


class GroundedOutput(NamedTuple):
    """What a grounded space makes of a batch.

    Attributes:
        codes: [B, K, D] picked code vectors.
        indices: [B, K] long, by descending score.
        scores: [B, C] float32, no gradient.
        loss: scalar, token_loss + code_weight * code_loss; None without loss.
        token_loss: scalar, q of unimo2_spec item 16.
        code_loss: scalar, e of unimo2_spec item 15.
    """

    codes: Tensor
    indices: Tensor
    scores: Tensor
    loss: Tensor | None
    token_loss: Tensor | None
    code_loss: Tensor | None


class GroundedSpace(nn.Module):
    """Picks the K codes with which an example's tokens agree most, and pulls codes and tokens towards one another.

    Scores are S[b, c] = sum over tokens of sigmoid(t <x, code c>) with a learnable temperature t, a factor that is
    clipped to `temperature_range` and gets a gradient inside it. Without gradients no [B, N, C] tensor is held; with
    them only what the picked codes need. The codes come out as they are: the losses alone train x through them.

    The temperature decides how sharply a code tells tokens apart. Codes start as N(0, 0.02), so that t <x, code> starts
    with a standard deviation of 0.02 t |x|. For layer-normed states, |x| near sqrt(D), the default of 10 makes that 3.2
    at D 256 and 5.5 at D 768: decided, yet with a gradient. At 1 every sigmoid is near a half and the range's end near,
    at 100 most are 0 or 1 and picks change with small changes of the tokens. For L2-normalised tokens 10 to 30 will do.

    Args:
        width: D.
        codes: C, size of the codebook.
        picks: K, codes per example.
        temperature: initial t.
        temperature_range: lowest and highest t.
        code_weight: weight of the code loss beside the token loss.
        count_padding: let invalid tokens count in scores and losses, as the original implementation does.
        modalities: names by which `update` and `usage` tell picks apart.
        usage_decay: each `update` multiplies a modality's former counts with it; None counts all since `reset_usage`.
        backend: of the operations in `vlblocks.ops.grounding`.

    Raises:
        UserError: more picks than codes, or a temperature outside its range.

    Source: Li et al. 2022 (UNIMO-2), section 2.2; unimo2_spec items 10 to 17.
    """

    def __init__(
        self,
        *,
        width: int,
        codes: int,
        picks: int,
        temperature: float = 10.0,
        temperature_range: tuple[float, float] = (1.0, 10000.0),
        code_weight: float = 0.25,
        count_padding: bool = False,
        modalities: Sequence[str] = ("image", "text"),
        usage_decay: float | None = None,
        backend: GroundingBackend = "auto",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not 1 <= picks <= codes:
            raise UserError(f"picks: cannot pick {picks} of {codes} codes; choose 1 <= picks <= codes")
        low, high = temperature_range
        if not low <= temperature <= high:
            raise UserError(
                f"temperature: {temperature} lies outside temperature_range ({low}, {high}) and would get no gradient; "
                "choose one inside"
            )
        self.picks, self.temperature_range, self.code_weight = picks, (low, high), code_weight
        self.count_padding, self.backend = count_padding, backend
        self.initial_temperature = temperature
        self.codebook = nn.Parameter(torch.empty(codes, width, device=device, dtype=dtype))
        self.temperature = nn.Parameter(torch.empty(1, device=device, dtype=dtype))
        self.tracker = CodeUsageTracker(codes=codes, modalities=modalities, decay=usage_decay, device=device)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Codes from N(0, 0.02), the temperature as it was given."""
        nn.init.normal_(self.codebook, std=0.02)
        nn.init.constant_(self.temperature, self.initial_temperature)

    def extra_repr(self) -> str:
        codes, width = self.codebook.shape
        return f"width={width}, codes={codes}, picks={self.picks}, count_padding={self.count_padding}"

    def clipped_temperature(self) -> Tensor:
        """t [1], clipped to its range."""
        return self.temperature.clamp(*self.temperature_range)

    def forward(
        self, x: Tensor, valid: Tensor | None = None, *, scores: Tensor | None = None, with_loss: bool = True
    ) -> GroundedOutput:
        """Picks codes for each example.

        Args:
            x: [B, N, D] tokens: image and text states without their CLS.
            valid: [B, N] bool, True = real; all real if None.
            scores: [B, C] if known already: a pair's are the sum of its image's and its text's.
            with_loss: compute the losses.

        Raises:
            UserError: shapes that do not fit.
        """
        if scores is None:
            scores = self.scores(x, valid)
        codes, indices = self.pick(scores)
        if not with_loss:
            return GroundedOutput(codes, indices, scores, None, None, None)
        token_loss, code_loss = grounding_losses(
            x, self.codebook, indices, self.clipped_temperature(), self._counted(valid), backend=self.backend
        )
        loss = token_loss + self.code_weight * code_loss
        return GroundedOutput(codes, indices, scores, loss, token_loss, code_loss)

    def scores(self, x: Tensor, valid: Tensor | None = None) -> Tensor:
        """Scores [B, C] of all codes for tokens [B, N, D], float32 and without gradient."""
        with torch.no_grad():
            t = self.clipped_temperature()
        return grounding_scores(x, self.codebook, t, self._counted(valid), backend=self.backend)

    def pick(self, scores: Tensor) -> PickedCodes:
        """The K codes of highest score [B, C] for each example, in descending order.

        Raises:
            UserError: scores of another number of codes.
        """
        if scores.ndim != 2 or scores.shape[1] != self.codebook.shape[0]:
            raise UserError(f"scores {list(scores.shape)}: give [B, C] with C = {self.codebook.shape[0]}")
        indices = scores.topk(self.picks, dim=1).indices
        return PickedCodes(F.embedding(indices, self.codebook), indices)

    @torch.no_grad()
    def activations(self, x: Tensor, codes: Tensor) -> Tensor:
        """How strongly each of the code vectors [B, K, D] fires on each token [B, N, D] -> [B, N, K] in (0, 1)."""
        return torch.sigmoid(self.clipped_temperature() * (x @ codes.transpose(1, 2)))

    def update(self, indices: Tensor, modality: str, valid: Tensor | None = None) -> None:
        """Counts picks [...] of a modality over all ranks; only valid ones [...] if given. See `vlblocks.nn.usage`."""
        self.tracker.update(indices, modality, valid)

    def usage(self, modality: str | None = None) -> CodeUsage:
        """Codes in use and perplexity of the counted picks, of one modality or of all."""
        return self.tracker.usage(modality)

    def reset_usage(self) -> None:
        """Forgets the counted picks."""
        self.tracker.reset()

    def _counted(self, valid: Tensor | None) -> Tensor | None:
        return None if self.count_padding else valid
