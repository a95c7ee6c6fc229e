"""The chunked losses against losses/specification.py over a grid of settings, and their memory."""

import dataclasses
import itertools
import math
import random
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from conf.schema import LossConfig
from losses import similarity
from losses.build import build_loss
from losses.comparisons import Dense, chunks_of, difference, exact_loss, on_embeddings
from losses.grad_cache import targets_on
from losses.infonce import InfoNCE, Targets, dims_of_step
from losses.similarity import Limits, Teacher, similarity_sums
from losses.specification import specification
from losses.tiny import sample

CPU = torch.device("cpu")
WIDTH = 12

# Each setting that says something by itself; what LossConfig refuses together is left out below.
GRID = {
    "symmetric": (0.0, 0.3, 1.0),
    "negatives": (
        ["query_passage"],
        ["query_passage", "query_query"],
        ["query_passage", "query_query", "passage_passage"],
        ["query_passage", "query_query", "passage_passage", "passage_query"],
    ),
    "false_negative_margin": (None, 0.1, 0.0, -0.2),
    "false_negative_ratio": (None, 0.95, 1.3),
    "guide": (None, "a model"),
    "label_smoothing": (0.0, 0.1),
    "hardness": (0.0, 3.0),
    "debias": (0.0, 0.1),
    "teacher_weight": (0.0, 0.4, 1.0),
    "dims": ([], [12], [7, 2], [12, 5, 3]),
    "dims_per_step": (0, 1, 2),
    "temperature": (0.05, 0.3),
    "learn_temperature": (False, True),
}


def settings() -> list[LossConfig]:
    """Every value of every setting beside the defaults, then 150 seeded draws from the product."""
    default = {key: values[0] for key, values in GRID.items()}
    single = [default | {key: value} for key, values in GRID.items() for value in values]
    rng = random.Random(0)
    drawn = ({key: rng.choice(values) for key, values in GRID.items()} for _ in itertools.count())
    found = []
    for keys in itertools.chain(single, drawn):
        keys = keys | {"teacher": "a model" if keys["teacher_weight"] else None}
        try:
            found.append(LossConfig(**keys))
        except ValueError:
            continue
        if len(found) == len(single) + 150:
            return found


def embeddings(s, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    rng = torch.Generator().manual_seed(seed)
    sizes = len(s.batch.query_tokens), len(s.batch.passage_tokens)
    noise = (torch.randn(n, WIDTH, generator=rng, dtype=torch.float64) for n in sizes)
    q_AD, p_ND = (torch.nn.functional.normalize(x, dim=1) for x in noise)
    return q_AD, p_ND


def test_losses_equal_the_specification_over_a_grid_of_settings():
    """Options interact: limits with dims, columns with symmetric, smoothing with kinds of
    negatives. rtol 1e-9 in float64: the same numbers, summed in another order.
    """
    batches = [(s, *embeddings(s)) for s in (sample(7, 9, seed=1), sample(2, 0, seed=2))]
    bad, seen = [], set()
    for step, c in enumerate(settings()):
        seen.update((key, str(getattr(c, key))) for key in GRID)
        rows = (1, 3, 1000)[step % 3]
        for s, q_AD, p_ND in batches:
            targets = targets_on(s.batch, CPU, step=step, guide=s.guide)
            with chunks_of(rows, num_kept=20):
                found = on_embeddings(exact_loss(c, seed=5), q_AD, p_ND, targets)
            expected = on_embeddings(Dense(c, seed=5), q_AD, p_ND, targets)
            assert ("log_temperature" in expected.gradients) == c.learn_temperature
            worst = difference(found, expected)
            if not worst <= 1e-9:
                bad.append((worst, rows, c))
    assert not bad, f"{len(bad)} settings; the worst: {max(bad, key=lambda b: b[0])}"
    assert seen == {(key, str(value)) for key, values in GRID.items() for value in values}


@pytest.mark.parametrize("dims", [[], [12, 5, 2]])
@pytest.mark.parametrize("bias", [-10.0, 0.5])
@pytest.mark.parametrize("temperature", [0.04, 0.5])
def test_sigmoid_loss_equals_the_specification(temperature, bias, dims):
    """Every cell is a term of its own: a relative counted, or a positive counted twice, shows."""
    c = LossConfig(
        kind="sigmoid", temperature=temperature, learn_temperature=True, sigmoid_bias=bias,
        dims=dims,
    )  # fmt: skip
    s = sample(7, 9, seed=1)
    q_AD, p_ND = embeddings(s)
    targets = targets_on(s.batch, CPU)
    for rows in (1, 3, 1000):
        with chunks_of(rows, num_kept=20):
            found = on_embeddings(exact_loss(c), q_AD, p_ND, targets)
        expected = on_embeddings(Dense(c), q_AD, p_ND, targets)
        assert expected.gradients.keys() == {"q", "p", "log_temperature", "bias"}
        assert difference(found, expected) <= 1e-9


def test_sigmoid_loss_of_a_hopeless_pair():
    """Cosine -1 at a start of -10: softplus(20.1) has a slope of 1 - 2e-9, not 1."""
    c = LossConfig(kind="sigmoid", temperature=0.0985)
    at, e_22 = torch.arange(2), torch.eye(2, dtype=torch.float64)
    targets = Targets(at, at, torch.ones(2), at[:, None], num_examples=2)
    found = on_embeddings(exact_loss(c), e_22, -e_22, targets)
    assert difference(found, on_embeddings(Dense(c), e_22, -e_22, targets)) <= 1e-9


def test_specification_by_hand():
    """Two queries, three passages, every kind of negative, one of them out of limits."""
    q_AD = torch.eye(2, dtype=torch.float64)
    p_ND = torch.tensor([[0.8, 0.6], [0.0, 1.0], [0.6, -0.8]], dtype=torch.float64)
    at = torch.arange(2)
    targets = Targets(
        at, at, torch.ones(2), at[:, None], num_examples=2, query_relatives_BK=at[:, None]
    )
    kinds = ["query_passage", "query_query", "passage_passage", "passage_query"]
    c = LossConfig(negatives=kinds, temperature=0.5, false_negative_margin=-0.3)
    # query 0: positive .8, limit .5. Passages 0, .6 (out); query 0; positive 0 to passages .6 (out)
    # and 0; query 1 to positive 0: .6, in or out by that column's limit: .8 - .3
    first = math.exp(0.0) + math.exp(0.0) + math.exp(0.0)
    # query 1: positive 1, limit .7. Passages .6, -.8; query 0; positive 1 to passages .6, -.8;
    # query 0 to positive 1: 0, limit .7
    second = sum(math.exp(x / 0.5) for x in (0.6, -0.8, 0.0, 0.6, -0.8, 0.0))
    expected = (math.log1p(first / math.exp(1.6)) + math.log1p(second / math.exp(2.0))) / 2
    found = specification(c, q_AD, p_ND, targets, temperature=0.5)
    assert found.item() == pytest.approx(expected, rel=1e-12)


def test_a_sample_of_dims_is_unbiased():
    """Over many steps the sampled losses must average to the loss over all dims."""
    c = LossConfig(dims=[12, 5, 2], dim_weights=[1.0, 2.0, 0.5], dims_per_step=1)
    s = sample(7, 9, seed=1)
    q_AD, p_ND = embeddings(s)
    targets = targets_on(s.batch, CPU)
    drawn = {tuple(dims_of_step(c, WIDTH, 0, step)[0]) for step in range(50)}
    assert drawn == {(12,), (5,), (2,)}
    of_dims = [specification(c, q_AD, p_ND, targets, temperature=0.05, dims=dims) for dims in drawn]
    whole = specification(c, q_AD, p_ND, targets, temperature=0.05)
    assert torch.stack(of_dims).mean().item() == pytest.approx(whole.item(), rel=1e-12)


def test_the_smallest_chunks_change_nothing_but_rounding():
    """Chunks of 1, 2, 3, 5 and 8 queries against all at once: sums over chunks, in float64."""
    c = LossConfig(
        symmetric=0.5, negatives=GRID["negatives"][-1], dims=[12, 5, 2], label_smoothing=0.1,
        false_negative_margin=0.05, learn_temperature=True,
    )  # fmt: skip
    s = sample(9, 4, seed=1)
    q_AD, p_ND = embeddings(s)
    targets = targets_on(s.batch, CPU)
    with chunks_of(1000, num_kept=10**6):
        whole = on_embeddings(exact_loss(c), q_AD, p_ND, targets)
    for rows, num_kept in itertools.product((1, 2, 3, 5, 8), (0, 30, 10**6)):
        with chunks_of(rows, num_kept):
            found = on_embeddings(exact_loss(c), q_AD, p_ND, targets)
        assert difference(found, whole) <= 1e-12


def test_gradcheck_of_every_sum():
    """Against finite differences, with arbitrary upstream gradients of all outputs at once."""
    s = sample(4, 3, seed=1)
    q_AD, p_ND = (x.requires_grad_() for x in embeddings(s))
    scale = torch.tensor(7.0, dtype=torch.float64, requires_grad=True)
    bias = torch.tensor(-0.5, dtype=torch.float64, requires_grad=True)
    relatives_BK = torch.from_numpy(s.batch.relatives_BK)
    teacher = Teacher(*map(torch.from_numpy, (s.guide.query_AE, s.guide.passage_NE)), 0.2)
    limits = Limits(torch.full((2, 4), 0.35).double(), torch.full((2, 8), 0.35).double())

    def sums(q_AD, p_ND, scale, bias):
        found = similarity_sums(
            q_AD, p_ND, scale, dims=[5, 12], relatives_BK=relatives_BK, limits=limits,
            want=tuple(similarity.KINDS), bias=bias, teacher=teacher, chunk=3,
        )  # fmt: skip
        # -inf, the log of nothing, has no difference quotient
        return [torch.where(x.isinf(), 0, x) for x in (getattr(found, n) for n in KEPT)]

    KEPT = [*similarity.KINDS.values()]
    assert torch.autograd.gradcheck(sums, (q_AD, p_ND, scale, bias), eps=1e-6, atol=1e-7)


class Allocations(TorchDispatchMode):
    """Elements of the largest tensor that an operation made, and of all alive at the worst time."""

    def __init__(self):
        super().__init__()
        self.largest = self.alive = self.peak = 0
        self.known, self.of_float64 = set(), []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for x in out if isinstance(out, tuple | list) else (out,):
            if isinstance(x, torch.Tensor) and x.untyped_storage().data_ptr():
                self._note(x.untyped_storage(), x.element_size())
                self.of_float64 += [function] * (x.dtype == torch.float64)
        return out

    def _note(self, storage, element_size):
        key = storage.data_ptr()
        if key in self.known:
            return
        size = storage.nbytes() // element_size
        self.known.add(key)
        self.largest = max(self.largest, size)
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._forget, key, size)

    def _forget(self, key, size):
        self.known.discard(key)
        self.alive -= size


def allocations(c: LossConfig, B: int, chunk: int, monkeypatch) -> Allocations:
    """One forward and backward at B = N, 32 dims, in float32, where nothing is kept."""
    D = 32
    monkeypatch.setitem(similarity._CHUNK_ELEMENTS, "cpu", chunk * B)
    monkeypatch.setitem(similarity._KEPT_ELEMENTS, "cpu", 0)
    rng = torch.Generator().manual_seed(0)
    q, p = (torch.randn(B, D, generator=rng).requires_grad_() for _ in range(2))
    at = torch.arange(B)
    targets = Targets(
        at, at, torch.ones(B), at[:, None], B, query_relatives_BK=at[:, None],
        guide_query_AE=torch.randn(B, 8, generator=rng),
        guide_passage_NE=torch.randn(B, 8, generator=rng),
    )  # fmt: skip
    loss_fn = build_loss(c)
    with Allocations() as seen:
        loss, _ = loss_fn(q, p, targets)
        loss.backward()
    assert q.grad.isfinite().all() and p.grad.isfinite().all()
    return seen


MEMORY = {
    "plain": LossConfig(),
    "matryoshka": LossConfig(dims=[32, 16, 4], symmetric=0.5),
    "gte": LossConfig(negatives=GRID["negatives"][-1], false_negative_margin=0.1),
    "teacher": LossConfig(
        teacher="a model", teacher_weight=0.5, guide="a model", false_negative_ratio=0.95,
        label_smoothing=0.1,
    ),
    "sigmoid": LossConfig(kind="sigmoid", dims=[32, 16]),
}  # fmt: skip


@pytest.mark.parametrize("name", MEMORY)
def test_no_matrix_of_queries_by_passages_is_made(name, monkeypatch):
    """B = N = 2048 in chunks of 128 rows: the largest tensor is a chunk's, and all that is alive at
    once are a few of those and the vectors, far from one whole matrix. (What a run may keep from
    the forward for the backward is a constant, similarity._KEPT_ELEMENTS; it is 0 here.)
    """
    B, chunk = 2048, 128
    seen = allocations(MEMORY[name], B, chunk, monkeypatch)
    assert seen.largest <= 2 * chunk * B
    # z, its masks, the gradient of each dim and the embeddings' gradients
    assert seen.peak < 0.75 * B * B, f"{seen.peak / (chunk * B):.1f} chunks alive"


@pytest.mark.parametrize("name", MEMORY)
def test_nothing_is_computed_in_float64(name, monkeypatch):
    """A float32 loss: some devices (MPS) have no float64. The weights of the dims are a constant,
    made on the host and cast on the way."""
    seen = allocations(MEMORY[name], 64, 16, monkeypatch)
    assert seen.of_float64 == [torch.ops.aten.lift_fresh.default]


def test_memory_follows_the_chunk(monkeypatch):
    """Twice the batch in the same chunks: twice the memory, where a matrix takes four times."""
    peaks = [allocations(LossConfig(), B, 128, monkeypatch).peak for B in (1024, 2048)]
    assert peaks[1] < 2.2 * peaks[0]


def test_default_chunks_are_bounded_too(monkeypatch):
    """Without a word from anyone, 4096 x 4096 is cut: 17M cells, of which a chunk has 4M."""
    monkeypatch.setitem(similarity._KEPT_ELEMENTS, "cpu", 0)
    q, p = (torch.randn(4096, 4, requires_grad=True) for _ in range(2))
    at = torch.arange(4096)
    with Allocations() as seen:
        loss, _ = InfoNCE(LossConfig())(q, p, Targets(at, at, torch.ones(4096), at[:, None], 4096))
        loss.backward()
    assert seen.largest <= 2**22


def test_settings_that_differ_give_losses_that_differ():
    """The grid would prove nothing if an option were ignored on both sides."""
    s = sample(7, 9, seed=1)
    q_AD, p_ND = embeddings(s)
    targets = targets_on(s.batch, CPU, guide=s.guide)
    changes = (
        {"symmetric": 0.3},
        {"negatives": GRID["negatives"][1]},
        {"negatives": GRID["negatives"][2]},
        {"negatives": GRID["negatives"][3]},
        {"false_negative_margin": -0.2},
        {"false_negative_ratio": 0.3},
        {"false_negative_ratio": 0.3, "guide": "a model"},
        {"label_smoothing": 0.1},
        {"hardness": 3.0},
        {"debias": 0.1},
        {"teacher": "a model", "teacher_weight": 0.4},
        {"dims": [7, 2]},
        {"dims": [7, 2], "dims_per_step": 1},
        {"dims": [7, 2], "dim_weights": [1.0, 3.0]},
        {"temperature": 0.3},
    )
    losses = {}
    for change in ({}, *changes):
        c = dataclasses.replace(LossConfig(), **change)
        losses[str(change)] = round(exact_loss(c)(q_AD, p_ND, targets)[0].item(), 9)
    assert len(set(losses.values())) == len(losses), losses
