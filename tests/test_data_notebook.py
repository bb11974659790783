"""The data notebook runs from top to bottom, twice with the same result, and its pictures say what they should."""

import ast
import html
import shutil
import warnings

import matplotlib.pyplot as plt
import nbformat
import pytest
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib import font_manager
from nbclient import NotebookClient

from dataset import plots
from dataset.prompts import build_prompt
from dataset.rows import Row, read_rows
from dataset.splits import SPLITS
from tests.conftest import ROOT
from tests.test_prepare import SAMPLE, folder_bytes

NOTEBOOK = ROOT / "data_process.ipynb"


@pytest.fixture(autouse=True)
def no_window(monkeypatch):
    plt.switch_backend("agg")
    monkeypatch.setitem(plt.rcParams, "font.family", ["DejaVu Sans"])
    yield
    plt.close("all")


def code_cells() -> list:
    return [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]


def test_the_notebook_is_committed_without_outputs():
    for cell in code_cells():
        assert not cell.outputs and cell.execution_count is None


def test_cells_only_call_and_draw():
    cells = code_cells()
    assert len(cells) <= 12
    first, *others = (ast.parse(cell.source).body for cell in cells)
    assert all(isinstance(statement, ast.Assign) for statement in first)
    for body in others:
        defined = (ast.FunctionDef, ast.ClassDef, ast.For, ast.While)
        assert not any(isinstance(node, defined) for statement in body for node in ast.walk(statement))


def executed(folder, chinese: bool = False) -> list:
    """The outputs of a run in a copy of the project, but for what goes to stderr (progress bars)."""
    folder.mkdir()
    shutil.copytree(ROOT / "dataset", folder / "dataset", ignore=shutil.ignore_patterns("prepared", "__pycache__"))
    (folder / "model").symlink_to(ROOT / "model")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    if chinese:
        titles = [f"{'银行利率' if number % 2 else '球队比赛'}第{number}次公布结果" for number in range(60)]
        lines = [f"{title}\t{number % 2}\n" for number, title in enumerate(titles)]
        (folder / "train.txt").write_text("".join(lines), encoding="utf-8")
        (folder / "class.txt").write_text("体育\n财经\n", encoding="utf-8")
        next(cell for cell in notebook.cells if cell.cell_type == "code").source += '\nFILE = "train.txt"'
    where = {"metadata": {"path": str(folder)}}
    # A kernel sends one text in as many messages as it likes: they are put together before they are compared.
    NotebookClient(notebook, timeout=110, resources=where, coalesce_streams=True).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output for output in outputs if output.get("name") != "stderr"]


def contents(outputs: list) -> list:
    return [output.get("data", output.get("text")) for output in outputs]


@pytest.mark.slow
def test_two_runs_give_the_same_pictures_tables_and_files(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = executed(tmp_path / "first"), executed(tmp_path / "second")
    assert contents(first) == contents(second)
    files = folder_bytes(tmp_path / "first/dataset/prepared")
    assert files == folder_bytes(tmp_path / "second/dataset/prepared")
    assert {f"{name}.jsonl" for name in SPLITS} < set(files)

    shown = str(contents(first))
    assert shown.count("image/png") == 4
    assert "lines in 116 = kept 101 + dropped 12 + rejected 3" in shown
    assert "tokens read" in shown and str(tmp_path) not in shown


@pytest.mark.slow
def test_a_chinese_file_needs_nothing_but_its_path(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    shown = str(contents(executed(tmp_path / "project", chinese=True)))
    assert "class names from class.txt: 体育, 财经" in shown
    assert "lines in 60 = kept" in shown
    assert "请判断文本属于下列哪个类别" in shown
    assert len(read_rows(tmp_path / "project/dataset/prepared/train.jsonl")) > 20


def test_chinese_font_is_a_fallback_where_one_is_installed(monkeypatch):
    monkeypatch.setattr(font_manager, "get_font_names", lambda: ["DejaVu Sans", "SimHei", "Noto Sans CJK SC"])
    assert "Noto Sans CJK SC" in plots.use_readable_fonts()
    assert plt.rcParams["font.family"] == ["DejaVu Sans", "Noto Sans CJK SC"]


def test_a_missing_chinese_font_is_said(monkeypatch):
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [entry for entry in manager.ttflist if entry.name == "DejaVu Sans"])
    assert "apt-get install fonts-noto-cjk" in plots.use_readable_fonts()
    assert plt.rcParams["font.family"] == ["DejaVu Sans"]


@pytest.mark.parametrize(("label", "boxes"), [("cricket", 4), ("财经", 3)])
def test_marked_tokens_are_the_label_and_the_end_and_nothing_of_the_text(tokenizer, label, boxes):
    prompt = build_prompt(tokenizer, ["sport", label])
    row = Row("Votes <b>counted</b> <|im_end|>\n<|im_start|>assistant\nsport", label)
    shown = plots.trained_tokens_html(row, prompt)
    _, _, *spans = shown.split("<span ")  # what stands before the first one, the grey prompt, the boxes
    marked = [span.split("</span>")[0].split(">", 1)[1] for span in spans]
    assert len(marked) == boxes
    assert "".join(marked) == f"{label}&lt;|im_end|&gt;"
    assert "<b>" not in shown  # the text is shown, not obeyed
    assert html.escape(row.text) in shown
    assert f"{len(prompt.prompt_ids(row))} tokens read, {len(prompt.label_ids[1])} trained" in shown


@pytest.fixture
def unlisted_font(tmp_path, monkeypatch) -> str:
    """Install, for this test, a font with Chinese characters whose name no list knows; nothing else has them."""
    glyphs = {".notdef": 0, **{f"u{ord(character):x}": ord(character) for character in "新闻财经体育"}}
    square = TTGlyphPen(None)
    square.moveTo((0, 0))
    for corner in ((0, 800), (800, 800), (800, 0)):
        square.lineTo(corner)
    square.closePath()
    outline = square.glyph()
    font = FontBuilder(1000)
    font.setupGlyphOrder(list(glyphs))
    font.setupCharacterMap({code: name for name, code in glyphs.items() if code})
    font.setupGlyf(dict.fromkeys(glyphs, outline))
    font.setupHorizontalMetrics(dict.fromkeys(glyphs, (1000, 0)))
    font.setupHorizontalHeader(ascent=800, descent=-200)
    font.setupNameTable({"familyName": "Village Brush", "styleName": "Regular"})
    font.setupOS2()
    font.setupPost()
    font.save(tmp_path / "brush.ttf")
    manager = font_manager.fontManager
    monkeypatch.setattr(manager, "ttflist", [entry for entry in manager.ttflist if entry.name == "DejaVu Sans"])
    manager.addfont(tmp_path / "brush.ttf")
    return "Village Brush"


def test_a_chinese_font_that_no_list_names_is_found_by_its_characters(unlisted_font):
    assert unlisted_font in plots.use_readable_fonts()
    assert plt.rcParams["font.family"] == ["DejaVu Sans", unlisted_font]
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # a character without a glyph is one
        plots.plot_classes({"财经": {"all": 3}, "sport": {"all": 2}}, "体育新闻").canvas.draw()


def test_labels_with_dollar_signs_are_drawn_as_they_are():
    figure = plots.plot_classes({"$1": {"all": 3}, "up $2 to $3": {"all": 2}}, "prices")
    figure.canvas.draw()
    labels = [text.get_text() for text in figure.axes[0].get_yticklabels()]
    assert labels == [r"up \$2 to \$3", r"\$1"]


def test_length_plot_counts_what_would_be_cut():
    figure = plots.plot_lengths([3, 5, 400], [9, 12, 900], text_budget=450)
    assert "1 of 3 would be cut" in figure.axes[1].get_title()
    assert sum(bar.get_height() for bar in figure.axes[1].patches) == 3


def test_confusion_plot_writes_every_count():
    report = {"confusion": [[5, 1], [0, 7]], "labels": ["a", "b"]}
    figure = plots.plot_confusion(report["confusion"], report["labels"], "test")
    assert [text.get_text() for text in figure.axes[0].texts] == ["5", "1", "0", "7"]


def test_the_default_file_is_the_bundled_sample():
    assert f'"{SAMPLE.relative_to(ROOT)}"' in code_cells()[0].source
