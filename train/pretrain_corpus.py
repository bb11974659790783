"""What `pretrain_base.py` trains on, all from one corpus: tokenizer, token streams, label-reading tasks, embeddings.

The corpus is JSONL (or .jsonl.xz / .jsonl.gz), one document `{"book": ..., "text": ...}` a line; every line of `text`
is a paragraph, and a line that begins with `# ` is the heading of what follows.
"""

import collections
import gzip
import json
import lzma
import random
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from tqdm import tqdm
from transformers import PreTrainedTokenizerFast

from dataset.prompts import build_prompt
from dataset.rows import DataError, Row

MARKERS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as MiniMind has them
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# Words for what a book is about, for the label-reading tasks; books that are not named here give heading tasks only.
SUBJECTS = {
    "american-government": ["politics", "government", "elections", "Congress"],
    "anatomy-physiology": ["anatomy", "medicine", "health", "biology"],
    "astronomy": ["astronomy", "space", "science"],
    "business-ethics": ["business ethics", "business", "ethics"],
    "business-law": ["law", "business law", "courts"],
    "college-physics-bundle": ["physics", "science", "mechanics"],
    "college-success-bundle": ["study skills", "college", "education"],
    "entrepreneurship": ["entrepreneurship", "business", "start-ups"],
    "introduction-anthropology": ["anthropology", "culture", "peoples of the world"],
    "introduction-business": ["business", "companies", "management"],
    "introduction-intellectual-property": ["patents", "intellectual property", "law"],
    "introduction-philosophy": ["philosophy", "ideas", "ethics"],
    "introduction-political-science": ["politics", "political science", "government"],
    "introduction-sociology": ["sociology", "society"],
    "principles-economics-bundle": ["economics", "economy", "markets"],
    "principles-finance": ["finance", "business", "investing"],
    "principles-marketing": ["marketing", "business", "advertising"],
    "psychology": ["psychology", "mind", "health"],
    "us-history": ["American history", "history"],
    "workplace-software-skills": ["software", "technology", "tech", "computers"],
    "world-history": ["world history", "history", "world"],
    "writing-guide": ["writing", "literature", "language"],
}


@dataclass(frozen=True)
class Sequence:
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


def language_sequences(documents: list[dict], tokenizer) -> list[Sequence]:
    """Each document as plain language modelling: its tokens and an end of text, all of weight 1."""
    sequences = []
    for document in tqdm(documents, desc="tokenize", unit="doc"):
        ids = [*tokenizer.encode(document["text"], add_special_tokens=False), tokenizer.pad_token_id]
        sequences.append(Sequence(np.array(ids, np.uint16), np.ones(len(ids), np.float16)))
    return sequences


def label_reading_sequences(
    documents: list[dict], tokenizer, count: int, answer_weight: float, seed: int
) -> list[Sequence]:
    """`count` classification tasks in the template that fine-tuning uses, made from headings and subjects.

    Half ask which of 2 to 8 section headings a paragraph stands under, half which of 2 to 10 subjects it is about.
    The label list is context only; the text weighs 1 and the answer `answer_weight` a token.
    """
    rng = random.Random(seed)
    paragraphs = _paragraphs(documents)
    by_book = collections.defaultdict(list)
    for book, heading, _ in paragraphs:
        by_book[book].append(heading)
    books_with_subject = [p for p in paragraphs if p[0] in SUBJECTS]
    sequences = []
    for _ in tqdm(range(count), desc="label-reading tasks", unit="task"):
        by_subject = books_with_subject and rng.random() < 0.5
        book, heading, text = rng.choice(books_with_subject if by_subject else paragraphs)
        if by_subject:
            answer, labels = _subject_labels(book, rng)
        else:
            answer, labels = heading, _heading_labels(book, heading, by_book, rng)
        recase = rng.choice([str, str, str.lower, str.title, str.capitalize])
        answer, labels = recase(answer), [recase(label) for label in labels]
        if len(set(labels)) < len(labels):
            continue
        prompt = build_prompt(tokenizer, labels, "en", max_seq_len=512)
        text_ids = prompt.text_ids(Row(text, None))[:200]
        answer_ids = prompt.label_ids[labels.index(answer)]
        ids = [*prompt.prefix_ids, *text_ids, *prompt.suffix_ids, *answer_ids]
        weights = np.zeros(len(ids), np.float16)
        weights[len(prompt.prefix_ids) : len(prompt.prefix_ids) + len(text_ids)] = 1
        weights[-len(answer_ids) :] = answer_weight
        sequences.append(Sequence(np.array(ids, np.uint16), weights))
    return sequences


def _paragraphs(documents: list[dict]) -> list[tuple[str, str, str]]:
    """(book, heading, paragraph) for paragraphs of 25 words and more under a heading that is no stock phrase."""
    found = []
    for document in documents:
        heading = ""
        for line in document["text"].split("\n"):
            if line.startswith("# "):
                heading = line[2:].strip()
            elif heading and 3 <= len(heading) <= 60 and len(line.split()) >= 25:
                found.append((document["book"], heading, line))
    documents_with = collections.Counter(heading for _, heading in {(book, heading) for book, heading, _ in found})
    return [item for item in found if documents_with[item[1]] <= 2]


def _subject_labels(book: str, rng: random.Random) -> tuple[str, list[str]]:
    answer = rng.choice(SUBJECTS[book])
    # A word that also fits this book would be a second right answer.
    others = sorted({word for words in SUBJECTS.values() for word in words} - set(SUBJECTS[book]))
    labels = [answer, *rng.sample(others, rng.randint(1, 9))]
    rng.shuffle(labels)
    return answer, labels


def _heading_labels(book: str, heading: str, by_book: dict, rng: random.Random) -> list[str]:
    labels = {heading}
    for _ in range(rng.randint(1, 7)):
        labels.add(rng.choice(by_book[book if rng.random() < 0.4 else rng.choice(sorted(by_book))]))
    if len(labels) == 1:
        labels.add("Other topics")
    labels = sorted(labels)
    rng.shuffle(labels)
    return labels


def pack(sequences: list[Sequence], length: int, seed: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Shuffle the sequences, lay them end to end and cut windows: ids (W, length + 1), weights (W, length + 1)."""
    order = np.random.default_rng(seed).permutation(len(sequences))
    ids = np.concatenate([sequences[i].ids for i in order])
    weights = np.concatenate([sequences[i].weights for i in order])
    windows = (len(ids) - 1) // length
    rows = np.arange(windows)[:, None] * length + np.arange(length + 1)
    return torch.from_numpy(ids.astype(np.int32))[rows], torch.from_numpy(weights.astype(np.float32))[rows]


def corpus_embeddings(sequences: list[Sequence], vocab_size: int, size: int, standard_deviation: float = 0.03):
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
