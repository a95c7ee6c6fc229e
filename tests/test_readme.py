"""What README shows is run here: the code blocks, on a tiny model, and the names it promises."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", README, re.MULTILINE | re.DOTALL)


def trained_in(folder: Path) -> str:
    """Where the run of the first block lies: the test's own overrides are in the name."""
    return "".join(str(p.relative_to(folder)) for p in folder.glob("runs/mine/*/seed0"))


@pytest.mark.slow
def test_code_blocks_run_in_order(tiny_base, tmp_path):
    """A renamed option breaks a reader's first five minutes and no other test.

    Changed for the test alone: the model is a tiny one, the BEIR folder one written here.
    """
    copy = tmp_path / "rook"
    ignored = shutil.ignore_patterns(".git", ".venv", "runs", "artifacts", "__pycache__", "tests")
    shutil.copytree(ROOT, copy, ignore=ignored)
    beir = copy / "path/to/beir_folder"
    (beir / "qrels").mkdir(parents=True)
    words = "ab cd ef gh ij kl mn op qr st uv wx".split()
    texts = {f"d{i}": f"passage number {i} about {w}" for i, w in enumerate(words)}
    rows = "".join(f'{{"_id": "{i}", "title": "", "text": "{t}"}}\n' for i, t in texts.items())
    (beir / "corpus.jsonl").write_text(rows)
    rows = (f'{{"_id": "q{i}", "text": "which is about {w}"}}\n' for i, w in enumerate(words))
    (beir / "queries.jsonl").write_text("".join(rows))
    for split, some in (("train", range(6)), ("dev", range(6, 9)), ("test", range(9, 12))):
        rows = "".join(f"q{i}\td{i}\t1\n" for i in some)
        (beir / f"qrels/{split}.tsv").write_text(f"query-id\tcorpus-id\tscore\n{rows}")
    env = os.environ | {"PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    tiny = f"model.base={tiny_base} model.max_query_length=32 model.max_passage_length=32"
    for block in blocks("bash"):
        script = re.sub(r"(python train\.py .*name=mine)", rf"\1 {tiny} loss.dims=[16]", block)
        script = re.sub(r"(python train\.py .*name=(first|second))", rf"\1 {tiny}", script)
        pair = f"model.base={tiny_base} model.max_pair_length=40 optim.lr=1e-2 optim.steps=20"
        script = re.sub(r"(python train\.py task=.*)", rf"\1 {pair}", script)
        # an untrained model finds all passages alike
        near = "mine.fraction=null mine.near_duplicate=null mine.veto_above=null"
        script = script.replace("'stages=[mine]'", f"'stages=[mine]' {near}")
        script = script.replace("'dims=[384,128]'", "'dims=[16,8]'")
        script = script.replace("runs/mine/default/seed0", trained_in(copy))
        done = subprocess.run(
            ["bash", "-euc", script], cwd=copy, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stdout[-2000:]}{done.stderr[-4000:]}"
    for block in blocks("python"):
        block = block.replace("runs/mine/default/seed0", trained_in(copy))
        done = subprocess.run(
            [sys.executable, "-c", block], cwd=copy, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, f"{block}\n{done.stderr[-4000:]}"


def test_lists_in_commands_are_quoted():
    """zsh takes dims=[384,128] for a pattern and runs nothing: no matches found."""
    for block in blocks("bash"):
        unquoted = re.sub(r"'[^'\n]*'|\"[^\"\n]*\"|#.*", "", block)
        assert not re.search(r"=\S*[\[{*?]", re.sub(r"\$\(.*?\)", "", unquoted)), block


def test_every_make_target_and_file_named_is_there():
    """`make` targets and paths in README's text."""
    makefile = (ROOT / "Makefile").read_text()
    for target in set(re.findall(r"`make ([a-z]+)`", README)):
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
    for path in re.findall(r"`([a-z_]+(?:\.py|/))`", README):
        assert (ROOT / path).exists() or path == "export/", path


def test_transformers_imports_beside_our_kernels_folder():
    """A package `kernels` exists on PyPI and transformers looks for it: our folder must not be
    taken for it."""
    assert (ROOT / "kernels").is_dir() and not (ROOT / "kernels/__init__.py").exists()
    code = "import transformers; from transformers import BertModel; print(BertModel.__name__)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout.strip() == "BertModel", done.stderr[-2000:]
