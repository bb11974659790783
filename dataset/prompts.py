"""The one place where a row becomes a prompt and a label: training, scoring, the notebooks and the judge all come here.

A prompt is three runs of token ids, joined and never searched for:

    prefix (instruction and label list) | text (the only part that is ever cut) | suffix (end of turn, answer begins)

and behind it stand a label's ids with the end token. The prefix is the same for every row of a run, so that its keys
and values can be computed once. In the label list each label has a line of its own: a label behind a line break has
the same token ids there as in the answer, which follows the line break of the assistant's turn.
"""

import re
from dataclasses import dataclass, replace

from dataset.rows import DataError, Row

INSTRUCTIONS = {
    "en": "Classify the text into one of these labels:\n{labels}\n\nText:\n{text}",
    "zh": "请判断文本属于下列哪个类别：\n{labels}\n\n文本：\n{text}",
}
_TEXT_MARK = "⟦text⟧"


@dataclass(frozen=True)
class Prompt:
    """A classification prompt for one tokenizer and one list of labels.

    Attributes:
        labels: the user's own words, in order; the index in this list is the class index.
        template: "en" or "zh".
        max_seq_len: most tokens of prompt and longest label together.
        prefix_ids, suffix_ids: what stands before and behind the text.
        label_ids: for each label its token ids with the end token.
    """

    tokenizer: object
    labels: tuple[str, ...]
    template: str
    max_seq_len: int
    prefix_ids: tuple[int, ...]
    suffix_ids: tuple[int, ...]
    label_ids: tuple[tuple[int, ...], ...]

    @property
    def text_budget(self) -> int:
        """Most tokens a text may take."""
        longest_label = max(map(len, self.label_ids))
        return self.max_seq_len - len(self.prefix_ids) - len(self.suffix_ids) - longest_label

    def text_ids(self, row: Row) -> list[int]:
        """Token ids of title and text as plain text, cut to `text_budget`."""
        text = f"{row.title}\n{row.text}" if row.title else row.text
        # A token covers at least one byte: there is no need to tokenize megabytes to keep a few hundred tokens.
        longest_token = 64
        return encode_plain(self.tokenizer, text[: self.text_budget * longest_token])[: self.text_budget]

    def prompt_ids(self, row: Row) -> list[int]:
        """The whole prompt, up to where the answer begins."""
        return [*self.prefix_ids, *self.text_ids(row), *self.suffix_ids]

    def label_index(self, row: Row) -> int:
        """Class index of the row's label.

        Raises:
            DataError: the label is none of `labels`.
        """
        if row.label not in self.labels:
            raise DataError(f"{row.source}: unknown label {row.label!r}; the labels are {', '.join(self.labels)}")
        return self.labels.index(row.label)


def build_prompt(tokenizer, labels: list[str], template: str = "en", max_seq_len: int = 512) -> Prompt:
    """Render instruction and label list through the tokenizer's chat template.

    Args:
        template: "en" or "zh"; `choose_template` picks one from the texts.
        max_seq_len: in tokens.

    Raises:
        DataError: fewer than two labels, a label that holds one of the tokenizer's markers, or a `max_seq_len`
            that leaves no room for text.
    """
    if len(set(labels)) < 2:
        raise DataError(f"a classification needs at least two labels, found {', '.join(labels) or 'none'}")
    if len(set(labels)) < len(labels):
        raise DataError(f"a label stands twice in {', '.join(labels)}")
    for label in labels:
        if encode_plain(tokenizer, label) != tokenizer.encode(label, add_special_tokens=False) or _TEXT_MARK in label:
            raise DataError(f"label {label!r} holds a marker of the tokenizer; rename the label")
    content = INSTRUCTIONS[template].format(labels="\n".join(labels), text=_TEXT_MARK)
    rendered = tokenizer.apply_chat_template(
        [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
    )
    before, _, behind = rendered.partition(_TEXT_MARK)
    prompt = Prompt(
        tokenizer=tokenizer,
        labels=tuple(labels),
        template=template,
        max_seq_len=max_seq_len,
        prefix_ids=tuple(tokenizer.encode(before, add_special_tokens=False)),
        suffix_ids=tuple(tokenizer.encode(behind, add_special_tokens=False)),
        label_ids=tuple((*encode_plain(tokenizer, label), tokenizer.eos_token_id) for label in labels),
    )
    if prompt.text_budget < 1:
        needed = max_seq_len - prompt.text_budget + 1
        raise DataError(f"max_seq_len {max_seq_len} leaves no room for text: template and label take {needed - 1}")
    return prompt


def with_virtual_tokens(prompt: Prompt, count: int) -> Prompt:
    """The prompt behind `count` placeholders for prompt tuning's vectors; the text keeps its budget."""
    placeholders = (prompt.tokenizer.pad_token_id,) * count
    return replace(prompt, prefix_ids=placeholders + prompt.prefix_ids, max_seq_len=prompt.max_seq_len + count)


def text_only_prompt(prompt: Prompt) -> Prompt:
    """The text without instruction and answer, as the projection head reads it."""
    end = (prompt.tokenizer.eos_token_id,)
    return replace(prompt, prefix_ids=(), suffix_ids=(), label_ids=(end,) * len(prompt.labels))


def encode_plain(tokenizer, text: str) -> list[int]:
    """Token ids of `text` in which no marker such as `<|im_end|>` becomes a control token.

    A marker is cut behind its first character and the pieces are encoded apart, which works for every tokenizer
    and for markers that it does not flag as special.
    """
    markers = [token.content for token in tokenizer.added_tokens_decoder.values()]
    pieces, start = [], 0
    if markers:
        for match in re.finditer("|".join(map(re.escape, markers)), text):
            pieces.append(text[start : match.start() + 1])
            start = match.start() + 1
    pieces.append(text[start:])
    return [token for piece in pieces for token in tokenizer.encode(piece, add_special_tokens=False)]


def choose_template(rows: list[Row]) -> str:
    """ "zh" where at least a third of the letters are Chinese characters, else "en"."""
    letters = [c for row in rows[:500] for c in row.text[:500] if c.isalpha()]
    chinese = sum("\u4e00" <= c <= "\u9fff" for c in letters)
    return "zh" if 3 * chinese > len(letters) else "en"


def labels_of(rows: list[Row]) -> list[str]:
    """The labels that occur, sorted."""
    return sorted({row.label for row in rows if row.label is not None})
