"""Train, score and draw: `python tools/main.py fit|validate|predict --config configs/NAME.yaml`."""

from __future__ import annotations

import errno
import json
import os
import signal
import sys
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

from jsonargparse import ArgumentError, ArgumentParser
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, Timer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from lightning.pytorch.plugins import TorchCheckpointIO
from lightning.pytorch.strategies import Strategy
from lightning.pytorch.utilities.exceptions import SIGTERMException

import cotgen_pl
from cotgen_pl.callbacks.export import HuggingFaceExport
from cotgen_pl.callbacks.final_checkpoint import FinalCheckpoint, StartCheckpoint
from cotgen_pl.callbacks.guards import Guards
from cotgen_pl.callbacks.metrics import MetricsFile
from cotgen_pl.callbacks.preemption import Preemption, StopSignals
from cotgen_pl.callbacks.watchdog import Watchdog
from cotgen_pl.files import write_whole
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.origin import find_commit
from cotgen_pl.run_checkpoints import WholeCheckpoints, check_whole, is_on_disk, newest_good
from cotgen_pl.strategies import leave_group

# Lightning's advice on choices that are made on purpose here.
EXPECTED = (
    ".*does not have many workers.*",  # prompts are a few bytes
    ".*`training_step` returned `None`.*",  # manual optimisation
    ".*`IterableDataset` has `__len__` defined.*",  # its length is that of the run
    ".*a checkpoint that ended before the epoch ended.*",  # data modules start behind its batches
    ".*no `val_dataloader`.*",  # SuiteEvaluation scores in training
    ".*in eval mode at the start of training.*",  # nothing here has dropout
    ".*pre-optimization state.*",  # a checkpoint holds what the update made
    ".*treespec.is_leaf.*",  # Lightning's own use of torch
    r"\s*skip_none parameter was deprecated.*",  # as Lightning's own, for older jsonargparse
)


# What Lightning resolves by itself, beside `last`.
RESOLVED_BY_LIGHTNING = ("best", "hpc")

ENDED = "ended.json"

# How often SLURM and torchrun say that they have started this command before.
RESTARTS = ("SLURM_RESTART_COUNT", "TORCHELASTIC_RESTART_COUNT")

# What shells say of a program that SIGTERM ended; to launchers, the run is not done.
STOPPED = 128 + signal.SIGTERM

# No space, quota used up, file beyond `ulimit -f`.
FULL_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, and beside it what was found out: run.json.

    Once callbacks, weights and data have had no objection: a run that was refused leaves none.
    Without ckpt_path: a resumed run's file, too, runs again by itself. ended.json is there once
    training has ended, and until it goes on. `validate` leaves evaluation/validate.yaml.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Write nothing yet."""

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write both files, from the first process."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.is_global_zero:
            folder = Path(trainer.default_root_dir)
            (folder / ENDED).unlink(missing_ok=True)
            _write_json(folder / "run.json", self._found_out(pl_module))
            write_whole(folder / self.config_filename, self._write_config)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say that training has ended, now that all callbacks have done their last."""
        assert isinstance(pl_module, PolicyModule)
        if trainer.is_global_zero:
            counts = {"updates": pl_module.rollouts, "images_sampled": pl_module.images_sampled}
            _write_json(Path(trainer.default_root_dir) / ENDED, counts)

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write what a checkpoint or a folder is scored with."""
        if trainer.is_global_zero and trainer.state.fn == "validate":
            folder = Path(trainer.default_root_dir)
            write_whole(folder / "evaluation/validate.yaml", self._write_config)

    def _found_out(self, module: PolicyModule) -> dict[str, Any]:
        versions = {name: version(name) for name in ("torch", "transformers", "lightning")}
        own = {"commit": find_commit(), "cotgen_pl": cotgen_pl.__version__}
        found = {**own, **versions, "policy": module.policy.describe()}
        if hasattr(module, "micro_batch_size"):  # found, under `auto`; config.yaml has that word
            found["micro_batch_size"] = module.micro_batch_size
        return found

    def _write_config(self, path: Path) -> None:
        config = self.config.clone()
        config.ckpt_path = None
        self.parser.save(config, path, skip_none=False, overwrite=True, multifile=False)


def _write_json(path: Path, content: dict[str, Any]) -> None:
    text = json.dumps(content, indent=2, ensure_ascii=False) + "\n"
    write_whole(path, lambda part: part.write_text(text))


class Curves(TensorBoardLogger):
    """TensorBoard's file, without the hparams.yaml beside it: config.yaml has every setting."""

    def save(self) -> None:
        """Write out what is logged so far."""
        if self._experiment is not None:
            self._experiment.flush()


class CommandLine(LightningCLI):
    """LightningCLI with one run folder, `trainer.default_root_dir`, for all that a run writes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed of the command line is the seed of all noise."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def _parse_ckpt_path(self) -> None:
        """Read no settings from a checkpoint: config.yaml has them, and runs put none there.

        Lightning's own would read all of it for that, unchecked.
        """

    def before_instantiate_classes(self) -> None:
        """Read the file that a strategy is named by; refuse to mix two runs in one folder.

        A command that its launcher starts again goes on with its run.
        """
        config = self.config[self.subcommand]
        config.trainer.strategy = read_strategy(config.trainer.strategy)
        folder = Path(config.trainer.default_root_dir or ".")
        if self.subcommand != "fit" or config.ckpt_path:
            return
        if any((folder / name).exists() for name in ("config.yaml", "metrics.csv")):
            if any(os.environ.get(name, "0") != "0" for name in RESTARTS):
                config.ckpt_path = "last"
                return
            raise ValueError(
                f"{folder} holds a run already; go on with it by --ckpt_path last, name another "
                "folder by --trainer.default_root_dir, or remove it"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put metrics.csv and checkpoints into the run folder, and TensorBoard's file by default.

        Not into the configuration: the saved one would lead another run into this folder. The end
        of training is saved and scored in every run, so what ends it goes first, and what saves it
        last; behind that is what stops a run that is told to. The start is saved before anything is
        done at it.
        """
        trainer = super().instantiate_trainer(logger=self._loggers(), **kwargs)
        if type(trainer.strategy.checkpoint_io) is TorchCheckpointIO:  # neither named nor sharded
            trainer.strategy.checkpoint_io = WholeCheckpoints()
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath is None:
                # Lightning would put them into the folder of the first logger.
                callback.dirpath = str(Path(trainer.default_root_dir) / "checkpoints")
        signals = StopSignals()
        own: list[Callback] = [StartCheckpoint(), signals]
        if not any(isinstance(callback, Guards) for callback in trainer.callbacks):
            own.append(Guards())
        if trainer.world_size > 1 and not any(isinstance(c, Watchdog) for c in trainer.callbacks):
            own.append(Watchdog())
        callbacks = [*own, *trainer.callbacks, FinalCheckpoint(), Preemption(signals)]
        first = (StartCheckpoint, StopSignals, Guards, Watchdog, Timer, SaveRunConfig)
        trainer.callbacks = sorted(callbacks, key=lambda callback: not isinstance(callback, first))
        return trainer

    def _loggers(self) -> list[Logger]:
        """None but in training: there, the named ones or TensorBoard's, and metrics.csv."""
        if self.subcommand != "fit":
            return []
        folder = self.config[self.subcommand].trainer.default_root_dir or "."
        named = self._get(self.config_init, "trainer").logger
        if named in (None, True):
            named = Curves(folder, "", "")
        loggers = named if isinstance(named, list) else [named] if named else []
        return [*loggers, MetricsFile(folder)]

    def after_instantiate_classes(self) -> None:
        """Find `last`, and refuse a checkpoint that is damaged, or not there, before weights load.

        Lightning starts over where there is no `last`.
        """
        path = self.config[self.subcommand].ckpt_path
        if path == "last":
            self.config_init[self.subcommand].ckpt_path = str(self._find_last())
        elif path and path not in RESOLVED_BY_LIGHTNING:
            if not get_filesystem(path).exists(path):
                raise ValueError(
                    f"expected a checkpoint at {path}, got none; name a file of a run's "
                    "checkpoints folder, or leave out --ckpt_path to begin with the policy's own "
                    "weights"
                )
            if is_on_disk(path):
                check_whole(Path(path))

    def _find_last(self) -> Path:
        callbacks = self.trainer.checkpoint_callbacks
        named = [Path(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath]
        folders = list(dict.fromkeys(named))
        found = newest_good(folders)
        if found is None:
            names = ", ".join(map(str, folders)) or self.trainer.default_root_dir
            raise ValueError(
                f"expected last.ckpt in {names} for --ckpt_path last, got none; name the run's "
                "folder by --trainer.default_root_dir, a checkpoint by --ckpt_path FILE, or leave "
                "out --ckpt_path to begin with the policy's own weights (for a run that ended "
                "before its first checkpoint, remove its folder first)"
            )
        return found

    def before_validate(self) -> None:
        """Leave out the data: the module alone gives the loop a batch, suites have own prompts."""
        self.datamodule = None

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = self.trainer.default_root_dir
        lines = [f"run folder: {folder}", f"curves and pictures: tensorboard --logdir {folder}"]
        for callback in self.trainer.callbacks:
            if isinstance(callback, HuggingFaceExport):
                lines.append(f"exported model: {Path(folder) / callback.folder}")
        self.model.print("\n".join(lines))


def read_strategy(named: Any) -> Any:
    """The strategy that a YAML file holds; any other as it is.

    The parser reads such a file where a class is expected, but here a string may be a name, too.
    """
    if not isinstance(named, str) or not named.endswith(".yaml"):
        return named
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(Strategy, "strategy")
    try:
        return parser.parse_args([f"--strategy={named}"], defaults=False).strategy
    except ArgumentError as error:
        raise ValueError(
            f"expected a strategy's name, or a file with its class, got {named}: "
            f"{' '.join(str(error).split())}; configs/strategies has fsdp.yaml and ddp.yaml"
        ) from error


def main(args: ArgsType = None, command_line: type[CommandLine] = CommandLine) -> CommandLine:
    """Run a command line; `args` stand in for those of the process."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    done = command_line(
        PolicyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        seed_everything_default=0,
        trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
        args=args,
    )
    leave_group()
    return done


def find_mistake(error: Exception) -> str | None:
    """What to say of an error in one line, or None where only its traceback helps.

    Libraries put their own errors around ours: jsonargparse around what a constructor raised,
    Lightning's TensorBoardLogger around the operating system's word on a full disk.
    """
    links = _chain(error)
    for link in links:
        if isinstance(link, ValueError) and _raised_here(link):
            return str(link)
    for link in links:
        if isinstance(link, OSError) and link.errno in FULL_DISK:
            return (
                f"expected room for the files of a run, got: {link}; what was finished before it "
                "stays: free some room, and go on with --ckpt_path last"
            )
    return str(error) if isinstance(error, ValueError) else None


def _chain(error: BaseException | None) -> list[BaseException]:
    """An error and what led to it, each once: an error that is raised again can lead to itself."""
    links: list[BaseException] = []
    while error is not None and error not in links:
        links.append(error)
        error = error.__cause__ or error.__context__
    return links


def _raised_here(error: BaseException) -> bool:
    trace = error.__traceback__
    while trace and trace.tb_next:
        trace = trace.tb_next
    module = trace.tb_frame.f_globals["__name__"] if trace else ""
    return module == __name__ or module.partition(".")[0] == cotgen_pl.__name__


def run_command(command: Callable[[], Any]) -> Any:
    """What a tool's command gives; a user's mistake ends the program with one line.

    Args:
        command: Raises a ValueError of ours, or an OSError, for what the user can put right.
    """
    try:
        return command()
    except SIGTERMException:
        print("stopped as asked; go on with --ckpt_path last", file=sys.stderr)
        sys.exit(STOPPED)
    except (ValueError, OSError) as error:
        mistake = find_mistake(error)
        if mistake is None:
            raise
        sys.exit(f"error: {mistake}")


if __name__ == "__main__":
    sys.path.append(str(Path.cwd()))  # where a user's own classes lie; else only tools/ is there
    run_command(main)
