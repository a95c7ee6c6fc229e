"""LossConfig -> module: the only place where a kind of loss is named."""

import logging

from torch import nn

from conf.schema import LossConfig
from losses.infonce import InfoNCE

log = logging.getLogger(__name__)


def build_loss(c: LossConfig) -> nn.Module:
    log.info(
        "loss: InfoNCE in plain torch, temperature %g%s",
        c.temperature,
        " (learned)" if c.learn_temperature else "",
    )
    return InfoNCE(c)
