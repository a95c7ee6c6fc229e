"""python -m losses.check: real experiments pass, and faults that others ship are caught by name."""

import dataclasses
import json
import subprocess
import sys
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

from conf.schema import LossConfig
from losses import check, comparisons, comparisons_kernels, infonce, tiny
from losses.comparisons import Row, Subject, Values, compare_ranks

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def one_thread():
    """Models of a few thousand weights compute faster than a second thread wakes up."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.mark.slow
def test_command_passes_on_the_quickstart(tmp_path):
    """All of it as a user runs it: Hydra, three processes, table, file, exit code."""
    file = tmp_path / "check.json"
    done = subprocess.run(
        [sys.executable, "-m", "losses.check", "+experiment=quickstart", "--json", str(file)],
        cwd=ROOT, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    content = json.loads(file.read_text())
    assert content["experiment"] == "quickstart" and content["ok"]
    assert content["versions"]["torch"] == torch.__version__
    rows = {row["name"]: row for row in content["comparisons"]}
    for name in ("cached = direct", "any chunking", "any activation budget", "2 processes",
                 "3 processes", "chunked = specification", "one Matryoshka sweep",
                 "relatives by ids = by mask"):  # fmt: skip
        assert rows[name]["bound"] == 1e-9 and 0 <= rows[name]["difference"] <= 1e-9
        assert f"ok   {name} " in done.stdout
    assert all(row.keys() == {"name", "what", "difference", "bound", "ok"} for row in rows.values())
    shares = rows["any activation budget"]["what"].removeprefix("share replayed: ").split(", ")
    assert shares[0] == "0.00" and shares[-1] == "1.00" and len(shares) > 2, "some kept, some not"


def run(monkeypatch, *args: str) -> int:
    monkeypatch.setattr(sys, "argv", ["check.py", *args])
    for name, value in (("HF_HUB_OFFLINE", "1"), ("TRANSFORMERS_VERBOSITY", "error")):
        monkeypatch.setenv(name, value)  # the command sets them: this takes it back
    try:
        check.main()
    except SystemExit as left:
        return left.code
    return 0


def test_exit_code_and_file_say_what_is_out_of_bounds(monkeypatch, tmp_path, capsys):
    """nan compares false with everything: it must count as out of bounds, and JSON has no nan."""
    rows = [Row("fine", "", 1e-12, 1e-9), Row("broken", "", float("nan"), 1e-9)]
    monkeypatch.setattr(check, "check", lambda c: ("a model", rows))
    file = tmp_path / "check.json"
    assert run(monkeypatch, "+experiment=toy", f"--json={file}") == 1
    out, err = capsys.readouterr()
    assert "FAIL broken" in out and "ok   fine" in out and "out of bounds: broken" in err
    content = json.loads(file.read_text())
    assert not content["ok"] and content["comparisons"][1]["difference"] is None
    assert content["not_checked"] == [] and "not checked" not in out
    monkeypatch.setattr(check, "check", lambda c: ("a model", rows[:1]))
    words = "loss.backend=triton", "runtime.compile=true", f"--json={file}"
    assert run(monkeypatch, "+experiment=toy", *words) == 0
    assert "not checked: loss.backend=triton: kernels have no float64" in capsys.readouterr().out
    assert len(json.loads(file.read_text())["not_checked"]) == 2


@pytest.mark.slow
def test_an_experiment_with_kernels_has_rows_of_them():
    """They run in a process of their own, with Triton's interpreter where there is no GPU."""
    pytest.importorskip("triton")
    c = LossConfig(backend="triton", symmetric=0.5)
    rows = list(comparisons_kernels.compare_kernels(comparisons_kernels.start(c)))
    assert [row.name for row in rows] == ["kernels, temperature 0.1", "kernels, temperature 0.03"]
    assert all(row.ok and "fused" in row.what for row in rows)
    assert comparisons_kernels.start(LossConfig()) is None


def test_a_process_of_kernels_that_fails_is_a_row_out_of_bounds():
    """It must not look as if there was nothing to compare."""
    command = [sys.executable, "-S", "-c", "raise RuntimeError('no kernel')"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = subprocess.Popen(command, text=True, **pipes)
    (row,) = comparisons_kernels.compare_kernels(process)
    assert not row.ok and "RuntimeError: no kernel" in row.what


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["+experiment=quikstart"], "did you mean quickstart"),
        (["optim.lrr=1"], "did you mean optim.lr"),
        (["loss.temperature=0"], "loss.temperature (0.0) must be > 0"),
        (["model.base=./nowhere"], "no such folder"),
        (["-m", "seed=1,2"], "takes no -m"),
        (["--json"], "want a file"),
        (["model=custom"], "model.base is not set"),
        (["loss.dims=[1000]"], "loss.dims [1000] must be <= 384"),
    ],
)
def test_what_cannot_be_run_is_a_message(args, message, monkeypatch, capsys):
    """The same words as train.py's, exit code 2, no traceback."""
    assert run(monkeypatch, *args) == 2
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err


def test_what_only_training_needs_may_be_missing(monkeypatch):
    """data.root and a guide's folder are not read; one's own folder of experiments is."""
    for loss in ("gist", "in_batch_kl"):
        c, name = check.compose(["+experiment=ray_docs", f"loss={loss}"])
        assert name == "ray_docs" and (c.loss.guide or c.loss.teacher)
    assert run(monkeypatch, "--help") == 0


def test_an_experiment_in_a_folder_of_its_own(tmp_path):
    """Hydra's --config-dir, with a path that its grammar would not take."""
    folder = tmp_path / "my experiments=1" / "experiment"
    folder.mkdir(parents=True)
    text = "# @package _global_\ndefaults:\n  - override /loss: gte\nname: mine\n"
    (folder / "mine.yaml").write_text(text)
    c, name = check.compose(["+experiment=mine", "--config-dir", str(folder.parent)])
    assert name == "mine" and "passage_query" in c.loss.negatives


# ---- planted faults ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def subject(tmp_path_factory) -> Subject:
    """The quickstart: Matryoshka, symmetric, half of its layers frozen."""
    c, _ = check.compose(["+experiment=quickstart"])
    small, _ = tiny.shrink(c, tmp_path_factory.mktemp("check") / "base")
    subject = Subject(small)
    assert subject.budgets_mib
    return subject


def failed(subject: Subject) -> set[str]:
    chosen = (
        comparisons.compare_chunks, comparisons.compare_reported, comparisons.compare_temperature,
        comparisons.compare_formula, comparisons.compare_margins, comparisons.compare_precision,
        comparisons.compare_extremes,
    )  # fmt: skip
    return {row.name for compare in chosen for row in compare(subject) if not row.ok}


def test_nothing_is_found_where_nothing_is_wrong(subject):
    """Else the tests below prove nothing."""
    assert failed(subject) == set()


def with_step(monkeypatch, change) -> None:
    """change(towers, loss_fn, batch, step) in place of train_step."""
    step = comparisons.train_step

    def changed(towers, loss_fn, batch, **options):
        def original(batch=batch):
            return step(towers, loss_fn, batch, **options)

        return change(towers, loss_fn, batch, original)

    monkeypatch.setattr(comparisons, "train_step", changed)


def scaled_gradients(factor_of):
    def change(towers, loss_fn, batch, original):
        result = original()
        for p in towers.parameters():
            if p.grad is not None:
                p.grad *= factor_of(loss_fn, batch)
        return result

    return change


def test_fault_1_gradient_is_b_times_that_of_the_reported_loss(subject, monkeypatch):
    """PyLate's cached loss: every number it prints is right, and its learning rate is B-fold."""
    with_step(monkeypatch, scaled_gradients(lambda loss_fn, batch: len(batch.query_tokens)))
    assert failed(subject) == {
        "gradient of the reported loss", "any chunking", "any chunking, small batch"
    }  # fmt: skip


def test_fault_2_cached_path_ignores_the_temperature(subject, monkeypatch):
    """Tevatron's: the gradient fits the reported loss, which is another loss than was asked for."""

    def change(towers, loss_fn, batch, original):
        with torch.no_grad():
            loss_fn.log_temperature.fill_(0.0)
        return original()

    with_step(monkeypatch, change)
    assert failed(subject) == {
        "the configured temperature", "any chunking", "any chunking, small batch"
    }  # fmt: skip


def test_fault_3_chunks_by_query_count_lose_the_hard_negatives(subject, monkeypatch):
    """contrastors': of all passages as many are encoded as there are queries."""

    def change(towers, loss_fn, batch, original):
        B = len(batch.query_tokens)
        is_left_P = batch.pair_passage_P < B
        lost = dataclasses.replace(
            batch,
            passage_tokens=batch.passage_tokens[:B],
            passage_prompt_tokens_N=batch.passage_prompt_tokens_N[:B],
            num_passages_global=B,
            pair_query_P=batch.pair_query_P[is_left_P],
            pair_passage_P=batch.pair_passage_P[is_left_P],
            pair_weight_P=batch.pair_weight_P[is_left_P],
            relatives_BK=batch.relatives_BK * (batch.relatives_BK < B) - (batch.relatives_BK >= B),
        )
        return original(lost)

    with_step(monkeypatch, change)
    assert {"any chunking", "any chunking, small batch"} <= failed(subject)


def test_a_weight_that_a_replay_under_autocast_leaves_out(subject, monkeypatch):
    """What a copy of a weight does that was made without a graph, in versions of torch that keep
    such copies: with a budget that keeps every graph there is none."""
    step = comparisons.train_step

    def changed(towers, *args, **options):
        result = step(towers, *args, **options)
        if options["autocast"] is not nullcontext and result[1]["replayed_share"] == 1:
            next(p for p in towers.parameters() if p.grad is not None and p.ndim == 2).grad = None
        return result

    monkeypatch.setattr(comparisons, "train_step", changed)
    (row,) = comparisons.compare_autocast(subject)
    assert row.difference == pytest.approx(1)
    assert failed(subject) == set(), "nothing else runs under autocast"


def test_fault_7_fixed_maximum_is_not_finite(subject, monkeypatch):
    """memeff's: e^{z - 1/temperature} of every candidate vanishes, the log of the sum is -inf."""
    original = infonce.similarity_sums

    def fixed_maximum(q_BD, p_ND, scale, **options):
        sums = original(q_BD, p_ND, scale, **options)
        sums.row_MB = (sums.row_MB - scale).exp().log() + scale
        return sums

    monkeypatch.setattr(infonce, "similarity_sums", fixed_maximum)
    caught = failed(subject)
    assert "finite at temperature .01" in caught
    assert "the configured temperature" not in caught, "at .025 and above it is right"


@contextmanager
def softplus_as(function):
    original, infonce.F = infonce.F, SimpleNamespace(softplus=function)
    try:
        yield
    finally:
        infonce.F = original


def with_softplus(monkeypatch, function, wanted) -> None:
    """`function` in place of softplus in InfoNCE wherever wanted(config, queries)."""
    original = infonce.InfoNCE.forward

    def forward(self, q_BD, *rest):
        with softplus_as(function) if wanted(self.c, q_BD) else nullcontext():
            return original(self, q_BD, *rest)

    monkeypatch.setattr(infonce.InfoNCE, "forward", forward)


def test_fault_7_a_margin_that_is_not_positive_masks_the_positive(subject, monkeypatch):
    """memeff's: left out of its own denominator, a positive makes the loss ln - z, below 0."""
    with_softplus(
        monkeypatch,
        lambda x, threshold: x,
        lambda c, q_BD: c.false_negative_margin is not None and c.false_negative_margin <= 0,
    )
    assert failed(subject) == {"a margin <= 0 keeps the positive"}


def test_fault_7_gradients_scaled_by_the_root_of_b_times_temperature(subject, monkeypatch):
    """memeff's default."""

    def factor(loss_fn, batch):
        return (len(batch.query_tokens) * loss_fn.temperature.item()) ** 0.5

    with_step(monkeypatch, scaled_gradients(factor))
    assert failed(subject) == {
        "gradient of the reported loss", "any chunking", "any chunking, small batch"
    }  # fmt: skip


class RoundedSoftplus(torch.autograd.Function):
    """Its derivative 1 - P(positive), P rounded to bfloat16 before."""

    @staticmethod
    def forward(ctx, x, threshold):
        ctx.save_for_backward(x)
        return F.softplus(x, threshold=threshold)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - torch.sigmoid(-x).bfloat16().to(x.dtype)), None


def test_fault_7_rounding_the_positive_probability(subject, monkeypatch):
    """memeff's: right at a loss of 2, 10% off at 1e-2, over 100% at 7e-4."""
    with_softplus(monkeypatch, RoundedSoftplus.apply, lambda c, q_BD: q_BD.dtype == torch.bfloat16)
    assert failed(subject) == {"bfloat16 inputs"}


def test_a_rank_that_differs_and_a_process_that_fails_are_out_of_bounds(subject, tmp_path):
    """Faults cannot be planted in other processes; what those write is made up here."""
    one = {id(s): comparisons.direct(subject, s, subject.towers)
           for s in (subject.sample, subject.small)}  # fmt: skip

    def write(change) -> Row:
        for name, s, _ in subject.splits(2):
            for rank in range(2):
                gradients = {n: g * change(rank) for n, g in one[id(s)].gradients.items()}
                values = Values(one[id(s)].loss, gradients)
                torch.save((values.loss, values.gradients), tmp_path / f"{name}-{rank}.pt")
        (row,) = compare_ranks(subject, [], tmp_path, (2,))
        return row

    assert write(lambda rank: 1.0).ok
    assert write(lambda rank: 0.5).difference == pytest.approx(0.5), "a mean over ranks"
    assert not write(lambda rank: 1 + 1e-8 * rank).ok
    dead = SimpleNamespace(join=lambda timeout: None, exitcode=1)
    (row,) = compare_ranks(subject, [dead], tmp_path, (2,))
    assert not row.ok and "failed" in row.what
