"""What `attentionvisualize.ipynb` asks of a classifier: its attention over one text, with names for every position.

    classifiers = open_classifiers("full_sft", ["out/lora/lora_classifier_256.safetensors"], train_rows)
    readings = {name: read(classifier, row) for name, classifier in classifiers.items()}

The numbers come from `model/attention.py`, the pictures are in `train/attention_plots.py`.
"""

import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from dataset.classification_dataset import Example, collate
from dataset.rows import Row
from model import attention
from model.artifact import read_artifact
from model.checkpoint import find_weight, load_minimind
from model.model_prompt_tuning import PromptTuningModel
from train.classifiers import SCRIPTS, artifact_classifier, base_classifier
from train.evaluation import Classifier

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION = "instruction"
BASE = "base"

# For a small artifact in about half a minute on one thread: far from what the method can do.
QUICK_FLAGS = {
    "lora": ("--rank_eval_steps", "0", "--epochs", "1", "--batch_size", "8", "--max_seq_len", "128"),
    "adapter": ("--epochs", "1", "--batch_size", "8", "--max_seq_len", "128"),
    "prompt_tuning": ("--epochs", "1", "--batch_size", "8", "--max_seq_len", "128"),
    "projection_head": ("--epochs", "3", "--max_seq_len", "128"),
}


@dataclass(frozen=True)
class Reading:
    """Attention of one forward. T' positions: all of them, or with the instruction folded to one.

    Attributes:
        names: the T' positions as text.
        weights: (L, N, T', T'), rows sum to 1; a folded instruction's row is that of its last token.
        rollout: (T', T'), the weights followed through all layers, before anything was folded.
        reader: where the prediction is read off: the last position of the prompt, or `<cls>`.
        text: the positions of the text's own tokens.
        pieces: the text in pieces of whole characters, each with its positions.
        answer: the positions from which the tokens of a generated answer were predicted; empty without one.
        answer_names: those tokens.
        label, probability: what the classifier predicts.
    """

    names: list[str]
    weights: torch.Tensor
    rollout: torch.Tensor
    reader: int
    text: range
    pieces: list[tuple[str, range]]
    answer: range
    answer_names: list[str]
    label: str
    probability: float

    @property
    def by_layer(self) -> torch.Tensor:
        """(L, T'): what the prediction is read from, the mean of all heads of each layer."""
        return self.weights.mean(1)[:, self.reader]

    @property
    def relevance(self) -> torch.Tensor:
        """(T',): the same, the mean of all layers."""
        return self.by_layer.mean(0)


def open_classifiers(weight: str, artifacts: Sequence[str], rows: Sequence[Row]) -> dict[str, Classifier]:
    """The frozen base and the classifiers of artifacts by name, in float32, in which the kernels compare best.

    Args:
        weight: the base, as `--weight` takes it.
        artifacts: paths; or a method's name for a small artifact that is trained here unless it is there.
        rows: of the training data; their labels are the base's, where there is no artifact to take them from.

    Raises:
        CheckpointError: no such artifact, or one of another base.
    """
    weight = str(find_weight(weight))
    args = Namespace(weight=weight, hidden_size=None, num_hidden_layers=None, tokenizer=None, allow_mismatch=False)
    args.device, args.dtype, args.template, args.max_seq_len = "cpu", "float32", "auto", 512
    opened = {}
    for artifact in artifacts:
        path = quick_artifact(weight, artifact) if artifact in QUICK_FLAGS else Path(artifact)
        method = read_artifact(path)[1].method
        name = path.stem if path == Path(artifact) else method
        opened[str(path) if name in opened else name] = artifact_classifier(args, method, "", str(path), {})[0]
    like = next((classifier.prompt for classifier in opened.values() if classifier.speaks), None)
    if like is None and opened:  # a projection head: its length counts no instruction
        like = replace(next(iter(opened.values())).prompt, max_seq_len=args.max_seq_len)
    return {BASE: base_classifier(args, rows, like)} | opened


def quick_artifact(weight: str, method: str, folder: Path = Path("out/attention")) -> Path:
    """A small artifact of `method` for the base `weight`, trained on the bundled data unless it is there.

    Raises:
        RuntimeError: the train script failed; the message ends with what it said.
    """
    base = load_minimind(weight)
    folder = folder / base.fingerprint[:8]
    path = folder / f"{method}_{base.config.hidden_size}.safetensors"
    if not path.is_file():
        places = ["--save_dir", str(folder), "--save_name", method, "--checkpoint_dir", str(folder / "resume")]
        command = [sys.executable, str(ROOT / SCRIPTS[method]), "--from_weight", weight, *places, *QUICK_FLAGS[method]]
        result = subprocess.run(command, capture_output=True, text=True)
        if result.returncode:
            raise RuntimeError(f"{SCRIPTS[method]} ended with {result.returncode}: {result.stderr[-1000:]}")
    return path


def read(classifier: Classifier, row: Row, with_answer: bool = False, fold: bool = True) -> Reading:
    """Run a classifier over one text and keep what it attends to.

    Args:
        with_answer: also let it answer in words, greedily; not for the projection head, which has none.
        fold: show instruction and label list in front of the text as one position, their weights summed.

    Raises:
        ValueError: an answer was asked of a classifier without words.
    """
    if with_answer and not classifier.speaks:
        raise ValueError(f"{classifier.method} answers with a class, not in words")
    model, prompt, tokenizer = classifier.model, classifier.prompt, classifier.prompt.tokenizer
    text_ids, ids = prompt.text_ids(row), prompt.prompt_ids(row)
    answer_ids = []
    if with_answer:
        longest = max(map(len, prompt.label_ids))
        answer_ids = attention.greedy_continuation(model, ids, tokenizer.eos_token_id, longest)
    weights = attention.attention_weights(model, [*ids, *answer_ids[:-1]])
    rolled = attention.rollout(weights)

    virtual = len(model.virtual_tokens) if isinstance(model, PromptTuningModel) else 0
    names = [f"virtual {n + 1}" for n in range(virtual)] if classifier.speaks else ["<cls>"]
    instruction = attention.token_labels(tokenizer, prompt.prefix_ids[virtual:])
    if fold and instruction:
        weights, rolled = (_join_columns(values, len(names), len(instruction)) for values in (weights, rolled))
        instruction = [INSTRUCTION]
    names += instruction
    start = len(names)
    answer_names = attention.token_labels(tokenizer, answer_ids)
    for part in (text_ids, prompt.suffix_ids):
        names += attention.token_labels(tokenizer, part)
    last = len(names) - 1
    chance = text_probabilities(classifier, [text_ids])[0]
    return Reading(
        names=names + answer_names[:-1],
        weights=weights,
        rollout=rolled,
        reader=last if classifier.speaks else 0,
        text=range(start, start + len(text_ids)),
        pieces=[
            (text, range(start + span.start, start + span.stop))
            for text, span in attention.text_pieces(tokenizer, text_ids)
        ],
        answer=range(last, last + len(answer_ids)),
        answer_names=answer_names,
        label=prompt.labels[int(chance.argmax())],
        probability=float(chance.max()),
    )


def _join_columns(weights: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Sum `count` columns from `first` on to one, and keep the last of their rows."""
    joined = weights[..., first : first + count].sum(-1, keepdim=True)
    columns = torch.cat([weights[..., :first], joined, weights[..., first + count :]], dim=-1)
    return torch.cat([columns[..., :first, :], columns[..., first + count - 1 :, :]], dim=-2)


@torch.inference_mode()
def text_probabilities(classifier: Classifier, texts: list[list[int]]) -> torch.Tensor:
    """(texts, C): the labels' probabilities for texts that are given as token ids."""
    prompt = classifier.prompt
    examples = [Example([*ids, *prompt.suffix_ids], None, Row("", None)) for ids in texts]
    return classifier.scorer(collate(examples, prompt, classifier.device, with_answers=False)).softmax(-1).cpu()


def faithfulness(classifier: Classifier, rows: Sequence[Row], share: float = 0.2, draws: int = 5) -> torch.Tensor:
    """(rows, 2, 2): `attention.erasure_effect` of each text, `share` of its words being erased.

    How much a word is attended to is the mean over all layers and heads, read where the prediction is read off.
    """

    def probabilities(texts):
        return text_probabilities(classifier, texts)

    effects = []
    for number, row in enumerate(rows):
        reading, text_ids = read(classifier, row), classifier.prompt.text_ids(row)
        spans = attention.word_spans(classifier.prompt.tokenizer, text_ids)
        words = attention.word_relevance(reading.relevance[reading.text.start : reading.text.stop], spans)
        effects.append(attention.erasure_effect(probabilities, text_ids, spans, words, share, draws, seed=number))
    return torch.stack(effects)


def bootstrap_interval(values: torch.Tensor, draws: int = 1000) -> tuple[torch.Tensor, torch.Tensor]:
    """The 95 % interval of the mean over texts, (rows, ...) -> low and high (...,); the same for every call."""
    generator = torch.Generator().manual_seed(0)
    chosen = torch.randint(len(values), (draws, len(values)), generator=generator)
    low, high = torch.quantile(values[chosen].mean(1), torch.tensor([0.025, 0.975]), dim=0)
    return low, high
