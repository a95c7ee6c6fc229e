"""SIGTERM and Ctrl-C end a run with a word on how to go on; in the loop, after saving the step."""

import os
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from runtime.run_dir import last_checkpoint_name


class Interrupt:
    """While installed, a signal ends the run at once; within deferred() it is remembered, and
    `requested` names it. A second Ctrl-C leaves there, too, at once.
    """

    def __init__(self, run_dir: Path) -> None:
        self.requested: str | None = None
        self._run_dir, self._waits, self._breaks = run_dir, False, False
        self._before: dict[int, object] = {}

    def __enter__(self) -> "Interrupt":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._before[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def deferred(self) -> Iterator[None]:
        """A block that looks at `requested` itself; what it leaves there ends the run after it."""
        self._waits = True
        try:
            yield
        finally:
            self._waits = False
        if self.requested:
            raise self.ended(self.requested)

    def unless_requested(self, fn: Callable, *args: Any, **options: Any) -> Any:
        """fn(*args, **options) within deferred(); None where a signal came before its end, which
        cuts it short: fn must not change anything."""
        if self.requested:
            return None
        try:
            try:
                self._breaks = True
                value = fn(*args, **options)
            finally:
                self._breaks = False
        except _CutShort:
            return None
        return value

    def ended(self, signal_name: str, saved: str = "") -> SystemExit:
        """To be raised; on rank 0 alone it says what is saved.

        saved  "saved at step 5 of 9"; "": the newest checkpoint, where there is one
        """
        if os.environ.get("RANK", "0") != "0":
            return SystemExit(1)
        checkpoint = last_checkpoint_name(self._run_dir)
        if checkpoint is None:
            said = f"no step is saved yet in {self._run_dir}; start again with the same command"
        else:
            saved = saved or f"saved at step {int(checkpoint.removeprefix('step_'))}"
            said = f"{saved} in {self._run_dir}; go on with the same command and resume=true"
        return SystemExit(f"\n{signal_name}: {said}")

    def _note(self, number: int, _: FrameType | None) -> None:
        is_second = self.requested is not None
        self.requested = self.requested or signal.Signals(number).name
        if not self._waits:
            raise self.ended(self.requested)
        if is_second and number == signal.SIGINT:
            raise KeyboardInterrupt
        if self._breaks:
            self._breaks = False
            raise _CutShort


class _CutShort(BaseException):
    """Not an Exception: nothing on its way takes it for a failure."""
