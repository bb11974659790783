"""What a base is worth to the toolkit's users: zero-shot accuracy, and LoRA on few and on many rows of a data set.

    python tests/benchmarks/probe_base.py model/minimind_mini --train train.jsonl --test test.jsonl

For every number of rows in `--rows` and every one of `--seeds` samples, stratified training rows are drawn, LoRA is
trained on them by `train/train_lora.py` (flags behind `--` go there as they stand), and the test rows are scored.
Beside it stand, on the very same rows, TF-IDF with logistic regression over words and over the base's tokens, and
logistic regression on the frozen base's last hidden states: of the text alone, their mean and the last one, and of the
whole prompt, the one from which it would be answered, where LoRA starts. Prints a table of means and writes every run
to `--report` (JSON lines, appended as they come).
"""

import argparse
import json
import random
import statistics
import sys
import tempfile
from collections import defaultdict
from pathlib import Path

import torch
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dataset.baselines import tfidf_predictions
from dataset.classification_dataset import collate, encode, token_batches
from dataset.prompts import build_prompt, choose_template, labels_of, text_only_prompt
from dataset.rows import Row, read_rows
from model.artifact import read_artifact
from model.checkpoint import load_minimind, load_tokenizer
from model.methods import attach
from train import train_lora
from train.scoring import language_scorer, score_examples


def parse_arguments(argv: list[str] | None = None) -> tuple[argparse.Namespace, list[str]]:
    argv = list(sys.argv[1:] if argv is None else argv)
    cut = argv.index("--") if "--" in argv else len(argv)
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("base", type=Path, help="Hugging Face folder of the base, its tokenizer in it")
    parser.add_argument("--train", required=True, help="labelled rows to draw from (.jsonl or .csv)")
    parser.add_argument("--test", required=True, help="labelled rows to score")
    parser.add_argument("--rows", type=int, nargs="*", default=[100, 700, 5600], help="training rows, all at most")
    parser.add_argument("--seeds", type=int, default=3, help="samples of each size")
    parser.add_argument("--max_seq_len", type=int, default=256, help="tokens of prompt and label")
    parser.add_argument("--without_lora", action="store_true", help="only what needs no training")
    parser.add_argument("--report", type=Path, default=Path("out/probe.jsonl"))
    return parser.parse_args(argv[:cut]), argv[cut + 1 :]


def stratified_sample(rows: list[Row], count: int, seed: int) -> list[Row]:
    """`count` rows, of every class as near to its share as whole rows allow; all rows where `count` exceeds them."""
    groups = defaultdict(list)
    for row in rows:
        groups[row.label].append(row)
    for label in sorted(groups):
        random.Random(f"{seed}:{label}").shuffle(groups[label])
    shares = {row: place / len(group) for group in groups.values() for place, row in enumerate(group)}
    return sorted(rows, key=lambda row: shares[row])[:count]


def accuracy(predictions: list[str], rows: list[Row]) -> float:
    return sum(found == row.label for found, row in zip(predictions, rows, strict=True)) / len(rows)


def label_accuracy(model, prompt, rows: list[Row]) -> float:
    """Share of rows whose best label, by the log-probability of its tokens, is the right one."""
    scores = score_examples(language_scorer(model, prompt), encode(rows, prompt), prompt, "cpu")
    return accuracy([prompt.labels[index] for index in scores.argmax(-1).tolist()], rows)


def token_tfidf_accuracy(tokenizer, sample: list[Row], test: list[Row]) -> float:
    """`tfidf_predictions` with the base's tokens in the place of words: what the tokenizer alone leaves to be found."""
    features = TfidfVectorizer(sublinear_tf=True, analyzer=lambda row: tokenizer.tokenize(f"{row.title}\n{row.text}"))
    linear = make_pipeline(features, LogisticRegression(C=10, max_iter=1000))
    linear.fit(sample, [row.label for row in sample])
    return accuracy(list(linear.predict(test)), test)


@torch.inference_mode()
def hidden_states(model, prompt, rows: list[Row]) -> dict[str, torch.Tensor]:
    """Last hidden states (N, H): of a text alone, averaged and at its last token; where a whole prompt is answered."""
    states = torch.zeros(3, len(rows), model.config.hidden_size)
    for layout in (text_only_prompt(prompt), prompt):
        examples = encode(rows, layout)
        prefix = torch.tensor(layout.prefix_ids, dtype=torch.long)
        for indices in token_batches([len(prefix) + len(example.ids) for example in examples]):
            batch = collate([examples[index] for index in indices], layout, "cpu", with_answers=False)
            ids = torch.cat([prefix.expand(len(indices), -1), batch.input_ids], dim=1)
            hidden = model.model(input_ids=ids).last_hidden_state[:, len(prefix) :]  # (B, T, H)
            end = hidden[torch.arange(len(indices)), batch.lengths - 1]
            if layout is prompt:
                states[2, indices] = end
            else:
                real = torch.arange(hidden.shape[1]) < batch.lengths[:, None]
                states[0, indices] = (hidden * real[..., None]).sum(1) / batch.lengths[:, None]
                states[1, indices] = end
    return {"mean hidden state": states[0], "last position": states[1], "answer position": states[2]}


def lora_accuracy(base: Path, rows: list[Row], test: list[Row], seed: int, max_seq_len: int, flags: list[str]) -> float:
    """Train LoRA by its script in a folder of its own, then score the test rows with the artifact."""
    with tempfile.TemporaryDirectory() as folder:
        data = Path(folder) / "train.jsonl"
        lines = [json.dumps({"text": r.text, "title": r.title, "label": r.label}) for r in rows]
        data.write_text("\n".join(lines) + "\n")
        common = ["--from_weight", base, "--data_path", data, "--seed", seed, "--max_seq_len", max_seq_len]
        places = ["--save_dir", folder, "--checkpoint_dir", f"{folder}/resume", "--save_interval", 10**9]
        train_lora.main([str(value) for value in [*common, *places, *flags]])
        path = next(Path(folder).glob("lora_classifier_*.safetensors"))
        tensors, description = read_artifact(path)
    model, tokenizer = load_minimind(base, dtype=torch.float32), load_tokenizer(base)
    prompt = build_prompt(tokenizer, description.labels, description.template, max_seq_len)
    return label_accuracy(attach(model, description, tensors, str(path)), prompt, test)


def main() -> None:
    args, flags = parse_arguments()
    train, test = read_rows(args.train), read_rows(args.test)
    model, tokenizer = load_minimind(args.base, dtype=torch.float32), load_tokenizer(args.base)
    prompt = build_prompt(tokenizer, labels_of(train), choose_template(train), args.max_seq_len)
    args.report.parent.mkdir(parents=True, exist_ok=True)
    table: dict[tuple[str, int], list[float]] = defaultdict(list)

    def note(what: str, count: int, seed: int, value: float) -> None:
        table[what, count].append(value)
        line = {"base": str(args.base), "what": what, "rows": count, "seed": seed, "accuracy": value, "flags": flags}
        with args.report.open("a") as file:
            file.write(json.dumps(line) + "\n")
        print(f"{what}, {count} rows, seed {seed}: {value:.3f}", flush=True)

    note("zero-shot", 0, 0, label_accuracy(model, prompt, test))
    test_states = hidden_states(model, prompt, test)
    for count in args.rows:
        for seed in range(args.seeds):
            sample = stratified_sample(train, count, seed)
            note("TF-IDF", count, seed, accuracy(tfidf_predictions(sample, test), test))
            note("TF-IDF of tokens", count, seed, token_tfidf_accuracy(tokenizer, sample, test))
            for what, states in hidden_states(model, prompt, sample).items():
                linear = make_pipeline(StandardScaler(), LogisticRegression(C=0.05, max_iter=1000))
                linear.fit(states, [row.label for row in sample])
                note(what, count, seed, accuracy(list(linear.predict(test_states[what])), test))
            if not args.without_lora:
                note("LoRA", count, seed, lora_accuracy(args.base, sample, test, seed, args.max_seq_len, flags))

    print(f"\n{'':<20} {'rows':>6} {'mean':>7} {'lowest':>7} {'highest':>8}")
    for (what, count), values in table.items():
        print(f"{what:<20} {count:>6} {statistics.mean(values):>7.3f} {min(values):>7.3f} {max(values):>8.3f}")


if __name__ == "__main__":
    main()
