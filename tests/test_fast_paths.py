"""Every shortcut gives what the plain way gives."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from transformers import DynamicCache

from dataset.classification_dataset import IGNORED, collate, encode
from dataset.prompts import build_prompt, with_virtual_tokens
from model.attention_kernels import QUERY_BLOCK, attention, causal_mask
from model.checkpoint import BUNDLED_BASE, load_minimind
from model.label_scoring import answer_loss, label_log_probabilities
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM, positions_of
from tests.test_methods import LABELS, SPEAKING, speaking_model

IDS = torch.arange(3, 51).view(3, 16)
ASKED = torch.zeros(3, 16, dtype=torch.bool)
ASKED[0, [2, 15]] = ASKED[1, 7] = True
ASKED[2, 3:9] = True


def test_positions_of_a_mask_stand_in_order():
    positions, real = positions_of(ASKED)
    assert positions.shape == real.shape == (3, 6)
    found = [row[keep].tolist() for row, keep in zip(positions, real, strict=True)]
    assert found == [[2, 15], [7], [3, 4, 5, 6, 7, 8]]


@pytest.mark.parametrize("method", SPEAKING)
def test_the_last_block_on_asked_positions_equals_all_positions(method, tiny_base):
    model, _ = speaking_model(method, tiny_base)
    everything = model(IDS).logits[ASKED]
    asked = model(IDS, logits_to_keep=ASKED).logits
    torch.testing.assert_close(asked, everything, atol=1e-5, rtol=0)
    trained = [p for p in model.parameters() if p.requires_grad]
    expected = torch.autograd.grad(everything.square().sum(), trained)
    for found, wanted in zip(torch.autograd.grad(asked.square().sum(), trained), expected, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("generation", ["minimind2", "minimind3"])
@pytest.mark.parametrize("use_moe", [False, True])
@torch.no_grad()
def test_asked_positions_behind_a_cache_and_under_a_mask(generation, use_moe):
    torch.manual_seed(0)
    model = MiniMindForCausalLM(
        MiniMindConfig(generation, hidden_size=64, num_hidden_layers=2, vocab_size=64, use_moe=use_moe)
    ).eval()
    expected = model(IDS).logits[:, 6:]
    cache = DynamicCache()
    model(IDS[:, :6], past_key_values=cache, use_cache=True)
    found = model(IDS[:, 6:], past_key_values=cache, use_cache=True, logits_to_keep=ASKED[:, 6:]).logits
    torch.testing.assert_close(found, expected[ASKED[:, 6:]], atol=1e-5, rtol=0)
    assert cache.get_seq_length() == 16  # every position left its keys and values
    padding = torch.ones_like(IDS)
    padding[1, :4] = 0
    found = model(IDS, attention_mask=padding, logits_to_keep=ASKED).logits
    torch.testing.assert_close(found, model(IDS, attention_mask=padding).logits[ASKED], atol=1e-5, rtol=0)


def plain_attention(query, key, value, sees):
    """Softmax attention as its formula says, every key/value head repeated for its group of query heads."""
    group = query.shape[1] // key.shape[1]
    scores = query @ key.repeat_interleave(group, 1).transpose(2, 3) / query.shape[-1] ** 0.5
    return scores.masked_fill(~sees, -torch.inf).softmax(-1) @ value.repeat_interleave(group, 1)


@pytest.mark.parametrize("dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("past", [0, 5])
@pytest.mark.parametrize("length", [1, QUERY_BLOCK - 1, QUERY_BLOCK, 2 * QUERY_BLOCK + 1])
def test_attention_in_blocks_of_queries_equals_the_formula(length, past, masked, dtype, tolerance):
    torch.manual_seed(0)
    query, upstream = torch.randn(2, 2, 8, length, 16)
    key, value = torch.randn(2, 2, 2, past + length, 16)
    sees = causal_mask(length, past + length, query.device)
    if masked:  # besides, a row of its own: its first two keys are padding, which only they themselves see
        sees = sees.repeat(2, 1, 1, 1)
        sees[1, :, :, :2] = torch.eye(past + length, dtype=torch.bool)[past:, :2]
    inputs = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    found = attention(*inputs, sees if masked else None)
    exact = [x.detach().float().requires_grad_() for x in inputs]
    expected = plain_attention(*exact, sees)
    torch.testing.assert_close(found.float(), expected, atol=tolerance, rtol=tolerance)
    wanted = torch.autograd.grad(expected, exact, upstream)
    for gradient, plain in zip(torch.autograd.grad(found, inputs, upstream.to(dtype)), wanted, strict=True):
        scale = plain.abs().max().clamp(min=1.0)  # a key's gradient sums over all queries
        torch.testing.assert_close(gradient.float() / scale, plain / scale, atol=tolerance, rtol=0)


@torch.no_grad()
def test_autocast_reaches_the_attention(monkeypatch):
    seen = []

    def attention_seen(query, key, value, mask):
        seen.append({query.dtype, key.dtype, value.dtype})
        return attention(query, key, value, mask)

    monkeypatch.setattr("model.model_minimind.attention", attention_seen)
    model = MiniMindForCausalLM(MiniMindConfig(hidden_size=32, num_hidden_layers=2, vocab_size=64)).eval()
    with torch.autocast("cpu", torch.bfloat16):
        model(IDS % 64)
    assert seen == [{torch.bfloat16}] * 2


@pytest.mark.parametrize("method", SPEAKING)
@pytest.mark.parametrize("max_seq_len", [120, 400])
def test_a_shared_prefix_equals_one_for_each_row(method, max_seq_len, tiny_base, tokenizer, rows):
    model, virtual = speaking_model(method, tiny_base)
    prompt = with_virtual_tokens(build_prompt(tokenizer, LABELS, max_seq_len=max_seq_len), virtual)
    rows = [replace(row, text=f"{row.text} " * 3) for row in rows[:5]]
    batch = collate(encode(rows, prompt), prompt, "cpu", with_answers=True)
    assert batch.input_ids.shape[1] > max_seq_len / 2
    loss, count = answer_loss(model, batch)
    trained = [p for p in model.parameters() if p.requires_grad]
    gradients = torch.autograd.grad(loss, trained)

    prefix = batch.prefix_ids.expand(len(rows), -1)
    logits = model(torch.cat([prefix, batch.input_ids], dim=1)).logits[:, prefix.shape[1] :]
    plain = F.cross_entropy(logits.flatten(0, 1), batch.targets.flatten(), ignore_index=IGNORED, reduction="sum")
    assert count == int((batch.targets != IGNORED).sum())
    torch.testing.assert_close(loss, plain, atol=1e-5, rtol=1e-6)
    for found, wanted in zip(gradients, torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)


def test_bfloat16_gives_the_labels_of_float32(tokenizer, rows):
    prompt = build_prompt(tokenizer, sorted({row.label for row in rows}), max_seq_len=400)
    batch = collate(encode(rows, prompt), prompt, "cpu", with_answers=False)
    exact, short = (
        label_log_probabilities(load_minimind(BUNDLED_BASE, dtype=dtype), batch, prompt.label_ids).float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    first, second = exact.topk(2).values.unbind(1)
    clear = first - second > 0.1  # nats; nearer ones may fall either way
    assert clear.sum() > len(rows) / 2
    assert torch.equal(exact.argmax(1)[clear], short.argmax(1)[clear])
