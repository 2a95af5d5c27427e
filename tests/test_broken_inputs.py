"""Inputs that hypothesis breaks: each gives one clear error or is survived, and harms nothing."""

import copy
import json
import math
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cotgen_pl.data.formats import Format, PromptFile, read_prompts
from cotgen_pl.interfaces import Prompt
from cotgen_pl.pairs.sets import PairSet, load_reference, save_reference
from cotgen_pl.rewards.remote import RemoteReward
from cotgen_pl.run_checkpoints import WholeCheckpoints, newest_good
from tests.test_command_line import assert_same, settings_of
from tests.toys import write_pairs
from tools.main import find_mistake, main

# 5 kinds of inputs: 20 cases in the default suite, 200 in the slow one.
CASES = pytest.mark.parametrize("cases", [4, pytest.param(40, marks=pytest.mark.slow)])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3)
    ),
    max_leaves=8,
)


def break_in(number: int, check: Callable[..., None], **inputs: st.SearchStrategy[Any]) -> None:
    """Check so many cases, the same ones each time."""
    settings(
        max_examples=number,
        derandomize=True,
        deadline=None,
        database=None,
        suppress_health_check=list(HealthCheck),
    )(given(**inputs)(check))()


def refused(work: Callable[[], Any], told: str = "") -> Any:
    """What the work gives, or None where it says in a line what is wrong."""
    try:
        return work()
    except SystemExit as error:  # of the parser, which has told what it expected
        assert error.code == 2
    except (ValueError, OSError) as error:
        line = find_mistake(error)
        assert line and told in line
    return None


# Configs ----------------------------------------------------------------------------------------


def places(value: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Where the entries of nested dicts and lists lie."""
    entries = value.items() if isinstance(value, dict) else enumerate(value)
    for key, entry in entries:
        yield (*path, key)
        if isinstance(entry, dict | list):
            yield from places(entry, (*path, key))


def replace(value: Any, path: tuple[Any, ...], other: Any) -> Any:
    changed = copy.deepcopy(value)
    place = changed
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = other
    return changed


OTHER = st.sampled_from([None, "", "x", "a.b.C", -1, 0, 1.5, math.nan, [], {}, True, [1, "x"]])


@CASES
def test_configs(tiny_janus, tmp_path, cases, capsys):
    whole = settings_of(tiny_janus, tmp_path)
    folder, config = tmp_path / "run", tmp_path / "broken.yaml"
    model = [path.read_bytes() for path in sorted(tiny_janus.iterdir())]

    def check(place: tuple[Any, ...], other: Any, cut: int | None) -> None:
        text = yaml.safe_dump(replace(whole, place, other))
        config.write_text(text if cut is None else text[: cut % len(text)])
        shutil.rmtree(folder, ignore_errors=True)
        where = ["--trainer.default_root_dir", str(folder), "--trainer.max_steps", "1"]
        refused(lambda: main(["fit", "--config", str(config), *where]))
        assert [path.read_bytes() for path in sorted(tiny_janus.iterdir())] == model

    cut = st.none() | st.integers(0, 10_000)
    break_in(cases, check, place=st.sampled_from(list(places(whole))), other=OTHER, cut=cut)
    capsys.readouterr()


# Prompt files -----------------------------------------------------------------------------------

LINES = {
    "text": "a red circle",
    "jsonl": '{"prompt": "a red circle", "category": "color", "generation_text": "x"}',
    "geneval": '{"tag": "counting", "include": [{"class": "cat", "count": 2}], "prompt": "cats"}',
    "t2i_compbench": "a red circle",
    "t2i_r1": '{"prompt": "cats", "task_type": "x", "nouns": ["cat"], "numeracy_info": []}',
    "flow_grpo": '{"prompt": "cats", "include": [{"class": "cat", "count": 2}], "tag": "x"}',
}


@CASES
def test_prompt_files(tmp_path, cases):
    path = tmp_path / "color_train.txt"

    def check(kind: Format, column: str, value: Any, junk: bytes, cut: int) -> None:
        line = LINES[kind]
        if line.startswith("{"):
            line = json.dumps(json.loads(line) | {column: value})
        content = f"{LINES[kind]}\n{line}\n".encode()
        path.write_bytes(content[: len(content) - cut % len(content)] + junk)
        before = path.read_bytes()
        prompts = refused(lambda: read_prompts(PromptFile(str(path), kind)), told=str(path))
        assert prompts is None or all(prompt.text.strip() for prompt in prompts)
        assert path.read_bytes() == before

    columns = st.sampled_from(["prompt", "tag", "include", "category", "task_type", "nouns"])
    kinds = st.sampled_from(list(LINES))
    cuts = st.integers(0, 30)
    junk = st.binary(max_size=6)
    break_in(cases, check, kind=kinds, column=columns, value=JSON, junk=junk, cut=cuts)


# Pair shards ------------------------------------------------------------------------------------

KEY = {"reference": "abc", "guidance": 2.0}


def contents(folder: Path) -> list[Any]:
    """All that training reads of a pair set."""
    pairs = PairSet(folder)
    pairs.check_fits(SimpleNamespace(num_tokens=4, codebook_size=32))
    batch = pairs.batch(range(len(pairs)))
    texts = [prompt.text for prompt in batch.prompts]
    stored = load_reference(folder, KEY)
    return [texts, batch.chosen, batch.rejected, batch.scores, stored]


@CASES
def test_pair_shards(tmp_path, cases):
    whole = write_pairs(tmp_path / "whole", 6)
    save_reference(whole.folder, torch.rand(6, 2), KEY)
    expected = contents(whole.folder)
    shutil.rmtree(whole.folder / ".reading")
    names = [str(p.relative_to(whole.folder)) for p in whole.folder.rglob("*") if p.is_file()]
    good = {name: (whole.folder / name).read_bytes() for name in names}
    folder = tmp_path / "broken"

    def check(name: str, cut: int, junk: bytes | None) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(whole.folder, folder)
        broken = good[name][: cut % len(good[name])] + (junk or b"")
        (folder / name).write_bytes(broken)
        found = refused(lambda: contents(folder), told=str(folder))
        if found is not None:
            assert name in ("settings.json", "counts/00000.json") or not junk
            assert_same(found, expected)
        assert (folder / name).read_bytes() == broken
        for other in set(names) - {name}:
            assert (folder / other).read_bytes() == good[other]

    cuts = st.integers(0, 100_000)
    break_in(
        cases, check, name=st.sampled_from(sorted(names)), cut=cuts, junk=st.none() | st.binary()
    )


# Checkpoints ------------------------------------------------------------------------------------


@CASES
def test_checkpoints(tmp_path, cases):
    state = {
        "state_dict": {"policy.a": torch.arange(600.0), "policy.b": torch.ones(3)},
        "progress": {"rollouts": 2, "images_sampled": 16},
        "optimizer_states": [{"state": {0: {"step": torch.tensor(3.0)}}}],
    }
    older, last = tmp_path / "best.ckpt", tmp_path / "last.ckpt"
    for path in (older, last):
        WholeCheckpoints().save_checkpoint(state, path)
    whole = last.read_bytes()

    def check(cut: int | None, place: int, change: int) -> None:
        broken = bytearray(whole)
        broken[place % len(whole)] ^= change
        last.write_bytes(bytes(broken) if cut is None else whole[: cut % len(whole)])
        content = refused(lambda: WholeCheckpoints().load_checkpoint(last), told=str(last))
        if content is not None:
            assert_same(content, state)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("warnings.warn", lambda *args, **kwargs: None)
            found = newest_good([tmp_path])
        assert found == (last if content is not None else older)
        assert older.read_bytes() == whole

    cuts = st.none() | st.integers(0, 100_000)
    places_of_change = st.integers(0, 100_000)
    break_in(cases, check, cut=cuts, place=places_of_change, change=st.integers(1, 255))


# Reward answers ---------------------------------------------------------------------------------


def reply_with(message: Any, logprobs: Any) -> bytes:
    choice = {"message": message, "logprobs": logprobs, "finish_reason": "stop"}
    return json.dumps({"choices": [choice]}).encode()


ANSWERS = st.one_of(
    st.binary(max_size=60),
    JSON.map(lambda value: json.dumps(value).encode()),
    st.builds(reply_with, JSON, JSON),
    st.builds(
        lambda text, number: reply_with({"content": f"{text}Final Score: {number}{text}"}, None),
        st.text(max_size=5),
        st.floats() | st.integers() | st.text(max_size=5),
    ),
    st.builds(
        lambda tokens: reply_with({"content": "yes"}, {"content": [{"top_logprobs": tokens}]}),
        st.lists(st.fixed_dictionaries({"token": JSON, "logprob": JSON}), max_size=3) | JSON,
    ),
)


@CASES
def test_reward_answers(monkeypatch, cases):
    prompts = [Prompt("a red circle")]
    images = torch.zeros(1, 3, 4, 4)

    def check(status: int, wait: str, answer: bytes, reading: Any) -> None:
        reward = RemoteReward(
            "http://localhost:1/v1", "judge", "{prompt}?", reading, retries=1, backoff_s=0.0
        )
        told = (status, {"Retry-After": wait}, answer)
        reward._server._send = lambda method, path, body: told  # type: ignore[method-assign]
        scores = reward.score(images, prompts)
        lowest, highest = (1.0, 5.0) if reading == "number" else (0.0, 1.0)
        value = scores.total.item()
        assert lowest <= value <= highest or (math.isnan(value) and scores.details[0]["failure"])
        refused(reward.load, told="reward remote")

    statuses = st.sampled_from([200, 200, 200, 204, 302, 400, 429, 500, 599])
    waits = st.sampled_from(["", "0", "x", "-1", "99999"])
    readings = st.sampled_from(["number", "yes_probability"])
    break_in(cases, check, status=statuses, wait=waits, answer=ANSWERS, reading=readings)
