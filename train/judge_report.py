"""What the judge found and what it costs: counts, scores, agreement with the gold labels, for JSON and for people."""

import argparse
import json
import os
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

# The first two are what DeepSeek's documentation gives for its tokenizer.
TOKENS_PER_ASCII_CHARACTER, TOKENS_PER_OTHER_CHARACTER, TOKENS_PER_ANSWER = 0.3, 0.6, 50
STATUSES = ("judged", "unparseable", "refused", "stopped_by_length")  # beside "error", which is not kept


def make_report(rows: Sequence[dict], answers: Sequence[dict]) -> dict:
    """Return the counts by status and the scores; only what was judged counts as right or wrong.

    Where gold labels are known, `exact_match_accuracy` is that of the judged items, `judge_gold_kappa` compares the
    judge's labels with the gold ones, `label_noise` lists the rows (from 1) where judge and model agree against gold.
    """
    counts = Counter(answer["status"] for answer in answers)
    errors = [answer["reason"] for answer in answers if answer["status"] == "error"]
    numbered = enumerate(zip(rows, answers, strict=True), start=1)
    judged = [(i, row, answer) for i, (row, answer) in numbered if answer["status"] == "judged"]
    with_gold = [(i, row, answer) for i, row, answer in judged if row.get("label") is not None]
    noise = [
        {"row": i, "text": row["text"], "gold": row["label"], "prediction": row["prediction"], **answer}
        for i, row, answer in with_gold
        if row["label"] != row["prediction"] == answer["label"]
    ]
    return {
        "n": len(rows),
        **{status: counts[status] for status in STATUSES},
        "errors": len(errors),
        "error_reasons": Counter(errors),
        "judged_accuracy": _share(answer["verdict"] == "correct" for _, _, answer in judged),
        "exact_match_accuracy": _share(row["label"] == row["prediction"] for _, row, _ in with_gold),
        "judge_gold_kappa": kappa([(answer["label"], row["label"]) for _, row, answer in with_gold]),
        "label_noise": noise,
    }


def _share(outcomes: Iterable[bool]) -> float | None:
    outcomes = list(outcomes)
    return sum(outcomes) / len(outcomes) if outcomes else None


def kappa(pairs: Sequence[tuple[str, str]], resamples: int = 1000) -> dict | None:
    """Return Cohen's kappa of two raters with a 95 % percentile bootstrap interval over the items.

    None where it is undefined: no items, or a single label throughout.
    """
    names = sorted({label for pair in pairs for label in pair})
    if len(names) < 2:
        return None
    counts = Counter(pairs)
    table = np.array([[counts[first, second] for second in names] for first in names])
    # To draw n items with replacement is to draw the cells of their table from a multinomial.
    draws = np.random.default_rng(0).multinomial(len(pairs), table.ravel() / len(pairs), size=resamples)
    shares = np.stack([table, *draws.reshape(-1, *table.shape)]) / len(pairs)  # (1 + resamples, labels, labels)
    chance = (shares.sum(1) * shares.sum(2)).sum(1)
    with np.errstate(invalid="ignore"):  # a resample of one label has no kappa and is left out below
        values = (np.trace(shares, axis1=1, axis2=2) - chance) / (1 - chance)
    low, high = np.nanpercentile(values[1:], [2.5, 97.5])
    return {"value": float(values[0]), "low": float(low), "high": float(high), "n": len(pairs)}


def estimate(n: int, cached: int, requests: Sequence[dict], args: argparse.Namespace) -> dict:
    """Return the tokens, counted from characters, and the USD that these requests would take without any repair.

    Args:
        n: how many items there are.
        cached: how many of them have been answered before.
        requests: what is to be sent for the others; the same request for several items counts once.
    """
    prompts = "".join(message["content"] for request in requests for message in request["messages"])
    plain = len(prompts.encode("ascii", "ignore"))
    tokens = round(TOKENS_PER_ASCII_CHARACTER * plain + TOKENS_PER_OTHER_CHARACTER * (len(prompts) - plain))
    used = {"prompt_tokens": tokens, "completion_tokens": TOKENS_PER_ANSWER * len(requests)}
    counts = {"dry_run": True, "n": n, "cached": cached, "to_send": len(requests)}
    return {**counts, **used, "cost_usd": cost(used, args)}


def cost(used: dict, args: argparse.Namespace) -> float | None:
    """Return the USD for tokens at the prices of the flags; None where one is not given."""
    if args.judge_price_in is None or args.judge_price_out is None:
        return None
    return (used["prompt_tokens"] * args.judge_price_in + used["completion_tokens"] * args.judge_price_out) / 1e6


def usage_text(used: dict, usd: float | None) -> str:
    """Tokens and what they cost, for people."""
    price = "cost unknown without --judge_price_in and --judge_price_out" if usd is None else f"${usd:.4f}"
    return f"{used['prompt_tokens']:,} prompt and {used['completion_tokens']:,} answer tokens, {price}"


def print_report(report: dict) -> None:
    """Print a report or an estimate of `run_judge`."""
    usage = report.get("this_run", report)
    tokens = usage_text(usage, usage["cost_usd"])
    if "dry_run" in report:
        print(f"{report['n']} items, {report['cached']} cached; to send: {report['to_send']} requests, about {tokens}")
        rates = (TOKENS_PER_ASCII_CHARACTER, TOKENS_PER_OTHER_CHARACTER, TOKENS_PER_ANSWER)
        print("(estimated at {} tokens an ASCII character, {} any other and {} an answer)".format(*rates))
        return
    counts = ", ".join(f"{report[status]} {status.replace('_', ' ')}" for status in (*STATUSES, "errors"))
    print(f"judge {report['judge']}{' (saw the gold label)' * report['judge_saw_gold']}, {report['n']} items: {counts}")
    for reason, count in report["error_reasons"].items():
        print(f"  {count} times: {reason!r}")
    for name in ("judged_accuracy", "exact_match_accuracy"):
        if report[name] is not None:
            print(f"{name:<21} {report[name]:.4f}")
    if report["judge_gold_kappa"]:
        values = "{value:.4f}, 95 % interval {low:.4f} to {high:.4f} ({n} items)"
        print("judge_gold_kappa      " + values.format(**report["judge_gold_kappa"]))
    for item in report["label_noise"]:
        print(f"  row {item['row']}: judge and model say {item['prediction']!r}, the gold label is {item['gold']!r}")
    print(f"this run: {usage['requests']} requests, {tokens}")


def write_report(path: Path, report: dict) -> None:
    """Write a report as JSON, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.write_bytes(json.dumps(report, ensure_ascii=False, indent=2).encode("utf-8", "replace"))
    os.replace(temporary, path)
