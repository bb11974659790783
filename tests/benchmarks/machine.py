"""What the numbers were measured on, how fast it multiplies matrices, and how much of that a step cannot do without."""

import os
import platform
import time
from pathlib import Path

import torch
import torch.nn.functional as F
import transformers

from dataset.prompts import Prompt
from dataset.rows import Row
from model.model_minimind import MiniMindForCausalLM


def matrix_rate(dtype: torch.dtype) -> float:
    """Operations a second of the model's own matrix product: 4,096 tokens through a 512 x 1408 layer."""
    tokens, weight = torch.randn(4096, 512, dtype=dtype), torch.randn(1408, 512, dtype=dtype)
    for _ in range(3):
        F.linear(tokens, weight)
    start, count = time.perf_counter(), 20
    for _ in range(count):
        F.linear(tokens, weight)
    return count * 2 * tokens.numel() * len(weight) / (time.perf_counter() - start)


def step_operations(base: MiniMindForCausalLM, prompt: Prompt, rows: list[Row]) -> float:
    """Floating-point operations that one LoRA step over `rows` cannot do without, the prefix read once.

    A multiplication and an addition count two. Each frozen weight is used once a token in the forward and once in the
    backward (to the activations; frozen weights need no gradient). Of the last block only keys and values belong to
    every token, the rest to the answer's positions alone, like the head; the first block's q, k and v pass no gradient
    on, for nothing below them is trained. Attention has two products forward and four backward over the keys that a
    causal query sees. Left out, so that the share comes out too low rather than too high: LoRA's own products (about
    2 %), the last block's attention, padding, and all that is no matrix product.
    """
    config, layers = base.config, base.model.layers
    block = sum(p.numel() for p in layers[0].parameters())
    first_qkv = sum(getattr(layers[0].self_attn, f"{name}_proj").weight.numel() for name in "qkv")
    last_kv = sum(getattr(layers[-1].self_attn, f"{name}_proj").weight.numel() for name in "kv")
    prefix = tokens = len(prompt.prefix_ids)
    pairs, answers = prefix * (prefix + 1) / 2, 0
    for row in rows:
        answer = len(prompt.label_ids[prompt.label_index(row)])
        own = len(prompt.prompt_ids(row)) - prefix + answer - 1  # the end token is predicted, never read
        tokens += own
        pairs += own * prefix + own * (own + 1) / 2
        answers += answer
    everywhere = tokens * ((len(layers) - 1) * block + last_kv)
    at_answers = answers * (block - last_kv + config.vocab_size * config.hidden_size)
    width = config.num_attention_heads * config.head_dim
    attention = (len(layers) - 1) * pairs * width * 2 * (2 + 4)
    return 4 * (everywhere + at_answers) - 2 * tokens * first_qkv + attention


def peak_resident_memory() -> int:
    """Bytes of this process at its highest point; `getrusage` would begin with what its parent had (Linux)."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def machine() -> dict:
    """Processor, its features that matter here, cores, threads, versions."""
    facts = torch.cpu.get_capabilities()
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "features": [name for name in ("avx2", "avx512_f", "avx512_bf16", "amx_bf16") if facts.get(name)],
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
    }
