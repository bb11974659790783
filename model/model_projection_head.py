"""A trained `<cls>` embedding that reads the whole text, and a projection head that classifies what it read.

MiniMind is causal: a `<cls>` at the first position of an ordinary sequence sees nothing but itself, and its output
would be one constant for all texts. Here `<cls>` stands first and sees everything: its row of the mask is full, and its
rotary position is the one behind the last token. The text's own rows do not see it, so it is the same as a `<cls>`
behind the text under the plain causal mask. For the same reason the frozen base's keys and values of a text never
change: `text_cache` computes them once, and `forward_cached` runs one token a text from then on.
"""

import torch
from torch import nn
from transformers import DynamicCache

from model.attention_kernels import causal_mask
from model.model_minimind import MiniMindForCausalLM

MIDDLE_FEATURES = 128


class ProjectionHead(nn.Module):
    """LayerNorm, H -> 128, ReLU, dropout 0.1, LayerNorm, 128 -> classes; float32."""

    def __init__(self, hidden_size: int, num_classes: int):
        super().__init__()
        self.norm_in = nn.LayerNorm(hidden_size)
        self.project = nn.Linear(hidden_size, MIDDLE_FEATURES)
        self.dropout = nn.Dropout(0.1)
        self.norm_middle = nn.LayerNorm(MIDDLE_FEATURES)
        self.classify = nn.Linear(MIDDLE_FEATURES, num_classes)

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        middle = self.dropout(torch.relu(self.project(self.norm_in(hidden))))  # (B, 128)
        return self.classify(self.norm_middle(middle))  # (B, classes)


class ClsTunedModel(nn.Module):
    """A frozen MiniMind with a trained `<cls>` embedding (H,) and a projection head."""

    def __init__(self, base: MiniMindForCausalLM, num_classes: int):
        super().__init__()
        self.base = base.requires_grad_(False)
        # From the embeddings' own mean and spread: a vector that the frozen blocks know how to read.
        embeddings = base.model.embed_tokens.weight.detach().float()
        start = embeddings.mean(0) + 0.5 * embeddings.std(0) * torch.randn(embeddings.shape[1]).to(base.device)
        self.cls_embedding = nn.Parameter(start)
        self.head = ProjectionHead(embeddings.shape[1], num_classes).to(base.device)

    @property
    def config(self):
        return self.base.config

    def forward(self, input_ids: torch.Tensor, lengths: torch.Tensor, **model_arguments) -> torch.Tensor:
        """Class logits (B, C) of right-padded texts (B, T), `<cls>` at index 0, in one pass over 1 + T positions."""
        return self.head(self.hidden_states(input_ids, lengths, **model_arguments).last_hidden_state[:, 0].float())

    def hidden_states(self, input_ids: torch.Tensor, lengths: torch.Tensor, **model_arguments):
        """The base's outputs over `<cls>` and the text, (B, 1 + T, H)."""
        rows, width = input_ids.shape
        device = input_ids.device
        text = self.base.model.embed_tokens(input_ids)
        cls = self.cls_embedding.to(text.dtype).expand(rows, 1, -1)
        real = torch.arange(width, device=device) < lengths[:, None]  # (B, T)
        mask = torch.zeros(rows, 1, 1 + width, 1 + width, dtype=torch.bool, device=device)
        mask[:, 0, 0, 0] = True
        mask[:, 0, 0, 1:] = real
        mask[:, 0, 1:, 1:] = causal_mask(width, width, device)[0, 0]
        positions = torch.arange(width, device=device).expand(rows, -1)
        return self.base.model(
            inputs_embeds=torch.cat([cls, text], dim=1),
            attention_mask=mask,
            position_ids=torch.cat([lengths[:, None], positions], dim=1),
            **model_arguments,
        )

    @torch.no_grad()
    def text_cache(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Keys and values of texts (B, T) in the frozen base: (B, L, 2, K, T, D)."""
        any_one = input_ids.new_zeros(len(input_ids), 1)  # of the last block only keys and values are wanted
        cache = self.base.model(input_ids=input_ids, use_cache=True, last_positions=any_one).past_key_values
        return torch.stack([torch.stack([layer.keys, layer.values], 1) for layer in cache.layers], 1)

    def forward_cached(
        self, text_cache: torch.Tensor, lengths: torch.Tensor, kept: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Class logits (B, C) from the keys and values of right-padded texts (B, L, 2, K, T, D).

        Args:
            kept: (B, T), which positions of the text `<cls>` may see; all of them if not given.
        """
        cache = DynamicCache()
        for index in range(text_cache.shape[1]):
            cache.update(text_cache[:, index, 0], text_cache[:, index, 1], index)
        width = text_cache.shape[4]
        sees = torch.arange(width + 1, device=lengths.device) < lengths[:, None]  # (B, T)
        if kept is not None:
            sees[:, :-1] &= kept
        sees[:, -1] = True  # itself
        output = self.base.model(
            inputs_embeds=self.cls_embedding.to(text_cache.dtype).expand(len(lengths), 1, -1),
            attention_mask=sees[:, None, None],
            position_ids=lengths[:, None],
            past_key_values=cache,
        )
        return self.head(output.last_hidden_state[:, 0].float())
