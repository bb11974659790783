"""The flags that the four train scripts share, and the exit codes of all scripts.

Names are MiniMind's own where MiniMind has one.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

import torch

from dataset.classification_dataset import BUNDLED_DATA, TOKENS_PER_FORWARD
from dataset.rows import DataError
from model.checkpoint import CheckpointError
from train import distributed
from train.judge_client import JudgeError

EXIT_CODES = {DataError: 3, CheckpointError: 4, FloatingPointError: 5, OSError: 6, JudgeError: 8}


def run_script(main: Callable[[], None]) -> None:
    """Run a script's main: an error that a user can mend ends in one line on stderr and its exit code
    (2 usage, 3 data, 4 weights or artifact, 5 numbers that are not finite, 6 storage, 8 judge, 130 interrupted)."""
    try:
        main()
    except KeyboardInterrupt:
        sys.exit(130)
    except tuple(EXIT_CODES) as error:
        print(f"error: {error}", file=sys.stderr)
        code = next(code for kind, code in EXIT_CODES.items() if isinstance(error, kind))
        sys.exit(getattr(error, "exit_code", code))  # a judge without a key is wrong usage
    finally:
        distributed.stop()


def seed_initialisation(seed: int) -> None:
    """Fix what a method's fresh parameters are drawn from."""
    torch.manual_seed(seed)


def positive_int(text: str) -> int:
    """An argparse type: a whole number of at least 1."""
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"{text} is below 1")
    return value


def share(text: str) -> float:
    """An argparse type: a number above 0 and at most 1."""
    value = float(text)
    if not 0 < value <= 1:
        raise argparse.ArgumentTypeError(f"{text} is not above 0 and at most 1")
    return value


def dropout_rate(text: str) -> float:
    """An argparse type: a number of at least 0 and below 1."""
    value = float(text)
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text} is not at least 0 and below 1")
    return value


def yes_no_auto(text: str) -> str:
    """An argparse type: yes, no or auto; MiniMind's own 1 and 0 are yes and no."""
    value = {"1": "yes", "0": "no"}.get(text, text)
    if value not in ("yes", "no", "auto"):
        raise argparse.ArgumentTypeError(f"{text!r} is none of yes, no, auto")
    return value


def build_parser(docstring: str) -> argparse.ArgumentParser:
    """A parser whose help opens with the script's docstring and ends each flag with its default."""

    class Formatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
        pass

    return argparse.ArgumentParser(description=docstring, formatter_class=Formatter, allow_abbrev=False)


def add_base_arguments(parser: argparse.ArgumentParser, weight_flag: str) -> None:
    """Which base, where, in which type: the same for training (`--from_weight`) and evaluation (`--weight`)."""
    group = parser.add_argument_group("base model")
    group.add_argument(
        weight_flag, default="full_sft", help="path, or a name: out/<name>_<hidden>.pth, else the bundled base"
    )
    group.add_argument("--hidden_size", type=positive_int, help="picks among and is checked against the weights")
    group.add_argument("--num_hidden_layers", type=positive_int, help="checked against the weights")
    group.add_argument("--tokenizer", help="folder of the tokenizer; by default the one beside the weights")
    group.add_argument("--allow_mismatch", action="store_true", help="use a base that does worse than chance")
    group.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    group.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="type of frozen weights"
    )


def add_training_arguments(
    parser: argparse.ArgumentParser,
    save_dir: str,
    save_name: str,
    epochs: int,
    learning_rate: float,
    word_dropout: float = 0.0,
    batch_size: int = 16,
) -> None:
    """All that the training loop reads; the arguments are a method's own defaults."""
    data = parser.add_argument_group("data")
    data.add_argument("--data_path", default=str(BUNDLED_DATA / "train.jsonl"), help=".jsonl or .csv to train on")
    data.add_argument("--val_path", help="validation rows; without them a tenth of the training rows is held out")
    data.add_argument("--max_seq_len", type=positive_int, default=512, help="tokens of prompt and label; texts are cut")
    data.add_argument("--template", default="auto", choices=("auto", "en", "zh"), help="language of the instruction")
    data.add_argument("--num_workers", type=int, default=0, help="accepted for MiniMind's sake; rows are encoded once")

    loop = parser.add_argument_group("training")
    loop.add_argument("--epochs", type=positive_int, default=epochs, help="most epochs; each ends with a validation")
    loop.add_argument(
        "--min_epoch_steps",
        type=positive_int,
        default=24,
        help="few rows are passed over again until an epoch has so many updates; 1: one pass",
    )
    loop.add_argument("--batch_size", type=positive_int, default=batch_size, help="texts a forward and process")
    loop.add_argument(
        "--tokens_per_forward",
        type=positive_int,
        default=TOKENS_PER_FORWARD,
        help="longer texts of a batch are taken in parts of so many tokens, to the same sum; raise it on a GPU",
    )
    loop.add_argument("--accumulation_steps", type=positive_int, default=1, help="forwards an optimizer step")
    loop.add_argument("--learning_rate", type=float, default=learning_rate, help="peak, after warm-up")
    loop.add_argument(
        "--word_dropout", type=dropout_rate, default=word_dropout, help="share of a text's tokens a step leaves out"
    )
    loop.add_argument("--weight_decay", type=float, default=0.01, help="AdamW's")
    loop.add_argument("--warmup_ratio", type=float, default=0.06, help="share of all steps")
    loop.add_argument("--grad_clip", type=float, default=1.0, help="largest norm of the gradient")
    loop.add_argument("--patience", type=positive_int, default=4, help="epochs worse than the best before the end")
    loop.add_argument("--seed", type=int, default=42)
    loop.add_argument(
        "--use_compile", type=yes_no_auto, default="auto", help="torch.compile the blocks: yes (1), no (0), or auto"
    )

    run = parser.add_argument_group("run")
    run.add_argument("--save_dir", type=Path, default=Path(save_dir), help="folder of the artifact")
    run.add_argument("--save_name", default=save_name, help="artifact is <save_name>_<hidden>.safetensors")
    run.add_argument("--checkpoint_dir", type=Path, default=Path("checkpoints"), help="folder of resume files")
    run.add_argument("--from_resume", type=int, default=0, choices=(0, 1), help="go on from the last checkpoint")
    run.add_argument("--save_interval", type=positive_int, default=100, help="optimizer steps between checkpoints")
    run.add_argument("--log_interval", type=positive_int, default=10, help="optimizer steps between log lines")
    run.add_argument("--use_wandb", action="store_true", help="also log to Weights & Biases (pip install wandb)")
    run.add_argument("--wandb_project", default="MiniMind-Classification")
