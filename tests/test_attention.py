"""Attention that is shown: the model's own, with names that can be read, checked against plain loops."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from dataset.classification_dataset import collate, encode
from dataset.prompts import build_prompt, text_only_prompt, with_virtual_tokens
from dataset.rows import Row, read_rows
from model import attention, model_minimind
from model.checkpoint import CheckpointError
from model.label_scoring import greedy_answers
from model.model_projection_head import ClsTunedModel
from tests.conftest import run
from tests.test_methods import LABELS, SPEAKING, speaking_model
from train import attention_plots, attention_view, setup
from train.classifiers import SCRIPTS
from train.evaluation import Classifier
from train.scoring import head_scorer, language_scorer

IDS = list(range(5, 25))
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
    weights = attention.attention_weights(model, IDS)
    found = attention.check_weights(model, IDS, weights)
    assert set(found) == {"row_sum", "attention", "output"} and max(found.values()) < 1e-5
    assert not any(module._forward_hooks for module in model.modules())
    length = len(IDS) + (method == "projection_head")
    assert weights.shape == (2, 8, length, length) and weights.dtype == torch.float32
    if method == "projection_head":
        assert (weights[:, :, 0] > 0).all()  # `<cls>` reads all of the text
        assert (weights[:, :, 1:, 0] == 0).all()  # and no text reads `<cls>`
    else:
        assert (weights.triu(1) == 0).all()


@pytest.mark.parametrize("method", METHODS)
def test_weights_that_are_not_the_models_own_are_noticed(method, tiny_base, tokenizer):
    model = classifier_of(method, tiny_base, tokenizer).model
    weights = attention.attention_weights(model, IDS)
    assert attention.check_weights(model, IDS, weights / 2)["row_sum"] > 0.4
    other_heads = attention.check_weights(model, IDS, weights.flip(1))  # whose rows sum to 1 all the same
    assert other_heads["row_sum"] < 1e-5 and other_heads["attention"] > 1e-3
    other_text = attention.attention_weights(model, IDS[::-1])
    assert attention.check_weights(model, IDS, other_text)["attention"] > 1e-3


def test_a_forward_that_computes_something_else_to_show_its_weights_is_noticed(tiny_base, monkeypatch):
    exact = model_minimind.attention_with_weights

    def shifted(*arguments):
        mixed, weights = exact(*arguments)
        return mixed * 1.01, weights

    weights = attention.attention_weights(tiny_base, IDS)
    monkeypatch.setattr(model_minimind, "attention_with_weights", shifted)
    found = attention.check_weights(tiny_base, IDS, weights)
    assert found["output"] > 1e-4 and found["attention"] < 1e-5


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
    assert attention.text_pieces(tokenizer, broken)[0][0].startswith("<E9")
    assert "".join(attention.token_labels(tokenizer, broken)).endswith("Oil")


@pytest.mark.parametrize("text", ["Oil prices\nrose 2 %", "央行上调利率，股市下跌。", "naïve café 🙂 done"])
def test_pieces_are_the_text_and_cover_its_tokens(tokenizer, text):
    ids = tokenizer.encode(text, add_special_tokens=False)
    pieces = attention.text_pieces(tokenizer, ids)
    assert "".join(piece for piece, _ in pieces) == text
    assert [position for _, span in pieces for position in span] == list(range(len(ids)))
    labels = attention.token_labels(tokenizer, ids)
    assert len(labels) == len(ids) and labels.count(attention.CONTINUED) == len(ids) - len(pieces)


def test_words_cover_the_text_and_chinese_characters_stand_alone(tokenizer):
    text = "Oil prices\nrose 银行unbelievably涨"
    ids = tokenizer.encode(text, add_special_tokens=False)
    spans = attention.word_spans(tokenizer, ids)
    assert [position for span in spans for position in span] == list(range(len(ids)))
    words = [tokenizer.decode([ids[position] for position in span]).strip() for span in spans]
    assert [word for word in words if word] == ["Oil", "prices", "rose", "银", "行", "unbelievably", "涨"]
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
    virtual = [f"virtual {number}" for number in range(1, 6)]
    first = {"prompt_tuning": [*virtual, "instruction"], "projection_head": ["<cls>"]}
    expected = first.get(method, ["instruction"])
    assert reading.names[: len(expected)] == expected and reading.text.start == len(expected)
    assert reading.reader == (0 if method == "projection_head" else size - 1)
    # The instruction's column holds what its tokens got: nothing else of the row has changed.
    prompt = classifier.prompt
    whole = attention.attention_weights(classifier.model, prompt.prompt_ids(ROW))
    own = len(reading.text) + len(prompt.suffix_ids)
    assert torch.equal(reading.weights[..., -own:, -own:], whole[..., -own:, -own:])
    for position in range(whole.shape[-1] - own, whole.shape[-1]):
        folded = whole[:, :, position, : whole.shape[-1] - own].sum(-1)
        shown = reading.weights[:, :, position - whole.shape[-1], : reading.text.start].sum(-1)
        torch.testing.assert_close(shown, folded, atol=1e-6, rtol=0)
    unfolded = attention_view.read(classifier, ROW, fold=False)
    assert torch.equal(unfolded.weights, whole) and len(unfolded.names) == whole.shape[-1]
    assert torch.equal(unfolded.rollout, attention.rollout(whole))
    first = reading.text.start - 1  # the instruction, whose row is that of its last token; virtual tokens before it
    of_instruction = whole[:, :, unfolded.text.start - 1, :first]
    assert torch.equal(reading.weights[:, :, first, :first], of_instruction)
    torch.testing.assert_close(reading.by_layer[:, -own:], unfolded.by_layer[:, -own:])
    assert unfolded.names[unfolded.reader] == reading.names[reading.reader]
    scores = classifier.scores([ROW]).softmax(-1)
    assert reading.probability == pytest.approx(float(scores.max()), abs=1e-6)
    assert reading.label == prompt.labels[int(scores.argmax())]


@pytest.mark.parametrize("method", SPEAKING)
def test_the_answer_shown_is_the_greedy_one(method, tiny_base, tokenizer):
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
    figure = attention_plots.plot_answer({method: reading})
    drawn = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert drawn == [f"{step + 1}: {name}" for step, name in enumerate(reading.answer_names)]


def test_the_projection_head_has_no_words(tiny_base, tokenizer):
    classifier = classifier_of("projection_head", tiny_base, tokenizer)
    with pytest.raises(ValueError, match="answers with a class, not in words"):
        attention_view.read(classifier, ROW, with_answer=True)
    with pytest.raises(ValueError, match="holds no answer"):
        attention_plots.plot_answer({"head": attention_view.read(classifier, ROW)})


def looks_for_seven(texts):
    return torch.tensor([[0.9, 0.1] if 7 in text else [0.2, 0.8] for text in texts])


def test_erasing_finds_the_word_that_decides():
    """A classifier that looks for token 7 alone: attention that points at it is faithful, other attention is not."""
    ids, spans = list(range(10)), [range(n, n + 1) for n in range(10)]
    right, wrong = torch.zeros(10), torch.zeros(10)
    right[7], wrong[3] = 1.0, 1.0
    attended, chance = attention.erasure_effect(looks_for_seven, ids, spans, right, share=0.1, draws=200, seed=0)
    assert attended.tolist() == pytest.approx([0.7, 1])
    assert chance[1] == pytest.approx(0.1, abs=0.06) and chance[0] == pytest.approx(0.7 * float(chance[1]), abs=1e-6)
    attended, _ = attention.erasure_effect(looks_for_seven, ids, spans, wrong, share=0.1, draws=5, seed=0)
    assert attended.tolist() == [0, 0]
    with pytest.raises(ValueError, match="a text of 1 words"):
        attention.erasure_effect(looks_for_seven, [7], [range(1)], torch.ones(1), 0.2, 5, 0)


def test_random_erasures_are_as_large_as_the_one_they_are_compared_with():
    """Half of the tokens are one word: it is erased first, and random words must cost as many tokens."""
    ids, spans = list(range(20)), [range(10), *(range(n, n + 1) for n in range(10, 20))]
    relevance = torch.tensor([1.0] + [0.0] * 10)
    seen = []

    def probabilities(texts):
        seen.extend(texts)
        return looks_for_seven(texts)

    attention.erasure_effect(probabilities, ids, spans, relevance, share=0.1, draws=30, seed=0)
    whole, attended, *chance = seen
    assert whole == ids and attended == ids[10:]
    assert all(0 < len(text) <= 10 for text in chance)
    assert len({tuple(text) for text in chance}) > 5


def test_effects_of_many_texts_are_those_of_each(tiny_base, tokenizer, rows):
    classifier = classifier_of("projection_head", tiny_base, tokenizer)
    effects = attention_view.faithfulness(classifier, rows[:3], draws=2)
    assert effects.shape == (3, 2, 2)
    assert torch.equal(effects, attention_view.faithfulness(classifier, rows[:3], draws=2))
    low, high = attention_view.bootstrap_interval(effects[:, :, 0])
    assert ((low <= effects[:, :, 0].mean(0)) & (effects[:, :, 0].mean(0) <= high)).all()
    figure = attention_plots.plot_faithfulness({"a": effects, "b": effects})
    assert len(figure.axes[0].patches) == 4
    widths = [bar.get_width() for bar in figure.axes[0].patches[::2]]  # most attended, random, of "a"
    assert widths == pytest.approx(effects[:, :, 0].mean(0).tolist())


# -- artifacts --------------------------------------------------------------------------------------------------------


def test_every_artifact_and_the_base_open_by_name(tmp_path, tiny_base_folder, data_files, monkeypatch):
    monkeypatch.chdir(tmp_path)
    flags = ["--from_weight", tiny_base_folder, "--data_path", data_files["train"], "--allow_mismatch"]
    for method in ("prompt_tuning", "projection_head"):
        run(SCRIPTS[method], *flags, "--epochs", 1, "--max_seq_len", 96, "--save_name", "same", cwd=tmp_path)
    paths = [f"out/{method}/same_64.safetensors" for method in ("prompt_tuning", "projection_head")]
    rows = read_rows(data_files["train"])
    monkeypatch.setattr(setup, "check_pairing", lambda *arguments: None)  # the tiny base knows nothing
    opened = attention_view.open_classifiers(str(tiny_base_folder), paths, rows)
    methods = {name: classifier.method for name, classifier in opened.items()}
    assert methods == {"base": "frozen base", "same_64": "prompt_tuning", paths[1]: "projection_head"}
    assert attention_view.read(opened["same_64"], ROW).names[19] == "virtual 20"
    assert list(attention_view.open_classifiers(str(tiny_base_folder), [], rows)) == ["base"]
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: no such file"):
        attention_view.open_classifiers(str(tiny_base_folder), ["out/absent.safetensors"], rows)
    assert not Path("out/absent.safetensors").exists()


def test_a_small_artifact_that_cannot_be_trained_says_why(tmp_path, tiny_base_folder):
    with pytest.raises(RuntimeError, match=r"train_lora\.py ended with 4: .*no better than chance"):
        attention_view.quick_artifact(str(tiny_base_folder), "lora", tmp_path)
