"""Reading news files the way they are downloaded: tables with or without a header, JSONL, Parquet.

Nothing has to be edited first and nothing gets lost: a row that cannot be read is set aside with its line, the reason
and the beginning of what stands there, and the file is read on from the next line.
"""

import codecs
import csv
import json
import re
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path

from tqdm import tqdm

from dataset.raw_columns import AG_NEWS_COLUMNS, find_class_names, find_roles, name_columns, plain_name
from dataset.raw_tables import LONGEST_FIELD, SAMPLE_LINES, find_delimiter, has_quoting, read_record
from dataset.rows import DataError

UNDECODED = "a byte that cannot be decoded"  # a reason for setting a row aside
RAW_CUT = 200  # characters of a removed row that are kept for reading


@dataclass(frozen=True)
class Document:
    """One text of the file: where it begins, its label and title, and the name of the article that it is part of."""

    line: int
    text: str
    label: str
    title: str = ""
    name: str = ""


@dataclass(frozen=True)
class Removed:
    """A row that goes no further: its line, why, how it begins, and the line of the row that stays in its place."""

    line: int
    reason: str
    text: str
    twin: int | None = None


@dataclass
class RawFile:
    """What a file held. `lines_in` = `documents` + `rejected` + `blank_lines`; a record counts as one line.

    Attributes:
        format: "comma-separated", "tab-separated", "JSON lines", …, for people to read.
        columns: which column is taken as text, label, title and document.
        header_lines, continuation_lines: the lines of the file that begin no record.
    """

    path: Path
    format: str
    columns: dict[str, str]
    lines_in: int
    header_lines: int = 0
    continuation_lines: int = 0
    documents: list[Document] = field(default_factory=list)
    rejected: list[Removed] = field(default_factory=list)
    blank_lines: list[int] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def read_raw(
    path: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: str | Path | list[str] | None = None,
    encoding: str = "utf-8",
) -> RawFile:
    """Read a file of labelled texts: CSV, TSV, AG News, THUCNews, JSONL or Parquet.

    Args:
        text_column, label_column: by name where the usual names do not tell. A number counts columns from 1
            and says that the file has no header.
        class_names: names for a column of class numbers: a list, or a file with one name a line. Without it a
            `class.txt` beside the file is taken, and AG News has its own four.
        encoding: of text files; a byte-order mark is accepted.

    Raises:
        DataError: the file as a whole cannot be used. A single bad row is set aside in `rejected` instead.
    """
    path = Path(path)
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    asked = {"text": text_column, "label": label_column}
    if path.suffix.lower() == ".parquet":
        raw = _read_parquet(path, asked)
    else:
        lines = _decode_lines(path, encoding)
        json_lines = path.suffix.lower() in (".jsonl", ".ndjson", ".json")
        raw = _read_json_lines(path, lines, asked) if json_lines else _read_table(path, lines, asked)
    _name_classes(raw, class_names)
    if undecoded := sum(row.reason.startswith(UNDECODED) for row in raw.rejected):
        advice = "if the file has another encoding, name it, for example --encoding cp1252"
        raw.notes.append(f"{undecoded} rows are not {encoding}; {advice}")
    accounted = len(raw.documents) + len(raw.rejected) + len(raw.blank_lines)
    if accounted != raw.lines_in:
        raise RuntimeError(f"{path}: {raw.lines_in} lines read, {accounted} accounted for")
    if not raw.documents:
        reasons = f"; line {raw.rejected[0].line}: {raw.rejected[0].reason}" if raw.rejected else ""
        raise DataError(f"{path}: no row could be read{reasons}")
    raw.rejected.sort(key=lambda row: row.line)
    return raw


def _decode_lines(path: Path, encoding: str) -> list[str]:
    """The lines of a text file. Undecodable bytes become lone surrogates, which `_unreadable` finds again."""
    data = path.read_bytes().removeprefix(codecs.BOM_UTF8)
    if not data.strip():
        raise DataError(f"{path}: the file is empty")
    if data.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        raise DataError(f"{path}: the file is UTF-16; save it as UTF-8")
    try:
        text = data.decode(encoding, errors="surrogateescape")
    except (LookupError, UnicodeError) as error:
        raise DataError(f"{path}: cannot be read as {encoding!r} ({error})") from None
    lines = text.split("\n") if "\n" in text else text.split("\r")
    lines = [line.removesuffix("\r") for line in lines]
    if not lines[-1]:
        lines.pop()  # what follows the last line break is no line
    bad = [number for number, line in enumerate(lines, start=1) if _unreadable(line)]
    if 2 * len(bad) > len(lines):
        raise DataError(
            f"{path}:{bad[0]}: {len(bad)} of {len(lines)} lines are not {encoding}; "
            "is it a text file? If so, name its encoding, for example --encoding gb18030 (in the notebook ENCODING)"
        )
    return lines


def _unreadable(text: str) -> str:
    """Why a piece of text cannot be used, or an empty string."""
    if broken := re.search("[\ud800-\udfff]", text):
        code = ord(broken[0])
        is_byte = 0xDC80 <= code <= 0xDCFF
        return f"{UNDECODED} ({code - 0xDC00:#04x})" if is_byte else "half a surrogate pair"
    return "a NUL character" if "\0" in text else ""


# --- tables ---------------------------------------------------------------------------------------------------------


def _read_table(path: Path, lines: list[str], asked: dict[str, str | None]) -> RawFile:
    field_limit = csv.field_size_limit(LONGEST_FIELD)
    try:
        delimiter = find_delimiter(path, lines)
        first = next(number for number, line in enumerate(lines) if line.strip())
        read = partial(read_record, lines, delimiter=delimiter, quoting=has_quoting(lines[first], delimiter))
        head, head_lines, problem = read(first)
        if head is None:
            raise DataError(f"{path}:{first + 1}: the first line cannot be read: {problem}")
        sample = [read(number, columns=len(head))[0] for number in range(min(SAMPLE_LINES, len(lines)))]
        columns, has_header = name_columns(head, [fields for fields in sample if fields is not None], asked)
        roles = find_roles(path, columns, asked)
        names = {"\t": "tab-separated", ",": "comma-separated", ";": "semicolon-separated"}
        raw = RawFile(path, names[delimiter], roles, lines_in=len(lines))
        if has_header:
            raw.header_lines = head_lines
            raw.lines_in -= head_lines
        else:
            raw.format += ", no header"
        breaks_are_backslashes = [name.casefold() for name in columns] == AG_NEWS_COLUMNS

        raw.blank_lines.extend(range(1, first + 1))
        position = first + (head_lines if has_header else 0)
        with tqdm(total=len(lines), initial=position, desc="reading", unit="line", delay=1, leave=False) as bar:
            while position < len(lines):
                number, used = position + 1, 1
                if not lines[position].strip():
                    raw.blank_lines.append(number)
                else:
                    fields, used, problem = read(position, columns=len(columns))
                    record = "\n".join(lines[position : position + used])
                    if fields is None:
                        _reject(raw, number, problem, record)
                    else:
                        if breaks_are_backslashes:
                            fields = [re.sub(r"\\+", " ", value) for value in fields]
                        _add(raw, number, dict(zip(columns, fields, strict=True)), record)
                raw.continuation_lines += used - 1
                position += used
                bar.update(used)
        raw.lines_in -= raw.continuation_lines
        return raw
    finally:
        csv.field_size_limit(field_limit)


# --- JSON lines and Parquet -----------------------------------------------------------------------------------------


def _read_json_lines(path: Path, lines: list[str], asked: dict[str, str | None]) -> RawFile:
    if lines[0].lstrip().startswith("["):
        raise DataError(f"{path}: a JSON array; write one JSON object a line (.jsonl)")
    raw = RawFile(path, "JSON lines", {}, lines_in=len(lines))
    records = []
    for number, line in enumerate(tqdm(lines, desc="reading", unit="line", delay=1, leave=False), start=1):
        if not line.strip():
            raw.blank_lines.append(number)
            continue
        try:
            fields = json.loads(line)
            problem = "" if isinstance(fields, dict) else "no JSON object"
        except json.JSONDecodeError as error:
            problem = f"broken JSON ({error.msg})"
        except (ValueError, RecursionError) as error:  # a number of 5,000 digits, 100,000 brackets
            problem = f"broken JSON ({error})"
        if problem:
            _reject(raw, number, problem, line)
        else:
            records.append((number, fields, line))
    columns = list(dict.fromkeys(name for _, fields, _ in records[:SAMPLE_LINES] for name in fields))
    raw.columns = find_roles(path, columns, asked)
    for number, fields, line in records:
        _add(raw, number, fields, line)
    return raw


def _read_parquet(path: Path, asked: dict[str, str | None]) -> RawFile:
    import pandas  # only this format needs it

    try:
        table = pandas.read_parquet(path)
    except ImportError:
        raise DataError(
            f"{path}: reading Parquet needs pyarrow (pip install pyarrow); or save the table as CSV or JSON lines"
        ) from None
    except (OSError, ValueError) as error:
        raise DataError(f"{path}: not a Parquet file that can be read ({error})") from None
    raw = RawFile(path, "Parquet", find_roles(path, [str(name) for name in table], asked), lines_in=len(table))
    table.columns = [str(name) for name in table]
    for number, fields in enumerate(table.to_dict("records"), start=1):
        _add(raw, number, fields, str(fields))
    return raw


# --- records to documents -------------------------------------------------------------------------------------------


def _add(raw: RawFile, line: int, fields: dict, record: str) -> None:
    """Turn one record into a document, or set it aside."""
    values, problem = {}, ""
    for role, column in raw.columns.items():
        value = fields.get(column)
        if isinstance(value, int) and not isinstance(value, bool) and role != "text":
            value = str(value)
        if (value is None or value != value) and role in (
            "title",
            "document",
        ):  # a table's gaps are NaN, unequal to itself
            value = ""
        if not isinstance(value, str):
            kind = "missing" if value is None or value != value else f"not a string but {type(value).__name__}"
            problem = problem or f"`{column}` is {kind}"
            continue
        values[role] = value
        problem = problem or _unreadable(value)
    if not problem and not values["label"].strip():
        problem = f"no label in `{raw.columns['label']}`"
    if problem:
        _reject(raw, line, problem, record)
        return
    name = values.get("document", "").strip()
    if name and plain_name(raw.columns["document"]) == "filename":
        name = f"{values['label'].strip().casefold()}/{name}"  # BBC counts its files anew in every category
    raw.documents.append(Document(line, values["text"], values["label"], values.get("title", ""), name))


def _reject(raw: RawFile, line: int, reason: str, record: str) -> None:
    """Set a row aside; what of it no file could hold (undecodable bytes) becomes replacement characters."""
    raw.rejected.append(Removed(line, reason, re.sub("[\ud800-\udfff]", "\ufffd", record[:RAW_CUT])))


def _name_classes(raw: RawFile, class_names: str | Path | list[str] | None) -> None:
    """Put names in the place of class numbers; a row whose number has no name is set aside."""
    numbers = [int(row.label) for row in raw.documents if row.label.strip().isdecimal()]
    if not numbers or 10 * len(numbers) < 9 * len(raw.documents):
        if class_names is not None and raw.documents:
            raise DataError(f"{raw.path}: class_names are given, but labels are words: {raw.documents[0].label!r}")
        return
    names, first, note = find_class_names(raw.path, set(numbers), raw.columns, class_names)
    if note:
        raw.notes.append(note)
    documents = []
    for row in raw.documents:
        number = int(row.label) - first if row.label.strip().isdecimal() else -1
        if 0 <= number < len(names):
            documents.append(replace(row, label=names[number]))
        else:
            _reject(raw, row.line, f"class {row.label.strip()!r} has no name", row.text)
    raw.documents = documents
