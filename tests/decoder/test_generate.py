"""Generating: the cache that never moves gives what a whole forward pass gives."""

from __future__ import annotations

import json
import math

import decoders
import numpy as np
import pytest

import onnx_bitnet as bn
from onnx_bitnet.decoder import GEOMETRIES, Generator, Options, Sampling, build
from onnx_bitnet.errors import DataError, ModelError, RecipeError

PROMPT = [3, 1, 4, 1, 5]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("decoder") / "tiny"
    build(GEOMETRIES["tiny"], path, Options("float", "float"))
    return path


def test_greedy_tokens_are_those_of_whole_passes(folder):
    session = bn.session(folder / "model.onnx", threads=1)
    tokens = list(PROMPT)
    for _ in range(24):
        tokens.append(int(decoders.run(session, tokens)[-1].argmax()))
    generator = Generator(folder, threads=1)
    assert list(generator.tokens(PROMPT, 24)) == tokens[len(PROMPT) :]
    assert generator.times.prompt_tokens == 5
    assert generator.times.tokens == 23
    assert generator.times.speed > 0
    assert list(Generator(folder / "model.onnx", threads=2).tokens(PROMPT, 24)) == tokens[len(PROMPT) :]


def test_a_long_prompt_is_read_in_parts(folder):
    prompt = np.random.default_rng(0).integers(0, 256, 200).tolist()
    session = bn.session(folder / "model.onnx", threads=1)
    expected = int(decoders.run(session, prompt)[-1].argmax())
    assert next(Generator(folder, threads=1).tokens(prompt, 4)) == expected


def test_texts_do_not_disturb_each_other(folder):
    generator = Generator(folder, threads=1)
    alone = list(generator.tokens(PROMPT, 8)), list(generator.tokens([7], 8))
    both = zip(generator.tokens(PROMPT, 8), generator.tokens([7], 8), strict=True)
    assert tuple(map(list, zip(*both, strict=True))) == alone


def test_it_stops_at_the_end_of_the_text(folder):
    generator = Generator(folder, threads=1)
    third = list(generator.tokens(PROMPT, 8))[2]
    config = json.loads((folder / "genai_config.json").read_text())
    other = folder.parent / "stopping"
    build(GEOMETRIES["tiny"].replace(eos=(third,)), other, Options("float", "float"))
    assert config["model"]["eos_token_id"] == []
    expected = list(generator.tokens(PROMPT, 8))
    assert list(Generator(other, threads=1).tokens(PROMPT, 8)) == expected[: expected.index(third)]


def test_sampling_has_a_seed(folder):
    generator = Generator(folder, threads=1)
    texts = [
        list(generator.tokens(PROMPT, 16, Sampling(temperature=1.0, seed=seed, top_p=0.95)))
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_sampling_follows_the_probabilities():
    logits = np.log(np.array([0.1, 0.6, 0.3], np.float32))
    for sampling, expected in (
        (Sampling(1.0), [0.1, 0.6, 0.3]),
        (Sampling(1.0, top_k=2), [0, 2 / 3, 1 / 3]),
        (Sampling(1.0, top_p=0.5), [0, 1, 0]),
        (Sampling(1.0, top_p=0.7), [0, 2 / 3, 1 / 3]),
        (Sampling(0.5), np.array([0.01, 0.36, 0.09]) / 0.46),
        (Sampling(), [0, 1, 0]),
    ):
        rng = sampling.generator()
        drawn = np.bincount([sampling.choose(logits, rng) for _ in range(4000)], minlength=3) / 4000
        np.testing.assert_allclose(drawn, expected, atol=0.03)


@pytest.mark.parametrize(
    "values",
    [
        {"temperature": -1},
        {"temperature": math.nan},
        {"top_k": -1},
        {"top_p": 0},
        {"top_p": 1.1},
        {"seed": -1},
    ],
)
def test_sampling_out_of_range(values):
    with pytest.raises(RecipeError, match="temperature, top_k and seed"):
        Sampling(**values)


def test_prompts_that_do_not_fit(folder):
    generator = Generator(folder, threads=1)
    for prompt, count, message in (
        ([], 4, "the prompt is empty"),
        ([1], 0, "no tokens are asked for"),
        ([256], 4, "tokens outside 0 to 255"),
        ([-1], 4, "tokens outside"),
        ([1] * 250, 10, "250 tokens of prompt and 10 new ones exceed the model's 256"),
    ):
        with pytest.raises(DataError, match=message):
            list(generator.tokens(prompt, count))


def test_models_that_are_none(folder, tmp_path):
    with pytest.raises(ModelError, match=r"tokenizer\.json: the model has no tokenizer"):
        list(Generator(folder, threads=1).text("hello"))
    with pytest.raises(ModelError, match=r"genai_config.json: is missing"):
        Generator(tmp_path)
    (tmp_path / "genai_config.json").write_text('{"model": {}}')
    with pytest.raises(ModelError, match=r"does not describe a decoder"):
        Generator(tmp_path)


def test_text_comes_in_whole_characters(folder):
    tokenizers = pytest.importorskip("tokenizers", reason="install the extra [text]")
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.BPE({symbol: index for index, symbol in enumerate(alphabet)}, [])
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.save(str(folder / "tokenizer.json"))
    try:
        generator = Generator(folder, threads=1)
        pieces = list(generator.text("héllo", 40, Sampling(1.0, seed=4)))
        tokens = list(generator.tokens(tokenizer.encode("héllo").ids, 40, Sampling(1.0, seed=4)))
    finally:
        (folder / "tokenizer.json").unlink()
    whole = tokenizer.decode(tokens)
    assert "".join(pieces) == whole
    assert len(pieces) > 5
