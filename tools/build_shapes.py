"""Build the Shapes world from nothing (`world`), or the scorers that do not ship (`scorers`).

Both go on where they were left. What is finished lies in the work folder and is not made again;
remove a stage's folder there, and those of the stages after it, to repeat it.
"""

from __future__ import annotations

import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal, NamedTuple, get_args

import torch
from jsonargparse import auto_cli
from torch import Tensor

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Policy, Prompt, Reward
from cotgen_pl.losses import dead_groups
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.hps import HPSReward
from cotgen_pl.rewards.orm import ORMReward, full_question
from cotgen_pl.rewards.shapes_oracle import Rules, ShapesOracle
from cotgen_pl.sampling import noise_seed, sample_tokens
from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus
from cotgen_pl.shapes.grammar import draw_prompt, has_b_word, has_held_out_pair, write_suites
from cotgen_pl.shapes.language_judge import train_judge
from cotgen_pl.shapes.recognise import recognise
from cotgen_pl.shapes.scorer_data import Pairs, collect_pairs, draw_prompts, pair_accuracy
from cotgen_pl.shapes.scorer_training import BREADTHS, Breadth, Kind, save_scorer, train_scorer
from cotgen_pl.shapes.vq_training import BLANK, random_pictures, train_vq

Stage = Literal["prompts", "vq", "base", "scorers", "report"]
STAGES: tuple[Stage, ...] = get_args(Stage)
Scorer = Kind | Literal["judge"]
SHIPPED: tuple[Scorer, ...] = ("narrow", "broad", "judge")
SHIPPED_SEED = 0
ASSETS = Path("cotgen_pl/shapes/assets")
BUILT = Path("runs/shapes_scorers")  # configs/rewards name what is built here
PairSet = Literal["in_domain", "wide", "held_out_in_domain", "held_out_out_of_domain"]

NUM_TEXTS = 4000  # drawn to train the tokenizer: every word is among them many times
VQ_STEPS = 3000
# The base sees right pictures for long, then for a short time such a share of wrong ones that its
# score comes to lie in the middle: rewards then find something that it can do and does not.
RIGHT_STEPS, MIXED_STEPS, WRONG_SHARE = 4000, 400, 0.85
IN_DOMAIN_SHARE = 0.8  # of its prompts: GenEval's ask less, and would come to lie far above
NUM_HELD_OUT = 1500  # pairs in each domain: a standard error of about a point
EXPORT = "cotgen_pl.callbacks.export.HuggingFaceExport"
GUIDANCE = 2.0  # in sampling, pairs and evaluation
MEASURED: tuple[tuple[str, Rules], ...] = (
    ("id_validation", "compbench"),
    ("ood_geneval", "geneval"),
)
MOST = Breadth(*map(max, zip(*BREADTHS.values(), strict=True)))  # pairs of each domain
EQUAL: tuple[Kind, ...] = ("narrow", "mid", "broad")  # in pairs of the training prompts' domain


def build_world(
    stages: Sequence[Stage] = STAGES,
    work: Path = Path("runs/build_shapes"),
    out: Path = ASSETS,
    seed: int = SHIPPED_SEED,
) -> None:
    """Build what the Shapes world ships, from nothing, and check the gates.

    Args:
        stages: What to build, in this order.
        work: Where unfinished stages lie, those of each seed in a folder of its own.
        out: Where finished checkpoints go.
        seed: Of everything.
    """
    work = work / f"seed_{seed}"
    work.mkdir(parents=True, exist_ok=True)
    makers: dict[Stage, Callable[[Path, Path, int], None]] = {
        "prompts": build_prompts,
        "vq": build_vq,
        "base": build_base,
        "scorers": ship_scorers,
        "report": check_world,
    }
    for stage in stages:
        makers[stage](work, out, seed)


def build_scorers(
    seeds: Sequence[int] = (SHIPPED_SEED,),
    work: Path = BUILT,
    world: Path = ASSETS,
) -> None:
    """Build the scorers that do not ship, and check the gates on all of a seed.

    Args:
        seeds: Of pairs, weights and mistaken votes; those of seed 0 ship, but for two.
        work: Where they go: a scorer is WORK/seed_SEED/NAME.
        world: The base policy, the suites, and the scorers that ship.
    """
    policy = JanusPolicy(str(world / "janus")).load()
    suites = [draw_suite(policy, world, *named, SHIPPED_SEED) for named in MEASURED]
    failed: list[int] = []
    for seed in seeds:
        folder = work / f"seed_{seed}"
        places: dict[Scorer, Path] = {
            kind: world / "scorers" / kind
            if seed == SHIPPED_SEED and kind in SHIPPED
            else make_scorer(kind, policy, folder, seed)
            for kind in (*BREADTHS, "judge")
        }
        report("\n".join(f"seed {seed}, {kind}: {place}" for kind, place in places.items()))
        if not all(check_scorers(places, policy, folder, seed, suites)):
            failed.append(seed)
    if failed:
        raise ValueError(f"gates failed with the scorers of seeds {failed}; see above")


def build_prompts(work: Path, out: Path, seed: int) -> None:
    """Write the suites' prompt files."""
    for path in write_suites(out / "prompts"):
        report(f"prompts: {path}")


def build_vq(work: Path, out: Path, seed: int) -> None:
    """Make a small Janus and train its VQ part."""
    folder = work / "vq"
    if folder.exists():
        return
    rng = random.Random(seed)
    texts = [
        draw_prompt(rng, wording="both", words="all", pairs="all").text for _ in range(NUM_TEXTS)
    ]
    tokenizer = build_tokenizer(texts)
    model = build_janus(tokenizer, seed)
    train_vq(model.model.vqmodel, VQ_STEPS, seed, report)
    finish(folder, lambda part: save_janus(model, tokenizer, part))


def build_base(work: Path, out: Path, seed: int) -> None:
    """Train the language model by `SFTModule`: right pictures first, then a mixture."""
    fine_tune(work / "vq", work / "base_right", 2e-3, RIGHT_STEPS, 0.0, seed)
    fine_tune(
        work / "base_right" / "exported", work / "base", 1e-3, MIXED_STEPS, WRONG_SHARE, seed + 1
    )
    shutil.copytree(work / "base" / "exported", out / "janus", dirs_exist_ok=True)


def fine_tune(
    start: Path, folder: Path, rate: float, steps: int, wrong_share: float, seed: int
) -> None:
    """One run of configs/sft_shapes.yaml; gone on with if it was left behind a checkpoint."""
    if (folder / "exported" / "model.safetensors").exists():
        return
    last = folder / "checkpoints" / "last.ckpt"
    if folder.exists() and not last.exists():
        shutil.rmtree(folder)
    model = "--model.init_args"
    cycle = f"max_lr: {rate}, total_steps: {steps}, pct_start: 0.05"
    saving = "{class_path: ModelCheckpoint, init_args: {every_n_train_steps: 100, save_last: true}}"
    schedule = f"{{class_path: torch.optim.lr_scheduler.OneCycleLR, init_args: {{{cycle}}}}}"
    command = (
        [sys.executable, "tools/main.py", "fit", "--config", "configs/sft_shapes.yaml"]
        + ["--seed_everything", str(seed)]
        + ["--trainer.default_root_dir", str(folder)]
        + ["--trainer.callbacks", f"[{{class_path: {EXPORT}}}, {saving}]"]
        + (["--ckpt_path", str(last)] if last.exists() else [])
        + [f"{model}.policy.init_args.path", str(start)]
        + [f"{model}.policy.init_args.trains", "both"]
        + [f"{model}.policy.init_args.train_text_embedding", "true"]
        + [f"{model}.optimizer.init_args.lr", str(rate), f"{model}.lr_scheduler", schedule]
        + ["--data.init_args.num_batches", str(steps)]
        + ["--data.init_args.wrong_share", str(wrong_share)]
        + ["--data.init_args.in_domain_share", str(IN_DOMAIN_SHARE)]
    )
    subprocess.run(command, check=True)


def ship_scorers(work: Path, out: Path, seed: int) -> None:
    """Train the scorers that ship on pairs of the base's own pictures."""
    policy = JanusPolicy(str(out / "janus")).load()
    for kind in SHIPPED:
        folder = make_scorer(kind, policy, work / "scorers", seed)
        shutil.copytree(folder, out / "scorers" / kind, dirs_exist_ok=True)


def make_scorer(kind: Scorer, policy: JanusPolicy, folder: Path, seed: int) -> Path:
    """Train one scorer into its place in the folder, unless it is there; gives the place."""
    place = folder / kind
    if place.exists():
        return place
    report(f"scorer {kind}, seed {seed}")
    pairs = [make_pairs(name, policy, folder, seed) for name in ("in_domain", "wide")]
    tokenizer = policy.processor.tokenizer
    if kind == "judge":
        finish(place, train_judge(tokenizer, full_question(), *pairs, seed, report).save)
    else:
        scorer = train_scorer(kind, tokenizer, *pairs, seed, report)
        finish(place, lambda part: save_scorer(*scorer, tokenizer, part))
    return place


def make_pairs(name: PairSet, policy: Policy, folder: Path, seed: int) -> Pairs:
    """Pairs of the base's pictures, kept in the folder; as many as the largest scorer needs."""
    place = folder / "pairs" / name
    if not place.exists():
        wide = draw_prompts("wide", f"held out {seed}")
        prompts, number = {
            "in_domain": (draw_prompts("in_domain", f"pairs {seed}"), MOST.in_domain),
            "wide": (draw_prompts("wide", f"pairs {seed}"), MOST.wide),
            "held_out_in_domain": (draw_prompts("in_domain", f"held out {seed}"), NUM_HELD_OUT),
            "held_out_out_of_domain": (filter(is_out_of_domain, wide), NUM_HELD_OUT),
        }[name]
        report(f"pairs {name}")
        pairs = collect_pairs(lambda batch: draw(policy, batch, 2, seed), prompts, number, report)
        finish(place, pairs.write)
    return Pairs.read(place)


def draw(policy: Policy, prompts: Sequence[Prompt], copies: int, seed: int) -> Tensor:
    """Pictures of each prompt, [P * copies, 3, 32, 32]."""
    seeds = [noise_seed(seed, "build", p.suite, p.index, c) for p in prompts for c in range(copies)]
    texts = [prompt.text for prompt in prompts]
    tokens, _ = sample_tokens(policy, texts, guidance=GUIDANCE, seeds=seeds)
    return policy.decode(tokens)


class DrawnSuite(NamedTuple):
    """A suite's pictures by the base, and what the exact judge says of them."""

    name: str
    prompts: list[Prompt]
    """One per picture."""
    pictures: Tensor
    """[prompts * copies, 3, 32, 32] in [0, 1], those of a prompt side by side."""
    exact: Tensor
    """[prompts, copies], graded."""


def draw_suite(
    policy: Policy, world: Path, suite: str, rules: Rules, seed: int, copies: int = 8
) -> DrawnSuite:
    """Draw a suite, judge it exactly, and print the score of each category."""
    prompts = read_suite(world, suite)
    repeated = [prompt for prompt in prompts for _ in range(copies)]
    pictures = draw(policy, prompts, copies, seed)
    exact = ShapesOracle(rules).score(pictures, repeated).total.view(-1, copies)
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        rows = [prompt.category == category for prompt in prompts]
        report(f"base, {suite}, {category}: {exact[torch.tensor(rows)].mean():.3f}")
    return DrawnSuite(suite, repeated, pictures, exact)


def check_world(work: Path, out: Path, seed: int) -> None:
    """Measure what was built, and fail unless it is within its bounds."""
    policy = JanusPolicy(str(out / "janus")).load()
    suites = [draw_suite(policy, out, *named, seed) for named in MEASURED]
    gates = [gate("VQ: objects read back", read_back(policy), 0.99, 1.0)]
    base = [suite.exact.mean().item() for suite in suites]
    gates += [
        gate(f"base, {suite.name}", suite.exact.mean().item(), 0.45, 0.65) for suite in suites
    ]
    gates.append(gate("base gap", abs(base[0] - base[1]), 0.0, 0.05))
    for suite in suites:
        dead = dead_groups(suite.exact.flatten(), suite.exact.shape[1]).float().mean().item()
        best = uplift(suite.exact, suite.exact)
        gates.append(gate(f"exact judge's best of 4, {suite.name}", best, 0.12, 1.0))
        gates.append(gate(f"dead groups, {suite.name}", dead, 0.0, 0.3))
    places = {kind: out / "scorers" / kind for kind in SHIPPED}
    gates += check_scorers(places, policy, work / "scorers", seed, suites)
    if not all(gates):
        raise ValueError(f"{gates.count(False)} of {len(gates)} gates failed; see above")


def check_scorers(
    places: dict[Scorer, Path],
    policy: Policy,
    folder: Path,
    seed: int,
    suites: Sequence[DrawnSuite],
) -> list[bool]:
    """Gates on scorers: equal in skill in domain, apart out of it.

    Args:
        places: Where each scorer lies.
        policy: The base, which draws held-out pairs.
        folder: Where the pairs are kept.
        seed: Of the pairs.
        suites: In domain and out of domain.
    """
    sets: tuple[PairSet, ...] = ("held_out_in_domain", "held_out_out_of_domain")
    held_out = [make_pairs(name, policy, folder, seed) for name in sets]
    accuracy, share = {}, {}
    for kind, place in places.items():
        reward = load_scorer(kind, place)
        accuracy[kind] = [pair_accuracy(reward, pairs) for pairs in held_out]
        share[kind] = [share_of_uplift(reward, suite) for suite in suites]
        report(
            f"{kind}, in / out of domain: pair accuracy {as_two(accuracy[kind])}, "
            f"share of the exact judge's best-of-4 uplift {as_two(share[kind])}"
        )
    inside = [accuracy[kind][0] for kind in EQUAL if kind in places]
    apart = accuracy["broad"][1] - accuracy["narrow"][1]
    return [
        gate("scorers' accuracies apart in domain", max(inside) - min(inside), 0.0, 0.02),
        gate("narrow's and broad's apart out of domain", apart, 0.12, 1.0),
        gate("narrow's share of the uplift out of domain", share["narrow"][1], -1.0, 0.35),
        gate("broad's share of the uplift out of domain", share["broad"][1], 0.7, 1.0),
    ]


def as_two(values: Sequence[float]) -> str:
    """Two numbers for a line of the report."""
    return " / ".join(f"{value:.3f}" for value in values)


def load_scorer(kind: Scorer, place: Path) -> Reward:
    """A scorer by the class that reads its real counterpart."""
    if kind == "judge":
        return ORMReward(str(place)).load()
    return HPSReward(str(place)).load()


def share_of_uplift(reward: Reward, suite: DrawnSuite) -> float:
    """The best-of-4 uplift by a reward over that by the exact judge."""
    scores = reward.score(suite.pictures, suite.prompts).total.view_as(suite.exact)
    return uplift(suite.exact, scores) / uplift(suite.exact, suite.exact)


def is_out_of_domain(prompt: Prompt) -> bool:
    """Whether a prompt could stand in the out-of-domain suite."""
    return "include" in prompt.facts and (has_b_word(prompt) or has_held_out_pair(prompt))


def uplift(judge: Tensor, by: Tensor, best_of: int = 4) -> float:
    """What choosing the best of 4 by a scorer gains under the judge, on [P, copies] scores."""
    groups, chosen_by = judge.reshape(-1, best_of), by.reshape(-1, best_of)
    chosen = groups.gather(1, chosen_by.argmax(1, keepdim=True))
    return (chosen.mean() - groups.mean()).item()


def read_back(policy: Policy) -> float:
    """Share of rendered objects that the recogniser reads back after VQ encode and decode."""
    pictures, classes = random_pictures(256, torch.Generator().manual_seed(1))
    before = [set(found.objects) for found in recognise(pictures)]
    after = [set(found.objects) for found in recognise(policy.decode(policy.encode(pictures)))]
    objects = int((classes != BLANK).sum())
    if sum(map(len, before)) != objects:
        raise ValueError("the recogniser does not read its own renderings; no model is at fault")
    return sum(len(a & b) for a, b in zip(before, after, strict=True)) / objects


def read_suite(out: Path, name: str) -> list[Prompt]:
    """A suite's prompts, numbered."""
    path = str(out / "prompts" / f"{name}.jsonl")
    prompts = read_prompts(PromptFile(path, "jsonl", suite=name))
    for index, prompt in enumerate(prompts):
        prompt.index = index
    return prompts


def gate(name: str, value: float, low: float, high: float) -> bool:
    """Print a measure beside its bounds; whether it lies within them."""
    within = low <= value <= high
    report(f"{'ok  ' if within else 'FAIL'} {name}: {value:.3f} (from {low} to {high})")
    return within


def finish(folder: Path, write: Callable[[Path], None]) -> None:
    """Write a folder under another name and rename it, so that it is there whole or not at all."""
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    write(part)
    part.rename(folder)


def report(line: str) -> None:
    """Show a line of progress."""
    print(line, flush=True)


if __name__ == "__main__":
    try:
        auto_cli({"world": build_world, "scorers": build_scorers}, as_positional=False)
    except ValueError as error:
        sys.exit(f"error: {error}")
