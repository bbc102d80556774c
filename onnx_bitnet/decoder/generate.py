"""Generate text with plain onnxruntime: a loop over tokens."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from onnx_bitnet import runtime
from onnx_bitnet.decoder.chat import chat_prompt
from onnx_bitnet.decoder.sampling import Sampling
from onnx_bitnet.decoder.step import Step
from onnx_bitnet.errors import DataError, ModelError, one_line

CONFIG = "genai_config.json"
_REPLACEMENT = "\N{REPLACEMENT CHARACTER}"


@dataclass
class Times:
    """How long a text took.

    Args:
        prompt_tokens: tokens of the prompt.
        prompt_seconds: time until the first new token.
        tokens: tokens generated after the first.
        seconds: their time.
    """

    prompt_tokens: int = 0
    prompt_seconds: float = 0.0
    tokens: int = 0
    seconds: float = 0.0

    @property
    def prompt_speed(self) -> float:
        """Tokens of the prompt per second."""
        return self.prompt_tokens / self.prompt_seconds if self.prompt_seconds else 0.0

    @property
    def speed(self) -> float:
        """Generated tokens per second."""
        return self.tokens / self.seconds if self.seconds else 0.0

    def summary(self) -> str:
        """Say both in a line."""
        generated = self.tokens + 1 if self.prompt_seconds else 0
        return (
            f"prompt: {self.prompt_tokens} tokens, {self.prompt_speed:.1f} tokens/s; "
            f"generated: {generated} tokens, {self.speed:.1f} tokens/s"
        )


class Generator:
    """A decoder with its session and, if it has one, its tokenizer.

    Args:
        path: a folder as `build` or the builder of onnxruntime-genai writes it, or the .onnx file in it.
        threads: for onnxruntime; 0 lets it choose.
        options: an onnxruntime.SessionOptions, see session.

    Raises:
        ModelError: there is no such model, or its genai_config.json is missing or describes no decoder.
        RuntimeMissing: see session.
    """

    def __init__(self, path: str | Path, threads: int = 0, options: Any = None) -> None:
        path = Path(path)
        self.folder = path if path.is_dir() else path.parent
        self._config = _read_config(self.folder / CONFIG)
        self._decoder = self._config["decoder"]
        self.session = runtime.session(
            self.folder / self._decoder["filename"] if path.is_dir() else path, threads, options
        )
        eos = self._config.get("eos_token_id", [])
        self._eos = set(eos if isinstance(eos, list) else [eos])
        self._context = int(self._config["context_length"])
        self.times = Times()

    def text(
        self, prompt: str, count: int = 128, sampling: Sampling | None = None, *, chat: bool = False
    ) -> Iterator[str]:
        """Yield the continuation of a text, piece by piece.

        Args:
            prompt: text to begin with.
            count: tokens to generate at most.
            sampling: how to choose them; None takes the most likely one each time.
            chat: the prompt is a message to answer: it is put into the checkpoint's chat template.

        Raises:
            ModelError: the model has no tokenizer or no chat template, or a package for it is missing.
            DataError: the prompt is empty or too long, or `count` is not positive.
        """
        tokenizer = self._tokenizer()
        tokens: list[int] = []
        whole = written = ""
        if chat:  # a template writes special tokens itself
            prompt = chat_prompt(self.folder, [{"role": "user", "content": prompt}])
        encoded = tokenizer.encode(prompt, add_special_tokens=not chat)
        for token in self.tokens(encoded.ids, count, sampling):
            tokens.append(token)
            whole = tokenizer.decode(tokens)
            if not whole.endswith(_REPLACEMENT):  # the rest of a character is still to come
                yield whole[len(written) :]
                written = whole
        if whole != written:
            yield whole[len(written) :]

    def tokens(
        self, prompt: Sequence[int], count: int = 128, sampling: Sampling | None = None
    ) -> Iterator[int]:
        """Yield the tokens that continue a prompt of tokens, until one that ends the text, which is left out.

        Raises:
            DataError: the prompt is empty, too long, or holds tokens that the model does not know.
        """
        sampling = sampling or Sampling()
        self._check(prompt, count)
        step = Step(self.session, self._decoder, len(prompt) + count, in_place=self._config["in_place"])
        rng, new = sampling.generator(), list(prompt)
        self.times = Times(prompt_tokens=len(prompt))
        for index in range(count):
            start = time.perf_counter()
            new = [sampling.choose(step.logits(new), rng)]
            seconds = time.perf_counter() - start
            if index == 0:
                self.times.prompt_seconds = seconds
            else:
                self.times.tokens += 1
                self.times.seconds += seconds
            if new[0] in self._eos:
                return
            yield new[0]

    def _check(self, prompt: Sequence[int], count: int) -> None:
        vocabulary = self._config["vocab_size"]
        if not prompt or count < 1:
            raise DataError("the prompt is empty, or no tokens are asked for; give at least one of each")
        if min(prompt) < 0 or max(prompt) >= vocabulary:
            raise DataError(f"the prompt holds tokens outside 0 to {vocabulary - 1}")
        if len(prompt) + count > self._context:
            raise DataError(
                f"{len(prompt)} tokens of prompt and {count} new ones exceed the model's {self._context}"
            )

    def _tokenizer(self) -> Any:
        path = self.folder / "tokenizer.json"
        if not path.is_file():
            raise ModelError(f"{path}: the model has no tokenizer; give tokens instead of text")
        try:
            import tokenizers
        except ImportError:
            raise ModelError(f"{path}: reading it needs a package: pip install 'onnx-bitnet[text]'") from None
        try:
            return tokenizers.Tokenizer.from_file(str(path))
        except Exception as error:  # the library raises nothing more specific
            raise ModelError(f"{path}: not a tokenizer: {one_line(error)}") from None


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
        model = {
            "in_place": config.get("search", {}).get("past_present_share_buffer", True),
            **config["model"],
        }
        decoder = model["decoder"]
        for key in ("filename", "inputs", "outputs", "num_key_value_heads", "head_size", "num_hidden_layers"):
            decoder[key]
        model["context_length"], model["vocab_size"]
    except FileNotFoundError:
        raise ModelError(f"{path}: is missing; it says how the model is run, `build` writes it") from None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ModelError(f"{path}: does not describe a decoder: {one_line(error)}") from None
    return model
