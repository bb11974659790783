"""`eval_llm_metrics.py`: its commands, figures against plain formulas, artifacts in a fresh process, misfits."""

import csv
import json
import math

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sklearn.metrics import f1_score

from dataset.baselines import majority_predictions, tfidf_predictions
from dataset.classification_dataset import BUNDLED_DATA
from dataset.rows import read_rows
from model.artifact import read_artifact, read_header
from tests.conftest import run
from tests.test_training import METHODS, artifact, clean_runs, command  # noqa: F401 - a fixture
from train.classifiers import artifact_classifier
from train.evaluation import accuracy_figures, evaluate, expected_calibration_error
from train.scoring import batch_calibrated

FLAGS = {
    "lora": ["--lora_weight", "lora_classifier"],
    "adapter": ["--adapter_weight", "adapter_classifier", "--middle_features", 8],
    "prompt_tuning": ["--prompt_tuning", 4],
    "projection_head": [
        *("--projectionhead_cls_tuning", "--cls_tuning_weight", "cls_tuning_projection_head_classifier"),
    ],
}


def evaluation(base, data, *more) -> list:
    paths = ["--data_path", data["test"], "--train_path", data["train"]]
    return ["eval_llm_metrics.py", "--weight", base, "--allow_mismatch", *paths, *more]


@pytest.mark.parametrize("method", METHODS)
def test_report_and_fresh_process_agree_with_this_one(method, clean_runs, tiny_base_folder, data_files, tmp_path):  # noqa: F811
    folder = clean_runs(method)
    report, predictions = tmp_path / "report.json", tmp_path / "predictions.jsonl"
    output = run(
        *evaluation(tiny_base_folder, data_files, *FLAGS[method], "--report", report, "--predictions", predictions),
        cwd=folder,
    ).stdout
    assert output.index("majority class") < output.index("TF-IDF") < output.index("frozen base") < output.index(method)
    figures = json.loads(report.read_text())
    rows = read_rows(data_files["test"])
    written = [json.loads(line) for line in predictions.read_text().splitlines()]
    assert figures["method"] == method and figures["n"] == len(rows) == len(written)
    gold, predicted = [row.label for row in rows], [line["prediction"] for line in written]
    assert figures["accuracy"] == pytest.approx(np.mean([g == p for g, p in zip(gold, predicted, strict=True)]))
    labels = sorted({row.label for row in read_rows(data_files["train"])})
    assert figures["macro_f1"] == pytest.approx(f1_score(gold, predicted, average="macro", zero_division=0))
    assert set(figures["baselines"]) == {"majority", "tfidf_logreg", "frozen_base", "frozen_base_calibrated"}
    assert figures["texts_per_second"] > 0 and 0 <= figures["ece"] <= 1
    assert (figures["generation_accuracy"] is None) == (method == "projection_head")
    assert report.with_suffix(".confusion.png").stat().st_size > 1000

    class Arguments:
        weight, hidden_size, num_hidden_layers, tokenizer = str(tiny_base_folder), None, None, None
        device, dtype, out_dir = "cpu", "auto", folder / "out"

    classifier, path = artifact_classifier(Arguments, method, METHODS[method][0], METHODS[method][1], {})
    assert figures["trained_parameters"] == sum(t.numel() for t in read_artifact(path)[0].values())
    here = classifier.scores(rows).softmax(-1)
    there = torch.tensor([[line["probabilities"][label] for label in labels] for line in written])
    torch.testing.assert_close(here, there, atol=2e-6, rtol=0)
    again = evaluate(classifier, rows)
    assert again["generation_accuracy"] == figures["generation_accuracy"]


def test_text_and_file_are_classified(clean_runs, tiny_base_folder, data_files, tmp_path):  # noqa: F811
    folder = clean_runs("lora")
    arguments = evaluation(tiny_base_folder, data_files, *FLAGS["lora"])
    printed = run(*arguments, "--text", "A match at last.", cwd=folder).stdout.splitlines()
    chances = [float(line.split()[0]) for line in printed[-5:]]
    assert sum(chances) == pytest.approx(1, abs=1e-3) and printed[-6] == printed[-5].split()[1]
    with (tmp_path / "texts.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["text"], ["A match at last."], ["The council voted."]])
    run(*arguments, "--input", tmp_path / "texts.csv", "--output", tmp_path / "labels.jsonl", cwd=folder)
    lines = [json.loads(line) for line in (tmp_path / "labels.jsonl").read_text().splitlines()]
    assert lines[0]["prediction"] == printed[-6] and lines[0]["label"] is None and len(lines) == 2


def test_misfits_are_refused_in_one_line(clean_runs, tiny_base_folder, data_files, tmp_path):  # noqa: F811
    folder = clean_runs("lora")

    def refused(*more, code=4):
        result = run(*evaluation(tiny_base_folder, data_files, *more), cwd=folder, check=False)
        assert result.returncode == code and "Traceback" not in result.stderr
        return result.stderr

    assert "was given, but" in refused(*FLAGS["lora"], "--middle_features", 8)
    assert "train it with `python train/train_lora.py`" in refused("--lora_weight", "absent")
    adapters = clean_runs("adapter")
    assert "has middle_features 8, but 16 was given" in refused(
        "--adapter_weight", artifact("adapter", adapters), "--middle_features", 16
    )
    assert "made by adapter, not by lora" in refused("--lora_weight", artifact("adapter", adapters))
    path = artifact("lora", folder)
    tensors, _ = read_artifact(path)
    header = read_header(path)

    def altered(name, change, head=header):
        changed = dict(tensors)
        change(changed)
        save_file(changed, tmp_path / name, metadata=head)
        return refused("--lora_weight", tmp_path / name)

    first, second = sorted(tensors)[:2]
    message = altered("a.safetensors", lambda t: (t.pop(first), t.update({second: torch.zeros(3, 3)})))
    assert f"missing {first}" in message and f"{second} has shape (3, 3)" in message
    assert "not finite" in altered("b.safetensors", lambda t: t[first].fill_(math.nan))
    tensors, _ = read_artifact(path)
    description = json.loads(header["description"])
    for field, what in (("base", "another base"), ("tokenizer", "another tokenizer")):
        other = {"description": json.dumps({**description, field: "0" * 64})}
        assert what in altered("c.safetensors", lambda t: None, other)
    newer = {"description": json.dumps({**description, "format_version": 99})}
    assert "newer than this code" in altered("d.safetensors", lambda t: None, newer)
    (tmp_path / "e.safetensors").write_bytes(path.read_bytes()[:-100])
    assert "is no artifact of this project" in refused("--lora_weight", tmp_path / "e.safetensors")


def test_merged_classifier_and_comparison(tiny_base_folder, data_files, tmp_path):
    run(*command("projection_head", tiny_base_folder, data_files, "--save_merged"), cwd=tmp_path)
    run(*command("adapter", tiny_base_folder, data_files), cwd=tmp_path)
    run(*evaluation(tiny_base_folder, data_files, "--projectionhead", "--report", "m.json"), cwd=tmp_path)
    run(*evaluation(tiny_base_folder, data_files, *FLAGS["projection_head"], "--report", "s.json"), cwd=tmp_path)
    merged, separate = (json.loads((tmp_path / name).read_text()) for name in ("m.json", "s.json"))
    for name in ("accuracy", "macro_f1", "ece", "perplexity", "trained_parameters"):
        assert merged[name] == separate[name]
    label2id = json.loads(artifact("projection_head", tmp_path).with_suffix(".label2id.json").read_text())
    assert list(label2id) == separate["labels"] and list(label2id.values()) == list(range(len(label2id)))
    output = run(*evaluation(tiny_base_folder, data_files, "--compare"), cwd=tmp_path).stdout
    bases = ("frozen base  ", "frozen base, calibrated")
    for name in ("adapter (", "projection_head (", *bases, "majority class", "TF-IDF + logistic regression"):
        assert name in output
    lines = json.loads((tmp_path / "out/leaderboard.json").read_text())
    assert [line["accuracy"] for line in lines] == sorted((line["accuracy"] for line in lines), reverse=True)
    assert (tmp_path / "out/leaderboard.png").stat().st_size > 1000


def test_figures_against_formulas():
    gold = np.array([0, 1, 1, 0])
    chance = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.55, 0.45]])
    # bins of 1/15: 0.9 alone, 0.8 alone, 0.6 alone, 0.55 alone
    assert expected_calibration_error(chance, gold) == pytest.approx((0.1 + 0.2 + 0.6 + 0.45) / 4)
    figures = accuracy_figures(gold, chance.argmax(1))
    assert figures["accuracy"] == 0.75 and figures["interval"][0] < 0.75 < figures["interval"][1]


def test_calibration_takes_off_what_a_label_gets_whatever_the_text_says():
    scores = torch.tensor([[0.9, 0.1], [0.7, 0.3], [0.95, 0.05], [0.6, 0.4]]).log()
    assert scores.argmax(1).tolist() == [0, 0, 0, 0]
    calibrated = batch_calibrated(scores - 3)  # a constant says nothing
    torch.testing.assert_close(calibrated, scores - torch.tensor([3.15 / 4, 0.85 / 4]).log())
    assert calibrated.argmax(1).tolist() == [0, 1, 0, 1]


def test_sample_news_is_neither_trivial_nor_noise():
    train, val, test = (read_rows(BUNDLED_DATA / f"{name}.jsonl") for name in ("train", "val", "test"))
    assert (len(train), len(val), len(test)) == (750, 100, 200)
    grams = {}
    for name, rows in (("train", train), ("val", val), ("test", test)):
        counts = {label: sum(row.label == label for row in rows) for label in {row.label for row in rows}}
        assert len(counts) == 5 and len(set(counts.values())) == 1
        for row in rows:
            assert 40 <= len(row.text.split()) <= 80 and row.title
            words = [word.strip(".,;:!?\"'()").lower() for word in f"{row.title} {row.text}".split()]
            for start in range(len(words) - 7):
                assert grams.setdefault(tuple(words[start : start + 8]), name) == name
    predicted = tfidf_predictions(train, test)
    assert 0.75 <= np.mean([p == row.label for p, row in zip(predicted, test, strict=True)]) <= 0.97
    assert set(majority_predictions(train, test)) == {"business"}
