"""Time spent in training steps alone, and what went through them."""

import time

from data.batches import Batch


class Clock:
    """count() every batch; what runs inside `with clock.paused():` is not training time."""

    def __init__(self) -> None:
        self._began, self._away = time.perf_counter(), 0.0
        self._examples = self._tokens = 0
        self._last = (0.0, 0, 0)

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

    def totals(self) -> dict[str, float]:
        """Of this process: a resumed run counts from where it went on."""
        seconds = max(1e-9, self._spent())
        return {
            "examples_per_s": self._examples / seconds,
            "tokens_per_s": self._tokens / seconds,
            "train_s": seconds,
        }
