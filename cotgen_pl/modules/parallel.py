"""What modules do with other processes: join values, share weights, and shard them."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import OptimizerCallable
from lightning.pytorch.strategies import ParallelStrategy
from torch import Tensor
from torch.distributed import all_gather_object

from cotgen_pl.interfaces import Policy
from cotgen_pl.sharding import gathered, shard, share_weights, take_values, whole
from cotgen_pl.strategies import ShardedStrategy


class ParallelModule(LightningModule):
    """A module whose policy may be whole on each process, or in parts over all of them."""

    policy: Policy
    reference: Policy | None  # the frozen twin of a module that holds one
    _unread: tuple[Policy]  # the policy before it was read; a tuple hides it from nn.Module

    @property
    def sharding(self) -> ShardedStrategy | None:
        """The strategy that divides weights, if there is one."""
        strategy = self._trainer.strategy if self._trainer else None
        return strategy if isinstance(strategy, ShardedStrategy) else None

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    # Reading and sharding ---------------------------------------------------------------------

    def check_sharding(self, make: OptimizerCallable) -> None:
        """Refuse, before weights load, what cannot be in parts.

        Args:
            make: Makes the optimizer from the parameters that train.
        """
        if not self.sharding:
            return
        optimizer = make([torch.nn.Parameter(torch.zeros(1))])
        if any(base.__module__.startswith("bitsandbytes") for base in type(optimizer).__mro__):
            raise ValueError(
                f"expected an optimizer of torch beside {type(self.sharding).__name__}, got "
                f"bitsandbytes' {type(optimizer).__name__}, whose kernels take a part of a weight "
                "for the whole; set model.init_args.optimizer to torch.optim.AdamW, whose state is "
                "divided over processes, or --trainer.strategy configs/strategies/ddp.yaml"
            )
        bits = getattr(self.policy, "quantize", None)
        if bits:
            raise ValueError(
                f"expected weights of a floating-point type beside {type(self.sharding).__name__}, "
                f"got quantize: {bits}, whose packed weights cannot be divided; leave quantize "
                "out, or set --trainer.strategy configs/strategies/ddp.yaml"
            )

    def read_weights(self) -> None:
        """Read the policy's weights: the first process from its files, the others from it.

        Raises:
            ValueError: One of them cannot; raised by all, so that none waits for it.
        """
        if self._trainer is None or self.trainer.world_size == 1:
            self.policy.load()
            return
        refusal: str | None = None
        refusals: list[str | None] = [None] * self.trainer.world_size
        try:
            self.policy.load(empty=not self.trainer.is_global_zero)
        except ValueError as error:
            refusal = str(error)
        all_gather_object(refusals, refusal)
        for first in filter(None, refusals):
            raise ValueError(first)
        share_weights(self.policy, self.trainer.strategy.root_device)

    def shard(self) -> None:
        """Divide policy and reference over all processes, if the strategy says so."""
        if not self.sharding:
            return
        trained, processes = self._trained().keys(), self.sharding.processes
        for model in (self.policy, self.reference):
            if model is not None and any(True for _ in model.parameters()):  # not AdaptersThen
                shard(model, model.blocks(), trained, processes, self.sharding.block_type)

    # Whole weights ----------------------------------------------------------------------------

    def gathered(self) -> AbstractContextManager[None]:
        """Whole weights for work of which processes have unequal parts; all enter and leave."""
        return gathered(self.policy)

    def gathered_to_draw(self) -> AbstractContextManager[None]:
        """Whole weights for one rollout, unless they are to be gathered for each token."""
        by_token = self.sharding is not None and self.sharding.gather == "step"
        return nullcontext() if by_token else self.gathered()

    def whole_policy(self) -> Policy | None:
        """The policy as one process would have it, on the first one; None on the others.

        Tensor by tensor, into one model on the CPU whose frozen weights are read again. All
        processes must call this.
        """
        first = self.trainer.is_global_zero
        if not self.sharding:
            return self.policy if first else None
        [unread] = self._unread
        target = dict(unread.load().named_parameters()) if first else {}
        for name, parameter in self._trained().items():
            values = whole(parameter.detach())
            if first:
                take_values(target, {name: values})
        return unread if first else None

    # Gradients --------------------------------------------------------------------------------

    def backward_part(self, loss: Tensor, *, last: bool) -> None:
        """The backward pass of a micro-batch; processes join their gradients in the last alone."""
        strategy = self.trainer.strategy
        if isinstance(strategy, ParallelStrategy) and not last:
            with strategy.block_backward_sync():
                self.manual_backward(loss)
        else:
            self.manual_backward(loss)

    # Values -----------------------------------------------------------------------------------

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of each process's tensor."""
        if self.trainer.world_size == 1:
            return values
        total: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        return total

    def gather(self, values: Tensor) -> Tensor:
        """[B] of each process, laid end to end."""
        if self.trainer.world_size == 1:
            return values
        gathered_values: Tensor = self.all_gather(values)  # type: ignore[assignment]  # likewise
        return gathered_values.flatten()
