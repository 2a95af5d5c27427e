"""Sharding over processes as a strategy of Lightning's trainer: `configs/strategies/fsdp.yaml`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.fabric.utilities.types import _PATH
from lightning.pytorch.strategies import ModelParallelStrategy, Strategy
from torch.distributed import destroy_process_group, is_available, is_initialized
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule
from torch.optim import Optimizer

from cotgen_pl.interfaces import check_choice
from cotgen_pl.sharded_checkpoints import load_parts, save_parts, split_whole

Gather = Literal["rollout", "step"]


def leave_group() -> None:
    """Let go of the other processes, at the end of a program.

    The threads that talk to them end with it. Without it one process was seen to abort while Python
    ended, which gloo's threads explain, and its launcher took a run that was done for a failed one.
    """
    if is_available() and is_initialized():
        destroy_process_group()


class ShardedStrategy(ModelParallelStrategy):
    """Fully sharded data parallelism (PyTorch's FSDP2) over all processes.

    Beside Lightning's own, which it extends: it divides over all processes by itself, writes
    checkpoints that open without running code and that any strategy goes on from, and gathers
    weights as its argument says. At the start, each process has the whole model in the machine's
    memory for a moment.

    Args:
        gather: `rollout`: a process gathers all weights once, draws all tokens with them, then
            lets go of them, and adds up whole gradients over micro-batches. `step`: at no time more
            than one layer's weights and gradients, gathered for each token anew; slow, for what
            does not fit otherwise. What processes do in unequal parts (evaluation, pairs, pictures)
            always gathers all.
    """

    def __init__(self, gather: Gather = "rollout") -> None:
        check_choice("gather", gather, Gather)
        super().__init__(tensor_parallel_size=1)
        self.gather = gather

    def setup_environment(self) -> None:
        """Divide over all processes; Lightning's default is over those of other nodes alone."""
        self._data_parallel_size = self.num_nodes * self.num_processes
        super().setup_environment()

    @property
    def processes(self) -> DeviceMesh:
        """All of them, in one dimension."""
        return self.device_mesh["data_parallel"]

    @property
    def block_type(self) -> torch.dtype | None:
        """What layers are gathered in; None for the weights' own type."""
        return torch.bfloat16 if self.precision_plugin.precision == "bf16-mixed" else None

    @contextmanager
    def block_backward_sync(self) -> Iterator[None]:
        """Keep gradients on their process, whole, while the context lasts; not under `step`."""
        assert self.model is not None
        units = [unit for unit in self.model.modules() if isinstance(unit, FSDPModule)]
        if self.gather == "step":
            units = []
        for unit in units:
            unit.set_requires_gradient_sync(False, recurse=False)
        try:
            yield
        finally:
            for unit in units:
                unit.set_requires_gradient_sync(True, recurse=False)

    # Checkpoints, in place of Lightning's ------------------------------------------------------

    @property
    def lightning_restore_optimizer(self) -> bool:
        """The optimizer's state is read with all others."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """What the module's own `state_dict` gives, in parts."""
        return Strategy.lightning_module_state_dict(self)

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """What the optimizer's own `state_dict` gives, in parts."""
        return Strategy.optimizer_state(self, optimizer)

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Let the module read its weights."""
        Strategy.load_model_state_dict(self, checkpoint, strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Let optimizers read their states."""
        Strategy.load_optimizer_state_dict(self, checkpoint)

    def save_checkpoint(
        self, checkpoint: dict[str, Any], filepath: _PATH, storage_options: Any = None
    ) -> None:
        """Write a folder, each process its parts."""
        if storage_options is not None or "://" in str(filepath):
            raise ValueError(
                f"expected a sharded checkpoint on a disk that all processes share, got {filepath};"
                " name such a folder by the dirpath of ModelCheckpoint"
            )
        save_parts(checkpoint, Path(self.broadcast(filepath)))

    def load_checkpoint(
        self, checkpoint_path: _PATH, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Read a folder, or the file of a run that was not sharded."""
        path = Path(self.broadcast(checkpoint_path))
        if path.is_dir():
            return load_parts(path, self.processes)
        whole = self.checkpoint_io.load_checkpoint(path, weights_only=True)
        return split_whole(whole, self.processes)
