"""The exact judge of the Shapes world as a reward: pictures are read, then judged by rules."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from typing import Literal

import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.shapes.judge import (
    check_compbench_facts,
    check_geneval_facts,
    graded,
    judge_compbench,
    judge_geneval,
    strict,
)
from cotgen_pl.shapes.recognise import recognise

Rules = Literal["compbench", "geneval"]


class ShapesOracle(Reward):
    """Share of a prompt's clauses that hold in its picture (`graded`), and if all do (`strict`).

    The total is `graded`: with small groups, all-or-nothing scores leave most groups without
    variance.
    """

    name = "shapes"

    def __init__(self, rules: Rules = "compbench") -> None:
        """Choose the rules.

        Args:
            rules: `compbench` reads the fact `objects` of in-domain prompts, `geneval` the fact
                `include`.
        """
        super().__init__()
        if rules not in ("compbench", "geneval"):
            raise ValueError(
                f"rules: expected compbench or geneval, got {rules!r}; name one of the two"
            )
        self.rules = rules
        self.required_facts = ("objects",) if rules == "compbench" else ("include",)
        self._judge = judge_compbench if rules == "compbench" else judge_geneval
        self._check = check_compbench_facts if rules == "compbench" else check_geneval_facts

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for facts that the rules cannot judge by, before weights load."""
        self._check(prompt.facts)

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 3, 32, 32] in [0, 1]; details: clauses that failed, objects read."""
        found = recognise(images)
        verdicts = [self._judge(p.facts, r) for p, r in zip(prompts, found, strict=True)]
        parts = {
            "graded": torch.tensor([graded(v) for v in verdicts], device=images.device),
            "strict": torch.tensor([strict(v) for v in verdicts], device=images.device),
        }
        details = [
            {
                "failed": [name for name, holds in verdict.items() if not holds],
                "objects": [asdict(placed) for placed in recognition.objects],
            }
            for verdict, recognition in zip(verdicts, found, strict=True)
        ]
        return Scores(parts["graded"], parts, {"graded": 1.0, "strict": 0.0}, details)
