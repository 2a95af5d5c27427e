"""The append-only file of metrics."""

import csv
import resource

import pytest

from cotgen_pl.callbacks.metrics import MetricsFile


def read(folder) -> list[list[str]]:
    with (folder / "metrics.csv").open(newline="") as file:
        header, *rows = list(csv.reader(file))
    assert header == ["run", "step", "metric", "value"]
    return rows


def test_rows_name_run_step_and_metric_and_lose_no_digit(tmp_path):
    folder = tmp_path / "first"
    logger = MetricsFile(str(folder))
    logger.log_metrics({}, step=0)
    logger.log_metrics({"a": 0.1, "epoch": 0, "step": 1.0}, step=1)
    logger.log_metrics({"b": 1 / 3}, step=1)
    assert read(folder) == [["first", "1", "a", "0.1"], ["first", "1", "b", repr(1 / 3)]]


def test_a_resumed_run_keeps_the_rows_up_to_its_step_and_writes_none_twice(tmp_path):
    first = MetricsFile(str(tmp_path))
    for step in range(4):
        first.log_metrics({"train/a": step, "val/b": step}, step=step)
    resumed = MetricsFile(str(tmp_path))
    resumed.log_metrics({}, step=2)
    resumed.log_metrics({"val/b": 9, "val/c": 9}, step=2)
    resumed.log_metrics({"train/a": 9}, step=3)
    name = tmp_path.name
    kept = [[name, str(s), m, f"{s}.0"] for s in range(3) for m in ("train/a", "val/b")]
    assert read(tmp_path) == [*kept, [name, "2", "val/c", "9.0"], [name, "3", "train/a", "9.0"]]


@pytest.mark.parametrize("rest", ["x,2,a", "x,2,a,1", "x,2,a,12.5\r", "x,2,a,"])
def test_a_row_that_broke_off_is_dropped(tmp_path, rest):
    (tmp_path / "metrics.csv").write_text("run,step,metric,value\nx,1,a,1.0\n" + rest, newline="")
    logger = MetricsFile(str(tmp_path))
    logger.log_metrics({"a": 2.0}, step=2)
    assert read(tmp_path) == [["x", "1", "a", "1.0"], [tmp_path.name, "2", "a", "2.0"]]


def test_a_full_disk_keeps_the_rows_that_are_there(tmp_path):
    logger = MetricsFile(str(tmp_path))
    logger.log_metrics({"a": 1.0}, step=1)
    before = read(tmp_path)
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1000, hard))
        with pytest.raises(ValueError, match=r"expected room for .*metrics.csv, got: "):
            logger.log_metrics({f"metric {number}": 2.0 for number in range(100)}, step=2)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert read(tmp_path) == before


def test_metrics_without_a_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"metrics \['a'\] have no step"):
        MetricsFile(str(tmp_path)).log_metrics({"a": 1.0})
