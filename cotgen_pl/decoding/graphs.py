"""Decoding steps captured as CUDA graphs: hundreds of launches become one."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import cache

import torch
from torch import Tensor

Step = Callable[[int], Tensor]
Replay = Callable[[], None]
Graphs = dict[int, tuple[Replay, Tensor]]
Capture = Callable[[Step, Sequence[int]], Graphs]


class CapturedSteps:
    """The steps of one batch.

    Args:
        graphs: For each length that attention reads, what replays the step, and where its logits
            stand afterwards.
    """

    def __init__(self, graphs: Graphs) -> None:
        self.graphs = graphs

    def __call__(self, length: int) -> Tensor:
        """The step's logits; the caller's own, whatever is replayed later."""
        replay, logits = self.graphs[length]
        replay()
        return logits.clone()


class StepRecorder:
    """Captures the steps of batch after batch; after a failure it tries no more.

    Args:
        capture: Captures a step at each of some lengths.
    """

    def __init__(self, capture: Capture) -> None:
        self.capture, self.failed = capture, False

    def record(self, step: Step, lengths: Sequence[int], *, strict: bool) -> Step:
        """A batch's steps as graphs, or the step as it is where they cannot be captured.

        Args:
            step: Gives logits when it is told the length; run twice, it gives the same twice. It is
                run here, once for each length.
            lengths: All that the batch will ask for.
            strict: Raise a ValueError where a capture fails, do not go on without.

        Raises:
            torch.OutOfMemoryError: There is no room for what a step computes.
        """
        if self.failed and not strict:
            return step
        try:
            return CapturedSteps(self.capture(step, lengths))
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            reason = (str(error) or type(error).__name__).splitlines()[0]
            if strict:
                raise ValueError(
                    f"expected to capture decoding steps of {list(lengths)} positions, got: "
                    f"{reason}; set decoding.path to fused, or decoding.strict to false"
                ) from error
        self.failed = True
        warnings.warn(
            f"decoding steps could not be captured as CUDA graphs ({reason}); from here on their "
            "operations are launched one by one, about 20 ms per token of a batch below 64 images "
            "(estimate). Set decoding.path to fused to draw like this without a try",
            stacklevel=2,
        )
        return step


@cache
def step_recorder(device: torch.device) -> StepRecorder | None:
    """What captures all batches on a device, or None where there are no graphs."""
    return StepRecorder(GraphCapture(device)) if device.type == "cuda" else None


class GraphCapture:
    """Records steps without running them, on a stream and in a pool of memory of its own.

    Graphs may share the pool because only one runs at a time, and its result is copied before the
    next. Stream and pool are those of all batches: what torch keeps for each, a later one finds.

    `torch.cuda.graph` would wait for the device and give all unused memory back before each
    capture, and leave its stream the current one after a failure.

    Args:
        device: A GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.device, self.stream = device, torch.cuda.Stream(device)
        self.pool = torch.cuda.graph_pool_handle()
        self.kept: torch.cuda.CUDAGraph | None = None  # a pool lives as long as a graph in it
        self.broken: torch.cuda.CUDAGraph | None = None  # torch may go on pointing to it

    def __call__(self, step: Step, lengths: Sequence[int]) -> Graphs:
        """See `Graphs`; the step has run once for each length before the current stream goes on."""
        with suppress(torch.OutOfMemoryError):
            return self._capture_all(step, lengths)
        # Elsewhere the allocator does this itself; within a capture it cannot.
        torch.cuda.empty_cache()
        return self._capture_all(step, lengths)

    def _capture_all(self, step: Step, lengths: Sequence[int]) -> Graphs:
        outer = torch.cuda.current_stream(self.device)
        self.stream.wait_stream(outer)
        try:
            with torch.cuda.stream(self.stream):
                return {length: self._capture(step, length) for length in lengths}
        except BaseException:
            # A pool whose last graph has gone cannot be captured into again.
            self.pool, self.kept = torch.cuda.graph_pool_handle(), None
            raise
        finally:
            outer.wait_stream(self.stream)

    def _capture(self, step: Step, length: int) -> tuple[Replay, Tensor]:
        step(length)  # libraries make their handles and plans outside of any capture
        graph = torch.cuda.CUDAGraph()
        try:
            # Other threads, such as those that load data, may go on using the device meanwhile.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")
            result = step(length)
        except BaseException:
            with suppress(RuntimeError):  # that the capture is invalid, which is known
                graph.capture_end()
            self._clean_up(graph)
            raise
        try:
            graph.capture_end()
        except BaseException:
            self._clean_up(graph)
            raise
        self.kept = graph
        return graph.replay, result

    def _clean_up(self, graph: torch.cuda.CUDAGraph) -> None:
        """Free the allocator of a capture that failed.

        Torch 2.11 lets it believe that the capture goes on (github.com/pytorch/pytorch, pull
        request 180395): it would never again make room by giving unused memory back.
        """
        self.broken = graph
        graph.reset()
        with suppress(RuntimeError):  # that nothing goes on, as from torch 2.12
            torch._C._cuda_endAllocateToPool(self.stream.device.index, self.pool)
