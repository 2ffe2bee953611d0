"""What only a GPU can show of attention over segments: named functions that raise on failure.

On a CPU the same code runs at small sizes, through the reference or Triton's interpreter: a dry run.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from checks.grounding import at_most, no_worse, poisoned
from torch import Tensor

from vlblocks.ops import SegmentMask, attention
from vlblocks_kernels import attention_triton
from vlblocks_kernels.attention import dropout_keep, packed_runs

GOLDEN = Path(__file__).resolve().parents[2] / "tests/golden"
TYPES = (torch.float32, torch.float16, torch.bfloat16)
LIMIT = {torch.float32: 1e-5, torch.float16: 1e-2, torch.bfloat16: 1e-2}

PAIRS = {"image": ["image", "codes"], "codes": ["image", "codes", "text"], "text": ["codes", "text"]}
CAPTION = {"image": ["image", "codes"], "codes": ["image", "codes"], "text": ["image", "codes", "text"]}


class Shape(NamedTuple):
    """Examples; lengths of image, codes and text; heads of queries and of keys; widths of keys and of values."""

    batch: int
    image: int
    codes: int
    text: int
    heads: int
    kv_heads: int
    width: int
    value: int

    def __str__(self) -> str:
        return "x".join(map(str, self))


SMALL = [Shape(2, 9, 3, 7, 2, 1, 8, 8), Shape(3, 1, 0, 1, 1, 1, 5, 3)]
REAL = [Shape(8, 197, 100, 128, 12, 12, 64, 64), Shape(4, 577, 100, 30, 16, 16, 64, 64)]
ODD = [
    Shape(3, 131, 65, 129, 6, 2, 128, 128),
    Shape(5, 63, 1, 200, 4, 4, 80, 48),
    Shape(2, 257, 0, 33, 8, 1, 20, 20),
    Shape(2, 1, 0, 1, 1, 1, 1, 1),
]


def checks(device: str, quick: bool) -> list[tuple[str, Callable[[], None]]]:
    """(what holds, function that raises if it does not)."""
    on_gpu = torch.device(device).type == "cuda"
    shapes = REAL + ODD if on_gpu else SMALL
    found: list[tuple[str, Callable[[], None]]] = []
    for dtype in TYPES:
        name = str(dtype).removeprefix("torch.")
        for shape in shapes:
            for kind in KINDS:
                what = f"{kind} equals float64, {name} {shape}"
                found.append((what, partial(mask_holds, device, shape, dtype, kind)))
            found.append((f"dropout is its seed's mask, {name} {shape}", partial(dropout_holds, device, shape, dtype)))
        found.append((f"packed examples and decoding, {name}", partial(packed_holds, device, dtype, on_gpu)))
    for case in ("image_topk", "text_topk"):
        found.append((f"the original's tower, {case}", partial(golden_holds, device, case)))
    repeats = 3 if quick or not on_gpu else 40
    for shape in shapes:
        for dtype in TYPES[1:] if on_gpu else TYPES[:1]:
            what = f"equal bits {repeats} times, {dtype} {shape}"
            found.append((what, partial(bits_hold, device, shape, dtype, repeats)))
    if on_gpu:
        found.append(("no device sync", partial(nothing_syncs, device)))
        if not quick:
            found.append(("offsets past 2^31", partial(far_offsets_hold, device)))
    return found


def pairs(shape: Shape, device: str) -> SegmentMask:
    text = torch.randint(1, shape.text + 1, (shape.batch, 1))
    text[0] = 0
    valid = {"text": (torch.arange(shape.text) < text).to(device)}
    return SegmentMask.build(_sizes(shape), PAIRS, valid=valid)


def captioning(shape: Shape, device: str) -> SegmentMask:
    text = torch.arange(shape.text) < torch.randint(1, shape.text + 1, (shape.batch, 1))
    prefix = torch.randint(0, shape.text + 1, (shape.batch,)).to(device)
    return SegmentMask.build(_sizes(shape), CAPTION, valid={"text": text.to(device)}, causal="text", prefix=prefix)


def several_runs(shape: Shape, device: str) -> SegmentMask:
    """Padding in the middle of the image, and a segment between that is not seen."""
    image = torch.ones(shape.batch, shape.image, dtype=torch.bool)
    image[:, shape.image // 3 : shape.image // 2] = False
    text = torch.arange(shape.text) >= torch.randint(0, shape.text, (shape.batch, 1))
    sees = PAIRS | {"image": ["image", "text"]}
    valid = {"image": image.to(device), "text": text.to(device)}
    return SegmentMask.build(_sizes(shape), sees, valid=valid)


def _sizes(shape: Shape) -> dict[str, int]:
    return {"image": shape.image, "codes": shape.codes, "text": shape.text}


KINDS = {"pairs": pairs, "captioning": captioning, "several runs": several_runs}


def mask_holds(device: str, shape: Shape, dtype: torch.dtype, kind: str) -> None:
    """Output and gradients, with NaN in whatever is padded."""
    torch.manual_seed(sum(shape))
    mask = KINDS[kind](shape, device)
    valid = mask.valid_tokens()
    hole = None if valid is None else ~valid[:, None, :, None]
    qkv, grad = draw(device, shape, dtype, mask.queries)
    dirty = qkv if hole is None else [x.masked_fill(hole, float("nan")) for x in qkv]
    dirty_grad = grad if hole is None else grad.masked_fill(hole, float("nan"))
    with poisoned():
        found = run(partial(attention, mask=mask, backend="triton"), dirty, dirty_grad)
    compare(found, qkv, grad, mask.dense(device))


def dropout_holds(device: str, shape: Shape, dtype: torch.dtype) -> None:
    torch.manual_seed(sum(shape))
    mask = captioning(shape, device)
    qkv, grad = draw(device, shape, dtype, mask.queries)
    seed = torch.randint(2**62, (1,), device=device)
    keep = dropout_keep(seed, (shape.batch, shape.heads, mask.queries, mask.total), 0.1)
    options = dict(runs=mask.kernel_runs(device), scale=shape.width**-0.5, dropout_p=0.1, seed=seed)
    with poisoned():
        found = run(partial(attention_triton.attention, **options), qkv, grad)
    compare(found, qkv, grad, mask.dense(device), keep / 0.9)


def packed_holds(device: str, dtype: torch.dtype, on_gpu: bool) -> None:
    """Lengths on the device; and the last rows alone, which are one step of decoding."""
    torch.manual_seed(0)
    lengths = [300, 1, 0, 77, 500, 128, 64, 3, 190] if on_gpu else [9, 1, 0, 20]
    total = sum(lengths)
    bounds = torch.tensor([0, *np.cumsum(lengths)], dtype=torch.int32).to(device)
    shape = Shape(1, total, 0, 0, 4, 2, 64 if on_gpu else 8, 64 if on_gpu else 8)
    for causal in (False, True):
        qkv, grad = draw(device, shape, dtype, total)
        runs = packed_runs(bounds, keys=total, causal=causal)
        with poisoned():
            found = run(partial(attention_triton.attention, runs=runs, scale=shape.width**-0.5), qkv, grad)
        compare(found, qkv, grad, SegmentMask.packed(lengths, causal=causal).dense(device))
    mask = SegmentMask.single(length=total, causal=True)
    q, k, v = qkv
    for n in (1, 5, min(total, 40)):
        last = mask.last_queries(n)
        with poisoned():
            found = run(partial(attention, mask=last, backend="triton"), (q[:, :, -n:], k, v), grad[:, :, -n:])
        compare(found, (q[:, :, -n:], k, v), grad[:, :, -n:], last.dense(device))


def golden_holds(device: str, case: str) -> None:
    """The original's single tower in float32, its attention by the kernels."""
    with np.load(GOLDEN / f"{case}.npz", allow_pickle=False) as file:
        config = json.loads(str(file["config"]))
        p = {
            name.removeprefix("param."): torch.from_numpy(file[name]).to(device)
            for name in file.files
            if name.startswith("param.")
        }
        given = {
            name: torch.from_numpy(file[name]).to(device) for name in file.files if name.startswith(("in.", "out."))
        }
    if case == "image_topk":
        tower, eps, valid, expected = "vit", 1e-12, given["in.image_mask"][:, 0] > 0, given["out.vit_out"]
        x = given["in.image_u8"].permute(0, 3, 1, 2).float() / 127.5 - 1
        patch = config["resolution"]
        weight, bias = p["vit.patch_embeddings_projection_weight"], p["vit.patch_embeddings_projection_bias"]
        x = F.conv2d(x, weight, bias, stride=patch, padding=(patch - 1) // 2).flatten(2).mT
        x = torch.cat([p["vit.cls_token_embeddings"].expand(len(x), -1, -1), x], 1) + p["vit.position_embeddings"]
    else:
        tower, eps, valid, expected = "text", 1e-5, given["in.text_mask"][:, 0] > 0, given["out.text_out"]
        x = p["text.word_embedding"][given["in.src_ids"][..., 0]] + p["text.pos_embedding"][given["in.pos_ids"][..., 0]]
        x = _norm(p, "text.pre_encoder_layer_norm", x, eps)
    mask = SegmentMask.single(length=x.shape[1], valid=valid)
    heads = config[f"{tower}_num_attention_heads"]
    for number in range(config[f"{tower}_num_hidden_layers"]):
        layer = f"{tower}.encoder_layer_{number}"
        if tower == "vit":
            x = x + _attend(p, layer, _norm(p, f"{layer}_pre_att_layer_norm", x, eps), mask, heads)
            x = x + _feed_forward(p, layer, _norm(p, f"{layer}_pre_ffn_layer_norm", x, eps))
        else:
            x = _norm(p, f"{layer}_post_att_layer_norm", x + _attend(p, layer, x, mask, heads), eps)
            x = _norm(p, f"{layer}_post_ffn_layer_norm", x + _feed_forward(p, layer, x), eps)
    if tower == "vit":
        x = _norm(p, "vit.post_encoder_layer_norm", x, eps)
    wrong = float((x - expected)[valid].abs().max())
    if not wrong <= 2e-5:
        raise AssertionError(f"off by {wrong:.2e} from the original, at most 2e-05 allowed")


def _dense(p: dict[str, Tensor], name: str, x: Tensor) -> Tensor:
    return x @ p[f"{name}.w_0"] + p[f"{name}.b_0"]


def _norm(p: dict[str, Tensor], name: str, x: Tensor, eps: float) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], p[f"{name}_scale"], p[f"{name}_bias"], eps)


def _attend(p: dict[str, Tensor], layer: str, x: Tensor, mask: SegmentMask, heads: int) -> Tensor:
    q, k, v = (
        _dense(p, f"{layer}_multi_head_att_{part}_fc", x).unflatten(-1, (heads, -1)).transpose(1, 2)
        for part in ("query", "key", "value")
    )
    out = attention(q, k, v, mask=mask, backend="triton").transpose(1, 2).flatten(2)
    return _dense(p, f"{layer}_multi_head_att_output_fc", out)


def _feed_forward(p: dict[str, Tensor], layer: str, x: Tensor) -> Tensor:
    return _dense(p, f"{layer}_ffn_fc_1", F.gelu(_dense(p, f"{layer}_ffn_fc_0", x)))


def bits_hold(device: str, shape: Shape, dtype: torch.dtype, repeats: int) -> None:
    torch.manual_seed(sum(shape))
    mask = captioning(shape, device)
    qkv, grad = draw(device, shape, dtype, mask.queries)
    seed = torch.randint(2**62, (1,), device=device)

    def once(dropout_p: float) -> list[Tensor]:
        options = dict(runs=mask.kernel_runs(device), scale=0.1, dropout_p=dropout_p, seed=seed)
        return run(partial(attention_triton.attention, **options), qkv, grad)

    for dropout_p in (0.0, 0.1):
        first = once(dropout_p)
        for i in range(repeats):
            noise = torch.randn(1 + i * 4099, device=device)  # other addresses, other neighbours
            for a, b in zip(first, once(dropout_p), strict=True):
                if not torch.equal(a, b):
                    raise AssertionError(f"run {i + 2} differs by {float((a.double() - b.double()).abs().max()):.2e}")
            del noise


def nothing_syncs(device: str) -> None:
    """Masks are built anew each time, as in every step of training."""
    shape = REAL[0]
    qkv, grad = draw(device, shape, torch.bfloat16, shape.image + shape.codes + shape.text)
    valid = (torch.arange(shape.text) < torch.randint(1, shape.text, (shape.batch, 1))).to(device)
    prefix = torch.randint(0, 5, (shape.batch,)).to(device)

    def once() -> None:
        sizes = _sizes(shape)
        masks = [
            SegmentMask.build(sizes, PAIRS, valid={"text": valid}),
            SegmentMask.build(sizes, PAIRS, valid={"text": valid}, masked_rows="open"),
            SegmentMask.build(sizes, CAPTION, valid={"text": valid}, causal="text", prefix=prefix),
            None,
            torch.cat([valid.new_ones(shape.batch, shape.image + shape.codes), valid], 1)[:, None, None, :],
        ]
        for backend in ("triton", "sdpa"):
            for mask in masks:
                run(partial(attention, mask=mask, dropout_p=0.1, backend=backend), qkv, grad)

    once()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")


def far_offsets_hold(device: str) -> None:
    """Tensors of more than 2^31 elements: the last examples get what they get on their own."""
    shape = Shape(3800, 600, 100, 30, 12, 12, 64, 64)
    text = torch.arange(30) < torch.randint(1, 31, (shape.batch, 1))
    q = torch.randn(shape.batch, 730, 12, 64, device=device, dtype=torch.bfloat16).transpose(1, 2)

    def attend(x: Tensor, valid: Tensor) -> list[Tensor]:
        mask = SegmentMask.build(_sizes(shape), PAIRS, valid={"text": valid.to(device)})
        x = x.detach().requires_grad_()
        out = attention(x, x, x, mask=mask, backend="triton")
        return [out.detach()[-2:], *(g[-2:] for g in torch.autograd.grad(out, x, x.detach()))]

    for whole, alone in zip(attend(q, text), attend(q[-2:].clone(), text[-2:]), strict=True):
        if not torch.equal(whole, alone):
            raise AssertionError("the last examples differ")


def draw(device: str, shape: Shape, dtype: torch.dtype, tokens: int) -> tuple[list[Tensor], Tensor]:
    """q, k and v as slices of one projection's output where the heads allow it, and a gradient of the output."""
    if shape.heads == shape.kv_heads and shape.width == shape.value:
        fused = torch.randn(shape.batch, tokens, 3, shape.heads, shape.width, device=device).to(dtype)
        qkv = list(fused.permute(2, 0, 3, 1, 4))
    else:
        sizes = ((shape.heads, shape.width), (shape.kv_heads, shape.width), (shape.kv_heads, shape.value))
        qkv = [torch.randn(shape.batch, h, tokens, width, device=device).to(dtype) for h, width in sizes]
    return qkv, torch.randn(shape.batch, shape.heads, tokens, shape.value, device=device).to(dtype)


def run(function: Callable[..., Tensor], qkv, grad: Tensor) -> list[Tensor]:
    leaves = [x.detach().requires_grad_() for x in qkv]
    out = function(*leaves)
    return [out.detach(), *torch.autograd.grad(out, leaves, grad.to(out.dtype))]


def eager(q: Tensor, k: Tensor, v: Tensor, allowed: Tensor, keep: Tensor | float) -> Tensor:
    """Attention written plainly, every step in the inputs' type."""
    k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
    blind = ~allowed.any(-1, keepdim=True)
    scores = (q @ k.mT * q.shape[-1] ** -0.5).masked_fill(~(allowed | blind), float("-inf"))
    return (scores.softmax(-1) * keep).to(q.dtype).masked_fill(blind, 0.0) @ v


def compare(found: list[Tensor], qkv, grad: Tensor, allowed: Tensor, keep: Tensor | float = 1.0) -> None:
    plain = partial(eager, allowed=allowed, keep=keep)
    exact = run(plain, [x.double() for x in qkv], grad)
    same = run(plain, qkv, grad)
    for name, ours, theirs, right in zip(("out", "dq", "dk", "dv"), found, same, exact, strict=True):
        if allowed.sum(-1).max() <= 2 and name in ("dq", "dk"):
            # The gradient of a softmax over one key or two is a difference of near equals: relative to those.
            size = grad.double().norm() * qkv[2].double().norm() * max(x.double().norm() for x in qkv[:2])
            if not (ours.double() - right).norm() <= LIMIT[ours.dtype] * size:
                raise AssertionError(f"{name}: off by {float((ours.double() - right).norm()):.2e}")
            continue
        at_most(name, ours, right, LIMIT[ours.dtype])
        no_worse(name, ours, theirs, right)
