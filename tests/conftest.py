"""What the tests share: a tiny base with the bundled tokenizer, a few labelled rows, and a way to run the scripts."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig

from dataset.classification_dataset import BUNDLED_DATA
from dataset.rows import read_rows
from model.checkpoint import BUNDLED_BASE, load_minimind, load_tokenizer
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = Path(__file__).resolve().parent / "golden"


@pytest.fixture(autouse=True)
def one_thread():
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def tokenizer():
    return load_tokenizer(BUNDLED_BASE)


@pytest.fixture(scope="session")
def tiny_base_folder(tmp_path_factory, tokenizer) -> Path:
    """A random MiniMind2 of hidden size 64 and 2 layers, saved with the bundled tokenizer."""
    folder = tmp_path_factory.mktemp("tiny_base")
    torch.manual_seed(0)
    config = MiniMindConfig(hidden_size=64, num_hidden_layers=2, vocab_size=len(tokenizer))
    MiniMindForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny_base(tiny_base_folder) -> MiniMindForCausalLM:
    return load_minimind(tiny_base_folder)


@pytest.fixture(scope="session")
def rows():
    """Forty labelled rows of the bundled training data."""
    return read_rows(BUNDLED_DATA / "train.jsonl")[:40]


@pytest.fixture(scope="session")
def data_files(tmp_path_factory, rows) -> dict[str, Path]:
    """The same rows as files: 24 to train on, 8 to validate, 8 to test."""
    folder = tmp_path_factory.mktemp("data")
    files = {}
    for name, part in (("train", rows[:24]), ("val", rows[24:32]), ("test", rows[32:40])):
        files[name] = folder / f"{name}.jsonl"
        lines = [json.dumps({"text": r.text, "title": r.title, "label": r.label}) for r in part]
        files[name].write_text("\n".join(lines) + "\n")
    return files


def llama_config(config: MiniMindConfig, **more) -> LlamaConfig:
    """The same dense MiniMind2 shape for transformers' own Llama, which PEFT can wrap."""
    return LlamaConfig(
        vocab_size=config.vocab_size,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.num_hidden_layers,
        num_attention_heads=config.num_attention_heads,
        num_key_value_heads=config.num_key_value_heads,
        rms_norm_eps=config.rms_norm_eps,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        tie_word_embeddings=True,
        **more,
    )


def run(*command: object, cwd: Path, check: bool = True, **environment: str) -> subprocess.CompletedProcess:
    """Run one of the project's scripts by its path from the root, in the folder `cwd`, on one thread."""
    script, *arguments = map(str, command)
    result = subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd,
        env={**os.environ, "OMP_NUM_THREADS": "1", **environment},
        capture_output=True,
        text=True,
    )
    if check and result.returncode:
        pytest.fail(f"{script} ended with {result.returncode}:\n{result.stdout[-2000:]}\n{result.stderr[-4000:]}")
    return result
