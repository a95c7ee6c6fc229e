"""losses.check on rerankers, and on retrievers that learn their scores."""

import pytest
import torch

from conf.cli import list_experiments, task_of
from losses import check, comparisons, comparisons_rerank, tiny

RERANKERS = [name for name in list_experiments() if task_of(name) == "rerank"]


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few thousand weights compute faster than a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def failures(folder, of, chosen, *args: str) -> dict[str, float]:
    """What is out of bounds, of some comparisons on a command line's words."""
    c, _ = check.compose([*args])
    small, _ = tiny.shrink(c, folder / "tiny")
    subject = of.Subject(small)
    rows = [row for compare in chosen for row in compare(subject)]
    assert len(rows) >= len(chosen)
    return {row.name: row.difference for row in rows if not row.ok}


@pytest.mark.parametrize("name", RERANKERS)
def test_rerankers_of_this_repository(name, tiny_base, tmp_path):
    """Every comparison but that of processes, which test_grad_cache_groups.py makes."""
    args = f"+experiment={name}", f"model.base={tiny_base}", "data.root=x"
    chosen = comparisons_rerank.COMPARISONS
    assert failures(tmp_path, comparisons_rerank, chosen, *args) == {}


@pytest.mark.slow
def test_the_command_compares_processes_too(tmp_path):
    """Two processes of their own, in which a base that is not at hand is a BERT's."""
    c, _ = check.compose(["+experiment=arabic_reranker", "data.root=x", "loss=margin_mse"])
    what, rows = check.check(c, sizes=(2,))
    assert "bert head on cls; margin_mse" in what
    assert all(row.ok for row in rows) and rows[-1].name == "2 processes"


def test_a_gradient_that_is_not_of_the_reported_mean_is_caught(tiny_base, tmp_path, monkeypatch):
    """PITFALLS 1, planted: the gradient times the number of groups."""
    step = comparisons_rerank.train_step

    def faulty(model, loss_fn, batch, **options):
        done = step(model, loss_fn, batch, **options)
        for p in model.parameters():
            if p.grad is not None:
                p.grad *= batch.num_examples
        return done

    monkeypatch.setattr(comparisons_rerank, "train_step", faulty)
    args = "+experiment=arabic_reranker", f"model.base={tiny_base}", "data.root=x"
    chosen = comparisons_rerank.compare_cached, comparisons_rerank.compare_mean
    found = failures(tmp_path, comparisons_rerank, chosen, *args)
    assert found.keys() == {"cached = direct", "mean over groups"}


@pytest.mark.parametrize("kind", ["margin_mse", "kl"])
def test_retrievers_that_learn_scores(kind, tiny_base, tmp_path):
    """Own negatives, several positives, a missing score, Matryoshka."""
    chosen = (
        comparisons.compare_cached, comparisons.compare_budgets, comparisons.compare_reported,
        comparisons.compare_dims,
    )  # fmt: skip
    args = "+experiment=toy", f"model.base={tiny_base}", f"loss={kind}", "loss.dims=[16,8]"
    assert failures(tmp_path, comparisons, chosen, *args, "loss.temperature=0.05") == {}
