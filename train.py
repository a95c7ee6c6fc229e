"""Train a retriever: python train.py +experiment=quickstart        (python train.py --help lists
                                                                    everything)

Read top to bottom: setup, loop, result. Settings: conf/schema.py. What a run leaves behind:
docs/design.md.
"""

import logging
import math
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from conf.cli import main
from conf.schema import TrainConfig
from data.batches import Batch
from data.datasets import open_data
from evals.final import evaluate_base, evaluate_dev, write_result
from losses.build import build_loss
from losses.grad_cache import train_step
from models.build import build_model
from models.towers import Towers
from runtime import checkpoint
from runtime.device import autocast_for, keep_freed_memory, pick_device, pick_precision
from runtime.interrupt import Interrupt
from runtime.optim import build_optimizer, lr_at, set_lr
from runtime.run_dir import is_finished, print_finished
from runtime.track import Tracker

log = logging.getLogger("train")


def train(c: TrainConfig, run_dir: Path) -> None:
    """One run, from settings to result.json; resumable at any step."""
    if is_finished(run_dir):  # only reached with resume=true
        print_finished(run_dir)
        return

    # 1. setup: everything that happens once
    keep_freed_memory()
    device = pick_device(c.runtime.device)
    precision = pick_precision(c.runtime.precision, device)
    log.info(
        "computing on %s in %s with %d CPU threads",
        device,
        precision,
        set_threads(c.runtime.threads),
    )
    torch.manual_seed(c.seed)  # a fresh projection is the only thing drawn from it
    dims = sorted(c.dims or c.loss.dims, reverse=True)
    towers = build_model(c.model, dims=dims).to(device)
    dims = dims or [towers.width]
    prepare_runtime(towers, c)
    data = open_data(
        c.data, towers.spec, towers.tokenizer_query, towers.tokenizer_passage, seed=c.seed
    )
    base = evaluate_base(
        towers, data, dims, run_dir, precision=precision
    )  # before a single step; kept for resume
    loss_fn = build_loss(c.loss).to(device)
    optimizer = build_optimizer(towers, loss_fn, c.optim)
    autocast = autocast_for(precision, device)
    total_steps = c.optim.steps or math.ceil(
        c.optim.epochs * data.train.steps_per_epoch(c.optim.batch_size)
    )
    batches = data.train.batches(c, total_steps)
    state = checkpoint.load_latest(run_dir, towers, loss_fn, optimizer) if c.resume else None
    start = state["step"] if state else 0
    progress = (
        state["progress"]
        if state
        else {"best_value": None, "best_step": None, "bad_evaluations": 0}
    )
    track = Tracker(c.wandb, run_dir, c)
    track.truncate(start)
    clock = Clock(start)

    # 2. the loop: one iteration is one optimiser step
    towers.train()
    bar = tqdm(
        total=data.train.num_examples_until(c, total_steps),
        initial=data.train.num_examples_until(c, start),
        unit="pair", desc="train", dynamic_ncols=True, mininterval=0.5,
    )  # fmt: skip
    with Interrupt() as interrupt, bar:
        for step in range(start, total_steps):
            batch = batches.batch_at(step)
            is_last = step == total_steps - 1
            lr = lr_at(step, total_steps, c.optim)
            set_lr(optimizer, lr)
            loss, numbers = train_step(
                towers, loss_fn, batch, seed=c.seed, step=step, chunk_tokens=c.runtime.chunk_tokens,
                device=device, autocast=autocast,
            )  # fmt: skip
            grad_norm = clip_grad_norm_(trained(towers, loss_fn), c.optim.max_grad_norm or math.inf)
            check_finite(step, batch, loss, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            clock.count(batch)
            bar.update(batch.num_examples)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)

            if done % c.log_every == 0 or is_last:
                track.log(done, loss=loss.item(), grad_norm=grad_norm.item(), lr=lr,
                          temperature=loss_fn.temperature.item(), **numbers, **clock.rates())  # fmt: skip
            if c.eval_every and (done % c.eval_every == 0 or is_last):
                with clock.paused():
                    values = evaluate_dev(towers, data, dims, precision=precision)
                track.log(done, **values)
                note_best(progress, done, values, c)
            is_best = progress["best_step"] == done
            stops_early = bool(c.early_stopping) and progress["bad_evaluations"] >= c.early_stopping
            if (
                is_last
                or is_best
                or stops_early
                or interrupt.requested
                or (c.save_every and done % c.save_every == 0)
            ):
                with clock.paused():
                    checkpoint.save(
                        run_dir, done, towers, loss_fn, optimizer, progress, keep=c.keep_checkpoints
                    )
                    if is_best:
                        checkpoint.mark_best(run_dir, done)
            if stops_early and not is_last:
                log.info(
                    "no better %s in %d evaluations: stopping at step %d",
                    c.best_metric,
                    c.early_stopping,
                    done,
                )
                break
            if interrupt.requested and not is_last:
                raise SystemExit(f"\n{interrupt.requested}: saved at step {done} of {total_steps};"
                                 f" go on with the same command and resume=true ({run_dir})")  # fmt: skip

    # 3. the result: small files that a report can read without W&B
    if progress["best_step"] is not None:
        checkpoint.load_best(run_dir, towers, loss_fn, progress["best_step"])
    write_result(
        c, run_dir, towers, data, dims, base, track, clock.totals(done), precision=precision
    )


def set_threads(threads: int) -> int:
    if threads:
        torch.set_num_threads(threads)
    return torch.get_num_threads()


def prepare_runtime(towers: Towers, c: TrainConfig) -> None:
    """Switch on activation checkpointing and torch.compile, layer by layer, without renaming a
    parameter."""
    for tower in {id(t): t for t in (towers.query, towers.passage)}.values():
        tower.encoder.activation_checkpointing = c.runtime.activation_checkpointing
        if c.runtime.compile:
            for layer in tower.encoder.layers:
                layer.compile(dynamic=True)


def trained(towers: Towers, loss_fn: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for module in (towers, loss_fn) for p in module.parameters() if p.requires_grad]


def check_finite(step: int, batch: Batch, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Raise ValueError, naming the step and its examples, before a non-finite update reaches the
    weights."""
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        ids = ", ".join(batch.example_ids[:8])
        raise ValueError(
            f"step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()}; examples {ids}"
            f"{', ...' if len(batch.example_ids) > 8 else ''}; lower optim.lr or look at these"
            f" texts"
        )


def note_best(progress: dict, step: int, values: dict[str, float], c: TrainConfig) -> None:
    """Update best_value, best_step and bad_evaluations from dev metrics, in place."""
    value = values[f"dev/{c.best_metric}"]
    if progress["best_value"] is None or value > progress["best_value"]:
        progress.update(best_value=value, best_step=step, bad_evaluations=0)
    else:
        progress["bad_evaluations"] += 1


class Clock:
    """Time spent in steps alone, and what went through them."""

    def __init__(self, start: int):
        self.start, self.began, self.away = start, time.perf_counter(), 0.0
        self.examples = self.tokens = 0
        self._last = (self.began, 0, 0)

    def count(self, batch: Batch) -> None:
        self.examples += batch.num_examples
        self.tokens += batch.num_tokens

    def paused(self) -> "Clock":
        return self

    def __enter__(self) -> None:
        self._left = time.perf_counter()

    def __exit__(self, *_: object) -> None:
        self.away += time.perf_counter() - self._left

    def _spent(self) -> float:
        return time.perf_counter() - self.began - self.away

    def rates(self) -> dict[str, float]:
        """Since the last call; under time.*: it depends on the clock."""
        now, (then, examples, tokens) = (
            self._spent(),
            self._last if self._last[0] < self.began else (0.0, 0, 0),
        )
        seconds = max(1e-9, now - then)
        self._last = (now, self.examples, self.tokens)
        return {
            "time.pairs_per_s": (self.examples - examples) / seconds,
            "time.tokens_per_s": (self.tokens - tokens) / seconds,
        }

    def totals(self, steps: int) -> dict[str, float]:
        seconds = max(1e-9, self._spent())
        return {
            "steps": steps,
            "examples_per_s": self.examples / seconds,
            "tokens_per_s": self.tokens / seconds,
            "train_s": seconds,
        }


if __name__ == "__main__":
    main(TrainConfig, "train", train)
