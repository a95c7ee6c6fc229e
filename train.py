"""Train a retriever: python train.py +experiment=quickstart     (python train.py --help: the rest)

Read top to bottom: setup, loop, result. Settings: conf/schema.py. Why it is so: docs/design.md.
"""

import logging
import math
import os
import time
from pathlib import Path

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from conf.cli import main
from conf.schema import TrainConfig
from data.batches import Batch
from data.datasets import open_data
from evals.final import check_dev, evaluate_base, evaluate_dev, write_result
from losses.build import build_loss
from losses.grad_cache import train_step
from models.build import build_model
from models.towers import Towers
from runtime import checkpoint
from runtime.clock import Clock
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
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        raise ValueError("training runs in one process so far; start it without torchrun")

    # 1. setup: everything that happens once
    began = time.perf_counter()
    keep_freed_memory()
    if c.runtime.threads:
        torch.set_num_threads(c.runtime.threads)
    device = pick_device(c.runtime.device)
    precision = pick_precision(c.runtime.precision, device)
    log.info("computing on %s in %s, %d CPU threads", device, precision, torch.get_num_threads())
    torch.manual_seed(c.seed)  # a fresh projection is the only thing drawn from it
    towers = build_model(c.model, dims=c.loss.dims).to(device)
    dims = sorted(c.dims or c.loss.dims or [towers.width], reverse=True)
    prepare_runtime(towers, c)
    tokenizers = towers.tokenizer_query, towers.tokenizer_passage
    data = open_data(c.data, towers.spec, *tokenizers, seed=c.seed)
    check_dev(c, data)
    # before a single step; a resumed run reads what it was
    base = evaluate_base(towers, data, dims, run_dir, precision=precision)
    loss_fn = build_loss(c.loss).to(device)
    optimizer = build_optimizer(towers, loss_fn, c.optim)
    total_steps = data.train.num_steps(c.optim)
    batches = data.train.batches(c, total_steps)
    start, progress = checkpoint.resume(run_dir, towers, loss_fn, optimizer)
    track = Tracker(c.wandb, run_dir, c)
    track.truncate(start)
    clock = Clock()

    # 2. the loop: one iteration is one optimiser step
    towers.train()
    done = start
    num_examples = [batches.num_examples_until(n) for n in (start, total_steps)]
    bar = tqdm(desc="train", unit="pair", initial=num_examples[0], total=num_examples[1])
    with Interrupt() as interrupt, bar:
        for step in range(start, total_steps):
            if c.early_stopping and progress["bad_evaluations"] >= c.early_stopping:
                log.info("step %d: %d evaluations without a better %s: stopping",
                         step, c.early_stopping, c.best_metric)  # fmt: skip
                break
            batch = batches.batch_at(step)
            lr = lr_at(step, total_steps, c.optim)
            set_lr(optimizer, lr)
            loss, numbers = train_step(
                towers, loss_fn, batch, seed=c.seed, step=step, device=device,
                chunk_tokens=c.runtime.chunk_tokens, autocast=autocast_for(precision, device),
            )  # fmt: skip
            grad_norm = clip_grad_norm_(trained(towers, loss_fn), c.optim.max_grad_norm or math.inf)
            check_finite(step, batch, loss, grad_norm)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            is_last = done == total_steps
            clock.count(batch)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(batch.num_examples)

            if done % c.log_every == 0 or is_last:
                numbers |= {"loss": loss.item(), "grad_norm": grad_norm.item(), "lr": lr}
                numbers |= {"temperature": loss_fn.temperature.item()}
                track.log(done, **numbers, **clock.rates())
            if c.eval_every and (done % c.eval_every == 0 or is_last):
                with clock.paused():
                    values = evaluate_dev(towers, data, dims, precision=precision)
                track.log(done, **values)
                note_best(progress, done, values, c)
            if is_last or interrupt.requested or is_time_to_save(done, progress, c):
                with clock.paused():
                    track.sync()  # the checkpoint claims that its rows exist
                    checkpoint.save(run_dir, done, towers, loss_fn, optimizer, progress,
                                    keep=c.keep_checkpoints)  # fmt: skip
            if interrupt.requested and not is_last:
                raise SystemExit(
                    f"\n{interrupt.requested}: saved at step {done} of {total_steps} in {run_dir};"
                    " go on with the same command and resume=true"
                )

    # 3. the result: small files that a report can read without W&B
    if progress["best_step"] is not None:
        checkpoint.load_best(run_dir, towers, loss_fn, progress["best_step"])
    totals = {"steps": done, **clock.totals(), "wall_s": time.perf_counter() - began}
    write_result(c, run_dir, towers, data, dims, base, track, totals, precision=precision)


def prepare_runtime(towers: Towers, c: TrainConfig) -> None:
    """Switch on activation checkpointing and torch.compile, without renaming a parameter."""
    for tower in {id(t): t for t in (towers.query, towers.passage)}.values():
        tower.encoder.activation_checkpointing = c.runtime.activation_checkpointing
        if c.runtime.compile:
            for layer in tower.encoder.layers:
                layer.compile(dynamic=True)


def trained(towers: Towers, loss_fn: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for module in (towers, loss_fn) for p in module.parameters() if p.requires_grad]


def check_finite(step: int, batch: Batch, loss: torch.Tensor, grad_norm: torch.Tensor) -> None:
    """Raise ValueError, naming step and examples, before a bad update reaches the weights."""
    if not (torch.isfinite(loss) and torch.isfinite(grad_norm)):
        ids = ", ".join(batch.example_ids[:8]) + (", ..." if len(batch.example_ids) > 8 else "")
        raise ValueError(
            f"step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()} on examples"
            f" {ids}; lower optim.lr or look at these texts"
        )


def note_best(progress: dict, step: int, values: dict[str, float], c: TrainConfig) -> None:
    """Update best_value, best_step and bad_evaluations from dev metrics, in place."""
    value = values[f"dev/{c.best_metric}"]
    if progress["best_value"] is None or value > progress["best_value"]:
        progress.update(best_value=value, best_step=step, bad_evaluations=0)
    else:
        progress["bad_evaluations"] += 1


def is_time_to_save(done: int, progress: dict, c: TrainConfig) -> bool:
    stops_early = c.early_stopping and progress["bad_evaluations"] >= c.early_stopping
    is_due = c.save_every and done % c.save_every == 0
    return bool(is_due or stops_early or progress["best_step"] == done)


if __name__ == "__main__":
    main(TrainConfig, "train", train)
