"""What the loss is of a training step: python -m benchmarks.share --device cuda

A step of a batch of B pairs takes B times what a query and a passage cost to encode, forward and
backward, and the loss on B x B scores. The first is measured on one pack of texts and multiplied,
because it grows with B alone; the second is measured at B. Encoders have random weights: time does
not depend on them. Left out are the optimiser and the second encoding of what the activation budget
does not hold (up to a third more): both make the loss's share smaller.

trained  both towers                frozen  the passage tower runs forward only

Shapes: T tokens of a pack, S texts, D embedding.
"""

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.ceilings import milliseconds
from benchmarks.infonce import table
from benchmarks.infonce_cells import CELL_LIMIT_S, Cell, run_cells
from benchmarks.infonce_sides import OURS, SIDES, Case
from benchmarks.turns import DATA, append_csv, device_name, provenance
from models.towers import Tower
from models.transformer import Encoder, EncoderConfig, Packed, pack
from runtime.device import autocast_for, has_fast_bf16, keep_freed_memory, pick_device

ENCODERS = {
    "minilm": {"hidden": 384, "num_layers": 6, "num_heads": 12, "intermediate": 1536},
    "e5-large": {"hidden": 1024, "num_layers": 24, "num_heads": 16, "intermediate": 4096},
    "tiny": {"hidden": 32, "num_layers": 2, "num_heads": 2, "intermediate": 64},
}
SHOWN = {
    k: k for k in ("encoder", "passages", "batch", "side", "encode_ms", "loss_ms", "share", "note")
}


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.share",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--encoder", nargs="+", choices=ENCODERS, default=["minilm", "e5-large"])
    parser.add_argument("--batch", nargs="+", type=int, default=[1024, 16_384, 131_072])
    parser.add_argument(
        "--side", nargs="+", choices=SIDES, default=[OURS, "rook-eform", "rook-torch", "dense"]
    )
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--precision", choices=("fp32", "bf16"), help="default: bf16 where the device multiplies it"
    )
    parser.add_argument("--query-tokens", type=int, default=32)
    parser.add_argument("--passage-tokens", type=int, default=128)
    parser.add_argument("--pack-tokens", type=int, default=16_384, help="of the sample encoded")
    parser.add_argument("--limit-s", type=float, default=float("inf"))
    parser.add_argument("--cell-limit-s", type=float, default=CELL_LIMIT_S)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to share.csv")
    parser.add_argument("--out", metavar="FOLDER", help="of share.csv, for benchmarks/data")
    return parser.parse_args(given)


def random_tower(name: str, device: torch.device) -> Tower:
    torch.manual_seed(0)
    config = EncoderConfig(
        layout="bert", vocab_size=30_522, max_positions=512, type_vocab=2, **ENCODERS[name]
    )
    with device:
        encoder = Encoder(config)
    return Tower(encoder, pooling="mean", projections=[], normalize=True).train()


def random_pack(tokens: int, length: int, device: torch.device) -> Packed:
    """About `tokens` tokens in texts of equal length."""
    ids_SL = torch.randint(1000, 30_000, (max(1, tokens // length), length))
    return pack(list(ids_SL.numpy()), device)


def text_ms(tower: Tower, packed: Packed, precision: str, device: torch.device) -> dict[str, float]:
    """Milliseconds a text: {"trained": forward and backward, "frozen": forward}."""
    autocast = autocast_for(precision, device)
    grad_SD = torch.randn(len(packed.lengths), tower.width, device=device)

    def train() -> None:
        with autocast():
            out_SD = tower(packed)
        out_SD.backward(grad_SD)
        tower.zero_grad(set_to_none=True)

    @torch.no_grad()
    def encode() -> None:
        with autocast():
            tower(packed)

    return {
        kind: milliseconds(call, device) / len(packed.lengths)
        for kind, call in (("trained", train), ("frozen", encode))
    }


def rows_of(
    args: argparse.Namespace,
    device: torch.device,
    keep: Callable[[list[dict]], None] = lambda rows: None,
) -> list[dict]:
    """keep  called with the rows of a cell as soon as it is measured"""
    deadline = time.monotonic() + args.limit_s
    precision = args.precision or ("bf16" if has_fast_bf16(device) else "fp32")
    encode: dict[str, dict[str, float]] = {}  # encoder -> milliseconds of a pair
    for name in args.encoder:
        tower = random_tower(name, device)
        query, passage = (
            text_ms(tower, random_pack(args.pack_tokens, length, device), precision, device)
            for length in (args.query_tokens, args.passage_tokens)
        )
        encode[name] = {kind: query["trained"] + passage[kind] for kind in ("trained", "frozen")}
        del tower
    if device.type == "cuda":
        torch.cuda.empty_cache()  # the losses have processes of their own
    keys = [
        (name, Case("one-sided", precision, B, B, ENCODERS[name]["hidden"]), side)
        for B in args.batch
        for name in args.encoder
        for side in args.side
    ]
    rows, reported = [], iter(keys)  # cells are reported in their order

    def report(cell: Cell, result: dict) -> None:
        print(cell.case.name, cell.side, result.get("ms", result["note"]))
        name, case, side = next(reported)
        of_cell = []
        for kind, pair_ms in encode[name].items():
            encode_ms, loss_ms = case.B * pair_ms, result.get("ms")
            share = None if loss_ms is None else loss_ms / (loss_ms + encode_ms)
            of_cell.append(
                {
                    "encoder": name,
                    "passages": kind,
                    "batch": case.B,
                    "side": side,
                    "encode_ms": float(f"{encode_ms:.4g}"),
                    "loss_ms": "" if loss_ms is None else loss_ms,
                    "share": "" if share is None else float(f"{share:.3g}"),
                    "pair_ms": float(f"{pair_ms:.4g}"),
                    "precision": precision,
                    "device": device_name(device),
                    "query_tokens": args.query_tokens,
                    "passage_tokens": args.passage_tokens,
                    "note": result["note"],
                }
            )
        rows.extend(of_cell)
        if "ms" in result:
            keep(of_cell)

    run_cells(
        [Cell(case, side, checked=False) for _, case, side in keys],
        device=device.type, limit_s=deadline - time.monotonic(), cell_limit_s=args.cell_limit_s,
        report=report,
    )  # fmt: skip
    return sorted(rows, key=lambda r: (r["encoder"], r["passages"], r["batch"]))


def main() -> None:
    args = arguments()
    keep_freed_memory()
    folder = Path(args.out or DATA)

    def keep(rows: list[dict]) -> None:
        if args.csv:
            folder.mkdir(parents=True, exist_ok=True)
            append_csv(folder / "share.csv", [r | provenance() for r in rows])

    rows = rows_of(args, pick_device(args.device), keep)
    print(
        f"encode_ms: measured on packs of {args.pack_tokens} tokens ({args.query_tokens} a query,"
        f" {args.passage_tokens} a passage), times the batch; share: of encode_ms + loss_ms"
    )
    print(table(rows, SHOWN))
    if args.json:
        Path(args.json).write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
