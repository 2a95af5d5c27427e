"""Preference pairs on disk: a folder that is written shard by shard, finished, and then only read.

    data/train-00000-of-00004.parquet   one row per pair, with Pick-a-Pic's columns and our own
    counts/00000.json                   what the shard was made from; written behind it
    settings.json                       what the set was begun with
    pairs.json                          settings and totals; written last, so it marks a whole set
    reference.safetensors               log-probabilities of a reference, where a run stored them

The layout is the hub's: `datasets.load_dataset(folder)` finds the shards. Their columns are in
`rows.py`, whose `Drawn` belongs here for users.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from datasets import Dataset
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Policy, PreferencePair, Prompt
from cotgen_pl.pairs.rows import FEATURES, TRAINED_ON, Drawn, read_prompts, read_tokens

__all__ = [
    "Drawn",
    "PairSet",
    "PairSetWriter",
    "load_reference",
    "save_reference",
    "tokens_hash",
]

TOTALS, SETTINGS, REFERENCE = "pairs.json", "settings.json", "reference.safetensors"
READING = ".reading"  # memory-mapped copy of TRAINED_ON, made by `datasets`; may be deleted
COUNTS = ("prompts", "images", "pairs", "dropped")
ADVICE = "copy it again, or draw the set in a new run"
ROWS_PER_SCAN = 1000  # 4.6 MB of tokens at 576 per picture


class PairSetWriter:
    """Writes a pair set, each shard whole or not at all; several processes write their own shards.

    A folder that was begun is gone on with: shards that are finished stay.

    Args:
        folder: Of the set, one that all processes share.
        num_shards: In the whole set.
        settings: JSON values. What the set was made with; with other values, the folder is refused.

    Raises:
        ValueError: The folder was begun with other settings.
    """

    def __init__(self, folder: Path, num_shards: int, settings: Mapping[str, Any]) -> None:
        self.folder, self.num_shards = Path(folder), num_shards
        self.settings: dict[str, Any] = json.loads(json.dumps(dict(settings)))
        begun = {"num_shards": num_shards, **self.settings}
        for part in ("data", "counts"):
            (self.folder / part).mkdir(parents=True, exist_ok=True)
        path = self.folder / SETTINGS
        if path.is_file():
            self._check_settings(_read_json(path, ["num_shards"]), begun)
        else:
            _write_json(path, begun, part=str(os.getpid()))  # all processes do, at the same time

    def _check_settings(self, before: dict[str, Any], now: dict[str, Any]) -> None:
        for name in sorted(before.keys() | now.keys()):
            if before.get(name) != now.get(name):
                raise ValueError(
                    f"{self.folder} was begun with {name} {before.get(name)!r}, got "
                    f"{now.get(name)!r}; go on with the settings it was begun with, name another "
                    "folder, or remove this one"
                )

    def is_finished(self, shard: int) -> bool:
        """Whether shard and counts are both there."""
        return self._path(shard).is_file() and self._counts_path(shard).is_file()

    def write(
        self,
        shard: int,
        rows: Sequence[Mapping[str, Any]],
        *,
        num_prompts: int,
        num_images: int,
        dropped: Mapping[str, int],
    ) -> None:
        """Write a shard.

        Args:
            shard: Its number, from 0.
            rows: From `Drawn.pairs`; there may be none.
            num_prompts: Prompts that it was made from.
            num_images: Pictures that it was made from.
            dropped: How many candidates (groups, rows of a source) gave no pair, by reason.

        Raises:
            ValueError: The disk is full; the part is removed, finished shards stay.
        """
        columns = {name: [row[name] for row in rows] for name in FEATURES}
        table = Dataset.from_dict(columns, features=FEATURES)
        with _quiet():
            write_whole(self._path(shard), lambda part: table.to_parquet(str(part)))
        counts = {"prompts": num_prompts, "images": num_images, "pairs": len(rows)}
        _write_json(self._counts_path(shard), counts | {"dropped": dict(dropped)})

    def finish(self) -> PairSet:
        """Write the totals, which make the set whole; one process calls this, behind a barrier.

        Raises:
            ValueError: A shard is missing, or no pairs are left.
        """
        missing = [shard for shard in range(self.num_shards) if not self.is_finished(shard)]
        if missing:
            raise ValueError(
                f"expected {self.num_shards} shards in {self.folder}, got none for {missing}; put "
                "the folder where all processes write to the same disk, and start again"
            )
        shards = [_read_json(self._counts_path(shard), COUNTS) for shard in range(self.num_shards)]
        totals: dict[str, Any] = {
            name: sum(counts[name] for counts in shards) for name in ("prompts", "images", "pairs")
        }
        dropped: Counter[str] = Counter()
        for counts in shards:
            dropped.update(counts["dropped"])
        _write_json(
            self.folder / TOTALS,
            {
                "settings": self.settings,
                "counts": totals | {"dropped": dict(dropped)},
                "pairs_per_shard": [counts["pairs"] for counts in shards],
            },
        )
        return PairSet(self.folder)

    def _path(self, shard: int) -> Path:
        return _shard_path(self.folder, shard, self.num_shards)

    def _counts_path(self, shard: int) -> Path:
        return self.folder / "counts" / f"{shard:05d}.json"


class PairSet:
    """A finished pair set, read in constant memory; pictures are never read.

    `datasets` copies all other columns into the folder once, and maps that copy into memory: a
    batch is read from disk when it is asked for. A shard that changes, and a folder that moves,
    make a new copy, and the old one goes.

    Args:
        folder: Of the set.

    Raises:
        ValueError: The set is not whole, a shard cannot be read, or there is no pair.
    """

    def __init__(self, folder: Path | str) -> None:
        self.folder = Path(folder)
        path = self._totals_path()
        totals = _read_json(path, ["settings", "counts", "pairs_per_shard"])
        _check_keys(totals["counts"], COUNTS, path)
        self.settings: dict[str, Any] = totals["settings"]
        """What it was made with."""
        self.counts: dict[str, Any] = totals["counts"]
        """`prompts`, `images`, `pairs`, and `dropped` by reason."""
        sizes = totals["pairs_per_shard"]
        self._shards = [_shard_path(self.folder, k, len(sizes)) for k in range(len(sizes))]
        for path, size in zip(self._shards, sizes, strict=True):
            _check_shard(path, size)
        if not self.counts["pairs"]:
            raise ValueError(
                f"expected pairs in {self.folder}, got none of {self.counts['images']} pictures; "
                f"dropped: {_reasons(self.counts['dropped'])}; draw more pictures of each prompt, "
                "or take a reward or margin that tells them apart"
            )
        self._rows = self._map().with_format("arrow")
        self._drop_old_copies()

    def __len__(self) -> int:
        return len(self._rows)

    def _totals_path(self) -> Path:
        path = self.folder / TOTALS
        if path.is_file():
            return path
        if (self.folder / SETTINGS).is_file():
            raise ValueError(
                f"expected a finished pair set in {self.folder}, got one that was begun; resume "
                "the run that builds it"
            )
        raise ValueError(
            f"expected a pair set in {self.folder.absolute()}, got no {TOTALS} there; name the "
            "folder of a finished one"
        )

    def _map(self) -> Dataset:
        try:
            with _quiet():
                return Dataset.from_parquet(
                    [str(path.absolute()) for path in self._shards],
                    columns=list(TRAINED_ON),
                    cache_dir=str(self.folder / READING),
                )
        except OSError as error:
            raise ValueError(
                f"expected room and leave to write in {self.folder}, where pairs are laid out for "
                f"reading once, got: {error}; free some room, or copy the set to a folder of yours"
            ) from error
        except datasets.exceptions.DatasetGenerationError:
            for path in self._shards:
                _check_pages(path)
            raise

    def _drop_old_copies(self) -> None:
        """Remove those of shards that have changed or lay elsewhere: `datasets` keys by path."""
        files = [Path(file["filename"]).resolve() for file in self._rows.cache_files]
        for copy in (self.folder / READING / "parquet").resolve().iterdir():
            if not any(copy in file.parents for file in files):
                shutil.rmtree(copy, ignore_errors=True)  # whoever has mapped it keeps it

    def check_fits(self, policy: Policy) -> None:
        """Raise a ValueError unless all tokens are codes of the policy, as many as it draws."""
        for start in range(0, len(self), ROWS_PER_SCAN):
            table = self._rows[start : start + ROWS_PER_SCAN]
            for name in ("tokens_0", "tokens_1"):
                self._check_tokens(table[name].combine_chunks(), policy, start, name)

    def _check_tokens(self, lists: Any, policy: Policy, start: int, name: str) -> None:
        lengths = lists.value_lengths().to_numpy()
        if (lengths != policy.num_tokens).any():
            row = int((lengths != policy.num_tokens).argmax())
            raise ValueError(
                f"{self.folder}: expected {policy.num_tokens} tokens per picture, as the policy "
                f"draws, got {lengths[row]} in {name} of pair {start + row}; take the policy that "
                "drew the pairs, or pairs of this one"
            )
        tokens = lists.flatten().to_numpy()
        wrong = (tokens < 0) | (tokens >= policy.codebook_size)
        if wrong.any():
            place = int(wrong.argmax())
            raise ValueError(
                f"{self.folder}: expected tokens from 0 to {policy.codebook_size - 1}, the "
                f"policy's codes, got {tokens[place]} in {name} of pair "
                f"{start + place // policy.num_tokens}; take the policy that drew the pairs, or "
                "pairs of this one"
            )

    def prompts(self) -> Iterator[Prompt]:
        """The prompts of all pairs, in order."""
        for start in range(0, len(self), ROWS_PER_SCAN):
            yield from read_prompts(self._rows[start : start + ROWS_PER_SCAN])

    def batch(self, rows: Sequence[int]) -> PreferencePair:
        """The pairs at these places of the set."""
        places = [int(row) for row in rows]
        table = self._rows[places]
        scores = np.stack([table[name].to_numpy() for name in ("score_0", "score_1")], 1)
        return PreferencePair(
            prompts=read_prompts(table),
            chosen=read_tokens(table, "tokens_0"),
            rejected=read_tokens(table, "tokens_1"),
            scores=torch.from_numpy(scores),
            rows=torch.tensor(places, dtype=torch.int64),
        )


def tokens_hash(pairs: PairSet) -> str:
    """16 hexadecimal digits of all that log-probabilities depend on in a set: texts and tokens."""
    digest = hashlib.blake2b(digest_size=8)
    for start in range(0, len(pairs), ROWS_PER_SCAN):
        batch = pairs.batch(range(start, min(start + ROWS_PER_SCAN, len(pairs))))
        digest.update(json.dumps([prompt.drawn_text for prompt in batch.prompts]).encode())
        digest.update(batch.chosen.numpy().tobytes())
        digest.update(batch.rejected.numpy().tobytes())
    return digest.hexdigest()


def save_reference(folder: Path | str, logps: Tensor, key: Mapping[str, str | float]) -> None:
    """Store a reference's log-probabilities beside the pairs, whole or not at all.

    Args:
        folder: Of the pair set.
        logps: [N, 2] float32, summed over tokens, of chosen and rejected.
        key: What they depend on: reference, tokens, template, mode and so on.
    """
    path = Path(folder) / REFERENCE
    metadata = {name: json.dumps(value) for name, value in key.items()}
    values = {"logps": logps.detach().float().cpu().contiguous()}
    content = save(values, metadata)  # not `save_file`: only its owner could read that file
    write_whole(path, lambda part: part.write_bytes(content))


def load_reference(folder: Path | str, key: Mapping[str, str | float]) -> Tensor | None:
    """The stored log-probabilities, [N, 2] float32, or None where there are none.

    Raises:
        ValueError: The file cannot be read, or it was made with another key.
    """
    path = Path(folder) / REFERENCE
    if not path.is_file():
        return None
    try:
        with safe_open(path, "pt") as file:
            stored = {name: json.loads(value) for name, value in (file.metadata() or {}).items()}
            logps: Tensor = file.get_tensor("logps")
    except SafetensorError as error:
        raise ValueError(
            f"expected a reference's log-probabilities in {path}, got: {error}; remove the file, "
            "and the next run computes them again"
        ) from error
    for name in sorted(stored.keys() | key.keys()):
        if stored.get(name) != key.get(name):
            raise ValueError(
                f"{path}: expected log-probabilities of {name} {key.get(name)!r}, got those of "
                f"{stored.get(name)!r}; train with that one, or remove the file, and the next run "
                "computes them again"
            )
    return logps


def _shard_path(folder: Path, shard: int, num_shards: int) -> Path:
    return folder / "data" / f"train-{shard:05d}-of-{num_shards:05d}.parquet"


def _check_shard(path: Path, num_pairs: int) -> None:
    """Read the shard's footer, which a truncated file does not have."""
    try:
        found = pq.read_metadata(path).num_rows
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error
    if found != num_pairs:
        raise _unreadable(path, f"{found} pairs instead of {num_pairs}")


def _check_pages(path: Path) -> None:
    try:
        for _ in pq.ParquetFile(path).iter_batches(columns=list(TRAINED_ON)):
            pass
    except (OSError, pa.ArrowException) as error:
        raise _unreadable(path, error) from error


def _unreadable(path: Path, what: object) -> ValueError:
    return ValueError(f"expected a readable shard at {path}, got: {what}; {ADVICE}")


def _reasons(dropped: Mapping[str, int]) -> str:
    return ", ".join(f"{number} {reason}" for reason, number in dropped.items()) or "nothing"


def _write_json(path: Path, values: Mapping[str, Any], part: str = "part") -> None:
    text = json.dumps(values, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda file: file.write_text(text, encoding="utf-8"), part)


def _read_json(path: Path, keys: Sequence[str]) -> dict[str, Any]:
    """A JSON object that has the keys, or a ValueError that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"expected JSON in {path}, got: {error}; {ADVICE}") from error
    _check_keys(found, keys, path)
    return dict(found)


def _check_keys(found: Any, keys: Sequence[str], path: Path) -> None:
    missing = [key for key in keys if not isinstance(found, dict) or key not in found]
    if missing:
        raise ValueError(f"expected {list(keys)} in {path}, got none for {missing}; {ADVICE}")


@contextmanager
def _quiet() -> Iterator[None]:
    """Without `datasets`' own progress bars."""
    silent = datasets.are_progress_bars_disabled()
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        if not silent:
            datasets.enable_progress_bars()
