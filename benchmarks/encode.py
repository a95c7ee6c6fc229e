"""Encoding speed against a peer: python -m benchmarks.encode --peer sentence-transformers

Passages of mixed lengths through both sides with the same model, each in a process of its own, by
turns: once in the
same precision, once as each comes by default. The median of the passes after the first counts.
"""

import argparse
import statistics

from benchmarks.step import BASE, PEAK_FLOPS


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.encode", description=__doc__)
    parser.add_argument(
        "--peer", choices=("sentence-transformers",), default="sentence-transformers"
    )
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument(
        "--precision", nargs="+", choices=("fp32", "bf16", "default"), default=["fp32", "default"]
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--texts", type=int, default=512)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text")
    parser.add_argument(
        "--passes", type=int, default=3, help="in each process; the first is not counted"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/data/encode.csv")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import by_turns, emit, row

    rows = []
    for precision in args.precision:
        keys = ("base", "device", "texts", "length", "passes")
        options = [w for key in keys for w in (f"--{key}", str(getattr(args, key)))]
        results = by_turns(
            "benchmarks.encode",
            ["rook", args.peer],
            [*options, "--precision", precision],
            args.rounds,
        )
        rows.append(row(f"encode l{args.length}", args.peer, precision, results))
    emit(rows, csv_name="encode.csv" if args.csv else None, json_path=args.json)


def texts(args: argparse.Namespace) -> list[str]:
    """Half questions, half passages of the quickstart, seeded: lengths from a few tokens to beyond
    the cut."""
    import numpy as np

    from data.pydocs import read_pydocs

    docs = read_pydocs(None, cache_dir="artifacts/cache")
    if args.texts > 2 * len(docs):
        raise SystemExit(f"--texts {args.texts}: this machine's Python gives {2 * len(docs)}")
    chosen = np.random.default_rng(0).permutation(len(docs))
    half = args.texts // 2
    return [docs.queries[i] for i in chosen[:half]] + [
        docs.passages[i] for i in chosen[: args.texts - half]
    ]


def timed(encode, args: argparse.Namespace, device) -> dict:
    from benchmarks.turns import PeakMemory, clock, device_name, synchronise

    times = []
    with PeakMemory(device) as memory:
        for _ in range(args.passes):
            began = clock()
            encode()
            synchronise(device)
            times.append(clock() - began)
    rate = args.texts / statistics.median(times[1:] or times)
    return {"rate": rate, "peak_mib": memory.mib, "device": device_name(device)}


def work_rook(args: argparse.Namespace) -> dict:
    from conf.schema import ModelConfig
    from evals.encode import encode
    from models.build import build_model
    from runtime.device import keep_freed_memory, pick_device, pick_precision

    keep_freed_memory()
    device = pick_device(args.device)
    config = ModelConfig(
        base=args.base, max_query_length=args.length, max_passage_length=args.length
    )
    towers = build_model(config, dims=[]).to(device)
    some = texts(args)
    precision = pick_precision(
        "auto" if args.precision[0] == "default" else args.precision[0], device
    )
    result = timed(lambda: encode(towers, some, "passage", precision=precision), args, device)
    tokens = sum(min(len(e.ids), args.length) for e in towers.tokenizer_passage.encode_batch(some))
    result |= {
        "ran_in": precision,
        "tokens_per_s": round(tokens / args.texts * result["rate"]),
        "padding_share": 0.0,
    }
    layers = sum(p.numel() for n, p in towers.passage.named_parameters() if ".layers." in n)
    peak = next((v for k, v in PEAK_FLOPS.items() if k in result["device"]), None)
    return result | (
        {"flop_utilisation": round(2 * layers * result["tokens_per_s"] / peak, 4)} if peak else {}
    )


def work_sentence_transformers(args: argparse.Namespace) -> dict:
    import torch
    from sentence_transformers import SentenceTransformer

    from models.pretrained import resolve_base
    from runtime.device import autocast_for, pick_device

    device = pick_device(args.device)
    model = SentenceTransformer(str(resolve_base(args.base)), device=device.type)
    model.max_seq_length = args.length
    some = texts(args)
    autocast = autocast_for("bf16" if args.precision[0] == "bf16" else "fp32", device)

    def encode() -> torch.Tensor:
        with autocast():
            return model.encode(some, show_progress_bar=False)

    return timed(encode, args, device)


if __name__ == "__main__":
    from benchmarks.turns import main

    workers = {"rook": work_rook, "sentence-transformers": work_sentence_transformers}
    main(arguments, compare, workers)
