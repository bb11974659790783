"""What a model attends to: its own attention weights, and what can be worked out from them.

Everything here takes token ids and a model of any of the methods, frozen base included. Attention shows where values
are read from; it is no proof of why a label was chosen. `erasure_effect` measures how far the one follows the other.

Shapes: L layers, N heads, T positions (with `<cls>` or virtual tokens), V vocabulary, C classes.
"""

import unicodedata
from collections.abc import Callable, Sequence

import torch

from model.model_projection_head import ClsTunedModel
from model.model_prompt_tuning import PromptTuningModel

CONTINUED = "·"  # the label of a token that only carries more bytes of the character before it


@torch.inference_mode()
def attention_weights(model, ids: Sequence[int]) -> torch.Tensor:
    """(L, N, T, T) float32: how much each position (row) reads from each position (column).

    Args:
        model: a base, with or without LoRA or adapters, a `PromptTuningModel` (its placeholder ids open `ids`), or a
            `ClsTunedModel`, whose `<cls>` is position 0, before the ids.
    """
    return _run(model, ids, output_attentions=True)[1]


@torch.inference_mode()
def check_weights(model, ids: Sequence[int]) -> dict[str, float]:
    """How well the weights shown are the model's own.

    Returns:
        row_sum: largest distance of a row's sum from 1; output: largest difference between the outputs (logits, or
        class logits behind `<cls>`) that follow from these weights and those of the fused kernel, which shows none,
        as a share of the largest output.
    """
    from_weights, weights = _run(model, ids, output_attentions=True)
    fused, _ = _run(model, ids, output_attentions=False)
    return {
        "row_sum": float((weights.sum(-1) - 1).abs().max()),
        "output": float((from_weights - fused).abs().max() / fused.abs().max()),
    }


def _run(model, ids: Sequence[int], output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, V), or class logits (C,), and the weights (L, N, T, T) where asked for."""
    device = model.base.device if isinstance(model, ClsTunedModel | PromptTuningModel) else model.device
    input_ids = torch.tensor([list(ids)], device=device)
    if isinstance(model, ClsTunedModel):
        lengths = torch.tensor([len(ids)], device=device)
        outputs = model.hidden_states(input_ids, lengths, output_attentions=output_attentions)
        result = model.head(outputs.last_hidden_state[:, 0].float())[0]
    else:
        outputs = model(input_ids=input_ids, output_attentions=output_attentions)
        result = outputs.logits[0].float()
    weights = torch.cat(outputs.attentions).float().cpu() if output_attentions else None
    return result.cpu(), weights


def rollout(weights: torch.Tensor) -> torch.Tensor:
    """(T, T): attention followed through all layers (Abnar and Zuidema 2020, https://arxiv.org/abs/2005.00928).

    Heads are averaged and the residual stream counts for half of each layer; rows sum to 1.

    Args:
        weights: (L, N, T, T).
    """
    identity = torch.eye(weights.shape[-1])
    total = identity
    for layer in weights.mean(1):  # (T, T), from the first layer to the last
        total = (0.5 * layer + 0.5 * identity) @ total
    return total


@torch.inference_mode()
def greedy_continuation(model, ids: Sequence[int], end_id: int, most: int) -> list[int]:
    """The answer's tokens by greedy choice, the end token included where it comes within `most`; no cache."""
    answer: list[int] = []
    while len(answer) < most and (not answer or answer[-1] != end_id):
        logits, _ = _run(model, [*ids, *answer], output_attentions=False)
        answer.append(int(logits[-1].argmax()))
    return answer


def token_labels(tokenizer, ids: Sequence[int]) -> list[str]:
    """Every token as text that can be read.

    The bytes of a character that several tokens share stand at the first of them, `·` at the others. Line breaks are
    `↵`, a space alone is `␣`, bytes that are no text are shown as `<E4>`.
    """
    labels: list[str] = []
    for piece in _whole_pieces(tokenizer, ids):
        text = tokenizer.decode(piece, skip_special_tokens=False)
        if "\ufffd" in text:
            labels += [_hex(tokenizer, token) for token in piece]
            continue
        visible = text.replace("\n", "↵").strip(" ") or "␣"
        labels += [visible] + [CONTINUED] * (len(piece) - 1)
    return labels


def _whole_pieces(tokenizer, ids: Sequence[int]) -> list[list[int]]:
    """The ids in groups, each the fewest that decode to whole characters; bytes that are no text stand alone."""
    pieces, start = [], 0
    while start < len(ids):
        # A character has at most 4 bytes, so at most 4 tokens share one.
        tries = [list(ids[start : start + count]) for count in range(1, 5)]
        whole = (part for part in tries if "\ufffd" not in tokenizer.decode(part, skip_special_tokens=False))
        pieces.append(next(whole, tries[0]))
        start += len(pieces[-1])
    return pieces


def _hex(tokenizer, token: int) -> str:
    """A byte-level token as its bytes in hexadecimal (the byte alphabet of GPT-2: printable bytes as themselves)."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    byte_of = {chr(byte): byte for byte in printable} | {chr(256 + n): byte for n, byte in enumerate(others)}
    return "".join(f"<{byte_of[c]:02X}>" for c in tokenizer.convert_ids_to_tokens(token))


def word_spans(tokenizer, ids: Sequence[int]) -> list[range]:
    """The positions of every word: what stands between white space, and each Chinese character for itself."""
    spans: list[range] = []
    position, after_break = 0, True
    for piece in _whole_pieces(tokenizer, ids):
        text = tokenizer.decode(piece, skip_special_tokens=False)
        wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
        end = position + len(piece)
        if after_break or wide or text[:1].isspace():
            spans.append(range(position, end))
        else:
            spans[-1] = range(spans[-1].start, end)
        position, after_break = end, wide or text[-1:].isspace()
    return spans


def word_relevance(relevance: torch.Tensor, spans: Sequence[range]) -> torch.Tensor:
    """(words,): the sum of each word's tokens in `relevance` (positions of the text,)."""
    return torch.stack([relevance[span.start : span.stop].sum() for span in spans])


def erasure_effect(
    probabilities: Callable[[list[list[int]]], torch.Tensor],
    ids: Sequence[int],
    spans: Sequence[range],
    relevance: torch.Tensor,
    share: float,
    draws: int,
    seed: int,
) -> tuple[float, float]:
    """How much the predicted label loses when words are erased: the most attended ones, and as many at random.

    The first is comprehensiveness (DeYoung et al. 2020, https://arxiv.org/abs/1911.03429); the second, a mean over
    `draws`, is what any erasure of that size costs. Where the prediction rests on what is attended to, the first is
    larger.

    Args:
        probabilities: texts as token ids -> (texts, C).
        spans, relevance: the words of `ids` and how much each is attended to (words,).
        share: of the words to erase, at least one of them and never all.

    Raises:
        ValueError: fewer than two words.
    """
    if len(spans) < 2:
        raise ValueError(f"a text of {len(spans)} words: erasing one needs at least two")
    count = min(max(1, round(share * len(spans))), len(spans) - 1)
    generator = torch.Generator().manual_seed(seed)
    erased = [relevance.topk(count).indices.tolist()]
    erased += [torch.randperm(len(spans), generator=generator)[:count].tolist() for _ in range(draws)]
    texts = [list(ids)]
    for words in erased:
        gone = {position for word in words for position in spans[word]}
        texts.append([token for position, token in enumerate(ids) if position not in gone])
    chance = probabilities(texts)
    predicted = chance[0].argmax()
    losses = chance[0, predicted] - chance[1:, predicted]
    return float(losses[0]), float(losses[1:].mean())
