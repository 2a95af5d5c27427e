"""Asking a reward: ready and frozen, in full precision, with the time that it took.

About all pictures of a rollout at its end, or about each part while the next one is drawn.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import contextmanager
from functools import cache

import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores, check_scores, freeze


@torch.no_grad()
def ask(reward: Reward, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
    """A reward's verdict outside of autocast, with `seconds` until its last kernel.

    Args:
        reward: Loaded and moved to the pictures where that is still to be done.
        images: [B, 3, H, W] in [0, 1].
        prompts: B, each image's own.
    """
    freeze(reward.load()).to(images.device)
    started = time.perf_counter()
    with torch.autocast(images.device.type, enabled=False):
        scores: Scores = reward.score(images, prompts)
    if images.is_cuda:
        # Not for the whole device: that is an error while another thread captures a CUDA graph.
        torch.cuda.current_stream(images.device).synchronize()
    if isinstance(scores, Scores) and not scores.seconds:  # an ensemble has told its members'
        scores.seconds = {reward.name: time.perf_counter() - started}
    return scores


def ask_each(
    rewards: Mapping[str, Reward], images: Tensor, prompts: Sequence[Prompt]
) -> dict[str, Scores]:
    """The verdict of each reward, by its name; one under several names is asked once."""
    verdicts: dict[int, Scores] = {}
    for reward in rewards.values():
        if id(reward) not in verdicts:
            scores = ask(reward, images, prompts)
            check_scores(scores, len(images), reward.name, most_missing=None)
            verdicts[id(reward)] = scores
    return {name: verdicts[id(reward)] for name, reward in rewards.items()}


class Questions:
    """Pictures of a rollout, put one part after another, and the verdict on all of them.

    Args:
        reward: Is asked about parts in their order, never about two at a time.
        pool: Has one thread, which asks about a part as soon as it is put; without one, the reward
            is asked about all parts at once, at the end.
    """

    def __init__(self, reward: Reward, pool: Executor | None) -> None:
        self.reward, self.pool = reward, pool
        self.images: list[Tensor] = []
        self.prompts: list[Prompt] = []
        self.answers: list[Future[Scores]] = []

    def put(self, images: Tensor, prompts: Sequence[Prompt]) -> None:
        """Add a part: [b, 3, H, W] in [0, 1], and each image's own prompt.

        What went wrong with a part before is raised here.
        """
        if self.pool is not None:
            for answer in self.answers:
                if answer.done():
                    answer.result()
            drawn = None
            if images.is_cuda:
                drawn = torch.cuda.current_stream(images.device).record_event()
            question = self.reward, images, prompts, drawn
            self.answers.append(self.pool.submit(_ask_in_thread, *question))
            return
        self.images.append(images)
        self.prompts.extend(prompts)

    def scores(self) -> Scores:
        """The verdict on all parts; waits for it."""
        if self.pool is None:
            return ask(self.reward, torch.cat(self.images), self.prompts)
        answers = [answer.result() for answer in self.answers]
        for answer in answers:
            _take_over(answer)
        joined = Scores.join(answers)
        for answer in answers:
            for name, seconds in answer.seconds.items():
                joined.seconds[name] = joined.seconds.get(name, 0.0) + seconds
        return joined


@contextmanager
def questions(reward: Reward, *, while_drawing: bool) -> Iterator[Questions]:
    """To be put to a reward: at the end, or part by part while pictures are drawn.

    Asked part by part, a reward that computes where pictures are drawn gains nothing, and rounds
    otherwise than over the whole batch.
    """
    if not while_drawing:
        yield Questions(reward, None)
        return
    pool = ThreadPoolExecutor(1)
    try:
        yield Questions(reward, pool)
    finally:
        pool.shutdown(cancel_futures=True)


def _ask_in_thread(
    reward: Reward, images: Tensor, prompts: Sequence[Prompt], drawn: torch.cuda.Event | None
) -> Scores:
    with _stream_of_rewards(images, drawn):
        scores = ask(reward, images, prompts)
        check_scores(scores, len(images), reward.name, most_missing=None)  # of all parts, later
    return scores


@contextmanager
def _stream_of_rewards(images: Tensor, drawn: torch.cuda.Event | None) -> Iterator[None]:
    """Compute beside the thread that draws, once pictures are there; nothing on a CPU.

    Neither of the two waits for the other: the default stream would, and a stream that is being
    captured as a CUDA graph must not see what this thread does.
    """
    if drawn is None:
        yield
        return
    # A thread begins with the first GPU as its own, whichever its process uses.
    with torch.cuda.device(images.device):
        stream = _reward_stream(images.device)
        stream.wait_event(drawn)
        images.record_stream(stream)
        with torch.cuda.stream(stream):
            yield


@cache
def _reward_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all rollouts, as memory and libraries' workspaces are kept for each stream.

    Torch has 32 streams, and a 33rd is the first again: made anew, one would soon be the stream
    that graphs are captured on.
    """
    return torch.cuda.Stream(device)


def _take_over(scores: Scores) -> None:
    """Let scores that were computed in the reward's thread be used, and freed, in this one."""
    for values in (scores.total, *scores.parts.values()):
        if values.is_cuda:
            values.record_stream(torch.cuda.current_stream(values.device))
