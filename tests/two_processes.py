"""Training on one process or two, whose results can be compared; torchrun starts this file.

`torchrun --nproc-per-node 2 tests/two_processes.py PLAN RESULTS`: the plan is a JSON list of
`learn`'s arguments, the results one file for each.
"""

import json
import re
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins import DoublePrecision
from lightning.pytorch.strategies import DDPStrategy

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.callbacks.export import HuggingFaceExport
from cotgen_pl.callbacks.final_checkpoint import FinalCheckpoint
from cotgen_pl.data.pairs import PairData
from cotgen_pl.data.prompts import PromptData
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.run_checkpoints import WholeCheckpoints
from cotgen_pl.sharding import whole
from cotgen_pl.strategies import ShardedStrategy, leave_group
from tests.toys import make_dpo, make_grpo, make_policy, make_trainer, write_prompts

PER_UPDATE, MOST_UPDATES = 8, 10
OF_THE_POLICY = ("lora", "trains", "gradient_checkpointing")
GATHERS = re.compile(r"FSDP::all_gather( \(.*)?")  # of one unit, in torch's own profile


class Recorder(Callback):
    """Keeps tokens and seconds of rollouts, layers gathered for each, and gradients.

    Args:
        profiles: Count what is gathered; it takes time.
    """

    def __init__(self, profiles: bool) -> None:
        self.profiles = profiles
        self.seconds: list[float] = []
        self.gradients: list[dict[str, torch.Tensor]] = []
        self.tokens: list[torch.Tensor] = []
        self.gathers: list[int] = []
        self.start: dict[str, torch.Tensor] = {}

    def on_train_start(self, trainer, pl_module):
        self.start = {n: whole(p.detach()).clone() for n, p in pl_module._trained().items()}
        if isinstance(pl_module, DPOModule):
            return
        draw = pl_module.draw

        def note(*args: Any, **settings: Any) -> Any:
            started = time.perf_counter()
            with torch.profiler.profile() if self.profiles else nullcontext() as profile:
                drawn = draw(*args, **settings)
            self.seconds.append(time.perf_counter() - started)
            if profile is not None:
                events = profile.key_averages()
                self.gathers.append(sum(e.count for e in events if GATHERS.fullmatch(e.key)))
            self.tokens.append(drawn[0])
            return drawn

        pl_module.draw = note

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        gradients = {n: whole(p.grad).clone() for n, p in pl_module._trained().items()}
        self.gradients.append(gradients)


def learn(
    janus: str,
    folder: str,
    algorithm: str,
    strategy: str | None,
    updates: int,
    resume: str | None = None,
    dtype: str = "float64",
    pairs: str = "",
    gather: str = "rollout",
    profiles: bool = False,
    precision: str = "32-true",
    timed: bool = False,
    **settings: Any,
) -> dict[str, Any]:
    """Train for some updates in all, from the start or from another run's last checkpoint.

    Returns:
        `start` and `weights` by name, `gradients` of each update, and under GRPO of each rollout
        this process's `tokens`, `seconds` and `gathers`. Where `timed`, the seconds alone, and
        nothing is written.
    """
    place, recorder = Path(folder), Recorder(profiles)
    place.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(0)  # adapters begin at random
    about = {name: settings.pop(name) for name in OF_THE_POLICY if name in settings}
    if "lora" in about:
        about["lora"] = LoraSettings(**about["lora"])
    policy = make_policy(Path(janus), dtype=dtype, **about)
    adam = {"optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=3e-4)}
    module: Any
    data: Any
    if algorithm == "grpo":
        sizes = {"images_per_update": PER_UPDATE, "images_budget": PER_UPDATE * MOST_UPDATES}
        learning = {"kl_coef": 0.1, "micro_batch_size": 2}
        module = make_grpo(Path(janus), policy=policy, **(sizes | learning | adam | settings))
        data = PromptData([write_prompts(place)])
    else:
        module = make_dpo(Path(janus), policy=policy, **(adam | settings))
        data = PairData(pairs, pairs_per_update=4, epochs=10)
    strategies = {"ddp": DDPStrategy, "sharded": lambda: ShardedStrategy(gather)}
    around: dict[str, Any] = {}
    if strategy is not None:
        around = {"strategy": strategies[strategy](), "devices": 2}
    if dtype == "float64":
        around |= {"precision": None, "plugins": DoublePrecision()}
    checkpoint = ModelCheckpoint(place, save_last=True, every_n_train_steps=100)
    writing = [] if timed else [HuggingFaceExport(), checkpoint, FinalCheckpoint()]
    trainer = make_trainer(
        place,
        recorder,
        *writing,
        **({"precision": precision, "max_steps": updates} | around),
    )
    if strategy != "sharded":
        trainer.strategy.checkpoint_io = WholeCheckpoints()
    last = None if resume is None else str(Path(resume) / "last.ckpt")
    trainer.fit(module, data, ckpt_path=last)
    if timed:
        return {"seconds": recorder.seconds}
    weights = {n: whole(p.detach()).clone() for n, p in module._trained().items()}
    found = {"start": recorder.start, "weights": weights, "gradients": recorder.gradients}
    drawn = {"tokens": recorder.tokens, "gathers": recorder.gathers, "seconds": recorder.seconds}
    return found | drawn


def main(plan: str, results: str) -> None:
    """Carry out a plan on this process."""
    for number, arguments in enumerate(json.loads(Path(plan).read_text())):
        found = learn(**arguments)
        rank = torch.distributed.get_rank()
        torch.save(found, Path(results) / f"{number}-{rank}.pt")
    leave_group()


if __name__ == "__main__":
    torch.set_num_threads(1)
    main(*sys.argv[1:])
