"""The log of a run keeps every digit, and a resumed run writes what an unbroken one would have."""

import json
import math

import pytest

from lmlab.core.errors import UserError
from lmlab.report.metrics import METRICS, MetricsLog, read_metrics

AWKWARD = [0.1 + 0.2, 1 / 3, 5e-324, 1.7976931348623157e308, -0.0, 1e16 + 2, 123456789.123456789]


def write(folder, steps, resume=0):
    with MetricsLog(folder, resume) as log:
        for step in steps:
            log.write(step, "train", {"loss": 1 / step})
            if step % 2 == 0:
                log.write(step, "eval", {"loss": 2 / step})


def test_floats_come_back_to_the_last_bit(tmp_path):
    with MetricsLog(tmp_path, 0) as log:
        for step, value in enumerate(AWKWARD):
            log.write(step, "train", {"value": value})
    back = [row["value"] for row in read_metrics(tmp_path)]
    assert [value.hex() for value in back] == [value.hex() for value in AWKWARD]


@pytest.mark.parametrize(("value", "text"), [(math.nan, "nan"), (math.inf, "inf"), (-math.inf, "-inf")])
def test_what_is_not_finite_is_text_and_the_line_is_strict_json(tmp_path, value, text):
    def refuse(constant):
        raise AssertionError(constant)

    with MetricsLog(tmp_path, 0) as log:
        log.write(1, "train", {"loss": value})
    (line,) = (tmp_path / METRICS).read_text().splitlines()
    assert json.loads(line, parse_constant=refuse) == {"step": 1, "kind": "train", "loss": text}
    assert float(read_metrics(tmp_path)[0]["loss"]) == pytest.approx(value, nan_ok=True)


@pytest.mark.parametrize("resume", [0, 2, 3, 5])
def test_resuming_writes_what_an_unbroken_run_would_have(tmp_path, resume):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir()
    broken.mkdir()
    write(whole, range(1, 8))
    write(broken, range(1, 6))
    write(broken, range(resume + 1, 8), resume)
    assert (broken / METRICS).read_bytes() == (whole / METRICS).read_bytes()


@pytest.mark.parametrize("cut", [1, 2, 20])
def test_a_half_written_last_line_is_dropped_and_written_again(tmp_path, cut):
    write(tmp_path, range(1, 6))
    path = tmp_path / METRICS
    whole = path.read_bytes()
    path.write_bytes(whole[:-cut])
    # Without its line end alone the row is whole.
    assert len(read_metrics(tmp_path)) == len(whole.splitlines()) - (cut > 1)
    write(tmp_path, range(5, 6), resume=4)
    assert path.read_bytes() == whole


def test_rows_are_on_disk_before_the_log_is_closed(tmp_path):
    log = MetricsLog(tmp_path, 0)
    log.write(1, "train", {"loss": 1.0})
    assert read_metrics(tmp_path) == [{"step": 1, "kind": "train", "loss": 1.0}]
    log.__exit__(None, None, None)


def test_tensorboard_has_the_same_scalars(tmp_path):
    write(tmp_path, [1, 2])
    (events,) = (tmp_path / "tensorboard").iterdir()
    content = events.read_bytes()
    assert b"train/loss" in content
    assert b"eval/loss" in content


def test_a_folder_without_a_log_is_refused(tmp_path):
    with pytest.raises(UserError, match="run folder"):
        read_metrics(tmp_path)
    with pytest.raises(UserError, match="run folder"):
        MetricsLog(tmp_path / "absent", 0)
