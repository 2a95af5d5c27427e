"""What processes send each other in a training step: bytes by phase, and the seconds it takes.

Apart from `planning.py`, whose formulas are of one process. Each GPU receives as much as it sends.
Rings of n processes pass (n - 1) / n of a tensor on to gather or to reduce-scatter it, and both to
all-reduce it (Patarasuk and Yuan 2009; doc/PERFORMANCE.md of github.com/NVIDIA/nccl-tests): DDP
sends gradients twice, FSDP sends weights twice and gradients once (ZeRO, arXiv 1910.02054,
section 7.2), the weights anew for each micro-batch.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.planning.work import PlannedWork

GPUS_PER_NODE = 8
# Bytes per second that a GPU sends, by data sheet: half of NVLink's 900e9 for both directions (H100
# and H200, SXM), and one adapter of 400e9 bits per GPU (DGX H100).
LINKS = {"in a node": 450e9, "between nodes": 50e9}
LINK_SHARE = 0.7  # of these, reached with large messages; an estimate


def ddp_bytes(policy: PlannedPolicy, work: PlannedWork) -> Mapping[str, float]:
    """Bytes that each process sends in a step where each has a whole model.

    Gradients are summed once for each update, in the type that they are kept in.
    """
    gradients = 2 * _share(work) * policy.trained * policy.trained_bytes
    return {"gradients": work.updates * gradients}


def sharded_bytes(policy: PlannedPolicy, work: PlannedWork) -> Mapping[str, float]:
    """The same where layers are in parts over all processes, and gathered once for a rollout.

    Layers travel in the type that they compute in, gradients in float32 at least. Without gradient
    (reference, replay) a micro-batch gathers them once, with it forward and backward; gradients are
    joined in an update's last micro-batch.
    """
    layers = _share(work) * policy.sizes.body * policy.compute_bytes
    parts = math.ceil(work.learnt / work.micro_batch)
    return {
        "rollout": layers,
        "reference and replay": work.replays * parts * layers,
        "update": work.updates * 2 * parts * layers,
        "gradients": work.updates * _share(work) * policy.trained * policy.trained_bytes,
    }


def _share(work: PlannedWork) -> float:
    return (work.processes - 1) / work.processes


def link(processes: int) -> str:
    """Which of `LINKS` a ring of so many processes is as fast as."""
    return "in a node" if processes <= GPUS_PER_NODE else "between nodes"


def communication_seconds(sent: Mapping[str, float], processes: int) -> float:
    """Of a step, if nothing is computed meanwhile: an upper bound, as both run side by side."""
    return sum(sent.values()) / (LINKS[link(processes)] * LINK_SHARE)


def format_communication(policy: PlannedPolicy, work: PlannedWork) -> str:
    """A line for whole models and one for sharded ones."""
    lines = []
    for name, count in (("whole models (DDP)", ddp_bytes), ("in parts (FSDP2)", sharded_bytes)):
        sent = count(policy, work)
        listed = ", ".join(
            f"{value / 1e9:.3g} GB {phase}" for phase, value in sent.items() if value
        )
        spent = communication_seconds(sent, work.processes)
        lines.append(f"  {name}: each GPU sends {listed} in a step, at most {spent:.3g} s")
    links = f"{LINKS[link(work.processes)] * LINK_SHARE / 1e9:.3g} GB/s {link(work.processes)}"
    return "\n".join([f"  communication at {links}, an estimate", *lines])
