"""How fast is it here? `python tools/bench.py PHASE --size NAME`.

Times a phase on random weights of a stated size (or on a checkpoint's: --path), warm, several
times, to the device's last kernel, and holds it to the machine's own limits, which are measured in
the same run. Nothing is downloaded.

  rollout                          tokens of --batch images, drawn at once
  rollout --against transformers   the same weights and prompts through transformers' generate, in
                                   turns, after both drew the same greedy tokens
  growth                           rollouts of 1, 2, 4 ... up to --batch images, and what memory
                                   one image more takes, beside what the formula says
  paths                            rollouts by each path of `DecodingSettings`, and how far tokens
                                   and log-probs lie from transformers' own layers'
  update, reward, step             the other phases of GRPO, and all together
  step --against naive             a plain GRPO step (cotgen_pl/bench/naive.py) in turns, and what
                                   each of its habits costs: switched on alone, against the same
                                   step without any

`over load` is the peak less the memory after loading, each in a fresh process: of two steps, or of
one rollout. Prompts are the Shapes world's. The reward of updates and steps is the mean pixel,
which costs nothing; `reward` scores random pictures of the size's side.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from cotgen_pl.bench.arguments import read_arguments
from cotgen_pl.bench.generate import check_agreement, generate_tokens
from cotgen_pl.bench.measuring import (
    copy_bandwidth,
    matrix_rate,
    memory_bytes,
    peak_bytes,
    reset_peak,
    time_alternately,
)
from cotgen_pl.bench.naive import pad_left
from cotgen_pl.bench.paths import compare_paths, draw_by, paths_on
from cotgen_pl.bench.report import Row, as_json, describe_machine, format_found
from cotgen_pl.bench.roofline import Load, Machine, Network, Work, cache_bytes, phase_works
from cotgen_pl.bench.scoring import measure_scoring, read_reward
from cotgen_pl.bench.sizes import SIZES, make_weights, write_without_weights
from cotgen_pl.bench.steps import (
    OURS,
    PEERS,
    MeasuredGRPO,
    compare_steps,
    naive_step,
    peers_for,
    run_in_trainer,
)
from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt, freeze
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.sampling import sample_tokens

if __package__:  # as a module of tools/
    from tools.main import run_command
else:  # as a script, which has its own folder on the path
    from main import run_command

ASSETS = Path(__file__).resolve().parents[1] / "cotgen_pl" / "shapes" / "assets"


class RandomJanus(JanusPolicy):
    """A Janus whose weights are made, not read.

    Args:
        path: A folder with configuration, tokenizer and processor.
        device: Where they are made.
        **arguments: Of `JanusPolicy`.
    """

    def __init__(self, path: str, device: str, **arguments: Any) -> None:
        super().__init__(path, **arguments)
        self.weights_device = torch.device(device)

    def load(self, *, empty: bool = False) -> JanusPolicy:
        """Make the weights, `empty` or not, and decide what trains; a second call does nothing."""
        if self.model is None:
            tokenizer, dtype = self.processor.tokenizer, getattr(torch, self.dtype)
            self.model = make_weights(self.config, tokenizer, dtype, self.weights_device)
            freeze(self.model)
            self.model.model.vqmodel.float()
            self._choose_trainable()
            if self.gradient_checkpointing:
                self.janus.gradient_checkpointing_enable({"use_reentrant": False})
        return self.train()


# Building -----------------------------------------------------------------------------------------


def build_policy(own: argparse.Namespace, folder: Path) -> JanusPolicy:
    """The policy of a size or a path, not loaded; `folder` takes the files of a made one."""
    arguments = {
        "dtype": own.dtype,
        "trained_dtype": own.trained_dtype,
        "gradient_checkpointing": own.recompute,
    }
    if own.path or own.size == "shapes":
        return JanusPolicy(own.path or str(ASSETS / "janus"), **arguments)
    texts = [prompt.text for prompt in read_shapes_prompts()]
    write_without_weights(SIZES[own.size], texts, folder)
    return RandomJanus(str(folder), own.device, **arguments)


def read_shapes_prompts() -> list[Prompt]:
    """The Shapes world's training prompts."""
    return read_prompts(PromptFile(str(ASSETS / "prompts" / "train.jsonl"), "jsonl"))


def pick_prompts(own: argparse.Namespace) -> list[Prompt]:
    """One per group of the batch."""
    return read_shapes_prompts()[: own.batch // own.group_size]


def count_work(
    own: argparse.Namespace, policy: JanusPolicy, prompts: Sequence[Prompt]
) -> dict[str, Work]:
    """The work of each phase, in the type that is computed in."""
    network = Network.of(policy.janus, getattr(torch, own.dtype).itemsize)
    return phase_works(network, count_load(own, policy, prompts))


def count_load(own: argparse.Namespace, policy: JanusPolicy, prompts: Sequence[Prompt]) -> Load:
    """How much the whole batch asks."""
    return Load(
        images=own.batch,
        prompts=len({prompt.text for prompt in prompts}),
        prompt=max(len(policy.prompt_ids(prompt.text)) for prompt in prompts),
        tokens=policy.num_tokens,
        guided=own.guidance != 1,
        mode=own.logprobs,
        recompute=own.recompute,
    )


# Phases -------------------------------------------------------------------------------------------


def measure_rollout(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """Draw tokens; beside it transformers' generate, and the decoding of pictures."""
    device = torch.device(own.device)
    policy = load_to_draw(own, folder)
    prompts = pick_prompts(own)
    texts = [prompt.text for prompt in prompts]
    drawn: list[Tensor] = []

    def draw() -> None:
        drawn[:] = sample_tokens(policy, texts, guidance=own.guidance, seeds=range(own.batch))

    runs: dict[str, Callable[[], object]] = {OURS: draw}
    found: dict[str, Any] = {}
    if own.against:
        repeated = [text for text in texts for _ in range(own.group_size)]
        rows = [policy.prompt_ids(text) for text in repeated]
        inputs = (policy.janus, *pad_left(rows, policy.pad, device), own.guidance)
        greedy = generate_tokens(*inputs, greedy=True)
        equal = check_agreement(policy, repeated, own.guidance, greedy)
        found["equal_greedy_tokens"] = equal
        runs[own.against] = lambda: generate_tokens(*inputs)
    timings = time_alternately(runs, own.repeats, device)
    decode = {"pictures of tokens": lambda: policy.decode(drawn[0])}
    work = count_work(own, policy, prompts)["rollout"]
    least, length = machine.least_seconds(work), policy.num_tokens
    found["rows"] = [
        Row(name, timing, own.batch, length, least) for name, timing in timings.items()
    ]
    for name, timing in time_alternately(decode, own.repeats, device).items():
        found["rows"].append(Row(name, timing, own.batch, length))
    found["bound_by"] = machine.binding(work)
    if own.against:
        found["times_faster"] = timings[own.against].median / timings[OURS].median
    return found


def measure_growth(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """Rollouts of ever more images in turns, and the memory of each in a process of its own."""
    batches = [1 << doublings for doublings in range(own.batch.bit_length())]
    # First, while this process holds no model: each of the others loads one.
    memory = [measure_apart(rollout_bytes, own, images) for images in batches]
    policy = load_to_draw(own, folder)
    runs = {f"{images} images": partial(draw_distinct, own, policy, images) for images in batches}
    timings = time_alternately(runs, own.repeats, torch.device(own.device)).items()
    load = count_load(own, policy, read_shapes_prompts()[: own.batch])
    network = Network.of(policy.janus, getattr(torch, own.dtype).itemsize)
    return {
        "rows": [
            Row(name, timing, images, policy.num_tokens, extra_bytes=extra)
            for (name, timing), images, extra in zip(timings, batches, memory, strict=True)
        ],
        "memory_per_image_gb": statistics.linear_regression(batches, memory).slope / 1e9,
        "its_cache_by_formula_gb": cache_bytes(network, load) / load.images / 1e9,
    }


def draw_distinct(own: argparse.Namespace, policy: JanusPolicy, images: int) -> None:
    """Draw so many images at once, each of a prompt of its own."""
    texts = [prompt.text for prompt in read_shapes_prompts()[:images]]
    sample_tokens(policy, texts, guidance=own.guidance, seeds=range(images))


def rollout_bytes(own: argparse.Namespace, images: int) -> int:
    """Bytes of a rollout over those after loading."""
    device = torch.device(own.device)
    with tempfile.TemporaryDirectory() as folder:
        policy = load_to_draw(own, Path(folder))
        loaded = memory_bytes(device)
        reset_peak(device)
        draw_distinct(own, policy, images)
        return peak_bytes(device)[0] - loaded


def measure_paths(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """Each path held to the eager one, and their rollouts in turns."""
    policy, device = load_to_draw(own, folder), torch.device(own.device)
    texts = [prompt.text for prompt in pick_prompts(own)]
    found = compare_paths(policy, texts, own.guidance)
    runs = {path: partial(draw_by, policy, path, texts, own.guidance) for path in paths_on(device)}
    least = machine.least_seconds(count_work(own, policy, pick_prompts(own))["rollout"])
    found["rows"] = [
        Row(path, timing, len(texts), policy.num_tokens, least)
        for path, timing in time_alternately(runs, own.repeats, device).items()
    ]
    return found


def load_to_draw(own: argparse.Namespace, folder: Path) -> JanusPolicy:
    """The policy on its device with all weights in one type, for nothing trains."""
    policy = build_policy(own, folder).load().to(own.device)
    for weight in policy.parameters():
        if weight.requires_grad:
            weight.data = weight.data.to(getattr(torch, own.dtype))
    freeze(policy)
    return policy


def measure_reward(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """Score random pictures of the size's side in one call, and one by one."""
    reward = read_reward(own.reward).load()
    side = build_policy(own, folder).config.vision_config.image_size
    images = torch.rand(own.batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    prompts = [prompt for prompt in pick_prompts(own) for _ in range(own.group_size)]
    found = measure_scoring(reward, images.to(own.device), prompts, own.repeats)
    return found | {"picture_side": side}


def measure_update(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """One rollout, and the optimizer's step on it again and again."""
    found: dict[str, Any] = {}

    def measure(module: MeasuredGRPO, prompts: list[Prompt]) -> None:
        rollout = module.collect(prompts)
        runs = {OURS: lambda: module.update(rollout)}
        timings = time_alternately(runs, own.repeats, module.device)
        assert isinstance(module.policy, JanusPolicy)
        least = machine.least_seconds(count_work(own, module.policy, prompts)["update"])
        found["rows"] = [Row(OURS, timings[OURS], own.batch, module.policy.num_tokens, least)]

    train(own, folder, measure)
    return found


def measure_step(own: argparse.Namespace, machine: Machine, folder: Path) -> dict[str, Any]:
    """Whole steps, in turns with the naive one and its variants."""
    names = [OURS, *(peers_for(own.habits) if own.against else [])]
    # First, while this process holds no model: each of the others loads one.
    memory = {name: measure_apart(step_bytes, own, name) for name in names}
    found: dict[str, Any] = {}

    def measure(module: MeasuredGRPO, prompts: list[Prompt]) -> None:
        phases: dict[str, list[float]] = defaultdict(list)
        runs = {name: step_run(module, prompts, name, phases) for name in names}
        timings = time_alternately(runs, own.repeats, module.device)
        assert isinstance(module.policy, JanusPolicy)
        works = count_work(own, module.policy, prompts).values()
        least, tokens = sum(map(machine.least_seconds, works)), module.policy.num_tokens
        found["rows"] = [
            Row(name, timing, own.batch, tokens, least, memory[name])
            for name, timing in timings.items()
        ]
        # Without the run to warm up.
        found["phases_s"] = {name: statistics.median(spent[1:]) for name, spent in phases.items()}
        found.update(compare_steps(timings, memory) if own.against else {})

    train(own, folder, measure)
    return found


def step_run(
    module: MeasuredGRPO, prompts: list[Prompt], name: str, phases: dict[str, list[float]]
) -> Callable[[], object]:
    """One whole step of a candidate; ours adds the seconds of its phases to `phases`."""
    if name != OURS:
        step = naive_step(module, prompts, PEERS[name])
        return lambda: step.run(module.noise_seeds(prompts, module.group_size, "rollout"))

    def run() -> None:
        module.run_step(prompts)
        for phase, spent in module.seconds.items():
            phases[phase].append(spent)

    return run


def train(
    own: argparse.Namespace, folder: Path, measure: Callable[[MeasuredGRPO, list[Prompt]], None]
) -> None:
    """Measure inside of a GRPO run by the command line's settings."""
    run_in_trainer(
        build_policy(own, folder),
        pick_prompts(own),
        measure,
        folder,
        device=own.device,
        dtype=own.dtype,
        optimizer=own.optimizer,
        guidance=own.guidance,
        images_per_update=own.batch,
        group_size=own.group_size,
        micro_batch_size=own.micro_batch_size,
        drawn_at_once=own.drawn_at_once,
        logprobs=own.logprobs,
    )


def measure_apart(measure: Callable[..., int], *arguments: object) -> int:
    """What a function of this file finds in a fresh process."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(measure, *arguments).result()


def step_bytes(own: argparse.Namespace, name: str) -> int:
    """Bytes of a candidate's first two steps over those after loading.

    From the second step on, Adam's state is there.
    """
    found: list[int] = []

    def measure(module: MeasuredGRPO, prompts: list[Prompt]) -> None:
        run = step_run(module, prompts, name, defaultdict(list))
        loaded = memory_bytes(module.device)
        reset_peak(module.device)
        run()
        run()
        found.append(peak_bytes(module.device)[0] - loaded)

    with tempfile.TemporaryDirectory() as folder:
        train(own, Path(folder), measure)
    return found[0]


PHASES = {
    "rollout": measure_rollout,
    "growth": measure_growth,
    "paths": measure_paths,
    "update": measure_update,
    "reward": measure_reward,
    "step": measure_step,
}


def bench(arguments: Sequence[str] | None = None) -> dict[str, Any]:
    """Read a command line, measure, print and write; returns what the JSON file holds."""
    own = read_arguments(arguments)
    device, dtype = torch.device(own.device), getattr(torch, own.dtype)
    machine = Machine(copy_bandwidth(device), matrix_rate(device, dtype))
    content = {"settings": vars(own), "machine": describe_machine(machine, device)}
    with tempfile.TemporaryDirectory() as folder:
        found = PHASES[own.phase](own, machine, Path(folder))
    model = own.path or own.size
    print(f"{own.phase} of {model}: {own.batch} images, guidance {own.guidance:g}, {own.dtype}")
    print(format_found(content["machine"], found))
    content |= found | {"rows": [row.as_dict() for row in found["rows"]]}
    if own.json:
        own.json.write_text(as_json(content))
    return content


if __name__ == "__main__":
    run_command(bench)
