"""What stages of prepare.py need, which of them are done, and what they report."""

import json
from collections.abc import Container
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Any

from conf.schema import PrepareConfig
from data.cache import digest_of, path_digest
from data.languages import check_script
from models.pretrained import resolve_base
from models.reranker import check_judges

VERSION = 4  # raise it when the same input and settings would give another file
SECTIONS = {"split": "parts"}  # of PrepareConfig, where it has not the stage's name
MODEL_KEYS = ("model", "reranker", "base", "tokenizer")  # settings that may name a hub id


def check_stage(c: PrepareConfig, name: str, made: Container[Path] = ()) -> None:
    """Raise ValueError for a setting that stage `name` needs and has not, and for a model or file
    of its settings that is nowhere. Reads neither data nor weights.

    made  files that an earlier stage is going to write, resolved
    """
    if name == "filter" and c.filter.script is not None:
        check_script(c.filter.script, "filter.script")
    if name == "validate" and not c.validate.base:
        raise ValueError(
            "validate.base is not set: name the encoder that the judges start from, e.g."
            " validate.base=intfloat/multilingual-e5-small"
        )
    if name == "score" and not c.score.model:
        raise ValueError(
            "score.model is not set: name the teacher, a run directory, model folder or hub id of a"
            " cross-encoder or a retriever"
        )
    if name == "mine":
        _check_mine(c, made)
    section = getattr(c, name, None)
    for key in MODEL_KEYS:
        model = getattr(section, key, None)
        if not model:
            continue
        try:
            resolve_base(model)
        except ValueError as error:  # it names train.py's setting
            reason = str(error).removeprefix(f"model.base ({model!r}): ")
            raise ValueError(f"{name}.{key}={model}: {reason}") from error
        if key == "reranker":
            check_judges(model, f"{name}.{key}", f", or {name}.model for a retriever")


def _check_mine(c: PrepareConfig, made: Container[Path]) -> None:
    for name, example in (("model", "a run directory, folder or hub id"), ("run", "a TREC run")):
        if name in c.mine.sources and not getattr(c.mine, name):
            raise ValueError(
                f"mine.sources ({c.mine.sources}) has {name}, and mine.{name} is not set: name"
                f" {example}, or use other sources, e.g. 'mine.sources=[bm25]'"
            )
    if c.mine.run and not Path(c.mine.run).is_file():
        raise ValueError(f"mine.run={c.mine.run}: no such file; want a TREC run")
    corpus = Path(c.mine.corpus).expanduser() if c.mine.corpus is not None else None
    if corpus is not None and not corpus.exists() and corpus.resolve() not in made:
        raise ValueError(
            f"mine.corpus={corpus}: no such file or folder; want a BEIR folder, or rows of passages"
        )


def key_of(c: PrepareConfig, name: str, source: Path) -> str:
    """Digest of all that a stage's output depends on: the content of its input, its settings, and
    the content of the files and models that these name.

    Raises ValueError for a model that is nowhere.
    """
    settings = settings_of(c, name)
    named = {k: v for k, v in sorted(settings.items()) if isinstance(v, str) and v}
    named |= {k: str(resolve_base(v)) for k, v in named.items() if k in MODEL_KEYS}
    if name == "mine":  # no known answer is a negative, though an earlier stage dropped its row
        named["data"] = c.data
    contents = {k: path_digest(v) for k, v in named.items()}
    return digest_of(VERSION, name, path_digest(source), settings, contents)


def settings_of(c: PrepareConfig, name: str) -> dict[str, Any]:
    """The stage's own section, and what all stages share."""
    section = getattr(c, SECTIONS.get(name, name), None)
    shared = {key: getattr(c, key) for key in ("split", "columns", "seed", "precision")}
    return shared | (asdict(section) if is_dataclass(section) else {})


def output_digest(target: Path) -> str:
    """Of what a stage leaves: <stage>.jsonl, and the folder <stage>/ where it has one."""
    return digest_of(path_digest(target), path_digest(target.with_suffix("")))


def finished_stages(out: Path) -> dict[str, Any]:
    """Stage -> its part of report.json, where its output is as it left it.

    Nothing where report.json is missing or damaged: every stage is then done again.
    """
    try:
        parts = json.loads((out / "report.json").read_text(encoding="utf-8"))["stages"]
        return {
            name: part
            for name, part in parts.items()
            if part["key"] and part["output"] == output_digest(out / f"{name}.jsonl")
        }
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def report_text(report: dict[str, Any]) -> str:
    """report.md."""
    lines = [f"# {report['data']}", "", "| stage | rows in | rows out | what |"]
    lines += ["|---|--:|--:|---|"]
    for name, part in report["stages"].items():
        counts = "; ".join(f"{k} {v:,}" for k, v in part.get("counts", {}).items())
        lines.append(f"| {name} | {part['in']:,} | {part['out']:,} | {counts} |")
    for name, part in report["stages"].items():
        for what, rows in part.get("examples", {}).items():
            lines += ["", f"## {name}: {what}", ""]
            lines += [f"- {row if isinstance(row, str) else json.dumps(row)}" for row in rows]
    return "\n".join(lines) + "\n"
