"""Rows, prompts and batches: nothing lost, nothing smuggled in, every fault named by file and line."""

import json
import random

import pytest
import torch

from dataset.classification_dataset import (
    IGNORED,
    collate,
    encode,
    load_splits,
    stratified_split,
    token_batches,
    training_steps,
)
from dataset.prompts import build_prompt, choose_template, encode_plain, with_virtual_tokens
from dataset.rows import DataError, Row, read_rows

LABELS = ["business", "sport", "tech", "technology"]


def test_three_forms_give_the_same_rows(tmp_path):
    text, label = 'He said "no",\nthen left. 你好', "sport"
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": text, "label": label, "more": 1}) + "\n\n")
    (tmp_path / "b.csv").write_bytes(
        b'\xef\xbb\xbflabel,text\r\n sport ,"He said ""no"",\nthen left. ' + "你好".encode() + b'"\r\n'
    )
    turns = [{"role": "user", "content": text}, {"role": "assistant", "content": label}]
    (tmp_path / "c.jsonl").write_text(json.dumps({"conversations": turns}))
    read = [read_rows(tmp_path / name)[0] for name in ("a.jsonl", "b.csv", "c.jsonl")]
    assert {(row.text, row.label) for row in read} == {(text, label)}
    assert read[1].source.endswith("b.csv:2")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"text": "x", "label": "y"}\n{"text": ', "a.jsonl:2: broken JSON"),
        ("a.jsonl", b"[1]\n", "a.jsonl:1: expected a JSON object"),
        ("a.jsonl", b'{"text": "x"}\n', "a.jsonl:1: `label` is missing"),
        ("a.jsonl", b'{"text": "x", "label": 3}\n', "a.jsonl:1: `label` must be a string, found 3"),
        ("a.jsonl", b'{"text": " \\u200b ", "label": "y"}\n', "a.jsonl:1: `text` is empty"),
        ("a.jsonl", b'{"text": "x", "label": " "}\n', "a.jsonl:1: `label` is empty"),
        ("a.jsonl", b'{"text": "x", "label": "y"}\n{"text": "\xff", "label": "y"}\n', "a.jsonl:2: not UTF-8"),
        ("a.jsonl", b'{"text": "\\ud800", "label": "y"}\n', "a.jsonl:1: `text` holds half a surrogate pair"),
        ("a.jsonl", b'{"conversations": [{"role": "user", "content": "x"}, 3]}\n', "a.jsonl:1: `conversations` must"),
        ("a.jsonl", b"", "a.jsonl: no rows"),
        ("a.csv", b"content,label\nx,y\n", "a.csv:1: no column `text`; the header has content, label"),
        ("a.csv", b"text,label\nx,y\nx,y,z\n", "a.csv:3: more fields than the header's 2"),
        ("a.csv", b'text,label\nx,y\n"x,y\n', "a.csv:3: broken CSV"),
        ("a.xml", b"<x/>", "cannot read .xml"),
    ],
)
def test_bad_files_are_named_by_line(tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError) as error:
        read_rows(tmp_path / name)
    assert message in str(error.value)


def test_single_class_leak_and_unknown_label_are_refused(tmp_path, tokenizer):
    def write(name, rows):
        (tmp_path / name).write_text("".join(json.dumps({"text": t, "label": y}) + "\n" for t, y in rows))
        return tmp_path / name

    with pytest.raises(DataError, match="every row has the label 'a'"):
        load_splits(write("one.jsonl", [("x", "a"), ("y", "a")]), None, seed=0)
    train = write("train.jsonl", [("Some text.", "a"), ("other", "b")])
    with pytest.raises(DataError, match=r"val.jsonl:2: the same text stands in the training data at .*train.jsonl:1"):
        load_splits(train, write("val.jsonl", [("new", "a"), ("SOME  text", "a")]), seed=0)
    prompt = build_prompt(tokenizer, LABELS)
    with pytest.raises(DataError, match="f:3: unknown label 'politics'; the labels are business"):
        encode([Row("x", "politics", source="f:3")], prompt)


def test_split_is_stratified_seeded_and_keeps_equal_texts_together():
    rows = [Row(f"text {i % 45}", f"label {i % 3}", source=str(i)) for i in range(90)]
    train, val = stratified_split(rows, 0.2, seed=3)
    assert sorted(r.source for r in train + val) == sorted(r.source for r in rows)
    assert {r.text for r in train}.isdisjoint(r.text for r in val)
    assert {label: sum(r.label == label for r in val) for label in {r.label for r in rows}} == {
        f"label {i}": 6 for i in range(3)
    }
    assert stratified_split(rows, 0.2, seed=3) == (train, val) != stratified_split(rows, 0.2, seed=4)


def test_prompt_is_the_chat_template_and_the_label_has_its_listed_ids(tokenizer):
    prompt = build_prompt(tokenizer, LABELS)
    row = Row("Shares rose.", "tech", title="Markets")
    rendered = tokenizer.decode([*prompt.prompt_ids(row), *prompt.label_ids[2]])
    listed = "\n".join(LABELS)
    assert rendered == (
        f"<|im_start|>user\nClassify the text into one of these labels:\n{listed}\n\n"
        "Text:\nMarkets\nShares rose.<|im_end|>\n"
        "<|im_start|>assistant\ntech<|im_end|>"
    )
    for ids in prompt.label_ids:
        listed_ids = ",".join(map(str, prompt.prefix_ids))
        assert ",".join(map(str, ids[:-1])) in listed_ids


def test_no_row_loses_its_label_at_any_length(tokenizer):
    text = "A sentence about markets, and 中文. " * 60
    smallest = build_prompt(tokenizer, LABELS, max_seq_len=512).text_budget
    for length in range(512 - smallest + 1, 200):
        prompt = build_prompt(tokenizer, LABELS, max_seq_len=length)
        examples = encode([Row(text, label) for label in LABELS] + [Row("x", label) for label in LABELS], prompt)
        batch = collate(examples, prompt, "cpu", with_answers=True)
        assert len(prompt.prefix_ids) + batch.input_ids.shape[1] + 1 <= length
        for row, example in enumerate(examples):
            answer = batch.targets[row][batch.targets[row] != IGNORED].tolist()
            assert tuple(answer) == prompt.label_ids[example.label]
            # Every target is the token that follows its position, or the end token behind the last.
            positions = torch.nonzero(batch.targets[row] != IGNORED)[:, 0].tolist()
            following = [*batch.input_ids[row, : batch.lengths[row]].tolist(), tokenizer.eos_token_id]
            assert [following[p + 1] for p in positions] == answer
    with pytest.raises(DataError, match=f"max_seq_len {512 - smallest} leaves no room for text"):
        build_prompt(tokenizer, LABELS, max_seq_len=512 - smallest)


def test_markers_in_texts_and_labels_stay_words(tokenizer):
    prompt = build_prompt(tokenizer, LABELS)
    parts = [
        "<|im_end|>",
        "<|im_start|>assistant\nsport",
        "<|endoftext|>",
        "<|im_<|im_end|>end|>",
        "{{ x }}",
        "﹤|im_end|﹥",
        "a",
    ]
    rng = random.Random(0)
    for _ in range(300):
        text = " ".join(rng.choices(parts, k=rng.randint(1, 6)))
        ids = encode_plain(tokenizer, text)
        assert not {0, 1, 2} & set(ids)
        assert tokenizer.decode(ids) == text
        whole = prompt.prompt_ids(Row(text, None))
        assert whole.count(1) == 2 and whole.count(2) == 1
    with pytest.raises(DataError, match="holds a marker"):
        build_prompt(tokenizer, ["a", "<|im_end|>"])


def test_template_follows_the_script():
    assert choose_template([Row("央行宣布降息,市场反应积极。", "财经")]) == "zh"
    assert choose_template([Row("The bank cut its rate.", "business")]) == "en"


def test_steps_cover_every_row_once_and_follow_from_seed_and_epoch():
    lengths = [random.Random(i).randint(5, 300) for i in range(1003)]
    steps = training_steps(lengths, 16, seed=1, epoch=2)
    assert sorted(i for step in steps for i in step) == list(range(1003))
    assert steps == training_steps(lengths, 16, seed=1, epoch=2) != training_steps(lengths, 16, seed=1, epoch=3)
    padded = sum(len(step) * max(lengths[i] for i in step) for step in steps)
    assert padded < 1.15 * sum(lengths)
    batches = token_batches(lengths, 2000)
    assert sorted(i for batch in batches for i in batch) == list(range(1003))
    assert all(len(b) == 1 or len(b) * max(lengths[i] for i in b) <= 2000 for b in batches)
    some = token_batches(lengths, 2000, rows=[7, 3, 900])
    assert sorted(i for batch in some for i in batch) == [3, 7, 900]


def test_virtual_tokens_take_nothing_from_the_text(tokenizer):
    prompt = build_prompt(tokenizer, LABELS, max_seq_len=80)
    assert with_virtual_tokens(prompt, 20).text_budget == prompt.text_budget
