"""DPO: its reference, live and stored, its loss, its metrics, and what it refuses."""

import math
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.checkpoints import hash_weights
from cotgen_pl.data.pairs import PairData
from cotgen_pl.modules.dpo import DPOModule
from cotgen_pl.pairs.sets import PairSet
from cotgen_pl.policies.janus import JanusPolicy
from tests.toys import Snapshots, make_dpo, make_policy, make_trainer, write_pairs

NUM_PAIRS, PER_UPDATE = 8, 4
REFERENCES = ("live", "stored")
LORA = LoraSettings(rank=2, alpha=16)
TOLERANCE = {"live": 1e-6, "stored": 1e-4}


@pytest.fixture
def pairs(tmp_path) -> PairSet:
    return write_pairs(tmp_path / "set", NUM_PAIRS)


@pytest.fixture(params=["full", "lora"])
def policy(request, tiny_janus) -> JanusPolicy:
    return make_policy(tiny_janus, lora=LORA if request.param == "lora" else None)


def fit(module: DPOModule, pairs: PairSet, *callbacks: Any, **settings: Any) -> dict[int, Any]:
    """Four updates, two passes; returns what was logged."""
    arguments = {"pairs_per_update": PER_UPDATE, "epochs": 2}
    trainer = make_trainer(pairs.folder.parent / "run", *callbacks, **settings)
    trainer.fit(module, PairData(str(pairs.folder), **arguments))
    return trainer.logger.rows


def weights_of(module: DPOModule) -> dict[str, torch.Tensor]:
    return {name: values.clone() for name, values in module.state_dict().items()}


# The reference is the reference -----------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("precision", ["64-true", "bf16-mixed"])
def test_the_first_loss_is_ln_2_and_then_margins_open(
    tiny_janus, policy, pairs, reference, precision
):
    dtype = "float64" if precision == "64-true" else "float32"
    policy = make_policy(tiny_janus, lora=policy.lora, dtype=dtype)
    module = make_dpo(tiny_janus, policy=policy, reference_logps=reference)
    rows = fit(module, pairs, precision=precision)
    assert rows[1]["train/loss"] == pytest.approx(math.log(2), abs=TOLERANCE[reference])
    assert rows[1]["train/rewards/margins"] == pytest.approx(0, abs=TOLERANCE[reference])
    # Where policy and reference share their forward, both stay what they were in the first step.
    assert all(abs(rows[step]["train/rewards/margins"]) > 1e-3 for step in (2, 3, 4))
    assert rows[3]["train/rewards/margins"] > 0  # the second pass: these pairs have been learnt
    assert rows[3]["train/loss"] < math.log(2) - 1e-3


@pytest.mark.parametrize("reference", REFERENCES)
def test_the_reference_stays_what_the_policy_was(tiny_janus, policy, pairs, reference):
    module = make_dpo(tiny_janus, policy=policy, reference_logps=reference)
    fresh = make_policy(tiny_janus).load()  # adapters that have not learnt change nothing
    batch = pairs.batch(range(NUM_PAIRS))
    fit(module, pairs)
    expected = module._sums(fresh, batch)
    torch.testing.assert_close(module._reference_of(batch), expected.to(torch.float32), **close())
    assert torch.equal(module.reference_sums(pairs, NUM_PAIRS), expected)
    assert (module._sums(module.policy, batch) - expected).abs().min() > 1e-3


def test_adapters_that_have_not_learnt_do_not_make_another_reference(tiny_janus):
    """Their first factor is random, and new in each run."""
    hashes = []
    for _ in range(2):
        adapted = make_policy(tiny_janus, lora=LORA).load()
        hashes.append(hash_weights(adapted))
    assert hashes[0] == hashes[1]
    with torch.no_grad():
        learnt = next(p for name, p in adapted.named_parameters() if "lora_B" in name)
        learnt[0, 0] = 1e-3
    assert hash_weights(adapted) != hashes[1]


def close() -> dict[str, float]:
    return {"rtol": 0, "atol": 1e-5, "check_dtype": False}


def test_stored_and_live_references_train_alike(tiny_janus, policy, pairs):
    ends, rows = {}, {}
    for reference in (*REFERENCES, "read back"):
        torch.manual_seed(0)
        twin = make_policy(tiny_janus, lora=policy.lora).load()  # adapters begin at random
        kind = "live" if reference == "live" else "stored"
        module = make_dpo(tiny_janus, policy=twin, reference_logps=kind)
        rows[reference] = fit(module, pairs)
        ends[reference] = weights_of(module)
    start = make_dpo(tiny_janus, policy=policy)
    start.configure_model()
    for name, values in ends["live"].items():
        assert not torch.equal(values, start.state_dict()[name])
        # Sums of log-probs are stored in float32, which is all that they differ in.
        torch.testing.assert_close(ends["stored"][name], values, rtol=0, atol=1e-6)
        assert torch.equal(ends["stored"][name], ends["read back"][name])
    for step in (1, 2, 3, 4):
        stored, live = rows["stored"][step], rows["live"][step]
        assert stored["train/loss"] == pytest.approx(live["train/loss"], abs=1e-6)


def test_a_refreshed_reference_is_the_policy_of_now(tiny_janus, policy, pairs):
    module = make_dpo(tiny_janus, policy=policy, reference_logps="live")
    fit(module, pairs)
    module.refresh_reference()
    batch = pairs.batch(range(NUM_PAIRS))
    now = module._sums(module.policy, batch)
    assert torch.equal(module._reference_of(batch), now)
    with torch.no_grad():
        for parameter in module._trained().values():
            parameter.add_(0.05)
    assert torch.equal(module._reference_of(batch), now)
    assert torch.equal(module.reference_sums(pairs, NUM_PAIRS), now)
    assert (module._sums(module.policy, batch) - now).abs().min() > 1e-3


# Micro-batches ----------------------------------------------------------------------------------


@pytest.mark.parametrize("reference", REFERENCES)
@pytest.mark.parametrize("size", [1, 3])
def test_micro_batches_train_as_the_whole_batch_does(tiny_janus, policy, pairs, reference, size):
    ends, rows = [], []
    for micro_batch_size in (None, size):
        torch.manual_seed(0)
        twin = make_policy(tiny_janus, lora=policy.lora)
        settings = {"reference_logps": reference, "likelihood_coef": 0.1}
        module = make_dpo(tiny_janus, policy=twin, micro_batch_size=micro_batch_size, **settings)
        logged = fit(module, pairs, gradient_clip_val=0.5)
        rows.append(
            {(s, n): v for s, r in logged.items() for n, v in r.items() if n.startswith("train/")}
        )
        ends.append(module.state_dict())
        (pairs.folder / "reference.safetensors").unlink(missing_ok=True)
    assert rows[1] == pytest.approx(rows[0], rel=1e-6, abs=1e-6)
    for name, values in ends[0].items():
        torch.testing.assert_close(ends[1][name], values, rtol=0, atol=1e-9)
    start = make_policy(tiny_janus, lora=policy.lora).load()
    moved = [(values - ends[0][f"policy.{n}"]).abs().max() for n, values in named(start).items()]
    assert max(moved) > 1e-3


def named(policy: JanusPolicy) -> dict[str, torch.Tensor]:
    return {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}


def test_micro_batches_keep_the_activations_of_one_of_them(tiny_janus, pairs):
    """Numbers that wait for the backward pass, beside the weights themselves."""
    waiting = {}
    for size in (None, 1, 2):
        module = make_dpo(tiny_janus, micro_batch_size=size)
        module.configure_model()
        weights = {p.data_ptr() for p in module.parameters()}
        sizes: list[int] = []

        def pack(tensor, sizes=sizes, weights=weights):
            if tensor.untyped_storage().data_ptr() not in weights:
                sizes.append(tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            module._loss_in_parts(pairs.batch(range(NUM_PAIRS)), torch.zeros(NUM_PAIRS, 2))
        waiting[size] = sum(sizes)
    assert waiting[1] < 0.2 * waiting[None]  # an eighth, and what the parts were given
    assert waiting[2] < 0.35 * waiting[None]


# Stored log-probs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("entry", "arguments"),
    [
        ("guidance", {"guidance": 2.0}),
        ("logprobs", {"logprobs": "conditional"}),
        ("temperature", {"temperature": 0.5}),
        ("reference", {}),
        ("template", {"template": "janus"}),
        ("precision", {"precision": "bf16-mixed"}),
    ],
)
def test_log_probs_of_another_reference_are_refused(tiny_janus, pairs, entry, arguments):
    path = pairs.folder / "reference.safetensors"
    fit(make_dpo(tiny_janus), pairs)
    before = path.read_bytes()
    kind = Shifted if entry == "reference" else JanusPolicy
    template = {name: arguments[name] for name in arguments.keys() & {"template"}}
    policy = kind(str(tiny_janus), dtype="float64", **template)
    other = {n: arguments[n] for n in arguments.keys() & {"guidance", "logprobs", "temperature"}}
    precision = arguments.get("precision", "64-true")
    snapshots = Snapshots()
    with pytest.raises(ValueError, match=rf"{path}: expected log-probabilities of {entry} "):
        fit(make_dpo(tiny_janus, policy=policy, **other), pairs, snapshots, precision=precision)
    assert path.read_bytes() == before
    assert len(snapshots.weights) == 1  # no step was taken


class Shifted(JanusPolicy):
    """A policy whose weights differ from those of its folder in one number."""

    def load(self):
        super().load()
        with torch.no_grad():
            next(iter(self.parameters())).view(-1)[0] += 1e-3
        return self


def test_log_probs_of_other_tokens_are_refused(tiny_janus, pairs):
    fit(make_dpo(tiny_janus), pairs)
    other = write_pairs(pairs.folder.parent / "other", NUM_PAIRS)
    stored = (pairs.folder / "reference.safetensors").read_bytes()
    (other.folder / "reference.safetensors").write_bytes(stored)
    with pytest.raises(ValueError, match="expected log-probabilities of tokens "):
        fit(make_dpo(tiny_janus), other)


def test_stored_log_probs_are_what_training_reads(tiny_janus, pairs):
    """A file with other numbers under the right key changes the loss."""
    path = pairs.folder / "reference.safetensors"
    fit(make_dpo(tiny_janus), pairs)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    logps = load_file(path)["logps"]
    assert logps.dtype == torch.float32 and logps.shape == (NUM_PAIRS, 2)
    save_file({"logps": logps + torch.tensor([1.0, 0.0])}, path, metadata)
    rows = fit(make_dpo(tiny_janus), pairs)
    expected = math.log(1 + math.exp(0.1))  # each gap is -1, beta 0.1
    assert rows[1]["train/loss"] == pytest.approx(expected, abs=1e-5)


def test_reading_the_reference_of_a_set_counts_as_reference(tiny_janus, pairs, monkeypatch):
    read = DPOModule.reference_sums

    def read_slowly(self, pair_set, batch_size):
        time.sleep(0.2)
        return read(self, pair_set, batch_size)

    monkeypatch.setattr(DPOModule, "reference_sums", read_slowly)
    assert fit(make_dpo(tiny_janus), pairs)[1]["perf/reference_s"] >= 0.2


def test_a_live_reference_stores_nothing(tiny_janus, pairs):
    fit(make_dpo(tiny_janus, reference_logps="live"), pairs)
    assert not (pairs.folder / "reference.safetensors").exists()


# Loss and metrics -------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["conditional", "guided", "guided_detached"])
def test_the_loss_is_that_of_the_formula(tiny_janus, pairs, mode):
    module = make_dpo(tiny_janus, logprobs=mode, temperature=0.8, beta=0.3)
    module.configure_model()
    batch = pairs.batch([5, 2])
    reference = torch.tensor([[-13.0, -14.0], [-12.5, -13.25]])
    loss, metrics = module.loss(batch, reference)
    ratios = torch.zeros(2, 2)
    for pair in range(2):
        for side, tokens in enumerate((batch.chosen[pair], batch.rejected[pair])):
            total = log_prob(module.policy, batch.prompts[pair].text, tokens, mode)
            ratios[pair, side] = total - reference[pair, side]
    margins = 0.3 * (ratios[:, 0] - ratios[:, 1])
    assert loss.item() == pytest.approx(torch.log(1 + (-margins).exp()).mean().item(), abs=1e-5)
    assert metrics["rewards/margins"].item() == pytest.approx(margins.mean().item(), abs=1e-5)
    accuracy = (margins > 0).float().mean().item()
    assert metrics["rewards/accuracies"].item() == pytest.approx(accuracy)
    chosen = 0.3 * ratios[:, 0].mean().item()
    assert metrics["rewards/chosen"].item() == pytest.approx(chosen, abs=1e-5)


def log_prob(policy: JanusPolicy, text: str, tokens: torch.Tensor, mode: str) -> float:
    """Of one picture, guidance 3 and temperature 0.8, one by one."""
    logits = policy.logits([text], tokens[None])
    if mode != "conditional":
        empty = policy.logits([text], tokens[None], unconditional=True)
        logits = empty + 3 * (logits - empty)
    distribution = (logits[0] / 0.8).log_softmax(-1)
    return sum(distribution[place, token].item() for place, token in enumerate(tokens))


def test_metrics_have_their_names(tiny_janus, pairs):
    rows = fit(make_dpo(tiny_janus, likelihood_coef=0.1), pairs)
    assert sorted(rows) == [0, 1, 2, 3, 4]
    named = {"loss", "likelihood_loss", "entropy", "grad_norm", "logps/chosen", "logps/rejected"}
    named |= {f"rewards/{name}" for name in ("chosen", "rejected", "margins", "accuracies")}
    expected = {f"train/{name}" for name in named}
    expected |= {"perf/reference_s", "perf/images_sampled", "perf/images_redrawn"}
    for step in (1, 2, 3, 4):
        assert set(rows[step]) >= expected
        assert rows[step]["train/rewards/accuracies"] in {0, 0.25, 0.5, 0.75, 1}


def test_images_of_a_finished_set_count_as_sampled_and_not_as_redrawn(tiny_janus, pairs):
    rows = fit(make_dpo(tiny_janus), pairs)
    for step in (1, 4):
        assert rows[step]["perf/images_sampled"] == 2 * NUM_PAIRS
        assert rows[step]["perf/images_redrawn"] == 0


@pytest.mark.parametrize("variant", ["ipo", "hinge", "robust"])
def test_other_losses_learn_too(tiny_janus, pairs, variant):
    settings = {"label_smoothing": 0.1} if variant == "robust" else {}
    rows = fit(make_dpo(tiny_janus, variant=variant, **settings), pairs)
    assert rows[3]["train/rewards/margins"] > rows[1]["train/rewards/margins"]
    assert rows[3]["train/loss"] < rows[1]["train/loss"]


# Refusals ---------------------------------------------------------------------------------------


def test_a_non_finite_loss_names_its_update(tiny_janus, pairs):
    path = pairs.folder / "reference.safetensors"
    fit(make_dpo(tiny_janus), pairs)
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    save_file({"logps": load_file(path)["logps"] * float("nan")}, path, metadata)
    snapshots = Snapshots()
    with pytest.raises(ValueError, match=r"a finite loss in update 1 \(optimizer step 1\)"):
        fit(make_dpo(tiny_janus), pairs, snapshots)
    assert len(snapshots.weights) == 1


def test_a_non_finite_gradient_does_not_reach_the_weights(tiny_janus, pairs):
    module = make_dpo(tiny_janus)
    module.configure_model()
    weight = next(iter(module._trained().values()))
    weight.register_hook(lambda gradient: gradient * float("inf"))
    before = weights_of(module)
    with pytest.raises(ValueError, match="expected a finite gradient norm in update 1 "):
        fit(module, pairs, gradient_clip_val=1.0)
    assert all(torch.equal(values, before[n]) for n, values in module.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"beta": 0.0}, "expected beta above 0, got 0.0"),
        ({"variant": "kto"}, "expected variant to be one of"),
        ({"logprobs": "unguided"}, "expected logprobs to be one of"),
        ({"reference_logps": "none"}, "expected reference_logps to be one of"),
        ({"label_smoothing": 0.1}, "expected label_smoothing 0 for sigmoid"),
        ({"micro_batch_size": 0}, "expected micro_batch_size of 1 or more, got 0"),
        ({"group_size": 1}, "expected group_size of 2 or more, got 1; a pair has two"),
        ({"images_budget": 3}, r"expected images_budget of at least group_size \(4\), got 3"),
        ({"guidance": 0.5}, "expected guidance of 1"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        make_dpo(Path("never read"), policy=object(), **arguments)
