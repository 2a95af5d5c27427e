"""BLIP's original checkpoints, of small random weights, become folders for transformers."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import BlipConfig, BlipForQuestionAnswering

from cotgen_pl.conversion import blip
from cotgen_pl.conversion.blip import (
    BLIP_VQA_KEYS,
    IMAGE_REWARD_KEYS,
    BlipCheckpoint,
    ImageRewardWeights,
    convert_blip_vqa,
    convert_image_reward,
    describe_blip_vqa,
    describe_image_reward,
)
from cotgen_pl.conversion.formats import convert_checkpoint
from cotgen_pl.conversion.keys import check_coverage, rename_weights
from tests.conversion.original_blip import (
    NUM_WORDS,
    PIECES,
    blip_vqa_shapes,
    fill,
    image_reward_shapes,
    write_blip_vqa,
    write_image_reward,
    write_tokenizer,
)

SMALL = {"text": (16, 2), "head": (16, 32, 16, 8, 4, 1), "vision": (64, 2), "size": 32}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    return write_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture
def image_reward(tmp_path):
    """The weights of an original ImageReward in tmp_path."""
    return write_image_reward(tmp_path, **SMALL)


@pytest.fixture
def blip_vqa(tmp_path):
    """The weights of an original BLIP-VQA in tmp_path."""
    return write_blip_vqa(tmp_path, size=32)


def test_image_reward_is_written_whole_and_renamed(tmp_path, image_reward, tokenizer):
    source, target = tmp_path / "ImageReward.pt", tmp_path / "converted"
    done = convert_image_reward(source, target, tokenizer)
    written = load_file(target / "model.safetensors")
    assert (done.source, done.target) == (source, target)
    assert (done.num_read, done.num_written) == (len(image_reward), len(image_reward) - 5)
    assert len(written) == done.num_written
    assert sorted(done.dropped) == [
        "blip.text_encoder.embeddings.position_ids",
        "blip.text_proj.bias",
        "blip.text_proj.weight",
        "blip.vision_proj.bias",
        "blip.vision_proj.weight",
    ]
    for new, old in {
        "vision_model.embeddings.class_embedding": "blip.visual_encoder.cls_token",
        "vision_model.encoder.layers.1.self_attn.qkv.bias": (
            "blip.visual_encoder.blocks.1.attn.qkv.bias"
        ),
        "vision_model.encoder.layers.0.mlp.fc2.weight": (
            "blip.visual_encoder.blocks.0.mlp.fc2.weight"
        ),
        "text_encoder.encoder.layer.1.crossattention.self.key.weight": (
            "blip.text_encoder.encoder.layer.1.crossattention.self.key.weight"
        ),
        "head.2.weight": "mlp.layers.4.weight",
        "head.4.bias": "mlp.layers.7.bias",
    }.items():
        assert torch.equal(written[new], image_reward[old]), new


def test_blip_vqa_is_what_transformers_loads(tmp_path, blip_vqa, tokenizer):
    done = convert_blip_vqa(tmp_path, tmp_path / "converted", tokenizer)
    assert (done.num_read, done.num_written) == (len(blip_vqa), len(blip_vqa) - 2)
    model, report = BlipForQuestionAnswering.from_pretrained(
        tmp_path / "converted", output_loading_info=True
    )
    assert not any(report.values())
    loaded = model.state_dict()
    assert len(loaded) == done.num_written
    for new, old in {
        "vision_model.post_layernorm.weight": "visual_encoder.norm.weight",
        "vision_model.embeddings.position_embedding": "visual_encoder.pos_embed",
        "text_decoder.cls.predictions.decoder.weight": (
            "text_decoder.bert.embeddings.word_embeddings.weight"
        ),
        "text_decoder.cls.predictions.decoder.bias": "text_decoder.cls.predictions.bias",
    }.items():
        assert torch.equal(loaded[new], blip_vqa[old]), new


def test_sizes_come_from_the_weights_and_heads_from_med_config(tmp_path, image_reward, tokenizer):
    convert_image_reward(tmp_path, tmp_path / "converted", tokenizer)
    config = json.loads((tmp_path / "converted" / "config.json").read_text())
    assert config["head_widths"] == [16, 32, 16, 8, 4, 1]
    assert config["vision_config"] == {
        "hidden_size": 64,
        "intermediate_size": 256,
        "num_hidden_layers": 2,
        "num_attention_heads": 1,
        "image_size": 32,
        "patch_size": 16,
        "hidden_act": "gelu",
        "layer_norm_eps": 1e-6,
    }
    assert config["text_config"] == {
        "vocab_size": 30524,
        "hidden_size": 16,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "max_position_embeddings": 64,
        "num_attention_heads": 2,
        "layer_norm_eps": 1e-12,
        "encoder_hidden_size": 64,
        "hidden_act": "gelu",
        "is_decoder": True,
    }


def on_meta(tmp_path, shapes, key_map):
    weights, dropped = rename_weights(fill(shapes, "meta"), key_map, tmp_path / "file", "BLIP")
    return BlipCheckpoint(tmp_path / "file", weights, len(shapes), dropped)


def test_the_published_image_reward_has_the_settings_of_blip(tmp_path):
    shapes = image_reward_shapes(
        vision=(1024, 24), text=(768, 12), head=(768, 1024, 128, 64, 16, 1), positions=512
    )
    checkpoint = on_meta(tmp_path, shapes, IMAGE_REWARD_KEYS)
    with torch.device("meta"):
        model = ImageRewardWeights(describe_image_reward(checkpoint))
    check_coverage(model, checkpoint.weights, checkpoint.file)
    vision, text = model.vision_model, model.text_encoder
    assert vision.config.num_attention_heads == vision.encoder.layers[0].self_attn.num_heads == 16
    assert vision.config.image_size == 224 and len(vision.encoder.layers) == 24
    assert vision.post_layernorm.eps == vision.encoder.layers[23].layer_norm1.eps == 1e-6
    assert text.config.num_attention_heads == 12
    assert text.encoder.layer[11].crossattention.self.num_attention_heads == 12
    assert text.embeddings.LayerNorm.eps == 1e-12
    num_parameters = sum(parameter.numel() for parameter in model.parameters())
    assert num_parameters == pytest.approx(447e6, rel=0.01)


def test_the_published_blip_vqa_reads_480_pixels(tmp_path):
    shapes = blip_vqa_shapes(width=768, layers=12, positions=512)
    checkpoint = on_meta(tmp_path, shapes, BLIP_VQA_KEYS)
    with torch.device("meta"):
        model = BlipForQuestionAnswering(BlipConfig(**describe_blip_vqa(checkpoint)))
    check_coverage(model, checkpoint.weights, checkpoint.file)
    vision = model.vision_model
    assert vision.config.image_size == 480
    assert vision.embeddings.position_embedding.shape == (1, 901, 768)
    assert vision.post_layernorm.eps == 1e-6 and vision.encoder.layers[0].self_attn.num_heads == 12
    for text in (model.text_encoder, model.text_decoder.bert):
        assert text.encoder.layer[0].attention.self.num_attention_heads == 12
        assert text.config.layer_norm_eps == 1e-12


def test_tools_find_both_formats(tmp_path, image_reward, blip_vqa, tokenizer):
    for name, num_dropped in {"image_reward": 5, "blip_vqa": 2}.items():
        done = convert_checkpoint(name, tmp_path, tmp_path / name, tokenizer=tokenizer)
        assert len(done.dropped) == num_dropped
        assert (tmp_path / name / "tokenizer.json").is_file()


def test_another_model_is_named_by_its_first_weights(tmp_path, image_reward, blip_vqa, tokenizer):
    vqa, other = tmp_path / "model_base_vqa_capfilt_large.pth", tmp_path / "ImageReward.pt"
    with pytest.raises(
        ValueError,
        match=r"expected the weights of ImageReward, got 151 unexpected names "
        r"\(first: visual_encoder.cls_token, visual_encoder.pos_embed, ",
    ):
        convert_image_reward(vqa, tmp_path / "converted", tokenizer)
    with pytest.raises(
        ValueError, match=r"of BLIP-VQA, got 101 unexpected names \(first: blip.visual_encoder.cls"
    ):
        convert_blip_vqa(other, tmp_path / "converted", tokenizer)
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.pop("mlp.layers.7.bias"), r"got 1 missing \(first: head.4.bias\)"),
        (lambda w: w.pop("blip.visual_encoder.cls_token"), r"1 missing \(first: vision_model"),
        (lambda w: w.pop("mlp.layers.7.weight"), "a weight that becomes head.4.weight, got none"),
        (
            lambda w: w.update({"blip.text_encoder.pooler.dense.bias": torch.zeros(16)}),
            r"1 unknown \(first: text_encoder.pooler.dense.bias\)",
        ),
        (
            lambda w: w.update({"blip.visual_encoder.norm.bias": torch.zeros(65)}),
            r"1 of another shape \(first: vision_model.post_layernorm.bias\)",
        ),
        (
            lambda w: w.update(
                {"blip.visual_encoder.patch_embed.proj.weight": torch.zeros(96, 3, 16, 16)}
            ),
            "expected a vision width that is a multiple of 64, .* got 96",
        ),
    ],
)
def test_weights_must_be_all_and_no_others(tmp_path, image_reward, tokenizer, change, message):
    change(image_reward)
    torch.save(image_reward, tmp_path / "ImageReward.pt")
    with pytest.raises(ValueError, match=message):
        convert_image_reward(tmp_path, tmp_path / "converted", tokenizer)


def test_a_decoder_that_is_not_tied_is_refused(tmp_path, blip_vqa, tokenizer):
    name = "text_decoder.cls.predictions.decoder.weight"
    torch.save(blip_vqa | {name: blip_vqa[name] + 1}, tmp_path / "other.pth")
    with pytest.raises(ValueError, match=f"expected equal weights in {name} and text_decoder.bert"):
        convert_blip_vqa(tmp_path / "other.pth", tmp_path / "converted", tokenizer)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"num_attention_heads": 12}', "expected BLIP's text settings .* 'layer_norm_eps'"),
        ("[", "expected BLIP's text settings"),
        (
            '{"num_attention_heads": 2, "layer_norm_eps": 1e-12, "hidden_size": 768}',
            r"expected the sizes of the weights .* got \{'hidden_size': 768\}",
        ),
    ],
)
def test_settings_of_another_model_are_refused(tmp_path, image_reward, tokenizer, content, message):
    (tmp_path / "med_config.json").write_text(content)
    with pytest.raises(ValueError, match=message):
        convert_image_reward(tmp_path, tmp_path / "converted", tokenizer)


def test_without_med_config_the_settings_are_blips(tmp_path):
    assert blip.TEXT_DEFAULTS == {"num_attention_heads": 12, "layer_norm_eps": 1e-12}
    shapes = image_reward_shapes(text=(768, 1))
    config = describe_image_reward(on_meta(tmp_path, shapes, IMAGE_REWARD_KEYS))
    assert config["text_config"]["num_attention_heads"] == 12


def test_blips_tokens_stand_behind_berts(tokenizer):
    words = blip.read_tokenizer(tokenizer, NUM_WORDS + 2)
    assert words.convert_tokens_to_ids(["[DEC]", "[ENC]"]) == [30522, 30523]
    again = blip.read_tokenizer(tokenizer, NUM_WORDS + 2)
    assert words("A Red cat")["input_ids"] == again("a red cat")["input_ids"] != []


def test_another_tokenizer_is_refused(tmp_path, image_reward):
    other = write_tokenizer(tmp_path / "other", PIECES | {"[ENC]": 5000})
    with pytest.raises(ValueError, match=r"expected 30524 tokens, .* got 30523 .* \[30522, 5000\]"):
        convert_image_reward(tmp_path, tmp_path / "converted", other)


@pytest.mark.parametrize("kept", ["tokenizer.json", "vocab.txt"])
def test_either_file_of_berts_tokenizer_is_enough(tmp_path, tokenizer, kept):
    words = json.loads((Path(tokenizer) / "tokenizer.json").read_text())["model"]["vocab"]
    if kept == "vocab.txt":
        (tmp_path / kept).write_text("\n".join(sorted(words, key=words.get)) + "\n")
    else:
        shutil.copy(Path(tokenizer) / kept, tmp_path)
    # As in the hub's bert-base-uncased, which names no class.
    (tmp_path / "tokenizer_config.json").write_text('{"do_lower_case": true}')
    texts = ["A Red CATs, zebra?", ""]
    expected = blip.read_tokenizer(tokenizer, NUM_WORDS + 2)(texts)["input_ids"]
    assert blip.read_tokenizer(str(tmp_path), NUM_WORDS + 2)(texts)["input_ids"] == expected
    assert len(expected[0]) == 9


def test_a_tokenizer_out_of_reach_says_what_to_do(tmp_path, image_reward):
    with pytest.raises(
        ValueError, match=r"got .* from nobody/nothing; .* run `hf download bert-base-uncased"
    ):
        convert_image_reward(tmp_path, tmp_path / "converted", "nobody/nothing")
    with pytest.raises(ValueError, match=r"or vocab.txt of BERT's, got neither file from"):
        convert_image_reward(tmp_path, tmp_path / "converted", str(tmp_path))
    assert not (tmp_path / "converted").exists()


@pytest.mark.parametrize("source", ["nowhere/at/all", "nobody/nothing", "nothing.pt"])
def test_a_source_that_is_not_there_is_named(tmp_path, source, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=f"expected .*{source}"):
        convert_image_reward(source, tmp_path / "converted")
