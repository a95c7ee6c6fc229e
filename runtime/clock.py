"""Time spent in training steps alone, and what went through them."""

import time

from data.batches import Batch


class Clock:
    """count() every batch; what runs inside `with clock.paused():` is not training time.

    began    of the process, in seconds of time.perf_counter
    earlier  state() of the run that this one continues; None: nothing came before
    """

    def __init__(self, began: float, earlier: dict[str, float] | None = None) -> None:
        earlier = earlier or {"train_s": 0.0, "wall_s": 0.0, "examples": 0, "tokens": 0}
        self._wall_began = began - earlier["wall_s"]
        self._began, self._away = time.perf_counter() - earlier["train_s"], 0.0
        self._examples, self._tokens = int(earlier["examples"]), int(earlier["tokens"])
        self._last = (self._spent(), self._examples, self._tokens)

    def count(self, batch: Batch, num_ranks: int = 1) -> None:
        """Of all ranks, which have as many tokens as this one but for part of a text."""
        self._examples += batch.num_examples_global
        self._tokens += batch.num_tokens * num_ranks

    def paused(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._left = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self._away += time.perf_counter() - self._left

    def _spent(self) -> float:
        return time.perf_counter() - self._began - self._away

    def rates(self) -> dict[str, float]:
        """Since the last call; named time.* because they depend on the clock."""
        then, examples, tokens = self._last
        self._last = (self._spent(), self._examples, self._tokens)
        seconds = max(1e-9, self._last[0] - then)
        return {
            "time.pairs_per_s": (self._examples - examples) / seconds,
            "time.tokens_per_s": (self._tokens - tokens) / seconds,
        }

    def state(self) -> dict[str, float]:
        """What a checkpoint keeps, so that a resumed run counts on."""
        return {
            "train_s": self._spent(),
            "wall_s": time.perf_counter() - self._wall_began,
            "examples": self._examples,
            "tokens": self._tokens,
        }

    def totals(self) -> dict[str, float]:
        """Of the whole run: what a kill lost after its last checkpoint is not counted."""
        seconds = max(1e-9, self._spent())
        return {
            "examples_per_s": self._examples / seconds,
            "tokens_per_s": self._tokens / seconds,
            "train_s": seconds,
            "wall_s": time.perf_counter() - self._wall_began,
        }
