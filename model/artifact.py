"""Artifacts: what a run trained, with all that is needed to use it again, in one `.safetensors` file.

The tensors are the trained ones only; the header holds a JSON description (`Description`). Nothing is pickled.
"""

import json
import os
import tempfile
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save

from model.checkpoint import CheckpointError, check_tensors

FORMAT_VERSION = 1


@dataclass
class Description:
    """What an artifact says about itself.

    Attributes:
        method: "lora", "adapter", "prompt_tuning" or "projection_head".
        settings: the method's own shape, such as rank_map and alpha, middle_features, num_virtual_tokens.
        labels: class names in order.
        template, max_seq_len: how rows became prompts (max_seq_len in tokens).
        base, tokenizer: SHA-256 fingerprints of what it was trained on.
        run: seed, arguments, validation scores, seconds, library versions.
    """

    method: str
    settings: dict
    labels: list[str]
    template: str
    max_seq_len: int
    base: str
    tokenizer: str
    run: dict = field(default_factory=dict)
    format_version: int = FORMAT_VERSION


def trained_tensors(model: torch.nn.Module) -> dict[str, torch.nn.Parameter]:
    """The parameters that train: the one predicate by which they are optimized, counted and saved."""
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


def write_atomically(path: Path, content: bytes) -> None:
    """Write to a temporary name, flush to disk, rename: `path` is whole at every moment, the old or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        umask = os.umask(0)
        os.umask(umask)
        os.chmod(temporary, 0o666 & ~umask)  # mkstemp makes files that nobody else may read
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(folder)  # the rename itself
    finally:
        os.close(folder)


def save_artifact(path: Path, tensors: dict[str, torch.Tensor], description: Description) -> None:
    """Write an artifact; `path` ends in `.safetensors`."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    header = {"description": json.dumps(asdict(description), ensure_ascii=False)}
    write_atomically(path, save(plain, metadata=header))


def save_merged(path: Path, model: torch.nn.Module, description: Description, tokenizer) -> None:
    """Write classifier and base as one file: tensors `base.*` and the trained ones, the tokenizer in the header."""
    plain = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
    plain.pop("base.lm_head.weight")  # it is the token embedding
    header = {
        "description": json.dumps(asdict(description), ensure_ascii=False),
        "config": model.config.to_json_string(use_diff=False),
        "tokenizer": tokenizer.backend_tokenizer.to_str(),
        "chat_template": tokenizer.chat_template,
        "special_tokens": json.dumps({name: str(token) for name, token in tokenizer.special_tokens_map.items()}),
    }
    write_atomically(path, save(plain, metadata=header))


def read_artifact(path: Path) -> tuple[dict[str, torch.Tensor], Description]:
    """The tensors and the description of an artifact.

    Raises:
        CheckpointError: no such file, not an artifact of ours, of a later format, or with a value that is not finite.
    """
    if not Path(path).is_file():
        raise CheckpointError(f"artifact {path}: no such file")
    try:
        description = Description(**json.loads(read_header(path)["description"]))
        with safe_open(path, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except (SafetensorError, KeyError, TypeError, ValueError, OSError) as error:
        raise CheckpointError(f"{path} is no artifact of this project: {error!r}") from None
    if description.format_version > FORMAT_VERSION:
        raise CheckpointError(
            f"{path} has format {description.format_version}, newer than this code's {FORMAT_VERSION}"
        )
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(f"{path}: {name} holds values that are not finite")
    return tensors, description


def read_header(path: Path) -> dict[str, str]:
    """The strings in a safetensors file's header."""
    with safe_open(path, "pt") as file:
        return file.metadata() or {}


def load_trained(model: torch.nn.Module, tensors: dict[str, torch.Tensor], source: str) -> None:
    """Copy an artifact's tensors into the model's trained parameters, all of them and nothing else.

    Raises:
        CheckpointError: with the list of missing, unexpected and misshapen tensors.
    """
    trained = trained_tensors(model)
    check_tensors(tensors, {name: p.shape for name, p in trained.items()}, source)
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(tensors[name])


def check_fits(description: Description, base: str, tokenizer: str, source: str) -> None:
    """Refuse an artifact of another base or tokenizer.

    Raises:
        CheckpointError: names which of the two differs, with both fingerprints.
    """
    for what, expected, found in (
        ("base", description.base, base),
        ("tokenizer", description.tokenizer, tokenizer),
    ):
        if expected != found:
            raise CheckpointError(
                f"{source} was trained on another {what} ({expected[:12]}…), this one is {found[:12]}…; "
                "give the right one with --weight"
            )
