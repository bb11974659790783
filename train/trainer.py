"""The one training loop: fit and validate, on one process or many.

It never asks which method it runs. A script hands it a model whose trained parameters require gradients, a
`loss(batch) -> (summed loss, number of targets)`, a `collate(indices) -> batch`, and a `validate() -> scores`.

Randomness is stateless: the order of an epoch follows from (seed, epoch), dropout from (seed, epoch, step,
micro-batch). A run that is killed and resumed (`train/resume.py`) therefore ends in the same bits as one that was not.
"""

import hashlib
import math
import time
from collections.abc import Callable, Sequence

import torch
from tqdm import tqdm

from dataset.classification_dataset import token_batches, training_steps
from model.artifact import trained_tensors
from train import distributed
from train.resume import Progress, checkpoint_path, load_checkpoint, run_identity, save_checkpoint
from train.run_log import RunLog


def fit(
    model: torch.nn.Module,
    loss: Callable,
    collate: Callable[[Sequence[int]], object],
    lengths: Sequence[int],
    validate: Callable[[], dict],
    args,
    identity: dict,
) -> Progress:
    """Train until the last epoch or until validation gets worse; leave the best state in the model.

    The best is the latest whose accuracy is at most a standard error below the highest so far. Of few validation rows
    the highest one picks an epoch by luck, often the first, long before the learning rate has come down.

    Args:
        lengths: tokens of every training row; rows are batched by them.
        validate: returns at least `accuracy`, `loss` and the number of `rows`, the same on every process.
        args: the flags of `add_training_arguments`.
        identity: what must be the same for a checkpoint to be resumed (data, base, method, ...).

    Raises:
        FloatingPointError: a loss or gradient is not finite; nothing was updated with it.
        CheckpointError: the checkpoint belongs to a different run.
    """
    trained = trained_tensors(model)
    parameters = list(trained.values())
    optimizer = torch.optim.AdamW(parameters, lr=args.learning_rate, weight_decay=args.weight_decay)
    best = {name: p.detach().clone() for name, p in trained.items()}
    identity = {**identity, **run_identity(args, lengths)}
    checkpoint = checkpoint_path(args)
    progress = Progress()
    if args.from_resume:
        progress = load_checkpoint(checkpoint, trained, optimizer, best, identity) or progress
    log = RunLog(args, progress)
    micro_batches = args.accumulation_steps * distributed.world_size()
    texts_per_step = args.batch_size * micro_batches
    steps_per_pass = math.ceil(len(lengths) / texts_per_step)
    passes = math.ceil(args.min_epoch_steps / steps_per_pass)  # over the rows in one epoch
    steps_per_epoch = passes * steps_per_pass
    started = time.perf_counter() - progress.seconds

    bar = tqdm(total=args.epochs * steps_per_epoch, unit="step", disable=not distributed.is_main(), mininterval=1)
    bar.update(progress.epoch * steps_per_epoch + progress.step)
    while not progress.finished:
        epoch = progress.epoch
        passes_of_epoch = range(epoch * passes, (epoch + 1) * passes)
        steps = [rows for p in passes_of_epoch for rows in training_steps(lengths, texts_per_step, args.seed, p)]
        model.train()
        for rows in steps[progress.step :]:
            # -- one step: rows -> loss -> gradients -> update ---------------------------------------------------
            step = epoch * steps_per_epoch + progress.step
            total_loss = total_targets = 0.0
            for micro_batch in range(distributed.rank(), micro_batches, distributed.world_size()):
                micro_rows = rows[micro_batch::micro_batches]
                if not micro_rows:
                    continue
                torch.manual_seed(seed_of(args.seed, epoch, progress.step, micro_batch))
                # Long texts are taken a few at a time: the gradients add up to the same, in less memory and time.
                for part in token_batches(lengths, args.tokens_per_forward, micro_rows):
                    batch = collate(part)
                    part_loss, targets = loss(batch)
                    if not torch.isfinite(part_loss):
                        raise FloatingPointError(
                            f"loss {part_loss.item()} at epoch {epoch + 1}, step {progress.step + 1}; "
                            f"rows {', '.join(batch.sources[:8])}; nothing was updated"
                        )
                    part_loss.backward()
                    total_loss += part_loss.item()
                    total_targets += targets
            totals = distributed.gather((total_loss, total_targets))
            total_loss, total_targets = (sum(part) for part in zip(*totals, strict=True))
            for parameter in parameters:
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            distributed.sum_gradients(parameters)
            for parameter in parameters:  # a mean over all targets of the step, however they were spread
                parameter.grad /= total_targets
            norm = torch.nn.utils.clip_grad_norm_(parameters, args.grad_clip, error_if_nonfinite=False)
            if not torch.isfinite(norm):
                raise FloatingPointError(f"the gradient is not finite at epoch {epoch + 1}, step {progress.step + 1}")
            learning_rate = args.learning_rate * schedule(step, args.epochs * steps_per_epoch, args.warmup_ratio)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            # -------------------------------------------------------------------------------------------------
            progress.step += 1
            progress.seconds = time.perf_counter() - started
            bar.update()
            mean_loss = total_loss / total_targets
            if step % args.log_interval == 0:
                log.write(
                    step=step, epoch=epoch, in_epoch=progress.step, loss=mean_loss, lr=learning_rate, norm=norm.item()
                )
                bar.set_postfix(epoch=epoch + 1, loss=f"{mean_loss:.3f}")
            if (step + 1) % args.save_interval == 0 and progress.step < len(steps):
                save_checkpoint(checkpoint, trained, optimizer, best, progress, identity)

        model.eval()
        scores = {"epoch": epoch, **validate()}
        progress.seconds = time.perf_counter() - started
        progress.history.append(scores)
        highest = max(past["accuracy"] for past in progress.history)
        if scores["accuracy"] >= highest - accuracy_error(highest, scores["rows"]):
            progress.best_epoch = epoch  # as good as any before it, as far as these rows can tell, and trained longer
            best = {name: p.detach().clone() for name, p in trained.items()}
        progress.epoch, progress.step = epoch + 1, 0
        stale = epoch - progress.best_epoch >= args.patience
        progress.finished = progress.epoch == args.epochs or stale
        log.write(step=progress.epoch * steps_per_epoch, **{f"val_{name}": value for name, value in scores.items()})
        save_checkpoint(checkpoint, trained, optimizer, best, progress, identity)
        if distributed.is_main():
            accuracy, nats = scores["accuracy"], scores["loss"]
            bar.write(f"epoch {epoch + 1}: validation accuracy {accuracy:.3f}, loss {nats:.3f} nats a text")
            if stale and progress.epoch < args.epochs:
                bar.write(f"stopped: {args.patience} epochs worse than epoch {progress.best_epoch + 1} (--patience)")
    bar.close()
    with torch.no_grad():
        for name, parameter in trained.items():
            parameter.copy_(best[name])
    model.eval()
    log.close()
    return progress


def schedule(step: int, total: int, warmup_ratio: float) -> float:
    """Learning-rate factor of a step: a straight warm-up, then a cosine down to a tenth."""
    warmup = max(1, round(total * warmup_ratio))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, total - warmup)
    return 0.1 + 0.45 * (1 + math.cos(math.pi * progress))


def accuracy_error(accuracy: float, rows: int) -> float:
    """Standard error of an accuracy over so many rows; at least a row and a half, so that one row never decides."""
    return max(math.sqrt(accuracy * (1 - accuracy) / rows), 1.5 / rows)


def seed_of(*numbers: int) -> int:
    """A seed for torch from a few whole numbers."""
    digest = hashlib.sha256(":".join(map(str, numbers)).encode()).digest()
    return int.from_bytes(digest[:7], "big")
