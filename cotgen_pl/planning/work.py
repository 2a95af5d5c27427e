"""Memory and seconds of a training step, and the micro-batch that fits: formulas alone.

Apart from whoever reads a configuration (`tools/plan.py`) or asks a device
(`cotgen_pl.modules.micro_batches`). Bytes are bytes and GB are 1e9 of them. docs/performance.md
says what was measured, and how far off the formulas were.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from cotgen_pl.decoding.settings import DecodingSettings
from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.sampling import LogprobMode

OPTIMIZER_TRIAL = 1 << 16  # parameters: enough for 8-bit optimizers, which leave small ones alone
# Of a GPU's memory; the rest is CUDA's context (about 0.5 GB), libraries' workspaces and gaps
# between blocks. An estimate.
GPU_SHARE = 0.9
# Of a machine's memory, which other programs use too. A choice.
CPU_SHARE = 0.5
PRINTS_SAVINGS = "python tools/plan.py CONFIG prints what each setting would save"

# What each process has its part of where weights are divided.
IN_PARTS = (
    "weights that train",
    "gradients",
    "optimizer",
    "reference",
    "square roots",
    "start weights",
)

Memory = dict[str, dict[str, float]]
"""Bytes by phase and by what they hold."""


@dataclass(frozen=True)
class OptimizerMemory:
    """Bytes that an optimizer takes for each parameter."""

    state: float
    """From the first step on."""
    step: float
    """More while it takes a step."""


def try_optimizer(
    make: Callable[[Any], torch.optim.Optimizer], dtype: str = "float32"
) -> OptimizerMemory:
    """Count what an optimizer keeps by having it take a step on zeros of a type, on the CPU.

    >>> try_optimizer(torch.optim.AdamW)
    OptimizerMemory(state=8.0, step=4.0)
    """
    parameter = torch.nn.Parameter(torch.zeros(OPTIMIZER_TRIAL, dtype=getattr(torch, dtype)))
    parameter.grad = torch.zeros_like(parameter)
    optimizer = make([parameter])
    optimizer.step()
    state = [value for value in optimizer.state[parameter].values() if torch.is_tensor(value)]
    kept = sum(value.nbytes for value in state if value.numel() > 1) / OPTIMIZER_TRIAL
    # torch's own Adam takes all square roots at once on a GPU, unless it is fused.
    roots = isinstance(optimizer, (torch.optim.Adam, torch.optim.AdamW))
    return OptimizerMemory(round(kept, 3), 4.0 if roots and not optimizer.defaults["fused"] else 0)


@dataclass(frozen=True)
class PlannedWork:
    """What a training step asks of one process."""

    drawn: int
    """Images drawn at once for training."""
    draws: int
    """So often in a step; 0 where they are drawn apart from steps."""
    learnt: int
    """Images of one update."""
    micro_batch: int
    """Images whose activations are kept at a time."""
    guided: bool
    """Whether sampling is guided."""
    logprobs: LogprobMode
    twin: bool
    """Whether a frozen copy of what trains stays beside it."""
    replays: int
    """Passes without gradient over each image: reference, old log-probs."""
    optimizer: OptimizerMemory
    updates: int = 1
    evaluated: int = 0
    """Images drawn at once by callbacks, such as evaluations."""
    reward: float = 0.0
    """Bytes of the reward's weights on the policy's device while it scores."""
    reward_stays: bool = True
    """Whether they stay there afterwards."""
    processes: int = 1
    gather: Literal["rollout", "step"] | None = None
    """How weights that are divided over the processes are gathered; None where they are whole."""

    @property
    def forced_guidance(self) -> bool:
        """Whether log-probs are those of guided logits."""
        return self.guided and self.logprobs != "conditional"


def grpo_work(
    policy: PlannedPolicy, settings: Any, processes: int, paired: int = 0, **around: Any
) -> PlannedWork:
    """What a step of GRPO asks of each process.

    Args:
        policy: What trains.
        settings: A `GRPOModule`, or the arguments that a configuration has for it.
        processes: Over which a rollout is shared.
        paired: Nothing: its pictures make no pairs.
        **around: Fields of `PlannedWork` that the module's settings do not say.
    """
    images = settings.images_per_update // processes
    drawn = min(images, settings.drawn_at_once or images)
    compares = bool(settings.kl_coef or settings.kl_penalty)
    replays = compares + bool(settings.updates_per_rollout > 1 or settings.kl_penalty)
    return PlannedWork(
        drawn=drawn,
        draws=math.ceil(images / drawn),
        learnt=images,
        micro_batch=min(images, _number(settings.micro_batch_size) or images),
        guided=settings.guidance != 1,
        logprobs=settings.logprobs,
        twin=compares and not policy.lora_rank,
        replays=replays,
        updates=settings.updates_per_rollout,
        processes=processes,
        **around,
    )


def dpo_work(
    policy: PlannedPolicy, settings: Any, pairs: int, processes: int, paired: int, **around: Any
) -> PlannedWork:
    """What an update of DPO asks of each process, and a batch of pictures for its pairs.

    Args:
        policy: What trains.
        settings: A `DPOModule`, or the arguments that a configuration has for it.
        pairs: Of an update, over all processes.
        processes: Over which they are shared.
        paired: Pictures drawn at once for pairs.
        **around: Fields of `PlannedWork` that the module's settings do not say.
    """
    own = pairs // processes
    live = settings.reference_logps == "live"
    return PlannedWork(
        drawn=paired,
        draws=0,
        learnt=2 * own,
        micro_batch=2 * min(own, _number(settings.micro_batch_size) or own),
        guided=settings.guidance != 1,
        logprobs=settings.logprobs,
        twin=live and not policy.lora_rank,
        replays=1,
        processes=processes,
        **around,
    )


def _number(size: Any) -> int | None:
    return None if size == "auto" else size


def images_at_once(callbacks: Iterable[Any]) -> dict[str, int]:
    """Pictures that callbacks, or what a configuration has for them, draw at a time, at most.

    Returns:
        `evaluated`, and `paired` for the pictures that pairs are made of.
    """
    evaluated, paired = [0], [0]
    for callback in callbacks:
        evaluated.append(getattr(callback, "batch_size", None) or 0)
        pairs = getattr(callback, "pairs", None)
        paired.append(getattr(pairs, "images_per_batch", None) or 0)
    return {"evaluated": max(evaluated), "paired": max(paired)}


def activations(policy: PlannedPolicy, work: PlannedWork) -> dict[str, float]:
    """Bytes of one image while its loss is computed and carried back.

    Backward begins with the logits; then each layer in turn frees its activations, or makes them
    again first. The shares of a layer are counted, see `layer_share`.
    """
    branches = 2 if work.forced_guidance and work.logprobs == "guided" else 1
    kept = policy.layer_input if policy.gradient_checkpointing else policy.layer_activations
    layer = layer_share(policy, work) * policy.layer_activations
    logits = policy.logits(work.forced_guidance, work.micro_batch)
    return {
        "activations": branches * policy.sizes.layers * kept,
        "logits, or a layer's gradients": max(logits, layer),
    }


def layer_share(policy: PlannedPolicy, work: PlannedWork) -> float:
    """How much one layer takes in passing, as a share of the activations that it has.

    Counted on the CPU: 0.33 and 0.45 backward, 1.35 and 1.54 with activations made again, and 0.74
    forward without gradient, beside the kept activations of the other branch.
    """
    if policy.gradient_checkpointing:
        return 1.6
    return 0.75 if work.forced_guidance and work.logprobs == "guided_detached" else 0.5


def memory(policy: PlannedPolicy, work: PlannedWork) -> Memory:
    """Bytes on one device, by phase.

    Keys, values and the weights that fused layers draw with go when the batch is drawn; gradients
    go with the optimizer's last step on a rollout.
    """
    trained = policy.trained
    weights = {
        "weights that train": trained * policy.trained_bytes,
        "frozen weights": policy.frozen_weights,
        "optimizer": trained * work.optimizer.state,
        "copies for autocast": policy.compute_copy,
        "reference": trained * policy.trained_bytes if work.twin else 0.0,
        "reward": work.reward if work.reward_stays else 0.0,
        "buckets of gradients": trained * policy.trained_bytes if work.processes > 1 else 0.0,
    }
    gradients = {"gradients": trained * policy.trained_bytes}
    logits = policy.logits(work.forced_guidance, work.micro_batch)
    read = max(logits, 0.75 * policy.layer_activations)
    phases = {
        "rollout": drawing(policy, work, work.drawn),
        "reward": {"reward": work.reward},
        "reference": {"logits, or a layer": work.micro_batch * read} if work.replays else {},
        "update": gradients
        | {name: work.micro_batch * held for name, held in activations(policy, work).items()},
        "optimizer step": gradients | {"square roots": trained * work.optimizer.step},
        "evaluation": {"start weights": trained * policy.trained_bytes}
        | drawing(policy, work, work.evaluated)
        if work.evaluated
        else {},
    }
    return {
        phase: {name: held for name, held in in_parts(policy, work, phase, weights | own) if held}
        for phase, own in phases.items()
        if own
    }


def drawing(policy: PlannedPolicy, work: PlannedWork, images: int) -> dict[str, float]:
    """Bytes that go when so many images are drawn."""
    if work.gather == "step":  # layers that stay divided are not fused
        policy = replace(policy, drawn_by=DecodingSettings("eager"))
    held = {
        "key-value cache": policy.cache(images, work.guided),
        "decoding pictures": policy.decoding(images),
    }
    if policy.draws_fused:
        held |= {"weights to draw with": policy.drawing_copy, "copies for autocast": 0.0}
    return held


def in_parts(
    policy: PlannedPolicy, work: PlannedWork, phase: str, held: dict[str, float]
) -> Iterable[tuple[str, float]]:
    """What a phase holds; where weights are divided, each process's parts and what it gathers.

    By FSDP2: one layer computes while the next one comes, but where all are gathered at once; whole
    gradients, in float32, stay from micro-batch to micro-batch.
    """
    if work.gather is None:
        return held.items()
    parts = {n: v / work.processes if n in IN_PARTS else v for n, v in held.items()}
    del parts["copies for autocast"], parts["buckets of gradients"]
    sizes, by_rollout = policy.sizes, work.gather == "rollout"
    if policy.lora_rank or policy.trains == "generation":
        parts["frozen weights"] -= sizes.body * policy.frozen_bytes * (1 - 1 / work.processes)
    at_once = phase == "evaluation" or (phase == "rollout" and by_rollout)
    layers = sizes.layers if at_once else min(2, sizes.layers)
    parts["gathered layers"] = layers / sizes.layers * sizes.body * policy.compute_bytes
    if phase == "update" and by_rollout and work.micro_batch < work.learnt:
        parts["whole gradients"] = 4.0 * policy.trained
    return parts.items()


def peak(planned: Memory) -> tuple[str, float]:
    """The phase that takes most, and its bytes."""
    sums = {phase: sum(parts.values()) for phase, parts in planned.items()}
    phase = max(sums, key=lambda name: sums[name])
    return phase, sums[phase]


def largest_micro_batch(
    policy: PlannedPolicy, work: PlannedWork, room: float, images_each: int = 1
) -> int:
    """Images or pairs (`images_each` 2) in a micro-batch such that all phases have room.

    As many as fit, then evened out: of 64 images where 30 fit, 22 at a time and not 30, 30 and 4.

    Raises:
        ValueError: Not even one fits; the plan's numbers say why.
    """
    single = memory(policy, replace(work, micro_batch=images_each))
    check_room(single, room)
    none = memory(policy, replace(work, micro_batch=0))
    fits = []
    for phase, parts in single.items():
        before = sum(none.get(phase, {}).values()) if phase in none else 0.0
        grows = sum(parts.values()) - before
        if grows > 0 and phase in ("reference", "update"):
            fits.append(math.floor((room - before) / grows))
    units = work.learnt // images_each
    return math.ceil(units / math.ceil(units / min(fits)))


def check_room(planned: Memory, room: float, advice: str = PRINTS_SAVINGS) -> None:
    """Raise a ValueError with the fullest phase's numbers and advice unless all have room."""
    phase, total = peak(planned)
    if total > room:
        parts = sorted(planned[phase].items(), key=lambda part: -part[1])
        listed = ", ".join(f"{held / 1e9:.3g} GB {name}" for name, held in parts[:5])
        raise ValueError(
            f"expected a run that fits into {room / 1e9:.3g} GB, got one that is planned to take "
            f"{total / 1e9:.3g} GB in its {phase} ({listed}); {advice}"
        )


@dataclass(frozen=True)
class Speed:
    """How fast a device moves bytes and computes."""

    bandwidth: float
    """Bytes per second, as its data sheet has it."""
    flops: float
    """Operations per second of bfloat16 matrix products, without sparsity; likewise."""
    bandwidth_share: float = 0.5
    """Of the bandwidth, reached while decoding; an estimate until it is measured."""
    flops_share: float = 0.36
    """Of the operations, reached in passes over whole images (MFU); likewise. 0.36 is 45 % of the
    790e12 per second that a large product reaches on an H200."""


def decode_bytes(policy: PlannedPolicy, images: int, guided: bool) -> float:
    """Bytes that one decoding step moves, on average: weights, and keys and values so far.

    Those up to the end of the bucket where attention reads whole buckets.
    """
    first, number = policy.prompt_tokens + 1, policy.sizes.num_tokens
    lengths = map(policy.positions_read, range(first, first + number))
    rows = images * (2 if guided else 1)
    read = policy.cache_per_position * rows * sum(lengths) / number
    return policy.weights_read + read


def decode_seconds(policy: PlannedPolicy, images: int, guided: bool, speed: Speed) -> float:
    """Of drawing all tokens of images, prompts not counted (1 to 2 % at Janus-Pro's sizes)."""
    moved = decode_bytes(policy, images, guided)
    return policy.sizes.num_tokens * moved / (speed.bandwidth * speed.bandwidth_share)


def training_flop(policy: PlannedPolicy, work: PlannedWork) -> float:
    """Operations that one image takes in one update.

    A forward pass, and twice as many backward (once for adapters, whose base needs no gradients of
    its own); checkpointing passes forward again; guided log-probs have two branches, of which
    `guided_detached` carries one back.
    """
    one = (2 if policy.lora_rank else 3) + (1 if policy.gradient_checkpointing else 0)
    passes = {"guided": 2 * one, "guided_detached": one + 1, "conditional": one}
    return policy.forward_flop() * (passes[work.logprobs] if work.forced_guidance else one)


def seconds(policy: PlannedPolicy, work: PlannedWork, speed: Speed) -> Mapping[str, float]:
    """By phase, for one process's share; rewards, pictures and the optimizer are not counted.

    Where pictures are drawn apart from steps, `rollout` is that of one batch.
    """
    rate = speed.flops * speed.flops_share
    passes = work.replays * (2 if work.forced_guidance else 1)
    return {
        "rollout": max(1, work.draws) * decode_seconds(policy, work.drawn, work.guided, speed),
        "reference and replay": work.learnt * passes * policy.forward_flop() / rate,
        "update": work.updates * work.learnt * training_flop(policy, work) / rate,
    }
