"""A small random Janus on disk, once per session."""

from pathlib import Path

import pytest

from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus

pytest.register_assert_rewrite("tests.policies.equivalence")

TEXTS = ["a photo of a red circle and a blue square", "two striped crosses above a star"]


@pytest.fixture(scope="session")
def janus_folder(tmp_path_factory) -> Path:
    """An untrained Janus of 2 layers, 3 x 3 tokens and 64 codes, in transformers' format."""
    folder = tmp_path_factory.mktemp("janus")
    tokenizer = build_tokenizer(TEXTS * 3, vocab_size=300)
    sizes = {"hidden_size": 64, "num_layers": 2, "num_heads": 2, "codebook_size": 64}
    model = build_janus(tokenizer, **sizes, grid=3, vq_levels=3, max_positions=96)
    save_janus(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="session")
def shipped_folder(repository) -> Path:
    """The trained small Janus that the package ships."""
    folder = repository / "cotgen_pl/shapes/assets/janus"
    if not folder.is_dir():
        pytest.skip(f"no shipped checkpoint yet at {folder}; run tools/build_shapes.py")
    return folder
