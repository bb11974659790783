"""How fast this project is beside the way it replaces and beside PEFT, all in one run.

    python tests/benchmarks/run.py                  # or: make bench

Contenders take turns, round after round (A B C A B C ...), so that a drift of the machine cancels; medians and their
ratios are printed and written to out/bench.json. Larger is better, but for `memory_*` and `rank_selection_share`.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
import torch
from tqdm import tqdm

from tests.benchmarks import ours, seed_way, shape, with_peft
from tests.benchmarks.texts import long_rows, short_rows

HEAD_EPOCHS = 20
DEFAULT_STEPS = 10 * 43  # training with the defaults: 10 epochs of 675 bundled rows in batches of 16
PROBE_BATCHES = 30  # and its rank selection


def contenders() -> dict[str, Callable[[], Callable[[], float]]]:
    """Name -> what sets a contender up and returns its timed run, which returns how much it did.

    The seed's way takes the same time for every text, whatever its length, and gets fewer of the short ones.
    """
    short, articles = short_rows(64), long_rows(16)
    return {
        "lora_long_ours": lambda: ours.training("lora", articles),
        "lora_long_seed": lambda: seed_way.training("lora", articles),
        "lora_long_peft_float32": lambda: with_peft.training("lora", articles, bfloat16=False),
        "lora_long_peft_bfloat16": lambda: with_peft.training("lora", articles, bfloat16=True),
        "lora_short_ours": lambda: ours.training("lora", short),
        "lora_short_seed": lambda: seed_way.training("lora", short[:8]),
        "lora_short_peft_float32": lambda: with_peft.training("lora", short, bfloat16=False),
        "lora_short_peft_bfloat16": lambda: with_peft.training("lora", short, bfloat16=True),
        "adapter_ours": lambda: ours.training("adapter", articles),
        "adapter_seed": lambda: seed_way.training("adapter", articles),
        "prompt_ours": lambda: ours.training("prompt", articles),
        "prompt_seed": lambda: seed_way.training("prompt", articles),
        "prompt_peft_float32": lambda: with_peft.training("prompt", articles, bfloat16=False),
        "prompt_peft_bfloat16": lambda: with_peft.training("prompt", articles, bfloat16=True),
        "head_ours": lambda: ours.head_training(short, HEAD_EPOCHS),
        "head_seed": lambda: seed_way.head_training(short[:8]),
        "head_peft_float32": lambda: with_peft.head_training(short, bfloat16=False),
        "head_peft_bfloat16": lambda: with_peft.head_training(short, bfloat16=True),
        "scoring_ours": lambda: ours.scoring(short),
        "scoring_seed": lambda: seed_way.scoring(short[:4]),
        "scoring_generate": lambda: with_peft.generating(short),
        "ranks_ours": lambda: ours.rank_selection(short),
        "ranks_eva": lambda: with_peft.eva(short),
    }


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--rounds", type=int, default=3, help="turns of every contender (default 3)")
    parser.add_argument("--only", default="", help="contenders whose name begins so; no file is written then")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--report", type=Path, default=Path("out/bench.json"))
    parser.add_argument("--memory_of", help=argparse.SUPPRESS)  # a child process that tells its peak
    return parser.parse_args()


def measure(names: list[str], rounds: int) -> dict[str, list[float]]:
    """How much each contender did a second, a value a round; a first turn that nobody counts warms up."""
    everyone = contenders()
    runs = {name: everyone[name]() for name in names}
    rates: dict[str, list[float]] = {name: [] for name in names}
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
            rates.setdefault("limit", []).append(shape.matrix_rate(torch.float32))
    bar.close()
    return rates


def peak_memory(name: str, threads: int) -> float:
    """GiB of resident memory at the highest point of a process of its own that runs one contender once."""
    command = [sys.executable, __file__, "--memory_of", name, "--threads", str(threads)]
    return int(subprocess.run(command, capture_output=True, text=True, check=True).stdout.split()[-1]) / 2**20


def ratios_of(rate: dict[str, float], memory: dict[str, float]) -> dict[str, float]:
    """The comparison, from median rates and peak memories."""

    def peft(name: str) -> float:
        return max(rate[f"{name}_peft_float32"], rate[f"{name}_peft_bfloat16"])

    ratios = {}
    for name in ("lora_long", "lora_short", "prompt", "head"):
        ratios[f"{name}_vs_seed"] = rate[f"{name}_ours"] / rate[f"{name}_seed"]
        ratios[f"{name}_vs_peft"] = rate[f"{name}_ours"] / peft(name)
    ratios["adapter_vs_seed"] = rate["adapter_ours"] / rate["adapter_seed"]
    ratios["scoring_vs_seed"] = rate["scoring_ours"] / rate["scoring_seed"]
    ratios["scoring_vs_generate"] = rate["scoring_ours"] / rate["scoring_generate"]
    training_seconds = DEFAULT_STEPS * shape.BATCH_SIZE / rate["lora_short_ours"]
    ratios["rank_selection_share"] = PROBE_BATCHES / rate["ranks_ours"] / training_seconds
    ratios["rank_selection_vs_eva"] = rate["ranks_ours"] / rate["ranks_eva"]
    articles = long_rows(16)
    operations = shape.step_operations(shape.new_base(), shape.new_prompt(), articles, batches=1)
    ratios["limit_share"] = operations * rate["lora_long_ours"] / len(articles) / rate["limit"]
    ratios["memory_vs_seed"] = memory["lora_long_ours"] / memory["lora_long_seed"]
    ratios["memory_vs_peft"] = memory["lora_long_ours"] / memory["lora_long_peft_float32"]
    return ratios


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    if args.memory_of:
        contenders()[args.memory_of]()()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)  # KiB
        return
    names = [name for name in contenders() if name.startswith(args.only)]
    rates = measure(names, args.rounds)
    rate = {name: statistics.median(values) for name, values in rates.items()}
    print(f"{'':<26} {'texts a second':>15} {'lowest':>9} {'highest':>9}")
    for name, values in rates.items():
        scale = 1e9 if name == "limit" else 1.0
        shown = "limit, GFLOP/s" if name == "limit" else name
        print(f"{shown:<26} {rate[name] / scale:>15.2f} {min(values) / scale:>9.2f} {max(values) / scale:>9.2f}")
    if args.only:
        return
    memory = {
        name: peak_memory(name, args.threads) for name in ("lora_long_ours", "lora_long_seed", "lora_long_peft_float32")
    }
    ratios = ratios_of(rate, memory)
    print()
    for name, value in ratios.items():
        print(f"{name:<26} {value:>8.2f}")
    print("peak memory, GiB:", {name: round(value, 2) for name, value in memory.items()})
    prompt = shape.new_prompt()
    tokens = {"long": shape.prompt_tokens(prompt, long_rows(16)) / 16}
    tokens["short"] = shape.prompt_tokens(prompt, short_rows(64)) / 64
    per_second = {name: rate[name] * tokens["long" if "long" in name else "short"] for name in rate if "lora_" in name}
    report = {"ratios": ratios, "tokens_per_second": per_second, "peak_gib": memory, "rates": rates}
    args.report.parent.mkdir(parents=True, exist_ok=True)
    args.report.write_text(json.dumps({**report, "machine": shape.machine()}, indent=1) + "\n")
    print(f"  {args.report}")


if __name__ == "__main__":
    main()
