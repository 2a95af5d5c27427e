"""UnifiedReward: its questions word by word, its parser, and small random models of each family."""

import functools
import hashlib
import math

import pytest
import torch
from transformers import (
    AddedToken,
    AutoModelForImageTextToText,
    AutoProcessor,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2_5_VLProcessor,
    Qwen2VLImageProcessor,
    Qwen2VLVideoProcessor,
    Qwen3VLConfig,
    Qwen3VLForConditionalGeneration,
    Qwen3VLProcessor,
    Qwen3VLVideoProcessor,
)

from cotgen_pl.interfaces import Prompt
from cotgen_pl.pixels import to_pillow
from cotgen_pl.rewards.unified_reward import (
    UnifiedReward,
    read_mark,
    read_mark_as_reference,
)
from tests.conversion.test_llava_next import VOCABULARY, build_tokenizer, write_converted

TEXTS = ["a red cat", "two blue dogs on the moon, in the rain", "a {braced} é cat"]
CRITERIA = (
    "You are given a text caption and a generated image based on that caption. Your task is to "
    "evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess how "
    "well this image aligns with the provided caption. Consider the accuracy of depicted objects, "
    "their relationships, and attributes as described in the caption.\n2. Overall Image Quality: "
    "Examine the visual quality of this image, including clarity, detail preservation, color "
    "accuracy, and overall aesthetic appeal.\n"
)
SCORE_ONLY = CRITERIA + (
    "Based on the above criteria, assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
ELEMENTS = CRITERIA + (
    "Extract key elements from the provided text caption, evaluate their presence in the generated "
    "image using the format: 'element (type): value' (where value=0 means not generated, and "
    "value=1 means generated), and assign a score from 1 to 5 after 'Final Score:'.\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
ANALYSE = (
    "You are presented with a generated image and its associated text caption. Your task is to "
    "analyze the image across multiple dimensions in relation to the caption. Specifically:\n"
)
RATED = (
    "- Alignment Score: How well the image matches the caption in terms of content.\n"
    "- Coherence Score: How logically consistent the image is (absence of visual glitches, object "
    "distortions, etc.).\n"
    "- Style Score: How aesthetically appealing the image looks, regardless of caption accuracy."
    "\n\nOutput your evaluation using the format below:\n\n"
)
STATED = (
    "Alignment Score (1-5): X\nCoherence Score (1-5): Y\nStyle Score (1-5): Z\n\n"
    "Your task is provided as follows:\nText Caption: [{prompt}]"
)
OVERALL = (
    "rovide overall assessments for the image along the following axes (each rated from 1 to 5):"
)
AXES = f"{ANALYSE}P{OVERALL}\n{RATED}{STATED}"
WORD_WISE_AXES = (
    f"{ANALYSE}\n1. Evaluate each word in the caption based on how well it is visually represented "
    "in the image. Assign a numerical score to each word using the format:\n"
    '   Word-wise Scores: [["word1", score1], ["word2", score2], ..., ["wordN", scoreN], '
    '["[No_mistakes]", scoreM]]\n'
    "   - A higher score indicates that the word is less well represented in the image.\n"
    "   - The special token [No_mistakes] represents whether all elements in the caption were "
    "correctly depicted. A high score suggests no mistakes; a low score suggests missing or "
    f"incorrect elements.\n\n2. P{OVERALL}\n{RATED}---\n\n"
    'Word-wise Scores: [["word1", score1], ..., ["[No_mistakes]", scoreM]]\n\n' + STATED
)
QUESTIONS = {
    "score_only": SCORE_ONLY,
    "elements": ELEMENTS,
    "axes": AXES,
    "word_wise_axes": WORD_WISE_AXES,
}
DIGESTS = {  # of the questions as published, so that an edit of both copies shows too
    "score_only": "bb5823f33a1fda4c",
    "elements": "f56f919ce3bc6aab",
    "axes": "75d52d3ae771f89b",
    "word_wise_axes": "88d1d1c5f0fba9dc",
}
QWEN_TEMPLATE = (
    "{%- for message in messages -%}"
    "{%- if loop.first and message.role != 'system' -%}"
    "{{ '<|im_start|>system\\nYou are a helpful assistant.<|im_end|>\\n' }}{%- endif -%}"
    "{{ '<|im_start|>' + message.role + '\\n' }}"
    "{%- for part in message.content -%}{%- if part.type == 'image' -%}"
    "{{ '<|vision_start|><|image_pad|><|vision_end|>' }}{%- else -%}{{ part.text }}{%- endif -%}"
    "{%- endfor -%}{{ '<|im_end|>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\\n' }}{%- endif -%}"
)  # as Qwen2.5-VL's own renders one turn
VISION_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def qwen_parts(patch_size: int):
    """A tokenizer with Qwen-VL's special tokens, their ids, and an image processor."""
    tokenizer = build_tokenizer()
    marks = [AddedToken(mark, special=True, normalized=False) for mark in VISION_TOKENS]
    tokenizer.add_tokens(marks, special_tokens=True)
    start, end, image, video = tokenizer.convert_tokens_to_ids(list(VISION_TOKENS))
    ids = {"image_token_id": image, "video_token_id": video}
    ids |= {"vision_start_token_id": start, "vision_end_token_id": end}
    size = {"shortest_edge": (2 * patch_size) ** 2, "longest_edge": (6 * patch_size) ** 2}
    return tokenizer, ids, Qwen2VLImageProcessor(patch_size=patch_size, size=size)


def shake(model):
    """Make words, pictures and answers matter: at 0.02 a small model says one thing only."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = 0.3 * torch.randn(parameter.shape, generator=generator)
            parameter.copy_(1 + noise if parameter.ndim == 1 and "bias" not in name else noise)
    return model


TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 48}
TEXT |= {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1}
ROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 10000.0}
VISION = {"depth": 2, "hidden_size": 32, "intermediate_size": 48, "num_heads": 2}
VISION |= {"out_hidden_size": 32}


def write_qwen2_5(folder):
    tokenizer, ids, images = qwen_parts(14)
    vision = VISION | {"fullatt_block_indexes": [1], "patch_size": 14}
    text = TEXT | {"rope_parameters": ROPE, "bos_token_id": None, "eos_token_id": 0}
    config = Qwen2_5_VLConfig(text_config=text, vision_config=vision, **ids)
    shake(Qwen2_5_VLForConditionalGeneration(config)).save_pretrained(folder)
    video = Qwen2VLVideoProcessor(patch_size=14)
    Qwen2_5_VLProcessor(images, tokenizer, video, chat_template=QWEN_TEMPLATE).save_pretrained(
        folder
    )
    return folder


def write_qwen3(folder):
    tokenizer, ids, images = qwen_parts(16)
    vision = VISION | {"deepstack_visual_indexes": [0], "num_position_embeddings": 16}
    text = TEXT | {"head_dim": 16, "rope_parameters": ROPE | {"mrope_interleaved": True}}
    config = Qwen3VLConfig(text_config=text, vision_config=vision, **ids)
    shake(Qwen3VLForConditionalGeneration(config)).save_pretrained(folder)
    video = Qwen3VLVideoProcessor(patch_size=16)
    Qwen3VLProcessor(images, tokenizer, video, chat_template=QWEN_TEMPLATE).save_pretrained(folder)
    return folder


WRITERS = {"qwen2_5_vl": write_qwen2_5, "qwen3_vl": write_qwen3, "llava_onevision": write_converted}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    return {name: write(tmp_path_factory.mktemp(name)) for name, write in WRITERS.items()}


@pytest.fixture(params=sorted(WRITERS))
def folder(request, folders):
    return str(folders[request.param])


@pytest.fixture
def images():
    return torch.rand(3, 3, 40, 56, generator=torch.Generator().manual_seed(1))


def prompts(texts=TEXTS):
    return [Prompt(text) for text in texts]


def chat(folder: str, question: str) -> str:
    """What a model of the folder's family reads for one question, written out."""
    picture = "<image>\n" if "llava" in folder else "<|vision_start|><|image_pad|><|vision_end|>"
    return (
        "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
        f"<|im_start|>user\n{picture}{question}<|im_end|>\n<|im_start|>assistant\n"
    )


@functools.cache
def read(folder: str):
    """transformers' own model and processor."""
    model = AutoModelForImageTextToText.from_pretrained(folder).eval()
    return model, AutoProcessor.from_pretrained(folder)


@functools.cache
def loaded(folder: str, **settings) -> UnifiedReward:
    return UnifiedReward(folder, **settings).load()


@torch.no_grad()
def next_logits(folder: str, image, text: str, said: list[int]) -> torch.Tensor:
    """The next token's logits for one picture, without a cache and without padding."""
    model, processor = read(folder)
    inputs = processor(text=[text], images=to_pillow(image[None]), return_tensors="pt")
    for name in ("input_ids", "attention_mask", "mm_token_type_ids"):
        if name in inputs:
            more = {"input_ids": said, "attention_mask": [1] * len(said)}.get(name, [0] * len(said))
            inputs[name] = torch.cat([inputs[name], torch.tensor([more]).to(inputs[name])], dim=1)
    return model(**inputs).logits[0, -1]


def answer_with(monkeypatch, answers):
    monkeypatch.setattr(UnifiedReward, "_answers", lambda self, inputs: list(answers))


@pytest.mark.parametrize(
    ("answer", "mark", "as_reference"),
    [
        ("Final Score: 4", 4.0, 4.0),
        ("Final Score:3.5", 3.5, 3.5),
        ("Final Score:\n 5.0.", 5.0, 5.0),
        ("a cat (animal): 1\nFinal Score: 2\n", 2.0, 2.0),
        ("Final Score: 2 and Final Score: 4", 2.0, 2.0),
        ("Final Score: 3.7450", 3.745, 3.745),
        ("Final Score: 7", math.nan, 0.0),
        ("Final Score: 0.9", math.nan, 0.0),
        ("Final Score: 10", math.nan, 1.0),
        ("Final Score: 5.7", math.nan, 5.7),
        ("Final Score: 4.5.1", math.nan, 4.5),
        ("Final Score: 4th", math.nan, 4.0),
        ("Final Score: 7. Final Score: 3", math.nan, 3.0),
        ("**Final Score:** 4", math.nan, 0.0),
        ("final score: 4", math.nan, 0.0),
        ("Final Score: -3", math.nan, 0.0),
        ("Final Score: ٤", math.nan, 0.0),
        ("Score: 4", math.nan, 0.0),
        ("", math.nan, 0.0),
    ],
)
def test_marks_are_read(answer, mark, as_reference):
    assert read_mark(answer) == pytest.approx(mark, nan_ok=True)
    assert read_mark_as_reference(answer) == as_reference


@pytest.mark.parametrize("name", QUESTIONS)
def test_questions_are_the_authors(name, folders):
    reward = UnifiedReward(str(folders["qwen2_5_vl"]), question=name)
    assert reward.question == QUESTIONS[name]
    assert hashlib.sha256(reward.question.encode()).hexdigest()[:16] == DIGESTS[name]


def test_each_family_is_asked_in_its_own_form(folder):
    reward = loaded(folder)
    questions = [SCORE_ONLY.replace("{prompt}", text) for text in TEXTS]
    assert reward._conversations(prompts()) == [chat(folder, question) for question in questions]


def test_answers_are_those_of_greedy_decoding_one_by_one(folder, images):
    reward = loaded(folder, max_new_tokens=3)
    scores = reward.score(images, prompts())
    assert scores.total.isnan().all()  # a random model gives no marks
    answers = []
    for image, text in zip(images, TEXTS, strict=True):
        said: list[int] = []
        for _ in range(3):
            question = chat(folder, SCORE_ONLY.replace("{prompt}", text))
            said.append(int(next_logits(folder, image, question, said).argmax()))
        answers.append(reward._judge.tokenizer.decode(said, skip_special_tokens=True))
    assert [entry["answer"] for entry in scores.details] == answers
    assert {entry["problem"] for entry in scores.details} == {"no mark from 1 to 5"}
    assert len(set(answers)) > 1  # else any picture's answer would pass for another's


def test_expected_mark_is_the_mean_of_the_digits(folder, images):
    reward = loaded(folder, expected=True)
    passes = []
    hook = reward.network.model.language_model.register_forward_hook(
        lambda *_: passes.append(1)  # whose None leaves the output
    )
    scores = reward.score(images, prompts())
    hook.remove()
    assert len(passes) == 1
    tokenizer = read(folder)[1].tokenizer
    digits = [tokenizer.get_vocab()[str(mark)] for mark in (1, 2, 3, 4, 5)]
    said = tokenizer("Final Score: ")["input_ids"]
    expected = []
    for image, text in zip(images, TEXTS, strict=True):
        question = chat(folder, SCORE_ONLY.replace("{prompt}", text))
        weights = next_logits(folder, image, question, said)[digits].double().exp().tolist()
        mean = sum(mark * w for mark, w in enumerate(weights, start=1)) / sum(weights)
        expected.append(mean / 5)
    torch.testing.assert_close(scores.total, torch.tensor(expected), atol=1e-5, rtol=0)
    assert scores.total.std() > 1e-3  # else any constant would pass
    assert sum(scores.details[0]["chances"]) == pytest.approx(1, abs=1e-3)


def test_a_picture_scores_alone_as_among_sixteen(folder):
    reward = loaded(folder, expected=True)
    images = torch.rand(16, 3, 30, 30, generator=torch.Generator().manual_seed(3))
    texts = [" ".join(["cat"] * number) for number in range(16)]  # so that padding differs
    together = reward.score(images, prompts(texts)).total
    alone = [reward.score(images[i : i + 1], prompts(texts[i : i + 1])).total for i in range(16)]
    torch.testing.assert_close(together, torch.cat(alone), atol=1e-5, rtol=0)
    swapped = reward.score(images.flip(0), prompts(texts[::-1])).total
    torch.testing.assert_close(swapped, together.flip(0), atol=1e-5, rtol=0)


def test_prompt_and_picture_change_the_score(folder, images):
    reward = loaded(folder, expected=True)
    total = reward.score(images, prompts()).total
    other_text = reward.score(images, prompts([text + " hat" for text in TEXTS])).total
    other_picture = reward.score(1 - images, prompts()).total
    assert ((total - other_text).abs() > 1e-5).all()
    assert ((total - other_picture).abs() > 1e-5).all()


def test_grey_and_transparent_pictures_are_scored_as_rgb(folder, images):
    reward, grey = loaded(folder, expected=True), images[:, :1]
    torch.testing.assert_close(
        reward.score(grey, prompts()).total,
        reward.score(grey.expand(-1, 3, -1, -1), prompts()).total,
    )
    torch.testing.assert_close(
        reward.score(torch.cat([images, grey], dim=1), prompts()).total,
        reward.score(images, prompts()).total,
    )


def test_marks_become_scores_and_answers_without_one_none(folders, images, monkeypatch):
    answers = ["Final Score: 4", "Final Score: 10", "Final Score: 3.5"]
    answer_with(monkeypatch, answers)
    reward = loaded(str(folders["qwen2_5_vl"]))
    scores = reward.score(images, prompts())
    expected = torch.tensor([0.8, math.nan, 0.7])
    torch.testing.assert_close(scores.total, expected, equal_nan=True)
    assert scores.weights == {"unified_reward": 1.0} and scores.total.dtype == torch.float32
    assert scores.details == [
        {"answer": answers[0]},
        {"answer": answers[1], "problem": "no mark from 1 to 5"},
        {"answer": answers[2]},
    ]


def test_the_references_faults_can_be_had(folders, images, monkeypatch):
    answer_with(monkeypatch, ["Final Score: 10", "Final Score: 5.7", "none"])
    reward = UnifiedReward(str(folders["qwen2_5_vl"]), reference_faults=True).load()
    total = reward.score(images, prompts()).total
    torch.testing.assert_close(total, torch.tensor([0.2, 1.14, 0.0]))


@pytest.mark.parametrize("question", ["axes", "word_wise_axes"])
def test_axes_are_parts_and_their_mean_the_total(folders, images, monkeypatch, question):
    stated = "Alignment Score (1-5): {}\nCoherence Score (1-5): {}\nStyle Score (1-5): {}"
    words = 'Word-wise Scores: [["cat", 0.2]]\n\n'
    answers = [
        words + stated.format("2.694700002670288", 3, "4.5"),
        stated.format(5, 5, 5),
        stated.format(4, 6, 3),
    ]
    answer_with(monkeypatch, answers)
    scores = (
        UnifiedReward(str(folders["qwen2_5_vl"]), question=question).load().score(images, prompts())
    )
    expected = torch.tensor([[0.53894, 0.6, 0.9], [1, 1, 1], [0.8, math.nan, 0.6]])
    for name, values in zip(("alignment", "coherence", "style"), expected.T, strict=True):
        torch.testing.assert_close(scores.parts[name], values, equal_nan=True)
        assert scores.weights[name] == pytest.approx(1 / 3)
    total = torch.tensor([(0.53894 + 0.6 + 0.9) / 3, 1, math.nan])
    torch.testing.assert_close(scores.total, total, equal_nan=True)
    assert [entry.get("problem") for entry in scores.details] == [None, None, "no mark from 1 to 5"]


def test_sampling_and_penalties_of_the_checkpoint_are_not_used(folders, images, tmp_path):
    source = str(folders["qwen2_5_vl"])
    model = AutoModelForImageTextToText.from_pretrained(source)
    settings = model.generation_config
    settings.do_sample, settings.temperature, settings.repetition_penalty = True, 50.0, 30.0
    model.save_pretrained(tmp_path)
    AutoProcessor.from_pretrained(source).save_pretrained(tmp_path)
    plain, noisy = (
        UnifiedReward(path, max_new_tokens=4).load().score(images, prompts()).details
        for path in (source, str(tmp_path))
    )
    assert noisy == plain


def test_digits_that_are_no_single_tokens_are_refused(folders, monkeypatch):
    path = str(folders["qwen2_5_vl"])
    monkeypatch.setattr("cotgen_pl.rewards.unified_reward.BEST", 10)  # "10" is two tokens
    with pytest.raises(
        ValueError, match=rf"a single token behind 'Final Score: ' .* {path} \(Qwen"
    ):
        UnifiedReward(path, expected=True).load()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"question": "stars"}, "expected question to be one of"),
        ({"max_new_tokens": 0}, "expected max_new_tokens of 1 or more"),
        ({"expected": True, "question": "elements"}, "expected question: score_only beside"),
        ({"expected": True, "question": "axes"}, "expected question: score_only beside"),
        ({"expected": True, "reference_faults": True}, "expected reference_faults with score_only"),
        ({"question": "axes", "reference_faults": True}, "expected reference_faults with"),
    ],
)
def test_settings_that_exclude_each_other_are_refused(folders, settings, message):
    with pytest.raises(ValueError, match=message):
        UnifiedReward(str(folders["qwen2_5_vl"]), **settings)


def test_a_mark_of_a_picture_in_a_prompt_is_refused(folders, images):
    reward = loaded(str(folders["qwen2_5_vl"]))
    with pytest.raises(ValueError, match=r"expected prompts without <\|image_pad\|>"):
        reward.score(images[:1], prompts(["a <|image_pad|>"]))


def test_the_original_llava_format_is_sent_to_the_converter(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "llava_qwen"}')
    with pytest.raises(ValueError, match=r"got model_type 'llava_qwen'.*convert.py"):
        UnifiedReward(str(tmp_path)).load()


@pytest.mark.parametrize("version", ["4.57.0", "4.57.1"])
def test_a_transformers_with_wrong_features_is_refused_for_llava(folders, monkeypatch, version):
    monkeypatch.setattr("transformers.__version__", version)
    with pytest.raises(ValueError, match="picture features right"):
        UnifiedReward(str(folders["llava_onevision"])).load()
    UnifiedReward(str(folders["qwen2_5_vl"])).load()  # has no SigLIP


def test_a_hub_id_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(
        ValueError, match=r"got neither .*hf download CodeGoat24/UnifiedReward-qwen"
    ):
        UnifiedReward().load()


def test_a_weights_file_is_no_checkpoint(tmp_path):
    (tmp_path / "model.safetensors").touch()
    with pytest.raises(ValueError, match="expected a folder or a hub repository"):
        UnifiedReward(str(tmp_path / "model.safetensors"))
