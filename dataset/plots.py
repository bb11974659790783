"""The pictures of the data notebook, and a font for them that knows Chinese."""

import html
import math
from collections.abc import Sequence

import matplotlib.pyplot as plt
from matplotlib import font_manager
from matplotlib.figure import Figure
from matplotlib.ft2font import FT2Font

from dataset.classification_dataset import IGNORED, Example, collate
from dataset.prompts import Prompt
from dataset.rows import Row

# Fonts with Chinese characters as Linux, Windows and macOS ship them, in the order of preference.
CJK_FONTS = (
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans SC",
    "Source Han Sans SC",
    "Source Han Sans CN",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Microsoft YaHei",
    "SimHei",
    "PingFang SC",
    "Hiragino Sans GB",
    "Heiti SC",
    "Arial Unicode MS",
    "Droid Sans Fallback",
    "AR PL UMing CN",
)
SPLIT_COLORS = {"train": "#4c78a8", "val": "#f2a541", "test": "#72a98f"}
MOST_BARS = 40


def use_readable_fonts() -> str:
    """Let pictures fall back on an installed font for Chinese characters.

    Returns:
        A sentence: which font that is, or that none is installed and how to get one.
    """
    installed = set(font_manager.get_font_names())
    found = next((name for name in CJK_FONTS if name in installed), None) or _font_by_its_characters()
    if found is None:
        return (
            "No font with Chinese characters is installed: Chinese labels would appear as boxes in the plots. "
            "On Debian or Ubuntu: apt-get install fonts-noto-cjk, then restart the kernel."
        )
    plt.rcParams["font.family"] = ["DejaVu Sans", found]
    return f"Chinese characters in plots are drawn with {found}."


def _font_by_its_characters() -> str | None:
    """An installed font with (simplified) Chinese characters, whatever its name; None where there is none."""
    needed = set(map(ord, "新闻财经体育"))
    for entry in sorted(font_manager.fontManager.ttflist, key=lambda entry: (entry.name, entry.fname)):
        try:
            characters = FT2Font(entry.fname).get_charmap().keys()
        except (OSError, RuntimeError):  # a font that was removed, or that FreeType cannot read
            continue
        # "Last Resort" claims every character and draws each as a box.
        if needed <= characters and not entry.name.lstrip(".").startswith(("Last Resort", "LastResort")):
            return entry.name
    return None


def plot_classes(counts: dict[str, dict[str, int]], title: str) -> Figure:
    """Rows of every class as bars, stacked by split: {label: {split: rows}}; the largest classes only if many."""
    labels = sorted(counts, key=lambda label: sum(counts[label].values()))[-MOST_BARS:]
    figure, axes = plt.subplots(figsize=(7, 1.2 + 0.35 * len(labels)), layout="constrained")
    left = [0] * len(labels)
    for split in counts[labels[0]]:
        widths = [counts[label][split] for label in labels]
        axes.barh(plain_labels(labels), widths, left=left, color=SPLIT_COLORS.get(split, "#4c78a8"), label=split)
        left = [start + width for start, width in zip(left, widths, strict=True)]
    for position, total in enumerate(left):
        axes.text(total, position, f" {total:,}", va="center")
    axes.set(xlabel="rows", title=title, xlim=(0, 1.12 * max(left)))
    axes.spines[["top", "right"]].set_visible(False)
    if len(counts[labels[0]]) > 1:
        figure.legend(loc="outside lower center", ncols=3, frameon=False)
    return figure


def plot_lengths(words: Sequence[int], tokens: Sequence[int], text_budget: int) -> Figure:
    """How long the texts are, in words and in tokens, and where `text_budget` tokens cut them."""
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.2), layout="constrained")
    left.hist(words, bins=_bins(max(words)), color="#4c78a8")
    left.set(xlabel="words (Chinese: characters)", ylabel="texts", title="length in words")
    right.hist(tokens, bins=_bins(max(text_budget, *tokens)), color="#4c78a8")
    cut = sum(length > text_budget for length in tokens)
    right.axvline(text_budget, color="#c44e52", linestyle="--", label=f"room for {text_budget} tokens")
    right.set(xlabel="tokens", ylabel="texts", title=f"length in tokens: {cut} of {len(tokens)} would be cut")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.set_yscale("log")  # the few long texts stay visible beside the many short ones
        axes.set_ylim(bottom=0.7)
        axes.yaxis.set_major_formatter("{x:,.0f}")
        axes.spines[["top", "right"]].set_visible(False)
    return figure


def _bins(longest: int) -> range:
    """About forty bins of whole words or tokens from 0 to the longest."""
    step = math.ceil((longest + 1) / 40)
    return range(0, longest + step + 1, step)


def plot_confusion(confusion: Sequence[Sequence[int]], labels: Sequence[str], title: str) -> Figure:
    """A confusion matrix: rows gold, columns predicted; the colour is the share of the row."""
    size = 2.4 + 0.55 * len(labels)
    figure, axes = plt.subplots(figsize=(size + 0.8, size), layout="constrained")
    shares = [[count / max(1, sum(row)) for count in row] for row in confusion]
    axes.imshow(shares, cmap="Blues", vmin=0, vmax=1)
    axes.set_xticks(range(len(labels)), plain_labels(labels), rotation=45, ha="right", rotation_mode="anchor")
    axes.set_yticks(range(len(labels)), plain_labels(labels))
    for row, counts in enumerate(confusion):
        for column, count in enumerate(counts):
            color = "white" if shares[row][column] > 0.5 else "black"
            axes.text(column, row, count, ha="center", va="center", color=color)
    axes.set(xlabel="predicted", ylabel="gold", title=title)
    return figure


def trained_tokens_html(row: Row, prompt: Prompt) -> str:
    """A row as the model is trained on it: the prompt in grey, each trained token in a yellow box.

    What is trained is read off the very batch that training builds, not worked out a second time.
    """
    label = prompt.label_index(row)
    example = Example([*prompt.text_ids(row), *prompt.suffix_ids], label, row)
    batch = collate([example], prompt, "cpu", with_answers=True)
    targets = batch.targets[0].tolist()
    first = next(position for position, target in enumerate(targets) if target != IGNORED)
    read = [*prompt.prefix_ids, *batch.input_ids[0, : first + 1].tolist()]
    trained = [target for target in targets if target != IGNORED]

    box = "background:#ffe08a;color:black;border:1px solid #b8860b;border-radius:3px;padding:0 2px"
    boxes = "".join(f'<span style="{box}">{html.escape(piece)}</span>' for piece in _pieces(prompt.tokenizer, trained))
    prompt_text = html.escape(prompt.tokenizer.decode(read, skip_special_tokens=False))
    style = "white-space:pre-wrap;font-family:monospace;border-left:3px solid #ccc;padding-left:8px;margin:8px 0"
    count = f"{len(read)} tokens read, {len(trained)} trained"
    return f'<div style="{style}"><span style="color:#777">{prompt_text}</span>{boxes}\n<i>{count}</i></div>'


def _pieces(tokenizer, ids: Sequence[int]) -> list[str]:
    """The tokens as text; tokens that are only parts of one character (bytes of a Chinese one) stand together."""
    pieces, part = [], []
    for token in ids:
        part.append(token)
        text = tokenizer.decode(part, skip_special_tokens=False)
        if "\ufffd" not in text:
            pieces.append(text)
            part = []
    return pieces + ([tokenizer.decode(part, skip_special_tokens=False)] if part else [])


def plain_labels(labels: Sequence[str]) -> list[str]:
    """Labels in which a dollar sign is a dollar sign, not the beginning of a formula."""
    return [label.replace("$", r"\$") for label in labels]
