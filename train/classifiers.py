"""From the command line to a classifier ready to use: the frozen base, an artifact on its base, a merged file."""

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from tokenizers import Tokenizer
from transformers import PreTrainedTokenizerFast

from dataset.prompts import Prompt, build_prompt, text_only_prompt, with_virtual_tokens
from dataset.rows import Row
from model.artifact import Description, check_fits, read_artifact, read_header
from model.checkpoint import (
    CheckpointError,
    compute_dtype,
    find_weight,
    load_minimind,
    load_tokenizer,
    minimind_from_tensors,
    tokenizer_fingerprint,
)
from model.methods import attach
from train import setup
from train.evaluation import Classifier
from train.scoring import head_scorer, language_scorer

SCRIPTS = {
    "lora": "train/train_lora.py",
    "adapter": "train/train_adapter.py",
    "prompt_tuning": "train/train_prompt_tuning.py",
    "projection_head": "train/train_projection_head.py",
}


def base_classifier(args, train_rows: Sequence[Row], like: Prompt | None = None) -> Classifier:
    """The frozen base with the labels of the training rows, or with the labels and template of the prompt `like`."""
    model, tokenizer = setup.open_base(args, args.weight, train_rows)
    if like is None:
        prompt = setup.open_prompt(args, tokenizer, train_rows)
    else:
        prompt = build_prompt(tokenizer, list(like.labels), like.template, like.max_seq_len)
    return Classifier("frozen base", prompt, language_scorer(model, prompt), model, 0, args.device)


def artifact_classifier(args, method: str, folder: str, name: str, given: dict) -> tuple[Classifier, Path]:
    """The classifier of an artifact, by path or by name below `args.out_dir/folder`, and the artifact's path.

    Args:
        given: shape flags of the command line; those that are not None are checked against the artifact.

    Raises:
        CheckpointError: no such artifact, another method, base, tokenizer or shape.
    """
    weight = find_weight(args.weight, args.hidden_size)
    dtype = compute_dtype(args.dtype, args.device)
    base = load_minimind(weight, args.device, dtype, args.hidden_size, args.num_hidden_layers)
    tokenizer = load_tokenizer(weight, args.tokenizer)
    path = Path(name)
    if path.suffix != ".safetensors":
        path = args.out_dir / folder / f"{name}_{base.config.hidden_size}.safetensors"
    if not path.is_file():
        raise CheckpointError(f"no artifact {path}: train it with `python {SCRIPTS[method]}`, or give a path")
    tensors, description = read_artifact(path)
    if description.method != method:
        raise CheckpointError(f"{path} was made by {description.method}, not by {method}")
    check_fits(description, base.fingerprint, tokenizer_fingerprint(tokenizer), str(path))
    check_given(description, given, path)
    model = attach(base, description, tensors, str(path))
    return _classifier(model, description, tokenizer, args.device), path


def merged_classifier(args) -> tuple[Classifier, Path]:
    """A projection head merged into one file with its base and tokenizer, by path or by name."""
    path = Path(args.merged_weight)
    if path.suffix != ".safetensors":
        found = sorted((args.out_dir / "projection_head").glob(f"{args.merged_weight}_*_merged.safetensors"))
        if len(found) != 1:
            raise CheckpointError(
                f"{len(found)} merged files fit {args.merged_weight!r} in {args.out_dir / 'projection_head'}: make one "
                f"with `python {SCRIPTS['projection_head']} --save_merged`, or give the path with --merged_weight"
            )
        path = found[0]
    tensors, description = read_artifact(path)
    header = read_header(path)
    if "tokenizer" not in header:
        raise CheckpointError(f"{path} holds no base: evaluate it with --projectionhead_cls_tuning")
    prefix = "base."
    base_tensors = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
    base = minimind_from_tensors(base_tensors, json.loads(header["config"]), str(path))
    base = base.to(args.device, compute_dtype(args.dtype, args.device))
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(header["tokenizer"]),
        chat_template=header["chat_template"],
        **json.loads(header["special_tokens"]),
    )
    trained = {name: tensor for name, tensor in tensors.items() if not name.startswith(prefix)}
    return _classifier(attach(base, description, trained, str(path)), description, tokenizer, args.device), path


def check_given(description: Description, given: dict, path: Path) -> None:
    """Compare shape flags with the artifact.

    Raises:
        CheckpointError: names the flag, the file's value and the given one.
    """
    settings = description.settings
    known = {**settings, "rank": max(settings["rank_map"].values()) if "rank_map" in settings else None}
    for name, value in given.items():
        if value is None:
            continue
        if known.get(name) is None:
            raise CheckpointError(f"--{name} {value} was given, but {path} was made by {description.method}")
        if name == "rank" and len(set(settings["rank_map"].values())) > 1:
            print(f"--rank {value} is ignored: {path} has a rank of its own for every layer")
        elif known[name] != value:
            raise CheckpointError(f"{path} has {name} {known[name]}, but {value} was given")


def _classifier(model: torch.nn.Module, description: Description, tokenizer, device: str) -> Classifier:
    prompt = build_prompt(tokenizer, description.labels, description.template, description.max_seq_len)
    speaks = description.method != "projection_head"
    if not speaks:
        prompt = text_only_prompt(prompt)
    prompt = with_virtual_tokens(prompt, description.settings.get("num_virtual_tokens", 0))
    return Classifier(
        method=description.method,
        prompt=prompt,
        scorer=language_scorer(model, prompt) if speaks else head_scorer(model),
        model=model,
        trained_parameters=description.run.get("trained_parameters", 0),
        device=device,
        speaks=speaks,
        details=description.run,
    )
