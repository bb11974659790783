"""Evaluate the frozen base or any fine-tuned classifier, or classify texts with it.

    python eval_llm_metrics.py --lora_weight lora_classifier
    python eval_llm_metrics.py --adapter_weight adapter_classifier
    python eval_llm_metrics.py --prompt_tuning 20
    python eval_llm_metrics.py --projectionhead_cls_tuning
    python eval_llm_metrics.py --projectionhead                        # classifier merged into one file with its base
    python eval_llm_metrics.py --lora_weight lora_classifier --text "Shares rose after the bank's results."
    python eval_llm_metrics.py --lora_weight lora_classifier --input texts.csv --output labels.csv
    python eval_llm_metrics.py --compare                               # every artifact of this base, side by side

A report opens with what is easy to reach: majority class, TF-IDF with logistic regression, and the frozen base, as it
answers and once every label's mean probability over the texts is divided out (batch calibration).
"""

import json
from pathlib import Path

import llm_as_a_judge
from dataset.classification_dataset import BUNDLED_DATA
from dataset.rows import DataError, Row, read_rows
from model.artifact import write_atomically
from model.checkpoint import CheckpointError, find_weight
from train import arguments, leaderboard
from train.classifiers import artifact_classifier, base_classifier, merged_classifier
from train.evaluation import class_table, comparison_table, evaluate, frozen_lines, honest_lines, plot_confusion
from train.judge_client import JudgeError


def parse_arguments(argv: list[str] | None = None):
    parser = arguments.build_parser(__doc__)
    which = parser.add_argument_group(
        "what to evaluate: a name as it was saved, or a path; nothing means the frozen base"
    )
    which.add_argument("--lora_weight", help="LoRA artifact")
    which.add_argument("--adapter_weight", help="adapter artifact")
    which.add_argument("--prompt_tuning", type=arguments.positive_int, help="evaluate so many virtual tokens")
    which.add_argument("--prompt_weight", default="prompt_classifier", help="prompt tuning artifact")
    which.add_argument("--projectionhead_cls_tuning", action="store_true", help="evaluate the projection head")
    which.add_argument(
        "--cls_tuning_weight", default="cls_tuning_projection_head_classifier", help="projection head artifact"
    )
    which.add_argument("--projectionhead", action="store_true", help="evaluate a merged base and classifier")
    which.add_argument("--merged_weight", default="cls_tuning_projection_head_classifier", help="merged file")
    which.add_argument("--compare", action="store_true", help="every artifact found, side by side")
    which.add_argument("--rank", type=arguments.positive_int, help="checked: the largest rank of the LoRA artifact")
    which.add_argument("--middle_features", type=arguments.positive_int, help="checked against the adapter artifact")
    arguments.add_base_arguments(parser, "--weight")
    data = parser.add_argument_group("data and output")
    data.add_argument("--data_path", default=str(BUNDLED_DATA / "test.jsonl"), help="labelled rows to test on")
    data.add_argument("--train_path", default=str(BUNDLED_DATA / "train.jsonl"), help="rows for the honest lines")
    data.add_argument("--max_seq_len", type=arguments.positive_int, default=512, help="tokens, for the frozen base")
    data.add_argument("--template", default="auto", choices=("auto", "en", "zh"), help="for the frozen base")
    data.add_argument("--out_dir", type=Path, default=Path("out"), help="where artifacts lie")
    data.add_argument("--report", type=Path, help="JSON report; by default beside the artifact")
    data.add_argument("--predictions", type=Path, help="also write one JSON line a text")
    data.add_argument("--text", help="classify this text and print the probabilities")
    data.add_argument("--input", type=Path, help="classify the texts of a .jsonl or .csv file ...")
    data.add_argument("--output", type=Path, help="... into this .jsonl file")
    judge = parser.add_argument_group("LLM as a judge")
    judge.add_argument("--llm_as_a_judge", action="store_true", help="let a large model judge the predictions")
    llm_as_a_judge.add_judge_arguments(judge)
    args = parser.parse_args(argv)
    if (args.input is None) != (args.output is None):
        parser.error("--input and --output go together")
    return args


def open_classifier(args, train_rows):
    """The classifier that the command line names, and the file it came from (None for the frozen base)."""
    named = [
        ("lora", "lora", args.lora_weight),
        ("adapter", "adapter", args.adapter_weight),
        ("prompt_tuning", "prompt_tuning", args.prompt_weight if args.prompt_tuning else None),
        ("projection_head", "projection_head", args.cls_tuning_weight if args.projectionhead_cls_tuning else None),
    ]
    chosen = [(method, folder, name) for method, folder, name in named if name]
    if len(chosen) + args.projectionhead > 1:
        raise CheckpointError(f"one classifier at a time: {', '.join(m for m, _, _ in chosen)} were asked for")
    if args.projectionhead:
        return merged_classifier(args)
    if not chosen:
        return base_classifier(args, train_rows), None
    given = {"rank": args.rank, "middle_features": args.middle_features, "num_virtual_tokens": args.prompt_tuning}
    return artifact_classifier(args, *chosen[0], given)


def write_predictions(path: Path, rows: list[Row], labels: list[str], predictions, chances) -> None:
    """One JSON line a text: text, title, gold label where known, prediction, probabilities."""
    lines = []
    for row, prediction, chance in zip(rows, predictions, chances, strict=True):
        fields = {"text": row.text, "title": row.title, "label": row.label, "prediction": prediction}
        fields["probabilities"] = dict(zip(labels, chance, strict=True))
        lines.append(json.dumps(fields, ensure_ascii=False) + "\n")
    write_atomically(path, "".join(lines).encode())


def write_report(path: Path, report: dict) -> None:
    write_atomically(path, json.dumps(report, ensure_ascii=False, indent=1).encode())


def classify(args, classifier) -> None:
    """`--text` and `--input`: labels and probabilities for texts without labels."""
    rows = read_rows(args.input, need_labels=False) if args.input else [Row(args.text, None, source="--text")]
    if not args.input and not args.text.strip():
        raise DataError("--text is empty")
    chances = classifier.scores(rows, progress_bar=bool(args.input)).softmax(-1)
    labels = list(classifier.prompt.labels)
    predictions = [labels[index] for index in chances.argmax(-1).tolist()]
    if args.input:
        write_predictions(args.output, rows, labels, predictions, [[round(p, 6) for p in c] for c in chances.tolist()])
        print(f"{len(rows)} texts -> {args.output}")
        return
    print(predictions[0])
    for chance, label in sorted(zip(chances[0].tolist(), labels, strict=True), reverse=True):
        print(f"  {chance:7.4f}  {label}")


def main(argv: list[str] | None = None) -> None:
    args = parse_arguments(argv)
    train_rows = read_rows(args.train_path)
    args.weight = str(find_weight(args.weight, args.hidden_size))  # once, since it prints what it falls back on
    if args.compare:
        leaderboard.compare(args, train_rows, read_rows(args.data_path))
        return
    classifier, source = open_classifier(args, train_rows)
    if args.text is not None or args.input:
        classify(args, classifier)
        return

    rows = read_rows(args.data_path)
    figures = evaluate(classifier, rows, progress_bar=True)
    lines = honest_lines(train_rows, rows)
    # The frozen base answers to the same labels in the same template.
    frozen = figures if source is None else evaluate(base_classifier(args, train_rows, classifier.prompt), rows)
    lines |= frozen_lines(frozen)
    predictions, chances = figures.pop("predictions"), figures.pop("probabilities")
    report = {**figures, "baselines": lines, "artifact": source and str(source), "data_path": args.data_path}
    report["run"] = classifier.details

    shown = {"majority class": lines["majority"], "TF-IDF + logistic regression": lines["tfidf_logreg"]}
    shown |= {"frozen base": lines["frozen_base"], "frozen base, calibrated": lines["frozen_base_calibrated"]}
    if source is not None:
        shown[figures["method"]] = figures
    print(comparison_table(shown))
    print(f"\n{figures['method']} on {figures['n']} texts\n{class_table(figures)}")
    print(f"expected calibration error {figures['ece']:.3f}, perplexity of the gold label {figures['perplexity']:.3f}")
    if figures["generation_accuracy"] is not None:
        print(
            f"free greedy answers: accuracy {figures['generation_accuracy']:.3f}, "
            f"{figures['invalid_rate']:.1%} name no label"
        )
    print(f"{figures['texts_per_second']:.0f} texts a second")

    report_path = args.report or (source or args.out_dir / "frozen_base").with_suffix(".report.json")
    picture = report_path.with_suffix(".confusion.png")
    write_report(report_path, report)
    plot_confusion(figures, picture)
    print(f"  {report_path}\n  {picture}")
    if args.predictions:
        write_predictions(args.predictions, rows, list(classifier.prompt.labels), predictions, chances)
        print(f"  {args.predictions}")
    if args.llm_as_a_judge:  # last: what was measured is on disk by then, whatever the judge's server says
        judged = [
            {"text": row.text, "title": row.title, "label": row.label, "prediction": prediction}
            for row, prediction in zip(rows, predictions, strict=True)
        ]
        report["judge"] = llm_as_a_judge.run_judge(judged, list(classifier.prompt.labels), args)
        llm_as_a_judge.print_report(report["judge"])
        write_report(report_path, report)
        if report["judge"].get("errors"):
            raise JudgeError(f"{report['judge']['errors']} texts could not be judged; run it again for these alone")


if __name__ == "__main__":
    arguments.run_script(main)
