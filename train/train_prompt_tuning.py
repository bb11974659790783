"""Fine-tune a MiniMind base for classification with prompt tuning: trained vectors at the start of every sequence.

    python train/train_prompt_tuning.py                    # bundled base and data, 20 virtual tokens
    python train/train_prompt_tuning.py --num_virtual_tokens 50 --prompt_init vocab

Writes the artifact out/prompt_tuning/prompt_classifier_<hidden>.safetensors and beside it the learning curve (PNG).
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.classification_dataset import load_splits
from dataset.prompts import with_virtual_tokens
from model.model_prompt_tuning import INITIALISATIONS, PromptTuningModel, initial_virtual_tokens
from train import arguments, distributed, setup
from train.language_task import LanguageTask
from train.run_log import plot_learning_curve
from train.trainer import fit


def parse_arguments(argv: list[str] | None = None):
    parser = arguments.build_parser(__doc__)
    tuning = parser.add_argument_group("prompt tuning")
    tuning.add_argument("--num_virtual_tokens", type=arguments.positive_int, default=20, help="trained vectors")
    tuning.add_argument(
        "--prompt_init",
        default="text",
        choices=INITIALISATIONS,
        help="start from the task's own words, from vocabulary, or from noise (for comparison only)",
    )
    arguments.add_base_arguments(parser, "--from_weight")
    arguments.add_training_arguments(parser, "out/prompt_tuning", "prompt_classifier", epochs=15, learning_rate=1e-2)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    args = parse_arguments(argv)
    args.device = distributed.start(args.device)

    # 2. Data
    train_rows, val_rows = load_splits(args.data_path, args.val_path, args.seed)

    # 3. Base
    base, tokenizer = setup.open_base(args, args.from_weight, train_rows)
    plain_prompt = setup.open_prompt(args, tokenizer, train_rows)

    # 4. Virtual tokens
    text_ids = list(plain_prompt.prefix_ids)
    start = initial_virtual_tokens(base, args.num_virtual_tokens, args.prompt_init, text_ids, args.seed)
    model = PromptTuningModel(base, start)
    prompt = with_virtual_tokens(plain_prompt, args.num_virtual_tokens)
    task = LanguageTask(model, prompt, train_rows, val_rows, args.device, args.word_dropout)
    setup.compile_blocks(args, base.model, task.lengths)

    # 5. Fit
    settings = {"num_virtual_tokens": args.num_virtual_tokens, "prompt_init": args.prompt_init}
    description = setup.describe("prompt_tuning", settings, base, plain_prompt, train_rows)
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
