"""Losses over 1, 2 and 4 real gloo processes: sharded loss and gradients equal the full batch's, uneven ones included.

The file is its own worker: `python test_losses.py RANK FOLDER` computes everything once for one rank. Four processes
are started once; the first two of them, and then the first alone, make smaller groups after it.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn

from vlblocks.losses import (
    caption_loss,
    circle_loss,
    grounding_loss,
    info_nce,
    linear_cross_entropy,
    masked_grounding_loss,
    masked_rows,
    masked_token_loss,
    matching_loss,
    siglip,
    two_view_contrast,
)
from vlblocks.ops import collectives

RANKS = 4
SPLITS = {4: [(2, 1, 3, 0), (2, 2, 1, 1)], 2: [(3, 3), (4, 2), (1, 5), (6, 0)], 1: [(6,)]}
ROWS, WIDTH, TOKENS, VOCAB = 6, 5, 4, 7


class Toy(nn.Module):
    """Two linear towers and every learnable scalar of the objectives."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.text = nn.Linear(WIDTH, WIDTH, dtype=torch.float64)
        self.match = nn.Linear(WIDTH, 2, dtype=torch.float64)
        self.head = nn.Linear(WIDTH, VOCAB, dtype=torch.float64)
        self.temperature = nn.Parameter(torch.tensor([0.3], dtype=torch.float64))
        self.bias = nn.Parameter(torch.tensor([-1.0], dtype=torch.float64))

    def forward(self, case, batch):
        return CASES[case](self, batch)


BACKEND: list[str] = ["auto"]
"""Back end of the losses that never hold their logits; the full batch's are the plain twins'."""


def contrast(loss, ids=False, weight=False, queue=False, teacher=False, **settings):
    """A contrastive case: (model, batch) -> (loss, this rank's amount)."""

    def run(model, batch):
        image, text = model.image(batch["image"]), model.text(batch["text"])
        more = {"image_ids": batch["ids"] if ids else None} if loss is not views else {}
        if queue:
            more |= queues()
        if teacher:
            more |= {"teacher_image": batch["image"], "teacher_text": batch["text"], "alpha": 0.3}
        more |= {"weight": batch["weight"] if weight else None, "backend": BACKEND[0]}
        value = loss(model, image, text, settings | more)
        weighted = settings.get("reduction") == "weighted"
        return value, batch["weight"].sum() if weighted else len(image)

    return run


def queues():
    generator = torch.Generator().manual_seed(2)
    image, text = torch.randn(2, 3, WIDTH, dtype=torch.float64, generator=generator)
    return {"queue_image": image, "queue_text": text, "queue_valid": torch.tensor([True, False, True])}


def nce(model, image, text, settings):
    return info_nce(image, text, temperature=model.temperature, **settings)


def sigmoid(model, image, text, settings):
    return siglip(image, text, scale=1 / model.temperature, bias=model.bias, **settings)


def views(model, image, text, settings):
    return two_view_contrast(image, text, temperature=model.temperature, **settings)


def matching(model, batch):
    logits = model.match(model.image(batch["image"]) * model.text(batch["text"]))
    return matching_loss(logits, batch["match"], batch["weight"]), batch["weight"].sum()


def masked_tokens(model, batch):
    masked = masked_rows(model.text(batch["states"]), batch["labels"])
    return masked_token_loss(model.head(masked.rows), masked.labels), len(masked.rows)


def masked_codes(model, batch):
    states = model.text(batch["states"])
    head = {"codebook": model.head.weight, "bias": model.head.bias}
    loss = masked_grounding_loss(states, batch["labels"], **head, backend=BACKEND[0])
    return loss, (batch["labels"] != -100).sum()


def tied_tokens(model, batch):
    """The output weights are also the embeddings that the states are made of."""
    words, labels = model.head.weight, batch["labels"]
    states = model.text(batch["states"]) + F.embedding(batch["words"], words)
    options = {"label_smoothing": 0.1, "chunk_bytes": 1024, "backend": BACKEND[0]}
    loss = linear_cross_entropy(states, words, model.head.bias, labels, **options)
    return loss, (labels != -100).sum()


def grounding(model, batch):
    valid = batch["labels"] != -100
    picks = batch["match"][:, None] + torch.tensor([0, 3])
    terms = grounding_loss(model.text(batch["states"]), model.head.weight, picks, 5 * model.temperature, valid)
    tokens, examples = collectives.rank_share(valid.sum()), collectives.rank_share(valid.any(dim=1).sum())
    return terms.token_loss * tokens + 0.25 * terms.code_loss * examples, 1


def caption(model, batch):
    return caption_loss(model.head(batch["states"]), batch["labels"]), (batch["labels"] != -100).sum()


def circle(model, batch):
    positives = model.image(batch["image"])[:, :2]
    return circle_loss(positives, model.text(batch["text"]), scale=2.0), len(positives)


RING = {"exchange": "ring", "chunk_bytes": 40}
CONTRASTS = {
    "info_nce": contrast(nce),
    "info_nce_ids": contrast(nce, ids=True),
    "info_nce_exclude": contrast(nce, ids=True, same_id="exclude"),
    "info_nce_weight": contrast(nce, weight=True),
    "info_nce_ids_weighted": contrast(nce, ids=True, weight=True, reduction="weighted"),
    "siglip": contrast(sigmoid),
    "siglip_ids_weighted": contrast(sigmoid, ids=True, weight=True, reduction="weighted"),
    "two_view": contrast(views),
    "two_view_weight": contrast(views, weight=True),
    "info_nce_tiles": contrast(nce, ids=True, weight=True, chunk_bytes=24),
    "info_nce_smooth": contrast(nce, ids=True, weight=True, label_smoothing=0.1),
    "info_nce_exclude_smooth": contrast(nce, ids=True, weight=True, same_id="exclude", label_smoothing=0.1),
    "info_nce_queue": contrast(nce, queue=True, label_smoothing=0.1),
    "info_nce_teacher": contrast(nce, teacher=True),
    "info_nce_albef": contrast(nce, ids=True, weight=True, queue=True, teacher=True, label_smoothing=0.1),
    "info_nce_ring": contrast(nce, **RING),
    "info_nce_ring_albef": contrast(nce, ids=True, weight=True, queue=True, teacher=True, label_smoothing=0.1, **RING),
    "info_nce_ring_exclude": contrast(nce, ids=True, weight=True, same_id="exclude", reduction="weighted", **RING),
    "siglip_ring": contrast(sigmoid, **RING),
    "siglip_ring_ids_weighted": contrast(sigmoid, ids=True, weight=True, reduction="weighted", **RING),
    "two_view_ring": contrast(views, weight=True, **RING),
}
CASES = CONTRASTS | {
    "matching": matching,
    "masked_tokens": masked_tokens,
    "masked_codes": masked_codes,
    "tied_tokens": tied_tokens,
    "grounding": grounding,
    "caption": caption,
    "circle": circle,
}


def full_batch():
    generator = torch.Generator().manual_seed(5)

    def normal(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    labels = torch.randint(VOCAB, (ROWS, TOKENS), generator=generator)
    # Unlike counts per row, none at all in row 1.
    shown = torch.arange(TOKENS)[None] >= torch.tensor([4, 0, 2, 1, 3, 1])[:, None]
    return {
        "image": normal(ROWS, WIDTH),
        "text": normal(ROWS, WIDTH),
        "ids": torch.tensor([4, 9, 1, 9, 4, 4]),
        "weight": torch.tensor([1.0, 1.0, 0.0, 2.0, 1.0, 0.0], dtype=torch.float64),
        "match": torch.tensor([1, 0, 1, 1, 0, 1]),
        "states": normal(ROWS, TOKENS, WIDTH),
        "labels": labels.masked_fill(shown, -100),
        "words": torch.randint(VOCAB, (ROWS, TOKENS), generator=generator),
    }


def model():
    torch.manual_seed(11)
    return Toy()


def gradients(toy):
    return {name: torch.zeros_like(p) if p.grad is None else p.grad.clone() for name, p in toy.named_parameters()}


def cases_of(ranks):
    """What is worth as many ranks: exchanges differ with more than two."""
    return CASES if ranks == 2 else CONTRASTS


def run_cases(rank):
    results = {}
    ranks = collectives.world_size()
    for split in SPLITS[ranks]:
        shard = {name: x.split(list(split))[rank] for name, x in full_batch().items()}
        for case in cases_of(ranks):
            toy = model()
            parallel = nn.parallel.DistributedDataParallel(toy, find_unused_parameters=True)
            loss, amount = parallel(case, shard)
            loss = loss * collectives.rank_share(amount)
            loss.backward()
            average = collectives.all_reduce_sum(loss) / collectives.world_size()
            results[f"{case}-{split}"] = {"loss": average, "gradients": gradients(toy)}
    return results


def run_collectives(rank):
    x = (torch.arange(2 * rank + 1, dtype=torch.float64)[:, None] + 10 * rank + torch.zeros(2)).requires_grad_()
    gathered = collectives.gather_with_grad(x)
    factors = torch.arange(1.0, 9.0).view(4, 2) * 10**rank
    (gathered * factors).sum().backward()
    z = torch.full((2,), float(rank))
    return {
        "ranks": (collectives.rank(), collectives.world_size()),
        "sizes": collectives.gather_sizes(2 * rank + 1),
        "offset": collectives.row_offset([1, 3]),
        "gathered": gathered.detach(),
        "gathered_grad": x.grad,
        "constants": collectives.gather(x),
        "flags": collectives.gather(torch.tensor([True] * rank + [False])),
        "even": collectives.gather(torch.tensor([[rank, rank]])),
        "empty": collectives.gather(torch.zeros(0, 3)),
        "sum": collectives.all_reduce_sum(z),
        "broadcast": collectives.broadcast(z, source=1),
        "untouched": z,
        "share": collectives.rank_share(2 * rank + 1),
        "share_of_nothing": collectives.rank_share(torch.tensor(0)),
    }


def run_alone_on_one_rank(rank):
    """Only rank 0 computes: without `gather=False` it would wait for ever."""
    if rank != 0:
        return {}
    image, text = full_batch()["image"], full_batch()["text"]
    return {
        "info_nce": info_nce(image, text, temperature=0.3, gather=False),
        "siglip": siglip(image, text, scale=2.0, bias=-1.0, gather=False),
        "two_view": two_view_contrast(image, text, temperature=0.3, gather=False),
    }


def run_exchanges(rank):
    """On four ranks, of 0 to 3 rows."""
    sizes = [2, 0, 3, 1]
    own = torch.full((sizes[rank], 2), float(rank))
    seen = [(owner, *(x.clone() for x in blocks)) for owner, blocks in collectives.ring([own, -own], sizes=sizes)]
    sums = collectives.RingSum(sizes=sizes)
    for owner, (block,) in collectives.ring([own], sizes=sizes):
        sums.add(owner, block + 10.0**rank)
    everything = torch.arange(float(sum(sizes)))[:, None] + 100 * rank
    return {
        "ring": seen,
        "ring_sum": sums.finish(),
        "exchanged": collectives.exchange_rows(everything, sizes=sizes),
        "scattered": collectives.reduce_scatter(everything, sizes=sizes),
    }


def work(rank, folder):
    results = {}
    for ranks in SPLITS:
        if rank >= ranks:
            break
        dist.init_process_group("gloo", init_method=f"file://{folder}/meeting{ranks}", rank=rank, world_size=ranks)
        results[ranks] = {"cases": run_cases(rank)}
        if ranks == 4:
            results[ranks]["exchanges"] = run_exchanges(rank)
        if ranks == 2:
            results[ranks] |= {"collectives": run_collectives(rank), "alone": run_alone_on_one_rank(rank)}
        dist.barrier()
        dist.destroy_process_group()
    torch.save(results, folder / f"{rank}.pt")


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    """What the processes computed, by rank and by how many took part."""
    folder = tmp_path_factory.mktemp("gloo")
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(rank), str(folder)], env=environment, stderr=subprocess.PIPE, text=True
        )
        for rank in range(RANKS)
    ]
    try:
        errors = [worker.communicate(timeout=120)[1] for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    assert all(worker.returncode == 0 for worker in workers), "\n".join(errors)
    return [torch.load(folder / f"{rank}.pt") for rank in range(RANKS)]


@pytest.fixture
def ranks(found):
    """What both processes of a group of two computed."""
    return [results[2] for results in found[:2]]


@pytest.mark.parametrize(
    "case, split", [(case, split) for n, splits in SPLITS.items() for split in splits for case in cases_of(n)], ids=str
)
def test_sharded_loss_and_gradients_equal_the_full_batch(found, case, split, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "BACKEND", ["reference"])
    ranks = [results[len(split)] for results in found[: len(split)]]
    toy = model()
    loss, _ = toy(case, full_batch())
    loss.backward()
    expected = gradients(toy)
    assert any(gradient.abs().max() > 1e-3 for gradient in expected.values())
    for results in ranks:
        result = results["cases"][f"{case}-{split}"]
        # The share is float32.
        torch.testing.assert_close(result["loss"], loss.detach(), rtol=1e-6, atol=0)
        for name, gradient in expected.items():
            torch.testing.assert_close(result["gradients"][name], gradient, rtol=1e-6, atol=1e-6, msg=name)


def test_blocks_go_round_the_ring(found):
    sizes = [2, 0, 3, 1]
    for rank, results in enumerate(found):
        seen = results[4]["exchanges"]["ring"]
        assert [owner for owner, *_ in seen] == [(rank - step) % 4 for step in range(4)]
        for owner, block, negative in seen:
            assert torch.equal(block, torch.full((sizes[owner], 2), float(owner)))
            assert torch.equal(negative, -block)
        # Every rank has added the block and its own power of ten.
        assert torch.equal(results[4]["exchanges"]["ring_sum"], torch.full((sizes[rank], 2), 4.0 * rank + 1111))


def test_columns_reach_their_rank(found):
    offsets = [0, 2, 2, 5, 6]
    for rank, results in enumerate(found):
        own = torch.arange(float(offsets[rank]), float(offsets[rank + 1]))[:, None]
        expected = torch.stack([own + 100 * other for other in range(4)])
        assert torch.equal(results[4]["exchanges"]["exchanged"], expected)
        assert torch.equal(results[4]["exchanges"]["scattered"], expected.sum(0))


def test_gather_keeps_rank_order_and_uneven_sizes(ranks):
    rows = torch.tensor([0.0, 10.0, 11.0, 12.0], dtype=torch.float64)[:, None].expand(4, 2)
    for rank, results in enumerate(ranks):
        found = results["collectives"]
        assert found["ranks"] == (rank, 2)
        assert found["sizes"] == [1, 3]
        assert found["offset"] == rank
        assert torch.equal(found["gathered"], rows)
        assert torch.equal(found["constants"], rows)
        assert found["flags"].tolist() == [False, True, False]
        assert found["even"].tolist() == [[0, 0], [1, 1]]
        assert found["empty"].shape == (0, 3)


def test_gather_sums_the_gradients_of_all_ranks(ranks):
    factors = torch.arange(1.0, 9.0, dtype=torch.float64).view(4, 2) * 11
    assert torch.equal(ranks[0]["collectives"]["gathered_grad"], factors[:1])
    assert torch.equal(ranks[1]["collectives"]["gathered_grad"], factors[1:])


def test_reductions_and_broadcast(ranks):
    for rank, results in enumerate(ranks):
        found = results["collectives"]
        assert found["sum"].tolist() == [1, 1]
        assert found["broadcast"].tolist() == [1, 1]
        assert found["untouched"].tolist() == [rank, rank]
        assert float(found["share"]) == pytest.approx((0.5, 1.5)[rank])
        assert found["share_of_nothing"] == 1


def test_one_rank_can_compute_alone(ranks):
    image, text = full_batch()["image"], full_batch()["text"]
    alone = ranks[0]["alone"]
    torch.testing.assert_close(alone["info_nce"], info_nce(image, text, temperature=0.3))
    torch.testing.assert_close(alone["siglip"], siglip(image, text, scale=2.0, bias=-1.0))
    torch.testing.assert_close(alone["two_view"], two_view_contrast(image, text, temperature=0.3))


if __name__ == "__main__":
    work(int(sys.argv[1]), Path(sys.argv[2]))
