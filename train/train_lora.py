"""Fine-tune a MiniMind base for classification with LoRA, the rank of each layer chosen from its gradients.

    python train/train_lora.py                                      # adaptive rank, bundled base and data
    python train/train_lora.py --rank 16 --epochs 15 --rank_eval_steps 0        # the same rank everywhere
    python train/train_lora.py --data_path train.csv --val_path val.csv --from_weight full_sft
    torchrun --nproc_per_node 2 train/train_lora.py                 # several processes, one or many machines

Writes the artifact out/lora/lora_classifier_<hidden>.safetensors and beside it its rank map (JSON), the spectra and the
learning curve (PNG).
"""

import json
import sys
from itertools import chain, islice
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.classification_dataset import load_splits, token_batches, training_steps
from model.artifact import write_atomically
from model.model_lora import ALL_TARGETS, ATTENTION_TARGETS, apply_lora, target_layers, uniform_rank_map
from model.rank_selection import mean_gradients, plot_spectra, rank_report, read_rank_map, select_ranks
from train import arguments, distributed, setup
from train.language_task import LanguageTask
from train.resume import checkpoint_path, read_checkpoint_identity
from train.run_log import plot_learning_curve
from train.trainer import fit


def parse_arguments(argv: list[str] | None = None):
    parser = arguments.build_parser(__doc__)
    lora = parser.add_argument_group("LoRA")
    lora.add_argument("--rank", type=arguments.positive_int, default=8, help="rank of every layer without selection")
    lora.add_argument("--alpha", type=float, help="scale is alpha / rank; the layer's own rank, scale 1, if not given")
    lora.add_argument(
        "--lora_targets",
        default=",".join(name.removesuffix("_proj") for name in ATTENTION_TARGETS),
        help="comma-separated, of " + ",".join(name.removesuffix("_proj") for name in ALL_TARGETS),
    )
    lora.add_argument("--rank_eval_steps", type=int, default=30, help="batches for rank selection; 0 skips it")
    lora.add_argument("--svd_tau", type=arguments.share, default=0.95, help="share of gradient energy a rank must hold")
    lora.add_argument(
        "--svd_k", type=arguments.positive_int, default=64, help="singular values computed; the largest rank"
    )
    lora.add_argument("--svd_q", type=int, default=2, help="power iterations of the randomized SVD")
    lora.add_argument("--rank_map", type=Path, help="JSON of layer names and ranks, instead of a selection")
    arguments.add_base_arguments(parser, "--from_weight")
    arguments.add_training_arguments(
        parser, "out/lora", "lora_classifier", epochs=10, learning_rate=5e-3, word_dropout=0.2
    )
    return parser.parse_args(argv)


def choose_rank_map(args, model, task: LanguageTask, targets) -> dict[str, int]:
    """The rank of every target layer: from the checkpoint, from a file, uniform, or by selection, with its report."""
    saved = read_checkpoint_identity(checkpoint_path(args)) if args.from_resume else None
    if saved and saved["method"] == "lora":
        return saved["settings"]["rank_map"]
    if args.rank_map:
        return read_rank_map(args.rank_map)
    if args.rank_eval_steps <= 0:
        return uniform_rank_map(model, args.rank, targets)
    steps = islice(training_steps(task.lengths, args.batch_size, args.seed, epoch=0), args.rank_eval_steps)
    parts = chain.from_iterable(token_batches(task.lengths, args.tokens_per_forward, rows) for rows in steps)
    gradients = mean_gradients(model, target_layers(model, targets), map(task.batch, parts), task.loss)
    spectra = select_ranks(gradients, args.svd_tau, args.svd_k, args.svd_q, args.seed)
    if distributed.is_main():
        print(rank_report(spectra, model, args.svd_tau, args.rank))
        args.save_dir.mkdir(parents=True, exist_ok=True)
        plot_spectra(spectra, args.svd_tau, args.save_dir / f"{args.save_name}.ranks.png")
    return {spectrum.name: spectrum.rank for spectrum in spectra}


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    args = parse_arguments(argv)
    args.device = distributed.start(args.device)
    targets = tuple(f"{name.removesuffix('_proj')}_proj" for name in args.lora_targets.split(","))

    # 2. Data
    train_rows, val_rows = load_splits(args.data_path, args.val_path, args.seed)

    # 3. Base
    model, tokenizer = setup.open_base(args, args.from_weight, train_rows)
    prompt = setup.open_prompt(args, tokenizer, train_rows)
    task = LanguageTask(model, prompt, train_rows, val_rows, args.device, args.word_dropout)

    # 4. LoRA
    rank_map = choose_rank_map(args, model, task, targets)
    arguments.seed_initialisation(args.seed)
    apply_lora(model, rank_map, args.alpha)
    setup.compile_blocks(args, model.model, task.lengths)

    # 5. Fit
    settings = {"rank_map": rank_map, "alpha": args.alpha}
    description = setup.describe("lora", settings, model, prompt, train_rows)
    identity = setup.identity_of(description, val_rows, args)
    progress = fit(model, task.loss, task.batch, task.lengths, task.validate, args, identity)

    # 6. Save
    path = setup.artifact_path(args, model)
    setup.save_run(args, model, path, description, progress)

    # 7. Report
    if distributed.is_main():
        rank_map_path = path.with_suffix(".rank_map.json")
        write_atomically(rank_map_path, json.dumps(rank_map, indent=1).encode())
        curve = path.with_suffix(".curve.png")
        plot_learning_curve(args, curve)
        setup.print_report(path, description, extra=[rank_map_path, curve])


if __name__ == "__main__":
    arguments.run_script(main)
