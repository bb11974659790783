"""Rows as the three methods that answer in words (LoRA, adapter, prompt tuning) train and validate on them.

The projection head has its own way from rows to loss: `text_cache.py`.
"""

from collections.abc import Sequence
from dataclasses import replace

import torch

from dataset.classification_dataset import Batch, Example, collate, encode
from dataset.prompts import Prompt
from dataset.rows import Row
from model.label_scoring import answer_loss
from train.scoring import language_scorer, score_examples, validation_scores


class LanguageTask:
    """What `trainer.fit` asks a script for: batches, their loss, and a validation.

    Args:
        model: called like `MiniMindForCausalLM`; a method may still be put onto it afterwards.
        prompt: how rows become tokens, virtual tokens included.
        word_dropout: share of a text's tokens that a training batch leaves out, drawn anew each time: the classifier
            must not lean on single words (https://aclanthology.org/P15-1162).

    Raises:
        DataError: a validation row has a label that the prompt does not know.
    """

    def __init__(
        self,
        model: torch.nn.Module,
        prompt: Prompt,
        train_rows: Sequence[Row],
        val_rows: Sequence[Row],
        device: str,
        word_dropout: float = 0.0,
    ):
        self.model, self.prompt, self.device, self.word_dropout = model, prompt, device, word_dropout
        self.train_examples, self.val_examples = encode(train_rows, prompt), encode(val_rows, prompt)
        self.lengths = [len(example.ids) for example in self.train_examples]

    def batch(self, indices: Sequence[int]) -> Batch:
        """Training rows with their labels' tokens, padded to the longest of them."""
        examples = [self.train_examples[index] for index in indices]
        if self.word_dropout and self.model.training:
            examples = [self._without_some_words(example) for example in examples]
        return collate(examples, self.prompt, self.device, with_answers=True)

    def _without_some_words(self, example: Example) -> Example:
        text_length = len(example.ids) - len(self.prompt.suffix_ids)
        kept = torch.rand(text_length) >= self.word_dropout
        text = [token for token, keep in zip(example.ids, kept.tolist(), strict=False) if keep]
        return replace(example, ids=text + example.ids[text_length:])

    def loss(self, batch: Batch) -> tuple[torch.Tensor, int]:
        """Summed cross-entropy of the labels' tokens, and how many there are."""
        return answer_loss(self.model, batch)

    def validate(self) -> dict[str, float]:
        """Accuracy, macro-F1 and loss over the validation rows."""
        scorer = language_scorer(self.model, self.prompt)
        return validation_scores(score_examples(scorer, self.val_examples, self.prompt, self.device), self.val_examples)
