"""Does a base read the list of labels that it is given? What a classifier that answers in words builds on.

    python tests/benchmarks/label_reading.py model/minimind_mini --corpus corpus.jsonl.xz

Asks tasks of `train/label_reading.py` about the documents that pre-training held out, and prints the accuracy of each
kind beside that of a blind choice. Subjects can be answered without the list, from what was learned of 22 books; the
headings and keywords of a held-out document cannot. Then it measures what reading a list takes first, copying: the loss
of a held-out text, and of the same text read a second time.
"""

import argparse
import statistics
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))
from dataset.classification_dataset import encode
from dataset.prompts import build_prompt
from dataset.rows import Row
from model.checkpoint import load_minimind, load_tokenizer
from train.label_reading import Task, draw_tasks
from train.pretrain_corpus import language_sequences, read_corpus, split_held_out
from train.scoring import language_scorer, score_examples

COPY_LENGTH, COPIES = 100, 64


def is_right(model, tokenizer, task: Task) -> bool:
    prompt = build_prompt(tokenizer, task.labels, "en", max_seq_len=512)
    row = Row(" ".join(task.text.split()[:70]), task.answer)
    scores = score_examples(language_scorer(model, prompt), encode([row], prompt), prompt, "cpu")
    return prompt.labels[int(scores.argmax())] == task.answer


@torch.inference_mode()
def copying(model, ids: np.ndarray) -> tuple[float, float]:
    """Nats a token of texts (COPIES, COPY_LENGTH), and of the same texts straight behind themselves."""
    texts = torch.from_numpy(ids[: COPIES * COPY_LENGTH].astype(np.int64)).view(COPIES, COPY_LENGTH)
    twice = torch.cat([texts, texts], dim=1)
    logits = model(input_ids=twice).logits[:, :-1]
    losses = F.cross_entropy(logits.transpose(1, 2), twice[:, 1:], reduction="none")  # (COPIES, 2 * COPY_LENGTH - 1)
    return losses[:, : COPY_LENGTH - 1].mean().item(), losses[:, COPY_LENGTH:].mean().item()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("base", type=Path, help="Hugging Face folder of the base, its tokenizer in it")
    parser.add_argument("--corpus", type=Path, required=True, help="what it was pre-trained on")
    parser.add_argument("--tasks", type=int, default=50_000, help="to draw; one in a hundred is on a held-out document")
    args = parser.parse_args()

    model, tokenizer = load_minimind(args.base, dtype=torch.float32), load_tokenizer(args.base)
    documents = read_corpus(args.corpus)
    _, held_out = split_held_out(documents)
    unseen = {paragraph for document in held_out for paragraph in document["text"].split("\n")}
    right, chance = defaultdict(list), defaultdict(list)
    for task in draw_tasks(documents, args.tasks, seed=1):
        if task.text in unseen:
            right[task.kind].append(is_right(model, tokenizer, task))
            chance[task.kind].append(1 / len(task.labels))
    for kind, answers in sorted(right.items()):
        print(
            f"{kind}: {statistics.mean(answers):.3f} of {len(answers)} right, blind {statistics.mean(chance[kind]):.3f}"
        )
    ids = np.concatenate([sequence.ids for sequence in language_sequences(held_out, tokenizer)])
    print("copying: {:.2f} nats a token, read a second time {:.2f}".format(*copying(model, ids)))


if __name__ == "__main__":
    main()
