"""The same computations on a CUDA device; `make gpu` runs them."""

import numpy as np
import pytest
import torch

from conf.schema import LossConfig, ModelConfig
from losses.grad_cache import train_step
from losses.infonce import InfoNCE
from models.attention import attend
from models.build import build_model
from models.transformer import pack
from runtime.device import autocast_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
LENGTHS = [130, 77, 77, 9, 1]


@pytest.mark.parametrize("half_window", [0, 16])
@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_attention_equals_the_cpu_in_float64(dtype, with_bias, half_window):
    """varlen or padded, whichever this device takes, forward and backward, within rounding of its
    type."""
    generator = torch.Generator().manual_seed(0)
    qkv = torch.randn(sum(LENGTHS), 3, 4, 32, generator=generator)
    bias = torch.randn(4, max(LENGTHS), max(LENGTHS), generator=generator) if with_bias else None
    texts = [np.zeros(n, np.int64) for n in LENGTHS]
    grads, outs = [], []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        x = qkv.to(device, kind).requires_grad_()
        b = None if bias is None else bias.to(device, kind)
        out = attend(x, pack(texts, device), b, half_window=half_window)
        out.square().sum().backward()
        outs.append(out.detach().double().cpu())
        grads.append(x.grad.double().cpu())
    bound = 0.02 if dtype == torch.bfloat16 else 1e-4
    for exact, found in (outs, grads):
        assert (found - exact).abs().max() <= bound * exact.abs().max()


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_training_step_equals_the_cpu(precision, tiny_base):
    """Loss and gradients of a whole step."""
    from tests.losses.test_grad_cache import random_batch

    found = []
    for device, kind in ((torch.device("cpu"), "fp32"), (torch.device("cuda", 0), precision)):
        towers = build_model(ModelConfig(base=str(tiny_base), dropout=0.0), dims=[]).to(device)
        loss_fn = InfoNCE(LossConfig(temperature=0.5)).to(device)
        loss, _ = train_step(
            towers, loss_fn, random_batch(), seed=0, step=0, chunk_tokens=50, device=device,
            autocast=autocast_for(kind, device),
        )  # fmt: skip
        grads = torch.cat(
            [p.grad.flatten().cpu() for p in towers.parameters() if p.grad is not None]
        )
        found.append((loss.item(), grads))
    (loss_cpu, grads_cpu), (loss_gpu, grads_gpu) = found
    bound = 0.05 if precision == "bf16" else 1e-4
    assert loss_gpu == pytest.approx(loss_cpu, rel=bound)
    assert (grads_gpu - grads_cpu).norm() <= bound * grads_cpu.norm()
