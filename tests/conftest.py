"""Settings and fixtures that every test shares."""

import os
import random
from pathlib import Path

import numpy
import pytest
import torch

# Before any test imports a hub client, which reads it once; child processes inherit both.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("OMP_NUM_THREADS", "1")
# Models here are so small that a second thread costs more than it gives, and sums keep their order.
torch.set_num_threads(1)


@pytest.fixture(scope="session")
def repository() -> Path:
    """The root of the checkout."""
    return Path(__file__).resolve().parents[1]


@pytest.fixture(autouse=True)
def fixed_seeds() -> None:
    """Every test starts from the same random states, whatever ran before it.

    Lightning's seed of an earlier command line would be that of all processes started later.
    """
    os.environ.pop("PL_GLOBAL_SEED", None)
    random.seed(0)
    numpy.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def tiny_janus(tmp_path_factory) -> Path:
    """An untrained Janus in transformers' format: 2 layers, 2 x 2 tokens, 32 codes, 4 x 4 px."""
    from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus

    folder = tmp_path_factory.mktemp("tiny_janus")
    tokenizer = build_tokenizer(["a red circle left of a blue square", "two cats"], 300)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    save_janus(build_janus(tokenizer, **sizes, grid=2, vq_levels=2), tokenizer, folder)
    return folder
