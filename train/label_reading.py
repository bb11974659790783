"""Label-reading tasks: classification problems made from a corpus without labels, in the template of fine-tuning.

A base that has seen them copies a label from the list it was given, and has an idea which one fits a text. There are
three kinds, each a paragraph with 2 to 10 labels of which one is right:

    headings   the heading that the paragraph stands under, among others of the same book and of others
    subjects   what its book is about
    keywords   a word that marks its document (by tf-idf; the paragraph need not hold it), among those of others

Keywords come in the forms that people write labels in: alone, in pairs ("Trade/tariff", "trade and tariff"), cut short.
"""

import collections
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from tqdm import tqdm

from dataset.prompts import build_prompt
from dataset.rows import Row
from train.pretrain_corpus import TokenSequence

KINDS = ("headings", "subjects", "keywords")
# What the books are about, for the kind "subjects"; a book that is not named here gives none.
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
MOST_TEXT_TOKENS = 120
KEYWORDS_PER_DOCUMENT = 24


@dataclass(frozen=True)
class Task:
    """A classification problem: which of the `labels` fits the `text`?"""

    kind: str
    labels: tuple[str, ...]
    text: str
    answer: str


def draw_tasks(documents: list[dict], count: int, seed: int, kinds: Sequence[str] = KINDS) -> Iterator[Task]:
    """At most `count` tasks, the kinds in equal shares as far as the corpus gives them.

    A draw in which two labels look the same is left out.
    """
    rng = random.Random(seed)
    paragraphs = _paragraphs(documents)
    makers = {"headings": _HeadingTasks, "subjects": _SubjectTasks, "keywords": _KeywordTasks}
    makers = {kind: makers[kind](paragraphs, documents) for kind in kinds}
    makers = {kind: maker for kind, maker in makers.items() if maker.paragraphs}
    for _ in range(count if makers else 0):
        kind = rng.choice(list(makers))
        document, heading, text = rng.choice(makers[kind].paragraphs)
        answer, others = makers[kind].draw(document, heading, rng)
        recase = rng.choice([str, str.lower, str.title, str.capitalize])
        labels = [recase(label) for label in (answer, *others)]
        answer = labels[0]
        if len(set(labels)) < max(len(labels), 2):
            continue
        rng.shuffle(labels)
        yield Task(kind, tuple(labels), text, answer)


def label_reading_sequences(
    documents: list[dict], tokenizer, count: int, answer_weight: float, seed: int, kinds: Sequence[str] = KINDS
) -> list[TokenSequence]:
    """The tokens of at most `count` tasks, their texts cut to 30 to 120 tokens.

    The instruction and the label list are context only (weight 0); the text weighs 1 and the answer `answer_weight` a
    token.
    """
    rng = random.Random(f"{seed}:lengths")
    sequences = []
    for task in tqdm(draw_tasks(documents, count, seed, kinds), desc="label-reading tasks", total=count, unit="task"):
        prompt = build_prompt(tokenizer, task.labels, "en", max_seq_len=512)
        text_ids = prompt.text_ids(Row(task.text, None))[: rng.randint(MOST_TEXT_TOKENS // 4, MOST_TEXT_TOKENS)]
        answer_ids = prompt.label_ids[task.labels.index(task.answer)]
        ids = [*prompt.prefix_ids, *text_ids, *prompt.suffix_ids, *answer_ids]
        weights = np.zeros(len(ids), np.float16)
        weights[len(prompt.prefix_ids) : len(prompt.prefix_ids) + len(text_ids)] = 1
        weights[-len(answer_ids) :] = answer_weight
        sequences.append(TokenSequence(np.array(ids, np.uint16), weights))
    return sequences


def _paragraphs(documents: list[dict]) -> list[tuple[int, str, str, str]]:
    """(document, book, heading, paragraph) for paragraphs of 25 words and more; stock headings are left empty."""
    found = []
    for index, document in enumerate(documents):
        heading = ""
        for line in document["text"].split("\n"):
            if line.startswith("# "):
                heading = line[2:].strip()
            elif len(line.split()) >= 25:
                found.append((index, document["book"], heading, line))
    places = collections.Counter(heading for _, heading in {(index, heading) for index, _, heading, _ in found})
    return [
        (index, book, heading if 3 <= len(heading) <= 60 and places[heading] <= 2 else "", text)
        for index, book, heading, text in found
    ]


class _HeadingTasks:
    def __init__(self, paragraphs, documents):
        self.paragraphs = [(book, heading, text) for _, book, heading, text in paragraphs if heading]
        self.by_book = collections.defaultdict(list)
        for book, heading, _ in self.paragraphs:
            self.by_book[book].append(heading)
        self.books = sorted(self.by_book)

    def draw(self, book: str, heading: str, rng: random.Random) -> tuple[str, list[str]]:
        others = set()
        for _ in range(rng.randint(1, 9)):
            others.add(rng.choice(self.by_book[book if rng.random() < 0.4 else rng.choice(self.books)]))
        return heading, sorted(others - {heading})


class _SubjectTasks:
    def __init__(self, paragraphs, documents):
        self.paragraphs = [(book, heading, text) for _, book, heading, text in paragraphs if book in SUBJECTS]
        self.subjects = {subject for subjects in SUBJECTS.values() for subject in subjects}

    def draw(self, book: str, heading: str, rng: random.Random) -> tuple[str, list[str]]:
        # Another word for this book would be a second right answer.
        others = sorted(self.subjects - set(SUBJECTS[book]))
        return rng.choice(SUBJECTS[book]), rng.sample(others, rng.randint(1, 9))


class _KeywordTasks:
    def __init__(self, paragraphs, documents):
        words = [collections.Counter(re.findall(r"[a-z]{4,}", d["text"].lower())) for d in documents]
        documents_with = collections.Counter(word for counts in words for word in counts)

        def tf_idf(counts, word):
            return counts[word] * math.log(len(documents) / documents_with[word])

        self.keywords = []
        for counts in words:
            known = [word for word in counts if documents_with[word] >= 3]
            known.sort(key=lambda word: (-tf_idf(counts, word), word))
            self.keywords.append(known[:KEYWORDS_PER_DOCUMENT])
        self.paragraphs = [(i, heading, text) for i, _, heading, text in paragraphs if len(self.keywords[i]) >= 2]

    def draw(self, document: int, heading: str, rng: random.Random) -> tuple[str, list[str]]:
        own = set(self.keywords[document])
        others = []
        for _ in range(rng.randint(1, 9)):
            words = [word for word in self.keywords[rng.choice(self.paragraphs)[0]] if word not in own]
            if len(words) >= 2:
                others.append(self._label(words, rng))
        return self._label(self.keywords[document], rng), others

    @staticmethod
    def _label(words: list[str], rng: random.Random) -> str:
        form = rng.choice(["{0}", "{0}", "{0}", "{0}", "{0} {1}", "{0} and {1}", "{0} & {1}", "{0}/{1}", "{0}/{1}"])
        lengths = [3, 4, None, None] if "/" in form else [None]
        return form.format(*(word[: rng.choice(lengths)] for word in rng.sample(words, 2)))
