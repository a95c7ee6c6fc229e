"""Measurements of one side in one case each, in a process that a bad one cannot take along.

A kernel that reads out of bounds leaves a CUDA context in which nothing runs any more, and one that
hangs cannot be stopped from inside. So a worker goes through a list of cells and reports each; when
it dies or a cell overruns its time, the cell gets a row that says so, and a new worker takes the
rest. Time is asked of CUDA events around each call, the L2 cache swept before it.
"""

import json
import queue
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.infonce_sides import DTYPES, SIDES, Case
from benchmarks.infonce_truth import Truth, embeddings, gradient_error, truth
from benchmarks.turns import PeakMemory, clock, device_name, release_freed_memory

ROOT = Path(__file__).parents[1]
WORKER = (sys.executable, "-m", "benchmarks.infonce_cells")
CELL_LIMIT_S = 40.0  # compiling included
_SAMPLE = 1024  # rows whose gradients are compared with float64, where there are more
_L2_BYTES = 2**28  # several times any L2 cache
_TIMED_S, _MOST_CALLS = 0.6, 50
_NOT_RUN = "not run: no time left"


@dataclass(frozen=True)
class Cell:
    """side  one of SIDES; checked: compare loss and gradients with float64."""

    case: Case
    side: str
    checked: bool = True


def run_cells(
    cells: list[Cell],
    *,
    device: str,
    limit_s: float = float("inf"),
    cell_limit_s: float = CELL_LIMIT_S,
    report: Callable[[Cell, dict], None] = lambda cell, found: None,
) -> list[dict]:
    """What `measure` finds for each cell; {"note": why} where it finds nothing.

    limit_s, cell_limit_s  seconds for everything and for one cell; what does not begin in time has
                           the note "not run: no time left"
    report                 called with each as soon as it is there
    """
    deadline = time.monotonic() + limit_s
    found: dict[int, dict] = {}
    left = list(range(len(cells)))
    while left and time.monotonic() < deadline:
        with _worker(device, [cells[i] for i in left]) as (answers, why_it_ended):
            done, goes_on, begun = 0, True, time.monotonic()
            while goes_on and done < len(left):
                # a worker's first cell waits for torch as well
                until = min(deadline, begun + cell_limit_s + (30 if done == 0 else 0))
                try:
                    answer = answers.get(timeout=max(0.0, until - time.monotonic()))
                except queue.Empty:
                    is_over = time.monotonic() >= deadline
                    why = "cut off: no time left" if is_over else f"over {cell_limit_s:g} s"
                    answer = {"note": why, "stops": True}
                if answer is None:
                    answer = {"note": why_it_ended(), "stops": True}
                goes_on = not answer.pop("stops", False)
                found[left[done]] = answer
                report(cells[left[done]], answer)
                done += 1
                begun = time.monotonic()
            left = left[done:]
    for i in left:
        found[i] = {"note": _NOT_RUN}
        report(cells[i], found[i])
    return [found[i] for i in range(len(cells))]


@contextmanager
def _worker(
    device: str, cells: list[Cell]
) -> Iterator[tuple["queue.Queue[dict | None]", Callable[[], str]]]:
    """A queue of answers, None at the end, and what the process said last."""
    with tempfile.TemporaryFile("w+") as errors:
        command = [*WORKER, device]
        process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, text=True,
            cwd=ROOT,
        )  # fmt: skip
        lines: queue.Queue[dict | None] = queue.Queue()

        def read() -> None:
            for line in process.stdout:
                lines.put(json.loads(line))
            lines.put(None)

        def why_it_ended() -> str:
            code = process.wait()
            errors.seek(0)
            said = [line.strip() for line in errors.read().splitlines() if line.strip()]
            return f"process ended with {code}: {said[-1][:160] if said else 'no message'}"

        threading.Thread(target=read, daemon=True).start()
        with process.stdin as pipe:
            pipe.write(json.dumps([asdict(cell) for cell in cells]))
        try:
            yield lines, why_it_ended
        finally:
            process.kill()
            process.wait()


def work() -> None:
    """The worker: cells from stdin, one JSON line each to stdout, in order."""
    given = json.load(sys.stdin)
    out, sys.stdout = sys.stdout, sys.stderr  # libraries print
    bench = Bench(torch.device(sys.argv[1]))
    for cell in given:
        case = Case(**(cell["case"] | {"dims": tuple(cell["case"]["dims"])}))
        answer = bench.answer(Cell(case, cell["side"], cell["checked"]))
        print(json.dumps(answer), file=out, flush=True)
        if "stops" in answer:
            return


class Bench:
    """Measures cells one by one; inputs and truth of the last case are kept for the next side."""

    def __init__(self, device: torch.device):
        self.device = device
        self._case: Case | None = None
        self._truth: Truth | None = None
        self._sweeper = None
        if device.type == "cuda":
            self._sweeper = torch.empty(_L2_BYTES, dtype=torch.int8, device=device)

    def answer(self, cell: Cell) -> dict:
        """What was found, or {"note": why nothing}; "stops" where the device is of no more use."""
        try:
            why_not = SIDES[cell.side].why_not(cell.case, self.device.type)
            return {"note": why_not} if why_not else self.measure(cell)
        except torch.OutOfMemoryError:
            note = f"out of memory ({self._memory_gib():.0f} GiB)"
        except Exception as error:  # a row, not the end of the run
            text = " ".join(str(error).split()) or "no message"
            note = f"{type(error).__name__}: {text[:160]}"
        # only here has the error let go of the tensors of the call
        release_freed_memory()
        try:
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
                torch.ones(8, device=self.device).sum().item()
        except RuntimeError:
            return {"note": note, "stops": True}
        return {"note": note}

    def _memory_gib(self) -> float:
        return torch.cuda.get_device_properties(self.device).total_memory / 2**30

    def measure(self, cell: Cell) -> dict:
        """
        ms, p20_ms, p80_ms, calls   of forward and backward
        gradients                   how many of the two inputs get one
        peak_mib, beyond_mib        growth at the highest point of a call; less the gradients
        loss, gradient_error, loss_found   float64's loss, error against it, the side's loss
        """
        case, side = cell.case, SIDES[cell.side]
        self._take(case, cell.checked)

        def call():
            return side.compute(self.q_BD, self.p_ND, case.dims, case.kind)

        loss, *gradients = call()  # compiles, and libraries take their workspaces
        notes = [side.note(case)]
        result = {"loss_found": float(f"{loss.item():.6g}")}
        if cell.checked:
            wanted = self._truth
            error = gradient_error((loss, *gradients), wanted, self.q_BD, self.p_ND)
            result |= {"loss": float(f"{wanted.loss.item():.4g}")}
            result |= {"gradient_error": float(f"{error:.2g}")}
            if not torch.isclose(loss.double(), wanted.loss, rtol=1e-2, atol=0):
                notes.append(f"finds loss {loss.item():.4g}")
        held_mib = sum(g.numel() * g.element_size() for g in gradients if g is not None) / 2**20
        num_gradients = sum(g is not None for g in gradients)
        del loss, gradients
        release_freed_memory()
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        with PeakMemory(self.device, in_use=True) as memory:
            began = clock()
            call()
            self._wait()
            once_s = clock() - began
        grown_mib = memory.in_use_mib
        result |= {"gradients": num_gradients, "peak_mib": round(grown_mib, 1)}
        result |= {"beyond_mib": round(grown_mib - held_mib, 1)}
        fewest = 5 if once_s < 0.5 else 3 if once_s < 2 else 1
        calls = min(_MOST_CALLS, max(fewest, round(_TIMED_S / once_s)))
        times = sorted(self._times(call, calls))
        for key, share in (("ms", 0.5), ("p20_ms", 0.2), ("p80_ms", 0.8)):
            result[key] = float(f"{times[int(share * (calls - 1) + 0.5)]:.4g}")
        note = "; ".join(n for n in notes if n)
        return result | {"calls": calls, "device": device_name(self.device), "note": note}

    def _take(self, case: Case, checked: bool) -> None:
        if case != self._case:
            self.q_BD = self.p_ND = self._truth = None
            q_BD, p_ND = embeddings(case.B, case.N, case.D, cosine=case.cosine, device=self.device)
            self.q_BD, self.p_ND = (x.to(DTYPES[case.precision]) for x in (q_BD, p_ND))
            self._case = case
        if checked and self._truth is None:
            self._truth = truth(self.q_BD, self.p_ND, case.dims, case.kind, sample=_SAMPLE)

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def _times(self, call: Callable[[], tuple[Tensor, ...]], calls: int) -> list[float]:
        """Milliseconds of each call."""
        if self.device.type != "cuda":
            times = []
            for _ in range(calls):
                began = clock()
                call()
                times.append(1000 * (clock() - began))
            return times
        events = [[torch.cuda.Event(enable_timing=True) for _ in "ab"] for _ in range(calls)]
        for start, end in events:
            self._sweeper.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize(self.device)
        return [start.elapsed_time(end) for start, end in events]


if __name__ == "__main__":
    work()
