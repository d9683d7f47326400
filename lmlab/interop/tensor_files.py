"""Safetensors files: whole folders of them read in parts, and written tensor by tensor.

The format is a length, a JSON header and the bytes (huggingface/safetensors, README).
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
from safetensors import SafetensorError, safe_open

from lmlab.core.errors import UserError, check

WHOLE, INDEX = "model.safetensors", "model.safetensors.index.json"
DTYPES: Mapping[str, tuple[str, np.dtype]] = {
    "float32": ("F32", np.dtype(np.float32)),
    "bfloat16": ("BF16", np.dtype(ml_dtypes.bfloat16)),
    "float16": ("F16", np.dtype(np.float16)),
}
"""By the names of config.json: what safetensors and numpy call the types that weights may have."""


@dataclass(frozen=True)
class TensorFiles:
    """The tensors of a folder."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    """As safetensors names them: F32, BF16, I8, ..."""
    read: Callable[[str, tuple[slice, ...]], np.ndarray]
    """As in `Source`, for tensors that pass `check_stored`."""


def open_tensor_files(folder: Path) -> TensorFiles:
    """`model.safetensors`, or all files that its index names. Nothing but headers is read.

    Raises:
        UserError: there are none, one is missing or damaged, or they are not what the index says.
    """
    where = _read_index(folder)
    names = sorted(set(where.values())) if where else [WHOLE]
    handles = {name: _open(folder / name) for name in names}
    holders = {tensor: name for name, handle in handles.items() for tensor in handle.keys()}  # noqa: SIM118
    for tensor, name in where.items():
        check(holders.get(tensor) == name, f"{folder / INDEX}: {tensor}", name, "a file that holds this tensor")
    slices = {tensor: handles[name].get_slice(tensor) for tensor, name in holders.items()}
    dtypes = {tensor: part.get_dtype() for tensor, part in slices.items()}

    def read(tensor: str, ranges: tuple[slice, ...]) -> np.ndarray:
        file = folder / holders[tensor]
        try:
            return slices[tensor][ranges] if ranges else handles[holders[tensor]].get_tensor(tensor)
        except (SafetensorError, OSError) as error:
            raise UserError("file", str(file), f"{tensor} whole ({error})") from error

    return TensorFiles({tensor: tuple(part.get_shape()) for tensor, part in slices.items()}, dtypes, read)


def check_stored(folder: Path, tensor: str, dtype: str) -> None:
    """Raise `UserError` unless a tensor is stored as floating-point numbers of 16 or 32 bits."""
    stored = sorted(name for name, _ in DTYPES.values())
    check(dtype in stored, f"{folder}: {tensor}", dtype, f"one of {', '.join(stored)}",
          "Quantised weights are not supported: take the original ones.")  # fmt: skip


def _read_index(folder: Path) -> dict[str, str]:
    """File by tensor; empty if the folder holds one file and no index."""
    if (folder / WHOLE).is_file():
        return {}
    if not (folder / INDEX).is_file():
        pickled = sorted(path.name for path in folder.glob("*.bin")) + sorted(
            path.name for path in folder.glob("*.pt*")
        )
        remedy = f"It has {pickled[0]}, which can run code when read: let transformers' save_pretrained write "\
                 "safetensors from it." if pickled else ""  # fmt: skip
        raise UserError("folder", str(folder), f"a folder with {WHOLE} or {INDEX}", remedy)
    index = read_json(folder / INDEX)
    where = index.get("weight_map") if isinstance(index, dict) else None
    fine = isinstance(where, dict) and where and all(isinstance(name, str) for name in where.values())
    check(bool(fine), "file", str(folder / INDEX), "a JSON object with the weight_map of safetensors")
    assert isinstance(where, dict)
    for name in set(where.values()):
        check(Path(name).name == name, str(folder / INDEX), name, "the name of a file in the folder")
        check((folder / name).is_file(), "file", str(folder / name), f"an existing file, since {INDEX} names it",
              "The download may be incomplete.")  # fmt: skip
    return where


def _open(path: Path) -> Any:
    try:
        # Lazily mapped; the handle lives as long as whoever reads from it.
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise UserError("file", str(path), f"a whole safetensors file ({error})",
                        "The download may be incomplete.") from error  # fmt: skip


def read_json(path: Path) -> Any:
    """Parsed JSON. Raises `UserError` if it is none."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise UserError("file", str(path), f"readable JSON ({error})") from error


def write_tensor_files(
    folder: Path, shapes: Mapping[str, Sequence[int]], make: Callable[[str], np.ndarray], dtype: str, shard_bytes: int
) -> None:  # fmt: skip
    """Safetensors in the order given, in files of at most `shard_bytes` (or one tensor); an index if there are more.

    make: a tensor by its name, called once for each, when it is written.

    Raises:
        UserError: a value does not fit the type.
    """
    size = {name: math.prod(shape) * DTYPES[dtype][1].itemsize for name, shape in shapes.items()}
    shards: list[list[str]] = [[]]
    for name in shapes:
        if shards[-1] and sum(size[each] for each in shards[-1]) + size[name] > shard_bytes:
            shards.append([])
        shards[-1].append(name)
    count = len(shards)
    files = [WHOLE] if count == 1 else [f"model-{i:05}-of-{count:05}.safetensors" for i in range(1, count + 1)]
    for file, names in zip(files, shards, strict=True):
        _write_file(folder / file, {name: shapes[name] for name in names}, make, dtype)
    if count > 1:
        where = {name: file for file, names in zip(files, shards, strict=True) for name in names}
        index = {"metadata": {"total_size": sum(size.values())}, "weight_map": where}
        (folder / INDEX).write_text(json.dumps(index, indent=2), encoding="utf-8")


def _write_file(
    path: Path, shapes: Mapping[str, Sequence[int]], make: Callable[[str], np.ndarray], dtype: str
) -> None:  # fmt: skip
    code, numpy_dtype = DTYPES[dtype]
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        start, end = end, end + math.prod(shape) * numpy_dtype.itemsize
        header[name] = {"dtype": code, "shape": list(shape), "data_offsets": [start, end]}
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in shapes:
            file.write(_cast(name, make(name), numpy_dtype).data)


def _cast(name: str, tensor: np.ndarray, dtype: np.dtype) -> np.ndarray:
    """Contiguous bytes of the tensor in another type."""
    with np.errstate(over="ignore"):
        cast = np.ascontiguousarray(tensor, dtype)
    if dtype == np.float16 and tensor.dtype != dtype:
        check(bool(np.isfinite(cast).all()), name, float(np.abs(tensor).max()), "finite values up to 65504 for float16",
              "Export as bfloat16 or float32.")  # fmt: skip
    return cast.reshape(-1).view(np.uint8)
