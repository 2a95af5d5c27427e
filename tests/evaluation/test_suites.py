"""Suites of held-out prompts: samples of them, and settings that cannot be."""

import pytest

from cotgen_pl.evaluation.suites import Suite, sample_prompts
from cotgen_pl.interfaces import Prompt


def numbered(counts: dict[str, int]) -> list[Prompt]:
    rows = [category for category, number in counts.items() for _ in range(number)]
    return [Prompt(f"{c} {i}", category=c, index=i) for i, c in enumerate(rows)]


def test_a_sample_is_balanced_and_from_all_parts_of_each_category():
    prompts = numbered({"color": 10, "few": 2, "count": 7, "": 4})
    sample = sample_prompts(prompts, 3)
    assert [prompt.index for prompt in sample] == [0, 3, 6, 10, 11, 12, 14, 16, 19, 20, 21]
    assert sample_prompts(prompts, None) == prompts
    assert sample_prompts(prompts, 10) == prompts


def test_a_sample_of_mixed_categories_keeps_order_and_numbers():
    prompts = [Prompt(str(i), category="ab"[i % 2], index=i) for i in range(8)]
    assert [prompt.index for prompt in sample_prompts(prompts, 2)] == [0, 1, 4, 5]


@pytest.mark.parametrize("name", ["images_per_prompt", "final_images_per_prompt"])
def test_a_suite_s_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        Suite("near", "id", [], **{name: 0})


@pytest.mark.parametrize("name", ["", "a/b"])
def test_suites_names_make_metrics_and_files(name):
    with pytest.raises(ValueError, match="expected a suite's name without '/'"):
        Suite(name, "id", [])
