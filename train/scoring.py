"""Scores of every label for many rows, spread over the processes, and the figures that follow from them."""

import math
from collections.abc import Callable, Sequence

import torch
from sklearn.metrics import f1_score
from tqdm import tqdm

from dataset.classification_dataset import Example, collate, token_batches
from dataset.prompts import Prompt
from model.label_scoring import label_log_probabilities
from train import distributed


def language_scorer(model, prompt: Prompt) -> Callable:
    """batch -> (B, C) log-probabilities of the labels' token sequences; for every method that answers in words."""
    return lambda batch: label_log_probabilities(model, batch, prompt.label_ids)


def head_scorer(model) -> Callable:
    """batch -> (B, C) log-probabilities of the classes; for the projection head."""
    return lambda batch: model(batch.input_ids, batch.lengths).log_softmax(-1)


def score_examples(
    scorer: Callable, examples: Sequence[Example], prompt: Prompt, device: str, progress_bar: bool = False
) -> torch.Tensor:
    """(N, C) float32 log scores of all rows in their order."""

    def scores_of(indices):
        return scorer(collate([examples[index] for index in indices], prompt, device, with_answers=False))

    return score_indices(scores_of, examples, len(prompt.labels), progress_bar)


@torch.no_grad()
def score_indices(
    scores_of: Callable, examples: Sequence[Example], num_labels: int, progress_bar: bool = False
) -> torch.Tensor:
    """(N, C) float32 from `scores_of(indices) -> (B, C)`; each row is scored once, by one of the processes."""
    mine = range(distributed.rank(), len(examples), distributed.world_size())
    lengths = [len(example.ids) for example in examples]
    scores = torch.zeros(len(examples), num_labels)
    bar = tqdm(total=len(mine), unit="text", disable=not progress_bar or not distributed.is_main(), leave=False)
    for indices in token_batches(lengths, rows=mine):
        scores[indices] = scores_of(indices).float().cpu()
        bar.update(len(indices))
    bar.close()
    return torch.stack(distributed.gather(scores)).sum(0)  # every row is zero but on one process


def probabilities(scores: torch.Tensor) -> torch.Tensor:
    """(N, C): the scores as a distribution over the labels."""
    return scores.softmax(dim=-1)


def batch_calibrated(scores: torch.Tensor) -> torch.Tensor:
    """(N, C) log-probabilities less what each label gets on average over these texts, whatever they say.

    A frozen model likes some labels for their words alone; texts without gold labels are enough to see how much
    (batch calibration, https://arxiv.org/abs/2309.17249). It takes the classes to be about equally frequent.
    """
    chances = scores.log_softmax(-1)
    return chances - (chances.logsumexp(0) - math.log(len(chances)))


def validation_scores(scores: torch.Tensor, examples: Sequence[Example]) -> dict[str, float]:
    """Number of rows, accuracy, macro-F1, mean negative log-probability of the right label among all (nats a text)."""
    gold = torch.tensor([example.label for example in examples])
    predicted = scores.argmax(-1)
    loss = -scores.log_softmax(-1).gather(1, gold[:, None]).mean()
    return {
        "rows": len(examples),
        "accuracy": float((predicted == gold).float().mean()),
        "macro_f1": float(f1_score(gold, predicted, average="macro", zero_division=0)),
        "loss": float(loss),
    }
