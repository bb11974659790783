"""What every train script does before and after its own part: open the base, build the prompt, write the artifact."""

import hashlib
import math
import platform
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
import transformers

from dataset.prompts import Prompt, build_prompt, choose_template, labels_of
from dataset.rows import Row
from model.artifact import Description, save_artifact, trained_tensors
from model.checkpoint import (
    check_pairing,
    compute_dtype,
    find_weight,
    load_minimind,
    load_tokenizer,
    tokenizer_fingerprint,
)
from model.model_minimind import MiniMindForCausalLM
from train import distributed
from train.resume import Progress

# Operations of a training run: about an hour and a half at the 200 GFLOP/s of a measured CPU; a GPU's is a guess.
COMPILE_PAYS_ABOVE = {"cpu": 1e15, "cuda": 1e17}


def open_base(args, weight: str, rows: Sequence[Row]) -> tuple[MiniMindForCausalLM, object]:
    """The base and its tokenizer, after a check on a few rows that the two belong together.

    Raises:
        CheckpointError: no such weights, no tokenizer, or a base that does worse than chance.
    """
    path = find_weight(weight, args.hidden_size)
    dtype = compute_dtype(args.dtype, args.device)
    model = load_minimind(path, args.device, dtype, args.hidden_size, args.num_hidden_layers)
    tokenizer = load_tokenizer(path, args.tokenizer)
    if not args.allow_mismatch:
        check_pairing(model, tokenizer, [row.text for row in rows])
    return model, tokenizer


def compile_blocks(args, blocks: torch.nn.Module, lengths: Sequence[int]) -> None:
    """Compile the base's blocks in place if `--use_compile` says so, or says auto and the run is long enough for it.

    Measured on a CPU (tests/benchmarks/RESULTS.md): a step gets a seventh shorter, after minutes of compiling for each
    kind of batch. So auto counts the run's operations, about four a parameter and token, and not the clock: the same
    run decides the same everywhere.
    """
    tokens = args.epochs * sum(lengths)
    operations = 4 * sum(p.numel() for p in blocks.parameters()) * tokens
    pays = operations > COMPILE_PAYS_ABOVE.get(args.device.partition(":")[0], math.inf)
    if args.use_compile == "yes" or (args.use_compile == "auto" and pays):
        blocks.compile()
        if distributed.is_main():
            print("compiling: the first steps take minutes; a resumed run ends close to, not in, the same bits")


def open_prompt(args, tokenizer, rows: Sequence[Row]) -> Prompt:
    """The prompt for the labels of the training rows, in the language of their texts."""
    template = choose_template(rows) if args.template == "auto" else args.template
    return build_prompt(tokenizer, labels_of(rows), template, args.max_seq_len)


def rows_fingerprint(rows: Sequence[Row]) -> str:
    """SHA-256 over titles, texts and labels in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(f"{row.title}\0{row.text}\0{row.label}\0".encode())
    return digest.hexdigest()


def artifact_path(args, model: MiniMindForCausalLM) -> Path:
    return args.save_dir / f"{args.save_name}_{model.config.hidden_size}.safetensors"


def describe(
    method: str, settings: dict, model: MiniMindForCausalLM, prompt: Prompt, train_rows: Sequence[Row]
) -> Description:
    """The description of the artifact to be; its fields but `run` also identify the run to its checkpoints."""
    return Description(
        method=method,
        settings=settings,
        labels=list(prompt.labels),
        template=prompt.template,
        max_seq_len=prompt.max_seq_len,
        base=model.fingerprint,
        tokenizer=tokenizer_fingerprint(prompt.tokenizer),
        run={"train_rows": rows_fingerprint(train_rows)},
    )


def identity_of(description: Description, val_rows: Sequence[Row], args) -> dict:
    """What a checkpoint of this run must agree with."""
    return {
        **asdict(description),
        "val_rows": rows_fingerprint(val_rows),
        "dtype": str(compute_dtype(args.dtype, args.device)),
    }


def save_run(args, model: torch.nn.Module, path: Path, description: Description, progress: Progress) -> None:
    """Write the artifact with what is known of its run; the main process writes."""
    if not distributed.is_main():
        return
    trained = trained_tensors(model)
    description.run |= {
        "seed": args.seed,
        "arguments": {name: str(value) for name, value in sorted(vars(args).items())},
        "validation": progress.history,
        "best_epoch": progress.best_epoch + 1,
        "seconds": round(progress.seconds, 1),
        "trained_parameters": sum(p.numel() for p in trained.values()),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }
    save_artifact(path, trained, description)


def print_report(path: Path, description: Description, extra: Sequence[Path]) -> None:
    """The end of a training run: what was trained, how well it validates, where it lies."""
    kept = description.run["validation"][description.run["best_epoch"] - 1]
    print(
        f"{description.method}: {description.run['trained_parameters']:,} trained parameters, "
        f"{description.run['seconds']:.0f} s; kept epoch {description.run['best_epoch']}: "
        f"validation accuracy {kept['accuracy']:.3f}, macro-F1 {kept['macro_f1']:.3f}"
    )
    for file in (path, *extra):
        print(f"  {file}")
