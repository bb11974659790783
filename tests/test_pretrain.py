"""Pre-training: its loss is the plain one, and a small run from a corpus writes a base that loads."""

import json

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from model.checkpoint import load_minimind, load_tokenizer
from tests.conftest import run
from train.pretrain_base import learning_rate_factor
from train.pretrain_corpus import TokenSequence, pack
from train.pretrain_loss import ChunkedCrossEntropy, ContextPrediction, chunk_loss


@pytest.mark.parametrize("positions", [3, ChunkedCrossEntropy.CHUNK, ChunkedCrossEntropy.CHUNK + 1])
@pytest.mark.parametrize("count", [1, 3])
def test_cross_entropy_in_chunks_equals_the_plain_one(positions, count):
    torch.manual_seed(0)
    hidden, head = torch.randn(positions, 8, requires_grad=True), torch.randn(20, 8, requires_grad=True)
    targets, weights = torch.randint(20, (positions, count)), torch.rand(positions)
    found = 2 * ChunkedCrossEntropy.apply(hidden, head, targets, weights, chunk_loss)
    plain = [F.cross_entropy(hidden @ head.t(), column, reduction="none") for column in targets.t()]
    expected = 2 * (sum(plain) / count * weights).sum()
    torch.testing.assert_close(found, expected)
    pairs = zip(torch.autograd.grad(found, (hidden, head)), torch.autograd.grad(expected, (hidden, head)), strict=True)
    for mine, plain in pairs:
        torch.testing.assert_close(mine, plain, atol=1e-5, rtol=1e-4)


def test_context_is_drawn_from_within_reach_and_never_from_a_template():
    ids = torch.arange(2 * 41).view(2, 41)  # every token once, so that a target tells where it stood
    weights = torch.ones(2, 41)
    weights[:, 10:22] = 0  # a template
    counts = torch.ones(82)
    counts[30] = 1e9
    context = ContextPrediction(8, counts, markers=3, reach=(6, 4))
    targets, position_weights = context.draw(ids, weights, torch.Generator().manual_seed(0))
    assert targets.shape == (2 * 10, context.DRAWN)
    seen = set()
    for row, (drawn, weight) in enumerate(zip(targets, position_weights, strict=True)):
        window, position = row // 10, row % 10 * context.EVERY
        allowed = {41 * window + i for i in range(max(position - 6, 0), min(position + 4, 40) + 1) if not 10 <= i < 22}
        allowed -= {0, 1, 2}
        assert weight == bool(allowed)
        if weight:
            assert set(drawn.tolist()) <= allowed
            seen |= set(drawn.tolist())
    assert 30 not in seen and len(seen) > 40
    assert (position_weights == 0).sum() == 2  # from position 16 all in reach is template, in either window


def test_the_learning_rate_warms_up_stays_and_decays():
    factors = [learning_rate_factor(share) for share in (0, 0.005, 0.5, 0.7, 0.85, 1)]
    assert factors[0] < 0.02 and factors[2] == factors[3] == 1 and 0.4 < factors[4] < 0.6 and factors[5] < 0.01


def test_windows_hold_whole_tasks_and_all_of_the_language_in_order():
    language = [TokenSequence(np.arange(100, 400, dtype=np.uint16), np.ones(300, np.float16))]
    lengths = [5, 9, 14, 7, 30, 11, 4, 8]  # of tasks of one token each, repeated; 30 is longer than a window
    tasks = [TokenSequence(np.full(n, i, np.uint16), np.full(n, 3, np.float16)) for i, n in enumerate(lengths)]
    ids, weights = pack(language, tasks, length=19, seed=0)
    assert ids.shape == weights.shape and ids.shape[1] == 20
    of_tasks = ids < 100
    assert torch.equal(weights == 3, of_tasks)
    for index, length in enumerate(lengths):
        windows = (ids == index).sum(1)
        assert windows[windows > 0].tolist() == ([length] if length <= 20 else [])  # whole, in one window
    for window in of_tasks:
        assert (window.int().diff() <= 0).all()  # language comes behind
    assert of_tasks.any(1).sum() >= 5  # spread
    assert ids[~of_tasks].tolist() == list(range(100, 100 + int((~of_tasks).sum()))) and (~of_tasks).sum() > 280
    assert not torch.equal(pack(language, tasks, length=19, seed=1)[0], ids)


def test_a_run_that_is_stopped_goes_on_and_writes_a_base(tmp_path):
    words = ["market", "river", "engine", "senate", "violin", "planet", "harvest"]
    lines = [
        json.dumps({"book": "psychology", "text": "# Part\n" + " ".join(words[(i + j) % 7] for j in range(60))})
        for i in range(120)
    ]
    (tmp_path / "corpus.jsonl").write_text("\n".join(lines))

    def command(tokens):
        shape = ["--hidden_size", 32, "--num_hidden_layers", 1, "--vocab_size", 300, "--seq_len", 32, "--tasks", 4]
        steps = ["--tokens", tokens, "--tokens_per_step", 256, "--tokens_per_micro_batch", 128, "--use_compile", 0]
        places = ["--corpus", "corpus.jsonl", "--output_dir", "base", "--work_dir", "work", "--device", "cpu"]
        return ["train/pretrain_base.py", *places, *shape, *steps, "--epochs", 2]

    assert "too few for one window" in run(*command(4000), "--seq_len", 512, cwd=tmp_path, check=False).stderr
    first = run(*command(4000), cwd=tmp_path)
    assert "resumed" not in first.stdout and "validation loss" in first.stdout
    # Too short a run for a log of its own (a line in 100 steps): the curve is drawn from what stands in the folder.
    (tmp_path / "work/log.jsonl").write_text('{"tokens": 1000, "loss": 5.0, "val_loss": 5.5}\n')
    second = run(*command(8000), cwd=tmp_path)
    assert "resumed at step 16" in second.stdout
    assert (tmp_path / "base/loss_curve.png").read_bytes().startswith(b"\x89PNG")
    model, tokenizer = load_minimind(tmp_path / "base"), load_tokenizer(tmp_path / "base")
    assert model.config.vocab_size == len(tokenizer) and model.config.hidden_size == 32
    assert next(model.parameters()).dtype == torch.bfloat16
    # A further run must not go on from the checkpoint of the first, whose model it would write.
    refused = run(*command(400), "--from_weight", "base", cwd=tmp_path, check=False).stderr
    assert "error: work/checkpoint.pt belongs to a different run: from_weight was None, is now base;" in refused
    # Further, from that base: its shape and tokenizer, whatever the flags say, and weights that start from its own.
    further = ["--from_weight", "base", "--seed", 1, "--hidden_size", 64]
    slow = ["--output_dir", "slow", "--work_dir", "work_slow", "--muon_lr", 1e-6, "--adamw_lr", 1e-6]
    run(*command(400), *further, *slow, cwd=tmp_path)
    assert load_tokenizer(tmp_path / "slow").get_vocab() == tokenizer.get_vocab()
    for name, tensor in load_minimind(tmp_path / "slow").state_dict().items():
        torch.testing.assert_close(tensor, model.state_dict()[name], atol=1e-3, rtol=1e-2)
    # The average with the base it started from; the finished run is not trained again for it.
    run(*command(4000), *further, "--output_dir", "moved", "--work_dir", "more", cwd=tmp_path)
    average = ["--output_dir", "average", "--work_dir", "more", "--from_weight_share", 0.25]
    assert "averaged with base" in run(*command(4000), *further, *average, cwd=tmp_path).stdout
    start, moved = (load_minimind(tmp_path / folder, dtype=torch.float32).state_dict() for folder in ("base", "moved"))
    assert (start["lm_head.weight"] - moved["lm_head.weight"]).abs().max() > 0.01
    for name, tensor in load_minimind(tmp_path / "average", dtype=torch.float32).state_dict().items():
        torch.testing.assert_close(tensor, 0.25 * start[name] + 0.75 * moved[name], atol=1e-3, rtol=1e-2)
