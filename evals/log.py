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
KEPT = ("ndcg@10", "mrr@10", "accuracy@1", "recall@10", "map@100")


def kept(of: dict) -> dict:
    """The headline metrics of {"metrics", "delta"}, rounded."""

    def short(values: dict) -> dict:
        return {m: round(values[m], 4) for m in KEPT if m in values}

    metrics = {
        name: short(rows) if name == "bm25" else {dim: short(v) for dim, v in rows.items()}
        for name, rows in of["metrics"].items()
    }
    delta = {
        dim: {m: row[m] for m in ("ndcg@10", "accuracy@1") if m in row}
        for dim, row in of["delta"].items()
    }
    return {"metrics": metrics, "delta": delta}


def without_folder(word: str) -> str:
    """model.base=/home/me/models/tiny -> model.base=tiny; hub ids stay."""
    name, _, value = word.rpartition("=")
    return f"{name}={Path(value).name}".lstrip("=") if value.startswith("/") else word


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
    for key in ("root", "cache_dir"):  # a path of this machine says nothing elsewhere
        config["data"].pop(key, None)
    config["runs_dir"], config["model"]["base"] = None, without_folder(config["model"]["base"])
    overrides = (args.run / "overrides.txt").read_text(encoding="utf-8").split("\n")
    left_out = ("data.root=", "data.cache_dir=", "runs_dir=")
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
    tuned, base = result["metrics"].get("tuned", {}), result["metrics"].get("base", {})
    dims = sorted(tuned, key=int, reverse=True)
    row = [
        content["date"],
        f"[{name}]({name}.json)",
        f"{result['metrics'].get('bm25', {}).get('ndcg@10', 0):.3f}",
        " / ".join(f"{base[d]['ndcg@10']:.3f}" for d in dims if d in base),
        " / ".join(f"{tuned[d]['ndcg@10']:.3f}" for d in dims),
        " / ".join(dims),
        f"{result['train_s']:.0f} s",
        args.note,
    ]
    readme = RESULTS / "README.md"
    text = readme.read_text(encoding="utf-8")
    ndcg = label_of("ndcg@10")
    head = f"| date | run | BM25 {ndcg} | base | tuned | dims | training | what it says |"
    if head not in text:
        text += f"\n{head}\n|---|---|---|---|---|---|---|---|\n"
    write_text_atomic(readme, text + f"| {' | '.join(row)} |\n")
    print(f"{RESULTS / name}.json")


if __name__ == "__main__":
    main()
