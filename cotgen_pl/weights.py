"""Finding, reading and fitting the weights of scorers: tensors only, each accounted for."""

from __future__ import annotations

import pickle
import re
import struct
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")
# What torch's own unpickler and safetensors raise for files that hold something else.
DAMAGED = (
    pickle.UnpicklingError,
    SafetensorError,
    struct.error,
    RuntimeError,
    EOFError,
    LookupError,
    TypeError,
    ValueError,
    AssertionError,
)
WEIGHT_SUFFIXES = (".pt", ".pth", ".bin", ".safetensors")


def find_weights(path: str, names: Sequence[str], what: str) -> Path | None:
    """The local weights file that `path` names, or None where it names a hub repository.

    Args:
        path: A weights file, a folder that holds one, or a repository, "owner/name".
        names: File names that a folder is searched for, the first found counts.
        what: Whose weights, for messages.

    Raises:
        ValueError: It is none of the three.
    """
    place = Path(path).expanduser()
    if place.is_file():
        return place
    if place.is_dir():
        found = [place / name for name in names if (place / name).is_file()]
        if found:
            return found[0]
        raise ValueError(
            f"{what} weights: expected {' or '.join(names)} in the folder {path}, got none of "
            "them; name the weights file itself or put it there"
        )
    if HUB_ID.fullmatch(path) and place.suffix not in WEIGHT_SUFFIXES:
        return None
    raise ValueError(
        f"{what} weights: expected a file, a folder or a hub repository (owner/name), got {path}, "
        "which does not exist; correct the path, or get the file first by the command at the head "
        "of its piece in configs/rewards"
    )


def download_weights(repository: str, file: str, what: str, *beside: str) -> Path:
    """Fetch a file from the Hugging Face hub or the local cache.

    Args:
        repository: "owner/name".
        file: The weights.
        what: Whose weights, for messages.
        *beside: Further files of the repository, which come to lie in the same folder.
    """
    from huggingface_hub import hf_hub_download

    try:
        return [Path(hf_hub_download(repository, name)) for name in (*beside, file)][-1]
    except OSError as error:  # offline, not cached, no such repository or file: all are OSErrors
        raise ValueError(
            f"{what} weights: expected a local path or {file} of the hub repository {repository}, "
            f"got neither ({type(error).__name__}); where there is a network run `hf download "
            f"{' '.join([repository, file, *beside])}`, then set path to what it prints"
        ) from error


def read_tensors(file: Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors or PyTorch file, on the CPU. No other object is ever unpickled.

    Args:
        file: Names to tensors, or those under "state_dict" or "model".
    """
    content: Any
    try:
        if file.suffix == ".safetensors":
            content = load_file(file)
        else:
            content = torch.load(file, map_location="cpu", weights_only=True)
    except DAMAGED as error:
        raise ValueError(
            f"{file}: expected a checkpoint that holds tensors only, got one that is damaged "
            "or would run code when opened; download it again, or convert one that you trust to "
            ".safetensors"
        ) from error
    for key in ("state_dict", "model"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if isinstance(content, dict) and all(isinstance(v, Tensor) for v in content.values()):
        return content
    raise ValueError(
        f"{file}: expected tensors by name, or those under 'state_dict' or 'model', got other "
        "contents; name the model's own weights file"
    )


def load_strictly(model: nn.Module, weights: Mapping[str, Tensor], refusal: str) -> None:
    """Put weights into a model, all of them and no others.

    Args:
        model: Of the architecture that the weights are for.
        weights: By name.
        refusal: A message with `{misfits}` in it, for weights that do not fit.
    """
    misfits = describe_misfits(model.state_dict(), weights)
    if misfits:
        raise ValueError(refusal.format(misfits=misfits))
    model.load_state_dict(dict(weights))


def describe_misfits(expected: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """What does not fit, in a line, with the first name of each kind; empty if everything does."""
    common = [name for name in expected if name in weights]
    misfits = {
        "missing": [name for name in expected if name not in weights],
        "unknown": [name for name in weights if name not in expected],
        "of another shape": [n for n in common if expected[n].shape != weights[n].shape],
    }
    return ", ".join(f"{len(v)} {kind} (first: {v[0]})" for kind, v in misfits.items() if v)
