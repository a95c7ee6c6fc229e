"""The one command for a GPU cannot run here: its plan, its clock and its arithmetic can."""

import csv
import io
import time

import pytest

from benchmarks import ceilings, gpu, infonce, share
from benchmarks.gpu import FIVE, Run, full_parts, goals, parts
from benchmarks.infonce_sides import SIDES

PARSERS = {
    "benchmarks.infonce": infonce.arguments,
    "benchmarks.ceilings": ceilings.arguments,
    "benchmarks.share": share.arguments,
}


def test_the_plan_takes_less_than_eight_minutes_and_reaches_the_sizes_of_the_goals():
    assert sum(part.limit_s for part in parts()) <= gpu.TOTAL_S < 8 * 60
    assert sum(part.limit_s for part in full_parts()) <= gpu.FULL_S
    cases = {
        (case.kind, case.B, case.dims)
        for part in parts()
        for module, *options in part.commands
        if module == "benchmarks.infonce"
        for case in infonce.cases_of(infonce.arguments(options))
    }
    five = tuple(int(d) for d in FIVE.split(","))
    for B in (8192, 32768, 65536):
        assert {("one-sided", B, ()), ("two-sided", B, ()), ("one-sided", B, five)} <= cases
    commands = [" ".join(command) for part in parts() for command in part.commands]
    assert any("test_ahead_of_time.py" in c and "-k 90" in c for c in commands)  # no spills there
    largest = max(
        case.B
        for part in full_parts()
        for module, *options in part.commands
        if module == "benchmarks.infonce"
        for case in infonce.cases_of(infonce.arguments(options))
    )
    assert largest == 262_144


@pytest.mark.parametrize("part", full_parts(), ids=lambda part: part.name)
def test_every_command_of_the_plan_is_understood(part):
    """A misspelt option would show after ten minutes of a lent device."""
    for module, *options in part.commands:
        if module in PARSERS:
            args = PARSERS[module](options)
            assert args.device == "cuda"
            if module == "benchmarks.infonce":  # every side is there for a loss of the command
                assert all(set(args.loss) & set(SIDES[side].kinds) for side in args.peer)


@pytest.mark.slow
def test_a_part_that_overruns_is_cut_and_the_next_one_runs(tmp_path, monkeypatch):
    """Eight minutes are eight minutes."""
    monkeypatch.setattr(gpu, "LEAST_S", 0)
    log = io.StringIO()
    run = Run(tmp_path, log, total_s=600)
    sleeps = (
        "timeit",
        "-n1",
        "-r1",
        "-s",
        "print('begun', flush=True)",
        "__import__('time').sleep(60)",
    )
    began = time.monotonic()
    assert run.command(sleeps, began + 3) == "cut off"
    assert time.monotonic() - began < 15
    assert run.command(("timeit", "-n1", "-r1", "1"), time.monotonic() + 30) == "done"
    assert run.command(("timeit", "--bad"), time.monotonic() + 30).startswith("failed (")
    assert "begun" in log.getvalue()
    assert Run(tmp_path, log, total_s=0).part(parts()[1]).endswith("not run: no time left")


@pytest.mark.slow
def test_the_losses_of_a_part_share_a_worker_and_leave_rows(tmp_path):
    """What is measured goes to the file, and what is late is counted."""
    log = io.StringIO()
    run = Run(tmp_path, log, total_s=600)
    options = ("--device", "cpu", "--size", "32x32x16", "--dims", "-", "--peer", "dense")
    assert (
        run.losses([options, (*options, "--loss", "two-sided")], time.monotonic() + 300) == "done"
    )
    assert [r["kind"] for r in run.rows] == ["one-sided", "two-sided"]
    assert (tmp_path / "infonce.csv").read_text().count("\n") == 3
    assert run.losses([options], time.monotonic()) == "1 of 1 rows not measured: no time left"


def test_goals_take_the_best_path_and_the_best_peer():
    def row(kind: str, dims: str, ours: float, peer: str, peer_ms: float | str) -> dict:
        name = f"loss {'' if kind == 'one-sided' else kind + ' '}65536x65536x768 dims {dims}"
        return {
            **{"kind": kind, "precision": "bf16", "name": name, "cosine": 0.4, "ours": "rook"},
            **{"ms": ours, "peer": peer, "peer_ms": peer_ms, "beyond_mib": 900.0},
            **{"peer_beyond_mib": 700.0, "gradients": 2, "gradient_error": 2e-3},
            **{"peer_gradients": 2, "peer_gradient_error": 2e-3},
        }

    rows = [
        row("one-sided", "768", 50.0, "rook-eform", 38.0),
        row("one-sided", "768", 50.0, "dense", 95.0),
        row("one-sided", "768", 50.0, "memeff", ""),
        row("one-sided", FIVE, 57.0, "memeff", 171.0),
    ]
    found = {what: value for what, value, _ in goals(rows)}
    assert found["one-sided"] == "38 ms (rook-eform)"
    assert found["one-sided against the best peer"] == "2.50 (dense / rook-eform)"
    assert found["one-sided beyond inputs and gradients"] == "700 MiB (rook-eform)"
    assert found["two-sided"] == "not measured"
    assert found["five dims over one"] == "1.50 (rook / rook-eform)"
    assert found["five dims against the best peer"] == "3.00 (memeff / rook)"


def test_goals_leave_out_sides_without_both_gradients_or_with_wrong_ones():
    """A side with half of the work, or a broken one, would be the best of all."""
    row = {"kind": "one-sided", "precision": "bf16", "cosine": 0.4, "ours": "rook", "ms": 30.0}
    row |= {"name": "loss 65536x65536x768 dims 768", "beyond_mib": 1.0, "peer_beyond_mib": 1.0}
    row |= {"gradients": 2, "gradient_error": 0.3, "peer_gradients": 2}
    half = {"peer": "memeff", "peer_ms": 40.0, "peer_gradients": 1, "peer_gradient_error": 1e-3}
    dense = {"peer": "dense", "peer_ms": 90.0, "peer_gradient_error": 2e-3}
    eform = {"peer": "rook-eform", "peer_ms": 45.0, "peer_gradient_error": 2e-3}
    wrong = {"peer": "inf-cl", "peer_ms": 41.0, "peer_gradient_error": float("nan")}
    rows = [row | x for x in (half, dense, eform, wrong)]
    found = {what: value for what, value, _ in goals(rows)}
    assert found["one-sided"] == "45 ms (rook-eform)"
    assert found["one-sided against the best peer"] == "2.00 (dense / rook-eform)"
    reasons = {k.removeprefix("not counted: "): v for k, v in found.items() if "not counted" in k}
    assert reasons == {
        "rook, one-sided, dims 768": "30 ms, its gradient is 0.3 off",
        "memeff, one-sided, dims 768": "40 ms, the gradient of one side alone",
        "inf-cl, one-sided, dims 768": "41 ms, its gradient is nan off",
    }


def test_a_part_may_take_what_earlier_ones_left_over(tmp_path, monkeypatch):
    """Seconds of a part that ends early are those of a lent device."""
    run, ends = Run(tmp_path, io.StringIO(), total_s=100), []
    monkeypatch.setattr(run, "command", lambda command, end: ends.append(end) or "done")
    run.part(gpu.Part("short", 5, (("timeit",),)), later_s=30)
    run.part(gpu.Part("last", 30, (("timeit",),)))
    assert [end - run.deadline for end in ends] == [-30, 0]
    for part in full_parts():  # what is cut is the small end
        for module, *options in part.commands:
            if module == "benchmarks.infonce" and part.name.startswith(("all", "widths")):
                sizes = [case.B for case in infonce.cases_of(infonce.arguments(options))]
                assert sizes[0] == max(sizes)


def test_a_killed_run_leaves_every_cell_it_measured(tmp_path, monkeypatch):
    """A command on a lent device ends after ten minutes, whatever it is doing."""

    def killed(cells, *, report, **options):
        for ms, cell in enumerate(cells, 1):
            if ms == 4:
                raise KeyboardInterrupt
            report(cell, {"ms": float(ms), "calls": 5, "gradients": 2, "note": ""})

    monkeypatch.setattr(infonce, "run_cells", killed)
    gpu_rows = tmp_path / "infonce.csv"
    gpu_rows.write_text("name,peer\ncommitted,dense\n")
    run = Run(tmp_path, io.StringIO(), total_s=100)
    options = ("--device", "cuda", "--size", "65536x65536x768", "--dims", "-", "--peer")
    with pytest.raises(KeyboardInterrupt):
        run.losses([(*options, "dense"), (*options, "dense", "--loss", "two-sided")], 1e9)
    with (tmp_path / gpu.CELLS).open("a") as file:
        file.write('{"case": {"ki')  # killed while it wrote
    monkeypatch.setattr("sys.argv", ["gpu", "--rebuild", "--out", str(tmp_path)])
    for _ in range(2):  # rows are not written twice
        gpu.main()
        saved = list(csv.DictReader(gpu_rows.open()))
        assert [r["name"].split(" ")[0] for r in saved] == ["committed", "loss", "loss"]
    one, two = saved[1:]
    wanted = [["one-sided", "1.0", "dense", "2.0"], ["two-sided", "3.0", "", ""]]
    assert [[r[k] for k in ("kind", "ms", "peer", "peer_ms")] for r in (one, two)] == wanted
    assert one["date"] and "B = N = 65,536" in (tmp_path / "summary.txt").read_text()


def test_ceilings_are_of_the_work_that_was_done(monkeypatch):
    """A factor of two in the operations would move every share of the peak."""
    import torch

    options = ["--rows", "64", "--chunk", "16", "--width", "8", "--square", "32", "--copy-mib", "1"]
    args = ceilings.arguments([*options, "--precision", "fp32"])
    found = {name: work for name, work, _, _ in ceilings.jobs(args, torch.device("cpu"))}
    assert found["copy"] == pytest.approx(2 * 2**20 * 1e-12)
    assert found["product 32 x 32 x 32"] == pytest.approx(2 * 32**3 * 1e-12)
    assert {v for k, v in found.items() if "N 64" in k} == {2 * 16 * 64 * 8 * 1e-12}
    for _, _, _, call in ceilings.jobs(args, torch.device("cpu")):
        call()


def test_ceilings_are_written_one_by_one(tmp_path, monkeypatch):
    """A killed process leaves what it has measured."""
    times = iter([3.0, 4.0])

    def milliseconds(call, device):
        try:
            return next(times)
        except StopIteration:
            raise KeyboardInterrupt from None

    monkeypatch.setattr(ceilings, "milliseconds", milliseconds)
    options = ["--rows", "64", "--chunk", "16", "--width", "8", "--square", "32", "--copy-mib", "1"]
    options += ["--device", "cpu", "--precision", "fp32", "--csv", "--out", str(tmp_path)]
    monkeypatch.setattr("sys.argv", ["ceilings", *options])
    with pytest.raises(KeyboardInterrupt):
        ceilings.main()
    assert [r["ms"] for r in csv.DictReader((tmp_path / "ceilings.csv").open())] == ["3.0", "4.0"]


@pytest.mark.slow
def test_the_share_of_a_step_is_the_loss_over_loss_and_encoding():
    """Encoding is measured on one pack and grows with the batch."""
    import torch

    options = ["--encoder", "tiny", "--batch", "16", "64", "--side", "dense", "rook-eform"]
    args = share.arguments([*options, "--pack-tokens", "64", "--query-tokens", "8",
                            "--passage-tokens", "32"])  # fmt: skip
    kept = []
    rows = share.rows_of(args, torch.device("cpu"), kept.extend)
    assert len(rows) == 8 and len(kept) == 4  # as measured, one by one
    assert all(row in rows and row["side"] == "dense" for row in kept)
    for row in rows:
        assert row["encode_ms"] == pytest.approx(row["batch"] * row["pair_ms"], rel=1e-3)
        if row["side"] == "dense":
            whole_ms = row["loss_ms"] + row["encode_ms"]
            # three digits: up to half a percent
            assert row["share"] == pytest.approx(row["loss_ms"] / whole_ms, rel=6e-3)
        else:
            assert row["loss_ms"] == "" and row["note"] == "does not run on cpu"


def test_a_frozen_tower_runs_forward_alone(monkeypatch):
    """What each kind of passage tower is timed on; two measured times would differ by chance."""
    import torch

    backward = torch.Tensor.backward
    went_back = []
    monkeypatch.setattr(
        torch.Tensor, "backward", lambda self, *a: (went_back.append(self), backward(self, *a))
    )

    def milliseconds(call, device):
        went_back.clear()
        call()
        return 3.0 if went_back else 1.0

    monkeypatch.setattr(share, "milliseconds", milliseconds)
    device = torch.device("cpu")
    tower = share.random_tower("tiny", device)
    packed = share.random_pack(64, 8, device)
    assert share.text_ms(tower, packed, "fp32", device) == {"trained": 3 / 8, "frozen": 1 / 8}
