"""Mining hard negatives against sentence-transformers' mine_hard_negatives:

    python -m benchmarks.mine --data ../shared/datasets/en_scifact

Both sides mine for the train queries of a BEIR folder with the same model, each in a process of its
own, by turns, nothing cached; a side's rate is queries over the time from texts to negatives.

defaults  each one's defaults
fp32      3 negatives, no limits, float32: the same negatives are asserted
veto      the same cross-encoder leaves out what it scores above a bound. sentence-transformers
          scores every candidate, one query at a time, and takes the highest scores that are left;
          ours asks in batches over all queries about those that the retriever would take
again     the defaults a second time, with another number of negatives: ours finds its embeddings
          in the cache, the peer has none unless it is told to
"""

import argparse
import json
import math
import statistics
import tempfile
import time
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.step import BASE

if TYPE_CHECKING:
    from data.pool import Pool

PEER = "sentence-transformers"
CASES = ("defaults", "fp32", "veto", "again")
TIE = 1e-5  # scores of two passages that may change places: float32 sums in another order


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mine",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--data", help="BEIR folder with a train split")
    parser.add_argument("--base", default=BASE, help="model: folder or hub id")
    parser.add_argument("--case", nargs="+", choices=CASES, default=["defaults", "fp32", "veto"])
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the queries and of the other passages"
    )
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", metavar="FILE")
    parser.add_argument("--csv", action="store_true", help="append to benchmarks/data/mine.csv")
    for name in ("worker", "reranker", "above"):
        parser.add_argument(f"--{name}", help=argparse.SUPPRESS)
    return parser.parse_args()


def compare(args: argparse.Namespace) -> None:
    from benchmarks.turns import by_turns, emit, row

    if not args.data:
        raise SystemExit("--data=<BEIR folder> is needed, e.g. ../shared/datasets/en_scifact")
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        for case in args.case:
            keys = ("data", "base", "device", "share")
            options = [w for key in keys for w in (f"--{key}", str(getattr(args, key)))]
            if case == "veto":
                options += ["--reranker", folder, "--above", str(make_reranker(args, Path(folder)))]
            results = by_turns(
                "benchmarks.mine", ["rook", PEER], [*options, "--case", case], args.rounds
            )
            found = {side: [r.pop("negatives") for r in some] for side, some in results.items()}
            check(case, found["rook"][0], found[PEER][0])
            assert all(one == some[0] for some in found.values() for one in some)
            precision = results["rook"][0]["ran_in"] if case == "defaults" else "fp32"
            peer_cpu_s = statistics.median(r["cpu_s"] for r in results[PEER])
            rows.append(row(f"mine {case}", PEER, precision, results) | {"peer_cpu_s": peer_cpu_s})
    emit(rows, csv_name="mine.csv" if args.csv else None, json_path=args.json)


def check(case: str, ours: dict, theirs: dict) -> None:
    """Raise SystemExit where the case promises equal negatives and they differ by more than ties.

    Both are query -> [[passage, score], ...].
    """
    if case != "fp32":
        return
    assert ours.keys() == theirs.keys()
    for query, expected in theirs.items():
        for (text, score), (wanted, its_score) in zip(ours[query], expected, strict=True):
            if abs(score - its_score) > TIE:
                raise SystemExit(
                    f"other negatives for {query!r}: {text[:60]!r} ({score}) and"
                    f" {wanted[:60]!r} ({its_score})"
                )
            if text != wanted and [s for t, s in expected if t == text] == []:
                print(f"  equal scores, other passage: {query!r}")


def read_pool(args: argparse.Namespace) -> "Pool":
    """The share of the train queries, their positives, and the share of the other passages."""
    from conf.schema import PrepareConfig
    from data import pool as module

    whole = module.read_pool(PrepareConfig(data=args.data), Path(args.data))
    part = module.Pool()
    num = max(1, round(args.share * len(whole.positives)))
    for q in range(num):
        positives = [part.docs.add(whole.docs.texts[d]) for d in whole.positives[q]]
        part.add(whole.queries.texts[q], None, positives)
    answers = {d for some in whole.positives for d in some}
    others = [t for d, t in enumerate(whole.docs.texts) if d not in answers]
    for text in others[: round(args.share * len(others))]:
        part.docs.add(text)
    return part


def write_beir(pool: "Pool", folder: Path) -> None:
    (folder / "qrels").mkdir(parents=True)
    sides = (("corpus.jsonl", pool.docs), ("queries.jsonl", pool.queries))
    for name, side in sides:
        rows = [{"_id": i, "text": t} for i, t in zip(side.ids, side.texts, strict=True)]
        (folder / name).write_text("".join(json.dumps(r) + "\n" for r in rows))
    lines = [
        f"{pool.queries.ids[q]}\t{pool.docs.ids[d]}\t1"
        for q, some in enumerate(pool.positives)
        for d in some
    ]
    (folder / "qrels/train.tsv").write_text("\n".join(lines) + "\n")


def make_reranker(args: argparse.Namespace, folder: Path) -> float:
    """The base as a cross-encoder with a random head, saved; the logit that is exceeded by a fifth
    of some pairs."""
    import numpy as np
    import torch

    from evals.rerank import score_pairs
    from models.export_reranker import export_reranker
    from models.reranker import load_reranker

    torch.manual_seed(0)
    reranker = load_reranker(args.base)
    export_reranker(reranker, folder, {})
    pool = read_pool(args)
    pairs = [(q, d) for q in range(min(8, len(pool.queries))) for d in range(8)]
    score_P = score_pairs(reranker, pool.queries.texts, pool.docs.texts, pairs, precision="fp32")
    return float(np.quantile(score_P, 0.8))


def work_rook(args: argparse.Namespace) -> dict:
    from benchmarks.turns import PeakMemory, clock, device_name
    from conf.schema import MineConfig, PrepareConfig
    from data.negatives import mine_file
    from models.pretrained import load_towers
    from runtime.device import pick_device, pick_precision

    case, device = args.case[0], pick_device(args.device)
    pool = read_pool(args)
    load_towers(args.base)  # as the peer: imports and a first look at the disk are not counted
    mine = {"model": args.base}
    if case in ("fp32", "veto"):
        mine |= {"fraction": None, "near_duplicate": None}
    if case == "veto":
        probability = 1 / (1 + math.exp(-float(args.above)))
        mine |= {"reranker": args.reranker, "veto_above": probability}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_beir(pool, folder / "set")
        precision = "auto" if case in ("defaults", "again") else "fp32"

        def run(num_negatives: int) -> None:
            c = PrepareConfig(
                data=str(folder / "set"), device=args.device, precision=precision,
                cache_dir=str(folder / "cache"),
                mine=MineConfig(**mine, num_negatives=num_negatives),
            )  # fmt: skip
            mine_file(c, folder / "set", folder / "mine.jsonl")

        if case == "again":
            run(3)
        with PeakMemory(device) as memory:
            began, began_cpu = clock(), time.process_time()
            run(5 if case == "again" else 3)  # 3 is the default of both
            seconds, cpu_s = clock() - began, time.process_time() - began_cpu
        rows = [json.loads(line) for line in (folder / "mine.jsonl").read_text().splitlines()]
    found = {
        r["query"]: [
            [text, m["scores"]["model"]] for text, m in zip(r["negative"], r["mined"], strict=True)
        ]
        for r in rows
    }
    return {
        "rate": len(pool.queries) / seconds,
        "peak_mib": memory.mib,
        "device": device_name(device),
        "cpu_s": round(cpu_s, 2),
        "ran_in": pick_precision(precision, device),
        "queries": len(pool.queries),
        "passages": len(pool.docs),
        "negatives": found,
    }


def work_sentence_transformers(args: argparse.Namespace) -> dict:
    from datasets import Dataset
    from sentence_transformers import CrossEncoder, SentenceTransformer
    from sentence_transformers.util import mine_hard_negatives

    from benchmarks.turns import PeakMemory, clock, device_name
    from models.pretrained import resolve_base
    from runtime.device import pick_device

    case, device = args.case[0], pick_device(args.device)
    pool = read_pool(args)
    model = SentenceTransformer(str(resolve_base(args.base)), device=device.type)
    pairs = [(q, d) for q, some in enumerate(pool.positives) for d in some]
    data = Dataset.from_dict(
        {
            "query": [pool.queries.texts[q] for q, _ in pairs],
            "positive": [pool.docs.texts[d] for _, d in pairs],
        }
    )
    options: dict = {}
    if case == "fp32":
        options = {"output_format": "labeled-list", "output_scores": True}
    if case == "again":
        options = {"num_negatives": 5}
    if case == "veto":
        reranker = CrossEncoder(args.reranker, device=device.type)
        options = {"cross_encoder": reranker, "max_score": float(args.above)}
    with PeakMemory(device) as memory:
        began, began_cpu = clock(), time.process_time()
        mined = mine_hard_negatives(data, model, corpus=list(pool.docs.texts), **options)
        seconds, cpu_s = clock() - began, time.process_time() - began_cpu
    found = {}
    if case == "fp32":
        found = {
            row["query"]: list(zip(row["positive"], row["scores"], strict=True))[1:]
            for row in mined
        }
    return {
        "rate": len(pool.queries) / seconds,
        "peak_mib": memory.mib,
        "device": device_name(device),
        "cpu_s": round(cpu_s, 2),
        "negatives": found,
    }


if __name__ == "__main__":
    from benchmarks.turns import main

    main(arguments, compare, {"rook": work_rook, PEER: work_sentence_transformers})
