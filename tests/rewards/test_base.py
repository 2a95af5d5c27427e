"""ModelReward: where a scorer's network lives, in which dtype, in which batches; and Kept."""

import pytest
import torch
from torch import nn

from cotgen_pl.interfaces import Prompt, Scores
from cotgen_pl.rewards import base
from cotgen_pl.rewards.base import Kept, ModelReward

PROMPTS = [Prompt("a" * i) for i in range(1, 6)]


class Recorder(nn.Module):
    """A network that notes what it is moved to, and stays on the CPU in truth."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.tensor([1.0, 2.0, 4.0]) / 3)
        self.moves: list[torch.dtype | torch.device | str] = []

    def to(self, where):
        self.moves.append(where)
        return super().to(where) if isinstance(where, torch.dtype) else self


class Weighted(ModelReward):
    """The weighted mean colour plus the text's length."""

    def __init__(self, **residence) -> None:
        super().__init__("weighted", **residence)
        self.reads, self.batches = 0, []

    def read(self):
        self.reads += 1
        self.default_dtype = torch.get_default_dtype()
        return Recorder()

    def score_batch(self, images, prompts):
        self.batches.append((tuple(images.shape), images.dtype, torch.is_autocast_enabled("cpu")))
        colours = images.mean(dim=(2, 3)).to(self.torch_dtype)
        lengths = torch.tensor([len(prompt.text) for prompt in prompts])
        return Scores.single(self.name, colours @ self.network.weight + lengths)


@pytest.fixture
def images():
    return torch.rand(5, 3, 4, 6, generator=torch.Generator().manual_seed(0))


def expected(images):
    return images.mean(dim=(2, 3)) @ (torch.tensor([1.0, 2.0, 4.0]) / 3) + torch.arange(1.0, 6.0)


def test_pictures_are_scored_in_batches_and_in_order(images):
    reward = Weighted(batch_size=2).load()
    torch.testing.assert_close(reward.score(images, PROMPTS).total, expected(images))
    assert [shape[0] for shape, _, _ in reward.batches] == [2, 2, 1]


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_network_has_the_dtype_and_scores_are_float32(images, dtype):
    reward = Weighted(dtype=dtype).load()
    scores = reward.score(images.double(), PROMPTS)
    assert reward.network.weight.dtype == getattr(torch, dtype) == reward.torch_dtype
    assert scores.total.dtype == scores.parts["weighted"].dtype == torch.float32
    torch.testing.assert_close(scores.total, expected(images), atol=0.05, rtol=0)
    assert reward.batches[0][1] == torch.float32  # pictures come in full precision


def test_autocast_is_off_and_no_gradient_kept(images):
    reward = Weighted().load()
    with torch.autocast("cpu", torch.bfloat16):
        total = reward.score(images.requires_grad_(), PROMPTS).total
    assert reward.batches == [((5, 3, 4, 6), torch.float32, False)]
    assert not total.requires_grad and not reward.network.weight.requires_grad
    assert not reward.network.training


def test_weights_are_read_in_float32_whatever_the_trainer_has_set():
    torch.set_default_dtype(torch.bfloat16)
    try:
        reward = Weighted().load()
        assert torch.get_default_dtype() == torch.bfloat16
    finally:
        torch.set_default_dtype(torch.float32)
    assert reward.default_dtype == torch.float32 == reward.network.weight.dtype


def test_the_network_belongs_to_no_module(images):
    reward = Weighted()
    trainer = nn.ModuleDict({"policy": nn.Linear(2, 2), "reward": reward})
    reward.load()
    total = reward.score(images, PROMPTS).total
    assert list(trainer.state_dict()) == ["policy.weight", "policy.bias"]
    assert len(list(trainer.parameters())) == 2 and len(list(reward.modules())) == 1
    trainer.to(torch.float64).train()
    assert reward.network.weight.dtype == torch.float32 and not reward.network.training
    assert torch.equal(reward.score(images, PROMPTS).total, total)


@pytest.mark.parametrize("offload", [True, False])
def test_the_network_follows_the_pictures_and_offload_takes_it_back(images, offload):
    reward = Weighted(offload=offload).load()
    moves = reward.network.moves
    assert moves == [torch.float32]  # to the CPU, as read
    reward.score(images, PROMPTS)
    assert moves[1:] == [torch.device("cpu"), *(["cpu"] if offload else [])]


@pytest.mark.parametrize("offload", [True, False])
def test_a_named_device_comes_first_and_offload_holds_after_a_failure(images, offload):
    reward = Weighted(device="cuda:63", offload=offload).load()
    with pytest.raises((AssertionError, RuntimeError)):  # there is no 64th GPU for the pictures
        reward.score(images, PROMPTS)
    assert reward.network.moves[1:] == [torch.device("cuda:63"), *(["cpu"] if offload else [])]


def test_grey_and_transparent_pictures_arrive_as_rgb(images):
    reward = Weighted().load()
    alpha = torch.cat([images, images[:, :1]], dim=1)
    torch.testing.assert_close(reward.score(alpha, PROMPTS).total, expected(images))
    grey = reward.score(images[:, :1], PROMPTS).total
    torch.testing.assert_close(grey, expected(images[:, :1].expand(-1, 3, -1, -1)))


@pytest.mark.parametrize("shape", [(4, 3, 4, 6), (3, 4, 6)])
def test_one_picture_per_prompt_is_demanded(shape):
    with pytest.raises(ValueError, match=r"reward weighted: expected pictures \[5, 3, H, W\]"):
        Weighted().load().score(torch.zeros(shape), PROMPTS)


def test_weights_are_read_once_and_not_before_load(images):
    reward = Weighted()
    with pytest.raises(ValueError, match=r"reward weighted: its weights are not loaded; call load"):
        reward.score(images, PROMPTS)
    assert reward.reads == 0
    assert reward.load() is reward and reward.load() is reward
    assert reward.reads == 1


@pytest.mark.parametrize(
    ("residence", "message"),
    [
        ({"device": "gpu"}, "expected device like cpu, cuda or cuda:1, got 'gpu'"),
        ({"device": "cuda:x"}, "expected device like cpu, cuda or cuda:1, got 'cuda:x'"),
        ({"dtype": "int8"}, r"expected dtype to be one of \('float32', .* got 'int8'"),
        ({"batch_size": 0}, "expected batch_size of 1 or more, got 0"),
    ],
)
def test_nonsense_is_refused(residence, message):
    with pytest.raises(ValueError, match=message):
        Weighted(**residence)


def test_a_kept_result_is_computed_once():
    kept, computed = Kept(), []

    def compute(text):
        computed.append(text)
        return len(text)

    assert [kept.get_or_compute(text, compute) for text in ("ab", "c", "ab", "ab")] == [2, 1, 2, 2]
    assert computed == ["ab", "c"]


def test_the_oldest_kept_result_goes_first(monkeypatch):
    monkeypatch.setattr(base, "MAX_KEPT", 2)
    kept = Kept()
    for text in ("a", "b", "a", "c"):
        kept.get_or_compute(text, str.upper)
    assert dict(kept) == {"b": "B", "c": "C"}


def test_a_failed_computation_takes_no_place(monkeypatch):
    monkeypatch.setattr(base, "MAX_KEPT", 1)
    kept = Kept(a="A")
    with pytest.raises(ZeroDivisionError):
        kept.get_or_compute("b", lambda text: 1 // 0)
    assert dict(kept) == {"a": "A"}
