"""Every shortcut gives what the plain way gives."""

import pytest
import torch
from transformers import DynamicCache

from dataset.classification_dataset import collate, encode
from dataset.prompts import build_prompt, with_virtual_tokens
from model import label_scoring
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


@pytest.mark.parametrize("method", SPEAKING)
def test_a_shared_prefix_equals_one_for_each_row(method, tiny_base, tokenizer, rows, monkeypatch):
    model, virtual = speaking_model(method, tiny_base)
    prompt = with_virtual_tokens(build_prompt(tokenizer, LABELS, max_seq_len=120), virtual)
    examples = encode(rows[:5], prompt)
    asked, answered = (collate(examples, prompt, "cpu", with_answers) for with_answers in (False, True))
    trained = [p for p in model.parameters() if p.requires_grad]
    results = []
    for bound in (0, 1000):
        monkeypatch.setattr(label_scoring, "SHARED_UP_TO", bound)
        loss, _ = answer_loss(model, answered)
        scores = label_log_probabilities(model, asked, prompt.label_ids)
        answers = label_scoring.greedy_answers(model, asked, end_id=-1, max_new_tokens=3)
        results.append((loss.detach(), scores, answers, torch.autograd.grad(loss, trained)))
    (loss, scores, answers, gradients), (loss_2, scores_2, answers_2, gradients_2) = results
    torch.testing.assert_close(loss, loss_2, atol=1e-5, rtol=1e-6)
    torch.testing.assert_close(scores, scores_2, atol=1e-5, rtol=1e-6)
    assert answers == answers_2
    for found, wanted in zip(gradients, gradients_2, strict=True):
        torch.testing.assert_close(found, wanted, atol=1e-5, rtol=1e-4)
