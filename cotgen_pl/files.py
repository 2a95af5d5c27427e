"""Files that a run may be killed over, or the disk be full: what was finished in them stays."""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

DIGESTS = "checksums.json"


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


def write_digests(folder: Path) -> None:
    """List the SHA-256 of each of a folder's files, in `checksums.json` beside them."""
    digests = {path.name: _digest(path) for path in _files_of(folder)}
    text = json.dumps(digests, indent=2) + "\n"
    write_whole(folder / DIGESTS, lambda part: part.write_text(text))


def check_digests(folder: Path) -> None:
    """Raise a ValueError unless the files are those of `write_digests`, byte for byte."""
    listed = _as_row((folder / DIGESTS).read_text(errors="replace")) or {}
    found = {path.name: _digest(path) for path in _files_of(folder)}
    differing = sorted(n for n in listed.keys() | found if listed.get(n) != found.get(n))
    if differing or not listed:
        raise ValueError(
            f"expected the files of {folder} as {DIGESTS} has them, got others: "
            f"{', '.join(differing) or DIGESTS}; copy the folder again, or take another one"
        )


def _files_of(folder: Path) -> list[Path]:
    return sorted(p for p in folder.iterdir() if p.is_file() and p.name != DIGESTS)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def append_rows(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Add rows to a file of JSON objects, one per line; numbers that are not known are null."""
    lines = [json.dumps(without_nan(row), ensure_ascii=False, allow_nan=False) for row in rows]
    path.parent.mkdir(parents=True, exist_ok=True)
    append_whole(path, "".join(f"{line}\n" for line in lines))


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file of JSON objects, none where there is no file.

    The half of a last row that a kill left is not one of them. Neither may anything be added behind
    it: write what is here anew first.

    Raises:
        ValueError: Another line is no JSON object; it is named.
    """
    if not path.is_file():
        return []
    *lines, last = path.read_text(encoding="utf-8", errors="replace").split("\n")
    rows = [_as_row(line) for line in lines]
    if None in rows:
        number = rows.index(None)
        raise ValueError(
            f"{path}:{number + 1}: expected a JSON object, got {lines[number][:60]!r}; correct "
            "this line, or remove the file where it can be made again"
        )
    half = _as_row(last)  # whole, where only the line's end is missing
    return [row for row in [*rows, half] if row is not None]


def _as_row(line: str) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) else None


def without_nan(value: Any) -> Any:
    """JSON values with null in place of NaN, which JSON has no word for."""
    if isinstance(value, Mapping):
        return {name: without_nan(entry) for name, entry in value.items()}
    if isinstance(value, list | tuple):
        return [without_nan(entry) for entry in value]
    return None if isinstance(value, float) and math.isnan(value) else value
