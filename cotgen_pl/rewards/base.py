"""What rewards share that ask a network: where it lives, how many pictures at a time, which dtype.

A file of a scorer holds its architecture, its preprocessing and its formula; the rest is here.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Self, TypeVar

import torch
from torch import Tensor, nn

from cotgen_pl.interfaces import Prompt, Reward, Scores, check_choice, check_positive, freeze
from cotgen_pl.pixels import as_rgb

NetworkDtype = Literal["float32", "bfloat16", "float16"]
MAX_KEPT = 4096  # entries; 16 MB of features of 1,024 floats each
T = TypeVar("T")


class Kept(dict[str, T]):
    """Results by text, each computed once; the oldest go first when there are too many."""

    def get_or_compute(self, key: str, compute: Callable[[str], T]) -> T:
        """What belongs to a key, from memory or from `compute(key)`."""
        if key not in self:
            value = compute(key)
            if len(self) >= MAX_KEPT:
                del self[next(iter(self))]
            self[key] = value
        return self[key]


class ModelReward(Reward):
    """A reward that asks a frozen network.

    The network is no submodule: neither the trainer's precision nor its device placement nor a
    sharding strategy touches it. It follows the pictures unless `device` names a place.

    Args:
        name: Of the score among the parts.
        batch_size: Pictures scored at once.
        device: Where the network lives, like `cuda:1`; absent means where the pictures are.
        dtype: Of its weights. Scores are float32 in any case.
        offload: Keep the network in the CPU's memory and move it only while it scores.
    """

    def __init__(
        self,
        name: str,
        batch_size: int = 32,
        device: str | None = None,
        dtype: NetworkDtype = "float32",
        offload: bool = False,
    ) -> None:
        super().__init__()
        check_positive(batch_size=batch_size)
        check_choice("dtype", dtype, NetworkDtype)
        _check_device(device)
        self.name, self.batch_size = name, batch_size
        self.device, self.dtype, self.offload = device, dtype, offload
        self._held: list[nn.Module] = []  # a list hides the network from nn.Module

    @abstractmethod
    def read(self) -> nn.Module:
        """Read the network from its files, on the CPU. Called once."""

    @abstractmethod
    def score_batch(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score RGB pictures [b, 3, H, W], float32 in [0, 1], on the network's device."""

    @property
    def torch_dtype(self) -> torch.dtype:
        """The dtype of the network's weights."""
        dtype: torch.dtype = getattr(torch, self.dtype)
        return dtype

    @property
    def network(self) -> nn.Module:
        """The network; a ValueError before `load`."""
        if not self._held:
            raise ValueError(
                f"reward {self.name}: its weights are not loaded; call load() before score()"
            )
        return self._held[0]

    def load(self) -> Self:
        """Read the weights, to the CPU; a second call does nothing."""
        if not self._held:
            with _default_dtype(torch.float32):  # that of this moment may be the trainer's
                self._held.append(freeze(self.read().to(self.torch_dtype)))
        return self

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 1, 3 or 4, H, W] in [0, 1] of any size, each against its own prompt.

        The scores are float32, whatever autocast is active, and lie on the device of `images`.
        """
        network = self.network
        if images.ndim != 4 or len(images) != len(prompts):
            raise ValueError(
                f"reward {self.name}: expected pictures [{len(prompts)}, 3, H, W] for "
                f"{len(prompts)} prompts, got {list(images.shape)}; pass one picture per prompt"
            )
        images, place = as_rgb(images).float(), torch.device(self.device or images.device)
        if place == torch.device(images.device.type):  # `cuda` is the first one in a new thread
            place = images.device
        network.to(place)
        try:
            batches = self._score_batches(images, prompts, place)
        finally:
            if self.offload:
                network.to("cpu")
        return Scores.join(batches).to(images.device)

    def _score_batches(
        self, images: Tensor, prompts: Sequence[Prompt], place: torch.device
    ) -> list[Scores]:
        # Not inference_mode: its tensors could not enter a loss afterwards.
        with torch.no_grad(), torch.autocast(place.type, enabled=False):
            return [
                self.score_batch(
                    images[start : start + self.batch_size].to(place),
                    prompts[start : start + self.batch_size],
                )
                for start in range(0, len(images), self.batch_size)
            ]


def _check_device(device: str | None) -> None:
    try:
        torch.device(device or "cpu")
    except RuntimeError as error:
        raise ValueError(
            f"expected device like cpu, cuda or cuda:1, got {device!r}; leave it out to score "
            "where the pictures are"
        ) from error


@contextmanager
def _default_dtype(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
