"""Asking a reward: loaded, frozen, in full precision, timed."""

import threading
import time
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.scoring import _ask_in_thread, _reward_stream, ask, questions

IMAGES = torch.full((2, 3, 4, 4), 0.3)
PROMPTS = [Prompt("a"), Prompt("b")]


class Slow(Reward):
    """A linear layer, which takes its time and notes how it was asked."""

    name = "slow"

    def __init__(self, pause: float = 0.0, loading: float = 0.0) -> None:
        super().__init__()
        self.pause, self.loading, self.loads = pause, loading, 0
        self.layer = nn.Linear(3, 1)
        self.told: dict[str, float] = {}

    def load(self):
        time.sleep(self.loading)
        self.loads += 1
        return self

    def score(self, images, prompts):
        time.sleep(self.pause)
        self.autocast = torch.is_autocast_enabled("cpu")
        scores = Scores.single(self.name, self.layer(images.mean(dim=(2, 3))).squeeze(-1))
        scores.seconds = dict(self.told)
        return scores


def test_the_reward_is_loaded_and_frozen():
    reward = Slow()
    total = ask(reward, IMAGES, PROMPTS).total
    assert reward.loads == 1 and not reward.training
    assert not any(parameter.requires_grad for parameter in reward.parameters())
    assert not total.requires_grad and total.shape == (2,)


def test_gradients_are_on_again_afterwards():
    ask(Slow(), IMAGES, PROMPTS)
    assert torch.is_grad_enabled()


def test_autocast_does_not_reach_the_reward():
    reward = Slow()
    full = ask(reward, IMAGES, PROMPTS).total
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ask(reward, IMAGES, PROMPTS).total, full)
        assert torch.is_autocast_enabled("cpu")
    assert reward.autocast is False


def test_seconds_are_those_of_scoring_without_loading():
    reward = Slow(pause=0.05, loading=0.3)
    seconds = ask(reward, IMAGES, PROMPTS).seconds
    assert list(seconds) == ["slow"] and 0.05 <= seconds["slow"] < 0.3


def test_seconds_that_a_reward_tells_itself_stay():
    reward = Slow()
    reward.told = {"a": 1.5, "b": 2.5}
    assert ask(reward, IMAGES, PROMPTS).seconds == {"a": 1.5, "b": 2.5}


@pytest.mark.parametrize("answer", [None, torch.zeros(2)])
def test_an_answer_that_is_no_scores_is_left_to_the_check(answer, monkeypatch):
    reward = Slow()
    monkeypatch.setattr(reward, "score", lambda images, prompts: answer)
    assert ask(reward, IMAGES, PROMPTS) is answer


@pytest.mark.parametrize("while_drawing", [True, False])
def test_questions_about_parts_are_answered_in_their_order(while_drawing):
    reward = Slow(pause=0.02)
    images = torch.rand(6, 3, 4, 4, generator=torch.Generator().manual_seed(0))
    prompts = [Prompt(text) for text in "abcdef"]
    expected = ask(reward, images, prompts)
    with questions(reward, while_drawing=while_drawing) as asked:
        for start in (0, 2, 4):
            asked.put(images[start : start + 2], prompts[start : start + 2])
        scores = asked.scores()
    torch.testing.assert_close(scores.total, expected.total)
    times_asked = 3 if while_drawing else 1
    assert list(scores.seconds) == ["slow"] and scores.seconds["slow"] >= 0.02 * times_asked


def test_a_wrong_answer_about_a_part_is_named(monkeypatch):
    reward = Slow()
    monkeypatch.setattr(reward, "score", lambda images, prompts: torch.zeros(2))
    with questions(reward, while_drawing=True) as asked:
        asked.put(IMAGES, PROMPTS)
        with pytest.raises((TypeError, ValueError), match="slow"):
            asked.scores()


def test_a_part_without_a_verdict_is_for_the_whole_to_judge(monkeypatch):
    reward = Slow()
    values = iter([0.5, float("nan")])
    monkeypatch.setattr(
        reward,
        "score",
        lambda images, prompts: Scores.single("slow", torch.full((2,), next(values))),
    )
    with questions(reward, while_drawing=True) as asked:
        for _ in range(2):
            asked.put(IMAGES, PROMPTS)
        total = asked.scores().total
    assert total.isnan().tolist() == [False, False, True, True]


def test_a_failure_is_told_with_the_next_part(monkeypatch):
    reward = Slow()

    def fail(images, prompts):
        raise ValueError("the server is gone")

    monkeypatch.setattr(reward, "score", fail)
    with (
        pytest.raises(ValueError, match="the server is gone"),
        questions(reward, while_drawing=True) as asked,
    ):
        asked.put(IMAGES, PROMPTS)
        time.sleep(0.3)
        asked.put(IMAGES, PROMPTS)
        pytest.fail("went on drawing")


def test_seconds_of_nothing_are_kept(monkeypatch):
    reward = Slow()
    reward.told = {"cached": 0.0}
    with questions(reward, while_drawing=True) as asked:
        asked.put(IMAGES, PROMPTS)
        assert asked.scores().seconds == {"cached": 0.0}


def test_what_nobody_waits_for_is_not_asked(monkeypatch):
    reward, started = Slow(), []

    def score(images, prompts):
        started.append(len(images))
        time.sleep(0.2)
        return Scores.single("slow", torch.zeros(len(images)))

    monkeypatch.setattr(reward, "score", score)
    failing = pytest.raises(RuntimeError, match="out of memory")
    with failing, questions(reward, while_drawing=True) as asked:
        for _ in range(5):
            asked.put(IMAGES, PROMPTS)
        raise RuntimeError("out of memory")
    assert len(started) <= 1


def test_verdicts_with_other_parts_are_not_joined():
    parts = Scores.single("one", torch.zeros(1)), Scores.single("other", torch.zeros(1))
    with pytest.raises(ValueError, match=r"the same parts .* got \['one'\] and \['other'\]"):
        Scores.join(parts)


class Gpu:
    """What torch.cuda is to scoring; `calls` has what each thread asked it for, in order."""

    def __init__(self):
        self.calls, self.current = [], {}

    def note(self, call):
        drawing = threading.current_thread() is threading.main_thread()
        self.calls.append(f"{'main' if drawing else 'reward'}: {call}")

    def stream(self, name):
        return SimpleNamespace(
            name=name,
            record_event=lambda: self.note(f"event on {name}") or f"event of {name}",
            wait_event=lambda event: self.note(f"{name} waits for {event}"),
            synchronize=lambda: self.note(f"wait for {name}"),
        )

    def current_stream(self, device):
        return self.stream(self.current.get(threading.get_ident(), "default"))

    @contextmanager
    def within(self, stream):
        self.current[threading.get_ident()] = stream.name
        yield
        del self.current[threading.get_ident()]

    @contextmanager
    def on_device(self, device):
        self.note(f"on {device}")
        yield

    def whole(self, *arguments):
        raise AssertionError("waits for the device, where another thread may be capturing")

    def replacements(self):
        """By the names that torch.cuda has for them."""
        return {
            "Stream": lambda device: self.note("new stream") or self.stream("own"),
            "stream": self.within,
            "device": self.on_device,
            "current_stream": self.current_stream,
            "synchronize": self.whole,
        }


class OnGpu:
    """Pictures, or scores of them, that only say that they are on a GPU."""

    is_cuda, device, shape = True, torch.device("cuda", 1), (2,)

    def __init__(self, gpu, name):
        self.gpu, self.name = gpu, name

    def __len__(self):
        return 2

    def record_stream(self, stream):
        self.gpu.note(f"{self.name} used on {stream.name}")


@pytest.fixture
def gpu(monkeypatch):
    gpu = Gpu()
    for name, value in gpu.replacements().items():
        monkeypatch.setattr(f"torch.cuda.{name}", value)
    _reward_stream.cache_clear()
    yield gpu
    _reward_stream.cache_clear()


@pytest.fixture
def reward_on_gpu(gpu, monkeypatch):
    reward = Slow()
    monkeypatch.setattr(reward, "to", lambda device: reward)

    def score(images, prompts):
        gpu.note(f"score on {gpu.current_stream(None).name}")
        return Scores.single("slow", torch.zeros(2))

    monkeypatch.setattr(reward, "score", score)
    return reward


def test_a_reward_asked_while_drawing_computes_on_a_stream_of_its_own(gpu, reward_on_gpu):
    with questions(reward_on_gpu, while_drawing=True) as asked:
        asked.put(OnGpu(gpu, "pictures"), PROMPTS)
        asked.scores()
    assert gpu.calls == [
        "main: event on default",
        "reward: on cuda:1",
        "reward: new stream",
        "reward: own waits for event of default",
        "reward: pictures used on own",
        "reward: score on own",
        "reward: wait for own",
    ]


def test_all_rollouts_have_the_same_stream_of_rewards(gpu, reward_on_gpu):
    for _ in range(3):
        with questions(reward_on_gpu, while_drawing=True) as asked:
            asked.put(OnGpu(gpu, "pictures"), PROMPTS)
            asked.scores()
    assert gpu.calls.count("reward: new stream") == 1
    assert gpu.calls.count("reward: own waits for event of default") == 3


def test_a_reward_asked_at_the_end_is_waited_for_on_the_current_stream(gpu, reward_on_gpu):
    ask(reward_on_gpu, OnGpu(gpu, "pictures"), PROMPTS)
    assert gpu.calls == ["main: score on default", "main: wait for default"]


def test_scores_of_the_other_stream_are_used_before_they_are_freed(gpu, reward_on_gpu, monkeypatch):
    scores = Scores(OnGpu(gpu, "total"), {"slow": OnGpu(gpu, "part")}, {"slow": 1.0})
    monkeypatch.setattr(reward_on_gpu, "score", lambda images, prompts: scores)
    monkeypatch.setattr("cotgen_pl.scoring.check_scores", lambda *given, **named: None)
    monkeypatch.setattr(Scores, "join", lambda answers: gpu.note("join") or answers[0])
    with questions(reward_on_gpu, while_drawing=True) as asked:
        asked.put(OnGpu(gpu, "pictures"), PROMPTS)
        asked.scores()
    assert gpu.calls[-3:] == [
        "main: total used on default",
        "main: part used on default",
        "main: join",
    ]


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_reward_answers_while_a_graph_is_captured():
    reward, images = Slow(), IMAGES.cuda()
    expected = ask(reward, images, PROMPTS).total
    graph, side = torch.cuda.CUDAGraph(), torch.cuda.Stream()
    with questions(reward, while_drawing=True) as asked, torch.cuda.stream(side):
        side.wait_stream(torch.cuda.default_stream())
        asked.put(images, PROMPTS)  # once, for what torch makes when it is first used
        asked.scores()
        asked.answers.clear()
        event = side.record_event()
        graph.capture_begin(capture_error_mode="thread_local")
        try:
            sums = images.sum()
            reward.pause = 0.1
            question = asked.pool.submit(_ask_in_thread, reward, images, PROMPTS, event)
            scores = question.result(timeout=60)
        finally:
            graph.capture_end()
        graph.replay()
    side.synchronize()
    torch.testing.assert_close(scores.total, expected)
    torch.testing.assert_close(sums, images.sum())
