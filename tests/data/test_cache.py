"""Folders built once: damage is seen and mended, a kill leaves nothing behind, two builders
agree.
"""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from data import cache
from data.cache import Strings, StringsWriter, built_once, file_digest

ROOT = Path(__file__).parents[2]
BIG = bytes(range(256)) * 40_000


def build(folder: Path) -> dict:
    (folder / "big.bin").write_bytes(BIG)
    (folder / "small.txt").write_text("seven")
    return {"number": 7, "pairs": [[1, 2.5], [3, None]], "by": {"x": 1}}


def flip(path: Path, at: int) -> None:
    data = bytearray(path.read_bytes())
    data[at] ^= 0x10
    path.write_bytes(data)


DAMAGE = {
    "a flipped bit": lambda f: flip(f / "big.bin", len(BIG) - 5),
    "a cut file": lambda f: os.truncate(f / "big.bin", len(BIG) - 1),
    "an empty file": lambda f: os.truncate(f / "small.txt", 0),
    "a missing file": lambda f: (f / "small.txt").unlink(),
    "a missing meta.json": lambda f: (f / "meta.json").unlink(),
    "a cut meta.json": lambda f: os.truncate(f / "meta.json", 40),
    "meta.json of another kind": lambda f: (f / "meta.json").write_text("[1]"),
    "a changed number in meta.json": lambda f: (f / "meta.json").write_text(
        (f / "meta.json").read_text().replace('"number": 7', '"number": 8')
    ),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_is_found_and_the_folder_built_again(tmp_path, damage, caplog):
    """A half-written or bit-rotten store would train on noise."""
    folder = tmp_path / "store"
    first = built_once(folder, build, what="numbers")
    DAMAGE[damage](folder)
    assert built_once(folder, build, what="numbers") == first
    assert "is damaged" in caplog.text and "building the numbers again" in caplog.text
    assert (folder / "big.bin").read_bytes() == BIG
    assert built_once(folder, lambda _: pytest.fail("built again"), what="numbers") == first


def test_an_intact_folder_is_not_built_again(tmp_path):
    """Info must come back from disk just as it was returned."""
    info = built_once(tmp_path / "store", build, what="numbers")
    again = built_once(tmp_path / "store", lambda _: pytest.fail("built again"), what="numbers")
    assert again == info == {"number": 7, "pairs": [[1, 2.5], [3, None]], "by": {"x": 1}}
    assert sorted(p.name for p in tmp_path.iterdir()) == ["store", "store.lock"]


def test_a_failing_build_leaves_no_folder(tmp_path):
    def fail(folder: Path) -> dict:
        build(folder)
        raise ValueError("line 3 is bad")

    with pytest.raises(ValueError, match="line 3"):
        built_once(tmp_path / "store", fail, what="numbers")
    assert [p.name for p in tmp_path.iterdir()] == ["store.lock"]


@pytest.mark.parametrize("memo", ["", "{", "[]", '{"a": 1}', "null", '{"PATH": [1, 2, 3, "x"]}'])
def test_a_source_file_is_read_again_only_when_it_changed(tmp_path, monkeypatch, memo):
    """Two gigabytes of unchanged source would delay every start by ten seconds."""
    monkeypatch.setattr(cache, "BLOCK", 64)
    paths = [tmp_path / name for name in ("a", "b", "small")]
    for i, path in enumerate(paths):
        path.write_bytes(bytes([i]) * (10 if path.name == "small" else 1000))
        os.utime(path, (1e9, 1e9))
    folder = tmp_path / "cache"
    folder.mkdir()
    (folder / "digests.json").write_text(memo.replace("PATH", str(paths[0])))
    read = []
    monkeypatch.setattr(
        cache, "file_digest", lambda p, **k: read.append(p.name) or file_digest(p, **k)
    )

    def digests() -> list[str]:
        read.clear()
        found = cache.remembered_digests(paths, folder)
        assert found == [file_digest(p, full=True) for p in paths]
        return read.copy()

    assert digests() == ["a", "b", "small"]
    assert digests() == ["small"]
    paths[0].write_bytes(b"x" * 1000)  # the same size, another time
    assert digests() == ["a", "small"]
    assert digests() == ["a", "small"]  # changed just now: not yet remembered
    (tmp_path / "other").write_bytes(b"y" * 1000)
    os.utime(tmp_path / "other", (1e9, 1e9))
    os.replace(tmp_path / "other", paths[1])  # the same size and time, another inode
    assert digests() == ["a", "b", "small"]
    paths[1].write_bytes(b"y" * 1001)
    os.utime(paths[1], (1e9, 1e9))
    assert digests() == ["a", "b", "small"]
    assert [p.name for p in folder.iterdir()] == ["digests.json"]


@pytest.mark.parametrize("size", [10 * cache.BLOCK, 10 * cache.BLOCK + 17])
def test_sampled_digests_see_the_ends_and_the_size(tmp_path, monkeypatch, size):
    """Above the full-check size only some blocks are read: first and last must be among them."""
    monkeypatch.setattr(cache, "FULL_CHECK_BYTES", 0)
    monkeypatch.setattr(cache, "_SAMPLED_BLOCKS", 4)
    path = tmp_path / "f"
    path.write_bytes(random.Random(0).randbytes(size))
    before = file_digest(path)
    for at in (0, cache.BLOCK - 1, size - cache.BLOCK, size - 1):
        flip(path, at)
        assert file_digest(path) != before
        flip(path, at)
    assert file_digest(path) == before
    flip(path, 2 * cache.BLOCK)  # in none of the four blocks
    assert file_digest(path) == before
    assert file_digest(path, full=True) != file_digest(path)


WORKER = """
import sys, time
from pathlib import Path
from data.cache import built_once
folder, log, seconds = Path(sys.argv[1]), Path(sys.argv[2]), float(sys.argv[3])
def build(temporary):
    with open(log, "a") as f: f.write("start\\n")
    with open(temporary / "a.bin", "wb") as f:
        for i in range(20):
            f.write(bytes([i]) * 1000); f.flush()
            time.sleep(seconds / 20)
    return {"n": 20}
print(built_once(folder, build, what="bytes"))
"""


def start(folder: Path, log: Path, seconds: float, prelude: str = "") -> subprocess.Popen:
    return subprocess.Popen(
        [sys.executable, "-c", prelude + WORKER, str(folder), str(log), str(seconds)],
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        text=True,
    )


def wait_until(condition, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.01)


def test_a_killed_build_is_swept_up_and_done_again(tmp_path):
    """SIGKILL half-way leaves a temporary folder and a lock file, but no lock."""
    folder, log = tmp_path / "store", tmp_path / "log"
    killed = start(folder, log, 10)
    wait_until(lambda: any(p.stat().st_size > 2000 for p in tmp_path.glob("store.tmp-*/a.bin")))
    killed.send_signal(signal.SIGKILL)
    killed.wait()
    assert not folder.exists()
    assert list(tmp_path.glob("store.tmp-*"))
    assert built_once(folder, build, what="bytes")["number"] == 7
    assert not list(tmp_path.glob("store.tmp-*"))


@pytest.mark.parametrize("can_lock", [True, False])
def test_two_builders_at_once_end_with_one_whole_folder(tmp_path, can_lock):
    """Ranks of one run start together; without locks both build and one rename has to lose."""
    folder, log = tmp_path / "store", tmp_path / "log"
    prelude = "" if can_lock else "import data.cache; data.cache.fcntl = None\n"
    workers = [start(folder, log, 0.5, prelude) for _ in range(3)]
    assert [w.communicate(timeout=60)[0] for w in workers] == ["{'n': 20}\n"] * 3
    assert all(w.returncode == 0 for w in workers)
    starts = log.read_text().count("start")
    assert starts == 1 if can_lock else starts >= 2
    assert (folder / "a.bin").stat().st_size == 20_000
    assert not list(tmp_path.glob("store.tmp-*"))
    meta = json.loads((folder / "meta.json").read_text())
    assert meta["files"]["a.bin"]["blake2b"] == file_digest(folder / "a.bin")


def test_a_damaged_folder_in_the_way_is_replaced_without_a_lock(tmp_path, monkeypatch):
    monkeypatch.setattr(cache, "fcntl", None)
    folder = tmp_path / "store"
    built_once(folder, build, what="numbers")
    flip(folder / "big.bin", 3)
    assert built_once(folder, build, what="numbers")["number"] == 7
    assert (folder / "big.bin").read_bytes() == BIG


def test_strings_come_back_as_they_were(tmp_path):
    texts = ["", "a", "\u0633\u0644\u0627\u0645", "two\nlines\0", "\U0001f600" * 3, ""] * 900
    writer = StringsWriter(tmp_path, "t")
    assert [writer.append(t) for t in texts] == list(range(len(texts)))
    digest = writer.close()
    strings = Strings(tmp_path, "t")
    assert list(strings) == texts == [strings[i] for i in range(len(texts))]
    assert strings[-2] == texts[-2] and strings[3:6] == texts[3:6]
    with pytest.raises(IndexError):
        strings[len(texts)]
    shutil.rmtree(tmp_path)
    tmp_path.mkdir()
    other = StringsWriter(tmp_path, "t")
    for text in ["", "a\u0633", "\u0644\u0627\u0645", *texts[3:]]:
        other.append(text)
    assert other.close() != digest, "the digest must see where texts end"


def test_no_strings_are_an_empty_sequence(tmp_path):
    StringsWriter(tmp_path, "t").close()
    assert list(Strings(tmp_path, "t")) == []
