"""The original Janus layout to transformers' and back: same numbers there, same bytes here."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoProcessor, JanusForConditionalGeneration

from cotgen_pl.conversion import janus
from cotgen_pl.conversion.formats import convert_checkpoint
from cotgen_pl.conversion.shards import Shards, write_shards
from cotgen_pl.policies.janus import JanusPolicy
from tests.conversion.original_janus import CODES, PIXELS, WIDTH, write_original


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    """The folder and the modules that it holds."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("janus") / "original"
    model = write_original(folder)
    return folder, model


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    target = tmp_path_factory.mktemp("janus") / "converted"
    return convert_checkpoint("janus", original[0], target, template="janus_pro")


@pytest.fixture(scope="module")
def model(converted):
    loaded, report = JanusForConditionalGeneration.from_pretrained(
        converted.target, output_loading_info=True
    )
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    return loaded.eval().model


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    shards = Shards(folder, "a checkpoint")
    return {name: shards.read(name) for name in shards.outlines}


def test_decoded_pictures_are_the_originals(original, model):
    tokens = torch.randint(CODES, (2, 16))
    with torch.no_grad():
        expected = original[1].gen_vision_model.decode(tokens)
        drawn = model.vqmodel.decode(tokens)
    assert (drawn - expected).abs().max() < 1e-4 * expected.abs().max()


def test_encoded_pictures_are_the_originals(original, model):
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        expected = original[1].gen_vision_model.encode(pixels)
        encoded = model.vqmodel.quant_conv(model.vqmodel.encoder(pixels))
    assert (encoded - expected).abs().max() < 1e-4 * expected.abs().max()


def test_picture_features_are_the_originals(original, model):
    pixels = torch.randn(2, 3, PIXELS, PIXELS)
    with torch.no_grad():
        expected = original[1].aligner(original[1].vision_model.vision_tower(pixels))
        features = model.aligner(model.vision_model(pixels).last_hidden_state)
    assert (features - expected).abs().max() < 1e-5


def test_image_logits_and_embeddings_are_the_originals(original, model):
    hidden, tokens = torch.randn(2, 3, WIDTH), torch.randint(CODES, (2, 5))
    with torch.no_grad():
        assert (model.generation_head(hidden) - original[1].image_logits(hidden)).abs().max() < 1e-5
        expected = original[1].gen_aligner(original[1].gen_embed(tokens))
        embedded = model.generation_aligner(model.generation_embeddings(tokens))
    assert (embedded - expected).abs().max() < 1e-5


def test_words_are_the_originals(original, converted):
    loaded = JanusForConditionalGeneration.from_pretrained(converted.target)
    ids = torch.randint(100, (2, 7))
    with torch.no_grad():
        expected = original[1].language_model(ids).logits
        logits = loaded(input_ids=ids).logits
    assert (logits - expected).abs().max() < 1e-5
    head, words = loaded.lm_head.weight, loaded.model.language_model.embed_tokens.weight
    assert not torch.equal(head, words)


def test_what_has_no_place_is_listed(converted):
    assert all("attn_pool" in n or n.endswith("codebook_used") for n in converted.dropped)
    assert len(converted.dropped) == 14
    # two blocks' qkv weights and biases are three each
    assert converted.num_written == converted.num_read - len(converted.dropped) + 2 * 2 * 2


def test_there_and_back_is_exact(original, converted, tmp_path):
    back = convert_checkpoint("janus_original", converted.target, tmp_path / "back")
    before, after = weights_of(original[0]), weights_of(back.target)
    assert set(before) == set(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    assert all(before[n].dtype == after[n].dtype for n in before)
    assert back.num_written == len(before)
    for file in original[0].glob("*.json"):
        if "index" not in file.name:
            assert (back.target / file.name).read_bytes() == file.read_bytes()


def test_back_and_there_is_exact(converted, tmp_path):
    back = convert_checkpoint("janus_original", converted.target, tmp_path / "back")
    again = convert_checkpoint("janus", back.target, tmp_path / "again", template="janus_pro")
    before, after = weights_of(converted.target), weights_of(again.target)
    assert set(before) == set(after)
    assert all(torch.equal(before[n], after[n]) for n in before)
    config = (converted.target / "config.json").read_text()
    assert (again.target / "config.json").read_text() == config


def test_exported_policies_go_back_beside_their_original(original, converted, tmp_path):
    exported = tmp_path / "exported"
    shutil.copytree(converted.target, exported)
    shutil.rmtree(exported / "original")
    weights = load_file(exported / "model.safetensors")
    weights["lm_head.weight"] += 1
    save_file(weights, exported / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="--original FOLDER"):
        convert_checkpoint("janus_original", exported, tmp_path / "back")
    back = convert_checkpoint("janus_original", exported, tmp_path / "back", original=original[0])
    before, after = weights_of(original[0]), weights_of(back.target)
    assert set(before) == set(after)
    assert {n for n in before if not torch.equal(before[n], after[n])} == {
        "language_model.lm_head.weight"
    }


@pytest.mark.parametrize(
    ("template", "prompt"),
    [
        ("janus_pro", "<|User|>: a dog\n\n<|Assistant|>:<begin_of_image>"),
        ("janus", "User: a dog\n\nAssistant:<begin_of_image>"),
    ],
)
def test_prompts_have_the_roles_asked_for(original, template, prompt, tmp_path):
    target = convert_checkpoint("janus", original[0], tmp_path / "new", template=template).target
    processor = AutoProcessor.from_pretrained(target)
    message = [{"role": "user", "content": [{"type": "text", "text": "a dog"}]}]
    text = processor.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = processor(text=[text], generation_mode="image")["input_ids"][0].tolist()
    tokenizer = processor.tokenizer
    assert ids[0] == tokenizer.bos_token_id
    assert ids.count(tokenizer.bos_token_id) == 1
    assert tokenizer.decode(ids[1:]) == prompt
    assert tokenizer.pad_token == "<｜▁pad▁｜>"
    asked = processor(text=[text], generation_mode="text")["input_ids"][0]
    assert tokenizer.decode(asked[1:]).startswith("You are a helpful language and vision assistant")


def test_the_policy_loads_it(converted):
    policy = JanusPolicy(str(converted.target)).load()
    tokens = torch.randint(CODES, (1, 16))
    assert policy.logits(["a dog"], tokens).shape == (1, 16, CODES)
    assert policy.decode(tokens).shape == (1, 3, PIXELS, PIXELS)


def test_large_results_are_cut_into_files(original, tmp_path):
    shards = Shards(original[0], "a Janus")
    plan, _ = janus.plan_forward(shards)
    write_shards(tmp_path, plan, shard_bytes=10**6)
    files = sorted(tmp_path.glob("*.safetensors"))
    assert len(files) > 2
    assert files[0].name == f"model-00001-of-{len(files):05d}.safetensors"
    assert all(file.stat().st_size < 1.1 * 10**6 for file in files)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert set(index["weight_map"]) == {planned.name for planned in plan}
    assert set(weights_of(tmp_path)) == set(index["weight_map"])


def replaced(file: Path, **entries) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | entries))


@pytest.mark.parametrize(
    ("spoil", "refusal"),
    [
        (lambda f: replaced(f / "config.json", model_type="llama"), "got 'llama'"),
        (lambda f: (f / "pytorch_model-00002-of-00002.bin").unlink(), "expected 2 weights files"),
        (lambda f: (f / "tokenizer.json").unlink(), "tokenizer.json"),
        (lambda f: replaced(f / "preprocessor_config.json", image_mean=None), "image_mean"),
        (lambda f: replaced(f / "config.json", vision_config={"params": {}}), "vision tower"),
        (
            lambda f: replaced(f / "special_tokens_map.json", pad_token="<nothing>"),
            "the token <nothing>",
        ),
    ],
)
def test_other_checkpoints_are_refused(original, spoil, refusal, tmp_path):
    shutil.copytree(original[0], tmp_path / "spoilt")
    spoil(tmp_path / "spoilt")
    with pytest.raises(ValueError, match=refusal):
        convert_checkpoint("janus", tmp_path / "spoilt", tmp_path / "new", template="janus_pro")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["spoilt"]


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda w: w.pop("gen_aligner.layers.2.bias"), "generation_aligner.hidden_layers.0.bias"),
        (lambda w: w.update({"gen_aligner.layers.4.bias": torch.ones(1)}), "unexpected names"),
        (lambda w: w.update({"aligner.layers.2.bias": torch.ones(1)}), "of another shape"),
        (lambda w: w.pop("vision_model.vision_tower.pos_embed"), "position_embedding"),
    ],
)
def test_weights_that_do_not_fit_are_refused(original, change, refusal, tmp_path):
    spoilt = tmp_path / "spoilt"
    weights = weights_of(original[0])
    change(weights)
    shutil.copytree(original[0], spoilt, ignore=shutil.ignore_patterns("*.bin"))
    save_file(weights, spoilt / "model.safetensors")
    with pytest.raises(ValueError, match=refusal):
        convert_checkpoint("janus", spoilt, tmp_path / "new", template="janus_pro")


def test_an_original_of_another_size_is_refused(original, converted, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(original[0], other)
    settings = json.loads((other / "config.json").read_text())
    settings["language_config"]["num_hidden_layers"] = 30
    (other / "config.json").write_text(json.dumps(settings))
    with pytest.raises(ValueError, match=r"num_hidden_layers 2 .*, got 30"):
        convert_checkpoint("janus_original", converted.target, tmp_path / "back", original=other)
