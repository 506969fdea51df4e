"""Rows from files in the formats people have, one at a time.

JSON lines, CSV (both also .gz), parquet and Arrow streams; a folder of such files, as `datasets.save_to_disk` or a
download from a hub leaves it; or a pattern for some files of a folder ("data/train-*.parquet"). Cells of a CSV file are
texts; empty cells are None. A row that cannot be read, such as a line that is not JSON, does not end a file: it is
told apart (`SourceRow`), and whoever reads counts it.
"""

from __future__ import annotations

import csv
import gzip
import io
import json
import re
import sys
import zlib
from collections.abc import Iterator
from fnmatch import fnmatchcase
from typing import Any

import pyarrow as pa
import pyarrow.fs as pafs

from cai_ray.data.left_out import OddRow, SourceRow
from cai_ray.errors import InputError
from cai_ray.storage import files
from cai_ray.storage.filesystems import iter_parquet, open_file, resolve

JSONL = (".jsonl", ".jsonl.gz")
CSV = (".csv", ".csv.gz")
FORMATS = (*JSONL, *CSV, ".parquet", ".arrow")
_ACCEPTED = f"a file or a folder of {', '.join(FORMATS)}"

_AHEAD_BYTES = 4 << 20
_CACHE = re.compile(r"cache-.*\.arrow")
_NOT_UTF8 = re.compile("[\udc80-\udcff]")
"""What bytes that are not UTF-8 are read as (`surrogateescape`)."""

csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may be a document


def iter_source_rows(path: str) -> Iterator[SourceRow]:
    """Rows of a file, of a folder's files in the order of their names, or of the files that match a pattern.

    Each has its place; those that cannot be read are among them.

    Raises:
        InputError: a file is missing, unreadable, empty, or in another format.
    """
    empty = True
    for file in data_files(path):
        # A file in a folder is named by its own path; a single file, as the user wrote it.
        where = path if path.endswith(FORMATS) and "*" not in path else file
        try:
            for number, values in _read(file, path):
                empty = False
                yield SourceRow(where, number, values)
        except (OSError, EOFError, ValueError, OverflowError, zlib.error, csv.Error, pa.ArrowException) as e:
            raise InputError(f"{where}: cannot be read ({' '.join(str(e).split())})") from e
    if empty:
        raise InputError(f"{path}: holds no rows")


def data_files(path: str) -> list[str]:
    """The files that a file's, a folder's or a pattern's `path` stands for, without the scheme.

    Raises:
        InputError: there are none, or a file is in another format.
    """
    folder, _, name = path.rpartition("/")
    if "*" in name:
        matching = [f for f in _list_files(folder or ".") if fnmatchcase(f.rsplit("/", 1)[-1], name)]
        if not matching:
            raise InputError(f"{path}: no such files; give {_ACCEPTED}")
        return matching
    fs, real = resolve(path)
    info = fs.get_file_info(real)
    if info.type == pafs.FileType.NotFound:
        raise InputError(f"{path}: no such file; give {_ACCEPTED}")
    if info.is_file:
        if not path.endswith((*FORMATS, ".json")):
            raise InputError(f"{path}: is in another format; give {_ACCEPTED}")
        return [real]
    if listed := _list_files(path):
        return listed
    below = sorted({f.rsplit("/", 1)[0][len(real) :].strip("/") for f in _list_files(path, recursive=True)})
    if below:
        raise InputError(f"{path}: its rows are in folders; name one of them ({', '.join(below)})")
    raise InputError(f"{path}: the folder has none of {', '.join(FORMATS)}")


def clean(text: str) -> str:
    """A text whose lines end with a line feed alone, and whose lone surrogates are replaced.

    Every tokenizer and file accepts it.
    """
    return _whole(text).replace("\r\n", "\n")


def _whole(text: str) -> str:
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


def _list_files(folder: str, recursive: bool = False) -> list[str]:
    """The files of rows in a folder, without those in which `datasets` keeps what it computed from them."""
    listed = files.list_files(folder, recursive=recursive)
    return [f for f in listed if f.endswith(FORMATS) and not _CACHE.fullmatch(f.rsplit("/", 1)[-1])]


def _read(file: str, path: str) -> Iterator[tuple[int, dict[str, Any] | OddRow]]:
    """The rows of a file with their numbers."""
    fs, _ = resolve(path)
    if file.endswith(".parquet"):
        yield from enumerate((row for table in iter_parquet(fs, file, 1024) for row in table.to_pylist()), 1)
        return
    if file.endswith(".arrow"):
        with open_file(fs, file) as f:
            yield from enumerate(_arrow(f), 1)
        return
    # Line readers read a few kilobytes at a time; without a buffer, each would be a request to an object store.
    with pa.BufferedInputStream(open_file(fs, file), _AHEAD_BYTES) as raw:
        plain = gzip.GzipFile(fileobj=raw) if file.endswith(".gz") else raw
        # Only \n ends a line: the texts in it may contain other separators.
        lines = io.TextIOWrapper(io.BufferedReader(plain), "utf-8-sig", "surrogateescape", newline="\n")
        yield from _csv(lines) if file.endswith(CSV) else _json_lines(lines)


def _arrow(raw: pa.NativeFile) -> Iterator[dict[str, Any]]:
    """Rows of an Arrow stream, which `save_to_disk` writes, or of an Arrow file, which other programs write."""
    if raw.read(6) == b"ARROW1":
        raw.seek(0)
        reader = pa.ipc.open_file(raw)
        batches = (reader.get_batch(i) for i in range(reader.num_record_batches))
    else:
        raw.seek(0)
        batches = iter(pa.ipc.open_stream(raw))
    for batch in batches:
        for start in range(0, batch.num_rows, 1024):
            yield from batch.slice(start, 1024).to_pylist()


def _csv(lines: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any] | OddRow]]:
    for number, row in enumerate(csv.DictReader(lines, strict=True), 1):
        if None in row:
            yield number, OddRow("more cells than the header", "quote cells with commas")
        elif any(value and _NOT_UTF8.search(value) for value in row.values()):
            yield number, OddRow("not UTF-8")
        elif any(row.values()):
            yield number, {name: value or None for name, value in row.items()}


def _json_lines(lines: io.TextIOWrapper) -> Iterator[tuple[int, dict[str, Any] | OddRow]]:
    for number, line in enumerate(lines, 1):
        if line.strip():
            yield number, _json_row(line)


def _json_row(line: str) -> dict[str, Any] | OddRow:
    if not line.isascii() and _NOT_UTF8.search(line):
        return OddRow("not UTF-8")
    try:
        row = json.loads(line)
        if "\\u" in line:  # an escape can name half a character, which cannot be written to a file
            row = json.loads(_whole(json.dumps(row, ensure_ascii=False)))
    except (ValueError, RecursionError) as e:  # numbers with thousands of digits, endless nesting
        reason = e.msg if isinstance(e, json.JSONDecodeError) else str(e).partition(";")[0]
        return OddRow("not valid JSON", f"{reason}; give one JSON object per line")
    if not isinstance(row, dict):
        return OddRow("not a JSON object", "give one JSON object per line")
    return row
