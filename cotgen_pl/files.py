"""Files that a run may be killed over, or the disk be full: what was finished in them stays."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


def write_whole(path: Path, write: Callable[[Path], Any], part: str = "part") -> None:
    """Write under another name, hidden from readers, and rename when all of it is there.

    Args:
        path: Of the file; its folder is made where there is none.
        write: Writes all of it to the path that it is given.
        part: Ending of the unfinished file; processes that write the same file have one each.

    Raises:
        ValueError: There is no room. The unfinished file is removed, an old one stays.
    """
    unfinished = path.with_name(f".{path.name}.{part}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(unfinished)
        unfinished.replace(path)
    except OSError as error:
        unfinished.unlink(missing_ok=True)
        raise _no_room(path, error) from error


def append_whole(path: Path, text: str) -> None:
    """Add text to the end of a file; only a kill can leave a half of it there.

    Raises:
        ValueError: There is no room. The file is what it was before.
    """
    before = path.stat().st_size if path.exists() else 0
    try:
        with path.open("ab") as file:
            file.write(text.encode())
    except OSError as error:
        if path.exists():
            os.truncate(path, before)
        raise _no_room(path, error) from error


def _no_room(path: Path, error: OSError) -> ValueError:
    return ValueError(
        f"expected room for {path}, got: {error}; what was finished before it stays: free some "
        "room, and go on with --ckpt_path last"
    )
