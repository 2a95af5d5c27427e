"""Every logged number in one append-only file, which the study reads."""

from __future__ import annotations

import csv
import io
from argparse import Namespace
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities import rank_zero_only

from cotgen_pl.files import append_whole, write_whole

COLUMNS = ("run", "step", "metric", "value")


class MetricsFile(Logger):
    """Appends to `metrics.csv` in the run folder, one row per number: run, step, metric, value.

    Lightning's own CSVLogger rewrites its file when a run is resumed in its folder. This one keeps
    it up to the step that a module in training names first (`PolicyModule.on_train_start`), and
    drops what the resumed run writes again. A number that is there already is not written twice.

    Args:
        save_dir: The run folder.
    """

    def __init__(self, save_dir: str) -> None:
        super().__init__()
        self._folder = Path(save_dir)
        self._path = self._folder / "metrics.csv"
        self._present: set[tuple[int, str]] | None = None  # of the last step; None until opened

    @property
    def name(self) -> str:
        """The run folder's name."""
        return self._folder.name

    @property
    def version(self) -> str:
        """Runs have no versions: each has a folder."""
        return ""

    @property
    def save_dir(self) -> str:
        """The run folder."""
        return str(self._folder)

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Nothing: the run folder's config.yaml has them all."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row per metric."""
        if step is None:
            raise ValueError(f"metrics {sorted(metrics)} have no step; log them with one")
        if self._present is None:
            self._present = self._open(step)
        rows = [
            [self.name, str(step), metric, repr(float(value))]
            for metric, value in metrics.items()
            if metric not in ("epoch", "step") and (step, metric) not in self._present
        ]
        append_whole(self._path, _as_text(rows))

    def _open(self, last_step: int) -> set[tuple[int, str]]:
        """Keep the rows up to a step; returns step and metric of those of the step itself."""
        rows = []
        if self._path.exists():
            with self._path.open(newline="") as file:
                # What a kill broke off has no end of line: 12.5 may have become 1.
                whole = [line for line in file if line.endswith("\n")]
            rows = list(csv.reader(whole))[1:]
        kept = [row for row in rows if int(row[1]) <= last_step]
        text = _as_text([list(COLUMNS), *kept])
        write_whole(self._path, lambda part: part.write_bytes(text.encode()))
        return {(last_step, metric) for _, step, metric, _ in kept if int(step) == last_step}


def _as_text(rows: list[list[str]]) -> str:
    text = io.StringIO()
    csv.writer(text).writerows(rows)
    return text.getvalue()
