"""Preference data that the policy did not draw: read, resized and turned into tokens once.

The result is an ordinary pair set, so training reads nothing else. Pictures are resized as the
policy's own processor does, and stored as the policy sees them.
"""

from __future__ import annotations

import hashlib
import io
import json
import math
import random
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from PIL import Image
from torch import Tensor
from tqdm import tqdm

import cotgen_pl
from cotgen_pl.data.foreign_files import column_names, count_rows, find_files, read_rows
from cotgen_pl.data.formats import ORIGIN
from cotgen_pl.interfaces import Policy, Prompt, check_positive
from cotgen_pl.pairs.sets import Drawn, PairSetWriter

ROWS_PER_SHARD = 256  # about 100 MB of Pick-a-Pic's pictures in memory at a time
NUM_NAMED = 5  # unreadable pictures in a message
TIES, UNLABELLED, UNREADABLE = "ties", "without labels", "unreadable pictures"
# Pillow's errors for broken files; SyntaxError is that of a broken PNG.
BROKEN = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


@dataclass
class Candidate:
    """A row of a source whose labels prefer one picture."""

    prompt: Prompt
    pictures: list[Image.Image]
    """Chosen and rejected."""
    labels: list[float]
    """Likewise."""


@dataclass
class ForeignPairs:
    """Where preference data is, and how its columns are called; the defaults are Pick-a-Pic's.

    A picture is the bytes of a file, or a path relative to the file that names it. Of two labels
    the higher one's picture is chosen; equal ones, and missing ones, are dropped and counted.
    """

    path: str
    """A Parquet or JSONL file, a folder of such files, or one that `Dataset.save_to_disk` wrote."""
    cache: str | None = None
    """Folder for the encoded sets; by default `<path>.tokens`, beside the source. A set is made
    anew when the source's files, or the part of the policy that reads pictures, have changed;
    picture files that a source names by path are not looked at again."""
    caption: str = "caption"
    """Column of the prompts."""
    picture_0: str = "jpg_0"
    """Column of the first pictures."""
    picture_1: str = "jpg_1"
    """Column of the second ones."""
    label_0: str = "label_0"
    """Column of the first pictures' labels."""
    label_1: str = "label_1"
    """Column of the second ones'."""
    skip_unreadable: bool = False
    """Leave out pairs with a picture that does not decode, and count them; otherwise the first
    shard with such a picture stops the run."""
    batch_size: int = 16
    """Pairs that are encoded at a time."""

    def __post_init__(self) -> None:
        check_positive(batch_size=self.batch_size)

    @property
    def columns(self) -> list[str]:
        """Names of all columns that are read."""
        return [self.caption, self.picture_0, self.picture_1, self.label_0, self.label_1]

    def check(self, policy: Policy) -> None:
        """Raise a ValueError for what is wrong with files, columns or captions; needs no weights.

        Only captions are read.
        """
        self._cache()
        for file in find_files(Path(self.path)):
            missing = sorted(set(self.columns) - set(column_names(file)))
            if missing:
                raise ValueError(
                    f"{file}: expected the columns {self.columns}, got {column_names(file)} "
                    f"without {missing}; name the columns of this source by caption, picture_0, "
                    "picture_1, label_0 and label_1"
                )
        for prompt in self.prompts():
            policy.check_prompts([prompt.text])

    def prompts(self) -> Iterator[Prompt]:
        """The captions of all rows; nothing else is read."""
        for file in find_files(Path(self.path)):
            for number, row in enumerate(read_rows(file, [self.caption])):
                origin = f"{file}, row {number + 1}"
                yield Prompt(self._caption(row, origin), facts={ORIGIN: origin})

    def encode(self, policy: Policy) -> Path:
        """The folder of the encoded pair set, which is made where it is not there yet.

        Goes on behind the shards that an interrupted run has finished. Needs the policy's weights.
        """
        files = find_files(Path(self.path))
        settings = self._settings(files, policy)
        key = hashlib.blake2b(json.dumps(settings).encode(), digest_size=8).hexdigest()
        folder = self._cache() / key
        if (folder / "pairs.json").is_file():
            return folder
        num_rows = sum(map(count_rows, files))
        if not num_rows:
            raise ValueError(f"expected pairs in {self.path}, got an empty source; name another")
        settings["project_version"] = cotgen_pl.__version__
        writer = PairSetWriter(folder, math.ceil(num_rows / ROWS_PER_SHARD), settings)
        self._write(writer, files, num_rows, policy)
        return writer.finish().folder

    def _cache(self) -> Path:
        path = Path(self.path)
        cache = Path(self.cache) if self.cache else path.with_name(f"{path.name}.tokens")
        if cache.resolve().is_relative_to(path.resolve()):
            raise ValueError(
                f"expected a cache outside of the source {path}, whose files are all read, got "
                f"{cache}; name another folder, or leave it out"
            )
        return cache

    def _settings(self, files: Sequence[Path], policy: Policy) -> dict[str, Any]:
        """All that decides about the set's contents."""
        return {
            "policy": fingerprint_encoder(policy),
            "num_tokens": policy.num_tokens,
            "codebook_size": policy.codebook_size,
            "source": [_stamp(file) for file in files],
            "columns": self.columns,
            "skip_unreadable": self.skip_unreadable,
            "reward": "labels of the source",
        }

    def _write(
        self, writer: PairSetWriter, files: Sequence[Path], num_rows: int, policy: Policy
    ) -> None:
        rows = self._rows(files)
        with tqdm(total=num_rows, unit="pair", desc="pictures to tokens") as bar:
            for shard in range(writer.num_shards):
                part = islice(rows, ROWS_PER_SHARD)
                if writer.is_finished(shard):
                    bar.update(sum(1 for _ in part))
                else:
                    self._write_shard(writer, shard, part, policy, bar.update)

    def _rows(self, files: Sequence[Path]) -> Iterator[tuple[int, Path, str, dict[str, Any]]]:
        """Number, folder, place for messages, and values of each row."""
        index = 0
        for file in files:
            for number, row in enumerate(read_rows(file, self.columns)):
                yield index, file.parent, f"{file}, row {number + 1}", row
                index += 1

    def _write_shard(
        self,
        writer: PairSetWriter,
        shard: int,
        rows: Iterator[tuple[int, Path, str, dict[str, Any]]],
        policy: Policy,
        advance: Callable[[int], Any],
    ) -> None:
        dropped: Counter[str] = Counter()
        unreadable: list[str] = []
        pairs: list[dict[str, Any]] = []
        waiting: list[Candidate] = []
        num_rows = 0
        for row in rows:
            num_rows += 1
            found = self._candidate(*row, unreadable)
            if isinstance(found, Candidate):
                waiting.append(found)
            else:
                dropped[found] += 1
            if len(waiting) == self.batch_size:
                pairs += encode_pairs(waiting, policy)
                waiting = []
            advance(1)
        self._report(unreadable, num_rows)
        if waiting:
            pairs += encode_pairs(waiting, policy)
        writer.write(shard, pairs, num_prompts=num_rows, num_images=2 * num_rows, dropped=dropped)

    def _candidate(
        self, index: int, folder: Path, origin: str, row: dict[str, Any], unreadable: list[str]
    ) -> Candidate | str:
        """The row as a candidate, or why it is none; pictures that do not decode are noted."""
        for column in self.columns:
            if column not in row:
                raise ValueError(
                    f"{origin}: expected the columns {self.columns}, got a row without {column!r}; "
                    "give each row all of them"
                )
        labels = [self._label(row, column, origin) for column in (self.label_0, self.label_1)]
        if any(map(math.isnan, labels)):
            return UNLABELLED
        if labels[0] == labels[1]:
            return TIES
        pictures = []
        for column in (self.picture_0, self.picture_1):
            _check_picture(row[column], column, origin)
            try:
                pictures.append(open_picture(row[column], folder))
            except BROKEN as error:
                unreadable.append(f"{origin} {column} ({error})")
        if len(pictures) < 2:
            return UNREADABLE
        best = int(labels[1] > labels[0])
        order = (best, 1 - best)
        prompt = Prompt(self._caption(row, origin), facts={ORIGIN: origin}, index=index)
        return Candidate(prompt, [pictures[k] for k in order], [labels[k] for k in order])

    def _label(self, row: dict[str, Any], column: str, origin: str) -> float:
        """A missing one is NaN."""
        label = row[column]
        if not isinstance(label, int | float | None):
            raise ValueError(
                f"{origin}: expected a number in column {column!r}, got {label!r}; correct the "
                "row, or name the columns of the labels by label_0 and label_1"
            )
        return math.nan if label is None else float(label)

    def _caption(self, row: dict[str, Any], origin: str) -> str:
        text = row.get(self.caption)
        if not isinstance(text, str) or not text.strip():
            raise ValueError(
                f"{origin}: expected a prompt in column {self.caption!r}, got {text!r}; remove the "
                "row, or name the column of the prompts by caption"
            )
        return text

    def _report(self, unreadable: list[str], num_rows: int) -> None:
        if not unreadable:
            return
        named = ", ".join(unreadable[:NUM_NAMED])
        rest = f" and {len(unreadable) - NUM_NAMED} more" if len(unreadable) > NUM_NAMED else ""
        message = (
            f"expected pictures that decode, got {len(unreadable)} that do not in {num_rows} "
            f"rows: {named}{rest}"
        )
        if not self.skip_unreadable:
            raise ValueError(f"{message}; repair them, or leave them out by skip_unreadable: true")
        rank_zero_warn(f"{message}; their pairs are left out")


def encode_pairs(candidates: Sequence[Candidate], policy: Policy) -> list[dict[str, Any]]:
    """Rows of a pair set: pictures prepared and encoded by the policy, on its device."""
    images = policy.prepare([picture for found in candidates for picture in found.pictures])
    drawn = Drawn(
        prompts=[found.prompt for found in candidates],
        tokens=policy.encode(images.to(_device(policy))).cpu(),
        images=images,
        scores=torch.tensor([label for found in candidates for label in found.labels]),
        seeds=[None] * len(images),
    )
    return drawn.pairs(range(0, len(images), 2), range(1, len(images), 2))


def fingerprint_encoder(policy: Policy) -> str:
    """16 hexadecimal digits that tell apart how policies read pictures: tokens of noise.

    What trains does not change them, so a resumed run finds the set of the run that it resumes.
    """
    noise = random.Random("pictures that tell encoders apart")
    width, height = 40, 30  # not square: padding counts too
    pictures = [
        Image.frombytes("RGB", (width, height), noise.randbytes(3 * width * height))
        for _ in range(8)
    ]
    tokens: Tensor = policy.encode(policy.prepare(pictures).to(_device(policy)))
    return hashlib.blake2b(tokens.cpu().numpy().tobytes(), digest_size=8).hexdigest()


def open_picture(value: Any, folder: Path) -> Image.Image:
    """A picture from the bytes of a file, from a path, or from a record that holds one of the two.

    Raises:
        OSError, ValueError, SyntaxError: It does not decode; see `BROKEN`.
    """
    value = _content(value)
    if not value:
        raise OSError("no picture")
    with Image.open(io.BytesIO(value) if isinstance(value, bytes) else folder / value) as picture:
        return picture.convert("RGB")  # reads all of it


def _content(value: Any) -> Any:
    """The bytes or the path in a record as `datasets.Image` stores it; others as they are."""
    return value.get("bytes") or value.get("path") if isinstance(value, dict) else value


def _check_picture(value: Any, column: str, origin: str) -> None:
    """Refuse what is no picture at all; one that is missing or broken is not refused here."""
    if not isinstance(_content(value), str | bytes | None):
        raise ValueError(
            f"{origin}: expected a picture in column {column!r}, as the bytes of a file or a path, "
            f"got {type(_content(value)).__name__}; correct the row, or name the columns of the "
            "pictures by picture_0 and picture_1"
        )


def _stamp(file: Path) -> list[str | int]:
    """Name, size and time of the last change."""
    found = (file / "state.json" if file.is_dir() else file).stat()
    return [file.name, found.st_size, found.st_mtime_ns]


def _device(policy: Policy) -> torch.device:
    return next(policy.parameters()).device
