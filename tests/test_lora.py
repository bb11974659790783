"""LoRA: exact at the start, merged, in PEFT's hands, in public MiniMind's files; ranks from spectra."""

import json

import pytest
import torch
from peft import LoraConfig, get_peft_model
from safetensors import safe_open
from transformers import LlamaForCausalLM

from model.artifact import load_trained, trained_tensors
from model.checkpoint import CheckpointError, fingerprint, minimind_from_tensors
from model.model_lora import (
    ATTENTION_TARGETS,
    LoRALinear,
    apply_lora,
    lora_parameter_count,
    merge_lora,
    minimind_lora,
    rank_map_of,
    read_minimind_lora,
    target_layers,
    uniform_rank_map,
)
from model.rank_selection import layer_spectrum, mean_gradients, rank_report, select_ranks
from tests.conftest import GOLDEN, llama_config

IDS = torch.arange(3, 51).view(3, 16)


def shake(model: torch.nn.Module) -> None:
    """Give trained tensors values of which none is zero."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in trained_tensors(model).values():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.05)


@torch.no_grad()
def test_fresh_lora_is_the_base_bit_for_bit(tiny_base):
    before = tiny_base(IDS).logits
    apply_lora(tiny_base, uniform_rank_map(tiny_base, 4))
    assert torch.equal(tiny_base(IDS).logits, before)
    assert set(trained_tensors(tiny_base)) == {
        f"{name}.lora.{part}.weight" for name in target_layers(tiny_base) for part in "AB"
    }


def test_targets_reach_every_attention_matrix_under_grouped_queries(tiny_base):
    names = target_layers(tiny_base)
    assert len(names) == 4 * tiny_base.config.num_hidden_layers
    assert {name.rpartition(".")[2] for name in names} == set(ATTENTION_TARGETS)
    with pytest.raises(ValueError, match=r"'w_proj' is no linear layer"):
        target_layers(tiny_base, ("q_proj", "w_proj"))


@torch.no_grad()
def test_merged_equals_lora(tiny_base):
    apply_lora(tiny_base, {**uniform_rank_map(tiny_base, 3), "model.layers.1.mlp.up_proj": 5}, alpha=8)
    shake(tiny_base)
    with_lora = tiny_base(IDS).logits
    merge_lora(tiny_base)
    assert not any(isinstance(module, LoRALinear) for module in tiny_base.modules())
    torch.testing.assert_close(tiny_base(IDS).logits, with_lora, atol=1e-5, rtol=0)


@torch.no_grad()
def test_peft_computes_the_same_logits(tiny_base):
    ranks = {name: 2 + index % 3 for index, name in enumerate(target_layers(tiny_base))}
    llama = LlamaForCausalLM(llama_config(tiny_base.config))
    llama.load_state_dict(tiny_base.state_dict(), strict=True)
    apply_lora(tiny_base, ranks, alpha=6)
    shake(tiny_base)
    peft_config = LoraConfig(
        r=2,
        lora_alpha=6,
        target_modules=list(ATTENTION_TARGETS),
        rank_pattern=ranks,
        alpha_pattern=dict.fromkeys(ranks, 6),
    )
    peft = get_peft_model(llama, peft_config)
    theirs = peft.state_dict()
    for name, tensor in trained_tensors(tiny_base).items():
        key = "base_model.model." + name.replace("lora.A.", "lora_A.default.").replace("lora.B.", "lora_B.default.")
        theirs[key].copy_(tensor)
    torch.testing.assert_close(peft(IDS).logits, tiny_base(IDS).logits, atol=1e-5, rtol=0)


@pytest.mark.parametrize("name", ["upstream_lora_rank4", "seed_lora_rank_map"])
@torch.no_grad()
def test_public_lora_files_load_and_are_written_alike(name, tmp_path):
    with safe_open(GOLDEN / f"{name}_base.safetensors", "pt") as file:
        stored = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    weights = {k.removeprefix("weights."): v for k, v in stored.items() if k.startswith("weights.")}
    model = minimind_from_tensors(weights, {}, name)
    tensors = read_minimind_lora(GOLDEN / f"{name}.pth")
    ranks = rank_map_of(tensors)
    if name == "seed_lora_rank_map":
        assert ranks == json.loads((GOLDEN / f"{name}.json").read_text())
    apply_lora(model, ranks)
    load_trained(model, tensors, name)
    torch.testing.assert_close(model(stored["input_ids"]).logits, stored["logits"], atol=1e-5, rtol=0)
    written = minimind_lora(model)
    assert written.keys() == tensors.keys()
    for key, tensor in tensors.items():
        assert torch.equal(written[key], tensor.half())
    torch.save({f"module.{key}": value for key, value in written.items()}, tmp_path / "lora.pth")
    assert read_minimind_lora(tmp_path / "lora.pth").keys() == tensors.keys()


def test_bad_ranks_and_misfits_are_named(tiny_base):
    with pytest.raises(ValueError, match=r"rank 65 for model\.layers\.0\.self_attn\.q_proj"):
        apply_lora(tiny_base, {"model.layers.0.self_attn.q_proj": 65})
    with pytest.raises(ValueError, match="which the model does not have"):
        apply_lora(tiny_base, {"model.layers.9.self_attn.q_proj": 2})
    apply_lora(tiny_base, {"model.layers.0.self_attn.q_proj": 2})
    tensors = {"model.layers.0.self_attn.q_proj.lora.A.weight": torch.zeros(4, 64), "stray": torch.zeros(1)}
    with pytest.raises(CheckpointError) as error:
        load_trained(tiny_base, tensors, "file")
    for part in (
        "missing model.layers.0.self_attn.q_proj.lora.B.weight",
        "unexpected stray",
        "(4, 64), expected (2, 64)",
    ):
        assert part in str(error.value)


# -- rank selection ---------------------------------------------------------------------------------------------------


def matrix(values: list[float], rows: int = 96, columns: int = 64) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    left = torch.linalg.qr(torch.randn(rows, rows, generator=generator))[0][:, : len(values)]
    right = torch.linalg.qr(torch.randn(columns, columns, generator=generator))[0][:, : len(values)]
    return left @ torch.diag(torch.tensor(values)) @ right.T


@pytest.mark.parametrize(
    ("values", "tau", "rank"),
    [
        ([3.0, 2.0, 1.0], 0.64, 1),  # energies 9, 4, 1 of 14
        ([3.0, 2.0, 1.0], 0.65, 2),
        ([3.0, 2.0, 1.0], 0.95, 3),
        ([1.0] * 20, 0.95, 19),
        ([1.0] * 20, 1.0, 20),
        ([5.0], 1.0, 1),
    ],
)
def test_rank_is_exact_for_known_spectra(values, tau, rank):
    spectrum = layer_spectrum("x", matrix(values), tau, k=32, niter=2, seed=0)
    assert (spectrum.rank, spectrum.saturated) == (rank, False)
    assert spectrum.coverage == pytest.approx(sum(v * v for v in values[:rank]) / sum(v * v for v in values), abs=1e-5)


def test_coverage_is_of_the_whole_energy_and_saturation_is_said(tiny_base):
    slow = [i**-0.5 for i in range(1, 61)]
    spectrum = layer_spectrum("x", matrix(slow), 0.95, k=8, niter=4, seed=0)
    held = sum(1 / i for i in range(1, 9)) / sum(1 / i for i in range(1, 61))
    assert spectrum.saturated and spectrum.rank == 8
    assert spectrum.coverage == pytest.approx(held, abs=1e-3)  # of the k values alone it would be 1
    gradient = {"model.layers.0.self_attn.q_proj": matrix(slow, 64, 64)}
    report = rank_report(select_ranks(gradient, 0.95, k=8), tiny_base, 0.95, uniform_rank=8)
    assert "k = 8 values hold less than tau" in report


def test_zero_gradient_gets_rank_one_and_nan_is_refused(tiny_base):
    assert layer_spectrum("x", torch.zeros(8, 8), 0.95, 4, 2, 0).rank == 1
    layers = target_layers(tiny_base)
    with pytest.raises(FloatingPointError, match=r"q_proj is not finite"):
        mean_gradients(tiny_base, layers, [IDS], lambda ids: (tiny_base(ids).logits.sum() * float("nan"), 1))


def test_probe_leaves_no_trace_and_averages_over_targets(tiny_base):
    tiny_base.train()
    frozen = tiny_base.model.layers[0].self_attn.q_proj.weight
    frozen.requires_grad_(False)
    before = (
        fingerprint(tiny_base.state_dict()),
        torch.get_rng_state(),
        [p.requires_grad for p in tiny_base.parameters()],
    )

    def loss(ids):
        torch.rand(3)  # a loss that draws random numbers
        logits = tiny_base(ids).logits[:, :-1].flatten(0, 1)
        return torch.nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum"), ids[:, 1:].numel()

    layers = target_layers(tiny_base)
    apart = mean_gradients(tiny_base, layers, [IDS[:1], IDS[1:]], loss)
    together = mean_gradients(tiny_base, layers, [IDS], loss)
    for name in layers:
        torch.testing.assert_close(apart[name], together[name], atol=1e-6, rtol=1e-4)
    assert tiny_base.training and all(p.grad is None for p in tiny_base.parameters())
    assert [p.requires_grad for p in tiny_base.parameters()] == before[2]
    assert torch.equal(torch.get_rng_state(), before[1])
    assert fingerprint(tiny_base.state_dict()) == before[0]
    state = torch.get_rng_state()
    first = select_ranks(apart)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == select_ranks(apart)
    ranks = {s.name: s.rank for s in first}
    apply_lora(tiny_base, ranks)
    assert sum(p.numel() for p in trained_tensors(tiny_base).values()) == lora_parameter_count(tiny_base, ranks)
