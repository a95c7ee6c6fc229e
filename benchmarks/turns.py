"""Ours against a peer in one run: by turns, medians of paired ratios, peak memory.

Rows have the keys name, peer, precision, device, rate, peer_rate, ratio, peak_mib, peer_peak_mib,
and what else a benchmark adds.
"""

import csv
import ctypes
import gc
import json
import os
import platform
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from datetime import date
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import ClassVar

import torch

DATA = Path(__file__).parent / "data"


def run_worker(module: str, args: Sequence[str]) -> dict:
    """Run `python -m module args` and read the JSON object on the last line it prints.

    Raises SystemExit with the end of its output when it fails.
    """
    command = [sys.executable, "-m", module, *args]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[1])
    if done.returncode:
        raise SystemExit(
            f"{' '.join(command)} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}"
        )
    return json.loads(done.stdout.strip().splitlines()[-1])


def by_turns(
    module: str, sides: Sequence[str], args: Sequence[str], rounds: int
) -> dict[str, list[dict]]:
    """`rounds` results of each side, taken in turns so that a slow minute of the machine meets all
    of them."""
    results: dict[str, list[dict]] = {side: [] for side in sides}
    for turn in range(rounds):
        order = sides if turn % 2 == 0 else sides[::-1]
        for side in order:
            results[side].append(run_worker(module, ["--worker", side, *args]))
            print(
                f"  round {turn + 1}/{rounds} {side}: {results[side][-1]['rate']:.1f}/s",
                file=sys.stderr,
            )
    return results


def interleaved(
    calls: Mapping[str, Callable[[int], object]], rounds: int, device: torch.device
) -> dict[str, list[float]]:
    """Seconds of `rounds` calls of each side within this process, the order turned round each time.

    Two processes meet different minutes of a shared machine and different addresses; neighbouring
    calls in one process meet neither. A call is given the number of its round; round 0 warms up and
    is not counted.
    """
    seconds: dict[str, list[float]] = {side: [] for side in calls}
    for turn in range(rounds + 1):
        for side in list(calls) if turn % 2 == 0 else list(calls)[::-1]:
            synchronise(device)
            began = clock()
            calls[side](turn)
            synchronise(device)
            if turn:
                seconds[side].append(clock() - began)
    return seconds


def row(
    name: str, peer: str, precision: str, results: dict[str, list[dict]], ours: str = "rook"
) -> dict:
    """One comparison: medians of both sides; the ratio is the median of the ratios of each
    round."""

    def median(side: str, key: str) -> float:
        return statistics.median(r[key] for r in results[side])

    ratios = [a["rate"] / b["rate"] for a, b in zip(results[ours], results[peer], strict=True)]
    first = results[ours][0]
    return {
        "name": name,
        "peer": peer,
        "precision": precision,
        "device": first["device"],
        "rate": round(median(ours, "rate"), 2),
        "peer_rate": round(median(peer, "rate"), 2),
        "ratio": round(statistics.median(ratios), 3),
        "peak_mib": round(median(ours, "peak_mib")),
        "peer_peak_mib": round(median(peer, "peak_mib")),
        "rounds": len(ratios),
        "ratio_min": round(min(ratios), 3),
        "ratio_max": round(max(ratios), 3),
        **{k: v for k, v in first.items() if k not in ("rate", "peak_mib", "device", "losses")},
    }


def emit(rows: list[dict], *, csv_name: str | None, json_path: str | None) -> None:
    """Print a table; append to benchmarks/data/<csv_name> and write JSON when asked."""
    shown = ["name", "peer", "precision", "rate", "peer_rate", "ratio", "peak_mib", "peer_peak_mib"]
    cells = [shown] + [[str(r[k]) for k in shown] for r in rows]
    widths = [max(len(c[i]) for c in cells) for i in range(len(shown))]
    for line in cells:
        print(
            "  ".join(
                c.ljust(w) if i < 3 else c.rjust(w)
                for i, (c, w) in enumerate(zip(line, widths, strict=True))
            )
        )
    if json_path:
        Path(json_path).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    if csv_name:
        append_csv(DATA / csv_name, [r | provenance() for r in rows])


def main(arguments, compare, workers) -> None:
    """A benchmark's main: one side in this process with --worker, else all of them by turns."""
    args = arguments()
    if not args.worker:
        compare(args)
        return
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print; the last line of stdout is ours
    result = workers[args.worker](args)
    print(json.dumps(result), file=out)


def append_csv(path: Path, rows: list[dict]) -> None:
    """Append rows; when a row brings new columns old cells are empty. The file is written again
    beside itself and then takes its own place: old rows outlive a process that is killed here."""
    old = []
    if path.is_file():
        with path.open(encoding="utf-8") as file:
            old = list(csv.DictReader(file))
    columns = list(dict.fromkeys(k for r in [*old, *rows] for k in r))
    beside = path.with_name(path.name + ".tmp")
    with beside.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows([*old, *rows])
    os.replace(beside, path)


def provenance() -> dict[str, str]:
    """Date, command, machine and versions of a measurement."""
    versions = {}
    for package in ("torch", "transformers", "sentence-transformers", "triton"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            versions[package] = ""
    return {
        "date": date.today().isoformat(),
        "command": " ".join(
            ["python", "-m", f"benchmarks.{Path(sys.argv[0]).stem}", *sys.argv[1:]]
        ),
        "cpu": cpu_name(),
        "python": platform.python_version(),
        **versions,
    }


def cpu_name() -> str:
    """Model and the vector extensions that decide the matrix rate."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.is_file() else []
    name = next(
        (line.split(":")[1].strip() for line in lines if line.startswith("model name")),
        platform.machine(),
    )
    flags = next((line.split(":")[1].split() for line in lines if line.startswith("flags")), [])
    best = next((f for f in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if f in flags), "")
    return f"{name} x{torch.get_num_threads()} {best}".strip()


def device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


class PeakMemory:
    """Largest memory of this process while open, in MiB: resident on a CPU, allocated on CUDA.

    mib         the whole
    grown_mib   what it is above the state at the start
    in_use_mib  growth of what was in use at one time: resident memory holds freed buffers too, and
                glibc's heap has holes
    Linux keeps the mark of the highest resident memory itself; what is in use, and all elsewhere,
    is looked at every 10 ms, which misses a shorter peak. What is in use is looked at where asked
    for alone, and not while times are taken: malloc counts it under its locks.
    """

    def __init__(self, device: torch.device, *, in_use: bool = False):
        self.device, self._wants_in_use = device, in_use
        self.mib = self.grown_mib = self.in_use_mib = 0.0
        self._stop = threading.Event()

    def __enter__(self) -> "PeakMemory":
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
            self._start = torch.cuda.memory_allocated(self.device) / 2**20
            return self
        self._has_mark = _reset_mark()
        self._start = self.mib = resident_mib()
        self._start_in_use = self._in_use = in_use_mib()
        self._watch = threading.Thread(target=self._poll, daemon=True)
        if self._wants_in_use or not self._has_mark:
            self._watch.start()
        return self

    def _poll(self) -> None:
        while not self._stop.wait(0.01):
            if self._wants_in_use:
                self._in_use = max(self._in_use, in_use_mib())
            if not self._has_mark:
                self.mib = max(self.mib, resident_mib())

    def __exit__(self, *_: object) -> None:
        if self.device.type == "cuda":
            self.mib = torch.cuda.max_memory_allocated(self.device) / 2**20
            self.in_use_mib = self.mib - self._start
        else:
            self._stop.set()
            if self._watch.ident is not None:
                self._watch.join()
            self.mib = max(self.mib, _mark_mib()) if self._has_mark else self.mib
            self.in_use_mib = self._in_use - self._start_in_use
        self.grown_mib = self.mib - self._start


class _Mallinfo2(ctypes.Structure):
    """glibc's malloc.h"""

    _fields_: ClassVar = [
        (name, ctypes.c_size_t)
        for name in (
            *("arena", "ordblks", "smblks", "hblks", "hblkhd"),
            *("usmblks", "fsmblks", "uordblks", "fordblks", "keepcost"),
        )
    ]


@cache
def _mallinfo2() -> Callable[[], _Mallinfo2] | None:
    try:
        found = ctypes.CDLL(None).mallinfo2  # glibc 2.33
    except (AttributeError, OSError, TypeError):
        return None
    found.restype = _Mallinfo2
    return found


def in_use_mib() -> float:
    """What malloc has given out and not got back; resident memory where it does not say."""
    ask = _mallinfo2()
    if ask is None:
        return resident_mib()
    info = ask()
    return (info.uordblks + info.hblkhd) / 2**20


def _reset_mark() -> bool:
    """Set this process's mark of highest resident memory to what is resident now; False where it
    cannot be."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # 5: the mark alone (man 5 proc)
        return _mark_mib() > 0
    except OSError:
        return False


def _mark_mib() -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next((int(line.split()[1]) / 1024 for line in lines if line.startswith("VmHWM:")), 0.0)


def resident_mib() -> float:
    statm = Path("/proc/self/statm")
    if statm.is_file():
        return int(statm.read_text().split()[1]) * 4096 / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def release_freed_memory() -> None:
    """Give back what was freed, so that memory measured next is not found among the leftovers."""
    gc.collect()
    try:
        ctypes.CDLL(None).malloc_trim(0)  # glibc
    except (AttributeError, OSError, TypeError):  # elsewhere growth is a little too small
        pass


def synchronise(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def clock() -> float:
    return time.perf_counter()
