"""Score a folder of pictures that any model drew, in a benchmark's own layout or with a manifest.

`python tools/score.py FOLDER --layout geneval --prompts data/geneval/evaluation_metadata.jsonl
--reward configs/rewards/geneval.yaml` prints the table that `validate` prints, see
`cotgen_pl.evaluation.tables`, and writes three files beside each other: OUT.json (the table, the
reward's description with hashes of its weights, what was scored, every verdict), OUT.csv (a row per
picture) and OUT.jsonl (the reward's verdicts, appended batch by batch: a run that was killed goes
on behind its last one).
"""

from __future__ import annotations

import csv
import hashlib
import io
import json
import math
import warnings
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from jsonargparse import ArgumentParser, Namespace
from torch import Tensor
from tqdm.auto import tqdm

import cotgen_pl
from cotgen_pl.data.formats import ORIGIN, Format
from cotgen_pl.data.prompts import PromptFile, check_scorable, read_prompts
from cotgen_pl.evaluation.suites import OWN, JudgedSuite, Suite
from cotgen_pl.evaluation.tables import Row, format_rows, suite_rows, warn_of_equal
from cotgen_pl.evaluation.verdicts import as_plain, describe_judge
from cotgen_pl.files import append_rows, read_rows, without_nan, write_whole
from cotgen_pl.interfaces import Prompt, Reward, check_positive, check_scores
from cotgen_pl.layouts import Layout, Picture, find_pictures, read_picture
from cotgen_pl.official_results import read_vqa_result
from cotgen_pl.sampling import noise_seed
from cotgen_pl.scoring import ask

if __package__:  # as a module of tools/
    from tools.main import run_command
else:  # as a script, which has its own folder on the path
    from main import run_command

# How the prompts of each layout's benchmark are written.
FORMATS: dict[str, Format] = {
    "plain": "jsonl",
    "geneval": "geneval",
    "t2i_compbench": "t2i_compbench",
}
UNIDET = "unidet"
UNIDET_CATEGORIES = ("spatial", "numeracy", "3d_spatial")  # what official UniDet results are of
Verdict = dict[str, Any]


# Scoring ----------------------------------------------------------------------------------------


def score_pictures(
    folder: Path,
    pictures: Sequence[Picture],
    reward: Reward,
    verdicts: Path,
    batch_size: int,
    device: str,
) -> list[Verdict]:
    """A verdict on each picture, in their order; those in the file already are not asked for again.

    Args:
        folder: Where the pictures lie.
        pictures: Of any sizes.
        reward: Judges; loaded.
        verdicts: A file of rows that this appends to.
        batch_size: Pictures at a time.
        device: Where they are put.
    """
    known = {row["file"]: row for row in read_rows(verdicts)[1:]}
    missing = len(pictures) - len(known)
    with tqdm(total=len(pictures), desc=f"scoring {folder.name}", disable=not missing) as bar:
        for number, part in enumerate(_split(pictures, batch_size)):
            if any(picture.file not in known for picture in part):
                with torch.random.fork_rng(_generators(device)):
                    torch.manual_seed(noise_seed("score", number))  # of rewards that use it
                    rows = _score_batch(folder, part, reward, device)
                append_rows(verdicts, rows)
                known |= {row["file"]: row for row in map(without_nan, rows)}
            bar.update(len(part))
    return [known[picture.file] for picture in pictures]


def _split(pictures: Sequence[Picture], size: int) -> Iterator[Sequence[Picture]]:
    for start in range(0, len(pictures), size):
        yield pictures[start : start + size]


def _generators(device: str) -> list[torch.device]:
    return [torch.device(device)] if torch.device(device).type == "cuda" else []


def _score_batch(
    folder: Path, pictures: Sequence[Picture], reward: Reward, device: str
) -> list[Verdict]:
    """Ask for the pictures of each size at once."""
    images = [read_picture(folder / picture.file) for picture in pictures]
    sizes: dict[torch.Size, list[int]] = defaultdict(list)
    for place, image in enumerate(images):
        sizes[image.shape].append(place)
    rows: dict[int, Verdict] = {}
    for places in sizes.values():
        asked = torch.stack([images[place] for place in places]).to(device)
        scores = ask(reward, asked, [pictures[place].prompt for place in places])
        check_scores(scores, len(places), reward.name, most_missing=None)
        for number, place in enumerate(places):
            parts = {name: values[number].item() for name, values in scores.parts.items()}
            details = as_plain(scores.details[number]) if scores.details else None
            rows[place] = _verdict(pictures[place], scores.total[number].item(), parts, details)
    return [rows[place] for place in range(len(pictures))]


def _verdict(
    picture: Picture, total: float, parts: Mapping[str, float], details: Any = None
) -> Verdict:
    prompt = picture.prompt
    return {
        "file": picture.file,
        "prompt": prompt.text,
        "category": prompt.category,
        "index": prompt.index,
        "copy": picture.copy,
        "total": total,
        "parts": dict(parts),
        "details": details,
    }


def import_unidet(pictures: Sequence[Picture], file: Path) -> dict[str, Verdict]:
    """Official verdicts on the pictures of the category that has such, by their files.

    Raises:
        ValueError: There is not one such category, or the file is not of its pictures.
    """
    found = {p.prompt.category for p in pictures} & set(UNIDET_CATEGORIES)
    if len(found) != 1:
        raise ValueError(
            f"--import-unidet: expected prompts of one category out of {UNIDET_CATEGORIES}, since "
            f"a result file is of one, got {sorted(found)}; score one category at a time"
        )
    own = [picture for picture in pictures if picture.prompt.category in found]
    answers = read_vqa_result(file)
    if set(answers) != set(range(len(own))):
        lacking, extra = set(range(len(own))) - set(answers), set(answers) - set(range(len(own)))
        raise ValueError(
            f"{file}: expected question_id 0 to {len(own) - 1}, one for each picture of "
            f"{found.pop()}, got {len(answers)} without {sorted(lacking)} and with "
            f"{sorted(extra)} besides; name the result of this folder"
        )
    return {
        picture.file: _verdict(picture, answers[number], {UNIDET: answers[number]})
        for number, picture in enumerate(own)
    }


def take_up(verdicts: Path, variant: Mapping[str, Any]) -> None:
    """Begin a file of verdicts, or cut what a kill left half of off one that goes on.

    Raises:
        ValueError: The file has verdicts on other pictures, or by another reward.
    """
    head, *rows = read_rows(verdicts) or [{"variant": variant}]
    found = head.get("variant", {})
    differing = [name for name in variant if found.get(name) != variant[name]]
    if differing:
        name = differing[0]
        raise ValueError(
            f"{verdicts} has verdicts with another {', '.join(differing)} ({name}: expected "
            f"{_shorten(variant[name])}, got {_shorten(found.get(name))}); name another file by "
            "--out, or remove it"
        )
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (head, *rows))
    write_whole(verdicts, partial(_write_text, text=text))


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 300 else f"{text[:300]}..."


# Showing ----------------------------------------------------------------------------------------


def as_suite(name: str, prompts: Sequence[Prompt], verdicts: Sequence[Verdict]) -> JudgedSuite:
    """The verdicts as those of an evaluation, with its tables: tensors [P, G], NaN for none.

    Args:
        name: For messages.
        prompts: P.
        verdicts: P * G, those of a prompt adjacent.
    """
    copies = len(verdicts) // len(prompts)

    def table(values: Iterable[float | None]) -> Tensor:
        numbers = [math.nan if value is None else value for value in values]
        return torch.tensor(numbers, dtype=torch.float64).view(-1, copies)

    names = dict.fromkeys(name for verdict in verdicts for name in verdict["parts"])
    parts = {name: table(verdict["parts"].get(name) for verdict in verdicts) for name in names}
    own = {"total": table(verdict["total"] for verdict in verdicts), **parts}
    unknown = torch.full((len(prompts),), torch.nan)
    return JudgedSuite(Suite(name, "shift", []), list(prompts), {OWN: own}, unknown)


def format_csv(verdicts: Sequence[Verdict]) -> str:
    """A row per picture, a column per part; no verdict is an empty cell."""
    names = list(dict.fromkeys(name for verdict in verdicts for name in verdict["parts"]))
    stands = ["file", "prompt", "category", "index", "copy", "total"]
    file = io.StringIO()
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow([*stands, *(f"parts/{name}" for name in names), "details"])
    for verdict in verdicts:
        parts = [verdict["parts"].get(name) for name in names]
        details = json.dumps(verdict["details"], ensure_ascii=False)
        writer.writerow([*(verdict[name] for name in stands), *parts, details])
    return file.getvalue()


# The command ------------------------------------------------------------------------------------


def read_arguments(arguments: Sequence[str] | None) -> Namespace:
    """Read a command line; the reward comes from a piece of YAML, named by path."""
    parser = ArgumentParser(description="Score a folder of pictures that any model drew.")
    parser.add_argument("folder", type=str, help="of pictures")
    parser.add_argument("--layout", type=Layout, required=True, help="how they lie in it")
    parser.add_argument("--prompts", nargs="+", type=str, required=True, help="files, in order")
    parser.add_argument("--format", type=Format | None, help="of them; that of the benchmark")
    parser.add_subclass_arguments(Reward, "reward", required=False, help="a piece of YAML")
    parser.add_argument(
        "--copies", type=int | None, help="pictures of each prompt; as many as the benchmark wants"
    )
    parser.add_argument("--batch_size", type=int, default=32, help="pictures at a time")
    parser.add_argument("--device", type=str | None, help="a GPU where there is one")
    parser.add_argument("--out", type=str | None, help="where verdicts go; FOLDER/verdicts.json")
    parser.add_argument(
        "--import-unidet", type=str | None, help="official UniDet results, a vqa_result.json"
    )
    with warnings.catch_warnings():  # the new name is that of jsonargparse 4.49 and later
        warnings.simplefilter("ignore", DeprecationWarning)
        return parser.instantiate_classes(parser.parse_args(arguments))


def read_all(files: Sequence[str], format: Format) -> list[Prompt]:
    """The prompts of all files, numbered."""
    prompts = [prompt for file in files for prompt in read_prompts(PromptFile(file, format))]
    return [replace(prompt, index=index) for index, prompt in enumerate(prompts)]


def score(arguments: Sequence[str] | None = None) -> list[Row]:
    """Read a command line, score, print and write; returns the table."""
    own = read_arguments(arguments)
    check_positive(batch_size=own.batch_size)
    folder = Path(own.folder)
    out = Path(own.out) if own.out else folder / "verdicts.json"
    if out.suffix != ".json":
        raise ValueError(f"expected --out of a file that ends in .json, got {out}; rename it")
    prompts = read_all(own.prompts, own.format or FORMATS[own.layout])
    pictures = find_pictures(folder, own.layout, prompts, own.copies)
    imported = import_unidet(pictures, Path(own.import_unidet)) if own.import_unidet else {}
    asked = [picture for picture in pictures if picture.file not in imported]
    variant = describe_task(own, folder, prompts, pictures)
    judged = _judge(own, folder, asked, out, variant) if asked else []
    known = imported | {verdict["file"]: verdict for verdict in judged}
    verdicts = [known[picture.file] for picture in pictures]
    suite = as_suite(folder.name, prompts, verdicts)
    suite.names = {  # imported verdicts are the published metric itself
        category: own.reward.metric_name(category)
        for category in {picture.prompt.category for picture in asked}
    }
    rows = suite_rows(suite)
    _write(out, rows, verdicts, variant)
    warn_of_equal(suite)
    copies = len(pictures) // len(prompts)
    print(format_rows(f"{folder}, images of each prompt: {copies}", rows))
    print(f"\nverdicts: {out} and {out.with_suffix('.csv')}")
    return rows


def describe_task(
    own: Namespace, folder: Path, prompts: Sequence[Prompt], pictures: Sequence[Picture]
) -> dict[str, Any]:
    """What verdicts depend on but for the reward, as JSON values."""
    told = [asdict(replace(prompt, facts=prompt.facts | {ORIGIN: ""})) for prompt in prompts]
    digest = hashlib.blake2b(digest_size=8)
    for picture in pictures:
        digest.update(picture.file.encode() + (folder / picture.file).read_bytes())
    return {
        "version": cotgen_pl.__version__,
        "layout": own.layout,
        "prompts": {"files": own.prompts, "hash": f"{noise_seed(repr(told)):016x}"},
        "pictures": {"number": len(pictures), "hash": digest.hexdigest()},
        "batch_size": own.batch_size,
        "import_unidet": own.import_unidet,
    }


def _judge(
    own: Namespace,
    folder: Path,
    asked: Sequence[Picture],
    out: Path,
    variant: dict[str, Any],
) -> list[Verdict]:
    """Have the reward score what has no imported verdict; adds its description to the variant."""
    if own.reward is None:
        raise ValueError(
            f"expected a reward for {len(asked)} pictures, got none; name a piece by --reward, "
            "like configs/rewards/geneval.yaml"
        )
    check_scorable([picture.prompt for picture in asked], own.reward)
    variant["reward"] = json.loads(json.dumps(as_plain(describe_judge(own.reward))))
    take_up(out.with_suffix(".jsonl"), variant)
    device = own.device or ("cuda" if torch.cuda.is_available() else "cpu")
    return score_pictures(
        folder, asked, own.reward, out.with_suffix(".jsonl"), own.batch_size, device
    )


def _write(
    out: Path, rows: Sequence[Row], verdicts: Sequence[Verdict], variant: Mapping[str, Any]
) -> None:
    head = {"variant": variant, "table": [as_plain(vars(row)) for row in rows]}
    content = without_nan({**head, "verdicts": list(verdicts)})
    files = {
        out: json.dumps(content, indent=2, ensure_ascii=False, allow_nan=False) + "\n",
        out.with_suffix(".csv"): format_csv(verdicts),
    }
    for path, text in files.items():
        write_whole(path, partial(_write_text, text=text))


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    run_command(score)
