"""What will a run take? `python tools/plan.py configs/NAME.yaml --gpu h200`, before it starts.

Reads an experiment and no weights, and prints the memory of each phase on each GPU, the seconds of
a step, and, where it does not fit, what each setting would save; then it exits with 1. The formulas
are those of `cotgen_pl.planning`. Arguments that it does not know override the configuration, as
those of tools/main.py do.
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from pkgutil import resolve_name
from typing import Any

import torch
from transformers import JanusConfig

from cotgen_pl.checkpoints import expand_home, read_config
from cotgen_pl.interfaces import check_positive, check_share
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.modules.grpo import GRPOModule
from cotgen_pl.modules.micro_batches import total_memory
from cotgen_pl.planning.communication import ddp_bytes, format_communication, sharded_bytes
from cotgen_pl.planning.footprint import PROMPT_TOKENS, PlannedPolicy, PolicySizes, read_sizes
from cotgen_pl.planning.savings import format_savings
from cotgen_pl.planning.work import (
    CPU_SHARE,
    GPU_SHARE,
    Memory,
    OptimizerMemory,
    PlannedWork,
    Speed,
    dpo_work,
    grpo_work,
    images_at_once,
    largest_micro_batch,
    memory,
    peak,
    seconds,
    try_optimizer,
)
from cotgen_pl.policies.janus import EXAMPLE, JanusPolicy
from cotgen_pl.rewards.base import ModelReward

if __package__:  # as a module of tools/
    from tools.main import CommandLine, main, run_command
else:  # as a script, which has its own folder on the path
    from main import CommandLine, main, run_command

# Counted on models built without weights from the published config.json, whose layers and widths
# are those of Table 1 of arXiv 2501.17811; tests/tools/test_plan.py counts again.
KNOWN_SIZES = {
    "deepseek-community/Janus-Pro-1B": PolicySizes(
        layers=24,
        width=2048,
        mlp_width=5632,
        heads=16,
        attention_width=2048,
        key_width=2048,
        num_tokens=576,
        codebook_size=16_384,
        body=1_233_225_728,
        text_embedding=209_715_200,
        generation_head=37_767_168,
        generation_input=4_345_856,
        vq=71_883_403,
        unused=519_699_456,
        side=384,
        decoder_width=128,
    ),
    "deepseek-community/Janus-Pro-7B": PolicySizes(
        layers=30,
        width=4096,
        mlp_width=11_008,
        heads=32,
        attention_width=4096,
        key_width=4096,
        num_tokens=576,
        codebook_size=16_384,
        body=6_071_504_896,
        text_embedding=419_430_400,
        generation_head=83_906_560,
        generation_input=16_949_248,
        vq=71_883_403,
        unused=744_098_816,
        side=384,
        decoder_width=128,
    ),
}
ROOT = Path(__file__).resolve().parents[1]
WEIGHT_FILES = (".safetensors", ".bin", ".pt", ".pth")
RATED_PRECISION = "bf16-mixed"  # the trainer's that has the rate of `Device.flops`
LAUNCH_SECONDS = 0.02  # of all kernels of one token, one by one: an estimate


@dataclass(frozen=True)
class Device:
    """Memory in bytes, bytes per second, bfloat16 operations per second without sparsity."""

    memory: float
    bandwidth: float
    flops: float
    source: str


GPUS = {
    "h200": Device(141e9, 4.8e12, 989.5e12, "NVIDIA H200 data sheet, SXM"),
    "h100": Device(80e9, 3.35e12, 989.5e12, "NVIDIA H100 data sheet, SXM"),
    "a100": Device(80e9, 2.039e12, 312e12, "NVIDIA A100 data sheet, 80GB SXM"),
    "l40s": Device(48e9, 0.864e12, 362.05e12, "NVIDIA L40S data sheet"),
    "rtx4090": Device(24e9, 1.008e12, 165.2e12, "NVIDIA Ada GPU architecture, appendix A"),
}


# Reading ----------------------------------------------------------------------------------------


class Unbuilt(CommandLine):
    """Reads a configuration as `fit` would, and builds nothing of it."""

    def before_instantiate_classes(self) -> None:
        """Let a run lie in the folder: nothing is written."""

    def instantiate_classes(self) -> None:
        """Build nothing."""

    def after_instantiate_classes(self) -> None:
        """Keep what was read, and have nothing run."""
        self.read = self.config[self.subcommand]
        self.reader = self._parser(self.subcommand)
        self.subcommand = None


def policy_sizes(path: str) -> PolicySizes:
    """Of a known hub id, offline; else from the config.json of a folder or hub id."""
    path = expand_home(path)
    return KNOWN_SIZES.get(path) or read_sizes(read_config(path, JanusConfig, EXAMPLE))


def plan_policy(config: Any, prompt_tokens: int) -> PlannedPolicy:
    """The policy that a configuration names."""
    policy = config.model.init_args.policy
    if not issubclass(resolve_name(policy.class_path), JanusPolicy):
        raise ValueError(f"expected a JanusPolicy, got {policy.class_path}; plan one with Janus")
    sizes, precision = policy_sizes(policy.init_args.path), config.trainer.precision or "32-true"
    planned = PlannedPolicy.read(sizes, policy.init_args, precision)
    return replace(planned, prompt_tokens=prompt_tokens)


def plan_work(config: Any, policy: PlannedPolicy, gpus: int, reward_gb: float | None) -> Any:
    """What the configuration asks of each process."""
    settings, kind = config.model.init_args, resolve_name(config.model.class_path)
    callbacks = [callback.init_args for callback in config.trainer.callbacks or []]
    reward, stays = reward_bytes(settings.reward)
    around: dict[str, Any] = {
        "optimizer": plan_optimizer(settings.optimizer, policy.trained_dtype),
        "reward": reward if reward_gb is None else reward_gb * 1e9,
        "reward_stays": stays,
        **images_at_once(callbacks),
    }
    if issubclass(kind, GRPOModule):
        if settings.images_per_update % (settings.group_size * gpus):
            raise ValueError(
                f"expected images_per_update to split into groups of {settings.group_size} on "
                f"{gpus} GPUs, got {settings.images_per_update}; set --gpus to another number"
            )
        return grpo_work(policy, settings, gpus, **around)
    if issubclass(kind, DPOModule):
        pairs = config.data.init_args.pairs_per_update
        if pairs % gpus:
            raise ValueError(
                f"expected pairs_per_update to split over {gpus} GPUs, got {pairs}; set --gpus to "
                "a divisor"
            )
        return dpo_work(policy, settings, pairs, gpus, **around)
    raise ValueError(f"expected GRPOModule or DPOModule, got {kind.__name__}; plan one of those")


def plan_optimizer(settings: Any, dtype: str) -> OptimizerMemory:
    """What the named optimizer keeps for weights of a type; AdamW by default."""
    if not hasattr(settings, "class_path"):
        return try_optimizer(torch.optim.AdamW, dtype)
    make = partial(resolve_name(settings.class_path), **dict(settings.init_args))
    return try_optimizer(make, dtype)


def reward_bytes(reward: Any) -> tuple[float, bool]:
    """Bytes of a reward's weights where pictures are, and whether they stay there.

    The size of its files where they lie here, else what the piece of configs/rewards with its class
    states.

    Raises:
        ValueError: Neither is known.
    """
    if reward is None:
        return 0.0, True
    settings = getattr(reward, "init_args", None)  # none of a class that takes nothing
    parts = getattr(settings, "rewards", None)
    if parts:
        sizes = [reward_bytes(part) for part in parts.values()]
        return sum(size for size, _ in sizes), any(stays for _, stays in sizes)
    kind = resolve_name(reward.class_path)
    if not issubclass(kind, ModelReward) or getattr(settings, "device", None):
        return 0.0, True
    size = file_bytes(getattr(settings, "path", None)) or stated_bytes(reward)
    if size is None:
        raise ValueError(
            f"expected the weights of {kind.__name__} here or a piece in configs/rewards that "
            "states their number, got neither; state it: --reward_gb 4"
        )
    return size, not getattr(settings, "offload", False)


def file_bytes(path: str | None) -> float | None:
    """Of the weight files at a path, or None where there are none."""
    place = Path(expand_home(path or ""))
    files = [place] if place.is_file() else sorted(place.glob("*")) if path else []
    for suffix in WEIGHT_FILES:  # of one format: some folders hold the same weights in two
        sizes = [file.stat().st_size for file in files if file.suffix == suffix]
        if sizes:
            return float(sum(sizes))
    return None


def stated_bytes(reward: Any) -> float | None:
    """By the header of a piece in configs/rewards: `986 M parameters`, and its dtype."""
    item = 4.0 if getattr(reward.init_args, "dtype", "float32") == "float32" else 2.0
    found = []
    for piece in sorted((ROOT / "configs/rewards").glob("*.yaml")):
        text = piece.read_text()
        stated = re.search(r"([\d.]+) (M|B) parameters", text)
        if stated and f"class_path: {reward.class_path}\n" in text:
            found.append(float(stated[1]) * {"M": 1e6, "B": 1e9}[stated[2]] * item)
    return max(found, default=None)


# Showing ----------------------------------------------------------------------------------------


def format_memory(planned: Memory) -> str:
    """A table in GB: a row for what memory holds, a column for each phase."""
    names = list(dict.fromkeys(name for parts in planned.values() for name in parts))
    widths = {phase: max(10, len(phase) + 2) for phase in planned}
    lines = [f"{'GB on each GPU':32s}" + "".join(f"{p:>{w}s}" for p, w in widths.items())]
    for name in names:
        cells = (f"{planned[p].get(name, 0) / 1e9:{w}.3g}" for p, w in widths.items())
        lines.append(f"{name:32s}" + "".join(cells))
    sums = (f"{sum(planned[p].values()) / 1e9:{w}.3g}" for p, w in widths.items())
    return "\n".join([*lines, f"{'sum':32s}" + "".join(sums)])


def format_seconds(spent: dict[str, float], policy: PlannedPolicy, work: PlannedWork) -> str:
    """The phases' seconds; under GRPO, whose step has all of them, their sum and the pace."""
    draws = max(1, work.draws)
    launched = draws * LAUNCH_SECONDS * policy.sizes.num_tokens
    lines = [f"  {phase}: {value:.3g} s" for phase, value in spent.items()]
    alone = f"at least {launched:.3g} s by a loop of single kernels"
    lines[0] += f" for {draws} x {work.drawn} images ({alone})"
    lines[2] += f" for {work.learnt} images"
    if work.draws:
        total = sum(spent.values())
        lines.append(f"  step: {total:.3g} s, {work.learnt / total:.3g} images/s on each GPU")
    lines.append("  not in these: rewards, making pictures of tokens, the optimizer, evaluations")
    return "\n".join(lines)


def why_no_seconds(name: str, precision: str) -> str:
    """What keeps a plan from telling seconds."""
    if name not in GPUS:
        return "on a CPU, whose rates are not known"
    return f"in {precision}: the rates known are those of bfloat16 products, in {RATED_PRECISION}"


def plan_on(
    name: str, policy: PlannedPolicy, work: PlannedWork, own: argparse.Namespace
) -> dict[str, Any]:
    """Whether one kind of device has room, and how long a step takes on it."""
    device = GPUS.get(name)
    total = own.memory_gb * 1e9 if own.memory_gb else device.memory if device else None
    room = GPU_SHARE * total if total else CPU_SHARE * total_memory(torch.device("cpu"))
    if own.finds_micro_batch:
        work = with_largest(policy, work, room, own.images_each)
    planned = memory(policy, work)
    spent = None
    if device and policy.precision == RATED_PRECISION:
        speed = Speed(device.bandwidth, device.flops, own.bandwidth_share, own.mfu)
        spent = dict(seconds(policy, work, speed))
    phase, most = peak(planned)
    return {
        "gpu": name,
        "source": device.source if device else f"{CPU_SHARE:.0%} of this machine's memory",
        "room": room,
        "peak": most,
        "phase": phase,
        "fits": most <= room,
        "micro_batch_images": work.micro_batch,
        "memory": planned,
        "seconds": spent,
        "communication": {
            "ddp": dict(ddp_bytes(policy, work)),
            "sharded": dict(sharded_bytes(policy, work)),
        }
        if work.processes > 1
        else None,
        "work": work,
    }


def with_largest(
    policy: PlannedPolicy, work: PlannedWork, room: float, images_each: int
) -> PlannedWork:
    """The work with the micro-batch that `auto` would find, or with the smallest if none fits."""
    try:
        units = largest_micro_batch(policy, work, room, images_each)
    except ValueError:  # said by the table
        units = 1
    return replace(work, micro_batch=units * images_each)


def show(found: dict[str, Any], policy: PlannedPolicy) -> None:
    """Print one device's plan."""
    print(f"{found['gpu']} ({found['source']}), micro-batches of {found['micro_batch_images']}")
    print(format_memory(found["memory"]))
    verdict = "fits" if found["fits"] else "DOES NOT FIT"
    numbers = (
        f"{found['peak'] / 1e9:.3g} GB in the {found['phase']}, room {found['room'] / 1e9:.3g}"
    )
    print(f"  {verdict}: {numbers}")
    if found["seconds"]:
        print(format_seconds(found["seconds"], policy, found["work"]))
    else:
        print(f"  seconds: not planned {why_no_seconds(found['gpu'], policy.precision)}")
    if found["communication"]:
        print(format_communication(policy, found["work"]))
    if not found["fits"]:
        print(format_savings(policy, found["work"], found["room"]))
    print()


def plan(arguments: Sequence[str] | None = None) -> list[dict[str, Any]]:
    """Read a command line, print a plan for each kind of device; returns them."""
    own, overrides = _parser().parse_known_args(arguments)
    check_positive(gpus=own.gpus, prompt_tokens=own.prompt_tokens)
    check_share(mfu=own.mfu, bandwidth_share=own.bandwidth_share)
    if not own.mfu or not own.bandwidth_share:
        raise ValueError("expected --mfu and --bandwidth_share above 0, got 0; leave it out")
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    read = main(["fit", "--config", own.config, *overrides], Unbuilt)
    assert isinstance(read, Unbuilt)
    config = read.read
    policy = plan_policy(config, own.prompt_tokens)
    work = plan_work(config, policy, own.gpus, own.reward_gb)
    own.finds_micro_batch = config.model.init_args.micro_batch_size == "auto"
    own.images_each = resolve_name(config.model.class_path).images_each
    names = own.gpu or ["cpu" if config.trainer.accelerator == "cpu" else "h200"]
    print(f"{own.config} on {own.gpus} GPU{'s' * (own.gpus > 1)}, prompts of {own.prompt_tokens}\n")
    policies = [replace(policy, device="cpu" if name == "cpu" else "cuda") for name in names]
    plans = [plan_on(name, on, work, own) for name, on in zip(names, policies, strict=True)]
    for found, on in zip(plans, policies, strict=True):
        show(found, on)
    if own.json:
        rows = [found | {"work": asdict(found["work"])} for found in plans]
        own.json.write_text(json.dumps({"config": own.config, "plans": rows}, indent=2) + "\n")
    return plans


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Memory and seconds of an experiment, planned without weights.",
        epilog="All other arguments override the configuration, as those of tools/main.py do.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="an experiment, like configs/grpo_hps.yaml")
    parser.add_argument("--gpu", nargs="+", choices=[*GPUS, "cpu"], help="one or several kinds")
    parser.add_argument("--gpus", type=int, default=1, help="how many, each with a whole copy")
    parser.add_argument("--memory_gb", type=float, help="of each GPU, if not the data sheet's")
    parser.add_argument("--reward_gb", type=float, help="of the reward's weights, if not known")
    parser.add_argument("--prompt_tokens", type=int, default=PROMPT_TOKENS, help="of a long prompt")
    defaults = Speed(0, 0)
    share = defaults.bandwidth_share
    parser.add_argument("--bandwidth_share", type=float, default=share, help="while decoding")
    parser.add_argument("--mfu", type=float, default=defaults.flops_share, help="of the data sheet")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    return parser


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))  # where a user's own classes lie; else only tools/ is there
    sys.exit(0 if all(found["fits"] for found in run_command(plan)) else 1)
