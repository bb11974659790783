"""The texts that every contender gets: short ones as news items are, and long ones as articles are."""

import random

from dataset.classification_dataset import BUNDLED_DATA
from dataset.rows import Row, read_rows


def short_rows(count: int) -> list[Row]:
    """News items of 15 to 55 words from the bundled data; about 70 tokens with the title."""
    rng, rows = random.Random(0), read_rows(BUNDLED_DATA / "train.jsonl")
    return [
        Row(" ".join(row.text.split()[: rng.randint(15, 55)]), row.label, row.title, row.source)
        for row in rng.sample(rows, count)
    ]


def long_rows(count: int) -> list[Row]:
    """Articles of about 280 to 920 tokens: 3 to 9 bundled items in a row."""
    rng, rows = random.Random(1), read_rows(BUNDLED_DATA / "train.jsonl")
    articles = []
    for _ in range(count):
        parts = rng.sample(rows, rng.randint(3, 9))
        articles.append(Row("\n".join(part.text for part in parts), parts[0].label, source=parts[0].source))
    return articles
