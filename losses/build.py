"""LossConfig -> module: the only place where a kind of loss is named."""

import logging

from torch import nn

from conf.schema import LossConfig
from losses.infonce import InfoNCE
from losses.sigmoid import Sigmoid

log = logging.getLogger(__name__)

KINDS = {"infonce": InfoNCE, "sigmoid": Sigmoid}


def build_loss(c: LossConfig, seed: int = 0) -> nn.Module:
    """The loss module; `seed` draws the dims of a step where loss.dims_per_step asks for it."""
    learned = " (learned)" if c.learn_temperature else ""
    log.info("loss: %s in chunked torch, temperature %g%s", c.kind, c.temperature, learned)
    return KINDS[c.kind](c, seed)
