"""From scores to a report: figures, intervals, the honest lines, the printed table, the plots.

Used by `eval_llm_metrics.py`. Every method is a `Classifier` here; nothing asks which one it is.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import confusion_matrix, f1_score, precision_recall_fscore_support

from dataset.baselines import majority_predictions, tfidf_predictions
from dataset.classification_dataset import collate, encode, token_batches
from dataset.prompts import Prompt
from dataset.rows import Row
from model.label_scoring import greedy_answers
from train.scoring import batch_calibrated, probabilities, score_examples


@dataclass(frozen=True)
class Classifier:
    """A model ready to classify.

    Attributes:
        method: its name in reports.
        prompt: how a row becomes tokens.
        scorer: batch -> (B, C) log scores.
        model: the base with its method on it.
        speaks: whether the model answers in words.
        trained_parameters: 0 for the frozen base.
        details: what its artifact says of its run.
    """

    method: str
    prompt: Prompt
    scorer: Callable
    model: torch.nn.Module
    trained_parameters: int
    device: str
    speaks: bool = True
    details: dict = field(default_factory=dict)

    def scores(self, rows: Sequence[Row], progress_bar: bool = False) -> torch.Tensor:
        """(N, C) log scores; for language models of each label's whole token sequence."""
        examples = encode(rows, self.prompt, need_labels=False)
        return score_examples(self.scorer, examples, self.prompt, self.device, progress_bar)

    def answers(self, rows: Sequence[Row]) -> list[str] | None:
        """Greedy answers in words; None for a classifier that has none."""
        if not self.speaks:
            return None
        examples = encode(rows, self.prompt, need_labels=False)
        answers = [""] * len(rows)
        longest = max(map(len, self.prompt.label_ids)) + 4
        for indices in token_batches([len(example.ids) for example in examples]):
            batch = collate([examples[index] for index in indices], self.prompt, self.device, with_answers=False)
            tokens = greedy_answers(self.model, batch, self.prompt.tokenizer.eos_token_id, longest)
            for index, ids in zip(indices, tokens, strict=True):
                answers[index] = self.prompt.tokenizer.decode(ids, skip_special_tokens=True).strip()
        return answers


def evaluate(classifier: Classifier, rows: Sequence[Row], progress_bar: bool = False) -> dict:
    """All figures of one classifier on labelled rows.

    Returns:
        accuracy, its 95 % interval, macro_f1, the same three calibrated (`batch_calibrated`), n, per_class, confusion
        (rows are the gold labels), perplexity of the gold label's tokens, ece, texts_per_second, generation_accuracy
        and invalid_rate (None without words), trained_parameters, predictions, probabilities.
    """
    labels = classifier.prompt.labels
    gold = np.array([classifier.prompt.label_index(row) for row in rows])
    start = time.perf_counter()
    scores = classifier.scores(rows, progress_bar)
    seconds = time.perf_counter() - start
    chance = probabilities(scores).numpy()
    predicted = chance.argmax(1)
    gold_scores = scores[torch.arange(len(rows)), torch.tensor(gold)]
    gold_tokens = sum(len(classifier.prompt.label_ids[index]) for index in gold)
    precision, recall, f1, support = precision_recall_fscore_support(
        gold, predicted, labels=range(len(labels)), zero_division=0
    )
    figures = {
        "method": classifier.method,
        **accuracy_figures(gold, predicted),
        "calibrated": accuracy_figures(gold, batch_calibrated(scores).argmax(1).numpy()),
        "n": len(rows),
        "trained_parameters": classifier.trained_parameters,
        "ece": expected_calibration_error(chance, gold),
        "perplexity": math.exp(-float(gold_scores.sum()) / gold_tokens),
        "texts_per_second": len(rows) / seconds,
        "generation_accuracy": None,
        "invalid_rate": None,
        "labels": list(labels),
        "per_class": {
            label: {"precision": precision[i], "recall": recall[i], "f1": f1[i], "n": int(support[i])}
            for i, label in enumerate(labels)
        },
        "confusion": confusion_matrix(gold, predicted, labels=range(len(labels))).tolist(),
        "predictions": [labels[index] for index in predicted],
        "probabilities": chance.round(6).tolist(),
    }
    answers = classifier.answers(rows)
    if answers is not None:
        figures["generation_accuracy"] = float(np.mean([a == labels[g] for a, g in zip(answers, gold, strict=True)]))
        figures["invalid_rate"] = float(np.mean([answer not in labels for answer in answers]))
    return figures


def accuracy_figures(gold: np.ndarray, predicted: np.ndarray) -> dict:
    """Accuracy with a 95 % bootstrap interval (1,000 seeded resamples of the rows) and macro-F1."""
    right = gold == predicted
    resampled = np.random.default_rng(0).choice(right, size=(1000, len(right))).mean(1)
    low, high = np.percentile(resampled, [2.5, 97.5])
    return {
        "accuracy": float(right.mean()),
        "interval": [float(low), float(high)],
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
    }


def expected_calibration_error(chance: np.ndarray, gold: np.ndarray, bins: int = 15) -> float:
    """Mean gap between confidence and accuracy over equal bins of confidence (https://arxiv.org/abs/1706.04599)."""
    confidence, right = chance.max(1), chance.argmax(1) == gold
    place = np.minimum((confidence * bins).astype(int), bins - 1)
    gaps = [abs(right[place == b].sum() - confidence[place == b].sum()) for b in range(bins)]
    return float(sum(gaps) / len(gold))


def honest_lines(train_rows: Sequence[Row], rows: Sequence[Row]) -> dict[str, dict]:
    """Majority class and TF-IDF with logistic regression, fitted on the training rows."""
    labels = {label: index for index, label in enumerate(sorted({r.label for r in [*train_rows, *rows]}))}
    gold = np.array([labels[row.label] for row in rows])
    return {
        name: accuracy_figures(gold, np.array([labels[label] for label in predict(train_rows, rows)]))
        for name, predict in (("majority", majority_predictions), ("tfidf_logreg", tfidf_predictions))
    }


def frozen_lines(figures: dict) -> dict[str, dict]:
    """The lines of the frozen base in a table: as it answers, and calibrated on the texts."""
    plain = {name: figures[name] for name in ("accuracy", "interval", "macro_f1")}
    lines = {"frozen_base": plain, "frozen_base_calibrated": figures["calibrated"]}
    return {name: {**line, "trained_parameters": 0} for name, line in lines.items()}


def comparison_table(lines: dict[str, dict]) -> str:
    """Accuracy, interval, macro-F1 and trained parameters of several lines, as text."""
    rows = [f"{'':<30} {'accuracy':>9} {'95 % interval':>16} {'macro-F1':>9} {'trained parameters':>19}"]
    for name, figures in lines.items():
        low, high = figures["interval"]
        trained = figures.get("trained_parameters")
        rows.append(
            f"{name:<30} {figures['accuracy']:>9.3f} {f'{low:.3f} to {high:.3f}':>16} {figures['macro_f1']:>9.3f} "
            f"{'-' if trained is None else f'{trained:,}':>19}"
        )
    return "\n".join(rows)


def class_table(figures: dict) -> str:
    """Precision, recall and F1 of every class, as text."""
    rows = [f"{'class':<20} {'precision':>10} {'recall':>8} {'F1':>8} {'texts':>7}"]
    for label, values in figures["per_class"].items():
        rows.append(
            f"{label:<20} {values['precision']:>10.3f} {values['recall']:>8.3f} {values['f1']:>8.3f} {values['n']:>7}"
        )
    return "\n".join(rows)


def plot_confusion(figures: dict, path: Path) -> None:
    """Draw the confusion matrix as a PNG: rows are the gold labels, each cell counts texts."""
    from matplotlib.figure import Figure

    counts = np.array(figures["confusion"])
    labels = figures["labels"]
    side = 2.5 + 0.7 * len(labels)
    figure = Figure(figsize=(side + 0.8, side), layout="constrained")
    axes = figure.subplots()
    shares = counts / np.maximum(counts.sum(1, keepdims=True), 1)
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    for i in range(len(labels)):
        for j in range(len(labels)):
            axes.text(j, i, counts[i, j], ha="center", va="center", color="white" if shares[i, j] > 0.5 else "black")
    axes.set_xticks(range(len(labels)), labels, rotation=45, ha="right")
    axes.set_yticks(range(len(labels)), labels)
    axes.set(xlabel="predicted", ylabel="gold label")
    axes.set_title(f"{figures['method']}: accuracy {figures['accuracy']:.3f} on {figures['n']} texts")
    figure.savefig(path, dpi=120)
