"""Label-reading tasks: the template of fine-tuning, one right label, and the loss where it should be."""

import random

import pytest

from dataset.prompts import build_prompt
from model.checkpoint import load_tokenizer
from tests.conftest import BUNDLED_BASE
from train.label_reading import KINDS, SUBJECTS, _KeywordTasks, _paragraphs, label_reading_sequences

TOPICS = {
    "astronomy": ["telescope", "galaxy", "nebula", "orbits"],
    "principles-finance": ["dividend", "shareholder", "portfolio", "yields"],
    "world-history": ["empire", "dynasty", "conquest", "pharaoh"],
}


@pytest.fixture(scope="module")
def documents():
    """Nine documents in three books; every word of a topic stands in that book's documents only."""
    return [
        {"book": book, "text": f"# {words[part]} and {words[-1]} {part}\n" + " ".join(words * 10)}
        for book, words in TOPICS.items()
        for part in range(3)
    ]


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer(BUNDLED_BASE)


def parts(sequence, tokenizer) -> tuple[list[str], str, str]:
    """The labels, the text and the answer of a task, read back from its token ids."""
    user, answer = tokenizer.decode(sequence.ids).split("<|im_end|>\n<|im_start|>assistant\n")
    instruction, text = user.split("\n\nText:\n")
    return instruction.split("\n")[2:], text, answer.removesuffix("<|im_end|>")


@pytest.mark.parametrize("kind", KINDS)
def test_a_task_is_a_prompt_of_fine_tuning_with_one_right_label(kind, documents, tokenizer):
    sequences = label_reading_sequences(documents, tokenizer, 60, 8.0, seed=1, kinds=(kind,))
    assert len(sequences) > 20
    for sequence in sequences:
        labels, text, answer = parts(sequence, tokenizer)
        assert labels.count(answer) == 1 and len(set(labels)) == len(labels) >= 2
        prompt = build_prompt(tokenizer, labels, "en", max_seq_len=512)
        answer_ids = prompt.label_ids[labels.index(answer)]
        ids = sequence.ids.tolist()
        assert tuple(ids[: len(prompt.prefix_ids)]) == prompt.prefix_ids
        assert tuple(ids[-len(answer_ids) :]) == answer_ids
        behind_text = -len(answer_ids) - len(prompt.suffix_ids)
        text_ids = ids[len(prompt.prefix_ids) : behind_text]
        assert tokenizer.decode(text_ids) == text and 30 <= len(text_ids) <= 120
        # Nothing is asked of the instruction and the list, all of the text, most of the answer.
        assert sequence.weights.tolist() == (
            [0.0] * len(prompt.prefix_ids)
            + [1.0] * len(text_ids)
            + [0.0] * len(prompt.suffix_ids)
            + [8.0] * len(answer_ids)
        )
        book = next(book for book, words in TOPICS.items() if words[0] in text)
        if kind == "subjects":
            lower = {label.lower() for label in labels}
            assert {word.lower() for word in SUBJECTS[book]} & lower == {answer.lower()}
        elif kind == "headings":
            assert TOPICS[book][-1] in answer.lower()


def test_keywords_come_from_the_document_and_the_others_from_elsewhere(documents):
    tasks, rng = _KeywordTasks(_paragraphs(documents), documents), random.Random(0)
    forms = set()
    for _ in range(200):
        answer, others = tasks.draw(0, "", rng)
        for label, right in [(answer, True), *((other, False) for other in others)]:
            words = [word for word in label.replace("/", " ").replace("&", " ").split() if word != "and"]
            own = [any(keyword.startswith(word) for keyword in TOPICS["astronomy"]) for word in words]
            assert all(own) if right else not any(own)
            forms.add((len(words), "/" in label, "&" in label, " and " in label))
    assert len(forms) == 5  # alone, side by side, with "and", "&", "/"


def test_the_seed_decides_and_the_order_of_labels_gives_nothing_away(documents, tokenizer):
    def ids(seed):
        return [sequence.ids.tolist() for sequence in label_reading_sequences(documents, tokenizer, 200, 8.0, seed)]

    assert ids(3) == ids(3) != ids(4)
    places = {0: 0, 1: 0}
    for sequence in label_reading_sequences(documents, tokenizer, 400, 8.0, seed=5, kinds=("subjects",)):
        labels, _, answer = parts(sequence, tokenizer)
        if len(labels) == 2:
            places[labels.index(answer)] += 1
    assert min(places.values()) > 5


def test_a_corpus_without_known_books_or_headings_gives_what_it_can(tokenizer):
    bare = [{"book": "mine", "text": " ".join(words * 10)} for words in TOPICS.values() for _ in range(3)]
    assert label_reading_sequences(bare, tokenizer, 20, 8.0, 1, ("headings", "subjects")) == []
    assert label_reading_sequences(bare, tokenizer, 20, 8.0, 1)
