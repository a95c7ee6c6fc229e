"""A retriever that learns a reranker's scores: loss, gradient caching, ranks, and the data path."""

import json
import math
from dataclasses import replace

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig, ModelConfig, TrainConfig
from data.batches import Batch, ScoredPairs
from data.datasets import open_data
from losses.build import build_loss
from losses.distill import ScoreDistillation
from losses.grad_cache import targets_on
from losses.tiny import share_of
from models.build import build_model
from models.transformer import pack
from runtime.distributed import Ranks
from tests.losses.test_grad_cache import assert_close, gradients, random_batch, take_step
from tests.ranks import run_on_ranks

CPU = torch.device("cpu")
DIMS = {"full": [], "matryoshka": [16, 4]}
# row, column, grade, teacher's score: two positives, a negative that another query has as well, a
# score that is missing, a query with nothing but a positive; scores that float32 holds exactly
PAIRS = [
    (0, 0, 1, 3.0), (0, 5, 1, 2.0), (0, 6, 0, -1.0), (0, 7, 0, math.nan),
    (1, 1, 1, 0.5), (1, 6, 0, 0.75), (2, 2, 2, 1.0), (2, 8, 0, -4.0), (2, 3, 0, 0.0),
    (3, 3, 1, 1.0), (4, 4, 1, 0.25), (4, 8, 0, 0.125),
]  # fmt: skip


def scored_batch() -> Batch:
    query, passage, grade, score = map(np.array, zip(*PAIRS, strict=True))
    own = ScoredPairs(query, passage, grade.astype(np.float32), score.astype(np.float32))
    return replace(random_batch(), scored=own)


def loss_of(kind: str, dims: str) -> ScoreDistillation:
    c = LossConfig(kind=kind, temperature=0.05, teacher_temperature=2.0, dims=DIMS[dims])
    return build_loss(c).double()


def by_hand(kind: str, q_BD, p_ND, dims: list[int]) -> torch.Tensor:
    """The equations, a query and a pair of passages at a time."""
    total = torch.zeros((), dtype=torch.float64)
    for d in dims:
        q_Bd, p_Nd = F.normalize(q_BD[:, :d], dim=-1), F.normalize(p_ND[:, :d], dim=-1)
        for b in range(len(q_BD)):
            own = [(p, g, t, q_Bd[b] @ p_Nd[p] / 0.05) for q, p, g, t in PAIRS if q == b]
            own = [x for x in own if not math.isnan(x[2])]
            if kind == "kl" and len(own) > 1:
                teacher = torch.tensor([t for _, _, t, _ in own], dtype=torch.float64) / 2.0
                student = torch.stack([z for *_, z in own])
                log_p, log_q = teacher.log_softmax(0), student.log_softmax(0)
                total = total + (log_p.exp() * (log_p - log_q)).sum()
            if kind == "margin_mse":
                errors = [
                    ((z - y) - (t - u)) ** 2 for _, g, t, z in own for _, h, u, y in own if g > h
                ]
                if errors:
                    total = total + sum(errors) / len(errors)
    return total / len(dims) / 5


@pytest.mark.parametrize("kind", ["margin_mse", "kl"])
@pytest.mark.parametrize("dims", DIMS)
def test_loss_and_gradient_are_the_equations_however_the_batch_is_cut(kind, dims, tiny_base):
    """Against loops in float64: a passage in another's column, a prefix that is not normalised
    again or a missing score that counts shows."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[]).double()
    batch = scored_batch()
    q_BD = towers.encode_query(pack(batch.query_tokens))
    p_ND = towers.encode_passage(pack(batch.passage_tokens))
    expected_loss = by_hand(kind, q_BD, p_ND, DIMS[dims] or [q_BD.shape[1]])
    expected_loss.backward()
    expected = gradients(towers, torch.nn.Module())
    for budget_mib in (0, math.inf):
        loss, numbers, found = take_step(
            towers, loss_of(kind, dims), batch, activation_budget_mib=budget_mib
        )
        assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
        assert_close(found, expected)
        assert {"diagonal", "mean_similarity"} <= numbers.keys()


def on_ranks(ranks: Ranks, base: str) -> tuple:
    batch = replace(scored_batch(), query_relatives_BK=np.arange(5)[:, None])
    part = share_of(batch, ranks.rank, [0, 2, 5], [0, 6, 9])
    towers = build_model(ModelConfig(base=base, dropout=0.0), dims=[]).double()
    loss, _, found = take_step(towers, loss_of("margin_mse", "full"), part, ranks=ranks)
    return loss.item(), found


def test_two_processes_find_the_gradient_of_one(tiny_base):
    """A query's own passages may lie on another rank; the mean is over all ranks' queries."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[]).double()
    loss, _, expected = take_step(towers, loss_of("margin_mse", "full"), scored_batch())
    for found_loss, found in run_on_ranks(on_ranks, 2, str(tiny_base)):
        assert found_loss == pytest.approx(loss.item(), rel=1e-12)
        assert_close(found, expected)


def test_batches_hold_the_scores_of_the_rows(tmp_path, tiny_base):
    """Scores through reader, cache, draw of negatives and text numbering: each is found again by
    the tokens of its query and passage."""
    rows = [
        {
            "query": f"query {'x' * q}",
            "positive": [f"good {'y' * q}"], "positive_scores": [q + 0.5],
            "negative": [f"bad {q} {'z' * n}" for n in range(3)],
            "negative_scores": [q - n for n in range(3)],
        }
        for q in range(9)
    ]  # fmt: skip
    path = tmp_path / "rows.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    c = TrainConfig(loss=LossConfig(kind="margin_mse"))
    c.model.base = str(tiny_base)
    c.data.root, c.data.cache_dir = str(path), str(tmp_path / "cache")
    c.data.dev_fraction = c.data.test_fraction = 0.0
    c.data.max_negatives, c.optim.batch_size = 2, 4
    towers = build_model(c.model, dims=[])
    tokenizers = towers.tokenizer_query, towers.tokenizer_passage
    data = open_data(c.data, towers.spec, *tokenizers, with_scores=True)

    def tokens(side: str, text: str) -> tuple[int, ...]:
        return tuple(towers.tokenizer(side).encode(text).ids)

    wanted = {}
    for row in rows:
        texts = [*row["positive"], *row["negative"]]
        for text, score in zip(texts, row["positive_scores"] + row["negative_scores"], strict=True):
            wanted[tokens("query", row["query"]), tokens("passage", text)] = score
    seen = 0
    for world in (1, 2):
        for rank in range(world):
            batches = data.train.batches(c, 3, rank=rank, world=world)
            for step in range(3):
                batch, whole = batches.batch_at(step), data.train.batches(c, 3).batch_at(step)
                own = batch.scored
                for b, n, label, score in zip(
                    own.query_P, own.passage_P, own.label_P, own.score_P, strict=True
                ):
                    query, passage = batch.query_tokens[b], whole.passage_tokens[n]
                    pair = tuple(query.tolist()), tuple(passage.tolist())
                    assert wanted[pair] == score and (label > 0) == (score % 1 == 0.5)
                    seen += 1
    assert seen == 2 * 9 * 3  # twice every query with its positive and two negatives
    assert targets_on(whole, CPU).scored.num_groups_global == len(whole.query_tokens)


def test_data_without_scores_is_an_error_that_says_how_to_get_them(tmp_path, tiny_base):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"query": "a b", "positive": "c", "negative": "d"}\n')
    c = TrainConfig(loss=LossConfig(kind="kl"))
    c.data.root, c.data.cache_dir = str(path), str(tmp_path / "cache")
    c.data.dev_fraction = c.data.test_fraction = 0.0
    towers = build_model(ModelConfig(base=str(tiny_base)), dims=[])
    with pytest.raises(ValueError, match=r"mine\.reranker=<reranker> .* writes them"):
        open_data(
            c.data, towers.spec, towers.tokenizer_query, towers.tokenizer_passage, with_scores=True
        )
