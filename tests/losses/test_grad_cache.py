"""The training step: its gradient is that of the whole batch at once, however the batch is cut."""

import gc
import math
import weakref

import numpy as np
import pytest
import torch

from conf.schema import LossConfig, ModelConfig
from data.batches import Batch
from losses import grad_cache
from losses.grad_cache import GraphMeter, pieces, targets_on, train_step
from losses.infonce import InfoNCE
from models.build import build_model
from models.transformer import Dropout, pack
from runtime.device import autocast_for

CPU = torch.device("cpu")
SOME = 0.2  # MiB: about a third of what the graphs of random_batch() take in float64


def random_batch(num_queries: int = 5, num_passages: int = 9, seed: int = 0) -> Batch:
    """Ragged texts, hard negatives (N > B), a query with two positives."""
    rng = np.random.default_rng(seed)

    def texts(count: int, longest: int) -> list[np.ndarray]:
        return [
            rng.integers(5, 90, rng.integers(1, longest)).astype(np.int32) for _ in range(count)
        ]

    relatives = np.full((num_queries, 2), -1, np.int64)
    relatives[:, 0] = np.arange(num_queries)
    relatives[0, 1] = num_queries
    return Batch(
        query_tokens=texts(num_queries, 12),
        passage_tokens=texts(num_passages, 30),
        pair_query_P=np.array([0, *range(num_queries)]),
        pair_passage_P=np.array([num_queries, *range(num_queries)]),
        pair_weight_P=np.array([0.5, 0.5, *[1.0] * (num_queries - 1)], np.float32),
        relatives_BK=relatives,
        num_examples=num_queries,
        num_examples_global=num_queries,
        passage_offset=0,
        num_passages_global=num_passages,
        query_prompt_tokens_B=np.zeros(num_queries, np.int32),
        passage_prompt_tokens_N=np.zeros(num_passages, np.int32),
        example_ids=[f"e{i}" for i in range(num_queries)],
    )


def gradients(towers, loss_fn) -> dict[str, torch.Tensor]:
    named = [*towers.named_parameters(), *loss_fn.named_parameters()]
    return {name: p.grad.clone() for name, p in named if p.grad is not None}


def take_step(towers, loss_fn, batch: Batch, **changes) -> tuple[torch.Tensor, dict, dict]:
    """(loss, numbers, gradients) of one step; gradients of before are dropped."""
    for p in [*towers.parameters(), *loss_fn.parameters()]:
        p.grad = None
    options = {"seed": 0, "step": 0, "chunk_tokens": 17, "device": CPU}
    options |= {"autocast": autocast_for("fp32", CPU)} | changes
    loss, numbers = train_step(towers, loss_fn, batch, **options)
    return loss, numbers, gradients(towers, loss_fn)


def assert_close(found: dict, expected: dict, *, rtol: float = 1e-9, atol: float = 1e-14) -> None:
    assert found.keys() == expected.keys() and found
    for name, gradient in found.items():
        torch.testing.assert_close(gradient, expected[name], rtol=rtol, atol=atol, msg=name)


@pytest.mark.parametrize("kind", ["single", "dual"])
@pytest.mark.parametrize("chunk_tokens", [1, 17, 10_000])
@pytest.mark.parametrize("budget_mib", [0, 1e-9, SOME, math.inf])
def test_any_chunking_and_budget_gives_the_gradient_of_the_whole_batch(
    kind, chunk_tokens, budget_mib, tiny_base
):
    """Against one plain forward and backward in float64: a chunk lost, doubled or misplaced shows,
    among the kept and among the replayed."""
    c = LossConfig(temperature=0.1, dims=[16, 4], learn_temperature=True, symmetric=0.25)
    batch = random_batch()
    towers = build_model(
        ModelConfig(base=str(tiny_base), towers=kind, dropout=0.0), dims=[]
    ).double()
    loss_fn = InfoNCE(c).double()
    q_BD = towers.encode_query(pack(batch.query_tokens))
    p_ND = towers.encode_passage(pack(batch.passage_tokens))
    expected_loss, _ = loss_fn(q_BD, p_ND, targets_on(batch, CPU))
    expected_loss.backward()
    expected = gradients(towers, loss_fn)
    loss, numbers, found = take_step(
        towers, loss_fn, batch, chunk_tokens=chunk_tokens, activation_budget_mib=budget_mib
    )
    assert loss.item() == pytest.approx(expected_loss.item(), rel=1e-12)
    assert_close(found, expected)
    share = numbers["replayed_share"].item()
    assert share == {0: 1, 1e-9: 1, math.inf: 0}.get(budget_mib, share)
    if budget_mib == SOME:
        assert 0 < share < 1


@pytest.mark.parametrize("kind", ["single", "automodel"])
@pytest.mark.parametrize("budget_mib", [0, SOME, math.inf])
def test_sparse_gradients_of_tables_become_the_dense_one(kind, budget_mib, tiny_base, monkeypatch):
    """Tables above LARGE_TABLE rows, of which tiny models have none, take another way: the dense
    way is the judge. A second step adds to what is there, and no module stays switched."""
    model = {"adapter": "automodel"} if kind == "automodel" else {}
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0, **model), dims=[]).double()
    loss_fn = InfoNCE(LossConfig(temperature=0.1)).double()
    options = {"activation_budget_mib": budget_mib}
    _, _, expected = take_step(towers, loss_fn, random_batch(), **options)
    monkeypatch.setattr(grad_cache, "LARGE_TABLE", 1)
    tables = grad_cache.large_tables(towers)
    assert tables
    _, _, found = take_step(towers, loss_fn, random_batch(), **options)
    assert not any(g.is_sparse for g in found.values())
    assert_close(found, expected)
    train_step(
        towers, loss_fn, random_batch(), seed=0, step=0, chunk_tokens=17, device=CPU,
        autocast=autocast_for("fp32", CPU), **options,
    )  # fmt: skip
    assert_close(gradients(towers, loss_fn), {name: 2 * g for name, g in expected.items()})
    assert not any(table.sparse for table in tables)


def test_a_table_keeps_the_rows_of_one_chunk_at_most(tiny_base, monkeypatch):
    """A sum of sparse gradients lists the rows of all chunks, several times a table's size in a
    large batch: from the first chunk on the sum is dense."""
    monkeypatch.setattr(grad_cache, "LARGE_TABLE", 1)
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[])
    weights = [table.weight for table in grad_cache.large_tables(towers)]
    seen, encode = [], towers.encode

    def watch(*args):
        seen.append([None if w.grad is None else w.grad.layout for w in weights])
        return encode(*args)

    monkeypatch.setattr(towers, "encode", watch)
    take_step(towers, InfoNCE(LossConfig()), random_batch(), activation_budget_mib=0)
    replayed = seen[len(seen) // 2 :]
    assert replayed[0] == [None] * len(weights) and len(replayed) > 2
    assert all(layouts == [torch.strided] * len(weights) for layouts in replayed[1:])


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("kind", ["single", "dual", "automodel"])
def test_dropout_is_replayed_exactly(kind, checkpointing, tiny_base):
    """The same chunks at any budget have the same masks. A replay whose masks differ from those its
    embedding gradient belongs to is off by a third here; activation checkpointing draws the masks a
    third time."""
    model = {"adapter": "automodel"} if kind == "automodel" else {"towers": kind}
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.3, **model), dims=[]).double()
    for tower in (towers.query, towers.passage):
        tower.encoder.activation_checkpointing = checkpointing
    loss_fn = InfoNCE(LossConfig(temperature=0.1, dims=[16, 4], learn_temperature=True)).double()
    loss, _, expected = take_step(towers, loss_fn, random_batch(), activation_budget_mib=math.inf)
    for budget_mib in (0, SOME / 4 if checkpointing else SOME):
        again, numbers, found = take_step(
            towers, loss_fn, random_batch(), activation_budget_mib=budget_mib
        )
        assert again.item() == pytest.approx(loss.item(), rel=1e-12)
        assert (0 < numbers["replayed_share"] < 1) == (budget_mib > 0)
        assert_close(found, expected)
    _, _, other = take_step(towers, loss_fn, random_batch(), step=1)
    name = next(n for n in expected if "query" in n and expected[n].ndim == 2)
    assert (other[name] - expected[name]).norm() > 0.1 * expected[name].norm()


@pytest.mark.parametrize("adapter", ["auto", "automodel"])
def test_autocast_loses_no_weight_where_chunks_are_left_out(adapter, tiny_base):
    """Autocast keeps its bf16 copies of the weights for as long as it is on. A copy made without a
    graph cuts its weight off from every later chunk, so that its gradient stays 0."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.3, adapter=adapter), dims=[])
    loss_fn = InfoNCE(LossConfig(temperature=0.5))
    bf16 = {"autocast": autocast_for("bf16", CPU)}
    _, _, expected = take_step(towers, loss_fn, random_batch(), **bf16)
    for budget_mib in (0, SOME / 2):
        _, numbers, found = take_step(
            towers, loss_fn, random_batch(), activation_budget_mib=budget_mib, **bf16
        )
        assert (0 < numbers["replayed_share"] < 1) == (budget_mib > 0)
        # the same roundings; but for the float32 order of the sum over chunks
        assert_close(found, expected, rtol=1e-4, atol=1e-6)


def test_the_share_that_is_encoded_twice_follows_the_budget(tiny_base):
    """More memory must never mean more work, and a batch that fits costs one forward: counted at
    the towers."""
    towers = build_model(ModelConfig(base=str(tiny_base), towers="dual"), dims=[])
    calls = []
    for tower in (towers.query, towers.passage):
        tower.register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    num_chunks = len(list(pieces(random_batch(), 17, CPU)))
    shares = []
    for budget_mib in (0, 0.02, 0.05, 0.1, 0.2, 1e6):
        calls.clear()
        _, numbers, _ = take_step(
            towers, InfoNCE(LossConfig()), random_batch(), activation_budget_mib=budget_mib
        )
        shares.append(numbers["replayed_share"].item())
        # of phase 1, those without a graph or whose graph did not fit: one forward more each
        assert 0 <= len(calls) - num_chunks - calls.count(False) <= 1
    assert shares[0] == 1 and shares[-1] == 0 and len(calls) == num_chunks and all(calls)
    assert shares == sorted(shares, reverse=True) and len(set(shares)) >= 4


def test_what_a_graph_keeps_is_counted_once_and_freed_with_it():
    """Against the sizes by hand: the same storage twice, a view of it, a parameter. A hook that
    held on to what it counts would leak every graph."""
    weight = torch.nn.Linear(100, 100, bias=False)
    meter = GraphMeter(weight, 10**6)
    x = torch.randn(50, 100)
    saved = []
    count = meter._count
    meter._count = lambda t: saved.append(weakref.ref(t)) or count(t)
    with meter.graph_if_room(50, wanted=True):
        y = weight(x).tanh()  # x for the weight, y for tanh; the parameter is there anyway
        z = y[:25] * y[25:]  # y again, through two views
    assert meter.bytes == 2 * 50 * 100 * 4 and meter.has_room
    assert meter.bytes_per_token == 2 * 100 * 4
    assert len(saved) == 4
    gc.disable()  # nothing may have to wait for a collection
    try:
        del y, z, x
        assert not any(ref() is not None for ref in saved)
    finally:
        gc.enable()
    with meter.graph_if_room(10**6, wanted=True):  # expected to cost more than there is
        assert not torch.is_grad_enabled()
    with meter.graph_if_room(1, wanted=True):  # and none after it
        assert not torch.is_grad_enabled()


def test_a_chunk_that_costs_more_than_expected_is_not_kept():
    """The first chunk is tried without knowing: what is over the budget must not stay."""
    meter = GraphMeter(torch.nn.Identity(), 100)
    with meter.graph_if_room(1, wanted=True):
        torch.ones(1000, requires_grad=True).exp()
    assert not meter.has_room


def test_copies_of_weights_are_no_cost_of_a_token(tiny_base):
    """Autocast's copies are in the first chunk's graph and in all others': spread over its few
    tokens they would leave no room for a large chunk that does fit."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[])
    texts = random_batch().passage_tokens[:1]
    meter, autocast = GraphMeter(towers, 2**30), autocast_for("bf16", CPU)
    parts, costs, in_all = [], [], 0
    with autocast():
        for _ in range(3):
            with meter.graph_if_room(len(texts[0]), wanted=True):
                parts.append(towers.encode("passage", pack(texts)))
            costs.append(meter.bytes - in_all)
            in_all = meter.bytes
    assert costs[0] > costs[1] == costs[2]
    assert meter.bytes_of_copies == costs[0] - costs[1]


@pytest.mark.parametrize("budget_mib", [0, math.inf])
@pytest.mark.parametrize("side", ["query", "passage"])
def test_a_frozen_tower_is_encoded_once_and_gets_no_gradient(side, budget_mib, tiny_base):
    """Half-frozen dual towers: the frozen side needs neither a graph nor a replay, and the other
    side's gradient must not notice."""
    both = build_model(ModelConfig(base=str(tiny_base), towers="dual", dropout=0.0), dims=[])
    both, batch, loss_fn = both.double(), random_batch(), InfoNCE(LossConfig()).double()
    _, _, expected = take_step(both, loss_fn, batch, chunk_tokens=20)
    towers = build_model(
        ModelConfig(base=str(tiny_base), towers="dual", dropout=0.0, freeze=[f"{side}_tower"]),
        dims=[],
    ).double()
    calls = []
    towers.tower(side).register_forward_hook(lambda *_: calls.append(torch.is_grad_enabled()))
    _, numbers, found = take_step(
        towers, loss_fn, batch, chunk_tokens=20, activation_budget_mib=budget_mib
    )
    assert_close(found, {n: g for n, g in expected.items() if not n.startswith(side)})
    assert calls == [False] * sum(s == side for s, _, _ in pieces(batch, 20, CPU))
    texts = batch.passage_tokens if side == "query" else batch.query_tokens
    trained_share = sum(map(len, texts)) / batch.num_tokens
    assert numbers["replayed_share"] == pytest.approx(0 if budget_mib else trained_share)


def test_dropout_masks_depend_on_seed_and_step_alone(tiny_base):
    """The promise behind exact resume: whatever was drawn before a step must not matter."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.3), dims=[]).train()
    assert any(isinstance(m, Dropout) and m.p == 0.3 for m in towers.modules())
    loss_fn = InfoNCE(LossConfig())

    def step(number: int) -> torch.Tensor:
        towers.zero_grad(set_to_none=True)
        train_step(
            towers, loss_fn, random_batch(), seed=7, step=number, chunk_tokens=40, device=CPU,
            autocast=autocast_for("fp32", CPU),
        )  # fmt: skip
        return torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])

    first = step(3)
    torch.rand(1000)
    assert torch.equal(step(3), first)
    assert not torch.equal(step(4), first)


def test_bf16_autocast_stays_near_float32(tiny_base):
    """bf16 has 8 bits: a gradient off by far more than 2^-8 a layer means a cast in the wrong
    place."""
    towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[])
    loss_fn = InfoNCE(LossConfig(temperature=0.5))
    found = []
    for precision in ("fp32", "bf16"):
        towers.zero_grad(set_to_none=True)
        train_step(
            towers, loss_fn, random_batch(), seed=0, step=0, chunk_tokens=10_000, device=CPU,
            autocast=autocast_for(precision, CPU),
        )  # fmt: skip
        assert all(p.grad is None or p.grad.dtype == torch.float32 for p in towers.parameters())
        found.append(
            torch.cat([p.grad.flatten() for p in towers.parameters() if p.grad is not None])
        )
    error = (found[1] - found[0]).norm() / found[0].norm()
    assert 0 < error < 0.05


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_replay_on_a_card_draws_the_same_masks(tiny_base):
    """CUDA draws its masks from another generator, which seed_chunk must reach too."""
    device = torch.device("cuda", 0)
    model = ModelConfig(base=str(tiny_base), dropout=0.3)
    towers = build_model(model, dims=[]).to(device)
    loss_fn = InfoNCE(LossConfig(temperature=0.5)).to(device)
    for precision, bound in (("fp32", 1e-4), ("bf16", 1e-2)):
        options = {"device": device, "autocast": autocast_for(precision, device)}
        _, _, expected = take_step(towers, loss_fn, random_batch(), **options)
        for budget_mib in (0, SOME / 2):
            _, _, found = take_step(
                towers, loss_fn, random_batch(), activation_budget_mib=budget_mib, **options
            )
            for name, gradient in found.items():  # sums by atomics come in any order
                error = (gradient - expected[name]).norm()
                assert error <= bound * expected[name].norm() + 1e-6, name
