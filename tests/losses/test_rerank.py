"""Losses of groups of pairs: against loops from the equations, sentence-transformers, autograd."""

import dataclasses
import logging
import math
import sys
from itertools import chain, pairwise

import pytest
import torch
from torch import nn

from conf.schema import RERANK_LOSSES, LossConfig
from losses.build import build_loss
from losses.rerank import GroupTargets, RerankLoss
from runtime.distributed import Ranks

GROUP_LOSSES = [kind for kind in RERANK_LOSSES if kind not in ("bce", "cross_entropy")]
# groups of 1, 2, 5, 3, 4 and 6; ties of grades; a group of positives alone, one of negatives alone
LABELS = [[1], [0, 1], [0, 3, 1, 0, 1], [1, 1, 2], [0, 0, 0, 0], [2, 0, 0, 1, 0, 3]]
NAN = math.nan
SCORES = [[0.2], [NAN, 0.4], [0.1, 0.9, NAN, 0.3, 0.7], [0.3, 0.1, 0.2], [NAN] * 4,
          [0.5, 0.4, NAN, NAN, -0.2, 1.5]]  # fmt: skip


def targets_of(labels=LABELS, scores=SCORES, **options) -> GroupTargets:
    group_P = [g for g, group in enumerate(labels) for _ in group]
    flat = torch.tensor([y for group in labels for y in group], dtype=torch.float32)
    score_P = None if scores is None else torch.tensor([t for group in scores for t in group])
    values = {"num_groups_global": len(labels), "num_pairs_global": len(flat)} | options
    return GroupTargets(torch.tensor(group_P, dtype=torch.int64), flat, score_P, **values)


def logits_of(labels=LABELS, width: int = 1, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    count = sum(len(group) for group in labels)
    return 2 * torch.randn(count, width, dtype=torch.float64, generator=generator)


def config(kind: str) -> LossConfig:
    own = {"bce": {"positive_weight": 2.5}, "kl": {"teacher_temperature": 0.3}}
    return LossConfig(kind=kind, temperature=0.7, **own.get(kind, {}))


def discount(rank: int) -> float:
    return 1 / math.log2(1 + rank)


def group_by_loops(kind: str, z: list, y: list, t: list) -> float:
    """One group's loss, one exponential at a time, from the equations in losses/rerank.py."""
    n = len(z)
    higher = [(i, j) for i in range(n) for j in range(n) if y[i] > y[j]]
    if kind == "softmax":
        positives, negatives = [i for i in range(n) if y[i]], [i for i in range(n) if not y[i]]
        total = 0.0
        for i in positives:
            below = sum(math.exp(z[j]) for j in negatives)
            total -= math.log(math.exp(z[i]) / (math.exp(z[i]) + below))
        return total / max(1, len(positives))
    if kind == "listmle":
        total = 0.0
        for i in range(n):
            below = sum(math.exp(z[j]) for j in range(n) if y[j] < y[i])
            total -= math.log(math.exp(z[i]) / (math.exp(z[i]) + below))
        return total
    if kind == "ranknet":
        terms = [math.log(1 + math.exp(z[j] - z[i])) for i, j in higher]
        return sum(terms) / max(1, len(terms))
    if kind in ("lambdarank", "lambdaloss"):
        rank = {i: r for r, i in enumerate(sorted(range(n), key=lambda i: -z[i]), 1)}
        ideal = sum((2**g - 1) * discount(r) for r, g in enumerate(sorted(y, reverse=True), 1))
        total = 0.0
        for i, j in higher:
            weight = abs(discount(rank[i]) - discount(rank[j]))
            if kind == "lambdaloss":
                apart = abs(rank[i] - rank[j])
                weight += 10 * abs(discount(apart) - discount(apart + 1))
            weight *= abs(2 ** y[i] - 2 ** y[j]) / ideal
            total += weight * math.log(1 + math.exp(z[j] - z[i]))
        return total
    if kind == "margin_mse":
        both = [(i, j) for i, j in higher if not (math.isnan(t[i]) or math.isnan(t[j]))]
        return sum((z[i] - z[j] - t[i] + t[j]) ** 2 for i, j in both) / max(1, len(both))
    assert kind == "kl"
    scored = [i for i in range(n) if not math.isnan(t[i])]
    p = [math.exp(t[i] / 0.3) for i in scored]
    q = [math.exp(z[i]) for i in scored]
    return sum(a / sum(p) * math.log(a / sum(p) / (b / sum(q))) for a, b in zip(p, q, strict=True))


def by_loops(c: LossConfig, logits_PL: torch.Tensor) -> float:
    z_PL = (logits_PL / c.temperature).tolist()
    if c.kind == "bce":
        total = 0.0
        for (z,), y in zip(z_PL, chain(*LABELS), strict=True):
            p = 1 / (1 + math.exp(-z))
            total -= c.positive_weight * math.log(p) if y else math.log(1 - p)
        return total / len(z_PL)
    if c.kind == "cross_entropy":
        total = 0.0
        for z, y in zip(z_PL, chain(*LABELS), strict=True):
            total -= math.log(math.exp(z[y]) / sum(math.exp(x) for x in z))
        return total / len(z_PL)
    total, start = 0.0, 0
    for y, t in zip(LABELS, SCORES, strict=True):
        z = [row[0] for row in z_PL[start : start + len(y)]]
        total += group_by_loops(c.kind, z, y, t)
        start += len(y)
    return total / len(LABELS)


def width_of(kind: str) -> int:
    return 4 if kind == "cross_entropy" else 1


@pytest.mark.parametrize("kind", RERANK_LOSSES)
def test_loss_equals_its_definition(kind):
    """Ragged groups, ties, missing scores, groups of one grade: every mask and divisor is in it."""
    c, logits_PL = config(kind), logits_of(width=width_of(kind))
    loss, _ = RerankLoss(c)(logits_PL, targets_of())
    # float64; scores are kept in float32, and 1e-12 is what the sums of a few exponentials lose
    rel = 1e-6 if kind in ("margin_mse", "kl") else 1e-12
    assert loss.item() == pytest.approx(by_loops(c, logits_PL), rel=rel)


@pytest.mark.parametrize("kind", ["softmax", "bce", "lambdarank"])
def test_a_teacher_beside_the_labels_takes_its_share(kind):
    teacher = {"teacher_weight": 0.3, "teacher_temperature": config("kl").teacher_temperature}
    c, logits_PL = dataclasses.replace(config(kind), **teacher), logits_of()
    loss, _ = RerankLoss(c)(logits_PL, targets_of())
    of_labels, of_teacher = (by_loops(config(k), logits_PL) for k in (kind, "kl"))
    assert loss.item() == pytest.approx(0.7 * of_labels + 0.3 * of_teacher, rel=1e-6)
    without = targets_of(scores=None)  # a step whose groups all lack them
    assert RerankLoss(c)(logits_PL, without)[0].item() == pytest.approx(0.7 * of_labels, rel=1e-12)


def test_no_answer_is_one_more_choice_of_logit_0():
    """Against torch's cross-entropy over each group with a 0 put before it: the right choice is
    the group's positive, or that 0. Where a group is one pair, it is binary cross-entropy."""
    labels = [[0, 1, 0], [0, 0], [1], [0], [0, 0, 0, 2]]
    c = dataclasses.replace(config("softmax"), no_answer=True)
    logits_PL = logits_of(labels).requires_grad_()
    loss, _ = RerankLoss(c)(logits_PL, targets_of(labels, None))
    expected, start = 0.0, 0
    for y in labels:
        z = torch.cat([torch.zeros(1), logits_PL[start : start + len(y), 0] / c.temperature])
        right = next((i for i, grade in enumerate(y, 1) if grade), 0)
        expected = expected + nn.functional.cross_entropy(z, torch.tensor(right)) / len(labels)
        start += len(y)
    grads = [torch.autograd.grad(x, logits_PL)[0] for x in (loss, expected)]
    assert loss.item() == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(*grads, rtol=1e-12, atol=1e-15)

    single, logits_PL = targets_of([[1], [0], [3]], None), logits_of([[1], [0], [3]])
    one_by_one = nn.functional.binary_cross_entropy_with_logits(
        logits_PL[:, 0] / c.temperature, torch.tensor([1.0, 0, 1], dtype=torch.float64)
    )
    loss, _ = RerankLoss(c)(logits_PL, single)
    assert loss.item() == pytest.approx(one_by_one.item(), rel=1e-12)


def test_no_answer_with_several_positives_is_their_mean():
    """Positives are not told from each other: each has the negatives and the 0 against it."""
    c = dataclasses.replace(config("softmax"), no_answer=True)
    loss, _ = RerankLoss(c)(logits_of(), targets_of())
    expected, start = 0.0, 0
    for y in LABELS:
        z = (logits_of()[start : start + len(y), 0] / c.temperature).tolist()
        start += len(y)
        below = 1 + sum(math.exp(x) for x, grade in zip(z, y, strict=True) if not grade)
        above = [math.exp(x) for x, grade in zip(z, y, strict=True) if grade]
        terms = [-math.log(x / (x + below)) for x in above] or [math.log(below)]
        expected += sum(terms) / len(terms) / len(LABELS)
    assert loss.item() == pytest.approx(expected, rel=1e-12)


def test_a_teacher_beside_the_labels_needs_its_temperature():
    """No default is right for a cross-encoder's logits and a retriever's cosines."""
    with pytest.raises(ValueError, match=r"needs loss\.teacher_temperature.* 1 for a cross-enc"):
        dataclasses.replace(config("softmax"), teacher_weight=0.3)
    assert LossConfig(kind="kl").teacher_divisor == 1.0
    assert LossConfig(teacher="m", teacher_weight=1.0).teacher_divisor == 0.05


@pytest.mark.parametrize("kind", ["kl", "margin_mse", "cross_entropy"])
def test_a_loss_without_grades_has_no_share_to_give(kind):
    with pytest.raises(ValueError, match=rf"teacher_weight \(0\.3\) belongs .* loss\.kind={kind}"):
        dataclasses.replace(config(kind), teacher_weight=0.3)


@pytest.mark.parametrize("kind", RERANK_LOSSES)
def test_gradient_is_that_of_finite_differences(kind):
    """The weights of lambdarank are constants; log-sum-exp over an empty set must give no nan."""
    logits_PL = logits_of(width=width_of(kind)).requires_grad_()
    loss_fn = RerankLoss(config(kind))
    assert torch.autograd.gradcheck(lambda x: loss_fn(x, targets_of())[0], logits_PL)


@pytest.mark.parametrize("kind", RERANK_LOSSES)
def test_shares_of_ranks_add_up_to_the_whole(kind):
    """Groups 0-2 on one rank, none on another, the rest on the third: loss, gradient and numbers
    must be what one process has; a divisor of the rank alone would not be."""
    width, whole = width_of(kind), targets_of()
    logits_PL = logits_of(width=width)
    loss_fn = RerankLoss(config(kind))
    expected_leaf = logits_PL.clone().requires_grad_()
    expected, expected_numbers = loss_fn(expected_leaf, whole)
    expected.backward()

    cuts = [0, 8, 8, len(logits_PL)]
    parts = [slice(a, b) for a, b in pairwise(cuts)]
    total, grads, numbers = 0.0, [], []
    for rank, part in enumerate(parts):
        group_P = whole.group_P[part]
        targets = GroupTargets(
            group_P - (group_P[0] if len(group_P) else 0), whole.label_P[part],
            whole.score_P[part], whole.num_groups_global, whole.num_pairs_global,
            num_positives_global=sum(y > 0 for group in LABELS for y in group),
            num_many_global=sum(len(group) > 1 for group in LABELS),
        )  # fmt: skip
        leaf = logits_PL[part].clone().requires_grad_()
        loss, own = loss_fn(leaf, targets, Ranks(rank, 3))  # no process group: no collective
        loss.backward()
        total += loss.item()
        grads.append(leaf.grad)
        numbers.append(own)
    assert total == pytest.approx(expected.item(), rel=1e-12)
    torch.testing.assert_close(torch.cat(grads), expected_leaf.grad, rtol=1e-12, atol=1e-15)
    for name, value in expected_numbers.items():
        assert sum(own[name] for own in numbers) == pytest.approx(value.item(), rel=1e-12)


def test_numbers_are_mean_scores_and_spread():
    """The collapse check reads them: equal logits have no spread, groups of one do not count."""
    logits_PL = torch.tensor([[9.0], [1.0], [3.0], [2.0], [2.0]])
    targets = targets_of([[1], [0, 1], [0, 0]], None)
    _, numbers = RerankLoss(config("softmax"))(logits_PL, targets)
    assert numbers["positive_score"] == pytest.approx((9 + 3) / 2)
    assert numbers["negative_score"] == pytest.approx((1 + 2 + 2) / 3)
    assert numbers["spread"] == pytest.approx((1.0 + 0.0) / 2)
    _, numbers = RerankLoss(config("softmax"))(torch.full((5, 1), 0.3), targets)
    assert numbers["spread"] == 0


@pytest.mark.parametrize("kind", GROUP_LOSSES)
def test_unusable_groups_cost_nothing_and_are_said_once(kind, caplog):
    """A query whose every candidate is a positive, one without any, a single pair, no scores: no
    nan, no gradient, and a divisor that still counts them."""
    labels = [[1, 1, 1], [0, 0], [1]]
    targets = targets_of(labels, None, num_groups_global=4)
    logits_PL = logits_of(labels).requires_grad_()
    loss_fn = RerankLoss(config(kind))
    with caplog.at_level(logging.WARNING):
        for _ in range(2):
            loss, _ = loss_fn(logits_PL, targets)
            loss.backward()
    assert loss.item() == 0
    assert torch.equal(logits_PL.grad, torch.zeros_like(logits_PL))
    (record,) = caplog.records
    assert "3 of this step's 3 groups give no loss" in record.getMessage()


@pytest.mark.parametrize("kind", RERANK_LOSSES)
def test_large_logits_stay_finite_in_float32(kind):
    """A confident cross-encoder: e^{100 / temperature} overflows where no maximum is taken out."""
    signs = torch.where(torch.arange(21) % 3 == 0, 1.0, -1.0)
    logits_PL = (100 * signs)[:, None].expand(-1, width_of(kind)).clone().requires_grad_()
    loss, _ = RerankLoss(config(kind))(logits_PL, targets_of())
    loss.backward()
    assert torch.isfinite(loss) and torch.isfinite(logits_PL.grad).all()


def test_a_label_without_an_output_is_an_error():
    targets = targets_of([[0, 3]], None)
    with pytest.raises(ValueError, match=r"labels from 0 to 3, want whole numbers in \[0, 3\)"):
        RerankLoss(config("cross_entropy"))(torch.zeros(2, 3), targets)


def test_build_loss_knows_every_kind():
    """train.py makes it by its name and logs .temperature."""
    for kind in RERANK_LOSSES:
        loss_fn = build_loss(config(kind), seed=3, task="rerank", precision="bf16")
        assert isinstance(loss_fn, RerankLoss) and loss_fn.temperature == pytest.approx(0.7)


# -- the same numbers as sentence-transformers' losses, where they mean the same ----------------


class _Fixed(nn.Module):
    """A CrossEncoder whose score of the pair (query, "7") is the eighth given."""

    def __init__(self, logits: torch.Tensor):
        super().__init__()
        self.logits, self.num_labels = logits, logits.shape[1]
        self.device = torch.device("cpu")

    def preprocess(self, pairs, prompt=None, task=None):
        return {"number": torch.tensor([int(passage) for _, passage in pairs])}

    def forward(self, features):
        logits = self.logits[features["number"]]
        return {"scores": logits[:, 0] if logits.shape[1] == 1 else logits}


@pytest.fixture
def theirs(monkeypatch):
    """Their losses, with our stand-in passing for their model."""
    pytest.importorskip("sentence_transformers")
    from sentence_transformers.cross_encoder import losses

    for loss in (losses.BinaryCrossEntropyLoss, losses.CrossEntropyLoss, losses.MarginMSELoss):
        monkeypatch.setattr(sys.modules[loss.__module__], "CrossEncoder", _Fixed)
    return losses


def _lists(labels: list[list[int]]):
    """Queries, passages (their numbers) and labels as those losses want them."""
    numbers = iter(range(100))
    passages = [[str(next(numbers)) for _ in group] for group in labels]
    return [["q"] * len(labels), passages], [torch.tensor(g, dtype=torch.float) for g in labels]


def ours(kind: str, logits_PL: torch.Tensor, targets: GroupTargets, **options) -> float:
    c = LossConfig(kind=kind, temperature=1.0, **options)
    return RerankLoss(c)(logits_PL, targets)[0].item()


def test_equals_sentence_transformers_bce_and_cross_entropy(theirs):
    labels, logits_PL = LABELS, logits_of(width=1).float()
    inputs = [["q"] * len(logits_PL), [str(i) for i in range(len(logits_PL))]]
    flat = torch.tensor([float(y > 0) for group in labels for y in group])
    loss_fn = theirs.BinaryCrossEntropyLoss(_Fixed(logits_PL), pos_weight=torch.tensor(2.5))
    found = ours("bce", logits_PL, targets_of(), positive_weight=2.5)
    assert found == pytest.approx(loss_fn(inputs, flat).item(), rel=1e-6)

    logits_PL = logits_of(width=4).float()
    flat = torch.tensor([y for group in labels for y in group])
    expected = theirs.CrossEntropyLoss(_Fixed(logits_PL))(inputs, flat).item()
    assert ours("cross_entropy", logits_PL, targets_of()) == pytest.approx(expected, rel=1e-6)


def test_equals_sentence_transformers_listmle_where_no_grades_are_equal(theirs):
    """With ties theirs takes whatever order the passages come in."""
    labels = [[0, 4, 2, 1, 3], [2, 1, 0]]
    logits_PL = logits_of(labels).float()
    loss_fn = theirs.ListMLELoss(_Fixed(logits_PL), respect_input_order=False)
    found = ours("listmle", logits_PL, targets_of(labels, None))
    assert found == pytest.approx(loss_fn(*_lists(labels)).item(), rel=1e-5)


@pytest.mark.parametrize("kind", ["ranknet", "lambdarank", "lambdaloss"])
def test_equals_sentence_transformers_pairwise_losses(theirs, kind):
    """Theirs is a mean over the pairs of all groups, in bits; of one group that is ours times the
    pairs (lambda), in nats."""
    labels = [[0, 3, 1, 0, 1, 2]]
    num_pairs = sum(a > b for a in labels[0] for b in labels[0])
    logits_PL = logits_of(labels).float()
    schemes = {"lambdarank": theirs.LambdaRankScheme, "lambdaloss": theirs.NDCGLoss2PPScheme}
    if kind == "ranknet":
        loss_fn, factor = theirs.RankNetLoss(_Fixed(logits_PL)), 1.0
    else:
        loss_fn = theirs.LambdaLoss(_Fixed(logits_PL), weighting_scheme=schemes[kind]())
        factor = num_pairs
    expected = loss_fn(*_lists(labels)).item() * math.log(2) * factor
    assert ours(kind, logits_PL, targets_of(labels, None)) == pytest.approx(expected, rel=1e-5)


def test_equals_sentence_transformers_margin_mse(theirs):
    """One positive and three negatives a query; teacher scores of all four."""
    labels, scores = [[1, 0, 0, 0]] * 2, [[0.9, 0.1, 0.5, -0.3], [0.2, 0.4, 0.0, 0.1]]
    logits_PL = logits_of(labels).float()
    inputs = [["q", "q"], ["0", "4"], ["1", "5"], ["2", "6"], ["3", "7"]]
    expected = theirs.MarginMSELoss(_Fixed(logits_PL))(inputs, torch.tensor(scores)).item()
    found = ours("margin_mse", logits_PL, targets_of(labels, scores))
    assert found == pytest.approx(expected, rel=1e-6)
