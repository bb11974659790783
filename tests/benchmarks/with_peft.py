"""Hugging Face PEFT at its best over `LlamaForCausalLM` with the same weights.

Batches of similar length, padded to their longest row and made before the clock starts, each text with its whole prompt
(PEFT shares no prefix), taken in parts of as many tokens as ours. The type is an argument, and the fastest one counts:
"float32", "autocast" (float32 weights under bfloat16 autocast) or "bfloat16" (the frozen weights stored so, too).
"""

import contextlib
import copy
from collections.abc import Callable

import torch
from peft import EvaConfig, LoraConfig, PromptTuningConfig, TaskType, get_peft_model, initialize_lora_eva_weights
from transformers import LlamaForCausalLM, LlamaForSequenceClassification

from dataset.classification_dataset import token_batches, training_steps
from dataset.prompts import Prompt, text_only_prompt
from dataset.rows import Row
from tests.benchmarks.ours import update
from tests.benchmarks.shape import BATCH_SIZE, HEAD_BATCH_SIZE, LABELS, RANK, VIRTUAL_TOKENS, new_base, new_prompt
from tests.conftest import llama_config

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj"]


def llama(kind=LlamaForCausalLM, **more):
    """The base's weights in transformers' own Llama."""
    base = new_base()
    model = kind(llama_config(base.config, pad_token_id=0, eos_token_id=2, **more))
    model.model.load_state_dict(base.model.state_dict(), strict=True)
    if kind is LlamaForCausalLM:
        model.tie_weights()
    return model


def batches(
    prompt: Prompt, rows: list[Row], with_answers: bool = True, batch_size: int = BATCH_SIZE
) -> list[list[dict]]:
    """Inputs for transformers, rows of similar length together: for every step its parts."""
    sequences = [
        (prompt.prompt_ids(row), prompt.label_ids[prompt.label_index(row)] if with_answers else (), row) for row in rows
    ]
    lengths = [len(question) + len(answer) for question, answer, _ in sequences]

    def batch(indices: list[int]) -> dict:
        width = max(lengths[index] for index in indices)
        ids = torch.zeros(len(indices), width, dtype=torch.long)
        mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
        for place, index in enumerate(indices):
            question, answer, _ = sequences[index]
            ids[place, : lengths[index]] = torch.tensor([*question, *answer])
            mask[place, : lengths[index]] = 1
            labels[place, len(question) : lengths[index]] = torch.tensor(answer, dtype=torch.long)
        classes = torch.tensor([prompt.label_index(sequences[index][2]) for index in indices])
        return {"input_ids": ids, "attention_mask": mask, "labels": labels if with_answers else classes}

    steps = training_steps(lengths, batch_size, seed=0, epoch=0)
    return [[batch(part) for part in token_batches(lengths, rows=step)] for step in steps]


def in_type(model, dtype: str):
    """The model with its weights in the type that they are stored in."""
    return model.to(torch.bfloat16 if dtype == "bfloat16" else torch.float32)


def trainer(model, steps: list[list[dict]], texts: int, dtype: str) -> Callable[[], float]:
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)

    def run() -> float:
        model.train()
        for parts in steps:
            for batch in parts:
                with torch.autocast("cpu", torch.bfloat16, enabled=dtype != "float32"):
                    loss = model(**batch).loss
                loss.backward()
            update(optimizer)
        return texts

    return run


def training(method: str, rows: list[Row], dtype: str) -> Callable[[], float]:
    """One epoch of LoRA or prompt tuning; returns the texts it trained on."""
    configs = {
        "lora": LoraConfig(task_type=TaskType.CAUSAL_LM, r=RANK, lora_alpha=RANK, target_modules=TARGETS),
        "prompt": PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=VIRTUAL_TOKENS),
    }
    model = get_peft_model(in_type(llama(), dtype), configs[method])
    return trainer(model, batches(new_prompt(), rows), len(rows), dtype)


def head_training(rows: list[Row], dtype: str) -> Callable[[], float]:
    """One epoch of PEFT's sequence classification on the text alone: LoRA and a linear head on the last token."""
    model = in_type(llama(LlamaForSequenceClassification, num_labels=len(LABELS)), dtype)
    config = LoraConfig(task_type=TaskType.SEQ_CLS, r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    steps = batches(text_only_prompt(new_prompt()), rows, with_answers=False, batch_size=HEAD_BATCH_SIZE)
    return trainer(get_peft_model(model, config), steps, len(rows), dtype)


def generating(rows: list[Row], dtype: str) -> Callable[[], float]:
    """A greedy answer for every text by `generate`, in left-padded batches like ours; returns the texts."""
    model, prompt = in_type(llama(), dtype).eval(), new_prompt()
    longest = max(map(len, prompt.label_ids))
    questions = [prompt.prompt_ids(row) for row in rows]
    inputs = []
    for indices in token_batches([len(question) for question in questions]):
        part = [questions[index] for index in indices]
        width = max(map(len, part))
        ids = torch.tensor([[0] * (width - len(question)) + question for question in part])
        mask = torch.tensor([[0] * (width - len(question)) + [1] * len(question) for question in part])
        inputs.append((ids, mask))

    @torch.inference_mode()
    def run() -> float:
        for ids, mask in inputs:
            model.generate(ids, attention_mask=mask, max_new_tokens=longest, do_sample=False, pad_token_id=0)
        return len(rows)

    return run


class PassEndError(Exception):
    """The batches have been read once."""


class OnePass(list):
    """Batches that end EVA's search behind the last of them."""

    def __iter__(self):
        yield from super().__iter__()
        raise PassEndError


def eva(rows: list[Row], dtype: str) -> Callable[[], float]:
    """EVA's initialisation (https://arxiv.org/abs/2410.07170) on the same batches; returns the batches.

    EVA goes around its batches until every component stands still, which the activations of random weights delay
    for minutes: one pass over the batches, the least that it can do, is what counts.
    """
    inputs = [batch for parts in batches(new_prompt(), rows) for batch in parts]
    config = LoraConfig(
        task_type=TaskType.CAUSAL_LM,
        r=RANK,
        lora_alpha=RANK,
        target_modules=TARGETS,
        init_lora_weights="eva",
        eva_config=EvaConfig(),
    )
    fresh = get_peft_model(llama(), config, low_cpu_mem_usage=True)

    def run() -> float:
        model = copy.deepcopy(fresh)  # hooks stay on a model whose search was ended; a copy is cheap beside a batch
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype == "autocast"), contextlib.suppress(PassEndError):
            initialize_lora_eva_weights(model, OnePass(inputs), show_progress_bar=False)
        return len(inputs)

    return run
