"""Train a small MiniMind2-generation base from scratch on a JSONL corpus: this makes `model/minimind_mini/`.

    python train/pretrain_base.py --corpus corpus.jsonl.xz --output_dir model/minimind_mini
    python train/pretrain_base.py --corpus mine.jsonl --output_dir out/mine --from_weight model/minimind_mini   # go on

Stop it whenever you like: run the same command again and it goes on from its last checkpoint (`--work_dir`).
One step: windows of packed tokens -> blocks -> cross-entropy of the next token and of words around, in chunks ->
gradients -> Muon and AdamW.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.rows import DataError
from model.checkpoint import load_minimind, load_tokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from train import label_reading
from train import pretrain_corpus as corpus
from train.arguments import run_script, share
from train.pretrain_loss import ChunkedCrossEntropy, ContextPrediction, chunk_loss
from train.pretrain_output import average_with, export, load_checkpoint, plot_loss, run_identity, save_checkpoint


def parse_arguments(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--corpus", type=Path, required=True, help="JSONL of {book, text}, also .xz or .gz")
    parser.add_argument("--output_dir", type=Path, required=True, help="Hugging Face folder to write")
    parser.add_argument("--work_dir", type=Path, default=Path("out/pretrain"), help="checkpoint and log")
    parser.add_argument("--epochs", type=int, default=6, help="passes for which tasks are drawn (default 6)")
    parser.add_argument("--tokens", type=float, default=60e6, help="to train on, at most all epochs (default 60e6)")
    parser.add_argument(
        "--from_weight",
        type=Path,
        help="train this base further, with its tokenizer; without it one is made: the next three flags, and "
        "--corpus_embeddings, are for that alone",
    )
    parser.add_argument("--hidden_size", type=int, default=256)
    parser.add_argument("--num_hidden_layers", type=int, default=5)
    parser.add_argument("--vocab_size", type=int, default=12800)
    parser.add_argument(
        "--from_weight_share",
        type=share,
        default=0.0,
        help="write the average of the result and --from_weight, this much of it the latter (default 0)",
    )
    parser.add_argument("--seq_len", type=int, default=256, help="tokens a window; doubled for the last quarter")
    parser.add_argument("--tokens_per_step", type=int, default=8192)
    parser.add_argument("--tokens_per_micro_batch", type=int, default=4096)
    parser.add_argument("--muon_lr", type=float, default=0.02, help="learning rate of the matrices (default 0.02)")
    parser.add_argument("--adamw_lr", type=float, default=2e-3, help="of embeddings and norms (default 2e-3)")
    parser.add_argument("--tasks", type=int, default=15000, help="label-reading tasks an epoch; 0 leaves them out")
    parser.add_argument(
        "--task_kinds", nargs="+", default=["headings", "subjects"], choices=label_reading.KINDS, help="of tasks"
    )
    parser.add_argument("--answer_weight", type=float, default=4.0, help="loss weight of a task's answer tokens")
    parser.add_argument(
        "--context_weight", type=float, default=0.5, help="of predicting words around a position; 0: next token alone"
    )
    parser.add_argument(
        "--context_reach", type=int, nargs=2, default=[64, 64], metavar=("BACK", "AHEAD"), help="of it, tokens"
    )
    parser.add_argument("--corpus_embeddings", type=int, default=1, choices=(0, 1), help="start from co-occurrences")
    parser.add_argument("--use_compile", type=int, default=1, choices=(0, 1))
    parser.add_argument("--dtype", default="bfloat16", choices=("float32", "bfloat16"), help="of matrix products")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if args.from_weight_share and not args.from_weight:
        parser.error(f"--from_weight_share {args.from_weight_share} needs --from_weight")
    return args


def prepare(args: argparse.Namespace):
    """Tokenizer, language and label-reading tasks to train on, and held-out language (one document in a hundred)."""
    documents = corpus.read_corpus(args.corpus)
    if args.from_weight:
        tokenizer = load_tokenizer(args.from_weight)
    else:
        tokenizer = corpus.train_tokenizer(documents, args.vocab_size)
    training, held_out = corpus.split_held_out(documents)
    language = corpus.language_sequences(training, tokenizer)
    tasks = label_reading.label_reading_sequences(
        training, tokenizer, args.tasks * args.epochs, args.answer_weight, args.seed, args.task_kinds
    )
    held_out = corpus.language_sequences(held_out, tokenizer)
    held_out_tokens = sum(len(sequence.ids) for sequence in held_out)
    if held_out_tokens <= args.seq_len:
        raise DataError(
            f"{args.corpus}: the held-out documents (one in a hundred) have {held_out_tokens} tokens, "
            f"too few for one window of --seq_len {args.seq_len}"
        )
    return tokenizer, language, tasks, held_out


def build_model(args: argparse.Namespace, tokenizer, sequences) -> MiniMindForCausalLM:
    if args.from_weight:
        return load_minimind(args.from_weight, args.device, torch.float32).train()
    torch.manual_seed(args.seed)
    config = MiniMindConfig(
        hidden_size=args.hidden_size,
        num_hidden_layers=args.num_hidden_layers,
        vocab_size=len(tokenizer),
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    model = MiniMindForCausalLM(config)
    for name, parameter in model.named_parameters():
        if parameter.dim() == 2:
            torch.nn.init.normal_(parameter, std=0.02)
        # Blocks begin as the identity: what they add grows from zero.
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    if args.corpus_embeddings:
        vectors = corpus.corpus_embeddings(sequences, len(tokenizer), args.hidden_size)
        model.model.embed_tokens.weight.data.copy_(vectors)
    return model.to(args.device)


def build_optimizers(model: MiniMindForCausalLM, context: ContextPrediction, args) -> list[torch.optim.Optimizer]:
    """Muon (https://kellerjordan.github.io/posts/muon) for the blocks' matrices, AdamW for the rest."""
    matrices = [p for p in model.model.layers.parameters() if p.dim() == 2]
    rest = [p for p in model.parameters() if not any(p is m for m in matrices)]
    rest += context.parameters()
    return [
        torch.optim.Muon(matrices, lr=args.muon_lr, weight_decay=0.01, momentum=0.95),
        torch.optim.AdamW(rest, lr=args.adamw_lr, betas=(0.9, 0.95), weight_decay=0.0),
    ]


def learning_rate_factor(progress: float) -> float:
    """Warm-up over the first 1 %, flat, then a straight decay to 0 over the last 30 %."""
    return min(progress / 0.01 + 0.01, 1.0, (1.0 - progress) / 0.3 + 1e-3)


def hidden_states(blocks, ids, args) -> torch.Tensor:
    """Last hidden states (B, T, H) of all but the last of ids (B, T + 1), in the type of the products."""
    with torch.autocast(args.device.split(":")[0], torch.bfloat16, enabled=args.dtype == "bfloat16"):
        return blocks(ids[:, :-1]).last_hidden_state.to(getattr(torch, args.dtype))


def language_loss(hidden, head_weight, ids, weights, loss_of_chunk) -> torch.Tensor:
    """Sum over tokens of weight times cross-entropy of the next one; hidden (B, T, H), ids and weights (B, T + 1)."""
    targets, token_weights = ids[:, 1:].reshape(-1, 1), weights[:, 1:].flatten()
    return ChunkedCrossEntropy.apply(hidden.flatten(0, 1), head_weight, targets, token_weights, loss_of_chunk)


@torch.no_grad()
def validation_loss(blocks, loss_of_chunk, head_weight, held_out, args) -> float:
    """Nats a token of next-token prediction."""
    ids, weights = corpus.pack(held_out, [], args.seq_len, seed=0)
    ids, weights = ids.to(args.device, torch.long), weights.to(args.device)
    rows = args.tokens_per_micro_batch // args.seq_len
    if len(ids) > rows:  # whole micro-batches only: another shape would be compiled anew
        ids, weights = ids[: len(ids) // rows * rows], weights[: len(weights) // rows * rows]
    total = sum(
        float(language_loss(hidden_states(blocks, i, args), head_weight, i, w, loss_of_chunk))
        for i, w in zip(ids.split(rows), weights.split(rows), strict=True)
    )
    return total / float(weights[:, 1:].sum())


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    tokenizer, language, tasks, held_out = prepare(args)
    model = build_model(args, tokenizer, language)
    counts = corpus.token_counts(language, model.config.vocab_size)
    context = ContextPrediction(model.config.hidden_size, counts, len(corpus.MARKERS), args.context_reach)
    optimizers = build_optimizers(model, context.to(args.device), args)
    checkpoint, log_file = args.work_dir / "checkpoint.pt", args.work_dir / "log.jsonl"
    identity = run_identity(args, language)
    state = load_checkpoint(checkpoint, model, context, optimizers, identity)
    all_tokens = args.epochs * sum(len(s.ids) for s in language) + sum(len(s.ids) for s in tasks)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters, {all_tokens:,} tokens in {args.epochs} epochs")
    last_token = min(args.tokens, all_tokens)

    blocks, loss_of_chunk = model.model, chunk_loss
    if args.use_compile:
        blocks, loss_of_chunk = (torch.compile(f, dynamic=False) for f in (blocks, loss_of_chunk))
    head_weight, generator = model.lm_head.weight, torch.Generator(args.device)

    bar = tqdm(total=int(last_token), initial=state["tokens"], unit="tok", unit_scale=True, mininterval=5)
    progress = 0.0
    while state["epoch"] < args.epochs and progress < 1:
        progress = state["tokens"] / last_token
        length = args.seq_len * (2 if progress > 0.75 else 1)
        epoch_tasks = tasks[state["epoch"] :: args.epochs]
        ids, weights = corpus.pack(language, epoch_tasks, length, seed=args.seed + state["epoch"])
        per_step, per_micro = args.tokens_per_step // length, args.tokens_per_micro_batch // length
        # Windows are counted in tokens, so that a change of length continues at the same place of the epoch.
        for first in range(state["window"] // length, len(ids) - per_step + 1, per_step):
            begin = time.perf_counter()
            progress = state["tokens"] / last_token
            if progress >= 1 or (progress > 0.75 and length == args.seq_len):
                break
            step_ids = ids[first : first + per_step].to(args.device, torch.long)
            step_weights = weights[first : first + per_step].to(args.device)
            normalizer = float(step_weights[:, 1:].sum())
            generator.manual_seed(args.seed + state["step"])
            loss = loss_of_context = 0.0
            for micro_ids, micro_weights in zip(step_ids.split(per_micro), step_weights.split(per_micro), strict=True):
                hidden = hidden_states(blocks, micro_ids, args)
                micro_loss = language_loss(hidden, head_weight, micro_ids, micro_weights, loss_of_chunk) / normalizer
                loss += micro_loss.item()
                if args.context_weight:
                    of_context = context(hidden, head_weight, micro_ids, micro_weights, generator, loss_of_chunk)
                    of_context = of_context * len(micro_ids) / per_step
                    loss_of_context += of_context.item()
                    micro_loss = micro_loss + args.context_weight * of_context
                micro_loss.backward()
            torch.nn.utils.clip_grad_norm_([*model.parameters(), *context.parameters()], 1.0, error_if_nonfinite=True)
            for optimizer, peak in zip(optimizers, (args.muon_lr, args.adamw_lr), strict=True):
                for group in optimizer.param_groups:
                    group["lr"] = peak * learning_rate_factor(progress)
                optimizer.step()
                optimizer.zero_grad(set_to_none=True)
            state["step"] += 1
            state["tokens"] += step_ids.numel() - len(step_ids)
            state["window"] = (first + per_step) * length
            state["seconds"] += time.perf_counter() - begin
            bar.update(step_ids.numel() - len(step_ids))
            if state["step"] % 100 == 0:
                held_out_loss = validation_loss(blocks, loss_of_chunk, head_weight, held_out, args)
                report = {**state, "loss": loss, "context_loss": loss_of_context, "val_loss": held_out_loss}
                args.work_dir.mkdir(parents=True, exist_ok=True)
                with log_file.open("a") as log:
                    log.write(json.dumps(report) + "\n")
                bar.set_postfix(loss=f"{loss:.3f}", val=f"{held_out_loss:.3f}")
                save_checkpoint(checkpoint, model, context, optimizers, state, identity)
        else:
            state["epoch"], state["window"] = state["epoch"] + 1, 0
    bar.close()
    final = validation_loss(blocks, loss_of_chunk, head_weight, held_out, args)
    print(f"validation loss {final:.3f} nats a token, perplexity {math.exp(final):.1f}")
    save_checkpoint(checkpoint, model, context, optimizers, state, identity)
    if args.from_weight_share:
        average_with(model, load_minimind(args.from_weight, args.device, torch.float32), args.from_weight_share)
        averaged = validation_loss(blocks, loss_of_chunk, head_weight, held_out, args)
        print(f"averaged with {args.from_weight}: validation loss {averaged:.3f} nats a token")
    export(model, tokenizer, args.output_dir)
    if log_file.exists():
        plot_loss(log_file, args.output_dir / "loss_curve.png")


if __name__ == "__main__":
    run_script(main)
