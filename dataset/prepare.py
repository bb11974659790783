"""From a raw news file to training data: read, clean, drop duplicates, split, chunk, report, write.

    python dataset/prepare.py dataset/raw_sample.csv --output_dir dataset/prepared
    python dataset/prepare.py bbc-news-data.csv --output_dir dataset/bbc --chunk_words 200
    python dataset/prepare.py thucnews/train.txt --class_names thucnews/class.txt --output_dir dataset/thucnews

writes train.jsonl, val.jsonl and test.jsonl (rows of text, label, title and document), rejects.jsonl (what could not be
read, and why) and report.json. The same file and settings give the same bytes. `data_process.ipynb` walks through the
same steps with pictures.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict
from itertools import islice
from pathlib import Path

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from dataset.duplicates import NEAR, drop_duplicates
from dataset.read_raw import RAW_CUT, Document, RawFile, Removed, read_raw
from dataset.report import data_report
from dataset.splits import Splits, chunk_splits, split_documents
from dataset.text import clean_label, clean_text, is_empty

SHOWN_REJECTS = 5  # rows that the command line prints; all are in rejects.jsonl


def clean(documents: list[Document]) -> tuple[list[Document], list[Removed], dict[str, str]]:
    """Clean texts, titles and labels.

    Spellings of a label that differ in case only become the most frequent one. A document without a name is named
    after its line.

    Returns:
        The documents, the empty ones that were dropped, and the spellings that changed: {"Tech": "tech"}.
    """
    spellings = Counter(clean_label(document.label) for document in documents)
    usual: dict[str, str] = {}
    for spelling in sorted(spellings, key=lambda spelling: (spellings[spelling], spelling)):
        usual[spelling.casefold()] = spelling  # the most frequent one comes last and stays
    kept, dropped = [], []
    for document in documents:
        text = clean_text(document.text)
        if is_empty(text):
            dropped.append(Removed(document.line, "empty text", document.text[:RAW_CUT]))
            continue
        label = usual[clean_label(document.label).casefold()]
        name = document.name or f"line {document.line}"
        kept.append(Document(document.line, text, label, clean_text(document.title), name))
    changed = {document.label: usual[clean_label(document.label).casefold()] for document in documents}
    return kept, dropped, {raw: label for raw, label in sorted(changed.items()) if raw != label}


def count_lines(raw: RawFile, splits: Splits, dropped: list[Removed]) -> dict:
    """Where every line of the file went: lines_in == kept + dropped + rejected.

    Raises:
        RuntimeError: the counts do not add up, which would be a fault of this module.
    """
    reasons = Counter(row.reason for row in dropped)
    if raw.blank_lines:
        reasons["blank line"] = len(raw.blank_lines)
    counts = {
        "lines_in": raw.lines_in,
        "kept": len({document.line for documents in splits.values() for document in documents}),
        "dropped": reasons.total(),
        "rejected": len(raw.rejected),
        "dropped_by_reason": dict(sorted(reasons.items())),
        "rejected_by_reason": dict(sorted(Counter(row.reason for row in raw.rejected).items())),
        "header_lines": raw.header_lines,
        "continuation_lines": raw.continuation_lines,
    }
    if counts["lines_in"] != counts["kept"] + counts["dropped"] + counts["rejected"]:
        raise RuntimeError(f"{raw.path}: the lines do not add up: {counts}")
    return counts


def write_splits(output_dir: str | Path, splits: Splits, rejected: list[Removed], report: dict) -> list[Path]:
    """Write the three splits, the rejects and the report; files of an earlier run are replaced, never added to.

    Every file is complete under a temporary name before the first one takes its place.
    """
    contents = {
        f"{name}.jsonl": "".join(_json_line(_fields(document)) for document in documents)
        for name, documents in splits.items()
    }
    contents["rejects.jsonl"] = "".join(
        _json_line({"line": row.line, "reason": row.reason, "raw": row.text}) for row in rejected
    )
    contents["report.json"] = json.dumps(report, ensure_ascii=False, indent=2) + "\n"

    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    temporary = {folder / name: folder / f".{name}.{os.getpid()}.tmp" for name in contents}
    try:
        for path, unfinished in temporary.items():
            with open(unfinished, "w", encoding="utf-8", newline="\n") as file:
                file.write(contents[path.name])
                file.flush()
                os.fsync(file.fileno())
        for path, unfinished in temporary.items():
            os.replace(unfinished, path)
    finally:
        for unfinished in temporary.values():
            unfinished.unlink(missing_ok=True)
    return list(temporary)


def _fields(document: Document) -> dict[str, str]:
    fields = {"text": document.text, "label": document.label, "title": document.title, "document": document.name}
    return {name: value for name, value in fields.items() if value}


def _json_line(fields: dict) -> str:
    return json.dumps(fields, ensure_ascii=False) + "\n"


def full_report(
    raw: RawFile,
    spellings: dict[str, str],
    dropped: list[Removed],
    dropped_chunks: list[Removed],
    splits: Splits,
    settings: dict,
    tokenizer=None,
    max_seq_len: int = 512,
) -> dict:
    """What report.json holds: where the rows came from, where every line went, and the checks of the splits."""
    return {
        "file": raw.path.name,
        "format": raw.format,
        "columns": raw.columns,
        "notes": raw.notes,
        "settings": settings,
        "lines": count_lines(raw, splits, dropped),
        "label_spellings": spellings,
        "dropped": [asdict(row) for row in sorted(dropped, key=lambda row: row.line)],
        "dropped_chunks": dict(sorted(Counter(row.reason for row in dropped_chunks).items())),
        **data_report(splits, tokenizer, max_seq_len),
    }


def prepare(
    path: str | Path,
    output_dir: str | Path,
    text_column: str | None = None,
    label_column: str | None = None,
    class_names: str | Path | list[str] | None = None,
    encoding: str = "utf-8",
    near: float = NEAR,
    seed: int = 42,
    val_share: float = 0.1,
    test_share: float = 0.1,
    chunk_words: int = 0,
    tokenizer=None,
    max_seq_len: int = 512,
) -> dict:
    """All steps from a raw file to written splits.

    Args:
        chunk_words: most words of a chunk (Chinese: characters); 0 leaves articles whole.
        tokenizer: for the token counts of the report; without one they are left out.
        max_seq_len: in tokens; the report says how many texts it cuts.

    Returns:
        What is written to report.json.

    Raises:
        DataError: the file cannot be used; nothing has been written.
    """
    raw = read_raw(path, text_column, label_column, class_names, encoding)
    documents, dropped, spellings = clean(raw.documents)
    documents, duplicates = drop_duplicates(documents, near)
    splits = split_documents(documents, seed, val_share, test_share)
    dropped = dropped + duplicates
    dropped_chunks: list[Removed] = []
    if chunk_words:
        splits, dropped_chunks, emptied = chunk_splits(splits, chunk_words, near)
        dropped = dropped + emptied
    settings = {
        "near": near,
        "seed": seed,
        "val_share": val_share,
        "test_share": test_share,
        "chunk_words": chunk_words,
    }
    report = full_report(raw, spellings, dropped, dropped_chunks, splits, settings, tokenizer, max_seq_len)
    write_splits(output_dir, splits, raw.rejected, report)
    return report


def main() -> None:
    """The command line. Its imports stand here because the functions above need neither torch nor a model."""
    from model.checkpoint import BUNDLED_BASE, load_tokenizer
    from train.arguments import build_parser

    parser = build_parser(__doc__)
    parser.add_argument("file", help="CSV, TSV, AG News, THUCNews, JSONL or Parquet")
    parser.add_argument("--output_dir", required=True, help="folder for the splits, the rejects and the report")
    parser.add_argument("--text_column", help="by name, or counted from 1 in a file without a header")
    parser.add_argument("--label_column", help="by name, or counted from 1 in a file without a header")
    parser.add_argument("--class_names", help="file with one class name a line, for a column of class numbers")
    parser.add_argument("--encoding", default="utf-8", help="of a text file, for example gb18030")
    parser.add_argument("--near", type=float, default=NEAR, help="similarity of near duplicates; 2 keeps them")
    parser.add_argument("--seed", type=int, default=42, help="of the split")
    parser.add_argument("--val_share", type=float, default=0.1, help="share of the documents for validation")
    parser.add_argument("--test_share", type=float, default=0.1, help="share of the documents for the test")
    parser.add_argument(
        "--chunk_words", type=int, default=0, help="most words (Chinese: characters) of a chunk; 0: whole"
    )
    parser.add_argument("--tokenizer", default=str(BUNDLED_BASE), help="folder of the tokenizer that counts tokens")
    parser.add_argument("--max_seq_len", type=int, default=512, help="in tokens; the report counts the texts it cuts")
    options = vars(parser.parse_args())
    options["tokenizer"] = load_tokenizer(options["tokenizer"])
    output_dir = options["output_dir"]

    print_report(prepare(options.pop("file"), **options), output_dir)


def print_report(report: dict, output_dir: str) -> None:
    """Print what a user has to know of a report: every line's way, the first rejects, warnings, what is to beat."""
    columns = ", ".join(f"{role} in `{column}`" for role, column in report["columns"].items())
    print(f"{report['file']}: {report['format']}; {columns}")
    for note in report["notes"]:
        print(note)
    lines = report["lines"]
    print("lines in {lines_in} = kept {kept} + dropped {dropped} + rejected {rejected}".format(**lines))
    for reason, count in {**lines["dropped_by_reason"], **lines["rejected_by_reason"]}.items():
        print(f"  {count} {reason}")
    with open(Path(output_dir) / "rejects.jsonl", encoding="utf-8") as file:
        for row in map(json.loads, islice(file, SHOWN_REJECTS)):
            print(f"  line {row['line']}: {row['reason']}: {row['raw'][:80]!r}")
    if lines["rejected"] > SHOWN_REJECTS:
        print(f"  {lines['rejected'] - SHOWN_REJECTS} more in rejects.jsonl")
    print(", ".join(f"{name} {rows} rows" for name, rows in report["rows"].items()))
    if tokens := report.get("tokens"):
        rows = sum(report["rows"].values())
        share = f"{tokens['cut_texts']} of {rows} texts ({100 * tokens['cut_texts'] / rows:.1f} %)"
        print(f"{share} are cut at {tokens['max_seq_len']} tokens")
    if baseline := report["baseline"]:
        names = {"majority_accuracy": "largest class", "tfidf_accuracy": "TF-IDF with logistic regression"}
        scores = ", ".join(f"{name} {100 * baseline[key]:.1f} %" for key, name in names.items())
        print(f"test accuracy to beat: {scores}")
    for warning in report["warnings"]:
        print(f"note: {warning}")
    print(f"wrote {output_dir}: the splits, rejects.jsonl, report.json")


if __name__ == "__main__":
    from train.arguments import run_script

    run_script(main)
