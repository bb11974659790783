"""Lines of a delimited file -> records, for files whose quotes may be broken."""

import csv
from pathlib import Path

from dataset.rows import DataError

SAMPLE_LINES = 50  # first lines that decide on delimiter and header
# A quote that is never closed must not swallow the file: a record that spans more lines is broken.
LONGEST_RECORD = 200  # lines
LONGEST_FIELD = 1 << 24  # characters


def find_delimiter(path: Path, lines: list[str]) -> str:
    """The delimiter that cuts most of the first lines into as many fields as the very first one.

    Raises:
        DataError: neither tab, comma nor semicolon separates columns.
    """
    sample = [line for line in lines[:SAMPLE_LINES] if line.strip()]

    def regular_lines(delimiter: str) -> int:
        counts = [len(next(csv.reader([line], delimiter=delimiter))) for line in sample]
        return sum(count == counts[0] for count in counts) if counts[0] > 1 else 0

    best = max("\t,;", key=regular_lines)
    if not regular_lines(best):
        raise DataError(f"{path}:1: no tab, comma or semicolon separates columns in {sample[0][:80]!r}")
    return best


def has_quoting(line: str, delimiter: str) -> bool:
    """Whether a file with this first line encloses fields in quotes.

    Tab-separated files are usually written without: there a quote is a character like any other, unless already the
    first line holds nothing but quoted fields.
    """
    return delimiter != "\t" or all(len(field) > 1 and field[0] == field[-1] == '"' for field in line.split("\t"))


def read_record(
    lines: list[str], start: int, delimiter: str, quoting: bool = True, columns: int | None = None
) -> tuple[list[str] | None, int, str]:
    """The record that begins at `lines[start]`: its fields, how many lines it takes, what is wrong with it.

    A broken record takes one line, so that reading goes on right behind it.

    Args:
        quoting: what `has_quoting` says of the file.
        columns: how many fields are right; None where that is not known yet.
    """
    if not quoting:
        fields = lines[start].split(delimiter)
        if columns is None or len(fields) == columns:
            last, used = _last_field(lines, start, delimiter, fields[-1])
            return [*map(_unquote, fields[:-1]), last], used, ""
    end = min(len(lines), start + LONGEST_RECORD)
    reader = csv.reader((lines[number] + "\n" for number in range(start, end)), delimiter=delimiter, strict=True)
    try:
        fields = next(reader)
    except csv.Error as error:
        return None, 1, f"broken quotes ({error})" if quoting else f"{len(fields)} fields instead of {columns}"
    if columns is not None and len(fields) != columns:
        return None, 1, f"{len(fields)} fields instead of {columns}"
    return fields, reader.line_num, ""


def _last_field(lines: list[str], start: int, delimiter: str, field: str) -> tuple[str, int]:
    """The last field of a record without quoting, and how many lines the record takes.

    Some programs quote after all where a text has several lines. A field that opens a quote is taken for such a text
    if a later line closes it and no line on the way holds a delimiter; else its quote is a stray one.
    """
    if field.startswith('"') and field.count('"') % 2:
        text = field
        for number in range(start + 1, min(len(lines), start + LONGEST_RECORD)):
            if delimiter in lines[number]:
                break
            text += "\n" + lines[number]
            if lines[number].count('"') % 2:
                inner = text[1:-1].replace('""', "")
                if text.endswith('"') and '"' not in inner:
                    return text[1:-1].replace('""', '"'), number - start + 1
                break
    return _unquote(field), 1


def _unquote(value: str) -> str:
    """Undo the quoting of programs that do quote in tab-separated files: outer quotes, every inner one doubled."""
    inner = value[1:-1]
    quoted = len(value) > 2 and value[0] == value[-1] == '"' and '""' in inner and '"' not in inner.replace('""', "")
    return inner.replace('""', '"') if quoted else value
