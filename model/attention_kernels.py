"""Softmax attention as it is computed: by the fused kernel or by plain matrix products, whichever measured faster.

Shapes: B batch, T query positions, S key positions, N attention heads, K key/value heads, D head size.
"""

import math

import torch
import torch.nn.functional as F

QUERY_BLOCK = 128  # queries that a CPU takes at a time


def attention(query, key, value, mask):
    """Softmax attention, (B, N, T, D); `mask` None means causal, the queries being the last of the keys.

    On a CPU the queries go in blocks, each over the keys up to its own end: what no query of a block may see is
    never computed, also behind a cache. There bfloat16 takes plain matrix products, several times as fast as the fused
    kernel's, and float32 the fused kernel; both were chosen by measurement (tests/benchmarks/RESULTS.md).
    """
    queries, keys = query.shape[2], key.shape[2]
    if query.device.type != "cpu":
        if mask is None and queries != keys:
            mask = causal_mask(queries, keys, query.device)
        return F.scaled_dot_product_attention(query, key, value, mask, is_causal=mask is None, enable_gqa=True)
    mixed = []
    for start in range(0, queries, QUERY_BLOCK):
        asking = query[:, :, start : start + QUERY_BLOCK]
        if mask is None:
            end = keys - queries + start + asking.shape[2]
            seen = causal_mask(asking.shape[2], end, query.device)
        else:
            end, seen = keys, mask[:, :, start : start + QUERY_BLOCK]
        if query.dtype == torch.bfloat16:
            mixed.append(attention_with_weights(asking, key[:, :, :end], value[:, :, :end], seen)[0])
        else:
            mixed.append(
                F.scaled_dot_product_attention(asking, key[:, :, :end], value[:, :, :end], seen, enable_gqa=True)
            )
    return torch.cat(mixed, dim=2)


def attention_with_weights(query, key, value, mask):
    """Attention by matrix products, with its weights (B, N, T, S); a group of heads reads its keys in one product."""
    if mask is None:
        mask = causal_mask(query.shape[2], key.shape[2], query.device)
    heads, kv_heads = query.shape[1], key.shape[1]
    grouped = query.unflatten(1, (kv_heads, heads // kv_heads)).flatten(2, 3)  # (B, K, N/K * T, D)
    scores = (grouped * query.shape[-1] ** -0.5) @ key.transpose(2, 3)  # (B, K, N/K * T, S)
    scores = scores.unflatten(2, (heads // kv_heads, -1))
    # In place and unseen by autograd: where a weight is 0, the softmax passes no gradient on anyway.
    scores.detach().masked_fill_(~mask[:, :, None], -math.inf)
    weights = scores.softmax(dim=-1)  # (B, K, N/K, T, S)
    mixed = (weights.flatten(2, 3) @ value).unflatten(2, (heads // kv_heads, -1))
    return mixed.flatten(1, 2), weights.flatten(1, 2)


def causal_mask(queries: int, keys: int, device: torch.device) -> torch.Tensor:
    """(1, 1, T, S) bool, True where the query may look; the queries are the last of the keys."""
    return torch.ones(queries, keys, dtype=torch.bool, device=device).tril(keys - queries)[None, None]
