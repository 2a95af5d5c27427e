"""What several tests train with: simple rewards, a logger in memory, a trainer for the CPU."""

import os
from collections import defaultdict
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Timer
from lightning.pytorch.loggers import Logger

from cotgen_pl.data.prompts import PromptData, PromptFile
from cotgen_pl.interfaces import Prompt, Reward, Scores
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.modules.grpo import GRPOModule
from cotgen_pl.pairs.sets import Drawn, PairSet, PairSetWriter
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.sharding import whole

TEXTS = ("a red circle", "two cats", "a blue square left of it", "cats")


class Brightness(Reward):
    """Mean of all pixels, and watched beside it the mean of the red ones."""

    def score(self, images, prompts):
        total, red = images.mean((1, 2, 3)).float(), images[:, 0].mean((1, 2)).float()
        return Scores(total, {"all": total, "red": red}, {"all": 1.0, "red": 0.0})


class Fixed(Reward):
    """The same scores on each call, repeated to the number of images."""

    def __init__(self, values: list[float]) -> None:
        super().__init__()
        self.values = values

    def score(self, images, prompts):
        values = torch.tensor(self.values).repeat(len(images) // len(self.values))
        return Scores.single("fixed", values)


class Memory(Logger):
    """Keeps what is logged: `rows[step][metric]`."""

    name, version = "memory", ""

    def __init__(self) -> None:
        super().__init__()
        self.rows: dict[int, dict[str, float]] = defaultdict(dict)

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        self.rows[step].update(metrics)


class Snapshots(Callback):
    """Keeps the weights that train: at the start, and after each rollout."""

    def __init__(self) -> None:
        self.weights: list[dict[str, torch.Tensor]] = []

    def on_train_start(self, trainer, pl_module):
        self._keep(pl_module)

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self._keep(pl_module)

    def _keep(self, module):
        self.weights.append({name: w.detach().clone() for name, w in module.state_dict().items()})


class SaveRank(Callback):
    """Writes, from each process, its tokens of all rollouts and its weights at the end."""

    def on_fit_start(self, trainer, pl_module):
        self.tokens: list[torch.Tensor] = []
        collect = pl_module.collect

        def keep_tokens(prompts):
            rollout = collect(prompts)
            self.tokens.append(rollout.tokens)
            return rollout

        pl_module.collect = keep_tokens

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        torch.save({"tokens": torch.stack(self.tokens), "weights": whole_weights(pl_module)}, path)


class SaveWeights(Callback):
    """Writes each process's weights at the end."""

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        path = Path(trainer.default_root_dir) / f"rank{trainer.global_rank}.pt"
        torch.save(whole_weights(pl_module), path)


def whole_weights(module: LightningModule) -> dict[str, torch.Tensor]:
    """The weights that train; all processes have to ask."""
    return {name: whole(values) for name, values in module.state_dict().items()}


def numbered_prompts(number: int = 2) -> list[Prompt]:
    return [Prompt(text, index=index) for index, text in enumerate(TEXTS[:number])]


def make_policy(folder: Path, **arguments: Any) -> JanusPolicy:
    return JanusPolicy(str(folder), **({"dtype": "float64"} | arguments))


def make_grpo(folder: Path, reward: Reward | None = None, **arguments: Any) -> GRPOModule:
    """Two groups of 4 per rollout, plain SGD, guidance 3, without KL."""
    sizes = {"images_per_update": 8, "group_size": 4, "images_budget": 8, "guidance": 3.0}
    settings = sizes | {"kl_coef": 0.0, "gradient_clip": None, "optimizer": sgd(0.1)} | arguments
    policy = settings.pop("policy", None) or make_policy(folder)
    return GRPOModule(policy, reward or Brightness(), **settings)


def attach_grpo(folder: Path, run_folder: Path) -> GRPOModule:
    """One that is loaded and attached to a trainer."""
    module = make_grpo(folder)
    module.configure_model()
    module.trainer = make_trainer(run_folder)
    return module


def make_dpo(folder: Path, **arguments: Any) -> DPOModule:
    """Four groups of 4 in all, plain SGD, guidance 3, without a reward of its own."""
    sizes = {"group_size": 4, "images_budget": 16, "guidance": 3.0}
    settings = sizes | {"optimizer": sgd(0.5)} | arguments
    policy = settings.pop("policy", None) or make_policy(folder)
    return DPOModule(policy, settings.pop("reward", None), **settings)


def sgd(lr: float):
    return lambda parameters: torch.optim.SGD(parameters, lr=lr)


def make_trainer(folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    """A quiet trainer in float64, whose logger is a `Memory` and which writes no checkpoint."""
    settings = {
        "accelerator": "cpu",
        "precision": "64-true",
        "max_epochs": 1,
        "logger": Memory(),
        "log_every_n_steps": 1,
        "num_sanity_val_steps": 0,
        "enable_progress_bar": False,
        "enable_model_summary": False,
        "enable_checkpointing": any("Checkpoint" in type(c).__name__ for c in callbacks),
    }
    return Trainer(default_root_dir=folder, callbacks=list(callbacks), **(settings | arguments))


def write_prompts(folder: Path, texts: tuple[str, ...] = TEXTS) -> PromptFile:
    """Write them whole: two processes may do so while a third reads."""
    path, part = folder / "prompts.txt", folder / f"prompts.{os.getpid()}"
    part.write_text("\n".join(texts) + "\n")
    part.replace(path)
    return PromptFile(str(path), "text")


def fit(module: LightningModule, folder: Path, *callbacks: Callback, **arguments: Any) -> Trainer:
    """Train on four prompts; returns the trainer, whose logger has the metrics."""
    trainer = make_trainer(folder, *callbacks, **arguments)
    trainer.fit(module, PromptData([write_prompts(folder)]))
    return trainer


class NoisyBrightness(Brightness):
    """Brightness with noise from torch's own random state, which a resumed run must take up."""

    def score(self, images, prompts):
        noise = 0.01 * torch.rand(len(images))
        total = super().score(images, prompts).total + noise
        return Scores.single("noisy", total)


class StopAt(Callback):
    """Fails before a rollout, as a machine that goes down would."""

    def __init__(self, rollout: int) -> None:
        self.rollout = rollout

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if pl_module.rollouts + 1 == self.rollout:
            raise RuntimeError("the machine went down")


class OftenEqual(Brightness):
    """Brightness of a third of the prompts' pictures, and 0 for the others: dead groups."""

    def score(self, images, prompts):
        alive = torch.tensor([len(prompt.text) % 3 == 0 for prompt in prompts])
        return Scores.single("often_equal", super().score(images, prompts).total * alive)


class Rising(Reward):
    """The same for all images of a call, and more with each call."""

    calls = 0

    def score(self, images, prompts):
        self.calls += 1
        return Scores.single("rising", torch.full((len(images),), float(self.calls)))


class OutOfTime(Timer):
    """Lightning's timer, with a clock that counts rollouts."""

    def __init__(self, rollouts: int) -> None:
        super().__init__()
        self.rollouts = rollouts

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.should_stop or pl_module.rollouts == self.rollouts


def write_pairs(
    folder: Path, number: int, tokens: torch.Tensor | None = None, text: str = "prompt"
) -> PairSet:
    """A finished set in one shard; pair k is of prompt "<text> k", tokens are [number, 2, 4]."""
    if tokens is None:
        tokens = torch.randint(0, 32, (number, 2, 4))
    prompts = [Prompt(f"{text} {index}", index=index) for index in range(number)]
    images, scores = torch.zeros(2 * number, 3, 2, 2), torch.tensor([1.0, 0.0]).repeat(number)
    drawn = Drawn(prompts, tokens.flatten(0, 1), images, scores, [None] * (2 * number))
    rows = drawn.pairs(range(0, 2 * number, 2), range(1, 2 * number, 2))
    writer = PairSetWriter(folder, 1, {})
    writer.write(0, rows, num_prompts=number, num_images=2 * number, dropped={})
    return writer.finish()


def counted_peak(work) -> int:
    """The most bytes that tensors took at once, beyond those before, by torch's own profiler."""
    activities = [torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities, profile_memory=True) as profile:
        work()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    assert events
    now = most = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        most = max(most, now)
    return most
