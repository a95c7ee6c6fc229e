"""What losses/check.py compares of a reranker: every way to cut groups of pairs gives one gradient.

Shapes: P pairs, G groups.
"""

import dataclasses
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import nullcontext
from functools import partial

import numpy as np
import torch
from torch import Tensor, nn

from conf.schema import TrainConfig
from data.batches import chunks
from data.groups import GroupBatch
from data.pairs import pack_pairs
from losses import tiny
from losses.build import build_loss
from losses.comparisons import CPU, EXACT, Row, Values, difference, forget, gradients_of, larger
from losses.grad_cache import group_targets_on, seed_chunk, train_step
from models.reranker import Reranker
from runtime.distributed import SINGLE, Ranks

CHUNK_TOKENS = 60  # several chunks
# groups of each rank end here, as shares of all; a rank may have none
CUTS = {2: ((0, 0.5, 1), (0, 0, 1)), 3: ((0, 0.3, 0.8, 1), (0, 0.6, 0.6, 1))}


class Subject:
    """A shrunken experiment: a reranker with and without dropout, two batches of groups."""

    def __init__(self, c: TrainConfig) -> None:
        self.c, self.dropout = c, tiny.dropout_of(c)
        self.noisy, self.model = (tiny.build_rerank(c, dropout=p) for p in (self.dropout, 0.0))
        types = self.model.encoder.config.type_vocab > 1
        self.batch = groups_of((4, 1, 6, 3, 2), c, seed=1, has_types=types)
        self.small = groups_of((2,), c, seed=2, has_types=types)

    without = "ranks without groups"  # what the splits below hold

    def whole(self, batch: GroupBatch) -> Values:
        return direct(self, batch, self.model)

    def splits(self, size: int) -> Iterator[tuple[str, GroupBatch, Callable[[Ranks], Values]]]:
        """As comparisons.Subject.splits."""

        def step(batch: GroupBatch, cuts: list[int], budget_mib: float, ranks: Ranks) -> Values:
            part = share_of(batch, *cuts[ranks.rank : ranks.rank + 2])
            return cached(self, part, self.model, budget_mib=budget_mib, ranks=ranks)[0]

        for b, batch in enumerate((self.batch, self.small)):
            for k, shares in enumerate(CUTS[size]):
                cuts = [math.floor(share * batch.num_examples) for share in shares]
                for budget in (math.inf, 0.0):
                    yield f"{size}-{b}-{k}-{budget}", batch, partial(step, batch, cuts, budget)


def groups_of(
    sizes: Sequence[int], c: TrainConfig, *, seed: int, has_types: bool = False
) -> GroupBatch:
    """Random pairs of ragged lengths; the first group has two answers of different grades."""
    rng, num = np.random.default_rng(seed), sum(sizes)
    group_P = np.repeat(np.arange(len(sizes)), sizes)
    label_P = np.zeros(num, np.float32)
    label_P[np.unique(group_P, return_index=True)[1]] = 1
    if sizes[0] > 2:
        label_P[1] = 2
    if c.model.num_labels > 1:
        label_P = rng.integers(0, c.model.num_labels, num).astype(np.float32)
    lengths = rng.integers(3, tiny.POSITIONS - 8, num)
    return GroupBatch(
        pair_tokens=[rng.integers(2, tiny.VOCAB, n).astype(np.int32) for n in lengths],
        pair_types=[((np.arange(n) > n // 3) & has_types).astype(np.int32) for n in lengths],
        group_P=group_P,
        label_P=label_P,
        score_P=rng.standard_normal(num).astype(np.float32),
        num_examples=len(sizes),
        num_examples_global=len(sizes),
        num_pairs_global=num,
        example_ids=[f"e{i}" for i in range(len(sizes))],
    )


def share_of(batch: GroupBatch, low: int, high: int) -> GroupBatch:
    """The groups low ... high - 1, as one rank has them."""
    mine = np.flatnonzero((batch.group_P >= low) & (batch.group_P < high))
    return dataclasses.replace(
        batch,
        pair_tokens=[batch.pair_tokens[i] for i in mine],
        pair_types=[batch.pair_types[i] for i in mine],
        group_P=batch.group_P[mine] - low,
        label_P=batch.label_P[mine],
        score_P=batch.score_P[mine],
        num_examples=high - low,
    )


def exact_loss(s: Subject) -> nn.Module:
    return build_loss(s.c.loss, s.c.seed, task="rerank").double()


def direct(
    s: Subject, batch: GroupBatch, model: Reranker, *, chunk_tokens: int = 10**6, step: int = 0
) -> Values:
    """Score every pair with its graph, one loss, one backward.

    Chunks, their numbers and their seeds are those of train_step, made here once more.
    """
    pairs = list(zip(batch.pair_tokens, batch.pair_types, strict=True))
    parts, order = [], []
    for number, rows in enumerate(chunks(np.array([len(t) for t, _ in pairs]), chunk_tokens)):
        seed_chunk(s.c.seed, step, 0, number)
        parts.append(model(pack_pairs([pairs[i] for i in rows])))
        order += rows.tolist()
    logits_PL = torch.cat(parts)[torch.tensor(order).argsort()]
    forget(model)
    loss, _ = exact_loss(s)(logits_PL, group_targets_on(batch, CPU, step=step))
    loss.backward()
    return Values(loss.detach(), gradients_of_layers(model))


def cached(
    s: Subject,
    batch: GroupBatch,
    model: Reranker,
    *,
    chunk_tokens: int = CHUNK_TOKENS,
    step: int = 0,
    budget_mib: float = math.inf,
    ranks: Ranks = SINGLE,
) -> tuple[Values, float]:
    """train_step as the training loop calls it, and the share of tokens that it replayed."""
    forget(model)
    loss, numbers = train_step(
        model, exact_loss(s), batch, seed=s.c.seed, step=step, chunk_tokens=chunk_tokens,
        device=CPU, autocast=nullcontext, activation_budget_mib=budget_mib, ranks=ranks,
    )  # fmt: skip
    return Values(loss, gradients_of_layers(model)), float(numbers["replayed_share"])


def gradients_of_layers(model: Reranker) -> dict[str, Tensor]:
    """Gradients by name, the last layer's bias as one with its weight: most of these losses do not
    change when all logits do, so that it is 0 but for rounding and has no size of its own."""
    found = gradients_of(model)
    last = [found.pop(f"head.out.{kind}") for kind in ("weight", "bias")]
    return found | {"head.out": torch.cat([x.flatten() for x in last])}


def compare_cached(s: Subject) -> Iterator[Row]:
    worst = 0.0
    for batch, step in ((s.batch, 0), (s.batch, 3), (s.small, 1)):
        expected = direct(s, batch, s.noisy, chunk_tokens=CHUNK_TOKENS, step=step)
        for budget in (math.inf, 0.3, 0.0):
            found, _ = cached(s, batch, s.noisy, step=step, budget_mib=budget)
            worst = larger(worst, difference(found, expected))
    what = f"one backward through everything; dropout {s.dropout:g}, same chunks"
    yield Row("cached = direct", what, worst, EXACT)


def compare_chunks(s: Subject) -> Iterator[Row]:
    worst = 0.0
    for batch in (s.batch, s.small):
        expected = direct(s, batch, s.model)
        for chunk_tokens in (1, 13, 60, 150, 10**6):
            found, _ = cached(s, batch, s.model, chunk_tokens=chunk_tokens)
            worst = larger(worst, difference(found, expected))
    what = "groups lie across chunks; 1, 13, 60, 150 tokens a chunk, all"
    yield Row("any chunking", what, worst, EXACT)


def compare_budgets(s: Subject) -> Iterator[Row]:
    expected, worst, shares = direct(s, s.batch, s.model), 0.0, set()
    for budget in (math.inf, 3.0, 1.0, 0.5, 0.25, 0.1, 0.0):
        found, share = cached(s, s.batch, s.model, budget_mib=budget)
        shares.add(round(share, 2))
        worst = larger(worst, difference(found, expected))
    said = ", ".join(f"{share:.2f}" for share in sorted(shares))
    yield Row("any activation budget", f"share replayed: {said}", worst, EXACT)


def compare_mean(s: Subject) -> Iterator[Row]:
    b, num = s.batch, s.batch.num_examples
    twice = dataclasses.replace(
        b,
        pair_tokens=2 * b.pair_tokens,
        pair_types=2 * b.pair_types,
        group_P=np.concatenate([b.group_P, b.group_P + num]),
        label_P=np.tile(b.label_P, 2),
        score_P=np.tile(b.score_P, 2),
        num_examples=2 * num,
        num_examples_global=2 * num,
        num_pairs_global=2 * b.num_pairs_global,
        num_positives_global=None,
        num_many_global=None,
    )
    found, _ = cached(s, twice, s.model)
    error = difference(found, direct(s, b, s.model))
    yield Row("mean over groups", "every group twice: nothing changes", error, EXACT)


COMPARISONS: tuple[Callable[[Subject], Iterable[Row]], ...] = (
    compare_cached,
    compare_chunks,
    compare_budgets,
    compare_mean,
)
