"""Train, score and draw: `python tools/main.py fit|validate|predict --config configs/NAME.yaml`."""

from __future__ import annotations

import json
import sys
import warnings
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.cli import (
    ArgsType,
    LightningArgumentParser,
    LightningCLI,
    SaveConfigCallback,
)
from lightning.pytorch.loggers import TensorBoardLogger

import cotgen_pl
from cotgen_pl.callbacks.export import HuggingFaceExport
from cotgen_pl.callbacks.metrics import MetricsFile
from cotgen_pl.modules.base import PolicyModule

# Lightning's advice on choices that are made on purpose here.
EXPECTED = (
    ".*does not have many workers.*",  # prompts are a few bytes
    ".*`training_step` returned `None`.*",  # manual optimisation
    ".*is an iterable dataset with.*",  # its length is that of the run
    ".*no `val_dataloader`.*",  # SuiteEvaluation scores in training
    ".*in eval mode at the start of training.*",  # nothing here has dropout
    ".*pre-optimization state.*",  # a checkpoint holds what the update made
    ".*treespec.is_leaf.*",  # Lightning's own use of torch
)


class SaveRunConfig(SaveConfigCallback):
    """Writes config.yaml into the run folder, in training alone."""

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Leave the run folder as it is under validate and predict."""
        if stage == "fit":
            super().setup(trainer, pl_module, stage)


class CommandLine(LightningCLI):
    """LightningCLI with one run folder, `trainer.default_root_dir`, for all that a run writes."""

    def add_arguments_to_parser(self, parser: LightningArgumentParser) -> None:
        """The seed of the command line is the seed of all noise."""
        parser.link_arguments("seed_everything", "model.init_args.seed", compute_fn=int)
        parser.link_arguments("seed_everything", "data.init_args.seed", compute_fn=int)

    def before_instantiate_classes(self) -> None:
        """Refuse to mix two runs in one folder."""
        config = self.config[self.subcommand]
        folder = Path(config.trainer.default_root_dir or ".")
        if self.subcommand != "fit" or config.ckpt_path:
            return
        if (folder / "metrics.csv").exists():
            raise ValueError(
                f"{folder} holds a run already; go on with it by --ckpt_path last, name another "
                "folder by --trainer.default_root_dir, or remove it"
            )

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        """Put loggers into the run folder, unless the configuration names others.

        Not into the configuration: the saved one would lead another run into this folder.
        """
        config = self.config[self.subcommand].trainer
        folder = config.default_root_dir or "."
        if self.subcommand != "fit":
            kwargs["logger"] = False
        elif config.logger in (None, True):
            kwargs["logger"] = [TensorBoardLogger(folder, "", ""), MetricsFile(folder)]
        return super().instantiate_trainer(**kwargs)

    def before_fit(self) -> None:
        """Write what was found out rather than configured beside the configuration."""
        if self.trainer.is_global_zero:
            versions = {name: version(name) for name in ("torch", "transformers", "lightning")}
            found = {"cotgen_pl": cotgen_pl.__version__, **versions}
            found |= {"policy": self.model.policy.describe()}
            path = Path(self.trainer.default_root_dir) / "run.json"
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(json.dumps(found, indent=2, ensure_ascii=False) + "\n")

    def before_validate(self) -> None:
        """Leave out the data: the module alone gives the loop a batch, suites have own prompts."""
        self.datamodule = None

    def after_fit(self) -> None:
        """Say where everything is."""
        folder = self.trainer.default_root_dir
        lines = [f"run folder: {folder}", f"curves and pictures: tensorboard --logdir {folder}"]
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            if isinstance(callback, HuggingFaceExport):
                lines.append(f"exported model: {Path(folder) / callback.folder}")
        self.model.print("\n".join(lines))


def main(args: ArgsType = None) -> CommandLine:
    """Run the command line; `args` stand in for those of the process."""
    for message in EXPECTED:
        warnings.filterwarnings("ignore", message)
    return CommandLine(
        PolicyModule,
        LightningDataModule,
        subclass_mode_model=True,
        subclass_mode_data=True,
        save_config_callback=SaveRunConfig,
        save_config_kwargs={"overwrite": True},
        seed_everything_default=0,
        trainer_defaults={"max_epochs": 1, "num_sanity_val_steps": 0, "log_every_n_steps": 1},
        args=args,
    )


if __name__ == "__main__":
    try:
        main()
    except ValueError as error:
        sys.exit(f"error: {error}")
