"""Every contrastive loss of LossConfig as whole matrices and plain autograd: slow, dense, obvious.

Shapes: A queries and N candidate passages of all ranks, P (query, positive) pairs, X negatives of a
pair in a row, kept or not, D embedding.

Written from the equations at the top of losses/infonce.py and losses/sigmoid.py, and from the
papers that they name, not from the code there: losses/check.py and the tests compare the two.
Nothing is chunked, everything is float64, and who is a negative of whom is a boolean matrix.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from conf.schema import LossConfig
from losses.infonce import Targets

KINDS = ("infonce", "sigmoid")  # of LossConfig.kind


def specification(
    c: LossConfig,
    q_AD: Tensor,
    p_ND: Tensor,
    targets: Targets,
    *,
    temperature: float | Tensor,
    bias: Tensor | None = None,
    dims: Sequence[int] | None = None,
    keep_AN: Tensor | None = None,
) -> Tensor:
    """The loss of a step in nats: a mean over the examples of all ranks, float64.

    q_AD, p_ND   embeddings of all ranks, any float dtype; a prefix is normalised again, the full
                 width is taken as it comes
    temperature  > 0; a tensor when it is learned
    bias         of kind=sigmoid
    dims         those of this step (loss.dims_per_step); None: all of loss.dims
    keep_AN      True where a passage may be a negative of a query, in place of
                 targets.relatives_BK
    """
    q_AD, p_ND = q_AD.double(), p_ND.double()
    if keep_AN is None:
        keep_AN = _all_but(targets.relatives_BK, len(p_ND))
    weight_of = dict(zip(c.dims, c.dim_weights or [1.0] * len(c.dims), strict=True))
    weight_of = weight_of or {q_AD.shape[1]: 1.0}
    chosen = list(weight_of) if dims is None else list(dims)
    loss_of_kind = {"infonce": _infonce, "sigmoid": _sigmoid}[c.kind]
    loss = torch.zeros((), dtype=torch.float64)
    for d in chosen:
        x_Ad, y_Nd = q_AD[:, :d], p_ND[:, :d]
        if d < q_AD.shape[1]:
            x_Ad, y_Nd = F.normalize(x_Ad, dim=1), F.normalize(y_Nd, dim=1)
        at_dim = loss_of_kind(c, x_Ad, y_Nd, targets, keep_AN, temperature, bias)
        # a sample of the dims stands for all of them: its mean is theirs in expectation
        loss = loss + at_dim * weight_of[d] / sum(weight_of.values()) * len(weight_of) / len(chosen)
    return loss


def _all_but(relatives_BK: Tensor, size: int) -> Tensor:
    """(B, size) bool, False in the columns listed."""
    keep_BN = torch.ones(len(relatives_BK), size, dtype=torch.bool)
    for keep_N, columns in zip(keep_BN, relatives_BK.tolist(), strict=True):
        keep_N[[column for column in columns if column >= 0]] = False
    return keep_BN


def _infonce(
    c: LossConfig,
    q_AD: Tensor,
    p_ND: Tensor,
    t: Targets,
    keep_AN: Tensor,
    temperature: float | Tensor,
    bias: None,
) -> Tensor:
    of_P, at_P = t.pair_query_P, t.pair_passage_P
    qp_AN, qq_AA, pp_NN = q_AD @ p_ND.T, q_AD @ q_AD.T, p_ND @ p_ND.T
    keep_AN, by_query_AN, keep_qq_AA, keep_pp_PN = _without_false_negatives(
        c, qp_AN.detach(), qq_AA.detach(), pp_NN.detach(), t, keep_AN
    )
    # each pair's cosines with its negatives, and whether they count, side by side
    kinds = {
        "query_passage": (qp_AN[of_P], keep_AN[of_P]),
        "passage_query": (qp_AN.T[at_P], by_query_AN.T[at_P]),
        "passage_passage": (pp_NN[at_P], keep_pp_PN),
    }
    if "query_query" in c.negatives:
        kinds["query_query"] = (qq_AA[of_P], keep_qq_AA[of_P])

    def pair_losses(names: Sequence[str]) -> Tensor:
        cosine_PX = torch.cat([kinds[name][0] for name in names], 1)
        keep_PX = torch.cat([kinds[name][1] for name in names], 1)
        count_P = keep_PX.double().sum(1)
        z_P = qp_AN[of_P, at_P] / temperature
        z_PX = cosine_PX / temperature + c.hardness * cosine_PX.detach()
        # e^{z - z of the positive}: float64 has room for it at any temperature above .003
        ratio_PX = torch.where(keep_PX, (z_PX - z_P[:, None]).exp(), 0.0)
        negatives_P = ratio_PX.sum(1)
        if c.debias:
            estimate_P = (negatives_P - c.debias * count_P) / (1 - c.debias)
            # the smallest sum that cosines of -1 could have; as above, over e^{z of the positive}
            smallest_P = count_P * (-1 / torch.as_tensor(temperature) - z_P).exp()
            negatives_P = torch.maximum(estimate_P, smallest_P)
        loss_P = torch.log1p(negatives_P)
        if c.label_smoothing:
            mean_P = (z_P + torch.where(keep_PX, z_PX, 0.0).sum(1)) / (1 + count_P)
            loss_P = loss_P + c.label_smoothing * (z_P - mean_P)
        return loss_P

    loss_P = (1 - c.symmetric) * pair_losses(c.negatives)
    loss_P = loss_P + c.symmetric * pair_losses(["passage_query"])
    weight_P = t.pair_weight_P.double()
    loss = (weight_P * loss_P).sum() / t.num_examples
    if c.teacher_weight:
        teacher_AN = t.guide_query_AE.double() @ t.guide_passage_NE.double().T
        labels_AN = F.softmax(teacher_AN / c.teacher_divisor, 1)
        log_p_AN = F.log_softmax(qp_AN / temperature, 1)
        kl_A = F.kl_div(log_p_AN, labels_AN, reduction="none").sum(1)
        kl = (weight_P * kl_A[of_P]).sum() / t.num_examples
        loss = (1 - c.teacher_weight) * loss + c.teacher_weight * kl
    return loss


def _without_false_negatives(
    c: LossConfig, qp_AN: Tensor, qq_AA: Tensor, pp_NN: Tensor, t: Targets, keep_AN: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    """Who is a negative, for each kind: of a query among passages, of a passage among queries (both
    (A, N)), of a query among queries (A, A), of a pair's positive among passages (P, N).

    qp_AN, qq_AA, pp_NN are the model's cosines; those of a guide take their place where there is
    one.
    """
    keep_AA = None
    if t.query_relatives_BK is not None:
        keep_AA = _all_but(t.query_relatives_BK, len(qp_AN))
    of_P, at_P = t.pair_query_P, t.pair_passage_P
    if c.false_negative_margin is None and c.false_negative_ratio is None:
        return keep_AN, keep_AN, keep_AA, keep_AN[of_P]
    if c.guide is not None:
        q_AE, p_NE = t.guide_query_AE.double(), t.guide_passage_NE.double()
        qp_AN, qq_AA, pp_NN = q_AE @ p_NE.T, q_AE @ q_AE.T, p_NE @ p_NE.T
    is_pair_AN = torch.zeros_like(keep_AN)
    is_pair_AN[of_P, at_P] = True
    own_AN = torch.where(is_pair_AN, qp_AN, -torch.inf)

    def limit(best: Tensor) -> Tensor:
        margin, ratio = c.false_negative_margin, c.false_negative_ratio
        return torch.minimum(
            torch.full_like(best, torch.inf) if margin is None else best + margin,
            torch.full_like(best, torch.inf) if ratio is None else best * ratio,
        )

    limit_A, limit_N = limit(own_AN.amax(1)), limit(own_AN.amax(0))
    return (
        keep_AN & (qp_AN <= limit_A[:, None]),
        keep_AN & (qp_AN <= limit_N[None]),
        None if keep_AA is None else keep_AA & (qq_AA <= limit_A[:, None]),
        keep_AN[of_P] & (pp_NN[at_P] <= limit_A[of_P, None]),
    )


def _sigmoid(
    c: LossConfig,
    q_AD: Tensor,
    p_ND: Tensor,
    t: Targets,
    keep_AN: Tensor,
    temperature: float | Tensor,
    bias: Tensor,
) -> Tensor:
    z_AN = q_AD @ p_ND.T / temperature + bias
    ones_AN = torch.ones_like(z_AN)
    # binary cross entropy: log(1 + e^{-z}) of what answers, log(1 + e^z) of what does not
    positive_AN = F.binary_cross_entropy_with_logits(z_AN, ones_AN, reduction="none")
    negative_AN = F.binary_cross_entropy_with_logits(z_AN, 0 * ones_AN, reduction="none")
    positive_P = positive_AN[t.pair_query_P, t.pair_passage_P] * t.pair_weight_P.double()
    return (positive_P.sum() + negative_AN[keep_AN].sum()) / t.num_examples
