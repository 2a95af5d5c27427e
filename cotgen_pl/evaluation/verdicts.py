"""Verdicts of a thorough evaluation on disk, batch by batch, so that one that is killed goes on.

Apart from `judging.py`, which draws and asks: this knows files, and what must be the same for
verdicts of before to count now.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

import cotgen_pl
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.prompts import PromptFile
from cotgen_pl.descriptions import RESIDENCE, describe
from cotgen_pl.files import append_rows, read_rows, write_whole
from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.sampling import noise_seed

LIBRARIES = ("torch", "torchvision", "transformers", "open_clip_torch")  # that scores depend on


@dataclass
class JudgedBatch:
    """What all rewards of a suite say of G pictures of each of some prompts, P of them."""

    prompts: list[int]
    """[P], their places in the suite."""
    verdicts: dict[str, dict[str, Tensor]]
    """By reward, its `total` and its parts, [P, G] float64 each, on the CPU."""
    diversity: Tensor
    """[P] float64, of each prompt's pictures; NaN for one picture."""
    details: list[list[Any]] | None
    """Of the suite's own reward, JSON values, P lists of G; None if it gives none."""

    def as_row(self) -> dict[str, Any]:
        """JSON values."""
        verdicts = {
            reward: {part: values.tolist() for part, values in parts.items()}
            for reward, parts in self.verdicts.items()
        }
        return {
            "prompts": self.prompts,
            "verdicts": verdicts,
            "diversity": self.diversity.tolist(),
            "details": self.details,
        }

    @classmethod
    def from_row(cls, row: Mapping[str, Any]) -> Self:
        """What `as_row` made, with null for NaN."""
        verdicts = {
            reward: {
                part: torch.stack([_read_numbers(line) for line in lines])
                for part, lines in parts.items()
            }
            for reward, parts in row["verdicts"].items()
        }
        return cls(row["prompts"], verdicts, _read_numbers(row["diversity"]), row["details"])


def _read_numbers(values: Sequence[float | None]) -> Tensor:
    return torch.tensor([math.nan if v is None else v for v in values], dtype=torch.float64)


def as_plain(value: Any) -> Any:
    """JSON values of what a reward tells: null for NaN, and the text of what JSON does not know."""
    if isinstance(value, Mapping):
        return {str(name): as_plain(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [as_plain(entry) for entry in value]
    if isinstance(value, float) and math.isnan(value):
        return None
    known = value is None or isinstance(value, bool | int | str)
    return value if known or (isinstance(value, float) and math.isfinite(value)) else str(value)


# What is evaluated ------------------------------------------------------------------------------


def describe_variant(
    module: PolicyModule,
    suite: str,
    files: Sequence[PromptFile],
    prompts: Sequence[Prompt],
    copies: int,
    rewards: Mapping[str, Mapping[str, Any]],
) -> dict[str, Any]:
    """All that a suite's verdicts depend on, as JSON values.

    Args:
        module: Whose policy draws.
        suite: Its name.
        files: Where its prompts are from.
        prompts: All of them.
        copies: Pictures of each.
        rewards: By name, as `describe_judge` has them.
    """
    return {
        "suite": suite,
        "prompts": {
            "files": [asdict(file) for file in files],
            "number": len(prompts),
            "hash": f"{noise_seed(repr(prompts)):016x}",
        },
        "policy": {"weights": hash_weights(module.policy), **module.policy.describe()},
        "rewards": dict(rewards),
        "sampling": {
            "guidance": module.guidance,
            "temperature": module.temperature,
            "precision": str(module.trainer.precision),
            "images_per_prompt": copies,
            "seed": module.seed,
            "stream": "evaluation",
        },
        "versions": {
            "cotgen_pl": cotgen_pl.__version__,
            **{name: version(name) for name in LIBRARIES},
        },
    }


def describe_judge(reward: Reward) -> dict[str, Any]:
    """A reward's class and arguments, and what tells apart all rewards that it is made of.

    These are the plain values that each holds, since an argument may be kept under another name,
    and a hash of the weights of its `network`, where it asks one. Reads the weights.
    """
    reward.load()
    parts = {
        f"{at} {part.name}".strip(): part
        for at, part in reward.named_modules()
        if isinstance(part, Reward)
    }
    networks = {name: getattr(part, "network", None) for name, part in parts.items()}
    hashes = {name: hash_weights(n) for name, n in networks.items() if isinstance(n, nn.Module)}
    held = {name: _plain_settings(part) for name, part in parts.items()}
    return {**describe(reward), "held": held, "networks": hashes}


def _plain_settings(reward: Reward) -> dict[str, Any]:
    """The numbers, texts and switches that a reward holds, but for where it scores."""
    return {
        name: value
        for name, value in vars(reward).items()
        if not name.startswith("_")
        and name not in (*RESIDENCE, "training")
        and isinstance(value, str | int | float | None)
    }


def digest(variant: Mapping[str, Any]) -> str:
    """8 hexadecimal digits that tell variants apart."""
    text = json.dumps(variant, sort_keys=True)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()


# Where it is kept -------------------------------------------------------------------------------


class VerdictStore:
    """Files of an evaluation that is under way: one for each process, a line for each batch.

    The first line of a file is the variant that it belongs to, and the file's name has its digest:
    verdicts of other weights, prompts, rewards or seeds are never taken up. A line that a kill has
    left half written is dropped.

    Args:
        folder: Where the files lie, shared by all processes.
        variant: What is evaluated; see `describe_variant`.
        rank: Number of this process.
    """

    def __init__(self, folder: Path, variant: Mapping[str, Any], rank: int) -> None:
        self.folder, self.variant = folder, dict(variant)
        self._stem = f"{variant['suite']}-{digest(variant)}"
        self.path = folder / f"{self._stem}-{rank}.jsonl"

    def read(self) -> list[JudgedBatch]:
        """The batches of all processes. No process may append before each has read."""
        self._drop_half_line()
        return [JudgedBatch.from_row(row) for path in self._paths() for row in read_rows(path)[1:]]

    def _drop_half_line(self) -> None:
        """Write this process's file anew, so that more can follow; readers see the same rows."""
        rows = read_rows(self.path)
        if rows:
            text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
            write_whole(self.path, lambda part: part.write_text(text, encoding="utf-8"))
        else:
            self.path.unlink(missing_ok=True)

    def append(self, batch: JudgedBatch) -> None:
        """Add a batch of this process."""
        head = [] if self.path.exists() else [{"variant": self.variant}]
        append_rows(self.path, [*head, batch.as_row()])

    def remove(self) -> None:
        """Take away the files of all processes, and the folder if nothing else is in it."""
        for path in self._paths():
            path.unlink()
        if self.folder.is_dir() and not any(self.folder.iterdir()):
            self.folder.rmdir()

    def others(self) -> dict[Path, list[str]]:
        """Files of the suite's other unfinished evaluations, with what differs in each."""
        found = {}
        for path in sorted(set(self.folder.glob("*.jsonl")) - set(self._paths())):
            variant = _read_variant(path)
            if variant.get("suite") == self.variant["suite"]:
                names = [name for name in self.variant if variant.get(name) != self.variant[name]]
                found[path] = names
        return found

    def _paths(self) -> list[Path]:
        return sorted(self.folder.glob(f"{self._stem}-*.jsonl"))


def _read_variant(path: Path) -> dict[str, Any]:
    """The first line's, without reading what follows; empty if a kill left only a half of it."""
    with path.open(encoding="utf-8") as file:
        line = file.readline()
    variant: dict[str, Any] = json.loads(line)["variant"] if line.endswith("\n") else {}
    return variant
