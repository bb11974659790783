"""The attention notebook runs from top to bottom, twice with the same result, and its pictures say what they should."""

import ast
import html
import re
import resource

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from dataset.rows import Row
from tests.conftest import ROOT
from tests.test_attention import ROW, classifier_of
from train import attention_plots, attention_view

NOTEBOOK = ROOT / "attentionvisualize.ipynb"


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def test_coloured_text_is_the_text_escaped_and_darkest_where_read_most(tiny_base, tokenizer):
    row = Row("Rates <b>rose</b>  银行", None)
    reading = attention_view.read(classifier_of("lora", tiny_base, tokenizer), row)
    relevance = torch.zeros(len(reading.names))
    bank = next(span for text, span in reading.pieces if "银" in text)
    assert len(bank) > 1
    relevance[bank.start : bank.stop] = 0.5 / len(bank)
    relevance[reading.text[0]] = 0.25
    shown = attention_plots.coloured_text_html(reading, relevance, "base")
    text = re.search(r'pre-wrap">(.*)</div><i>', shown)[1]
    assert html.unescape(re.sub("<.*?>", "", text)) == row.text
    assert re.findall(r"96,30,([\d.]+)[^>]*>([^<]*)<", text)[0] == ("0.500", reading.pieces[0][0])
    assert "214,96,30,1.000" in text[: text.index("银")].rpartition("<span")[2]
    assert "75% of the weight lies on the text" in shown


def test_pictures_side_by_side_share_one_scale(tiny_base, tokenizer):
    speaking = attention_view.read(classifier_of("lora", tiny_base, tokenizer), ROW)
    head = attention_view.read(classifier_of("projection_head", tiny_base, tokenizer), ROW)
    figure = attention_plots.plot_by_layer({"lora": speaking, "head": head})
    images = [axes.images[0] for axes in figure.axes[:2]]
    assert images[0].get_clim() == images[1].get_clim()
    for image, reading in zip(images, (speaking, head), strict=True):
        drawn = torch.as_tensor(image.get_array())
        expected = torch.stack([layer.mean(0)[reading.reader] for layer in reading.weights])
        torch.testing.assert_close(drawn[:2], expected)
        torch.testing.assert_close(drawn[2], expected.mean(0))
        torch.testing.assert_close(drawn[3], reading.rollout[reading.reader])
    ticks = [tick.get_text() for tick in figure.axes[1].get_xticklabels()]
    assert ticks == head.names and ticks[0] == "<cls>"


# -- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook_is_committed_without_outputs_and_only_calls_and_draws():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None
        defined = (ast.FunctionDef, ast.ClassDef, ast.While)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source)))


def processor_seconds() -> float:
    """Of the processes that have ended: on one thread what a run takes, whatever else the machine is doing."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def executed(folder) -> list:
    """What a run shows in a copy of the project that holds no artifact."""
    folder.mkdir()
    for name in ("dataset", "model", "train"):
        (folder / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    before = processor_seconds()
    where = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=240, resources=where, coalesce_streams=True).execute()
    assert 10 < processor_seconds() - before < 120
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.get("data", output.get("text")) for output in outputs if output.get("name") != "stderr"]


@pytest.mark.slow
def test_two_runs_of_the_notebook_show_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = executed(tmp_path / "first"), executed(tmp_path / "second")
    assert first == second
    shown = str(first)
    assert shown.count("image/png") == 8 and "of the weight lies on the text" in shown
    assert shown.count("equal the fused kernel's, all within 1e-5") == 3
    assert shown.count("more than random ones") == 3
    assert str(tmp_path) not in shown and "\ufffd" not in shown
