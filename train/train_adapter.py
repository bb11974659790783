"""Fine-tune a MiniMind base for classification with bottleneck adapters, two in every block.

    python train/train_adapter.py                          # bundled base and data
    python train/train_adapter.py --middle_features 16 --data_path train.csv --val_path val.csv

Writes the artifact out/adapter/adapter_classifier_<hidden>.safetensors and beside it the learning curve (PNG).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.classification_dataset import load_splits
from model.artifact import trained_tensors
from model.model_adapter import adapter_parameter_count, apply_adapter
from train import arguments, distributed, setup
from train.language_task import LanguageTask
from train.run_log import plot_learning_curve
from train.trainer import fit


def parse_arguments(argv: list[str] | None = None):
    parser = arguments.build_parser(__doc__)
    adapter = parser.add_argument_group("adapter")
    adapter.add_argument("--middle_features", type=arguments.positive_int, default=8, help="width of the bottleneck")
    arguments.add_base_arguments(parser, "--from_weight")
    arguments.add_training_arguments(
        parser, "out/adapter", "adapter_classifier", epochs=10, learning_rate=5e-3, word_dropout=0.2
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    args = parse_arguments(argv)
    args.device = distributed.start(args.device)

    # 2. Data
    train_rows, val_rows = load_splits(args.data_path, args.val_path, args.seed)

    # 3. Base
    model, tokenizer = setup.open_base(args, args.from_weight, train_rows)
    prompt = setup.open_prompt(args, tokenizer, train_rows)
    task = LanguageTask(model, prompt, train_rows, val_rows, args.device, args.word_dropout)

    # 4. Adapters
    arguments.seed_initialisation(args.seed)
    apply_adapter(model, args.middle_features)
    if distributed.is_main():
        count = sum(p.numel() for p in trained_tensors(model).values())
        formula = adapter_parameter_count(model, args.middle_features)
        print(f"{count:,} trained parameters = 2 L (2 H m + H + m) = {formula:,}")
    setup.compile_blocks(args, model.model, task.lengths)

    # 5. Fit
    settings = {"middle_features": args.middle_features}
    description = setup.describe("adapter", settings, model, prompt, train_rows)
    identity = setup.identity_of(description, val_rows, args)
    progress = fit(model, task.loss, task.batch, task.lengths, task.validate, args, identity)

    # 6. Save
    path = setup.artifact_path(args, model)
    setup.save_run(args, model, path, description, progress)

    # 7. Report
    if distributed.is_main():
        curve = path.with_suffix(".curve.png")
        plot_learning_curve(args, curve)
        setup.print_report(path, description, extra=[curve])


if __name__ == "__main__":
    arguments.run_script(main)
