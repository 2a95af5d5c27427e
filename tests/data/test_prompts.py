"""Prompts as a module gets them: order, weights, processes, resumed runs, and our own files."""

import json
import os
from collections import Counter
from itertools import chain, islice, pairwise
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentError, ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cotgen_pl.data.prompts import (
    PromptData,
    PromptFile,
    PromptStream,
    check_facts,
    check_scorable,
    draw_passes,
    read_prompts,
)
from cotgen_pl.interfaces import Prompt, Reward
from cotgen_pl.leaks import find_leaks
from cotgen_pl.modules.sft import SFTModule

CATEGORIES = ("color", "shape", "texture", "spatial", "numeracy", "complex", "scene")


def numbered(size: int) -> list[Prompt]:
    return [Prompt(f"prompt {i}") for i in range(size)]


def write(path: Path, prompts: list[str]) -> PromptFile:
    path.write_text("\n".join(prompts), encoding="utf-8")
    return PromptFile(str(path), "text")


# Facts and leaks --------------------------------------------------------------------------------


def test_missing_fact_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    rows = [{"prompt": "p", "nouns": [], "count": 0}, {"prompt": "q", "nouns": [], "count": None}]
    path.write_text("\n".join(json.dumps(row) for row in rows))
    prompts = read_prompts(PromptFile(str(path), "jsonl"))
    check_facts(prompts, ["nouns"], "judge")
    check_facts(prompts[:1], ["nouns", "count"], "judge")
    message = (
        f"{path}:2: expected the facts \\['nouns', 'count'\\] for reward judge, got \\['nouns'\\] "
        r"without \['count'\]; add them to the file"
    )
    with pytest.raises(ValueError, match=message):
        check_facts(prompts, ["nouns", "count"], "judge")


class Needing(Reward):
    """Needs the named facts and never scores."""

    def __init__(self, *facts: str) -> None:
        super().__init__()
        self.required_facts = facts

    def score(self, images, prompts):
        raise AssertionError("nothing is scored here")


class Reader(Reward):
    """Reads into the fact `objects`: each must have a shape."""

    required_facts = ("objects",)

    def check_prompt(self, prompt):
        if any("shape" not in item for item in prompt.facts["objects"]):
            raise ValueError("expected a shape, got none")

    def score(self, images, prompts):
        raise AssertionError("nothing is scored here")


def test_what_is_missing_inside_a_fact_is_named_with_file_and_line(tmp_path):
    path = tmp_path / "a.jsonl"
    objects = [[{"shape": "circle"}], [{"shape": "circle"}, {"color": "red"}]]
    path.write_text("\n".join(json.dumps({"prompt": "p", "objects": item}) for item in objects))
    prompts = read_prompts(PromptFile(str(path), "jsonl"))
    check_scorable(prompts[:1], Reader())
    with pytest.raises(ValueError, match=f"^{path}:2: expected a shape, got none$"):
        check_scorable(prompts, Reader())
    with pytest.raises(ValueError, match=r"^prompt 1: expected the facts \['objects'\]"):
        check_scorable([prompts[0], Prompt("q")], Reader())


def test_missing_fact_of_a_prompt_that_no_file_holds():
    with pytest.raises(ValueError, match=r"^prompt 1: expected the facts \['x'\] for reward r"):
        check_facts([Prompt("p", facts={"x": 1}), Prompt("q")], ["x"], "r")


# Order ------------------------------------------------------------------------------------------


def test_each_pass_has_every_prompt_once_in_another_order():
    passes = list(islice(draw_passes([1.0] * 50, seed=0), 4))
    for number, draws in enumerate(passes):
        assert sorted(draws) == [(index, number) for index in range(50)]
    assert len({tuple(index for index, _ in draws) for draws in passes}) == 4
    assert passes == list(islice(draw_passes([1.0] * 50, seed=0), 4))
    assert passes[0] != next(draw_passes([1.0] * 50, seed=1))


def test_weight_two_draws_twice_per_pass_and_never_a_pair_again():
    draws = [draw for draws in islice(draw_passes([1.0, 2.0], seed=0), 3) for draw in draws]
    assert sorted(draws) == [(0, 0), (0, 1), (0, 2), *[(1, occurrence) for occurrence in range(6)]]


def test_fractional_weight_draws_an_even_share_of_each_file_per_pass():
    weights = [0.3] * 100 + [1.5] * 100
    passes = list(islice(draw_passes(weights, seed=0), 10))
    for draws in passes:
        small = [index for index, _ in draws if index < 100]
        assert abs(len(small) - 30) <= 2
        assert abs(len([index for index in small if index < 50]) - 15) <= 2
        assert abs(len(draws) - len(small) - 150) <= 2
    totals = Counter(index for draws in passes for index, _ in draws)
    assert [totals[index] for index in range(200)] == [3] * 100 + [15] * 100
    assert len({draw for draws in passes for draw in draws}) == sum(totals.values())


def stream(size: int = 10, **settings) -> PromptStream:
    settings = {"prompts_per_batch": 4, "num_batches": 6, **settings}
    return PromptStream(numbered(size), [1.0] * size, **settings)


def test_stream_lays_passes_end_to_end():
    batches = list(stream())
    assert [len(batch) for batch in batches] == [4] * 6
    draws = [(prompt.index, prompt.occurrence) for batch in batches for prompt in batch]
    expected = [draw for draws in islice(draw_passes([1.0] * 10, seed=0), 3) for draw in draws]
    assert draws == expected[:24]
    assert all(prompt.text == f"prompt {prompt.index}" for batch in batches for prompt in batch)


def test_stream_leaves_the_data_set_as_it_is():
    prompts = numbered(4)
    source = PromptStream(prompts, [1.0] * 4, prompts_per_batch=2, num_batches=6)
    assert len(list(source)) == 6
    assert prompts == numbered(4)


@pytest.mark.parametrize(("num_batches", "ends"), [(6, [2, 4, 6]), (7, [3, 5, 7]), (4, [2, 3, 4])])
def test_parts_have_prompts_of_their_own(num_batches, ends):
    settings = {"prompts_per_batch": 4, "num_batches": num_batches, "parts": 3}
    whole = list(PromptStream(numbered(7), [1.0, 0.5] * 3 + [2.0], **settings))
    assert len(whole) == num_batches
    for part, (first, end) in enumerate(pairwise([0, *ends])):
        drawn = [prompt.index for batch in whole[first:end] for prompt in batch]
        assert {index % 3 for index in drawn} == {part}
    keys = [(prompt.index, prompt.occurrence) for batch in whole for prompt in batch]
    assert len(set(keys)) == len(keys)
    later = PromptStream(numbered(7), [1.0, 0.5] * 3 + [2.0], **settings, start=3)
    assert list(later) == whole[3:]


@pytest.mark.parametrize("start", [0, 1, 5, 6])
def test_stream_from_a_later_batch_is_the_rest_of_the_whole(start):
    part = stream(start=start)
    assert list(part) == list(stream())[start:]
    assert len(part) == 6


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_union_over_processes_does_not_depend_on_their_number(world_size):
    shares = [list(stream(rank=rank, world_size=world_size)) for rank in range(world_size)]
    union = [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    assert union == list(stream())


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"world_size": 3}, "4 prompts per batch do not split over 3 processes; set images_per_up"),
        ({"num_batches": 0}, "at least one batch of at least one prompt, got 0 batches of 4; rai"),
        ({"prompts_per_batch": 0}, "got 6 batches of 0; raise images_budget or images_per_update"),
    ],
)
def test_stream_refuses_impossible_batches(settings, message):
    with pytest.raises(ValueError, match=message):
        stream(**settings)


# Data module ------------------------------------------------------------------------------------


def test_prompts_of_several_files_are_numbered_through(tmp_path):
    first = write(tmp_path / "a.txt", ["p", "q", "r"])
    second = write(tmp_path / "b.txt", ["s", "t", "u"])
    second.weight = 0.5
    data = PromptData([first, second], limit=2)
    assert [(prompt.index, prompt.text) for prompt in data.prompts] == [
        (0, "p"),
        (1, "q"),
        (2, "s"),
        (3, "t"),
    ]
    assert data.weights == [1.0, 1.0, 0.5, 0.5]


def test_malformed_file_is_refused_at_construction(tmp_path):
    file = PromptFile(str(write(tmp_path / "a.jsonl", ["no object"]).path), "jsonl")
    good = write(tmp_path / "a.txt", ["p"])
    with pytest.raises(ValueError, match=r"a.jsonl:1: expected a JSON object"):
        PromptData([file])
    with pytest.raises(ValueError, match=r"a.jsonl:1: expected a JSON object"):
        PromptData([good], predict_files=[file])


def test_no_files_and_a_limit_below_one_are_refused(tmp_path):
    with pytest.raises(ValueError, match="files: expected at least one prompt file, got none; na"):
        PromptData([])
    with pytest.raises(ValueError, match="limit: expected at least 1 prompt of each file, got 0"):
        PromptData([write(tmp_path / "a.txt", ["p"])], limit=0)


def test_prediction_takes_its_own_files_in_order(tmp_path):
    first = write(tmp_path / "a.txt", ["p", "q", "r"])
    second = write(tmp_path / "b.txt", ["s", "t"])
    drawn = PromptData([first]).predict_prompts
    assert [(p.index, p.text) for p in drawn] == [(0, "p"), (1, "q"), (2, "r")]
    drawn = PromptData([first], predict_files=[second]).predict_prompts
    assert [(p.index, p.text) for p in drawn] == [(0, "s"), (1, "t")]


def test_loader_gives_the_share_of_its_process(tmp_path):
    data = PromptData([write(tmp_path / "a.txt", [f"prompt {i}" for i in range(10)])], seed=3)

    def texts(rank: int, world_size: int) -> list[list[str]]:
        data.trainer = SimpleNamespace(
            lightning_module=SimpleNamespace(
                prompts_per_batch=4,
                num_rollouts=6,
                reward=Needing(),
                policy=SimpleNamespace(check_prompts=lambda prompts: None),
            ),
            fit_loop=Trainer(logger=False, enable_checkpointing=False).fit_loop,
            global_rank=rank,
            world_size=world_size,
            max_epochs=1,
        )
        data.setup("fit")
        return [[prompt.text for prompt in batch] for batch in data.train_dataloader()]

    whole = texts(0, 1)
    assert [first + second for first, second in zip(texts(0, 2), texts(1, 2), strict=True)] == whole
    assert whole == [[prompt.text for prompt in batch] for batch in stream(seed=3)]
    with pytest.raises(ValueError, match="4 prompts per batch do not split over 3 processes"):
        texts(0, 3)


def test_yaml_builds_the_files(tmp_path, monkeypatch):
    write(tmp_path / "a.txt", ["p", "q"])
    config = """
data:
  class_path: cotgen_pl.data.prompts.PromptData
  init_args:
    limit: 1
    files: [{path: a.txt, format: text, category: color, weight: 2}]
"""
    monkeypatch.chdir(tmp_path)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_string(config)).data
    assert isinstance(data, PromptData)
    assert [(prompt.text, prompt.category) for prompt in data.prompts] == [("p", "color")]
    assert data.weights == [2.0]
    with pytest.raises(ArgumentError, match=r"Expected a typing.Literal\['text'.* Got value: csv"):
        parser.parse_string(config.replace("format: text", "format: csv"))
    with pytest.raises(ArgumentError, match="Option 'wieght' is not accepted"):
        parser.parse_string(config.replace("weight", "wieght"))


# Resumed runs -----------------------------------------------------------------------------------


class Recorder(LightningModule):
    """Remembers the batches that it finished; two optimizer steps each, as GRPO may take."""

    prompts_per_batch = 3
    num_rollouts = 7

    def __init__(self, breaks_in: int | None = None, required_facts: tuple[str, ...] = ()) -> None:
        super().__init__()
        self.reward = Needing(*required_facts)
        self.policy = SimpleNamespace(check_prompts=lambda prompts: None)
        self.automatic_optimization = False
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.breaks_in = breaks_in
        self.batches: list[list[tuple]] = []

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch: list[Prompt], batch_idx: int) -> None:
        for _ in range(2):
            self.optimizers().zero_grad()
            self.manual_backward(self.weight.sum())
            self.optimizers().step()
        if self.breaks_in == batch_idx:
            raise RuntimeError("interrupted")
        self.batches.append([(p.text, p.index, p.occurrence, p.facts["_origin"]) for p in batch])


@pytest.fixture
def prompt_file(tmp_path) -> PromptFile:
    return write(tmp_path / "prompts.txt", [f"prompt {i}" for i in range(8)])


def fit(
    module: Recorder,
    file: PromptFile,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    **settings,
) -> list[list[tuple]]:
    trainer = Trainer(
        **{"max_epochs": 1, **settings},
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=bool(callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=PromptData([file], seed=1), ckpt_path=checkpoint)
    return module.batches


def every_batch(folder: Path) -> ModelCheckpoint:
    """Writes `<optimizer steps>.ckpt` after each batch."""
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=2, save_top_k=-1)


def test_run_of_one_epoch_sees_all_its_batches(prompt_file):
    batches = fit(Recorder(), prompt_file)
    assert [len(batch) for batch in batches] == [3] * 7
    assert len({draw for batch in batches for draw in batch}) == 21


@pytest.mark.parametrize("finished", [1, 3, 6, 7])
def test_resumed_run_sees_exactly_the_remaining_batches(prompt_file, tmp_path, finished):
    whole = fit(Recorder(), prompt_file, every_batch(tmp_path / "run"))
    checkpoint = tmp_path / "run" / f"step={2 * finished}.ckpt"
    assert fit(Recorder(), prompt_file, checkpoint=checkpoint) == whole[finished:]


def test_run_may_be_resumed_again_and_again(prompt_file, tmp_path):
    whole = fit(Recorder(), prompt_file)
    seen: list[list[tuple]] = []
    checkpoint = None
    for part, finished in enumerate((2, 3, 7)):
        folder = tmp_path / f"part {part}"
        seen += fit(
            Recorder(),
            prompt_file,
            every_batch(folder),
            checkpoint=checkpoint,
            max_steps=2 * finished,
        )
        checkpoint = folder / f"step={2 * finished}.ckpt"
    assert seen == whole


def test_interrupted_batch_is_drawn_again(prompt_file, tmp_path):
    whole = fit(Recorder(), prompt_file)
    broken = Recorder(breaks_in=4)
    on_exception = ModelCheckpoint(tmp_path / "run", save_on_exception=True)
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(broken, prompt_file, on_exception)
    [checkpoint] = (tmp_path / "run").glob("*.ckpt")
    assert broken.batches == whole[:4]
    assert fit(Recorder(), prompt_file, checkpoint=checkpoint) == whole[4:]


def test_run_of_several_epochs_is_refused(prompt_file):
    with pytest.raises(ValueError, match=r"trainer.max_epochs: expected 1, .*got 2; set it to 1"):
        fit(Recorder(), prompt_file, max_epochs=2)


def test_reward_that_needs_other_prompts_is_refused_before_weights_load(prompt_file, monkeypatch):
    monkeypatch.setattr(
        Recorder, "configure_model", lambda self: pytest.fail("weights were loaded")
    )
    message = r"prompts.txt:1: expected the facts \['nouns'\] for reward Needing, got \[\]"
    with pytest.raises(ValueError, match=message):
        fit(Recorder(required_facts=("nouns",)), prompt_file)


class Strict(Recorder):
    """Refuses one prompt."""

    def __init__(self) -> None:
        super().__init__()
        self.policy = SimpleNamespace(check_prompts=self.refuse)

    def refuse(self, prompts: list[str]) -> None:
        if "prompt 7" in prompts:
            raise ValueError("too long")

    def configure_model(self) -> None:
        pytest.fail("weights were loaded")

    def predict_step(self, batch, batch_idx):
        pytest.fail("prompts were drawn")


def test_prompt_that_cannot_be_drawn_is_refused_before_weights_load(prompt_file):
    with pytest.raises(ValueError, match="too long"):
        fit(Strict(), prompt_file)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    with pytest.raises(ValueError, match="too long"):
        trainer.predict(Strict(), PromptData([prompt_file]))


def test_module_that_learns_from_pictures_is_refused_before_weights_load(prompt_file, monkeypatch):
    module = SFTModule(None)
    monkeypatch.setattr(SFTModule, "configure_model", lambda self: pytest.fail("weights"))
    message = "expected a module that draws .* beside PromptData, got SFTModule, .*use PictureData"
    with pytest.raises(ValueError, match=message):
        fit(module, prompt_file)


# Our own files ----------------------------------------------------------------------------------


@pytest.fixture
def starter(repository) -> dict[str, list[Prompt]]:
    folder = repository / "configs" / "data"
    return {
        name: read_prompts(PromptFile(str(folder / f"{name}.jsonl"), "jsonl"))
        for name in ("starter_prompts", "starter_prompts_heldout")
    }


def test_starter_prompts_are_many_and_balanced(starter):
    for name, size in (("starter_prompts", 30), ("starter_prompts_heldout", 8)):
        categories = Counter(prompt.category for prompt in starter[name])
        assert categories == dict.fromkeys(CATEGORIES, size)


def test_starter_prompts_are_distinct_and_do_not_leak(starter):
    train, held_out = starter.values()
    for prompts in (train, held_out):
        assert find_leaks(prompts, prompts) == [(prompt, prompt) for prompt in prompts]
    assert find_leaks(train, held_out) == []


def test_starter_prompts_are_in_no_benchmark(starter, repository):
    folder = Path(os.environ.get("COTGEN_DATA", repository.parent / "shared" / "data"))
    if not folder.is_dir():
        pytest.skip(f"no official prompt files at {folder}; set COTGEN_DATA to their folder")
    files = [PromptFile(str(path), "t2i_compbench") for path in folder.glob("t2i_*/*_[tv]*.txt")]
    files.append(PromptFile(str(folder / "geneval" / "evaluation_metadata.jsonl"), "geneval"))
    files.append(PromptFile(str(folder / "t2i_r1" / "geneval_and_t2i_data_final.json"), "t2i_r1"))
    assert len(files) == 24
    official = [prompt for file in files for prompt in read_prompts(file)]
    for prompts in starter.values():
        assert find_leaks(official, prompts) == []


@pytest.mark.parametrize(
    ("name", "sizes"), [("starter.yaml", (210, 56)), ("shapes.yaml", (1536, 1536))]
)
def test_data_pieces_build(repository, monkeypatch, name, sizes):
    monkeypatch.chdir(repository)
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    config = parser.parse_args([f"--data=configs/data/{name}"])
    data = parser.instantiate_classes(config).data
    assert (len(data.prompts), len(data.predict_prompts)) == sizes
