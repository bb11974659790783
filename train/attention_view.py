"""What `attentionvisualize.ipynb` draws: a classifier's attention over one text, with names for every position.

    reading = read(classifier, row)         # numbers: `model/attention.py`
    plot_head(reading, layer=3, head=0)     # pictures

The instruction and label list in front of the text are one column, `instruction`: their weights are summed.
"""

import html
import subprocess
import sys
from argparse import Namespace
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from dataset.classification_dataset import Example, collate
from dataset.rows import Row
from model import attention
from model.artifact import read_artifact
from train.classifiers import artifact_classifier, base_classifier
from train.evaluation import Classifier

ROOT = Path(__file__).resolve().parent.parent
INSTRUCTION = "instruction"


@dataclass(frozen=True)
class Reading:
    """Attention of one forward, the instruction's columns summed to one.

    Attributes:
        names: the T' positions as text.
        weights: (L, N, T', T'), rows sum to 1; the instruction's row is that of its last token.
        rollout: (T', T'), the weights followed through all layers, before any columns were summed.
        reader: where the prediction is read off: the last position of the prompt, or `<cls>`.
        text: the positions of the text's own tokens.
        answer: the positions from which the tokens of a generated answer were predicted; empty without one.
        answer_names: those tokens.
        label, probability: what the classifier predicts.
    """

    names: list[str]
    weights: torch.Tensor
    rollout: torch.Tensor
    reader: int
    text: range
    answer: range
    answer_names: list[str]
    label: str
    probability: float

    @property
    def relevance(self) -> torch.Tensor:
        """(L, T'): what the prediction is read from, the mean of all heads of each layer."""
        return self.weights.mean(1)[:, self.reader]


def open_classifier(weight: str, artifact: Path | None, rows: Sequence[Row], like: Classifier | None = None):
    """The classifier of an artifact, or with None the frozen base (with the labels of `rows`, or those of `like`)."""
    args = Namespace(weight=weight, hidden_size=None, num_hidden_layers=None, tokenizer=None, allow_mismatch=False)
    args.device, args.dtype, args.template, args.max_seq_len = "cpu", "float32", "auto", 512
    if artifact is None:
        return base_classifier(args, rows, like and like.prompt)
    return artifact_classifier(args, read_artifact(artifact)[1].method, "", str(artifact), {})[0]


def train_if_missing(artifact: Path, script: str, *flags: object) -> None:
    """Make `artifact` by one of the train scripts, unless it is there.

    Raises:
        RuntimeError: the script failed; the message ends with what it said.
    """
    if artifact.is_file():
        return
    places = ["--save_dir", artifact.parent, "--checkpoint_dir", artifact.parent / "resume"]
    name = ["--save_name", artifact.stem.rpartition("_")[0]]
    command = [sys.executable, str(ROOT / script), *map(str, [*places, *name, *flags])]
    result = subprocess.run(command, capture_output=True, text=True)
    if result.returncode:
        raise RuntimeError(f"{script} ended with {result.returncode}: {result.stderr[-1000:]}")


def read(classifier: Classifier, row: Row, with_answer: bool = False) -> Reading:
    """Run a classifier over one text and keep what it attends to.

    Args:
        with_answer: also let it answer in words, greedily; not for the projection head, which has none.

    Raises:
        ValueError: an answer was asked of a classifier without words.
    """
    if with_answer and not classifier.speaks:
        raise ValueError(f"{classifier.method} answers with a class, not in words")
    prompt, tokenizer = classifier.prompt, classifier.prompt.tokenizer
    text_ids = prompt.text_ids(row)
    virtual = next((n for n, token in enumerate(prompt.prefix_ids) if token != tokenizer.pad_token_id), 0)
    ids = [*prompt.prefix_ids, *text_ids, *prompt.suffix_ids]
    answer_ids = []
    if with_answer:
        longest = max(map(len, prompt.label_ids))
        answer_ids = attention.greedy_continuation(classifier.model, ids, tokenizer.eos_token_id, longest)
    weights = attention.attention_weights(classifier.model, [*ids, *answer_ids[:-1]])
    own = attention.token_labels(tokenizer, text_ids) + attention.token_labels(tokenizer, prompt.suffix_ids)
    answer_names = attention.token_labels(tokenizer, answer_ids)
    instruction = len(prompt.prefix_ids) - virtual
    first = [f"v{n + 1}" for n in range(virtual)] if classifier.speaks else ["<cls>"]
    names = first + [INSTRUCTION] * bool(instruction) + own + answer_names[:-1]
    start = len(first) + bool(instruction)
    chance = text_probabilities(classifier, [text_ids])[0]
    return Reading(
        names=names,
        weights=_join_columns(weights, len(first), instruction),
        rollout=_join_columns(attention.rollout(weights), len(first), instruction),
        reader=start + len(own) - 1 if classifier.speaks else 0,
        text=range(start, start + len(text_ids)),
        answer=range(start + len(own) - 1, start + len(own) - 1 + len(answer_ids)),
        answer_names=answer_names,
        label=prompt.labels[int(chance.argmax())],
        probability=float(chance.max()),
    )


def _join_columns(weights: torch.Tensor, first: int, count: int) -> torch.Tensor:
    """Sum `count` columns from `first` on to one, and keep the last of their rows."""
    if count == 0:
        return weights
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
    """(rows, 2): what the predicted label loses when `share` of the words go, the most attended ones and random ones.

    How much a word is attended to is the mean over all layers and heads, read where the prediction is read off.
    """
    effects = []
    for number, row in enumerate(rows):
        reading, text_ids = read(classifier, row), classifier.prompt.text_ids(row)
        spans = attention.word_spans(classifier.prompt.tokenizer, text_ids)
        relevance = reading.relevance.mean(0)[reading.text.start : reading.text.stop]
        words = attention.word_relevance(relevance, spans)
        probabilities = lambda texts: text_probabilities(classifier, texts)  # noqa: E731
        effects.append(attention.erasure_effect(probabilities, text_ids, spans, words, share, draws, seed=number))
    return torch.tensor(effects)


# -- pictures ---------------------------------------------------------------------------------------------------------


def plot_head(reading: Reading, layer: int, head: int) -> Figure:
    """One head as a heat map: each row is a position that reads, each column one that is read."""
    size = 2.5 + 0.17 * len(reading.names)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(reading.weights[layer, head].numpy(), cmap="magma_r", vmin=0, vmax=1)
    _name_axis(axes, "x", reading.names)
    _name_axis(axes, "y", reading.names)
    axes.set(xlabel="is read", ylabel="reads", title=f"layer {layer}, head {head}")
    figure.colorbar(image, ax=axes, shrink=0.6, label="attention weight")
    return figure


def plot_grid(matrices: Sequence[torch.Tensor], titles: Sequence[str], title: str) -> Figure:
    """Heat maps (T', T') side by side, four a row, without names: the patterns at a glance.

    The colour shows the square root of the weight, so that weak patterns stay visible.
    """
    rows = -(-len(matrices) // 4)
    figure, grid = plt.subplots(rows, 4, figsize=(11, 2.9 * rows), layout="constrained", squeeze=False)
    for axes in grid.flat:
        axes.set_axis_off()
    for axes, matrix, name in zip(grid.flat, matrices, titles, strict=False):
        axes.imshow(matrix.sqrt().numpy(), cmap="magma_r", vmin=0, vmax=1)
        axes.set_axis_on()
        axes.set(title=name, xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def plot_rows(values: torch.Tensor, row_names: Sequence[str], reading: Reading, title: str) -> Figure:
    """A heat map of a few readers (rows, T') over all named positions."""
    width, height = 2.5 + 0.17 * values.shape[1], 1.6 + 0.28 * len(row_names)
    figure, axes = plt.subplots(figsize=(width, height), layout="constrained")
    image = axes.imshow(values.numpy(), cmap="magma_r", vmin=0, aspect="auto")
    _name_axis(axes, "x", reading.names[: values.shape[1]])
    axes.set_yticks(range(len(row_names)), [_plain(name) for name in row_names])
    axes.set_title(title)
    figure.colorbar(image, ax=axes, label="attention weight")
    return figure


def plot_by_layer(reading: Reading, title: str) -> Figure:
    """What the prediction is read from in each layer, the mean of its heads."""
    layers = [f"layer {layer}" for layer in range(len(reading.weights))]
    return plot_rows(reading.relevance, layers, reading, title)


def plot_answer(reading: Reading) -> Figure:
    """Step by step through a generated answer: what each of its tokens is read from, the mean of all layers and heads.

    Raises:
        ValueError: the reading holds no answer.
    """
    if not reading.answer_names:
        raise ValueError("this reading holds no answer: read(classifier, row, with_answer=True)")
    steps = reading.weights.mean((0, 1))[reading.answer.start : reading.answer.stop]
    names = [f"{step + 1}: {name}" for step, name in enumerate(reading.answer_names)]
    return plot_rows(steps, names, reading, "what each token of the answer is read from")


def coloured_text_html(reading: Reading, relevance: torch.Tensor, title: str) -> str:
    """The text with each token as dark as its weight in `relevance` (T',), the heaviest token of the text darkest.

    A last line says what share of the weight fell on the text at all.
    """
    values = relevance[reading.text.start : reading.text.stop]
    strongest = float(values.max()) or 1.0
    spans = []
    for position, value in zip(reading.text, values.tolist(), strict=True):
        name = reading.names[position]
        shown = "" if name == attention.CONTINUED else name
        colour = f"background:rgba(214,96,30,{value / strongest:.3f});padding:1px 2px;border-radius:3px"
        spans.append(f'<span style="{colour}" title="{value:.4f}">{html.escape(shown)}</span>')
    share = f"{float(values.sum()):.0%} of the weight lies on the text"
    style = "line-height:2;max-width:900px;margin:8px 0"
    prediction = f"{reading.label} ({reading.probability:.2f})"
    return (
        f'<div style="{style}"><b>{html.escape(title)}: {html.escape(prediction)}</b><br>{" ".join(spans)}'
        f"<br><i>{share}</i></div>"
    )


def plot_faithfulness(effects: torch.Tensor) -> Figure:
    """Mean loss of probability by erasing the most attended and random words, with 95 % bootstrap intervals."""
    generator = torch.Generator().manual_seed(0)
    draws = torch.randint(len(effects), (1000, len(effects)), generator=generator)
    means = effects[draws].mean(1)  # (1000, 2)
    low, high = torch.quantile(means, torch.tensor([0.025, 0.975]), dim=0)
    middle = effects.mean(0)
    figure, axes = plt.subplots(figsize=(6, 2.2), layout="constrained")
    axes.barh(
        ["most attended", "random"], middle, xerr=torch.stack([middle - low, high - middle]), color=["#d6601e", "#999"]
    )
    axes.invert_yaxis()
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set(xlabel="loss of the predicted label's probability", title=f"erasing words, {len(effects)} texts")
    axes.spines[["top", "right"]].set_visible(False)
    return figure


def _name_axis(axes, which: str, names: Sequence[str]) -> None:
    rotation = {"rotation": 90} if which == "x" else {}
    ticks = axes.set_xticks if which == "x" else axes.set_yticks
    ticks(range(len(names)), [_plain(name) for name in names], fontsize=8, **rotation)


def _plain(name: str) -> str:
    return name.replace("$", r"\$")
