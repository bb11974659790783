"""How fast this project is beside the way it replaces and beside PEFT, all in one run.

    python tests/benchmarks/run.py                  # or: make bench
    python tests/benchmarks/run.py --only lora_long --rounds 1

Contenders take turns, round after round (A B C A B C ...), so that a drift of the machine cancels; medians and their
ratios are printed and written to out/bench.json. Larger is better, but for `memory_*` and `rank_selection_share`.
Ours runs in the type that the scripts' `--dtype auto` takes here (`--dtype` gives another); PEFT's fastest type counts.
"""

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from tqdm import tqdm

from model.checkpoint import compute_dtype
from tests.benchmarks import machine, ours, seed_way, shape, with_peft
from tests.benchmarks.texts import long_rows, short_rows

HEAD_EPOCHS = 20
DEFAULT_STEPS = 10 * 43  # training with the defaults: 10 epochs of 675 bundled rows in batches of 16
PROBE_BATCHES = 30  # and its rank selection
SHORT_TEXTS, LONG_TEXTS = 32, shape.BATCH_SIZE  # a turn; the long ones are one step
SEED_TEXTS = 4  # a turn of the seed's way
LIMITS = {"limit_float32": torch.float32, "limit_bfloat16": torch.bfloat16}


def contenders(dtype: torch.dtype, seed_texts: int = SEED_TEXTS) -> dict[str, Callable[[], Callable[[], float]]]:
    """Name -> what sets a contender up and returns its timed run, which returns how much it did.

    LoRA of ours runs in both types, beside each other; everything else of ours in `dtype`. The seed's way takes the
    same time for every text, whatever its length, and gets only `seed_texts` of them.
    """
    short, articles = short_rows(SHORT_TEXTS), long_rows(LONG_TEXTS)
    float32, bfloat16 = torch.float32, torch.bfloat16
    return {
        "lora_long_ours_float32": lambda: ours.training("lora", articles, float32),
        "lora_long_ours_bfloat16": lambda: ours.training("lora", articles, bfloat16),
        "lora_long_seed": lambda: seed_way.training("lora", articles[:seed_texts]),
        "lora_long_peft_float32": lambda: with_peft.training("lora", articles, "float32"),
        "lora_long_peft_autocast": lambda: with_peft.training("lora", articles, "autocast"),
        "lora_long_peft_bfloat16": lambda: with_peft.training("lora", articles, "bfloat16"),
        "lora_short_ours_float32": lambda: ours.training("lora", short, float32),
        "lora_short_ours_bfloat16": lambda: ours.training("lora", short, bfloat16),
        "lora_short_seed": lambda: seed_way.training("lora", short[:seed_texts]),
        "lora_short_peft_float32": lambda: with_peft.training("lora", short, "float32"),
        "lora_short_peft_autocast": lambda: with_peft.training("lora", short, "autocast"),
        "lora_short_peft_bfloat16": lambda: with_peft.training("lora", short, "bfloat16"),
        "adapter_ours": lambda: ours.training("adapter", articles, dtype),
        "adapter_seed": lambda: seed_way.training("adapter", articles[:seed_texts]),
        "prompt_ours": lambda: ours.training("prompt", articles, dtype),
        "prompt_seed": lambda: seed_way.training("prompt", articles[:seed_texts]),
        "prompt_peft_float32": lambda: with_peft.training("prompt", articles, "float32"),
        "prompt_peft_autocast": lambda: with_peft.training("prompt", articles, "autocast"),
        "prompt_peft_bfloat16": lambda: with_peft.training("prompt", articles, "bfloat16"),
        "head_ours": lambda: ours.head_training(short, HEAD_EPOCHS, dtype),
        "head_seed": lambda: seed_way.head_training(short[:seed_texts]),
        "head_peft_float32": lambda: with_peft.head_training(short, "float32"),
        "head_peft_autocast": lambda: with_peft.head_training(short, "autocast"),
        "head_peft_bfloat16": lambda: with_peft.head_training(short, "bfloat16"),
        "scoring_ours": lambda: ours.scoring(short, dtype),
        "scoring_seed": lambda: seed_way.scoring(short[:seed_texts]),
        "scoring_generate_float32": lambda: with_peft.generating(short, "float32"),
        "scoring_generate_bfloat16": lambda: with_peft.generating(short, "bfloat16"),
        "ranks_gradients": lambda: ours.gradients(short, dtype),
        "ranks_spectra": lambda: ours.spectra(short, dtype),
        "ranks_eva_float32": lambda: with_peft.eva(short, "float32"),
        "ranks_eva_autocast": lambda: with_peft.eva(short, "autocast"),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender (default 3)")
    parser.add_argument("--only", default="", help="contenders whose name begins so; no file is written then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--dtype", default="auto", choices=("auto", "bfloat16", "float32"), help="of our frozen weights"
    )
    parser.add_argument("--report", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # a child process that tells its peak
    return parser.parse_args()


def measure(names: list[str], rounds: int, dtype: torch.dtype) -> dict[str, list[float]]:
    """How much each contender did a second, a value a round; a first turn that nobody counts warms up."""
    everyone = contenders(dtype)
    runs = {name: everyone[name]() for name in names}
    rates: dict[str, list[float]] = {name: [] for name in [*names, *LIMITS]}
    bar = tqdm(total=(rounds + 1) * len(names), unit="turn")
    for turn in range(rounds + 1):
        for name, run in runs.items():
            bar.set_postfix_str(name)
            start = time.perf_counter()
            amount = run()
            if turn > 0:
                rates[name].append(amount / (time.perf_counter() - start))
            bar.update()
        if turn > 0:
            for name, limit_dtype in LIMITS.items():
                rates[name].append(machine.matrix_rate(limit_dtype))
    bar.close()
    return rates


def peak_memory(name: str, args: argparse.Namespace) -> float:
    """GiB of resident memory at the highest point of a process of its own that runs one contender once."""
    command = [sys.executable, __file__, "--memory_of", name, "--threads", str(args.threads), "--dtype", args.dtype]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 2**30


def fastest(rate: dict[str, float], beginning: str) -> str:
    """The name of the fastest contender whose name begins so: a rival in its best type."""
    return max((name for name in rate if name.startswith(beginning)), key=rate.get)


def ratios_of(rate: dict[str, float], dtype: str) -> dict[str, float]:
    """Speeds against the rivals', from median rates; only comparisons whose two sides were measured."""
    against = {
        f"{name}_vs_{rival}": (f"{name}_ours_{dtype}" if name.startswith("lora") else f"{name}_ours", f"{name}_{rival}")
        for name in ("lora_long", "lora_short", "adapter", "prompt", "head", "scoring")
        for rival in ("seed", "peft", "generate")
    }
    ratios = {}
    for name, (mine, rival) in against.items():
        if mine in rate and any(other.startswith(rival) for other in rate):
            ratios[name] = rate[mine] / rate[fastest(rate, rival)]
    if "lora_long_ours_bfloat16" in rate:
        operations = machine.step_operations(shape.new_base(), shape.new_prompt(), long_rows(LONG_TEXTS))
        ratios["limit_share"] = operations * rate["lora_long_ours_bfloat16"] / LONG_TEXTS / rate["limit_bfloat16"]
    if "ranks_gradients" in rate:
        seconds = PROBE_BATCHES / rate["ranks_gradients"] + 1 / rate["ranks_spectra"]
        ratios["rank_selection_vs_eva"] = PROBE_BATCHES / rate[fastest(rate, "ranks_eva")] / seconds
        if f"lora_short_ours_{dtype}" in rate:
            ratios["rank_selection_share"] = (
                seconds * rate[f"lora_short_ours_{dtype}"] / (DEFAULT_STEPS * shape.BATCH_SIZE)
            )
    return ratios


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    dtype = compute_dtype(args.dtype, "cpu")
    if args.memory_of:
        contenders(dtype, seed_texts=LONG_TEXTS)[args.memory_of]()()  # every one with the same batch
        print(machine.peak_resident_memory())
        return
    started = time.perf_counter()
    names = [name for name in contenders(dtype) if name.startswith(args.only)]
    rates = measure(names, args.rounds, dtype)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'a second: texts, batches':<28} {'median':>9} {'lowest':>9} {'highest':>9}")
    for name, values in rates.items():
        scale, shown = (1e9, f"{name}, GFLOP") if name in LIMITS else (1.0, name)
        print(f"{shown:<28} {rate[name] / scale:>9.2f} {min(values) / scale:>9.2f} {max(values) / scale:>9.2f}")
    type_name = str(dtype).removeprefix("torch.")
    ratios = ratios_of(rate, type_name)
    memory = {}
    if not args.only:
        peft = fastest(rate, "lora_long_peft")
        memory = {name: peak_memory(name, args) for name in (f"lora_long_ours_{type_name}", "lora_long_seed", peft)}
        mine, seed, others = memory.values()
        ratios |= {"memory_vs_seed": mine / seed, "memory_vs_peft": mine / others}
    print(f"\nours in {type_name}")
    for name, value in ratios.items():
        print(f"{name:<28} {value:>9.3f}")
    if args.only:
        return
    print("peak memory, GiB:", ", ".join(f"{name} {value:.2f}" for name, value in memory.items()))
    prompt = shape.new_prompt()
    short = shape.prompt_tokens(prompt, short_rows(SHORT_TEXTS)) / SHORT_TEXTS
    long = shape.prompt_tokens(prompt, long_rows(LONG_TEXTS)) / LONG_TEXTS
    report = {
        "ratios": ratios,
        "tokens_per_second": {
            name: rate[name] * (short if "short" in name else long)
            for name in names
            if name.startswith(("lora", "adapter", "prompt"))
        },
        "machine": {
            **machine.machine(),
            "our_dtype": type_name,
            "limit_gflops": {name: rate[name] / 1e9 for name in LIMITS},
            "minutes": (time.perf_counter() - started) / 60,
        },
        "peak_gib": memory,
        "rates": rates,
    }
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps(report, indent=1) + "\n")
    print(f"{(time.perf_counter() - started) / 60:.1f} minutes; {args.report}")


if __name__ == "__main__":
    main()
