"""What a reward is, as JSON; apart, since pair sets and evaluations both write it down."""

from __future__ import annotations

import inspect
from typing import Any

from cotgen_pl.interfaces import Reward

RESIDENCE = ("batch_size", "device", "offload")  # where a reward scores, not what


def describe(reward: Reward | None) -> dict[str, Any]:
    """A reward's class, and the arguments of its constructor that it keeps, as JSON values."""
    names = _constructor_arguments(type(reward))
    kept = {name: _as_json(getattr(reward, name)) for name in names if hasattr(reward, name)}
    return {"class_path": f"{type(reward).__module__}.{type(reward).__qualname__}", **kept}


def _constructor_arguments(kind: type) -> list[str]:
    """Names of a class's own arguments and of those it hands on to its bases."""
    constructors = [vars(base)["__init__"] for base in kind.__mro__ if "__init__" in vars(base)]
    names = [name for make in constructors for name in inspect.signature(make).parameters]
    return [name for name in dict.fromkeys(names) if name not in RESIDENCE]


def _as_json(value: Any) -> Any:
    """Plain values, and dicts, lists and rewards of such; of all else the class."""
    if isinstance(value, Reward):
        return describe(value)
    if isinstance(value, dict):
        return {str(name): _as_json(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_as_json(item) for item in value]
    return value if isinstance(value, str | int | float | None) else type(value).__qualname__
