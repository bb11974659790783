"""What all contenders share: the 26 M MiniMind2 shape with random weights, its tokenizer, the prompt, the machine."""

import os
import platform
import time

import torch

from dataset.prompts import Prompt, build_prompt
from dataset.rows import Row
from model.checkpoint import BUNDLED_BASE, load_tokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

LABELS = ["business", "entertainment", "politics", "sport", "tech"]
MAX_SEQ_LEN = 1100
BATCH_SIZE = 16
RANK = 8
VIRTUAL_TOKENS = 20


def new_base() -> MiniMindForCausalLM:
    """Hidden 512, 8 layers, 8 heads, 2 key/value heads, feed-forward 1408, vocabulary 6,400; the same each time."""
    torch.manual_seed(0)
    return MiniMindForCausalLM(MiniMindConfig(hidden_size=512, num_hidden_layers=8)).eval()


def new_prompt() -> Prompt:
    return build_prompt(load_tokenizer(BUNDLED_BASE), LABELS, "en", MAX_SEQ_LEN)


def prompt_tokens(prompt: Prompt, rows: list[Row]) -> int:
    """Tokens of all prompts with their labels: what a loop without a shared prefix reads."""
    return sum(len(prompt.prompt_ids(row)) + len(prompt.label_ids[prompt.label_index(row)]) for row in rows)


def step_operations(base: MiniMindForCausalLM, prompt: Prompt, rows: list[Row], batches: int) -> float:
    """Floating-point operations that a LoRA pass over `rows` cannot do without, the prefix read once a batch.

    Forward, and backward to the activations (frozen weights need no gradient): 2 + 2 operations a weight and token in
    the blocks and a position in the head; attention's two products forward and four backward over the keys that a
    causal query sees. LoRA's own products are left out (below 2 %), as is all that is no matrix product.
    """
    config = base.config
    block_weights = sum(p.numel() for p in base.model.layers.parameters())
    width = config.num_attention_heads * config.head_dim
    prefix, tokens, pairs, answers = len(prompt.prefix_ids), 0, 0, 0
    tokens += batches * prefix
    pairs += batches * prefix * (prefix + 1) / 2
    for row in rows:
        own = len(prompt.prompt_ids(row)) - prefix + len(prompt.label_ids[prompt.label_index(row)]) - 1
        tokens += own
        pairs += own * prefix + own * (own + 1) / 2
        answers += len(prompt.label_ids[prompt.label_index(row)])
    attention = config.num_hidden_layers * pairs * width * 2 * (2 + 4)
    head = answers * config.vocab_size * config.hidden_size * 4
    return tokens * block_weights * 4 + attention + head


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of the model's own matrix product: 4,096 tokens through a 512 x 1408 layer."""
    tokens, weight = torch.randn(4096, 512, dtype=dtype), torch.randn(1408, 512, dtype=dtype)
    for _ in range(3):
        torch.nn.functional.linear(tokens, weight)
    start, count = time.perf_counter(), 20
    for _ in range(count):
        torch.nn.functional.linear(tokens, weight)
    return count * 2 * tokens.numel() * len(weight) / (time.perf_counter() - start)


def machine() -> dict:
    """What the numbers were measured on."""
    features = [name for name, there in torch.cpu.get_capabilities().items() if there is True]
    return {
        "processor": platform.processor() or platform.machine(),
        "features": features,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "python": platform.python_version(),
    }
