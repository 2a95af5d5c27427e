"""Where the pictures of prompts lie in a folder: our own plain layout and those of the benchmarks.

* `plain`: `<prompt>_<copy>.png`, six and four digits, and manifest.jsonl with a row for each.
* `geneval`: `<prompt>/samples/<copy>.png`, five and four digits, and the prompt's line of
  evaluation_metadata.jsonl as `<prompt>/metadata.jsonl`. Its tools
  (https://github.com/djghosh13/geneval/tree/af4902f) read any number of digits and skip grid.png.
* `t2i_compbench`: `samples/<text>_<number>.png`, six digits, the number running over the pictures.
  Its tools (https://github.com/Karine-Huang/T2I-CompBench/tree/1b70949) recover the text from the
  file's name, up to the first '_', and score one category at a time: where the prompts have several
  categories, each has a folder `<category>/samples/` and numbers of its own.

Prompts and copies are counted from 0.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from cotgen_pl.files import read_rows
from cotgen_pl.interfaces import Prompt, check_choice, check_positive

Layout = Literal["plain", "geneval", "t2i_compbench"]
OFFICIAL_COPIES = {"geneval": 4, "t2i_compbench": 10}  # pictures of each prompt
MANIFEST = "manifest.jsonl"
CANDIDATES = "candidates"  # a folder of pictures that were not chosen; no layout reads it
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
LONGEST_NAME = 240  # bytes; file systems take 255, and unfinished files have longer names
Place = tuple[int, int]  # number of the prompt, of the copy


@dataclass(frozen=True)
class Picture:
    """A picture that lies in a folder."""

    file: str
    """Its path inside the folder, with '/'."""
    prompt: Prompt
    copy: int


# Writing ----------------------------------------------------------------------------------------


def name_pictures(layout: Layout, prompts: Sequence[Prompt], copies: int) -> list[list[str]]:
    """The path of each picture inside its folder: P lists of `copies` each.

    Raises:
        ValueError: The layout cannot hold these prompts.

    >>> name_pictures("t2i_compbench", [Prompt("a red cat"), Prompt("a dog")], 1)
    [['samples/a red cat_000000.png'], ['samples/a dog_000001.png']]
    """
    check_choice("layout", layout, Layout)
    check_positive(copies=copies)
    numbers = range(len(prompts))
    match layout:
        case "plain":
            return [[f"{row:06d}_{copy:04d}.png" for copy in range(copies)] for row in numbers]
        case "geneval":
            return [
                [f"{row:05d}/samples/{copy:04d}.png" for copy in range(copies)] for row in numbers
            ]
        case "t2i_compbench":
            return _name_by_text(prompts, copies)


def _name_by_text(prompts: Sequence[Prompt], copies: int) -> list[list[str]]:
    _check_texts([prompt.text for prompt in prompts])
    several = len({prompt.category for prompt in prompts}) > 1
    numbers: Counter[str] = Counter()  # pictures so far, by folder
    names = []
    for prompt in prompts:
        folder = f"{_folder_of(prompt)}/samples" if several else "samples"
        first = numbers[folder]
        numbers[folder] += copies
        names.append([f"{folder}/{prompt.text}_{first + copy:06d}.png" for copy in range(copies)])
    return names


def _check_texts(texts: Sequence[str]) -> None:
    unusable = [
        text
        for text in texts
        if set(text) & set("_/\0") or len(text.encode()) + len("_000000.png") > LONGEST_NAME
    ]
    if unusable:
        raise ValueError(
            "layout t2i_compbench: expected prompts without '_' and '/' that fit into a file's "
            f"name, from which official tools recover them, got {len(unusable)} others: "
            f"{', '.join(map(repr, unusable))}; reword these prompts or leave them out, or take "
            "the layout plain, whose manifest holds any text"
        )


def _folder_of(prompt: Prompt) -> str:
    name = prompt.category
    if not name or name.startswith(".") or "/" in name or name == CANDIDATES:
        raise ValueError(
            "layout t2i_compbench: expected a category that can name a folder for each prompt, "
            f"since there are several categories, got {name!r} for {prompt.text!r}; set the "
            "category of its prompt file"
        )
    return name


def write_metadata(layout: Layout, prompts: Sequence[Prompt]) -> dict[str, str]:
    """What lies beside the pictures for official tools: contents by path inside the folder.

    Raises:
        ValueError: GenEval's layout wants its tag and clauses, which a prompt lacks.
    """
    if layout != "geneval":
        return {}
    return {
        f"{row:05d}/metadata.jsonl": json.dumps(_geneval_metadata(prompt), ensure_ascii=False)
        for row, prompt in enumerate(prompts)
    }


def _geneval_metadata(prompt: Prompt) -> dict[str, Any]:
    """A prompt's line of evaluation_metadata.jsonl."""
    if not prompt.facts.get("include") or not prompt.category:
        raise ValueError(
            "layout geneval: expected prompts with GenEval's tag as category and its clauses under "
            f"'include', got neither or one of them for {prompt.text!r}; take a file of format "
            "geneval, or another layout"
        )
    metadata = {"tag": prompt.category, "include": prompt.facts["include"]}
    if prompt.facts.get("exclude"):
        metadata["exclude"] = prompt.facts["exclude"]
    return metadata | {"prompt": prompt.text}


# Reading ----------------------------------------------------------------------------------------


@dataclass
class _Found:
    """What lies in a folder, and what is wrong with it."""

    files: dict[Place, str] = field(default_factory=dict)
    extra: list[str] = field(default_factory=list)
    differing: list[str] = field(default_factory=list)
    """Metadata that does not match the prompts, each with what it says."""

    def add(self, place: Place, file: str) -> None:
        """Note a picture; a second one of the same place is one too many."""
        if place in self.files:
            self.extra.append(f"{file} (beside {self.files[place]})")
        else:
            self.files[place] = file


def find_pictures(
    folder: Path, layout: Layout, prompts: Sequence[Prompt], copies: int | None = None
) -> list[Picture]:
    """All pictures of the prompts in a folder, in the order of prompts and copies.

    Args:
        folder: Drawn by whomever.
        layout: How the pictures lie in it.
        prompts: P.
        copies: Pictures of each prompt. Absent means the benchmark's own number; in the plain
            layout, that of the prompt with the most.

    Raises:
        ValueError: Pictures are missing, too many or unreadable, or metadata does not match the
            prompts. All faults are listed.
    """
    check_choice("layout", layout, Layout)
    check_positive(copies=copies)
    if not folder.is_dir():
        raise ValueError(f"expected a folder of pictures at {folder}, got none; correct the path")
    match layout:
        case "plain":
            found = _find_plain(folder, prompts)
            copies = copies or 1 + max((copy for _, copy in found.files), default=0)
            wanted = name_pictures(layout, prompts, copies)
        case "geneval":
            found = _find_geneval(folder, prompts)
            wanted = name_pictures(layout, prompts, copies or OFFICIAL_COPIES[layout])
        case "t2i_compbench":
            wanted = name_pictures(layout, prompts, copies or OFFICIAL_COPIES[layout])
            found = _find_by_text(folder, wanted)
    places = {(row, copy): name for row, of in enumerate(wanted) for copy, name in enumerate(of)}
    faults = {
        "missing": [name for place, name in places.items() if place not in found.files],
        "extra": [*found.extra, *(f for place, f in found.files.items() if place not in places)],
        "not as the prompts have it": found.differing,
        "unreadable": list(_unreadable(folder, [f for _, f in sorted(found.files.items())])),
    }
    _check_faults(folder, layout, len(places), faults)
    return [Picture(found.files[row, copy], prompts[row], copy) for row, copy in places]


def _check_faults(folder: Path, layout: Layout, number: int, faults: dict[str, list[str]]) -> None:
    if any(faults.values()):
        counts = ", ".join(f"{len(names)} {kind}" for kind, names in faults.items() if names)
        lines = [f"  {kind}: {name}" for kind, names in faults.items() for name in names]
        raise ValueError(
            f"{folder}: expected {number} pictures in the layout {layout}, got {counts}; nothing "
            "was scored: draw what is missing or unreadable, remove what is extra, or name the "
            "prompts, the layout and the copies that the folder was drawn with\n" + "\n".join(lines)
        )


def _pictures_in(folder: Path) -> Iterator[str]:
    """Paths of all picture files in a folder, in order, but hidden ones and candidates."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith(".") for part in parts)
        if path.suffix.lower() in SUFFIXES and not hidden and parts[0] != CANDIDATES:
            yield "/".join(parts)


def _find_plain(folder: Path, prompts: Sequence[Prompt]) -> _Found:
    path = folder / MANIFEST
    if not path.is_file():
        raise ValueError(
            f"expected {path} with a row for each picture, got no file; write one object per line, "
            'like {"file": "0.png", "prompt": "a red cube"}, or name another layout'
        )
    found = _Found()
    numbers = {prompt.text: row for row, prompt in reversed(list(enumerate(prompts)))}
    copies: Counter[Any] = Counter()  # rows so far, by prompt
    rows, named = read_rows(path), set[str]()
    for line, row in enumerate(rows, 1):
        index = row.get("index", numbers.get(str(row.get("prompt"))))
        copy = row.get("copy", copies[index])
        copies[index] += 1
        match {**row, "index": index, "copy": copy}:
            case {"file": str(file), "index": int(place), "copy": int(number), "prompt": text} if (
                0 <= place < len(prompts) and number >= 0 and prompts[place].text == text
            ) and file not in named:
                named.add(file)
                if (folder / file).is_file():
                    found.add((place, number), file)
            case _:
                found.differing.append(f"{MANIFEST}:{line}: {row}")
    told = {row.get("file") for row in rows}
    found.extra += [file for file in _pictures_in(folder) if file not in told]
    return found


def _find_geneval(folder: Path, prompts: Sequence[Prompt]) -> _Found:
    found = _Found()
    for file in _pictures_in(folder):
        drawn = re.fullmatch(r"(\d+)/samples/(\d+)\.png", file)
        if drawn:
            found.add((int(drawn[1]), int(drawn[2])), file)
        elif not re.fullmatch(r"\d+/grid\.png", file):
            found.extra.append(file)
    folders = {int(file.split("/")[0]): file.split("/")[0] for file in found.files.values()}
    for row, name in sorted(folders.items()):
        if row < len(prompts):
            said = _differing_metadata(folder / name / "metadata.jsonl", prompts[row])
            found.differing += [f"{name}/metadata.jsonl: {said}"] if said else []
    return found


def _differing_metadata(path: Path, prompt: Prompt) -> str | None:
    """What a metadata.jsonl says that the prompt does not, or None where they agree."""
    if not path.is_file():
        return "no file"
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        return str(error)
    if not isinstance(found, dict):
        return repr(found)
    wanted = {"prompt": prompt.text, "tag": prompt.category, **_clauses(prompt.facts)}
    has = {"prompt": found.get("prompt"), "tag": found.get("tag"), **_clauses(found)}
    differing = [name for name in wanted if wanted[name] != has[name]]
    return "; ".join(f"{n} {has[n]!r} instead of {wanted[n]!r}" for n in differing) or None


def _clauses(metadata: dict[str, Any]) -> dict[str, Any]:
    return {name: metadata.get(name) or [] for name in ("include", "exclude")}


def _find_by_text(folder: Path, wanted: Sequence[Sequence[str]]) -> _Found:
    places = {name: (row, copy) for row, of in enumerate(wanted) for copy, name in enumerate(of)}
    found = _Found()
    for file in _pictures_in(folder):
        if file in places:
            found.add(places[file], file)
        elif file.split("/")[-2:-1] == ["samples"]:  # official tools write pictures elsewhere
            found.extra.append(file)
    return found


def _unreadable(folder: Path, files: Iterable[str]) -> Iterator[str]:
    """Those that cannot be decoded to their last row, each with the reason."""
    for file in files:
        try:
            read_picture(folder / file)
        except ValueError as error:
            yield f"{file} ({error})"


def read_picture(path: Path) -> Tensor:
    """A picture file as [3, H, W] float32 in [0, 1].

    Raises:
        ValueError: It is not whole.
    """
    try:
        with Image.open(path) as picture:
            picture.verify()  # decoding alone does not miss the end of a PNG behind its last row
        with Image.open(path) as picture:
            pixels = np.array(picture.convert("RGB"))
    # What Pillow raises for broken files, by format.
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise ValueError(str(error) or type(error).__name__) from error
    return torch.from_numpy(pixels).permute(2, 0, 1).float() / 255
