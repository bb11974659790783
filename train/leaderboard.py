"""Every artifact of a base side by side: the table and the plot of `eval_llm_metrics.py --compare`."""

import json
from collections.abc import Sequence
from pathlib import Path

from dataset.rows import Row
from model.artifact import read_artifact, write_atomically
from model.checkpoint import CheckpointError, find_weight, load_minimind
from train.classifiers import artifact_classifier, base_classifier
from train.evaluation import evaluate, honest_lines

FOLDERS = ("lora", "adapter", "prompt_tuning", "projection_head")


def compare(args, train_rows: Sequence[Row], rows: Sequence[Row]) -> list[dict]:
    """Evaluate every artifact below `args.out_dir` that belongs to the base; print, plot and write the leaderboard.

    Raises:
        CheckpointError: there is none.
    """
    fingerprint = load_minimind(find_weight(args.weight, args.hidden_size)).fingerprint
    lines = []
    for path in sorted(path for folder in FOLDERS for path in (args.out_dir / folder).glob("*.safetensors")):
        if path.stem.endswith("_merged"):
            continue
        _, description = read_artifact(path)
        if description.base != fingerprint:
            print(f"left out {path}: it belongs to another base")
            continue
        classifier, _ = artifact_classifier(args, description.method, "", str(path), {})
        figures = evaluate(classifier, rows)
        lines.append(
            {
                "name": f"{description.method} ({path.stem})",
                **{key: figures[key] for key in ("accuracy", "interval", "macro_f1", "ece", "texts_per_second")},
                "trained_parameters": figures["trained_parameters"],
                "file_kb": path.stat().st_size / 1000,
                "seconds": description.run["seconds"],
            }
        )
    if not lines:
        raise CheckpointError(f"no artifact of this base below {args.out_dir}: train one, or say `make methods`")
    frozen = evaluate(base_classifier(args, train_rows), rows)
    shared = ("accuracy", "interval", "macro_f1", "ece", "texts_per_second", "trained_parameters")
    lines.append({"name": "frozen base", **{key: frozen[key] for key in shared}})
    lines.append({"name": "frozen base, calibrated", **frozen["calibrated"], "trained_parameters": 0})
    for name, figures in honest_lines(train_rows, rows).items():
        shown = {"majority": "majority class", "tfidf_logreg": "TF-IDF + logistic regression"}[name]
        lines.append({"name": shown, **figures})
    lines.sort(key=lambda line: -line["accuracy"])
    print(leaderboard_table(lines))
    report = args.report or args.out_dir / "leaderboard.json"
    write_atomically(report, json.dumps(lines, indent=1).encode())
    picture = report.with_suffix(".png")
    plot_leaderboard(lines, picture)
    print(f"  {report}\n  {picture}")
    return lines


def leaderboard_table(lines: Sequence[dict]) -> str:
    """The leaderboard as text."""

    def cell(line: dict, key: str, form: str, width: int) -> str:
        return f"{format(line[key], form) if key in line else '-':>{width}}"

    width = max(len(line["name"]) for line in lines)
    rows = [
        f"{'':<{width}} {'accuracy':>9} {'95 % interval':>16} {'macro-F1':>9} {'ECE':>6} {'trained':>9} {'file kB':>8} "
        f"{'train s':>8} {'texts/s':>8}"
    ]
    for line in lines:
        low, high = line["interval"]
        rows.append(
            f"{line['name']:<{width}} {line['accuracy']:>9.3f} {f'{low:.3f} to {high:.3f}':>16} "
            f"{line['macro_f1']:>9.3f} {cell(line, 'ece', '.3f', 6)} {cell(line, 'trained_parameters', ',', 9)} "
            f"{cell(line, 'file_kb', '.0f', 8)} {cell(line, 'seconds', '.0f', 8)} "
            f"{cell(line, 'texts_per_second', '.0f', 8)}"
        )
    return "\n".join(rows)


def plot_leaderboard(lines: Sequence[dict], path: Path) -> None:
    """Draw accuracies with their intervals as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 1 + 0.45 * len(lines)), layout="constrained")
    axes = figure.subplots()
    for place, line in enumerate(reversed(lines)):
        low, high = line["interval"]
        axes.plot([low, high], [place, place], color="C0" if "seconds" in line else "C7", linewidth=2)
        axes.plot(line["accuracy"], place, "o", color="C0" if "seconds" in line else "C7")
    axes.set_yticks(range(len(lines)), [line["name"] for line in reversed(lines)])
    axes.set(xlabel="accuracy, 95 % interval", xlim=(0, 1))
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=120)
