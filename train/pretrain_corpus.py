"""What `pretrain_base.py` trains on, all from one corpus: tokenizer, token streams, packed windows, embeddings.

The corpus is JSONL (or .jsonl.xz / .jsonl.gz), one document `{"book": ..., "text": ...}` a line; every line of `text`
is a paragraph, and a line that begins with `# ` is the heading of what follows.
"""

import gzip
import json
import lzma
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.rows import DataError

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as MiniMind has them
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@dataclass(frozen=True)
class TokenSequence:
    """Token ids with the weight that each one's prediction has in the loss (0: it is only context)."""

    ids: np.ndarray  # uint16
    weights: np.ndarray  # float16


def read_corpus(path: Path) -> list[dict]:
    """The documents of a corpus file.

    Raises:
        DataError: a line is not a JSON object with a string `text`.
    """
    opener = {".xz": lzma.open, ".gz": gzip.open}.get(path.suffix, open)
    documents = []
    with opener(path, "rt", encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                document = json.loads(line)
                documents.append({"book": str(document.get("book", "")), "text": document["text"] + ""})
            except (json.JSONDecodeError, AttributeError, KeyError, TypeError) as error:
                raise DataError(f"{path}:{number}: expected an object with a string `text` ({error!r})") from None
    return documents


def split_held_out(documents: list[dict]) -> tuple[list[dict], list[dict]]:
    """The documents to train on, and one in a hundred that is kept from training."""
    return [document for i, document in enumerate(documents) if i % 100], documents[::100]


def train_tokenizer(documents: list[dict], vocab_size: int) -> PreTrainedTokenizerFast:
    """A byte-level BPE of `vocab_size` tokens with MiniMind's markers and a ChatML template."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(MARKERS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        max_token_length=32,
        show_progress=False,
    )
    tokenizer.train_from_iterator((document["text"] for document in documents), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=MARKERS[1],
        eos_token=MARKERS[2],
        pad_token=MARKERS[0],
        unk_token=MARKERS[0],
        chat_template=CHAT_TEMPLATE,
        model_max_length=32768,
        clean_up_tokenization_spaces=False,
    )


def language_sequences(documents: list[dict], tokenizer) -> list[TokenSequence]:
    """Each document as plain language modelling: its tokens and an end of text, all of weight 1."""
    sequences = []
    for document in tqdm(documents, desc="tokenize", unit="doc"):
        ids = [*tokenizer.encode(document["text"], add_special_tokens=False), tokenizer.pad_token_id]
        sequences.append(TokenSequence(np.array(ids, np.uint16), np.ones(len(ids), np.float16)))
    return sequences


def token_counts(sequences: list[TokenSequence], vocab_size: int) -> torch.Tensor:
    """How often each token occurs (V,)."""
    counts = np.zeros(vocab_size, np.int64)
    for sequence in sequences:
        counts += np.bincount(sequence.ids, minlength=vocab_size)
    return torch.from_numpy(counts)


def pack(
    language: list[TokenSequence], tasks: list[TokenSequence], length: int, seed: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Windows of `length` predictions: ids and weights (W, length + 1).

    Language is shuffled by document, laid end to end and cut wherever a window is full. Tasks are spread evenly and
    never cut (an answer whose label list stands in another window can only be guessed): a window opens with those that
    fall to it, and language fills the rest. Tasks longer than a window are left out, and what remains at the end.
    """
    rng = np.random.default_rng(seed)
    order = rng.permutation(len(language))
    stream_ids = np.concatenate([language[i].ids for i in order])
    stream_weights = np.concatenate([language[i].weights for i in order])
    waiting = [tasks[i] for i in rng.permutation(len(tasks)) if len(tasks[i].ids) <= length + 1]
    all_windows = (len(stream_ids) + sum(len(task.ids) for task in waiting)) / (length + 1)
    windows, used_language, used_tasks = [], 0, 0
    while True:
        window, room = [], length + 1
        due = len(waiting) * (len(windows) + 1) / all_windows
        while used_tasks < due - 0.5 and used_tasks < len(waiting) and len(waiting[used_tasks].ids) <= room:
            window.append(waiting[used_tasks])
            room -= len(waiting[used_tasks].ids)
            used_tasks += 1
        rest = slice(used_language, used_language + room)
        if rest.stop > len(stream_ids):
            break
        used_language = rest.stop
        window.append(TokenSequence(stream_ids[rest], stream_weights[rest]))
        windows.append(window)
    ids = np.array([np.concatenate([part.ids for part in window]) for window in windows], np.int32)
    weights = np.array([np.concatenate([part.weights for part in window]) for window in windows], np.float32)
    return torch.from_numpy(ids).view(-1, length + 1), torch.from_numpy(weights).view(-1, length + 1)


def corpus_embeddings(sequences: list[TokenSequence], vocab_size: int, size: int, standard_deviation: float = 0.03):
    """Token embeddings (V, size) from co-occurrence alone, to start training from.

    Counts within 5 tokens weighted by 1/distance, positive pointwise mutual information with context counts to the
    power 0.75, truncated SVD with the square root of the singular values
    (Levy and Goldberg 2014; Levy, Goldberg and Dagan 2015), scaled to `standard_deviation`.
    """
    ids = np.concatenate([sequence.ids for sequence in sequences]).astype(np.int64)
    counts = np.zeros(vocab_size * vocab_size, np.float32)
    for distance in range(1, 6):
        pairs = ids[:-distance] * vocab_size + ids[distance:]
        counts += np.bincount(pairs, minlength=len(counts)).astype(np.float32) / distance
    counts = torch.from_numpy(counts).view(vocab_size, vocab_size)
    counts += counts.T.clone()
    context = counts.sum(0) ** 0.75
    word = counts.sum(1, keepdim=True).clamp(min=1e-9)
    information = torch.log(counts / word / (context / context.sum()).clamp(min=1e-12)).clamp(min=0)
    generator_state = torch.random.get_rng_state()
    torch.manual_seed(0)
    left, values, _ = torch.svd_lowrank(information, q=size + 32, niter=3)
    torch.random.set_rng_state(generator_state)
    vectors = left[:, :size] * values[:size].sqrt()
    return vectors * (standard_deviation / vectors.std())
