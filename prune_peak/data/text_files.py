"""Texts in files: plain text, JSON, CSV and Parquet, compressed by gzip or not; a text or a chat for each record."""

import csv
import gzip
import io
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import IO, Any

from ..errors import PrunePeakError, brief, spell
from ..io.untrusted import check_file, parse_json

LONGEST_TEXT = 4 * 2**20  # characters that are read of a text, from its start: about 2,000 windows of 512 tokens
# Files that hold text in a form of their own, which is not read
REFUSED = (
    *(".htm", ".html", ".xml", ".pdf", ".doc", ".docx", ".odt", ".rtf", ".epub", ".xls", ".xlsx", ".ppt", ".pptx"),
    *(".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".zst", ".bin", ".safetensors", ".gguf", ".pt", ".pkl", ".npy"),
    *(".arrow", ".feather", ".jpg", ".jpeg", ".png", ".gif", ".webp", ".mp3", ".wav", ".flac"),
)
RECORD = 'a "text", like {"text": "..."}, or "messages", like {"messages": [{"role": "user", "content": "..."}]}'


class Answered(str):
    """A text with what a model is to make of it."""

    target: str

    def __new__(cls, text: str, target: str) -> "Answered":
        answered = super().__new__(cls, text)
        answered.target = target
        return answered


# One text, with a target or without, or the messages of one chat
Record = str | list[dict[str, Any]]


def read_records(path: Path, column: str | None = None) -> list[Record]:
    """The texts and chats of a file, by its suffix; at most `LONGEST_TEXT` characters of it.

    `.jsonl`, `.ndjson` (an object on each line), `.json` (a list of objects), `.csv`, `.tsv` and `.parquet` (a column
    `text` or `messages`, or the given one); any other suffix is one plain text. `.gz` after the suffix is decompressed.

    Raises:
        PrunePeakError: the file cannot be read, or is not of that form.
    """
    suffixes = [suffix.lower() for suffix in path.suffixes[-2:]]
    is_compressed = suffixes[-1:] == [".gz"]
    kind = (suffixes[:-1] if is_compressed else suffixes)[-1:]
    suffix = kind[0] if kind else ""
    if suffix in REFUSED:
        raise PrunePeakError(
            f"{path} is a {suffix} file; expected plain text, .jsonl, .json, .csv or .parquet. Save its text as one of "
            "these."
        )
    try:
        check_file(path)
        if suffix == ".parquet":
            return limit_records(_read_parquet(path, column))
        with gzip.open(path) if is_compressed else path.open("rb") as file:
            text = _decode(file)
    except (OSError, EOFError, UnicodeDecodeError) as error:
        raise PrunePeakError(f"{path} is not a readable UTF-8 text ({brief(error)}).") from None
    reader = READERS.get(suffix)
    return [text] if reader is None else limit_records(reader(path, text, column))


def _decode(file: Any) -> str:
    """The first characters of a file, without a byte order mark."""
    with io.TextIOWrapper(file, encoding="utf-8-sig", newline=None) as decoded:
        return decoded.read(LONGEST_TEXT)


def limit_records(records: Iterable[Record]) -> list[Record]:
    """The first records, up to the longest text."""
    kept, size = [], 0
    for record in records:
        kept.append(record)
        size += len(record) if isinstance(record, str) else sum(len(str(each.get("content"))) for each in record)
        if size > LONGEST_TEXT:
            break
    return kept


def check_record(record: Any, where: str, column: str | None = None) -> Record:
    """The text or the messages of a record, or what a column of it holds."""
    target = record.get("target") if isinstance(record, Mapping) else None
    if column is not None:
        value = record.get(column) if isinstance(record, Mapping) else None
        record = {"text": value, "messages": value}
    if isinstance(record, str):
        record = {"text": record}
    if isinstance(record, Mapping):
        text, messages = record.get("text"), record.get("messages")
        if isinstance(messages, str):  # in a column of CSV
            try:
                messages = parse_json(messages)
            except ValueError:
                messages = None
        if isinstance(text, str) and _is_text(text):
            return Answered(text, target) if isinstance(target, str) and _is_text(target) else text
        if messages and isinstance(messages, list) and all(map(_is_message, messages)):
            return [dict(message) for message in messages]
    expected = f"an object with {RECORD}" if column is None else f"text, or messages of a chat, in the column {column}"
    raise PrunePeakError(f"{where}: expected {expected}.")


def _is_text(text: str) -> bool:
    try:
        text.encode()  # JSON can hold half a surrogate pair, which is not text
    except UnicodeEncodeError:
        return False
    return True


def _is_message(message: Any) -> bool:
    return isinstance(message, Mapping) and isinstance(message.get("role"), str) and "content" in message


def _read_lines(path: Path, text: str, column: str | None) -> Iterator[Record]:
    lines = text.split("\n")
    if len(text) >= LONGEST_TEXT:
        lines.pop()  # it may be cut
    for number, line in enumerate(lines, start=1):
        if line.strip():
            try:
                record = parse_json(line)
            except ValueError:
                record = None
            yield check_record(record, f"{path}, line {number}", column)


def _read_list(path: Path, text: str, column: str | None) -> Iterator[Record]:
    if len(text) >= LONGEST_TEXT:
        raise PrunePeakError(
            f"{path} has more than {LONGEST_TEXT:,} characters; expected fewer in one JSON value. Save it as .jsonl, "
            "one object on each line."
        )
    try:
        records = parse_json(text)
    except ValueError as error:
        raise PrunePeakError(
            f"{path} is not JSON ({brief(error)}). Expected a list of objects with {RECORD}."
        ) from None
    if not isinstance(records, list):
        raise PrunePeakError(f"{path} holds a {type(records).__name__}; expected a list of objects with {RECORD}.")
    for number, record in enumerate(records, start=1):
        yield check_record(record, f"{path}, record {number}", column)


def _read_table(path: Path, text: str, column: str | None, delimiter: str = ",") -> Iterator[Record]:
    csv.field_size_limit(LONGEST_TEXT)
    file: IO[str] = io.StringIO(text, newline="")
    rows = csv.DictReader(file, delimiter=delimiter)
    try:
        columns = rows.fieldnames or []
        _find_columns(path, columns, column)
        records = list(rows)
    except csv.Error as error:
        raise PrunePeakError(f"{path} is not a readable table ({brief(error)}).") from None
    if len(text) >= LONGEST_TEXT:
        records.pop()  # it may be cut
    for number, record in enumerate(records, start=1):
        yield check_record(record, f"{path}, record {number}", column)


def _find_columns(path: Path, columns: Sequence[str], column: str | None) -> list[str]:
    """The columns to read of a table."""
    wanted = ("text", "messages") if column is None else (column,)
    found = [name for name in wanted if name in columns]
    if not found:
        raise PrunePeakError(
            f"{path} has the columns {', '.join(columns) or 'of an empty file'}; expected one named "
            f"{' or '.join(wanted)}. Name yours with {spell('text_column')}."
        )
    return found


def _read_parquet(path: Path, column: str | None) -> Iterator[Record]:
    try:
        from pyarrow import parquet
    except ImportError:
        raise PrunePeakError(
            f"{path} needs the package pyarrow to be read: pip install 'prune-peak[datasets]', or save it as .jsonl."
        ) from None
    try:
        file = parquet.ParquetFile(path)
        names = file.schema_arrow.names
        columns = [*_find_columns(path, names, column), *({"target"} & {*names})]
        for batch in file.iter_batches(batch_size=1000, columns=columns):
            for record in batch.to_pylist():
                yield check_record(record, str(path), column)
    except PrunePeakError:
        raise
    except Exception as error:  # pyarrow raises its own kinds
        raise PrunePeakError(f"{path} is not a readable Parquet file ({brief(error)}).") from None


READERS: dict[str, Callable[[Path, str, str | None], Iterator[Record]]] = {
    ".jsonl": _read_lines,
    ".ndjson": _read_lines,
    ".json": _read_list,
    ".csv": _read_table,
    ".tsv": lambda path, text, column: _read_table(path, text, column, "\t"),
}
