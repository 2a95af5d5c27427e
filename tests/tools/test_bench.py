"""The bench's command line on tiny models: what it prints and writes, and what it refuses."""

import json
import sys
from importlib.metadata import version

import pytest
import torch

import tools.bench
from cotgen_pl.bench import measuring
from cotgen_pl.bench.arguments import read_arguments
from cotgen_pl.bench.naive import Habits
from cotgen_pl.bench.scoring import measure_scoring
from cotgen_pl.bench.sizes import SIZES, Size
from cotgen_pl.bench.steps import PEERS, compare_steps
from cotgen_pl.interfaces import Reward, Scores
from tests.toys import Brightness, numbered_prompts
from tools.bench import bench, step_bytes

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="a process's memory needs Linux")
TINY = Size(1, 32, 64, 2, 2, 64, 300, 128, {"channel_multiplier": [1, 1], "base_channels": 32}, {})


@pytest.fixture(autouse=True)
def quick_probes(monkeypatch):
    monkeypatch.setitem(measuring.COPY_BYTES, "cpu", 2**20)
    monkeypatch.setitem(measuring.MATRIX_SIDES, "cpu", 128)
    monkeypatch.setattr(measuring, "PROBE_SECONDS", 0.001)


@pytest.fixture
def tiny_size(monkeypatch):
    vision = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    monkeypatch.setitem(SIZES, "small", Size(**(vars(TINY) | {"vision": vision})))


def run(tmp_path, *arguments):
    file = tmp_path / "bench.json"
    found = bench([*arguments, "--device", "cpu", "--json", str(file)])
    written = json.loads(file.read_text())
    assert written["rows"] == found["rows"]
    return written


def step_arguments(folder):
    return read_arguments(["step", "--path", str(folder), "--batch", "4", "--device", "cpu"])


def test_rollout(tiny_janus, tmp_path, capsys):
    arguments = ["--batch", "6", "--group_size", "3", "--repeats", "2"]
    found = run(tmp_path, "rollout", "--path", str(tiny_janus), *arguments)
    ours, pictures = found["rows"]
    assert (ours["name"], pictures["name"]) == ("ours", "pictures of tokens")
    assert len(ours["runs_s"]) == 2
    assert ours["images_per_s"] == pytest.approx(6 / ours["median_s"])
    assert ours["tokens_per_s"] == pytest.approx(6 * 4 / ours["median_s"])
    assert ours["roofline_share"] == pytest.approx(ours["roofline_s"] / ours["median_s"])
    assert pictures["roofline_share"] is None
    assert found["machine"]["copy_gb_per_s"] > 0
    shown = capsys.readouterr().out
    assert "6 images, guidance 5, float32" in shown
    assert "of roofline" in shown


def test_growth(tiny_janus, tmp_path, monkeypatch):
    monkeypatch.setattr(tools.bench, "measure_apart", lambda measure, own, images: 100 + 7 * images)
    found = run(tmp_path, "growth", "--path", str(tiny_janus), "--batch", "6", "--repeats", "1")
    assert [row["name"] for row in found["rows"]] == ["1 images", "2 images", "4 images"]
    assert found["rows"][2]["images_per_s"] == pytest.approx(4 / found["rows"][2]["median_s"])
    assert found["rows"][2]["memory_over_loading_gb"] == pytest.approx(128e-9)
    assert found["memory_per_image_gb"] == pytest.approx(7e-9)
    assert found["its_cache_by_formula_gb"] > 0


def test_memory_of_a_rollout_is_that_over_loading(tiny_janus, monkeypatch):
    drawn = []
    monkeypatch.setattr(tools.bench, "memory_bytes", lambda device: 300)
    monkeypatch.setattr(tools.bench, "reset_peak", lambda device: drawn.clear())
    monkeypatch.setattr(tools.bench, "peak_bytes", lambda device: (1000, 2000))
    monkeypatch.setattr(tools.bench, "draw_distinct", lambda own, policy, n: drawn.append(n))
    own = read_arguments(["growth", "--path", str(tiny_janus), "--device", "cpu"])
    assert tools.bench.rollout_bytes(own, 2) == 700
    assert drawn == [2]


@pytest.mark.skipif(version("transformers").startswith("5.17."), reason="its generate is broken")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_rollout_against_transformers(tiny_size, tmp_path, dtype):
    arguments = ["--size", "small", "--batch", "4", "--repeats", "1", "--dtype", dtype]
    found = run(tmp_path, "rollout", "--against", "transformers", *arguments)
    ours, theirs, _ = found["rows"]
    assert theirs["name"] == "transformers"
    assert found["times_faster"] == pytest.approx(theirs["median_s"] / ours["median_s"])
    assert found["equal_greedy_tokens"] > (0.3 if dtype == "bfloat16" else 0.999)


@pytest.mark.skipif(not version("transformers").startswith("5.17."), reason="5.23's generate works")
def test_broken_transformers_is_one_error(tiny_janus, tmp_path):
    with pytest.raises(ValueError, match=r"that generates Janus pictures, got version 5\.17"):
        run(tmp_path, "rollout", "--path", str(tiny_janus), "--against", "transformers")


@pytest.mark.parametrize("arguments", [[], ["--recompute", "--logprobs", "guided"]], ids=str)
def test_update_of_made_weights(tiny_size, tmp_path, arguments):
    sizes = ["--size", "small", "--batch", "4", "--group_size", "2", "--micro_batch_size", "2"]
    found = run(tmp_path, "update", *sizes, "--repeats", "1", *arguments)
    assert [row["name"] for row in found["rows"]] == ["ours"]
    assert found["rows"][0]["roofline_share"] > 0


def test_update_of_weights_in_bfloat16(tiny_size, tmp_path):
    sizes = ["--size", "small", "--batch", "4", "--micro_batch_size", "auto", "--repeats", "1"]
    types = ["--dtype", "bfloat16", "--trained_dtype", "bfloat16"]
    optimizer = ["--optimizer", "cotgen_pl.optimizers.StochasticAdamW8bit"]
    found = run(tmp_path, "update", *sizes, *types, *optimizer)
    assert found["rows"][0]["images_per_s"] > 0
    assert found["settings"]["trained_dtype"] == "bfloat16"


@pytest.mark.parametrize(("dtype", "least"), [("float32", 1.0), ("bfloat16", 0.3)])
def test_paths_are_held_to_the_eager_one(tiny_size, tmp_path, dtype, least):
    sizes = ["--size", "small", "--batch", "3", "--repeats", "1", "--dtype", dtype]
    found = run(tmp_path, "paths", *sizes)
    assert [row["name"] for row in found["rows"]] == ["fused", "eager"]
    assert least <= found["equal_tokens"]["fused"] <= 1
    guided, alone = (found[f"{kind}_logprobs_p99"]["fused"] for kind in ("guided", "conditional"))
    assert (0 <= alone < 1e-4 and guided < 1e-4) if dtype == "float32" else 0 < alone < guided < 1


def test_step_against_naive(tiny_janus, tmp_path, monkeypatch, capsys):
    bytes_of = {"ours": 5_000_000, "naive": 20_000_000, "naive without habits": 4_000_000}
    monkeypatch.setattr(tools.bench, "measure_apart", lambda _, own, name: bytes_of.get(name, 6e6))
    sizes = ["--path", str(tiny_janus), "--batch", "4", "--group_size", "2", "--repeats", "1"]
    found = run(tmp_path, "step", "--against", "naive", *sizes)
    assert [row["name"] for row in found["rows"]] == ["ours", *PEERS]
    assert found["rows"][1]["memory_over_loading_gb"] == 0.02
    assert found["share_of_memory"] == 0.25
    assert found["habits"].keys() == set(Habits.names())
    assert {"rollout", "reference", "update"} <= found["phases_s"].keys()
    assert "image_per_backward" in capsys.readouterr().out.split("added by each habit")[1]


def test_habits_without_the_naive_step_are_refused(tmp_path):
    with pytest.raises(ValueError, match="expected --habits beside step --against naive, got it"):
        run(tmp_path, "rollout", "--habits", "text_head")


@pytest.mark.parametrize("names", [[], ["text_head"]], ids=str)
def test_habits_are_left_out(tiny_janus, tmp_path, monkeypatch, names):
    monkeypatch.setattr(tools.bench, "measure_apart", lambda measure, own, name: 6e6)
    sizes = ["--path", str(tiny_janus), "--batch", "4", "--group_size", "2", "--repeats", "1"]
    found = run(tmp_path, "step", "--against", "naive", *sizes, "--habits", *names)
    without = ["naive without habits", *names] if names else []
    assert [row["name"] for row in found["rows"]] == ["ours", "naive", *without]
    assert found["share_of_memory"] == 1
    assert list(found.get("habits", {})) == names


@pytest.mark.parametrize("name", ["ours", "naive"])
def test_memory_over_loading_takes_two_steps(tiny_janus, monkeypatch, name):
    calls, step_run = [], tools.bench.step_run
    monkeypatch.setattr(tools.bench, "memory_bytes", lambda device: 300)
    monkeypatch.setattr(tools.bench, "reset_peak", lambda device: calls.append("reset"))
    monkeypatch.setattr(tools.bench, "peak_bytes", lambda device: (1000, 2000))

    def counted(*arguments):
        run = step_run(*arguments)
        return lambda: (calls.append(arguments[2]), run())

    monkeypatch.setattr(tools.bench, "step_run", counted)
    assert step_bytes(step_arguments(tiny_janus), name) == 700
    assert calls == ["reset", name, name]


@pytest.mark.slow
def test_memory_over_loading_is_of_a_fresh_process(tiny_janus):
    held = torch.ones(100_000_000)  # 400 MB here, none there
    assert 0 < tools.bench.measure_apart(step_bytes, step_arguments(tiny_janus), "naive") < 200e6
    del held


def test_comparison_is_that_of_medians():
    timings = {name: measuring.Timing(0.0, [2.0, 2.0, 9.0]) for name in PEERS}
    timings |= {
        "ours": measuring.Timing(0.0, [1.0]),
        "naive": measuring.Timing(0.0, [3.0]),
        "text_head": measuring.Timing(0.0, [2.5]),
    }
    memory = dict.fromkeys(PEERS, 100) | {"ours": 60, "naive": 120, "text_head": 150}
    found = compare_steps(timings, memory)
    assert found["times_faster"] == 3
    assert found["share_of_memory"] == 0.5
    assert found["habits"]["text_head"] == {"added_time": 0.25, "added_memory": 0.5}
    assert found["habits"]["full_logits"] == {"added_time": 0.0, "added_memory": 0.0}


def test_reward_of_a_yaml_piece(repository, tmp_path, monkeypatch):
    monkeypatch.chdir(repository)
    found = run(tmp_path, "reward", "--batch", "3", "--repeats", "1")
    assert [row["name"] for row in found["rows"]] == ["batched", "one by one"]
    assert found["rows"][0]["tokens_per_s"] is None
    assert found["largest_difference"] < 1e-4
    assert found["picture_side"] == 32


class OfBatch(Brightness):
    """Scores that depend on the batch."""

    def score(self, images, prompts):
        return Scores.single("of_batch", torch.full((len(images),), float(len(images))))


@pytest.mark.parametrize(("reward", "difference"), [(Brightness(), 0.0), (OfBatch(), 3.0)])
def test_scoring_tells_how_much_a_batch_matters(reward: Reward, difference):
    found = measure_scoring(reward, torch.rand(4, 3, 2, 2), numbered_prompts(4), 1)
    assert found["largest_difference"] == pytest.approx(difference, abs=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["step", "--batch", "6"], "multiple of --group_size 4, got 6"),
        (["growth", "--batch", "1"], "expected --batch of 2 or more beside growth, got 1"),
        (["paths", "--group_size", "2"], "expected --group_size 1 beside paths"),
        (["step", "--optimizer", "torch.optim.Adamw"], "optimizer's class path, like .* 'torch"),
        (["step", "--optimizer", "torch.nn.Linear"], "an optimizer's class path"),
        (["rollout", "--batch", "0"], "expected batch of 1 or more"),
        (["rollout", "--guidance", "0.5"], "expected guidance of 1"),
        (["rollout", "--against", "naive"], "expected --against transformers beside rollout"),
        (["step", "--against", "transformers"], "expected --against naive beside step"),
        (["update", "--against", "naive"], "to be left out beside update"),
        (["rollout", "--against", "transformers", "--guidance", "1"], "expected guidance above 1"),
        (["reward", "--reward", "nowhere.yaml"], "expected a reward's YAML piece"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        bench(arguments)
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match="expected a GPU for --device cuda, got none"):
            bench(["rollout", "--device", "cuda"])
