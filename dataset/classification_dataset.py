"""Rows -> examples -> batches.

An example is what follows the shared prefix: text, suffix and, in training, the label's tokens. Batches hold rows
of similar length, padded on the right to their own longest row.
"""

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from dataset.prompts import Prompt
from dataset.rows import DataError, Row, read_rows

IGNORED = -100  # a position that is not to be predicted
BUNDLED_DATA = Path(__file__).resolve().parent / "sample_news"


# The fastest of the sizes measured on a CPU (tests/benchmarks/RESULTS.md).
TOKENS_PER_FORWARD = 4096


@dataclass(frozen=True)
class Example:
    """A row as tokens: `ids` is text and suffix; `label` its class index, None where unknown."""

    ids: list[int]
    label: int | None
    row: Row


@dataclass(frozen=True)
class Batch:
    """Rows for one forward.

    Attributes:
        prefix_ids: (P,), shared by all rows.
        input_ids: (B, T), right-padded; ends with the answer's tokens when `targets` is there.
        lengths: (B,) tokens of each row without padding.
        labels: (B,) class indices; -1 where unknown.
        targets: (B, T), the next token where it belongs to the answer, else IGNORED; None for scoring.
        sources: `file:line` of each row.
    """

    prefix_ids: torch.Tensor
    input_ids: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    targets: torch.Tensor | None
    sources: list[str]


def load_splits(
    data_path: str | Path, val_path: str | Path | None, seed: int, val_share: float = 0.1
) -> tuple[list[Row], list[Row]]:
    """Training and validation rows; without a `val_path` a seeded, stratified share is held out.

    Raises:
        DataError: an unusable row, a single class, or a text that stands in both splits.
    """
    rows = read_rows(data_path)
    labels = {row.label for row in rows}
    if len(labels) < 2:
        raise DataError(f"{data_path}: every row has the label {labels.pop()!r}; a classifier needs at least two")
    if val_path is None:
        train, val = stratified_split(rows, val_share, seed)
    else:
        train, val = rows, read_rows(val_path)
    check_no_leak(train, val)
    return train, val


def stratified_split(rows: Sequence[Row], share: float, seed: int) -> tuple[list[Row], list[Row]]:
    """Hold out `share` of every class, at least one row of each with two; equal texts stay on one side."""
    groups: dict[str, dict[str, list[int]]] = defaultdict(lambda: defaultdict(list))
    for index, row in enumerate(rows):
        groups[row.label][_folded(row)].append(index)
    held_out: set[int] = set()
    for label in sorted(groups):
        texts = list(groups[label].values())
        random.Random(f"{seed}:{label}").shuffle(texts)
        count = max(1, round(share * len(texts))) if len(texts) > 1 else 0
        held_out.update(index for text in texts[:count] for index in text)
    if not held_out:
        raise DataError("no class has two different texts: nothing can be held out; give --val_path")
    train = [row for index, row in enumerate(rows) if index not in held_out]
    return train, [row for index, row in enumerate(rows) if index in held_out]


def check_no_leak(train: Sequence[Row], other: Sequence[Row]) -> None:
    """Refuse a text that stands in both splits (case, punctuation and space aside).

    Raises:
        DataError: names both places.
    """
    seen = {_folded(row): row.source for row in train}
    for row in other:
        if _folded(row) in seen:
            raise DataError(f"{row.source}: the same text stands in the training data at {seen[_folded(row)]}")


def _folded(row: Row) -> str:
    return "".join(c for c in f"{row.title} {row.text}".casefold() if c.isalnum())


def encode(rows: Sequence[Row], prompt: Prompt, need_labels: bool = True) -> list[Example]:
    """Tokenize rows once, for every epoch.

    Raises:
        DataError: a label that the prompt does not know.
    """
    return [
        Example(
            ids=[*prompt.text_ids(row), *prompt.suffix_ids],
            label=prompt.label_index(row) if need_labels or row.label is not None else None,
            row=row,
        )
        for row in rows
    ]


def training_steps(lengths: Sequence[int], texts_per_step: int, seed: int, epoch: int) -> list[list[int]]:
    """Indices of the rows of every optimizer step of an epoch, in order.

    The order follows from (seed, epoch) alone. Rows are shuffled, sorted by length within pools of 32 steps, cut into
    steps, and the steps shuffled: neighbours have similar length, and no epoch groups them the same way.
    """
    rng = random.Random(f"{seed}:{epoch}")
    order = list(range(len(lengths)))
    rng.shuffle(order)
    pool = 32 * texts_per_step
    steps = []
    for start in range(0, len(order), pool):
        bucket = sorted(order[start : start + pool], key=lambda index: lengths[index])
        steps += [bucket[i : i + texts_per_step] for i in range(0, len(bucket), texts_per_step)]
    rng.shuffle(steps)
    return steps


def token_batches(
    lengths: Sequence[int], tokens_per_batch: int = TOKENS_PER_FORWARD, rows: Sequence[int] | None = None
) -> list[list[int]]:
    """Indices of all rows (or of `rows`), longest first, in batches of at most so many tokens with padding, or one row.

    Args:
        lengths: of every row, whether asked for or not.
    """
    order = sorted(range(len(lengths)) if rows is None else rows, key=lambda index: -lengths[index])
    batches: list[list[int]] = []
    for index in order:
        if not batches or (len(batches[-1]) + 1) * lengths[batches[-1][0]] > tokens_per_batch:
            batches.append([])
        batches[-1].append(index)
    return batches


def collate(examples: Sequence[Example], prompt: Prompt, device: str, with_answers: bool) -> Batch:
    """Pad examples to one batch; `with_answers` puts each label's tokens behind its prompt, with their targets."""
    rows, targets = [], []
    for example in examples:
        answer = prompt.label_ids[example.label] if with_answers else ()
        rows.append([*example.ids, *answer[:-1]])  # the end token is predicted, never read
        targets.append([IGNORED] * (len(example.ids) - 1) + list(answer))
    width = max(map(len, rows))
    padding = prompt.tokenizer.pad_token_id
    labels = [-1 if example.label is None else example.label for example in examples]
    padded_targets = [row + [IGNORED] * (width - len(row)) for row in targets]
    return Batch(
        prefix_ids=torch.tensor(prompt.prefix_ids, device=device),
        input_ids=torch.tensor([row + [padding] * (width - len(row)) for row in rows], device=device),
        lengths=torch.tensor([len(row) for row in rows], device=device),
        labels=torch.tensor(labels, device=device),
        targets=torch.tensor(padded_targets, device=device) if with_answers else None,
        sources=[example.row.source for example in examples],
    )
