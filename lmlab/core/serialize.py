"""Frozen config dataclasses to JSON and back; a nested config says its class, so unions survive."""

import dataclasses
import importlib
from typing import Any

from lmlab.core.errors import UserError, check

CLASS = "class"


def to_json(config: Any) -> Any:
    """Plain dicts, lists and scalars; each dataclass becomes a dict with its class under `class`."""
    if dataclasses.is_dataclass(config) and not isinstance(config, type):
        name = f"{type(config).__module__}:{type(config).__name__}"
        return {CLASS: name} | {f.name: to_json(getattr(config, f.name)) for f in dataclasses.fields(config)}
    if isinstance(config, dict):
        check(CLASS not in config, "name", CLASS, "any other: it marks the classes of a config in JSON")
        return {key: to_json(value) for key, value in config.items()}
    if isinstance(config, tuple | list):
        return [to_json(value) for value in config]
    return config


def from_json(data: Any) -> Any:
    """The inverse of `to_json`, for classes of lmlab. Raises `UserError` on a class or field unknown here."""
    if isinstance(data, list):
        return tuple(from_json(value) for value in data)
    if not isinstance(data, dict):
        return data
    fields = {key: from_json(value) for key, value in data.items() if key != CLASS}
    if CLASS not in data:
        return fields
    cls = _find_class(data[CLASS])
    known = {field.name for field in dataclasses.fields(cls)}
    if unknown := set(fields) - known:
        raise UserError(data[CLASS], sorted(unknown), f"fields among {sorted(known)}",
                        "The config was written by another version of lmlab.")  # fmt: skip
    return cls(**fields)


def _find_class(name: str) -> type[Any]:
    module, _, cls = name.partition(":") if isinstance(name, str) else ("", "", "")
    if not module.startswith("lmlab."):
        raise UserError(CLASS, name, "a config class of lmlab")
    try:
        found = getattr(importlib.import_module(module), cls)
    except (ImportError, AttributeError):
        found = None
    if not (isinstance(found, type) and dataclasses.is_dataclass(found)):
        raise UserError(CLASS, name, "a config class that this version of lmlab has")
    return found
