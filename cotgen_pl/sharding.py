"""Weights in parts: each process keeps its share of each layer (FSDP2) and gathers to compute.

Kept apart from strategies and modules because adapters and checkpoints must know parts from wholes,
too. All of it also works, and does nothing, where nothing is sharded.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import broadcast, broadcast_object_list, get_rank
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.distributed.tensor import DTensor

PASSES = ("logits", "prefill", "step", "answer")
"""Methods of a policy that compute with the weights that train: each is a forward to FSDP2."""


def whole(values: Tensor) -> Tensor:
    """A tensor with the parts of all processes, which all have to ask; one without parts itself."""
    return values.full_tensor() if isinstance(values, DTensor) else values


def own_part(values: Tensor) -> Tensor:
    """This process's part of a tensor, in the same memory; a tensor without parts itself."""
    return values.to_local() if isinstance(values, DTensor) else values


def take_values(parameters: Mapping[str, Tensor], values: Mapping[str, Tensor]) -> None:
    """Write other values, in parts as the parameters are, over the named parameters."""
    with torch.no_grad():
        for name, value in values.items():
            target, source = own_part(parameters[name].data), own_part(value)
            assert target.shape == source.shape, f"{name}: both in parts, or both whole"
            target.copy_(source)


def shard(
    policy: nn.Module,
    blocks: Iterable[nn.Module],
    trained: Collection[str],
    mesh: DeviceMesh,
    block_type: torch.dtype | None = None,
) -> None:
    """Leave each process its part of every block, and of what trains outside of them.

    What is frozen outside of the blocks stays whole everywhere: it would be gathered in each pass
    and has neither gradients nor an optimizer's state. Outside of its methods in `PASSES`, a policy
    is in parts.

    Args:
        policy: With all of its weights on each process.
        blocks: Its layers, each gathered by itself when it computes.
        trained: Names of the parameters that train, or whose counterparts in another policy do.
        mesh: The processes, one dimension.
        block_type: What blocks are gathered and computed in; gradients are summed in float32.
            Absent means as they are.
    """
    settings: dict[str, Any] = {"mesh": mesh, "reshard_after_forward": True}
    narrow = MixedPrecisionPolicy(block_type, torch.float32, cast_forward_inputs=False)
    for block in blocks:
        fully_shard(block, mp_policy=narrow if block_type else MixedPrecisionPolicy(), **settings)
    kept = {
        parameter
        for name, parameter in policy.named_parameters()
        if name not in trained and not isinstance(parameter, DTensor)
    }
    fully_shard(policy, ignored_params=kept, **settings)
    for method in PASSES:
        register_fsdp_forward_method(policy, method)
    parameters = dict(policy.named_parameters())
    assert all(isinstance(parameters[name], DTensor) for name in trained)


@contextmanager
def gathered(policy: nn.Module) -> Iterator[None]:
    """Keep the whole weights on each process, gathered once, while the context lasts.

    All processes enter and leave together; between, each makes as many passes as it likes, because
    none of them communicates. The parts must not change meanwhile.
    """
    units = [unit for unit in policy.modules() if isinstance(unit, FSDPModule)]
    if not units or not any(isinstance(p, DTensor) for p in policy.parameters()):
        yield  # nothing is in parts, or all is gathered already
        return
    for unit in units:  # neither call reaches the units inside a unit
        unit.set_reshard_after_forward(False, recurse=False)
        unit.unshard()
    try:
        yield
    finally:
        for unit in units:
            unit.reshard()
            unit.set_reshard_after_forward(True, recurse=False)


@torch.no_grad()
def share_weights(model: nn.Module, device: torch.device) -> None:
    """Give all processes the first one's parameters and buffers, tensor by tensor.

    Args:
        model: Of the same make everywhere; its values count on the first process alone.
        device: Where processes communicate.
    """
    tensors = [*model.parameters(), *model.buffers()]
    kinds = [[(tensor.shape, tensor.dtype) for tensor in tensors]]
    broadcast_object_list(kinds)
    for tensor, (shape, dtype) in zip(tensors, kinds[0], strict=True):
        sent = torch.empty(shape, dtype=dtype, device=device)
        if get_rank() == 0:
            sent.copy_(tensor)
        broadcast(sent.reshape(-1).view(torch.uint8), 0)  # as bytes: gloo does not know all types
        if get_rank() != 0:
            tensor.data = sent.to(tensor.device)
