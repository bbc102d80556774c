"""A decoder in NumPy, written slowly and plainly: what a model that `build` writes must compute."""

from __future__ import annotations

import numpy as np

from onnx_bitnet import reference

_MARGIN = 4e-4
"""Float noise moves 8-bit activations of up to 127 steps by less than this part of a step."""


def steady(of, weights, length=6):
    """Return tokens that put no activation so near to the middle of two steps that float noise moves it."""
    for seed in range(500):
        ids = np.random.default_rng(seed).integers(0, of.vocabulary, length)
        margins = []
        forward(of, weights, ids, margins)
        if min(margins) > _MARGIN:
            return ids
    raise AssertionError("no such tokens")


def forward(of, weights, ids, margins=None):
    """Return the logits float32 (sequence, vocabulary) of tokens (sequence,).

    Args:
        of: Architecture.
        weights: float tensors by the names that transformers gives them.
        ids: tokens.
        margins: gets the least distance of an activation to the middle of two steps, for each linear layer.
    """
    x = weights["model.embed_tokens.weight"][ids]
    cosines, sines = of.rope.tables(of.head_size, len(ids))
    for index in range(of.layers):
        name = f"model.layers.{index}"
        h = _norm(x, weights[f"{name}.input_layernorm.weight"], of.epsilon)
        q, k, v = (
            _linear(of, weights, f"{name}.self_attn.{part}_proj", h, margins).reshape(
                len(ids), -1, of.head_size
            )
            for part in "qkv"
        )
        h = _attention(_turn(q, cosines, sines), _turn(k, cosines, sines), v)
        if of.sub_norms:
            h = _norm(h, weights[f"{name}.self_attn.attn_sub_norm.weight"], of.epsilon)
        x = x + _linear(of, weights, f"{name}.self_attn.o_proj", h, margins)
        h = _norm(x, weights[f"{name}.post_attention_layernorm.weight"], of.epsilon)
        gate, up = (_linear(of, weights, f"{name}.mlp.{part}_proj", h, margins) for part in ("gate", "up"))
        h = up * (np.maximum(gate, 0) ** 2 if of.activation == "relu2" else gate / (1 + np.exp(-gate)))
        if of.sub_norms:
            h = _norm(h, weights[f"{name}.mlp.ffn_sub_norm.weight"], of.epsilon)
        x = x + _linear(of, weights, f"{name}.mlp.down_proj", h, margins)
    head = weights["model.embed_tokens.weight" if of.tied else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], of.epsilon) @ head.T


def _linear(of, weights, name, x, margins):
    if of.input_epsilon is not None:
        x = _norm(x, weights[f"{name}.rms_norm.weight"], of.input_epsilon)
    q, step = reference.quantize_rows(x.astype(np.float32), of.activation_bits)
    if margins is not None:
        margins.append(np.abs(np.abs(x / step.reshape(-1, 1) - q) - 0.5).min())
    return q.astype(np.float32) * step.reshape(-1, 1) @ weights[f"{name}.weight"].T


def _norm(x, gains, epsilon):
    return x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + epsilon) * gains


def _turn(x, cosines, sines):
    """Rotate pairs of the two halves of each head by the angle of its position."""
    first, second = np.split(x, 2, axis=-1)
    c, s = cosines[:, None], sines[:, None]
    return np.concatenate([first * c - second * s, second * c + first * s], axis=-1)


def _attention(q, k, v):
    """Return (sequence, heads * size) for q (sequence, heads, size) and shared k and v."""
    share = q.shape[1] // k.shape[1]
    k, v = (np.repeat(part, share, axis=1) for part in (k, v))
    scores = np.einsum("qhd,khd->hqk", q, k) / np.sqrt(q.shape[-1])
    scores[:, np.triu(np.ones(scores.shape[1:], bool), 1)] = -np.inf
    scores = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return np.einsum("hqk,khd->qhd", scores / scores.sum(axis=-1, keepdims=True), v).reshape(len(q), -1)


def run(session, ids):
    """Run a model on tokens, without a past; return its logits (positions, vocabulary)."""
    past = {
        value.name: np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
        for value in session.get_inputs()
        if value.name.startswith("past")
    }
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, len(ids)), np.int64)}
    return session.run(["logits"], feeds | past)[0][0]
