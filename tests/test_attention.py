"""Attention that is shown: the model's own, with names that can be read, against plain loops; and its notebook."""

import ast

import matplotlib.pyplot as plt
import nbformat
import pytest
import torch
from nbclient import NotebookClient

from dataset.prompts import build_prompt, text_only_prompt, with_virtual_tokens
from dataset.rows import Row
from model import attention
from model.label_scoring import greedy_answers
from model.model_projection_head import ClsTunedModel
from tests.conftest import ROOT
from tests.test_methods import LABELS, SPEAKING, speaking_model
from train import attention_view
from train.evaluation import Classifier
from train.scoring import head_scorer, language_scorer

IDS = list(range(5, 25))
NOTEBOOK = ROOT / "attentionvisualize.ipynb"
ROW = Row("The bank's shares rose after its results, and the minister spoke.", "business", source="here")


@pytest.fixture(autouse=True)
def no_window():
    plt.switch_backend("agg")
    yield
    plt.close("all")


def classifier_of(method, base, tokenizer) -> Classifier:
    prompt = build_prompt(tokenizer, LABELS, max_seq_len=120)
    if method == "projection_head":
        torch.manual_seed(0)
        model = ClsTunedModel(base, len(LABELS)).eval()
        return Classifier(method, text_only_prompt(prompt), head_scorer(model), model, 0, "cpu", speaks=False)
    model, virtual = speaking_model(method, base)
    prompt = with_virtual_tokens(prompt, virtual)
    return Classifier(method, prompt, language_scorer(model, prompt), model, 0, "cpu")


METHODS = [*SPEAKING, "projection_head"]


@pytest.mark.parametrize("method", METHODS)
def test_the_weights_are_the_models_own(method, tiny_base, tokenizer):
    model = classifier_of(method, tiny_base, tokenizer).model
    found = attention.check_weights(model, IDS)
    assert found["row_sum"] < 1e-5 and found["output"] < 1e-5
    weights = attention.attention_weights(model, IDS)
    length = len(IDS) + (method == "projection_head")
    assert weights.shape == (2, 8, length, length) and weights.dtype == torch.float32
    if method == "projection_head":
        assert (weights[:, :, 0] > 0).all()  # `<cls>` reads all of the text
        assert (weights[:, :, 1:, 0] == 0).all()  # and no text reads `<cls>`
    else:
        assert (weights.triu(1) == 0).all()


def test_a_wrong_weight_is_noticed(tiny_base, monkeypatch):
    from model import model_minimind

    exact = model_minimind.attention_with_weights

    def halved(*arguments):
        mixed, weights = exact(*arguments)
        return mixed, weights / 2

    monkeypatch.setattr(model_minimind, "attention_with_weights", halved)
    assert attention.check_weights(tiny_base, IDS)["row_sum"] > 0.4


def test_rollout_equals_a_loop_over_paths():
    weights = torch.rand(3, 2, 4, 4).softmax(-1)
    layers = [0.5 * layer.mean(0) + 0.5 * torch.eye(4) for layer in weights]
    expected = torch.zeros(4, 4)
    for i in range(4):
        for j in range(4):
            for a in range(4):
                for b in range(4):
                    expected[i, j] += layers[2][i, a] * layers[1][a, b] * layers[0][b, j]
    torch.testing.assert_close(attention.rollout(weights), expected)
    torch.testing.assert_close(attention.rollout(weights).sum(-1), torch.ones(4))


def test_every_token_has_a_name_that_can_be_read(tokenizer):
    ids = tokenizer.encode("Oil up\n\n 银行 café <|im_end|>", add_special_tokens=False)
    names = attention.token_labels(tokenizer, ids)
    assert len(names) == len(ids) and "\ufffd" not in "".join(names)
    joined = "".join(name for name in names if name != attention.CONTINUED)
    for piece in ("Oil", "↵", "银", "行", "é", "<|im_end|>"):
        assert piece in joined
    half = tokenizer.encode("银", add_special_tokens=False)[:1]
    assert attention.token_labels(tokenizer, half)[0].startswith("<E9")
    broken = [*half, *tokenizer.encode("Oil", add_special_tokens=False)]
    assert attention.token_labels(tokenizer, broken)[0].startswith("<E9")
    assert "".join(attention.token_labels(tokenizer, broken)).endswith("Oil")


def test_words_cover_the_text_and_chinese_characters_stand_alone(tokenizer):
    text = "Oil prices\nrose 银行 unbelievably"
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = attention.word_spans(tokenizer, ids)
    assert [position for span in spans for position in span] == list(range(len(ids)))
    words = [tokenizer.decode([ids[position] for position in span]).strip() for span in spans]
    assert [word for word in words if word] == ["Oil", "prices", "rose", "银", "行", "unbelievably"]
    relevance = torch.rand(len(ids))
    torch.testing.assert_close(attention.word_relevance(relevance, spans).sum(), relevance.sum())


@pytest.mark.parametrize("method", METHODS)
def test_a_reading_names_every_position_and_keeps_all_weight(method, tiny_base, tokenizer):
    classifier = classifier_of(method, tiny_base, tokenizer)
    reading = attention_view.read(classifier, ROW)
    size = len(reading.names)
    assert reading.weights.shape == (2, 8, size, size) and reading.rollout.shape == (size, size)
    torch.testing.assert_close(reading.weights.sum(-1), torch.ones(2, 8, size), atol=1e-5, rtol=0)
    torch.testing.assert_close(reading.rollout.sum(-1), torch.ones(size), atol=1e-5, rtol=0)
    shown = "".join(reading.names[position] for position in reading.text)
    assert shown == ROW.text.replace(" ", "")
    first = {"prompt_tuning": ["v1", "v2", "v3", "v4", "v5", "instruction"], "projection_head": ["<cls>"]}
    expected = first.get(method, ["instruction"])
    assert reading.names[: len(expected)] == expected and reading.text.start == len(expected)
    assert reading.reader == (0 if method == "projection_head" else size - 1)
    # The instruction's column holds what its tokens got: nothing else of the row has changed.
    prompt = classifier.prompt
    whole = attention.attention_weights(classifier.model, prompt.prompt_ids(ROW))
    own = len(reading.text) + len(prompt.suffix_ids)
    assert torch.equal(reading.weights[..., -own:, -own:], whole[..., -own:, -own:])
    scores = classifier.scores([ROW]).softmax(-1)
    assert reading.probability == pytest.approx(float(scores.max()), abs=1e-6)
    assert reading.label == prompt.labels[int(scores.argmax())]


@pytest.mark.parametrize("method", SPEAKING)
def test_the_answer_shown_is_the_greedy_one(method, tiny_base, tokenizer):
    from dataset.classification_dataset import collate, encode

    classifier = classifier_of(method, tiny_base, tokenizer)
    reading = attention_view.read(classifier, ROW, with_answer=True)
    prompt, longest = classifier.prompt, max(map(len, classifier.prompt.label_ids))
    batch = collate(encode([ROW], prompt, need_labels=False), prompt, "cpu", False)
    answer = greedy_answers(classifier.model, batch, tokenizer.eos_token_id, longest)[0]
    shown = reading.answer_names[:-1] if reading.answer_names[-1] == "<|im_end|>" else reading.answer_names
    assert shown == attention.token_labels(tokenizer, answer)
    # A step's row is the last row of a forward over what stood there at that step.
    so_far = prompt.prompt_ids(ROW) + answer[:2]
    expected = attention.attention_weights(classifier.model, so_far)[:, :, -1, -3:]
    found = reading.weights[:, :, reading.answer[2], reading.answer[2] - 2 : reading.answer[2] + 1]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=0)
    figure = attention_view.plot_answer(reading)
    assert len(figure.axes[0].get_yticks()) == len(reading.answer_names)


def test_the_projection_head_has_no_words(tiny_base, tokenizer):
    classifier = classifier_of("projection_head", tiny_base, tokenizer)
    with pytest.raises(ValueError, match="answers with a class, not in words"):
        attention_view.read(classifier, ROW, with_answer=True)
    with pytest.raises(ValueError, match="holds no answer"):
        attention_view.plot_answer(attention_view.read(classifier, ROW))


def test_erasing_finds_the_word_that_decides():
    """A classifier that looks for token 7 alone: attention that points at it is faithful, other attention is not."""

    def probabilities(texts):
        return torch.tensor([[0.9, 0.1] if 7 in text else [0.2, 0.8] for text in texts])

    ids, spans = list(range(10)), [range(n, n + 1) for n in range(10)]
    right, wrong = torch.zeros(10), torch.zeros(10)
    right[7], wrong[3] = 1.0, 1.0
    attended, chance = attention.erasure_effect(probabilities, ids, spans, right, share=0.1, draws=200, seed=0)
    assert attended == pytest.approx(0.7) and chance == pytest.approx(0.07, abs=0.04)
    attended, _ = attention.erasure_effect(probabilities, ids, spans, wrong, share=0.1, draws=5, seed=0)
    assert attended == 0
    with pytest.raises(ValueError, match="a text of 1 words"):
        attention.erasure_effect(probabilities, [7], [range(1)], torch.ones(1), 0.2, 5, 0)


def test_coloured_text_is_escaped_and_darkest_where_read_most(tiny_base, tokenizer):
    row = Row("Rates <b>rose</b> 银", None)
    reading = attention_view.read(classifier_of("lora", tiny_base, tokenizer), row)
    relevance = torch.zeros(len(reading.names))
    relevance[reading.text[0]] = 0.25
    shown = attention_view.coloured_text_html(reading, relevance, "base")
    assert "<b>rose" not in shown and "银" in shown
    assert shown.index("214,96,30,1.000") < shown.index("214,96,30,0.000")
    assert "25% of the weight lies on the text" in shown


# -- the notebook -----------------------------------------------------------------------------------------------------


def test_the_notebook_is_committed_without_outputs_and_only_calls_and_draws():
    cells = [cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code"]
    for cell in cells:
        assert not cell.outputs and cell.execution_count is None
        defined = (ast.FunctionDef, ast.ClassDef, ast.While)
        assert not any(isinstance(node, defined) for node in ast.walk(ast.parse(cell.source)))


def executed(folder) -> list:
    """What a run shows in a copy of the project that holds no artifact."""
    folder.mkdir()
    for name in ("dataset", "model", "train"):
        (folder / name).symlink_to(ROOT / name)
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    resources = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=110, resources=resources, coalesce_streams=True).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    return [output.get("data", output.get("text")) for output in outputs if output.get("name") != "stderr"]


@pytest.mark.slow
def test_two_runs_of_the_notebook_show_the_same(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    first, second = executed(tmp_path / "first"), executed(tmp_path / "second")
    assert first == second
    shown = str(first)
    assert shown.count("image/png") >= 8 and "of the weight lies on the text" in shown
    assert str(tmp_path) not in shown
