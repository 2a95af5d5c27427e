"""Capturing without a GPU: stand-ins for what torch captures with, which note their calls."""

import gc
import warnings
import weakref

import pytest
import torch

from cotgen_pl.decoding.graphs import GraphCapture, StepRecorder, step_recorder

INVALID = "operation failed due to a previous error during capture"


class Recorder:
    """Captures by noting lengths: one result per graph, overwritten by each replay."""

    def __init__(self):
        self.captures = []

    def __call__(self, step, lengths):
        return {length: self.graph(step, length) for length in lengths}

    def graph(self, step, length):
        self.captures.append(length)
        result = step(length)
        return lambda: result.copy_(step(length)), result


def refuse(step, lengths):
    raise RuntimeError("operation not permitted when stream is capturing\nmore")


class Steps:
    """Counts what is launched."""

    def __init__(self):
        self.lengths = []

    def __call__(self, length):
        self.lengths.append(length)
        return torch.tensor([length, len(self.lengths)]).float()


def test_each_length_is_captured_before_the_first_step_and_replayed():
    recorder = Recorder()
    run = StepRecorder(recorder).record(Steps(), (128, 256), strict=True)
    assert recorder.captures == [128, 256]
    assert [run(length)[0].item() for length in (128, 128, 256, 128)] == [128, 128, 256, 128]
    assert recorder.captures == [128, 256]


def test_results_outlive_the_next_replay():
    run = StepRecorder(Recorder()).record(Steps(), (128,), strict=True)
    first = run(128)
    kept = first.clone()
    run(128)
    assert torch.equal(first, kept)


def test_a_failed_capture_warns_once_and_no_batch_tries_again():
    tried = []

    def capture(step, lengths):
        tried.append(lengths)
        refuse(step, lengths)

    recorder = StepRecorder(capture)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for _ in range(3):
            run = recorder.record(Steps(), (128, 256), strict=False)
            assert [run(length)[0].item() for length in (128, 128, 256)] == [128, 128, 256]
    [warning] = [str(each.message) for each in seen]
    assert "not permitted when stream is capturing)" in warning
    assert "20 ms per token" in warning
    assert tried == [(128, 256)]


def test_a_failed_capture_is_an_error_if_strict():
    recorder = StepRecorder(refuse)
    message = r"expected to capture .* \[128, 256\] positions, got: operation"
    with pytest.raises(ValueError, match=message):
        recorder.record(Steps(), (128, 256), strict=True)
    with pytest.warns(UserWarning, match="could not be captured"):
        recorder.record(Steps(), (128,), strict=False)
    with pytest.raises(ValueError, match="got: operation"):
        recorder.record(Steps(), (128,), strict=True)


def test_an_error_of_the_step_itself_is_not_hidden():
    def broken(length):
        raise ValueError("a bug")

    with pytest.raises(ValueError, match="a bug"):
        StepRecorder(Recorder()).record(broken, (128,), strict=False)


@pytest.mark.parametrize("strict", [False, True])
def test_a_lack_of_memory_is_no_failure_of_captures(strict):
    def full(step, lengths):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 MiB")

    recorder = StepRecorder(full)
    with warnings.catch_warnings(), pytest.raises(torch.OutOfMemoryError, match="2 MiB"):
        warnings.simplefilter("error")
        recorder.record(Steps(), (128,), strict=strict)
    assert not recorder.failed


def test_there_are_no_graphs_on_a_cpu():
    assert step_recorder(torch.device("cpu")) is None


class Stream:
    """A stream; `main` is the one that was current before."""

    def __init__(self, device, where, name="side"):
        self.cuda, self.device, self.name = device, where, name

    def wait_stream(self, other):
        self.cuda.calls.append(f"{self.name} waits for {other.name}")


class Within:
    def __init__(self, stream):
        self.stream = stream

    def __enter__(self):
        self.stream.cuda.current = self.stream.name

    def __exit__(self, *error):
        self.stream.cuda.current = "main"


class Graph:
    def __init__(self, device):
        self.device = device
        device.graphs.add(self)

    def capture_begin(self, pool, capture_error_mode):
        device = self.device
        device.calls.append(f"begin in {pool} on {device.current} {capture_error_mode}")
        device.capturing = True

    def capture_end(self):
        self.device.calls.append("end")
        self.device.capturing = False
        if self.device.invalid:
            raise RuntimeError(INVALID)

    def replay(self):
        self.device.calls.append("replay")

    def reset(self):
        self.device.calls.append("reset")


def unwanted(*arguments):
    raise AssertionError("waits for the device, on which another thread computes")


class Device:
    """What torch.cuda is to `GraphCapture`; `calls` has what it was asked for, in order."""

    def __init__(self):
        self.calls, self.current, self.pools = [], "main", 0
        self.invalid = self.capturing = False
        self.graphs = weakref.WeakSet()

    def graph_pool_handle(self):
        self.pools += 1
        return 0, self.pools

    def leave_pool(self, index, pool):
        self.calls.append(f"pool {pool} of GPU {index} is left")

    def replacements(self):
        """By the names that torch.cuda has for them."""
        return {
            "Stream": lambda where: Stream(self, where),
            "CUDAGraph": lambda: Graph(self),
            "stream": Within,
            "current_stream": lambda where: Stream(self, where, "main"),
            "graph_pool_handle": self.graph_pool_handle,
            "empty_cache": lambda: self.calls.append("give unused memory back"),
            "synchronize": unwanted,
            "graph": unwanted,
        }

    def step(self, length):
        self.calls.append(f"{'record' if self.capturing else 'run'} {length}")
        return torch.zeros(1)


@pytest.fixture
def device(monkeypatch):
    device = Device()
    for name, value in device.replacements().items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    name = "torch._C._cuda_endAllocateToPool"  # torch for a CPU does not have it
    monkeypatch.setattr(name, device.leave_pool, raising=False)
    return device


@pytest.fixture
def capture(device):
    return GraphCapture(torch.device("cuda", 1))


def test_captures_follow_each_other_on_a_stream_of_their_own(device, capture):
    graphs = capture(device.step, (128, 256))
    begin = "begin in (0, 1) on side thread_local"
    assert device.calls == [
        "side waits for main",
        *("run 128", begin, "record 128", "end"),
        *("run 256", begin, "record 256", "end"),
        "main waits for side",
    ]
    assert list(graphs) == [128, 256] and device.current == "main"


def test_a_pool_outlives_the_graphs_of_a_batch(device, capture):
    for _ in range(20):
        graphs = capture(device.step, (128, 256))
        del graphs
        gc.collect()
        assert len(device.graphs) == 1
    assert device.pools == 1


@pytest.mark.parametrize("when", ["begin", "record", "end"])
def test_a_failed_capture_leaves_the_device_as_it_was(device, capture, when, monkeypatch):
    device.invalid = True

    def fail(*arguments, **named):
        raise RuntimeError("forced")

    if when == "begin":
        monkeypatch.setattr(Graph, "capture_begin", fail)

    def step(length):
        device.step(length)
        if device.capturing and when == "record":
            fail()
        return torch.zeros(1)

    with pytest.raises(RuntimeError, match=INVALID if when == "end" else "forced"):
        capture(step, (128, 256))
    left = ["end", "reset", "pool (0, 1) of GPU 1 is left", "main waits for side"]
    assert device.calls[-4:] == left
    assert device.calls.count("end") == 1 and device.current == "main" and not device.capturing


def test_what_torch_cleans_up_itself_is_left_to_it(device, capture, monkeypatch):
    def ended(index, pool):
        raise RuntimeError("endAllocatePool: not currently recording to mempool_id")

    monkeypatch.setattr("torch._C._cuda_endAllocateToPool", ended)
    device.invalid = True
    with pytest.raises(RuntimeError, match=INVALID):
        capture(device.step, (128,))


def out_of_memory_at(device, failures):
    """A step that finds no room so many times while it is captured at 256 positions."""
    left = [failures]

    def step(length):
        if device.capturing and length == 256 and left[0]:
            left[0] -= 1
            raise torch.OutOfMemoryError("CUDA out of memory")
        return device.step(length)

    return step


def test_a_capture_that_finds_no_room_is_tried_again_with_unused_memory_given_back(device, capture):
    graphs = capture(out_of_memory_at(device, 1), (128, 256))
    assert list(graphs) == [128, 256]
    assert device.calls.count("give unused memory back") == 1
    assert device.calls[-3:] == ["record 256", "end", "main waits for side"]
    # What was captured before the failure has gone, and a pool goes with its last graph.
    assert "begin in (0, 2) on side thread_local" in device.calls


def test_a_second_lack_of_memory_is_told(device, capture):
    with pytest.raises(torch.OutOfMemoryError):
        capture(out_of_memory_at(device, 2), (128, 256))
    assert device.current == "main" and not device.capturing


def test_unused_memory_stays_where_nothing_fails(device, capture):
    capture(device.step, (128,))
    assert "give unused memory back" not in device.calls


def test_all_that_draws_on_a_device_has_one_recorder(device):
    step_recorder.cache_clear()
    first = step_recorder(torch.device("cuda", 0))
    assert step_recorder(torch.device("cuda", 0)) is first
    assert step_recorder(torch.device("cuda", 1)) is not first
    step_recorder.cache_clear()
