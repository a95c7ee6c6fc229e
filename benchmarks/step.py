"""Training speed against a peer: python -m benchmarks.step --peer sentence-transformers

Both sides train the same model on the same pairs with the same batch, length, loss, optimiser and
precision, each in a
process of its own, by turns. A side's rate is pairs over the median time of a step, the first step
left out.
On a GPU tokens/s, the share of padding and model FLOP utilisation are reported too.
"""

import argparse
import itertools
import json
import statistics
import tempfile
from pathlib import Path

PEERS = ("sentence-transformers",)
BASE = "sentence-transformers/all-MiniLM-L6-v2"
PEAK_FLOPS = {
    "H100": 989e12,
    "H200": 989e12,
    "A100": 312e12,
}  # dense bf16, from the vendor's data sheets


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step", description=__doc__)
    parser.add_argument("--peer", choices=PEERS, default="sentence-transformers")
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16"), default=["fp32", "bf16"]
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--pairs", type=int, default=512, help="pairs of Python docstrings and bodies"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text")
    parser.add_argument(
        "--dropout", type=float, default=0.1, help="of hidden states, on both sides"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--chunk-tokens", type=int, default=4096)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/data/step.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import by_turns, emit, row

    rows = []
    for precision in args.precision:
        keys = ("base", "device", "pairs", "batch", "length", "dropout", "chunk_tokens")
        options = [
            w for key in keys for w in (f"--{key.replace('_', '-')}", str(getattr(args, key)))
        ]
        results = by_turns(
            "benchmarks.step",
            ["rook", args.peer],
            [*options, "--precision", precision],
            args.rounds,
        )
        rows.append(row(f"step b{args.batch} l{args.length}", args.peer, precision, results))
    emit(rows, csv_name="step.csv" if args.csv else None, json_path=args.json)


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


def work_rook(args: argparse.Namespace) -> dict:
    """Our training step, batches made as train.py makes them."""
    import torch

    from benchmarks.turns import PeakMemory, clock, device_name, synchronise
    from conf.schema import DataConfig, LossConfig, ModelConfig, OptimConfig
    from data.batches import Batches
    from data.datasets import open_data
    from losses.build import build_loss
    from losses.grad_cache import train_step
    from models.build import build_model
    from runtime.device import autocast_for, keep_freed_memory, pick_device
    from runtime.optim import build_optimizer, set_lr

    keep_freed_memory()
    device = pick_device(args.device)
    model_config = ModelConfig(
        base=args.base,
        max_query_length=args.length,
        max_passage_length=args.length,
        dropout=args.dropout,
    )
    towers = build_model(model_config, dims=[]).to(device)
    loss_fn = build_loss(LossConfig(temperature=0.05)).to(device)
    optim = OptimConfig(lr=2e-5, batch_size=args.batch)
    optimizer = build_optimizer(towers, loss_fn, optim)
    autocast = autocast_for(args.precision[0], device)
    tokens, losses, times = 0, [], []
    with tempfile.TemporaryDirectory() as cache, PeakMemory(device) as memory:
        rows = Path(cache) / "pairs.jsonl"
        lines = [json.dumps({"query": q, "positive": p}) for q, p in pairs(args)]
        rows.write_text("\n".join(lines) + "\n", encoding="utf-8")
        source = DataConfig(root=str(rows), dev_fraction=0.0, test_fraction=0.0, cache_dir=cache)
        data = open_data(source, towers.spec, towers.tokenizer_query, towers.tokenizer_passage)
        batches = Batches(data.train, batch_size=args.batch, seed=0)
        for step in range(args.pairs // args.batch):
            began = clock()
            batch = batches.batch_at(step)
            set_lr(optimizer, optim.lr)
            loss, _ = train_step(
                towers,
                loss_fn,
                batch,
                seed=0,
                step=step,
                chunk_tokens=args.chunk_tokens,
                device=device,
                autocast=autocast,
            )
            torch.nn.utils.clip_grad_norm_(towers.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
            synchronise(device)
            times.append(clock() - began)
            tokens += batch.num_tokens
    seconds = statistics.median(times[1:])
    result = {
        "rate": args.batch / seconds,
        "peak_mib": memory.mib,
        "device": device_name(device),
        "losses": losses,
        "tokens_per_s": round(tokens / len(times) / seconds),
        "padding_share": 0.0,
    }
    flops = (
        6
        * sum(p.numel() for n, p in towers.query.named_parameters() if ".layers." in n)
        * tokens
        / len(times)
    )
    peak = next((v for k, v in PEAK_FLOPS.items() if k in result["device"]), None)
    return result | ({"flop_utilisation": round(flops / seconds / peak, 4)} if peak else {})


def work_sentence_transformers(args: argparse.Namespace) -> dict:
    """SentenceTransformerTrainer with MultipleNegativesRankingLoss, as its documentation shows
    it."""
    import torch
    from datasets import Dataset
    from sentence_transformers import (
        SentenceTransformer,
        SentenceTransformerTrainer,
        SentenceTransformerTrainingArguments,
    )
    from sentence_transformers.losses import MultipleNegativesRankingLoss
    from transformers import TrainerCallback

    from benchmarks.turns import PeakMemory, clock, device_name, synchronise
    from models.pretrained import resolve_base
    from runtime.device import pick_device

    device = pick_device(args.device)
    model = SentenceTransformer(str(resolve_base(args.base)), device=device.type)
    model.max_seq_length = args.length
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = args.dropout
    some = pairs(args)
    data = Dataset.from_dict({"anchor": [q for q, _ in some], "positive": [p for _, p in some]})
    times: list[float] = []

    class Times(TrainerCallback):
        def on_step_end(self, *_, **__):
            synchronise(device)
            times.append(clock())

    with tempfile.TemporaryDirectory() as out, PeakMemory(device) as memory:
        settings = SentenceTransformerTrainingArguments(
            output_dir=out,
            per_device_train_batch_size=args.batch,
            num_train_epochs=1,
            learning_rate=2e-5,
            bf16=args.precision[0] == "bf16",
            use_cpu=device.type == "cpu",
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
            dataloader_drop_last=True,
            seed=0,
        )
        trainer = SentenceTransformerTrainer(
            model=model,
            args=settings,
            train_dataset=data,
            callbacks=[Times()],
            loss=MultipleNegativesRankingLoss(model, scale=20.0),
        )
        trainer.train()
    steps = [b - a for a, b in itertools.pairwise(times)]
    return {
        "rate": args.batch / statistics.median(steps),
        "peak_mib": memory.mib,
        "device": device_name(device),
    }


if __name__ == "__main__":
    from benchmarks.turns import main

    workers = {"rook": work_rook, "sentence-transformers": work_sentence_transformers}
    main(arguments, compare, workers)
