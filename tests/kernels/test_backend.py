"""loss.backend: the kernels under the whole loss, against torch."""

import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig
from losses import comparisons_kernels, similarity
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


@pytest.mark.parametrize("path", ["auto", "eform", "chunk", "fused"])
@pytest.mark.parametrize("options", [{}, {"dims": [8, 24], "false_negative_margin": 0.5}])
def test_the_loss_tells_kernels_its_gradient_beforehand(path, options, kernels, monkeypatch):
    """Without the forecast no user would have the ways of 6 instead of 8 B N D operations; a wrong
    one would cost a walk more. Pairs come in any order and weigh differently."""
    if torch.cuda.is_available():
        pytest.skip("this form is for the interpreter")
    monkeypatch.setattr(similarity, "kernels", lambda: kernels)
    monkeypatch.setattr(kernels, "_DENSE_CELLS", 0)
    walks, run = [], kernels._Walk.run
    monkeypatch.setattr(kernels._Walk, "run", lambda *a: (walks.append(a[0].path), run(*a))[1])
    at = targets()
    at.pair_query_P = at.pair_passage_P = torch.arange(18).flip(0)
    at.pair_weight_P = torch.linspace(0.5, 1.5, 18)
    found = []
    for ways in ({"backend": "triton", "path": path}, {"backend": "torch"}):
        config = LossConfig(temperature=0.1, learn_temperature=True, **options, **ways)
        loss_fn = build_loss(config)
        loss_fn.operands = torch.bfloat16
        q_BD, p_ND = unit(18, 0), unit(29, 1)
        loss, _ = loss_fn(q_BD, p_ND, at)
        (0.3 * loss).backward()
        found.append([loss.detach(), q_BD.grad, p_ND.grad, loss_fn.log_temperature.grad])
    M = len(options.get("dims", [24]))
    taken = {"auto": "eform" if M == 1 else "fused"}.get(path, path)
    assert walks == [taken] * M * (taken != "fused")
    for f, e in zip(*found, strict=True):
        assert (f - e).norm() < 2**-8 * e.norm()  # a coefficient is rounded to bf16 once


@pytest.mark.parametrize("path", ["auto", "eform", "chunk", "fused"])
def test_a_rank_without_queries_takes_any_path(path, kernels, monkeypatch):
    """The last batch may be smaller than the number of ranks."""
    if torch.cuda.is_available():
        pytest.skip("this form is for the interpreter")
    monkeypatch.setattr(similarity, "kernels", lambda: kernels)
    loss_fn = build_loss(LossConfig(backend="triton", path=path))
    none = torch.arange(0)
    at = Targets(none, none, torch.ones(0), none[:, None], 8, query_relatives_BK=none[:, None])
    q_BD, p_ND = unit(0, 0), unit(5, 1)
    loss, _ = loss_fn(q_BD, p_ND, at)
    loss.backward()
    assert loss == 0 and not p_ND.grad.any()


def test_the_check_compares_kernels_with_the_specification(kernels, monkeypatch):
    """python -m losses.check on an experiment of loss.backend=triton; a wrong kernel is a row out
    of bounds, and what no kernel serves has none."""
    if torch.cuda.is_available():
        pytest.skip("this form is for the interpreter")
    monkeypatch.setattr(similarity, "kernels", lambda: kernels)
    monkeypatch.setattr(comparisons_kernels, "TEMPERATURES", (0.1,))
    cpu, plain = torch.device("cpu"), LossConfig(backend="triton", path="fused")
    (row,) = comparisons_kernels.rows_of(plain, cpu)
    assert row.ok and row.difference > 0 and "fused" in row.what
    monkeypatch.setattr(kernels._Gradients, "_emit", lambda *a: None)
    (row,) = comparisons_kernels.rows_of(plain, cpu)
    assert not row.ok
    guided = LossConfig(backend="triton", guide="x", false_negative_margin=0.0)
    assert comparisons_kernels.rows_of(guided, cpu) == []


def test_what_no_kernel_can_do_goes_through_torch_and_says_so(caplog):
    """A silent slow path would be taken for the fast one."""
    similarity._log_once.cache_clear()
    with caplog.at_level("INFO"):
        loss_fn = build_loss(LossConfig(backend="triton")).double()
        loss_fn(unit(18, 0).double(), unit(29, 1).double(), targets())
    assert "chunks in torch instead of kernels (float64)" in caplog.text
