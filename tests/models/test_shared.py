"""The rotation by what pairs share: its algebra against numpy, and what it leaves unchanged."""

from contextlib import nullcontext

import numpy as np
import pytest
import torch

from conf.schema import ModelConfig, ProjectionConfig
from data.batches import Batch
from models.build import build_model, build_reranker
from models.shared import shared_directions, start_from_shared
from models.transformer import pack

D = 16  # width of tiny_base


def noisy_pairs(num: int, planted: int) -> tuple[torch.Tensor, torch.Tensor, np.ndarray]:
    """Queries and passages that share `planted` directions and have loud noise of their own."""
    rng = np.random.default_rng(0)
    basis_DD = np.linalg.qr(rng.standard_normal((D, D)))[0]
    common = rng.standard_normal((num, planted)) * np.linspace(2, 1, planted)
    sides = []
    for _ in range(2):
        own = 3 * rng.standard_normal((num, D - planted))
        sides.append(torch.from_numpy(np.hstack([common, own]) @ basis_DD.T + 3))
    return *sides, basis_DD[:, :planted]


def test_directions_are_orthogonal_and_in_order():
    """numpy's Rayleigh quotients of the cross-covariance, written out, are the judge."""
    query, passage, planted_D3 = noisy_pairs(20_000, 3)
    rows = shared_directions(query, passage).double().numpy()
    np.testing.assert_allclose(rows @ rows.T, np.eye(D), atol=1e-6)
    q, p = query.numpy() - query.numpy().mean(0), passage.numpy() - passage.numpy().mean(0)
    cross = sum(np.outer(a, b) for a, b in zip(q, p, strict=True))
    shared = np.array([r @ cross @ r for r in rows])
    assert (np.diff(shared) < 0).all()
    # loud as it is, what only one side has comes later: the first three span what was planted
    assert np.linalg.svd(rows[:3] @ planted_D3)[1].min() > 0.95
    assert (rows[np.arange(D), np.abs(rows).argmax(1)] > 0).all()


def batch_of(num: int, offset: int = 0) -> Batch:
    """num queries and 2 num passages, those at odd places the positives."""
    rng = np.random.default_rng(offset)

    def texts(n: int) -> list[np.ndarray]:
        return [rng.integers(5, 60, size=rng.integers(3, 9)).astype(np.int32) for _ in range(n)]

    return Batch(
        query_tokens=texts(num),
        passage_tokens=texts(2 * num),
        pair_query_P=np.arange(num),
        pair_passage_P=2 * np.arange(num) + 1 + offset,
        pair_weight_P=np.ones(num, np.float32),
        relatives_BK=np.full((num, 1), -1),
        num_examples=num,
        num_examples_global=num,
        passage_offset=offset,
        num_passages_global=2 * num + offset,
        query_prompt_tokens_B=np.zeros(num, np.int32),
        passage_prompt_tokens_N=np.zeros(2 * num, np.int32),
        example_ids=[str(i) for i in range(num)],
    )


@pytest.mark.parametrize("kind", ["single", "dual"])
def test_full_similarity_stays_and_the_first_dims_share_more(kind, tiny_base):
    """Before, the projection is the identity. Afterwards it is what shared_directions finds in the
    embeddings of one text at a time, of the pairs asked for and no others."""
    projection = ProjectionConfig(init="shared")
    towers = build_model(ModelConfig(base=str(tiny_base), towers=kind, projection=projection))
    bare = build_model(ModelConfig(base=str(tiny_base)))
    batches = [batch_of(24), batch_of(24, offset=7)]

    def embed(model, side, texts):
        with torch.no_grad():
            return torch.cat([model.eval().encode(side, pack([t])) for t in texts])

    before = embed(towers, "query", batches[0].query_tokens)
    torch.testing.assert_close(before, embed(bare, "query", batches[0].query_tokens))
    queries = torch.cat([embed(bare, "query", b.query_tokens) for b in batches])[:40]
    positives = torch.cat([embed(bare, "passage", b.passage_tokens[1::2]) for b in batches])[:40]
    options = {"chunk_tokens": 50, "device": torch.device("cpu"), "autocast": nullcontext}
    towers.train()
    assert start_from_shared(towers, iter(batches), 40, **options) == 40
    assert towers.training
    weight = towers.passage.projections[-1].linear.weight
    assert torch.equal(weight, towers.query.projections[-1].linear.weight)
    torch.testing.assert_close(
        weight.detach().abs(), shared_directions(queries, positives).abs(), atol=2e-3, rtol=0
    )
    rotated = [embed(towers, "query", b.query_tokens) for b in batches]
    rotated = (
        torch.cat(rotated)[:40],
        torch.cat([embed(towers, "passage", b.passage_tokens[1::2]) for b in batches])[:40],
    )
    torch.testing.assert_close(rotated[0] @ rotated[1].T, queries @ positives.T)
    q, p = (x - x.mean(0) for x in rotated)
    shared = (q * p).sum(0)
    assert (
        shared[:4].sum()
        > (queries - queries.mean(0)).mul(positives - positives.mean(0)).sum(0)[:4].sum()
    )
    # fewer pairs than asked for: all of them
    assert start_from_shared(towers, iter(batches), 1000, **options) == 48


def test_settings_that_do_not_fit_are_refused(tiny_base):
    """The message names the setting, what it got and what would do."""
    with pytest.raises(ValueError, match=rf"model.projection.dim \(8\) must be {D}"):
        build_model(
            ModelConfig(base=str(tiny_base), projection=ProjectionConfig(init="shared", dim=8))
        )
    with pytest.raises(ValueError, match="activation=identity, got tanh"):
        ProjectionConfig(init="shared", activation="tanh")
    with pytest.raises(ValueError, match="must be one of random, shared"):
        ProjectionConfig(init="pca")
    with pytest.raises(ValueError, match=r"projection\.init=shared has no meaning"):
        build_reranker(ModelConfig(base=str(tiny_base), projection=ProjectionConfig(init="shared")))
