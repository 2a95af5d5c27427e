"""Pairs as a module gets them: order, processes, several sets, resumed runs, refusals."""

from itertools import chain
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from jsonargparse import ArgumentParser
from lightning.pytorch import LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import Callback, ModelCheckpoint

from cotgen_pl.data.pairs import PairData, PairStream, draw_order
from cotgen_pl.pairs.sets import PairSet
from tests.toys import make_grpo, write_pairs

NUM_PAIRS, PER_UPDATE, EPOCHS = 11, 3, 3  # 3 updates per pass, two pairs left over


class ToyPolicy(SimpleNamespace):
    """What `PairData` asks a policy for before weights load."""

    def __init__(self, num_tokens: int = 4, refused: str = "") -> None:
        super().__init__(num_tokens=num_tokens, codebook_size=32, refused=refused)

    def check_prompts(self, texts: list[str]) -> None:
        if self.refused in texts:
            raise ValueError(f"{self.refused} is too long")


class Recorder(LightningModule):
    """Remembers the rows of the batches that it finished."""

    learns_from_pairs = True

    def __init__(self, policy: ToyPolicy | None = None, breaks_in: int | None = None) -> None:
        super().__init__()
        self.policy = policy or ToyPolicy()
        self.weight = torch.nn.Parameter(torch.zeros(1))
        self.breaks_in = breaks_in
        self.batches: list[list[int]] = []
        self.taken_up: list[tuple[int, str, int]] = []
        self.images_sampled = self.images_drawn = 0

    def setup(self, stage):
        self.trainer.datamodule.check_ready()

    def take_up(self, pairs, batch_size):
        self.taken_up.append((len(self.batches), pairs.folder.name, batch_size))

    def count_drawn(self, images):
        self.images_drawn += images

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1)

    def training_step(self, batch, batch_idx):
        assert batch.prompts[0].text == f"prompt {batch.rows[0]}"
        if self.breaks_in == len(self.batches):
            raise RuntimeError("interrupted")
        self.batches.append(batch.rows.tolist())
        return self.weight.sum()


class NewSets(Callback):
    """Hands one set after another over, as rounds do, and notes when each is asked for."""

    def __init__(self, folders: list[Path]) -> None:
        self.folders, self.asked = folders, []

    def setup(self, trainer, pl_module, stage):
        data = trainer.datamodule
        data.take_rounds(lambda: self._sets(pl_module), len(self.folders), most_pairs=20)

    def _sets(self, module):
        for folder in self.folders:
            self.asked.append(len(module.batches))
            yield PairSet(folder)


@pytest.fixture
def folder(tmp_path) -> Path:
    return write_pairs(tmp_path / "set", NUM_PAIRS).folder


def fit(
    module: Recorder,
    data: LightningDataModule,
    *callbacks: Callback,
    checkpoint: Path | None = None,
    **settings,
) -> list[list[int]]:
    trainer = Trainer(
        **{"max_epochs": 1, **settings},
        accelerator="cpu",
        devices=1,
        logger=False,
        callbacks=list(callbacks),
        enable_checkpointing=any(isinstance(c, ModelCheckpoint) for c in callbacks),
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data, ckpt_path=checkpoint)
    return module.batches


def data_of(folder: Path, **settings) -> PairData:
    arguments = {"pairs_per_update": PER_UPDATE, "epochs": EPOCHS, "seed": 1} | settings
    return PairData(str(folder), **arguments)


def every_batch(folder: Path) -> ModelCheckpoint:
    return ModelCheckpoint(folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)


def expected_batches(epochs: int = EPOCHS) -> list[list[int]]:
    orders = [draw_order(NUM_PAIRS, 1, number) for number in range(epochs)]
    return [order[start : start + 3] for order in orders for start in (0, 3, 6)]


# Order ------------------------------------------------------------------------------------------


def test_each_pass_has_every_pair_once_in_another_order():
    orders = [draw_order(50, 0, number) for number in range(3)]
    assert all(sorted(order) == list(range(50)) for order in orders)
    assert len(set(map(tuple, orders))) == 3
    assert orders[1] == draw_order(50, 0, 1) != draw_order(50, 1, 1)


def stream_of(pairs: PairSet, **settings) -> PairStream:
    arguments = {"prepare": lambda pairs, fresh: None, "end": lambda: None, "num_sets": 1}
    arguments |= {"longest": 9, "pairs_per_batch": 4} | settings
    return PairStream(lambda: iter([pairs]), **arguments)


@pytest.mark.parametrize("world_size", [1, 2, 4])
def test_union_over_processes_does_not_depend_on_their_number(folder, world_size):
    pairs = PairSet(folder)
    streams = [
        stream_of(pairs, seed=5, epochs=2, rank=rank, world_size=world_size)
        for rank in range(world_size)
    ]
    shares = [[batch.rows.tolist() for batch in stream] for stream in streams]
    union = [list(chain.from_iterable(parts)) for parts in zip(*shares, strict=True)]
    orders = [draw_order(NUM_PAIRS, 5, number) for number in (0, 1)]
    assert union == [order[k : k + 4] for order in orders for k in (0, 4)]


def test_stream_from_a_later_batch_is_the_rest_of_the_run(folder):
    rest = stream_of(PairSet(folder), pairs_per_batch=2, epochs=2, start=8)
    order = draw_order(NUM_PAIRS, 0, 1)
    assert [batch.rows.tolist() for batch in rest] == [order[6:8], order[8:10]]


def test_a_pass_is_ordered_once(folder, monkeypatch):
    passes = []

    def count(num_pairs, seed, number):
        passes.append(number)
        return draw_order(num_pairs, seed, number)

    monkeypatch.setattr("cotgen_pl.data.pairs.draw_order", count)
    assert len(list(stream_of(PairSet(folder), pairs_per_batch=2, epochs=3, start=6))) == 9
    assert passes == [1, 2]


# In training ------------------------------------------------------------------------------------


def test_run_passes_over_the_set_as_often_as_asked(folder):
    module = Recorder()
    assert fit(module, data_of(folder)) == expected_batches()
    assert module.taken_up == [(0, "set", 3)]


@pytest.mark.parametrize("finished", range(1, 10))
def test_resumed_run_sees_exactly_the_remaining_batches(folder, tmp_path, finished):
    whole = fit(Recorder(), data_of(folder), every_batch(tmp_path / "run"))
    checkpoint = tmp_path / "run" / f"step={finished}.ckpt"
    assert fit(Recorder(), data_of(folder), checkpoint=checkpoint) == whole[finished:]


@pytest.mark.parametrize("first", [3, 4])
def test_run_may_be_resumed_again_and_again(folder, tmp_path, first):
    whole = fit(Recorder(), data_of(folder), every_batch(tmp_path / "first"))
    checkpoint = tmp_path / "first" / f"step={first}.ckpt"
    fit(Recorder(), data_of(folder), every_batch(tmp_path / "second"), checkpoint=checkpoint)
    for finished in range(first + 1, 10):
        checkpoint = tmp_path / "second" / f"step={finished}.ckpt"
        assert fit(Recorder(), data_of(folder), checkpoint=checkpoint) == whole[finished:]


@pytest.mark.parametrize("breaks_in", [1, 3, 5])
def test_interrupted_batch_is_seen_again(folder, tmp_path, breaks_in):
    broken = Recorder(breaks_in=breaks_in)
    on_exception = ModelCheckpoint(
        tmp_path / "run", save_on_exception=True, save_on_train_epoch_end=False
    )
    with pytest.raises(RuntimeError, match="interrupted"):
        fit(broken, data_of(folder), on_exception)
    [checkpoint] = (tmp_path / "run").glob("*.ckpt")
    rest = fit(Recorder(), data_of(folder), checkpoint=checkpoint)
    assert broken.batches + rest == expected_batches()


def test_a_set_is_asked_for_when_the_one_before_is_learnt(tmp_path):
    folders = [write_pairs(tmp_path / f"{n}", n).folder for n in (6, 12, 9)]
    module, sets = Recorder(), NewSets(folders)
    batches = fit(module, PairData(pairs_per_update=PER_UPDATE, epochs=2, seed=1), sets)
    assert sets.asked == [0, 4, 12]
    assert module.taken_up == [(0, "6", 3), (4, "12", 3), (12, "9", 3)]
    orders = [draw_order(n, 1, number) for number, n in enumerate((6, 6, 12, 12, 9, 9))]
    assert [row for batch in batches for row in batch] == list(chain(*orders))
    assert module.images_sampled == 2 * (6 + 12 + 9)


@pytest.mark.parametrize("finished", range(1, 10))
def test_resumed_run_over_new_sets_sees_exactly_the_remaining_batches(tmp_path, finished):
    folders = [write_pairs(tmp_path / f"{n}", n).folder for n in (6, 12, 9)]

    def run(*callbacks, **settings):
        data, module = PairData(pairs_per_update=PER_UPDATE, seed=1), Recorder()
        return fit(module, data, NewSets(folders), *callbacks, **settings), module.images_sampled

    whole, _ = run(every_batch(tmp_path / "run"))
    assert len(whole) == 9
    rest, images = run(checkpoint=tmp_path / "run" / f"step={finished}.ckpt")
    assert rest == whole[finished:]
    begun_later = [n for n, begin in ((12, 2), (9, 6)) if begin >= finished]
    assert images == 2 * sum(begun_later)


def test_yaml_builds_it(tmp_path):
    config = """
data:
  class_path: cotgen_pl.data.pairs.PairData
  init_args:
    source: {path: a.parquet, caption: text}
    pairs_per_update: 8
"""
    parser = ArgumentParser(exit_on_error=False)
    parser.add_subclass_arguments(LightningDataModule, "data")
    data = parser.instantiate_classes(parser.parse_string(config)).data
    assert isinstance(data, PairData) and data.source is not None
    assert data.source.columns == ["text", "jpg_0", "jpg_1", "label_0", "label_1"]


# Refusals, before weights load ------------------------------------------------------------------


@pytest.fixture
def no_weights(monkeypatch):
    monkeypatch.setattr(Recorder, "configure_model", lambda self: pytest.fail("weights loaded"))


def test_a_module_that_draws_is_refused(folder, tiny_janus, monkeypatch):
    module = make_grpo(tiny_janus)
    monkeypatch.setattr(type(module), "configure_model", lambda self: pytest.fail("weights"))
    message = "expected a module that learns from pairs beside PairData, got GRPOModule; use DPOMo"
    with pytest.raises(ValueError, match=message):
        fit(module, data_of(folder))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"pairs_per_update": 12}, "expected at least 12 pairs, .* got 11; lower pairs_per_update"),
    ],
)
def test_a_set_that_does_not_do_is_refused(no_weights, folder, settings, message):
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), data_of(folder, **settings))


def test_tokens_and_prompts_that_do_not_fit_the_policy_are_refused(no_weights, folder):
    with pytest.raises(ValueError, match="expected 5 tokens per picture, as the policy draws"):
        fit(Recorder(ToyPolicy(num_tokens=5)), data_of(folder))
    with pytest.raises(ValueError, match="prompt 10 is too long"):
        fit(Recorder(ToyPolicy(refused="prompt 10")), data_of(folder))


def test_epochs_of_the_trainer_are_refused(no_weights, folder):
    message = r"trainer.max_epochs: expected 1, because the whole run is one epoch, got 2; .*"
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), data_of(folder), max_epochs=2)


def test_accumulated_gradients_are_refused(no_weights, folder):
    message = r"accumulate_grad_batches: expected 1, .* got 2; set it to 1, .* by pairs_per_update"
    with pytest.raises(ValueError, match=message):
        fit(Recorder(), data_of(folder), accumulate_grad_batches=2)


def test_pairs_that_do_not_split_over_processes_are_refused(folder):
    data = data_of(folder, pairs_per_update=4)
    data.trainer = SimpleNamespace(lightning_module=Recorder(), world_size=3, max_epochs=1)
    with pytest.raises(ValueError, match="4 pairs per update do not split over 3 processes; set"):
        data.setup("fit")


def test_no_pairs_at_all_are_refused():
    with pytest.raises(ValueError, match="expected pairs to train on, got none; name a finished"):
        fit(Recorder(), PairData())


def test_two_places_for_pairs_are_refused():
    from cotgen_pl.data.foreign_pairs import ForeignPairs

    with pytest.raises(ValueError, match="expected path or source, got both, a and b; leave out"):
        PairData("a", ForeignPairs("b"))


@pytest.mark.parametrize("name", ["pairs_per_update", "epochs"])
def test_sizes_below_one_are_refused(name):
    with pytest.raises(ValueError, match=f"expected {name} of 1 or more, got 0"):
        PairData(**{name: 0})
