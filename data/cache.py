"""Folders that are built once, by content: written aside, synced, renamed, checked whenever they
are opened, files above FULL_CHECK_BYTES in part.

What lies under data.cache_dir: tokens-*/ (data/tokens.py), set-*/ (data/reading.py) and guide-*/
(data/teacher.py), each with a meta.json that holds the size and digest of every other file; and
digests.json, what large source files were when they were last read; hub.json, the commits of hub
data sets (data/reading.py). All of it can be deleted at any time.
"""

import contextlib
import json
import logging
import os
import shutil
import tempfile
import time
from array import array
from collections.abc import Callable, Iterator, Sequence
from hashlib import blake2b
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

try:
    import fcntl
except (
    ImportError
):  # not on Windows; two processes then may build the same folder, and one of them wins
    fcntl = None

log = logging.getLogger(__name__)

BLOCK = 1 << 20
FULL_CHECK_BYTES = (
    1 << 30
)  # larger files are checked by size and 256 blocks: a second a GB would delay every start
_SAMPLED_BLOCKS = 256
SETTLED_NS = 2_000_000_000


def digest_of(*parts: Any) -> str:
    """Hex digest of a sequence of strings, numbers, None and lists and dicts of them."""
    return blake2b(
        json.dumps(parts, sort_keys=True, default=str).encode(), digest_size=16
    ).hexdigest()


def file_digest(path: Path, *, full: bool = False) -> str:
    """Hex blake2b of a file's bytes; of its first, last and evenly spaced blocks above
    FULL_CHECK_BYTES unless full.
    """
    digest = blake2b(digest_size=16)
    size = path.stat().st_size
    with open(path, "rb") as f:
        if full or size <= FULL_CHECK_BYTES:
            while block := f.read(BLOCK):
                digest.update(block)
        else:
            for i in range(_SAMPLED_BLOCKS):
                f.seek((size - BLOCK) * i // (_SAMPLED_BLOCKS - 1))
                digest.update(f.read(BLOCK))
    return digest.hexdigest()


def remembered_digests(paths: Sequence[Path], cache_dir: Path) -> list[str]:
    """file_digest(full=True) of each, for source files: one above BLOCK is read again only where
    its size, time of change or inode is another than when it was last read.

    What is remembered lies in cache_dir/digests.json by absolute path. A damaged file counts as
    none; of several processes the last one's is kept, and the others' files are read again.
    """
    memo_path = cache_dir / "digests.json"
    memo = {
        k: v
        for k, v in read_memo(memo_path).items()
        if isinstance(v, list) and [type(x) for x in v] == [int, int, int, str]
    }
    digests, num_new = [], 0
    for path in paths:
        key, stamp = os.path.abspath(path), _stamp(path)
        is_known = key in memo and memo[key][:3] == stamp
        digests.append(memo[key][3] if is_known else file_digest(path, full=True))
        # changed a moment ago, it may change again within one tick of the file system's clock
        is_settled = stamp == _stamp(path) and time.time_ns() - stamp[1] > SETTLED_NS
        if not is_known and stamp[0] > BLOCK and is_settled:
            memo[key] = [*stamp, digests[-1]]
            num_new += 1
    if num_new:
        write_memo(memo_path, memo)
    return digests


def read_memo(path: Path) -> dict[str, Any]:
    """What write_memo wrote; nothing where there is no such file or it is damaged."""
    try:
        memo = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return memo if isinstance(memo, dict) else {}


def write_memo(path: Path, memo: dict[str, Any]) -> None:
    """A small file that may be lost: replaced in one step; a failure is logged."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{path.name}.tmp-", dir=path.parent) as folder:
            temporary = Path(folder, path.name)
            temporary.write_text(json.dumps(memo, indent=1))
            os.replace(temporary, path)
    except OSError as e:
        log.info("%s cannot be written: %s", path, e)


def _stamp(path: Path) -> list[int]:
    at = path.stat()
    return [at.st_size, at.st_mtime_ns, at.st_ino]


def path_digest(name: str | Path) -> str | None:
    """Digest of a file's bytes, or of a folder's files and those one level down; None for a name
    that is no path. Of a run directory of ours its export counts.
    """
    path = Path(name).expanduser()
    path = path / "export" if (path / "export").is_dir() else path
    if path.is_file():
        return file_digest(path, full=True)
    if not path.is_dir():
        return None
    found = [p for depth in ("*", "*/*") for p in sorted(path.glob(depth)) if p.is_file()]
    return digest_of([(str(p.relative_to(path)), file_digest(p, full=True)) for p in found])


def built_once(
    folder: Path, build: Callable[[Path], dict[str, Any]], *, what: str
) -> dict[str, Any]:
    """The info that `build` returned when it filled `folder`, now or in an earlier process.

    build  writes its files (no subfolders) into the empty folder it is given; returns JSON-ready
           info
    what   for the log: "tokens of 1,000 passages"
    A folder that fails its check (see file_digest) is built again, with a warning. Of several
    processes one builds while the others wait; where files cannot be locked each builds and the
    first to finish wins.
    """
    meta = _checked(folder, what)
    if meta is not None:
        return meta["info"]
    folder.parent.mkdir(parents=True, exist_ok=True)
    with _lock(folder) as is_alone:
        meta = _checked(
            folder, what, quiet=True
        )  # another process may have built it while we waited
        if meta is not None:
            return meta["info"]
        if is_alone:  # what a killed process left half written
            for stale in folder.parent.glob(f"{folder.name}.tmp-*"):
                shutil.rmtree(stale, ignore_errors=True)
            shutil.rmtree(folder, ignore_errors=True)
        log.info("building the %s", what)
        temporary = Path(tempfile.mkdtemp(prefix=f"{folder.name}.tmp-", dir=folder.parent))
        try:
            info = build(temporary)
            _write_meta(temporary, info)
            return _publish(temporary, folder, what)["info"]
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


def _write_meta(folder: Path, info: dict[str, Any]) -> None:
    files = {}
    for path in sorted(folder.iterdir()):
        files[path.name] = {"bytes": path.stat().st_size, "blake2b": file_digest(path)}
        _sync(path)
    meta = {"files": files, "info": info}
    meta["blake2b"] = _meta_digest(meta)
    path = folder / "meta.json"
    path.write_text(json.dumps(meta, indent=1))
    _sync(path)
    _sync(folder)


def _meta_digest(meta: dict[str, Any]) -> str:
    # through JSON first, so that tuples and integer keys digest as they will be read back
    return digest_of(json.loads(json.dumps([meta["files"], meta["info"]])))


def _publish(temporary: Path, folder: Path, what: str) -> dict[str, Any]:
    for _ in range(10):
        try:
            os.rename(temporary, folder)
        except OSError:  # another process was first, or a damaged folder is in the way
            meta = _checked(folder, what, quiet=True)
            if meta is not None:
                return meta
            shutil.rmtree(folder, ignore_errors=True)
            continue
        _sync(folder.parent)
        return json.loads((folder / "meta.json").read_text())
    raise RuntimeError(f"{folder} cannot be replaced; delete it")


def _checked(folder: Path, what: str, *, quiet: bool = False) -> dict[str, Any] | None:
    """meta.json of a folder whose files are all as they were written, else None."""
    if not folder.is_dir():
        return None
    try:
        meta = json.loads((folder / "meta.json").read_text())
        fault = "" if meta["blake2b"] == _meta_digest(meta) else "meta.json: the checksum differs"
        for name, wanted in meta["files"].items() if not fault else ():
            path = folder / name
            size = path.stat().st_size
            if size != wanted["bytes"]:
                fault = f"{name}: {size:,} bytes instead of {wanted['bytes']:,}"
            elif file_digest(path) != wanted["blake2b"]:
                fault = f"{name}: the checksum differs"
            if fault:
                break
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as e:
        fault = f"{type(e).__name__}: {e}"
    if not fault:
        return meta
    if not quiet:
        log.warning("%s is damaged (%s); building the %s again", folder, fault, what)
    return None


@contextlib.contextmanager
def _lock(folder: Path) -> Iterator[bool]:
    """Whether this process alone may touch `folder` and its temporary folders; waits for others."""
    path = folder.with_name(f"{folder.name}.lock")
    with open(path, "a") as f:
        is_alone = False
        if fcntl is not None:
            try:
                fcntl.flock(f, fcntl.LOCK_EX)  # ends with the process, however that ends
                is_alone = True
            except OSError as e:
                log.info("%s cannot be locked (%s); other processes may build the same", path, e)
        yield is_alone


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError:  # some file systems refuse it for folders
        if not path.is_dir():
            raise
    finally:
        os.close(descriptor)


class Strings(Sequence[str]):
    """Texts on disk: <name>.bin (UTF-8, end to end) and <name>.offsets.npy, memory-mapped."""

    def __init__(self, folder: Path, name: str) -> None:
        offsets = np.load(folder / f"{name}.offsets.npy", mmap_mode="r")
        self._offsets = offsets.view(np.ndarray)  # as below
        path = folder / f"{name}.bin"
        # an empty file cannot be mapped
        mapped = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)
        self._bytes = mapped.view(np.ndarray)  # slices of a memmap object cost five times as much

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        i = int(i)
        if not -len(self) <= i < len(self):
            raise IndexError(f"text {i} of {len(self)}")
        i %= len(self)
        return self._bytes[self._offsets[i] : self._offsets[i + 1]].tobytes().decode("utf-8")

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):
            ends = self._offsets[start : start + 4097].tolist()
            block = self._bytes[ends[0] : ends[-1]].tobytes()
            for i, j in pairwise(ends):
                yield block[i - ends[0] : j - ends[0]].decode("utf-8")


class StringsWriter:
    """Writes what Strings reads; 8 bytes a text in memory. `digest` covers the texts and where each
    ends.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name
        self._file = open(folder / f"{name}.bin", "wb", buffering=BLOCK)
        self._offsets = array("q", [0])
        self._digest = blake2b(digest_size=16)

    def __len__(self) -> int:
        return len(self._offsets) - 1

    def append(self, text: str) -> int:
        """The number of the text."""
        data = text.encode("utf-8")
        self._file.write(data)
        self._digest.update(len(data).to_bytes(8, "little") + data)
        self._offsets.append(self._offsets[-1] + len(data))
        return len(self) - 1

    def close(self) -> str:
        """The digest; the files are complete from here."""
        self._file.close()
        np.save(self._folder / f"{self._name}.offsets.npy", np.array(self._offsets, np.int64))
        return self._digest.hexdigest()
