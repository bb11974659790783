"""Reading labelled rows: JSONL (`text`/`label`/`title`, or MiniMind's `conversations`) and CSV, strictly.

A row that cannot be used ends the reading with one message, `file:line: what is wrong`; nothing is skipped silently.
Files in other shapes go through `dataset/prepare.py` first.
"""

import csv
import io
import json
import unicodedata
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path


class DataError(ValueError):
    """Unusable data; the message reads `file:line: what is wrong`. The scripts end with exit code 3."""


@dataclass(frozen=True)
class Row:
    """One text with its label (None where nothing is known) and where it stands: `file:line`."""

    text: str
    label: str | None
    title: str = ""
    source: str = ""


def read_rows(path: str | Path, need_labels: bool = True) -> list[Row]:
    """Read every row of a `.jsonl` or `.csv` file (UTF-8, a byte-order mark is accepted).

    Args:
        need_labels: refuse a row without a label; False for texts that are to be classified.

    Raises:
        DataError: the file or one of its rows is unusable.
    """
    path = Path(path)
    readers = {".jsonl": _read_jsonl, ".json": _read_jsonl, ".csv": _read_csv}
    if path.suffix.lower() not in readers:
        raise DataError(f"{path}: cannot read {path.suffix or 'a file without an ending'}; give .jsonl or .csv")
    rows = []
    for line, fields in readers[path.suffix.lower()](path, _decode(path)):
        rows.append(_row(fields, f"{path}:{line}", need_labels))
    if not rows:
        raise DataError(f"{path}: no rows")
    return rows


def _decode(path: Path) -> str:
    if not path.is_file():
        raise DataError(f"{path}: no such file")
    raw = path.read_bytes().removeprefix(b"\xef\xbb\xbf")
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        raise DataError(f"{path}:{line}: not UTF-8 (byte {raw[error.start]:#04x})") from None
    if "\0" in text:
        raise DataError(f"{path}:{text.count(chr(10), 0, text.index(chr(0))) + 1}: holds a NUL character")
    return text


def _read_jsonl(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            fields = json.loads(line)
        except (json.JSONDecodeError, RecursionError) as error:
            raise DataError(f"{path}:{number}: broken JSON ({error}): {line.strip()[:80]!r}") from None
        if not isinstance(fields, dict):
            raise DataError(f"{path}:{number}: expected a JSON object, found {line.strip()[:80]!r}")
        yield number, _from_conversation(fields, f"{path}:{number}") if "conversations" in fields else fields


def _from_conversation(fields: dict, source: str) -> dict:
    turns = fields["conversations"]
    turns_are_objects = isinstance(turns, list) and all(isinstance(turn, dict) for turn in turns)
    roles = [turn.get("role") for turn in turns] if turns_are_objects else None
    if roles not in (["user", "assistant"], ["user"]):
        raise DataError(f"{source}: `conversations` must hold one user and one assistant turn, found roles {roles}")
    return {"text": turns[0].get("content"), "label": turns[1].get("content") if len(turns) == 2 else None}


def _read_csv(path: Path, text: str) -> Iterator[tuple[int, dict]]:
    reader = csv.DictReader(io.StringIO(text, newline=""), strict=True)
    line = 1  # where the row begins; a quoted field may run over several lines
    try:
        header = reader.fieldnames or []
        if "text" not in header:
            raise DataError(f"{path}:1: no column `text`; the header has {', '.join(header) or 'nothing'}")
        line = reader.line_num + 1
        for fields in reader:
            if None in fields:
                raise DataError(f"{path}:{line}: more fields than the header's {len(header)}")
            yield line, fields
            line = reader.line_num + 1
    except csv.Error as error:
        raise DataError(f"{path}:{line}: broken CSV ({error})") from None


def _row(fields: dict, source: str, need_label: bool) -> Row:
    text = _string(fields, "text", source)
    if not _visible(text):
        raise DataError(f"{source}: `text` is empty")
    label = _string(fields, "label", source) if fields.get("label") is not None or need_label else None
    label = unicodedata.normalize("NFC", label.strip()) if label is not None else None
    if label is not None and not _visible(label):
        if need_label:
            raise DataError(f"{source}: `label` is empty")
        label = None
    if label is not None and "\n" in label:
        raise DataError(f"{source}: `label` {label[:80]!r} runs over several lines")
    title = _string(fields, "title", source) if fields.get("title") is not None else ""
    return Row(text=text.strip(), label=label, title=title.strip(), source=source)


def _string(fields: dict, name: str, source: str) -> str:
    value = fields.get(name)
    if value is None:
        raise DataError(f"{source}: `{name}` is missing; the row has {', '.join(map(str, fields)) or 'no fields'}")
    if not isinstance(value, str):
        raise DataError(f"{source}: `{name}` must be a string, found {json.dumps(value)[:80]}")
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        raise DataError(f"{source}: `{name}` holds half a surrogate pair") from None
    return value


def _visible(text: str) -> bool:
    return any(not character.isspace() and unicodedata.category(character) != "Cf" for character in text)
