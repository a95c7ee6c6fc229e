"""The training step of several real gloo processes: its gradient is that of one process."""

import math
from dataclasses import replace
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import LossConfig, ModelConfig
from data.batches import Batch
from losses.build import build_loss
from losses.grad_cache import train_step
from models.build import build_model
from runtime.device import autocast_for
from runtime.distributed import SINGLE, Ranks
from tests.losses.test_grad_cache import SOME, assert_close, gradients, random_batch
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
# where the queries (of 5) and passages (of 9) of each rank begin and end
SPLITS = {
    2: [([0, 3, 5], [0, 2, 9]), ([0, 5, 5], [0, 0, 9]), ([0, 0, 5], [0, 0, 9])],
    3: [([0, 1, 4, 5], [0, 6, 7, 9]), ([0, 3, 3, 5], [0, 4, 4, 9])],
}
LOSSES = {
    "plain": LossConfig(temperature=0.1),
    "all": LossConfig(
        temperature=0.1, symmetric=0.25, learn_temperature=True, dims=[16, 4],
        negatives=["query_passage", "query_query", "passage_passage"], false_negative_margin=0.05,
    ),
    "gte guided": LossConfig(
        temperature=0.1, symmetric=0.5, guide="random", false_negative_margin=0.1,
        false_negative_ratio=0.9,
        negatives=["query_passage", "query_query", "passage_passage", "passage_query"],
    ),
    "ratio": LossConfig(temperature=0.1, symmetric=0.3, false_negative_ratio=0.9),
    "smoothing": LossConfig(temperature=0.1, symmetric=0.4, label_smoothing=0.1),
    "debias": LossConfig(temperature=0.2, symmetric=0.4, debias=0.05, hardness=2.0),
    "teacher": LossConfig(temperature=0.1, teacher="random", teacher_weight=0.7),
    "sigmoid": LossConfig(kind="sigmoid", temperature=0.1, learn_temperature=True, dims=[16, 4]),
}  # fmt: skip
HALF_FROZEN = {"towers": "dual", "freeze": ["passage_tower"]}
MODELS = [HALF_FROZEN, {"adapter": "automodel"}, {"checkpointing": True}]
# loss, model settings
CASES = [*(("plain", model) for model in MODELS), *((loss, {}) for loss in LOSSES)]


class RandomGuide:
    """Of all ranks' texts, as the real one."""

    def lookup(self, batch: Batch) -> tuple[np.ndarray, np.ndarray]:
        x = np.random.default_rng(3).standard_normal((14, 6)).astype(np.float32)
        x /= np.linalg.norm(x, axis=1, keepdims=True)
        return x[:5], x[5:]


def whole_batch() -> Batch:
    """Queries 1 and 2 share an answer; N > B; query 0 has two positives."""
    relatives = np.array([[0, 3, -1], [1, 2, -1], [1, 2, -1], [0, 3, -1], [4, -1, -1]])
    return replace(random_batch(), query_relatives_BK=relatives, num_queries_global=5)


def part_of(batch: Batch, queries: tuple[int, int], passages: tuple[int, int]) -> Batch:
    """A rank's part of a batch, by hand."""
    q, p = slice(*queries), slice(*passages)
    mine_P = (batch.pair_query_P >= q.start) & (batch.pair_query_P < q.stop)
    return replace(
        batch,
        query_tokens=batch.query_tokens[q],
        passage_tokens=batch.passage_tokens[p],
        pair_query_P=batch.pair_query_P[mine_P] - q.start,
        pair_passage_P=batch.pair_passage_P[mine_P],
        pair_weight_P=batch.pair_weight_P[mine_P],
        relatives_BK=batch.relatives_BK[q],
        num_examples=q.stop - q.start,
        passage_offset=p.start,
        query_prompt_tokens_B=batch.query_prompt_tokens_B[q],
        passage_prompt_tokens_N=batch.passage_prompt_tokens_N[p],
        query_offset=q.start,
        query_relatives_BK=batch.query_relatives_BK[q],
    )


def outcome(ranks: Ranks, base: str, batch: Batch, loss: str, model: dict, **options) -> tuple:
    """(loss, numbers, gradients, number of all-reduces) of one step in float64."""
    settings = {"base": base, "dropout": 0.0} | model
    checkpointing = settings.pop("checkpointing", False)
    towers = build_model(ModelConfig(**settings)).double()
    if checkpointing:
        towers.query.encoder.activation_checkpointing = True
    towers.unused = torch.nn.Parameter(torch.ones(3).double())  # as the pooler of some models
    loss_fn = build_loss(LOSSES[loss]).double()
    guide = RandomGuide() if LOSSES[loss].guide or LOSSES[loss].teacher else None
    with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
        value, numbers = train_step(
            towers, loss_fn, batch, seed=0, step=0, chunk_tokens=17, device=CPU,
            autocast=autocast_for("fp32", CPU), ranks=ranks, guide=guide, **options,
        )  # fmt: skip
    numbers = {name: float(x) for name, x in numbers.items()}
    return value.item(), numbers, gradients(towers, loss_fn), all_reduce.call_count


def on_ranks(ranks: Ranks, base: str) -> tuple[list[tuple], list[tuple]]:
    """Outcomes of every split and case; of one split with dropout, at three budgets."""
    found = []
    for queries, passages in SPLITS[ranks.size]:
        mine = [tuple(cuts[ranks.rank : ranks.rank + 2]) for cuts in (queries, passages)]
        batch = part_of(whole_batch(), *mine)
        for case in CASES:
            budget_mib = SOME / 2 if ranks.is_main else 0  # a budget is a rank's own affair
            found.append(outcome(ranks, base, batch, *case, activation_budget_mib=budget_mib))
    with_dropout = [
        outcome(ranks, base, batch, "all", {"dropout": 0.3}, activation_budget_mib=budget_mib)
        for budget_mib in (math.inf, SOME / 2, 0)
    ]
    return found, with_dropout


@pytest.mark.slow
@pytest.mark.parametrize("world", [2, 3])
def test_ranks_give_the_gradient_of_one_process(world, tiny_base):
    """Negatives and targets are global, the mean is over global examples, ranks are ragged, one
    lacks queries, one passages, one both: any of these done by rank alone shows, or hangs. There is
    one all-reduce a step."""
    expected = [
        outcome(SINGLE, str(tiny_base), whole_batch(), *case, activation_budget_mib=math.inf)
        for case in CASES
    ]
    by_rank = run_on_ranks(on_ranks, world, str(tiny_base))
    for found, _ in by_rank:
        for a, b in zip(found, expected * len(SPLITS[world]), strict=True):
            assert a[0] == pytest.approx(b[0], rel=1e-12)
            assert a[1].keys() == b[1].keys()
            for name in b[1].keys() - {"replayed_share"}:
                # a temperature is kept in float32
                assert a[1][name] == pytest.approx(b[1][name], rel=1e-5), name
            assert_close(a[2], b[2])  # the unused parameter has no gradient in either
            assert (a[3], b[3]) == (1, 0)
    for _, (kept, some, none) in by_rank:  # each rank's chunks have masks of their own
        assert kept[1]["replayed_share"] == 0 and none[1]["replayed_share"] == 1
        assert 0 < some[1]["replayed_share"] < 1
        assert_close(some[2], kept[2])
        assert_close(none[2], kept[2])
    for _, with_dropout in by_rank[1:]:
        for a, b in zip(with_dropout, by_rank[0][1], strict=True):
            assert a[0] == b[0] and a[1] == b[1]
            assert_close(a[2], b[2], rtol=0, atol=0)  # the same numbers, not only near ones


def test_a_rank_of_a_split_is_what_it_says():
    """The parts of a split put together are the whole batch: the tests above lean on it."""
    whole = whole_batch()
    for splits in SPLITS.values():
        for queries, passages in splits:
            parts = [
                part_of(whole, tuple(queries[r : r + 2]), tuple(passages[r : r + 2]))
                for r in range(len(queries) - 1)
            ]
            pairs = [(p.pair_query_P + p.query_offset, p.pair_passage_P) for p in parts]
            found = sorted((q, n) for qs, ns in pairs for q, n in zip(qs, ns, strict=True))
            assert found == sorted(zip(whole.pair_query_P, whole.pair_passage_P, strict=True))
            assert sum(p.num_tokens for p in parts) == whole.num_tokens
            assert sum(p.num_examples for p in parts) == whole.num_examples_global
