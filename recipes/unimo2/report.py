"""What a finished run leaves: metrics.json, curves.png and grounding.png."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path

import torch
from torch import Tensor

from vlblocks.evaluation import (
    GroundingExample,
    bootstrap_intervals,
    chance_levels,
    plot_curves,
    plot_grounding,
    retrieval_ranks,
    summarize_ranks,
)
from vlblocks.training import read_history, write_json_atomic

from .corpus import EvalPairs
from .model import Unimo2
from .objectives import STREAMS
from .retrieval import code_metrics, embed


def report(
    model: Unimo2,
    pairs: EvalPairs,
    out: Path,
    seconds: float,
    *,
    extra: dict[str, float],
    autocast: Callable[[], AbstractContextManager],
) -> dict[str, float]:
    """Evaluate on `pairs`, draw, and write metrics.json last: its presence says that the run is finished."""
    began = time.monotonic()
    model.eval()
    gallery = embed(model, pairs.image_batches(), pairs.text_batches(), autocast=autocast, states=False)
    ranks = retrieval_ranks(gallery.similarity(), pairs.text_image)
    found = {**summarize_ranks(ranks), **code_metrics(model, gallery, pairs.text_image)}
    metrics = {f"val/{name}": value for name, value in found.items()}
    chance = chance_levels(pairs.text_image, images=len(pairs))
    for name, (low, high) in bootstrap_intervals(ranks).items():
        metrics |= {f"val/{name}_low": low, f"val/{name}_high": high, f"val/{name}_chance": chance[name]}
    metrics |= extra

    history = read_history(out / "history.jsonl")
    own = [name for name in history if name == "loss" or name.startswith(tuple(f"{stream}/" for stream in STREAMS))]
    losses = {name: list(zip(*history[name], strict=True)) for name in own}
    plot_curves(losses, out / "curves.png", title=f"{out.name}: training losses")
    if gallery.image_lookup.image_scores is not None:
        examples = [grounding_example(model, pairs, index) for index in range(min(4, len(pairs)))]
        plot_grounding(out / "grounding.png", examples, title="Codes that a pair picks: where they fire")
    metrics["time/total_s"] = seconds + time.monotonic() - began
    write_json_atomic(out / "metrics.json", metrics)
    for name in ("text_to_image_r1", "image_to_text_r1", "text_to_image_r10", "image_to_text_r10"):
        print(f"{name}: {found[name]:.3f}  (chance {chance[name]:.3f})")
    return metrics


@torch.no_grad()
def grounding_example(model: Unimo2, pairs: EvalPairs, index: int) -> GroundingExample:
    """One pair's picked codes, and how strongly each fires on every patch and every word."""
    device = next(model.parameters()).device
    tokenizer, text = pairs.tokenizer, int((pairs.text_image == index).nonzero()[0])
    tokens = torch.tensor(tokenizer.encode(pairs.gallery.captions[text], pairs.max_text), device=device)[None]
    image = pairs.image(index)[None].to(device)
    image_states, text_states = model.image(image), model.text(tokens)
    states, _ = model.states_to_ground(image_states, text_states)
    found = model.grounded(states, with_loss=False)
    fires: Tensor = model.grounded.activations(states, found.codes)[0].T.cpu()  # [K, N]
    grid = model.image.patch_embed.grid(*image.shape[-2:])
    patches = grid[0] * grid[1]
    words, columns = [], []
    ids = tokens[0].tolist()[1:-1]
    starts = [place for place, first in enumerate(tokenizer.word_starts(ids)) if first]
    for start, stop in zip(starts, [*starts[1:], len(ids)], strict=True):
        words.append(tokenizer.decode(ids[start:stop]).strip())
        columns.append(fires[:, patches + start : patches + stop].amax(1))
    picture = pairs.gallery.images[index]
    side = min(picture.shape[:2])
    top, left = (round((length - side) / 2) for length in picture.shape[:2])
    return GroundingExample(
        image=picture[top : top + side, left : left + side],  # the model sees the centre
        words=words,
        patch_activations=fires[:, :patches].reshape(-1, *grid).numpy(),
        word_activations=torch.stack(columns, dim=1).numpy(),
        codes=found.indices[0].cpu().numpy(),
    )
