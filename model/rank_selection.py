"""Choosing a LoRA rank for every layer from the spectrum of its gradient.

The gradient of a layer's weight shows which directions the task wants to change. Averaged over a few batches, matrix G
goes through a randomized SVD (Halko, Martinsson and Tropp, https://arxiv.org/abs/0909.4061); its rank is the smallest
r whose singular values hold the share tau of the whole energy:

    sigma_1^2 + ... + sigma_r^2  >=  tau * ||G||_F^2

The right side is the energy of all of G, not of the k values that were computed: with the latter as the whole, the rank
would come out too low.
"""

import json
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from model.model_lora import lora_parameter_count


@dataclass(frozen=True)
class LayerSpectrum:
    """What was found for one layer.

    Attributes:
        singular_values: the k largest, falling.
        energy: ||G||_F^2.
        rank: the chosen one.
        coverage: share of the energy that `rank` values hold.
        effective_rank: exp of the entropy of the energy shares of the k values (Roy and Vetterli 2007).
        saturated: the k values together do not reach tau, so that `rank` is k and the true rank is higher.
    """

    name: str
    shape: tuple[int, int]
    singular_values: list[float]
    energy: float
    rank: int
    coverage: float
    effective_rank: float
    saturated: bool


def mean_gradients(
    model: nn.Module, layers: dict[str, nn.Linear], batches: Iterable, loss: Callable
) -> dict[str, torch.Tensor]:
    """Gradients (float32) of the layers' weights, averaged over all targets of `batches`.

    Leaves no trace: requires_grad, gradients, training mode and random state are as before.

    Args:
        loss: batch -> (summed loss, number of targets).

    Raises:
        FloatingPointError: a gradient is not finite.
    """
    before = [(p, p.requires_grad, p.grad) for p in model.parameters()]
    was_training, random_state = model.training, torch.get_rng_state()
    weights = {name: layer.weight for name, layer in layers.items()}
    sums = {name: torch.zeros_like(weight, dtype=torch.float32) for name, weight in weights.items()}
    targets = 0
    try:
        model.eval().requires_grad_(False)
        for weight in weights.values():
            weight.requires_grad_(True)
        for batch in batches:
            value, count = loss(batch)
            for name, gradient in zip(weights, torch.autograd.grad(value, list(weights.values())), strict=True):
                sums[name] += gradient
            targets += count
    finally:
        for parameter, requires_grad, gradient in before:
            parameter.requires_grad_(requires_grad)
            parameter.grad = gradient
        model.train(was_training)
        torch.set_rng_state(random_state)
    for name, total in sums.items():
        if not torch.isfinite(total).all():
            raise FloatingPointError(f"the gradient of {name} is not finite: no rank can be chosen from it")
    return {name: total / max(targets, 1) for name, total in sums.items()}


def layer_spectrum(name: str, gradient: torch.Tensor, tau: float, k: int, niter: int, seed: int) -> LayerSpectrum:
    """Randomized SVD of one gradient and the rank that it asks for, between 1 and k.

    Args:
        tau: share of the energy to keep, 0 < tau <= 1.
        k: singular values to compute, capped by the matrix.
        niter: power iterations of the randomized SVD.
    """
    if not 0 < tau <= 1:
        raise ValueError(f"svd_tau {tau} is not a share of energy: give a number above 0 and at most 1")
    if k < 1 or niter < 0:
        raise ValueError(f"svd_k {k}, svd_q {niter}: give at least one singular value and no negative iterations")
    gradient = gradient.detach().float().cpu()
    energy = float(gradient.double().square().sum())
    k = min(k, *gradient.shape)
    if energy == 0:  # nothing to learn here: the smallest LoRA
        return LayerSpectrum(name, tuple(gradient.shape), [0.0] * k, 0.0, 1, 1.0, 1.0, False)
    with torch.random.fork_rng(devices=[]):  # svd_lowrank takes no generator
        torch.manual_seed(seed)
        oversampled = min(k + 10, *gradient.shape)
        values = torch.svd_lowrank(gradient, q=oversampled, niter=niter)[1][:k].double()
    shares = values.square() / energy
    held = shares.cumsum(0)
    reached = torch.nonzero(held >= tau - 1e-6)  # float32 values: a sum that should be 1 may end just below
    rank = int(reached[0]) + 1 if len(reached) else k
    known = shares[shares > 0] / shares.sum()
    return LayerSpectrum(
        name=name,
        shape=tuple(gradient.shape),
        singular_values=values.tolist(),
        energy=energy,
        rank=rank,
        coverage=min(float(held[rank - 1]), 1.0),
        effective_rank=math.exp(-float((known * known.log()).sum())),
        saturated=not len(reached),
    )


def select_ranks(
    gradients: dict[str, torch.Tensor], tau: float = 0.95, k: int = 64, niter: int = 2, seed: int = 0
) -> list[LayerSpectrum]:
    """A spectrum, and with it a rank, for every gradient matrix."""
    return [layer_spectrum(name, gradient, tau, k, niter, seed) for name, gradient in gradients.items()]


def rank_report(spectra: list[LayerSpectrum], model: nn.Module, tau: float, uniform_rank: int) -> str:
    """The choice as a table, with the parameters it costs against a uniform rank."""
    rank_map = {spectrum.name: spectrum.rank for spectrum in spectra}
    uniform = {s.name: min(uniform_rank, *s.shape) for s in spectra}
    lines = [f"{'layer':<36} {'shape':>11} {'rank':>5} {'energy kept':>12} {'effective rank':>15}"]
    for s in spectra:
        shape = f"{s.shape[0]}x{s.shape[1]}"
        note = f"  k = {len(s.singular_values)} values hold less than tau = {tau}" if s.saturated else ""
        lines.append(f"{s.name:<36} {shape:>11} {s.rank:>5} {s.coverage:>12.3f} {s.effective_rank:>15.1f}{note}")
    adaptive_count, uniform_count = lora_parameter_count(model, rank_map), lora_parameter_count(model, uniform)
    ranks = sorted(rank_map.values())
    lines.append(
        f"ranks {ranks[0]} to {ranks[-1]}, mean {sum(ranks) / len(ranks):.1f}; {adaptive_count:,} trained parameters "
        f"(uniform rank {uniform_rank}: {uniform_count:,})"
    )
    return "\n".join(lines)


def plot_spectra(spectra: list[LayerSpectrum], tau: float, path: Path) -> None:
    """Draw the chosen ranks by layer and kind, and how the energy is gathered, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 4.2), layout="constrained")
    bars, curves = figure.subplots(1, 2)
    kinds = list(dict.fromkeys(s.name.rpartition(".")[2] for s in spectra))
    colours = {kind: f"C{index}" for index, kind in enumerate(kinds)}
    for position, kind in enumerate(kinds):
        ranks = [s.rank for s in spectra if s.name.endswith(kind)]
        places = [layer + (position - (len(kinds) - 1) / 2) * 0.8 / len(kinds) for layer in range(len(ranks))]
        bars.bar(places, ranks, width=0.8 / len(kinds), color=colours[kind])
    bars.set(xlabel="layer", ylabel="LoRA rank", title="Chosen ranks")
    bars.set_xticks(range(sum(s.name.endswith(kinds[0]) for s in spectra)))
    drawn = set()
    for s in spectra:
        kind = s.name.rpartition(".")[2]
        held = [0.0]
        for value in s.singular_values:
            held.append(held[-1] + (value * value / s.energy if s.energy else 0.0))
        curves.plot(held, color=colours[kind], alpha=0.6, linewidth=1, label=None if kind in drawn else kind)
        drawn.add(kind)
    curves.axhline(tau, color="black", linestyle="--", linewidth=1, label=f"tau = {tau}")
    curves.set(xlabel="singular values kept", ylabel="share of the gradient's energy", ylim=(0, 1.02))
    curves.set_title("Energy of the gradients, a line a layer")
    figure.legend(*curves.get_legend_handles_labels(), loc="outside lower center", ncols=len(kinds) + 1)
    figure.savefig(path, dpi=120)


def read_rank_map(path: str | Path) -> dict[str, int]:
    """A rank map from JSON: {layer name: rank}.

    Raises:
        ValueError: the file is no such object.
    """
    try:
        rank_map = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"cannot read the rank map {path}: {error}") from None
    if not isinstance(rank_map, dict) or not rank_map or not all(type(r) is int for r in rank_map.values()):
        raise ValueError(f"{path}: a rank map is a JSON object of layer names and whole numbers")
    return rank_map
