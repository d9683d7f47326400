"""One page a run: report.html, which opens from disk without a network."""

import json
from collections.abc import Mapping, Sequence
from itertools import groupby
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, Template
from markupsafe import Markup

from lmlab.core.errors import UserError
from lmlab.report.metrics import read_metrics, read_rows
from lmlab.report.plots import HELD_OUT, INK, PLOTS, TRAIN, Rows, write_plots

REPORT = "report.html"


def write_report(folder: Path) -> Path:
    """Draw the plots and write the page from what the run folder holds. Raises `UserError` if it holds no log."""
    rows = read_metrics(folder)
    plots = write_plots(folder, rows)
    config, scores = _optional(folder / "config.json"), _optional(folder / "baselines.json")
    steps = (config.get("train") or {}).get("steps")
    page = page_template("page.html.jinja").render(
        name=folder.resolve().name,
        status=_status(rows, steps),
        tiles=_tiles(rows, scores),
        bars=_bars(scores),
        plots=[(plot.title, Markup(inline_svg(plots[plot.name], plot.name))) for plot in PLOTS if plot.name in plots],
        samples=_samples(folder),
        operations=_operations(folder),
        config=_flatten(config),
        environment=_optional(folder / "environment.json"),
    )
    target, partial = folder / REPORT, folder / f"{REPORT}.partial"
    try:
        partial.write_text(page, encoding="utf-8")
        partial.replace(target)
    except OSError as error:
        raise UserError("run folder", str(folder), f"room to write {REPORT} ({error.strerror})") from error
    return target


def page_template(name: str) -> Template:
    """A template of this folder. What is put in is escaped, and what is not put in is an error."""
    loader = PackageLoader("lmlab.report", ".")
    return Environment(loader=loader, autoescape=True, undefined=StrictUndefined, trim_blocks=True).get_template(name)


def _optional(path: Path) -> dict[str, Any]:
    """A JSON file's content, or nothing where the file is absent or cut off: the page shows what there is."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def _status(rows: Rows, steps: int | None) -> str:
    reached = max((row["step"] for row in rows), default=0)
    if steps is None:
        return f"step {reached}"
    return f"finished, {steps} steps" if reached >= steps else f"at step {reached} of {steps}"


def _last(rows: Rows, kind: str, key: str) -> float | None:
    found = [row[key] for row in rows if row["kind"] == kind and isinstance(row.get(key), int | float)]
    return found[-1] if found else None


def _tiles(rows: Rows, scores: Mapping[str, float]) -> list[tuple[str, str]]:
    """Key figures as (label, text)."""
    held_out = scores.get("model", _last(rows, "eval", "bits_per_byte"))
    speeds = sorted(row["tokens_per_second"] for row in rows if row["kind"] == "speed")
    elapsed = _last(rows, "speed", "elapsed_seconds")
    figures: list[tuple[str, float | None, str]] = [
        ("held-out bits per byte", held_out, "{:.3f}"),
        ("held-out loss", _last(rows, "eval", "loss"), "{:.3f}"),
        ("training loss", _last(rows, "train", "loss"), "{:.3f}"),
        ("tokens per second (median)", speeds[len(speeds) // 2] if speeds else None, "{:,.0f}"),
        ("seconds in this session", elapsed, "{:,.0f}"),
        ("MFU", _last(rows, "speed", "mfu"), "{:.1%}"),
    ]
    return [(label, form.format(value)) for label, value, form in figures if value is not None]


def _bars(scores: Mapping[str, float]) -> list[tuple[str, str, float]]:
    """Name, value and length in percent of each bar, longest (worst) first."""
    longest = max(scores.values(), default=1.0)
    ordered = sorted(scores.items(), key=lambda item: -item[1])
    return [(name, f"{value:.3f}", 100 * value / longest) for name, value in ordered]


def inline_svg(svg: str, name: str) -> str:
    """The <svg> element alone, with ids of its own (several figures share the page) and the colours of the page."""
    body = svg[svg.index("<svg") :]
    start, end = body.find("<metadata"), body.find("</metadata>")
    if start >= 0:
        body = body[:start] + body[end + len("</metadata>") :]
    for mark in ('id="', 'href="#', "url(#"):
        body = body.replace(mark, f"{mark}{name}-")
    for colour, variable in ((TRAIN, "blue"), (HELD_OUT, "warm"), (INK, "soft")):
        body = body.replace(colour.lower(), f"var(--{variable})")
    return body


def _samples(folder: Path) -> list[tuple[int, Sequence[Mapping[str, Any]]]]:
    """Samples by step, newest first."""
    path = folder / "samples.jsonl"
    if not path.is_file():
        return []
    rows = read_rows(path)
    rows.sort(key=lambda row: -row["step"])
    return [(step, list(group)) for step, group in groupby(rows, key=lambda row: row["step"])]


def _operations(folder: Path) -> str:
    """The table of a profiled run."""
    path = folder / "profile" / "operations.txt"
    return path.read_text(encoding="utf-8") if path.is_file() else ""


def _flatten(data: Any, name: str = "") -> list[tuple[str, str]]:
    """Dotted names and values of a nested dict."""
    if isinstance(data, dict) and data:
        pairs = [_flatten(value, f"{name}.{key}".lstrip(".")) for key, value in data.items() if key != "class"]
        return [pair for part in pairs for pair in part]
    return [(name, json.dumps(data))] if name else []
