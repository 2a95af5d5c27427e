"""`micro_batch_size: auto`, and the refusal of a run, or of drawing, that has no room on its GPU.

What modules that learn in micro-batches share; the formulas are `cotgen_pl.planning.work`'s.
"""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Reward, check_positive, freeze
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.planning.footprint import PlannedPolicy, read_sizes
from cotgen_pl.planning.work import (
    CPU_SHARE,
    GPU_SHARE,
    OptimizerMemory,
    PlannedWork,
    check_room,
    images_at_once,
    largest_micro_batch,
    memory,
    try_optimizer,
)

MicroBatchSize = int | Literal["auto"] | None
CONTAINER_LIMIT = Path("/sys/fs/cgroup/memory.max")  # a number, or the word max


class MicroBatchModule(PolicyModule):
    """A module that learns in micro-batches, whose size it may have to find.

    The size is decided once, before the policy's weights load, from its sizes and the device's
    total memory; it goes into checkpoints, and a resumed run goes on with it on any machine that
    has room for it.
    """

    images_each = 1
    """Images in one unit of a micro-batch: 2 where it is counted in pairs."""

    def take_micro_batch_size(self, size: MicroBatchSize) -> None:
        """Keep a number, None for all at once, or `auto`."""
        self.finds_micro_batch = size == "auto"
        self.micro_batch_size: int | None = None if isinstance(size, str) else size
        if isinstance(size, str) and not self.finds_micro_batch:
            raise ValueError(
                f"expected micro_batch_size to be a number, auto or null, got {size!r}; null is a "
                "whole update at once"
            )
        check_positive(micro_batch_size=self.micro_batch_size)

    @abstractmethod
    def planned_work(
        self, policy: PlannedPolicy, processes: int, **around: Any
    ) -> PlannedWork | None:
        """What this module's settings ask of each process, or None where they do not say it."""

    # Deciding -----------------------------------------------------------------------------------

    def configure_model(self) -> None:
        """Read the reward's weights, see that all has room, then read the policy's."""
        reward = getattr(self, "reward", None)
        if reward is not None:
            freeze(reward.load())  # first: what cannot be found is found out before the long wait
        if self._trainer is not None and self.trainer.state.fn == "fit":
            self._fit_into_memory(reward)
        elif self._trainer is not None:
            self._check_drawing(reward)
        super().configure_model()

    def _fit_into_memory(self, reward: Reward | None) -> None:
        device: torch.device = self.trainer.strategy.root_device
        wanted = self.finds_micro_batch and self.micro_batch_size is None
        if not wanted and device.type != "cuda":
            return  # what other programs leave of a machine's memory is not known
        policy = self._planned_policy()
        work = self._work(policy, reward) if policy else None
        if policy is None or work is None:
            if wanted:
                raise ValueError(
                    "expected a JanusPolicy, and under DPO PairData, beside micro_batch_size: "
                    f"auto, got {type(self.policy).__name__} and sizes that are not known; set a "
                    "number"
                )
        elif wanted:
            self.micro_batch_size = self._find(policy, work, total_memory(device), device)
        else:
            check_room(memory(policy, work), total_memory(device))

    def _check_drawing(self, reward: Reward | None) -> None:
        """Refuse what `validate` or `predict` draws at once where a GPU has no room for it."""
        device: torch.device = self.trainer.strategy.root_device
        callbacks = images_at_once(self.trainer.callbacks)  # type: ignore[attr-defined]
        images = self.pictures_at_once or callbacks["evaluated"]
        policy = self._planned_policy() if device.type == "cuda" and images else None
        if policy is None:
            return
        planned = memory(policy, self._drawing_work(policy, images, reward))
        check_room(
            {phase: planned[phase] for phase in ("rollout", "reward")},
            total_memory(device),
            f"draw fewer than {images} pictures at once: batch_size of the callback that draws",
        )

    def _drawing_work(
        self, policy: PlannedPolicy, images: int, reward: Reward | None
    ) -> PlannedWork:
        """What drawing without training asks of each process."""
        return PlannedWork(
            drawn=images,
            draws=1,
            learnt=0,
            micro_batch=0,
            guided=self.guidance != 1,
            logprobs="conditional",
            twin=self.needs_reference and not policy.lora_rank,
            replays=0,
            optimizer=OptimizerMemory(0.0, 0.0),
            reward=held_bytes(reward),
            reward_stays=not getattr(reward, "offload", False),
            processes=self.trainer.world_size if self.sharding else 1,  # without gradients to join
            gather="rollout" if self.sharding else None,  # callbacks gather all they draw with
        )

    def _planned_policy(self) -> PlannedPolicy | None:
        config = getattr(self.policy, "config", None)
        if getattr(config, "model_type", None) != "janus":
            return None
        device = self.trainer.strategy.root_device.type
        sizes, precision = read_sizes(config), str(self.trainer.precision)
        return PlannedPolicy.read(sizes, self.policy, precision, device)

    def _work(self, policy: PlannedPolicy, reward: Reward | None) -> PlannedWork | None:
        return self.planned_work(
            policy,
            self.trainer.world_size,
            optimizer=try_optimizer(self.optimizer, policy.trained_dtype),
            reward=held_bytes(reward),
            gather=self.sharding.gather if self.sharding else None,
            reward_stays=not getattr(reward, "offload", False),
            **images_at_once(self.trainer.callbacks),  # type: ignore[attr-defined]
        )

    def _find(
        self, policy: PlannedPolicy, work: PlannedWork, total: float, device: torch.device
    ) -> int:
        """The smallest of all processes' sizes."""
        room = self._own_share(total, device) * (GPU_SHARE if device.type == "cuda" else CPU_SHARE)
        size = largest_micro_batch(policy, work, room, self.images_each)
        return int(self.gather(torch.tensor([size], device=device)).min())

    def _own_share(self, total: float, device: torch.device) -> float:
        """A GPU's memory, or this process's part of the one memory of all on its machine."""
        if device.type == "cuda":
            return total
        return total / (self.trainer.world_size / self.trainer.num_nodes)

    def _check_stored(self, size: int) -> None:
        """Refuse a checkpoint's size, found on another device, that this one has no room for."""
        policy, device = self._planned_policy(), self.trainer.strategy.root_device
        work = self._work(policy, getattr(self, "reward", None)) if policy else None
        if policy is None or work is None:
            return  # `auto` was refused before
        images = min(size * self.images_each, work.learnt)
        check_room(
            memory(policy, replace(work, micro_batch=images)),
            self._own_share(total_memory(device), device),
            f"the checkpoint's micro-batches of {size} were found on a device with more memory; "
            f"set model.init_args.micro_batch_size to a number, here {self.micro_batch_size}",
        )

    # Telling and keeping ------------------------------------------------------------------------

    def on_train_start(self) -> None:
        """Say what was found, in this run or in the one that it goes on with."""
        super().on_train_start()
        if self.finds_micro_batch:
            self.print(f"micro_batch_size: auto is {self.micro_batch_size}")

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the size in use."""
        super().on_save_checkpoint(checkpoint)
        checkpoint["micro_batch_size"] = self.micro_batch_size

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Go on with the size of the checkpoint, if it is to be found and there is one.

        Raises:
            ValueError: This run's device has no room for it.
        """
        super().on_load_checkpoint(checkpoint)
        stored = checkpoint.get("micro_batch_size")
        if self.finds_micro_batch and stored is not None:
            if self.trainer.state.fn == "fit":
                self._check_stored(stored)
            self.micro_batch_size = stored


def total_memory(device: torch.device) -> float:
    """Bytes of a GPU, or of the machine (of the container, where that has less).

    Raises:
        ValueError: The operating system does not say.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    try:
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError) as error:
        raise ValueError(
            "expected an operating system that says how much memory there is, got none such; set "
            "micro_batch_size to a number"
        ) from error
    limit = CONTAINER_LIMIT.read_text().strip() if CONTAINER_LIMIT.exists() else "max"
    return float(min(total, int(limit)) if limit.isdecimal() else total)


def held_bytes(reward: Reward | None) -> float:
    """Bytes of all that a reward holds where pictures are: networks hidden in lists, too.

    Nothing of those rewards, alone or in an ensemble, that name another device.
    """
    seen: dict[int, Any] = {}
    queue: list[Any] = [reward]
    while queue:
        thing = queue.pop()
        if id(thing) in seen or (isinstance(thing, Reward) and thing.device is not None):
            continue
        seen[id(thing)] = thing
        if isinstance(thing, Mapping):
            queue += thing.values()
        elif isinstance(thing, (list, tuple)):
            queue += thing
        elif isinstance(thing, nn.Module):
            queue += vars(thing).values()
    return float(sum(thing.nbytes for thing in seen.values() if isinstance(thing, Tensor)))
