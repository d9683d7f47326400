"""Predictions of a teacher on disk: of every label the k most probable tokens, and the probability of all others."""

import zipfile
from dataclasses import dataclass
from pathlib import Path

import ml_dtypes
import numpy as np

from lmlab.core.errors import UserError, check
from lmlab.core.types import TopK
from lmlab.data.folders import write_arrays


@dataclass(frozen=True)
class StoredTeacher:
    """What a teacher said of the labels of N examples, one after the other: 6 k + 2 bytes a label."""

    offsets_N: np.ndarray
    """[N + 1] where the labels of each example begin."""
    logprobs_nK: np.ndarray
    """bfloat16 [n, k + 1], best first; the last is all other tokens, which 1 - sum would drown in rounding."""
    ids_nK: np.ndarray
    """int32 [n, k]."""
    temperature: float
    """That the teacher's logits were divided by."""
    fingerprint: str
    """Of the teacher and of what it read."""

    def of(self, example: int) -> tuple[np.ndarray, np.ndarray]:
        """Log-probabilities and ids for the labels of one example."""
        held = slice(self.offsets_N[example], self.offsets_N[example + 1])
        return self.logprobs_nK[held], self.ids_nK[held]

    def empty(self, rows: int, labels: int) -> TopK:
        """Room for the labels of a batch. Every token of padding is another one, as those of labels are."""
        k = self.ids_nK.shape[1]
        ids = np.broadcast_to(np.arange(k, dtype=np.int32), (rows, labels, k)).copy()
        return TopK(np.zeros((rows, labels, k + 1), ml_dtypes.bfloat16), ids)  # type: ignore[arg-type]

    def save(self, path: Path) -> None:
        """Write an .npz; nothing is left half-written. Raises `UserError` where there is no room."""
        # NumPy's files know no bfloat16.
        arrays = {"offsets": self.offsets_N, "logprobs": self.logprobs_nK.view(np.uint16), "ids": self.ids_nK,
                  "temperature": self.temperature, "fingerprint": self.fingerprint}  # fmt: skip
        try:
            write_arrays(path, arrays)
        except OSError as error:
            raise UserError("stored", str(path), f"room to write it ({error.strerror})") from error


def load_stored(path: Path, fingerprint: str) -> StoredTeacher:
    """Stored predictions of the teacher and examples with this fingerprint. Raises `UserError` for any others."""
    try:
        # A file that is torn is closed too.
        with path.open("rb") as file, np.load(file) as found:
            stored = StoredTeacher(
                found["offsets"], found["logprobs"].view(ml_dtypes.bfloat16), found["ids"],
                float(found["temperature"]), str(found["fingerprint"]),
            )  # fmt: skip
    except (OSError, ValueError, KeyError, zipfile.BadZipFile) as error:
        raise UserError("stored", str(path), f"predictions of a teacher ({error})", "Store them anew.") from error
    check(stored.fingerprint == fingerprint, "stored", str(path), "predictions of this teacher for these examples",
          "Store them anew, or in another file.")  # fmt: skip
    return stored
