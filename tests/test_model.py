"""The model against vectors that public MiniMind computed, and against itself: cache, padding, attentions."""

import json

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from model.checkpoint import load_minimind
from model.model_minimind import MiniMindConfig, MiniMindForCausalLM
from tests.conftest import GOLDEN

MODELS = sorted(path.stem for path in GOLDEN.glob("minimind*.safetensors"))


def golden(name: str):
    with safe_open(GOLDEN / f"{name}.safetensors", "pt") as file:
        tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        metadata = file.metadata()
    weights = {k.removeprefix("weights."): v for k, v in tensors.items() if k.startswith("weights.")}
    return weights, tensors, metadata


def golden_model(name: str):
    weights, tensors, metadata = golden(name)
    config = MiniMindConfig(generation=metadata["generation"], **json.loads(metadata["given"]))
    assert config.intermediate_size == json.loads(metadata["config"])["intermediate_size"]
    model = MiniMindForCausalLM(config)
    model.load_state_dict(weights, strict=True)
    return model.eval(), tensors


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_golden_logits_greedy_and_balance_loss(name):
    model, tensors = golden_model(name)
    logits = model(tensors["input_ids"]).logits
    torch.testing.assert_close(logits, tensors["logits"], atol=1e-5, rtol=0)
    mask = tensors["attention_mask_padded"]
    padded = model(tensors["input_ids"], attention_mask=mask).logits
    torch.testing.assert_close(padded[mask.bool()], tensors["logits_padded"][mask.bool()], atol=1e-5, rtol=0)
    greedy = model.generate(tensors["input_ids"][:1], max_new_tokens=8, do_sample=False, eos_token_id=None)
    assert torch.equal(greedy, tensors["greedy"])
    model.train()
    balance = model(tensors["input_ids"]).aux_loss
    torch.testing.assert_close(balance, tensors["aux_loss_train"], atol=1e-6, rtol=0)


@pytest.mark.parametrize("name", [name for name in MODELS if "yarn" not in name])
@pytest.mark.parametrize("form", [".pth", ".safetensors", "folder", "half .pth"])
@torch.no_grad()
def test_architecture_is_read_off_the_tensors(name, form, tmp_path):
    weights, tensors, _ = golden(name)
    path = tmp_path / "base"
    if form == "folder":
        golden_model(name)[0].save_pretrained(path)
    elif form == ".safetensors":
        path = tmp_path / "base.safetensors"
        weights.pop("lm_head.weight")  # tied: a file may leave it out
        save_file(weights, path)
    else:
        path = tmp_path / "base_64.pth"
        half = {f"module.{key}": value.half() for key, value in weights.items()}
        torch.save(half if "half" in form else weights, path)
    model = load_minimind(path, dtype=torch.float32)
    tolerance = 2e-2 if "half" in form else 1e-5
    torch.testing.assert_close(model(tensors["input_ids"]).logits, tensors["logits"], atol=tolerance, rtol=0)


@pytest.mark.parametrize("name", ["minimind2_dense", "minimind3_moe"])
@torch.no_grad()
def test_cache_padding_side_embeddings_and_attentions_agree(name):
    model, tensors = golden_model(name)
    ids = tensors["input_ids"]
    whole = model(ids, output_attentions=True, output_hidden_states=True)
    start = model(ids[:, :10], use_cache=True)
    rest = model(ids[:, 10:], past_key_values=start.past_key_values, use_cache=True)
    torch.testing.assert_close(torch.cat([start.logits, rest.logits], 1), whole.logits, atol=1e-5, rtol=0)
    embedded = model(inputs_embeds=model.model.embed_tokens(ids)).logits
    torch.testing.assert_close(embedded, whole.logits, atol=1e-5, rtol=0)
    padding = torch.zeros(len(ids), 4, dtype=ids.dtype)
    mask = torch.cat([padding, torch.ones_like(ids)], 1)
    left = model(torch.cat([padding, ids], 1), attention_mask=mask).logits[:, 4:]
    torch.testing.assert_close(left, whole.logits, atol=1e-5, rtol=0)
    assert len(whole.attentions) == model.config.num_hidden_layers == len(whole.hidden_states) - 1
    rows, length = ids.shape
    for weights in whole.attentions:
        assert weights.shape == (rows, model.config.num_attention_heads, length, length)
        torch.testing.assert_close(weights.sum(-1), torch.ones(weights.shape[:-1]))
        assert weights.triu(1).abs().max() == 0


@torch.no_grad()
def test_batched_generation_with_left_padding_equals_one_by_one():
    model, tensors = golden_model("minimind2_dense")
    prompts = [tensors["input_ids"][0, :9], tensors["input_ids"][1, :5]]
    alone = [
        model.generate(p[None], max_new_tokens=6, do_sample=False, eos_token_id=None)[0, len(p) :] for p in prompts
    ]
    batch = torch.stack([torch.nn.functional.pad(p, (9 - len(p), 0)) for p in prompts])
    mask = torch.stack([torch.nn.functional.pad(torch.ones_like(p), (9 - len(p), 0)) for p in prompts])
    arguments = {"attention_mask": mask, "max_new_tokens": 6, "do_sample": False, "eos_token_id": None}
    together = model.generate(batch, **arguments)[:, 9:]
    assert torch.equal(together, torch.stack(alone))
    assert torch.equal(together, model.generate(batch, use_cache=False, **arguments)[:, 9:])


def test_published_sizes():
    def parameters(**given):
        with torch.device("meta"):
            model = MiniMindForCausalLM(MiniMindConfig(**given))
            model.tie_weights()
        return sum(p.numel() for p in model.parameters()) / 1e6

    assert parameters() == pytest.approx(25.8, abs=0.1)
    assert parameters(hidden_size=768, num_hidden_layers=16) == pytest.approx(104, abs=0.5)
    assert parameters(hidden_size=640, use_moe=True) == pytest.approx(145, abs=0.5)
    assert parameters(generation="minimind3", hidden_size=768) == pytest.approx(63.9, abs=0.5)
