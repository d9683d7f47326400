"""The treated copy of a file of preferences, the strength of each pair, and the page; all of it or nothing."""

import gzip
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lmlab.label_noise.config import LabelNoise
from lmlab.label_noise.page import render_page, summary
from lmlab.label_noise.read import Found
from lmlab.label_noise.scores import Verdict
from lmlab.report.folder import replace_all

STRENGTH, REPORT = "strength.jsonl", "report.html"


def treated(record: dict[str, Any], pair: int, verdict: Verdict, treat: str) -> dict[str, Any] | None:
    """The record as it is written; None: it is left out.

    A flipped one says so ("flipped"), and margin and target, if it has them, turn round with it. Other fields stay.
    """
    target = round(float(verdict.target_N[pair]), 6)
    if treat == "soft":
        return {**record, "target": target}
    if treat == "none" or not verdict.suspects_N[pair]:
        return record
    if treat == "drop":
        return None
    if treat == "weight":
        return {**record, "weight": round(record.get("weight", 1.0) * target, 6)}
    turned = {**record, "chosen": record["rejected"], "rejected": record["chosen"], "flipped": True}
    turned |= {"margin": -record["margin"]} if "margin" in record else {}
    return turned | ({"target": round(1 - record["target"], 6)} if "target" in record else {})


def strength_rows(found: Found, verdict: Verdict) -> Iterator[dict[str, Any]]:
    """What is said of each pair, by file and line."""
    for number, pair in enumerate(found.pairs):
        values = {"strength": verdict.mean_N, "std": verdict.std_N, "vote": verdict.vote_N, "target": verdict.target_N}
        shown = {name: round(float(value_N[number]), 6) for name, value_N in values.items()}
        yield {"where": pair.where, "kind": verdict.kind_of(number), **shown}


def write_all(found: Found, verdict: Verdict, args: LabelNoise, target: Path) -> str:
    """Write the three files. Returns the summary. Raises OSError, and then none of them has changed."""
    kept = (treated(record, number, verdict, args.treat) for number, record in enumerate(found.records))
    lines = [_line(record) for record in kept if record is not None]
    scores = [_line(row) for row in strength_rows(found, verdict)]
    folder = target.parent
    files = {
        target: _packed("".join(lines)) if target.suffix == ".gz" else "".join(lines).encode(),
        folder / STRENGTH: "".join(scores).encode(),
        folder / REPORT: render_page(found, verdict, args, len(lines)).encode(errors="replace"),
    }
    replace_all(files)
    paths = "\n".join(f"{path.name:16s} {path.resolve()}" for path in files)
    return f"{summary(found, verdict, args, len(lines))}\n\n{paths}"


def _line(record: dict[str, Any]) -> str:
    # Halves of surrogate pairs, which JSON can hold and UTF-8 can not, stay escaped.
    try:
        text = json.dumps(record, ensure_ascii=False)
        text.encode()
    except UnicodeEncodeError:
        text = json.dumps(record)
    return f"{text}\n"


def _packed(text: str) -> bytes:
    # Without the time, so that the same input gives the same bytes.
    return gzip.compress(text.encode(), mtime=0)
