"""What every training module shares: policy, optimizer, sampler, and what a checkpoint holds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader

from cotgen_pl.interfaces import Policy, Prompt, Reward
from cotgen_pl.metrics import MAXIMA, MINIMA
from cotgen_pl.sampling import check_guidance, noise_seed, sample_tokens

PRECISIONS = ("32-true", "64-true", "bf16-mixed")  # others lose small steps or rewards' precision


class PolicyModule(LightningModule):
    """A policy in training. Subclasses add an algorithm's `training_step`.

    Weights are read in `configure_model`, after all that can be wrong with a configuration has been
    checked. Checkpoints hold what trains, and counters; frozen weights, rewards and references are
    named by the configuration and read again.

    Args:
        policy: What is trained.
        optimizer: Makes the optimizer from the parameters that train.
        lr_scheduler: Makes the learning-rate schedule, stepped once per optimizer step.
        guidance: Weight of classifier-free guidance in sampling; 5 in Janus's
            generation_inference.py.
        temperature: Of sampling, above 0, applied after guidance.
        seed: Of all noise. On the command line it is `seed_everything`.
    """

    def __init__(
        self,
        policy: Policy,
        optimizer: OptimizerCallable = torch.optim.AdamW,
        lr_scheduler: LRSchedulerCallable | None = None,
        guidance: float = 5.0,
        temperature: float = 1.0,
        seed: int = 0,
    ) -> None:
        super().__init__()
        check_guidance(guidance)
        if not 0 < temperature < float("inf"):
            raise ValueError(
                f"expected temperature above 0, got {temperature}; 1 samples from the policy itself"
            )
        self.policy, self.optimizer, self.lr_scheduler = policy, optimizer, lr_scheduler
        self.guidance, self.temperature, self.seed = guidance, temperature, seed
        self.images_sampled = 0
        self.rollouts = 0
        self.seconds: dict[str, float] = defaultdict(float)
        self.predict_sampling: dict[str, Any] = {}
        self._start_weights: dict[str, Tensor] = {}
        self._random_state: Tensor | None = None  # of a checkpoint, until it is set

    # Preparation ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse precisions that would spoil a run."""
        precision = self.trainer.precision
        if precision not in PRECISIONS:
            raise ValueError(
                f"expected trainer.precision to be one of {', '.join(PRECISIONS)}, got "
                f"{precision}; bf16-mixed computes in bfloat16 and keeps float32 weights, so that "
                "small steps are not lost"
            )

    def configure_model(self) -> None:
        """Read the weights and remember those that will change."""
        self.policy.load()
        if not self._start_weights:
            self._start_weights = {
                name: p.detach().cpu().clone() for name, p in self._trained().items()
            }

    def configure_optimizers(self) -> Any:
        """The optimizer over what trains, and its schedule."""
        optimizer = self.optimizer(self._trained().values())
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_start(self) -> None:
        """Tell the loggers where the run stands, before it logs: it may be a resumed one."""
        for logger in self.loggers:
            logger.log_metrics({}, step=self.rollouts)

    def _trained(self) -> dict[str, torch.nn.Parameter]:
        return {name: p for name, p in self.policy.named_parameters() if p.requires_grad}

    @contextmanager
    def start_weights(self) -> Iterator[Policy]:
        """The policy as it was before training, while the context lasts."""
        trained = self._trained()
        now = {name: parameter.data for name, parameter in trained.items()}
        try:
            for name, parameter in trained.items():
                parameter.data = self._start_weights[name].to(parameter)
            yield self.policy
        finally:
            for name, parameter in trained.items():
                parameter.data = now[name]

    def check_finite(self, value: Tensor, name: str, update: int | None = None) -> None:
        """Raise a ValueError that names the step unless a loss or norm is a number.

        Args:
            value: A scalar.
            name: What it is, for the message.
            update: Number of the update, from 1; absent means the one after `rollouts`.
        """
        if not torch.isfinite(value):
            raise ValueError(
                f"expected a finite {name} in update {update or self.rollouts + 1} (optimizer step "
                f"{self.global_step + 1}), got {value.item()}; this step was not taken and no "
                "checkpoint was written: resume from the last one with a smaller learning rate, or "
                "clip gradients"
            )

    # Drawing ----------------------------------------------------------------------------------

    def draw(
        self,
        prompts: Sequence[Prompt],
        copies: int,
        stream: str,
        first_copy: int = 0,
        **sampling: Any,
    ) -> tuple[Tensor, Tensor]:
        """Draw `copies` images of each prompt with the run's guidance and temperature.

        Args:
            prompts: P prompts.
            copies: Images of each.
            stream: Kind of noise. "rollout" is new each time; every other stream is the same each
                time.
            first_copy: Number of the first copy: copies 2 and 3 are what copies 0 to 3 end with.
            **sampling: For `sample_tokens`.

        Returns:
            Tokens and log-probabilities, [P * copies, T] each.
        """
        rollout = self.rollouts if stream == "rollout" else 0
        seeds = [
            noise_seed(
                self.seed, stream, rollout, prompt.index, prompt.occurrence, first_copy + copy
            )
            for prompt in prompts
            for copy in range(copies)
        ]
        settings = {"guidance": self.guidance, "temperature": self.temperature} | sampling
        texts = [prompt.drawn_text for prompt in prompts]
        with self.precision():
            return sample_tokens(self.policy, texts, seeds=seeds, **settings)

    def precision(self) -> AbstractContextManager[Any]:
        """The trainer's precision, for work outside of its own steps."""
        return self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()

    # Processes, clocks and loggers ------------------------------------------------------------

    def sum_over_processes(self, values: Tensor) -> Tensor:
        """The sum of each process's tensor."""
        if self.trainer.world_size == 1:
            return values
        total: Tensor = self.trainer.strategy.reduce(values.to(self.device), reduce_op="sum")
        return total

    def gather(self, values: Tensor) -> Tensor:
        """[B] of each process, laid end to end."""
        if self.trainer.world_size == 1:
            return values
        gathered: Tensor = self.all_gather(values)  # type: ignore[assignment]  # likewise
        return gathered.flatten()

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the seconds that a phase takes, until its last kernel, to `seconds[name]`."""
        started = time.perf_counter()
        yield
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        self.seconds[name] += time.perf_counter() - started

    def log_all(self, prefix: str, metrics: Mapping[str, Any]) -> None:
        """Log for the rollout that is learnt from; its number is the x axis of every logger."""
        several = self.trainer.world_size > 1
        self.log("step", float(self.rollouts + 1))
        for name, value in metrics.items():
            joined = "max" if name in MAXIMA else "min" if name in MINIMA else "mean"
            self.log(prefix + name, value, sync_dist=several, reduce_fx=joined, batch_size=1)

    # Checkpoints ------------------------------------------------------------------------------

    # torch has overloads for the type of a destination, which Lightning never gives.
    def state_dict(self, *args: Any, **kwargs: Any) -> dict[str, Any]:  # type: ignore[override]
        """The weights that train, and no others."""
        state = super().state_dict(*args, **kwargs)
        return {name: state[name] for name in (f"policy.{name}" for name in self._trained())}

    def load_state_dict(
        self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False
    ) -> Any:
        """Read the weights that train.

        Raises:
            ValueError: The checkpoint trained other weights than this configuration does.
        """
        own = {f"policy.{name}" for name in self._trained()}
        if own != state_dict.keys():
            differing = sorted(own ^ state_dict.keys())
            raise ValueError(
                f"the checkpoint holds {len(state_dict)} trained weights, this configuration "
                f"trains {len(own)} (they differ in {differing[0]!r}, ...); use the configuration "
                "that wrote it"
            )
        return super().load_state_dict(state_dict, strict=False, assign=assign)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add counters and torch's random state."""
        checkpoint["progress"] = {"images_sampled": self.images_sampled, "rollouts": self.rollouts}
        checkpoint["random_state"] = torch.get_rng_state()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up counters and, in time for the next batch, torch's random state."""
        self.images_sampled = checkpoint["progress"]["images_sampled"]
        self.rollouts = checkpoint["progress"]["rollouts"]
        self._random_state = checkpoint["random_state"].cpu()

    def on_train_batch_start(self, batch: Any, batch_idx: int) -> None:
        """Set the random state of a resumed run, now that data loaders have drawn their seeds."""
        if self._random_state is not None:
            torch.set_rng_state(self._random_state)
            self._random_state = None

    # Validation and prediction ----------------------------------------------------------------

    def val_dataloader(self) -> DataLoader[Any]:
        """One empty batch, so that `validate` enters a loop; `SuiteEvaluation` does the work."""
        return DataLoader([0], batch_size=None)  # type: ignore[arg-type]  # any list will do

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Nothing: see `val_dataloader`."""

    def predict_step(self, prompts: list[Prompt], batch_idx: int) -> Tensor:
        """Draw one picture of each prompt, [P, 3, H, W] in [0, 1]."""
        tokens, _ = self.draw(prompts, copies=1, stream="predict", **self.predict_sampling)
        return self.policy.decode(tokens)


def scorer_of(module: LightningModule, own_reward: Reward | None, who: str) -> Reward:
    """What a callback scores with: its own reward, else the one that the module trains on.

    Raises:
        ValueError: There is neither; `who` is named.
    """
    reward = own_reward if own_reward is not None else getattr(module, "reward", None)
    if not isinstance(reward, Reward):
        raise ValueError(
            f"{who} got no reward and {type(module).__name__} trains on none; expected one of the "
            "two: give it its own, reward: ..."
        )
    return reward
