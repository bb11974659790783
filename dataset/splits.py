"""Splitting documents into train, val and test so that nothing stands on two sides, and cutting them into chunks."""

import hashlib
from collections import Counter, defaultdict
from dataclasses import replace

from tqdm import tqdm

from dataset.duplicates import NEAR, drop_duplicates
from dataset.read_raw import Document, Removed
from dataset.rows import DataError
from dataset.text import chunk_text, fold

SPLITS = ("train", "val", "test")
Splits = dict[str, list[Document]]


def split_documents(
    documents: list[Document], seed: int = 42, val_share: float = 0.1, test_share: float = 0.1
) -> Splits:
    """Split by document into train, val and test, each class in the same proportion.

    The order within a class follows from the seed and the texts alone, so neither the order of the file nor a new
    row elsewhere changes where a document goes (but for the few at the border). A class of three documents or more
    has at least one in every split; of a smaller class all go to train.

    Raises:
        DataError: shares out of range, or fewer than two classes.
    """
    if min(val_share, test_share) < 0 or val_share + test_share >= 1:
        raise DataError(f"val_share {val_share} and test_share {test_share} must leave something to train on")
    labels = sorted({document.label for document in documents})
    if len(labels) < 2:
        raise DataError(f"a classification needs at least two labels, found {', '.join(labels) or 'none'}")

    groups = defaultdict(list)
    for document in documents:
        groups[document.name].append(document)
    by_label = defaultdict(list)
    for group in groups.values():
        (label, _), *_ = Counter(document.label for document in group).most_common(1)
        key = hashlib.blake2b(f"{seed}\n{fold(group[0].text)}".encode(), digest_size=16).hexdigest()
        by_label[label].append((key, group))

    keyed = {name: [] for name in SPLITS}
    for keyed_groups in by_label.values():
        keyed_groups.sort(key=lambda pair: pair[0])
        test, val = _held_out(len(keyed_groups), val_share, test_share)
        keyed["test"] += keyed_groups[:test]
        keyed["val"] += keyed_groups[test : test + val]
        keyed["train"] += keyed_groups[test + val :]
    # Written in an order that follows from the keys' ends (their beginnings have chosen the split): the classes come
    # mixed, also to someone who reads the first lines only.
    return {
        name: [document for _, group in sorted(pairs, key=lambda pair: pair[0][::-1]) for document in group]
        for name, pairs in keyed.items()
    }


def _held_out(groups: int, val_share: float, test_share: float) -> tuple[int, int]:
    """How many of a class's groups go to test and to val; at least one stays for train."""
    if groups < 3:
        return 0, 0
    test = min(max(1, round(groups * test_share)), groups - 2) if test_share else 0
    val = min(max(1, round(groups * val_share)), groups - test - 1) if val_share else 0
    return test, val


def chunk_splits(splits: Splits, most_words: int, near: float = NEAR) -> tuple[Splits, list[Removed], list[Removed]]:
    """Cut long articles into chunks at sentence ends; the chunks of an article stay in its split.

    Articles share paragraphs (a standing notice, a quoted statement), so chunks are freed of duplicates once more.

    Args:
        most_words: most words of a chunk (Chinese: characters).

    Returns:
        The splits, the chunks that were dropped, and the documents of which no chunk is left.
    """
    split_of = {document.name: name for name, documents in splits.items() for document in documents}
    chunks = [
        replace(document, text=chunk)
        for name, documents in splits.items()
        for document in tqdm(documents, f"chunks of {name}", unit="article", delay=1, leave=False)
        for chunk in chunk_text(document.text, most_words)
    ]
    kept, dropped = drop_duplicates(chunks, near)
    chunked: Splits = {name: [] for name in splits}
    for chunk in kept:
        chunked[split_of[chunk.name]].append(chunk)
    lines_left = {chunk.line for chunk in kept}
    gone = [row for row in dropped if row.line not in lines_left]
    emptied = {row.line: Removed(row.line, "all chunks are duplicates", row.text, row.twin) for row in gone}
    return chunked, dropped, list(emptied.values())
