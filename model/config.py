"""The architecture of a MiniMind model.

The two generations share every key name and differ only where `MiniMindConfig.generation` says so:

| | MiniMind2 | MiniMind-3 |
|---|---|---|
| key/value heads | 2 | 4 |
| norm on q and k per head | no | yes |
| RMSNorm | cast back to the input type, then times weight; eps 1e-5 | times weight in float32, then cast; eps 1e-6 |
| feed-forward width | 8H/3, rounded up to 64 | pi*H, rounded up to 64 |
| mixture of experts | top 2 of 4 and 1 shared expert | top 1 of 4, none shared |
"""

import math

from transformers import PreTrainedConfig

GENERATIONS = ("minimind2", "minimind3")


class MiniMindConfig(PreTrainedConfig):
    """Architecture of a MiniMind model. Whatever is left at None takes the generation's published value.

    Args:
        generation: "minimind2" or "minimind3" (see the module's table).
        head_dim: size of one attention head; hidden_size / num_attention_heads by default.
        max_position_embeddings: positions the model may be asked for; above the original length YaRN applies.
        inference_rope_scaling: stretch the rotary embedding by YaRN, for texts above 2,048 tokens.
        router_aux_loss_coef: weight of the experts' balance loss.
    """

    model_type = "minimind"
    keys_to_ignore_at_inference = ["past_key_values"]

    def __init__(
        self,
        generation: str = "minimind2",
        hidden_size: int = 512,
        num_hidden_layers: int = 8,
        num_attention_heads: int = 8,
        num_key_value_heads: int | None = None,
        head_dim: int | None = None,
        intermediate_size: int | None = None,
        vocab_size: int = 6400,
        rms_norm_eps: float | None = None,
        rope_theta: float = 1e6,
        max_position_embeddings: int = 32768,
        inference_rope_scaling: bool = False,
        use_moe: bool = False,
        num_experts: int = 4,
        num_experts_per_tok: int | None = None,
        num_shared_experts: int | None = None,
        router_aux_loss_coef: float | None = None,
        bos_token_id: int = 1,
        eos_token_id: int = 2,
        pad_token_id: int = 0,
        tie_word_embeddings: bool = True,
        **kwargs,
    ):
        if generation not in GENERATIONS:
            raise ValueError(f"generation {generation!r} is unknown; one of {', '.join(GENERATIONS)}")
        second = generation == "minimind2"

        def published(value, minimind2, minimind3):
            return value if value is not None else minimind2 if second else minimind3

        self.generation = generation
        self.hidden_size = hidden_size
        self.num_hidden_layers = num_hidden_layers
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = published(num_key_value_heads, 2, 4)
        self.head_dim = head_dim or hidden_size // num_attention_heads
        self.intermediate_size = published(
            intermediate_size,
            64 * math.ceil(int(8 * hidden_size / 3) / 64),
            64 * math.ceil(math.pi * hidden_size / 64),
        )
        self.vocab_size = vocab_size
        self.rms_norm_eps = published(rms_norm_eps, 1e-5, 1e-6)
        self.rope_theta = rope_theta
        self.max_position_embeddings = max_position_embeddings
        self.inference_rope_scaling = inference_rope_scaling
        self.use_moe = use_moe
        self.num_experts = num_experts
        self.num_experts_per_tok = published(num_experts_per_tok, 2, 1)
        self.num_shared_experts = published(num_shared_experts, 1, 0)
        self.router_aux_loss_coef = published(router_aux_loss_coef, 0.01, 5e-4)
        super().__init__(
            bos_token_id=bos_token_id,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            tie_word_embeddings=tie_word_embeddings,
            **kwargs,
        )
