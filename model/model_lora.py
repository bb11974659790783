"""LoRA (https://arxiv.org/abs/2106.09685): a frozen linear layer plus a trained product of two thin matrices.

    y = W x + (alpha / r) * B A x        A (r, in), B (out, r), B zero at the start

`LoRALinear` is itself the `nn.Linear` that it replaces: `weight` keeps its key, so a base loads before or after.
Rank may differ from layer to layer (`rank_map`, see `rank_selection.py`). With alpha = r, the default, the scale is 1,
as in public MiniMind files, whose key names (`….lora.A.weight`) these are.
"""

import torch
import torch.nn.functional as F
from torch import nn

ATTENTION_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj")
ALL_TARGETS = (*ATTENTION_TARGETS, "gate_proj", "up_proj", "down_proj")


class LoRA(nn.Module):
    """The trained pair of a layer; kept in float32 whatever type the frozen weight has."""

    def __init__(self, in_features: int, out_features: int, rank: int, alpha: float):
        super().__init__()
        self.rank, self.alpha = rank, alpha
        self.A = nn.Linear(in_features, rank, bias=False, dtype=torch.float32)
        self.B = nn.Linear(rank, out_features, bias=False, dtype=torch.float32)
        nn.init.normal_(self.A.weight, std=0.02)
        nn.init.zeros_(self.B.weight)

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        thin = F.linear(x, self.A.weight.to(x.dtype)) * self.scale  # (B, T, r)
        return F.linear(thin, self.B.weight.to(x.dtype))  # (B, T, out)


class LoRALinear(nn.Linear):
    """A linear layer with a LoRA beside it."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight, self.bias = linear.weight, linear.bias
        self.lora = LoRA(linear.in_features, linear.out_features, rank, alpha).to(linear.weight.device)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return super().forward(x) + self.lora(x)


def target_layers(model: nn.Module, targets: tuple[str, ...] = ATTENTION_TARGETS) -> dict[str, nn.Linear]:
    """The linear layers whose last name is among `targets`, by full name, in the model's order.

    Raises:
        ValueError: a target names no linear layer of the model.
    """
    layers = {name: module for name, module in model.named_modules() if isinstance(module, nn.Linear)}
    known = {name.rpartition(".")[2] for name in layers if ".layers." in name}
    missing = sorted(set(targets) - known)
    if missing:
        raise ValueError(f"LoRA target {missing[0]!r} is no linear layer of the model; it has {sorted(known)}")
    return {name: layer for name, layer in layers.items() if name.rpartition(".")[2] in targets}


def apply_lora(model: nn.Module, rank_map: dict[str, int], alpha: float | None = None) -> None:
    """Freeze the model and give every layer named in `rank_map` a LoRA of that rank, in place.

    Args:
        rank_map: full layer name -> rank, at least 1 and at most the smaller side of the layer.
        alpha: numerator of the scale; None takes each layer's own rank, a scale of 1.

    Raises:
        ValueError: a name is no linear layer of the model, or a rank is out of range.
    """
    model.requires_grad_(False)
    # In the model's order, whatever the map's: fresh values must not depend on how a JSON file was sorted.
    order = {name: place for place, (name, _) in enumerate(model.named_modules())}
    for name, rank in sorted(rank_map.items(), key=lambda item: order.get(item[0], -1)):
        parent_name, _, child = name.rpartition(".")
        try:
            parent = model.get_submodule(parent_name)
            layer = getattr(parent, child)
        except AttributeError:
            raise ValueError(f"rank_map names {name!r}, which the model does not have") from None
        if not isinstance(layer, nn.Linear) or isinstance(layer, LoRALinear):
            raise ValueError(f"rank_map names {name!r}, which is a {type(layer).__name__}, not a plain linear layer")
        largest = min(layer.in_features, layer.out_features)
        if isinstance(rank, bool) or not isinstance(rank, int) or not 1 <= rank <= largest:
            raise ValueError(f"rank {rank!r} for {name}: give a whole number from 1 to {largest}")
        setattr(parent, child, LoRALinear(layer, rank, rank if alpha is None else alpha))


def uniform_rank_map(model: nn.Module, rank: int, targets: tuple[str, ...] = ATTENTION_TARGETS) -> dict[str, int]:
    """The same rank for every target, capped by a layer's smaller side."""
    return {
        name: min(rank, layer.in_features, layer.out_features) for name, layer in target_layers(model, targets).items()
    }


def lora_parameter_count(model: nn.Module, rank_map: dict[str, int]) -> int:
    """Trained numbers that `rank_map` asks for: the sum of r * (in + out)."""
    layers = dict(model.named_modules())
    return sum(r * (layers[name].in_features + layers[name].out_features) for name, r in rank_map.items())


@torch.no_grad()
def merge_lora(model: nn.Module) -> None:
    """Add every LoRA into its layer's weight and put a plain linear layer back, in place."""
    for name, layer in list(model.named_modules()):
        if isinstance(layer, LoRALinear):
            delta = layer.lora.B.weight @ layer.lora.A.weight * layer.lora.scale
            layer.weight += delta.to(layer.weight.dtype)
            merged = nn.Linear(layer.in_features, layer.out_features, bias=False, device="meta")
            merged.weight, merged.bias = layer.weight, layer.bias
            parent_name, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent_name), child, merged)


def read_minimind_lora(path: str) -> dict[str, torch.Tensor]:
    """Tensors of a LoRA file as MiniMind writes it (`.pth`); a `module.` that distributed training left is dropped."""
    tensors = torch.load(path, map_location="cpu", weights_only=True)
    return {name.removeprefix("module."): tensor for name, tensor in tensors.items()}


def rank_map_of(tensors: dict[str, torch.Tensor]) -> dict[str, int]:
    """The rank map that a set of LoRA tensors implies."""
    suffix = ".lora.A.weight"
    return {name.removesuffix(suffix): len(tensor) for name, tensor in tensors.items() if name.endswith(suffix)}


def minimind_lora(model: nn.Module) -> dict[str, torch.Tensor]:
    """The model's LoRA tensors as MiniMind stores them: half precision, scale 1 (other scales go into B)."""
    tensors = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoRALinear):
            tensors[f"{name}.lora.A.weight"] = layer.lora.A.weight.detach().half()
            tensors[f"{name}.lora.B.weight"] = (layer.lora.B.weight.detach() * layer.lora.scale).half()
    return tensors
