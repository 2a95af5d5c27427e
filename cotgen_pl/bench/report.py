"""What the bench found, as a table for people and as JSON for programs."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

import torch

from cotgen_pl.bench.measuring import Timing
from cotgen_pl.bench.roofline import Machine
from cotgen_pl.origin import find_commit


@dataclass
class Row:
    """One candidate."""

    name: str
    timing: Timing
    images: int
    """Per run."""
    tokens: int
    """Per image; 0 where none are drawn or read."""
    least_seconds: float | None = None
    """By the roofline; absent where no formula stands."""
    extra_bytes: int | None = None
    """Peak less the memory after loading, in a process of its own; absent where not measured."""

    def as_dict(self) -> dict[str, Any]:
        """Names carry the units."""
        timing, least = self.timing, self.least_seconds
        speed = self.images / timing.median
        return {
            "name": self.name,
            "median_s": timing.median,
            "fastest_s": timing.spread[0],
            "slowest_s": timing.spread[1],
            "runs_s": timing.seconds,
            "warm_up_s": timing.warm_up,
            "images_per_s": speed,
            "tokens_per_s": speed * self.tokens or None,
            "peak_memory_gb": timing.peak_bytes / 1e9,
            "reserved_memory_gb": timing.reserved_bytes / 1e9,
            "memory_over_loading_gb": None if self.extra_bytes is None else self.extra_bytes / 1e9,
            "roofline_s": least,
            "roofline_share": None if least is None else least / timing.median,
        }


# Heading, width, entry of `Row.as_dict`, its format.
_COLUMNS = [
    ("median s", 10, "median_s", ".3f"),
    ("fastest", 10, "fastest_s", ".3f"),
    ("slowest", 10, "slowest_s", ".3f"),
    ("images/s", 10, "images_per_s", ".3g"),
    ("tokens/s", 10, "tokens_per_s", ".4g"),
    ("peak GB", 10, "peak_memory_gb", ".3f"),
    ("over load", 11, "memory_over_loading_gb", ".3f"),
    ("of roofline", 13, "roofline_share", ".1%"),
]


def format_rows(rows: Sequence[Row]) -> str:
    """A table; what is not measured is a dash."""
    width = max(len(row.name) for row in rows) + 2
    lines = [" " * width + "".join(f"{heading:>{wide}s}" for heading, wide, _, _ in _COLUMNS)]
    for row in rows:
        entries = row.as_dict()
        cells = [
            f"{'-' if entries[key] is None else format(entries[key], form):>{wide}s}"
            for _, wide, key, form in _COLUMNS
        ]
        lines.append(f"{row.name:{width}s}" + "".join(cells))
    return "\n".join(lines)


def format_found(machine: dict[str, Any], found: dict[str, Any]) -> str:
    """All that a phase found: the machine, its rows, and a line for each other entry."""
    lines = [", ".join(f"{name} {_shown(value)}" for name, value in machine.items())]
    lines += ["", format_rows(found["rows"]), ""]
    for name, value in found.items():
        if name == "habits":
            lines.append("added by each habit alone to the naive step without any: time, memory")
            shares = {habit: (c["added_time"], c["added_memory"]) for habit, c in value.items()}
            lines += [f"  {habit:20s}{t:+9.1%}{m:+9.1%}" for habit, (t, m) in shares.items()]
        elif isinstance(value, dict):
            parts = ", ".join(f"{key} {_shown(entry)}" for key, entry in value.items())
            lines.append(f"{name}: {parts}")
        elif name != "rows":
            lines.append(f"{name}: {_shown(value)}")
    return "\n".join(lines)


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def describe_machine(machine: Machine, device: torch.device) -> dict[str, Any]:
    """Where it was measured, and what the probes found there."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "threads": torch.get_num_threads(),
        "load_average": os.getloadavg()[0],  # of the last minute: whether others used the machine
        "torch": torch.__version__,
        "transformers": version("transformers"),
        "commit": find_commit(),
        "copy_gb_per_s": machine.bandwidth / 1e9,
        "matrix_tflop_per_s": machine.matrix_rate / 1e12,
    }


def as_json(content: dict[str, Any]) -> str:
    """The text of a JSON file."""
    return json.dumps(content, indent=2, ensure_ascii=False, default=str) + "\n"
