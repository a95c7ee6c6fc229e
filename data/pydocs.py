"""Pairs (docstring, code) from Python sources on this machine. Files are parsed, never imported.

The query is the first paragraph of a public function's, method's or class's docstring, the passage
its signature and body without the docstring. A module is in one split alone, chosen by the md5 of
its dotted name. Imports nothing but the standard library: it also runs as the worker process that
parses half of the files.
"""

import ast
import gc
import hashlib
import importlib.util
import io
import json
import logging
import os
import re
import subprocess
import sys
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from data.records import Example

log = logging.getLogger(__name__)

EXTRACTION_VERSION = 2  # raise it when the same files would give other pairs
MIN_QUERY_WORDS, MAX_QUERY_WORDS = 4, 40
MIN_BODY_CHARS, MAX_PASSAGE_CHARS = 80, 1200
DEFAULT_PACKAGES = ("numpy", "torch")
SPLITS = ("train", "dev", "test")
# folders that hold tests, copies of other projects, tables of characters or installed packages
SKIPPED_FOLDERS = frozenset(
    "test tests testing _testing idle_test optests encodings _vendor vendor vendored _vendored"
    " third_party site-packages dist-packages node_modules".split()
)
_FILES_WORTH_A_PROCESS = 400  # below, starting a second interpreter costs more than it saves


@dataclass
class PyDocs:
    """Columns of equal length, one row a pair, in the order of the sorted files; `report` says what
    was left out.
    """

    queries: list[str] = field(default_factory=list)
    passages: list[str] = field(default_factory=list)
    names: list[str] = field(default_factory=list)  # module:Class.method, unique
    wheres: list[str] = field(default_factory=list)  # path:line
    splits: list[str] = field(default_factory=list)  # train | dev | test
    report: dict = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.queries)

    def rows(self, split: str | None = None) -> list[int]:
        """Row numbers of `split`, or all."""
        return [i for i, s in enumerate(self.splits) if split in (None, s)]

    def examples(self, split: str | None = None) -> "list[Example]":
        """The pairs of `split` (None: all) as examples with one positive each."""
        from data.records import Example

        return [
            Example(
                query=self.queries[i],
                positives=[self.passages[i]],
                negatives=[],
                where=self.wheres[i],
                # not the passage's id: scoring skips a document with the id of its query
                id="q:" + self.names[i],
                positive_ids=[self.names[i]],
            )
            for i in self.rows(split)
        ]


def split_of(module: str) -> str:
    """Split of a module by its dotted name: a tenth test, a tenth dev, the rest train."""
    bucket = int(hashlib.md5(module.encode(), usedforsecurity=False).hexdigest(), 16) % 10
    return {0: "test", 1: "dev"}.get(bucket, "train")


def default_roots() -> list[Path]:
    """Folders of the standard library, numpy and torch of the running interpreter, found without
    importing them.
    """
    roots = [Path(sysconfig.get_path("stdlib"))]
    for package in DEFAULT_PACKAGES:
        spec = importlib.util.find_spec(package)  # of a top-level name: imports nothing
        if spec is None or not spec.submodule_search_locations:
            raise ValueError(
                f"data.format=pydocs: package {package!r} is not installed in {sys.prefix};"
                " install it or name a folder of Python with data.root"
            )
        roots.append(Path(next(iter(spec.submodule_search_locations))))
    return roots


def python_files(root: Path) -> Iterator[tuple[str, Path]]:
    """(dotted module name, path) of every Python file under `root`, sorted by path.

    Hidden folders and SKIPPED_FOLDERS below `root` are left out; a root that is a package starts
    its modules' names.
    """
    if root.is_file():
        yield root.stem, root
        return
    prefix = (root.name,) if (root / "__init__.py").exists() else ()
    for folder, subfolders, names in os.walk(root):
        subfolders[:] = sorted(s for s in subfolders if not _is_skipped(Path(folder, s)))
        for name in sorted(names):
            if name.endswith(".py"):
                path = Path(folder, name)
                parts = (*prefix, *path.relative_to(root).with_suffix("").parts)
                yield (
                    ".".join(parts[:-1] if parts[-1] == "__init__" and len(parts) > 1 else parts),
                    path,
                )


def _is_skipped(folder: Path) -> bool:
    hidden = folder.name.startswith(".") or folder.name == "__pycache__"
    return hidden or folder.name in SKIPPED_FOLDERS or (folder / "pyvenv.cfg").exists()


def source_files(root: str | Path | None = None) -> list[tuple[str, Path]]:
    """(module, path) of every file read_pydocs would read. Raises ValueError when there is none."""
    if root is None:
        return [f for r in default_roots() for f in python_files(r)]
    path = Path(root).expanduser()
    if not path.exists():
        raise ValueError(
            f"data.root={root}: no such file or folder; name a folder of Python files, or leave"
            " data.root empty for the standard library, numpy and torch"
        )
    files = list(python_files(path))
    if not files or files[0][1].suffix != ".py":
        raise ValueError(
            f"data.root={root}: expected .py files, found none (looked in every folder but hidden"
            f" ones, virtual environments and {', '.join(sorted(SKIPPED_FOLDERS))})"
        )
    return files


def sources_digest(root: str | Path | None = None) -> str:
    """Hex digest of all that read_pydocs(root) depends on: names and bytes of the files, and this
    extraction.
    """
    return _key(source_files(root))


def read_pydocs(root: str | Path | None = None, *, cache_dir: str | Path | None = None) -> PyDocs:
    """Pairs from the Python under `root` (None: standard library, numpy and torch).

    cache_dir  holds the extracted pairs under a digest of every file's name and bytes; None: no
               cache
    Raises ValueError when the folder has no Python file or too few documented functions, with
    counts of what was seen.
    """
    files = source_files(root)
    shown = "the default folders" if root is None else str(root)
    cached = None
    if cache_dir is not None:
        cached = Path(cache_dir) / f"pydocs-{_key(files)}.json"
        found = _read_cache(cached)
        if found is not None:
            return found
    log.info("parsing %s Python files of %s", f"{len(files):,}", shown)
    docs = _select(_extract_all(files), shown)
    if cached is not None:
        _write_cache(cached, docs)
    return docs


def _key(files: Sequence[tuple[str, Path]]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    # which syntax parses depends on the Python version
    digest.update(f"{EXTRACTION_VERSION} {sys.version_info[:2]}".encode())
    for module, path in files:
        digest.update(f"\n{module} {path} ".encode("utf-8", "surrogateescape"))
        digest.update(hashlib.blake2b(path.read_bytes(), digest_size=16).digest())
    return digest.hexdigest()


def _read_cache(path: Path) -> PyDocs | None:
    if not path.exists():
        return None
    head, _, payload = path.read_bytes().partition(b"\n")
    if head.decode("ascii", "replace") != hashlib.blake2b(payload, digest_size=16).hexdigest():
        log.warning("%s is damaged (checksum differs); extracting the pairs again", path)
        return None
    return PyDocs(**json.loads(payload))


def _write_cache(path: Path, docs: PyDocs) -> None:
    payload = json.dumps(asdict(docs)).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.tmp{os.getpid()}")
    with open(temporary, "wb") as f:
        f.write(hashlib.blake2b(payload, digest_size=16).hexdigest().encode() + b"\n" + payload)
        f.flush()
        os.fsync(f.fileno())
    os.replace(temporary, path)


def _extract_all(files: Sequence[tuple[str, Path]]) -> list[list]:
    """Rows of `_extract_file` for every file, in order; a second interpreter parses every other
    file when many.
    """
    work = [(module, str(path)) for module, path in files]
    if len(work) < _FILES_WORTH_A_PROCESS or (os.cpu_count() or 1) < 2:
        return [_extract_file(*w) for w in work]
    # an interpreter of its own instead of a fork: the caller may hold threads of torch and of the
    # tokenizer
    command = [sys.executable, "-I", "-W", "ignore", os.path.abspath(__file__)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as worker:
        worker.stdin.write(json.dumps(work[1::2]).encode())
        worker.stdin.close()
        rows = [None] * len(work)
        try:
            with _no_gc():
                rows[0::2] = [_extract_file(*w) for w in work[0::2]]
            answer = worker.stdout.read()
        except BaseException:
            worker.kill()
            raise
    if worker.returncode != 0:
        raise RuntimeError(
            f"the process that parses Python files ended with code {worker.returncode}"
        )
    rows[1::2] = json.loads(answer)
    return rows


class _no_gc:
    """Trees of ten thousands of nodes and no cycles: the cycle collector would triple the time."""

    def __enter__(self) -> None:
        self.was_enabled = gc.isenabled()
        gc.disable()

    def __exit__(self, *_) -> None:
        if self.was_enabled:
            gc.enable()


def _extract_file(module: str, path: str) -> list:
    """[module, path, error or "", counts of what was left out, [[qualified name, line, query,
    passage], ...]].
    """
    counts: Counter[str] = Counter()
    pairs: list[list] = []
    try:
        raw = Path(path).read_bytes()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # invalid escapes in other people's code
            tree = ast.parse(raw)
        encoding, _ = tokenize.detect_encoding(io.BytesIO(raw).readline)
        # not str.splitlines: the parser does not count form feeds and the like as line ends
        lines = raw.decode(encoding).replace("\r\n", "\n").replace("\r", "\n").split("\n")
    except (SyntaxError, ValueError, RecursionError, MemoryError, OSError) as e:
        return [module, path, f"{type(e).__name__}: {e}", {}, []]
    for name, node in _definitions(tree.body, "", counts):
        counts["seen"] += 1
        query, passage, reason = _pair(node, lines)
        if reason:
            counts[reason] += 1
        else:
            pairs.append([name, node.lineno, query, passage])
    return [module, path, "", dict(counts), pairs]


def _definitions(
    body: Sequence[ast.stmt], prefix: str, counts: Counter[str]
) -> Iterator[tuple[str, ast.AST]]:
    """Public functions and classes of a module, methods of public classes, those under `if` and
    `try` included.
    """
    for node in body:
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
            if node.name.startswith("_"):
                counts["private name"] += 1
                continue
            yield prefix + node.name, node
            if isinstance(node, ast.ClassDef):
                yield from _definitions(node.body, f"{prefix}{node.name}.", counts)
        elif isinstance(node, (ast.If, ast.Try)):
            blocks = [node.body, node.orelse, *(h.body for h in getattr(node, "handlers", []))]
            for block in blocks:
                yield from _definitions(block, prefix, counts)


def _pair(node: ast.AST, lines: Sequence[str]) -> tuple[str, str, str]:
    """(query, passage, why it is left out or "") of one definition."""
    doc = ast.get_docstring(node)
    if not doc:
        return "", "", "no docstring"
    query = " ".join(re.split(r"\n\s*\n", doc, maxsplit=1)[0].split())
    num_words = len(query.split())
    if num_words < MIN_QUERY_WORDS:
        return "", "", f"docstring's first paragraph under {MIN_QUERY_WORDS} words"
    if num_words > MAX_QUERY_WORDS:
        return "", "", f"docstring's first paragraph over {MAX_QUERY_WORDS} words"
    doc_node = node.body[0]
    body = "\n".join(
        _dedented(lines[doc_node.end_lineno : node.end_lineno], node.col_offset)
    ).strip("\n")
    if len(node.body) < 2 or len(body.strip()) < MIN_BODY_CHARS:
        return "", "", f"body under {MIN_BODY_CHARS} characters"
    signature = "\n".join(_dedented(lines[node.lineno - 1 : doc_node.lineno - 1], node.col_offset))
    passage = f"{signature}\n{body}"[:MAX_PASSAGE_CHARS]
    try:
        (query + passage).encode()
    except UnicodeEncodeError:  # an escape such as "\ud800": no tokenizer takes it
        return "", "", "not text that UTF-8 can hold"
    return query, passage, ""


def _dedented(lines: Sequence[str], indent: int) -> list[str]:
    return [line[indent:] if line[:indent].isspace() else line for line in lines]


def _normalised(text: str) -> str:
    return " ".join(re.findall(r"\w+", text.casefold()))


def _select(files: list[list], shown: str) -> PyDocs:
    """Drop duplicates, choose splits, write the report. `files` as `_extract_all` gives them."""
    docs = PyDocs()
    dropped: Counter[str] = Counter()
    unparsable = []
    seen_queries: set[str] = set()
    seen_passages: set[str] = set()
    modules: dict[str, str] = {}
    module_of = []
    name_uses: Counter[str] = Counter()
    for module, path, error, counts, pairs in files:
        dropped.update(counts)
        if error:
            unparsable.append(f"{path}: {error}")
        for name, line, query, passage in pairs:
            # text equal but for case, spaces and punctuation is the same question or the same code
            query_key, passage_key = _normalised(query) or query, _normalised(passage) or passage
            if query_key in seen_queries:
                dropped["duplicate query"] += 1
                continue
            if passage_key in seen_passages:
                dropped["duplicate passage"] += 1
                continue
            seen_queries.add(query_key)
            seen_passages.add(passage_key)
            full_name = f"{module}:{name}"
            name_uses[full_name] += 1
            docs.queries.append(query)
            docs.passages.append(passage)
            # overloads and `if` branches define a name twice
            docs.names.append(
                full_name if name_uses[full_name] == 1 else f"{full_name}#{name_uses[full_name]}"
            )
            docs.wheres.append(f"{path}:{line}")
            module_of.append(module)
            modules.setdefault(module, split_of(module))
    num_seen = dropped.pop("seen", 0)
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in sorted(dropped.items())) or "none"
    seen = (
        f"{len(files):,} Python files ({len(unparsable)} do not parse), {num_seen:,} public"
        f" functions and classes; left out: {reasons}"
    )
    if unparsable:
        log.warning(
            "%d Python files do not parse and are left out, the first: %s",
            len(unparsable),
            unparsable[0],
        )
    if len(modules) < 3:
        raise ValueError(
            f"data.root={shown}: {len(docs)} usable pairs in {len(modules)} modules, need pairs in"
            f" at least 3 modules to hold a dev and a test module out; seen: {seen}. A usable pair"
            f" has a docstring whose first paragraph has {MIN_QUERY_WORDS} to {MAX_QUERY_WORDS}"
            f" words and a body of at least {MIN_BODY_CHARS} characters"
        )
    moved = _fill_empty_splits(modules)
    docs.splits = [modules[m] for m in module_of]
    docs.report = {
        "files": len(files),
        "unparsable": unparsable,
        "definitions": num_seen,
        "dropped": dict(sorted(dropped.items())),
        "modules": len(modules),
        "moved_modules": moved,
        "pairs": {s: docs.splits.count(s) for s in SPLITS},
        "split_rule": "int(md5(module), 16) % 10: 0 test, 1 dev, the rest train",
    }
    log.info("pydocs: %s pairs (%s) from %s", f"{len(docs):,}", docs.report["pairs"], seen)
    return docs


def _fill_empty_splits(modules: dict[str, str]) -> dict[str, str]:
    """In a small code base the md5 rule can leave a split empty: move one module there, the first
    by md5.
    """
    moved = {}
    for split in SPLITS:
        if split in modules.values():
            continue
        sizes = Counter(modules.values())
        spare = [m for m, s in modules.items() if sizes[s] > 1]
        module = min(
            spare, key=lambda m: (hashlib.md5(m.encode(), usedforsecurity=False).digest(), m)
        )
        modules[module] = moved[module] = split
        log.warning("few modules: none fell into %s, so module %s is moved there", split, module)
    return moved


if __name__ == "__main__":
    with _no_gc():
        result = [
            _extract_file(module, path) for module, path in json.loads(sys.stdin.buffer.read())
        ]
    sys.stdout.buffer.write(json.dumps(result).encode())
