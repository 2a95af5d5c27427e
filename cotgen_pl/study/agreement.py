"""Whether a finished run is the one that the study's file names, by its saved configuration alone.

A saved configuration has every value; a run's config and the overrides of the study's file have
some. Each of those must be what was saved. Nothing is read through the command line here, which
would take seconds for each run; so what neither of the two says any more is not missed.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cotgen_pl.study.definition import Run, Study, read_yaml

Place = tuple[str | int, ...]
"""Where a value of a configuration stands: names, and places in lists."""

FOLDER: Place = ("trainer", "default_root_dir")  # a run may be moved


@dataclass(frozen=True)
class Saying:
    """What a run's config or one of its overrides says."""

    place: Place
    value: Any
    folder: Path
    """From which the files that the value names are looked up."""


def find_difference(study: Study, run: Run, seed: int, saved: Mapping[str, Any]) -> str | None:
    """The first value of the study that a finished run was not made with, in words.

    Args:
        study: Of the run.
        run: That the folder is of.
        seed: Of the folder.
        saved: What the folder's config.yaml, or validate.yaml, holds.
    """
    config = Path(run.config)
    if not config.is_file():
        return f"{config} is not there"
    overrides = study.overrides_of(run, seed)
    sayings = [Saying((), read_yaml(config), config.parent)]
    for number, (name, value) in enumerate(overrides.items()):
        appended = [other for other in list(overrides)[number + 1 :] if other.endswith("+")]
        sayings.append(Saying(place_of(name, saved, appended), value, Path()))
    for number, saying in enumerate(sayings):
        later = [FOLDER, *(other.place for other in sayings[number + 1 :])]
        for difference in _differences(saying, _value_at(saved, saying.place), later):
            return difference
    return None


def place_of(name: str, saved: Mapping[str, Any], appended: Sequence[str] = ()) -> Place:
    """Where an override acts; inside a list that is its last element, as on the command line.

    Args:
        name: Of the override; with a plus at the end it appends.
        saved: The configuration that all overrides have made.
        appended: Later overrides that append.

    >>> place_of("a.b.c", {"a": {"b": [{}, {"c": 1}]}})
    ('a', 'b', 1, 'c')
    """
    place: Place = ()
    words = name.removesuffix("+").split(".")
    for number, word in enumerate(words):
        place += (word,)
        value = _value_at(saved, place)
        inside = number + 1 < len(words) or name.endswith("+")
        if inside and isinstance(value, list):
            behind = appended.count(".".join(words[: number + 1]) + "+")
            place += (len(value) - 1 - behind,)
    return place


def _value_at(saved: Any, place: Place) -> Any:
    """None where there is nothing."""
    for name in place:
        if isinstance(saved, Mapping):
            saved = saved.get(name)
        elif isinstance(saved, list) and isinstance(name, int) and 0 <= name < len(saved):
            saved = saved[name]
        else:
            return None
    return saved


def _differences(saying: Saying, held: Any, later: Sequence[Place]) -> Iterator[str]:
    """In words, what is held otherwise than said; not what something later says anew."""
    place, said = saying.place, saying.value
    if any(place[: len(other)] == other for other in later):
        return
    if isinstance(said, str) and isinstance(held, Mapping):
        file = saying.folder / said  # a piece of configuration
        if file.is_file():
            yield from _differences(Saying(place, read_yaml(file), file.parent), held, later)
            return
    if isinstance(said, Mapping) and (isinstance(held, Mapping) or not said):
        for name, value in said.items():
            own = Saying((*place, name), value, saying.folder)
            yield from _differences(own, held.get(name), later)
    elif isinstance(said, list) and isinstance(held, list) and _is_as_long(saying, held, later):
        for number, value in enumerate(said):
            own = Saying((*place, number), value, saying.folder)
            yield from _differences(own, held[number], later)
    elif not _is_equal(said, held):
        name = ".".join(map(str, place))
        yield f"{name} is {_short(held)} there and {_short(said)} in the study"


def _is_as_long(saying: Saying, held: Sequence[Any], later: Sequence[Place]) -> bool:
    """Whether a list is as it was said, but for elements that were appended later."""
    more = range(len(saying.value), len(held))
    return len(held) >= len(saying.value) and all(
        any(other[: len(saying.place) + 1] == (*saying.place, n) for other in later) for n in more
    )


def _is_equal(said: Any, held: Any) -> bool:
    """Whether a value is saved as said; YAML reads 6e-4 as text, and the command line as 0.0006."""
    if isinstance(said, str) and isinstance(held, float):
        try:
            return float(said) == held
        except ValueError:
            return False
    return bool(said == held)


def _short(value: Any) -> str:
    return f"{value!r:.80}"
