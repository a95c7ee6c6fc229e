"""The benchmarks run on a tiny model, and what they write has the keys that readers of it
expect."""

import csv
import json
import mmap
import sys
import time

import pytest
import torch
from safetensors.torch import load_file

from benchmarks import peer_run
from benchmarks.step import set_dropout
from benchmarks.turns import PeakMemory, append_csv, interleaved, row


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("step", ["--pairs", "32", "--batch", "8"]),
        ("step", ["--peer", "sentence-transformers-cached", "--batch", "12", "--mini-batch", "5"]),
        ("encode", ["--texts", "24", "--passes", "2"]),
    ],
    ids=["step", "step-cached", "encode"],
)
def test_a_benchmark_runs_both_sides(name, options, tiny_base, run_benchmark):
    """One round against the real peer: a worker that dies, or a rate of the wrong thing, shows."""
    model = ["--base", str(tiny_base), "--precision", "fp32", "--length", "32", "--rounds", "1"]
    (found,) = run_benchmark(name, *model, *options)
    assert found["rate"] > 0 and found["peer_rate"] > 0 and found["peak_mib"] > 50
    assert found["ratio"] == pytest.approx(found["rate"] / found["peer_rate"], rel=0.01)


@pytest.mark.slow
def test_a_whole_run_of_the_peer_saves_what_it_trained(tiny_base, tmp_path, capsys):
    """evaluate.py judges it beside ours, so it must be the trained weights."""
    folder = tmp_path / "set"
    (folder / "qrels").mkdir(parents=True)
    for name, letter in (("corpus", "d"), ("queries", "q")):
        rows = [{"_id": f"{letter}{n}", "text": f"{letter} {n} fish"} for n in range(16)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    (folder / "qrels/train.tsv").write_text("".join(f"q{n}\td{n}\t1\n" for n in range(16)))
    out = tmp_path / "peer"
    given = ["--data", str(folder), "--out", str(out), "--base", str(tiny_base), "--device", "cpu"]
    args = peer_run.arguments([*given, "--dims", "16", "8", "--batch", "4", "--lr", "0.1"])
    found = peer_run.train(args)
    assert (found["pairs"], found["steps"]) == (16, 4) and found["train_s"] > 0
    assert sorted(p.name for p in tmp_path.iterdir()) == ["peer", "set"]
    before, after = (load_file(folder / "model.safetensors") for folder in (tiny_base, out))
    assert any(not torch.equal(before[name], after[name]) for name in before)
    with pytest.raises(SystemExit):
        peer_run.arguments([*given, "--batch", "4"])
    assert "is there already" in capsys.readouterr().err


def test_the_peer_drops_what_we_drop(tiny_base):
    """Attention dropout, which ours lacks, slowed the peer alone."""
    from transformers import AutoModel

    model = AutoModel.from_pretrained(tiny_base)
    set_dropout(model, 0.25, 0.0)
    share = {n: m.p for n, m in model.named_modules() if isinstance(m, torch.nn.Dropout)}
    of_attention = {n for n in share if ".self." in n}
    assert len(of_attention) == 2 and len(share) == 7  # two layers; embeddings, two outputs each
    assert all(p == (0.0 if n in of_attention else 0.25) for n, p in share.items())


def test_ratio_is_the_median_of_the_rounds():
    """A slow minute meets both sides of its round: ratios first, then the median."""
    ours = [{"rate": r, "peak_mib": 1, "device": "cpu"} for r in (10.0, 2.0, 8.0)]
    peer = [{"rate": r, "peak_mib": 2, "device": "cpu"} for r in (5.0, 1.0, 2.0)]
    found = row("x", "peer", "fp32", {"rook": ours, "peer": peer})
    assert found["ratio"] == 2.0 and found["ratio_max"] == 4.0


def test_interleaved_turns_the_order_round_and_leaves_the_first_call_out():
    """Whoever always comes second finds warm caches; a first call loads libraries."""
    seen: list[str] = []
    calls = {side: (lambda turn, side=side: seen.append(f"{side}{turn}")) for side in "ab"}
    seconds = interleaved(calls, 2, torch.device("cpu"))
    assert seen == ["a0", "b0", "b1", "a1", "a2", "b2"]
    assert [len(s) for s in seconds.values()] == [2, 2]


def test_peak_memory_sees_a_buffer_that_is_gone():
    """Looking now and then misses a short peak; looking at the end misses it too."""
    with PeakMemory(torch.device("cpu")) as memory:
        # not from the allocator, which may have freed memory of earlier tests at hand
        with mmap.mmap(-1, 100 * 2**20) as buffer:
            buffer.write(b"x" * 100 * 2**20)
    assert 95 < memory.grown_mib < 250
    with PeakMemory(torch.device("cpu")) as memory:
        pass
    assert memory.grown_mib < 50  # the peak before does not count


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="malloc tells on glibc alone")
def test_memory_in_use_leaves_out_what_was_freed():
    """Resident memory never says how much of it a step needs: freed buffers stay."""
    with PeakMemory(torch.device("cpu"), in_use=True) as memory:
        for _ in range(3):  # in use at one time: one of them
            held = torch.ones(25 * 2**20)
            time.sleep(0.05)  # a fast machine fills it between two looks
            del held
    assert 95 < memory.in_use_mib < 110


def test_csv_keeps_old_rows_when_a_column_is_new(tmp_path):
    """Measurements are appended for years; a new column must not shift the old ones."""
    path = tmp_path / "rows.csv"
    append_csv(path, [{"a": 1, "b": 2}])
    append_csv(path, [{"a": 3, "c": "4,5"}])
    assert list(csv.DictReader(path.open())) == [
        {"a": "1", "b": "2", "c": ""},
        {"a": "3", "b": "", "c": "4,5"},
    ]


def test_old_rows_outlive_a_process_that_is_killed_while_it_writes(tmp_path):
    """The file holds committed rows of other machines."""
    path = tmp_path / "rows.csv"
    append_csv(path, [{"a": 1}])

    class Killed:
        def __str__(self) -> str:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        append_csv(path, [{"a": 2}, {"a": Killed()}])
    assert path.read_text() == "a\n1\n"
