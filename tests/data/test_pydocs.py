"""Pairs from Python sources: the right text, nothing imported, no module in two splits, honest
counts.
"""

import hashlib
import importlib
import inspect
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from data import pydocs
from data.pydocs import read_pydocs

LONG = "x = 1\n" + "\n".join(f"    value_{i} = {i} * 1000" for i in range(8))


def write(root: Path, files: dict[str, str | bytes]) -> Path:
    for name, content in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return root


def function(name: str, doc: str) -> str:
    """A function with that docstring whose body is long enough and its own."""
    head = f'def {name}(a, b=2):\n    """{doc}"""\n    tag = "{name}"\n'
    return f"{head}    {LONG}\n    return tag\n\n\n"


def modules(num: int) -> dict[str, str]:
    return {
        f"mod{i}.py": function(f"compute{i}", f"Compute quantity number {i}.") for i in range(num)
    }


def test_a_pair_is_docstring_and_code_without_it(tmp_path):
    """Line numbers, indents, comments and decorators all can go wrong: the text is spelled out."""
    source = '''
import os

@decorated(
    "twice")
def outer(a,
          b=2):  # why b
    """Adds two numbers
       and   waits.

    Not part of the query.
    """
    # a comment that stays
    def inner():
        """An inner function is not public at all."""
    return os.path.join(str(a), str(b)), "padding to reach eighty characters"


class Thing:
    """A thing that holds other things."""

    attribute = 1

    async def method(self):
        r"""Waits for the other thing."""
        text = """
  kept as it is
"""
        return await self.attribute, text, "padding to reach eighty characters"
'''
    root = write(tmp_path, {"one.py": source, **modules(6)})
    docs = read_pydocs(root)
    found = {n: (q, p) for n, q, p in zip(docs.names, docs.queries, docs.passages, strict=True)}
    assert found["one:outer"] == (
        "Adds two numbers and waits.",
        "def outer(a,\n          b=2):  # why b\n"
        "    # a comment that stays\n"
        "    def inner():\n"
        '        """An inner function is not public at all."""\n'
        '    return os.path.join(str(a), str(b)), "padding to reach eighty characters"',
    )
    assert found["one:Thing.method"] == (
        "Waits for the other thing.",
        'async def method(self):\n    text = """\n  kept as it is\n"""\n'
        '    return await self.attribute, text, "padding to reach eighty characters"',
    )
    assert found["one:Thing"][1].startswith("class Thing:\nattribute = 1") is False
    assert found["one:Thing"][1].startswith("class Thing:\n    attribute = 1\n\n    async def")
    where = docs.wheres[docs.names.index("one:outer")]
    assert where == f"{root / 'one.py'}:6"


@pytest.mark.parametrize("name", ["textwrap", "json.decoder", "configparser"])
def test_pairs_agree_with_inspect_on_imported_modules(name):
    """inspect finds docstrings and sources through live objects: another way to the same text."""
    module = importlib.import_module(name)
    rows = pydocs._extract_file(name, inspect.getsourcefile(module))[4]
    assert rows
    for qualified, _, query, passage in rows:
        live = module
        for part in qualified.split("."):
            live = inspect.getattr_static(live, part)
        live = getattr(live, "__func__", live)
        assert query == " ".join(inspect.getdoc(live).split("\n\n")[0].split())
        source = textwrap.dedent(inspect.getsource(live))
        lines = [line.strip() for line in passage.split("\n")[:-1]]  # the last may be cut
        assert all(line in source for line in lines if line)
        assert lines[0].startswith(("def ", "class ", "async def "))


def test_only_public_documented_definitions_of_the_right_size_are_taken(tmp_path):
    source = (
        function("_private", "This one is not public.")
        + function("short", "Too short here.")
        + function("wordy", "word " * 41)
        + function("exactly", " ".join(f"w{i}" for i in range(40)))
        + 'def tiny():\n    """Has a tiny body only."""\n    return 1\n\n\n'
        + 'def oneline(): "Is written on one line."\n\n\n'
        + "def silent():\n    return 'no docstring in this one at all, never mind the length'\n\n"
        + "class _Hidden:\n"
        + textwrap.indent(function("method", "Inside a private class."), "    ")
        + f"if True:\n{textwrap.indent(function('branch', 'Inside an if statement.'), '    ')}"
        + f"try:\n{textwrap.indent(function('tried', 'Inside a try statement.'), '    ')}"
        + f"except E:\n{textwrap.indent(function('caught', 'Inside an except clause.'), '    ')}"
    )
    docs = read_pydocs(write(tmp_path, {"one.py": source, **modules(3)}))
    assert {n.split(":")[1] for n in docs.names if n.startswith("one:")} == {
        "exactly",
        "branch",
        "tried",
        "caught",
    }
    assert docs.report["dropped"] == {
        "body under 80 characters": 2,
        "docstring's first paragraph over 40 words": 1,
        "docstring's first paragraph under 4 words": 1,
        "no docstring": 1,
        "private name": 2,
    }


def test_passages_are_cut_and_duplicates_dropped(tmp_path):
    """Normalised twins (case, punctuation, spaces) would be false negatives of each other."""
    long = 'def f():\n    """Has a very long body."""\n' + "".join(
        f"    a{i} = {i}\n" for i in range(400)
    )
    twin_query = function("twin", "COMPUTE quantity, number 0!")
    twin_code = modules(1)["mod0.py"].replace("number 0", "entirely different").replace("  ", "   ")
    files = {"zlong.py": long, "ztwin.py": twin_query, "zcode.py": twin_code, **modules(4)}
    docs = read_pydocs(write(tmp_path, files))
    assert len(docs) == 5
    assert docs.report["dropped"] == {"duplicate passage": 1, "duplicate query": 1}
    assert len(docs.passages[docs.names.index("zlong:f")]) == 1200
    assert docs.names[0] == "mod0:compute0", "the first in path order stays"


def test_no_module_is_in_two_splits_and_the_md5_rule_decides(tmp_path):
    docs = read_pydocs(write(tmp_path, modules(60)))
    assert set(docs.splits) == {"train", "dev", "test"}
    for name, split in zip(docs.names, docs.splits, strict=True):
        bucket = int(hashlib.md5(name.split(":")[0].encode()).hexdigest(), 16) % 10
        assert split == {0: "test", 1: "dev"}.get(bucket, "train")
    assert docs.report["pairs"] == {s: docs.splits.count(s) for s in ("train", "dev", "test")}
    assert [e.query for e in docs.examples("dev")] == [docs.queries[i] for i in docs.rows("dev")]


def test_few_modules_still_fill_every_split(tmp_path, caplog):
    """With three modules the md5 rule mostly leaves dev or test empty."""
    docs = read_pydocs(write(tmp_path, modules(3)))
    assert sorted(docs.splits) == ["dev", "test", "train"]
    assert docs.report["moved_modules"]
    assert "is moved there" in caplog.text


def test_a_package_gives_its_modules_their_full_names(tmp_path):
    files = {f"pkg/sub/{n}": s for n, s in modules(3).items()}
    files |= {
        "pkg/__init__.py": function("top", "Is in the package itself."),
        "pkg/sub/x/__init__.py": "",
    }
    docs = read_pydocs(write(tmp_path, files) / "pkg")
    assert docs.names[0] == "pkg:top"
    assert "pkg.sub.mod0:compute0" in docs.names


def test_sources_are_never_imported(tmp_path):
    """Other people's modules may do anything when imported."""
    trap = f"import os\nopen({str(tmp_path / 'ran')!r}, 'w')\nraise SystemExit(3)\n"
    files = {n: trap + s for n, s in modules(4).items()}
    assert len(read_pydocs(write(tmp_path / "src", files))) == 4
    assert not (tmp_path / "ran").exists()


def test_default_folders_are_found_without_importing_torch():
    """Importing torch takes seconds, and torch may be broken where only its text is wanted."""
    code = (
        "import sys; sys.path.insert(0, '.');"
        "from data.pydocs import default_roots; print(*default_roots(), sep='\\n');"
        "assert not {'torch', 'numpy'} & set(sys.modules)"
    )
    out = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[2]
    )
    assert out.returncode == 0, out.stderr
    assert [Path(p).name for p in out.stdout.split()][1:] == ["numpy", "torch"]
    assert (Path(out.stdout.split()[0]) / "textwrap.py").exists()


def test_files_that_do_not_parse_are_listed_and_skipped(tmp_path):
    bad = {
        "bad_syntax.py": "def f(:\n",
        "bad_nul.py": b"x = 1\0",
        "bad_bytes.py": b"x = '\xff'\n",
        "bad_depth.py": "x = " + "(" * 1000 + ")" * 1000,
    }
    docs = read_pydocs(write(tmp_path, {**bad, **modules(3)}))
    assert len(docs) == 3
    listed = docs.report["unparsable"]
    assert sorted(Path(line.split(": ")[0]).name for line in listed) == sorted(bad)


def test_encodings_and_odd_line_ends_keep_lines_in_step(tmp_path):
    """A form feed is a line end for str.splitlines but not for the parser; cookies name
    encodings.
    """
    latin = "# -*- coding: latin-1 -*-\n" + function("cafe", "Serves caf\u00e9 to the guests.")
    feed = "x = 1\n\x0c\n'''a\x0bb\x1cc'''\n" + function("fed", "Comes after a form feed.")
    files = {
        "latin.py": latin.encode("latin-1"),
        "feed.py": feed,
        "dos.py": function("dos", "Has line ends of DOS.").replace("\n", "\r\n"),
        "bom.py": b"\xef\xbb\xbf" + function("marked", "Has a byte order mark.").encode(),
        "surrogate.py": function("half", "Holds a lone \\ud800 surrogate half."),
    }
    docs = read_pydocs(write(tmp_path, files))
    assert docs.report["dropped"] == {"not text that UTF-8 can hold": 1}
    for query, passage in zip(docs.queries, docs.passages, strict=True):
        assert passage.startswith("def ") and passage.endswith("return tag"), (query, passage)
    assert "Serves caf\u00e9 to the guests." in docs.queries


def test_tests_vendored_and_hidden_folders_are_left_out(tmp_path):
    folders = ["test", "tests", "_vendor", "encodings", ".hidden", "__pycache__", "site-packages"]
    files = {f"a/{f}/{n}": s for f in folders for n, s in modules(2).items()}
    files |= {"env/pyvenv.cfg": "", "env/lib/x.py": function("x", "Is in a virtual environment.")}
    kept = {n: s.replace("quantity", "other quantity") for n, s in modules(5).items()}
    docs = read_pydocs(write(tmp_path, {**files, **kept}))
    assert {n.split(":")[0] for n in docs.names} == {f"mod{i}" for i in range(5)}
    assert docs.report["files"] == 5


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({"notes.txt": "x"}, ["expected .py files, found none"]),
        ({"a.py": "x = 1\n"}, ["0 usable pairs in 0 modules", "1 Python files", "at least 3"]),
        (
            {f"m{i}.py": "def f():\n    return 1\n" for i in range(9)},
            ["0 usable pairs", "9 public functions and classes", "9 no docstring"],
        ),
        (modules(2), ["2 usable pairs in 2 modules", "docstring whose first paragraph"]),
        ({"a.py": "def f(:\n"}, ["1 do not parse"]),
    ],
)
def test_unusable_folders_are_refused_with_counts(tmp_path, files, words):
    root = write(tmp_path / "code", files)
    with pytest.raises(ValueError) as error:
        read_pydocs(root)
    assert all(w in str(error.value) for w in [str(root), *words]), error.value


def test_a_missing_folder_is_named():
    with pytest.raises(ValueError, match=r"data\.root=/nowhere/code: no such file or folder"):
        read_pydocs("/nowhere/code")


def test_cache_holds_by_content(tmp_path, monkeypatch, caplog):
    """A stale cache would train on text that is no longer there."""
    root, cache = write(tmp_path / "code", modules(12)), tmp_path / "cache"
    first = read_pydocs(root, cache_dir=cache)
    real = pydocs._extract_all
    monkeypatch.setattr(pydocs, "_extract_all", lambda files: pytest.fail("extracted again"))
    assert read_pydocs(root, cache_dir=cache) == first
    monkeypatch.setattr(pydocs, "_extract_all", real)
    path = root / "mod3.py"
    stamp = path.stat()
    path.write_text(path.read_text().replace("quantity", "quality!"))  # same size
    os.utime(path, ns=(stamp.st_atime_ns, stamp.st_mtime_ns))
    assert "Compute quality! number 3." in read_pydocs(root, cache_dir=cache).queries
    path.write_text(path.read_text().replace("quality!", "quantity"))
    (cached,) = [
        p
        for p in cache.iterdir()
        if json.loads(p.read_bytes().split(b"\n")[1])["queries"] == first.queries
    ]
    data = bytearray(cached.read_bytes())
    data[len(data) // 2] ^= 1
    cached.write_bytes(data)
    assert read_pydocs(root, cache_dir=cache) == first
    assert "damaged" in caplog.text


def test_two_processes_extract_what_one_does(tmp_path, monkeypatch):
    root = write(tmp_path, {**modules(9), "bad.py": "def f(:\n"})
    alone = read_pydocs(root)
    monkeypatch.setattr(pydocs, "_FILES_WORTH_A_PROCESS", 1)
    assert read_pydocs(root) == alone


@pytest.mark.slow
def test_default_folders_give_the_yardstick():
    """About 10,000 pairs and 934 test questions in the prototype that the results are held against.

    Counts move with the installed versions: 10% either way.
    """
    docs = read_pydocs()
    assert 9_000 < len(docs) < 12_000
    assert 840 < docs.report["pairs"]["test"] < 1_030
    assert len(set(docs.queries)) == len(set(docs.passages)) == len(set(docs.names)) == len(docs)
    assert all(4 <= len(q.split()) <= 40 for q in docs.queries)
    assert max(map(len, docs.passages)) == 1_200
    tops = {n.split(":")[0].split(".")[0] for n in docs.names}
    assert {"torch", "numpy", "textwrap"} <= tops
    assert not {"test", "encodings", "site-packages", "pip"} & tops
