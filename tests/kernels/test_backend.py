"""loss.backend: the kernels under the whole loss, against torch."""

import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig
from losses import similarity
from losses.build import build_loss
from losses.infonce import Targets

CONFIGS = [
    {},
    {"symmetric": 0.3, "dims": [3, 8, 24], "learn_temperature": True, "false_negative_margin": 0.1},
    {"negatives": ["query_passage", "query_query", "passage_passage", "passage_query"],
     "hardness": 2.0},
    {"label_smoothing": 0.1, "symmetric": 0.5, "dims": [8, 24]},
    {"kind": "sigmoid", "dims": [8, 24], "learn_temperature": True},
]  # fmt: skip


def unit(n, seed):
    x = torch.randn(n, 24, generator=torch.Generator().manual_seed(seed))
    return F.normalize(x, dim=1).requires_grad_()


def targets() -> Targets:
    at = torch.arange(18)
    relatives_BK = torch.stack([at, torch.where(at % 3 == 0, at + 5, -1)], 1)
    return Targets(at, at, torch.ones(18), relatives_BK, 18, query_relatives_BK=at[:, None])


@pytest.mark.parametrize(
    "options", CONFIGS, ids=["plain", "matryoshka", "gte", "smooth", "sigmoid"]
)
def test_every_backend_gives_the_same_loss_and_gradients(options, kernels, monkeypatch):
    """Limits, hardness and factors cross the border between torch and the kernels."""
    if torch.cuda.is_available():
        pytest.skip("this form is for the interpreter")
    monkeypatch.setattr(similarity, "kernels", lambda: kernels)
    monkeypatch.setattr(kernels, "_DENSE_CELLS", 0)  # so small a batch would be dense otherwise
    found, swept = {}, []
    for name in ("sweep", "softplus_sweep"):
        sweep = getattr(kernels, name)
        monkeypatch.setattr(
            kernels, name, lambda *a, sweep=sweep, **k: swept.append(backend) or sweep(*a, **k)
        )
    for backend in ("torch", "dense", "triton"):
        loss_fn = build_loss(LossConfig(backend=backend, temperature=0.1, **options))
        q_BD, p_ND = unit(18, 0), unit(29, 1)
        loss, _ = loss_fn(q_BD, p_ND, targets())
        loss.backward()
        own = [p.grad for p in loss_fn.parameters()]
        found[backend] = [loss.detach(), q_BD.grad, p_ND.grad, *own]
    assert set(swept) == {"triton"}  # torch against torch would agree as well
    for backend in ("dense", "triton"):
        for f, e in zip(found[backend], found["torch"], strict=True):
            torch.testing.assert_close(f, e, rtol=2e-5, atol=2e-7)  # float32, sums in another order


def test_what_no_kernel_can_do_goes_through_torch_and_says_so(caplog):
    """A silent slow path would be taken for the fast one."""
    similarity._log_once.cache_clear()
    with caplog.at_level("INFO"):
        loss_fn = build_loss(LossConfig(backend="triton")).double()
        loss_fn(unit(18, 0).double(), unit(29, 1).double(), targets())
    assert "chunks in torch instead of kernels (float64)" in caplog.text
