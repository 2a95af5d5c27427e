"""Renaming a checkpoint's weights, with every name accounted for.

Shared by the converters beside this file, one per format; each has a function
`convert(source, target) -> Conversion`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

from torch import Tensor, nn

from cotgen_pl.weights import describe_misfits

Value = TypeVar("Value")

# What the placeholders of a table of names stand for.
PLACEHOLDERS = {
    "i": r"\d+",
    "j": r"\d+",
    "p": "weight|bias",
    "side": "encoder|decoder",
    "rest": ".+",
}
# The prefixes of two formats, and pairs of what follows them.
NameTable = Mapping[tuple[str, str], Sequence[tuple[str, str]]]


@dataclass(frozen=True)
class KeyMap:
    """How the names of one format become those of another."""

    renames: Sequence[tuple[str, str]]
    """Regular expression for a whole name, and what replaces it; the first that matches counts."""
    dropped: Sequence[str] = ()
    """Regular expressions for whole names that are left out on purpose."""

    def target(self, name: str) -> str | None:
        """The new name, or None for one that is left out; a KeyError for one that is unknown."""
        if any(re.fullmatch(pattern, name) for pattern in self.dropped):
            return None
        for pattern, replacement in self.renames:
            match = re.fullmatch(pattern, name)
            if match:
                return match.expand(replacement)
        raise KeyError(name)


def renames_of(table: NameTable, back: bool = False) -> list[tuple[str, str]]:
    """The renames of a table of names with placeholders, or those back.

    >>> table = {("backbone", "encoder"): (("norm{i}.{p}", "layernorm.{i}.{p}"),)}
    >>> KeyMap(renames_of(table)).target("backbone.norm3.bias")
    'encoder.layernorm.3.bias'
    >>> KeyMap(renames_of(table, back=True)).target("encoder.layernorm.3.bias")
    'backbone.norm3.bias'
    """
    rows = [
        (f"{old}.{old_end}", f"{new}.{new_end}")
        for (old, new), ends in table.items()
        for old_end, new_end in ends
    ]
    groups = {name: f"(?P<{name}>{what})" for name, what in PLACEHOLDERS.items()}
    references = {name: rf"\g<{name}>" for name in PLACEHOLDERS}
    return [
        (start.replace(".", r"\.").format(**groups), end.format(**references))
        for start, end in ([(new, old) for old, new in rows] if back else rows)
    ]


@dataclass
class Conversion:
    """What a converter did, for its printed summary."""

    source: Path
    target: Path
    num_read: int
    """Tensors in the original."""
    num_written: int
    """Tensors in the result."""
    dropped: list[str] = field(default_factory=list)
    """Names left out on purpose."""

    def __str__(self) -> str:
        left_out = f"left out on purpose: {', '.join(self.dropped)}" if self.dropped else ""
        return (
            f"{self.source} -> {self.target}\n"
            f"{self.num_read} tensors read, {self.num_written} written, {len(self.dropped)} left "
            f"out\n{left_out}"
        ).strip()


def rename_weights(
    weights: Mapping[str, Value], key_map: KeyMap, source: Path, kind: str
) -> tuple[dict[str, Value], list[str]]:
    """The weights under their new names, and the names that were left out on purpose.

    Args:
        weights: The original's, or what stands for them.
        key_map: Old names to new ones.
        source: Where they come from, for messages.
        kind: What the checkpoint must be, for messages.

    Raises:
        ValueError: A name that the map does not know: the checkpoint is of another model.
    """
    renamed: dict[str, Value] = {}
    dropped, unknown = [], []
    for name, values in weights.items():
        try:
            target = key_map.target(name)
        except KeyError:
            unknown.append(name)
            continue
        if target is None:
            dropped.append(name)
        elif target in renamed:
            raise ValueError(
                f"{source}: expected one weight for {target}, got two, {name} among them; name a "
                f"checkpoint of {kind} alone"
            )
        else:
            renamed[target] = values
    if unknown:
        raise ValueError(
            f"{source}: expected the weights of {kind}, got {len(unknown)} unexpected names "
            f"(first: {', '.join(unknown[:3])}); name a checkpoint of {kind}"
        )
    return renamed, dropped


def check_coverage(model: nn.Module, weights: Mapping[str, Tensor], source: Path) -> None:
    """Raise a ValueError unless the renamed weights are exactly those of the model."""
    misfits = describe_misfits(model.state_dict(), weights)
    if misfits:
        raise ValueError(
            f"{source}: expected every weight of {type(model).__name__} and no other, got "
            f"{misfits}; the file is incomplete or its architecture is another one"
        )
