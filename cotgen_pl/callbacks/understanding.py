"""Whether a policy in training still answers questions about pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.interfaces import Policy, check_choice, check_positive
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.understanding import Match, Question, is_right, load_picture, read_questions

UNNAMED = "other"  # where questions of no category are counted


class UnderstandingEvaluation(Observer):
    """Asks the policy about pictures, at the start, every so often and at the end.

    Learning to draw may cost a model that also answers questions that other skill. Logged, in
    training and under `validate`: `val/understanding/<category>`, the share of right answers, and
    `val/understanding/mean`, over categories. Answers are greedy, so they change with the weights
    alone.

    Args:
        files: JSONL files, a question per line: `picture` (a path, relative to the file's folder),
            `question`, `answer` and optionally `category`.
        every_n_updates: Rollouts between two evaluations in training.
        match: When an answer is right, without case, punctuation and articles: `exact`, when it is
            the file's; `contains`, when the words of the file's stand in it.
        max_tokens: Longest answer; what follows is cut off.
        batch_size: Questions asked at a time, on each process.
    """

    def __init__(
        self,
        files: list[str],
        every_n_updates: int = 100,
        match: Match = "exact",
        max_tokens: int = 16,
        batch_size: int = 16,
    ) -> None:
        super().__init__(every_n_updates)
        check_choice("match", match, Match)
        check_positive(max_tokens=max_tokens, batch_size=batch_size)
        if not files:
            raise ValueError("expected at least one file of questions, got none; name one")
        self.match, self.max_tokens, self.batch_size = match, max_tokens, batch_size
        self.questions = [q for file in files for q in read_questions(Path(file).expanduser())]
        self.responses: list[str] = []
        """What the policy said last, to this process's share of the questions."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, a policy that cannot be asked."""
        assert isinstance(pl_module, PolicyModule)
        kind = type(pl_module.policy)
        if kind.answer is Policy.answer:
            raise ValueError(
                "expected a policy that answers questions about pictures beside "
                f"{type(self).__name__}, got {kind.__name__}; leave the callback out"
            )

    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Ask all questions, each time."""
        self.evaluate(module)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask under `validate`, and print the shares."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.state.fn == "validate":
            for name, value in self.evaluate(pl_module).items():
                pl_module.print(f"{name.removeprefix('val/'):44s}{value:8.3f}")

    def evaluate(self, module: PolicyModule) -> dict[str, float]:
        """Ask all questions, log the shares of right answers and return them."""
        right = self._ask_all(module)
        categories = [question.category or UNNAMED for question in self.questions]
        metrics = {}
        for category in dict.fromkeys(categories):
            rows = torch.tensor([category == other for other in categories])
            metrics[f"val/understanding/{category}"] = right[rows].mean().item()
        metrics["val/understanding/mean"] = sum(metrics.values()) / len(metrics)
        for logger in module.trainer.loggers:
            logger.log_metrics(metrics, step=module.rollouts)
        return metrics

    def _ask_all(self, module: PolicyModule) -> Tensor:
        """[N] float64 on the CPU: 1 for each question that was answered right, else 0."""
        number, rank = len(self.questions), module.global_rank
        right = torch.zeros(number, dtype=torch.float64, device=module.device)
        own = range(rank, number, module.trainer.world_size)
        self.responses = []
        with module.gathered():
            for start in range(0, len(own), self.batch_size):
                rows = own[start : start + self.batch_size]
                self.responses += self._ask(module, [self.questions[row] for row in rows])
        for row, response in zip(own, self.responses, strict=True):
            right[row] = is_right(response, self.questions[row].answer, self.match)
        return module.sum_over_processes(right).cpu()

    def _ask(self, module: PolicyModule, asked: Sequence[Question]) -> list[str]:
        pictures = [load_picture(question) for question in asked]
        with module.precision():
            return module.policy.answer(pictures, [q.question for q in asked], self.max_tokens)
