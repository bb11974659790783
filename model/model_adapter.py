"""Bottleneck adapters (https://arxiv.org/abs/1902.00751): two small trained networks in every block of a frozen model.

    x + B gelu(A x)        A (m, H), B (H, m), biases, B zero at the start

One stands behind the attention, one behind the feed-forward, each inside the block's residual. The inner residual and
the zero B make a fresh adapter the identity, so training starts from exactly the base.
"""

import torch
import torch.nn.functional as F
from torch import nn

from model.model_minimind import MiniMindForCausalLM


class Adapter(nn.Module):
    """`x + B gelu(A x)` on (B, T, H), trained in float32 and computed in the type of x."""

    def __init__(self, hidden_size: int, middle_features: int):
        super().__init__()
        self.A = nn.Linear(hidden_size, middle_features, dtype=torch.float32)
        self.B = nn.Linear(middle_features, hidden_size, dtype=torch.float32)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.A.bias)
        nn.init.zeros_(self.B.weight)
        nn.init.zeros_(self.B.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        middle = F.gelu(F.linear(x, self.A.weight.to(x.dtype), self.A.bias.to(x.dtype)))  # (B, T, m)
        return x + F.linear(middle, self.B.weight.to(x.dtype), self.B.bias.to(x.dtype))


def apply_adapter(model: MiniMindForCausalLM, middle_features: int) -> None:
    """Freeze the model and fill both adapter slots of every block, in place.

    Raises:
        ValueError: `middle_features` is below 1.
    """
    if middle_features < 1:
        raise ValueError(f"middle_features {middle_features}: an adapter needs at least one middle feature")
    model.requires_grad_(False)
    hidden_size, device = model.config.hidden_size, model.device
    for layer in model.model.layers:
        layer.adapter_attn = Adapter(hidden_size, middle_features).to(device)
        layer.adapter_mlp = Adapter(hidden_size, middle_features).to(device)


def adapter_parameter_count(model: MiniMindForCausalLM, middle_features: int) -> int:
    """2 L (2 H m + H + m): what `apply_adapter` adds."""
    layers, hidden_size = model.config.num_hidden_layers, model.config.hidden_size
    return 2 * layers * (2 * hidden_size * middle_features + hidden_size + middle_features)
