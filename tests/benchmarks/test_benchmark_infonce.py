"""The loss benchmark compares things that compute the same loss.

Shapes: B queries, N passages, D embedding.
"""

import pytest
import torch
import torch.nn.functional as F

from benchmarks.infonce import SIDES, TEMPERATURE, embeddings, gradient_error, truth


@pytest.mark.parametrize("dims", [(), (24, 10, 5)], ids=["one dim", "three dims"])
@pytest.mark.parametrize("side", SIDES)
def test_every_side_computes_the_same_loss_and_gradients(side, dims):
    """A side that left out the hard negatives, weighted the dims otherwise or forgot to normalise a
    prefix again would be timed at other work."""
    if not SIDES[side].is_here():
        pytest.skip(f"{side} is not in this environment")
    q_BD, p_ND = embeddings(37, 90, 24, cosine=0.4)
    wanted = truth(q_BD, p_ND, dims)
    found = SIDES[side].compute(q_BD, p_ND, dims)
    # float32 against float64 at logits up to 20: 20 * 6e-8 each
    torch.testing.assert_close(found[0].double(), wanted[0], rtol=1e-5, atol=0)
    assert gradient_error(found, wanted, q_BD, p_ND) < 1e-5
    assert found[1].shape == q_BD.shape and found[2].shape == p_ND.shape


def test_truth_is_the_mean_loss_and_its_gradient_whatever_its_chunk():
    """The float64 reference is summed by hand over chunks and dims: a wrong divisor would make all
    errors wrong alike."""
    q_BD, p_ND = (x.double() for x in embeddings(11, 23, 8, cosine=0.4))
    q_BD.requires_grad_()
    p_ND.requires_grad_()
    half = F.normalize(q_BD[:, :4], dim=1) @ F.normalize(p_ND[:, :4], dim=1).T
    row_B = torch.arange(11)
    loss = sum(F.cross_entropy(z / TEMPERATURE, row_B) / 2 for z in (q_BD @ p_ND.T, half))
    wanted = (loss, *torch.autograd.grad(loss, (q_BD, p_ND)))
    for rows in (4, 256):
        found = truth(q_BD.detach(), p_ND.detach(), [8, 4], rows=rows)
        torch.testing.assert_close(found, wanted, rtol=1e-12, atol=1e-14)


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
