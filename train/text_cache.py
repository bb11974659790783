"""The frozen base's keys and values of every text, computed once for all epochs of the projection head.

The text never sees `<cls>`, and the base is frozen: nothing here changes from epoch to epoch. Up to a bound of memory
the values stay on the CPU in the base's own type; beyond it they are computed again, with the same result.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import torch

from dataset.classification_dataset import Example
from model.model_projection_head import ClsTunedModel


@dataclass(frozen=True)
class CachedBatch:
    """Texts for the head: `text_cache` (B, L, 2, K, T, D), `lengths` (B,), `labels` (B,), `sources`."""

    text_cache: torch.Tensor
    lengths: torch.Tensor
    labels: torch.Tensor
    sources: list[str]


class TextCache:
    """Keys and values by example.

    Args:
        limit_gb: most memory to keep, in GiB; 0 keeps nothing.
    """

    def __init__(self, model: ClsTunedModel, examples: Sequence[Example], limit_gb: float, device: str):
        self.model, self.examples, self.device = model, examples, device
        self.free = int(limit_gb * 2**30)  # bytes
        self.kept: dict[int, torch.Tensor] = {}

    def batch(self, indices: Sequence[int]) -> CachedBatch:
        """The keys and values of these examples, padded to their longest."""
        lengths = [len(self.examples[index].ids) for index in indices]
        rows = [self._text(index).to(self.device) for index in indices]
        padded = rows[0].new_zeros(len(rows), *rows[0].shape[:3], max(lengths), rows[0].shape[4])
        for row, (values, length) in enumerate(zip(rows, lengths, strict=True)):
            padded[row, ..., :length, :] = values
        labels = [-1 if self.examples[i].label is None else self.examples[i].label for i in indices]
        return CachedBatch(
            text_cache=padded,
            lengths=torch.tensor(lengths, device=self.device),
            labels=torch.tensor(labels, device=self.device),
            sources=[self.examples[index].row.source for index in indices],
        )

    def _text(self, index: int) -> torch.Tensor:
        """(L, 2, K, T, D). One text at a time, so that its values depend on nothing but itself."""
        if index in self.kept:
            return self.kept[index]
        ids = torch.tensor([self.examples[index].ids], device=self.device)
        values = self.model.text_cache(ids)[0].cpu()
        size = values.numel() * values.element_size()
        if size <= self.free:
            self.free -= size
            self.kept[index] = values
        return values
