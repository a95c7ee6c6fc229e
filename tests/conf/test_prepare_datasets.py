"""Each recipe in conf/prepare/dataset/ composes and says what it is for; the Persian chain runs."""

import json
import sys
from pathlib import Path

import pytest
import yaml
from omegaconf._utils import get_yaml_loader

from conf.cli import CONF_DIR, main
from conf.schema import PrepareConfig, SourceConfig
from data.formats import read_examples
from prepare import prepare

FOLDER = CONF_DIR / "prepare" / "dataset"
NAMES = sorted(path.stem for path in FOLDER.glob("*.yaml"))


def run(monkeypatch, *args, job=None) -> list:
    found = []
    monkeypatch.setattr(sys, "argv", ["prepare.py", *args])
    main(PrepareConfig, "prepare", job or (lambda c, out: found.append(c)))
    return found


def flatten(value, prefix=""):
    if not isinstance(value, dict):
        return {prefix: value}
    return {k: v for name, inner in value.items()
            for k, v in flatten(inner, f"{prefix}.{name}".strip(".")).items()}  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_recipe_composes_and_its_values_arrive(name, monkeypatch):
    """A value under the wrong section or a missing package line would be lost."""
    (c,) = run(monkeypatch, f"+dataset={name}", "data=somewhere", "out=there")
    content = yaml.load((FOLDER / f"{name}.yaml").read_text(), get_yaml_loader())
    content.pop("defaults", None)
    for key, value in flatten(content).items():
        found = c
        for part in key.split("."):
            found = getattr(found, part)
        assert found == ("somewhere" if value == "${data}" else value), key


@pytest.mark.parametrize("name", NAMES)
def test_recipe_says_question_run_and_expect(name):
    text = (FOLDER / f"{name}.yaml").read_text()
    for word in ("# @package _global_", "# Question: ", "# Run: ", "# Expect: "):
        assert word in text
    assert f"+dataset={name}" in text


@pytest.mark.slow
def test_the_persian_chain_runs_from_a_beir_folder_to_train_and_dev(
    tmp_path, tiny_base, monkeypatch
):
    """Each stage reads what the one before it wrote: what one writes and the next cannot read shows
    here, with rows lost on the way, and a second call that does the work again."""
    data, out = tmp_path / "data", tmp_path / "out"
    (data / "qrels").mkdir(parents=True)
    letters = "abcdefghij"
    texts = [f"passage {a}{b} is about {a}{a}{b} and {b}{a}{n}" for n, (a, b) in enumerate(
        (a, b) for a in letters for b in letters[:5])]  # fmt: skip
    write(data / "corpus.jsonl", [{"_id": f"d{n}", "title": "", "text": t}
                                  for n, t in enumerate(texts)])  # fmt: skip
    write(data / "queries.jsonl", [{"_id": f"q{n}", "text": f"what is {t.split()[4]} for {n}"}
                                   for n, t in enumerate(texts[:40])])  # fmt: skip
    rows = ["query-id\tcorpus-id\tscore", *(f"q{n}\td{n}\t1" for n in range(40))]
    (data / "qrels" / "train.tsv").write_text("\n".join(rows) + "\n")
    words = [
        "+dataset=persian_triplets", f"data={data}", f"out={out}", "device=cpu", "precision=fp32",
        f"cache_dir={tmp_path / 'cache'}", "filter.script=null", "filter.language=null",
        f"validate.base={tiny_base}", "validate.folds=2", "validate.epochs=0.2",
        "validate.max_pair_length=48", "validate.min_probability=0.0", f"mine.model={tiny_base}",
        "mine.fraction=null",
    ]  # fmt: skip
    run(monkeypatch, *words, job=prepare)
    report = json.loads((out / "report.json").read_text())
    stages = report["stages"]
    assert list(stages) == ["filter", "validate", "mine", "triplets", "split"]
    assert stages["validate"]["counts"]["pairs"] == stages["filter"]["counts"]["kept"]
    num = stages["filter"]["counts"]["kept"]
    assert num > 30 and stages["mine"]["counts"]["passages"] == len(texts)
    assert stages["triplets"]["out"] == num
    parts = {s: list(read_examples(SourceConfig(root=str(out / "split")), s))
             for s in ("train", "dev")}  # fmt: skip
    assert len(parts["train"]) + len(parts["dev"]) == num and len(parts["dev"]) == round(num / 10)
    for e in (*parts["train"], *parts["dev"]):
        assert e.positives == [texts[int(e.id[1:])]], "a positive of another query"
        assert len(e.negatives) == 1 and e.negatives != e.positives
    before = (out / "report.json").read_bytes()
    monkeypatch.setattr("prepare.STAGES", dict.fromkeys(stages))  # calling one would be an error
    run(monkeypatch, *words, job=prepare)
    assert (out / "report.json").read_bytes() == before


def write(path: Path, rows: list[dict]) -> None:
    path.write_text("".join(json.dumps(r) + "\n" for r in rows), encoding="utf-8")
