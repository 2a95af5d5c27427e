"""What every training module shares: policy, optimizer, sampler, and what a checkpoint holds."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from math import nan
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor
from torch.utils.data import DataLoader

from cotgen_pl.adapters import check_rounding, lend_weights
from cotgen_pl.files import write_whole
from cotgen_pl.interfaces import Policy, Prompt, Reward
from cotgen_pl.metrics import MAXIMA, MINIMA, Stopwatch
from cotgen_pl.modules.finite import FiniteSteps
from cotgen_pl.modules.parallel import ParallelModule
from cotgen_pl.sampling import check_guidance, noise_seed, sample_tokens
from cotgen_pl.sharding import take_values, whole

PRECISIONS = ("32-true", "64-true", "bf16-mixed")  # others lose small steps or rewards' precision


class PolicyModule(FiniteSteps, ParallelModule):
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
        self.reference = None
        self.images_sampled = 0
        self.rollouts = 0
        self.sequences_backpropagated = 0.0
        self.stopwatch = Stopwatch()
        """Runs in training, and pauses while callbacks look at the policy."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.write_pictures: Callable[[], int] | None = None
        """What `predict` does, and how many pictures that made; `ImageWriter` sets it."""
        self.pictures_at_once = 0  # that `predict` draws; set likewise
        self.before_drawing: list[Callable[[str], Any]] = []
        """Called with the stream before pictures are drawn; callbacks add to it."""
        self._start_weights: dict[str, Tensor] = {}
        self._reference_weights: dict[str, Tensor] = {}  # empty: those of the start
        self._random_state: Tensor | None = None  # of a checkpoint, until it is set

    # Preparation ------------------------------------------------------------------------------

    def setup(self, stage: str) -> None:
        """Refuse precisions that would spoil a run, and pictures that would go nowhere."""
        self.check_sharding(self.optimizer)
        precision = self.trainer.precision
        if precision not in PRECISIONS:
            raise ValueError(
                f"expected trainer.precision to be one of {', '.join(PRECISIONS)}, got "
                f"{precision}; bf16-mixed computes in bfloat16 and keeps float32 weights, so that "
                "small steps are not lost"
            )
        if stage == "fit":
            check_rounding(self.policy, self.optimizer)
        if stage == "predict" and self.write_pictures is None:
            raise ValueError(
                "expected a callback that writes what predict draws, got none; add "
                "--trainer.callbacks cotgen_pl.callbacks.images.ImageWriter"
            )

    def configure_model(self) -> None:
        """Read the weights, divide them if they are to be, and remember those that will change."""
        if self._start_weights:
            return
        if self.sharding:
            self._unread = (deepcopy(self.policy),)
        self.read_weights()
        if self.needs_reference:
            self.reference = self.policy.reference()
        self.shard()
        self._start_weights = self._copy_weights()

    @property
    def needs_reference(self) -> bool:
        """Whether training reads a frozen twin of the policy, step by step."""
        return False

    @property
    def compares(self) -> bool:
        """Whether training compares the policy with a reference, held as a twin or not."""
        return self.needs_reference

    def configure_optimizers(self) -> Any:
        """The optimizer over what trains, and its schedule."""
        optimizer = self.optimizer(self._trained().values())
        if self.lr_scheduler is None:
            return optimizer
        schedule = {"scheduler": self.lr_scheduler(optimizer), "interval": "step"}
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def restart_schedule(self, optimizer: torch.optim.Optimizer) -> Any:
        """A new learning-rate schedule, from its first step."""
        assert self.lr_scheduler is not None
        for group in optimizer.param_groups:
            group["lr"] = group.pop("initial_lr")
        return self.lr_scheduler(optimizer)

    def on_train_start(self) -> None:
        """Tell the loggers where the run stands, before it logs: it may be a resumed one."""
        self.stopwatch.start()
        for logger in self.loggers:
            logger.log_metrics({}, step=self.rollouts)

    def _copy_weights(self) -> dict[str, Tensor]:
        return {name: p.detach().cpu().clone() for name, p in self._trained().items()}

    @contextmanager
    def start_weights(self) -> Iterator[Policy]:
        """The policy as it was before training, while the context lasts."""
        with lend_weights(self.policy, self._start_weights):
            yield self.policy

    @contextmanager
    def reference_weights(self) -> Iterator[Policy]:
        """The policy as its reference is, while the context lasts."""
        with lend_weights(self.policy, self._reference_weights or self._start_weights):
            yield self.policy

    def refresh_reference(self) -> None:
        """From now on, the reference has the weights of now."""
        if self.compares:
            self._reference_weights = self._copy_weights()
            self._renew_reference()

    def _renew_reference(self) -> None:
        if self.reference is None:
            return
        twin = dict(self.reference.named_parameters())
        if twin:
            take_values(twin, self._reference_weights)
        else:  # it lends the policy adapters
            with self.reference_weights() as policy:
                self.reference = policy.reference()

    def clip_gradients_to(self, limit: float | None) -> Tensor:
        """Clip to a norm, if one is given, and return the norm before, over all parts."""
        limit = float("inf") if limit is None else limit
        norm = whole(torch.nn.utils.clip_grad_norm_(self._trained().values(), limit))
        self.check_finite(norm, "gradient norm")
        return norm

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
        for act in self.before_drawing:
            act(stream)
        seeds = self.noise_seeds(prompts, copies, stream, first_copy)
        settings = {"guidance": self.guidance, "temperature": self.temperature} | sampling
        texts = [prompt.drawn_text for prompt in prompts]
        with self.precision(), self.gathered_to_draw():
            return sample_tokens(self.policy, texts, seeds=seeds, **settings)

    def noise_seeds(
        self, prompts: Sequence[Prompt], copies: int, stream: str, first_copy: int = 0
    ) -> list[int]:
        """The seeds that `draw` takes: P * copies, the copies of prompt 0 first."""
        rollout = self.rollouts if stream == "rollout" else 0
        return [
            noise_seed(
                self.seed, stream, rollout, prompt.index, prompt.occurrence, first_copy + copy
            )
            for prompt in prompts
            for copy in range(copies)
        ]

    @contextmanager
    def own_random_state(self, *key: int | str) -> Iterator[None]:
        """Key torch's random state by (run seed, key) while the context lasts.

        A reward that uses it then scores the same when an interruption has it score again, and
        changes nothing that comes after.
        """
        devices = [self.device] if self.device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            torch.manual_seed(noise_seed(self.seed, *key))
            yield

    def precision(self) -> AbstractContextManager[Any]:
        """The trainer's precision, for work outside of its own steps."""
        return self.trainer.precision_plugin.forward_context() if self._trainer else nullcontext()

    # Images drawn for training --------------------------------------------------------------------

    def count_drawn(self, images: int) -> None:
        """Note images that this process drew for training, in a file that outlives a kill."""
        path = self._drawn_folder / f"{self.global_rank}.txt"
        before = int(path.read_text()) if path.exists() else 0
        write_whole(path, lambda part: part.write_text(f"{before + images}\n"))

    @property
    def _drawn_folder(self) -> Path:
        return Path(self.trainer.default_root_dir) / "drawn"

    def _read_drawn(self) -> int:
        """This process's share of all files: before a resume, there may have been more of them."""
        rank, number = self.global_rank, self.trainer.world_size
        paths = [p for p in self._drawn_folder.glob("*.txt") if int(p.stem) % number == rank]
        return sum(int(path.read_text()) for path in paths)

    def image_counts(self) -> dict[str, float]:
        """Images of all processes: sampled for training, and redrawn after an interruption."""
        drawn = int(self.sum_over_processes(torch.tensor(self._read_drawn())))
        sampled = self.images_sampled
        return {"images_sampled": float(sampled), "images_redrawn": float(drawn - sampled)}

    def count_work(self, sequences: int, optimizer_steps: int) -> dict[str, float]:
        """Count an update's sequences on this process; what training has taken since its start."""
        self.sequences_backpropagated += sequences * self.trainer.world_size
        return {
            "sequences_backpropagated": self.sequences_backpropagated,
            "optimizer_steps": float(optimizer_steps),
            "training_s": self.stopwatch.seconds,
        }

    # Clocks and loggers -----------------------------------------------------------------------

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
        """Add counters, each process's random state and the weights of a refreshed reference."""
        checkpoint["reference"] = self._reference_weights
        names = ("images_sampled", "rollouts", "skipped_steps")
        checkpoint["progress"] = {name: getattr(self, name) for name in names}
        checkpoint["work"] = {
            "sequences_backpropagated": self.sequences_backpropagated,
            "seconds": self.stopwatch.seconds,
        }
        pending = self._random_state  # of a resumed run that has had no batch yet
        own = torch.get_rng_state() if pending is None else pending
        # [processes, bytes]: they go apart where processes score unequal shares.
        checkpoint["random_state"] = self.gather(own.to(self.device)).cpu().view(-1, len(own))

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Take up counters and, in time for the next batch, torch's random state.

        Not the random state from before the first update: what comes before that update, such as
        the evaluation at the start, is done again and leads to the same one.
        """
        self.images_sampled = checkpoint["progress"]["images_sampled"]
        self.rollouts = checkpoint["progress"]["rollouts"]
        self.skipped_steps = checkpoint["progress"].get("skipped_steps", 0)  # of older ones
        unknown = {"sequences_backpropagated": nan, "seconds": nan}  # to older checkpoints
        work = checkpoint.get("work", unknown)
        self.sequences_backpropagated = work["sequences_backpropagated"]
        self.stopwatch = Stopwatch(work["seconds"])
        if self.rollouts > 0:
            states = checkpoint["random_state"].cpu().view(-1, len(torch.get_rng_state()))
            self._random_state = states[self.global_rank % len(states)].clone()
        begins_folder = self.trainer.state.fn == "fit" and not self._drawn_folder.exists()
        if begins_folder and self.trainer.is_global_zero:
            self.count_drawn(self.images_sampled)  # in another folder
        if checkpoint["reference"]:
            self._reference_weights = checkpoint["reference"]
            self._renew_reference()

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

    def predict_step(self, batch: Any, batch_idx: int) -> int:
        """Have `ImageWriter` draw; gives how many pictures it drew on this process."""
        assert self.write_pictures is not None  # see `setup`
        return self.write_pictures()


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
