"""Rows of JSONL, TSV, CSV, Parquet and hub data as dicts, one at a time.

What their columns mean is decided in data/columns.py.
"""

import csv
import json
import logging
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count, islice
from pathlib import Path
from types import ModuleType
from typing import Any

from data.records import (
    GZIP_DAMAGE,
    BadRows,
    bad_byte,
    open_bytes,
    parse_object,
    read_lines,
    read_rows,
    refuse_utf16,
    short,
)

log = logging.getLogger(__name__)

MAX_CSV_FIELD = (
    1 << 24
)  # characters; an unclosed quote would otherwise read the rest of the file into memory
EXTENSIONS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".json": "jsonl",
    ".tsv": "tsv",
    ".csv": "csv",
    ".parquet": "parquet",
}

Rows = Iterator[tuple[str, dict[str, Any]]]


@dataclass
class Table:
    """A source of rows.

    where    path or hub id, for messages
    columns  names, known before the first row; None for JSONL, where each row names its own
    rows     (columns needed, or None for all) -> ("path:line", row), from the start at every call
    """

    where: str
    columns: list[str] | None
    rows: Callable[[list[str] | None], Rows]
    is_text: bool = False  # every value is text: TSV and CSV


def extension_format(path: Path) -> str | None:
    """Format by file name, .gz left out of sight; None for other names."""
    return EXTENSIONS.get(Path(path.name.removesuffix(".gz")).suffix.lower())


def sniff(path: Path) -> str:
    """Format of a file by its first bytes, and by its name where those leave a choice.

    Raises ValueError for an empty file and for content that is none of ours.
    """
    try:
        with open_bytes(path) as f:
            head = f.read(1 << 16)
    except GZIP_DAMAGE as e:
        raise ValueError(f"{path}: expected a whole gzip file, found damage: {e}") from e
    if not head.strip():
        raise ValueError(f"{path}: expected rows of data, found an empty file")
    if head[:4] == b"PAR1":
        return "parquet"
    refuse_utf16(path, head)
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip()
    named = extension_format(path)
    if text[:1] == b"{" and named in (None, "jsonl", "tsv", "csv"):
        first = text.splitlines()[0]
        if named in (None, "jsonl") or _is_json(first):
            return "jsonl"
    if named == "parquet":
        raise ValueError(
            f"{path}: expected a Parquet file, which begins with PAR1, found {head[:8]!r}"
        )
    if named == "jsonl":
        return "jsonl"  # its rows are checked one by one
    first = text.splitlines()[0]
    has_tab, has_comma = b"\t" in first, b"," in first
    if named == "csv" and has_tab and not has_comma:
        return "tsv"
    if named == "tsv" and has_comma and not has_tab and b'"' not in first:
        # a comma inside a one-column TSV would be data; only a line of bare names is a CSV header
        is_names = all(
            _NAME.fullmatch(f.decode("utf-8", "replace").strip()) for f in first.split(b",")
        )
        return "csv" if is_names else "tsv"
    if named is not None:
        return named
    if has_tab:
        return "tsv"
    raise ValueError(
        f"{path}: cannot tell the format from the first line"
        f" {short(first.decode('utf-8', 'replace'))}; set data.format=jsonl, tsv, csv or parquet"
    )


def _is_json(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except (ValueError, RecursionError):
        return False


def open_table(path: Path, kind: str, bad: BadRows, named: "HeaderRule") -> Table:
    """A Table over one file; `kind` is jsonl, tsv, csv or parquet."""
    if kind == "jsonl":
        return Table(str(path), None, lambda _: _jsonl_rows(path, bad))
    if kind == "parquet":
        return _parquet_table(path, bad)
    return _text_table(path, kind, bad, named)


def _jsonl_rows(path: Path, bad: BadRows) -> Rows:
    for number, _, line in read_rows(path, bad):
        where = f"{path}:{number}"
        row = parse_object(line, where, bad)
        if row is not None:
            yield where, row


# -- TSV and CSV --------------------------------------------------------------------------------

HeaderRule = Callable[[str, list[str], list[list[str]]], list[str] | None]
"""(path, fields of the first row, of the next PEEK rows) -> column names if the first row is a
header, None if it is data."""
PEEK = 20

_QUOTED = re.compile(r'"[^"]*(?:""[^"]*)+"')
_NAME = re.compile(r"[A-Za-z_][\w.-]{0,39}")


def looks_like_names(fields: list[str], *, any_script: bool = False) -> bool:
    """Whether every field is a single short word, as in a header line.

    any_script  else of ASCII; of other letters, and with spaces, short texts look like names too
    """
    return all(_is_short_phrase(f) if any_script else _NAME.fullmatch(f) for f in fields)


def _is_short_phrase(field: str) -> bool:
    """Letters, marks and digits of at most three words, without the signs of a sentence."""
    return (
        0 < len(field) <= 40
        and len(field.split()) <= 3
        and field[0].isalpha()
        and all(c in " _.-\u200c" or unicodedata.category(c)[0] in "LMN" for c in field)
    )


def _text_table(path: Path, kind: str, bad: BadRows, header_rule: HeaderRule) -> Table:
    split_rows = _csv_fields if kind == "csv" else _tsv_fields
    # the first rows decide; faults among them are reported when the rows are read
    faults = BadRows("skip")
    head = [fields for _, fields in islice(split_rows(path, faults), 1 + PEEK)]
    if not head and faults.first:
        raise ValueError(f"{path}: no row can be read; the first fault: {faults.first}")
    if not head:
        raise ValueError(f"{path}: expected rows of data, found none that is UTF-8 text")
    fields, *later = [[f.strip() for f in row] for row in head]
    header = header_rule(str(path), fields, later)
    names = header if header is not None else positional_names(len(fields))
    has_header = header is not None and header == fields
    separated = "comma" if kind == "csv" else "tab"

    def rows(_: list[str] | None) -> Rows:
        is_header = has_header
        for number, values in split_rows(path, bad):
            if is_header:
                is_header = False
                continue
            where = f"{path}:{number}"
            if len(values) != len(names):
                wanted = f"{len(names)} {separated}-separated fields ({', '.join(names)})"
                bad.report(
                    where,
                    wanted,
                    f"{len(values)}: {short((chr(9) if kind == 'tsv' else ',').join(values))}",
                )
                continue
            yield where, dict(zip(names, values, strict=True))

    return Table(str(path), names, rows, is_text=True)


def positional_names(num_fields: int) -> list[str]:
    """Columns of a file without a header: query, positive, then negatives."""
    return ["query", "positive", *(f"negative_{i}" for i in range(1, num_fields - 1))][:num_fields]


def _tsv_fields(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    for number, _, line in read_rows(path, bad):
        fields = line.split("\t")
        yield number, [_unquoted(f) for f in fields] if '""' in line else fields


def _unquoted(field: str) -> str:
    """A field as CSV has it where only CSV can have written it: in quotes, and all quotes inside
    doubled, of which there are some. Any other quotes are text.
    """
    if '""' not in field or not _QUOTED.fullmatch(field):
        return field
    return field[1:-1].replace('""', '"')


def _csv_fields(path: Path, bad: BadRows) -> Iterator[tuple[int, list[str]]]:
    """(line a row starts on, fields); quotes may hold commas, quotes and line ends."""
    # bad bytes become lone surrogates here, so that a quoted field of several lines stays one row
    lines = (raw.decode("utf-8", "surrogateescape") for _, _, raw in read_lines(path))
    csv.field_size_limit(max(csv.field_size_limit(), MAX_CSV_FIELD))
    reader = csv.reader(lines, strict=True)
    blank: list[int] = []
    while True:
        start = reader.line_num + 1
        try:
            values = next(reader)
        except StopIteration:
            return
        except csv.Error as e:
            hint = "; is a quote left open?" if "end of data" in str(e) or "limit" in str(e) else ""
            bad.report(f"{path}:{start}", "a CSV row", f"{e}{hint}")
            continue
        if not values:
            blank.append(start)
            continue
        for number in blank:
            bad.report(f"{path}:{number}", "a row", "an empty line")
        blank.clear()
        joined = "".join(values)
        if not joined.isascii():
            try:
                joined.encode("utf-8")
            except UnicodeEncodeError:
                raw = ",".join(values).encode("utf-8", "surrogateescape")
                try:
                    raw.decode("utf-8")
                except UnicodeDecodeError as e:
                    bad.report(
                        f"{path}:{start}",
                        "UTF-8 text",
                        bad_byte(raw, e.start).replace("line", "row"),
                    )
                continue
        yield start, values


# -- Parquet ------------------------------------------------------------------------------------


def _parquet_table(path: Path, bad: BadRows) -> Table:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(path) as file:
            columns = list(file.schema_arrow.names)
            num_rows = file.metadata.num_rows
    except (pa.ArrowException, OSError) as e:
        raise ValueError(f"{path}: expected a Parquet file, found damage: {e}") from e
    if num_rows == 0:
        raise ValueError(f"{path}: expected rows of data, found an empty table")

    def rows(needed: list[str] | None) -> Rows:
        number = count(1)
        try:
            # pre_buffer would read all columns of a row group ahead
            with pq.ParquetFile(path, pre_buffer=False) as file:
                for batch in file.iter_batches(batch_size=256, columns=needed):
                    for row in _plain_rows(batch):
                        where = f"{path}:{next(number)}"
                        if isinstance(row, UnicodeDecodeError):
                            bad.report(
                                where, "UTF-8 text", f"{row.object[row.start : row.start + 1]!r}"
                            )
                            continue
                        yield where, row
        except (pa.ArrowException, OSError) as e:
            raise ValueError(f"{path}: expected a whole Parquet file, found damage: {e}") from e

    return Table(str(path), columns, rows)


def _plain_rows(batch: Any) -> list[dict[str, Any] | UnicodeDecodeError]:
    try:
        return batch.to_pylist()
    except UnicodeDecodeError:
        plain: list[dict[str, Any] | UnicodeDecodeError] = []
        for i in range(batch.num_rows):  # one at a time, to find the bad ones
            try:
                plain += batch.slice(i, 1).to_pylist()
            except UnicodeDecodeError as e:
                plain.append(e)
        return plain


# -- hub data (extra [hub]) ---------------------------------------------------------------------


def _datasets() -> ModuleType:
    try:
        import datasets
    except ImportError as e:
        raise ValueError(
            "data.format=hub needs the package datasets: pip install -e '.[hub]'"
        ) from e
    return datasets


def is_saved_dataset(root: Path) -> bool:
    """Whether the folder was written by datasets' save_to_disk."""
    return (root / "dataset_dict.json").is_file() or (
        (root / "state.json").is_file() and (root / "dataset_info.json").is_file()
    )


def _hub_name(root: str) -> tuple[str, str | None]:
    """(path, configuration) of "owner/name" or "owner/name:configuration" or an existing path."""
    if Path(root).exists():
        return root, None
    name, _, config = root.partition(":")
    return name, config or None


def hub_splits(root: str, revision: str | None = None) -> list[str]:
    """Splits of a hub data set or of a local folder `datasets` reads; [] for a lone Dataset."""
    datasets = _datasets()
    try:
        if is_saved_dataset(Path(root)):
            loaded = datasets.load_from_disk(root)
            return list(loaded) if isinstance(loaded, dict) else []
        return list(datasets.get_dataset_split_names(*_hub_name(root), revision=revision))
    except (
        Exception
    ) as e:  # whatever the network, the hub or a broken folder raises: say which data it was
        raise ValueError(f"data.root={root} cannot be read with datasets: {e}") from e


def hub_table(
    root: str, split: str | None, filter_by: dict[str, Any], revision: str | None = None
) -> tuple[Table, dict[str, Any]]:
    """(table, filter): names of classes in the filter are replaced by their numbers."""
    datasets = _datasets()
    try:
        if is_saved_dataset(Path(root)):
            data = datasets.load_from_disk(root)
            data = data[split] if isinstance(data, dict) else data
        else:
            name, config = _hub_name(root)
            data = datasets.load_dataset(
                name, config, split=split, streaming=True, revision=revision
            )
        if data.column_names is None:  # a stream that learns its columns from its first row
            data = data._resolve_features()
    except Exception as e:  # as in hub_splits
        raise ValueError(
            f"data.root={root} (split {split}) cannot be read with datasets: {e}"
        ) from e
    label = f"{root}[{split}]" if split else root
    wanted = dict(filter_by)
    for column, value in filter_by.items():
        feature = (data.features or {}).get(column)
        if (
            isinstance(feature, datasets.ClassLabel)
            and isinstance(value, str)
            and not value.isdigit()
        ):
            if value not in feature.names:
                names = ", ".join(feature.names)
                raise ValueError(
                    f"data.filter {column}={value!r} names no class of {label}; classes: {names}"
                )
            wanted[column] = feature.str2int(value)

    def rows(needed: list[str] | None) -> Rows:
        chosen = data.select_columns(needed) if needed is not None else data
        for number, row in enumerate(chosen, 1):
            yield f"{label}:{number}", dict(row)

    return Table(label, list(data.column_names), rows), wanted
