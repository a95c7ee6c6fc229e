"""LossConfig -> module: the only place where a kind of loss is named."""

import logging

import torch
from torch import nn

from conf.schema import RERANK_LOSSES, LossConfig
from losses.distill import ScoreDistillation
from losses.infonce import InfoNCE
from losses.rerank import RerankLoss
from losses.sigmoid import Sigmoid

log = logging.getLogger(__name__)

KINDS = {"infonce": InfoNCE, "sigmoid": Sigmoid}
BACKENDS = {"triton": "Triton kernels", "dense": "one matrix in torch"}


def build_loss(
    c: LossConfig, seed: int = 0, *, task: str = "retrieval", precision: str = "fp32"
) -> nn.Module:
    """The loss module.

    task       retrieval | rerank: kl and margin_mse are losses of both
    seed       draws the dims of a step where loss.dims_per_step asks for it
    precision  fp32 | bf16: with bf16 the kernels multiply embeddings rounded to bfloat16; torch
               computes in float32 whatever it is
    """
    if c.kind in RERANK_LOSSES:
        is_taught = c.kind == "kl" or c.teacher_weight
        teacher = f", teacher temperature {c.teacher_divisor:g}" if is_taught else ""
        log.info("loss: %s, temperature %g%s", c.kind, c.temperature, teacher)
        return ScoreDistillation(c, seed) if task == "retrieval" else RerankLoss(c, seed, precision)
    learned = " (learned)" if c.learn_temperature else ""
    way = BACKENDS.get(c.backend, "chunks in torch")
    log.info("loss: %s, %s, temperature %g%s", c.kind, way, c.temperature, learned)
    rounds = c.backend == "triton" and precision == "bf16"
    return KINDS[c.kind](c, seed, torch.bfloat16 if rounds else None)
