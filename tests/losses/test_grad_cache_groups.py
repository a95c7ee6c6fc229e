"""A reranker's training step: its gradient is that of all pairs at once, however they are cut.

On one process or several.
"""

import math
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist

from conf.schema import LossConfig, ModelConfig
from data.groups import GroupBatch
from data.pairs import pack_pairs
from losses.comparisons_rerank import share_of
from losses.grad_cache import group_targets_on, train_step
from losses.rerank import RerankLoss
from models.build import build_reranker
from runtime.device import autocast_for
from runtime.distributed import SINGLE, Ranks
from tests.losses.test_grad_cache import assert_close, gradients
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
SOME = 0.2  # MiB: part of what the graphs of the batch take in float64
KINDS = ["bce", "softmax", "listmle", "lambdarank", "margin_mse", "kl"]
# where the groups (of 5) of each rank begin and end; a rank may have none
SPLITS = {2: [[0, 2, 5], [0, 0, 5], [0, 5, 5]], 3: [[0, 1, 4, 5], [0, 3, 3, 5]]}


def random_groups(seed: int = 0) -> GroupBatch:
    """Five groups of 1 to 6 pairs, two positives in one, ragged lengths, two token types."""
    rng = np.random.default_rng(seed)
    counts = [4, 1, 6, 3, 2]
    label = np.concatenate([[2.0, 1.0, 0, 0], [1.0], [0, 0, 1.0, 0, 0, 0], [1.0, 0, 0], [0, 1.0]])
    tokens = [rng.integers(5, 90, rng.integers(3, 30)).astype(np.int32) for _ in label]
    return GroupBatch(
        pair_tokens=tokens,
        pair_types=[(np.arange(len(t)) >= len(t) // 2).astype(np.int32) for t in tokens],
        group_P=np.repeat(np.arange(5), counts),
        label_P=label.astype(np.float32),
        score_P=rng.normal(size=len(label)).astype(np.float32),
        num_examples=5,
        num_examples_global=5,
        num_pairs_global=len(label),
        example_ids=[f"e{i}" for i in range(5)],
    )


def model_of(base: str, **settings) -> torch.nn.Module:
    torch.manual_seed(0)  # the head is drawn
    return build_reranker(ModelConfig(**{"base": base, "dropout": 0.0} | settings)).double()


def loss_of(kind: str) -> RerankLoss:
    own = {"positive_weight": 2.0} if kind == "bce" else {}
    return RerankLoss(LossConfig(kind=kind, temperature=0.7, **own)).double()


def take_step(model, loss_fn, batch: GroupBatch, **changes) -> tuple[float, dict, dict]:
    """(loss, numbers, gradients) of one step."""
    model.zero_grad(set_to_none=True)
    options = {"seed": 0, "step": 0, "chunk_tokens": 40, "device": CPU}
    options |= {"autocast": autocast_for("fp32", CPU)} | changes
    loss, numbers = train_step(model, loss_fn, batch, **options)
    return loss.item(), {k: float(x) for k, x in numbers.items()}, gradients(model, loss_fn)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("chunk_tokens", [1, 40, 10_000])
@pytest.mark.parametrize("budget_mib", [0, SOME, math.inf])
def test_any_chunking_and_budget_gives_the_gradient_of_all_pairs(
    kind, chunk_tokens, budget_mib, tiny_base
):
    """Against one plain forward and backward in float64: groups lie across chunks, so a pair put
    back in another's place changes loss and gradient."""
    batch, model, loss_fn = random_groups(), model_of(str(tiny_base)), loss_of(kind)
    pairs = list(zip(batch.pair_tokens, batch.pair_types, strict=True))
    expected_loss, _ = loss_fn(model(pack_pairs(pairs)), group_targets_on(batch, CPU))
    expected_loss.backward()
    expected = gradients(model, loss_fn)
    loss, _, found = take_step(
        model, loss_fn, batch, chunk_tokens=chunk_tokens, activation_budget_mib=budget_mib
    )
    assert loss == pytest.approx(expected_loss.item(), rel=1e-12)
    assert_close(found, expected)


def test_dropout_of_encoder_and_head_is_replayed_exactly(tiny_base):
    """The head's own dropout is drawn after the encoder's: both must come back in the replay."""
    model, loss_fn = model_of(str(tiny_base), dropout=0.3), loss_of("softmax")
    loss, _, expected = take_step(model, loss_fn, random_groups())
    for budget_mib in (0, SOME):
        again, numbers, found = take_step(
            model, loss_fn, random_groups(), activation_budget_mib=budget_mib
        )
        assert again == pytest.approx(loss, rel=1e-12)
        assert numbers["replayed_share"] > 0
        assert_close(found, expected)


def test_a_frozen_encoder_trains_the_head_alone(tiny_base):
    """Warming up the head: no gradient elsewhere, and the head's is the plain one."""
    settings = {"freeze": ["embeddings", "layers:2"]}
    model, loss_fn = model_of(str(tiny_base), **settings), loss_of("softmax")
    _, _, found = take_step(model, loss_fn, random_groups(), activation_budget_mib=0)
    _, _, expected = take_step(model_of(str(tiny_base)), loss_fn, random_groups())
    assert {name.split(".")[0] for name in found} <= {"head", "encoder"}
    assert not any(".layers." in name or "embeddings" in name for name in found)
    assert_close(found, {name: expected[name] for name in found})


def on_ranks(ranks: Ranks, base: str) -> list[tuple]:
    """Outcomes and collectives of every split and kind of loss."""
    found = []
    for cuts in SPLITS[ranks.size]:
        batch = share_of(random_groups(), *cuts[ranks.rank : ranks.rank + 2])
        for kind in KINDS:
            with mock.patch.object(dist, "all_reduce", wraps=dist.all_reduce) as all_reduce:
                budget = SOME if ranks.is_main else 0  # a budget is a rank's own affair
                model, loss_fn = model_of(base), loss_of(kind)
                options = {"ranks": ranks, "activation_budget_mib": budget}
                outcome = take_step(model, loss_fn, batch, **options)
            found.append((*outcome, all_reduce.call_count))
    return found


@pytest.mark.parametrize("world", [2, 3])
def test_ranks_with_any_share_of_the_groups_find_the_gradient_of_one_process(world, tiny_base):
    """A mean over this rank's groups instead of all, or a rank without pairs that waits, shows."""
    expected = [
        take_step(model_of(str(tiny_base)), loss_of(kind), random_groups(), ranks=SINGLE)
        for kind in KINDS
    ]
    for outcomes in run_on_ranks(on_ranks, world, str(tiny_base)):
        for at, (loss, numbers, found, num_all_reduces) in enumerate(outcomes):
            assert num_all_reduces == 1
            wanted_loss, wanted_numbers, wanted = expected[at % len(KINDS)]
            assert loss == pytest.approx(wanted_loss, rel=1e-12)
            assert_close(found, wanted)
            for name in ("positive_score", "negative_score", "spread"):
                assert numbers[name] == pytest.approx(wanted_numbers[name], rel=1e-6), name
