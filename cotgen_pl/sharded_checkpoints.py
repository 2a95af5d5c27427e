"""Checkpoints of a sharded run: a folder into which every process writes its own parts.

`meta.pt` holds the checkpoint as one process would write it, but for tensors in parts: in their
place are empty ones. These tensors lie beside it in the safetensors format, which PyTorch's
distributed checkpoint divides anew for any number of processes. Its own format would keep their
shapes in a pickle that may run code when it is opened.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed.checkpoint as distributed_checkpoint
from torch import Tensor
from torch.distributed import broadcast_object_list, get_rank
from torch.distributed.checkpoint.hf_storage import (
    HuggingFaceStorageReader,
    HuggingFaceStorageWriter,
)
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor, empty

from cotgen_pl.files import write_digests, write_whole

META = "meta.pt"
IN_PARTS = ("state_dict", "optimizer_states", "reference")
"""Entries of a checkpoint whose tensors are in parts in a sharded run."""


def save_parts(checkpoint: dict[str, Any], folder: Path) -> None:
    """Write a checkpoint from all processes, each its parts; what was there stays until it is done.

    Tensors go into a new folder inside; the file that names it then takes the place of the old one
    at once. Of an interrupted call, readers see nothing.
    """
    parts: dict[str, Tensor] = {}

    def take(name: str, value: Tensor) -> Tensor:
        if not isinstance(value, DTensor):
            return value
        parts[name] = value
        return torch.empty(value.shape, dtype=value.dtype, device="meta")

    rest = _replace_tensors(checkpoint, take)
    found = [_next_folder(folder) if get_rank() == 0 else folder]
    broadcast_object_list(found)
    [tensors] = found
    writer = HuggingFaceStorageWriter(str(tensors), save_distributed=True)
    distributed_checkpoint.save(parts, storage_writer=writer)
    if get_rank() == 0:
        write_digests(tensors)
        content = {"checkpoint": rest, "tensors": tensors.name}
        write_whole(tensors.parent / META, lambda part: torch.save(content, part))
        if tensors.parent != folder:
            folder.unlink()
            tensors.parent.rename(folder)
        for old in folder.iterdir():
            if old.is_dir() and old.name != tensors.name:
                shutil.rmtree(old)


def load_parts(folder: Path, mesh: DeviceMesh | None) -> dict[str, Any]:
    """Read a checkpoint that any number of processes wrote.

    Args:
        folder: From `save_parts`.
        mesh: The processes that take a part each, all of which must call this; absent means whole
            tensors on the CPU.
    """
    if not (folder / META).is_file():
        raise ValueError(
            f"expected {META} in the checkpoint folder {folder}, got none: it was never finished; "
            "name another checkpoint by --ckpt_path"
        )
    content = torch.load(folder / META, map_location="cpu", weights_only=True)
    parts: dict[str, Tensor] = {}

    def make_room(name: str, value: Tensor) -> Tensor:
        if not value.is_meta:
            return value
        if mesh is None:
            parts[name] = torch.empty_like(value, device="cpu")
        else:
            parts[name] = empty(
                *value.shape, dtype=value.dtype, device_mesh=mesh, placements=[Shard(0)]
            )
        return parts[name]

    checkpoint: dict[str, Any] = _replace_tensors(content["checkpoint"], make_room)
    reader = HuggingFaceStorageReader(str(folder / content["tensors"]))
    distributed_checkpoint.load(parts, storage_reader=reader, no_dist=mesh is None)
    return checkpoint


def split_whole(checkpoint: dict[str, Any], mesh: DeviceMesh) -> dict[str, Any]:
    """Give each process its parts of the tensors of a checkpoint that was written whole."""

    def split(name: str, value: Tensor) -> Tensor:
        if value.dim() == 0:  # an optimizer's counter of steps
            return value
        own = value.to(mesh.device_type)
        return distribute_tensor(own, mesh, [Shard(0)], src_data_rank=None)

    divided = {name: _replace_tensors(checkpoint[name], split) for name in IN_PARTS}
    return checkpoint | divided


def _replace_tensors(value: Any, replace: Callable[[str, Tensor], Tensor], name: str = "") -> Any:
    """Nested dicts and lists with other tensors, each made of its path and the tensor there."""
    if isinstance(value, Tensor):
        return replace(name, value)
    if isinstance(value, dict):
        return {
            key: _replace_tensors(entry, replace, f"{name}/{key}") for key, entry in value.items()
        }
    if isinstance(value, list | tuple):
        return type(value)(
            _replace_tensors(entry, replace, f"{name}/{number}")
            for number, entry in enumerate(value)
        )
    return value


def _next_folder(folder: Path) -> Path:
    """A new one inside; or beside the file of a run that was not sharded, until it is done."""
    home = folder.with_name(f".{folder.name}.part") if folder.is_file() else folder
    home.mkdir(parents=True, exist_ok=True)
    numbers = [int(path.name) for path in home.iterdir() if path.name.isdecimal()]
    inside = home / str(max(numbers, default=0) + 1)
    inside.mkdir()
    return inside
