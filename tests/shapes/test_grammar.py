import json
import random
import re
from collections import Counter
from pathlib import Path

import pytest

import cotgen_pl.shapes
from cotgen_pl.shapes.grammar import (
    GENEVAL_TAGS,
    IN_DOMAIN_CATEGORIES,
    MAX_OBJECTS,
    draw_prompt,
    has_b_word,
    has_held_out_pair,
    held_out_pairs,
    suites,
    write_suites,
)
from cotgen_pl.shapes.render import COLORS, SHAPES, TEXTURES

SIZES = {  # prompts per category
    "train": 256,
    "id_validation": 32,
    "id_development": 16,
    "id_probe": 16,
    "ood_geneval": 32,
    "shift_wording": 16,
    "shift_pairs": 16,
    "shift_words": 16,
}
GENEVAL_SUITES = ("ood_geneval", "shift_wording")
B_WORD = re.compile(r"\b(cross|crosses|diamond|diamonds|purple|orange)\b")


@pytest.fixture(scope="module")
def prompts():
    return suites()


def test_each_suite_has_its_count_per_category(prompts):
    assert set(prompts) == set(SIZES)
    for suite, size in SIZES.items():
        categories = GENEVAL_TAGS if suite in GENEVAL_SUITES else IN_DOMAIN_CATEGORIES
        assert Counter(p.category for p in prompts[suite]) == dict.fromkeys(categories, size)
        assert {p.suite for p in prompts[suite]} == {suite}


def test_training_and_evaluation_texts_are_disjoint(prompts):
    names = [name for name in SIZES if name != "id_probe"]
    texts = {name: {p.text for p in prompts[name]} for name in names}
    for i, name in enumerate(names):
        for other in names[i + 1 :]:
            assert not texts[name] & texts[other], (name, other)
    train = {p.text for p in prompts["train"]}
    assert {p.text for p in prompts["id_probe"]} < train


def test_only_small_categories_repeat_prompts(prompts):
    repeated = {
        (suite, category)
        for suite, found in prompts.items()
        for category in {p.category for p in found}
        if len({p.text for p in found if p.category == category}) < SIZES[suite]
    }
    assert repeated == {
        ("ood_geneval", "single_object"),
        ("ood_geneval", "counting"),
        ("shift_wording", "single_object"),
    }


@pytest.mark.parametrize("suite", ["train", "id_validation", "id_development", "shift_wording"])
def test_suites_of_set_a_know_no_b_word_and_no_held_out_pair(prompts, suite):
    for prompt in prompts[suite]:
        assert not has_b_word(prompt) and not B_WORD.search(prompt.text)
        assert not has_held_out_pair(prompt)


def test_out_of_domain_suites_shift_what_they_say(prompts):
    for prompt in prompts["ood_geneval"]:
        assert B_WORD.search(prompt.text) or has_held_out_pair(prompt)
    assert any(has_held_out_pair(p) and not has_b_word(p) for p in prompts["ood_geneval"])
    for prompt in prompts["shift_pairs"]:
        assert has_held_out_pair(prompt) and not B_WORD.search(prompt.text)
    for prompt in prompts["shift_words"]:
        assert B_WORD.search(prompt.text) and not has_held_out_pair(prompt)
    for suite, found in prompts.items():
        assert all(p.text.startswith("a photo of ") == (suite in GENEVAL_SUITES) for p in found)


def test_a_quarter_of_the_pairs_is_held_out_and_the_choice_is_fixed():
    pairs = held_out_pairs()
    assert len(pairs) == 16  # of 66
    assert all(len(pair) == 2 for pair in pairs)
    assert frozenset({("red", "circle"), ("green", "triangle")}) in pairs
    uses = Counter(kind for pair in pairs for kind in pair)
    assert len(uses) == 12 and min(uses.values()) >= 2 and max(uses.values()) <= 4


def test_shipped_files_are_what_the_grammar_writes(tmp_path):
    shipped = Path(cotgen_pl.shapes.__file__).parent / "assets" / "prompts"
    paths = write_suites(tmp_path)
    assert len(paths) == 8
    for path in paths:
        assert (shipped / path.name).read_bytes() == path.read_bytes(), path.name
    row = json.loads((tmp_path / "ood_geneval.jsonl").read_text().splitlines()[0])
    assert set(row) == {"prompt", "category", "include", "exclude"}


@pytest.mark.parametrize("wording", ["in_domain", "geneval"])
def test_texts_name_exactly_their_facts(wording):
    rng = random.Random(5)
    for _ in range(500):
        prompt = draw_prompt(rng, wording=wording, words="all", pairs="all")
        items = prompt.facts.get("objects") or prompt.facts["include"]
        named = Counter(re.findall("|".join(SHAPES), prompt.text))
        assert named == Counter(i.get("shape") or i["class"] for i in items)
        for key, words in (("color", COLORS), ("texture", TEXTURES)):
            told = Counter(re.findall(rf"\b({'|'.join(words)})\b", prompt.text))
            assert told == Counter(i[key] for i in items if i.get(key)), prompt.text
        assert sum(i["count"] for i in items) <= MAX_OBJECTS
        assert not re.search(r"\ban? [aeiou]", re.sub(r"\ban [aeiou]", "", prompt.text))


def test_counts_and_positions_are_written_after_geneval():
    rng = random.Random(1)
    drawn = [draw_prompt(rng, wording="geneval", words="all", pairs="all") for _ in range(500)]
    for prompt in drawn:
        include, exclude = prompt.facts["include"], prompt.facts["exclude"]
        if prompt.category == "counting":
            assert exclude == [{"class": include[0]["class"], "count": include[0]["count"] + 1}]
            number = {2: "two", 3: "three", 4: "four"}[include[0]["count"]]
            assert f"a photo of {number} " in prompt.text
        if prompt.category == "position":
            relation, target = include[1]["position"]
            before, after = prompt.text.split(f" {relation} ")
            assert target == 0
            assert before.endswith(include[1]["class"]) and after.endswith(include[0]["class"])


def test_drawing_respects_words_and_pairs():
    rng = random.Random(2)
    narrow = [draw_prompt(rng, wording="both", words="A", pairs="seen") for _ in range(400)]
    assert not any(has_b_word(p) or has_held_out_pair(p) for p in narrow)
    wide = [draw_prompt(rng, wording="both", words="all", pairs="all") for _ in range(400)]
    assert {p.category for p in wide} == {*IN_DOMAIN_CATEGORIES, *GENEVAL_TAGS}
    assert any(has_b_word(p) for p in wide) and any(has_held_out_pair(p) for p in wide)
