"""Pictures of `predict` as files: in a benchmark's own layout, and the best of several candidates.

Apart from `cotgen_pl.layouts`, which says where a picture lies: here they are drawn, scored, chosen
from and recorded, so that an interrupted run goes on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor
from tqdm.auto import tqdm

import cotgen_pl
from cotgen_pl.best_of_n import choose
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.formats import ORIGIN
from cotgen_pl.data.prompts import PromptData, check_scorable
from cotgen_pl.evaluation.verdicts import as_plain, describe_judge
from cotgen_pl.files import append_rows, read_rows, write_whole
from cotgen_pl.interfaces import Prompt, Reward, Scores, check_positive
from cotgen_pl.layouts import (
    CANDIDATES,
    MANIFEST,
    Layout,
    name_pictures,
    read_picture,
    write_metadata,
)
from cotgen_pl.modules.base import PolicyModule
from cotgen_pl.pixels import round_to_bytes, to_pillow
from cotgen_pl.sampling import noise_seed, uniform_noise
from cotgen_pl.scoring import ask_each

STREAM = "predict"
SCORES = "scores.jsonl"
MADE_OF = "origin.json"
# What tells the rows of each file apart, and orders them.
KEYS = {SCORES: ("index", "copy", "candidate"), MANIFEST: ("index", "copy")}


class ImageWriter(Callback):
    """Draws pictures of the data's `predict_prompts` into a folder; an interrupted run goes on.

    Beside the pictures stand `origin.json`, what they were made of (another run, policy or seed
    may not go on with the folder); `manifest.jsonl`, of each picture its file, prompt, category,
    index (place of the prompt), copy and seed; and, with rewards, `scores.jsonl`, of each candidate
    its index, copy, number, category, seed, and each reward's total and parts (null for no
    verdict). What is scored is what an 8-bit file holds.

    The noise is keyed by prompt, copy and candidate: fewer copies, or fewer candidates of each, are
    the first of more.

    Args:
        folder: Where, inside the run folder.
        layout: How pictures lie in it, see `cotgen_pl.layouts`. Official tools expect 4 copies for
            geneval and 10 for t2i_compbench.
        copies: Pictures of each prompt that are reported.
        candidates: Drawn afresh for each reported picture; one of them is chosen.
        rewards: What scores all candidates, by names of your own.
        select: The reward whose highest score is chosen. A candidate without its verdict never is
            while another has one; equals are drawn from.
        keep_candidates: Write all candidates, as `candidates/<index>_<copy>_<number>.png`.
        batch_size: Images drawn at a time, on each process.
        top_k: Draw from the k likeliest tokens alone; 1 is greedy.
        top_p: Draw from the likeliest tokens that together reach this probability.
    """

    def __init__(
        self,
        folder: str = "images",
        layout: Layout = "plain",
        copies: int = 1,
        candidates: int = 1,
        rewards: dict[str, Reward] | None = None,
        select: str | None = None,
        keep_candidates: bool = False,
        batch_size: int = 64,
        top_k: int | None = None,
        top_p: float | None = None,
    ) -> None:
        check_positive(copies=copies, candidates=candidates, batch_size=batch_size)
        _check_selection(candidates, rewards or {}, select, keep_candidates)
        self.folder, self.layout, self.copies = folder, layout, copies
        self.candidates, self.rewards, self.select = candidates, rewards or {}, select
        self.keep_candidates, self.batch_size = keep_candidates, batch_size
        self.sampling = {"top_k": top_k, "top_p": top_p}

    # When ---------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Refuse, before weights load, prompts that layout or rewards cannot take."""
        assert isinstance(pl_module, PolicyModule)
        if stage != "predict":
            return
        data = getattr(trainer, "datamodule", None)
        if not isinstance(data, PromptData):
            raise ValueError(
                f"expected PromptData to draw from, got {type(data).__name__}; name prompts by "
                "--data cotgen_pl.data.prompts.PromptData --data.init_args.files ..."
            )
        self.prompts = data.predict_prompts
        self.names = name_pictures(self.layout, self.prompts, self.copies)
        self.metadata = write_metadata(self.layout, self.prompts)
        for reward in self.rewards.values():
            check_scorable(self.prompts, reward)
        pl_module.write_pictures = partial(self.write, trainer, pl_module)
        batch = len(next(self._batches(), []))  # none is larger
        pl_module.pictures_at_once = batch * min(self.candidates, self.batch_size)

    @torch.no_grad()
    def write(self, trainer: Trainer, module: PolicyModule) -> int:
        """Draw what is not there yet; gives how many pictures this process drew."""
        folder, strategy = Path(trainer.default_root_dir) / self.folder, trainer.strategy
        origin = self._origin(module)
        _check_origin(folder, origin)
        strategy.barrier("folder is checked")
        if trainer.is_global_zero:
            self._begin(folder, origin)
        strategy.barrier("folder is ready")
        finished = {(row["index"], row["copy"]) for row in read_rows(folder / MANIFEST)}
        with module.gathered():
            drawn = self._draw_all(trainer, module, folder, finished)
        strategy.barrier("pictures are drawn")
        if trainer.is_global_zero:
            _join_rows(folder)
            self._tell(module, folder)
        return drawn

    def _begin(self, folder: Path, origin: dict[str, Any]) -> None:
        """Take up what an interrupted run left, and write what lies beside the pictures."""
        _write_text(folder / MADE_OF, json.dumps(origin, indent=2, ensure_ascii=False) + "\n")
        _join_rows(folder)
        for name, content in self.metadata.items():
            _write_text(folder / name, content)

    def _draw_all(
        self, trainer: Trainer, module: PolicyModule, folder: Path, finished: set[tuple[int, int]]
    ) -> int:
        """Draw this process's part, and count it; a batch is written while the next is drawn."""
        parts = list(self._batches())[trainer.global_rank :: trainer.world_size]
        hidden = trainer.progress_bar_callback is None or not trainer.is_global_zero
        drawn = 0
        bar = tqdm(total=sum(map(len, parts)), desc=f"drawing {folder.name}", disable=hidden)
        with bar, ThreadPoolExecutor(1) as writer:
            before: Future[None] | None = None
            for part in parts:
                left = [prompt for prompt in part if not self._is_there(folder, prompt, finished)]
                if left:
                    write = self._draw_batch(module, folder, left)
                    if before is not None:
                        before.result()
                    before = writer.submit(write)
                drawn += len(left)
                bar.update(len(part))
            if before is not None:
                before.result()
        return drawn

    def _batches(self) -> Iterator[list[Prompt]]:
        """The pictures as prompts whose occurrence is the copy, by as many as are drawn at once."""
        pictures = [
            replace(prompt, occurrence=copy)
            for prompt in self.prompts
            for copy in range(self.copies)
        ]
        size = max(1, self.batch_size // self.candidates)
        for start in range(0, len(pictures), size):
            yield pictures[start : start + size]

    def _is_there(self, folder: Path, prompt: Prompt, finished: set[tuple[int, int]]) -> bool:
        """Whether a picture has its row and can be read to its end."""
        if (prompt.index, prompt.occurrence) not in finished:
            return False
        try:
            read_picture(folder / self._name(prompt))
        except ValueError:
            return False
        return True

    def _name(self, prompt: Prompt) -> str:
        return self.names[prompt.index][prompt.occurrence]

    def _tell(self, module: PolicyModule, folder: Path) -> None:
        module.print(f"pictures: {folder}")
        rows = read_rows(folder / MANIFEST)
        blind = [row["file"] for row in rows if self.select and row["score"] is None]
        if blind:
            rank_zero_warn(
                f"{self.select} gave no verdict on any candidate of {len(blind)} of {len(rows)} "
                f"pictures, which were chosen by chance: {', '.join(blind)}"
            )

    # What ---------------------------------------------------------------------------------------

    def _draw_batch(
        self, module: PolicyModule, folder: Path, prompts: list[Prompt]
    ) -> Callable[[], None]:
        """Draw, score and choose; gives what writes it, which asks nothing of the device."""
        images = self._draw(module, prompts)  # [B, N, 3, H, W]
        repeated = [prompt for prompt in prompts for _ in range(self.candidates)]
        with module.own_random_state(STREAM, prompts[0].index, prompts[0].occurrence):
            scores = ask_each(self.rewards, images.flatten(0, 1), repeated)
        scores = {name: verdict.to(torch.device("cpu")) for name, verdict in scores.items()}
        seeds = module.noise_seeds(prompts, self.candidates, STREAM)
        chosen = self._choose(module, prompts, scores)
        rows = [
            self._manifest_row(prompt, seeds[number * self.candidates + choice])
            | self._choice(scores, number * self.candidates + choice, choice)
            for number, (prompt, choice) in enumerate(zip(prompts, chosen, strict=True))
        ]
        told = list(self._score_rows(repeated, seeds, scores))
        batch = list(zip(prompts, images.cpu(), chosen, strict=True))
        return partial(self._write_batch, folder, module.global_rank, batch, told, rows)

    def _write_batch(
        self,
        folder: Path,
        rank: int,
        batch: Sequence[tuple[Prompt, Tensor, int]],
        scores: Sequence[dict[str, Any]],
        rows: Sequence[dict[str, Any]],
    ) -> None:
        """Write scores, pictures and, last, the pictures' rows."""
        if self.rewards:
            append_rows(_part(folder / SCORES, rank), scores)
        for prompt, images, chosen in batch:
            self._write_pictures(folder, prompt, images, chosen)
        append_rows(_part(folder / MANIFEST, rank), rows)

    def _draw(self, module: PolicyModule, prompts: list[Prompt]) -> Tensor:
        """[B, N, 3, H, W] in [0, 1], as 8-bit files hold them."""
        parts = []
        for first in range(0, self.candidates, self.batch_size):
            copies = min(self.batch_size, self.candidates - first)
            tokens, _ = module.draw(prompts, copies, STREAM, first, **self.sampling)
            images = round_to_bytes(module.policy.decode(tokens))
            parts.append(images.unflatten(0, (len(prompts), copies)))
        return torch.cat(parts, 1)

    def _choose(
        self, module: PolicyModule, prompts: Sequence[Prompt], scores: dict[str, Scores]
    ) -> list[int]:
        """The number of each picture's chosen candidate."""
        if self.select is None:
            return [0] * len(prompts)
        ties = [noise_seed(module.seed, STREAM, "ties", p.index, p.occurrence) for p in prompts]
        totals = scores[self.select].total.view(-1, self.candidates)
        return choose(totals, uniform_noise(ties, 1)[:, 0])

    def _write_pictures(self, folder: Path, prompt: Prompt, images: Tensor, chosen: int) -> None:
        """Write the chosen one of a picture's candidates [N, 3, H, W], and all of them if asked."""
        pictures = to_pillow(images)
        files = {folder / self._name(prompt): pictures[chosen]}
        if self.keep_candidates:
            stem = f"{prompt.index:06d}_{prompt.occurrence:04d}"
            for number, picture in enumerate(pictures):
                files[folder / CANDIDATES / f"{stem}_{number:04d}.png"] = picture
        for path, picture in files.items():
            write_whole(path, partial(picture.save, format="PNG"))

    # Records ------------------------------------------------------------------------------------

    def _manifest_row(self, prompt: Prompt, seed: int) -> dict[str, Any]:
        return {
            "file": self._name(prompt),
            "prompt": prompt.text,
            "category": prompt.category,
            "index": prompt.index,
            "copy": prompt.occurrence,
            "seed": seed,
        }

    def _choice(self, scores: dict[str, Scores], row: int, chosen: int) -> dict[str, Any]:
        """Which candidate a picture is, and its score."""
        if self.select is None:
            return {}
        return {"candidate": chosen, "score": scores[self.select].total[row].item()}

    def _score_rows(
        self, prompts: Sequence[Prompt], seeds: Sequence[int], scores: dict[str, Scores]
    ) -> Iterator[dict[str, Any]]:
        for row, (prompt, seed) in enumerate(zip(prompts, seeds, strict=True)):
            yield {
                "index": prompt.index,
                "copy": prompt.occurrence,
                "candidate": row % self.candidates,
                "category": prompt.category,
                "seed": seed,
                "rewards": {
                    name: {
                        "total": verdict.total[row].item(),
                        "parts": {part: of[row].item() for part, of in verdict.parts.items()},
                    }
                    for name, verdict in scores.items()
                },
            }

    def _origin(self, module: PolicyModule) -> dict[str, Any]:
        """What pictures and scores depend on, as JSON values."""
        texts = [
            (p.drawn_text, p.text, p.category, {k: v for k, v in p.facts.items() if k != ORIGIN})
            for p in self.prompts
        ]
        sampling = {"guidance": module.guidance, "temperature": module.temperature}
        origin = {
            "version": cotgen_pl.__version__,
            "policy": hash_weights(module.policy),
            "policy_source": module.policy.describe(),
            "prompts": {"number": len(texts), "hash": f"{noise_seed(repr(texts)):016x}"},
            "layout": self.layout,
            "copies": self.copies,
            "candidates": self.candidates,
            "keep_candidates": self.keep_candidates,
            "seed": module.seed,
            "sampling": {**sampling, **self.sampling},
            "rewards": {name: describe_judge(reward) for name, reward in self.rewards.items()},
            "select": self.select,
        }
        as_read: dict[str, Any] = json.loads(json.dumps(as_plain(origin)))
        return as_read


def _check_selection(
    candidates: int, rewards: dict[str, Reward], select: str | None, keep_candidates: bool
) -> None:
    if select is not None and select not in rewards:
        raise ValueError(
            f"expected select to name one of the rewards {list(rewards)}, got {select!r}; name one "
            "of them, or add it to rewards"
        )
    if (candidates > 1) != (select is not None):
        raise ValueError(
            f"expected select with 2 or more candidates and without it for 1, got select {select} "
            f"for {candidates}; name the reward that chooses, or set copies to report all pictures"
        )
    if keep_candidates and select is None:
        raise ValueError(
            "expected keep_candidates with a choice among candidates, got 1 candidate; raise "
            "candidates, or leave keep_candidates out"
        )


def _check_origin(folder: Path, origin: dict[str, Any]) -> None:
    """Raise a ValueError where a folder holds anything but pictures of the same origin."""
    path = folder / MADE_OF
    if not path.is_file():
        if folder.is_dir() and any(not file.name.startswith(".") for file in folder.iterdir()):
            raise ValueError(
                f"{folder} holds files without {MADE_OF}, so they are not of this run; name "
                "another folder, or remove it"
            )
        return
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(
            f"expected JSON in {path}, got: {error}; remove the folder {folder}"
        ) from error
    found = found if isinstance(found, dict) else {}
    differing = [name for name in origin if found.get(name) != origin[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{folder} holds pictures of another {', '.join(differing)} ({name}: expected "
            f"{origin[name]!r}, got {found.get(name)!r}); name another folder, or remove it"
        )


def _part(path: Path, rank: int | str) -> Path:
    """The file of one process's rows, until they are joined."""
    return path.with_name(f"{path.stem}_{rank}{path.suffix}")


def _join_rows(folder: Path) -> None:
    """Put the rows of all processes into one file each, in order; of a redrawn picture the last."""
    for name, keys in KEYS.items():
        path = folder / name
        parts = sorted(folder.glob(_part(path, "*").name))
        if parts:
            rows = [row for part in (path, *parts) for row in read_rows(part)]
            joined = {tuple(row[key] for key in keys): row for row in rows}
            lines = [json.dumps(joined[key], ensure_ascii=False) for key in sorted(joined)]
            _write_text(path, "".join(f"{line}\n" for line in lines))
            for part in parts:
                part.unlink()


def _write_text(path: Path, text: str) -> None:
    write_whole(path, lambda part: part.write_text(text, encoding="utf-8"))
