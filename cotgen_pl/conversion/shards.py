"""Large checkpoints, read and written a few tensors at a time.

A 7B model is 15 GB in bfloat16: a conversion holds one file of the original and one of the result,
never all of either.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from cotgen_pl.weights import read_tensors

SHARD_BYTES = 5 * 10**9  # of the result's files, as checkpoints on the hub are cut
INDEX = "model.safetensors.index.json"
# Those of transformers: the older ones are pickles, read as tensors only.
NAMES = (
    r"model(-\d{5}-of-\d{5})?\.safetensors",
    r"pytorch_model(-\d{5}-of-\d{5})?\.bin",
)

TYPES = {  # .safetensors' names
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


class Shards:
    """The tensors of a checkpoint folder, by name.

    Args:
        folder: Holds `model*.safetensors`, or else `pytorch_model*.bin`.
        kind: What the checkpoint must be, for messages.

    Raises:
        ValueError: No such folder, no or not all of the files, or a tensor in two of them.
    """

    def __init__(self, folder: Path, kind: str) -> None:
        self.folder = folder
        self.outlines: dict[str, Tensor] = {}  # shape and type without values, on the meta device
        self._places: dict[str, Path] = {}
        self._open: tuple[Path, dict[str, Tensor]] | None = None  # the .bin file read last
        for file in find_shards(folder, kind):
            for name, outline in self._outlines_of(file).items():
                if name in self._places:
                    raise ValueError(
                        f"{folder}: expected each tensor once, got {name} in "
                        f"{self._places[name].name} and {file.name}; remove what is left over"
                    )
                self._places[name], self.outlines[name] = file, outline

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU."""
        file = self._places[name]
        if file.suffix == ".bin":
            return self._read_pickle(file)[name]
        with safe_open(file, "pt") as content:
            tensor: Tensor = content.get_tensor(name)
        return tensor

    def _outlines_of(self, file: Path) -> dict[str, Tensor]:
        if file.suffix == ".bin":
            return {name: values.to("meta") for name, values in self._read_pickle(file).items()}
        try:
            with safe_open(file, "pt") as content:
                return {name: _outline(content.get_slice(name)) for name in list(content.keys())}
        except SafetensorError as error:
            raise ValueError(
                f"{file}: expected a whole .safetensors file, got a damaged one; download it again"
            ) from error

    def _read_pickle(self, file: Path) -> dict[str, Tensor]:
        if self._open is None or self._open[0] != file:
            self._open = None  # before the next one is read: there is room for one
            self._open = (file, read_tensors(file))
        return self._open[1]


def _outline(values: Any) -> Tensor:
    """Of a tensor in a .safetensors file, from the file's head alone."""
    kind = values.get_dtype()
    if kind not in TYPES:
        raise ValueError(
            f"expected weights of a type among {', '.join(TYPES)}, got {kind}; name a checkpoint "
            "that is not quantised"
        )
    return torch.empty(values.get_shape(), dtype=TYPES[kind], device="meta")


def find_shards(folder: Path, kind: str) -> list[Path]:
    """The weights files of a folder, in order; of several formats the safest."""
    if not folder.is_dir():
        raise ValueError(f"expected the folder of {kind}, got {folder}, which is none; name one")
    for pattern in NAMES:
        files = sorted(f for f in folder.iterdir() if re.fullmatch(pattern, f.name))
        if files:
            return _all_of(files)
    raise ValueError(
        f"expected the weights of {kind} in {folder}, as model*.safetensors or "
        "pytorch_model*.bin, got neither; name the folder that they lie in"
    )


def has_weights(folder: Path) -> bool:
    """Whether a folder holds weights files."""
    names = [file.name for file in folder.iterdir()]
    return any(re.fullmatch(pattern, name) for pattern in NAMES for name in names)


def _all_of(files: Sequence[Path]) -> list[Path]:
    """The files, if their names say that none is missing."""
    numbered = re.search(r"-of-(\d{5})\.", files[0].name)
    expected = int(numbered[1]) if numbered else 1
    if len(files) != expected:
        raise ValueError(
            f"{files[0].parent}: expected {expected} weights files, got {len(files)}: "
            f"{', '.join(file.name for file in files)}; download or remove the others"
        )
    return list(files)


@dataclass(frozen=True)
class Planned:
    """A tensor of the result: where it comes from and how it is made."""

    name: str
    shards: Shards
    sources: tuple[str, ...]
    make: Callable[..., Tensor]
    """Takes the sources' values in their order."""

    def outline(self) -> Tensor:
        """Shape and type, without values."""
        return self.make(*(self.shards.outlines[name] for name in self.sources))

    def values(self) -> Tensor:
        """The tensor itself, in memory of its own."""
        return self.make(*(self.shards.read(name) for name in self.sources)).clone(
            memory_format=torch.contiguous_format
        )


def write_shards(folder: Path, plan: Iterable[Planned], shard_bytes: int = SHARD_BYTES) -> None:
    """Write the planned tensors as transformers' safetensors files, one file at a time.

    Args:
        folder: Exists.
        plan: The tensors in the order of writing; that of the sources reads each file once.
        shard_bytes: Tensors per file, in bytes; a larger tensor has a file of its own.
    """
    groups = _group(plan, shard_bytes)
    places = {}
    for number, group in enumerate(groups, start=1):
        numbers = "" if len(groups) == 1 else f"-{number:05d}-of-{len(groups):05d}"
        file = f"model{numbers}.safetensors"
        tensors = {planned.name: planned.values() for planned in group}
        save_file(tensors, folder / file, metadata={"format": "pt"})
        places.update(dict.fromkeys(tensors, file))
    if len(groups) > 1:
        total = sum(_num_bytes(planned) for group in groups for planned in group)
        index = {"metadata": {"total_size": total}, "weight_map": places}
        (folder / INDEX).write_text(json.dumps(index, indent=1) + "\n")


def _group(plan: Iterable[Planned], shard_bytes: int) -> list[list[Planned]]:
    groups: list[list[Planned]] = [[]]
    filled = 0
    for planned in plan:
        size = _num_bytes(planned)
        if groups[-1] and filled + size > shard_bytes:
            groups.append([])
            filled = 0
        groups[-1].append(planned)
        filled += size
    return groups


def _num_bytes(planned: Planned) -> int:
    outline = planned.outline()
    return outline.numel() * outline.element_size()


def same(values: Tensor) -> Tensor:
    """The tensor as it is."""
    return values


def part(index: int, count: int) -> Callable[[Tensor], Tensor]:
    """Cuts one of `count` equal parts along the first axis."""
    return lambda values: values.chunk(count)[index]


def joined(*parts: Tensor) -> Tensor:
    """The parts one after another along the first axis."""
    return torch.cat(parts)
