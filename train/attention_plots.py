"""The pictures of `attentionvisualize.ipynb`, drawn from the readings of `train/attention_view.py`.

In every heat map a row is a position that reads and a column one that is read; white is no weight.
"""

import html
from collections.abc import Sequence

import matplotlib.pyplot as plt
import torch
from matplotlib.figure import Figure

from dataset.plots import plain_labels
from train.attention_view import Reading, bootstrap_interval

COLOURS = "Blues"
ATTENDED, RANDOM = "#d6601e", "#999999"


def plot_head(reading: Reading, layer: int, head: int, name: str) -> Figure:
    """One head as a heat map with the names of all positions."""
    size = 2.5 + 0.17 * len(reading.names)
    figure, axes = plt.subplots(figsize=(size + 1, size), layout="constrained")
    image = axes.imshow(reading.weights[layer, head].numpy(), cmap=COLOURS, vmin=0, vmax=1)
    _name_columns(axes, reading.names)
    axes.set_yticks(range(len(reading.names)), plain_labels(reading.names), fontsize=8)
    axes.set(xlabel="is read", ylabel="reads", title=f"{name}: layer {layer}, head {head}")
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
        axes.imshow(matrix.sqrt().numpy(), cmap=COLOURS, vmin=0, vmax=1)
        axes.set_axis_on()
        axes.set(title=name, xticks=[], yticks=[])
    figure.suptitle(title)
    return figure


def plot_panels(
    panels: dict[str, torch.Tensor], row_names: dict[str, list[str]], columns: dict[str, list[str]]
) -> Figure:
    """Heat maps (rows, T') of a few readers over named positions, one below the other under one colour scale.

    Args:
        panels, row_names, columns: by the title of the panel.
    """
    width = 2.5 + 0.17 * max(map(len, columns.values()))
    heights = [1.2 + 0.24 * len(names) for names in row_names.values()]
    figure, grid = plt.subplots(
        len(panels), figsize=(width, sum(heights)), height_ratios=heights, layout="constrained", squeeze=False
    )
    strongest = max(float(values.max()) for values in panels.values())
    for axes, (title, values) in zip(grid.flat, panels.items(), strict=True):
        image = axes.imshow(values.numpy(), cmap=COLOURS, vmin=0, vmax=strongest, aspect="auto")
        _name_columns(axes, columns[title])
        axes.set_yticks(range(len(row_names[title])), plain_labels(row_names[title]), fontsize=8)
        axes.set_title(title, fontsize=10, loc="left")
    figure.colorbar(image, ax=grid, label="attention weight", aspect=40)
    return figure


def plot_by_layer(readings: dict[str, Reading]) -> Figure:
    """What each prediction is read from: the mean of the heads by layer, the mean of all layers, and rollout."""
    panels, rows, columns = {}, {}, {}
    for name, reading in readings.items():
        title = f"{name}: {reading.label} ({reading.probability:.2f}), read at {reading.names[reading.reader]}"
        panels[title] = torch.cat([reading.by_layer, reading.relevance[None], reading.rollout[reading.reader][None]])
        rows[title] = [f"layer {layer}" for layer in range(len(reading.weights))] + ["all layers", "rollout"]
        columns[title] = reading.names
    return plot_panels(panels, rows, columns)


def plot_answer(readings: dict[str, Reading]) -> Figure:
    """Step by step through generated answers: what each token is read from, the mean of all layers and heads.

    Raises:
        ValueError: a reading holds no answer.
    """
    panels, rows, columns = {}, {}, {}
    for name, reading in readings.items():
        if not reading.answer_names:
            raise ValueError(f"the reading of {name} holds no answer: read(classifier, row, with_answer=True)")
        panels[name] = reading.weights.mean((0, 1))[reading.answer.start : reading.answer.stop]
        rows[name] = [f"{step + 1}: {token}" for step, token in enumerate(reading.answer_names)]
        columns[name] = reading.names
    return plot_panels(panels, rows, columns)


def coloured_text_html(reading: Reading, relevance: torch.Tensor, title: str) -> str:
    """The text, each piece as dark as its weight in `relevance` (T',), the heaviest piece darkest.

    Characters that several tokens share have the sum of their weights, which also shows under the mouse. The last
    line says what share of the weight fell on the text at all.
    """
    values = [float(relevance[span.start : span.stop].sum()) for _, span in reading.pieces]
    strongest = max(values) or 1.0
    spans = []
    for (text, _), value in zip(reading.pieces, values, strict=True):
        word = text.lstrip(" ")
        colour = f"background:rgba(214,96,30,{value / strongest:.3f});border-radius:3px"
        spaces = " " * (len(text) - len(word))
        spans.append(f'{spaces}<span style="{colour}" title="{value:.4f}">{html.escape(word)}</span>')
    prediction = html.escape(f"{title}: {reading.label} ({reading.probability:.2f})")
    return (
        f'<div style="line-height:1.8;max-width:900px;margin:8px 0"><b>{prediction}</b>'
        f'<div style="white-space:pre-wrap">{"".join(spans)}</div>'
        f"<i>{sum(values):.0%} of the weight lies on the text</i></div>"
    )


def plot_faithfulness(effects: dict[str, torch.Tensor]) -> Figure:
    """What erasing words does, (texts, 2, 2) by classifier, with 95 % bootstrap intervals over the texts."""
    figure, both = plt.subplots(1, 2, figsize=(10, 1.4 + 0.7 * len(effects)), layout="constrained", sharey=True)
    for column, (axes, label) in enumerate(
        zip(both, ("loss of the predicted label's probability", "another label is predicted"), strict=True)
    ):
        for kind, (words, colour) in enumerate((("most attended words", ATTENDED), ("random words", RANDOM))):
            for place, values in enumerate(effects.values()):
                mean = float(values[:, kind, column].mean())
                low, high = map(float, bootstrap_interval(values[:, kind, column]))
                error = [[mean - low], [high - mean]]
                at = place + 0.36 * kind - 0.18
                axes.barh(at, mean, 0.34, xerr=error, color=colour, label=None if place else words)
        axes.axvline(0, color="black", linewidth=0.8)
        axes.set_xlabel(label)
        axes.spines[["top", "right"]].set_visible(False)
    both[1].xaxis.set_major_formatter("{x:.0%}")
    both[0].set_yticks(range(len(effects)), plain_labels(list(effects)))
    both[0].invert_yaxis()
    texts = min(map(len, effects.values()))
    both[0].set_title(f"erased from {texts} texts", loc="left", fontsize=10)
    figure.legend(*both[0].get_legend_handles_labels(), loc="outside upper right", ncols=2, frameon=False)
    return figure


def _name_columns(axes, names: Sequence[str]) -> None:
    axes.set_xticks(range(len(names)), plain_labels(names), fontsize=8, rotation=90)
