"""What a run reports while it goes: metrics.jsonl, always, and Weights & Biases beside it.

metrics.jsonl is the record: one JSON object a logged step, whatever depends on the clock under
`time.*`, so that two runs with the same seed differ there alone. W&B lives in a thread of its own
and is fed from the same rows: it can be slow, without a key, without a network or not installed,
and training neither waits nor stops. A kill can lose W&B's own file; a resumed run therefore starts
a new W&B run and replays metrics.jsonl into it first.
"""

import atexit
import json
import logging
import math
import os
import queue
import re
import shutil
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from conf.schema import WandbConfig
from runtime.run_dir import write_bytes_atomic

log = logging.getLogger(__name__)

INIT_TIMEOUT_S = 30.0  # for W&B's server to answer before an offline file is written instead
# For W&B to take the rest; after it the run ends without.
FINISH_TIMEOUT_S = {"offline": 30.0, "online": 300.0}

_open_trackers: list["Tracker"] = []


class Tracker:
    """Writes metrics.jsonl of a run directory and mirrors it to W&B; see the module's text.

    c         wandb section of the config; mode offline (files under <run_dir>/wandb), online or
              disabled
    run_dir   a prepared run directory
    settings  the whole config dataclass, for W&B to show
    Only rank 0 writes; on the other ranks every method does nothing.
    Raises ValueError when metrics.jsonl cannot be opened for writing.
    """

    def __init__(self, c: WandbConfig, run_dir: Path, settings: Any = None) -> None:
        self.c, self.run_dir = c, Path(run_dir)
        self._settings = asdict(settings) if settings is not None else None
        self.path = self.run_dir / "metrics.jsonl"
        self._is_writer = os.environ.get("RANK", "0") == "0"
        self._wandb: _WandbThread | None = None
        self._file: Any = None
        self._start_s = time.perf_counter()
        if self._is_writer:
            self.truncate(None)
            _open_trackers.append(self)

    def log(self, step: int, **values: Any) -> None:
        """Append one row: `step` and numbers by name (python, numpy or one-element torch; other
        JSON values too).

        Names such as "ndcg@10" or "time.pairs_per_s" come as `**{"ndcg@10": x}`. NaN and infinities
        become null, which JSON can hold. time.elapsed_s is added: seconds since this Tracker was
        made.
        """
        if not self._is_writer:
            return
        row = {"step": int(step)} | {name: _plain(value) for name, value in values.items()}
        row["time.elapsed_s"] = round(time.perf_counter() - self._start_s, 3)
        self._start_wandb()
        self._file.write(json.dumps(row, ensure_ascii=False, allow_nan=False).encode() + b"\n")
        self._file.flush()  # in the kernel's hands: survives a kill of this process
        if self._wandb is not None:
            self._wandb.put(("row", row))

    __call__ = log

    def sync(self) -> None:
        """Force the rows to the disk; call before a checkpoint claims that they exist."""
        if self._file is not None:
            os.fsync(self._file.fileno())

    def truncate(self, last_step: int | None) -> None:
        """Keep the rows with step <= last_step (None: all) and cut what a kill left half-written at
        the end.

        Call it on resume before the first log(), with the last step that the checkpoint contains.
        """
        if not self._is_writer:
            return
        if self._file is not None:
            self._file.close()
        try:
            content = self.path.read_bytes() if self.path.exists() else b""
            kept = b"".join(
                line
                for line, row in _whole_rows(content)
                if last_step is None or row["step"] <= last_step
            )
            if kept != content:
                write_bytes_atomic(self.path, kept)
            self._file = open(self.path, "ab")
        except OSError as error:
            raise ValueError(f"{self.path} cannot be written: {error.strerror}") from None

    def finish(
        self,
        result: Mapping[str, Any] | None = None,
        figures: Sequence[Path] = (),
        table: tuple[Sequence[str], Sequence[Sequence[Any]]] | None = None,
    ) -> None:
        """Close the record; hand W&B the final numbers.

        result   result.json's content: numbers, nested by name
        figures  paths of PNG files
        table    (column names, rows) of the final table
        """
        if not self._is_writer:
            return
        self._start_wandb()  # nothing was logged in this part of the run
        if self._wandb is not None:
            self._wandb.put(("result", (dict(result or {}), [Path(f) for f in figures], table)))
        self.close()

    def _start_wandb(self) -> None:
        """Start W&B with the rows there are: called only after truncate(), when they are final."""
        if self.c.mode != "disabled" and self._wandb is None:
            self._wandb = _WandbThread(self.c, self.run_dir, self._settings, read_rows(self.path))

    def close(self, *, exit_code: int = 0) -> None:
        """Close files and W&B without a result: after an error or a stop. May be called twice."""
        if self._file is not None:
            self._file.close()
            self._file = None
        if self._wandb is not None:
            self._wandb.stop(exit_code)
            self._wandb = None
        if self in _open_trackers:
            _open_trackers.remove(self)


def close_open_trackers() -> None:
    """Close what an error or a stop left open, so that W&B's file is whole and the next run of a
    sweep starts clean.
    """
    for tracker in list(_open_trackers):
        tracker.close(exit_code=1)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The whole rows of a metrics.jsonl; none where there is no such file."""
    return [row for _, row in _whole_rows(path.read_bytes())] if path.exists() else []


def _whole_rows(content: bytes) -> list[tuple[bytes, dict[str, Any]]]:
    """(line, row) up to the first line that is not a complete row: what follows a broken write is
    not trusted.
    """
    rows = []
    for line in content.splitlines(keepends=True):
        try:
            row = json.loads(line)
        except ValueError:
            break
        if (
            not line.endswith(b"\n")
            or not isinstance(row, dict)
            or not isinstance(row.get("step"), int)
        ):
            break
        rows.append((line, row))
    return rows


def _plain(value: Any) -> Any:
    """A JSON value of a number, an array or tensor of one element, or a nested list or mapping of
    these.
    """
    if hasattr(value, "item") and getattr(value, "size", 1) != 0 and not isinstance(value, str):
        value = value.item()
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(k): _plain(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(v) for v in value]
    return value


# ---------------------------------------------------------------------------------------------- W&B


class _WandbThread:
    """Feeds one W&B run from a queue.

    Whatever goes wrong inside is logged once and ends the feeding alone.
    """

    def __init__(
        self,
        c: WandbConfig,
        run_dir: Path,
        settings: dict[str, Any] | None,
        earlier_rows: list[dict[str, Any]],
    ) -> None:
        self._c, self._run_dir, self._settings, self._earlier = c, run_dir, settings, earlier_rows
        self._mode = c.mode
        self._items: queue.SimpleQueue[tuple[str, Any]] = queue.SimpleQueue()
        self._thread = threading.Thread(target=self._work, name="wandb", daemon=True)
        self._thread.start()

    def put(self, item: tuple[str, Any]) -> None:
        self._items.put(item)

    def stop(self, exit_code: int) -> None:
        self._items.put(("stop", exit_code))
        self._thread.join(FINISH_TIMEOUT_S[self._mode])
        if self._thread.is_alive():
            log.warning(
                "W&B is still busy and is left behind; %s is complete",
                self._run_dir / "metrics.jsonl",
            )

    def _work(self) -> None:
        try:
            run = self._open()
            # before W&B's own exit hook, which ends its service: hooks run in reverse order
            atexit.register(self._stop_at_exit)
            for row in self._earlier:
                _log_row(run, row)
            self._earlier = []
            while True:
                kind, content = self._items.get()
                if kind == "row":
                    _log_row(run, content)
                elif kind == "result":
                    _log_result(run, *content)
                else:
                    run.finish(exit_code=content)
                    return
        except Exception as error:  # W&B raises nearly anything; none of it may stop training
            log.warning("W&B is off for this run: %s; metrics.jsonl goes on", _one_line(error))
        finally:
            atexit.unregister(self._stop_at_exit)

    def _stop_at_exit(self) -> None:
        self._items.put(("stop", 1))
        self._thread.join(10.0)

    def _open(self) -> Any:
        folder = self._run_dir / "wandb"
        folder.mkdir(exist_ok=True)  # W&B itself would turn to a temporary folder without an error
        # its console lines would break the progress bar
        os.environ.setdefault("WANDB_SILENT", "true")
        os.environ.setdefault("WANDB_CACHE_DIR", str(folder.resolve() / ".cache"))
        os.environ.setdefault("WANDB_DATA_DIR", str(folder.resolve() / ".cache"))
        import wandb  # a second to import: here, beside the first training steps

        older = sorted(folder.glob("offline-run-*"))
        if self._mode == "online":
            try:
                if not wandb.login(prompt=False, verify=False):
                    raise RuntimeError("no API key; run `wandb login` or set WANDB_API_KEY")
                run = self._init(wandb, "online")
                log.info("W&B: %s", run.url)
                return run
            except Exception as error:
                log.warning(
                    "W&B cannot go online (%s): writing its file under %s instead",
                    _one_line(error),
                    folder,
                )
                self._mode = "offline"
        run = self._init(wandb, "offline")
        for path in older:  # an earlier part of this run: all of it is replayed into the new file
            shutil.rmtree(path, ignore_errors=True)
        return run

    def _init(self, wandb: Any, mode: str) -> Any:
        relative = self._run_dir.parts[-3:]
        return wandb.init(
            mode=mode,
            project=self._c.project,
            entity=self._c.entity,
            tags=list(self._c.tags) or None,
            name="/".join(relative),
            group=relative[0],
            dir=str(self._run_dir.resolve()),
            config=self._settings,
            settings=wandb.Settings(
                silent=True,
                console="off",
                save_code=False,
                disable_git=True,  # env.json has the commit and the changes
                x_disable_stats=True,  # its monitor takes time from a two-core machine
                reinit="create_new",  # a sweep holds one run after the other in one process
                init_timeout=INIT_TIMEOUT_S,
            ),
        )


def _log_row(run: Any, row: dict[str, Any]) -> None:
    run.log(
        {name: value for name, value in row.items() if name != "step" and value is not None},
        step=row["step"],
    )


def _log_result(run: Any, result: dict[str, Any], figures: list[Path], table: Any) -> None:
    import wandb

    # a mapping name/dim/metric as one flat name, as W&B's charts want it
    run.summary.update(
        {f"result/{name}": value for name, value in _flat(_plain(result)) if value is not None}
    )
    media: dict[str, Any] = {
        f"figures/{path.stem}": wandb.Image(str(path)) for path in figures if path.is_file()
    }
    if table is not None:
        columns, rows = table
        media["result_table"] = wandb.Table(
            columns=list(columns), data=[[_plain(v) for v in row] for row in rows]
        )
    if media:
        run.log(media)


def _flat(value: Any, prefix: str = "") -> list[tuple[str, Any]]:
    if not isinstance(value, Mapping):
        return [(prefix, value)]
    return [
        pair for k, v in value.items() for pair in _flat(v, f"{prefix}/{k}" if prefix else str(k))
    ]


def _one_line(error: Exception) -> str:
    return re.sub(r"\s+", " ", f"{type(error).__name__}: {error}" if str(error) else repr(error))[
        :300
    ]
