"""Clocks and meters of the bench: alternating runs, peak memory, and what the machine can do."""

from __future__ import annotations

import gc
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from cotgen_pl.products import pack, product

MATRIX_SIDES = {"cpu": 2048, "cuda": 8192}  # 17 and 1,100 GFLOP a product: large enough for a peak
COPY_BYTES = {"cpu": 2**28, "cuda": 2**32}  # far beyond any processor's cache
PROBE_SECONDS = 0.3


@dataclass
class Timing:
    """What runs of one candidate took."""

    warm_up: float = float("nan")
    """Seconds of the first run, which is not among the others."""
    seconds: list[float] = field(default_factory=list)
    peak_bytes: int = 0
    """Most memory in any run: of tensors on a GPU, of the whole process elsewhere."""
    reserved_bytes: int = 0
    """Most that a GPU's allocator held in any run; elsewhere the same as `peak_bytes`."""

    @property
    def median(self) -> float:
        """Seconds."""
        return statistics.median(self.seconds)

    @property
    def spread(self) -> tuple[float, float]:
        """The fastest and the slowest run, in seconds."""
        return min(self.seconds), max(self.seconds)


def time_alternately(
    runs: Mapping[str, Callable[[], object]], repeats: int, device: torch.device
) -> dict[str, Timing]:
    """Run each candidate once to warm up and then in turns, A B A B, so that noise hits all alike.

    The clock stops when the device has finished.
    """
    gc.collect()
    timings = {name: Timing() for name in runs}
    for repeat in range(repeats + 1):
        for name, run in runs.items():
            timing = timings[name]
            reset_peak(device)
            started = time.perf_counter()
            run()
            synchronise(device)
            seconds = time.perf_counter() - started
            peak, reserved = peak_bytes(device)
            timing.peak_bytes = max(timing.peak_bytes, peak)
            timing.reserved_bytes = max(timing.reserved_bytes, reserved)
            if repeat:
                timing.seconds.append(seconds)
            else:
                timing.warm_up = seconds
    return timings


def synchronise(device: torch.device) -> None:
    """Wait for the device's last kernel."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


# Memory -------------------------------------------------------------------------------------------


def reset_peak(device: torch.device) -> None:
    """Begin a phase: its peak starts at the memory of now."""
    synchronise(device)
    if device.type == "cuda":
        torch.cuda.empty_cache()  # or what was reserved would be that of the phase before
        torch.cuda.reset_peak_memory_stats(device)
        return
    _check_linux()
    # Linux's own reset of the process's highest resident size: "5", man 5 proc_pid_clear_refs.
    Path("/proc/self/clear_refs").write_text("5")


def peak_bytes(device: torch.device) -> tuple[int, int]:
    """Most memory since `reset_peak`: of tensors and of the allocator, or twice the process's."""
    if device.type == "cuda":
        tensors = torch.cuda.max_memory_allocated(device)
        return tensors, torch.cuda.max_memory_reserved(device)
    highest = _process_bytes("VmHWM")
    return highest, highest


def memory_bytes(device: torch.device) -> int:
    """Memory of now: of tensors on a GPU, of the whole process elsewhere."""
    if device.type == "cuda":
        return torch.cuda.memory_allocated(device)
    return _process_bytes("VmRSS")


def _process_bytes(entry: str) -> int:
    """An entry of Linux's status of this process, kept there in KiB."""
    _check_linux()
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{entry}:"):
            return int(line.split()[1]) * 1024
    raise ValueError(f"expected {entry} in /proc/self/status, got none; measure on another Linux")


def _check_linux() -> None:
    if sys.platform != "linux":
        raise ValueError(
            f"expected Linux for the memory of a process, got {sys.platform}; measure on Linux, or "
            "on a GPU"
        )


# What the machine can do --------------------------------------------------------------------------


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second of a large copy, read and written ones together."""
    source = torch.empty(COPY_BYTES[device.type], dtype=torch.uint8, device=device).fill_(1)
    target = torch.empty_like(source)
    return 2 * source.numel() / _fastest(lambda: target.copy_(source), device)


def matrix_rate(device: torch.device, dtype: torch.dtype) -> float:
    """Operations per second of a large matrix product, by the library that our products use."""
    side = MATRIX_SIDES[device.type]
    left, right = (torch.randn(side, side, device=device, dtype=dtype) for _ in range(2))
    packed = pack(right)
    return 2 * side**3 / _fastest(lambda: product(left, packed), device)


def _fastest(run: Callable[[], Tensor], device: torch.device) -> float:
    """Seconds of the fastest run within `PROBE_SECONDS` and of at least three, after one more."""
    run()
    seconds: list[float] = []
    while len(seconds) < 3 or sum(seconds) < PROBE_SECONDS:
        synchronise(device)
        started = time.perf_counter()
        run()
        synchronise(device)
        seconds.append(time.perf_counter() - started)
    return min(seconds)
