"""Peak memory of a training step against the batch size: python -m benchmarks.memory --csv --figure

Batches of 64 to 16,384 pairs of short texts through the cached step with a fixed budget of kept
graphs, and through the direct step (benchmarks/step.py) as far as is reasonable. Each step runs in
a process of its own after a small one, so that optimiser state and libraries are in memory as in
the middle of a run. The embeddings of a batch and their gradients are the one part that must grow
with it: they are a line of their own.

peak_mib is resident memory with the allocator of train.py, in_use_mib what it would be without the
freed buffers that it holds: after many chunks glibc's heap has hundreds of MiB of holes.

Shapes: B queries, N passages, D embedding.
"""

import argparse
import csv
import json
import tempfile
from collections.abc import Sequence
from pathlib import Path

from benchmarks.step import BASE, direct_step

SIZES = tuple(2**k for k in range(6, 15))
FIGURE = Path(__file__).parents[1] / "docs" / "figures" / "memory_vs_batch.png"
CSV_NAME = "memory.csv"
# what must agree for rows to be points of one line
SAME = ("base", "precision", "device", "length", "budget_mib", "chunk_tokens")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.memory",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument("--batch", type=int, nargs="*", default=list(SIZES), help="pairs a step")
    parser.add_argument(
        "--direct-up-to", type=int, default=512, metavar="BATCH", help="0: the cached step alone"
    )
    parser.add_argument(
        "--length", type=int, default=32, help="tokens of the longest text; the shortest has half"
    )
    parser.add_argument("--budget-mib", type=float, default=512.0, help="graphs kept")
    parser.add_argument("--chunk-tokens", type=int, default=4096)
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--device", default="cpu", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help=f"append to benchmarks/data/{CSV_NAME}")
    parser.add_argument(
        "--figure",
        nargs="?",
        const=str(FIGURE),
        metavar="FILE",
        help="draw docs/figures/memory_vs_batch.png, with --csv from earlier rows of the same"
        " settings too (--batch without a number measures nothing new)",
    )
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.length < 8 or any(b < 1 for b in args.batch):
        parser.error(f"--length {args.length} must be >= 8 and --batch {args.batch} positive")
    return args


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import DATA, emit

    rows = [measured(args, batch) for batch in args.batch]
    if rows or args.json:
        emit(rows, csv_name=CSV_NAME if args.csv else None, json_path=args.json)
    if args.figure:
        shown = rows
        if args.csv:
            with (DATA / CSV_NAME).open(encoding="utf-8") as file:
                shown = list(csv.DictReader(file))
        plot(one_line(shown), Path(args.figure))


def measured(args: argparse.Namespace, batch: int) -> dict:
    from benchmarks.turns import run_worker

    keys = ("base", "length", "budget_mib", "chunk_tokens", "precision", "device")
    options = [w for key in keys for w in (f"--{key.replace('_', '-')}", str(getattr(args, key)))]
    options += ["--batch", str(batch)]
    ours = run_worker("benchmarks.memory", ["--worker", "rook", *options])
    has_peer = batch <= args.direct_up_to
    peer = run_worker("benchmarks.memory", ["--worker", "direct", *options]) if has_peer else {}
    return {
        "name": f"memory b{batch} l{args.length} budget {args.budget_mib:g}",
        "peer": "direct" if has_peer else "",
        "precision": args.precision,
        "device": ours["device"],
        "rate": ours["rate"],
        "peer_rate": peer.get("rate", ""),
        "ratio": round(ours["rate"] / peer["rate"], 3) if has_peer else "",
        "peak_mib": ours["peak_mib"],
        "peer_peak_mib": peer.get("peak_mib", ""),
        "batch": batch,
        "base": args.base,
        "length": args.length,
        "budget_mib": args.budget_mib,
        "chunk_tokens": args.chunk_tokens,
        "peer_in_use_mib": peer.get("in_use_mib", ""),
        **{k: v for k, v in ours.items() if k not in ("rate", "peak_mib", "device")},
    }


def one_line(rows: Sequence[dict]) -> list[dict]:
    """Rows with the settings of the last one, a batch size once (the newest), by size."""
    same = [r for r in rows if all(str(r[k]) == str(rows[-1][k]) for k in SAME)]
    newest = {int(r["batch"]): r for r in same}
    return [newest[batch] for batch in sorted(newest)]


def work(args: argparse.Namespace) -> dict:
    """One measured step of the cached or the direct kind."""
    import numpy as np
    from torch.nn.utils import clip_grad_norm_

    from benchmarks.turns import (
        PeakMemory,
        clock,
        device_name,
        release_freed_memory,
        synchronise,
    )
    from conf.schema import DataConfig, LossConfig, ModelConfig, OptimConfig
    from data.batches import Batches
    from data.datasets import open_data
    from losses.build import build_loss
    from losses.grad_cache import train_step
    from models.build import build_model
    from runtime.device import autocast_for, keep_freed_memory, pick_device
    from runtime.optim import build_optimizer

    keep_freed_memory()
    device, (batch_size,) = pick_device(args.device), args.batch
    model = ModelConfig(
        base=args.base, max_query_length=args.length, max_passage_length=args.length
    )
    towers = build_model(model, dims=[]).to(device)
    loss_fn = build_loss(LossConfig()).to(device)
    optimizer = build_optimizer(towers, loss_fn, OptimConfig(batch_size=batch_size))
    settings = {
        "seed": 0,
        "step": 0,
        "chunk_tokens": args.chunk_tokens,
        "device": device,
        "autocast": autocast_for(args.precision, device),
    }

    def take_step(batch) -> float:
        share = 0.0
        if args.worker == "direct":
            direct_step(towers, loss_fn, batch, **settings)
        else:
            budget = args.budget_mib
            _, numbers = train_step(
                towers, loss_fn, batch, **settings, activation_budget_mib=budget
            )
            share = float(numbers["replayed_share"])
        clip_grad_norm_(towers.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        synchronise(device)
        return share

    with tempfile.TemporaryDirectory() as cache:
        path = Path(cache) / "pairs.jsonl"
        vocabulary = towers.tokenizer_query.get_vocab()
        with path.open("w", encoding="utf-8") as file:
            for query, positive in made_up_pairs(vocabulary, batch_size, args.length):
                file.write(json.dumps({"query": query, "positive": positive}) + "\n")
        source = DataConfig(root=str(path), dev_fraction=0.0, test_fraction=0.0, cache_dir=cache)
        tokenizers = towers.tokenizer_query, towers.tokenizer_passage
        data = open_data(source, towers.spec, *tokenizers)
        take_step(Batches(data.train, batch_size=min(8, batch_size), seed=0).batch_at(0))
        batch = Batches(data.train, batch_size=batch_size, seed=0).batch_at(0)
        release_freed_memory()
        with PeakMemory(device, in_use=True) as memory:
            began = clock()
            share = take_step(batch)
            seconds = clock() - began
    num_texts = len(batch.query_tokens) + len(batch.passage_tokens)
    embeddings = 2 * num_texts * towers.width * np.dtype(np.float32).itemsize  # and gradients
    return {
        "rate": round(batch_size / seconds, 2),
        "peak_mib": round(memory.mib),
        "before_mib": round(memory.mib - memory.grown_mib),
        "in_use_mib": round(memory.mib - memory.grown_mib + memory.in_use_mib),
        "embeddings_mib": round(embeddings / 2**20, 2),
        "tokens": batch.num_tokens,
        "replayed_share": round(share, 3),
        "device": device_name(device),
    }


def made_up_pairs(vocabulary: Sequence[str], num: int, length: int):
    """`num` seeded pairs of texts of random words, length / 2 to length tokens each: the quickstart
    has too few pairs for the largest batch, and memory does not depend on what the words say."""
    import numpy as np

    words = sorted(w for w in vocabulary if w.isascii() and w.isalpha())
    rng = np.random.default_rng(0)

    def text() -> str:
        num_words = rng.integers(length // 2, length + 1) - 2  # two special tokens
        return " ".join(words[i] for i in rng.integers(0, len(words), num_words))

    for _ in range(num):
        yield text(), text()


def plot(rows: Sequence[dict], path: Path) -> Path:
    """Peaks of both kinds of step and the embeddings' own size, on logarithmic axes."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    if not rows:
        raise SystemExit("--figure: nothing was measured; name sizes with --batch")
    figure = Figure(figsize=(6.8, 3.8), dpi=150, layout="constrained")
    FigureCanvasAgg(figure)
    axis = figure.subplots()
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(axis="y", color="#e4e4e4", linewidth=0.8)
    axis.set_axisbelow(True)

    cached = f"cached, {float(rows[0]['budget_mib']):g} MiB of graphs kept"
    for key, label, colour, style in (
        ("peer_peak_mib", "direct: one graph of everything", "#c8553d", "o-"),
        ("peer_in_use_mib", "direct, in use", "#c8553d", "o:"),
        ("peak_mib", cached, "#0b6fb8", "o-"),
        ("in_use_mib", "cached, in use", "#0b6fb8", "o:"),
        ("embeddings_mib", "embeddings and their gradients alone", "#7f8c99", "--"),
    ):
        points = [(int(r["batch"]), float(r[key])) for r in rows if r[key] != ""]
        if points:
            axis.plot(*zip(*points, strict=True), style, color=colour, label=label, markersize=3)
    batches = [int(r["batch"]) for r in rows]
    axis.set_xscale("log", base=2)
    axis.set_yscale("log")
    axis.set_xticks(batches, [f"{b:,}" for b in batches])
    axis.minorticks_off()
    low, high = axis.get_ylim()
    ticks = [t for k in range(-2, 7) for t in (10**k, 3 * 10**k) if low <= t <= high]
    axis.set_yticks(ticks, [f"{t:,g}" for t in ticks])
    axis.set_xlabel("batch, pairs")
    axis.set_ylabel("peak of the process, MiB")
    last = rows[-1]
    model = Path(str(last["base"])).name
    axis.set_title(
        f"{model}, {last['precision']} on {last['device']}, texts of up to {last['length']} tokens",
        loc="left",
        fontsize=10,
    )
    axis.legend(frameon=False, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    # without the version in the file, the same numbers give the same bytes
    figure.savefig(path, format="png", metadata={"Software": None})
    return path


if __name__ == "__main__":
    from benchmarks.turns import main

    main(arguments, compare, {"rook": work, "direct": work})
