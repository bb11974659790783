"""The MiniMind decoder: both public generations, dense and mixture-of-experts.

A step through this file follows a token: embedding -> blocks (attention, feed-forward) -> norm -> logits.
The two generations share every key name; `model/config.py` says where they differ.

Shapes in comments: B batch, T query positions, S key positions (past and present), H hidden size,
N attention heads, K key/value heads, D head size, V vocabulary, E experts.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers import DynamicCache, GenerationMixin, PreTrainedModel
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast

from model.attention_kernels import attention, attention_with_weights, causal_mask
from model.config import MiniMindConfig
from model.feed_forward import FeedForward, MoEFeedForward
from model.rotary import rotary_embedding, rotate


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last dimension (https://arxiv.org/abs/1910.07467), computed in float32."""

    def __init__(self, size: int, config: MiniMindConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = config.rms_norm_eps
        self.weight_in_float32 = config.generation == "minimind3"

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        normed = F.rms_norm(x.float(), x.shape[-1:], eps=self.eps)
        if self.weight_in_float32:
            return (self.weight * normed).type_as(x)
        return self.weight * normed.type_as(x)


def positions_of(mask: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The positions of a bool mask (B, T), in order: (B, A) for the fullest row, and which of them are real (B, A)."""
    counts = mask.sum(1)
    most = int(counts.max())
    positions = mask.int().argsort(dim=1, descending=True, stable=True)[:, :most]
    return positions, torch.arange(most, device=mask.device) < counts[:, None]


def take(x: torch.Tensor, positions: torch.Tensor | None) -> torch.Tensor:
    """The rows of (B or 1, ..., T, D) at `positions` (B, A), (B, ..., A, D); None takes all of them."""
    if positions is None:
        return x
    index = positions.view(len(positions), *[1] * (x.dim() - 3), -1, 1)
    x = x.expand(len(positions), *x.shape[1:])
    return x.gather(-2, index.expand(*x.shape[:-2], -1, x.shape[-1]))


class Attention(nn.Module):
    """Causal grouped-query attention (https://arxiv.org/abs/2305.13245): N query heads share K key/value heads."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.layer_index = layer_index
        self.head_dim = config.head_dim
        query_size = config.num_attention_heads * config.head_dim
        key_value_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=False)
        self.k_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.v_proj = nn.Linear(config.hidden_size, key_value_size, bias=False)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=False)
        with_head_norm = config.generation == "minimind3"
        self.q_norm = RMSNorm(config.head_dim, config) if with_head_norm else nn.Identity()
        self.k_norm = RMSNorm(config.head_dim, config) if with_head_norm else nn.Identity()

    def forward(self, x, rotary, mask, cache, output_attentions, positions=None):
        def heads(projected):  # (B, T, heads * D) -> (B, T, heads, D)
            return projected.unflatten(-1, (-1, self.head_dim))

        asking = tuple(take(table, positions) for table in rotary)
        query = rotate(self.q_norm(heads(self.q_proj(take(x, positions)))).transpose(1, 2), asking)  # (B, N, T, D)
        key = rotate(self.k_norm(heads(self.k_proj(x))).transpose(1, 2), rotary)  # (B, K, T, D)
        value = heads(self.v_proj(x)).transpose(1, 2)  # (B, K, T, D)
        if cache is not None:
            key, value = cache.update(key, value, self.layer_index)  # (B, K, S, D)
        if output_attentions:
            mixed, weights = attention_with_weights(query, key, value, mask)
        else:
            mixed, weights = attention(query, key, value, mask), None
        return self.o_proj(mixed.transpose(1, 2).flatten(2)), weights  # (B, T, H)


class MiniMindBlock(nn.Module):
    """Pre-norm attention and feed-forward, each with a slot behind it that an adapter may fill."""

    def __init__(self, config: MiniMindConfig, layer_index: int):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config)
        self.self_attn = Attention(config, layer_index)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config)
        self.mlp = MoEFeedForward(config) if config.use_moe else FeedForward(config)
        self.adapter_attn = nn.Identity()
        self.adapter_mlp = nn.Identity()

    def forward(self, x, rotary, mask, cache, output_attentions, positions=None):
        """One block over (B, T, H); with `positions` (B, A) all are read, but only those go on: (B, A, H)."""
        attended, weights = self.self_attn(self.input_layernorm(x), rotary, mask, cache, output_attentions, positions)
        x = take(x, positions) + self.adapter_attn(attended)
        x = x + self.adapter_mlp(self.mlp(self.post_attention_layernorm(x)))
        return x, weights


class MiniMindPreTrainedModel(PreTrainedModel):
    config_class = MiniMindConfig
    base_model_prefix = "model"
    _no_split_modules = ["MiniMindBlock"]
    _supports_sdpa = True


class MiniMindModel(MiniMindPreTrainedModel):
    """Token ids or embeddings -> hidden states."""

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(MiniMindBlock(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        position_ids: torch.Tensor | None = None,
        past_key_values: DynamicCache | None = None,
        inputs_embeds: torch.Tensor | None = None,
        use_cache: bool = False,
        output_attentions: bool = False,
        output_hidden_states: bool = False,
        last_positions: torch.Tensor | None = None,
        **unused,
    ) -> MoeModelOutputWithPast:
        """Run the blocks over (B, T) ids or (B, T, H) embeddings.

        Args:
            attention_mask: (B, S) with 0 at padding, or (B or 1, 1, T, S) bool with True where a query may look
                (then nothing causal is added), or None: plain causal, which is also right for right-padded batches.
            position_ids: (B or 1, T); counted on from the cache by default.
            past_key_values: keys and values of earlier positions; extended in place.
            last_positions: (B, A), the only ones whose last hidden state is asked for: it comes as (B, A, H), and the
                last block spends its queries and feed-forward on nothing else.
        """
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds, not both and not neither")
        x = self.embed_tokens(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, H)
        if use_cache and past_key_values is None:
            past_key_values = DynamicCache()
        past = past_key_values.get_seq_length() if past_key_values is not None else 0
        length = x.shape[1]
        if position_ids is None:
            position_ids = torch.arange(past, past + length, device=x.device)[None]
        mask = self._attention_mask(attention_mask, length, past, x.device)
        rotary = rotary_embedding(self.config, position_ids, x.dtype)

        hidden_states, attentions = [], []
        for layer in self.layers:
            positions = None
            if layer is self.layers[-1] and last_positions is not None:
                positions = last_positions
                mask = take(causal_mask(length, past + length, x.device) if mask is None else mask, positions)
            if output_hidden_states:
                hidden_states.append(x)
            x, weights = layer(x, rotary, mask, past_key_values, output_attentions, positions)
            if output_attentions:
                attentions.append(weights)
        x = self.norm(x)
        if output_hidden_states:
            hidden_states.append(x)
        return MoeModelOutputWithPast(
            last_hidden_state=x,
            past_key_values=past_key_values,
            hidden_states=tuple(hidden_states) or None,
            attentions=tuple(attentions) or None,
        )

    @staticmethod
    def _attention_mask(attention_mask, length, past, device):
        if attention_mask is not None and attention_mask.dim() == 4:
            return attention_mask
        if attention_mask is None or bool(attention_mask.all()):
            return None
        # A padding query has no key of its own to look at but itself: without the diagonal its row would be NaN.
        causal = causal_mask(length, past + length, device)
        return (causal & attention_mask[:, None, None, :].bool()) | causal.triu(past)


class MiniMindForCausalLM(MiniMindPreTrainedModel, GenerationMixin):
    """MiniMind with its language-model head, whose weight is the token embedding."""

    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}

    def __init__(self, config: MiniMindConfig):
        super().__init__(config)
        self.model = MiniMindModel(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self,
        input_ids: torch.Tensor | None = None,
        attention_mask: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        logits_to_keep: int | torch.Tensor = 0,
        **model_arguments,
    ) -> MoeCausalLMOutputWithPast:
        """Logits (B, T, V); the other arguments are those of `MiniMindModel.forward`.

        Args:
            labels: (B, T) ids to predict, -100 where there is none; shifted here. Adds `loss`, the mean a token.
            logits_to_keep: only the last so many positions (0: all), or a bool mask (B, T) of the positions,
                which gives logits (positions, V): the head over a large vocabulary runs on nothing else.
        """
        if isinstance(logits_to_keep, int):
            kept = (..., slice(-logits_to_keep, None), slice(None))
        else:
            model_arguments["last_positions"], kept = positions_of(logits_to_keep)
        outputs = self.model(input_ids, attention_mask, **model_arguments)
        logits = self.lm_head(outputs.last_hidden_state[kept])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
        return MoeCausalLMOutputWithPast(
            loss=loss,
            aux_loss=self.balance_loss(),
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
        )

    def balance_loss(self) -> torch.Tensor:
        """Sum of the experts' balance losses of the last forward; 0 in evaluation and for dense models."""
        losses = [layer.mlp.aux_loss for layer in self.model.layers if isinstance(layer.mlp, MoEFeedForward)]
        return sum(losses, start=self.lm_head.weight.new_zeros(()))
