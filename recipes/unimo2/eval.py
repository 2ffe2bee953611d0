"""Evaluate a finished run: python recipes/unimo2/eval.py --run DIR [--task retrieval] [--pairs FILE.json --images DIR]

Prints one JSON: R@1/5/10 and median rank in both directions for the dual-encoder score and, with --rerank K, after the
joint tower has scored the K best candidates of every query. Without --pairs it takes the pairs that the run held out.
"""

from __future__ import annotations

import json
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch

from vlblocks.data import BadData, Tokenizer, read_karpathy
from vlblocks.errors import UserError
from vlblocks.evaluation import retrieval_ranks, summarize_ranks
from vlblocks.training import (
    config_from_dict,
    default_mixed_precision,
    load_weights,
    parse,
    read_json,
    read_tensors,
    run_main,
)
from vlblocks_recipes.unimo2.configs import RunConfig
from vlblocks_recipes.unimo2.corpus import EvalPairs, heldout_pairs
from vlblocks_recipes.unimo2.model import Unimo2
from vlblocks_recipes.unimo2.retrieval import code_metrics, embed, rerank_jointly


@dataclass(frozen=True)
class EvalConfig:
    """What to evaluate, and on what."""

    run: Path = Path("runs/unimo2-tiny")
    """Folder of a finished run."""
    task: Literal["retrieval"] = "retrieval"
    pairs: Path | None = None
    """Karpathy JSON; None: the pairs that the run held out."""
    images: Path | None = None
    """Folder of the JSON's images."""
    split: str = "test"
    rerank: int = 0
    """Candidates per query that the joint tower scores; 0: none."""


def load_run(folder: Path) -> tuple[RunConfig, Unimo2, Tokenizer]:
    """Configuration, model in evaluation mode and tokenizer of a finished run.

    Raises:
        UserError: naming the file that is missing or does not fit.
    """
    if not folder.is_dir():
        raise UserError(f"--run {folder}: no such folder; give the --out of a finished training")
    config = config_from_dict(RunConfig, read_json(folder / "config.json"), source=folder / "config.json")
    tokenizer = Tokenizer.load(folder / "tokenizer.json")
    model = Unimo2(replace(config.model, vocab=tokenizer.vocab_size)).eval()
    load_weights(model, read_tensors(folder / "model.safetensors"), source=folder / "model.safetensors")
    return config, model, tokenizer


def main() -> None:
    options = parse(EvalConfig(), description=__doc__)
    if (options.pairs is None) != (options.images is None):
        raise UserError("--pairs, --images: give both, or neither for the pairs that the run held out")
    if options.rerank < 0:
        raise UserError(f"--rerank: {options.rerank} is no number of candidates; give 0 or more")
    config, model, tokenizer = load_run(options.run)
    bad = BadData(share=config.data.max_bad_share)
    if options.pairs is None:
        gallery = heldout_pairs(config, bad)
    else:
        found = read_karpathy(options.pairs, options.images, split=options.split, bad=bad)
        gallery = found.gallery(bad=bad)
    pairs = EvalPairs(gallery, tokenizer, config.model.image_size, config.data.max_text)

    device = "cuda" if torch.cuda.is_available() else "cpu"
    precision = default_mixed_precision(device) if config.precision == "auto" else config.precision
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16 if device == "cuda" else None}.get(precision)

    def autocast():
        return nullcontext() if dtype is None else torch.autocast(device, dtype)

    model.to(device)
    embedded = embed(model, pairs.image_batches(), pairs.text_batches(), autocast=autocast)
    metrics = summarize_ranks(retrieval_ranks(embedded.similarity(), pairs.text_image))
    metrics |= code_metrics(model, embedded, pairs.text_image)
    if options.rerank:
        reranked = rerank_jointly(model, embedded, options.rerank, autocast=autocast)
        again = summarize_ranks(reranked.ranks(pairs.text_image))
        metrics |= {f"rerank_{name}": value for name, value in again.items() if name != "gallery_size"}
        metrics["rerank_pairs_scored"] = reranked.pairs_scored
    metrics["skipped"] = bad.total
    print(json.dumps(metrics, indent=2))


if __name__ == "__main__":
    run_main(main)
