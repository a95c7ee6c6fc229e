"""Losses of a cross-encoder, on the logits of groups of any size.

Shapes: P (query, passage) pairs of this rank, group by group, L labels of the head, G groups of
this rank, X ordered pairs (i, j) of one group with the grade of i above that of j.

With z = logit / temperature, y the grade (0: not relevant), t the teacher's score:

    bce            mean over all pairs of -w y' log s(z) - (1 - y') log(1 - s(z)), s the sigmoid,
                   y' = min(y, 1), w = loss.positive_weight   Nogueira & Cho 2019, sec. 3
    cross_entropy  mean over all pairs of -log softmax(z)[y], over the L labels

and the mean over the groups of:

    softmax     mean over i with y_i > 0 of softplus(ln - z_i), ln = log sum_{y_j = 0} e^{z_j}
                                                    Gao et al. 2021 (LCE); Cao et al. 2007
                with loss.no_answer a logit of 0, "no passage here answers", is one more negative
                of every group and what a group without positives should choose: ln = log(1 +
                sum_{y_j = 0} e^{z_j}), and the loss of such a group is ln
                                                    Devlin et al. 2019, sec. 4.3 (the null of SQuAD)
    listmle     sum_i softplus(ln_i - z_i), ln_i = log sum_{y_j < y_i} e^{z_j}
                                                    Xia et al. 2008
    ranknet     mean over X of softplus(z_j - z_i)  Burges et al. 2005, eq. 3
    lambdarank  sum over X of |g_i - g_j| |1/d_i - 1/d_j| softplus(z_j - z_i)
                                                    Burges 2010, sec. 4; Wang et al. 2018
    lambdaloss  the same with |1/d_i - 1/d_j| + 10 |1/D(|i - j|) - 1/D(|i - j| + 1)|, |i - j| the
                ranks between them                  Wang et al. 2018 (NDCG-Loss2++)
    margin_mse  mean over X of ((z_i - z_j) - (t_i - t_j))^2    Hofstaetter et al. 2020
    kl          KL(softmax(t / teacher temperature) || softmax(z))    Hinton et al. 2015, sec. 2

With w = loss.teacher_weight, a loss of grades becomes (1 - w) times itself + w times kl.

d_i = D(rank of i by z) = log2(1 + rank), g_i = (2^y_i - 1) / maximal DCG of the group. In nats, but
for margin_mse. Positives are never told from each other (softmax, listmle): with one positive the
softmax is the usual one, and where all grades differ listmle is the likelihood of their order; on
grades 0 and 1 the two differ by the number of positives alone.
"""

import logging
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from conf.schema import LossConfig
from runtime.distributed import SINGLE, Ranks

log = logging.getLogger(__name__)

MU = 10.0  # weight of the second part of NDCG-Loss2++, as in other implementations of it


@dataclass
class GroupTargets:
    """Which pairs form a group, and what they are worth.

    group_P    number of each pair's group on this rank, int64, non-decreasing, from 0
    label_P    grade, float32 >= 0; 0: not relevant. For cross_entropy: the label's number
    score_P    teacher scores, float32, NaN where the data has none; None: none at all
    num_groups_global  groups of all ranks: the divisor of a mean over groups
    num_pairs_global   pairs of all ranks: the divisor of bce and cross_entropy
    num_positives_global, num_many_global  pairs with a grade, and groups of two pairs or more, of
               all ranks: divisors of the numbers that are logged; None: of this rank
    step       0-based; no loss here draws anything
    """

    group_P: Tensor
    label_P: Tensor
    score_P: Tensor | None
    num_groups_global: int
    num_pairs_global: int
    step: int = 0
    num_positives_global: int | None = None
    num_many_global: int | None = None


class RerankLoss(nn.Module):
    """One of the losses of the module's text, chosen by loss.kind.

    A group that the loss cannot use (without a pair of different grades, unless loss.no_answer; or
    without teacher scores where they are needed) adds 0 and counts in the divisor; how many there
    are is logged once.
    """

    def __init__(self, c: LossConfig, seed: int = 0, precision: str = "fp32"):
        """seed, precision: as other losses are made; here nothing is drawn or rounded."""
        super().__init__()
        self.c, self.has_warned = c, False

    @property
    def temperature(self) -> Tensor:
        return torch.tensor(self.c.temperature)

    def forward(
        self, logits_PL: Tensor, targets: GroupTargets, ranks: Ranks = SINGLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss and of its numbers; sums over ranks are the global values.
        No collective: what all ranks have in common is in the targets.

        logits_PL  this rank's pairs, in the order of the targets; P may be 0
        numbers    "positive_score", "negative_score": mean logit (expected label, where L > 1) of
                   the pairs with a grade and without; "spread": mean over groups of two or more of
                   the standard deviation of their scores. Before the temperature.
        """
        groups = Groups(targets)
        return self.loss(logits_PL, targets, groups), _scores(logits_PL, targets, groups)

    def loss(self, logits_PL: Tensor, targets: GroupTargets, groups: "Groups") -> Tensor:
        """This rank's share of the loss alone."""
        z_PL = logits_PL / self.c.temperature
        loss = self._of_kind(z_PL, targets, groups)
        if not self.c.teacher_weight:
            return loss
        kl_G, _ = _kl(self.c, z_PL[:, 0], targets, groups)
        kl = kl_G.sum() / max(1, targets.num_groups_global)
        return (1 - self.c.teacher_weight) * loss + self.c.teacher_weight * kl

    def _of_kind(self, z_PL: Tensor, targets: GroupTargets, groups: "Groups") -> Tensor:
        if self.c.kind in PAIRWISE_MEANS:
            share_P = PAIRWISE_MEANS[self.c.kind](self.c, z_PL, targets.label_P)
            return share_P.sum() / max(1, targets.num_pairs_global)
        loss_G, is_usable_G = GROUPWISE[self.c.kind](self.c, z_PL[:, 0], targets, groups)
        self._say_unusable(is_usable_G)
        return loss_G.sum() / max(1, targets.num_groups_global)

    def _say_unusable(self, is_usable_G: Tensor) -> None:
        if self.has_warned or bool(is_usable_G.all()):
            return
        self.has_warned = True
        log.warning(
            "loss.kind=%s: %d of this step's %d groups give no loss (%s); said once",
            self.c.kind, int((~is_usable_G).sum()), len(is_usable_G), NEEDS[self.c.kind],
        )  # fmt: skip


class Groups:
    """Where the groups lie: count_G and start_G, and sums over them."""

    def __init__(self, targets: GroupTargets):
        self.group_P = targets.group_P
        self.num = int(self.group_P[-1]) + 1 if len(self.group_P) else 0
        self.count_G = torch.bincount(self.group_P, minlength=self.num)
        self.start_G = self.count_G.cumsum(0) - self.count_G

    def sum(self, x_n: Tensor, of_n: Tensor | None = None) -> Tensor:
        """(G,); of_n says which pair each value is of, where there is not one a pair."""
        group_n = self.group_P if of_n is None else self.group_P[of_n]
        return x_n.new_zeros(self.num).index_add(0, group_n, x_n)

    def mean(self, x_n: Tensor, of_n: Tensor | None = None) -> Tensor:
        """(G,), 0 for a group without values."""
        return self.sum(x_n, of_n) / self.sum(torch.ones_like(x_n), of_n).clamp(min=1)

    def has_any(self, is_P: Tensor) -> Tensor:
        return self.sum(is_P.to(torch.int64)) > 0

    def graded_pairs(self, label_P: Tensor, among_P: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """(i_X, j_X): all pairs of one group with label i > label j, both `among` some pairs."""
        size_P = self.count_G[self.group_P]
        i = torch.arange(len(label_P), device=label_P.device).repeat_interleave(size_P)
        first_P = size_P.cumsum(0) - size_P
        place = torch.arange(len(i), device=i.device) - first_P[i]
        j = self.start_G[self.group_P[i]] + place
        is_wanted = label_P[i] > label_P[j]
        if among_P is not None:
            is_wanted &= among_P[i] & among_P[j]
        return i[is_wanted], j[is_wanted]

    def ranks(self, x_P: Tensor) -> Tensor:
        """(P,) float: 1 for the largest of each group; equal ones in the order they come."""
        order = x_P.argsort(descending=True, stable=True)
        order = order[self.group_P[order].argsort(stable=True)]
        rank_P = torch.empty_like(x_P)
        place_P = torch.arange(len(x_P), device=x_P.device) - self.start_G[self.group_P]
        rank_P[order] = (place_P + 1).to(x_P)
        return rank_P


def _log_sum_exp(x_n: Tensor, segment_n: Tensor, num: int) -> Tensor:
    """(num,) log of the sum of e^x over each segment; -inf for one without values."""
    highest = x_n.new_full((num,), -torch.inf)
    highest = highest.scatter_reduce(0, segment_n, x_n.detach(), "amax")
    highest = torch.where(highest.isfinite(), highest, 0.0)
    return x_n.new_zeros(num).index_add(0, segment_n, (x_n - highest[segment_n]).exp()).log() + (
        highest
    )


def _softplus(x: Tensor) -> Tensor:
    return F.softplus(x, threshold=40)  # 20, the default: 2e-9 off


# -- means over pairs: (c, z_PL, label_P) -> (P,) -----------------------------------------------


def _bce(c: LossConfig, z_PL: Tensor, label_P: Tensor) -> Tensor:
    z_P, target_P = z_PL[:, 0], label_P.clamp(max=1).to(z_PL)
    return c.positive_weight * target_P * _softplus(-z_P) + (1 - target_P) * _softplus(z_P)


def _cross_entropy(c: LossConfig, z_PL: Tensor, label_P: Tensor) -> Tensor:
    is_whole = bool((label_P == label_P.round()).all())
    if len(label_P) and not (is_whole and 0 <= label_P.min() and label_P.max() < z_PL.shape[1]):
        raise ValueError(
            f"loss.kind=cross_entropy: labels from {label_P.min():g} to {label_P.max():g}, want"
            f" whole numbers in [0, {z_PL.shape[1]}); set model.num_labels"
        )
    return F.cross_entropy(z_PL, label_P.to(torch.int64), reduction="none")


# -- means over groups: (c, z_P, targets, groups) -> (loss_G, is_usable_G) ----------------------


def _softmax(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    is_positive_P = t.label_P > 0
    negatives, positives = (~is_positive_P).nonzero()[:, 0], is_positive_P.nonzero()[:, 0]
    ln_G = _log_sum_exp(z_P[negatives], groups.group_P[negatives], groups.num)
    if c.no_answer:
        ln_G = _softplus(ln_G)  # log(1 + e^ln)
    loss_n = _softplus(ln_G[groups.group_P[positives]] - z_P[positives])
    loss_G, has_positive_G = groups.mean(loss_n, positives), groups.has_any(is_positive_P)
    if c.no_answer:
        return torch.where(has_positive_G, loss_G, ln_G), torch.ones_like(has_positive_G)
    return loss_G, has_positive_G & groups.has_any(~is_positive_P)


def _listmle(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    i_X, j_X = groups.graded_pairs(t.label_P)
    ln_P = _log_sum_exp(z_P[j_X], i_X, len(z_P))
    return groups.sum(_softplus(ln_P - z_P)), _has_pair(groups, i_X)


def _ranknet(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    i_X, j_X = groups.graded_pairs(t.label_P)
    return groups.mean(_softplus(z_P[j_X] - z_P[i_X]), i_X), _has_pair(groups, i_X)


def _lambdarank(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    i_X, j_X = groups.graded_pairs(t.label_P)
    weight_X = _gain_changes(z_P, t, groups, i_X, j_X, mu=MU if c.kind == "lambdaloss" else 0.0)
    return groups.sum(weight_X * _softplus(z_P[j_X] - z_P[i_X]), i_X), _has_pair(groups, i_X)


@torch.no_grad()
def _gain_changes(
    z_P: Tensor, t: GroupTargets, groups: Groups, i_X: Tensor, j_X: Tensor, *, mu: float
) -> Tensor:
    """What each pair would change in nDCG if its two changed places, and mu times the bound."""

    def discount(rank: Tensor) -> Tensor:
        return 1 / torch.log2(1 + rank)

    gain_P = (2 ** t.label_P.to(z_P)) - 1
    best_G = groups.sum(gain_P * discount(groups.ranks(t.label_P.to(z_P))))
    gain_P = gain_P / best_G.clamp(min=torch.finfo(z_P.dtype).tiny)[groups.group_P]
    rank_P = groups.ranks(z_P)
    weight_X = (discount(rank_P[i_X]) - discount(rank_P[j_X])).abs()
    if mu:
        apart_X = (rank_P[i_X] - rank_P[j_X]).abs()
        weight_X = weight_X + mu * (discount(apart_X) - discount(apart_X + 1))
    return weight_X * (gain_P[i_X] - gain_P[j_X]).abs()


def _margin_mse(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    score_P = _scores_of_teacher(t, z_P)
    i_X, j_X = groups.graded_pairs(t.label_P, among_P=score_P.isfinite())
    error_X = (z_P[i_X] - z_P[j_X]) - (score_P[i_X] - score_P[j_X])
    return groups.mean(error_X**2, i_X), _has_pair(groups, i_X)


def _kl(c: LossConfig, z_P: Tensor, t: GroupTargets, groups: Groups):
    score_P = _scores_of_teacher(t, z_P) / c.teacher_divisor
    scored = score_P.isfinite().nonzero()[:, 0]
    group_n, z_n, score_n = groups.group_P[scored], z_P[scored], score_P[scored]
    log_q_n = z_n - _log_sum_exp(z_n, group_n, groups.num)[group_n]
    log_p_n = score_n - _log_sum_exp(score_n, group_n, groups.num)[group_n]
    is_usable_G = groups.sum(torch.ones_like(scored), scored) > 1
    return groups.sum(log_p_n.exp() * (log_p_n - log_q_n), scored), is_usable_G


def _scores_of_teacher(t: GroupTargets, z_P: Tensor) -> Tensor:
    return torch.full_like(z_P, torch.nan) if t.score_P is None else t.score_P.to(z_P)


def _has_pair(groups: Groups, i_X: Tensor) -> Tensor:
    return groups.sum(torch.ones_like(i_X), i_X) > 0


PAIRWISE_MEANS = {"bce": _bce, "cross_entropy": _cross_entropy}
GROUPWISE = {
    "softmax": _softmax, "listmle": _listmle, "ranknet": _ranknet, "lambdarank": _lambdarank,
    "lambdaloss": _lambdarank, "margin_mse": _margin_mse, "kl": _kl,
}  # fmt: skip
NEEDS = dict.fromkeys(GROUPWISE, "they have no two passages of different grades")
NEEDS |= {
    "softmax": "they have no two passages of different grades; loss.no_answer=true uses them",
    "margin_mse": "they have no two passages of different grades that both have a teacher score",
    "kl": "they have no two passages with a teacher score",
}


@torch.no_grad()
def _scores(logits_PL: Tensor, t: GroupTargets, groups: Groups) -> dict[str, Tensor]:
    """This rank's shares of the three numbers of RerankLoss.forward."""
    score_P = logits_PL[:, 0]
    if logits_PL.shape[1] > 1:
        labels_L = torch.arange(logits_PL.shape[1], device=score_P.device).to(score_P)
        score_P = logits_PL.softmax(1) @ labels_L
    is_positive_P = t.label_P > 0
    deviation_P = (score_P - groups.mean(score_P)[groups.group_P]) ** 2
    is_many_G = groups.count_G > 1
    positives, many = t.num_positives_global, t.num_many_global
    positives = is_positive_P.sum() if positives is None else positives
    sums = {
        "positive_score": (score_P[is_positive_P].sum(), positives),
        "negative_score": (score_P[~is_positive_P].sum(), t.num_pairs_global - positives),
        "spread": (
            groups.mean(deviation_P)[is_many_G].sqrt().sum(),
            is_many_G.sum() if many is None else many,
        ),
    }
    ones = score_P.new_ones(())
    return {name: total / (ones * count).clamp(min=1) for name, (total, count) in sums.items()}
