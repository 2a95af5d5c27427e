"""HPSReward against open_clip's own encoders, on small random weights in the published layout."""

import json
import pickle
import random
import socket
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy
import open_clip
import pytest
import torch
from open_clip.transform import CenterCropOrPad, ResizeKeepRatio
from PIL import Image
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torchvision.transforms import functional as tvf

from cotgen_pl.interfaces import Prompt
from cotgen_pl.rewards import base
from cotgen_pl.rewards.hps import ORIGINAL_FILES, HPSReward, fit_pictures
from cotgen_pl.rewards.open_clip_models import OPEN_CLIP_FILE, build_tokenizer, read_config
from cotgen_pl.shapes.grammar import suites
from cotgen_pl.shapes.render import render
from cotgen_pl.shapes.scenes import compose, spoil
from cotgen_pl.weights import find_weights
from tests.rewards.plain_clip import gelu, picture_features, text_features
from tests.test_pixels import as_array, as_tensor, draw_picture
from tests.toys import fit, make_grpo, make_policy

MEAN, STD = open_clip.OPENAI_DATASET_MEAN, open_clip.OPENAI_DATASET_STD
VISION = {"image_size": 28, "layers": 2, "width": 32, "head_width": 16, "patch_size": 14}
TEXT = {"context_length": 77, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 2}
MODEL = {"embed_dim": 24, "vision_cfg": VISION, "text_cfg": TEXT}
TEXTS = ["a red cat", "two blue dogs on the moon", "a red cat", "", "a red cat " * 60]


def build(model_config=MODEL):
    """A small random scorer, shaken so that its scores differ between pictures and texts."""
    torch.manual_seed(0)
    model = open_clip.CLIP(**model_config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def write(folder: Path, model_config=MODEL, **config) -> Path:
    file = folder / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": build(model_config).state_dict()}, file)
    settings = {"model_cfg": model_config, **config}
    (folder / "open_clip_config.json").write_text(json.dumps(settings))
    return file


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    return write(tmp_path_factory.mktemp("hps"))


@pytest.fixture
def reward(file):
    return HPSReward(str(file)).load()


@pytest.fixture
def images():
    return torch.rand(5, 3, 40, 30, generator=torch.Generator().manual_seed(1))


@pytest.fixture
def prompts():
    return [Prompt(text) for text in TEXTS]


def test_score_is_the_cosine_of_open_clips_own_features(reward, images, prompts):
    model = build()
    pictures = model.encode_image(torch.stack([reference_transform(image, 28) for image in images]))
    texts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(TEXTS))
    expected = torch.cosine_similarity(pictures, texts)
    scores = reward.score(images, prompts)
    assert scores.total.shape == (5,) and scores.total.dtype == torch.float32
    assert expected.std() > 0.01  # else any constant would pass
    torch.testing.assert_close(scores.total, expected, atol=1e-6, rtol=0)
    assert scores.weights == {"hps": 1.0} and list(scores.parts) == ["hps"]


def test_score_is_the_cosine_of_a_plain_clip(reward, images, prompts):
    weights = build().state_dict()
    pixels = torch.stack([reference_transform(image, 28) for image in images])
    tokens = open_clip.get_tokenizer("ViT-H-14")(TEXTS)
    seen = picture_features(weights, pixels, heads=2, activation=gelu)
    read = text_features(weights, tokens, heads=2, end=49407, activation=gelu)
    total = reward.score(images, prompts).total
    torch.testing.assert_close(total, (seen * read).sum(dim=-1), atol=1e-5, rtol=0)


def test_the_prompt_of_an_image_is_its_own(reward, images, prompts):
    total = reward.score(images, prompts).total
    order = [3, 0, 4, 2, 1]
    shuffled = reward.score(images[order], [prompts[i] for i in order]).total
    torch.testing.assert_close(shuffled, total[order], atol=1e-6, rtol=0)
    assert not torch.allclose(
        reward.score(images, [prompts[i] for i in order]).total, total, atol=1e-4
    )


def test_rewards_see_the_raw_text(reward, images):
    rewritten = [Prompt("a red cat", generation_text="something else")]
    plain = [Prompt("a red cat")]
    assert torch.equal(
        reward.score(images[:1], rewritten).total, reward.score(images[:1], plain).total
    )


def test_scores_do_not_depend_on_the_batch(file, images, prompts):
    whole = HPSReward(str(file)).load().score(images, prompts).total
    pieces = HPSReward(str(file), batch_size=2).load().score(images, prompts).total
    one = HPSReward(str(file)).load()
    single = torch.cat([one.score(images[i : i + 1], prompts[i : i + 1]).total for i in range(5)])
    torch.testing.assert_close(pieces, whole, atol=1e-6, rtol=0)
    torch.testing.assert_close(single, whole, atol=1e-6, rtol=0)


def test_kept_prompts_do_not_depend_on_the_texts_before(file, images, prompts):
    fresh = HPSReward(str(file)).load()
    used = HPSReward(str(file)).load()
    used.score(images, [Prompt(f"text {i}") for i in range(5)])
    used.score(images[:2], prompts[:2])
    assert torch.equal(used.score(images, prompts).total, fresh.score(images, prompts).total)


def test_each_text_is_encoded_once(reward, images, prompts, monkeypatch):
    encode, calls = reward.network.encode_text, []
    monkeypatch.setattr(
        reward.network,
        "encode_text",
        lambda tokens, **k: calls.append(len(tokens)) or encode(tokens, **k),
    )
    reward.score(images, prompts)
    reward.score(images, prompts)
    assert calls == [1] * len(set(TEXTS))


def test_only_the_latest_texts_are_kept(reward, images, monkeypatch):
    monkeypatch.setattr(base, "MAX_KEPT", 3)
    texts = [Prompt(f"text {i}") for i in range(5)]
    total = reward.score(images, texts).total
    assert list(reward._kept) == ["text 2", "text 3", "text 4"]
    assert torch.equal(reward.score(images, texts).total, total)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_numbers_do_not_depend_on_the_trainers_precision(file, images, prompts, dtype):
    expected = HPSReward(str(file)).load().score(images, prompts).total
    torch.set_default_dtype(dtype)
    try:
        reward = HPSReward(str(file)).load()
        with torch.autocast("cpu", dtype=torch.bfloat16):
            total = reward.score(images, prompts).total
    finally:
        torch.set_default_dtype(torch.float32)
    assert total.dtype == torch.float32 and torch.equal(total, expected)


def test_scores_from_inference_mode_and_after_it_enter_a_loss(reward, images, prompts):
    with torch.inference_mode():
        reward.score(images, prompts)
    weight = torch.ones(5, requires_grad=True)
    total = reward.score(images, prompts).total
    (weight * total).sum().backward()
    assert not total.requires_grad and torch.equal(weight.grad, total)


def test_a_training_parent_changes_nothing(tmp_path, images, prompts):
    dropping = {**MODEL, "vision_cfg": {**VISION, "patch_dropout": 0.5}}
    reward = HPSReward(str(write(tmp_path, dropping))).load()
    total = reward.score(images, prompts).total
    torch.nn.ModuleList([reward]).train()
    assert torch.equal(reward.score(images, prompts).total, total)
    assert not any(parameter.requires_grad for parameter in reward.network.parameters())


# --- pictures


def reference_transform(image, size):
    """The published transform by torchvision: scale the longer side, pad, normalise."""
    height, width = image.shape[1:]
    scale = size / max(height, width)
    resized = tvf.resize(
        image, [round(height * scale), round(width * scale)], tvf.InterpolationMode.BICUBIC
    )
    return tvf.normalize(CenterCropOrPad(size)(resized), MEAN, STD)


@pytest.mark.parametrize(
    "shape", [(384, 384), (480, 640), (641, 383), (100, 60), (60, 101), (28, 28)]
)
@pytest.mark.parametrize("size", [28, 224])
def test_transform_matches_torchvision(shape, size):
    image = torch.rand(3, *shape, generator=torch.Generator().manual_seed(0))
    result = fit_pictures(image[None], size, MEAN, STD)[0]
    assert result.shape == (3, size, size)
    torch.testing.assert_close(result, reference_transform(image, size), atol=1e-5, rtol=0)


def test_transform_is_near_open_clips_longest_mode_on_pil_pictures():
    """open_clip resizes 8-bit PIL pictures; over natural sizes that differs by rounding only."""
    ramp = torch.linspace(0, 255, 640).expand(480, 640)
    pixels = torch.stack([ramp, ramp.flip(1), ramp.flip(0) / 2], dim=-1).to(torch.uint8)
    picture = Image.fromarray(pixels.numpy())
    resized = ResizeKeepRatio(224, longest=1)(picture)
    expected = tvf.normalize(CenterCropOrPad(224)(tvf.to_tensor(resized)), MEAN, STD)
    result = fit_pictures(tvf.to_tensor(picture)[None], 224, MEAN, STD)[0]
    assert (result - expected).abs().mean() < 0.01


def fit_with_pillow(pixels: numpy.ndarray, size: int, *, rounded: bool) -> numpy.ndarray:
    """Longer side to `size`, centred on black, normalised, by Pillow and NumPy: [size, size, 3].

    Pillow resizes 8-bit pictures, or channels of float32 that it neither rounds nor clamps.
    """
    height, width = pixels.shape[:2]
    fitted = [round(side * size / max(height, width)) for side in (width, height)]
    channels = [pixels[..., i] if rounded else pixels[..., i].astype("float32") for i in range(3)]
    resized = [
        numpy.asarray(Image.fromarray(channel).resize(fitted, Image.Resampling.BICUBIC))
        for channel in channels
    ]
    left, top = [(size - side) // 2 for side in fitted]
    square = numpy.zeros((size, size, 3))
    square[top : top + fitted[1], left : left + fitted[0]] = numpy.stack(resized, axis=-1) / 255
    return (square - numpy.array(MEAN)) / numpy.array(STD)


@pytest.mark.parametrize("shape", [(384, 384), (480, 640), (1024, 1024)])
@pytest.mark.parametrize(("rounded", "most", "mean"), [(True, 0.11, 0.004), (False, 1e-4, 1e-5)])
def test_pixels_are_near_those_of_pillow(shape, rounded, most, mean):
    pixels = 64 + draw_picture(*shape) // 2  # far from 0 and 255, where 8 bits cut overshoot off
    result = as_array(fit_pictures(as_tensor(pixels), 224, MEAN, STD))
    difference = numpy.abs(result - fit_with_pillow(pixels, 224, rounded=rounded))
    assert result.shape == (224, 224, 3)
    assert difference.max() < most and difference.mean() < mean


def test_grey_and_transparent_pictures_are_scored(reward, images, prompts):
    grey, alpha = images[:, :1], torch.rand(5, 1, 40, 30)
    three = reward.score(grey.expand(-1, 3, -1, -1), prompts).total
    assert torch.equal(reward.score(grey, prompts).total, three)
    opaque = reward.score(images, prompts).total
    assert torch.equal(reward.score(torch.cat([images, alpha], dim=1), prompts).total, opaque)


def test_padding_is_black_before_normalising_and_nothing_is_cut_off():
    image = torch.ones(1, 3, 480, 640)
    result = fit_pictures(image, 224, MEAN, STD)[0]
    black = -torch.tensor(MEAN) / torch.tensor(STD)
    white = (1 - torch.tensor(MEAN)) / torch.tensor(STD)
    for rows in (
        result[:, :28],
        result[:, -28:],
    ):  # 480 * 224 / 640 = 168 rows of picture, 28 above and below
        torch.testing.assert_close(rows, black.view(3, 1, 1).expand_as(rows))
    middle = result[:, 28:-28]
    torch.testing.assert_close(middle, white.view(3, 1, 1).expand_as(middle), atol=1e-5, rtol=0)


def test_a_picture_that_fits_is_not_resampled():
    image = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    assert torch.equal(fit_pictures(image, 32, (0, 0, 0), (1, 1, 1)), image)
    oblong = fit_pictures(image[..., :16], 32, (0, 0, 0), (1, 1, 1))
    assert torch.equal(oblong[..., 8:24], image[..., :16]) and oblong[..., :8].abs().sum() == 0


def test_normalisation_comes_from_the_config(tmp_path, images, prompts):
    custom = {"mean": [0.5, 0.4, 0.3], "std": [0.2, 0.3, 0.4]}
    total = (
        HPSReward(str(write(tmp_path, preprocess_cfg=custom))).load().score(images, prompts).total
    )
    model = build()
    pictures = model.encode_image(fit_pictures(images, 28, custom["mean"], custom["std"]))
    texts = model.encode_text(open_clip.get_tokenizer("ViT-H-14")(TEXTS))
    torch.testing.assert_close(total, torch.cosine_similarity(pictures, texts), atol=1e-6, rtol=0)


# --- the shipped scorer


@pytest.fixture(scope="module")
def broad():
    return HPSReward("cotgen_pl/shapes/assets/scorers/broad").load()


@pytest.mark.parametrize("suite", ["id_validation", "ood_geneval"])
def test_the_shipped_scorer_orders_pictures_of_the_shapes_world(broad, suite):
    """A right picture above one with mistakes, mostly one or two: measured at 0.91 to 0.94."""
    generator, prompts = random.Random(0), suites()[suite]
    right = [compose(prompt, generator) for prompt in prompts]
    wrong = [spoil(p, scene, generator) for p, scene in zip(prompts, right, strict=True)]
    scores = [
        broad.score(torch.stack([render(scene) for scene in scenes]), prompts).total
        for scenes in (right, wrong)
    ]
    assert len(prompts) == 192
    assert (scores[0] > scores[1]).float().mean() > 0.88


def test_a_score_of_the_shipped_scorer_alone_is_that_in_a_batch_of_16(broad):
    generator, prompts = random.Random(0), suites()["train"][:16]
    images = torch.stack([render(compose(prompt, generator)) for prompt in prompts])
    together = broad.score(images, prompts).total
    alone = [broad.score(images[i : i + 1], prompts[i : i + 1]).total for i in range(16)]
    torch.testing.assert_close(torch.cat(alone), together, atol=1e-5, rtol=0)
    swapped = broad.score(images[[1, 0]], [prompts[1], prompts[0]]).total
    torch.testing.assert_close(swapped, together[[1, 0]], atol=1e-5, rtol=0)


@pytest.mark.slow
def test_a_batch_is_three_times_as_fast_as_one_by_one(broad):
    """64 pictures of 8 prompts; one by one, each prompt is read again for each picture."""
    generator, texts = random.Random(0), suites()["train"][:8]
    prompts = [prompt for prompt in texts for _ in range(8)]
    images = torch.stack([render(compose(prompt, generator)) for prompt in prompts])

    def score_together():
        broad._kept.clear()
        broad.score(images, prompts)

    def score_one_by_one():
        for i in range(64):
            broad._kept.clear()
            broad.score(images[i : i + 1], prompts[i : i + 1])

    assert median_seconds(score_one_by_one) > 3 * median_seconds(score_together)


def median_seconds(work, repeats: int = 5) -> float:
    work()  # warm
    seconds = []
    for _ in range(repeats):
        started = time.perf_counter()
        work()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)


# --- files


def small_tokenizer() -> Tokenizer:
    words = ["<pad>", "<unk>", "a", "red", "circle", "blue", "square", "<start>", "<end>"]
    tokenizer = Tokenizer(
        models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>")
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<start> $A <end>", special_tokens=[("<start>", 7), ("<end>", 8)]
    )
    tokenizer.enable_padding(pad_id=0, pad_token="<pad>")
    return tokenizer


@pytest.mark.parametrize("named", [True, False])
def test_a_folder_with_its_own_tokenizer_needs_no_network(tmp_path, monkeypatch, named):
    text = {**TEXT, "context_length": 8, "vocab_size": 9}
    config = {
        "embed_dim": 24,
        "vision_cfg": {**VISION, "image_size": 32, "patch_size": 8},
        "text_cfg": dict(text),
    }
    model = build(config)
    if named:
        config["text_cfg"]["hf_tokenizer_name"] = "nobody/of-that-name"
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": config}))
    small_tokenizer().save(str(tmp_path / "tokenizer.json"))
    monkeypatch.setattr(
        socket, "getaddrinfo", lambda *_, **__: pytest.fail("asked for the network")
    )
    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked for the network"))

    images = torch.rand(2, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    reward = HPSReward(str(tmp_path)).load()
    total = reward.score(
        images, [Prompt("a red circle"), Prompt("a blue square a red circle a blue")]
    ).total
    tokens = torch.tensor([[7, 2, 3, 4, 8, 0, 0, 0], [7, 2, 5, 6, 2, 3, 4, 8]])  # the second is cut
    pictures = model.encode_image(fit_pictures(images, 32, MEAN, STD))
    expected = torch.cosine_similarity(pictures, model.encode_text(tokens))
    torch.testing.assert_close(total, expected, atol=1e-6, rtol=0)


def test_without_a_config_the_weights_are_those_of_vit_h_14(tmp_path):
    config = read_config(tmp_path, "ViT-H-14")["model_cfg"]
    assert config["vision_cfg"]["width"] == 1280 and not config.get("quick_gelu")
    tokenize = build_tokenizer({"context_length": 77}, tmp_path)
    assert torch.equal(tokenize(TEXTS), open_clip.get_tokenizer("ViT-H-14")(TEXTS))


def test_a_folder_gives_the_file_of_the_version(tmp_path):
    v21 = write(tmp_path)
    v2 = tmp_path / "HPS_v2_compressed.pt"
    v2.write_bytes(b"")
    for version, expected in (("v2.1", v21), ("v2", v2)):
        names = (ORIGINAL_FILES[version], OPEN_CLIP_FILE)
        assert find_weights(str(tmp_path), names, "HPS") == expected
        assert HPSReward(str(tmp_path), version)._files == names


def test_half_precision_files_are_scored_in_float32(tmp_path, images, prompts):
    file = write(tmp_path)
    torch.save({"state_dict": build().half().state_dict()}, file)
    reward = HPSReward(str(file)).load()
    assert {parameter.dtype for parameter in reward.network.parameters()} == {torch.float32}
    assert reward.score(images, prompts).total.isfinite().all()


def test_import_and_construction_do_not_import_open_clip():
    code = (
        "import sys; from cotgen_pl.rewards.hps import HPSReward; HPSReward(); "
        "print([m for m in ('open_clip', 'transformers', 'huggingface_hub') if m in sys.modules])"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


class Malicious:
    """Writes a file when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self):
        return Path.touch, (self.mark,)


@pytest.mark.parametrize("save", ["torch", "pickle"])
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, save):
    file, mark = write(tmp_path), tmp_path / "ran"
    content = {"state_dict": build().state_dict(), "extra": Malicious(mark)}
    if save == "torch":
        torch.save(content, file)
    else:
        file.write_bytes(pickle.dumps(content, protocol=2))
    with pytest.raises(ValueError, match="tensors only, got one that is damaged or would run code"):
        HPSReward(str(file)).load()
    assert not mark.exists()
    if save == "torch":
        torch.load(file, weights_only=False)
        assert mark.exists()  # so the file was armed


@pytest.mark.parametrize("name", ["HPS_v2.1_compressed.pt", "HPS.safetensors"])
@pytest.mark.parametrize("content", [b"", b"not a checkpoint"])
def test_a_damaged_file_is_refused(tmp_path, name, content):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match="tensors only, got one that is damaged"):
        HPSReward(str(tmp_path / name)).load()


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {"epoch": 3}}])
def test_a_checkpoint_of_something_else_is_refused(tmp_path, content):
    torch.save(content, write(tmp_path))
    with pytest.raises(ValueError, match="expected tensors by name"):
        HPSReward(str(tmp_path)).load()


def test_weights_of_another_architecture_are_refused(tmp_path):
    write(tmp_path)
    other = {**MODEL, "embed_dim": 12, "vision_cfg": {**VISION, "layers": 3}}
    (tmp_path / "open_clip_config.json").write_text(json.dumps({"model_cfg": other}))
    message = r"3 vision layers .* got 12 missing \(first: visual.*2 of another shape.*_config.json"
    with pytest.raises(ValueError, match=message):
        HPSReward(str(tmp_path)).load()


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("{", "JSONDecodeError"),
        ("{}", "KeyError"),
        ('{"model_cfg": {"embed_dim": 8}}', "no vision_cfg"),
        (json.dumps({"model_cfg": {**MODEL, "colour": 1}}), "colour"),
    ],
)
def test_a_config_of_another_format_is_refused(tmp_path, content, message):
    write(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(ValueError, match=f"expected open_clip's format.*got .*{message}"):
        HPSReward(str(tmp_path)).load()


def test_a_missing_tokenizer_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    named = {**MODEL, "text_cfg": {**TEXT, "hf_tokenizer_name": "./no/such/tokenizer"}}
    write(tmp_path, named)
    with pytest.raises(
        ValueError, match=r"expected a Hugging Face tokenizer.*put its tokenizer.json"
    ):
        HPSReward(str(tmp_path)).load()


@pytest.mark.parametrize(
    "path", ["/no/such/folder", "missing.pt", "scorers/broad.safetensors", "a/b/c", "~/x", "./x"]
)
def test_a_missing_local_path_is_refused_before_loading(path):
    with pytest.raises(ValueError, match="which does not exist"):
        HPSReward(path)


def test_an_empty_folder_is_refused_before_loading(tmp_path):
    with pytest.raises(
        ValueError, match=r"expected HPS_v2.1_compressed.pt or open_clip_model.safetensors"
    ):
        HPSReward(str(tmp_path))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"version": "v3"}, "expected one of"),
        ({"batch_size": 0}, "expected batch_size of 1 or more"),
    ],
)
def test_wrong_arguments_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        HPSReward(**arguments)


def test_the_hub_without_a_network_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    with pytest.raises(ValueError, match=r"hf download xswu/HPSv2 HPS_v2_compressed.pt.*set path"):
        HPSReward(version="v2").load()


def test_the_hub_file_is_that_of_the_version(monkeypatch, file):
    asked = []
    monkeypatch.setattr(
        "huggingface_hub.hf_hub_download", lambda *what: asked.append(what) or str(file)
    )
    HPSReward().load()
    HPSReward(version="v2").load()
    assert asked == [
        ("xswu/HPSv2", "HPS_v2.1_compressed.pt"),
        ("xswu/HPSv2", "HPS_v2_compressed.pt"),
    ]


def test_scoring_before_loading_and_wrong_shapes_are_refused(file, images, prompts):
    reward = HPSReward(str(file))
    with pytest.raises(ValueError, match=r"call load\(\) before score"):
        reward.score(images, prompts)
    reward.load()
    for wrong, texts in ((images, prompts[:3]), (images[0], prompts[:3])):
        with pytest.raises(ValueError, match="pass one picture per prompt"):
            reward.score(wrong, texts)
    with pytest.raises(ValueError, match="give grey, RGB or RGBA pictures"):
        reward.score(images[:, :2], prompts)


def test_a_second_load_does_nothing(reward):
    network = reward.network
    assert reward.load() is reward and reward.network is network


def test_a_download_that_fails_stops_a_run_before_the_policys_weights_are_read(
    tiny_janus, tmp_path, monkeypatch
):
    policy = make_policy(tiny_janus)
    monkeypatch.setattr(type(policy), "load", lambda self: pytest.fail("weights were read"))
    with pytest.raises(ValueError, match=r"expected a local path or HPS_v2\.1_compressed\.pt of"):
        fit(make_grpo(policy=policy, folder=tiny_janus, reward=HPSReward("no/where")), tmp_path)
