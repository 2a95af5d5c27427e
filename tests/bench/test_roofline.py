"""Bytes and operations against arithmetic written out, and against published sizes."""

from types import SimpleNamespace

import pytest
import torch

from cotgen_pl.bench.roofline import (
    Load,
    Machine,
    Network,
    Work,
    cache_bytes,
    phase_works,
    rollout_work,
)
from cotgen_pl.bench.sizes import SIZES, make_config

MADE_UP = Network(parameters=1000, layers=2, width=10, cache_width=5, number_bytes=4)
LOAD = Load(
    images=3, prompts=2, prompt=4, tokens=3, guided=True, mode="conditional", recompute=False
)


def changed(**entries):
    return Load(**(vars(LOAD) | entries))


def janus_pro_1b():
    return Network(1_233_225_728 + 37_767_168, 24, 2048, 2048, 2)


def test_bytes_of_a_made_up_rollout():
    # A position: keys and values, 2 layers, 5 wide, 4 bytes. Weights: 4,000 bytes in each of the 3
    # steps. The 6 sequences hold 4, 5 and 6 positions.
    assert MADE_UP.position_bytes == 2 * 2 * 5 * 4
    assert rollout_work(MADE_UP, LOAD).moved == 3 * 4000 + 6 * 80 * (4 + 5 + 6)


def test_cache_of_a_made_up_rollout():
    assert cache_bytes(MADE_UP, LOAD) == 6 * 80 * 7
    assert cache_bytes(MADE_UP, changed(guided=False)) == 3 * 80 * 7


def test_operations_of_a_made_up_rollout():
    # Two steps of 6 sequences at 5 and 6 positions; before them, 2 prompts and an unconditional row
    # of 4 positions each.
    steps = 6 * (2 * 2 * 1000 + 4 * 2 * 10 * (5 + 6))
    read = 3 * (2 * 1000 * 4 + 2 * 2 * 10 * 4**2)
    assert rollout_work(MADE_UP, LOAD).operations == steps + read


def test_guidance_doubles_the_sequences():
    alone, guided = (rollout_work(MADE_UP, changed(guided=on)) for on in (False, True))
    weights = 3 * 4000
    assert guided.moved - weights == 2 * (alone.moved - weights)


@pytest.mark.parametrize(
    ("mode", "guided", "recompute", "update", "reference"),
    [
        ("conditional", True, False, 3, 1),
        ("conditional", True, True, 4, 1),
        ("guided", True, False, 6, 2),
        ("guided", True, True, 8, 2),
        ("guided_detached", True, False, 4, 2),
        ("guided_detached", True, True, 5, 2),
        ("guided", False, False, 3, 1),
    ],
)
def test_passes_of_update_and_reference(mode, guided, recompute, update, reference):
    forward = 3 * (2 * 1000 * 7 + 2 * 2 * 10 * 7**2)
    works = phase_works(MADE_UP, changed(mode=mode, guided=guided, recompute=recompute))
    assert works["update"] == Work(0, update * forward)
    assert works["reference"] == Work(0, reference * forward)


def test_training_operations_of_janus_pro():
    # 4.75e12 per image of 608 positions in the project's sheet of formulas.
    works = phase_works(janus_pro_1b(), changed(images=1, prompt=32, tokens=576))
    assert works["update"].operations == pytest.approx(4.75e12, rel=2e-3)


def test_decoding_bound_of_janus_pro_on_an_h200():
    # The sheet: 0.95 ms per step and 29.3 images/s at 16 images with guidance and 4.8 TB/s.
    load = changed(images=16, prompts=16, prompt=32, tokens=576)
    seconds = Machine(4.8e12, 790e12).least_seconds(rollout_work(janus_pro_1b(), load))
    assert 16 / seconds == pytest.approx(29.3, rel=5e-3)


def test_the_larger_bound_holds():
    machine = Machine(bandwidth=10.0, matrix_rate=100.0)
    assert machine.least_seconds(Work(20, 100)) == 2
    assert machine.least_seconds(Work(20, 300)) == 3
    assert [machine.binding(Work(20, count)) for count in (100, 300)] == ["bytes", "operations"]


@pytest.mark.parametrize(
    ("size", "body", "head", "everything"),
    [
        ("1b", 1_233_225_728, 37_767_168, 2_076_636_811),
        ("7b", 6_071_504_896, 83_906_560, 7_407_773_323),
    ],
)
def test_real_sizes_have_the_published_counts(size, body, head, everything):
    from transformers import JanusForConditionalGeneration

    ids = SimpleNamespace(bos_token_id=0, eos_token_id=1, pad_token_id=2)
    tokenizer = type("Tokenizer", (), {**vars(ids), "__len__": lambda self: 100})()
    tokenizer.convert_tokens_to_ids = lambda token: 3
    with torch.device("meta"):
        model = JanusForConditionalGeneration(make_config(SIZES[size], tokenizer))
    network = Network.of(model, 2)
    assert network.parameters == body + head
    assert (network.layers, network.width) == (SIZES[size].layers, SIZES[size].width)
    assert network.cache_width == network.width
    assert sum(weight.numel() for weight in model.parameters()) == everything
