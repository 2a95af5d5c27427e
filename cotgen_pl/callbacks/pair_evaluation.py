"""Whether a policy under preference training prefers the better of held-out pictures."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from cotgen_pl.callbacks.base import Observer
from cotgen_pl.callbacks.pair_building import PairSettings, build_pairs
from cotgen_pl.data.prompts import PromptFile, check_scorable, read_prompts
from cotgen_pl.interfaces import PreferencePair, check_positive
from cotgen_pl.metrics import merge_metrics
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.modules.offline import OfflineModule
from cotgen_pl.pairs.sets import PairSet

LOGGED = ("loss", "rewards/accuracies", "rewards/margins")


class PairEvaluation(Observer):
    """Builds pairs of held-out prompts once, with the start policy, and logs how training does.

    Logged: `val/pairs/accuracies` (share of the pairs whose better picture has the higher implicit
    reward), `val/pairs/margins` and `val/pairs/loss`, against the reference of the moment. The
    images do not count as sampled for training.

    Args:
        files: Prompts that are not trained on.
        num_prompts: Prompts taken, spread evenly over the files'.
        every_n_updates: Updates between two evaluations.
        pairs_per_batch: Pairs read at a time.
        folder: Where the pairs lie, in the run folder.
        pairs: Which pairs are taken, and how they are written.
    """

    def __init__(
        self,
        files: list[PromptFile],
        num_prompts: int = 128,
        every_n_updates: int = 10,
        pairs_per_batch: int = 64,
        folder: str = "held_out_pairs",
        pairs: PairSettings = PairSettings(),  # noqa: B008  # never changed
    ) -> None:
        super().__init__(every_n_updates)
        check_positive(num_prompts=num_prompts, pairs_per_batch=pairs_per_batch)
        self.files, self.pairs_per_batch, self.folder = files, pairs_per_batch, folder
        self.pairs = pairs
        prompts = [prompt for file in files for prompt in read_prompts(file)]
        prompts = [replace(prompt, index=index) for index, prompt in enumerate(prompts)]
        number = min(num_prompts, len(prompts))
        self.prompts = [prompts[len(prompts) * k // number] for k in range(number)]
        self.pair_set: PairSet | None = None
        """The pairs, once they are drawn."""
        self._read: tuple[int, Tensor] | None = None  # `refreshes` and what the reference said

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, another module, and prompts that cannot be judged."""
        if stage != "fit":
            return
        if not isinstance(pl_module, DPOModule):
            raise ValueError(
                f"expected DPOModule beside {type(self).__name__}, got {type(pl_module).__name__}, "
                "which compares no pairs; leave the callback out"
            )
        check_scorable(self.prompts, pl_module.needed_reward(type(self).__name__))
        pl_module.policy.check_prompts([prompt.drawn_text for prompt in self.prompts])

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Build the pairs, with the start policy even in a resumed run, and observe."""
        assert isinstance(pl_module, OfflineModule)
        with pl_module.start_weights():
            self.pair_set = build_pairs(
                pl_module,
                self.prompts,
                Path(trainer.default_root_dir) / self.folder,
                self.pairs,
                files=self.files,
                stream="held-out pairs",
                counted=False,
            )
        self._read = None
        super().on_train_start(trainer, pl_module)

    @torch.no_grad()
    def observe(self, trainer: Trainer, module: PolicyModule, *, thoroughly: bool) -> None:
        """Log accuracy, margin and loss on all pairs."""
        assert isinstance(module, DPOModule) and self.pair_set is not None
        reference = self._reference_sums(module, self.pair_set)
        metrics: dict[str, Any] = {}
        for rows in torch.arange(len(self.pair_set)).split(self.pairs_per_batch):
            pairs: PreferencePair = module.transfer_batch_to_device(
                self.pair_set.batch(rows.tolist()), module.device, 0
            )
            with module.precision():
                _, part = module.loss(pairs, reference[rows])
            merge_metrics(metrics, part, len(rows) / len(self.pair_set))
        named = {
            f"val/pairs/{name.removeprefix('rewards/')}": metrics[name].item() for name in LOGGED
        }
        for logger in trainer.loggers:
            logger.log_metrics(named, module.rollouts)

    def _reference_sums(self, module: DPOModule, pair_set: PairSet) -> Tensor:
        """Log-probs of all pairs by the reference, [N, 2], read once for each reference."""
        if self._read is None or self._read[0] != module.refreshes:
            sums = module.reference_sums(pair_set, self.pairs_per_batch)
            self._read = (module.refreshes, sums)
        return self._read[1]
