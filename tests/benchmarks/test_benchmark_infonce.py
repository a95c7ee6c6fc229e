"""The loss benchmark compares things that compute the same loss.

Shapes: B queries, N passages, D embedding.
"""

import csv

import pytest
import torch
import torch.nn.functional as F

from benchmarks import infonce
from benchmarks.infonce_sides import (
    KINDS,
    OURS,
    SIDES,
    SIGMOID_BIAS,
    Case,
    ChunkedCrossEntropy,
    dense_loss,
)
from benchmarks.infonce_truth import cosine_for, embeddings, gradient_error, truth


def case(kind: str = "one-sided", **other) -> Case:
    return Case(**{"kind": kind, "precision": "fp32", "B": 37, "N": 90, "D": 24} | other)


@pytest.mark.parametrize("dims", [(), (24, 10, 5)], ids=["one dim", "three dims"])
@pytest.mark.parametrize(
    ("side", "kind"),
    [
        pytest.param(name, kind, marks=pytest.mark.slow if name == "torch.compile" else ())
        for name, side in SIDES.items()
        for kind in side.kinds
    ],
)
def test_every_side_computes_the_same_loss_and_gradients(side, kind, dims):
    """A side that left out the hard negatives, weighted the dims otherwise or forgot to normalise a
    prefix again would be timed at other work."""
    why_not = SIDES[side].why_not(case(kind, dims=dims), "cpu")
    if why_not:
        pytest.skip(f"{side}: {why_not}")
    q_BD, p_ND = embeddings(37, 90, 24, cosine=0.4)
    wanted = truth(q_BD, p_ND, dims, kind)
    found = SIDES[side].compute(q_BD, p_ND, dims, kind)
    # float32 against float64 at logits up to 20: 20 * 6e-8 each
    torch.testing.assert_close(found[0].double(), wanted.loss, rtol=1e-5, atol=0)
    assert gradient_error(found, wanted, q_BD, p_ND) < 1e-5
    assert found[1].shape == q_BD.shape and found[2].shape == p_ND.shape


@pytest.mark.slow
def test_every_path_of_the_kernels_computes_it_too(run_benchmark, monkeypatch):
    """The paths need a device or Triton's interpreter, which is chosen when triton is imported:
    through the command, in its worker."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    options = ["--way", "cells", "--size", "16x20x16", "--dims", "16,5", "--cell-limit-s", "200"]
    paths = ["rook-fused", "rook-eform", "rook-chunk", "rook-dense"]
    rows = run_benchmark("infonce", *options, "--peer", *paths)
    rows += run_benchmark("infonce", *options, "--loss", "two-sided", "--peer", *paths)
    assert [r["peer"] for r in rows] == [*paths, "rook-fused", "rook-dense"]  # two know rows alone
    assert all(r["peer_gradient_error"] < 1e-5 and not r["note"] for r in rows), rows


@pytest.mark.parametrize("kind", KINDS)
def test_truth_is_the_loss_and_its_gradient_whatever_its_blocks(kind):
    """It is written from the equations: autograd of the definition must agree, at a part of the
    rows as at all."""
    q_BD, p_ND = (x.double() for x in embeddings(11, 23, 8, cosine=0.4))
    q_BD.requires_grad_()
    p_ND.requires_grad_()
    loss = 0
    for d in (8, 4):
        z_BN = F.normalize(q_BD[:, :d], dim=1) @ F.normalize(p_ND[:, :d], dim=1).T
        if d == 8:
            z_BN = q_BD @ p_ND.T
        z_BN = z_BN / (0.1 if kind == "sigmoid" else 0.05)
        one_BN = torch.eye(11, 23, dtype=torch.float64)
        row_B = torch.arange(11)
        if kind == "sigmoid":
            x_BN = z_BN + SIGMOID_BIAS
            part = F.binary_cross_entropy_with_logits(x_BN, one_BN, reduction="sum") / 11
        else:
            part = F.cross_entropy(z_BN, row_B)
            if kind == "two-sided":
                part = (part + F.cross_entropy(z_BN.T[:11], row_B)) / 2
        loss = loss + part / 2
    wanted = torch.autograd.grad(loss, (q_BD, p_ND))
    for cells, sample in ((30, None), (None, None), (30, 3)):
        found = truth(q_BD.detach(), p_ND.detach(), [8, 4], kind, cells=cells, sample=sample)
        torch.testing.assert_close(found.loss, loss.detach(), rtol=1e-12, atol=1e-14)
        rows, columns = found.row_r, found.column_c
        assert len(rows) == (sample or 11) and len(columns) == (sample or 23)
        torch.testing.assert_close(found.grad_q_rD, wanted[0][rows], rtol=1e-10, atol=1e-13)
        torch.testing.assert_close(found.grad_p_cD, wanted[1][columns], rtol=1e-10, atol=1e-13)


def test_gradient_error_is_of_the_queries_where_a_side_has_no_other():
    """A loss for one tower has no gradient of the passages; it must not count as all wrong."""
    q_BD, p_ND = embeddings(11, 23, 8, cosine=0.4)
    wanted = truth(q_BD, p_ND, (), sample=5)
    loss, of_q, of_p = SIDES["dense"].compute(q_BD, p_ND, (), "one-sided")
    assert gradient_error((loss, of_q, None), wanted, q_BD, p_ND) < 1e-5
    assert gradient_error((loss, of_q, 1.1 * of_p), wanted, q_BD, p_ND) > 0.01


@pytest.mark.parametrize("loss", [1.0, 1e-2, 1e-4])
def test_the_cosine_for_a_loss_gives_that_loss(loss):
    """Gradient errors are told at losses of 1, .01 and .0001."""
    q_BD, p_ND = embeddings(512, 512, 256, cosine=cosine_for(loss, 512, 256))
    # the noise on the cosine of one pair is 1 / 16, times 20: some rows are much harder
    assert 0.5 < truth(q_BD, p_ND, (), sample=1).loss.item() / loss < 2.5


@pytest.mark.parametrize("rows", [None, 5, 64])
def test_the_rebuilt_chunked_loss_does_not_depend_on_its_chunk(rows):
    q_BD, p_ND = (x.requires_grad_() for x in embeddings(37, 90, 24, cosine=0.4))
    (2 * ChunkedCrossEntropy.apply(q_BD / 0.05, p_ND, rows)).backward()
    wanted = torch.autograd.grad(2 * dense_loss(q_BD, p_ND, "one-sided"), (q_BD, p_ND))
    torch.testing.assert_close((q_BD.grad, p_ND.grad), wanted, rtol=1e-4, atol=1e-6)


def test_sides_say_what_they_do_not_serve(monkeypatch):
    """A kernel that reads out of bounds, or a shape that a library refuses, must not be tried."""
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert SIDES["memeff"].why_not(case(), "cpu") == "does not run on cpu"
    assert SIDES["memeff"].why_not(case(), "cuda") == "package memeff is missing"
    assert SIDES["memeff"].why_not(case("sigmoid"), "cuda") == "has no sigmoid loss"
    monkeypatch.setattr("importlib.util.find_spec", lambda name: name)
    square = {"B": 128, "N": 128, "D": 768}
    assert SIDES["memeff"].why_not(case(**square), "cuda") == ""
    assert "multiples of 64" in SIDES["memeff"].why_not(case(**square, dims=(768, 32)), "cuda")
    assert "end in D" in SIDES["memeff"].why_not(case(**square, dims=(512, 64)), "cuda")
    assert SIDES["memeff"].note(case()) == "gradient of the queries alone; tf32 products"
    assert "out of bounds" in SIDES["inf-cl"].why_not(case(B=100, N=128), "cuda")
    assert SIDES["inf-cl"].why_not(case(**square), "cuda") == ""
    assert SIDES["siglip-kernel"].why_not(case("sigmoid"), "cuda") == "wants N = B"


def test_a_row_tells_why_a_side_has_no_number(tmp_path):
    """Out of memory is a result; what was never tried is none, and stays out of the file."""
    ours = {"ms": 2.0, "p20_ms": 1.9, "p80_ms": 2.1, "peak_mib": 9.0, "beyond_mib": 5.0}
    ours |= {"gradient_error": 1e-3, "loss": 1.5, "calls": 7, "device": "x", "note": ""}
    too_large, late = {"note": "out of memory (139 GiB)"}, {"note": "not run: no time left"}
    row = infonce.paired(case(), OURS, ours, "dense", too_large)
    assert (row["ms"], row["peer_ms"], row["ratio"]) == (2.0, "", "")
    assert row["note"] == "out of memory (139 GiB)" and row["rate"] == 18500
    both = infonce.paired(case(), OURS, ours, "dense", ours | {"ms": 3.0})
    assert both["ratio"] == 1.5 and both["peer_rate"] == 12333.33
    nothing = infonce.paired(case(), OURS, late, "dense", late)
    infonce.save([row, both, nothing], tmp_path)
    saved = list(csv.DictReader((tmp_path / "infonce.csv").open()))
    assert [r["note"] for r in saved] == ["out of memory (139 GiB)", ""]
    lines = infonce.table([row, both]).splitlines()
    assert lines[1].endswith("out of memory (139 GiB)") and len(lines) == 3


@pytest.mark.slow
def test_the_command_writes_a_row_for_each_size_and_dims(run_benchmark):
    """End to end: workers, paired ratios, memory of each side in a process of its own."""
    options = ["--peer", "dense", "--size", "256x1024x16", "--dims", "-", "--rounds", "3"]
    (found,) = run_benchmark("infonce", *options)
    assert (found["name"], found["peer"]) == ("loss 256x1024x16 dims 16", "dense")
    assert found["rounds"] == 3 and found["rate"] > 0 and found["peer_rate"] > 0
    assert found["ratio_min"] <= found["ratio"] <= found["ratio_max"]
    assert found["peer_peak_mib"] >= 1  # at least the scores, 1 MiB
    assert 0 < found["gradient_error"] < 1e-5 and 0 < found["peer_gradient_error"] < 1e-5
