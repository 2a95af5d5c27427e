"""FunctionReward: functions of the user's own, what they are given and what they may return."""

import subprocess
import sys

import numpy
import pytest
import torch
import yaml

from cotgen_pl.data.prompts import check_scorable
from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards.ensemble import Ensemble
from cotgen_pl.rewards.function import FunctionReward

IMAGES = torch.rand(4, 3, 6, 8, generator=torch.Generator().manual_seed(0))
PROMPTS = [
    Prompt("a cat", facts={"count": 1, "colour": "red"}),
    Prompt("two cats", facts={"count": 2}),
    Prompt("", facts={}),
    Prompt("a dog", facts={"count": 1, "colour": None}),
]
SOURCE = """
import numpy
import torch

asked = []

def redness(prompts, images, **columns):
    asked.append((prompts, images, columns))
    return [float(numpy.asarray(image)[..., 0].mean()) / 255 for image in images]

def length(prompts, images, **columns):
    return [len(prompt) for prompt in prompts]

def picky(prompts, images, **columns):
    return [None if prompt == "" else 1.0 for prompt in prompts]

def counts(prompts, images, count, colour=None, **columns):
    return [float(n) for n in count]

def tensor_form(images, prompts, metadata):
    asked.append((images, prompts, metadata))
    return images.mean((1, 2, 3)), {"more": 1}

def list_form(images, prompts, metadata):
    return [len(facts) for facts in metadata]

def array_form(images, prompts, metadata):
    return numpy.array([1, 2, 3, 4]), {}

def scalars_form(images, prompts, metadata):
    return [torch.tensor(1.0), numpy.float32(2), True, 4], {}

def five(images, prompts, metadata):
    return [1.0] * 4, [1.0] * 4, [1.0] * 4, {}, {}

def spoils(images, prompts, metadata):
    images.zero_(), prompts.clear(), metadata[0]["objects"].clear()
    return [0.0] * 4

def paints(prompts, images, **columns):
    for image in images:
        image.paste((0, 0, 0), (0, 0, *image.size))
    prompts.clear(), columns["objects"][0].clear()
    return [0.0] * 4

def make_scorer(device):
    return tensor_form

def only_two(prompts, images):
    return [0.0] * 4

def breaks(prompts, images, **columns):
    return [1 / 0]

def returns(value):
    return lambda prompts, images, **columns: value

none, short, text = returns(None), returns([1.0]), returns(["1", "2", "3", "4"])
number, rows = returns(1.0), returns(torch.ones(4, 2))
number_0d, dictionary = returns(torch.tensor(1.0)), returns({"a": 1, "b": 2, "c": 3, "d": 4})
endless = returns([1.0, float("nan"), None, 2.0])
value = 3
"""


@pytest.fixture
def written(tmp_path, monkeypatch):
    """A working directory with my_functions.py, from which alone it is importable."""
    (tmp_path / "my_functions.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [name for name in sys.modules if name.startswith("my_")]:
        del sys.modules[name]


def score(function, signature="columns"):
    return FunctionReward(function, signature).load().score(IMAGES, PROMPTS)


def test_a_function_is_given_prompts_pictures_and_columns(written):
    scores = score("my_functions.redness")
    [(prompts, images, columns)] = sys.modules["my_functions"].asked
    assert prompts == ["a cat", "two cats", "", "a dog"]
    assert [(image.mode, image.size) for image in images] == [("RGB", (8, 6))] * 4
    assert columns == {"count": [1, 2, None, 1], "colour": ["red", None, None, None]}
    torch.testing.assert_close(scores.total, IMAGES[:, 0].mean((1, 2)), atol=0.002, rtol=0)
    assert scores.total.dtype == torch.float32 and scores.weights == {"redness": 1.0}
    assert list(scores.parts) == ["redness"] and scores.details == [{}] * 4


def test_scores_follow_their_picture(written):
    reward, order = FunctionReward("my_functions.redness"), [2, 0, 3, 1]
    total = reward.score(IMAGES, PROMPTS).total
    assert torch.equal(reward.score(IMAGES[order], PROMPTS).total, total[order])
    red = torch.zeros(2, 3, 4, 4)
    red[1, 0] = 1
    assert reward.score(red, PROMPTS[:2]).total.tolist() == [0.0, 1.0]


def test_flow_grpo_functions_are_given_tensors_and_metadata(written):
    scores = score("my_functions.tensor_form", "flow_grpo")
    [(images, prompts, metadata)] = sys.modules["my_functions"].asked
    assert torch.equal(images, IMAGES) and prompts == [prompt.text for prompt in PROMPTS]
    assert metadata == [prompt.facts for prompt in PROMPTS]
    torch.testing.assert_close(scores.total, IMAGES.mean((1, 2, 3)))


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("list_form", [2.0, 1.0, 0.0, 2.0]),
        ("array_form", [1.0, 2.0, 3.0, 4.0]),
        ("scalars_form", [1.0, 2.0, 1.0, 4.0]),
    ],
)
def test_flow_grpo_scores_come_alone_or_with_extras(written, name, expected):
    assert score(f"my_functions.{name}", "flow_grpo").total.tolist() == expected


def test_several_functions_are_weighted_and_shown(written):
    scores = score(
        {"my_functions.length": 2.0, "my_functions.redness": -0.5, "my_functions.picky": 0}
    )
    assert scores.weights == {"length": 2.0, "redness": -0.5, "picky": 0.0}
    assert scores.parts["length"].tolist() == [5.0, 8.0, 0.0, 5.0]
    expected = 2 * scores.parts["length"] - 0.5 * scores.parts["redness"]
    torch.testing.assert_close(scores.total, expected)
    assert not scores.total.isnan().any()  # `picky` is only watched
    assert scores.parts["picky"].isnan().tolist() == [False, False, True, False]
    assert scores.details == [{}, {}, {"failure": "no number from picky"}, {}]


def test_none_is_no_verdict_and_so_is_nan(written):
    assert score("my_functions.picky").total.isnan().tolist() == [False, False, True, False]
    scores = score({"my_functions.endless": 1.0, "my_functions.length": 1.0})
    assert scores.total.isnan().tolist() == [False, True, True, False]
    assert scores.details[1] == {"failure": "no number from endless"}


def test_it_is_a_member_of_an_ensemble_with_its_own_parts(written):
    both = FunctionReward({"my_functions.length": 1.0, "my_functions.redness": 1.0})
    scores = Ensemble({"mine": both, "form": FunctionReward("my_functions.picky")}).score(
        IMAGES, PROMPTS
    )
    assert list(scores.parts) == ["mine", "mine/length", "mine/redness", "form"]
    assert both.name == "functions" and FunctionReward("my_functions.picky").name == "picky"


@pytest.mark.parametrize(("name", "form"), [("spoils", "flow_grpo"), ("paints", "columns")])
def test_what_a_function_changes_stays_with_it(written, name, form):
    images, prompts = IMAGES.clone(), [Prompt("a cat", facts={"objects": ["cat"]})] * 4
    FunctionReward(f"my_functions.{name}", form).score(images, prompts)
    assert torch.equal(images, IMAGES)
    assert prompts == [Prompt("a cat", facts={"objects": ["cat"]})] * 4


def test_columns_without_default_are_required_facts(written):
    reward = FunctionReward({"my_functions.counts": 1.0, "my_functions.redness": 1.0})
    assert reward.required_facts == ("count",)
    check_scorable(PROMPTS[:2], reward)
    with pytest.raises(ValueError, match=r"prompt 2: expected the facts \['count'\]"):
        check_scorable(PROMPTS, reward)
    assert FunctionReward("my_functions.list_form", "flow_grpo").required_facts == ()


def test_facts_may_not_hide_the_arguments(written):
    prompts = [Prompt("a cat", facts={"images": []})]
    with pytest.raises(ValueError, match=r"prompt 0: reward redness: .*got \['images'\]"):
        check_scorable(prompts, FunctionReward("my_functions.redness"))
    check_scorable(prompts, FunctionReward("my_functions.list_form", "flow_grpo"))


@pytest.mark.parametrize(
    ("name", "signature", "message"),
    [
        ("short", "columns", r"list of 4 scores, one per picture, got \[1.0\], 1 long"),
        ("none", "columns", "list of 4 scores, one per picture, got None"),
        ("number", "columns", "list of 4 scores, one per picture, got 1.0"),
        ("number_0d", "columns", r"list of 4 scores, one per picture, got tensor\(1.\)"),
        ("dictionary", "columns", "list of 4 scores, one per picture, got {'a'"),
        ("five", "flow_grpo", "list of 4 scores, one per picture, got .*, 5 long"),
        ("text", "columns", "a number or None for each picture, got '1'"),
        ("rows", "columns", r"a number or None for each picture, got \[1.0, 1.0\]"),
    ],
)
def test_other_returns_are_told_with_the_function(written, name, signature, message):
    with pytest.raises(ValueError, match=rf"function my_functions.{name}: expected .*{message}"):
        score(f"my_functions.{name}", signature)


def test_an_exception_is_told_with_its_line(written):
    line = SOURCE[: SOURCE.index("1 / 0")].count("\n") + 1
    message = r"function my_functions.breaks: .*ZeroDivisionError: division by zero at "
    with pytest.raises(ValueError, match=rf"{message}.*my_functions.py:{line};"):
        score("my_functions.breaks")


@pytest.mark.parametrize(
    ("name", "signature", "message"),
    [
        ("only_two", "columns", r"f\(prompts, images, \*\*columns\).*any_other_column"),
        ("tensor_form", "columns", "unexpected keyword|missing a required argument"),
        ("redness", "flow_grpo", r"f\(images, prompts, metadata\).*too many positional"),
        ("make_scorer", "flow_grpo", r"f\(images, prompts, metadata\).*too many positional"),
    ],
)
def test_functions_of_another_form_are_told_before_any_picture(written, name, signature, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(f"my_functions.{name}", signature)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ("redness", "expected an import path like"),
        ("my_functions.", "expected an import path like"),
        ("my functions.redness", "expected an import path like"),
        ("os; import sys.exit", "expected an import path like"),
        ("my_functions.py", "expected a function py in my_functions, got None"),
        ("my_functions.value", "expected a function value in my_functions, got 3"),
        ("my_absent.redness", "No module named 'my_absent'.*put it into the working directory"),
        ("my_broken.redness", r"ModuleNotFoundError: No module named 'absent' at .*broken.py:2"),
        ("my_typo.redness", r"SyntaxError: .*my_typo.py, line 1"),
    ],
)
def test_paths_that_lead_nowhere_are_told(written, path, message):
    (written / "my_broken.py").write_text("import os\nimport absent\n")
    (written / "my_typo.py").write_text("def redness(:\n")
    with pytest.raises(ValueError, match=message):
        FunctionReward(path)


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ({}, "one other than 0"),
        ({"my_functions.redness": 0.0}, "one other than 0"),
        ({"my_functions.redness": float("nan")}, "expected finite weights"),
        ({"my_functions.redness": 1.0, "others.redness": 1.0}, "names of their own"),
    ],
)
def test_weights_that_make_no_sense_are_refused(written, function, message):
    with pytest.raises(ValueError, match=message):
        FunctionReward(function)


def test_an_unknown_form_is_refused(written):
    with pytest.raises(ValueError, match="signature to be one of"):
        FunctionReward("my_functions.redness", "trl")


def test_a_script_elsewhere_finds_functions_in_the_working_directory(written, repository):
    """As tools/main.py does, whose own folder stands on the path in place of the working one."""
    (written / "tools").mkdir()
    (written / "tools" / "script.py").write_text(
        f"import sys\nsys.path.append({str(repository)!r})\n"
        "from cotgen_pl.rewards.function import FunctionReward\n"
        "print(FunctionReward('my_functions.redness').name)\n"
    )
    command = [sys.executable, "tools/script.py"]
    finished = subprocess.run(command, capture_output=True, text=True)
    assert finished.stdout == "redness\n", finished.stderr


def test_the_shipped_piece_names_the_function_of_the_readme(written, repository):
    piece = yaml.safe_load((repository / "configs/rewards/function.yaml").read_text())
    (written / "my_rewards.py").write_text(SOURCE)
    reward = FunctionReward(**piece["init_args"])
    assert reward.score(IMAGES, PROMPTS).weights == {"redness": 1.0}


def test_grey_pictures_are_given_as_rgb(written):
    grey = FunctionReward("my_functions.redness").score(torch.ones(4, 1, 5, 5), PROMPTS)
    assert grey.total.tolist() == [1.0] * 4
    assert numpy.asarray(sys.modules["my_functions"].asked[0][1][0]).shape == (5, 5, 3)
