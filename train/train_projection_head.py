"""Train a `<cls>` embedding and a projection head on a frozen MiniMind base: a classifier that answers directly.

    python train/train_projection_head.py                  # bundled base and data
    python train/train_projection_head.py --save_merged    # also base and classifier as one file

Writes the artifact out/projection_head/cls_tuning_projection_head_classifier_<hidden>.safetensors and beside it the
labels' numbers (label2id.json) and the learning curve (PNG).
"""

import json
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from dataset.classification_dataset import encode, load_splits
from dataset.prompts import text_only_prompt
from model.artifact import save_merged, write_atomically
from model.model_projection_head import ClsTunedModel
from train import arguments, distributed, setup
from train.run_log import plot_learning_curve
from train.scoring import score_indices, validation_scores
from train.text_cache import TextCache
from train.trainer import fit


def parse_arguments(argv: list[str] | None = None):
    parser = arguments.build_parser(__doc__)
    head = parser.add_argument_group("projection head")
    head.add_argument(
        "--cache_gb", type=float, default=4.0, help="most memory (GiB) for the frozen base's keys and values"
    )
    head.add_argument("--save_merged", action="store_true", help="also write base and classifier as one file")
    arguments.add_base_arguments(parser, "--from_weight")
    # A step on the cache costs about the same for 32 texts as for 16.
    arguments.add_training_arguments(
        parser,
        "out/projection_head",
        "cls_tuning_projection_head_classifier",
        epochs=10,
        learning_rate=2e-3,
        word_dropout=0.4,
        batch_size=32,
    )
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    # 1. Arguments
    args = parse_arguments(argv)
    args.device = distributed.start(args.device)

    # 2. Data
    train_rows, val_rows = load_splits(args.data_path, args.val_path, args.seed)

    # 3. Base
    base, tokenizer = setup.open_base(args, args.from_weight, train_rows)
    prompt = text_only_prompt(setup.open_prompt(args, tokenizer, train_rows))
    train_examples, val_examples = encode(train_rows, prompt), encode(val_rows, prompt)
    lengths = [len(example.ids) for example in train_examples]

    # 4. <cls> and head
    arguments.seed_initialisation(args.seed)
    model = ClsTunedModel(base, len(prompt.labels))
    texts = TextCache(model, train_examples, args.cache_gb, args.device)
    val_texts = TextCache(model, val_examples, args.cache_gb / 4, args.device)

    # 5. Fit
    def loss(batch):
        kept = torch.rand(len(batch.lengths), batch.text_cache.shape[4]) >= args.word_dropout  # (B, T)
        logits = model.forward_cached(batch.text_cache, batch.lengths, kept.to(args.device))
        return F.cross_entropy(logits, batch.labels, reduction="sum"), len(batch.labels)

    def validate():
        def scores_of(indices):
            batch = val_texts.batch(indices)
            return model.forward_cached(batch.text_cache, batch.lengths)

        return validation_scores(score_indices(scores_of, val_examples, len(prompt.labels)), val_examples)

    description = setup.describe("projection_head", {}, base, prompt, train_rows)
    identity = setup.identity_of(description, val_rows, args)
    progress = fit(model, loss, texts.batch, lengths, validate, args, identity)

    # 6. Save
    path = setup.artifact_path(args, model)
    setup.save_run(args, model, path, description, progress)

    # 7. Report
    if distributed.is_main():
        label2id = path.with_suffix(".label2id.json")
        numbers = {label: index for index, label in enumerate(prompt.labels)}
        write_atomically(label2id, json.dumps(numbers, ensure_ascii=False, indent=1).encode())
        curve = path.with_suffix(".curve.png")
        plot_learning_curve(args, curve)
        written = [label2id, curve]
        if args.save_merged:
            written.append(path.with_name(f"{args.save_name}_{model.config.hidden_size}_merged.safetensors"))
            save_merged(written[-1], model, description, tokenizer)
        setup.print_report(path, description, extra=written)


if __name__ == "__main__":
    arguments.run_script(main)
