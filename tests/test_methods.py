"""All methods against plain computations: exact starts, `<cls>` that reads, PEFT's prompt tuning, a label at a time."""

import copy

import pytest
import torch
import torch.nn.functional as F
from peft import PromptTuningConfig, TaskType, get_peft_model
from transformers import LlamaForCausalLM

from dataset.classification_dataset import collate, encode
from dataset.prompts import build_prompt, text_only_prompt, with_virtual_tokens
from model.artifact import trained_tensors
from model.checkpoint import BUNDLED_BASE, fingerprint, load_minimind
from model.label_scoring import answer_loss, greedy_answers, label_log_probabilities
from model.model_adapter import adapter_parameter_count, apply_adapter
from model.model_lora import apply_lora, uniform_rank_map
from model.model_projection_head import ClsTunedModel
from model.model_prompt_tuning import PromptTuningModel, initial_virtual_tokens
from tests.conftest import llama_config
from train.language_task import LanguageTask
from train.text_cache import TextCache

LABELS = ["business", "entertainment", "politics", "sport", "tech", "technology and science"]
IDS = torch.arange(3, 51).view(3, 16)


def shake(model: torch.nn.Module) -> None:
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.05)


def speaking_model(method: str, base):
    """A language method with trained tensors that are not zero, and how many virtual tokens it has."""
    if method == "lora":
        apply_lora(base, uniform_rank_map(base, 4))
    elif method == "adapter":
        apply_adapter(base, 8)
    elif method == "prompt_tuning":
        base = PromptTuningModel(base, initial_virtual_tokens(base, 5, "text", [9, 10, 11], 0))
    shake(base)
    return base.eval(), 5 if method == "prompt_tuning" else 0


SPEAKING = ["lora", "adapter", "prompt_tuning"]


@torch.no_grad()
def test_fresh_adapter_is_the_base_bit_for_bit(tiny_base):
    before = tiny_base(IDS).logits
    apply_adapter(tiny_base, 8)
    assert torch.equal(tiny_base(IDS).logits, before)
    config = tiny_base.config
    expected = 2 * config.num_hidden_layers * (2 * config.hidden_size * 8 + config.hidden_size + 8)
    assert sum(p.numel() for p in trained_tensors(tiny_base).values()) == expected
    assert adapter_parameter_count(tiny_base, 8) == expected
    shake(tiny_base)
    assert not torch.allclose(tiny_base(IDS).logits, before)


# -- label scoring ----------------------------------------------------------------------------------------------------


def plain_scores(model, prompt, rows) -> torch.Tensor:
    """Log-probability of every label by one forward a text and label over the whole sequence."""
    scores = torch.zeros(len(rows), len(prompt.labels))
    for i, row in enumerate(rows):
        for c, label in enumerate(prompt.label_ids):
            ids = torch.tensor([[*prompt.prompt_ids(row), *label]])
            log_p = model(input_ids=ids).logits[0].log_softmax(-1)
            start = ids.shape[1] - len(label)
            scores[i, c] = log_p[torch.arange(start - 1, ids.shape[1] - 1), torch.tensor(label)].sum()
    return scores


@pytest.mark.parametrize("method", SPEAKING)
@torch.no_grad()
def test_label_scoring_and_answers_equal_a_plain_loop(method, tiny_base, tokenizer, rows):
    model, virtual = speaking_model(method, tiny_base)
    prompt = with_virtual_tokens(build_prompt(tokenizer, LABELS, max_seq_len=120), virtual)
    rows = rows[:6]
    examples = encode(rows, prompt)
    expected = plain_scores(model, prompt, rows)
    together = label_log_probabilities(model, collate(examples, prompt, "cpu", False), prompt.label_ids)
    torch.testing.assert_close(together, expected, atol=1e-4, rtol=0)
    for batch_size in (1, 4):  # the same, whatever the neighbours and the padding
        parts = [
            label_log_probabilities(
                model, collate(examples[i : i + batch_size], prompt, "cpu", False), prompt.label_ids
            )
            for i in range(0, 6, batch_size)
        ]
        torch.testing.assert_close(torch.cat(parts), together, atol=1e-5, rtol=0)

    answers = greedy_answers(model, collate(examples, prompt, "cpu", False), end_id=-1, max_new_tokens=5)
    for row, answer in zip(rows, answers, strict=True):
        ids = prompt.prompt_ids(row)
        for token in answer:
            assert int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()) == token
            ids.append(token)


@pytest.mark.parametrize("method", SPEAKING)
def test_answer_loss_and_gradients_equal_the_whole_sequence(method, tiny_base, tokenizer, rows):
    model, virtual = speaking_model(method, tiny_base)
    prompt = with_virtual_tokens(build_prompt(tokenizer, LABELS, max_seq_len=120), virtual)
    examples = encode(rows[:5], prompt)
    trained = list(trained_tensors(model).values())
    loss, targets = answer_loss(model, collate(examples, prompt, "cpu", True))
    gradients = torch.autograd.grad(loss, trained)
    plain = torch.zeros(())
    for example in examples:
        answer = prompt.label_ids[example.label]
        ids = torch.tensor([[*prompt.prefix_ids, *example.ids, *answer]])
        logits = model(input_ids=ids).logits[0, -len(answer) - 1 : -1]
        plain = plain + F.cross_entropy(logits, torch.tensor(answer), reduction="sum")
    torch.testing.assert_close(loss, plain, atol=1e-4, rtol=1e-5)
    assert targets == sum(len(prompt.label_ids[example.label]) for example in examples)
    for ours, expected in zip(gradients, torch.autograd.grad(plain, trained), strict=True):
        torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-3)
        assert ours.abs().sum() > 0


# -- prompt tuning ----------------------------------------------------------------------------------------------------


@torch.no_grad()
def test_prompt_tuning_equals_peft(tiny_base):
    llama = LlamaForCausalLM(llama_config(tiny_base.config))
    llama.load_state_dict(tiny_base.state_dict(), strict=True)
    peft = get_peft_model(llama, PromptTuningConfig(task_type=TaskType.CAUSAL_LM, num_virtual_tokens=6))
    vectors = peft.prompt_encoder["default"].embedding.weight
    ours = PromptTuningModel(tiny_base, vectors.clone())
    with_placeholders = torch.cat([torch.zeros(3, 6, dtype=IDS.dtype), IDS], dim=1)
    expected = peft(input_ids=IDS, attention_mask=torch.ones_like(IDS)).logits
    torch.testing.assert_close(ours(with_placeholders).logits, expected, atol=1e-4, rtol=0)
    generated = ours.generate(with_placeholders, max_new_tokens=4, do_sample=False, eos_token_id=None)
    theirs = peft.generate(
        input_ids=IDS, attention_mask=torch.ones_like(IDS), max_new_tokens=4, do_sample=False, eos_token_id=None
    )
    assert torch.equal(generated, theirs[:, -4:])


def test_prompt_starts_from_real_tokens(tiny_base):
    embeddings = tiny_base.model.embed_tokens.weight
    text = initial_virtual_tokens(tiny_base, 5, "text", [7, 8], 0)
    assert torch.equal(text, embeddings[[7, 8, 7, 8, 7]])
    vocabulary = initial_virtual_tokens(tiny_base, 5, "vocab", [], 0)
    assert all((embeddings == vector).all(1).any() for vector in vocabulary)
    assert initial_virtual_tokens(tiny_base, 5, "random", [], 0).std() > 10 * embeddings.std()
    with pytest.raises(ValueError, match="prompt_init 'noise' is unknown"):
        initial_virtual_tokens(tiny_base, 5, "noise", [], 0)


# -- projection head --------------------------------------------------------------------------------------------------


def padded(texts: list[list[int]]):
    lengths = torch.tensor([len(text) for text in texts])
    width = int(lengths.max())
    return torch.tensor([text + [0] * (width - len(text)) for text in texts]), lengths


@torch.no_grad()
def test_cls_reads_the_text_and_equals_one_behind_it(tiny_base):
    torch.manual_seed(0)
    model = ClsTunedModel(tiny_base, 4).eval()
    texts = [list(range(5, 5 + n)) for n in (4, 9, 16)]
    ids, lengths = padded(texts)
    first = model.hidden_states(ids, lengths).last_hidden_state[:, 0]
    for row, text in enumerate(texts):
        embedded = torch.cat(
            [tiny_base.model.embed_tokens(torch.tensor([text])), model.cls_embedding.view(1, 1, -1)], 1
        )
        behind = tiny_base.model(inputs_embeds=embedded).last_hidden_state[0, -1]
        torch.testing.assert_close(first[row], behind, atol=1e-5, rtol=0)
    # The literal first position of a causal sequence, as the original project had it, is blind.
    embedded = torch.cat([model.cls_embedding.expand(3, 1, -1), tiny_base.model.embed_tokens(ids)], dim=1)
    literal = tiny_base.model(inputs_embeds=embedded).last_hidden_state[:, 0]
    assert (literal - literal[0]).abs().max() < 1e-6
    assert (first - first[0]).abs().max() > 1e-2
    cached = model.forward_cached(model.text_cache(ids), lengths)
    torch.testing.assert_close(cached, model(ids, lengths), atol=1e-5, rtol=0)


def test_cache_bound_changes_nothing_but_what_is_kept(tiny_base, tokenizer, rows):
    model = ClsTunedModel(tiny_base, 5)
    prompt = text_only_prompt(build_prompt(tokenizer, LABELS, max_seq_len=64))
    examples = encode(rows[:6], prompt)
    everything = TextCache(model, examples, 1.0, "cpu")
    nothing = TextCache(model, examples, 0.0, "cpu")
    some = TextCache(model, examples, 40_000 / 2**30, "cpu")
    for _ in range(2):
        batches = [cache.batch([4, 0, 2, 5]) for cache in (everything, nothing, some)]
        for batch in batches[1:]:
            assert torch.equal(batch.text_cache, batches[0].text_cache)
    assert (len(everything.kept), len(nothing.kept)) == (4, 0)
    assert 0 < len(some.kept) < 4


def test_training_on_the_cache_equals_training_on_whole_texts(tiny_base, tokenizer, rows):
    """The same batches and dropout, once from cached keys and values and once in one pass over `<cls>` and text."""
    prompt = text_only_prompt(build_prompt(tokenizer, LABELS, max_seq_len=64))
    examples = encode(rows[:16], prompt)
    ends = []
    for cached in (True, False):
        torch.manual_seed(0)
        model = ClsTunedModel(copy.deepcopy(tiny_base), len(LABELS)).train()
        texts = TextCache(model, examples, 1.0, "cpu")
        optimizer = torch.optim.SGD(trained_tensors(model).values(), lr=0.02)
        start = model.cls_embedding.detach().clone()
        for step in range(12):
            torch.manual_seed(step)
            indices = range(step % 4 * 4, step % 4 * 4 + 4)
            if cached:
                batch = texts.batch(indices)
                logits = model.forward_cached(batch.text_cache, batch.lengths)
            else:
                batch = collate([examples[index] for index in indices], prompt, "cpu", False)
                logits = model(batch.input_ids, batch.lengths)
            F.cross_entropy(logits, batch.labels).backward()
            optimizer.step()
            optimizer.zero_grad()
        ends.append({name: p.detach() for name, p in trained_tensors(model).items()})
    for name, tensor in ends[0].items():
        torch.testing.assert_close(tensor, ends[1][name], atol=1e-6, rtol=0)
    assert (ends[0]["cls_embedding"] - start).abs().max() > 1e-3  # a thousand times the bound: it did train


# -- learning ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", [*SPEAKING, "projection_head"])
def test_sixteen_rows_are_learned_by_heart(method, tokenizer, rows):
    rows = rows[:16]
    base = load_minimind(BUNDLED_BASE, dtype=torch.float32)
    before = fingerprint(base.state_dict())
    prompt = build_prompt(tokenizer, LABELS, max_seq_len=80)
    torch.manual_seed(0)
    if method == "projection_head":
        model, prompt = ClsTunedModel(base, len(LABELS)), text_only_prompt(prompt)
        labels = torch.tensor([prompt.label_index(row) for row in rows])
        texts = collate(encode(rows, prompt), prompt, "cpu", False)

        def loss():
            return F.cross_entropy(model(texts.input_ids, texts.lengths), labels)

        def predictions():
            return model.eval()(texts.input_ids, texts.lengths).argmax(-1)
    else:
        if method == "lora":
            apply_lora(base, uniform_rank_map(base, 8))
        elif method == "adapter":
            apply_adapter(base, 8)
        model = base
        if method == "prompt_tuning":
            start = initial_virtual_tokens(base, 20, "text", list(prompt.prefix_ids), 0)
            model, prompt = PromptTuningModel(base, start), with_virtual_tokens(prompt, 20)
        examples = encode(rows, prompt)
        batch, questions = collate(examples, prompt, "cpu", True), collate(examples, prompt, "cpu", False)

        def loss():
            value, targets = answer_loss(model, batch)
            return value / targets

        def predictions():
            return label_log_probabilities(model, questions, prompt.label_ids).argmax(-1)

        labels = batch.labels
    trained = trained_tensors(model)
    start = copy.deepcopy({name: p.detach() for name, p in trained.items()})
    optimizer = torch.optim.Adam(trained.values(), lr=1e-2)
    for step in range(200):
        optimizer.zero_grad()
        value = loss()
        value.backward()
        if step == 1:
            assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in trained.values())
        optimizer.step()
        if value < 0.05:
            break
    assert torch.equal(predictions(), labels)
    assert all(not torch.equal(p, start[name]) for name, p in trained.items())
    frozen = {n.removeprefix("base."): p for n, p in model.state_dict().items() if n not in trained}
    assert fingerprint(frozen) == before


# -- word dropout -----------------------------------------------------------------------------------------------------


def test_word_dropout_leaves_out_words_of_the_text_alone_and_only_in_training(tiny_base, tokenizer, rows):
    prompt = build_prompt(tokenizer, LABELS, max_seq_len=64)
    whole = LanguageTask(tiny_base, prompt, rows[:8], rows[8:9], "cpu")
    task = LanguageTask(tiny_base, prompt, rows[:8], rows[8:9], "cpu", word_dropout=0.5)
    tiny_base.eval()
    assert torch.equal(task.batch(range(8)).input_ids, whole.batch(range(8)).input_ids)
    tiny_base.train()
    batches = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        batches.append(task.batch(range(8)))
    assert torch.equal(batches[0].input_ids, batches[1].input_ids)
    assert not torch.equal(batches[0].input_ids, batches[2].input_ids)
    kept = total = 0
    for row, example in enumerate(whole.train_examples):
        tail = len(prompt.suffix_ids) + len(prompt.label_ids[example.label]) - 1
        short = batches[0].input_ids[row, : batches[0].lengths[row]].tolist()
        full = [*example.ids, *prompt.label_ids[example.label][:-1]]
        assert short[-tail:] == full[-tail:]
        words = iter(full[:-tail])
        assert all(word in words for word in short[:-tail]), "not the text's own words in their order"
        kept, total = kept + len(short) - tail, total + len(full) - tail
    assert 0.35 < kept / total < 0.65
    targets = batches[0].targets[batches[0].targets != -100].tolist()
    assert targets == [token for example in whole.train_examples for token in prompt.label_ids[example.label]]


def test_cls_does_not_see_what_is_left_out(tiny_base):
    model = ClsTunedModel(tiny_base, 4).eval()
    ids, lengths = padded([list(range(5, 14)), list(range(20, 36))])
    cache, kept = model.text_cache(ids), torch.ones(ids.shape, dtype=torch.bool)
    everything = model.forward_cached(cache, lengths)
    torch.testing.assert_close(model.forward_cached(cache, lengths, kept), everything)
    kept[0, 3:6] = False
    without = model.forward_cached(cache, lengths, kept)
    assert (without[0] - everything[0]).abs().max() > 1e-4
    torch.testing.assert_close(without[1], everything[1])
    cache[0, ..., 3:6, :] = 7.0
    torch.testing.assert_close(model.forward_cached(cache, lengths, kept), without)
