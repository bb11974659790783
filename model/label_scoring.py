"""What a language model says about labels: the loss of an answer, the score of every label, a greedy answer.

All three share one way through the model. The prompt's prefix (instruction and label list) is the same for every text,
so it runs once a batch and its keys and values are shared by all rows; gradients flow back into it from each of them.
Behind it stand the rows' own tokens, padded on the right: no real token looks at padding, so a row's result does not
depend on its neighbours. `model` is anything that is called like `MiniMindForCausalLM`.

Shapes: B rows, P prefix tokens, T own tokens of the longest row, L label tokens of all labels together, C labels.
"""

import torch
import torch.nn.functional as F


def encode_rows(model, prefix_ids: torch.Tensor, input_ids: torch.Tensor, logits_to_keep: torch.Tensor):
    """Run prefix (P,) and rows (B, T): logits (kept, V) where the mask (B, T) says so, and the cache behind all."""
    cache = model(input_ids=prefix_ids[None], use_cache=True, logits_to_keep=1).past_key_values
    cache.batch_repeat_interleave(len(input_ids))
    output = model(input_ids=input_ids, past_key_values=cache, use_cache=True, logits_to_keep=logits_to_keep)
    return output.logits, cache


def answer_loss(model, batch) -> tuple[torch.Tensor, int]:
    """Summed cross-entropy of the labels' tokens, and how many there are.

    Args:
        batch: `prefix_ids` (P,), `input_ids` (B, T) that end with the label, and `targets` (B, T), -100 but at the
            positions from which a label's token is to be predicted.
    """
    answers = batch.targets != -100
    logits, _ = encode_rows(model, batch.prefix_ids, batch.input_ids, answers)
    targets = batch.targets[answers]
    return F.cross_entropy(logits.float(), targets, reduction="sum"), len(targets)


@torch.inference_mode()
def label_log_probabilities(model, batch, label_ids: tuple[tuple[int, ...], ...]) -> torch.Tensor:
    """(B, C): the log-probability of each label's whole token sequence, its end token included.

    The labels run together behind each text, one forward for all: under the tree mask a label's token sees the prompt
    and the earlier tokens of its own label, and stands at the position that it would have there alone.

    Args:
        batch: `prefix_ids` (P,), `input_ids` (B, T) that end where the answer begins, `lengths` (B,).
    """
    device = batch.input_ids.device
    rows, width = batch.input_ids.shape
    last = F.one_hot(batch.lengths - 1, width).bool()
    first_logits, cache = encode_rows(model, batch.prefix_ids, batch.input_ids, last)  # (B, V)
    first = first_logits.float().log_softmax(-1)
    scores = torch.stack([first[:, ids[0]] for ids in label_ids], dim=1)  # (B, C)

    label = torch.tensor([c for c, ids in enumerate(label_ids) for _ in ids[:-1]], device=device)  # (L,)
    depth = torch.tensor([d for ids in label_ids for d in range(len(ids) - 1)], device=device)
    token = torch.tensor([t for ids in label_ids for t in ids[:-1]], device=device)
    following = torch.tensor([t for ids in label_ids for t in ids[1:]], device=device)
    if len(token) == 0:  # every label is the end token alone
        return scores
    prefix = len(batch.prefix_ids)
    sees_prompt = torch.arange(prefix + width, device=device) < (prefix + batch.lengths)[:, None]  # (B, P + T)
    sees_label = (label[:, None] == label) & (depth[:, None] >= depth)  # (L, L)
    mask = torch.cat(
        [
            sees_prompt[:, None, None].expand(-1, -1, len(token), -1),
            sees_label[None, None].expand(rows, -1, -1, -1),
        ],
        dim=-1,
    )  # (B, 1, L, P + T + L)
    logits = model(
        input_ids=token.expand(rows, -1),
        attention_mask=mask,
        position_ids=prefix + batch.lengths[:, None] + depth,
        past_key_values=cache,
    ).logits  # (B, L, V)
    rest = logits.float().log_softmax(-1).gather(-1, following.expand(rows, -1)[..., None])[..., 0]  # (B, L)
    return scores.index_add(1, label, rest)


@torch.inference_mode()
def greedy_answers(model, batch, end_id: int, max_new_tokens: int) -> list[list[int]]:
    """The tokens that greedy decoding answers with, a list a row, without the end token."""
    device = batch.input_ids.device
    rows, width = batch.input_ids.shape
    prefix = len(batch.prefix_ids)
    logits, cache = encode_rows(model, batch.prefix_ids, batch.input_ids, F.one_hot(batch.lengths - 1, width).bool())
    visible = torch.arange(prefix + width, device=device) < (prefix + batch.lengths)[:, None]  # (B, P + T)
    answers: list[list[int]] = [[] for _ in range(rows)]
    running = torch.ones(rows, dtype=torch.bool, device=device)
    for step in range(max_new_tokens):
        token = logits.argmax(-1)  # (B,)
        running &= token != end_id
        for row in running.nonzero()[:, 0].tolist():
            answers[row].append(int(token[row]))
        if not running.any():
            break
        visible = torch.cat([visible, torch.ones(rows, 1, dtype=torch.bool, device=device)], dim=1)
        logits = model(
            input_ids=token[:, None],
            attention_mask=visible[:, None, None],
            position_ids=(prefix + batch.lengths + step)[:, None],
            past_key_values=cache,
            use_cache=True,
        ).logits[:, -1]
    return answers
