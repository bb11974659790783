"""Prompt tuning (https://arxiv.org/abs/2104.08691): trained vectors at the start of the sequence, the model frozen.

The sequence opens with placeholder ids; `PromptTuningModel` puts its vectors in place of their embeddings. Everything
else, the positions, the cache, the mask, counts them like any other token.
"""

import torch
from torch import nn

from model.model_minimind import MiniMindForCausalLM

INITIALISATIONS = ("text", "vocab", "random")


class PromptTuningModel(nn.Module):
    """A frozen MiniMind whose first `num_virtual_tokens` positions read trained float32 vectors (n, H)."""

    def __init__(self, base: MiniMindForCausalLM, virtual_tokens: torch.Tensor):
        super().__init__()
        self.base = base.requires_grad_(False)
        self.virtual_tokens = nn.Parameter(virtual_tokens.to(base.device, torch.float32))

    @property
    def config(self):
        return self.base.config

    def forward(self, input_ids: torch.Tensor, past_key_values=None, **model_arguments):
        """As `MiniMindForCausalLM.forward`; the first positions of `input_ids` (B, T) hold placeholder ids."""
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        return self.base(inputs_embeds=self.embed(input_ids, past), past_key_values=past_key_values, **model_arguments)

    def embed(self, input_ids: torch.Tensor, past: int = 0) -> torch.Tensor:
        """Embeddings (B, T, H) of ids that stand behind `past` earlier positions, virtual tokens in their place."""
        embeddings = self.base.model.embed_tokens(input_ids)
        virtual = self.virtual_tokens[past : past + input_ids.shape[1]].to(embeddings.dtype)
        return torch.cat([virtual.expand(len(input_ids), -1, -1), embeddings[:, len(virtual) :]], dim=1)

    def generate(self, input_ids: torch.Tensor, **arguments) -> torch.Tensor:
        """`generate` of transformers behind the virtual tokens; returns the new ids only."""
        return self.base.generate(inputs_embeds=self.embed(input_ids), **arguments)


def initial_virtual_tokens(
    base: MiniMindForCausalLM, count: int, how: str, text_ids: list[int], seed: int
) -> torch.Tensor:
    """Vectors (count, H) to start from.

    Args:
        how: "text" repeats the embeddings of `text_ids` (the instruction and labels), "vocab" draws tokens of the
            vocabulary, "random" draws from N(0, 1), far outside the embeddings' scale and here for comparison only.

    Raises:
        ValueError: `count` is below 1, or `how` is none of these.
    """
    if count < 1:
        raise ValueError(f"num_virtual_tokens {count}: prompt tuning needs at least one")
    embeddings = base.model.embed_tokens.weight.detach().float()
    generator = torch.Generator().manual_seed(seed)
    if how == "text":
        repeated = (text_ids * (count // len(text_ids) + 1))[:count]
        return embeddings[repeated].clone()
    if how == "vocab":
        return embeddings[torch.randperm(len(embeddings), generator=generator)[:count]].clone()
    if how == "random":
        return torch.randn(count, embeddings.shape[1], generator=generator)
    raise ValueError(f"prompt_init {how!r} is unknown; one of {', '.join(INITIALISATIONS)}")
