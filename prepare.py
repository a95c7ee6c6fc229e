"""Make a training set: python prepare.py 'stages=[mine]' data=<pairs or BEIR folder> out=<folder>

A stage reads what the one before it wrote (the first one data=) and writes out/<stage>.jsonl, which
train.py reads as data.root. out/report.json and out/report.md say what each stage kept and dropped.
The same command again goes on where it was stopped: a stage is skipped while its input, its
settings and its models are what they were. Settings: conf/schema.py, PrepareConfig.
"""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conf.schema import PrepareConfig

log = logging.getLogger("prepare")


def mine(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """Hard negatives for every query: data/negatives.py."""
    from data.negatives import mine_file

    return mine_file(c, source, target)


def filter_pairs(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """The pairs that pass rules about texts, near-duplicate removal and models: data/filters.py."""
    from data.filters import filter_file

    return filter_file(c, source, target)


def validate(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """The pairs that a cross-encoder trained on the others believes: data/validate.py."""
    from data.validate import validate_file

    return validate_file(c, source, target)


def score(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """A teacher's scores beside the passages that are there: data/score.py."""
    from data.score import score_file

    return score_file(c, source, target)


def triplets(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """Rows of a query, a positive and a negative: data/triplets.py."""
    from data.triplets import triplets_file

    return triplets_file(c, source, target)


def split(c: "PrepareConfig", source: Path, target: Path) -> dict[str, Any]:
    """A folder with train.jsonl and dev.jsonl that share no text: data/triplets.py."""
    from data.triplets import split_file

    return split_file(c, source, target)


# A stage: (settings, file or folder it reads, JSONL file it writes) -> its part of report.json.
# Its settings are the section of its name in PrepareConfig, where there is one. Of its report,
# report.md shows
#   "in", "out"   rows read and written
#   "counts"      {what: number}
#   "examples"    {what: [rows, the first ten or so]}
STAGES: dict[str, Callable[["PrepareConfig", Path, Path], dict[str, Any]]] = {
    "filter": filter_pairs,
    "validate": validate,
    "mine": mine,
    "score": score,
    "triplets": triplets,
    "split": split,
}


def prepare(c: "PrepareConfig", out: Path) -> dict[str, Any]:
    """Run c.stages in order; the content of report.json.

    out  folder for the files
    Raises ValueError for what the user can put right: a stage that does not exist or comes twice,
    data that cannot be read, a model that cannot be loaded, an `out` that is no folder.
    """
    from data.stages import finished_stages, key_of, output_digest, report_text, settings_of
    from runtime.run_dir import write_json_atomic, write_text_atomic

    check(c, out)
    out.mkdir(parents=True, exist_ok=True)
    report = {"data": c.data, "stages": {}}
    finished = finished_stages(out)

    def save() -> None:  # with the stages of earlier commands, so that they need not be done again
        write_json_atomic(out / "report.json", {**report, "stages": finished | report["stages"]})

    source = Path(c.data).expanduser()
    for name in c.stages:
        target = out / f"{name}.jsonl"
        key = key_of(c, name, source)
        if finished.get(name, {}).get("key") == key:
            log.info("%s: %s is up to date", name, target)
            report["stages"][name] = finished[name]
        else:
            began = time.perf_counter()
            log.info("%s: %s -> %s", name, source, target)
            part = STAGES[name](c, source, target)
            report["stages"][name] = {
                "key": key,
                "output": output_digest(target),
                "settings": settings_of(c, name),
                **part,
                "time.wall_s": round(time.perf_counter() - began, 1),
            }
            save()
        source = target
    save()
    write_text_atomic(out / "report.md", report_text(report))
    print(report_text(report))
    return report


def check(c: "PrepareConfig", out: Path) -> None:
    """Raise ValueError for stages or an `out` that cannot be run, before the first one works."""
    from data.stages import check_stage

    unknown = [name for name in c.stages if name not in STAGES]
    if unknown or not c.stages or len(set(c.stages)) < len(c.stages):
        raise ValueError(
            f"stages ({c.stages}) must name some of {', '.join(STAGES)}, each once, e.g."
            " 'stages=[mine]'"
        )
    if out.exists() and not out.is_dir():
        raise ValueError(f"out ({out}) is a file; want a folder")
    check_inputs_stay(c, out)
    made: set[Path] = set()
    for name in c.stages:
        check_stage(c, name, made)
        made.add((out / f"{name}.jsonl").resolve())


def check_inputs_stay(c: "PrepareConfig", out: Path) -> None:
    """Raise ValueError where a stage would write over what it, or the same command again, reads."""
    mine_on = c.stages[c.stages.index("mine") :] if "mine" in c.stages else []
    for setting, given, stages in (
        ("data", c.data, c.stages),
        ("mine.corpus", c.mine.corpus, mine_on),  # what an earlier stage writes may be read
    ):
        if given is None:
            continue
        read, written = Path(given).expanduser().resolve(), out.resolve()
        if setting == "data" and read == written:
            raise ValueError(f"out ({out}) is the folder of data ({given}); use another out=")
        for name in stages:
            targets = [written / f"{name}.jsonl"] + [written / name] * (name == "split")
            if any(read.is_relative_to(target) for target in targets):
                raise ValueError(
                    f"{setting} ({given}) is what stage {name} would write over; use another out="
                )


if __name__ == "__main__":
    from conf.cli import main
    from conf.schema import PrepareConfig

    main(PrepareConfig, "prepare", prepare)
