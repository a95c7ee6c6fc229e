"""Keep a finished run: python -m evals.log runs/<name>/<overrides>/seed<k> [--note TEXT]

Writes results/<name>.json (numbers, settings, versions, machine) and appends a line to
results/README.md.
"""

import argparse
import json
from datetime import date
from pathlib import Path

from evals.report import label_of
from runtime.run_dir import read_config, write_json_atomic, write_text_atomic

RESULTS = Path(__file__).parents[1] / "results"
KEPT = ("ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100", "mrr", "map")
COMPARED = ("ndcg@10", "accuracy@1", "mrr")  # kept of the differences


def kept(of: dict) -> dict:
    """The headline metrics of {"metrics", "delta"}, rounded; by dim where a retriever has dims."""

    def short(values: dict) -> dict:
        if values and all(isinstance(value, dict) for value in values.values()):
            return {dim: short(inner) for dim, inner in values.items()}
        return {m: round(values[m], 4) for m in KEPT if m in values}

    def compared(delta: dict) -> dict:
        if any(m in delta for m in COMPARED):
            return {m: delta[m] for m in COMPARED if m in delta}
        return {key: compared(inner) for key, inner in delta.items()}

    found = {"metrics": {name: short(values) for name, values in of["metrics"].items()}}
    key = "delta_of" if "delta_of" in of else "delta"  # a reranker's: to each other system
    return found | {key: compared(of[key])}


def without_folder(word: str) -> str:
    """model.base=/home/me/models/tiny -> model.base=tiny; hub ids stay."""
    name, _, value = word.rpartition("=")
    return f"{name}={Path(value).name}".lstrip("=") if value.startswith("/") else word


def retrieval_row(result: dict) -> dict[str, str]:
    """Columns of a retriever's table: nDCG@10 by dim, widest first."""
    metrics = result["metrics"]
    tuned, base = metrics.get("tuned", {}), metrics.get("base", {})
    dims = sorted(tuned, key=int, reverse=True)
    return {
        f"BM25 {label_of('ndcg@10')}": f"{metrics.get('bm25', {}).get('ndcg@10', 0):.3f}",
        "base": " / ".join(f"{base[d]['ndcg@10']:.3f}" for d in dims if d in base),
        "tuned": " / ".join(f"{tuned[d]['ndcg@10']:.3f}" for d in dims),
        "dims": " / ".join(dims),
    }


def rerank_row(result: dict) -> dict[str, str]:
    """Columns of a reranker's table: MRR / nDCG@10 of each system."""
    columns = {}
    for name in ("random", "bm25", "retriever", "tuned"):
        of = result["metrics"].get(name)
        value = f"{of['mrr']:.3f} / {of['ndcg@10']:.3f}" if of else "-"
        columns["MRR / nDCG@10: random" if name == "random" else label_of(name)] = value
    return columns


def with_row(text: str, head: str, line: str) -> str:
    """`text` with `line` as the last row of the table under `head`."""
    lines = text.splitlines()
    end = lines.index(head) + 1
    while end < len(lines) and lines[end].startswith("|"):
        end += 1
    return "\n".join([*lines[:end], line, *lines[end:]]) + "\n"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m evals.log", description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--name", help="file name under results/; default: the run's")
    parser.add_argument("--note", default="", help="one sentence: what the numbers say")
    args = parser.parse_args()
    path = args.run / "result.json"
    if not path.is_file():
        raise SystemExit(f"{path} does not exist; name the directory of a finished run")
    result = json.loads(path.read_text(encoding="utf-8"))
    env = json.loads((args.run / "env.json").read_text(encoding="utf-8"))
    config = read_config(args.run)
    for key in ("root", "texts", "cache_dir"):  # a path of this machine says nothing elsewhere
        config["data"].pop(key, None)
    config["runs_dir"], config["model"]["base"] = None, without_folder(config["model"]["base"])
    overrides = (args.run / "overrides.txt").read_text(encoding="utf-8").split("\n")
    left_out = ("data.root=", "data.texts=", "data.cache_dir=", "runs_dir=")
    command = [without_folder(w) for w in overrides if w and not w.startswith(left_out)]
    name = args.name or result["name"]
    content = {
        "date": date.today().isoformat(),
        "command": " ".join(["python train.py", *command]),
        "note": args.note,
        **kept(result),
        "other_sets": {n: kept(of) for n, of in result["other_sets"].items()},
        **{k: result[k] for k in ("seed", "steps", "examples_per_s", "train_s", "peak_memory_mib")},
        "commit": (env.get("git") or {}).get("commit"),
        "env": {k: env[k] for k in ("python", "packages", "cpu", "device", "threads")},
        "config": config,
    }
    write_json_atomic(RESULTS / f"{name}.json", content)
    columns = rerank_row(result) if result["task"] == "rerank" else retrieval_row(result)
    row = {"date": content["date"], "run": f"[{name}]({name}.json)", **columns}
    row |= {"training": f"{result['train_s']:.0f} s", "what it says": args.note}
    readme = RESULTS / "README.md"
    text = readme.read_text(encoding="utf-8")
    head = f"| {' | '.join(row)} |"
    line = f"| {' | '.join(row.values())} |"
    if head not in text:
        text = f"{text.rstrip()}\n\n{head}\n{'|---' * len(row)}|\n"
    write_text_atomic(readme, with_row(text, head, line))
    print(f"{RESULTS / name}.json")


if __name__ == "__main__":
    main()
