"""The way of the repository that this one restructures, over the same model and methods.

Every text is padded to 1,024 tokens, batches come as the file gives them, logits are taken at every position, all in
float32; evaluation goes text by text, with two forwards and a sampled answer. Its faults are left out: gradients reach
what ours reach, and a sampled answer may end after as many tokens as a label has, not after up to 50.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from dataset.prompts import Prompt, text_only_prompt
from dataset.rows import Row
from model.artifact import trained_tensors
from model.model_projection_head import ClsTunedModel
from tests.benchmarks.ours import update, with_method
from tests.benchmarks.shape import BATCH_SIZE, LABELS, new_base, new_prompt

PADDED = 1024


def padded(prompt: Prompt, rows: list[Row], with_answers: bool = True) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and targets, both (B, 1024); targets are -100 but on the label."""
    ids = torch.full((len(rows), PADDED), prompt.tokenizer.pad_token_id)
    targets = torch.full((len(rows), PADDED), -100)
    for place, row in enumerate(rows):
        answer = prompt.label_ids[prompt.label_index(row)] if with_answers else ()
        sequence = torch.tensor([*prompt.prompt_ids(row)[: PADDED - len(answer)], *answer])
        ids[place, : len(sequence)] = sequence
        if answer:
            targets[place, len(sequence) - len(answer) : len(sequence)] = torch.tensor(answer)
    return ids, targets


def training(method: str, rows: list[Row]) -> Callable[[], float]:
    model, prompt = with_method(method)
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-3)

    def run() -> float:
        for start in range(0, len(rows), BATCH_SIZE):
            ids, targets = padded(prompt, rows[start : start + BATCH_SIZE])
            logits = model(ids).logits
            F.cross_entropy(logits[:, :-1].flatten(0, 1), targets[:, 1:].flatten()).backward()
            update(optimizer)
        return len(rows)

    return run


def head_training(rows: list[Row]) -> Callable[[], float]:
    """One epoch: every text through the whole base again."""
    model, prompt = ClsTunedModel(new_base(), len(LABELS)).train(), text_only_prompt(new_prompt())
    optimizer = torch.optim.AdamW(trained_tensors(model).values(), lr=1e-3)

    def run() -> float:
        for start in range(0, len(rows), BATCH_SIZE):
            part = rows[start : start + BATCH_SIZE]
            ids, _ = padded(prompt, part, with_answers=False)
            lengths = torch.tensor([min(len(prompt.prompt_ids(row)), PADDED) for row in part])
            labels = torch.tensor([prompt.label_index(row) for row in part])
            F.cross_entropy(model(ids, lengths), labels).backward()
            update(optimizer)
        return len(rows)

    return run


def scoring(rows: list[Row]) -> Callable[[], float]:
    model, prompt = with_method("base")
    longest = max(map(len, prompt.label_ids))

    @torch.no_grad()
    def run() -> float:
        for row in rows:
            ids, _ = padded(prompt, [row])
            model(ids)  # loss and perplexity
            model(ids)  # the label's logits
            question = torch.tensor([prompt.prompt_ids(row)])
            model.generate(question, max_new_tokens=longest, do_sample=True, pad_token_id=0)
        return len(rows)

    return run
