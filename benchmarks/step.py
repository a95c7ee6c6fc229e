"""Training speed against a peer: python -m benchmarks.step --peer sentence-transformers

sentence-transformers         its trainer, MultipleNegativesRankingLoss
sentence-transformers-cached  its trainer, CachedMultipleNegativesRankingLoss, mini-batches of 32
direct                        our own step uncached: one graph of everything, one backward

Against the first two both sides train the same model on the same pairs with the same batch, length,
loss, optimiser and precision, each in a process of its own, by turns. A side's rate is pairs over
the median time of a step, the first step left out. On a GPU tokens/s, the share of padding and
model FLOP utilisation are reported too.

The aim against `direct` is a few percent, less than two processes differ by: both sides take turns
on the same batches, weights and dropout masks within one process, without an optimiser, and the
ratio is the median over pairs of neighbouring steps. Peak memory is that of one process a side.
"""

import argparse
import itertools
import json
import math
import statistics
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch
    from sentence_transformers import SentenceTransformer, SentenceTransformerTrainer

PEERS = ("sentence-transformers", "sentence-transformers-cached", "direct")
BASE = "sentence-transformers/all-MiniLM-L6-v2"
# dense bf16, from the vendor's data sheets
PEAK_FLOPS = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
# batch, and steps in a process: one of the cached peer takes minutes on a CPU
SIZES = {"sentence-transformers-cached": (512, 2)}


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.step",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--peer", choices=PEERS, default="sentence-transformers")
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument(
        "--precision",
        nargs="+",
        choices=("fp32", "bf16"),
        help="default: fp32, and bf16 where the hardware multiplies it",
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--pairs",
        type=int,
        help="pairs of Python docstrings and bodies in a process; default 8 batches, 2 of the"
        " cached peer; the first batch is not counted",
    )
    parser.add_argument("--batch", type=int, help="default 64, 512 against the cached peer")
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="of hidden states, on both sides"
    )
    parser.add_argument(
        "--attention-dropout",
        type=float,
        nargs=2,
        default=[0.1, 0.1],
        metavar=("OURS", "PEER"),
        help="default: 0.1 0.1, as all-MiniLM-L6-v2's config.json says; as each comes: 0 0.1",
    )
    parser.add_argument("--rounds", type=int, default=3, help="processes of each side")
    parser.add_argument("--chunk-tokens", type=int, default=4096)
    parser.add_argument("--mini-batch", type=int, default=32, help="of the cached peer")
    parser.add_argument(
        "--budget-mib",
        nargs="+",
        type=float,
        help="runtime.activation_budget_mib of our step, a row each; default: inf and 0 against"
        " direct (everything fits, nothing does), else that of train.py",
    )
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/data/step.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    batch, steps = SIZES.get(args.peer, (64, 8))
    args.batch = args.batch or batch
    args.pairs = args.pairs or steps * args.batch
    if args.pairs < 2 * args.batch:
        parser.error(
            f"--pairs {args.pairs} must be at least two batches of {args.batch}: the first is not"
            " counted"
        )
    if args.budget_mib is None and args.peer == "direct":
        args.budget_mib = [math.inf, 0.0]
    return args


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import emit

    side_by_side = compare_direct if args.peer == "direct" else compare_processes
    rows = [
        side_by_side(args, precision, budget)
        for precision in args.precision or precisions(args)
        for budget in args.budget_mib or [None]
    ]
    emit(rows, csv_name="step.csv" if args.csv else None, json_path=args.json)


def precisions(args: argparse.Namespace) -> list[str]:
    """bf16 only where hardware multiplies it: emulated, one step takes the time of dozens."""
    from runtime.device import has_fast_bf16, pick_device

    return ["fp32", "bf16"] if has_fast_bf16(pick_device(args.device)) else ["fp32"]


def worker_options(args: argparse.Namespace, precision: str, budget: float | None) -> list[str]:
    keys = (
        *("peer", "base", "device", "pairs", "batch", "length", "dropout"),
        *("chunk_tokens", "mini_batch"),
    )
    options = [w for key in keys for w in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    options += ["--precision", precision]
    options += ["--attention-dropout", *map(str, args.attention_dropout)]
    return options if budget is None else [*options, "--budget-mib", str(budget)]


def row_name(args: argparse.Namespace, budget: float | None) -> str:
    name = f"step b{args.batch} l{args.length}"
    ours, peers = args.attention_dropout
    name += f" attention dropout {ours:g}"
    if args.peer != "direct" and ours != peers:  # both sides of `direct` are ours
        name += f" against {peers:g}"
    return name if budget is None else f"{name} budget {budget:g}"


def compare_processes(args: argparse.Namespace, precision: str, budget: float | None) -> dict:
    from benchmarks.turns import by_turns, row

    options = worker_options(args, precision, budget)
    results = by_turns("benchmarks.step", ["rook", args.peer], options, args.rounds)
    return row(row_name(args, budget), args.peer, precision, results)


def compare_direct(args: argparse.Namespace, precision: str, budget: float | None) -> dict:
    """Times from processes that run both sides, peaks from one process of two steps a side."""
    from benchmarks.turns import row, run_worker

    options = worker_options(args, precision, budget)
    together = [
        run_worker("benchmarks.step", ["--worker", "together", *options])
        for _ in range(args.rounds)
    ]
    results = {}
    for side in ("rook", "direct"):
        alone = run_worker(
            "benchmarks.step", ["--worker", side, *options, "--pairs", str(2 * args.batch)]
        )
        shared = {k: alone[k] for k in ("peak_mib", "device")}
        shared |= {k: v for k, v in together[0].items() if k != "seconds"}
        results[side] = [
            shared | {"rate": args.batch / s} for t in together for s in t["seconds"][side]
        ]
    found = row(row_name(args, budget), "direct", precision, results)
    return found | {"time_ratio": round(1 / found["ratio"], 3)}


def pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """A seeded choice of training pairs of the quickstart."""
    import numpy as np

    from data.pydocs import read_pydocs

    docs = read_pydocs(None, cache_dir="artifacts/cache")
    rows = docs.rows("train")
    if len(rows) < args.pairs:
        raise SystemExit(f"--pairs {args.pairs}: this machine's Python gives {len(rows)}")
    chosen = np.random.default_rng(0).permutation(rows)[: args.pairs]
    return [(docs.queries[i], docs.passages[i]) for i in chosen]


class Ours:
    """Our model, loss and batches as train.py makes them, and one step of either kind.

    cache  a folder for the pairs and their tokens
    """

    def __init__(self, args: argparse.Namespace, cache: str) -> None:
        from conf.schema import DataConfig, LossConfig, ModelConfig
        from data.batches import Batches
        from data.datasets import open_data
        from losses.build import build_loss
        from models.build import build_model
        from runtime.device import autocast_for, keep_freed_memory, pick_device
        from runtime.memory import activation_budget_mib

        keep_freed_memory()
        self.args, self.device = args, pick_device(args.device)
        model = ModelConfig(
            base=args.base,
            max_query_length=args.length,
            max_passage_length=args.length,
            dropout=args.dropout,
            attention_dropout=args.attention_dropout[0],
        )
        self.towers = build_model(model, dims=[]).to(self.device)
        self.loss_fn = build_loss(LossConfig(temperature=0.05)).to(self.device)
        self.autocast = autocast_for(args.precision[0], self.device)
        setting = args.budget_mib[0] if args.budget_mib else "auto"
        self.budget_mib = activation_budget_mib(setting, self.device)
        rows = Path(cache) / "pairs.jsonl"
        lines = [json.dumps({"query": q, "positive": p}) for q, p in pairs(args)]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = DataConfig(root=str(rows), dev_fraction=0.0, test_fraction=0.0, cache_dir=cache)
        tokenizers = self.towers.tokenizer_query, self.towers.tokenizer_passage
        data = open_data(source, self.towers.spec, *tokenizers)
        self.batches = Batches(data.train, batch_size=args.batch, seed=0)
        self.num_steps = args.pairs // args.batch

    def cached(self, step: int) -> "tuple[torch.Tensor, float]":
        """(loss, share of the tokens that were encoded twice) of losses.grad_cache.train_step."""
        from losses.grad_cache import train_step

        loss, numbers = train_step(
            self.towers,
            self.loss_fn,
            self.batches.batch_at(step),
            **self._settings(step),
            activation_budget_mib=self.budget_mib,
        )
        return loss, float(numbers["replayed_share"])

    def direct(self, step: int) -> "tuple[torch.Tensor, float]":
        batch = self.batches.batch_at(step)
        return direct_step(self.towers, self.loss_fn, batch, **self._settings(step)), 0.0

    def _settings(self, step: int) -> dict:
        return {
            "seed": 0,
            "step": step,
            "chunk_tokens": self.args.chunk_tokens,
            "device": self.device,
            "autocast": self.autocast,
        }


def direct_step(towers, loss_fn, batch, *, seed, step, chunk_tokens, device, autocast):
    """The step that train_step must equal, without its second phase: one graph from the tokens to
    the loss, one backward.

    Arguments as train_step's. The same chunks with the same seeds, because one pack of all texts
    would be slower on a CPU, whose caches it leaves. Returns the loss.
    """
    import numpy as np
    import torch

    from losses.grad_cache import (
        dense_sums,
        large_tables,
        pieces,
        seed_chunk,
        sparse_gradients,
        targets_on,
    )

    tables = large_tables(towers)  # as there: only the phases differ
    parts: dict[str, list] = {"query": [], "passage": []}
    rows: dict[str, list] = {"query": [], "passage": []}
    with autocast():
        for number, (side, some_rows, packed) in enumerate(pieces(batch, chunk_tokens, device)):
            seed_chunk(seed, step, 0, number)
            with sparse_gradients(tables):
                parts[side].append(towers.encode(side, packed))
            rows[side].append(some_rows)
    whole = {}
    for side in parts:
        order = torch.from_numpy(np.argsort(np.concatenate(rows[side]), kind="stable")).to(device)
        whole[side] = torch.cat(parts[side])[order]
    loss, _ = loss_fn(whole["query"], whole["passage"], targets_on(batch, device, step=step))
    with dense_sums(tables):
        loss.backward()
    return loss.detach()


def work_rook(args: argparse.Namespace) -> dict:
    """Our training step, or the direct one, with the optimiser, alone in this process."""
    import torch

    from benchmarks.turns import PeakMemory, clock, device_name, synchronise
    from conf.schema import OptimConfig
    from runtime.optim import build_optimizer, set_lr

    tokens, losses, times, shares = 0, [], [], []
    with tempfile.TemporaryDirectory() as cache:
        ours = Ours(args, cache)
        device = ours.device
        take_step = ours.direct if args.worker == "direct" else ours.cached
        optim = OptimConfig(lr=2e-5, batch_size=args.batch)
        optimizer = build_optimizer(ours.towers, ours.loss_fn, optim)
        with PeakMemory(device) as memory:
            for step in range(ours.num_steps):
                began = clock()
                set_lr(optimizer, optim.lr)
                loss, replayed = take_step(step)
                torch.nn.utils.clip_grad_norm_(ours.towers.parameters(), 1.0)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
                losses.append(loss.item())
                synchronise(device)
                times.append(clock() - began)
                shares.append(replayed)
        tokens = sum(ours.batches.batch_at(step).num_tokens for step in range(ours.num_steps))
    seconds = statistics.median(times[1:])
    result = {
        "rate": args.batch / seconds,
        "peak_mib": memory.mib,
        "device": device_name(device),
        "losses": losses,
        "tokens_per_s": round(tokens / len(times) / seconds),
        "padding_share": 0.0,
        "replayed_share": round(statistics.mean(shares), 3),
        "budget_mib": f"{ours.budget_mib:.0f}",  # JSON has no inf
    }
    matrices = sum(p.numel() for n, p in ours.towers.query.named_parameters() if ".layers." in n)
    flops = 6 * matrices * tokens / len(times)  # of the model: a replayed forward is not counted
    peak = next((v for k, v in PEAK_FLOPS.items() if k in result["device"]), None)
    return result | ({"flop_utilisation": round(flops / seconds / peak, 4)} if peak else {})


def work_together(args: argparse.Namespace) -> dict:
    """Both kinds of step by turns in this process: {"seconds": of each side, "loss_difference"}.

    The weights stay as they are, so both see the same network and must find the same loss.
    """
    from benchmarks.turns import device_name, interleaved

    losses: dict[str, list[float]] = {"rook": [], "direct": []}
    shares: list[float] = []
    with tempfile.TemporaryDirectory() as cache:
        ours = Ours(args, cache)

        def call(side: str, step: int) -> None:
            loss, share = ours.cached(step) if side == "rook" else ours.direct(step)
            ours.towers.zero_grad(set_to_none=True)
            losses[side].append(loss.item())
            if side == "rook":
                shares.append(share)

        calls = {side: (lambda step, side=side: call(side, step)) for side in losses}
        seconds = interleaved(calls, ours.num_steps - 1, ours.device)
        tokens = sum(ours.batches.batch_at(step).num_tokens for step in range(ours.num_steps))
    difference = max(abs(a - b) for a, b in zip(losses["rook"], losses["direct"], strict=True))
    return {
        "seconds": seconds,
        "device": device_name(ours.device),
        "loss_difference": difference,
        "replayed_share": round(statistics.mean(shares), 3),
        "budget_mib": f"{ours.budget_mib:.0f}",  # JSON has no inf
        "tokens_per_step": round(tokens / ours.num_steps),
    }


def set_dropout(model: "torch.nn.Module", share: float, of_attention: float) -> None:
    """Dropout of a transformers model, of hidden states and of attention. With the latter the
    peer's attention leaves its fused kernel."""
    from torch import nn

    for name, module in model.named_modules():
        if isinstance(module, nn.Dropout):
            is_of_attention = name.endswith((".self.dropout", ".attn.dropout"))  # BERT, MPNet
            module.p = of_attention if is_of_attention else share


def peer_model(
    args: argparse.Namespace, device: "torch.device", dropout: tuple[float, float] | None
) -> "SentenceTransformer":
    """args.base for texts of args.length tokens; dropout None: as its config.json says."""
    from sentence_transformers import SentenceTransformer

    from models.pretrained import resolve_base

    model = SentenceTransformer(str(resolve_base(args.base)), device=device.type)
    model.max_seq_length = args.length
    if dropout:
        set_dropout(model, *dropout)
    return model


def peer_trainer(
    model: "SentenceTransformer",
    loss: "torch.nn.Module",
    pairs: list[tuple[str, str]],
    device: "torch.device",
    *,
    batch: int,
    precision: str,
    out: str,
    callbacks: tuple = (),
    **settings: Any,
) -> "SentenceTransformerTrainer":
    """SentenceTransformerTrainer as its documentation shows it, with nothing saved or reported."""
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )

    return SentenceTransformerTrainer(
        model=model,
        args=SentenceTransformerTrainingArguments(
            output_dir=out,
            per_device_train_batch_size=batch,
            bf16=precision == "bf16",
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            **settings,
        ),
        train_dataset=Dataset.from_dict(
            {"anchor": [q for q, _ in pairs], "positive": [p for _, p in pairs]}
        ),
        callbacks=list(callbacks),
        loss=loss,
    )


def work_sentence_transformers(args: argparse.Namespace) -> dict:
    """Its trainer with one of its two losses."""
    from sentence_transformers.losses import (
        CachedMultipleNegativesRankingLoss,
        MultipleNegativesRankingLoss,
    )
    from transformers import TrainerCallback

    from benchmarks.turns import PeakMemory, clock, device_name, synchronise
    from runtime.device import pick_device

    device = pick_device(args.device)
    model = peer_model(args, device, (args.dropout, args.attention_dropout[1]))
    if args.worker == "sentence-transformers-cached":
        loss = CachedMultipleNegativesRankingLoss(
            model, scale=20.0, mini_batch_size=args.mini_batch
        )
    else:
        loss = MultipleNegativesRankingLoss(model, scale=20.0)
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronise(device)
            times.append(clock())

    with tempfile.TemporaryDirectory() as out, PeakMemory(device) as memory:
        peer_trainer(
            model,
            loss,
            pairs(args),
            device,
            batch=args.batch,
            precision=args.precision[0],
            out=out,
            callbacks=(Times(),),
            num_train_epochs=1,
            learning_rate=2e-5,
            disable_tqdm=True,
            dataloader_drop_last=True,
            seed=0,
        ).train()
    steps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "rate": args.batch / statistics.median(steps),
        "peak_mib": memory.mib,
        "device": device_name(device),
    }


if __name__ == "__main__":
    from benchmarks.turns import main

    workers = {
        "rook": work_rook,
        "direct": work_rook,
        "together": work_together,
        "sentence-transformers": work_sentence_transformers,
        "sentence-transformers-cached": work_sentence_transformers,
    }
    main(arguments, compare, workers)
