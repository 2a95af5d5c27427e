"""Files that a run may be killed over: each is the old one or the new one, and never a half."""

from __future__ import annotations

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
        raise ValueError(
            f"expected room for {path}, got: {error}; what was finished before it stays: free some "
            "room and resume"
        ) from error
