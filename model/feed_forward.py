"""What follows attention in a block: a gated feed-forward, or a mixture of such experts.

Shapes: B batch, T positions, H hidden size, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.config import MiniMindConfig


class FeedForward(nn.Module):
    """Gated feed-forward with SiLU (SwiGLU, https://arxiv.org/abs/2002.05202)."""

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class MoEFeedForward(nn.Module):
    """Each token goes through its top experts, weighted by a softmax gate, and through every shared one.

    In training `aux_loss` holds the balance loss: MiniMind2 takes the load of each sequence and averages
    (https://arxiv.org/abs/2401.06066), MiniMind-3 takes the load of the whole batch (https://arxiv.org/abs/2101.03961).
    """

    def __init__(self, config: MiniMindConfig):
        super().__init__()
        self.top_k = config.num_experts_per_tok
        self.coefficient = config.router_aux_loss_coef
        self.balance_each_sequence = config.generation == "minimind2"
        self.gate = nn.Linear(config.hidden_size, config.num_experts, bias=False)
        self.experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_experts))
        if config.num_shared_experts:
            self.shared_experts = nn.ModuleList(FeedForward(config) for _ in range(config.num_shared_experts))
        self.aux_loss = torch.zeros(())

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        scores = self.gate(x).softmax(dim=-1)  # (B, T, E)
        weights, chosen = scores.topk(self.top_k, dim=-1)  # (B, T, top_k)
        weights = weights / (weights.sum(dim=-1, keepdim=True) + 1e-20)
        output = torch.zeros_like(x)
        for index, expert in enumerate(self.experts):
            row, position, slot = torch.where(chosen == index)
            routed = expert(x[row, position]) * weights[row, position, slot, None].type_as(x)
            output = output.index_put((row, position), routed, accumulate=True)
        for expert in getattr(self, "shared_experts", ()):
            output = output + expert(x)
        self.aux_loss = self.balance_loss(scores, chosen) if self.training else x.new_zeros(())
        return output

    def balance_loss(self, scores: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
        experts = scores.shape[-1]
        picked = F.one_hot(chosen, experts).to(scores.dtype).mean(dim=2)  # (B, T, E), sums to 1 a token
        if self.balance_each_sequence:
            load, share = picked.mean(dim=1), scores.mean(dim=1)  # (B, E)
            return (load * share).sum(dim=-1).mean() * experts * self.coefficient
        load, share = picked.mean(dim=(0, 1)), scores.mean(dim=(0, 1))  # (E,)
        return (load * share).sum() * experts * self.coefficient
