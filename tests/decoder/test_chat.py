"""Chat: the checkpoint's own template makes the prompt, and its end of an answer ends the text."""

from __future__ import annotations

import json

import checkpoints
import pytest

from onnx_bitnet.decoder import Generator, build
from onnx_bitnet.decoder.chat import chat_prompt
from onnx_bitnet.errors import ModelError

pytest.importorskip("jinja2", reason="install the extra [text]")

BITNET = (
    "{% for message in messages %}"
    "{% set content = message['role'] | capitalize + ': ' + message['content'] | trim + '<|eot|>' %}"
    "{% if loop.index0 == 0 %}{% set content = bos_token + content %}{% endif %}{{ content }}"
    "{% endfor %}{% if add_generation_prompt %}{{ 'Assistant: ' }}{% endif %}"
)
HELLO = [{"role": "user", "content": " <hello> "}]


def write(folder, **config):
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("bos", ["<s>", {"content": "<s>", "lstrip": False}])
@pytest.mark.parametrize("listed", [False, True])
def test_a_template_of_the_config(tmp_path, bos, listed):
    template = (
        [{"name": "tool_use", "template": "no"}, {"name": "default", "template": BITNET}]
        if listed
        else BITNET
    )
    write(tmp_path, bos_token=bos, chat_template=template)
    assert chat_prompt(tmp_path, HELLO) == "<s>User: <hello><|eot|>Assistant: "


def test_a_template_of_its_own_file_comes_first(tmp_path):
    write(tmp_path, chat_template="old")
    (tmp_path / "chat_template.jinja").write_text(
        "{% for m in messages %}\n"
        "  {% if m.role == 'tool' %}{% continue %}{% endif %}\n"
        "{{ m | tojson }}\n"
        "{% endfor %}"
    )
    assert chat_prompt(tmp_path, HELLO) == '{"role": "user", "content": " <hello> "}\n'


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({}, "has no chat template"),
        ({"chat_template": [{"name": "rag", "template": ""}]}, "has no chat template"),
        ({"chat_template": "{{ raise_exception('no system') }}"}, "its chat template fails: no system"),
        ({"chat_template": "{% if %}"}, "its chat template fails: Expected"),
        ({"chat_template": "{{ ''.__class__.__mro__ }}"}, "its chat template fails: access to attribute"),
    ],
)
def test_templates_that_give_no_prompt(tmp_path, config, message):
    with pytest.raises(ModelError, match=message):
        chat_prompt(write(tmp_path, **config), HELLO)


def test_answers(tmp_path):
    """No special tokens are added to the prompt; generation_config.json says what ends an answer."""
    tokenizers = pytest.importorskip("tokenizers", reason="install the extra [text]")
    words = ["<s>", "User:", "Assistant:", "hello", *(f"w{index}" for index in range(4, 96))]
    tokenizer = tokenizers.Tokenizer(
        tokenizers.models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<s>")
    )
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.WhitespaceSplit()
    tokenizer.post_processor = tokenizers.processors.TemplateProcessing("<s> $A", special_tokens=[("<s>", 0)])
    master = checkpoints.tensors(config := checkpoints.CONFIG | {"vocab_size": len(words)})
    source = checkpoints.write(tmp_path / "source", config, checkpoints.effective(master))
    tokenizer.save(str(source / "tokenizer.json"))
    write(
        source,
        bos_token="<s>",
        chat_template=BITNET.replace("<|eot|>", " ").replace("+ content", "+ ' ' + content"),
    )
    (source / "generation_config.json").write_text(json.dumps({"eos_token_id": [2, 90]}))
    build(source, tmp_path / "model")
    generator = Generator(tmp_path / "model", threads=1)
    expected = tokenizer.decode(list(generator.tokens([0, 1, 3, 2], 8)))
    assert "".join(generator.text("hello", 8, chat=True)) == expected
    assert json.loads((tmp_path / "model/genai_config.json").read_text())["model"]["eos_token_id"] == [2, 90]
