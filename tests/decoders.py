"""A decoder in NumPy, written slowly and plainly: what a model that `build` writes must compute."""

from __future__ import annotations

import numpy as np

from onnx_bitnet import reference


def forward(of, weights, ids):
    """Return the logits float32 (sequence, vocabulary) of tokens (sequence,).

    Args:
        of: Architecture.
        weights: float tensors by the names that transformers gives them.
        ids: tokens.
    """
    x = weights["model.embed_tokens.weight"][ids]
    cosines, sines = of.rope.tables(of.head_size, len(ids))
    for index in range(of.layers):
        name = f"model.layers.{index}"
        h = _norm(x, weights[f"{name}.input_layernorm.weight"], of.epsilon)
        q, k, v = (
            _linear(of, weights, f"{name}.self_attn.{part}_proj", h).reshape(len(ids), -1, of.head_size)
            for part in "qkv"
        )
        h = _attention(_turn(q, cosines, sines), _turn(k, cosines, sines), v)
        if of.sub_norms:
            h = _norm(h, weights[f"{name}.self_attn.attn_sub_norm.weight"], of.epsilon)
        x = x + _linear(of, weights, f"{name}.self_attn.o_proj", h)
        h = _norm(x, weights[f"{name}.post_attention_layernorm.weight"], of.epsilon)
        gate, up = (_linear(of, weights, f"{name}.mlp.{part}_proj", h) for part in ("gate", "up"))
        h = up * (np.maximum(gate, 0) ** 2 if of.activation == "relu2" else gate / (1 + np.exp(-gate)))
        if of.sub_norms:
            h = _norm(h, weights[f"{name}.mlp.ffn_sub_norm.weight"], of.epsilon)
        x = x + _linear(of, weights, f"{name}.mlp.down_proj", h)
    head = weights["model.embed_tokens.weight" if of.tied else "lm_head.weight"]
    return _norm(x, weights["model.norm.weight"], of.epsilon) @ head.T


def _linear(of, weights, name, x):
    if of.input_epsilon is not None:
        x = _norm(x, weights[f"{name}.rms_norm.weight"], of.input_epsilon)
    q, step = reference.quantize_rows(x.astype(np.float32), of.activation_bits)
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
