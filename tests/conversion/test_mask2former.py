"""A small detector under mmdet's names, converted, against transformers and mmdet's own merging."""

import pytest
import torch
from safetensors import safe_open
from torch import nn

from cotgen_pl.conversion.mask2former import convert, reorder_merging

WIDTH, WINDOW, HEADS, DEPTHS = 8, 3, (1, 2, 2, 4), (1, 2, 1, 1)
HIDDEN, FEED_FORWARD, QUERIES, LABELS = 32, 24, 5, 3
POINTS, LEVELS, ATTENTION_HEADS = 4, 3, 8


def linear(rows: int, columns: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (rows, columns), "bias": (rows,)}


def norm(width: int) -> dict[str, tuple[int, ...]]:
    return {"weight": (width,), "bias": (width,)}


def conv(rows: int, columns: int, size: int = 1, bias: bool = True) -> dict[str, tuple[int, ...]]:
    return {"weight": (rows, columns, size, size)} | ({"bias": (rows,)} if bias else {})


def swin_shapes() -> dict:
    shapes = {"patch_embed.projection": conv(WIDTH, 3, 4), "patch_embed.norm": norm(WIDTH)}
    for i, (depth, heads) in enumerate(zip(DEPTHS, HEADS, strict=True)):
        width = WIDTH * 2**i
        for j in range(depth):
            shapes |= {
                f"stages.{i}.blocks.{j}.norm1": norm(width),
                f"stages.{i}.blocks.{j}.attn.w_msa": {
                    "relative_position_bias_table": ((2 * WINDOW - 1) ** 2, heads),
                    "relative_position_index": (WINDOW**2, WINDOW**2),
                },
                f"stages.{i}.blocks.{j}.attn.w_msa.qkv": linear(3 * width, width),
                f"stages.{i}.blocks.{j}.attn.w_msa.proj": linear(width, width),
                f"stages.{i}.blocks.{j}.norm2": norm(width),
                f"stages.{i}.blocks.{j}.ffn.layers.0.0": linear(4 * width, width),
                f"stages.{i}.blocks.{j}.ffn.layers.1": linear(width, 4 * width),
            }
        if i < 3:
            shapes[f"stages.{i}.downsample.norm"] = norm(4 * width)
            shapes[f"stages.{i}.downsample.reduction"] = {"weight": (2 * width, 4 * width)}
        shapes[f"norm{i}"] = norm(width)
    return {f"backbone.{name}": values for name, values in shapes.items()}


def feed_forward() -> dict:
    return {
        "ffns.0.layers.0.0": linear(FEED_FORWARD, HIDDEN),
        "ffns.0.layers.1": linear(HIDDEN, FEED_FORWARD),
    }


def pixel_decoder_shapes() -> dict:
    offsets = ATTENTION_HEADS * LEVELS * POINTS
    layer = feed_forward() | {
        "attentions.0.sampling_offsets": linear(2 * offsets, HIDDEN),
        "attentions.0.attention_weights": linear(offsets, HIDDEN),
        "attentions.0.value_proj": linear(HIDDEN, HIDDEN),
        "attentions.0.output_proj": linear(HIDDEN, HIDDEN),
        "norms.0": norm(HIDDEN),
        "norms.1": norm(HIDDEN),
    }
    shapes = {f"encoder.layers.{k}.{name}": v for k in range(2) for name, v in layer.items()}
    for k in range(LEVELS):
        shapes[f"input_convs.{k}.conv"] = conv(HIDDEN, WIDTH * 2 ** (3 - k))
        shapes[f"input_convs.{k}.gn"] = norm(HIDDEN)
    shapes |= {
        "level_encoding": {"weight": (LEVELS, HIDDEN)},
        "lateral_convs.0.conv": conv(HIDDEN, WIDTH, bias=False),
        "lateral_convs.0.gn": norm(HIDDEN),
        "output_convs.0.conv": conv(HIDDEN, HIDDEN, 3, bias=False),
        "output_convs.0.gn": norm(HIDDEN),
        "mask_feature": conv(HIDDEN, HIDDEN),
    }
    return {f"panoptic_head.pixel_decoder.{name}": values for name, values in shapes.items()}


def head_shapes() -> dict:
    attention = {"in_proj_weight": (3 * HIDDEN, HIDDEN), "in_proj_bias": (3 * HIDDEN,)}
    layer = feed_forward() | {f"norms.{k}": norm(HIDDEN) for k in range(3)}
    for k in range(2):
        layer[f"attentions.{k}.attn"] = attention
        layer[f"attentions.{k}.attn.out_proj"] = linear(HIDDEN, HIDDEN)
    shapes = {
        f"transformer_decoder.layers.{k}.{name}": v for k in range(2) for name, v in layer.items()
    }
    shapes |= {
        "transformer_decoder.post_norm": norm(HIDDEN),
        "query_embed": {"weight": (QUERIES, HIDDEN)},
        "query_feat": {"weight": (QUERIES, HIDDEN)},
        "level_embed": {"weight": (LEVELS, HIDDEN)},
        "cls_embed": linear(LABELS + 1, HIDDEN),
    }
    shapes |= {f"mask_embed.{k}": linear(HIDDEN, HIDDEN) for k in (0, 2, 4)}
    return {f"panoptic_head.{name}": values for name, values in shapes.items()}


def mmdet_weights() -> dict[str, torch.Tensor]:
    groups = swin_shapes() | pixel_decoder_shapes() | head_shapes()
    return {
        f"{prefix}.{end}": torch.randn(shape)
        for prefix, shapes in groups.items()
        for end, shape in shapes.items()
    }


def write(folder, weights):
    file = folder / "mask2former.pth"
    torch.save({"meta": {"epoch": 50, "CLASSES": ("person",)}, "state_dict": weights}, file)
    return file


@pytest.fixture(scope="module")
def original():
    torch.manual_seed(0)
    return mmdet_weights()


@pytest.fixture(scope="module")
def converted(original, tmp_path_factory):
    folder = tmp_path_factory.mktemp("mask2former")
    target = folder / "converted"
    target.mkdir()
    return convert(write(folder, original), target)


@pytest.fixture
def detector(converted, monkeypatch):
    """Transformers' class; it asks for scipy, which only its training loss uses."""
    from transformers.models.mask2former import modeling_mask2former

    monkeypatch.setattr(modeling_mask2former, "requires_backends", lambda *_: None)
    model, report = modeling_mask2former.Mask2FormerForUniversalSegmentation.from_pretrained(
        converted.target, output_loading_info=True
    )
    return model.eval(), report


def test_only_position_indices_are_left_out(original, converted):
    assert len(converted.dropped) == sum(DEPTHS)
    assert all(name.endswith(".relative_position_index") for name in converted.dropped)
    cut = sum(DEPTHS) * 2 + 2 * 2  # in three instead of one
    assert converted.num_read == len(original)
    unused = 3  # that transformers has and mmdet has not
    assert converted.num_written == len(original) - sum(DEPTHS) + 2 * cut + unused


def test_every_weight_of_the_class_is_there(detector):
    model, report = detector
    assert not any(report[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert torch.allclose(model.criterion.empty_weight, torch.tensor([1, 1, 1, 0.1]))


def test_names_are_those_of_version_4(converted):
    with safe_open(converted.target / "model.safetensors", "pt") as file:
        names = set(file.keys())
    encoder = "model.pixel_level_module.encoder.encoder.layers.1.blocks.1"
    assert f"{encoder}.attention.self.query.weight" in names
    assert f"{encoder}.attention.output.dense.bias" in names


def test_sizes_come_from_the_weights(detector):
    config = detector[0].config
    assert (config.num_queries, config.num_labels, config.decoder_layers) == (QUERIES, LABELS, 3)
    assert (config.encoder_layers, config.encoder_feedforward_dim) == (2, FEED_FORWARD)
    swin = config.backbone_config
    assert (swin.embed_dim, swin.window_size, swin.mlp_ratio) == (WIDTH, WINDOW, 4)
    assert (tuple(swin.depths), tuple(swin.num_heads)) == (DEPTHS, HEADS)


def test_weights_lie_where_they_belong(original, detector):
    model = detector[0].model
    block = model.pixel_level_module.encoder.swin.encoder.layers[1].blocks[1]
    qkv = original["backbone.stages.1.blocks.1.attn.w_msa.qkv.weight"]
    for index, name in enumerate(("q_proj", "k_proj", "v_proj")):
        third = qkv[16 * index : 16 * (index + 1)]
        assert torch.equal(getattr(block.attention, name).weight, third)
    head = "panoptic_head.transformer_decoder.layers.1"
    layer = model.transformer_module.decoder.layers[1]
    assert torch.equal(
        layer.cross_attn.in_proj_bias, original[f"{head}.attentions.0.attn.in_proj_bias"]
    )
    keys = original[f"{head}.attentions.1.attn.in_proj_weight"][HIDDEN : 2 * HIDDEN]
    assert torch.equal(layer.self_attn.k_proj.weight, keys)
    for index, name in enumerate(("cross_attn", "self_attn", "final")):
        weight = getattr(layer, f"{name}_layer_norm").weight
        assert torch.equal(weight, original[f"{head}.norms.{index}.weight"])
    last = model.get_parameter("transformer_module.decoder.mask_predictor.mask_embedder.2.0.bias")
    assert torch.equal(last, original["panoptic_head.mask_embed.4.bias"])
    decoder = model.pixel_level_module.decoder
    levels = original["panoptic_head.pixel_decoder.level_encoding.weight"]
    assert torch.equal(decoder.level_embed, levels)


def test_merging_equals_mmdets(original, detector):
    """Mmdet: unfold 2 x 2 patches, norm, linear (mmdet 2.28.2, models/utils/transformer.py)."""
    name = "backbone.stages.0.downsample"
    pixels = torch.randn(2, WIDTH, 6, 4)
    patches = nn.Unfold(2, stride=2)(pixels).transpose(1, 2)  # [B, N, 4C]
    weight, bias = original[f"{name}.norm.weight"], original[f"{name}.norm.bias"]
    normal = nn.functional.layer_norm(patches, (4 * WIDTH,), weight, bias)
    expected = normal @ original[f"{name}.reduction.weight"].T
    merge = detector[0].model.pixel_level_module.encoder.swin.encoder.layers[0].downsample
    merged = merge(pixels.flatten(2).transpose(1, 2), (6, 4))
    assert (merged - expected).abs().max() < 1e-4


def test_reordering_by_hand():
    # two channels a, b with their pixels (row, column)
    before = torch.tensor([0, 1, 10, 11, 100, 101, 110, 111])
    assert reorder_merging(before).tolist() == [0, 100, 10, 110, 1, 101, 11, 111]


def test_detects_something(detector):
    outputs = detector[0](pixel_values=torch.randn(1, 3, 64, 64))
    assert outputs.class_queries_logits.shape == (1, QUERIES, LABELS + 1)
    assert outputs.masks_queries_logits.isfinite().all()


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        (lambda w: w.pop("panoptic_head.transformer_decoder.post_norm.bias"), "1 missing"),
        (lambda w: w.pop("panoptic_head.cls_embed.weight"), "class_predictor.weight"),
        (lambda w: w.update({"rpn_head.conv.weight": torch.ones(1)}), "unexpected names.*rpn_head"),
        (
            lambda w: w.update({"panoptic_head.query_embed.weight": torch.ones(4, HIDDEN)}),
            "of another shape",
        ),
    ],
)
def test_other_checkpoints_are_refused(original, change, refusal, tmp_path):
    weights = dict(original)
    change(weights)
    with pytest.raises(ValueError, match=refusal):
        convert(write(tmp_path, weights), tmp_path)
