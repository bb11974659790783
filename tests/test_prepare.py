"""From a raw file to written splits: the real formats, broken rows, duplicates, leaks, and that nothing gets lost."""

import csv
import io
import json
import os
import random
import sys
from itertools import combinations
from pathlib import Path

import pytest

from dataset import prepare, read_raw, report
from dataset.classification_dataset import check_no_leak
from dataset.duplicates import SHINGLE, drop_duplicates, find_near_duplicates
from dataset.prompts import build_prompt, labels_of
from dataset.raw_columns import AG_NEWS_CLASSES
from dataset.read_raw import Document
from dataset.rows import DataError, read_rows
from dataset.splits import SPLITS, chunk_splits, split_documents
from dataset.text import chunk_text, clean_text, fold, words
from tests.conftest import ROOT, run

SAMPLE = ROOT / "dataset" / "raw_sample.csv"
TOPICS = {
    "sport": ["goal", "coach", "league", "medal", "penalty", "striker"],
    "politics": ["minister", "ballot", "senate", "treaty", "mayor", "coalition"],
    "tech": ["browser", "chip", "software", "network", "laptop", "sensor"],
}
FILLER = [
    "yesterday",
    "quiet",
    "long",
    "nine",
    "old",
    "bridge",
    "morning",
    "letter",
    "house",
    "river",
    "winter",
    "table",
]


def invented_texts(count: int, seed: int = 0) -> list[tuple[str, str]]:
    """(text, label) pairs whose words follow the label."""
    rng = random.Random(seed)
    pairs = []
    for number in range(count):
        label = sorted(TOPICS)[number % len(TOPICS)]
        chosen = [rng.choice(TOPICS[label] + FILLER) for _ in range(25)]
        pairs.append((f"Report {number}: {' '.join(chosen)}.", label))
    return pairs


def written(path: Path, content: str | bytes) -> Path:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def as_csv(rows: list[list[str]]) -> str:
    file = io.StringIO()
    csv.writer(file, lineterminator="\n").writerows(rows)
    return file.getvalue()


def documents_of(pairs: list[tuple[str, str]]) -> list[Document]:
    return [Document(line, text, label, name=f"line {line}") for line, (text, label) in enumerate(pairs, start=1)]


def reasons(raw: read_raw.RawFile) -> dict[int, str]:
    return {row.line: row.reason for row in raw.rejected}


# --- the real formats -----------------------------------------------------------------------------------------------


def test_bbc_tab_separated_keeps_stray_quotes_and_rejects_short_rows(tmp_path):
    path = written(
        tmp_path / "bbc-news-data.csv",  # tab-separated in spite of its name
        "category\tfilename\ttitle\tcontent\n"
        'business\t001.txt\tMill sold\t "Not for sale, said the owner, until today.\n'
        'sport\t001.txt\t"Late" goal wins\t A goal "in the last minute" won it.\n'
        "sport\t002.txt\tonly three fields\n"
        'tech\t001.txt\tChip cools itself\t The chip, 5" wide, needs no fan.\n',
    )
    raw = read_raw.read_raw(path)
    assert raw.columns == {"text": "content", "label": "category", "title": "title", "document": "filename"}
    assert [document.text.strip() for document in raw.documents] == [
        '"Not for sale, said the owner, until today.',
        'A goal "in the last minute" won it.',
        'The chip, 5" wide, needs no fan.',
    ]
    assert raw.documents[1].title == '"Late" goal wins'
    assert len({document.name for document in raw.documents}) == 3  # 001.txt occurs in every category
    assert reasons(raw) == {4: "3 fields instead of 4"}


def test_quoted_fields_of_a_tab_separated_file_are_unquoted(tmp_path):
    text = 'He said "no", then left.'
    path = written(tmp_path / "a.tsv", f'text\tlabel\n"{text.replace(chr(34), chr(34) * 2)}"\tpolitics\n')
    assert read_raw.read_raw(path).documents[0].text == text


def test_a_tab_separated_file_with_every_field_in_quotes(tmp_path):
    rows = [["text", "label"], ['He said "no".', "politics"], ["one\ttab, two\nlines", "tech"], ["", "sport"]]
    file = io.StringIO()
    csv.writer(file, delimiter="\t", quoting=csv.QUOTE_ALL, lineterminator="\n").writerows(rows)
    raw = read_raw.read_raw(written(tmp_path / "a.tsv", file.getvalue() + '"no label"\n'))
    assert [[document.text, document.label] for document in raw.documents] == rows[1:]
    assert (raw.header_lines, raw.continuation_lines, reasons(raw)) == (1, 1, {6: "1 fields instead of 2"})


def test_a_quoted_text_of_several_lines_is_not_cut_in_a_tab_separated_file(tmp_path):
    path = written(
        tmp_path / "a.tsv",
        "label\ttext\n"
        'tech\t"One ""quoted"" line,\n\nand the last."\n'
        'sport\t"A stray quote opens this one.\n'
        'sport\t"Two stray quotes", said nobody "here.\n'
        "a broken line\n"
        'sport\t"This never ends,\n'
        'nor does "this" at all\n'
        'tech\tends with a quote"\n'
        'tech\t"open at the end of the file\n',
    )
    raw = read_raw.read_raw(path)
    assert [(document.line, document.text) for document in raw.documents] == [
        (2, 'One "quoted" line,\n\nand the last.'),
        (5, '"A stray quote opens this one.'),
        (6, '"Two stray quotes", said nobody "here.'),
        (8, '"This never ends,'),
        (10, 'ends with a quote"'),
        (11, '"open at the end of the file'),
    ]
    assert sorted(reasons(raw)) == [7, 9] and raw.continuation_lines == 2


@pytest.mark.parametrize("header", [["ArticleId", "Text", "Category"], ["Text", "Category"]])
def test_bbc_from_kaggle(tmp_path, header):
    rows = [["7", "wine, cheese and a merger", "business"], ["9", 'the "final" ended 2-1', "sport"]]
    path = written(tmp_path / "BBC News Train.csv", as_csv([header, *(row[-len(header) :] for row in rows)]))
    raw = read_raw.read_raw(path)
    assert [(document.text, document.label) for document in raw.documents] == [(row[1], row[2]) for row in rows]
    assert [document.name for document in raw.documents] == (["7", "9"] if len(header) == 3 else ["", ""])


def test_ag_news_without_header(tmp_path):
    path = written(
        tmp_path / "test.csv",
        '"3","Shares up","Shares rose\\by  #36;2, said \\""Barrons\\""."\n'
        '"4","New probe","A probe, the firm\'s first,\\\\was launched."\n'
        '"1","Talks","Talks go on &lt;b&gt;tonight&lt;/b&gt;, he doesn #39;t say why."\n'
        '"2","Cup","The cup was won."\n',
    )
    raw = read_raw.read_raw(path)
    assert raw.header_lines == 0 and not raw.rejected
    assert [document.label for document in raw.documents] == ["Business", "Sci/Tech", "World", "Sports"]
    assert set(AG_NEWS_CLASSES) == {document.label for document in raw.documents}
    texts = [clean_text(document.text) for document in raw.documents]
    assert texts[0] == 'Shares rose by $2, said "Barrons".'.replace('said "', 'said "').replace(
        '"Barrons"', '"Barrons "'
    )
    assert texts[1] == "A probe, the firm's first, was launched."
    assert texts[2] == "Talks go on tonight , he doesn't say why."


def test_ag_news_shape_with_other_classes_asks_for_names(tmp_path):
    content = as_csv([["1", "a", "first text"], ["2", "b", "second text"], ["3", "c", "third text"]])
    path = written(tmp_path / "other.csv", content)
    with pytest.raises(DataError, match=r"class numbers \(1 to 3\).*--class_names FILE"):
        read_raw.read_raw(path)
    raw = read_raw.read_raw(path, class_names=["red", "green", "blue"])
    assert [document.label for document in raw.documents] == ["red", "green", "blue"]


def test_class_numbers_one_to_four_are_ag_news_only_in_its_own_shape(tmp_path):
    stars = as_csv([["text", "label"], *([f"review {number}", str(number)] for number in range(1, 5))])
    with pytest.raises(DataError, match="--class_names FILE"):
        read_raw.read_raw(written(tmp_path / "stars.csv", stars))


def test_thucnews_takes_the_class_file_beside_it(tmp_path):
    names = ["财经", "体育", "科技"]
    titles = [("央行宣布降息", 0), ("女排逆转夺冠", 1), ("新款“芯片”发布", 2), ("没有这样的类别", 7)]
    titles += [(f"第{number}场比赛今晚开始", 1) for number in range(20)]
    path = written(tmp_path / "train.txt", "".join(f"{title}\t{number}\n" for title, number in titles) + "缺少类别\n")
    with pytest.raises(DataError, match="class numbers"):
        read_raw.read_raw(path)
    written(tmp_path / "class.txt", "\n".join(names) + "\n")
    raw = read_raw.read_raw(path)
    assert [(document.text, document.label) for document in raw.documents[:3]] == [
        (title, names[number]) for title, number in titles[:3]
    ]
    assert reasons(raw) == {4: "class '7' has no name", 25: "1 fields instead of 2"}


def test_class_names_that_may_count_from_0_or_1_are_refused(tmp_path):
    path = written(tmp_path / "train.txt", "一\t1\n二\t2\n")
    with pytest.raises(DataError, match="starts at 0 or 1"):
        read_raw.read_raw(path, class_names=["甲", "乙", "丙"])


def test_class_names_in_another_encoding_are_refused_by_their_file(tmp_path):
    written(tmp_path / "class.txt", "财经\n体育\n".encode("gb18030"))
    path = written(tmp_path / "train.txt", "一\t0\n二\t1\n")
    with pytest.raises(DataError, match=r"class\.txt: class names must be UTF-8"):
        read_raw.read_raw(path)


def test_json_lines_with_every_kind_of_broken_row(tmp_path):
    good = {"headline": "Title", "body": "A text.", "topic": "sport", "id": 5}
    lines = [
        json.dumps(good),
        "{",
        "[1]",
        "",
        "null",
        '{"body": "half \\ud800 pair", "topic": "sport"}',
        '{"body": 5, "topic": "sport"}',
        '{"body": "no label"}',
        '{"body": "empty label", "topic": " "}',
        '{"body": "trailing comma", "topic": "tech",}',
        "[" * 100_000,
        '{"body": "last line without a break", "topic": "tech"}',
    ]
    raw = read_raw.read_raw(written(tmp_path / "news.jsonl", "\n".join(lines)))
    assert [document.line for document in raw.documents] == [1, 12]
    assert raw.documents[0] == Document(1, "A text.", "sport", "Title", "5")
    assert raw.blank_lines == [4]
    found = reasons(raw)
    assert sorted(found) == [2, 3, 5, 6, 7, 8, 9, 10, 11]
    assert found[6] == "half a surrogate pair"
    assert found[7] == "`body` is not a string but int"
    assert found[8] == "`topic` is missing"
    assert found[9] == "no label in `topic`"


def test_parquet(tmp_path):
    import pandas

    table = pandas.DataFrame({"text": ["one", None, "three"], "label": ["a", "b", None]})
    table.to_parquet(tmp_path / "news.parquet")
    raw = read_raw.read_raw(tmp_path / "news.parquet")
    assert [(document.text, document.label) for document in raw.documents] == [("one", "a")]
    assert reasons(raw) == {2: "`text` is missing", 3: "`label` is missing"}


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.setitem(sys.modules, "fastparquet", None)
    with pytest.raises(DataError, match="pip install pyarrow"):
        read_raw.read_raw(written(tmp_path / "news.parquet", b"PAR1"))


def test_unclear_columns_are_asked_for_by_name(tmp_path):
    path = written(tmp_path / "a.csv", as_csv([["content", "body", "kind"], ["one", "two", "sport"]]))
    with pytest.raises(DataError, match=r"content, body, kind.*--text_column and --label_column .*TEXT_COLUMN"):
        read_raw.read_raw(path)
    with pytest.raises(DataError, match="no column 'Body'; the columns are: content, body, kind"):
        read_raw.read_raw(path, text_column="Body", label_column="kind")
    raw = read_raw.read_raw(path, text_column="body", label_column="kind")
    assert (raw.documents[0].text, raw.documents[0].label) == ("two", "sport")


def test_columns_by_number_mean_no_header(tmp_path):
    path = written(tmp_path / "a.csv", as_csv([["sport", "x", "first text"], ["tech", "y", "second text"]]))
    raw = read_raw.read_raw(path, text_column="3", label_column="1")
    assert [(document.text, document.label) for document in raw.documents] == [
        ("first text", "sport"),
        ("second text", "tech"),
    ]


# --- broken files and rows ------------------------------------------------------------------------------------------


def test_byte_order_mark_and_windows_line_ends_change_nothing(tmp_path):
    content = as_csv([["text", "label"], ["käse, und\nbrot", "b"], ["wein", "a"]])
    clean = read_raw.read_raw(written(tmp_path / "clean.csv", content))
    other = read_raw.read_raw(
        written(tmp_path / "windows.csv", b"\xef\xbb\xbf" + content.replace("\n", "\r\n").encode())
    )
    assert clean.documents == other.documents and len(clean.documents) == 2


def test_undecodable_rows_are_set_aside(tmp_path):
    content = b"text,label,author\ngood one,sport,a\ncaf\xe9 closes,business,b\nnul \x00 inside,tech,c\n"
    content += b"good two,tech,Ren\xe9\ngood three,tech,d\n"  # nobody asks for the author
    raw = read_raw.read_raw(written(tmp_path / "a.csv", content))
    assert [document.text for document in raw.documents] == ["good one", "good two", "good three"]
    assert reasons(raw) == {3: "a byte that cannot be decoded (0xe9)", 4: "a NUL character"}
    assert raw.rejected[0].text == "caf\ufffd closes,business,b"
    assert raw.notes == [
        "1 rows are not utf-8; if the file has another encoding, name it, for example --encoding cp1252"
    ]


def test_a_file_in_another_encoding_asks_for_it(tmp_path):
    rows = [f"第{number}条新闻标题\t{'体育' if number % 2 else '财经'}" for number in range(6)]
    path = written(tmp_path / "gbk.tsv", ("text\tlabel\n" + "\n".join(rows)).encode("gb18030"))
    with pytest.raises(DataError, match="--encoding gb18030"):
        read_raw.read_raw(path)
    assert read_raw.read_raw(path, encoding="gb18030").documents[0].text == "第0条新闻标题"


def test_a_stray_quote_costs_its_own_row_only(tmp_path):
    path = written(
        tmp_path / "a.csv",
        "text,label\n"
        "one,sport\n"
        '"never closed,sport\n'
        "three,tech\n"
        '"a quoted record\nover three\nlines",tech\n'
        "\n"
        'five 5" wide,tech\n'
        "six, with a comma,tech\n" + "\n".join(f"line {number},sport" for number in range(300)) + "\n",
    )
    raw = read_raw.read_raw(path)
    assert len(raw.documents) == 304
    assert raw.documents[2].text == "a quoted record\nover three\nlines"
    assert sorted(reasons(raw)) == [3, 10]
    assert (raw.header_lines, raw.continuation_lines, raw.blank_lines) == (1, 2, [8])


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"", "the file is empty"),
        ("a.csv", b"\n \n", "the file is empty"),
        ("a.csv", "text,label\none,a".encode("utf-16"), "UTF-16"),
        ("a.csv", bytes(range(128, 256)) * 9, "lines are not utf-8"),
        ("a.csv", b"text,label\n", "no row could be read"),
        ("a.csv", b"just a sentence\nand another\n", "no tab, comma or semicolon"),
        ("a.csv", b"text,label,text\na,b,c\n", "which column is the text: text or text"),
        ("a.json", b'[{"text": "a", "label": "b"}]', "JSON array"),
        ("a.jsonl", b"{\n{\n", "columns are: none"),
    ],
)
def test_unusable_files_end_in_one_line(tmp_path, name, content, message):
    with pytest.raises(DataError, match=message) as caught:
        read_raw.read_raw(written(tmp_path / name, content))
    assert str(caught.value).startswith(str(tmp_path / name)) and "\n" not in str(caught.value)


def test_missing_files_and_folders(tmp_path):
    for path in (tmp_path / "missing.csv", tmp_path):
        with pytest.raises(DataError, match="no such file"):
            read_raw.read_raw(path)


@pytest.mark.parametrize("seed", range(8))
@pytest.mark.parametrize("ending", ["csv", "tsv", "jsonl"])
def test_lines_add_up_whatever_the_file_holds(tmp_path, seed, ending):
    rng = random.Random(f"{ending}{seed}")
    separator = "\t" if ending == "tsv" else ","
    pieces = [
        b'"',
        b'""',
        separator.encode(),
        b"\n",
        b"sport",
        b"tech",
        "新闻".encode(),
        b"\xff",
        b"\x00",
        b"word word",
    ]
    junk = b"".join(rng.choice(pieces) for _ in range(400)).split(b"\n")
    good = [(f"{text}", label) for text, label in invented_texts(60, seed)]
    if ending == "jsonl":
        lines = [json.dumps({"text": text, "label": label}).encode() for text, label in good]
    else:
        lines = [f"{text}{separator}{label}".encode() for text, label in good]
    for piece in junk:
        lines.insert(rng.randrange(len(lines) + 1), piece)
    header = [] if ending == "jsonl" else [f"text{separator}label".encode()]
    path = written(tmp_path / f"hostile.{ending}", b"\n".join(header + lines) + b"\n")

    result = prepare.prepare(path, tmp_path / "out")
    counts = result["lines"]
    assert counts["lines_in"] == counts["kept"] + counts["dropped"] + counts["rejected"]
    assert counts["lines_in"] + counts["header_lines"] + counts["continuation_lines"] == path.read_bytes().count(b"\n")
    rejects = [json.loads(line) for line in (tmp_path / "out/rejects.jsonl").read_text().splitlines()]
    assert len(rejects) == counts["rejected"] > 0
    assert all(set(row) == {"line", "reason", "raw"} for row in rejects)
    kept = sum(len(read_rows(tmp_path / f"out/{name}.jsonl")) for name in SPLITS)
    assert kept == counts["kept"] >= 30


# --- one text -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (" two\u3000 wide \n lines\t", "two wide lines"),
        ("Standard  amp; Poor's &amp; AT&amp;T", "Standard & Poor's & AT&T"),
        ("the  #36;10 he doesn #39;t want", "the $10 he doesn't want"),
        ("came in #12; then #7", "came in #12; then #7"),
        ("a <b>bold</b> <A HREF='x'>link</A> &lt;DELL.O&gt; 3 < 4 > 2", "a bold link <DELL.O> 3 < 4 > 2"),
        ("cafe\u0301 zero\u200bwidth\ufeff", "café zerowidth"),
        ("<|im_end|> stays", "<|im_end|> stays"),
    ],
)
def test_clean_text(raw, clean):
    assert clean_text(raw) == clean


def test_fold_ignores_case_space_punctuation_and_width():
    assert fold("Late GOAL, wins — 2:1!") == fold("late goal wins２１")
    assert fold("!!!") != fold("???") != ""


def test_chinese_words_are_characters():
    assert words("央行don't宣布2.5") == ["央", "行", "don't", "宣", "布", "2", "5"]


@pytest.mark.parametrize("most_words", [1, 7, 40, 1000])
def test_chunks_are_short_enough_and_lose_nothing(most_words):
    english = " ".join(f"Sentence {n} says {'very ' * (n % 9)}little to Dr. Smith of the U.S. team." for n in range(30))
    chinese = "".join(f"第{n}句话说得{'很' * (n % 9)}少。" for n in range(30)) + "没有句号的结尾"
    for text in (english, chinese):
        chunks = chunk_text(text, most_words)
        assert "".join("".join(chunks).split()) == "".join(text.split())
        assert all(0 < len(words(chunk)) <= most_words for chunk in chunks)


def test_chunks_end_at_sentence_ends_and_have_similar_length():
    text = " ".join(f"Mr. Lee counted {n} birds before Dr. Gray came." for n in range(20))
    chunks = chunk_text(text, 60)
    assert len(chunks) == 4
    assert all(chunk.endswith("came.") for chunk in chunks)
    lengths = [len(words(chunk)) for chunk in chunks]
    assert max(lengths) - min(lengths) <= 2 * 9  # two sentences
    assert all(chunk.endswith(("。", "？")) for chunk in chunk_text("今天下雨了。明天呢？后天会晴。" * 9, 25))


# --- cleaning, duplicates, splits -----------------------------------------------------------------------------------


def test_spellings_of_a_label_become_the_most_frequent_one():
    labels = ["tech", "tech", "tech ", "Tech", "TECH", "caf\u00e9", "cafe\u0301"]
    documents, dropped, changed = prepare.clean(documents_of([(f"text {n}", label) for n, label in enumerate(labels)]))
    assert [document.label for document in documents] == ["tech"] * 5 + ["café"] * 2
    assert changed == {"tech ": "tech", "Tech": "tech", "TECH": "tech", "cafe\u0301": "café"}
    assert not dropped


def test_empty_texts_are_dropped():
    texts = ["", " \n", "\u200b\u200d", "&nbsp;", "!"]
    documents, dropped, _ = prepare.clean(documents_of([(text, "a") for text in texts]))
    assert [document.text for document in documents] == ["!"]
    assert [row.reason for row in dropped] == ["empty text"] * 4


def test_exact_duplicates_and_conflicting_labels():
    kept, dropped = drop_duplicates(
        documents_of(
            [
                ("The cup was won.", "sport"),
                ("Rates rise", "business"),
                ("the CUP was won", "sport"),
                ("Rates: rise!", "politics"),
                ("Something else", "tech"),
            ]
        )
    )
    assert [document.line for document in kept] == [1, 5]
    assert [(row.line, row.reason, row.twin) for row in dropped] == [
        (2, "same text under different labels", 4),
        (3, "exact duplicate", 1),
        (4, "same text under different labels", 2),
    ]


def similarity(a: str, b: str) -> float:
    """Jaccard similarity of shingle sets, computed the plain way."""

    def shingles(text):
        found = words(text.casefold())
        return {tuple(found[i : i + SHINGLE]) for i in range(max(1, len(found) - SHINGLE + 1))}

    return len(shingles(a) & shingles(b)) / len(shingles(a) | shingles(b))


@pytest.mark.parametrize("threshold", [0.5, 0.8, 1.0])
def test_near_duplicates_agree_with_comparing_every_pair(threshold):
    rng = random.Random(3)
    texts = []
    for _ in range(60):
        original = [rng.choice("abcdefgh") for _ in range(rng.randint(1, 40))]
        texts.append(" ".join(original))
        for _ in range(3):
            copy = list(original)
            for _ in range(rng.randint(0, 3)):
                copy[rng.randrange(len(copy))] = rng.choice("abcdefgh")
            texts.append(" ".join(copy))
    rng.shuffle(texts)
    expected = []
    for number, text in enumerate(texts):
        earlier = (o for o in range(number) if expected[o] is None and similarity(text, texts[o]) >= threshold - 1e-9)
        expected.append(next(earlier, None))
    assert find_near_duplicates(texts, threshold) == expected
    assert 20 < sum(twin is not None for twin in expected) < 220


def test_near_duplicates_in_chinese():
    text = "央行今天上午在北京宣布下调贷款基准利率，市场普遍认为此举将刺激经济增长并带动股市上涨"
    assert find_near_duplicates([text, text.replace("上午", "下午"), "女排昨晚在上海逆转取胜"]) == [None, 0, None]


def test_split_is_stratified_complete_and_follows_from_seed_and_texts():
    documents = documents_of(invented_texts(300))
    splits = split_documents(documents, seed=1, val_share=0.1, test_share=0.2)
    assert report.class_counts(splits) == {label: {"train": 70, "val": 10, "test": 20} for label in TOPICS}
    assert sorted(d.line for part in splits.values() for d in part) == list(range(1, 301))

    shuffled = invented_texts(300)
    random.Random(5).shuffle(shuffled)
    again = split_documents(documents_of(shuffled), 1, 0.1, 0.2)
    assert {name: [d.text for d in part] for name, part in again.items()} == {
        name: [d.text for d in part] for name, part in splits.items()
    }
    assert split_documents(documents, 2, 0.1, 0.2) != splits
    assert len({document.label for document in splits["train"][:20]}) == 3  # classes come mixed


def test_rows_of_an_article_stay_together():
    documents = [
        Document(line, text, label, name=f"{label}/{line % 20}")
        for line, (text, label) in enumerate(invented_texts(300), start=1)
    ]
    splits = split_documents(documents)
    names = {name: {document.name for document in part} for name, part in splits.items()}
    assert all(names[name] for name in names)
    assert all(not names[a] & names[b] for a, b in combinations(names, 2))


@pytest.mark.parametrize("shares", [(0.1, 0.1), (0.5, 0.4), (0.03, 0.95), (0.95, 0.03), (0.0, 0.3), (0.3, 0.0)])
def test_small_classes_keep_something_to_train_on(shares):
    for count in range(1, 8):
        pairs = [(f"rare text {n}", "rare") for n in range(count)] + [(f"other text {n}", "other") for n in range(9)]
        splits = split_documents(documents_of(pairs), 0, *shares)
        rare = report.class_counts(splits)["rare"]
        assert rare["train"] >= 1 and sum(rare.values()) == count
        if count >= 3:
            assert [rare["val"] > 0, rare["test"] > 0] == [share > 0 for share in shares]


def test_split_refuses_what_cannot_be_split():
    with pytest.raises(DataError, match="at least two labels, found a"):
        split_documents(documents_of([("one", "a"), ("two", "a")]))
    with pytest.raises(DataError, match="something to train on"):
        split_documents(documents_of(invented_texts(9)), 0, 0.5, 0.5)


def test_chunks_stay_in_the_split_of_their_article_and_shared_paragraphs_do_not_leak():
    notice = "This newspaper answers for no other site and asks its readers to write to the editor in case of doubt. "
    documents = [
        Document(line, f"{notice}{text} {other}", label, name=f"line {line}")
        for line, ((text, label), (other, _)) in enumerate(
            zip(invented_texts(90), invented_texts(90, 1), strict=True), 1
        )
    ]
    splits = split_documents(documents)
    chunked, dropped, emptied = chunk_splits(splits, most_words=28)
    split_of = {document.line: name for name, part in splits.items() for document in part}
    assert all(split_of[chunk.line] == name for name, part in chunked.items() for chunk in part)
    assert sum(map(len, chunked.values())) > 150
    assert dropped and not emptied
    assert {kind: len(pairs) for kind, pairs in report.leaks(chunked).items()} == dict.fromkeys(
        report.leaks(chunked), 0
    )


def test_an_article_of_which_no_chunk_is_left_counts_as_dropped(tmp_path):
    pairs = invented_texts(30)
    rows = [[text, label] for text, label in pairs]
    label = pairs[0][1]
    others = [text for text, other in pairs if other == label][:3]
    rows.append([" ".join(others), label])  # an article that is pieced together from three others
    path = written(tmp_path / "a.csv", as_csv([["text", "label"], *rows]))
    lines = prepare.prepare(path, tmp_path / "out", chunk_words=27)["lines"]
    assert list(lines["dropped_by_reason"]) == ["all chunks are duplicates"]
    assert lines["kept"] + lines["dropped"] == 31


# --- files and report -----------------------------------------------------------------------------------------------


def folder_bytes(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_prepared_sample_is_readable_leak_free_and_the_same_again(tmp_path, tokenizer):
    first = prepare.prepare(SAMPLE, tmp_path / "out", chunk_words=150, tokenizer=tokenizer)
    before = folder_bytes(tmp_path / "out")
    assert set(before) == {"train.jsonl", "val.jsonl", "test.jsonl", "rejects.jsonl", "report.json"}
    splits = {name: read_rows(tmp_path / "out" / f"{name}.jsonl") for name in SPLITS}
    assert {name: len(rows) for name, rows in splits.items()} == first["rows"]
    for a, b in combinations(splits.values(), 2):
        check_no_leak(a, b)
    assert json.loads(before["report.json"]) == first
    assert first["tokens"]["cut_texts"] == 0

    prepare.prepare(SAMPLE, tmp_path / "out", chunk_words=150, tokenizer=tokenizer)
    assert folder_bytes(tmp_path / "out") == before


def test_the_raw_sample_holds_every_flaw_it_promises(tmp_path, tokenizer):
    result = prepare.prepare(SAMPLE, tmp_path / "out", tokenizer=tokenizer)
    dropped = result["lines"]["dropped_by_reason"]
    assert set(dropped) == {
        "blank line",
        "empty text",
        "exact duplicate",
        "near duplicate",
        "same text under different labels",
    }
    assert result["lines"]["rejected"] == 3
    assert {"Tech", "tech "} <= set(result["label_spellings"])
    assert list(result["classes"]) == ["business", "entertainment", "politics", "sport", "tech"]
    assert result["tokens"]["cut_texts"] == 1  # the long article


def test_a_failing_write_leaves_the_earlier_files(tmp_path, monkeypatch):
    prepare.prepare(SAMPLE, tmp_path)
    before = folder_bytes(tmp_path)

    def full(_):
        raise OSError("no space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="no space"):
        prepare.prepare(SAMPLE, tmp_path, seed=7)
    assert folder_bytes(tmp_path) == before


def test_an_unusable_file_writes_nothing(tmp_path):
    path = written(tmp_path / "a.csv", "text,label\none text,a\nanother text,a\n")
    with pytest.raises(DataError):
        prepare.prepare(path, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_similar_labels():
    labels = [
        "tech",
        "technology",
        "sport",
        "sports",
        "business",
        "bussiness",
        "world",
        "politics",
        "体育",
        "体育新闻",
        "IT",
    ]
    assert report.similar_labels(labels) == [
        ["体育", "体育新闻"],
        ["tech", "technology"],
        ["sport", "sports"],
        ["business", "bussiness"],
    ]


def test_label_token_collisions(tokenizer):
    prompt = build_prompt(tokenizer, ["cricket", "crickets", "sport"])
    (labels,) = report.label_token_collisions(prompt).values()
    assert labels == ["cricket", "crickets"]


def test_cut_texts_are_those_that_lose_their_end_in_the_prompt(tmp_path, tokenizer):
    result = prepare.prepare(SAMPLE, tmp_path, tokenizer=tokenizer, max_seq_len=105)
    rows = [row for name in SPLITS for row in read_rows(tmp_path / f"{name}.jsonl")]
    short, long = (build_prompt(tokenizer, labels_of(rows), max_seq_len=limit) for limit in (105, 2000))
    cut = sum(short.text_ids(row) != long.text_ids(row) for row in rows)
    assert result["tokens"]["cut_texts"] == cut
    assert 10 < cut < len(rows) - 10


def test_planted_leaks_are_found():
    pairs = invented_texts(60)
    splits = split_documents(documents_of(pairs), val_share=0.2, test_share=0.2)
    assert not any(report.leaks(splits).values())
    train, test = splits["train"][0], splits["test"]
    test.append(Document(901, train.text.upper(), train.label, name="line 901"))
    test.append(Document(902, train.text.replace("Report", "Letter"), train.label, name="line 902"))
    test.append(Document(903, "Nothing alike at all", train.label, name=train.name))
    found = report.leaks(splits)
    assert {kind: [(a.line, b.line) for a, b in pairs] for kind, pairs in found.items()} == {
        "same text": [(train.line, 901)],
        "near duplicate": [(train.line, 902)],
        "same article": [(train.line, 903)],
    }


def test_warnings_name_what_is_wrong(tokenizer):
    pairs = invented_texts(200)
    pairs += [(f"A rare text about {n} matches.", "sports") for n in range(2)]
    splits = split_documents(documents_of(pairs))
    splits["test"].append(splits["train"][0])
    found = "\n".join(report.data_report(splits, tokenizer, max_seq_len=60)["warnings"])
    for expected in (
        "'sports' does not occur in val and test",
        "'sports' has only 2 training rows",
        "read macro-F1",
        "'sport' and 'sports' look like two spellings",
        "begin with the same token",
        "1 times two splits share a row (same text)",
        "of 203 texts are longer than",
    ):
        assert expected in found
    clean = split_documents(documents_of(invented_texts(200)))
    assert report.data_report(clean, tokenizer)["warnings"] == []


def test_baseline_beats_the_majority_where_words_tell(tokenizer):
    splits = split_documents(documents_of(invented_texts(150)), test_share=0.2)
    scores = report.baseline(splits["train"], splits["test"])
    assert scores["tfidf_accuracy"] > 0.9 and scores["majority_accuracy"] == pytest.approx(1 / 3, abs=0.01)
    assert sum(map(sum, scores["confusion"])) == len(splits["test"])


def test_command_line_gives_the_same_bytes_in_every_process(tmp_path):
    for number in (1, 2):
        environment = {"PYTHONHASHSEED": str(number), "LC_ALL": "C"}
        done = run("dataset/prepare.py", SAMPLE, "--output_dir", number, cwd=tmp_path, **environment)
        assert "lines in 116 = kept" in done.stdout
    assert folder_bytes(tmp_path / "1") == folder_bytes(tmp_path / "2")


def test_command_line_shows_rejects_cut_texts_and_what_to_beat(tmp_path):
    rejects = [f"no label here {number}\n" for number in range(7)]
    rows = as_csv([["text", "label"], *map(list, invented_texts(60))])
    path = written(tmp_path / "a.csv", rows + "".join(rejects))
    out = run("dataset/prepare.py", path, "--output_dir", "out", "--max_seq_len", 60, cwd=tmp_path).stdout
    assert "  7 1 fields instead of 2\n" in out
    assert "  line 62: 1 fields instead of 2: 'no label here 0'\n" in out
    assert "line 66" in out and "line 67" not in out and "2 more in rejects.jsonl" in out
    assert "60 of 60 texts (100.0 %) are cut at 60 tokens" in out
    assert "largest class 33.3 %, TF-IDF with logistic regression" in out


def test_command_line_says_how_the_file_was_understood(tmp_path):
    rows = [[str(1 + number % 4), f"Title {number}", text] for number, (text, _) in enumerate(invented_texts(40))]
    out = run(
        "dataset/prepare.py", written(tmp_path / "a.csv", as_csv(rows)), "--output_dir", "out", cwd=tmp_path
    ).stdout
    assert out.startswith(
        "a.csv: comma-separated, no header; text in `description`, label in `class index`, title in `title`\n"
    )
    assert "class numbers 1 to 4 read as AG News: World, Sports, Business, Sci/Tech\n" in out


def test_command_line_ends_with_one_line_and_code_3(tmp_path):
    path = written(tmp_path / "a.csv", "klass,inhalt\na,b\n")
    done = run("dataset/prepare.py", path, "--output_dir", "out", cwd=tmp_path, check=False)
    assert done.returncode == 3
    assert done.stderr.count("\n") == 1 and "klass, inhalt" in done.stderr
    assert not (tmp_path / "out").exists()
