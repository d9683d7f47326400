"""Figures of no, one or many rows; files that are what their names say."""

import math
import xml.etree.ElementTree as ElementTree

import pytest

from lmlab.report.plots import PLOTS, series, smooth, write_plots


def rows(count):
    made = []
    for step in range(1, count + 1):
        made.append({"step": step, "kind": "train", "loss": 5 / step, "bits_per_byte": 3 / step, "grad_norm": 1.0})
        made.append({"step": step, "kind": "eval", "loss": 6 / step})
        made.append({"step": step, "kind": "speed", "tokens_per_second": 1e5})
    return made


@pytest.mark.parametrize("count", [1, 40])
def test_every_figure_is_a_png_and_well_formed_svg(tmp_path, count):
    drawn = write_plots(tmp_path, rows(count))
    assert set(drawn) == {plot.name for plot in PLOTS}
    for name, text in drawn.items():
        assert (tmp_path / "plots" / f"{name}.svg").read_text() == text
        assert ElementTree.fromstring(text).tag == "{http://www.w3.org/2000/svg}svg"
        assert (tmp_path / "plots" / f"{name}.png").read_bytes().startswith(b"\x89PNG\r\n\x1a\n")


@pytest.mark.parametrize(
    "nothing",
    [[], [{"step": 1, "kind": "train", "other": 1.0}], [{"step": 1, "kind": "train", "loss": "nan"}]],
)
def test_where_there_is_nothing_to_draw_there_is_no_figure(tmp_path, nothing):
    assert write_plots(tmp_path, nothing) == {}
    assert list((tmp_path / "plots").iterdir()) == []


def test_the_same_rows_give_the_same_svg(tmp_path):
    log = [row for row in rows(3) if row["kind"] == "speed"]
    assert write_plots(tmp_path, log) == write_plots(tmp_path, log)


def test_values_that_are_not_finite_are_left_out():
    log = [{"step": 1, "kind": "train", "loss": 2}, {"step": 2, "kind": "train", "loss": "nan"},
           {"step": 3, "kind": "eval", "loss": 1.0}, {"step": 4, "kind": "train"},
           {"step": 5, "kind": "train", "loss": 0.5}]  # fmt: skip
    assert series(log, "train", "loss") == ([1, 5], [2.0, 0.5])


def test_smoothing_is_the_weighted_mean_of_the_past():
    values, memory = [3.0, -1.0, 4.0, 1.0], 0.7
    expected = []
    for n in range(1, 5):
        weights = [memory ** (n - 1 - i) for i in range(n)]
        expected.append(math.fsum(w * v for w, v in zip(weights, values, strict=False)) / sum(weights))
    assert smooth(values, memory) == pytest.approx(expected)
    assert smooth(values, 0.0) == values
    assert smooth([2.0] * 9, 0.95) == pytest.approx([2.0] * 9)
