"""The records of a file of preferences, kept as they are, with the pairs that are read from them."""

import json
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.data.config import Files
from lmlab.data.files import read_records
from lmlab.data.pair_records import Pair, read_pair
from lmlab.data.progress import say


@dataclass(frozen=True)
class Found:
    """What a file holds; record i is that of pair i."""

    records: list[dict[str, Any]]
    pairs: list[Pair]
    skipped: dict[str, int]
    """Lines that are no pair of two different answers, by reason."""


def read_file(path: Path, invalid: Literal["error", "drop"]) -> Found:
    """All pairs of a file. Pairs of equal answers are left out and counted, and so is with "drop" what is no pair.

    Raises:
        UserError: the file cannot be read or holds no pair; a line that is none, unless it may be left out.
    """
    records, pairs, skipped = [], [], Counter[str]()
    for where, record in read_records(Files(str(path)), [(path.name, path)]):
        try:
            pair = read_pair(record, where)
        except UserError as error:
            if invalid == "error":
                raise UserError("DATA", where, error.expected, "Mend the file, or give --invalid drop.") from error
            skipped["no pair"] += 1
            continue
        if pair.chosen.strip() == pair.rejected.strip():
            skipped["equal answers"] += 1
            continue
        assert isinstance(record, dict)
        records.append(record)
        pairs.append(pair)
    lost = ", ".join(f"{count} of {reason}" for reason, count in skipped.items())
    check(
        bool(pairs), "DATA", str(path), "at least one pair of different answers", f"Left out: {lost}." if lost else ""
    )
    if lost:
        say(f"left out: {lost}")
    return Found(records, pairs, dict(skipped))


def group_pairs(pairs: list[Pair]) -> np.ndarray:
    """The group of each pair, int [N] from 0 without gaps: pairs of one prompt, which share answers and words.

    Where the prompt is empty, or one for all pairs, it tells nothing: then a group is of one prompt and two answers.
    """
    same = len({json.dumps(pair.prompt) for pair in pairs}) == 1
    keys = []
    for pair in pairs:
        texts = [pair.prompt] if isinstance(pair.prompt, str) else [message["content"] for message in pair.prompt]
        alike = same or not any(text.strip() for text in texts)
        # In either order: a copy may have been turned round.
        keys.append(json.dumps([pair.prompt, *sorted((pair.chosen, pair.rejected))] if alike else pair.prompt))
    places: dict[str, int] = {}
    return np.asarray([places.setdefault(key, len(places)) for key in keys])


def answers_of(pairs: list[Pair]) -> Iterator[str]:
    """Both answers of each pair, one after the other."""
    for pair in pairs:
        yield pair.chosen
        yield pair.rejected
