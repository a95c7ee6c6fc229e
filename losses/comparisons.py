"""What losses/check.py compares: two ways to one gradient, and every way to cut the work.

Shapes: A queries and N candidate passages of all ranks, D embedding.
"""

import copy
import dataclasses
import functools
import logging
import math
import multiprocessing
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import LossConfig, TrainConfig
from data.batches import Batch, chunks
from losses import infonce, sigmoid, similarity, tiny
from losses.build import build_loss
from losses.grad_cache import seed_chunk, targets_on, train_step
from losses.infonce import Targets, dims_of_step
from losses.specification import KINDS, specification
from losses.tiny import Sample, sample, share_of
from models.towers import Towers
from models.transformer import pack
from runtime.device import autocast_for
from runtime.distributed import SINGLE, Ranks

CPU = torch.device("cpu")
EXACT = 1e-9  # float64, the same sums in another order
BFLOAT16 = 5e-3  # the embeddings' gradients are bfloat16 as well: up to 2^-9 of each entry
AUTOCAST = 1e-5  # the same roundings to bfloat16; float32 sums of chunks in another order
LOSSES = (20.0, 8.0, 3.0, 1.0, 0.1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6, 1e-7, 1e-8)
CHUNK_TOKENS = 45  # several chunks a side
# How a batch is cut over so many ranks: shares of its queries and of its passages at each cut. A
# rank may have no query, no passage, or neither.
CUTS = {
    2: (((0, 0.7, 1), (0, 0.2, 1)), ((0, 1, 1), (0, 1, 1))),
    3: (((0, 0.6, 0.6, 1), (0, 0.5, 0.5, 1)), ((0, 0, 0.4, 1), (0, 0.8, 1, 1))),
}


@dataclass(frozen=True)
class Row:
    """One comparison: the largest difference that was seen, and the most that is allowed."""

    name: str
    what: str
    difference: float
    bound: float

    @property
    def ok(self) -> bool:
        return self.difference <= self.bound  # nan is not


@dataclass(frozen=True)
class Values:
    """A loss and its gradients by name."""

    loss: Tensor
    gradients: dict[str, Tensor]


class Subject:
    """What is checked: a shrunken experiment, towers with and without dropout, two batches.

    small is the last batch of an epoch, as small as it can be.
    """

    def __init__(self, c: TrainConfig) -> None:
        self.c, self.loss = c, c.loss
        self.dropout = tiny.dropout_of(c)
        self.noisy, self.towers = (tiny.build(c, dropout=p) for p in (self.dropout, 0.0))
        pooled = {"is_prompt_pooled": self.towers.spec.prompt_in_pooling}
        self.sample = sample(7, 9, seed=1, **pooled)
        self.small = sample(2, 1, seed=2, **pooled)

    @property
    def is_specified(self) -> bool:
        """Whether losses/specification.py knows this loss; else it is compared with itself."""
        return self.loss.kind in KINDS

    without = "ranks without queries, passages or both"  # what the splits below hold

    def whole(self, s: Sample) -> "Values":
        return direct(self, s, self.towers)

    def splits(self, size: int) -> Iterator[tuple[str, Sample, Callable[[Ranks], "Values"]]]:
        """(name, batch, a rank's step on its part) of every way to cut a batch over ranks."""

        def step(s: Sample, cuts: tuple, budget_mib: float, ranks: Ranks) -> Values:
            part = share_of(s.batch, ranks.rank, *cuts)
            return cached(
                self, s, self.towers, batch=part, budget_mib=budget_mib, ranks=ranks
            )[0]  # fmt: skip

        for b, s in enumerate((self.sample, self.small)):
            totals = len(s.batch.query_tokens), len(s.batch.passage_tokens)
            for k, shares in enumerate(CUTS[size]):
                cuts = tuple(
                    [math.floor(share * n) for share in side]
                    for side, n in zip(shares, totals, strict=True)
                )
                for budget in (math.inf, 0.0):
                    yield f"{size}-{b}-{k}-{budget}", s, functools.partial(step, s, cuts, budget)

    def embeddings(self, s: Sample) -> tuple[Tensor, Tensor]:
        """Random unit q_AD, p_ND for a batch."""
        rng = torch.Generator().manual_seed(0)
        sizes = len(s.batch.query_tokens), len(s.batch.passage_tokens)
        noise = (torch.randn(n, self.towers.width, generator=rng).double() for n in sizes)
        q_AD, p_ND = (F.normalize(x, dim=1) for x in noise)
        return q_AD, p_ND

    @functools.cached_property
    def budgets_mib(self) -> dict[float, float]:
        """Activation budgets that keep all, less and less, nothing; the share of tokens that each
        replays."""

        def share_at(budget_mib: float) -> float:
            return cached(self, self.sample, self.towers, budget_mib=budget_mib)[1]

        found, budget, most = {math.inf: share_at(math.inf)}, 8.0, share_at(0.0)
        while (share := share_at(budget)) < most and budget > 1e-3:
            if share not in found.values():
                found[budget] = share
            budget /= 1.6
        return found | {0.0: most}


# ---- two ways to a gradient ----------------------------------------------------------------------


class Dense(nn.Module):
    """losses/specification.py with the parameters and the call of a loss module."""

    def __init__(self, c: LossConfig, seed: int = 0) -> None:
        super().__init__()
        self.c, self.seed, self.bias = c, seed, None
        start = torch.tensor(math.log(c.temperature), dtype=torch.float64)
        self.log_temperature = nn.Parameter(start, requires_grad=c.learn_temperature)
        if c.kind == "sigmoid":
            self.bias = nn.Parameter(torch.tensor(c.sigmoid_bias, dtype=torch.float64))

    def forward(
        self, q_AD: Tensor, p_ND: Tensor, targets: Targets, *, keep_AN: Tensor | None = None
    ) -> tuple[Tensor, dict[str, Tensor]]:
        dims, _ = dims_of_step(self.c, q_AD.shape[1], self.seed, targets.step)
        temperature = self.log_temperature.exp()
        loss = specification(
            self.c, q_AD, p_ND, targets, temperature=temperature, bias=self.bias, dims=dims,
            keep_AN=keep_AN,
        )  # fmt: skip
        return loss, {}


def exact_loss(c: LossConfig, seed: int = 0) -> nn.Module:
    """The experiment's loss module in float64, its temperature not rounded to float32 before."""
    loss_fn = build_loss(c, seed).double()
    if hasattr(loss_fn, "log_temperature"):
        with torch.no_grad():
            loss_fn.log_temperature.fill_(math.log(c.temperature))
    return loss_fn


def dense_loss(c: LossConfig, seed: int = 0) -> nn.Module:
    return Dense(c, seed) if c.kind in KINDS else exact_loss(c, seed)


def direct(
    subject: Subject,
    s: Sample,
    towers: Towers,
    *,
    chunk_tokens: int = 10**6,
    step: int = 0,
    loss_fn: nn.Module | None = None,
) -> Values:
    """Encode every text with its graph, one dense loss, one backward.

    Chunks, their numbers and their seeds are those of train_step, made here once more.
    """
    number, embeddings = 0, []
    for side in ("query", "passage"):
        texts = getattr(s.batch, f"{side}_tokens")
        skip = s.batch.query_prompt_tokens_B if side == "query" else s.batch.passage_prompt_tokens_N
        parts, order = [], []
        for rows in chunks(np.array([len(t) for t in texts]), chunk_tokens):
            seed_chunk(subject.c.seed, step, 0, number)
            parts.append(towers.tower(side)(pack([texts[i] for i in rows], skip=skip[rows])))
            order += rows.tolist()
            number += 1
        embeddings.append(torch.cat(parts)[torch.tensor(order).argsort()])
    loss_fn = dense_loss(subject.loss, subject.c.seed) if loss_fn is None else loss_fn
    forget(towers)
    loss, _ = loss_fn(*embeddings, targets_on(s.batch, CPU, step=step, guide=s.guide))
    loss.backward()
    return Values(loss.detach(), gradients_of(towers, loss_fn))


def cached(
    subject: Subject,
    s: Sample,
    towers: Towers,
    *,
    batch: Batch | None = None,
    chunk_tokens: int = CHUNK_TOKENS,
    step: int = 0,
    budget_mib: float = math.inf,
    ranks: Ranks = SINGLE,
    loss_fn: nn.Module | None = None,
    autocast: Callable[[], AbstractContextManager] = nullcontext,
) -> tuple[Values, float]:
    """train_step as the training loop calls it, and the share of tokens that it replayed.

    batch  this rank's part of the sample's; None: all of it
    """
    loss_fn = exact_loss(subject.loss, subject.c.seed) if loss_fn is None else loss_fn
    forget(towers, loss_fn)
    loss, numbers = train_step(
        towers, loss_fn, batch or s.batch, seed=subject.c.seed, step=step, device=CPU,
        chunk_tokens=chunk_tokens, autocast=autocast, activation_budget_mib=budget_mib,
        ranks=ranks, guide=s.guide,
    )  # fmt: skip
    return Values(loss, gradients_of(towers, loss_fn)), float(numbers["replayed_share"])


def on_embeddings(
    loss_fn: nn.Module, q_AD: Tensor, p_ND: Tensor, targets: Targets, **options: Any
) -> Values:
    """A loss module by itself: gradients of the embeddings and of its own parameters."""
    q_AD, p_ND = (x.detach().requires_grad_() for x in (q_AD, p_ND))
    forget(loss_fn)
    loss, _ = loss_fn(q_AD, p_ND, targets, **options)
    loss.backward()
    return Values(loss.detach(), {"q": q_AD.grad, "p": p_ND.grad} | gradients_of(loss_fn))


def forget(*modules: nn.Module) -> None:
    for module in modules:
        module.zero_grad(set_to_none=True)


def gradients_of(*modules: nn.Module) -> dict[str, Tensor]:
    named = [pair for module in modules for pair in module.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def difference(found: Values, expected: Values) -> float:
    """Largest relative difference of the loss and of each gradient, entry by entry.

    An entry's difference is measured against its tensor's largest entry, and never against less
    than 1e-6 of the largest of all: what is 0 but for rounding has no relative error.
    """
    nothing = torch.zeros((), dtype=torch.float64)
    top = max([nothing, *(g.abs().max() for g in expected.gradients.values())])
    errors = [(found.loss - expected.loss).abs() / expected.loss.abs().clamp_min(1e-30)]
    for name in found.gradients.keys() | expected.gradients.keys():
        f, e = (v.gradients.get(name, nothing).double() for v in (found, expected))
        size = torch.maximum(e.abs().max(), 1e-6 * top).clamp_min(1e-30)
        errors.append((f - e).abs().max() / size)
    return torch.stack([e.double() for e in errors]).max().item()  # nan stays nan


def larger(a: float, b: float) -> float:
    """max that keeps nan."""
    return b if math.isnan(b) or b > a else a


# ---- the training step ---------------------------------------------------------------------------


def compare_cached(s: Subject) -> Iterator[Row]:
    worst, kept = 0.0, list(s.budgets_mib)
    for batch, step in ((s.sample, 0), (s.sample, 3), (s.small, 1)):
        expected = direct(s, batch, s.noisy, chunk_tokens=CHUNK_TOKENS, step=step)
        for budget in (kept[0], kept[len(kept) // 2], kept[-1]):
            found, _ = cached(s, batch, s.noisy, step=step, budget_mib=budget)
            worst = larger(worst, difference(found, expected))
    what = f"one backward through everything; dropout {s.dropout:g}, same chunks"
    yield Row("cached = direct", what, worst, EXACT)


def compare_chunks(s: Subject) -> Iterator[Row]:
    for name, batch in (("any chunking", s.sample), ("any chunking, small batch", s.small)):
        expected, worst = direct(s, batch, s.towers), 0.0
        for chunk_tokens in (1, 13, 45, 130, 10**6):
            found, _ = cached(s, batch, s.towers, chunk_tokens=chunk_tokens)
            worst = larger(worst, difference(found, expected))
        A, N = len(batch.batch.query_tokens), len(batch.batch.passage_tokens)
        what = f"{A} queries, {N} passages; 1, 13, 45, 130 tokens a chunk, all"
        yield Row(name, what, worst, EXACT)


def compare_budgets(s: Subject) -> Iterator[Row]:
    expected, worst = direct(s, s.sample, s.towers), 0.0
    for budget in s.budgets_mib:
        found, _ = cached(s, s.sample, s.towers, budget_mib=budget)
        worst = larger(worst, difference(found, expected))
    shares = ", ".join(f"{share:.2f}" for share in sorted({*s.budgets_mib.values()}))
    yield Row("any activation budget", f"share replayed: {shares}", worst, EXACT)


def compare_autocast(s: Subject) -> Iterator[Row]:
    """Autocast keeps its copies of the weights: one made without a graph cuts its weight off."""
    towers = copy.deepcopy(s.noisy).float()
    loss_fn = build_loss(s.loss, s.c.seed)
    found = [
        cached(
            s, s.sample, towers, budget_mib=budget, loss_fn=loss_fn,
            autocast=autocast_for("bf16", CPU),
        )[0]
        for budget in s.budgets_mib
    ]  # fmt: skip
    worst = 0.0
    for one in found[1:]:
        worst = larger(worst, difference(one, found[0]))
    yield Row("any budget under autocast", "bfloat16, what is replayed against what is kept",
              worst, AUTOCAST)  # fmt: skip


def compare_reported(s: Subject) -> Iterator[Row]:
    """Central differences, with Richardson's extrapolation, of what train_step reports."""
    c, note = s.loss, ""
    if c.hardness:  # its weights are constants to the gradient, but not to a difference
        c, note = dataclasses.replace(c, hardness=0.0), " (hardness 0)"
    loss_fn = exact_loss(c, s.c.seed)
    gradient = cached(s, s.sample, s.towers, loss_fn=loss_fn)[0].gradients
    named = dict([*s.towers.named_parameters(), *loss_fn.named_parameters()])
    rng = torch.Generator().manual_seed(7)
    noise = {n: torch.randn(g.shape, generator=rng).double() for n, g in gradient.items()}
    # half at random, half along the gradient: a slope far above rounding
    length = [torch.cat([x.flatten() for x in some.values()]).norm() for some in (noise, gradient)]
    direction = {n: noise[n] / length[0] + g / length[1] for n, g in gradient.items()}

    @torch.no_grad()
    def move(step: float) -> None:
        for n, d in direction.items():
            named[n].add_(step * d)

    def slope(h: float) -> float:
        losses = []
        for step in (h, -h):
            move(step)
            losses.append(cached(s, s.sample, s.towers, loss_fn=loss_fn)[0].loss.item())
            move(-step)
        return (losses[0] - losses[1]) / (2 * h)

    h = 2e-5
    expected = (4 * slope(h) - slope(2 * h)) / 3
    along = sum((gradient[n] * d).sum() for n, d in direction.items()).item()
    what = f"finite difference of the reported loss along one direction{note}"
    error = abs(along - expected) / abs(expected)
    yield Row("gradient of the reported loss", what, error, 1e-7)


def compare_temperature(s: Subject) -> Iterator[Row]:
    if not s.is_specified:
        return
    worst, used = 0.0, []
    for factor in (0.5, 1.0, 3.0):
        temperature = s.loss.temperature * factor
        if s.loss.learn_temperature:
            temperature = min(max(temperature, s.loss.temperature_min), s.loss.temperature_max)
        c = dataclasses.replace(s.loss, temperature=temperature)
        used.append(f"{temperature:g}")
        # as the training loop builds it; there the temperature is float32
        found, _ = cached(s, s.sample, s.towers, loss_fn=build_loss(c, s.c.seed))
        expected = direct(s, s.sample, s.towers, loss_fn=Dense(c, s.c.seed))
        worst = larger(worst, ((found.loss - expected.loss).abs() / expected.loss).item())
    what = f"reported loss at {', '.join(used)} against the specification"
    yield Row("the configured temperature", what, worst, 1e-5)


def compare_mean(s: Subject) -> Iterator[Row]:
    if not s.is_specified:
        return
    b, pairs = s.sample.batch, ("pair_query_P", "pair_passage_P", "pair_weight_P")
    count = {name: 2 * getattr(b, name) for name in ("num_examples", "num_examples_global")}
    listed = {name: np.tile(getattr(b, name), 2) for name in pairs}
    twice = dataclasses.replace(s.sample, batch=dataclasses.replace(b, **count, **listed))
    found, _ = cached(s, twice, s.towers)
    if s.loss.kind == "sigmoid":  # a cell's negative term does not double with the examples
        expected, what = direct(s, twice, s.towers), "against the specification"
    else:
        expected, what = direct(s, s.sample, s.towers), "nothing changes"
    what = f"every example twice: {what}"
    yield Row("mean over queries", what, difference(found, expected), EXACT)


# ---- the loss on embeddings ----------------------------------------------------------------------


def compare_formula(s: Subject) -> Iterator[Row]:
    if not s.is_specified:
        return
    big, worst = sample(13, 17, seed=3), 0.0
    q_AD, p_ND = s.embeddings(big)
    for step in (0, 1, 2):
        targets = targets_on(big.batch, CPU, step=step, guide=big.guide)
        expected = on_embeddings(Dense(s.loss, s.c.seed), q_AD, p_ND, targets)
        for rows, num_kept in ((1, 0), (3, 0), (3, 100), (1000, 0), (1000, 10**6)):
            with chunks_of(rows, num_kept):
                found = on_embeddings(exact_loss(s.loss, s.c.seed), q_AD, p_ND, targets)
            worst = larger(worst, difference(found, expected))
    what = "1, 3, all queries at once; nothing, some, all kept for the backward"
    yield Row("chunked = specification", what, worst, EXACT)


@contextmanager
def chunks_of(rows: int, num_kept: int) -> Iterator[None]:
    """Let losses cut their matrices after so many queries, keeping so many cells for the backward:
    by themselves they would not cut anything as small as this."""
    function, room = similarity.similarity_sums, similarity._KEPT_ELEMENTS["cpu"]
    users = [m for m in (infonce, sigmoid) if m.similarity_sums is function]
    try:
        for module in users:
            module.similarity_sums = functools.partial(function, chunk=rows)
        similarity._KEPT_ELEMENTS["cpu"] = num_kept
        yield
    finally:
        for module in users:
            module.similarity_sums = function
        similarity._KEPT_ELEMENTS["cpu"] = room


def compare_dims(s: Subject) -> Iterator[Row]:
    """Each dim by itself is a loss without Matryoshka on prefixes that are normalised again."""
    big, D = sample(13, 17, seed=3), s.towers.width
    q_AD, p_ND = s.embeddings(big)
    targets = targets_on(big.batch, CPU, guide=big.guide)
    c = s.loss if s.loss.dims else dataclasses.replace(s.loss, dims=[D, D // 2, 3])
    dims, weight_M = dims_of_step(c, D, s.c.seed, 0)
    alone = exact_loss(dataclasses.replace(c, dims=[], dim_weights=[], dims_per_step=0))
    q, p = (x.clone().requires_grad_() for x in (q_AD, p_ND))
    expected = 0.0
    for d, weight in zip(dims, weight_M, strict=True):
        prefixes = [x if d == D else F.normalize(x[:, :d], dim=1) for x in (q, p)]
        expected = expected + weight * alone(*prefixes, targets)[0]
    expected.backward()
    one_by_one = Values(expected.detach(), {"q": q.grad, "p": p.grad} | gradients_of(alone))
    found = on_embeddings(exact_loss(c, s.c.seed), q_AD, p_ND, targets)
    what = f"dims {', '.join(map(str, dims))} against one loss a dim"
    yield Row("one Matryoshka sweep", what, difference(found, one_by_one), EXACT)


def compare_relatives(s: Subject) -> Iterator[Row]:
    if not s.is_specified:
        return
    worst = 0.0
    for batch in (sample(13, 17, seed=3), s.sample, s.small):
        q_AD, p_ND = s.embeddings(batch)
        targets = targets_on(batch.batch, CPU, guide=batch.guide)
        dense = Dense(s.loss, s.c.seed)
        expected = on_embeddings(dense, q_AD, p_ND, targets, keep_AN=batch.keep_AN)
        for loss_fn in (dense, exact_loss(s.loss, s.c.seed)):
            found = on_embeddings(loss_fn, q_AD, p_ND, targets)
            worst = larger(worst, difference(found, expected))
    what = "columns of integers against a whole boolean matrix"
    yield Row("relatives by ids = by mask", what, worst, EXACT)


def compare_margins(s: Subject) -> Iterator[Row]:
    if s.loss.kind != "infonce" or s.loss.teacher_weight == 1:
        return
    worst = 0.0
    for margin, ratio in ((0.0, None), (-0.1, None), (None, 0.9), (-0.05, 0.95)):
        c = dataclasses.replace(s.loss, false_negative_margin=margin, false_negative_ratio=ratio)
        for batch in (sample(13, 17, seed=3), s.small):
            q_AD, p_ND = s.embeddings(batch)
            targets = targets_on(batch.batch, CPU, guide=batch.guide)
            found = on_embeddings(exact_loss(c, s.c.seed), q_AD, p_ND, targets)
            expected = on_embeddings(Dense(c, s.c.seed), q_AD, p_ND, targets)
            worst = larger(worst, difference(found, expected))
    what = "margins 0, -.1, -.05 and ratios .9, .95 against the specification"
    yield Row("a margin <= 0 keeps the positive", what, worst, EXACT)


def compare_precision(s: Subject) -> Iterator[Row]:
    if s.loss.learns_scores:  # a loss of differences, that has no small values to lose
        return
    targets = one_answer_each()
    # small debiased losses are a difference of sums that are nearly equal
    sizes = [x for x in LOSSES if x >= 1e-2 or not s.loss.debias]
    worst_bf16, all_losses = 0.0, []
    for temperature in (1.0, 0.1, 0.03, 0.01):
        c = plain(s.loss, temperature)
        worst, losses = 0.0, []
        for q_AD, p_ND, loss in leaning_at(sizes, dense_loss(c), targets):
            losses.append(loss)
            worst = larger(worst, rounding(c, q_AD.float(), p_ND.float(), targets))
            error = rounding(c, q_AD.bfloat16(), p_ND.bfloat16(), targets)
            worst_bf16 = larger(worst_bf16, error)
        all_losses += losses
        name, bound = f"float32, temperature {temperature:g}", float32_bound(c)
        yield Row(name, f"{_span(losses)}; float64 on the same inputs", worst, bound)
    what = f"{_span(all_losses)}, temperatures .01 to 1"
    yield Row("bfloat16 inputs", what, worst_bf16, BFLOAT16)


@torch.no_grad()
def leaning_at(
    losses: Sequence[float], loss_fn: nn.Module, targets: Targets
) -> list[tuple[Tensor, Tensor, float]]:
    """(q_AD, p_ND, loss) near each of `losses` that some angle of leaning() has, and at the least
    and greatest that there are: at a temperature of 1 no loss is far from log N, at .01 an angle of
    a hundredth is a nat."""

    def loss_at(angle: float) -> float:
        return loss_fn(*leaning(angle), targets)[0].item()

    # where a limit leaves the other passage out the loss falls again
    top = max(torch.linspace(0, 2.2, 23).tolist(), key=loss_at)
    least, most, angles = loss_at(0.0), loss_at(top), {0.0, top}
    for wanted in losses:
        low, high = 0.0, top
        for _ in range(16 if least <= wanted <= most else 0):
            middle = (low + high) / 2
            low, high = (middle, high) if loss_at(middle) < wanted else (low, middle)
        angles.add(high)
    found = [(*leaning(angle), loss_at(angle)) for angle in sorted(angles)]
    return [one for one in found if min(losses) / 2 < one[2] < max(losses) + 1]


def compare_extremes(s: Subject) -> Iterator[Row]:
    if s.loss.learns_scores:
        return
    q_AD, p_ND = leaning(0.0)
    away_D = F.normalize(p_ND.sum(0), dim=0)
    p_ND = F.normalize(p_ND - (p_ND @ away_D)[:, None] * away_D, dim=1)
    p_ND = F.normalize(p_ND - 0.1 * away_D, dim=1)
    q_AD = F.normalize(away_D + 0.01 * q_AD, dim=1)
    c = plain(s.loss, 0.01)
    error = rounding(c, q_AD.float(), p_ND.float(), one_answer_each())
    what = "float32, every cosine near -0.1"
    yield Row("finite at temperature .01", what, error, float32_bound(c))


def float32_bound(c: LossConfig) -> float:
    """Most relative error in float32: eight roundings of z, which reaches 1 / temperature, for e^z
    turns an absolute error of z into a relative one. The debiased sum is a difference besides."""
    return (10 if c.debias else 1) * 8 * 2**-24 / c.temperature


def plain(c: LossConfig, temperature: float) -> LossConfig:
    """At a fixed temperature and the full dim, where losses from 21 down to 1e-8 can be had."""
    return dataclasses.replace(
        c, temperature=temperature, learn_temperature=False, dims=[], dim_weights=[],
        dims_per_step=0,
    )  # fmt: skip


def one_answer_each(A: int = 12, N: int = 24) -> Targets:
    at_A, guide = torch.arange(A), sample(A, N - A - 1, seed=4).guide
    return Targets(
        pair_query_P=at_A,
        pair_passage_P=at_A,
        pair_weight_P=torch.ones(A),
        relatives_BK=at_A[:, None],
        num_examples=A,
        query_relatives_BK=at_A[:, None],
        guide_query_AE=torch.from_numpy(guide.query_AE),
        guide_passage_NE=torch.from_numpy(guide.passage_NE),
    )


def leaning(angle: float, A: int = 12, N: int = 24) -> tuple[Tensor, Tensor]:
    """Unit q_AD and orthogonal p_ND: each query leans from its answer to another passage, by about
    `angle`."""
    rng = torch.Generator().manual_seed(5)
    p_ND = torch.linalg.qr(torch.randn(2 * N, N, dtype=torch.float64, generator=rng))[0].T
    angle_A1 = angle * (1 + 0.02 * torch.rand(A, 1, dtype=torch.float64, generator=rng))
    return angle_A1.cos() * p_ND[:A] + angle_A1.sin() * p_ND[A - 3 : 2 * A - 3], p_ND


def rounding(
    c: LossConfig, q_AD: Tensor, p_ND: Tensor, targets: Targets, device: torch.device = CPU
) -> float:
    """Largest relative error of the loss and, in norm, of its gradients; float64 computes from the
    same rounded embeddings, on a CPU."""
    fields = {k: v.to(device) for k, v in vars(targets).items() if isinstance(v, Tensor)}
    there = dataclasses.replace(targets, **fields)
    found = on_embeddings(build_loss(c).to(device), q_AD.to(device), p_ND.to(device), there)
    found = Values(found.loss.cpu(), {k: g.cpu() for k, g in found.gradients.items()})
    expected = on_embeddings(dense_loss(c), q_AD.double(), p_ND.double(), targets)
    errors = [(found.loss.double() - expected.loss).abs() / expected.loss.abs()]
    for name, e in expected.gradients.items():
        errors.append((found.gradients[name].double() - e).norm() / e.norm())
    return torch.stack(errors).max().item()


def _span(losses: Sequence[float]) -> str:
    return f"losses {min(losses):.0e} to {max(losses):.2g}" if losses else "no loss in range"


COMPARISONS: tuple[Callable[[Subject], Iterable[Row]], ...] = (
    compare_cached,
    compare_chunks,
    compare_budgets,
    compare_autocast,
    compare_reported,
    compare_temperature,
    compare_mean,
    compare_formula,
    compare_dims,
    compare_relatives,
    compare_margins,
    compare_precision,
    compare_extremes,
)


# ---- several processes ---------------------------------------------------------------------------


def start_ranks(
    make: Callable[[TrainConfig], Any], c: TrainConfig, folder: Path, sizes: Sequence[int]
) -> list[Any]:
    """Start as many processes as the largest of `sizes`; each writes its results to `folder`.

    make  the class Subject, of this module or of comparisons_rerank
    c     the shrunken experiment
    """
    spawn = multiprocessing.get_context("spawn")
    processes = [
        spawn.Process(target=_work_as, args=(rank, make, c, folder, tuple(sizes)), daemon=True)
        for rank in range(max(sizes, default=0))
    ]
    for process in processes:
        process.start()
    return processes


def _work_as(
    rank: int,
    make: Callable[[TrainConfig], Any],
    c: TrainConfig,
    folder: Path,
    sizes: Sequence[int],
) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.WARNING)
    subject = make(c)
    for size in (size for size in sizes if rank < size):
        dist.init_process_group(
            "gloo", init_method=f"file://{folder}/group{size}", rank=rank, world_size=size,
            timeout=timedelta(seconds=120),
        )  # fmt: skip
        for name, _, step in subject.splits(size):
            found = step(Ranks(rank, size))
            torch.save((found.loss, found.gradients), folder / f"{name}-{rank}.pt")
        dist.destroy_process_group()


def compare_ranks(
    subject: Any, processes: Sequence[Any], folder: Path, sizes: Sequence[int]
) -> Iterator[Row]:
    """Wait for the processes; every rank's loss and gradients against those of one process."""
    for process in processes:
        process.join(timeout=300)
    is_whole = all(process.exitcode == 0 for process in processes)
    for size in sizes:
        worst = 0.0 if is_whole else math.inf
        expected: dict[int, Values] = {}
        for name, batch, _ in subject.splits(size) if is_whole else ():
            if id(batch) not in expected:
                expected[id(batch)] = subject.whole(batch)
            for rank in range(size):
                found = Values(*torch.load(folder / f"{name}-{rank}.pt"))
                worst = larger(worst, difference(found, expected[id(batch)]))
        what = f"ragged; {subject.without}; against one process"
        what = what if is_whole else "a process failed (its message is above)"
        yield Row(f"{size} processes", what, worst, EXACT)
