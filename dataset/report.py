"""The data report: what in prepared splits would spoil a training or flatter a test, as figures and as warnings."""

from collections import Counter, defaultdict
from collections.abc import Sequence
from difflib import SequenceMatcher
from itertools import combinations
from statistics import median

from sklearn.metrics import accuracy_score, confusion_matrix, f1_score
from tqdm import tqdm

from dataset.baselines import majority_predictions, tfidf_predictions
from dataset.duplicates import NEAR, find_near_duplicates
from dataset.prompts import Prompt, build_prompt, choose_template, encode_plain
from dataset.read_raw import Document
from dataset.text import fold, words

IMBALANCE = 10  # times the largest class outnumbers the smallest before it is worth a warning
FEW_ROWS = 10  # training rows of a class below which it is worth a warning
CUT_SHARE = 0.05  # share of cut texts above which it is worth a warning


def data_report(splits: dict[str, list[Document]], tokenizer=None, max_seq_len: int = 512) -> dict:
    """All checks of prepared splits.

    Args:
        splits: train, val and test; train must hold at least two labels.
        tokenizer: without one, whatever counts tokens is left out.
        max_seq_len: in tokens, for prompt, text and label together.

    Returns:
        Figures that JSON can hold, and `warnings`, a list of sentences.
    """
    everything = [document for documents in splits.values() for document in documents]
    labels = sorted({document.label for document in everything})
    report = {
        "rows": {name: len(documents) for name, documents in splits.items()},
        "classes": class_counts(splits),
        "words": _spread([len(words(document.text)) for document in everything]),
        "similar_labels": similar_labels(labels),
        "leaks": {kind: len(pairs) for kind, pairs in leaks(splits).items()},
        "baseline": baseline(splits["train"], splits["test"]) if splits["test"] else None,
    }
    if tokenizer is not None:
        prompt = build_prompt(tokenizer, labels, choose_template(everything), max_seq_len)
        lengths = token_lengths(everything, tokenizer)
        report["tokens"] = {
            **_spread(lengths),
            "max_seq_len": max_seq_len,
            "left_for_text": prompt.text_budget,
            "cut_texts": sum(length > prompt.text_budget for length in lengths),
        }
        report["label_token_collisions"] = label_token_collisions(prompt)
    return {**report, "warnings": _warnings(report)}


def class_counts(splits: dict[str, list[Document]]) -> dict[str, dict[str, int]]:
    """Rows of every label in every split, zeros included: {label: {split: rows}}."""
    labels = sorted({document.label for documents in splits.values() for document in documents})
    counts = {name: Counter(document.label for document in documents) for name, documents in splits.items()}
    return {label: {name: counts[name][label] for name in splits} for label in labels}


def similar_labels(labels: Sequence[str]) -> list[list[str]]:
    """Pairs of labels that may be two spellings of one: `tech` and `technology`, `sport` and `sports`."""
    pairs = []
    for a, b in combinations(sorted(labels, key=lambda label: (len(label), label)), 2):
        short, long = a.casefold(), b.casefold()
        begins = long.startswith(short) and (len(short) >= 3 or not short.isascii())
        if begins or SequenceMatcher(None, short, long).ratio() >= 0.85:
            pairs.append([a, b])
    return pairs


def label_token_collisions(prompt: Prompt) -> dict[str, list[str]]:
    """Labels that begin with the same token, by that token: whoever scores only a label's first token mixes them up."""
    by_token = defaultdict(list)
    for label, ids in zip(prompt.labels, prompt.label_ids, strict=True):
        by_token[ids[0]].append(label)
    collisions = {}
    for token, labels in by_token.items():
        if len(labels) > 1:
            text = prompt.tokenizer.decode([token])
            collisions[f"part of a character (token {token})" if "\ufffd" in text else text] = labels
    return collisions


def leaks(splits: dict[str, list[Document]], near: float = NEAR) -> dict[str, list[tuple[Document, Document]]]:
    """Pairs of rows in different splits that share their text, nearly their text, or their article."""
    everything = [(name, document) for name, documents in splits.items() for document in documents]
    twins = find_near_duplicates([document.text for _, document in everything], near)
    found = {"same text": [], "near duplicate": [], "same article": []}
    first_text: dict[str, int] = {}
    first_article: dict[str, int] = {}
    for number, ((name, document), twin) in enumerate(zip(everything, twins, strict=True)):
        same_text = first_text.setdefault(fold(document.text), number)
        same_article = first_article.setdefault(document.name, number) if document.name else number
        near_twin = twin if twin is not None and same_text == number else number
        for kind, other in zip(found, (same_text, near_twin, same_article), strict=True):
            if everything[other][0] != name:
                found[kind].append((everything[other][1], document))
    return found


def token_lengths(documents: Sequence[Document], tokenizer) -> list[int]:
    """Tokens of title and text of every document, before anything is cut."""
    texts = (f"{row.title}\n{row.text}" if row.title else row.text for row in documents)
    progress = tqdm(texts, "tokens", total=len(documents), unit="text", delay=1, leave=False)
    return [len(encode_plain(tokenizer, text)) for text in progress]


def baseline(train: Sequence[Document], test: Sequence[Document]) -> dict:
    """Test scores of the largest class and of TF-IDF with logistic regression: what a fine-tuned model has to beat.

    Returns:
        Accuracies and macro-F1 as shares, `labels`, and `confusion`: rows gold, columns predicted, in that order.
    """
    gold = [document.label for document in test]
    predicted = tfidf_predictions(train, test)
    labels = sorted({*gold, *(document.label for document in train)})
    return {
        "majority_accuracy": round(accuracy_score(gold, majority_predictions(train, test)), 4),
        "tfidf_accuracy": round(accuracy_score(gold, predicted), 4),
        "tfidf_macro_f1": round(f1_score(gold, predicted, labels=labels, average="macro", zero_division=0), 4),
        "labels": labels,
        "confusion": confusion_matrix(gold, predicted, labels=labels).tolist(),
    }


def _spread(lengths: Sequence[int]) -> dict[str, float]:
    return {"shortest": min(lengths), "median": median(lengths), "longest": max(lengths)}


def _warnings(report: dict) -> list[str]:
    """The findings that call for a decision, as sentences."""
    found = []
    for label, counts in report["classes"].items():
        missing = [name for name, rows in counts.items() if not rows and report["rows"][name]]
        if missing:
            found.append(f"label {label!r} does not occur in {' and '.join(missing)}")
        if 0 < counts["train"] < FEW_ROWS:
            found.append(f"label {label!r} has only {counts['train']} training rows")
    totals = {label: sum(counts.values()) for label, counts in report["classes"].items()}
    large, small = max(totals, key=totals.get), min(totals, key=totals.get)
    if totals[large] > IMBALANCE * totals[small]:
        found.append(f"{large!r} has {totals[large]} rows and {small!r} {totals[small]}: read macro-F1, not accuracy")
    for a, b in report["similar_labels"]:
        found.append(f"labels {a!r} and {b!r} look like two spellings of one class")
    for token, labels in report.get("label_token_collisions", {}).items():
        listed = ", ".join(map(repr, labels))
        found.append(f"labels {listed} begin with the same token {token!r}: only whole labels tell them apart")
    for kind, pairs in report["leaks"].items():
        if pairs:
            found.append(f"{pairs} times two splits share a row ({kind}): the test would be too easy")
    tokens = report.get("tokens", {})
    rows = sum(report["rows"].values())
    if tokens and tokens["cut_texts"] > CUT_SHARE * rows:
        found.append(
            f"{tokens['cut_texts']} of {rows} texts are longer than the {tokens['left_for_text']} tokens that "
            f"max_seq_len {tokens['max_seq_len']} leaves them: chunk the articles or raise max_seq_len"
        )
    return found
