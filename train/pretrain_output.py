"""What a pre-training run leaves on disk: its checkpoint, the base as a Hugging Face folder, and the loss curve."""

import argparse
import io
import json
from pathlib import Path

import torch

from model.artifact import write_atomically
from model.model_minimind import MiniMindForCausalLM
from train.resume import check_same_run


def run_identity(args: argparse.Namespace, language) -> dict:
    """What a checkpoint must share with the run that goes on from it; a run may be prolonged by more --tokens."""
    free = ("corpus", "output_dir", "work_dir", "tokens", "from_weight_share", "use_compile", "device")
    flags = {name: value for name, value in vars(args).items() if name not in free}
    flags["from_weight"] = str(args.from_weight)
    return flags | {"corpus_tokens": sum(len(sequence.ids) for sequence in language)}


def save_checkpoint(path: Path, model, context, optimizers, state: dict, identity: dict) -> None:
    saved = {"model": model.state_dict(), "context": context.state_dict(), "state": state, "identity": identity}
    content = io.BytesIO()
    torch.save(saved | {"optimizers": [optimizer.state_dict() for optimizer in optimizers]}, content)
    write_atomically(path, content.getvalue())


def load_checkpoint(path: Path, model, context, optimizers, identity: dict) -> dict:
    """Restore a run; its state, that of a run not yet begun where there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint is another run's; names the first difference, then and now.
    """
    if not path.exists():
        return {"epoch": 0, "window": 0, "tokens": 0, "seconds": 0.0, "step": 0}
    saved = torch.load(path, weights_only=True, map_location=model.device)
    check_same_run(path, saved["identity"], identity, "give another --work_dir")
    model.load_state_dict(saved["model"])
    context.load_state_dict(saved["context"])
    for optimizer, optimizer_state in zip(optimizers, saved["optimizers"], strict=True):
        optimizer.load_state_dict(optimizer_state)
    state = saved["state"]
    print(f"resumed at step {state['step']}, {state['tokens']:,} tokens, {state['seconds'] / 60:.1f} minutes")
    return state


@torch.no_grad()
def average_with(model: MiniMindForCausalLM, start: MiniMindForCausalLM, share: float) -> None:
    """Move the weights the given share of the way back to where the run started (https://arxiv.org/abs/2109.01903)."""
    for trained, before in zip(model.parameters(), start.parameters(), strict=True):
        trained.lerp_(before, share)


def export(model: MiniMindForCausalLM, tokenizer, folder: Path) -> None:
    """Write the Hugging Face folder in bfloat16."""
    model.to("cpu", torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    size = sum(file.stat().st_size for file in folder.iterdir()) / 2**20
    print(f"{folder}: {size:.1f} MiB")


def plot_loss(log_file: Path, path: Path) -> None:
    """Draw a run's log: the loss of single steps, tasks included, and that of the held-out documents."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log_file.read_text().splitlines()]
    millions = [line["tokens"] / 1e6 for line in lines]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot(millions, [line["loss"] for line in lines], color="C0", alpha=0.5, label="training, one step")
    axes.plot(millions, [line["val_loss"] for line in lines], color="C1", label="held-out documents")
    axes.set(xlabel="million tokens", ylabel="loss (nats a token)", title="pre-training")
    axes.legend()
    figure.savefig(path, dpi=120)
