"""Log-probabilities of all pairs under the reference, computed once before training."""

import zipfile
from dataclasses import replace
from functools import partial
from pathlib import Path

import jax
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import AnswerBatch, Array, Params
from lmlab.data.answers import PairRows, preferences_of
from lmlab.data.folders import write_arrays
from lmlab.data.open_pairs import PairData
from lmlab.data.progress import counting
from lmlab.models.lm import LM
from lmlab.objectives.dpo import answer_sums
from lmlab.objectives.logprobs import answer_logprobs

STORED = "reference.npz"
"""Name of the file in a run folder."""


def with_reference(
    rows: PairRows, lm: LM, params: Params, *, batch_size: int = 8, tail: float = 1.0, chunk: int = 64
) -> PairRows:  # fmt: skip
    """The rows with the log-probabilities of their answers under a model. tail: see `answer_sums`."""
    found_N2 = np.zeros((len(rows.pairs), 2), np.float32)
    with counting("scoring pairs under the reference") as tell:
        for start in range(0, rows.rows, batch_size):
            numbers = range(start, min(start + batch_size, rows.rows))
            batch = preferences_of(rows, numbers, batch_size)
            sums_BS = np.asarray(score_answers(lm, tail, chunk, params, batch.answers))
            for b, number in enumerate(numbers):
                held = rows.pairs_of(number)
                found_N2[held] = sums_BS[b].reshape(-1, 2)[: len(held)]
            tell(int(rows.row_starts[numbers[-1] + 1]), int(rows.row_starts[numbers[-1] + 1]))
    return replace(rows, reference_N2=found_N2)


@partial(jax.jit, static_argnums=(0, 1, 2))
def score_answers(lm: LM, tail: float, chunk: int, params: Params, answers: AnswerBatch) -> Array:
    """Log-probabilities [B, S] of answers."""
    return answer_sums(answer_logprobs(lm, params, answers, chunk), answers, tail)


def store(folder: Path, data: PairData) -> PairData:
    """Data whose rows are scored; what was found is kept in a run folder for when the run goes on."""
    arrays = {"train": data.train.reference_N2, "heldout": data.heldout.reference_N2, "key": np.asarray(_key(data))}
    try:
        write_arrays(folder / STORED, arrays)
    except OSError as error:
        raise UserError("run folder", str(folder), f"room to write {STORED} ({error.strerror})") from error
    return data


def read_stored(folder: Path, data: PairData) -> PairData:
    """The same from the run folder. Raises `UserError` where it holds none, or that of other pairs or tokens."""
    try:
        # A file that is torn is closed too.
        with (folder / STORED).open("rb") as file, np.load(file) as found:
            arrays = {name: found[name] for name in ("train", "heldout", "key")}
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError("run folder", str(folder / STORED), f"the log-probabilities of the reference ({error})",
                        "Begin again in another folder.") from error  # fmt: skip
    check(str(arrays["key"]) == _key(data), "data.train", str(folder / STORED),
          "the pairs and the tokenizer that the run was begun with", "Begin again in another folder.")  # fmt: skip
    held = {name: replace(getattr(data, name), reference_N2=arrays[name]) for name in ("train", "heldout")}
    return replace(data, **held)


def _key(data: PairData) -> str:
    return " ".join(str(data.summary[name]) for name in sorted(data.summary) if name.endswith(("fingerprint", "izer")))
