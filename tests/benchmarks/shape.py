"""What all contenders share: the blocks of the 26 M MiniMind2, weights at random, the bundled tokenizer, the prompt."""

import torch

from dataset.prompts import Prompt, build_prompt
from dataset.rows import Row
from model.checkpoint import BUNDLED_BASE, load_tokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

LABELS = ["business", "entertainment", "politics", "sport", "tech"]
MAX_SEQ_LEN = 1100
BATCH_SIZE = 16
HEAD_BATCH_SIZE = 32  # the default of train_projection_head.py
RANK = 8
VIRTUAL_TOKENS = 20


def new_base() -> MiniMindForCausalLM:
    """Hidden 512, 8 layers, 8 heads, 2 key/value heads, feed-forward 1408; the same weights each time."""
    torch.manual_seed(0)
    vocab_size = len(load_tokenizer(BUNDLED_BASE))
    return MiniMindForCausalLM(MiniMindConfig(hidden_size=512, num_hidden_layers=8, vocab_size=vocab_size)).eval()


def new_prompt() -> Prompt:
    return build_prompt(load_tokenizer(BUNDLED_BASE), LABELS, "en", MAX_SEQ_LEN)


def prompt_tokens(prompt: Prompt, rows: list[Row]) -> int:
    """Tokens of all prompts with their labels: what a loop without a shared prefix reads."""
    return sum(len(prompt.prompt_ids(row)) + len(prompt.label_ids[prompt.label_index(row)]) for row in rows)
