"""prepare.py: stages one after the other, done once, done again when anything they read changes."""

import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch

import prepare
from conf.schema import (
    FilterConfig,
    MineConfig,
    PrepareConfig,
    ScoreConfig,
    SourceConfig,
    ValidateConfig,
)
from data.formats import read_examples, read_groups, read_retrieval_set
from data.stages import report_text
from models.reranker import load_reranker

ROOT = Path(__file__).parents[1]
BASIC = ["mine.sources=[bm25]", "mine.fraction=null", "mine.near_duplicate=null"]


@pytest.fixture
def pairs(tmp_path) -> Path:
    path = tmp_path / "pairs.jsonl"
    rows = [{"query": f"ask {n} fish", "positive": f"fish answer {n}"} for n in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def config(pairs, tmp_path):
    def make(**settings) -> PrepareConfig:
        mine = {"sources": ["bm25"], "fraction": None, "near_duplicate": None}
        mine |= settings.pop("mine", {})
        shared = {"stages": ["mine"], "data": str(pairs), "out": str(tmp_path / "out")}
        shared |= {"device": "cpu", "precision": "fp32", "cache_dir": str(tmp_path / "cache")}
        return PrepareConfig(**shared | settings, mine=MineConfig(**mine))

    return make


@pytest.fixture
def calls(monkeypatch) -> list[str]:
    """Stages that ran. `again` mines from what `mine` wrote."""
    ran: list[str] = []
    monkeypatch.setitem(prepare.STAGES, "again", prepare.STAGES["mine"])

    for name, stage in list(prepare.STAGES.items()):

        def counted(c, source, target, name=name, stage=stage):
            ran.append(name)
            return stage(c, source, target)

        monkeypatch.setitem(prepare.STAGES, name, counted)
    return ran


def test_stages_hand_files_on_and_are_done_once(config, calls, tmp_path, pairs, capsys):
    """A skipped stage must still give the next one its file, and the report its numbers."""
    out = tmp_path / "out"
    c = config(stages=["mine", "again"])
    report = prepare.prepare(c, out)
    assert calls == ["mine", "again"]
    assert [len((out / f"{n}.jsonl").read_text().splitlines()) for n in calls] == [30, 30]
    assert json.loads((out / "report.json").read_text()) == report
    assert (out / "report.md").read_text() in capsys.readouterr().out
    assert "| mine | 30 | 30 |" in report_text(report)
    assert prepare.prepare(c, out) == report and calls == ["mine", "again"]
    third = prepare.prepare(config(stages=["mine"]), out)  # fewer stages: the same file
    assert calls == ["mine", "again"] and list(third["stages"]) == ["mine"]
    assert prepare.prepare(c, out) == report and calls == ["mine", "again"]  # not forgotten
    read = list(read_examples(SourceConfig(root=str(out / "mine.jsonl")), None))
    assert len(read) == 30 and all(len(e.negatives) == 3 for e in read)


def test_a_stage_is_done_again_when_what_it_reads_changes(config, calls, tmp_path, pairs):
    """Data, settings, its own output, the report: stale files are the ones nobody looks at."""
    out = tmp_path / "out"
    prepare.prepare(config(), out)
    changes = [
        lambda: pairs.write_text(pairs.read_text().replace("answer 7", "answer seven")),
        lambda: (out / "mine.jsonl").write_text("{}\n"),
        lambda: (out / "mine.jsonl").unlink(),
        lambda: (out / "report.json").write_text('{"stages": {"mine": {"key": '),
        lambda: (out / "report.json").write_text("[]"),
        lambda: (out / "report.json").unlink(),
    ]
    for n, change in enumerate(changes):
        change()
        prepare.prepare(config(), out)
        assert len(calls) == n + 2
        prepare.prepare(config(), out)
        assert len(calls) == n + 2
    assert b"answer seven" in (out / "mine.jsonl").read_bytes()
    num = len(calls)
    for settings in ({"mine": {"num_negatives": 2}}, {"seed": 1}, {"mine": {"first_rank": 2}}):
        prepare.prepare(config(**settings), out)
        num += 1
        assert len(calls) == num
    prepare.prepare(config(mine={"first_rank": 2}, cache_dir=str(tmp_path / "other")), out)
    assert len(calls) == num  # where the cache lies changes nothing


def test_a_stage_is_done_again_when_its_model_was_retrained(config, calls, tmp_path, tiny_base):
    """Same path, same sizes: only the content says so."""
    folder = tmp_path / "model"
    folder.mkdir()
    for path in tiny_base.iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    c = config(mine={"sources": ["model"], "model": str(folder)})
    prepare.prepare(c, tmp_path / "out")
    prepare.prepare(c, tmp_path / "out")
    assert len(calls) == 1
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2] ^= 1  # a bit of the last weight's exponent
    weights.write_bytes(content)
    prepare.prepare(c, tmp_path / "out")
    assert len(calls) == 2


def test_grades_are_grades_behind_every_stage(config, tmp_path):
    """Written as a teacher's scores, a reranker would learn them as such and take every positive
    for equally relevant; left unread, the next stage loses them."""
    folder, out = tmp_path / "set", tmp_path / "out"
    (folder / "qrels").mkdir(parents=True)
    texts = ("one red fish", "one blue fish", "one red bird", "old stone fish")
    docs = "".join(json.dumps({"_id": f"d{n}", "text": t}) + "\n" for n, t in enumerate(texts))
    (folder / "corpus.jsonl").write_text(docs)
    (folder / "queries.jsonl").write_text(json.dumps({"_id": "q", "text": "which fish"}) + "\n")
    (folder / "qrels/train.tsv").write_text("q\td0\t2\nq\td1\t1\nq\td2\t0\n")
    mine = {"corpus": str(folder)}
    prepare.prepare(config(data=str(folder), stages=["filter", "mine", "triplets"], mine=mine), out)
    rows = {
        name: [json.loads(line) for line in (out / f"{name}.jsonl").open()]
        for name in ("filter", "mine", "triplets")
    }
    assert not any("positive_scores" in row for some in rows.values() for row in some)
    assert rows["filter"][0]["positive_grades"] == rows["mine"][0]["positive_grades"] == [2, 1]
    assert {t["positive"][0]: t["positive_grades"] for t in rows["triplets"]} == {
        "one red fish": [2], "one blue fish": [1],
    }  # fmt: skip
    source = SourceConfig(root=str(out / "filter.jsonl"))
    (group,) = read_groups(source, None)
    assert group.positive_grades == [2, 1] and group.positive_scores is None
    judged = read_retrieval_set(source, None)
    assert judged.qrels == {"q": {"d0": 2, "d1": 1}}


def test_a_reader_advises_no_setting_that_prepare_lacks(config, tmp_path):
    """The readers are train.py's: its data.filter, data.format and task are none of prepare.py."""
    data = tmp_path / "labelled"
    data.mkdir()
    row = {"query": "x", "positive": "y", "label": 1}
    (data / "train.jsonl").write_text(json.dumps(row) + "\n")
    with pytest.raises(ValueError, match=r"columns=\{score: label\} reads it as relevance") as e:
        prepare.prepare(config(data=str(data)), tmp_path / "out")
    assert "data." not in str(e.value) and "task=" not in str(e.value)
    (data / "train.tsv").write_text("query\tpositive\nx\ty\n")
    with pytest.raises(ValueError, match=r"is ambiguous.*; name one file$"):
        prepare.prepare(config(data=str(data)), tmp_path / "out")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"stages": []}, r"stages \(\[\]\) must name some of"),
        ({"stages": ["mime"]}, r"must name some of .*mine"),
        ({"stages": ["mine", "mine"]}, "each once"),
        ({"data": "nowhere.jsonl"}, "data=nowhere.jsonl: no such file or folder"),
        ({"mine": {"sources": ["model"]}}, r"mine\.model is not set"),
        ({"mine": {"veto_above": 0.4}}, r"mine\.veto_above \(0\.4\) is not read"),
        ({"mine": {"run": "a.trec"}}, r"mine\.run \(a\.trec\) is not read"),
        ({"mine": {"sources": ["model"], "model": "no/such/model/folder"}}, "no such folder"),
        ({"columns": {"query": "frage"}}, "'frage'.*columns.query"),
    ],
)
def test_what_cannot_be_run_says_so(config, tmp_path, settings, message):
    """And leaves no file that looks like a result."""
    with pytest.raises(ValueError, match=message):
        prepare.prepare(config(**settings), tmp_path / "out")
    assert not list((tmp_path / "out").glob("*.jsonl"))


def test_out_that_is_a_file_is_refused(config, tmp_path):
    (tmp_path / "out").write_text("x")
    with pytest.raises(ValueError, match="is a file; want a folder"):
        prepare.prepare(config(), tmp_path / "out")


@pytest.mark.parametrize(
    ("section", "settings", "message"),
    [
        ("filter", {"script": "Arabik"}, r"filter\.script \(Arabik\) is no script"),
        ("filter", {"reranker": "BASE"}, r"filter\.reranker \(.*\) is no cross-encoder"),
        ("filter", {"model": "./none", "min_similarity": 0.5}, r"filter\.model=\./none: no such f"),
        ("filter", {"tokenizer": "./none", "query_tokens": [1, 9]}, r"filter\.tokenizer=\./none"),
        ("validate", {}, r"validate\.base is not set"),
        ("validate", {"base": "./none"}, r"validate\.base=\./none: no such folder"),
        ("validate", {"base": "EMPTY"}, r"validate\.base=.*not a model folder"),
        ("mine", {"sources": ["bm25", "model"]}, r"mine\.model is not set"),
        ("mine", {"sources": ["run"]}, r"mine\.run is not set"),
        ("mine", {"sources": ["run"], "run": "none.trec"}, r"mine\.run=none\.trec: no such file"),
        ("mine", {"model": "none/of/these"}, r"mine\.model=none/of/these: no such folder"),
        ("mine", {"reranker": "BASE"}, r"mine\.reranker \(.*\) is no cross-encoder"),
        ("mine", {"corpus": "none.jsonl"}, r"mine\.corpus=none\.jsonl: no such file or folder"),
        ("score", {}, r"score\.model is not set"),
        ("score", {"model": "./none"}, r"score\.model=\./none: no such folder"),
    ],
)
def test_what_a_later_stage_lacks_is_said_before_the_first_one_works(
    config, calls, tmp_path, tiny_base, section, settings, message
):
    """It was said after the stages before it: an hour of judges, then "mine.model is not set"."""
    (tmp_path / "empty").mkdir()
    known = {"BASE": str(tiny_base), "EMPTY": str(tmp_path / "empty")}
    settings = {k: known.get(v, v) if isinstance(v, str) else v for k, v in settings.items()}
    kinds = {"filter": FilterConfig, "validate": ValidateConfig, "score": ScoreConfig, "mine": dict}
    c = config(stages=["triplets", section], **{section: kinds[section](**settings)})
    with pytest.raises(ValueError, match=message) as error:
        prepare.prepare(c, tmp_path / "out")
    assert "model.base" not in str(error.value)
    assert calls == [] and not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("stages", "read"),
    [
        (["mine"], "out/mine.jsonl"),
        (["mine"], "link/../out/mine.jsonl"),  # the same file by another name
        (["split"], "out/split.jsonl"),
        (["split"], "out/split/train.jsonl"),
        (["split"], "out/split"),
        (["filter", "mine"], "out/mine.jsonl"),
    ],
)
def test_data_that_a_stage_would_write_over_are_refused(config, tmp_path, pairs, stages, read):
    """The input was replaced without a word, and the same command gave more negatives each time."""
    source = tmp_path / read
    (tmp_path / "link").mkdir()
    (tmp_path / "out/split").mkdir(parents=True)
    file = source / "train.jsonl" if source.is_dir() else source
    file.write_text(pairs.read_text())
    before = sorted(p for p in (tmp_path / "out").rglob("*"))
    message = rf"data \(.*\) is what stage {stages[-1]} would write over; use another out="
    with pytest.raises(ValueError, match=message):
        prepare.prepare(config(stages=stages, data=str(source)), tmp_path / "out")
    assert file.read_text() == pairs.read_text()
    assert sorted(p for p in (tmp_path / "out").rglob("*")) == before


def test_out_that_is_the_data_folder_is_refused(config, tmp_path, pairs):
    """mine.jsonl would be among the files that the next command reads as its data."""
    with pytest.raises(ValueError, match=r"out \(.*\) is the folder of data"):
        prepare.prepare(config(data=str(tmp_path)), tmp_path)
    assert not (tmp_path / "mine.jsonl").exists()


def test_a_corpus_that_mining_would_write_over_is_refused(config, tmp_path, pairs):
    """What a stage before it writes may be the corpus; its own file and later ones may not."""
    (tmp_path / "out").mkdir()
    for name in ("mine", "triplets"):
        corpus = tmp_path / f"out/{name}.jsonl"
        corpus.write_text(pairs.read_text())
        c = config(stages=["filter", "mine", "triplets"], mine={"corpus": str(corpus)})
        with pytest.raises(ValueError, match=rf"mine\.corpus \(.*\) is what stage {name} would"):
            prepare.prepare(c, tmp_path / "out")
    (tmp_path / "out/filter.jsonl").unlink(missing_ok=True)  # yet to be written
    earlier = config(stages=["filter", "mine"], mine={"corpus": str(tmp_path / "out/filter.jsonl")})
    assert list(prepare.prepare(earlier, tmp_path / "out")["stages"]) == ["filter", "mine"]


@pytest.fixture
def reranker(tiny_base, tmp_path) -> Path:
    """A cross-encoder with random weights, in a folder of transformers' own class."""
    import transformers

    folder = tmp_path / "reranker"
    torch.manual_seed(0)
    config = transformers.AutoConfig.from_pretrained(tiny_base)
    config.num_labels = 1
    model = transformers.BertForSequenceClassification(config)
    for p in model.parameters():
        p.data.add_(0.3 * torch.randn_like(p))
    model.save_pretrained(folder)
    (folder / "tokenizer.json").write_bytes((tiny_base / "tokenizer.json").read_bytes())
    return folder


def test_a_cross_encoder_vetoes_and_its_scores_are_a_teachers(config, reranker, tmp_path, pairs):
    """Against scores computed one pair at a time: a pair given to the wrong query, or a logit taken
    for a probability, drops the wrong ones. The scores go where a distillation reads them."""
    from data.pairs import PairTemplate, pack_pairs, tokenise_plain

    model = load_reranker(str(reranker)).eval()
    template = PairTemplate.of(model.tokenizer)

    def score(query: str, passage: str) -> float:
        q, p = (tokenise_plain(model.tokenizer, [t], "", 64)[0] for t in (query, passage))
        with torch.no_grad():
            packed = pack_pairs([template.join(q, p, model.spec.max_length)], torch.device("cpu"))
            return float(model.score(model(packed)))

    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    texts = [row["positive"] for row in rows]
    all_QN = np.array([[score(row["query"], t) for t in texts] for row in rows])
    above = float(1 / (1 + np.exp(-np.median(all_QN))))
    settings = {"reranker": str(reranker), "veto_above": above, "num_negatives": 30}
    report = prepare.prepare(config(mine=settings), tmp_path / "out")
    mined = [json.loads(li) for li in (tmp_path / "out/mine.jsonl").read_text().splitlines()]
    for n, row in enumerate(mined):
        expected = {t for m, t in enumerate(texts) if m != n and all_QN[n, m] <= np.median(all_QN)}
        assert set(row["negative"]) == expected
        if not expected:  # a score below 0 alone would make the reader drop the row
            assert "positive_scores" not in row
            continue
        scores = [all_QN[n, texts.index(t)] for t in row["negative"]]
        # float32 logits of other batches, and six decimals
        np.testing.assert_allclose(row["negative_scores"], scores, atol=2e-5)
        np.testing.assert_allclose(row["positive_scores"], [all_QN[n, n]], atol=2e-5)
        assert [m["scores"]["reranker"] for m in row["mined"]] == row["negative_scores"]
        assert all(m["reranker"] == report["stages"]["mine"]["digests"]["reranker"]
                   for m in row["mined"])  # fmt: skip
    counts = report["stages"]["mine"]["counts"]
    assert counts["vetoed"] + counts["mined"] == 30 * 29 and counts["vetoed"] > 200
    assert len(report["stages"]["mine"]["examples"]["vetoed"]) == 10
    read = list(read_examples(SourceConfig(root=str(tmp_path / "out/mine.jsonl")), None))
    assert len(read) == 30
    assert all(len(e.negative_scores) == len(e.negatives) for e in read if e.negatives)


def test_scores_without_veto(config, reranker, tmp_path):
    """veto_above=null: a teacher for all negatives, and none is dropped."""
    settings = {"reranker": str(reranker), "veto_above": None}
    prepare.prepare(config(mine=settings), tmp_path / "out")
    mined = [json.loads(li) for li in (tmp_path / "out/mine.jsonl").read_text().splitlines()]
    assert all(len(row["negative_scores"]) == 3 == len(row["negative"]) for row in mined)
    assert len({s for row in mined for s in row["negative_scores"]}) > 50


def test_own_negatives_are_vetoed_too(config, reranker, tmp_path, pairs):
    """Against scores without a veto: an own negative that answers its query trains the reverse."""
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    for n, row in enumerate(rows):
        row["negative"] = [rows[(n + k) % 30]["positive"] for k in (1, 2, 3)]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def mined(above: float | None, out: str) -> tuple[dict, list[dict]]:
        settings = {"reranker": str(reranker), "veto_above": above, "num_negatives": 1}
        report = prepare.prepare(config(mine=settings), tmp_path / out)["stages"]["mine"]
        return report, [json.loads(x) for x in (tmp_path / out / "mine.jsonl").open()]

    _, every = mined(None, "every")
    middle = float(np.median([row["negative_scores"][:3] for row in every]))
    report, kept = mined(float(1 / (1 + np.exp(-middle))), "kept")
    num_own = 0
    for before, after, row in zip(every, kept, rows, strict=True):
        scores = zip(before["negative"][:3], before["negative_scores"][:3], strict=True)
        expected = [text for text, score in scores if score <= middle]
        own = [text for text in after["negative"] if text in row["negative"]]
        assert own == expected
        num_own += len(own)
    assert 0 < num_own < 90 and report["counts"]["own negatives"] == 90
    assert report["counts"]["own negatives vetoed"] == 90 - num_own


# --------------------------------------------------------------------------------- the command line


def run(*words: str, cwd: Path) -> subprocess.CompletedProcess:
    command = [sys.executable, str(ROOT / "prepare.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_the_documented_command(tmp_path, pairs):
    """From the shell: quoting, help, a mistyped setting, a path with blanks and Arabic letters."""
    named = tmp_path / "\u0628\u064a\u0627\u0646\u0627\u062a a=b.jsonl"
    pairs.rename(named)
    words = ["stages=[mine]", f"data={named}", "out=o=1", *BASIC]
    done = run(*words, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "| mine | 30 | 30 |" in done.stdout
    assert len((tmp_path / "o=1/mine.jsonl").read_text().splitlines()) == 30
    done = run("stages=[mine]", "mine.modell=x", cwd=tmp_path)
    assert done.returncode == 2 and "did you mean mine.model" in done.stderr
    done = run("stages=[mine]", f"data={named}", cwd=tmp_path)
    assert done.returncode == 2 and "out is not set" in done.stderr
    done = run("--help", cwd=tmp_path)
    assert done.returncode == 0 and "stages=[mine]" in done.stdout


@pytest.mark.slow
def test_interrupted_and_started_again(tmp_path, pairs):
    """Ctrl-C while it works: no traceback, no half-written file, and the same command finishes."""
    corpus = tmp_path / "corpus.jsonl"
    rows = ({"_id": f"c{n}", "text": f"fish {n} {'word ' * 200}{n}"} for n in range(20_000))
    corpus.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["stages=[mine]", f"data={pairs}", "out=out", *BASIC]
    command = [sys.executable, str(ROOT / "prepare.py"), *words, f"mine.corpus={corpus}"]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(
        command, cwd=tmp_path, env=environment, stderr=subprocess.PIPE, text=True,
        # tests that a shell runs in the background would hand on that Ctrl-C is ignored
        preexec_fn=partial(signal.signal, signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    for line in process.stderr:  # what it says first when it begins to mine
        if "mine:" in line:
            break
    time.sleep(2)
    process.send_signal(signal.SIGINT)
    said = process.stderr.read()
    assert process.wait(60) == 130
    assert "interrupted" in said and "Traceback" not in said
    assert not (tmp_path / "out/mine.jsonl").exists() and not list(tmp_path.glob("out/.*"))
    assert run(*words, cwd=tmp_path).returncode == 0
