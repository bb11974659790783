"""Checkpoints of a run: where it stands, in one file that is whole at every moment, and the way back.

A checkpoint holds the trained parameters, the optimizer's state, the best state so far, `Progress`, and the identity of
the run: data, base, method and every flag that changes a number. Resuming with anything else is refused.
"""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save

from model.artifact import write_atomically
from model.checkpoint import CheckpointError, check_tensors
from train import distributed


@dataclass
class Progress:
    """Where a run stands; with the tensors, all that a resumed run needs to know.

    Attributes:
        epoch, step: the next step to take is number `step` of `epoch`, both from 0.
        best_epoch: the latest epoch within a standard error of the highest accuracy; None before the first validation.
        history: the validation scores of every finished epoch.
        seconds: training time so far, over all resumed parts.
        finished: the last epoch is done or early stopping ended the run.
    """

    epoch: int = 0
    step: int = 0
    best_epoch: int | None = None
    history: list[dict] = field(default_factory=list)
    seconds: float = 0.0
    finished: bool = False


def checkpoint_path(args) -> Path:
    return args.checkpoint_dir / f"{args.save_name}_resume.safetensors"


def run_identity(args, lengths: Sequence[int]) -> dict:
    """The flags that change the numbers of a run, and the shape of its data."""
    names = "epochs min_epoch_steps batch_size accumulation_steps tokens_per_forward learning_rate weight_decay"
    names += " word_dropout warmup_ratio grad_clip patience seed"
    flags = {name: getattr(args, name) for name in names.split()}
    row_lengths = hashlib.sha256(json.dumps(list(lengths)).encode()).hexdigest()
    return {**flags, "row_lengths": row_lengths, "processes": distributed.world_size()}


def save_checkpoint(path: Path, trained, optimizer, best, progress: Progress, identity: dict) -> None:
    """Everything a resumed run needs, in one file that is whole at every moment; the main process writes."""
    if not distributed.is_main():
        return
    tensors = {f"trained.{name}": p.detach() for name, p in trained.items()}
    tensors |= {f"best.{name}": tensor for name, tensor in best.items()}
    for name, parameter in trained.items():
        tensors |= {f"optimizer.{key}.{name}": value for key, value in optimizer.state[parameter].items()}
    tensors = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
    header = {"progress": json.dumps(asdict(progress)), "identity": json.dumps(identity, sort_keys=True)}
    write_atomically(path, save(tensors, metadata=header))


def read_checkpoint_identity(path: Path) -> dict | None:
    """What run a checkpoint belongs to; None where there is no checkpoint."""
    if not path.is_file():
        return None
    with safe_open(path, "pt") as file:
        return json.loads(file.metadata()["identity"])


def check_same_run(path: Path, saved: dict, current: dict, remedy: str) -> None:
    """Refuse a checkpoint of another run.

    Raises:
        CheckpointError: what identifies the runs differs; names the first difference, then and now, and the remedy.
    """
    for name in sorted(saved.keys() | current.keys()):
        then, now = saved.get(name), current.get(name)
        if then != now:
            raise CheckpointError(
                f"{path} belongs to a different run: {name} was {str(then)[:80]}, is now {str(now)[:80]}; "
                f"repeat the flags of that run, or {remedy}"
            )


def load_checkpoint(path: Path, trained, optimizer, best, identity: dict) -> Progress | None:
    """Restore parameters, optimizer and best state; None where there is no checkpoint.

    Raises:
        CheckpointError: the checkpoint's run differs; names what, then and now.
    """
    saved_identity = read_checkpoint_identity(path)
    if saved_identity is None:
        if distributed.is_main():
            print(f"no checkpoint {path}: starting from the beginning")
        return None
    check_same_run(path, saved_identity, json.loads(json.dumps(identity)), "start anew with --from_resume 0")
    with safe_open(path, "pt") as file:
        progress = Progress(**json.loads(file.metadata()["progress"]))
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    shapes = {name: p.shape for name, p in trained.items()}
    saved = {name.removeprefix("trained."): t for name, t in tensors.items() if name.startswith("trained.")}
    check_tensors(saved, shapes, str(path))
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(saved[name])
            best[name].copy_(tensors[f"best.{name}"])
            keys = [key for key in ("step", "exp_avg", "exp_avg_sq") if f"optimizer.{key}.{name}" in tensors]
            device = {"step": "cpu"}  # AdamW keeps its step count there
            optimizer.state[parameter] = {
                key: tensors[f"optimizer.{key}.{name}"].to(device.get(key, parameter.device)) for key in keys
            }
    if distributed.is_main():
        print(f"resumed from {path}: epoch {progress.epoch + 1}, step {progress.step + 1}")
    return progress
