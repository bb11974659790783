"""The train scripts as a user runs them: killed and resumed, on two processes, with bad input; always the same bits."""

import hashlib
import json
import random
import subprocess
import sys
import time

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file

from dataset.classification_dataset import Batch
from model.artifact import read_artifact
from model.checkpoint import compute_dtype
from tests.conftest import ROOT, run
from train import arguments
from train.setup import compile_blocks
from train.trainer import fit

METHODS = {
    "lora": ("lora", "lora_classifier", ["--rank_eval_steps", "3"]),
    "adapter": ("adapter", "adapter_classifier", []),
    "prompt_tuning": ("prompt_tuning", "prompt_classifier", ["--num_virtual_tokens", "4"]),
    "projection_head": ("projection_head", "cls_tuning_projection_head_classifier", []),
}


def command(method, base, data, *more) -> list:
    """A tiny run: 24 rows, batches of 4, 2 epochs of two passes (12 steps), a checkpoint every second step."""
    flags = ["--from_weight", base, "--allow_mismatch", "--data_path", data["train"], "--val_path", data["val"]]
    flags += ["--max_seq_len", 96, "--epochs", 2, "--min_epoch_steps", 9, "--batch_size", 4]
    flags += ["--save_interval", 2, "--log_interval", 1]
    return [f"train/train_{method}.py", *flags, *METHODS[method][2], *more]


def artifact(method, folder):
    where, name, _ = METHODS[method]
    return folder / "out" / where / f"{name}_64.safetensors"


def checkpoint(method, folder):
    return folder / "checkpoints" / f"{METHODS[method][1]}_resume.safetensors"


def bits(path) -> str:
    """SHA-256 over names and bytes of all tensors."""
    digest = hashlib.sha256()
    for name, tensor in sorted(load_file(path).items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


@pytest.fixture(scope="session")
def clean_runs(tmp_path_factory, tiny_base_folder, data_files):
    """One uninterrupted run of every method, made when it is first asked for."""
    folders = {}

    def folder_of(method):
        if method not in folders:
            folders[method] = tmp_path_factory.mktemp(method)
            run(*command(method, tiny_base_folder, data_files), cwd=folders[method])
        return folders[method]

    return folder_of


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_killed_and_resumed_runs_end_in_the_same_bits(method, clean_runs, tiny_base_folder, data_files, tmp_path):
    clean = clean_runs(method)
    # Start-up takes most of a tiny run: kills are aimed at the time after the first checkpoint appears.
    kills = 20 if method == "lora" else 2
    rng = random.Random(method)
    arguments = command(method, tiny_base_folder, data_files, "--from_resume", 1)
    killed = attempts = 0
    while killed < kills:
        folder = tmp_path / str(attempts)
        folder.mkdir()
        attempts += 1
        assert attempts < 10 * kills, "nearly every run ends before its kill"
        begin = time.perf_counter()
        script, *flags = map(str, arguments)
        process = subprocess.Popen(
            [sys.executable, str(ROOT / script), *flags],
            cwd=folder,
            env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(folder)},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        while not checkpoint(method, folder).exists() and process.poll() is None:
            assert time.perf_counter() - begin < 120
            time.sleep(0.005)
        time.sleep(rng.uniform(0, 0.25))
        process.kill()
        if process.wait() == 0:  # it had ended by itself: that is no kill
            continue
        killed += 1
        result = run(*arguments, cwd=folder)
        assert "resumed from" in result.stdout
        assert bits(artifact(method, folder)) == bits(artifact(method, clean))
        assert bits(checkpoint(method, folder)) == bits(checkpoint(method, clean))
        log = [json.loads(line) for line in next((folder / "out").glob("*/*.log.jsonl")).read_text().splitlines()]
        assert [line["step"] for line in log if "loss" in line] == list(range(24))
        assert [line["val_epoch"] for line in log if "val_epoch" in line] == [0, 1]


def test_few_rows_are_passed_over_again_until_an_epoch_has_its_updates(clean_runs):
    log = [
        json.loads(line) for line in next((clean_runs("lora") / "out").glob("*/*.log.jsonl")).read_text().splitlines()
    ]
    places = [(line["epoch"], line["in_epoch"]) for line in log if "loss" in line]
    assert places == [(epoch, step + 1) for epoch in range(2) for step in range(12)]


def test_resuming_a_finished_run_changes_nothing_and_another_run_is_refused(clean_runs, tiny_base_folder, data_files):
    folder = clean_runs("lora")
    before = bits(artifact("lora", folder)), bits(checkpoint("lora", folder))
    run(*command("lora", tiny_base_folder, data_files, "--from_resume", 1), cwd=folder)
    assert (bits(artifact("lora", folder)), bits(checkpoint("lora", folder))) == before
    changed = command("lora", tiny_base_folder, data_files, "--from_resume", 1, "--learning_rate", "0.5")
    result = run(*changed, cwd=folder, check=False)
    assert result.returncode == 4
    assert "learning_rate was 0.005, is now 0.5" in result.stderr and "Traceback" not in result.stderr
    assert bits(artifact("lora", folder)) == before[0]


@pytest.mark.slow
@pytest.mark.parametrize("method", METHODS)
def test_two_processes_equal_one_with_the_same_global_batch(method, clean_runs, tiny_base_folder, data_files, tmp_path):
    one, two = tmp_path / "one", tmp_path / "two"
    one.mkdir(), two.mkdir()
    exact = ["--dtype", "float32"]  # so that another order of summing is all that may differ
    arguments = command(method, tiny_base_folder, data_files, *exact)
    run(*arguments, "--accumulation_steps", 2, cwd=one)
    script, *flags = map(str, arguments)
    launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    result = subprocess.run(
        [*launch, str(ROOT / script), *flags],
        cwd=two,
        env={"PATH": "/usr/bin:/bin", "OMP_NUM_THREADS": "1", "HOME": str(two)},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert bits(artifact(method, two)) == bits(artifact(method, one))
    histories = [read_artifact(artifact(method, folder))[1].run["validation"] for folder in (one, two)]
    # Each row is scored once; which rows pad which differs, so the loss may differ in its last digit.
    for first, second in zip(*histories, strict=True):
        assert first == pytest.approx(second, rel=1e-5)
    # A batch of 8 in one piece sums in another order: equal within rounding, but for dropout.
    if method != "projection_head":
        halves, whole = tmp_path / "halves", tmp_path / "whole"
        halves.mkdir(), whole.mkdir()
        # Ranks are chosen from so many batches, here from twice as many rows: the same map makes the runs comparable.
        same_ranks = ["--rank_map", artifact(method, one).with_suffix(".rank_map.json")] if method == "lora" else []
        arguments += ["--word_dropout", 0, *same_ranks]
        run(*arguments, "--accumulation_steps", 2, cwd=halves)
        # Only prompt tuning leaves no words out by itself.
        assert (bits(artifact(method, halves)) == bits(artifact(method, one))) == (method == "prompt_tuning")
        run(*arguments, "--batch_size", 8, cwd=whole)
        expected, found = load_file(artifact(method, halves)), load_file(artifact(method, whole))
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.parametrize("method", ["lora", "adapter"])
def test_a_batch_in_parts_ends_where_the_whole_does(method, tiny_base_folder, data_files, tmp_path):
    ends = []
    for tokens in (4096, 200):
        folder = tmp_path / str(tokens)
        folder.mkdir()
        flags = ["--dtype", "float32", "--batch_size", 8, "--tokens_per_forward", tokens]
        run(*command(method, tiny_base_folder, data_files, *flags), cwd=folder)
        ends.append(load_file(artifact(method, folder)))
    assert any(not torch.equal(ends[1][name], tensor) for name, tensor in ends[0].items())  # it was in parts
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-5, rtol=1e-3)


@pytest.mark.slow
def test_a_compiled_run_ends_near_the_eager_one(tiny_base_folder, data_files, tmp_path):
    ends = []
    for choice in ("0", "yes"):
        folder = tmp_path / choice
        folder.mkdir()
        flags = ["--dtype", "float32", "--epochs", 1, "--rank_eval_steps", 0, "--use_compile", choice]
        result = run(*command("lora", tiny_base_folder, data_files, *flags), cwd=folder)
        assert ("compiling" in result.stdout) == (choice == "yes")
        ends.append(load_file(artifact("lora", folder)))
    for name, tensor in ends[0].items():
        torch.testing.assert_close(ends[1][name], tensor, atol=1e-4, rtol=1e-2)


def test_auto_compiles_only_a_run_that_is_long_enough(capsys):
    class Arguments:
        use_compile, epochs, device = "auto", 10, "cpu"

    compiled = []
    blocks = torch.nn.Linear(1000, 5000, bias=False)  # five million parameters
    blocks.compile = lambda: compiled.append(True)
    compile_blocks(Arguments, blocks, [100] * 5600)  # AG News: 1.1e14 operations
    assert not compiled and not capsys.readouterr().out
    compile_blocks(Arguments, blocks, [1000] * 5600)
    assert compiled and "compiling" in capsys.readouterr().out
    Arguments.use_compile = "no"
    compile_blocks(Arguments, blocks, [1000] * 5600)
    assert len(compiled) == 1
    Arguments.use_compile, Arguments.device = "auto", "cuda:0"
    compile_blocks(Arguments, blocks, [1000] * 5600)
    assert len(compiled) == 1


@pytest.mark.parametrize("can, expected", [([], "float32"), (["avx512_bf16"], "bfloat16"), (["amx_bf16"], "bfloat16")])
def test_auto_takes_bfloat16_where_the_cpu_multiplies_it(can, expected, monkeypatch):
    monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx2": True, **dict.fromkeys(can, True)})
    assert compute_dtype("auto", "cpu") == getattr(torch, expected)
    assert compute_dtype("float32", "cpu") == torch.float32 and compute_dtype("bfloat16", "cpu") == torch.bfloat16


def test_the_head_trains_without_some_words(clean_runs, tiny_base_folder, data_files, tmp_path):
    run(*command("projection_head", tiny_base_folder, data_files, "--word_dropout", 0), cwd=tmp_path)
    clean = clean_runs("projection_head")
    assert bits(artifact("projection_head", tmp_path)) != bits(artifact("projection_head", clean))


def test_word_dropout_of_everything_is_refused(tiny_base_folder, data_files, tmp_path):
    result = run(*command("lora", tiny_base_folder, data_files, "--word_dropout", 1), cwd=tmp_path, check=False)
    assert result.returncode == 2 and "1 is not at least 0 and below 1" in result.stderr


def test_without_room_for_its_cache_the_head_ends_in_the_same_bits(clean_runs, tiny_base_folder, data_files, tmp_path):
    run(*command("projection_head", tiny_base_folder, data_files, "--cache_gb", 0), cwd=tmp_path)
    clean = clean_runs("projection_head")
    assert bits(artifact("projection_head", tmp_path)) == bits(artifact("projection_head", clean))


def test_artifact_says_all_and_rank_map_is_reused(clean_runs, tiny_base_folder, data_files, tmp_path):
    path = artifact("lora", clean_runs("lora"))
    tensors, description = read_artifact(path)
    assert description.method == "lora" and len(description.labels) >= 2 and description.template == "en"
    assert description.max_seq_len == 96 and len(description.base) == len(description.tokenizer) == 64
    assert description.run["trained_parameters"] == sum(t.numel() for t in tensors.values())
    assert len(description.run["validation"]) == 2 and description.run["versions"]["torch"]
    assert path.stat().st_mode & 0o044  # readable by others, as any file
    beside = path.with_suffix(".rank_map.json")
    assert json.loads(beside.read_text()) == description.settings["rank_map"]
    assert path.with_suffix(".curve.png").stat().st_size > 1000
    other_order = tmp_path / "map.json"
    other_order.write_text(json.dumps(dict(sorted(description.settings["rank_map"].items(), reverse=True))))
    run(*command("lora", tiny_base_folder, data_files, "--rank_map", other_order), cwd=tmp_path)
    assert bits(artifact("lora", tmp_path)) == bits(path)
    with safe_open(path, "pt") as file:
        assert all(".lora." in name for name in file.keys())  # noqa: SIM118


@pytest.mark.parametrize(
    ("content", "code", "message"),
    [
        ('{"text": "x", "label": "a"}\n{"text": \n', 3, "bad.jsonl:2: broken JSON"),
        ('{"text": "x", "label": "a"}\n{"text": "y", "label": "a"}\n', 3, "every row has the label 'a'"),
        ('{"text": "x", "label": "a"}\n{"text": "y"}\n', 3, "bad.jsonl:2: `label` is missing"),
        ('{"text": "", "label": "a"}\n', 3, "bad.jsonl:1: `text` is empty"),
    ],
)
def test_bad_data_ends_in_one_line_and_writes_nothing(content, code, message, tiny_base_folder, data_files, tmp_path):
    (tmp_path / "bad.jsonl").write_text(content)
    arguments = command("lora", tiny_base_folder, {"train": "bad.jsonl", "val": data_files["val"]})
    result = run(*arguments, cwd=tmp_path, check=False)
    assert result.returncode == code
    assert message in result.stderr and "Traceback" not in result.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["bad.jsonl"]


def test_wrong_base_and_shape_are_refused(tiny_base_folder, data_files, tmp_path):
    without_override = [str(a) for a in command("lora", tiny_base_folder, data_files) if a != "--allow_mismatch"]
    result = run(*without_override, cwd=tmp_path, check=False)
    assert result.returncode == 4 and "no better than chance" in result.stderr
    result = run(*command("lora", tiny_base_folder, data_files, "--hidden_size", 512), cwd=tmp_path, check=False)
    assert result.returncode == 4 and "has hidden_size 64, but 512 was given" in result.stderr
    result = run(*command("lora", "out/nothing.pth", data_files), cwd=tmp_path, check=False)
    assert result.returncode == 4 and "'out/nothing.pth': no such file" in result.stderr


def test_non_finite_loss_stops_before_the_step_and_names_the_rows(tiny_base_folder, data_files, tmp_path):
    result = run(*command("lora", tiny_base_folder, data_files, "--learning_rate", "1e30"), cwd=tmp_path, check=False)
    assert result.returncode == 5
    assert "not finite" in result.stderr or "nothing was updated" in result.stderr
    assert not artifact("lora", tmp_path).exists()


class StepCounter(torch.nn.Module):
    """A model whose only parameter grows a little with every step: its value says which state was kept."""

    def __init__(self):
        super().__init__()
        self.value = torch.nn.Parameter(torch.zeros(1))


@pytest.mark.parametrize(
    ("rows", "accuracies", "epochs", "best"),
    [
        # Of ten rows one or two more or fewer say nothing: the last epoch is kept, and nothing ends early.
        (10, [0.8, 0.7, 0.7, 0.8, 0.7, 0.7], 6, 5),
        (10, [1.0, 0.9, 0.9, 0.9, 0.9, 0.9], 6, 5),
        (3, [1.0, 2 / 3, 2 / 3, 2 / 3, 2 / 3, 2 / 3], 6, 5),
        # Of ten thousand a tenth is a real loss.
        (10_000, [0.8, 0.7, 0.7, 0.8, 0.7, 0.7], 3, 0),
        (10_000, [0.7, 0.8, 0.799, 0.7, 0.7, 0.7], 5, 2),
        # Each epoch is held against the best one, not against the one before.
        (100, [0.8, 0.77, 0.74, 0.71, 0.68, 0.65], 4, 1),
    ],
)
def test_an_earlier_epoch_is_kept_only_where_it_is_better_beyond_chance(rows, accuracies, epochs, best, tmp_path):
    parser = arguments.build_parser("")
    arguments.add_training_arguments(parser, str(tmp_path), "counter", epochs=6, learning_rate=0.1)
    args = parser.parse_args(["--patience", "2", "--min_epoch_steps", "1", "--checkpoint_dir", str(tmp_path)])
    model, states = StepCounter(), []

    def validate():
        states.append(model.value.item())
        return {"rows": rows, "accuracy": accuracies[len(states) - 1], "macro_f1": 0.0, "loss": 1.0}

    def loss(batch):
        return -model.value.sum(), 1

    progress = fit(model, loss, lambda indices: Batch(None, None, None, None, None, []), [5] * 8, validate, args, {})
    assert (len(states), progress.best_epoch) == (epochs, best)
    assert model.value.item() == states[best]
    assert len(set(states)) == len(states)
