"""Held-out prompts in training: which count as equal, which as nearly equal, and how fast."""

import os
import random
import time
from collections import Counter
from itertools import product
from pathlib import Path

import pytest

from cotgen_pl.data.formats import PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt
from cotgen_pl.leaks import find_leaks, find_near_leaks, leave_out
from cotgen_pl.rules.words import plain_text, plain_words

LETTERS = "abcdefghijklmnop"


def prompts_of(*texts: str) -> list[Prompt]:
    return [Prompt(text) for text in texts]


def kind_of(train: str, held_out: str) -> str | None:
    """What a pair counts as, the same both ways round."""
    kinds = []
    for one, other in ((train, held_out), (held_out, train)):
        equal = find_leaks(prompts_of(one), prompts_of(other))
        near = [leak.kind for leak in find_near_leaks(prompts_of(one), prompts_of(other))]
        kinds.append("equal" if equal else near[0] if near else None)
        assert not (equal and near)
    assert kinds[0] == kinds[1]
    return kinds[0]


# Equal ------------------------------------------------------------------------------------------


def test_case_spaces_and_punctuation_make_no_difference():
    train = prompts_of("A red  cube.", "a red cube", "a blue cube")
    held_out = prompts_of("a cube", "a 'Red' cube !", "a bluecube")
    assert find_leaks(train, held_out) == [(train[0], held_out[1])]


@pytest.mark.parametrize(
    ("one", "other", "same"),
    [
        ("a T-shirt, red", "a t shirt red", True),
        ("a café", "a café", True),  # composed and decomposed
        ("a café", "a cafe", False),
        ("cube ①", "cube 1", True),  # NFKC
        ("draw 🐱", "draw 🐶", False),
        ("?", "!", False),
        ("a_b", "a b", True),
        ("", "  ", True),
    ],
)
def test_plain_text_keeps_what_is_no_punctuation(one, other, same):
    assert (plain_text(one) == plain_text(other)) is same


def test_articles_alone_are_words():
    assert plain_words("A the") == ("a", "the")


# Nearly equal -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("one", "other", "kind"),
    [
        ("a red cube", "A red cube.", "equal"),
        ("a red cube", "the red cube", "same words"),
        ("two dogs and a cat", "a cat and two dogs", "same words"),
        ("a red glove and boxes", "red gloves and a box", "same words"),
        ("a photo of a berry", "a photo of berries", "same words"),
        ("a metal bench", "a metall bench", "one letter"),
        ("a metal bench", "a mattl bench", None),  # two letters of one word
        ("a metal bench", "a petal bench", "one letter"),
        ("a metal bench", "bench of petal", None),
        ("a metal bench", "a metall benchh", None),  # two words
        ("a cat", "a car", None),  # too short
        ("three dogs", "three dots", "one letter"),
        ("a big metal bench", "a metal bench", None),
        ("a red cube", "a red red cube", None),  # words are counted
        ("metal", "petal", "one letter"),
    ],
)
def test_what_is_nearly_equal(one, other, kind):
    assert kind_of(one, other) == kind


def test_each_held_out_prompt_comes_once_with_its_first_likeness():
    train = prompts_of("a cat and a dog", "a metal bench", "The dog and cat", "a metal bench!")
    held_out = prompts_of("metall bench", "a dog and a cat", "a dog and a cat.", "a metal bench")
    found = find_near_leaks(train, held_out)
    assert [(leak.train, leak.held_out) for leak in found] == [
        (train[1], held_out[0]),
        (train[0], held_out[1]),
    ]


def test_one_letter_is_what_comparing_all_pairs_finds():
    rng = random.Random(0)
    words = ["".join(letters) for length in (4, 5) for letters in product("bc", repeat=length)]
    train, held_out = (
        [Prompt(" ".join(rng.choices(words, k=2))) for _ in range(60)] for _ in range(2)
    )
    found = {leak.held_out.text: leak.kind for leak in find_near_leaks(train, held_out)}
    same = {tuple(sorted(prompt.text.split())) for prompt in train}
    expected = {
        prompt.text
        for prompt in held_out
        if tuple(sorted(prompt.text.split())) not in same
        and any(differ_by_a_letter(prompt.text, other.text) for other in train)
    }
    assert 5 < len(expected) < 50
    assert {text for text, kind in found.items() if kind == "one letter"} == expected


def differ_by_a_letter(one: str, other: str) -> bool:
    """By edit distance, word by word."""
    distances = [distance(*pair) for pair in zip(one.split(), other.split(), strict=True)]
    return sorted(distances) == [0, 1]


def distance(one: str, other: str) -> int:
    """Levenshtein's, by its definition."""
    if not one or not other:
        return len(one) + len(other)
    if one[0] == other[0]:
        return distance(one[1:], other[1:])
    return 1 + min(distance(one[1:], other), distance(one, other[1:]), distance(one[1:], other[1:]))


def test_many_prompts_of_one_template_are_compared_in_seconds():
    rng = random.Random(0)

    def draw(number: int) -> list[Prompt]:
        words = ("".join(rng.choices(LETTERS, k=6)) for _ in range(number))
        return [Prompt(f"a photo of a {word} on the left of a dog") for word in words]

    train, held_out = draw(10_000), draw(5_000)  # 50 million pairs
    started = time.process_time()
    find_leaks(train, held_out)
    find_near_leaks(train, held_out)
    assert time.process_time() - started < 15  # 1.5 s on a free core


# Leaving out ------------------------------------------------------------------------------------


def test_what_leaks_is_left_out_with_its_weight():
    prompts = prompts_of("a", "b", "c")
    kept, weights = leave_out(prompts, [1.0, 2.0, 0.5], lambda prompt: prompt.text == "b")
    assert (kept, weights) == ([prompts[0], prompts[2]], [1.0, 0.5])


def test_nothing_left_to_train_on_is_refused():
    prompts = prompts_of("a", "b")
    with pytest.raises(ValueError, match=r"at least 1 prompts .*, got 0 of 2; train on"):
        leave_out(prompts, [1.0, 1.0], lambda prompt: True)
    with pytest.raises(ValueError, match=r"at least 2 prompts .*, got 1 of 2"):
        leave_out(prompts, [1.0, 1.0], lambda prompt: prompt.text == "a", fewest=2)
    assert leave_out([], [], lambda prompt: True, fewest=0) == ([], [])


# Files ------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def official(repository) -> Path:
    folder = Path(os.environ.get("COTGEN_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no official prompt files at {folder}; set COTGEN_DATA to their folder")
    return folder


def compbench(folder: Path, category: str, split: str) -> list[Prompt]:
    path = folder / "t2i_compbench" / f"{category}_{split}.txt"
    return read_prompts(PromptFile(str(path), "t2i_compbench"))


CATEGORIES = ("color", "shape", "texture", "spatial", "non_spatial", "complex", "numeracy")
COUNTS = {"shape": 4, "spatial": 2}


def test_leaks_of_the_official_files(official):
    for category in CATEGORIES:
        train, held_out = (compbench(official, category, split) for split in ("train", "val"))
        assert len(find_leaks(train, held_out)) == COUNTS.get(category, 0), category


def test_leaks_of_t2i_r1(official):
    path = official / "t2i_r1" / "geneval_and_t2i_data_final.json"
    train = read_prompts(PromptFile(str(path), "t2i_r1"))
    held_out = [p for category in CATEGORIES for p in compbench(official, category, "val")]
    leaks = find_leaks(train, held_out)
    assert Counter(prompt.category for _, prompt in leaks) == COUNTS
    near = Counter(leak.kind for leak in find_near_leaks(train, held_out))
    assert near["one letter"] == 2 and near["same words"] > 10
    geneval = official / "geneval" / "evaluation_metadata.jsonl"
    assert find_leaks(train, read_prompts(PromptFile(str(geneval), "geneval"))) == []


def test_the_shapes_world_has_no_leaks_but_its_probe(repository):
    folder = repository / "cotgen_pl/shapes/assets/prompts"
    sets = {p.stem: read_prompts(PromptFile(str(p), "jsonl")) for p in folder.glob("*.jsonl")}
    train = sets.pop("train")
    leaks = {name: len(find_leaks(train, held_out)) for name, held_out in sets.items()}
    assert len(leaks) == 7
    assert {name: number for name, number in leaks.items() if number} == {"id_probe": 96}
