"""Whether a run trains on what its suites score: looked for at its start, told, and prevented.

What counts as equal and as nearly equal is said in `cotgen_pl.leaks`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn

from cotgen_pl.data.formats import ORIGIN
from cotgen_pl.evaluation.suites import Suite
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Prompt, check_choice
from cotgen_pl.leaks import (
    LeakAction,
    NearLeak,
    PromptSource,
    find_leaks,
    find_near_leaks,
    first_by_text,
)
from cotgen_pl.rules.words import plain_text

RECORD = "leaks.json"
NUM_NAMED = 3  # leaks in a message; the record has all
DONE = {
    "drop": "they are left out of training",
    "warn": "they are trained on, and lift the scores: set leaks: drop to leave them out",
}


class LeakCheck:
    """Compares a run's training prompts with held-out ones before its data loaders are built.

    What is left out is a function of the files alone, so it is the same on all processes. A resumed
    run that would train on other prompts is refused by those who hold them.

    Args:
        action: What to do about equal prompts: `drop` leaves them out of training and warns, `warn`
            trains on them and warns, `stop` ends the run. Nearly equal ones are only told.
    """

    def __init__(self, action: LeakAction = "drop") -> None:
        check_choice("leaks", action, LeakAction)
        self.action = action
        self._name = ""
        self._record: dict[str, Any] = {}

    def run(
        self, trainer: Trainer, suites: Sequence[Suite], prompts: Mapping[str, Sequence[Prompt]]
    ) -> None:
        """Look for held-out prompts in all that the trainer is about to train on, and act.

        Args:
            trainer: Its data module and callbacks hold the prompts.
            suites: Those of domain `shift` are passed over: a probe of training prompts is one.
            prompts: By suite.

        Raises:
            ValueError: There are equal ones, and `action` is `stop`, or nothing would be left, or
                they are in pairs that were drawn before.
        """
        if trainer.state.fn != "fit":
            return
        kept_apart = [suite.name for suite in suites if suite.domain != "shift"]
        held_out = [prompt for name in kept_apart for prompt in prompts[name]]
        self._name = ", ".join(kept_apart)
        sources = _find_sources(trainer)
        train = [prompt for source in sources for prompt in source.train_prompts()]
        leaks, near = find_leaks(train, held_out), find_near_leaks(train, held_out)
        texts = set(first_by_text(prompt for _, prompt in leaks))
        self._record = _describe(self.action, leaks, near)
        if near:
            rank_zero_info(_near_message(near))
        if not leaks:
            return
        message = _message(train, texts, leaks)
        if self.action == "stop":
            raise ValueError(f"{message}; set leaks: drop to leave them out, or mend the files")
        if self.action == "drop":
            for source in sources:
                source.drop_prompts(lambda prompt: plain_text(prompt.text) in texts)
        rank_zero_warn(f"{message}; {DONE[self.action]}. {RECORD} in the run folder names all")

    def write(self, trainer: Trainer) -> None:
        """Add what was found, if anything, to the run folder's record, from the first process.

        Several checks of one run share the record, each under the names of its suites.
        """
        if not trainer.is_global_zero or not (self._record["equal"] or self._record["near"]):
            return
        path = Path(trainer.default_root_dir) / RECORD
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        records[self._name] = self._record
        text = json.dumps(records, indent=1, ensure_ascii=False) + "\n"
        write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))


def _find_sources(trainer: Trainer) -> list[PromptSource]:
    callbacks = trainer.callbacks  # type: ignore[attr-defined]  # a Trainer has them
    holders = [getattr(trainer, "datamodule", None), *callbacks]
    return [holder for holder in holders if isinstance(holder, PromptSource)]


def _message(
    train: Sequence[Prompt], texts: set[str], leaks: Sequence[tuple[Prompt, Prompt]]
) -> str:
    number = sum(plain_text(prompt.text) in texts for prompt in train)
    suites = ", ".join(sorted({prompt.suite for _, prompt in leaks}))
    named = "; ".join(
        f"{twin.text!r} ({_place(twin)}) is held out by {prompt.suite} ({_place(prompt)})"
        for twin, prompt in leaks[:NUM_NAMED]
    )
    more = "; ..." if len(leaks) > NUM_NAMED else ""
    return (
        f"leaks: {number} of {len(train)} training prompts equal {len(leaks)} held-out prompts of "
        f"{suites}: {named}{more}"
    )


def _near_message(near: Sequence[NearLeak]) -> str:
    named = "; ".join(
        f"{leak.train.text!r} and {leak.held_out.text!r} ({leak.kind})" for leak in near[:NUM_NAMED]
    )
    more = "; ..." if len(near) > NUM_NAMED else ""
    return (
        f"leaks: {len(near)} held-out prompts are nearly equal to training prompts, which are kept:"
        f" {named}{more}. {RECORD} in the run folder names all"
    )


def _describe(
    action: LeakAction, leaks: Sequence[tuple[Prompt, Prompt]], near: Sequence[NearLeak]
) -> dict[str, Any]:
    """The record: each held-out prompt behind the first one to train on that is like it."""
    return {
        "leaks": action,
        "equal": [_pair(twin, prompt) for twin, prompt in leaks],
        "near": [{"kind": leak.kind, **_pair(leak.train, leak.held_out)} for leak in near],
    }


def _pair(train: Prompt, held_out: Prompt) -> dict[str, str]:
    return {
        "suite": held_out.suite,
        "held_out": held_out.text,
        "held_out_at": _place(held_out),
        "train": train.text,
        "train_at": _place(train),
    }


def _place(prompt: Prompt) -> str:
    """Path and line, or the number of a prompt that no file holds."""
    return str(prompt.facts.get(ORIGIN, f"prompt {prompt.index}"))
