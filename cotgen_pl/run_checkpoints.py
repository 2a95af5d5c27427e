"""Checkpoints of a run: written whole, checked before they are read, the newest good one found.

Apart from `checkpoints.py`, which reads the models that runs start from.
"""

from __future__ import annotations

import io
import os
import shutil
import warnings
import zipfile
from collections.abc import Iterable
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.plugins import TorchCheckpointIO

from cotgen_pl.files import DIGESTS, check_digests, write_whole
from cotgen_pl.sharded_checkpoints import load_parts

ADVICE = (
    "name another one by --ckpt_path FILE; --ckpt_path last finds the newest good one by itself"
)


class WholeCheckpoints(TorchCheckpointIO):
    """Writes a checkpoint beside the one that it takes the place of, and then renames it.

    Lightning's own goes through the system's temporary folder and is copied over the old one: a
    kill or a full disk in between would leave neither.
    """

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: str | Path, storage_options: Any = None
    ) -> None:
        """Write to a disk whole or not at all; to any other place as Lightning does."""
        if storage_options is not None or not is_on_disk(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        content = io.BytesIO()  # torch's own writer hides that a disk is full
        torch.save(checkpoint, content)

        def write(part: Path) -> None:
            _write_to_disk(part, content.getbuffer())
            if Path(path).is_dir():  # of a sharded run, whose place the file can take by now
                shutil.rmtree(path)

        write_whole(Path(path), write)

    def load_checkpoint(
        self, path: str | Path, map_location: Any = "cpu", weights_only: bool | None = True
    ) -> dict[str, Any]:
        """Read tensors and plain values alone, from a disk only what passes `check_whole`.

        A folder is that of a sharded run.
        """
        if is_on_disk(path):
            check_whole(Path(path))
        if Path(path).is_dir():
            return load_parts(Path(path), None)
        return super().load_checkpoint(path, map_location, weights_only=True)


def is_on_disk(path: str | Path) -> bool:
    """Whether a path is one of this machine, and not an address."""
    return type(get_filesystem(path)) is type(get_filesystem("."))


def _write_to_disk(path: Path, content: memoryview) -> None:
    """Write bytes and wait until they are there, lest a power cut leave a renamed file empty."""
    with path.open("wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def check_whole(path: Path) -> None:
    """Check a checkpoint by its checksums: those of a file are in it, a folder's in its list.

    torch writes a zip archive with the CRC-32 of each entry, and does not compare them when it
    reads. An archive that is cut off lacks its directory, which stands at the end.

    Raises:
        ValueError: It is not what was written, or holds more than tensors and plain values.
    """
    archives = [path]
    if path.is_dir():
        for listed in sorted(path.rglob(DIGESTS)):
            check_digests(listed.parent)
        archives = sorted(path.glob("*.pt"))  # written last
    damages = [_find_damage(archive) for archive in archives] or ["it was never finished"]
    for damage in damages:
        if damage:
            raise ValueError(
                f"expected a whole checkpoint at {path}, got a damaged one ({damage}); {ADVICE}"
            )


def _find_damage(archive: Path) -> str | None:
    """What is wrong with a file of torch's, None for nothing."""
    try:
        with zipfile.ZipFile(archive) as entries:
            name = entries.testzip()
        if name is None:
            torch.load(archive, weights_only=True, mmap=True)  # tensors stay on the disk
    except (
        zipfile.BadZipFile,
        ValueError,
        OSError,
        EOFError,
        RuntimeError,
        UnpicklingError,
    ) as error:
        return f"{archive.name}: {str(error).splitlines()[0]}"
    return f"{archive.name}: the checksum of {name} differs" if name else None


def newest_good(folders: Iterable[Path]) -> Path | None:
    """The newest checkpoint that is whole: a `last` one first, then any other; None without a last.

    Newest by time of writing. A damaged one is named in a warning.

    Raises:
        ValueError: There are some, and none is whole.
    """
    names = ("last*.ckpt", "*.ckpt")
    found = [_newest_first(path for f in folders for path in f.glob(name)) for name in names]
    last, every = found
    if not last:
        return None
    for path in dict.fromkeys([*last, *every]):
        try:
            check_whole(path)
        except ValueError as error:
            warnings.warn(f"not gone on with: {error}", stacklevel=2)
        else:
            return path
    raise ValueError(
        f"expected a whole checkpoint in {last[0].parent}, got {len(every)} damaged ones; go on "
        "from a copy by --ckpt_path FILE, or remove the run's folder and begin anew"
    )


def _newest_first(paths: Iterable[Path]) -> list[Path]:
    return sorted(paths, key=lambda path: path.stat().st_mtime_ns, reverse=True)
