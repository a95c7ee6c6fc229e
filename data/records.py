"""What every reader of text shares: examples, bad rows, and when two texts are the same.

Import these from data.formats.
"""

import gzip
import json
import logging
import math
import unicodedata
import zlib
from array import array
from collections.abc import Iterator
from dataclasses import dataclass, field
from hashlib import blake2b
from pathlib import Path
from types import TracebackType
from typing import IO, Any

import numpy as np

log = logging.getLogger(__name__)


@dataclass(slots=True)
class Example:
    """One query with the passages that answer it and, if given, passages that do not.

    where   "path:line" of the row, from 1; the line it starts on; for BEIR its first qrels row
    id      the data's own query id, else `where`
    *_ids, *_scores   as long as the texts they belong to, or None where the data gives none
    positive_grades   how relevant each positive is, > 0; None: all 1. Of a reranker's groups the
                      *_scores are a teacher's, NaN where it has none; a group may have no positive
    mined        where each negative comes from, as data.negatives writes it
    dataset name of the set, filled by whoever mixes several
    """

    query: str
    positives: list[str]
    negatives: list[str]
    where: str
    id: str
    positive_ids: list[str] | None = None
    negative_ids: list[str] | None = None
    positive_scores: list[float] | None = None
    negative_scores: list[float] | None = None
    dataset: str = ""
    positive_grades: list[float] | None = None
    mined: list[dict[str, Any]] | None = None


@dataclass
class RetrievalSet:
    """Documents, queries and judgements: qrels[query id][document id] = grade; > 0 is relevant.

    shares_ids    whether an id stands for the same text on both sides, as in BEIR, where searches
                  leave out the document that is the query itself; rows number each side from 0
    num_unjudged  queries that no split's judgements name; they are not among the queries
    """

    name: str
    doc_ids: list[str]
    doc_texts: list[str]
    query_ids: list[str]
    query_texts: list[str]
    qrels: dict[str, dict[str, int]]
    shares_ids: bool = field(default=False, kw_only=True)
    num_unjudged: int = field(default=0, kw_only=True)


@dataclass
class RerankSet(RetrievalSet):
    """A RetrievalSet whose queries bring the documents to be put in order.

    candidates   query id -> document ids, in an order that says nothing about relevance; None: they
                 come from a first stage. Those without a grade in qrels are not relevant.
    """

    candidates: dict[str, list[str]] | None = None


class BadRows:
    """Stops at the first bad row, or counts bad rows and lists them in a file.

    on_bad_row  "error": report() raises ValueError; "skip": it counts, and the row is left out
    list_path   JSONL file of {where, expected, found}, written as rows are reported; None: no file
    setting     with which the user chooses, for the error to name; None: there is none
    A row reported twice (a file read in two passes) counts once.
    """

    def __init__(
        self,
        on_bad_row: str = "error",
        list_path: str | Path | None = None,
        setting: str | None = None,
    ) -> None:
        if on_bad_row not in ("error", "skip"):
            raise ValueError(f"data.on_bad_row ({on_bad_row!r}) must be error or skip")
        self.on_bad_row = on_bad_row
        self.list_path = Path(list_path) if list_path is not None else None
        self.setting = setting
        self.first: str | None = None
        self._seen: set[int] = set()
        self._file: IO[str] | None = None

    @property
    def count(self) -> int:
        return len(self._seen)

    def report(self, where: str, expected: str, found: str, *, of_all: bool = False) -> None:
        """Raises ValueError "where: expected ..., found ..." unless on_bad_row is skip.

        of_all  every row of the file has it, so that leaving rows out is no way on
        """
        message = f"{where}: expected {expected}, found {found}"
        if self.on_bad_row == "error":
            lists = " and lists them" if self.list_path else ""
            way_on = f"; {self.setting}=skip leaves bad rows out{lists}"
            raise ValueError(message + (way_on if self.setting and not of_all else ""))
        key = hash_bytes(f"{where}\0{expected}\0{found}".encode("utf-8", "surrogateescape"))
        if key in self._seen:
            return
        if self.first is None:
            self.first = message
        self._seen.add(key)
        if self.list_path is None:
            return
        if self._file is None:
            self.list_path.parent.mkdir(parents=True, exist_ok=True)
            # line by line: the list is there even if the run is killed
            self._file = open(self.list_path, "w", encoding="utf-8", buffering=1)
        row = {"where": where, "expected": expected, "found": found}
        self._file.write(json.dumps(row, ensure_ascii=True) + "\n")

    def close(self) -> None:
        """Ends the list file and says in the log how many rows were skipped."""
        if self.count:
            listed = f"; listed in {self.list_path}" if self.list_path else ""
            log.warning("skipped %d bad rows, first: %s%s", self.count, self.first, listed)
        if self._file is not None:
            self._file.close()
            self._file = None
            self.list_path = None  # a later report must not overwrite the finished list

    def __enter__(self) -> "BadRows":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()


# -- when two texts are the same ----------------------------------------------------------------


def normalise(text: str) -> str:
    """The form in which texts are compared: NFKC, each run of whitespace one space; case kept."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text)
    return " ".join(text.split())


def hash_bytes(data: bytes) -> int:
    """63-bit hash, the same in every process and on every machine, as Python's hash() is not."""
    return int.from_bytes(blake2b(data, digest_size=8).digest(), "little") >> 1


def content_hash(text: str) -> int:
    """63-bit hash of normalise(text): equal for the same text in any process."""
    return hash_bytes(normalise(text).encode("utf-8"))


def mix(key_n: np.ndarray, seed: int) -> np.ndarray:
    """Seeded uint64 hash of each key: splitmix64 (Steele et al. 2014), the same anywhere."""
    salt = int.from_bytes(blake2b(str(seed).encode(), digest_size=8).digest(), "little")
    x = key_n.astype(np.uint64) ^ np.uint64(salt)
    x = (x ^ (x >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ (x >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return x ^ (x >> np.uint64(31))


class HashIndex:
    """63-bit key -> int64 value in two flat arrays: 20 to 40 bytes an entry, a fifth of a dict's.

    Keys are hashes: two of n different ids meet with probability n^2 / 2^64, 5e-6 at ten million.
    """

    def __init__(self) -> None:
        self._mask = 1023
        self._keys = array("q", [-1]) * 1024
        self._values = array("q", [0]) * 1024
        self._count = 0

    def __len__(self) -> int:
        return self._count

    def _slot(self, key: int) -> int:
        slot = key & self._mask
        while self._keys[slot] != key and self._keys[slot] != -1:
            slot = (slot + 1) & self._mask
        return slot

    def add(self, key: int, value: int) -> int | None:
        """The value already held for `key`, which stays; or None, and `value` is stored."""
        slot = self._slot(key)
        if self._keys[slot] == key:
            return self._values[slot]
        self._keys[slot] = key
        self._values[slot] = value
        self._count += 1
        if self._count * 5 > len(self._keys) * 4:
            self._grow()
        return None

    def get(self, key: int) -> int | None:
        slot = self._slot(key)
        return self._values[slot] if self._keys[slot] == key else None

    def _grow(self) -> None:
        keys, values = self._keys, self._values
        size = 2 * len(keys)
        self._mask = size - 1
        self._keys = array("q", [-1]) * size
        self._values = array("q", [0]) * size
        for key, value in zip(keys, values, strict=True):
            if key != -1:
                slot = self._slot(key)
                self._keys[slot] = key
                self._values[slot] = value


# -- lines and JSON objects ---------------------------------------------------------------------


GZIP_DAMAGE = (EOFError, gzip.BadGzipFile, zlib.error)


def open_bytes(path: Path) -> IO[bytes]:
    """Opens for reading; a gzip file, known by its first two bytes, is unpacked on the fly."""
    with open(path, "rb") as f:
        is_gzip = f.read(2) == b"\x1f\x8b"
    return gzip.open(path, "rb") if is_gzip else open(path, "rb")


def read_lines(path: Path, file: IO[bytes] | None = None) -> Iterator[tuple[int, int, bytes]]:
    """(line number from 1, byte offset, line with its end) of `path`, or of `file` opened from it.

    A UTF-8 byte order mark is left out. Raises ValueError for a damaged gzip file and for UTF-16.
    """
    stream = file if file is not None else open_bytes(path)
    offset = 0
    try:
        for number, raw in enumerate(stream, 1):
            if number == 1:
                refuse_utf16(path, raw)
            line = raw[3:] if number == 1 and raw.startswith(b"\xef\xbb\xbf") else raw
            yield number, offset, line
            offset += len(raw)
    except GZIP_DAMAGE as e:
        raise ValueError(f"{path}: expected a whole gzip file, found damage: {e}") from e
    finally:
        if file is None:
            stream.close()


def refuse_utf16(path: Path, head: bytes) -> None:
    """Raises ValueError for the first bytes of a UTF-16 file: no row of it is right, though some
    lines of it are UTF-8 with a NUL after each letter.
    """
    if head.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise ValueError(
            f"{path}: expected UTF-8 text, found a UTF-16 byte order mark; save the file as UTF-8"
            f" (iconv -f UTF-16 -t UTF-8 {path.name} > new)"
        )


def read_rows(
    path: Path, bad: BadRows, file: IO[bytes] | None = None
) -> Iterator[tuple[int, int, str]]:
    """(line number, byte offset, text without line end); blank lines at the end are left out.

    Lines that are not UTF-8 and blank lines before the last row are reported as bad rows.
    """
    blank: list[int] = []
    for number, offset, raw in read_lines(path, file):
        line = raw.rstrip(b"\r\n")
        if not line.strip(b" "):
            if len(blank) < 1000:
                blank.append(number)
            continue
        for blank_number in blank:
            bad.report(f"{path}:{blank_number}", "a row", "an empty line")
        blank.clear()
        try:
            text = line.decode("utf-8")
        except UnicodeDecodeError as e:
            bad.report(f"{path}:{number}", "UTF-8 text", bad_byte(line, e.start))
            continue
        yield number, offset, text


def bad_byte(line: bytes, start: int) -> str:
    return f"byte 0x{line[start]:02x} at byte {start + 1} of the line"


def short(value: Any, limit: int = 60) -> str:
    """`value` for an error message: its repr, cut, in ASCII-safe quotes."""
    text = repr(value)
    return text if len(text) <= limit else text[:limit] + "..."


def kind_of(value: Any) -> str:
    """What a value of a row is, in words of the file rather than of Python."""
    if value is None:
        return "null"
    if isinstance(value, bool):
        return f"the truth value {str(value).lower()}"
    if isinstance(value, int | float):
        return f"the number {value}"
    if isinstance(value, str):
        return f"the text {short(value)}"
    if isinstance(value, list):
        return f"a list {short(value)}"
    if isinstance(value, dict):
        return f"an object with keys {short(', '.join(map(str, value)))}"
    return f"{type(value).__name__} {short(value)}"


def parse_object(text: str, where: str, bad: BadRows) -> dict[str, Any] | None:
    """The JSON object in `text`; None after reporting anything else."""
    try:
        row = json.loads(text)
    except (ValueError, RecursionError) as e:
        hint = "a JSON array; write one object a line" if text.lstrip()[:1] == "[" else ""
        reason = getattr(e, "msg", None) or str(e) or type(e).__name__
        at = (
            f" (column {e.colno}: {reason})"
            if isinstance(e, json.JSONDecodeError)
            else f" ({reason})"
        )
        bad.report(where, "a JSON object", hint or f"{short(text)}{at}")
        return None
    if not isinstance(row, dict):
        bad.report(where, "a JSON object", kind_of(row))
        return None
    return row


def text_problem(value: Any) -> str | None:
    """Why `value` cannot serve as a text; None if it can."""
    if not isinstance(value, str):
        return kind_of(value)
    if not value or value.isspace():
        return "empty text"
    if not value.isascii():
        try:
            value.encode("utf-8")
        except UnicodeEncodeError as e:
            # half of a surrogate pair, which JSON can spell but no tokenizer reads; or a bad byte
            code = ord(value[e.start])
            if 0xDC80 <= code <= 0xDCFF:
                return f"byte 0x{code - 0xDC00:02x}, which is not UTF-8"
            return f"half of a surrogate pair (\\u{code:04x})"
    return None


def as_id(value: Any) -> str | None:
    """An id as text; whole numbers are taken as written; None for anything else or an empty one."""
    if isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if isinstance(value, str) and text_problem(value) is None:
        return value
    return None


def as_score(value: Any) -> float | None:
    """A finite number, also one written as text (TSV, CSV); None for anything else."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, bool):
        return float(value)
    if isinstance(value, int | float) and math.isfinite(value):
        return float(value)
    return None


def join_title(title: str, text: str) -> str:
    """A document as one text: title, space, text, stripped, as BEIR joins them."""
    return f"{title} {text}".strip()
