"""Rotary position embedding, with YaRN for texts longer than those that a model was trained on.

Shapes: B batch, T positions, D head size.
"""

import math

import torch

from model.config import MiniMindConfig


def inverse_frequencies(config: MiniMindConfig, device: torch.device) -> torch.Tensor:
    """Rotary frequencies (D/2,), stretched by YaRN (https://arxiv.org/abs/2309.00071) when the config asks for it.

    Dimensions that turn fast keep their frequency, slow ones are divided by the factor, a linear ramp lies between.
    """
    half = config.head_dim // 2
    index = torch.arange(half, dtype=torch.float32, device=device)
    frequencies = 1.0 / config.rope_theta ** (index * 2 / config.head_dim)
    original_length, factor, beta_fast, beta_slow = 2048, 16.0, 32.0, 1.0
    if not config.inference_rope_scaling or config.max_position_embeddings <= original_length:
        return frequencies

    def dimension_turning(times: float) -> float:  # the dimension that turns so often over the original length
        return half * math.log(original_length / (times * 2 * math.pi)) / math.log(config.rope_theta)

    low = max(math.floor(dimension_turning(beta_fast)), 0)
    high = min(math.ceil(dimension_turning(beta_slow)), half - 1)
    ramp = torch.clamp((index - low) / max(high - low, 0.001), 0, 1)
    return frequencies * (1 - ramp + ramp / factor)


def rotary_embedding(
    config: MiniMindConfig, position_ids: torch.Tensor, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosine and sine for positions (B, T), each (B, 1, T, D) in `dtype` (https://arxiv.org/abs/2104.09864).

    The sine's first half is negated, as `rotate` needs it.
    """
    angles = position_ids[:, None, :, None].float() * inverse_frequencies(config, position_ids.device)
    cos, sin = angles.cos(), angles.sin()
    return torch.cat([cos, cos], dim=-1).to(dtype), torch.cat([-sin, sin], dim=-1).to(dtype)


def rotate(x: torch.Tensor, rotary: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Turn queries or keys (B, heads, T, D) by their positions, in the rotate-half layout."""
    cos, sin = rotary
    # Under autocast the rotary factors are float32; what is turned keeps its own type.
    return torch.addcmul(x * cos, x.roll(x.shape[-1] // 2, dims=-1), sin).type_as(x)
