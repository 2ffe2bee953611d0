"""InfoNCE and SigLIP over all pairs of one process's batch: part of the suite `losses`."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from harness import MIB
from torch import Tensor

from vlblocks.losses.contrastive import info_nce, siglip

CHUNK = 512  # rows that open_clip's chunked losses take at once, as its documentation has it


class Contrast(NamedTuple):
    op: str  # of LOSSES
    batch: int
    width: int
    dtype: str
    device: str

    @property
    def shape(self) -> str:
        return f"N {self.batch}, D {self.width}"

    @property
    def ours(self) -> str:
        return "vlblocks" if self.device == "cpu" else "vlblocks (triton)"

    def small(self) -> Contrast:
        return self._replace(batch=min(self.batch, 64))

    def inputs(self, seed: int = 0) -> tuple[Tensor, ...]:
        """Unit features of which a pair's resemble each other, the scale, and SigLIP's bias, at their usual start."""
        generator = torch.Generator(self.device).manual_seed(seed)
        make = partial(torch.randn, self.batch, self.width, generator=generator, device=self.device)
        image = F.normalize(make(), dim=1)
        text = F.normalize(image + F.normalize(make(), dim=1), dim=1)
        numbers = (1 / 0.07,) if self.op == "InfoNCE" else (10.0, -10.0)
        dtype = getattr(torch, self.dtype)
        return image.to(dtype), text.to(dtype), *(torch.tensor(number, device=self.device) for number in numbers)

    def gradients_mib(self) -> float:
        """The scale's and the bias's are four bytes each."""
        return 2 * getattr(torch, self.dtype).itemsize * self.batch * self.width / MIB

    def work(self) -> tuple[float, float]:
        """FLOPs and bytes: three products; both features read, and their gradients written."""
        return 6.0 * self.batch**2 * self.width, 2 * MIB * self.gradients_mib()

    def exact(self) -> Callable[..., Tensor]:
        """What gives the truth in float64."""
        return partial(LOSSES[self.op].ours, backend="chunked")

    def eager(self) -> Callable[..., Tensor]:
        return LOSSES[self.op].eager

    def providers(self) -> dict[str, Callable[[], Callable[..., Tensor]]]:
        mine, peer = LOSSES[self.op].ours, LOSSES[self.op].open_clip
        found: dict[str, Callable[[], Callable[..., Tensor]]] = {
            "open_clip": lambda: _open_clip(peer),
            "open_clip, chunked": lambda: _open_clip(peer, chunk_size=CHUNK),
        }
        if self.device != "cpu":
            found["chunked"] = lambda: partial(mine, backend="chunked")
        found[self.ours] = lambda: mine
        return found


def eager_info_nce(image: Tensor, text: Tensor, scale: Tensor) -> Tensor:
    logits = scale * (image @ text.T).float()
    own = torch.arange(len(logits), device=logits.device)
    return (F.cross_entropy(logits, own) + F.cross_entropy(logits.T, own)) / 2


def eager_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor) -> Tensor:
    """Without the matrix of labels that is often written: log sigmoid(z) = z - softplus(z)."""
    logits = scale * (image @ text.T).float() + bias
    return (F.softplus(logits).sum() - logits.diagonal().sum()) / len(logits)


def our_info_nce(image: Tensor, text: Tensor, scale: Tensor, backend: Any = "auto") -> Tensor:
    return info_nce(image, text, logit_scale=scale, backend=backend)


def our_siglip(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, backend: Any = "auto") -> Tensor:
    return siglip(image, text, scale=scale, bias=bias, backend=backend)


class Loss(NamedTuple):
    eager: Callable[..., Tensor]
    ours: Callable[..., Tensor]
    open_clip: str


LOSSES = {
    "InfoNCE": Loss(eager_info_nce, our_info_nce, "ClipLoss"),
    "SigLIP": Loss(eager_siglip, our_siglip, "SigLipLoss"),
}


def _open_clip(name: str, **settings: int) -> Callable[..., Tensor]:
    import open_clip

    try:
        return getattr(open_clip.loss, name)(**settings)
    except TypeError as error:
        raise NotImplementedError(f"{name} of open_clip {open_clip.__version__} has no chunks") from error


def problems(device: str, quick: bool) -> Iterator[Contrast]:
    """The ones with an aim first."""
    if quick:
        sizes, dtype = [(40, 32)], "float32"
    elif device == "cpu":
        sizes, dtype = [(8192, 256), (1024, 256), (8192, 512), (1024, 512)], "float32"
    else:
        sizes, dtype = [(32768, 256), (8192, 256), (1024, 256), (32768, 512), (8192, 512), (1024, 512)], "bfloat16"
    for batch, width in sizes:
        for op in LOSSES:
            yield Contrast(op, batch, width, dtype, device)
