"""Train a retriever or, with task=rerank, a reranker: python train.py +experiment=quickstart
(python train.py --help: the rest)
On several devices: torchrun --nproc-per-node 2 train.py +experiment=quickstart

Read top to bottom: setup, loop, result. Settings: conf/schema.py. Why it is so: docs/design.md.
"""

import logging
import math
import time
from pathlib import Path
from types import ModuleType

import torch
from torch.nn.utils import clip_grad_norm_
from tqdm import tqdm

from conf.cli import main
from conf.schema import TrainConfig
from data.batches import Batch
from data.datasets import Data, adopt_prompts, open_data
from data.groups import GroupBatch, GroupData, open_groups
from data.refresh import Refreshed
from data.teacher import open_guide
from evals import final, final_rerank
from losses.build import build_loss
from losses.grad_cache import Guide, train_step
from models.attention import leave_out_of_compilation
from models.build import build_model, build_reranker
from models.reranker import Reranker
from models.shared import start_from_shared
from models.towers import Towers
from runtime import checkpoint
from runtime.clock import Clock
from runtime.device import autocast_for, keep_freed_memory, pick_device, pick_precision
from runtime.distributed import Ranks, broadcast_state, init_ranks
from runtime.interrupt import Interrupt
from runtime.memory import activation_budget_mib
from runtime.optim import build_optimizer, lr_at, set_lr
from runtime.run_dir import check_same_data
from runtime.track import Tracker

log = logging.getLogger("train")


def train(c: TrainConfig, run_dir: Path) -> None:
    """One run, from settings to result.json; resumable at any step, and after any signal."""
    with Interrupt(run_dir) as interrupt:
        run(c, run_dir, interrupt)


def run(c: TrainConfig, run_dir: Path, interrupt: Interrupt) -> None:
    """What train() does; `interrupt` is installed.

    Under torchrun every process runs this; ranks.on_main() is rank 0 working while the others wait.
    """
    # 1. setup: everything that happens once
    began = time.perf_counter()
    keep_freed_memory()
    if c.runtime.threads:
        torch.set_num_threads(c.runtime.threads)
    ranks = init_ranks(c.runtime.device)
    with ranks.together():  # what fails on one rank ends the run on all
        device = pick_device(c.runtime.device)
        precision = pick_precision(c.runtime.precision, device)
        log.info("computing on %s in %s, %d CPU threads", device, precision,
                 torch.get_num_threads())  # fmt: skip
        budget_mib = activation_budget_mib(c.runtime.activation_budget_mib, device)
        torch.manual_seed(c.seed)  # a fresh projection is the only thing drawn from it
        model, data, judge, judged = open_task(c, device)
        prepare_runtime(model, c)
        judge.check_dev(c, data)
        check_backend(c, device)
        guide = guide_of(c, data, device)
        loss_fn = build_loss(c.loss, seed=c.seed, task=c.task, precision=precision).to(device)
        optimizer = build_optimizer(model, loss_fn, c.optim)
    # before a single step; a resumed run reads what it was
    ranks.on_main(check_same_data, run_dir, data.report["digest"])
    base = ranks.on_main(judge.evaluate_base, *judged, run_dir, precision=precision)
    total_steps = data.train.num_steps(c.optim)
    batches = data.train.batches(c, total_steps, rank=ranks.rank, world=ranks.size)
    if c.mine_every:
        batches = Refreshed(batches, every=c.mine_every, towers=model, c=c, mine=c.mine,
                            folder=run_dir / "mined", ranks=ranks, precision=precision)  # fmt: skip
    start, progress = ranks.on_main(checkpoint.resume, run_dir, model, loss_fn, optimizer)
    clock = Clock(began, progress.get("clock"))
    if start == 0 and c.task == "retrieval" and c.model.projection.init == "shared":
        ranks.on_main(start_projection, model, data, c, device, precision)
    broadcast_state(ranks, [model, loss_fn], optimizer)
    track = Tracker(c.wandb, run_dir, c)  # rank 0 writes
    row = progress.pop("owed", None)
    track.truncate(start - 1 if row else start)
    if row:  # a signal came before the evaluation of this step
        with clock.paused():
            values = ranks.on_main(judge.evaluate_dev, *judged, precision=precision)
        note_step(start, total_steps, row, values, progress, track, clock, c)
        ranks.on_main(checkpoint.point_best, run_dir, progress)

    # 2. the loop: one iteration is one optimiser step
    model.train()
    done = start
    num_examples = [batches.num_examples_until(n) for n in (start, total_steps)]
    bar = tqdm(desc="train", unit="pair", initial=num_examples[0], total=num_examples[1],
               disable=not ranks.is_main)  # fmt: skip
    with interrupt.deferred(), bar:
        for step in range(start, total_steps):
            if stops_early(progress, c):
                log.info("step %d: %d evaluations without a better %s: stopping",
                         step, c.early_stopping, c.best_metric)  # fmt: skip
                break
            batch = batches.batch_at(step)
            lr = lr_at(step, total_steps, c.optim)
            set_lr(optimizer, lr)
            loss, numbers = train_step(
                model, loss_fn, batch, seed=c.seed, step=step, device=device,
                chunk_tokens=c.runtime.chunk_tokens, autocast=autocast_for(precision, device),
                activation_budget_mib=budget_mib, ranks=ranks, guide=guide,
            )  # fmt: skip
            grad_norm = clip_grad_norm_(trained(model, loss_fn), c.optim.max_grad_norm or math.inf)
            check_finite(step, batch, loss, grad_norm, ranks)
            row = numbers | {"loss": loss, "grad_norm": grad_norm, "lr": lr}
            row |= {"temperature": loss_fn.temperature.detach()}  # the loss's, not the next one's
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            done = step + 1
            is_last = done == total_steps
            clock.count(batch, ranks.size)
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
            bar.update(batch.num_examples_global)

            values = {}
            if c.eval_every and (done % c.eval_every == 0 or is_last):
                with clock.paused():  # a signal comes first: values is None
                    values = ranks.on_main(interrupt.unless_requested, judge.evaluate_dev,
                                           *judged, precision=precision)  # fmt: skip
            note_step(done, total_steps, row, values, progress, track, clock, c)
            stop = ranks.first(interrupt.requested)  # a signal to any rank stops all at this step
            if is_last or stop or is_time_to_save(done, progress, c):
                progress["clock"] = clock.state()
                with clock.paused():
                    track.sync()  # the checkpoint claims that its rows exist
                    ranks.on_main(checkpoint.save, run_dir, done, model, loss_fn, optimizer,
                                  progress, keep=c.keep_checkpoints)  # fmt: skip
            if stop:
                raise interrupt.ended(stop, f"saved at step {done} of {total_steps}")

    # 3. the result: small files that a report can read without W&B
    totals = {"steps": done, **clock.totals()}
    if progress["best_step"] is not None:
        ranks.on_main(checkpoint.load_best, run_dir, model, loss_fn, progress["best_step"])
    ranks.on_main(judge.write_result, c, run_dir, *judged, base, track, totals,
                  precision=precision)  # fmt: skip


def open_task(
    c: TrainConfig, device: torch.device
) -> tuple[Towers | Reranker, Data | GroupData, ModuleType, tuple]:
    """(model, data, who judges it, and by what): all that depends on c.task."""
    scores = c.loss.learns_scores
    if c.task == "rerank":
        model = build_reranker(c.model).to(device)
        adopt_prompts(model.spec, c.data)
        data = open_groups(c.data, model.spec, model.tokenizer, seed=c.seed, with_scores=scores)
        return model, data, final_rerank, (model, data)
    model = build_model(c.model, dims=c.loss.dims).to(device)
    adopt_prompts(model.spec, c.data)
    tokenizers = model.tokenizer_query, model.tokenizer_passage
    data = open_data(c.data, model.spec, *tokenizers, seed=c.seed, with_scores=scores)
    dims = sorted(c.dims or c.loss.dims or [model.width], reverse=True)
    if dims[0] > model.width:
        raise ValueError(f"dims ({dims[0]}) must be <= {model.width}, the embedding's dimension")
    return model, data, final, (model, data, dims)


def start_projection(
    model: Towers, data: Data, c: TrainConfig, device: torch.device, precision: str
) -> None:
    """Turn the embeddings by what the first training pairs share; the same for any number of
    ranks."""
    num_steps = data.train.num_steps(c.optim)
    batches = data.train.batches(c, num_steps, rank=0, world=1)
    start_from_shared(
        model,
        map(batches.batch_at, range(num_steps)),
        c.model.projection.init_pairs,
        chunk_tokens=c.runtime.chunk_tokens,
        device=device,
        autocast=autocast_for(precision, device),
    )


def guide_of(c: TrainConfig, data: Data, device: torch.device) -> Guide | None:
    """Embeddings of the training texts by loss.guide or loss.teacher, where one is set."""
    model = c.loss.guide or c.loss.teacher
    if model is None:
        return None
    return open_guide(
        model, data, cache_dir=c.data.cache_dir, device=device, precision=c.runtime.precision
    )


def check_backend(c: TrainConfig, device: torch.device) -> None:
    """Raise ValueError when the kernels are asked for where they cannot run."""
    if c.loss.backend == "triton" and device.type != "cuda":
        raise ValueError(
            f"loss.backend=triton needs a CUDA device, got {device.type}; use loss.backend=auto"
        )


def prepare_runtime(model: Towers | Reranker, c: TrainConfig) -> None:
    """Switch on activation checkpointing and torch.compile, without renaming a parameter."""
    for tower in {id(t): t for t in map(model.tower, model.sides)}.values():
        tower.encoder.activation_checkpointing = c.runtime.activation_checkpointing
        if c.runtime.compile:
            leave_out_of_compilation()
            for layer in tower.encoder.layers:
                layer.compile(dynamic=True)


def trained(model: torch.nn.Module, loss_fn: torch.nn.Module) -> list[torch.nn.Parameter]:
    return [p for module in (model, loss_fn) for p in module.parameters() if p.requires_grad]


def check_finite(
    step: int, batch: Batch | GroupBatch, loss: torch.Tensor, grad_norm: torch.Tensor, ranks: Ranks
) -> None:
    """Raise ValueError, naming step and examples, before a bad update reaches the weights."""
    if torch.isfinite(loss) and torch.isfinite(grad_norm):  # both are the same on every rank
        return
    names = [name for some in ranks.gather_objects(batch.example_ids[:8]) for name in some]
    ids = ", ".join(names[:8]) + (", ..." if batch.num_examples_global > len(names[:8]) else "")
    with ranks.together():
        raise ValueError(
            f"step {step + 1}: loss {loss.item()}, gradient norm {grad_norm.item()} on examples"
            f" {ids}; lower optim.lr or look at these texts"
        )


def note_step(
    done: int,
    total_steps: int,
    row: dict,
    values: dict[str, float] | None,
    progress: dict,
    track: Tracker,
    clock: Clock,
    c: TrainConfig,
) -> None:
    """Log a step where it is due, and note its evaluation in `progress`.

    values  dev metrics; {}: none were due; None: a signal came first, and the resumed run owes
            them, and what depends on them
    """
    if values is None:
        progress["owed"] = {name: float(value) for name, value in (row | clock.rates()).items()}
        return
    if values:
        note_best(progress, done, values, c)
    if done % c.log_every == 0 or done == total_steps or stops_early(progress, c):
        track.log(done, **clock.rates() | row)  # an owed row has its own rates
    if values:
        track.log(done, **values)


def note_best(progress: dict, step: int, values: dict[str, float], c: TrainConfig) -> None:
    """Update best_value, best_step and bad_evaluations from dev metrics, in place."""
    value = values[f"dev/{c.best_metric}"]
    if progress["best_value"] is None or value > progress["best_value"]:
        progress.update(best_value=value, best_step=step, bad_evaluations=0)
    else:
        progress["bad_evaluations"] += 1


def stops_early(progress: dict, c: TrainConfig) -> bool:
    return bool(c.early_stopping and progress["bad_evaluations"] >= c.early_stopping)


def is_time_to_save(done: int, progress: dict, c: TrainConfig) -> bool:
    is_due = c.save_every and done % c.save_every == 0
    return bool(is_due or stops_early(progress, c) or progress["best_step"] == done)


if __name__ == "__main__":
    main(TrainConfig, "train", train)
