"""The formats that `tools/convert.py` and recipes name, and converting into a whole folder or none.

A plain table of import paths: what a format needs is imported when it is asked for.
"""

from __future__ import annotations

import importlib
import inspect
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

from cotgen_pl.conversion.keys import Conversion

FORMATS = {
    "image_reward": "cotgen_pl.conversion.blip.convert_image_reward",
    "blip_vqa": "cotgen_pl.conversion.blip.convert_blip_vqa",
    "llava_next": "cotgen_pl.conversion.llava_next.convert",
    "mask2former": "cotgen_pl.conversion.mask2former.convert",
    "janus": "cotgen_pl.conversion.janus.convert",
    "janus_original": "cotgen_pl.conversion.janus.convert_back",
}


def find_converter(name: str) -> Callable[..., Conversion]:
    """The function that converts from a format; takes source and target, perhaps more."""
    if name not in FORMATS:
        raise ValueError(f"expected a format among {', '.join(FORMATS)}, got {name!r}; name one")
    module, _, function = FORMATS[name].rpartition(".")
    converter: Callable[..., Conversion] = getattr(importlib.import_module(module), function)
    return converter


def convert_checkpoint(name: str, source: Path, target: Path, **arguments: Any) -> Conversion:
    """Convert a checkpoint; the target is there whole or not at all.

    Args:
        name: A key of FORMATS.
        source: The original, a file or a folder.
        target: The folder to make; must not exist, or be empty.
        **arguments: What the format takes beyond the two.

    Raises:
        ValueError: An unknown format or argument, nothing at the source, something at the target,
            or a checkpoint that the converter refuses.
    """
    converter = find_converter(name)
    _check_arguments(name, converter, arguments)
    if not source.exists():
        raise ValueError(f"expected a checkpoint at {source}, got nothing; download it first")
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise ValueError(
            f"expected {target} to be free, got something there; remove it or name another folder"
        )
    unfinished = target.with_name(f".{target.name}.part")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        done = converter(source, unfinished, **arguments)
        unfinished.replace(target)
    except OSError as error:
        raise ValueError(
            f"expected to read {source} and to write {target}, got: {error}; see to that place"
        ) from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return replace(done, target=target)


def _check_arguments(name: str, converter: Callable[..., Any], given: dict[str, Any]) -> None:
    _, _, *extra = inspect.signature(converter).parameters.values()
    required = [p.name for p in extra if p.default is p.empty and p.kind is not p.VAR_KEYWORD]
    unknown = set(given) - {parameter.name for parameter in extra}
    missing = set(required) - set(given)
    if unknown or missing:
        takes = ", ".join(f"--{p.name}" for p in extra) or "nothing more"
        raise ValueError(
            f"expected {name} to be given source, target and of {takes} at least "
            f"{required or 'nothing'}, got {sorted(given) or 'nothing'}; see "
            f"the docstring of {FORMATS[name]}"
        )
