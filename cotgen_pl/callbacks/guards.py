"""What tells that a run no longer learns: steps that are no numbers, equal rewards, no gradient."""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn

from cotgen_pl.interfaces import check_choice, check_positive
from cotgen_pl.modules.base import PolicyModule

Action = Literal["warn", "stop"]
ADVICE = {
    "equal_rewards": "all groups of {patience} updates in a row had equal rewards, or no verdicts: "
    "nothing is learnt; see to the reward, the prompts, or temperature",
    "zero_gradient": "the gradient was 0 in {patience} updates in a row: nothing is learnt; see to "
    "the reward, the learning rate's schedule, or what trains",
    "kl": "the divergence from the reference is above {most_kl} nats per token: the policy is "
    "elsewhere altogether; go back to an earlier checkpoint with a smaller learning rate, a larger "
    "kl_coef, or gradient clipping",
}

SIGNS = ("train/frac_reward_zero_std", "train/grad_norm", "train/kl", "train/kl_proxy")


class Guards(Callback):
    """Watches each update's numbers, and warns once, or stops, where they say that it is lost.

    Logged in an update in which a guard holds: `train/alarm/equal_rewards`,
    `train/alarm/zero_gradient`, `train/alarm/kl`, 1 each, and `train/skipped_steps`, how many so
    far, when there is another one. Name it before callbacks that save: what stops a run is then not
    in its last checkpoint.

    Args:
        max_skipped_steps: Optimizer steps of the whole run whose loss or gradient norm is not
            finite that are left out: weights and the optimizer's state stay; rollouts, images and,
            but for GRPO's, the learning rate's schedule go on. One more stops the run.
        patience: Updates in a row with equal rewards in all groups, or with a gradient of 0.
        most_kl: Largest `train/kl` or `train/kl_proxy`, in nats per token. One token of Janus's
            16,384, chosen for sure, is 9.7 from choosing each of them alike.
        action: What follows but for skipped steps: one warning each, or the end of the run.
    """

    def __init__(
        self,
        max_skipped_steps: int = 0,
        patience: int = 20,
        most_kl: float = 10.0,
        action: Action = "warn",
    ) -> None:
        check_choice("action", action, Action)
        check_positive(patience=patience)
        if max_skipped_steps < 0 or not most_kl > 0:
            raise ValueError(
                "expected max_skipped_steps of 0 or more and most_kl above 0, got "
                f"{max_skipped_steps} and {most_kl}; 0 skipped steps stop at the first"
            )
        self.max_skipped_steps, self.patience = max_skipped_steps, patience
        self.most_kl, self.action = most_kl, action
        self.streaks = dict.fromkeys(ADVICE, 0)
        """Updates in a row that each guard's sign was seen in."""
        self.skipped_steps = 0

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Tell the module how many steps it may leave out."""
        assert isinstance(pl_module, PolicyModule)
        pl_module.max_skipped_steps = self.max_skipped_steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Count from what a resumed run has left out."""
        assert isinstance(pl_module, PolicyModule)
        self.skipped_steps = pl_module.skipped_steps

    def on_train_batch_end(
        self,
        trainer: Trainer,
        pl_module: LightningModule,
        outputs: Any,
        batch: Any,
        batch_idx: int,
    ) -> None:
        """Look at the update's numbers, which all processes share."""
        assert isinstance(pl_module, PolicyModule)
        alarms: dict[str, float] = {}
        if pl_module.skipped_steps > self.skipped_steps:
            self.skipped_steps = pl_module.skipped_steps
            alarms["train/skipped_steps"] = float(self.skipped_steps)
        logged = trainer.callback_metrics
        holding = self._holding({name: float(logged[name]) for name in SIGNS if name in logged})
        alarms |= {f"train/alarm/{name}": 1.0 for name in holding}
        for logger in trainer.loggers:
            if alarms:
                logger.log_metrics(alarms, step=pl_module.rollouts)
        for name in holding:
            self._act(name, pl_module.rollouts)

    def _holding(self, metrics: dict[str, float]) -> list[str]:
        """The guards that hold now; counts on."""
        signs = {
            "equal_rewards": metrics.get("train/frac_reward_zero_std") == 1,
            "zero_gradient": metrics.get("train/grad_norm") == 0,
            "kl": max(metrics.get(f"train/{name}", 0.0) for name in ("kl", "kl_proxy"))
            > self.most_kl,
        }
        self.streaks = {n: self.streaks[n] + 1 if seen else 0 for n, seen in signs.items()}
        needed = {"kl": 1}
        return [n for n, streak in self.streaks.items() if streak >= needed.get(n, self.patience)]

    def _act(self, name: str, update: int) -> None:
        told = ADVICE[name].format(patience=self.patience, most_kl=self.most_kl)
        if self.action == "stop":
            raise ValueError(f"update {update}: expected a run that learns, got: {told}")
        if self.streaks[name] == (1 if name == "kl" else self.patience):
            rank_zero_warn(f"update {update}: {told}")

    def state_dict(self) -> dict[str, Any]:
        """The streaks, for a resumed run."""
        return {"streaks": self.streaks}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on counting."""
        self.streaks = state_dict["streaks"]
