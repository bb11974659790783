"""What a run writes while it goes on: a JSONL line per logged step, and from it the learning curve."""

import json
from pathlib import Path

from model.artifact import write_atomically
from train import distributed
from train.resume import Progress


class RunLog:
    """A JSONL line per logged step, written by the main process; with `--use_wandb` also sent there.

    A resumed run first drops the lines behind its checkpoint, so that no step stands there twice.
    """

    def __init__(self, args, progress: Progress):
        self.file = self.wandb = None
        if not distributed.is_main():
            return
        path = log_path(args)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = []
        if (progress.epoch or progress.step) and path.is_file():
            lines = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
            kept = [line for line in lines if self._is_before(line, progress)]
        write_atomically(path, "".join(json.dumps(line) + "\n" for line in kept).encode())
        self.file = path.open("a")
        if args.use_wandb:
            try:
                import wandb
            except ImportError:
                raise OSError("--use_wandb needs the package: pip install wandb") from None
            self.wandb = wandb.init(project=args.wandb_project, config=vars(args))

    @staticmethod
    def _is_before(line: dict, progress: Progress) -> bool:
        if "val_epoch" in line:
            return line["val_epoch"] < progress.epoch
        return line["epoch"] < progress.epoch or (line["epoch"] == progress.epoch and line["in_epoch"] <= progress.step)

    def write(self, **values) -> None:
        if self.file:
            self.file.write(json.dumps(values) + "\n")
            self.file.flush()
        if self.wandb:
            self.wandb.log(values)

    def close(self) -> None:
        if self.file:
            self.file.close()
        if self.wandb:
            self.wandb.finish()


def log_path(args) -> Path:
    return args.save_dir / f"{args.save_name}.log.jsonl"


def plot_learning_curve(args, path: Path) -> None:
    """Draw the run's log: training loss by step, validation accuracy by epoch."""
    from matplotlib.figure import Figure

    lines = [json.loads(line) for line in log_path(args).read_text().splitlines()]
    steps = [line for line in lines if "loss" in line]
    epochs = [line for line in lines if "val_accuracy" in line]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    axes.plot([line["step"] for line in steps], [line["loss"] for line in steps], color="C0", label="training loss")
    axes.set(xlabel="optimizer step", ylabel="training loss (nats a target)", title=args.save_name)
    right = axes.twinx()
    accuracies = [line["val_accuracy"] for line in epochs]
    right.plot([line["step"] for line in epochs], accuracies, "o-", color="C1", label="validation accuracy")
    right.set(ylabel="validation accuracy", ylim=(0, 1))
    figure.legend(loc="outside lower center", ncols=2)
    figure.savefig(path, dpi=120)
