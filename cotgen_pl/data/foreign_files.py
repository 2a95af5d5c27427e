"""The files that preference data from elsewhere comes in: found, counted, and read row by row.

Apart from `foreign_pairs.py`, which knows what the rows mean.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets
import pyarrow as pa
import pyarrow.parquet as pq

ROWS_PER_READ = 32


def find_files(path: Path) -> list[Path]:
    """The files of a source in order; a folder that `datasets` saved stands for itself.

    Raises:
        ValueError: There are none, or they are of several kinds.
    """
    if path.is_file() and path.suffix in (".parquet", ".jsonl"):
        return [path]
    if (path / "state.json").is_file():
        return [path]
    found = [sorted(path.rglob(f"*{suffix}")) for suffix in (".parquet", ".jsonl")]
    kinds = [files for files in found if files]
    if len(kinds) != 1:
        raise ValueError(
            f"expected a .parquet or .jsonl file, a folder with files of one of the two kinds, or "
            f"one that Dataset.save_to_disk wrote (of a single split), got {path.absolute()} with "
            f"{len(kinds) or 'neither'} of them; correct the path"
        )
    return kinds[0]


def column_names(file: Path) -> list[str]:
    """Names of a file's columns; of a JSONL file, those of its first row."""
    if file.is_dir():
        return _open_saved(file).column_names
    if file.suffix == ".parquet":
        return _open_parquet(file).schema_arrow.names
    return list(next(read_rows(file, []), {}))


def count_rows(file: Path) -> int:
    """How many rows `read_rows` gives."""
    if file.is_dir():
        return len(_open_saved(file))
    if file.suffix == ".parquet":
        return _open_parquet(file).metadata.num_rows
    return sum(1 for _ in read_rows(file, []))


def read_rows(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    """The rows of a file, a few in memory at a time; a JSONL row has all of its columns."""
    if file.is_dir():
        saved = _open_saved(file).select_columns(list(columns)).with_format("arrow")
        for start in range(0, len(saved), ROWS_PER_READ):
            yield from saved[start : start + ROWS_PER_READ].to_pylist()
    elif file.suffix == ".parquet":
        yield from _read_parquet(file, columns)
    else:
        yield from _read_lines(file)


def _read_parquet(file: Path, columns: Sequence[str]) -> Iterator[dict[str, Any]]:
    number = 0
    try:
        for batch in _open_parquet(file).iter_batches(ROWS_PER_READ, columns=list(columns)):
            yield from batch.to_pylist()
            number += len(batch)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"{file}, behind row {number}: expected rows that can be read, got: {error}; download "
            "it again"
        ) from error


def _read_lines(file: Path) -> Iterator[dict[str, Any]]:
    with file.open(encoding="utf-8-sig") as lines:
        for number, line in enumerate(lines, start=1):
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except json.JSONDecodeError as error:
                raise ValueError(
                    f"{file}:{number}: expected a JSON object, got: {error}; correct the line"
                ) from error
            if not isinstance(row, dict):
                raise ValueError(
                    f"{file}:{number}: expected a JSON object, got {row!r}; correct the line"
                )
            yield row


def _open_parquet(file: Path) -> pq.ParquetFile:
    try:
        return pq.ParquetFile(file)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(
            f"expected a Parquet file at {file}, got: {error}; download it again"
        ) from error


def _open_saved(folder: Path) -> datasets.Dataset:
    return datasets.load_from_disk(str(folder))
