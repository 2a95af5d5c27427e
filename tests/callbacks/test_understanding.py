"""Questions about pictures: read, asked through transformers' own text path, and counted."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.callbacks.understanding import UnderstandingEvaluation
from cotgen_pl.interfaces import Policy
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.understanding import is_right, read_questions
from tests.toys import (
    Memory,
    NoisyBrightness,
    attach_grpo,
    fit,
    make_grpo,
    make_policy,
    make_trainer,
    sgd,
)

ASKED = ("what color?", "is there a circle or a square?", "how many cats?")


def write_questions(folder, answers=("red", "yes", "two"), categories=("a", "a", "")) -> str:
    """Three questions about two pictures; returns the file's path."""
    (folder / "pictures").mkdir(exist_ok=True)
    generator = np.random.default_rng(0)
    for name, mode in (("one.png", "RGBA"), ("two.png", "RGB")):
        pixels = generator.integers(0, 256, (6, 9, len(mode)), dtype=np.uint8)
        Image.fromarray(pixels, mode).save(folder / "pictures" / name)
    names = ("one.png", "two.png", "one.png")
    rows = [
        {"picture": f"pictures/{name}", "question": question, "answer": answer, "category": kind}
        for name, question, answer, kind in zip(names, ASKED, answers, categories, strict=True)
    ]
    path = folder / "questions.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return str(path)


@pytest.fixture(scope="session")
def seeing_janus(tmp_path_factory) -> Path:
    """An untrained Janus of 2 x 2 tokens and 16 px: the processor makes no picture below 14."""
    from cotgen_pl.shapes.checkpoint import build_janus, build_tokenizer, save_janus

    folder = tmp_path_factory.mktemp("seeing_janus")
    tokenizer = build_tokenizer(["a red circle left of a blue square", "two cats"], 300)
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2, "codebook_size": 32}
    save_janus(build_janus(tokenizer, **sizes, grid=2, vq_levels=4), tokenizer, folder)
    return folder


@pytest.fixture
def module(seeing_janus, tmp_path):
    """A module that is loaded and attached to a trainer."""
    return attach_grpo(seeing_janus, tmp_path)


def ask(module, folder, **arguments) -> list[str]:
    """The answers to the three questions."""
    evaluation = UnderstandingEvaluation([write_questions(folder)], max_tokens=5, **arguments)
    evaluation.evaluate(module)
    return evaluation.responses


# Asking -----------------------------------------------------------------------------------------


def test_answers_are_those_of_transformers_own_generate(module, tmp_path):
    answers = ask(module, tmp_path)
    processor, model = module.policy.processor, module.policy.janus
    picture = Image.open(tmp_path / "pictures/two.png").convert("RGB")
    text = f"<|User|>: <image_placeholder>\n{ASKED[1]}\n\n<|Assistant|>:"
    inputs = processor(text=[text], images=[picture], return_tensors="pt")
    said = model.generate(
        **inputs, generation_mode="text", do_sample=False, max_new_tokens=5, pad_token_id=2
    )
    own = processor.decode(said[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
    assert answers[1] == own and own != ""
    assert len(set(answers)) == 3


def test_answers_depend_on_the_picture(module, tmp_path):
    pictures = [Image.new("RGB", (4, 4), color) for color in ("black", "white")]
    policy = module.policy
    with torch.no_grad():  # random towers hardly see: let this one
        policy.janus.model.aligner.fc1.weight.mul_(1000)
    black, white = policy.answer(pictures, [ASKED[0]] * 2, 8)
    assert black != white


def test_batches_change_no_answer(module, tmp_path):
    assert ask(module, tmp_path, batch_size=1) == ask(module, tmp_path, batch_size=3)


def test_answers_end_at_the_limit_and_at_the_end_token(module, tmp_path):
    tokenizer, model = module.policy.processor.tokenizer, module.policy.janus
    picture = Image.new("RGB", (4, 4))
    short, long = (module.policy.answer([picture], ["?"], number)[0] for number in (2, 6))
    assert long.startswith(short) and long != short
    with torch.no_grad():  # whatever is read, the text head says the end
        model.model.language_model.norm.weight.zero_()
        model.lm_head.weight.zero_()
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer), dtype=torch.float64))
        model.lm_head.bias[tokenizer.eos_token_id] = 1.0
    assert module.policy.answer([picture], ["?"], 6) == [""]


@pytest.mark.parametrize(
    ("policy", "precision"),
    [
        ({"dtype": "bfloat16"}, "32-true"),
        ({"dtype": "bfloat16"}, "bf16-mixed"),
        ({"dtype": "float32"}, "bf16-mixed"),
        ({"dtype": "bfloat16", "lora": LoraSettings(2, 4)}, "bf16-mixed"),
        ({"dtype": "float32", "trains": "both", "gradient_checkpointing": True}, "32-true"),
    ],
)
def test_it_works_under_every_precision(seeing_janus, tmp_path, policy, precision):
    module = make_grpo(seeing_janus, policy=make_policy(seeing_janus, **policy))
    module.configure_model()
    module.trainer = make_trainer(tmp_path, precision=precision)
    assert len(ask(module, tmp_path)) == 3
    assert not module.policy.janus.lm_head._forward_pre_hooks


def test_adapters_are_asked_too(seeing_janus, tmp_path):
    policy = make_policy(seeing_janus, lora=LoraSettings(2, 4))
    module = make_grpo(seeing_janus, policy=policy)
    module.configure_model()
    module.trainer = make_trainer(tmp_path)
    before = ask(module, tmp_path)
    for name, parameter in policy.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter)
    assert ask(module, tmp_path) != before


# Judging ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("response", "answer", "exact", "contains"),
    [
        ("Red.", "red", True, True),
        (" the  red circle ", "a Red Circle", True, True),
        ("It is red.", "red", False, True),
        ("infrared", "red", False, False),
        ("red and big circle", "red circle", False, False),
        ("", "red", False, False),
        ("A", "a", True, True),
    ],
)
def test_what_counts_as_right(response, answer, exact, contains):
    assert is_right(response, answer, "exact") is exact
    assert is_right(response, answer, "contains") is contains


def test_shares_are_by_category_and_their_mean(module, tmp_path):
    said = ask(module, tmp_path)
    assert all(said)
    right = write_questions(tmp_path, answers=(said[0], "something else", said[2]))
    metrics = UnderstandingEvaluation([right], max_tokens=5).evaluate(module)
    assert metrics == {
        "val/understanding/a": 0.5,
        "val/understanding/other": 1.0,
        "val/understanding/mean": 0.75,
    }
    assert module.trainer.logger.rows[0] == metrics


# In the loop ------------------------------------------------------------------------------------


def test_start_middle_and_end_are_logged_and_training_is_as_without(seeing_janus, tmp_path):
    states = []
    for callbacks in ([], [UnderstandingEvaluation([write_questions(tmp_path)], 2)]):
        torch.manual_seed(0)
        module = make_grpo(seeing_janus, NoisyBrightness(), images_budget=24, optimizer=sgd(5.0))
        trainer = fit(module, tmp_path, *callbacks)
        states.append((module.state_dict(), torch.get_rng_state()))
    rows = trainer.logger.rows
    assert [step for step in sorted(rows) if "val/understanding/mean" in rows[step]] == [0, 2, 3]
    (plain, random_state), (watched, same_random_state) = states
    assert all(torch.equal(plain[name], watched[name]) for name in plain)
    assert torch.equal(random_state, same_random_state)


def test_it_is_asked_under_validate(seeing_janus, tmp_path, capsys):
    logger = Memory()
    evaluation = UnderstandingEvaluation([write_questions(tmp_path)])
    trainer = make_trainer(tmp_path, evaluation, logger=logger)
    trainer.validate(make_grpo(seeing_janus), verbose=False)
    assert set(logger.rows[0]) >= {"val/understanding/a", "val/understanding/mean"}
    lines = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert ["understanding/mean", f"{logger.rows[0]['val/understanding/mean']:.3f}"] in lines


# Mistakes ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"picture": "none.png"}, "expected a picture at .*none.png, got: .*No such file"),
        ({"picture": "questions.jsonl"}, "expected a picture at .*cannot identify image file"),
        ({"picture": "."}, "expected a picture at"),
        ({"answer": 2}, 'expected {"picture": path, "question": text, "answer": text}'),
        ({"question": " "}, 'expected {"picture": path'),
        ({"category": "a/b"}, "expected a category that names a metric"),
        ({"category": "mean"}, "expected a category that names a metric"),
    ],
)
def test_a_bad_line_is_named(tmp_path, row, message):
    path = write_questions(tmp_path)
    good = (tmp_path / "questions.jsonl").read_text().splitlines()
    (tmp_path / "questions.jsonl").write_text(
        "\n".join([good[0], "", json.dumps(json.loads(good[1]) | row)])
    )
    with pytest.raises(ValueError, match=rf"questions.jsonl:3: {message}"):
        UnderstandingEvaluation([path])


@pytest.mark.parametrize(
    ("text", "message"), [("\n", "got an empty file"), ("[1", "jsonl:1: expected a JSON object")]
)
def test_a_file_of_something_else_is_refused(tmp_path, text, message):
    (tmp_path / "q.jsonl").write_text(text)
    with pytest.raises(ValueError, match=message):
        read_questions(tmp_path / "q.jsonl")
    with pytest.raises(ValueError, match=r"questions at .*none\.jsonl"):
        read_questions(tmp_path / "none.jsonl")


def test_a_picture_that_breaks_off_is_named_when_it_is_asked_about(module, tmp_path):
    file = write_questions(tmp_path)
    evaluation = UnderstandingEvaluation([file])
    path = tmp_path / "pictures/two.png"
    path.write_bytes(path.read_bytes()[:60])
    with pytest.raises(ValueError, match=r"questions.jsonl:2: expected a picture at .*two.png"):
        evaluation.evaluate(module)


def test_a_question_beyond_the_context_is_refused(module, tmp_path):
    evaluation = UnderstandingEvaluation([write_questions(tmp_path)], max_tokens=200)
    with pytest.raises(ValueError, match=r"of at most 128 tokens, got \d+ and"):
        evaluation.evaluate(module)


def test_a_policy_that_answers_nothing_is_refused_before_weights_load(
    seeing_janus, tmp_path, monkeypatch
):
    monkeypatch.setattr(JanusPolicy, "answer", Policy.answer)
    monkeypatch.setattr(JanusPolicy, "load", None)
    with pytest.raises(ValueError, match=r"expected a policy that answers .* JanusPolicy"):
        fit(make_grpo(seeing_janus), tmp_path, UnderstandingEvaluation([write_questions(tmp_path)]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"match": "near"}, "expected match to be one of"),
        ({"max_tokens": 0}, "expected max_tokens of 1 or more"),
        ({"batch_size": 0}, "expected batch_size of 1 or more"),
    ],
)
def test_unusable_settings_are_refused(tmp_path, arguments, message):
    with pytest.raises(ValueError, match=message):
        UnderstandingEvaluation([write_questions(tmp_path)], **arguments)
    with pytest.raises(ValueError, match="expected at least one file of questions"):
        UnderstandingEvaluation([])
