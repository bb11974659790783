"""Base weights in any of their formats -> a model, its tokenizer and its fingerprint.

    model = load_minimind("out/full_sft_512.pth")     # or a .safetensors file, or a Hugging Face folder
    tokenizer = load_tokenizer("out/full_sft_512.pth")

The architecture is read off the tensors; nothing has to be told.
"""

import hashlib
import json
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

BUNDLED_BASE = Path(__file__).resolve().parent / "minimind_mini"


class CheckpointError(ValueError):
    """A weight file or artifact that cannot be used; the scripts end with exit code 4."""


def find_weight(name: str, hidden_size: int | None = None, folder: str | Path = "out") -> Path:
    """The file or folder of a base: `name` as a path, else `<folder>/<name>_<hidden>.pth`, else the bundled base.

    Prints one line when it falls back on the bundled base.

    Raises:
        CheckpointError: several files fit the name, or what looks like a path does not exist.
    """
    if Path(name).exists():
        return Path(name)
    if "/" in name or name.endswith((".pth", ".safetensors")):
        raise CheckpointError(f"base weights {name!r}: no such file or folder")
    found = sorted(Path(folder).glob(f"{name}_{hidden_size or '*'}.pth"))
    found = [path for path in found if path.stem.removeprefix(f"{name}_").isdigit()]
    if len(found) > 1:
        raise CheckpointError(f"{name!r} fits {', '.join(map(str, found))}: give the path or --hidden_size")
    if found:
        return found[0]
    print(f"no {folder}/{name}_<hidden>.pth here: using the bundled base {BUNDLED_BASE.name}")
    return BUNDLED_BASE


def load_minimind(
    path: str | Path,
    device: str = "cpu",
    dtype: torch.dtype | None = None,
    hidden_size: int | None = None,
    num_hidden_layers: int | None = None,
    inference_rope_scaling: bool = False,
) -> MiniMindForCausalLM:
    """Load a base of either generation, dense or mixture of experts, in evaluation mode.

    Args:
        path: `.pth` (read with weights_only), `.safetensors`, or a Hugging Face folder.
        dtype: type of the weights; that of the file by default.
        hidden_size, num_hidden_layers: checked against the file when given.

    Raises:
        CheckpointError: no such file, not MiniMind tensors, or a shape that was given disagrees with the file.
    """
    path = Path(path)
    tensors = _read_tensors(path)
    published = {}
    if path.is_dir() and (path / "config.json").is_file():
        published = json.loads((path / "config.json").read_text(encoding="utf-8"))
    if inference_rope_scaling:
        published["inference_rope_scaling"] = True
    model = minimind_from_tensors(tensors, published, str(path))
    for name, given in (("hidden_size", hidden_size), ("num_hidden_layers", num_hidden_layers)):
        if given is not None and given != getattr(model.config, name):
            raise CheckpointError(f"{path} has {name} {getattr(model.config, name)}, but {given} was given")
    return model.to(device=device, dtype=dtype)


def minimind_from_tensors(tensors: dict[str, torch.Tensor], published: dict, source: str) -> MiniMindForCausalLM:
    """A model in evaluation mode around these tensors.

    Args:
        published: a config.json's content, for what no tensor shows; may be empty.
        source: named in errors.

    Raises:
        CheckpointError: the tensors are no MiniMind model.
    """
    config = _read_config(source, tensors, published)
    with torch.device("meta"):
        model = MiniMindForCausalLM(config)
    # A file's bytes may lie at any address; the same kernels on the same alignment give the same bits every time.
    tensors = {name: tensor.clone() for name, tensor in tensors.items()}
    tensors.setdefault("lm_head.weight", tensors["model.embed_tokens.weight"])
    check_tensors(tensors, {name: p.shape for name, p in model.state_dict().items()}, source)
    model.load_state_dict(tensors, strict=True, assign=True)
    model.tie_weights()
    model.fingerprint = fingerprint(model.state_dict())
    return model.eval()


def _read_tensors(path: Path) -> dict[str, torch.Tensor]:
    files = [path]
    if path.is_dir():
        files = sorted(path.glob("*.safetensors")) or sorted(path.glob("pytorch_model*.bin"))
        if not files:
            raise CheckpointError(f"{path} holds no .safetensors file")
    elif not path.is_file():
        raise CheckpointError(f"{path}: no such file or folder")
    tensors = {}
    for file in files:
        try:
            if file.suffix == ".safetensors":
                tensors.update(load_file(file))
            else:
                tensors.update(torch.load(file, map_location="cpu", weights_only=True))
        except (SafetensorError, RuntimeError, OSError, EOFError, ValueError, KeyError) as error:
            raise CheckpointError(f"{file} cannot be read as weights: {str(error).splitlines()[0]}") from None
        except Exception as error:  # torch raises pickle.UnpicklingError for what weights_only forbids
            if type(error).__name__ != "UnpicklingError":
                raise
            raise CheckpointError(f"{file} is refused: it holds more than tensors") from None
    # Distributed training and older exports leave these behind; the rotary tables are computed, not loaded.
    tensors = {name.removeprefix("module.").removeprefix("_orig_mod."): t for name, t in tensors.items()}
    tensors = {n: t for n, t in tensors.items() if not n.endswith(("freqs_cos", "freqs_sin", "freqs_cis"))}
    if "model.embed_tokens.weight" not in tensors or not all(isinstance(t, torch.Tensor) for t in tensors.values()):
        raise CheckpointError(f"{path} holds no MiniMind weights (no model.embed_tokens.weight)")
    return tensors


def _read_config(source: str, tensors: dict[str, torch.Tensor], published: dict) -> MiniMindConfig:
    """The architecture, read off names and shapes. `published` adds what no tensor shows: the number of heads,
    the rotary base and YaRN. Without it MiniMind's own values stand: 8 heads, rotary base 1e6."""
    first = "model.layers.0."
    try:
        vocab_size, hidden_size = tensors["model.embed_tokens.weight"].shape
        third = f"{first}self_attn.q_norm.weight" in tensors
        query_size = len(tensors[f"{first}self_attn.q_proj.weight"])
        if third:
            head_dim = len(tensors[f"{first}self_attn.q_norm.weight"])
        else:
            head_dim = query_size // published.get("num_attention_heads", 8)
        key_value_size = len(tensors[f"{first}self_attn.k_proj.weight"])
        experts = {name.split(".")[5] for name in tensors if name.startswith(f"{first}mlp.experts.")}
        shared = {name.split(".")[5] for name in tensors if name.startswith(f"{first}mlp.shared_experts.")}
        gate = f"{first}mlp.experts.0.gate_proj.weight" if experts else f"{first}mlp.gate_proj.weight"
        layers = {int(name.split(".")[2]) for name in tensors if name.startswith("model.layers.")}
        rope = published.get("rope_parameters") or {}
        return MiniMindConfig(
            generation="minimind3" if third else "minimind2",
            vocab_size=vocab_size,
            hidden_size=hidden_size,
            num_hidden_layers=max(layers) + 1,
            num_attention_heads=query_size // head_dim,
            num_key_value_heads=key_value_size // head_dim,
            head_dim=head_dim,
            intermediate_size=len(tensors[gate]),
            use_moe=bool(experts),
            num_experts=len(experts) or 4,
            num_shared_experts=len(shared) if experts else None,
            num_experts_per_tok=published.get("num_experts_per_tok"),
            rms_norm_eps=published.get("rms_norm_eps"),
            rope_theta=published.get("rope_theta") or rope.get("rope_theta") or 1e6,
            max_position_embeddings=published.get("max_position_embeddings", 32768),
            inference_rope_scaling=bool(published.get("inference_rope_scaling", False)),
        )
    except (KeyError, ValueError, IndexError, ZeroDivisionError) as error:
        raise CheckpointError(f"{source} is no MiniMind model: {error}") from None


def check_tensors(found: dict[str, torch.Tensor], expected: dict[str, torch.Size], source: str) -> None:
    """Compare names and shapes.

    Raises:
        CheckpointError: anything is missing, unexpected or misshapen; one message lists all of it (20 at most).
    """
    problems = [f"missing {name}" for name in expected if name not in found]
    problems += [f"unexpected {name}" for name in found if name not in expected]
    problems += [
        f"{name} has shape {tuple(found[name].shape)}, expected {tuple(shape)}"
        for name, shape in expected.items()
        if name in found and found[name].shape != shape
    ]
    if problems:
        more = f"; and {len(problems) - 20} more" if len(problems) > 20 else ""
        raise CheckpointError(f"{source} does not fit the model: {'; '.join(problems[:20])}{more}")


def fingerprint(tensors: dict[str, torch.Tensor]) -> str:
    """SHA-256 over names, shapes and values (as float32), whatever the file's format or type was."""
    digest = hashlib.sha256()
    for name in sorted(tensors):
        value = tensors[name].detach().to("cpu", torch.float32).contiguous()
        digest.update(f"{name}{tuple(value.shape)}".encode())
        digest.update(value.numpy().tobytes())
    return digest.hexdigest()


def load_tokenizer(weight: str | Path, tokenizer: str | Path | None = None):
    """The tokenizer of `weight`: the one given, else beside the weights, else in `model/` where MiniMind keeps it.

    Raises:
        CheckpointError: none is found.
    """
    folder = Path(weight) if Path(weight).is_dir() else Path(weight).parent
    places = [Path(tokenizer)] if tokenizer else [folder, BUNDLED_BASE.parent]
    for place in places:
        if (place / "tokenizer.json").is_file():
            return PreTrainedTokenizerFast.from_pretrained(place)
    raise CheckpointError(
        f"no tokenizer.json in {' or '.join(map(str, places))}: give the tokenizer of {weight} with --tokenizer"
    )


def tokenizer_fingerprint(tokenizer) -> str:
    """SHA-256 over vocabulary, merges and chat template."""
    text = tokenizer.backend_tokenizer.to_str() + str(tokenizer.chat_template)
    return hashlib.sha256(text.encode()).hexdigest()


@torch.inference_mode()
def check_pairing(model: MiniMindForCausalLM, tokenizer, texts: list[str]) -> float:
    """Loss a token (nats) of the base on a few texts, so that a tokenizer of another model does not go unnoticed.

    Raises:
        CheckpointError: the base is no better than guessing among its vocabulary.
    """
    if len(tokenizer) > model.config.vocab_size:
        raise CheckpointError(f"the tokenizer has {len(tokenizer)} tokens, the base {model.config.vocab_size}")
    total, count = 0.0, 0
    for text in texts[:8]:
        ids = torch.tensor([tokenizer.encode(text, add_special_tokens=False)[:128]], device=model.device)
        if ids.shape[1] > 1:
            logits = model(input_ids=ids).logits[0, :-1].float()
            total += float(F.cross_entropy(logits, ids[0, 1:], reduction="sum"))
            count += ids.shape[1] - 1
    loss, chance = total / max(count, 1), math.log(model.config.vocab_size)
    if not loss < chance:
        raise CheckpointError(
            f"the base's loss on these texts is {loss:.2f} nats a token, no better than chance ({chance:.2f}): "
            "tokenizer and weights do not belong together (--allow_mismatch goes on all the same)"
        )
    return loss


def compute_dtype(name: str, device: str) -> torch.dtype:
    """The type of frozen weights and activations: "bfloat16", "float32", or for "auto" the faster one on `device`.

    That is bfloat16 wherever the hardware multiplies it: without such instructions a CPU only imitates it, slowly.
    """
    if name != "auto":
        return {"bfloat16": torch.bfloat16, "float32": torch.float32}[name]
    if device.startswith("cuda"):
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float32
    can = torch.cpu.get_capabilities()
    return torch.bfloat16 if can.get("amx_bf16") or can.get("avx512_bf16") else torch.float32
