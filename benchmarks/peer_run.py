"""A whole run of the peer: python -m benchmarks.peer_run --data <BEIR folder> --out <folder>

SentenceTransformerTrainer with MultipleNegativesRankingLoss at several Matryoshka dims, as its
documentation shows it, on the pairs that train.py takes from the same folder. The model is saved in
--out; `python evaluate.py model=<out> data=<folder>` judges it as it judges ours. Quality and time
of one machine and hour then stand beside a run of ours.

Prints JSON on its last line: train_s of its loop, pairs, steps, peak_mib, and the settings.
"""

import argparse
import json
import tempfile
from pathlib import Path

from benchmarks.step import BASE, peer_model, peer_trainer


def arguments(given: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.peer_run",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", required=True, help="BEIR folder with a train split")
    parser.add_argument("--out", required=True, help="folder of the model, not there yet")
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument("--split", default="train")
    parser.add_argument(
        "--dims", type=int, nargs="+", default=[384, 256, 128, 64], help="of MatryoshkaLoss"
    )
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--length", type=int, default=256, help="tokens of the longest text")
    parser.add_argument("--lr", type=float, default=1e-4)
    parser.add_argument("--warmup", type=float, default=0.1, help="share of the steps")
    parser.add_argument("--epochs", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--precision", default="fp32", choices=("fp32", "bf16"))
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--dropout",
        type=float,
        nargs=2,
        metavar=("HIDDEN", "ATTENTION"),
        help="default: as the model's config.json says",
    )
    args = parser.parse_args(given)
    if Path(args.out).exists():
        parser.error(f"--out {args.out}: is there already; name another folder or delete it")
    return args


def pairs(args: argparse.Namespace) -> list[tuple[str, str]]:
    """A query and a passage for every relevant document, in the order of the qrels."""
    from data.beir import read_beir_examples

    examples = read_beir_examples(args.data, args.split)
    return [(e.query, positive) for e in examples for positive in e.positives]


def train(args: argparse.Namespace) -> dict:
    from sentence_transformers.losses import MatryoshkaLoss, MultipleNegativesRankingLoss

    from benchmarks.turns import PeakMemory, clock, synchronise
    from runtime.device import pick_device

    device = pick_device(args.device)
    model = peer_model(args, device, args.dropout)
    some = pairs(args)
    loss = MultipleNegativesRankingLoss(model, scale=20.0)
    with tempfile.TemporaryDirectory() as folder, PeakMemory(device) as memory:
        trainer = peer_trainer(
            model,
            MatryoshkaLoss(model, loss, matryoshka_dims=args.dims),
            some,
            device,
            batch=args.batch,
            precision=args.precision,
            out=folder,
            num_train_epochs=args.epochs,
            learning_rate=args.lr,
            warmup_steps=args.warmup,  # below 1 a share of all steps
            seed=args.seed,
        )
        began = clock()
        trainer.train()
        synchronise(device)
        train_s = clock() - began
    model.save_pretrained(args.out)
    return {
        "train_s": round(train_s, 1),
        "pairs": len(some),
        "steps": trainer.state.global_step,
        "peak_mib": round(memory.mib),
    }


def main() -> None:
    from benchmarks.turns import provenance

    args = arguments()
    found = train(args)
    print(json.dumps(found | vars(args) | provenance()))


if __name__ == "__main__":
    main()
