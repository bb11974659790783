"""This project's way: the very functions that the train and evaluation scripts call.

`dtype` is the type of the frozen weights, as `--dtype` of those scripts gives it.
"""

from collections.abc import Callable
from itertools import chain

import torch
import torch.nn.functional as F

from dataset.classification_dataset import encode, token_batches, training_steps
from dataset.prompts import text_only_prompt, with_virtual_tokens
from dataset.rows import Row
from model.artifact import trained_tensors
from model.model_adapter import apply_adapter
from model.model_lora import apply_lora, target_layers, uniform_rank_map
from model.model_projection_head import ClsTunedModel
from model.model_prompt_tuning import PromptTuningModel, initial_virtual_tokens
from model.rank_selection import mean_gradients, select_ranks
from tests.benchmarks.shape import BATCH_SIZE, HEAD_BATCH_SIZE, LABELS, RANK, VIRTUAL_TOKENS, new_base, new_prompt
from train.language_task import LanguageTask
from train.scoring import language_scorer, score_examples
from train.text_cache import TextCache


def with_method(method: str, dtype: torch.dtype = torch.float32):
    """A model with the method on it, and its prompt."""
    model, prompt = new_base().to(dtype), new_prompt()
    if method == "lora":
        apply_lora(model, uniform_rank_map(model, RANK))
    elif method == "adapter":
        apply_adapter(model, 8)
    elif method == "prompt":
        start = initial_virtual_tokens(model, VIRTUAL_TOKENS, "text", list(prompt.prefix_ids), 0)
        model, prompt = PromptTuningModel(model, start), with_virtual_tokens(prompt, VIRTUAL_TOKENS)
    return model, prompt


def update(optimizer: torch.optim.Optimizer) -> None:
    """One step from the gradients that are there, as every contender does it."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.nn.utils.clip_grad_norm_(parameters, 1.0)
    optimizer.step()
    optimizer.zero_grad(set_to_none=True)


def training(method: str, rows: list[Row], dtype: torch.dtype) -> Callable[[], float]:
    """One epoch of LoRA, adapter or prompt tuning; returns the texts it trained on."""
    model, prompt = with_method(method, dtype)
    task = LanguageTask(model, prompt, rows, rows[:1], "cpu")
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-3)

    def run() -> float:
        model.train()
        for indices in training_steps(task.lengths, BATCH_SIZE, seed=0, epoch=0):
            for part in token_batches(task.lengths, rows=indices):
                loss, _ = task.loss(task.batch(part))
                loss.backward()
            update(optimizer)
        return len(rows)

    return run


def head_training(rows: list[Row], epochs: int, dtype: torch.dtype) -> Callable[[], float]:
    """The projection head from nothing, its cache included; returns texts times epochs."""
    model, prompt = ClsTunedModel(new_base().to(dtype), len(LABELS)), text_only_prompt(new_prompt())
    examples = encode(rows, prompt)
    lengths = [len(example.ids) for example in examples]
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-3)

    def run() -> float:
        model.train()
        texts = TextCache(model, examples, 4.0, "cpu")
        for epoch in range(epochs):
            for indices in training_steps(lengths, HEAD_BATCH_SIZE, seed=0, epoch=epoch):
                batch = texts.batch(indices)
                logits = model.forward_cached(batch.text_cache, batch.lengths)
                F.cross_entropy(logits, batch.labels).backward()
                update(optimizer)
        return len(rows) * epochs

    return run


def scoring(rows: list[Row], dtype: torch.dtype) -> Callable[[], float]:
    """The score of every label for every text; returns the texts."""
    model, prompt = with_method("base", dtype)
    examples = encode(rows, prompt)

    def run() -> float:
        score_examples(language_scorer(model, prompt), examples, prompt, "cpu")
        return len(rows)

    return run


def gradients(rows: list[Row], dtype: torch.dtype) -> Callable[[], float]:
    """Rank selection's gradients, one batch after the other; returns the batches."""
    model, prompt = with_method("base", dtype)
    task = LanguageTask(model, prompt, rows, rows[:1], "cpu")

    def run() -> float:
        steps = training_steps(task.lengths, BATCH_SIZE, seed=0, epoch=0)
        parts = chain.from_iterable(token_batches(task.lengths, rows=indices) for indices in steps)
        mean_gradients(model, target_layers(model), map(task.batch, parts), task.loss)
        return len(steps)

    return run


def spectra(rows: list[Row], dtype: torch.dtype) -> Callable[[], float]:
    """Rank selection's other part, the spectra of all layers, once; returns 1."""
    model, prompt = with_method("base", dtype)
    rows = rows[:BATCH_SIZE]
    task = LanguageTask(model, prompt, rows, rows[:1], "cpu")
    found = mean_gradients(model, target_layers(model), [task.batch(range(len(rows)))], task.loss)

    def run() -> float:
        select_ranks(found)
        return 1

    return run
