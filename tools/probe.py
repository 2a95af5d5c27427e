"""Will these rewards teach anything? `python tools/probe.py configs/NAME.yaml`, before training.

Draws some pictures of an experiment's training prompts with its policy as it starts (or as a
checkpoint has it: --ckpt_path), asks every reward that the experiment names, and prints how each
one spreads within a prompt's pictures, how the rewards agree, and what choosing by one gains for
another. Nothing is trained and no run folder is written.

It sees the policy and the prompts that training begins with, and no more. The Shapes world's narrow
scorer does well here and is hacked all the same; that is for `SuiteEvaluation`'s alarm to find.
"""

from __future__ import annotations

import argparse
import json
import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor

from cotgen_pl.callbacks.evaluation import SuiteEvaluation
from cotgen_pl.callbacks.rounds import IterativeRounds
from cotgen_pl.data.prompts import PromptData, check_scorable, read_prompts
from cotgen_pl.interfaces import Prompt, Reward, Scores, check_positive
from cotgen_pl.metrics import reward_metrics
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.monitors import best_of_uplift, rank_agreement
from cotgen_pl.scoring import ask_each

if __package__:  # as a module of tools/
    from tools.main import CommandLine, main, run_command
else:  # as a script, which has its own folder on the path
    from main import CommandLine, main, run_command

TRAINED = "trained"
# Above this share of pictures without verdict, GRPO and pair building stop by default.
MOST_MISSING = 0.5
# Above this share of dead groups, more pictures are drawn without effect than with one.
MOST_DEAD = 0.5
# Of what a judge's own choice gains it. The Shapes world's narrow scorer, whose score can be raised
# while the judge's falls, has at most this share out of domain, the broad one 0.7 or more; those
# are gates of tools/build_shapes.py.
LEAST_SHARE = 0.35


@dataclass
class Row:
    """What the pictures say of one reward."""

    mean: float
    """Over pictures."""
    spread: float
    """Mean over groups of the sample deviation."""
    dead_groups: float
    """Share of groups whose pictures score the same, or have fewer than two verdicts."""
    missing: float
    """Share of pictures without a verdict."""
    agreement: dict[str, float]
    """With each reward: see `cotgen_pl.monitors.rank_agreement`."""
    uplift: dict[str, float]
    """What choosing by this reward gains each one, in that one's unit: see `best_of_uplift`."""
    meaning: str = ""


# Building ---------------------------------------------------------------------------------------


class Unrun(CommandLine):
    """Builds what a configuration names, as `validate` would, and runs nothing."""

    def before_validate(self) -> None:
        """Keep the data: its prompts are drawn."""

    def validate(self, **arguments: Any) -> None:
        """Take the place of the trainer's own, and keep what it would be given."""
        self.arguments = arguments | {"datamodule": None, "verbose": False}


class Probe(Callback):
    """Draws pictures in place of a validation, and keeps what rewards say of them.

    Args:
        rewards: By name.
        prompts: To draw.
        num_images: Of each prompt.
        batch_size: Pictures drawn at a time.
    """

    def __init__(
        self,
        rewards: Mapping[str, Reward],
        prompts: Sequence[Prompt],
        num_images: int,
        batch_size: int,
    ) -> None:
        self.rewards, self.prompts = rewards, prompts
        self.num_images, self.batch_size = num_images, batch_size
        self.verdicts: dict[str, Scores] = {}

    @torch.no_grad()
    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Draw and score."""
        assert isinstance(pl_module, PolicyModule)
        size = max(1, self.batch_size // self.num_images)
        batches = []
        for start in range(0, len(self.prompts), size):
            part = self.prompts[start : start + size]
            tokens, _ = pl_module.draw(part, self.num_images, "probe")
            images = pl_module.policy.decode(tokens)
            repeated = [prompt for prompt in part for _ in range(self.num_images)]
            batches.append(ask_each(self.rewards, images, repeated))
        for name in self.rewards:
            self.verdicts[name] = Scores.join([batch[name] for batch in batches])


def training_prompts(data: Any, callbacks: Sequence[Callback]) -> list[Prompt]:
    """What an experiment draws: the prompts of its data, or those that pairs are made of."""
    if isinstance(data, PromptData):
        return data.prompts
    files = [
        file for rounds in callbacks if isinstance(rounds, IterativeRounds) for file in rounds.files
    ]
    if not files:
        raise ValueError(
            "expected an experiment that draws pictures of training prompts, got "
            f"{type(data).__name__} without them; probe one with PromptData, or with "
            "IterativeRounds and files"
        )
    prompts = [prompt for file in files for prompt in read_prompts(file)]
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts)]


def named_rewards(module: PolicyModule, callbacks: Sequence[Callback]) -> dict[str, Reward]:
    """The reward that is trained on, those that are watched, and the suites' own judges."""
    rewards: dict[str, Reward] = {}
    trained = getattr(module, "reward", None)
    if isinstance(trained, Reward):
        rewards[TRAINED] = trained
    for evaluation in callbacks:
        if isinstance(evaluation, SuiteEvaluation):
            watched = evaluation.watched or {}
            rewards |= {f"watched/{name}": reward for name, reward in watched.items()}
            for suite in evaluation.suites:
                if suite.reward is not None and suite.domain != "shift":
                    rewards[f"suites/{suite.name}"] = suite.reward
    if not rewards:
        raise ValueError(
            "expected an experiment that names a reward, got none; name one by "
            "--model.init_args.reward, or probe another experiment"
        )
    return rewards


def leave_out(rewards: Mapping[str, Reward], prompts: Sequence[Prompt]) -> dict[str, str]:
    """Judges that lack what they need to know of the training prompts, and why.

    Raises:
        ValueError: The reward that is trained on is one of them, and no run would begin.
    """
    reasons = {}
    for name, reward in rewards.items():
        try:
            check_scorable(prompts, reward)
        except ValueError as error:
            if name == TRAINED:
                raise
            reasons[name] = str(error)
    return reasons


def spread_evenly(prompts: Sequence[Prompt], number: int) -> list[Prompt]:
    """As many of the prompts, from all parts of their files."""
    number = min(number, len(prompts))
    return [prompts[len(prompts) * row // number] for row in range(number)]


# What the pictures say --------------------------------------------------------------------------


def columns(verdicts: Mapping[str, Scores]) -> dict[str, Tensor]:
    """Each reward's totals, [B], and the parts of the trained one that are not its total."""
    totals: dict[str, Tensor] = {}
    for name, scores in verdicts.items():
        totals[name] = scores.total
        for part, values in scores.parts.items() if name == TRAINED else ():
            if not torch.equal(values.nan_to_num(), scores.total.nan_to_num()):
                totals[f"{name}/{part}"] = values
    return totals


def measure(totals: Mapping[str, Tensor], group_size: int) -> dict[str, Row]:
    """A row for each reward's totals, [B], the pictures of a prompt adjacent."""
    rows = {}
    for name, own in totals.items():
        metrics = reward_metrics(Scores.single(name, own), group_size)
        rows[name] = Row(
            mean=metrics["reward"].item(),
            spread=metrics["reward_std"].item(),
            dead_groups=metrics["frac_reward_zero_std"].item(),
            missing=metrics["frac_no_verdict"].item(),
            agreement={other: rank_agreement(own, of, group_size) for other, of in totals.items()},
            uplift={other: best_of_uplift(of, own, group_size) for other, of in totals.items()},
        )
    for name, row in rows.items():
        row.meaning = interpret(name, rows, group_size)
    return rows


def interpret(name: str, rows: Mapping[str, Row], group_size: int) -> str:
    """What training on a reward would come to, by the thresholds at the top of this file."""
    row = rows[name]
    if row.missing > MOST_MISSING:
        return f"would stop a run: {row.missing:.0%} of the pictures have no verdict"
    if row.dead_groups > MOST_DEAD:
        return f"will teach little: {row.dead_groups:.0%} of the groups are dead"
    shares = {
        judge: row.uplift[judge] / rows[judge].uplift[judge]
        for judge in rows
        if judge.split("/")[0] != TRAINED and judge != name and rows[judge].uplift[judge] > 0
    }
    worst = min(shares, key=lambda judge: shares[judge], default=None)
    if worst is not None and shares[worst] < LEAST_SHARE:
        return (
            f"may rise without {worst}: best of {group_size} by it gains that one "
            f"{shares[worst]:.0%} of what its own choice would"
        )
    text = f"can teach: {row.dead_groups:.0%} of the groups are dead"
    if worst is None:
        return text
    return (
        f"{text}, and best of {group_size} by it gains {worst} {shares[worst]:.0%} of what its own "
        "choice would"
    )


# Showing ----------------------------------------------------------------------------------------


def format_rows(rows: Mapping[str, Row], group_size: int) -> str:
    """The rows as a table, two matrices and a line for each reward's meaning."""
    labels = {name: f"[{number}] {name}" for number, name in enumerate(rows, start=1)}
    width = max(map(len, labels.values())) + 2
    lines = [f"{'':{width}s}{'mean':>9s}{'spread':>9s}{'dead':>9s}{'missing':>9s}"]
    for name, row in rows.items():
        shares = f"{row.dead_groups:9.0%}{row.missing:9.0%}"
        lines.append(f"{labels[name]:{width}s}{row.mean:9.3f}{row.spread:9.3f}{shares}")
    agreement = {name: row.agreement for name, row in rows.items()}
    uplift = {name: row.uplift for name, row in rows.items()}
    lines += ["", "rank agreement: Kendall's tau-b within the pictures of a prompt"]
    lines += _matrix(agreement, labels, width)
    lines += ["", f"best of {group_size} by the row: what it gains the column, in its unit"]
    lines += _matrix(uplift, labels, width)
    return "\n".join([*lines, "", *(f"{name}: {row.meaning}" for name, row in rows.items())])


def _matrix(
    values: Mapping[str, Mapping[str, float]], labels: Mapping[str, str], width: int
) -> list[str]:
    numbers = [label.split()[0] for label in labels.values()]
    lines = [" " * width + "".join(f"{number:>9s}" for number in numbers)]
    for name, row in values.items():
        cells = "".join(f"{value:+9.3f}" for value in row.values())
        lines.append(f"{labels[name]:{width}s}{cells}")
    return lines


def as_json(rows: Mapping[str, Row], left_out: Mapping[str, str], **settings: Any) -> str:
    """All of it as JSON; numbers that are not known are null."""

    def known(value: Any) -> Any:
        if isinstance(value, dict):
            return {name: known(entry) for name, entry in value.items()}
        return None if isinstance(value, float) and math.isnan(value) else value

    rewards = {name: asdict(row) for name, row in rows.items()}
    content = known({**settings, "rewards": rewards, "left_out": dict(left_out)})
    return json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def probe(arguments: Sequence[str] | None = None) -> dict[str, Row]:
    """Read a command line, probe, print and write; returns the rows."""
    parser = argparse.ArgumentParser(
        description="Whether an experiment's rewards will teach anything.",
        epilog="All other arguments override the configuration, as those of tools/main.py do.",
        allow_abbrev=False,
    )
    parser.add_argument("config", help="an experiment, like configs/grpo_shapes.yaml")
    parser.add_argument("--prompts", type=int, default=32, help="of the training prompts")
    parser.add_argument("--images", type=int, default=8, help="of each prompt, 2 or more")
    parser.add_argument("--batch_size", type=int, default=64, help="images drawn at a time")
    parser.add_argument("--json", type=Path, help="a file to write the numbers to")
    own, overrides = parser.parse_known_args(arguments)
    check_positive(prompts=own.prompts, batch_size=own.batch_size)
    if own.images < 2:
        raise ValueError(f"expected --images of 2 or more, got {own.images}; one has no group")
    if own.json and not own.json.absolute().parent.is_dir():  # before the work, not behind it
        raise ValueError(f"expected --json in a folder that is there, got {own.json}; make it")
    rows, left_out = _run(own, overrides)
    print(f"{own.prompts} prompts x {own.images} images of {own.config}\n")
    print(format_rows(rows, own.images))
    for name, reason in left_out.items():
        print(f"{name}: left out, for it cannot judge these prompts: {reason}")
    if own.json:
        settings = {"config": own.config, "prompts": own.prompts, "images": own.images}
        own.json.write_text(as_json(rows, left_out, **settings))
    return rows


def _run(
    own: argparse.Namespace, overrides: Sequence[str]
) -> tuple[dict[str, Row], dict[str, str]]:
    warnings.filterwarnings("ignore", ".*args parameter is intended to run from within Python.*")
    built = main(["validate", "--config", own.config, *overrides], Unrun)
    assert isinstance(built, Unrun)
    trainer, module = built.trainer, built.model
    prompts = spread_evenly(training_prompts(built.datamodule, trainer.callbacks), own.prompts)
    own.prompts = len(prompts)
    module.policy.check_prompts([prompt.drawn_text for prompt in prompts])
    rewards = named_rewards(module, trainer.callbacks)
    left_out = leave_out(rewards, prompts)
    asked = {name: reward for name, reward in rewards.items() if name not in left_out}
    drawing = Probe(asked, prompts, own.images, own.batch_size)
    trainer.callbacks = [drawing]
    trainer.validate(**built.arguments)
    return measure(columns(drawing.verdicts), own.images), left_out


if __name__ == "__main__":
    run_command(probe)
