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
def check_weights(model, ids: Sequence[int], weights: torch.Tensor) -> dict[str, float]:
    """How well `weights` (L, N, T, T), as `attention_weights` gives them, are the model's own.

    In an ordinary forward, which shows no weights, the input and output of every layer's attention are recorded. From
    that input and `weights` the output is worked out once more, by the formula.

    Returns:
        row_sum: largest distance of a row's sum from 1; attention: largest difference of an attention's output from
        the recorded one; output: largest difference of the model's output (logits, or class logits behind `<cls>`)
        between a forward that shows its weights and the ordinary one. The last two are shares of the largest value.
    """
    recorded: list[tuple[torch.Tensor, torch.Tensor]] = []  # of each layer: (T, H) in and out

    def record(module, inputs, output):
        recorded.append((inputs[0][0], output[0][0]))

    layers = _base(model).model.layers
    hooks = [layer.self_attn.register_forward_hook(record) for layer in layers]
    try:
        fused, _ = _run(model, ids, output_attentions=False)
    finally:
        for hook in hooks:
            hook.remove()
    differences = [
        _relative(_attention_output(layer.self_attn, x, read.to(x)), output)
        for layer, (x, output), read in zip(layers, recorded, weights, strict=True)
    ]
    return {
        "row_sum": float((weights.sum(-1) - 1).abs().max()),
        "attention": max(differences),
        "output": _relative(_run(model, ids, output_attentions=True)[0], fused),
    }


def _attention_output(attention, x: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """(T, H) from the input (T, H) and the weights (N, T, T) of one layer's attention."""
    values = attention.v_proj(x).unflatten(-1, (-1, attention.head_dim))  # (T, K, D)
    values = values.repeat_interleave(len(weights) // values.shape[1], dim=1)  # (T, N, D): a group shares its values
    return attention.o_proj(torch.einsum("nts,snd->tnd", weights, values).flatten(1))


def _relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference as a share of the largest value."""
    return float((found - expected).abs().max() / expected.abs().max())


def _base(model):
    """The MiniMind inside a model of any method."""
    return model.base if isinstance(model, ClsTunedModel | PromptTuningModel) else model


def _run(model, ids: Sequence[int], output_attentions: bool) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Logits (T, V), or class logits (C,), and the weights (L, N, T, T) where asked for."""
    device = _base(model).device
    input_ids = torch.tensor([list(ids)], device=device)
    if isinstance(model, ClsTunedModel):
        lengths = torch.tensor([len(ids)], device=device)
        outputs = model.hidden_states(input_ids, lengths, output_attentions=output_attentions)
        result = model.head(outputs.last_hidden_state[:, 0].to(next(model.head.parameters()).dtype))[0]
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
    for text, span in text_pieces(tokenizer, ids):
        visible = text.replace("\n", "↵").strip(" ") or "␣"
        labels += [visible] + [CONTINUED] * (len(span) - 1)
    return labels


def text_pieces(tokenizer, ids: Sequence[int]) -> list[tuple[str, range]]:
    """The text in its smallest pieces of whole characters, each with the positions of its tokens.

    Joined they are the text, except that bytes that are no text are shown in hexadecimal.
    """
    pieces: list[tuple[str, range]] = []
    start = 0
    while start < len(ids):
        # A character has at most 4 bytes, so at most 4 tokens share one.
        for end in range(start + 1, min(start + 4, len(ids)) + 1):
            text = tokenizer.decode(list(ids[start:end]), skip_special_tokens=False)
            if "\ufffd" not in text:
                break
        else:
            end, text = start + 1, _hex(tokenizer, ids[start])
        pieces.append((text, range(start, end)))
        start = end
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
    after_break = True
    for text, piece in text_pieces(tokenizer, ids):
        wide = any(unicodedata.east_asian_width(character) in "WF" for character in text)
        if after_break or wide or text[:1].isspace():
            spans.append(piece)
        else:
            spans[-1] = range(spans[-1].start, piece.stop)
        after_break = wide or text[-1:].isspace()
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
) -> torch.Tensor:
    """What becomes of the prediction when words are erased: the most attended ones, and random ones.

    The first is comprehensiveness (DeYoung et al. 2020, https://arxiv.org/abs/1911.03429); the second is what any
    erasure of that size costs. A word's relevance grows with its length, so a random erasure goes on until it has
    taken as many tokens, not only as many words.

    Args:
        probabilities: texts as token ids -> (texts, C).
        spans, relevance: the words of `ids` and how much each is attended to (words,).
        share: of the words to erase, at least one of them and never all.

    Returns:
        (2, 2): first row the most attended words, second row the mean over `draws` random choices; first column the
        predicted label's loss of probability, second column how often another label is predicted instead.

    Raises:
        ValueError: fewer than two words.
    """
    if len(spans) < 2:
        raise ValueError(f"a text of {len(spans)} words: erasing one needs at least two")
    count = min(max(1, round(share * len(spans))), len(spans) - 1)
    generator = torch.Generator().manual_seed(seed)
    attended = relevance.topk(count).indices.tolist()
    tokens = sum(len(spans[word]) for word in attended)
    erased = [attended]
    for _ in range(draws):
        order = torch.randperm(len(spans), generator=generator).tolist()
        taken = torch.tensor([len(spans[word]) for word in order]).cumsum(0)
        erased.append(order[: min(int((taken < tokens).sum()) + 1, len(spans) - 1)])
    texts = [list(ids)]
    for words in erased:
        gone = {position for word in words for position in spans[word]}
        texts.append([token for position, token in enumerate(ids) if position not in gone])
    chance = probabilities(texts)  # (1 + 1 + draws, C)
    predicted = chance[0].argmax()
    effects = torch.stack([chance[0, predicted] - chance[1:, predicted], (chance[1:].argmax(-1) != predicted).float()])
    return torch.stack([effects[:, 0], effects[:, 1:].mean(1)])
