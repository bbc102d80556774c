"""Attention in onnxruntime: the oracle's bits, every way to call it, and every way to misuse it."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import packed
import pytest
from corrupted import attribute, load, node_input, python
from onnx import TensorProto, helper
from onnx.reference import ReferenceEvaluator
from sessions import assert_same_bits, open_model

from onnx_bitnet import _native, reference, runtime
from onnx_bitnet.rewrite import functions

Feeds = dict[str, np.ndarray]
NAMES = ("q", "k", "v", "mask")
SCALE = 0.25


def model(
    shapes: dict[str, packed.Shape | None] | None = None,
    *,
    by_head: bool = False,
    guard: bool = False,
    opset: int = 17,
    with_function: bool = False,
) -> onnx.ModelProto:
    """Make q, k, v, mask -> Attention -> y, whose shapes are not known unless said."""
    op_type = "AttentionByHead" if by_head else "Attention"
    attributes = {"scale": SCALE, "nan_to_zero": int(guard)}
    shapes = dict.fromkeys(NAMES) | {name: [None] * 4 for name in NAMES[:3]} | (shapes or {})
    return packed.model(
        [helper.make_node(op_type, NAMES, ["y"], name="attention", domain=functions.DOMAIN, **attributes)],
        [],
        [packed.value(name, np.float32, shapes[name]) for name in NAMES],
        [packed.value("y", np.float32, [None] * 4 if with_function else None)],
        opset=opset,
        with_function=with_function,
    )


def feeds(
    batch: int = 2,
    rows: int = 7,
    heads: int = 3,
    tokens: int | None = None,
    width: int = 8,
    value_width: int | None = None,
    mask: tuple[int, ...] = (1, 1, 1, 1),
    seed: int = 0,
) -> Feeds:
    tokens = rows if tokens is None else tokens
    shapes = {
        "q": (batch, rows, heads, width),
        "k": (batch, tokens, heads, width),
        "v": (batch, tokens, heads, width if value_width is None else value_width),
        "mask": mask,
    }
    rng = np.random.default_rng(seed)
    return {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}


def expected(x: Feeds) -> np.ndarray:
    return reference.attention(x["q"], x["k"], x["v"], x["mask"], SCALE)


def by_head(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x.swapaxes(1, 2))


def check(x: Feeds, threads: int = 1) -> None:
    """Compare with the oracle, in both orders of heads and rows."""
    want = expected(x)
    assert_same_bits(open_model(model(), threads).run(None, x)[0], want)
    x = {name: x[name] if name == "mask" else by_head(x[name]) for name in NAMES}
    assert_same_bits(open_model(model(by_head=True), threads).run(None, x)[0], by_head(want))


# What it computes


def test_result_has_the_bits_of_the_oracle_for_any_sizes():
    session = open_model(model())
    for rows in (1, 5, 6, 24, 25, 48, 50, 191, 193, 400):  # around strips, blocks and tasks
        x = feeds(rows=rows, tokens=min(rows, 70), width=5, value_width=19)
        assert_same_bits(session.run(None, x)[0], expected(x))
    for batch, heads in ((1, 1), (1, 65), (9, 16), (130, 1)):  # more heads than tasks
        x = feeds(batch, 3, heads, width=4)
        assert_same_bits(session.run(None, x)[0], expected(x))


def test_heads_of_16_values_are_read_where_they_lie():
    for rows in (1, 24, 25, 60):
        check(feeds(rows=rows, tokens=37, width=7, value_width=48))


def test_heads_larger_than_what_is_asked_for_ahead():
    check(feeds(1, 3, 2, tokens=1100, width=32, value_width=40))


@pytest.mark.parametrize(
    "mask",
    [(), (1,), (9,), (7, 1), (7, 9), (3, 7, 9), (2, 1, 1, 9), (1, 3, 7, 1), (2, 3, 7, 9), (2, 3, 1, 1)],
)
def test_masks_broadcast(mask: tuple[int, ...]):
    check(feeds(rows=7, tokens=9, mask=mask))


def test_masks_of_long_heads_go_by_rows():
    check(feeds(1, 400, 2, tokens=66, mask=(400, 66)), threads=2)
    check(feeds(1, 1537, 1, tokens=3, width=2, mask=(1537, 3)))  # the last task has one row


@pytest.mark.parametrize("shared", [("q",), ("k",), ("k", "v"), ("q", "mask"), ("q", "k", "v")])
@pytest.mark.parametrize("axis", [0, 2])
def test_one_batch_or_head_serves_all(shared: tuple[str, ...], axis: int):
    """A mask of 2 batches and 3 heads keeps the result large where q, k and v have one."""
    x = feeds(mask=(2, 3, 1, 7))
    check(x | {name: x[name].take([0], axis if name != "mask" else axis // 2) for name in shared})


def test_masked_tokens_do_not_count():
    x = feeds(mask=(2, 1, 1, 7))
    x["mask"][:] = np.where(np.arange(7) < 4, 0, -np.inf)
    part = {name: x[name][:, :4] for name in ("k", "v")} | {"q": x["q"], "mask": x["mask"][..., :4]}
    assert_same_bits(open_model(model()).run(None, x)[0], expected(part))


def test_rows_that_are_masked_throughout_are_nan():
    x = feeds(mask=(7, 7))
    x["mask"][2] = -np.inf
    y = open_model(model()).run(None, x)[0]
    assert np.isnan(y[:, 2]).all()
    assert np.isfinite(np.delete(y, 2, axis=1)).all()


def test_rows_that_are_masked_throughout_may_be_zeros():
    x = feeds(mask=(7, 7))
    x["mask"][2] = -np.inf
    x["q"][0, 4, 1] = np.nan
    y = open_model(model(guard=True)).run(None, x)[0]
    assert_same_bits(y, reference.attention(*(x[name] for name in NAMES), SCALE, nan_to_zero=True))
    assert not y[:, 2].any()
    assert not y[0, 4, 1].any()
    assert np.count_nonzero(y) == y.size - y[:, 2].size - y[0, 4, 1].size


@pytest.mark.parametrize("size", ["batch", "rows", "heads", "tokens", "width", "value_width"])
def test_sizes_of_zero(size: str):
    x = feeds(**{"batch": 2, "rows": 7, "heads": 3, "tokens": 7, size: 0})
    y = open_model(model()).run(None, x)[0]
    assert y.shape == (*x["q"].shape[:3], x["v"].shape[3])
    assert_same_bits(y, expected(x))


def test_results_do_not_depend_on_threads():
    for x in (feeds(1, 500, 3, mask=(1, 1, 500, 500)), feeds(9, 30, 16)):
        results = [open_model(model(), threads).run(None, x)[0] for threads in (1, 2, 4)]
        assert_same_bits(results[0], results[1])
        assert_same_bits(results[0], results[2])


@pytest.mark.parametrize("guard", [False, True])
@pytest.mark.parametrize("first", ["heads", "rows"])
@pytest.mark.parametrize("opset", [11, 12, 13, 18, 21])
def test_kernel_and_function_body_agree(opset: int, first: str, guard: bool):
    x = feeds(rows=5, tokens=9, value_width=6, mask=(2, 1, 5, 9))
    x["mask"][:, :, 1] = -np.inf
    if first == "heads":
        x |= {name: by_head(x[name]) for name in NAMES[:3]}
    shapes = {name: [*x[name].shape] for name in NAMES}
    made = model(shapes, by_head=first == "heads", guard=guard, opset=opset, with_function=True)
    onnx.checker.check_model(made)
    plain = ort.InferenceSession(made.SerializeToString(), providers=["CPUExecutionProvider"])
    kernel = open_model(made).run(None, x)[0]
    assert np.isnan(kernel).any() != guard
    with np.errstate(invalid="ignore"):
        slow = ReferenceEvaluator(made).run(None, x)[0]
    for body in (plain.run(None, x)[0], slow):
        np.testing.assert_allclose(body, kernel, rtol=1e-5, atol=1e-6)


# Shapes


def test_shape_inference_keeps_names_of_dimensions():
    shapes = {"q": ["b", "s", 3, 8], "k": ["b", "t", 3, 8], "v": ["b", "t", 3, 5], "mask": ["b", 1, 1, "t"]}
    assert open_model(model(shapes)).get_outputs()[0].shape == ["b", "s", 3, 5]
    shapes = {"q": [1, "s", 3, 8], "k": ["b", "t", 1, 8], "v": ["b", "t", 1, "w"], "mask": ["s", "t"]}
    assert open_model(model(shapes)).get_outputs()[0].shape == ["b", "s", 3, "w"]
    shapes = {name: [1, "s", 1, 8] for name in ("q", "k", "v")} | {"mask": ["b", 3, 1, "s"]}
    assert open_model(model(shapes)).get_outputs()[0].shape == ["b", "s", 3, 8]
    shapes = {"q": ["b", "s", "h", 8], "k": ["c", "t", 3, 8], "v": ["c", "t", 3, 5], "mask": [1, 1, 1, 1]}
    batch, *rest = open_model(model(shapes)).get_outputs()[0].shape
    assert batch not in ("b", "c")  # each may be 1
    assert rest == ["s", 3, 5]
    shapes = {"q": ["b", 3, "s", 8], "k": ["b", 3, "t", 8], "v": ["b", 3, "t", 5], "mask": ["s", "t"]}
    assert open_model(model(shapes, by_head=True)).get_outputs()[0].shape == ["b", 3, "s", 5]


def test_shape_of_y_downstream_is_right_when_dimensions_have_no_names():
    made = model()
    made.graph.node.append(helper.make_node("Shape", ["y"], ["shape"]))
    made.graph.output.append(packed.value("shape", np.int64, None))
    session = open_model(made)
    for rows in (2, 3):
        x = feeds(rows=rows)
        assert session.run(None, x)[1].tolist() == [2, rows, 3, 8]


# Instruction sets

DIGEST = """
import hashlib, sys
import test_attention
from onnx_bitnet import runtime
session = runtime.session(sys.argv[1], threads=2)
y = session.run(None, test_attention.feeds(3, 50, 4, 70, 20, 40, (3, 1, 50, 70)))[0]
print(hashlib.sha256(y.tobytes()).hexdigest())
"""


def test_every_instruction_set_gives_the_same_bits(tmp_path: Path):
    path = tmp_path / "model.onnx"
    onnx.save(model(), path)
    want = hashlib.sha256(expected(feeds(3, 50, 4, 70, 20, 40, (3, 1, 50, 70))).tobytes()).hexdigest()
    for isa, runs_here in _native.isas():
        if runs_here:
            child = python("-c", DIGEST, str(path), ONNX_BITNET_ISA=isa)
            assert child.stdout.strip() == want, f"{isa}: {child.stderr}"


# Misuse


@pytest.mark.parametrize(
    ("name", "shape", "message"),
    [
        ("q", (2, 7, 24), "input q has rank 3; it must have rank 4"),
        ("v", (2, 7, 3, 8, 1), "input v has rank 5; it must have rank 4"),
        ("mask", (1, 1, 1, 1, 1), "input mask has rank 5; it must have rank up to 4"),
        ("k", (2, 7, 3, 9), "q and k must have the same last dimension"),
        ("k", (2, 6, 3, 8), "k and v must have the same number of tokens"),
        ("k", (3, 7, 3, 8), "the batches and the heads of q, k, v and mask must be the same, or 1"),
        ("v", (2, 7, 2, 8), "the batches and the heads"),
        ("mask", (3, 1, 1, 7), "the batches and the heads"),
        ("mask", (1, 1, 6, 7), "mask must end in the rows of q and the tokens of k, or in 1"),
        ("mask", (8,), "convert with attention = 'keep'"),
    ],
)
def test_inputs_that_do_not_fit_are_refused_at_run(name: str, shape: tuple[int, ...], message: str):
    session = open_model(model(dict.fromkeys(NAMES)))
    with pytest.raises(Exception, match=f"'attention'.*{message}"):
        session.run(None, feeds() | {name: np.ones(shape, np.float32)})
    x = feeds()
    assert_same_bits(session.run(None, x)[0], expected(x))


def double(made: onnx.ModelProto) -> None:
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.elem_type = TensorProto.DOUBLE


CORRUPTIONS: dict[str, tuple[Callable[[onnx.ModelProto], None], str]] = {
    "scale missing": (attribute(scale=None), "attribute scale is missing or no float"),
    "scale an integer": (attribute(scale=1), "attribute scale is missing or no float"),
    "scale NaN": (attribute(scale=float("nan")), "attribute scale is nan; it must be finite"),
    "scale infinite": (attribute(scale=float("inf")), "attribute scale is inf; it must be finite"),
    "nan_to_zero missing": (attribute(nan_to_zero=None), "attribute nan_to_zero is missing or no integer"),
    "nan_to_zero two": (attribute(nan_to_zero=2), "attribute nan_to_zero is 2; it must be 0 or 1"),
    "nan_to_zero negative": (attribute(nan_to_zero=-1), "attribute nan_to_zero is -1; it must be 0 to"),
    "mask nowhere": (node_input(3, "nowhere"), ""),
    "mask empty": (node_input(3, ""), ""),
    "no mask": (node_input(3, None), ""),
    "double": (double, "tensor(double)"),
}


def test_corrupted_model_gives_one_clear_error(tmp_path: Path):
    models = {}
    for name, (change, _) in CORRUPTIONS.items():
        models[name] = model()
        change(models[name])
    for name, error in load(models, tmp_path).items():
        assert error is not None, name
        assert "\n" not in error, name
        assert CORRUPTIONS[name][1] in error, name


def test_unknown_instruction_set_is_an_error_when_the_session_is_made(tmp_path: Path, monkeypatch):
    path = tmp_path / "model.onnx"
    onnx.save(model(), path)
    monkeypatch.setenv("ONNX_BITNET_ISA", "mmx")
    with pytest.raises(Exception, match=r"Attention node 'attention': ONNX_BITNET_ISA"):
        runtime.session(path)
