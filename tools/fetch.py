"""Fetch what a config needs: `python tools/fetch.py RECIPE [RECIPE ...] [--to FOLDER]`.

A RECIPE is the name of a file in configs/recipes, or the path of one like them.
"""

from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from cotgen_pl.conversion.formats import convert_checkpoint
from cotgen_pl.downloads import Downloader
from cotgen_pl.fetching import Fetcher, Recipe, RecipePhrases, read_recipe
from cotgen_pl.files import write_whole
from cotgen_pl.phrases import PUBLISHED, PhraseFile, format_phrases

RECIPES = Path(__file__).resolve().parents[1] / "configs" / "recipes"
HUB = "https://huggingface.co"


def main(arguments: Sequence[str] | None = None, downloader: Downloader | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(description="Fetch and verify what configs need.")
    parser.add_argument("recipes", nargs="+", metavar="RECIPE", help=", ".join(recipe_names()))
    parser.add_argument("--to", type=Path, metavar="FOLDER", help="in place of the recipe's folder")
    given = parser.parse_args(arguments)
    failures = 0
    for name in given.recipes:
        try:
            run_recipe(read_recipe(find_recipe(name)), given.to, downloader or Downloader())
        except (ValueError, OSError) as error:
            print(f"error: {name}: {' '.join(str(error).split())}", file=sys.stderr)
            failures += 1
    return 2 if failures else 0


def recipe_names() -> list[str]:
    """The names of configs/recipes."""
    return sorted(file.stem for file in RECIPES.glob("*.yaml"))


def find_recipe(name: str) -> Path:
    """The file of a recipe, by name or by path."""
    for file in (RECIPES / f"{name}.yaml", Path(name)):
        if file.is_file():
            return file
    raise ValueError(
        f"expected a recipe among {', '.join(recipe_names())}, or the path of one, got {name}"
    )


def run_recipe(recipe: Recipe, to: Path | None, downloader: Downloader) -> None:
    """Fetch the files of a recipe and convert them, unless that has been done."""
    hub = os.environ.get("HF_ENDPOINT") or HUB
    fetcher = Fetcher(to or Path(recipe.folder), downloader, hub)
    for line in fetcher.fetch(recipe):
        print(line, flush=True)
    if recipe.phrases is not None:
        texts = [line for file in recipe.files for line in read_lines(fetcher.place(file.target))]
        make_phrases(recipe.phrases, fetcher.place(recipe.phrases.target), texts)
    step = recipe.convert
    if step is None:
        return
    target = fetcher.place(step.target)
    if target.exists():
        print(f"{target}: is there")
        return
    folders = {name: str(fetcher.place(folder)) for name, folder in step.folders.items()}
    source = fetcher.place(step.source)
    print(convert_checkpoint(step.format, source, target, **step.arguments, **folders))


def make_phrases(step: RecipePhrases, target: Path, texts: Sequence[str]) -> None:
    """Write a phrase file, unless that has been done."""
    if target.exists():
        print(f"{target}: is there; remove it to make it with another spaCy")
        return
    language, version = load_spacy(step.model)
    content = format_phrases(texts, language, version)
    write_whole(target, lambda path: path.write_text(content, encoding="utf-8"))
    made = PhraseFile(str(target))
    exact = "as published" if made.is_published else f"published scores are by {PUBLISHED}"
    print(f"{target}: phrases of {len(made)} prompts by {made.parser}; {exact}")


def read_lines(file: Path) -> list[str]:
    """The prompts of a file, one per line."""
    return [line.strip() for line in file.read_text(encoding="utf-8").splitlines() if line.strip()]


def load_spacy(model: str) -> tuple[Any, str]:
    """A model of spaCy's, and spaCy's version."""
    try:
        spacy = importlib.import_module("spacy")
        return spacy.load(model), spacy.__version__
    except (ImportError, OSError) as error:
        raise ValueError(
            f"expected spaCy with its model {model}, got: {error}; run pip install "
            f"'cotgen-pl[phrases]' and python -m spacy download {model}. The published scores are "
            f"by {PUBLISHED}, which wants an environment of its own"
        ) from error


if __name__ == "__main__":
    sys.exit(main())
