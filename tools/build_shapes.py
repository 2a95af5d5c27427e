"""Build the Shapes world's checkpoints from nothing: `python tools/build_shapes.py`.

Stages, each resumed where it was left: prompts, vq, base, scorers, report. What is finished lies in
the work folder and is not made again; remove a stage's folder there to repeat it.
"""

from __future__ import annotations

import functools
import random
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

import torch
from jsonargparse import auto_cli
from torch import Tensor

from cotgen_pl.data.prompts import PromptFile, read_prompts
from cotgen_pl.interfaces import Policy, Prompt, Reward
from cotgen_pl.losses import dead_groups
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rewards.hps import HPSReward
from cotgen_pl.rewards.shapes_oracle import ShapesOracle
from cotgen_pl.sampling import noise_seed, sample_tokens
from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus
from cotgen_pl.shapes.grammar import draw_prompt, has_b_word, has_held_out_pair, write_suites
from cotgen_pl.shapes.recognise import recognise
from cotgen_pl.shapes.scorer_data import Domain, Pairs, collect_pairs, draw_prompts, pair_accuracy
from cotgen_pl.shapes.scorer_training import BREADTHS, Kind, save_scorer, train_scorer
from cotgen_pl.shapes.vq_training import BLANK, random_pictures, train_vq

Stage = Literal["prompts", "vq", "base", "scorers", "report"]
STAGES: tuple[Stage, ...] = ("prompts", "vq", "base", "scorers", "report")

NUM_TEXTS = 4000  # drawn to train the tokenizer: every word is among them many times
VQ_STEPS = 3000
# The base sees right pictures for long, then for a short time such a share of wrong ones that its
# score comes to lie in the middle: rewards then find something that it can do and does not.
RIGHT_STEPS, MIXED_STEPS, WRONG_SHARE = 4000, 400, 0.85
IN_DOMAIN_SHARE = 0.8  # of its prompts: GenEval's ask less, and would come to lie far above
SHIPPED: tuple[Kind, ...] = ("narrow", "broad")
NUM_HELD_OUT = 1500  # pairs in each domain: a standard error of about a point
EXPORT = "cotgen_pl.callbacks.export.HuggingFaceExport"
GUIDANCE = 2.0  # in sampling, pairs and evaluation


def build_shapes(
    stages: Sequence[Stage] = STAGES,
    work: Path = Path("runs/build_shapes"),
    out: Path = Path("cotgen_pl/shapes/assets"),
    seed: int = 0,
) -> None:
    """Build what the Shapes world ships.

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
        "scorers": build_scorers,
        "report": check_gates,
    }
    for stage in stages:
        makers[stage](work, out, seed)


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


def build_scorers(work: Path, out: Path, seed: int) -> None:
    """Train the shipped HPS-style scorers on pairs of the base's own pictures."""
    policy = JanusPolicy(str(out / "janus")).load()
    for kind in SHIPPED:
        folder = work / "scorers" / kind
        if not folder.exists():
            pairs = [make_pairs(policy, domain, work, seed) for domain in ("in_domain", "wide")]
            scorer = train_scorer(kind, policy.processor.tokenizer, *pairs, seed, report)
            finish(folder, lambda part, s=scorer: save_scorer(*s, policy.processor.tokenizer, part))
        shutil.copytree(folder, out / "scorers" / kind, dirs_exist_ok=True)


@functools.cache
def make_pairs(policy: JanusPolicy, domain: Domain, work: Path, seed: int) -> Pairs:
    """As many pairs of a domain as the largest shipped scorer needs."""
    number = max(getattr(BREADTHS[kind], domain) for kind in SHIPPED)
    prompts = draw_prompts(domain, f"pairs {seed}")
    return collect_pairs(lambda batch: draw(policy, batch, 2, seed), prompts, number, report)


def draw(policy: Policy, prompts: Sequence[Prompt], copies: int, seed: int) -> Tensor:
    """Pictures of each prompt, [P * copies, 3, 32, 32]."""
    seeds = [noise_seed(seed, "build", p.suite, p.index, c) for p in prompts for c in range(copies)]
    texts = [prompt.text for prompt in prompts]
    tokens, _ = sample_tokens(policy, texts, guidance=GUIDANCE, seeds=seeds)
    return policy.decode(tokens)


def check_gates(work: Path, out: Path, seed: int) -> None:
    """Measure what was built, and fail unless it is within its bounds."""
    policy = JanusPolicy(str(out / "janus")).load()
    gates = [gate("VQ: objects read back", read_back(policy), 0.99, 1.0)]
    id_scores = score_suite(policy, out, "id_validation", "compbench", seed)
    ood_scores = score_suite(policy, out, "ood_geneval", "geneval", seed)
    base = [scores["judge"].mean().item() for scores in (id_scores, ood_scores)]
    gates.append(gate("base in domain", base[0], 0.45, 0.65))
    gates.append(gate("base out of domain", base[1], 0.45, 0.65))
    gates.append(gate("base gap", abs(base[0] - base[1]), 0.0, 0.05))
    uplifts = {}
    for domain, scores in (("in domain", id_scores), ("out of domain", ood_scores)):
        judge = scores["judge"]
        dead = dead_groups(judge.flatten(), judge.shape[1]).float().mean().item()
        uplifts[domain] = {name: uplift(judge, by) for name, by in scores.items()}
        gates.append(gate(f"judge's best of 4, {domain}", uplifts[domain]["judge"], 0.12, 1.0))
        gates.append(gate(f"dead groups, {domain}", dead, 0.0, 0.3))
    gates += check_scorers(policy, out, seed, uplifts)
    if not all(gates):
        raise ValueError(f"{gates.count(False)} of {len(gates)} gates failed; see above")


def check_scorers(
    policy: Policy, out: Path, seed: int, uplifts: dict[str, dict[str, float]]
) -> list[bool]:
    """Gates on the scorers: equal in skill in domain, apart out of it."""
    inside = draw_prompts("in_domain", f"held out {seed}")
    outside_prompts = filter(is_out_of_domain, draw_prompts("wide", f"held out {seed}"))
    held_out = [
        collect_pairs(lambda batch: draw(policy, batch, 2, seed), prompts, NUM_HELD_OUT, report)
        for prompts in (inside, outside_prompts)
    ]
    accuracy: dict[Kind, list[float]] = {}
    for kind in SHIPPED:
        reward = HPSReward(str(out / "scorers" / kind)).load()
        accuracy[kind] = [pair_accuracy(reward, pairs) for pairs in held_out]
    names = " ".join(f"{k} {a:.3f} / {b:.3f}" for k, (a, b) in accuracy.items())
    report(f"pair accuracy in domain / out of domain: {names}")
    narrow, broad = accuracy["narrow"], accuracy["broad"]
    outside = uplifts["out of domain"]
    shares = {kind: outside[kind] / outside["judge"] for kind in SHIPPED}
    return [
        gate("scorers' accuracies apart in domain", abs(narrow[0] - broad[0]), 0.0, 0.02),
        gate("scorers' accuracies apart out of domain", broad[1] - narrow[1], 0.12, 1.0),
        gate("narrow's share of the judge's uplift out of domain", shares["narrow"], -1.0, 0.35),
        gate("broad's share of the judge's uplift out of domain", shares["broad"], 0.7, 1.0),
    ]


def is_out_of_domain(prompt: Prompt) -> bool:
    """Whether a prompt could stand in the out-of-domain suite."""
    return "include" in prompt.facts and (has_b_word(prompt) or has_held_out_pair(prompt))


def score_suite(
    policy: Policy, out: Path, suite: str, rules: str, seed: int, copies: int = 8
) -> dict[str, Tensor]:
    """Scores of the base's pictures by the judge and each scorer, [prompts, copies], printed."""
    prompts = read_suite(out, suite)
    repeated = [prompt for prompt in prompts for _ in range(copies)]
    pictures = draw(policy, prompts, copies, seed)
    scorers: dict[str, Reward] = {"judge": ShapesOracle(rules)}  # type: ignore[arg-type]
    scorers |= {kind: HPSReward(str(out / "scorers" / kind)).load() for kind in SHIPPED}
    scores = {
        name: scorer.score(pictures, repeated).total.view(-1, copies)
        for name, scorer in scorers.items()
    }
    for category in dict.fromkeys(prompt.category for prompt in prompts):
        rows = [prompt.category == category for prompt in prompts]
        report(f"base, {suite}, {category}: {scores['judge'][torch.tensor(rows)].mean():.3f}")
    return scores


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
        auto_cli(build_shapes, as_positional=False)
    except ValueError as error:
        sys.exit(f"error: {error}")
