"""A retriever that learns a cross-encoder's scores of each query's own passages.

Shapes: B queries of this rank, N candidate passages of all ranks, D embedding, M Matryoshka dims, P
(query, own passage) pairs of this rank, group by group.

The losses are those of losses/rerank.py on cosines instead of logits, so that z = cosine /
temperature: margin_mse (Hofstaetter et al. 2020, eq. 2) and kl (as Ren et al. 2021, RocketQAv2, eq.
2). Other queries' passages are no negatives here.
"""

import torch
from torch import Tensor, nn

from conf.schema import LossConfig
from losses.infonce import Targets, dims_of_step, mean_scores
from losses.rerank import Groups, RerankLoss
from losses.similarity import positive_scores
from runtime.distributed import SINGLE, Ranks


class ScoreDistillation(nn.Module):
    """The loss of each Matryoshka dim on its prefixes, averaged by weight."""

    def __init__(self, c: LossConfig, seed: int = 0):
        super().__init__()
        self.c, self.seed, self.on_scores = c, seed, RerankLoss(c)

    @property
    def temperature(self) -> Tensor:
        return self.on_scores.temperature

    def forward(
        self, q_BD: Tensor, p_ND: Tensor, targets: Targets, ranks: Ranks = SINGLE
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """This rank's share of the loss and of its numbers: InfoNCE's, at the widest dim.

        targets.scored says which pairs form a group and what the teacher gave them.
        """
        if targets.scored is None:
            raise ValueError(
                f"loss.kind={self.c.kind} learns a teacher's scores, but the batch has none"
            )
        dims, weight_M = dims_of_step(self.c, q_BD.shape[1], self.seed, targets.step)
        one = q_BD.new_ones(())
        of = targets.scored
        cos_MP = positive_scores(q_BD, p_ND, one, of.group_P, targets.scored_passage_P, dims=dims)
        groups = Groups(of)
        loss_M = torch.stack([self.on_scores.loss(cos_P[:, None], of, groups) for cos_P in cos_MP])
        numbers = mean_scores(
            q_BD, p_ND, targets, max([*self.c.dims, *dims]), 1 / self.temperature.to(one)
        )
        return (loss_M * weight_M.to(loss_M)).sum(), numbers
