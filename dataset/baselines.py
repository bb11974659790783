"""The honest lines: what a majority vote and a linear model over words reach on the same rows."""

from collections import Counter
from collections.abc import Sequence

from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import Pipeline, make_pipeline

from dataset.prompts import choose_template
from dataset.rows import Row


def majority_predictions(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """The most frequent training label for every row (of equals, the first in the alphabet)."""
    counts = Counter(row.label for row in train)
    winner = min(counts, key=lambda label: (-counts[label], label))
    return [winner] * len(rows)


def tfidf_classifier(rows: Sequence[Row]) -> Pipeline:
    """TF-IDF of title and text with logistic regression, fitted on `rows`; Chinese goes by characters."""
    if choose_template(list(rows)) == "zh":
        features = TfidfVectorizer(sublinear_tf=True, analyzer="char", ngram_range=(1, 2))
    else:
        features = TfidfVectorizer(sublinear_tf=True)
    pipeline = make_pipeline(features, LogisticRegression(C=10, max_iter=1000))
    return pipeline.fit(_texts(rows), [row.label for row in rows])


def tfidf_predictions(train: Sequence[Row], rows: Sequence[Row]) -> list[str]:
    """Labels of `rows` by `tfidf_classifier` fitted on `train`."""
    return list(tfidf_classifier(train).predict(_texts(rows)))


def _texts(rows: Sequence[Row]) -> list[str]:
    return [f"{row.title}\n{row.text}" for row in rows]
