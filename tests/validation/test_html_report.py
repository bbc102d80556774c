"""The page and the table that a validation writes."""

from __future__ import annotations

import csv
import dataclasses
import json
import re
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from chains import K, chain, ordinary, ternary

import onnx_bitnet as bn
from onnx_bitnet.errors import DataError, OutputError
from onnx_bitnet.report import FrontierPoint, read_frontier

VOID = {"meta", "br", "use", "path"}


class Page(HTMLParser):
    """Collects the text, and every address that the page refers to; tags must be closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text, self.addresses = "", []
        self.feed(text)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.addresses += [value for name, value in attrs if name.endswith(("href", "src"))]
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_startendtag(self, _tag, attrs):
        self.addresses += [value for name, value in attrs if name.endswith(("href", "src"))]

    def handle_data(self, data):
        self.text += data


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    weights = {"a": ternary(K), "<b> & co": ordinary(K, seed=1), "c": ordinary(8, seed=2)}
    model = chain(folder / "model.onnx", weights)
    recipe = bn.Recipe(mode="ternary", rules=[("*c", "keep")])
    bn.convert(model, folder / "packed.onnx", recipe)
    rng = np.random.default_rng(0)
    feeds = [{"x": rng.standard_normal((4, K)).astype(np.float32)} for _ in range(2)]
    return bn.validate(model, folder / "packed.onnx", feeds, metric=lambda _, outputs: len(outputs))


def test_the_page_needs_nothing_but_itself(result, tmp_path):
    result.to_html(tmp_path / "report.html")
    page = Page((tmp_path / "report.html").read_text(encoding="utf-8"))
    assert all(address.startswith("#") for address in page.addresses)
    for text in ("2 of 3 linear layers packed", "<b> & co", "left float: kept-by-rule", "<lambda>: 2 → 2"):
        assert text in page.text
    for title in ("Error by depth", "Layers to blame", "Size", "Codes"):
        assert title in page.text
    assert "Gate" not in page.text
    assert [path.name for path in tmp_path.iterdir()] == ["report.html"]


FRONTIER = (
    FrontierPoint(1_000_000, 0.2, 0.21),
    FrontierPoint(1_500_000, 0.03, 0.02, chosen=True),
    FrontierPoint(4_000_000, 0.0),
)


def test_the_page_draws_what_a_conversion_was_chosen_from(result, tmp_path):
    path = tmp_path / "report.html"
    result.to_html(path)
    assert "Size against error" not in Page(path.read_text("utf-8")).text
    result.to_html(path, frontier=FRONTIER)
    page = Page(path.read_text("utf-8"))
    assert all(address.startswith("#") for address in page.addresses)
    for text in ("Size against error", "size of the files, MB", "predicted", "measured", "chosen"):
        assert text in page.text


def test_a_frontier_is_read_from_what_a_conversion_printed(tmp_path):
    path = tmp_path / "report.json"
    path.write_text(json.dumps({"frontier": [dataclasses.asdict(point) for point in FRONTIER]}))
    assert read_frontier(path) == FRONTIER
    for text in ("{", "[]", "{}", '{"frontier": [{"size": 1}]}', '{"frontier": 3}'):
        path.write_text(text)
        with pytest.raises(DataError, match=r"report.json: cannot be read as a report: .*; write it with"):
            read_frontier(path)
    with pytest.raises(DataError, match=r"no.json: cannot be read as a report"):
        read_frontier(tmp_path / "no.json")


def test_the_page_is_the_same_every_time_and_replaces_itself(result, tmp_path):
    path = tmp_path / "report.html"
    result.to_html(path)
    first = path.read_bytes()
    result.to_html(path)
    assert path.read_bytes() == first


def test_the_page_says_which_gates_failed(result, tmp_path):
    path = tmp_path / "report.html"
    result.to_html(path, min_cosine=0.5)
    assert "All gates passed: min_cosine 0.5" in re.sub(r"\s+", " ", Page(path.read_text("utf-8")).text)
    result.to_html(path, min_cosine=0.999999, min_metric=3)
    text = Page(path.read_text("utf-8")).text
    assert text.count("Gate failed:") == 2
    assert "is 2, below 3 (reference 2)" in text


def test_a_model_with_nothing_to_show_has_a_page_without_plots(tmp_path):
    model = chain(tmp_path / "model.onnx", {"a": ordinary(8)})
    bn.validate(model, model).to_html(tmp_path / "report.html")
    text = (tmp_path / "report.html").read_text("utf-8")
    assert "<svg" not in text
    assert "random" in Page(text).text


def test_the_table_has_a_line_for_each_layer(result, tmp_path):
    result.to_csv(tmp_path / "layers.csv")
    with (tmp_path / "layers.csv").open(newline="", encoding="utf-8") as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert list(rows) == ["layer.a", "layer.<b> & co", "layer.c"]
    layers = {layer.name: layer for layer in result.layers}
    assert float(rows["layer.a"]["local_cosine"]) == layers["layer.a"].local.cosine
    assert (rows["layer.a"]["format"], rows["layer.a"]["n"], rows["layer.a"]["k"]) == ("i2s", str(K), str(K))
    assert (rows["layer.c"]["format"], rows["layer.c"]["note"], rows["layer.c"]["local_cosine"]) == (
        "",
        "kept-by-rule",
        "",
    )


def test_a_model_is_not_replaced_by_its_report(result):
    for path in map(Path, (result.reference, result.got)):
        before = path.read_bytes()
        for write in (result.to_html, result.to_csv):
            with pytest.raises(OutputError, match="is part of the input model"):
                write(path)
        assert path.read_bytes() == before


def test_a_folder_that_is_not_there(result, tmp_path):
    for write in (result.to_html, result.to_csv):
        with pytest.raises(OutputError, match="cannot write: No such file or directory"):
            write(tmp_path / "none" / "report")
