"""One process, two with whole models and two with parts of one learn the same."""

import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import JanusForConditionalGeneration

from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus
from tests.toys import write_pairs
from tests.two_processes import learn

SECONDS = 600  # far more than it takes: a collective call that one process misses would hang
ALGORITHMS = ("grpo", "dpo")
STRATEGIES = ("ddp", "sharded")
UNITS = 3  # two layers, and what trains outside of them


def learn_on_two(repository: Path, folder: Path, plan: list[dict[str, Any]]) -> list[list[Any]]:
    """Carry out a plan on two processes; what each of them found, by step of the plan."""
    folder.mkdir()
    (folder / "plan.json").write_text(json.dumps(plan))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    command += ["tests/two_processes.py", str(folder / "plan.json"), str(folder)]
    environment = os.environ | {"PYTHONPATH": str(repository), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        command, cwd=repository, env=environment, capture_output=True, text=True, timeout=SECONDS
    )
    assert done.returncode == 0, done.stderr[-6000:]
    return [
        [torch.load(folder / f"{number}-{rank}.pt", weights_only=True) for rank in range(2)]
        for number in range(len(plan))
    ]


def largest_difference(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> float:
    assert one.keys() == two.keys() and one
    return max((one[name] - two[name]).abs().max().item() for name in one)


def steps_of(folder: Path, shared: dict[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """The arguments of `learn` for each algorithm and each way to have two processes."""
    return {
        (algorithm, strategy): shared
        | {
            "algorithm": algorithm,
            "strategy": strategy,
            "folder": f"{folder}/{algorithm}/{strategy}",
        }
        for algorithm in ALGORITHMS
        for strategy in STRATEGIES
    }


def learn_everywhere(
    repository: Path, folder: Path, shared: dict[str, Any]
) -> dict[tuple[str, str | None], list[Any]]:
    """(Algorithm, strategy) to what each process found; strategy None is one process."""
    plan = steps_of(folder, shared)
    found = dict(zip(plan, learn_on_two(repository, folder / "two", [*plan.values()]), strict=True))
    alone = {
        (algorithm, None): [
            learn(**shared, algorithm=algorithm, strategy=None, folder=f"{folder}/{algorithm}/one")
        ]
        for algorithm in ALGORITHMS
    }
    return found | alone


def assert_same_learning(ranks: list[Any], alone: dict[str, Any], updates: int) -> None:
    for rollout, tokens in enumerate(alone["tokens"]):
        assert torch.equal(torch.cat([rank["tokens"][rollout] for rank in ranks]), tokens)
    assert len(alone["gradients"]) == updates
    for rank in ranks:
        for own, expected in zip(rank["gradients"], alone["gradients"], strict=True):
            assert largest_difference(own, expected) < 1e-10
        assert largest_difference(rank["weights"], alone["weights"]) < 1e-8


@pytest.fixture(scope="module")
def runs(repository, tiny_janus, tmp_path_factory):
    """Two updates of each algorithm on one process, and on two in each way."""
    folder = tmp_path_factory.mktemp("sharding")
    pairs = write_pairs(folder / "set", 8).folder
    shared = {"janus": str(tiny_janus), "pairs": str(pairs), "updates": 2, "profiles": True}
    return folder, shared, learn_everywhere(repository, folder, shared)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_two_processes_learn_what_one_does(runs, algorithm, strategy):
    _, _, found = runs
    [alone] = found[algorithm, None]
    assert_same_learning(found[algorithm, strategy], alone, updates=2)
    assert largest_difference(alone["weights"], alone["start"]) > 5e-4


def test_each_layer_is_gathered_once_for_a_rollout(runs):
    _, _, found = runs
    for rank in found["grpo", "sharded"]:
        assert rank["gathers"] == [UNITS, UNITS]  # and not once for each of four tokens
    assert found["grpo", "ddp"][0]["gathers"] == [0, 0]


def test_the_exported_parts_are_what_one_process_exports(runs):
    folder, _, found = runs
    states = [
        JanusForConditionalGeneration.from_pretrained(
            folder / "grpo" / name / "exported", dtype=torch.float64
        ).state_dict()
        for name in ("one", "sharded")
    ]
    assert largest_difference(*states) < 1e-8
    trained = found["grpo", "sharded"][0]["weights"]
    assert all(torch.equal(states[1][n.removeprefix("model.")], w) for n, w in trained.items())


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_one_process_goes_on_where_two_stopped(runs, tmp_path, algorithm):
    folder, shared, _ = runs
    settings = shared | {"algorithm": algorithm, "strategy": None, "updates": 4, "profiles": False}
    whole = learn(**settings, folder=str(tmp_path / "whole"))
    stopped = str(folder / algorithm / "sharded")
    resumed = learn(**settings, folder=str(tmp_path / "resumed"), resume=stopped)
    assert len(resumed["gradients"]) == 2
    assert largest_difference(resumed["weights"], whole["weights"]) < 1e-8


# Slow -------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "adapters": {"lora": {"rank": 2, "alpha": 4}},
    "adapters, a live reference": {
        "algorithm": "dpo",
        "lora": {"rank": 2, "alpha": 4},
        "reference_logps": "live",
    },
    "a live reference, micro-batches": {
        "algorithm": "dpo",
        "reference_logps": "live",
        "micro_batch_size": 1,
    },
    "two updates per rollout": {"updates_per_rollout": 2, "kl_penalty": 0.1, "updates": 6},
    "gathered for each token": {"gather": "step", "profiles": True},
    "all that trains": {"trains": "both"},
    "clipped gradients": {"gradient_clip": 1e-3},
    "recomputed layers": {"gradient_checkpointing": True},
}


@pytest.mark.slow
def test_five_updates_on_two_processes_are_those_of_one(repository, tiny_janus, tmp_path):
    pairs = write_pairs(tmp_path / "set", 8).folder
    shared = {"janus": str(tiny_janus), "pairs": str(pairs), "updates": 5}
    found = learn_everywhere(repository, tmp_path, shared)
    for algorithm in ALGORITHMS:
        [alone] = found[algorithm, None]
        for strategy in STRATEGIES:
            assert_same_learning(found[algorithm, strategy], alone, updates=5)
        assert largest_difference(alone["weights"], alone["start"]) > 1e-3


@pytest.mark.slow
def test_every_variant_is_the_same_in_parts(repository, tiny_janus, tmp_path):
    pairs = write_pairs(tmp_path / "set", 8).folder
    shared = {"janus": str(tiny_janus), "pairs": str(pairs), "updates": 2, "algorithm": "grpo"}
    plan = [
        shared | {"strategy": "sharded", "folder": str(tmp_path / str(number))} | settings
        for number, settings in enumerate(VARIANTS.values())
    ]
    found = learn_on_two(repository, tmp_path / "two", plan)
    for arguments, ranks, name in zip(plan, found, VARIANTS, strict=True):
        one = {"strategy": None, "gather": "rollout", "folder": str(tmp_path / "one" / name)}
        alone = learn(**(arguments | one))
        assert_same_learning(ranks, alone, updates=arguments["updates"])
        assert largest_difference(alone["weights"], alone["start"]) > 5e-4, name
    by_token = found[list(VARIANTS).index("gathered for each token")][0]
    assert by_token["gathers"] == [UNITS * 4, UNITS * 4]


@pytest.mark.slow
@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_runs_go_on_with_another_number_of_processes(repository, tiny_janus, tmp_path, algorithm):
    """Five updates behind a checkpoint of one, of two with whole models and of two with parts."""
    pairs = write_pairs(tmp_path / "set", 8).folder
    shared: dict[str, Any] = {"janus": str(tiny_janus), "pairs": str(pairs), "algorithm": algorithm}

    def place(name: str) -> dict[str, str]:
        return {"folder": str(tmp_path / name)}

    learn(**shared, strategy=None, updates=2, **place("one"))
    whole = learn(**shared, strategy=None, updates=7, **place("whole"))
    first = [shared | place(s) | {"strategy": s, "updates": 2} for s in STRATEGIES]
    pairings = [(a, b) for a in ("one", *STRATEGIES) for b in STRATEGIES if a != b]
    then = [
        shared
        | place(f"{before} {after}")
        | {"strategy": after, "updates": 7, "resume": str(tmp_path / before)}
        for before, after in (*pairings, ("sharded", "sharded"))
    ]
    found = learn_on_two(repository, tmp_path / "two", [*first, *then])[len(first) :]
    resume = str(tmp_path / "sharded")
    found.append([learn(**shared, strategy=None, updates=7, resume=resume, **place("back"))])
    for ranks in found:
        for rank in ranks:
            assert len(rank["gradients"]) == 5
            assert largest_difference(rank["weights"], whole["weights"]) < 1e-8


@pytest.mark.slow
def test_float32_differs_by_rounding_alone(repository, tmp_path):
    """10,240 tokens of the shipped model, and the gradients of an update on them."""
    pairs = write_pairs(tmp_path / "set", 64, torch.randint(0, 128, (64, 2, 16))).folder
    janus = repository / "cotgen_pl/shapes/assets/janus"
    shared = {"janus": str(janus), "pairs": str(pairs), "updates": 1, "dtype": "float32"}
    plan = steps_of(tmp_path, shared | {"guidance": 2.0})
    for (algorithm, _), arguments in plan.items():
        if algorithm == "grpo":
            arguments |= {"images_per_update": 640, "images_budget": 640, "micro_batch_size": 160}
    ranks = learn_on_two(repository, tmp_path / "two", [*plan.values()])
    for number, (arguments, found) in enumerate(zip(plan.values(), ranks, strict=True)):
        one = {"strategy": None, "folder": str(tmp_path / f"one{number}")}
        alone = learn(**(arguments | one))
        if arguments["algorithm"] == "grpo":
            drawn = torch.cat([rank["tokens"][0] for rank in found])
            assert drawn.numel() == 10_240
            assert (drawn != alone["tokens"][0]).double().mean() <= 1e-4
        for rank in found:
            for name, expected in alone["gradients"][0].items():
                difference = (rank["gradients"][0][name] - expected).norm() / expected.norm()
                assert difference <= 1e-4, name


@pytest.mark.slow
def test_bfloat16_gathers_what_autocast_computes_with(repository, tiny_janus, tmp_path):
    """Layers in bfloat16, sums of gradients and all that trains in float32, as on one process."""
    pairs = write_pairs(tmp_path / "set", 8).folder
    shared = {"janus": str(tiny_janus), "pairs": str(pairs), "algorithm": "dpo", "updates": 2}
    shared |= {"dtype": "float32", "precision": "bf16-mixed"}
    plan = [shared | {"strategy": "sharded", "folder": str(tmp_path / "sharded")}]
    [ranks] = learn_on_two(repository, tmp_path / "two", plan)
    alone = learn(**shared, strategy=None, folder=str(tmp_path / "one"))
    for rank in ranks:
        for name, expected in alone["gradients"][0].items():
            own = rank["gradients"][0][name]
            assert own.dtype == rank["weights"][name].dtype == torch.float32
            assert (own - expected).norm() <= 0.02 * expected.norm(), name


@pytest.mark.exhaustive
@pytest.mark.slow
def test_gathering_once_is_three_times_as_fast_as_for_each_token(repository, tmp_path):
    """Two images of 36 tokens on each process, 8 layers, 512 wide; the second rollouts count."""
    tokenizer = build_tokenizer(["a red circle left of a blue square", "two cats"], 300)
    sizes = {"hidden_size": 512, "num_layers": 8, "num_heads": 4, "codebook_size": 64}
    janus = tmp_path / "janus"
    save_janus(build_janus(tokenizer, **sizes, grid=6, vq_levels=2), tokenizer, janus)
    shared = {"janus": str(janus), "algorithm": "grpo", "strategy": "sharded", "updates": 2}
    small = {"dtype": "float32", "guidance": 1.0, "kl_coef": 0.0}
    small |= {"images_per_update": 4, "group_size": 2, "timed": True}
    ways = ["rollout", "step"] * 3  # in turns: other work on the machine slows both
    plan = [
        shared | small | {"gather": gather, "folder": str(tmp_path / f"{turn} {gather}")}
        for turn, gather in enumerate(ways)
    ]
    found = learn_on_two(repository, tmp_path / "two", plan)
    seconds = {
        gather: [
            ranks[0]["seconds"][-1] for ranks, way in zip(found, ways, strict=True) if way == gather
        ]
        for gather in ("rollout", "step")
    }
    once, by_token = (statistics.median(seconds[gather]) for gather in ("rollout", "step"))
    assert by_token >= 3 * once, seconds
