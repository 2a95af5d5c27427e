"""Decoding steps captured as CUDA graphs: hundreds of launches become one."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor

Step = Callable[[int], Tensor]
Replay = Callable[[], None]
Capture = Callable[[Callable[[], Tensor]], tuple[Replay, Tensor]]


class CapturedSteps:
    """One graph for each length that attention reads; they share one pool of memory.

    Args:
        step: Gives logits when it is told the length; run twice, it gives the same twice.
        strict: Raise an error where a capture fails, do not go on without.
        capture: Captures a step.
    """

    def __init__(self, step: Step, *, strict: bool, capture: Capture | None = None) -> None:
        self.step, self.strict = step, strict
        self.capture = capture or GraphCapture()
        self.graphs: dict[int, tuple[Replay, Tensor]] = {}
        self.failed = False

    def __call__(self, length: int) -> Tensor:
        """The step's logits; the caller's own, whatever is replayed later."""
        if length not in self.graphs and not self.failed:
            self._capture(length)
        if self.failed:
            return self.step(length)
        replay, logits = self.graphs[length]
        replay()
        return logits.clone()

    def _capture(self, length: int) -> None:
        try:
            if not self.graphs:
                self.step(length)  # libraries make their handles outside of any capture
            self.graphs[length] = self.capture(lambda: self.step(length))
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if self.strict:
                raise ValueError(
                    f"expected to capture a decoding step of {length} positions, got: {reason}; "
                    "set decoding.path to fused, or decoding.strict to false"
                ) from error
            self.failed = True
            warnings.warn(
                f"a decoding step could not be captured as a CUDA graph ({reason}); its operations "
                "are launched one by one, about 20 ms per token of a batch below 64 images "
                "(estimate). Set decoding.path to fused to draw like this without a try",
                stacklevel=2,
            )


class GraphCapture:
    """Records steps without running them, in one pool of memory.

    They may share it because only one runs at a time, and its result is copied before the next.
    """

    def __init__(self) -> None:
        self.pool = torch.cuda.graph_pool_handle()

    def __call__(self, step: Callable[[], Tensor]) -> tuple[Replay, Tensor]:
        """What replays a step, and where its result will stand."""
        graph = torch.cuda.CUDAGraph()
        # Other threads, such as those that load data, may go on using the device meanwhile.
        with torch.cuda.graph(graph, pool=self.pool, capture_error_mode="thread_local"):
            result = step()
        return graph.replay, result
