"""Convert an original checkpoint: `python tools/convert.py FORMAT SOURCE TARGET`."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from cotgen_pl.conversion.formats import FORMATS, convert_checkpoint

OPTIONS = ("template", "tokenizer", "original")


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; gives the exit code."""
    parser = argparse.ArgumentParser(
        description="Convert an original checkpoint to a folder that transformers loads."
    )
    parser.add_argument("format", choices=FORMATS, help="what the original is")
    parser.add_argument("source", type=Path, help="the original, a file or a folder")
    parser.add_argument("target", type=Path, help="the folder to make")
    parser.add_argument(
        "--template",
        choices=("janus", "janus_pro"),
        help="janus: the form of prompts that the weights were trained with",
    )
    parser.add_argument("--tokenizer", help="image_reward, blip_vqa: BERT's, a folder or hub id")
    parser.add_argument(
        "--original", type=Path, help="janus_original: the checkpoint that SOURCE descends from"
    )
    given = parser.parse_args(arguments)
    options = {name: getattr(given, name) for name in OPTIONS if getattr(given, name) is not None}
    try:
        done = convert_checkpoint(given.format, given.source, given.target, **options)
    except ValueError as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(done)
    return 0


if __name__ == "__main__":
    sys.exit(main())
