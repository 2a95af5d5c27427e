"""CompBenchReward on phrases: they become questions, and answers become scores."""

import pytest
import torch

from cotgen_pl.conversion.blip import convert_blip_vqa
from cotgen_pl.data.formats import PromptFile, read_prompts
from cotgen_pl.data.prompts import check_scorable
from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.compbench import CompBenchReward, multiply_answers
from tests.conversion.original_blip import (
    ENCODE,
    PIECES,
    PlainBlip,
    write_blip_vqa,
    write_tokenizer,
)

BY_PHRASES = {"categories": ["color", "shape", "texture"], "phrases": "attr_nouns"}
NAMES = ["compbench", "color[attr_nouns]", "shape[attr_nouns]", "texture[attr_nouns]"]
PHRASES = [["red cat"], ["blue dog", "big red box"], ["moon", "red cat", "two big cat", "box"]]


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    folder = tmp_path_factory.mktemp("original")
    return folder, write_blip_vqa(folder, size=32)


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("converted")
    convert_blip_vqa(original[0], folder, write_tokenizer(folder / "bert"))
    return folder


@pytest.fixture(scope="module")
def reward(converted):
    return CompBenchReward(str(converted), **BY_PHRASES).load()


@pytest.fixture
def images():
    pictures = torch.rand(3, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    return (pictures * 255).round() / 255


@pytest.fixture
def prompts():
    return [ask(*phrases) for phrases in PHRASES]


def ask(*phrases, category="color"):
    return Prompt(" and ".join(phrases), category=category, facts={"attr_nouns": list(phrases)})


class Answers(torch.nn.Module):
    """Stands in for the network: answers by question, and notes what it is asked."""

    def __init__(self, answers):
        super().__init__()
        self.answers, self.asked = answers, []

    def forward(self, images, pictures, questions):
        self.asked.append((list(pictures), list(questions)))
        return torch.tensor([self.answers[question] for question in questions])


def with_answers(converted, answers, **options):
    reward = CompBenchReward(str(converted), **BY_PHRASES | options)
    reward._held.append(torch.nn.ModuleDict({"blip": Answers(answers)}))
    return reward


def asked_of(reward):
    return reward.network["blip"].asked


def test_score_is_the_product_of_plain_torchs_answers(reward, original, images, prompts):
    mean = torch.tensor([0.48145466, 0.4578275, 0.40821073]).double().view(3, 1, 1)
    std = torch.tensor([0.26862954, 0.26130258, 0.27577711]).double().view(3, 1, 1)
    plain, scores = PlainBlip(original[1]), reward.score(images, prompts)
    for i, phrases in enumerate(PHRASES):
        told = [entry["yes"] for entry in scores.details[i]["phrases"]]
        for phrase, yes in zip(phrases, told, strict=True):
            ids = torch.tensor([[ENCODE, *(PIECES[w] for w in [*phrase.split(), "?"]), 102]])
            pixels = ((images[i].double() - mean) / std)[None]
            expected = plain.yes_probability(pixels, ids, torch.ones_like(ids)).item()
            assert yes == pytest.approx(expected, abs=0.5e-4 + 1e-5)  # rounded to 4 decimals
        assert scores.total[i].item() == pytest.approx(torch.tensor(told).prod().item(), abs=1e-4)
    assert scores.total.dtype == torch.float32 and list(scores.parts) == NAMES
    assert scores.total.std() > 0.01


def test_the_product_is_rounded_like_its_factors(converted, images):
    answers = {"a?": 0.98765, "b?": 0.12344, "c?": 0.0004, "d?": 0.99995, "e?": 0.00004}
    reward = with_answers(converted, answers)
    scores = reward.score(images, [ask("a", "b"), ask("c", "b"), ask("d", "e")]).total.tolist()
    # 0.9876 or 0.9877 (0.98765 lies below the half in float32) x 0.1234; 0.0004 x 0.1234; 1 x 0
    assert scores == pytest.approx([0.1219, 0.0, 0.0], abs=1e-8)


@pytest.mark.parametrize(
    ("answers", "product"),
    [
        ([0.5], 0.5),
        ([0.12345678], 0.1235),
        ([0.5, 0.333333], 0.1666),  # 0.5 x 0.3333 = 0.16665, in float32 just below
        ([0.99996] * 8, 1.0),
        ([0.01, 0.004], 0.0),
        ([0.9] * 8, 0.4305),
    ],
)
def test_answers_are_multiplied(answers, product):
    assert multiply_answers(answers) == product


def test_a_missing_answer_is_no_verdict(converted, images):
    reward = with_answers(converted, {"a?": float("nan"), "b?": 0.5})
    scores = reward.score(images, [ask("a", "b"), ask("b"), ask("b", "b")])
    assert scores.total.isnan().tolist() == [True, False, False]
    assert scores.total[1:].tolist() == [0.5, 0.25]


def test_each_phrase_is_asked_about_its_own_picture(converted, images):
    reward = with_answers(converted, {f"{word}?": 0.1 * i for i, word in enumerate("abcd", 1)})
    scores = reward.score(images, [ask("a", "b"), ask("c"), ask("d", "a", "b")])
    asked = ([0, 0, 1, 2, 2, 2], ["a?", "b?", "c?", "d?", "a?", "b?"])
    assert asked_of(reward) == [asked]
    assert scores.details[1] == {"phrases": [{"phrase": "c", "yes": 0.3}]}
    torch.testing.assert_close(scores.total, torch.tensor([0.02, 0.3, 0.008]))
    swapped = reward.score(images, [ask("d", "a", "b"), ask("c"), ask("a", "b")])
    torch.testing.assert_close(swapped.total, scores.total.flip(0), atol=0, rtol=0)


def test_only_eight_phrases_are_asked_about(converted, images):
    words = "abcdefghij"
    reward = with_answers(converted, {f"{word}?": 0.9 for word in words})
    scores = reward.score(images[:1], [ask(*words)])
    assert asked_of(reward)[0][1] == [f"{word}?" for word in words[:8]]
    assert scores.total.item() == pytest.approx(0.4305)


def test_picture_and_phrase_both_count(reward, images):
    prompt, other = ask("red cat"), ask("big blue box")
    first, second, third = (
        reward.score(image[None], [asked]).total.item()
        for image, asked in ((images[0], prompt), (1 - images[0], prompt), (images[0], other))
    )
    assert abs(first - second) > 1e-3 and abs(first - third) > 1e-3


def test_batches_do_not_change_scores(converted, images, prompts):
    whole = CompBenchReward(str(converted), **BY_PHRASES).load().score(images, prompts)
    single = CompBenchReward(str(converted), batch_size=1, **BY_PHRASES).load()
    pieces = single.score(images, prompts)
    step = 1e-4 + 1e-6  # answers are equal within 1e-5, which may tip one rounding
    torch.testing.assert_close(pieces.total, whole.total, atol=step, rtol=0)
    assert [len(entry["phrases"]) for entry in pieces.details] == [1, 2, 4]


def test_phrases_may_be_another_fact(converted, images):
    reward = with_answers(converted, {"red cat?": 0.25}, phrases="phrases", name="blip_vqa")
    prompt = Prompt("a red cat", category="shape", facts={"phrases": ["red cat"]})
    scores = reward.score(images[:1], [prompt])
    assert scores.parts["blip_vqa"].tolist() == scores.parts["shape[phrases]"].tolist() == [0.25]
    assert scores.parts["color[phrases]"].isnan().all()
    assert scores.weights == {name: float(name == "blip_vqa") for name in scores.parts}


@pytest.mark.parametrize("given", [None, [], "red cat", ["red cat", " "], ["red cat", 3], {}])
def test_phrases_must_be_texts(converted, images, given):
    reward = with_answers(converted, {"red cat?": 0.25})
    message = "reward compbench: expected a list of phrases, .* under 'attr_nouns', got"
    with pytest.raises(ValueError, match=message):
        reward.check_prompt(Prompt("x", category="color", facts={"attr_nouns": given}))
    with pytest.raises(ValueError, match=message):
        reward.score(images[:1], [Prompt("x", category="color", facts={"attr_nouns": given})])


@pytest.mark.parametrize("category", ["spatial", "complex", ""])
def test_other_categories_are_refused_before_the_network_is_asked(converted, images, category):
    reward = with_answers(converted, {})
    message = r"expected prompts of the categories \('color', 'shape', 'texture'\), got '.*' for"
    with pytest.raises(ValueError, match=message):
        reward.score(images[:1], [ask("red cat", category=category)])
    assert asked_of(reward) == []


def test_t2i_r1s_prompts_are_judged_and_its_others_refused(converted, tmp_path):
    file = tmp_path / "prompts.json"
    shape = '{"prompt": "a round box", "task_type": "shape", "attr_nouns": ["round box"]}\n'
    file.write_text(shape + '{"prompt": "a cat", "task_type": "spatial", "nouns": ["cat"]}\n')
    prompts = read_prompts(PromptFile(str(file), "t2i_r1"))
    reward = CompBenchReward(str(converted), **BY_PHRASES)
    check_scorable(prompts[:1], reward)
    with pytest.raises(ValueError, match=r"prompts.json:2: .* got 'spatial' for 'a cat'; leave"):
        check_scorable(prompts, reward)


def test_the_original_is_refused_with_the_command_that_converts_it(original):
    with pytest.raises(ValueError, match=r"run `python tools/convert.py blip_vqa SOURCE TARGET`"):
        CompBenchReward(str(original[0]))
