"""Which version of this code runs; apart, since runs and benches both write it down."""

from __future__ import annotations

import subprocess
from pathlib import Path


def find_commit() -> str | None:
    """Of the checkout that this file lies in, with `-dirty` behind it where files differ.

    None for an installed package, or on a machine without git.
    """
    command = ["git", "describe", "--always", "--dirty", "--abbrev=12"]
    folder = Path(__file__).parent
    try:
        finished = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return finished.stdout.strip()
