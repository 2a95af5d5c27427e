import copy
import json
import shutil
import warnings
import weakref
from pathlib import Path

import pytest
import torch
import transformers
from bitsandbytes.nn import Linear4bit, Linear8bitLt
from safetensors.torch import load_file, save_file
from transformers import JanusForConditionalGeneration, JanusProcessor

from cotgen_pl.adapters import LoraSettings
from cotgen_pl.decoding.eager import CACHE
from cotgen_pl.decoding.settings import DecodingSettings
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.sampling import sample_tokens
from tests.policies.equivalence import (
    PROMPTS,
    PolicyEquivalence,
    random_tokens,
    repeated,
    stepped_logits,
)

LAYERS = "model.model.language_model.layers."
NORM = "model.model.language_model.norm."
GENERATION = tuple(f"model.model.generation_{part}." for part in ("embeddings", "aligner", "head"))
TEXT_EMBEDDING = "model.model.language_model.embed_tokens."
LORA = LoraSettings(rank=4, alpha=8)
EAGER = DecodingSettings(path="eager")


@pytest.fixture(params=["random", "shipped"])
def folder(request) -> Path:
    """Each checkpoint that facts about real use are shown on."""
    return request.getfixturevalue(
        {"random": "janus_folder", "shipped": "shipped_folder"}[request.param]
    )


def load(folder, **arguments) -> JanusPolicy:
    torch.manual_seed(0)  # fresh adapters are random
    return JanusPolicy(str(folder), **arguments).load()


def perturb(policy, size=0.05):
    """Move everything that trains, as training would."""
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in policy.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(size * noise.to(parameter))
    return policy


def trained_names(policy):
    return {name for name, parameter in policy.named_parameters() if parameter.requires_grad}


def image_loss(policy, tokens):
    logits = policy.logits(PROMPTS[: len(tokens)], tokens)
    return -logits.float().log_softmax(-1).gather(-1, tokens[..., None]).mean()


# Of three lengths, and such that the shipped model draws something for each.
WORLD_PROMPTS = [
    "three green circles",
    "a striped red circle on the left of a plain blue square",
    "a photo of four yellow triangles",
]


def greedy_tokens(policy, guidance=5.0):
    seeds = range(len(WORLD_PROMPTS))
    return sample_tokens(policy, WORLD_PROMPTS, guidance=guidance, seeds=seeds, top_k=1)[0]


def transformers_tokens(model, processor, guidance=5.0):
    """Greedy tokens of transformers' own loop for one left-padded batch of chat prompts."""
    chats = [
        [{"role": "user", "content": [{"type": "text", "text": prompt}]}]
        for prompt in WORLD_PROMPTS
    ]
    texts = [processor.apply_chat_template(chat, add_generation_prompt=True) for chat in chats]
    inputs = processor(text=texts, generation_mode="image", return_tensors="pt", padding=True)
    assert inputs["attention_mask"].sum(-1).unique().numel() > 1, "lengths must differ"
    settings = {"generation_mode": "image", "do_sample": False, "guidance_scale": guidance}
    try:
        return model.generate(**inputs, **settings)
    except TypeError as error:
        if "prefill_chunk_size" not in str(error):
            raise
        pytest.skip(f"transformers {transformers.__version__} generates no Janus pictures: {error}")


@pytest.fixture
def copied(janus_folder, tmp_path) -> Path:
    """A copy of the checkpoint to spoil."""
    return Path(shutil.copytree(janus_folder, tmp_path / "checkpoint"))


class TestEquivalence(PolicyEquivalence):
    @pytest.fixture
    def exact(self, folder):
        return load(folder, dtype="float64")


class TestEagerDecodingEquivalence(PolicyEquivalence):
    @pytest.fixture
    def exact(self, folder):
        return load(folder, dtype="float64", decoding=EAGER)


class TestBucketsEquivalence(PolicyEquivalence):
    @pytest.fixture
    def exact(self, janus_folder):
        buckets = DecodingSettings(buckets=(16, 24, 96))
        return load(janus_folder, dtype="float64", decoding=buckets)


class TestEagerAttentionEquivalence(PolicyEquivalence):
    # Eager attention takes its softmax in float32, whatever the model's type: errors of 6e-8, on
    # the way to logits of up to 20.
    tolerance = 1e-5

    @pytest.fixture
    def exact(self, folder):
        return load(folder, dtype="float64", attention="eager", decoding=EAGER)


class TestLoraEquivalence(PolicyEquivalence):
    @pytest.fixture
    def exact(self, janus_folder):
        return perturb(load(janus_folder, dtype="float64", lora=LORA))

    test_reference_keeps_the_weights_of_its_moment = None  # it is the base model: tested below


@pytest.mark.parametrize("guidance", [1.5, 5.0])
def test_greedy_tokens_are_those_of_transformers(folder, guidance):
    policy = load(folder)
    expected = transformers_tokens(policy.janus, policy.processor, guidance)
    assert greedy_tokens(policy, guidance).tolist() == expected.tolist()
    if guidance == 5:  # at 1.5 the shipped model's likeliest picture is an empty one
        assert expected.unique().numel() > 2


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("janus_pro", "<|User|>: a red circle\n\n<|Assistant|>:<begin_of_image>"),
        ("janus", "User: a red circle\n\nAssistant:<begin_of_image>"),
    ],
)
def test_golden_prompts(folder, template, expected):
    policy = JanusPolicy(str(folder), template=template)
    ids = policy.prompt_ids("  a red circle\n")
    tokenizer = policy.processor.tokenizer
    assert tokenizer.decode(ids) == tokenizer.bos_token + expected
    assert ids[0] == tokenizer.bos_token_id
    assert ids[-1] == tokenizer.get_vocab()["<begin_of_image>"]
    assert ids.count(ids[0]) == ids.count(ids[-1]) == 1


def test_prompt_is_the_one_of_the_processor(folder):
    policy = JanusPolicy(str(folder))
    assert policy.template == "janus_pro"
    chat = [{"role": "user", "content": [{"type": "text", "text": "a dog"}]}]
    text = policy.processor.apply_chat_template(chat, add_generation_prompt=True)
    inputs = policy.processor(text=[text], generation_mode="image")
    assert policy.prompt_ids("a dog") == list(inputs["input_ids"][0])


def test_template_is_read_from_the_chat_template(copied):
    chat_template = copied / "chat_template.jinja"
    chat_template.write_text(chat_template.read_text().replace("<|User|>", "User"))
    with pytest.raises(ValueError, match=r"got another or none; .*template: janus_pro or template"):
        JanusPolicy(str(copied))
    chat_template.write_text(chat_template.read_text().replace("<|Assistant|>", "Assistant"))
    assert JanusPolicy(str(copied)).template == "janus"


def test_template_can_be_named(copied):
    (copied / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"expected .* to carry the chat template"):
        JanusPolicy(str(copied))
    assert JanusPolicy(str(copied), template="janus").template == "janus"


def test_unconditional_rows_are_pads_as_long_as_the_prompt(janus_folder):
    policy = load(janus_folder)
    vocabulary = policy.processor.tokenizer.get_vocab()
    pad, begin = vocabulary["<｜▁pad▁｜>"], vocabulary["<begin_of_image>"]
    bos = policy.processor.tokenizer.bos_token_id
    seen = []
    table = policy.janus.model.language_model.embed_tokens
    hook = table.register_forward_hook(lambda module, ids, output: seen.append(ids[0].tolist()))
    with hook, torch.no_grad():
        policy.logits(["two", "a red circle"], random_tokens(policy, 2), unconditional=True)
    lengths = [len(policy.prompt_ids(prompt)) for prompt in ("two", "a red circle")]
    longest = max(lengths)
    expected = [
        [pad] * (longest - length) + [bos] + [pad] * (length - 2) + [begin] for length in lengths
    ]
    assert lengths[0] != lengths[1]
    assert seen == [expected]


def test_each_distinct_prompt_and_one_unconditional_row_per_length_are_read(janus_folder):
    policy = load(janus_folder, decoding=EAGER)
    rows = []
    hook = policy.blocks()[0].register_forward_hook(
        lambda layer, arguments, output: rows.append(len(arguments[0]))
    )
    prompts = ["two", "six", "a red circle", "two"]
    lengths = {len(policy.prompt_ids(prompt)) for prompt in prompts}
    with hook, torch.no_grad():
        logits, _ = policy.prefill(prompts, guided=True, copies=3)
    assert rows == [3 + len(lengths)]
    assert len(logits) == 2 * 12


@torch.no_grad()
@pytest.mark.parametrize("path", ["graph", "eager"])
def test_decoding_memory_ends_with_its_batch(janus_folder, path):
    policy = load(janus_folder, decoding=DecodingSettings(path=path))
    _, cache = policy.prefill(PROMPTS, guided=True, copies=2)
    policy.step(random_tokens(policy, 6)[:, 0], cache)
    if path == "eager":
        held = [layer.keys for layer in cache.memory.layers]
    else:
        held = [*cache.memory.keys, *cache.memory.values]
    seen = [weakref.ref(tensor) for tensor in held]
    del cache, held
    assert not [one for one in seen if one() is not None]


class Raises(torch.nn.Module):
    def forward(self, hidden):
        raise AssertionError("the text head ran")


def test_text_head_never_runs(janus_folder):
    policy = load(janus_folder)
    policy.janus.lm_head = Raises()
    with pytest.raises(AssertionError, match="text head"):
        policy.janus(input_ids=torch.tensor([[1, 2]]))
    sample_tokens(policy, PROMPTS, guidance=2.0, seeds=range(3))
    image_loss(policy, random_tokens(policy, 2)).backward()


def test_only_image_positions_reach_the_head_and_no_layer_is_kept(janus_folder):
    policy = load(janus_folder)
    head_shapes, outputs = [], []
    inner = policy.janus.model
    inner.generation_head.register_forward_hook(lambda m, x, y: head_shapes.append(x[0].shape))
    inner.language_model.register_forward_hook(lambda m, x, y: outputs.append(y))
    policy.logits(PROMPTS, random_tokens(policy, 3))
    assert head_shapes == [(3, policy.num_tokens, 64)]
    [output] = outputs
    assert output.hidden_states is None
    assert getattr(output, CACHE) is None


@pytest.mark.parametrize(
    ("arguments", "prefixes"),
    [
        ({}, (LAYERS, NORM)),
        ({"trains": "generation"}, GENERATION),
        ({"trains": "both"}, (LAYERS, NORM, *GENERATION)),
        ({"train_text_embedding": True}, (LAYERS, NORM, TEXT_EMBEDDING)),
        ({"trains": "generation", "train_text_embedding": True}, (*GENERATION, TEXT_EMBEDDING)),
    ],
)
def test_what_trains_and_nothing_else(janus_folder, arguments, prefixes):
    policy = load(janus_folder, **arguments)
    names = {name for name, _ in policy.named_parameters()}
    assert all(any(name.startswith(prefix) for name in names) for prefix in prefixes)
    assert trained_names(policy) == {name for name in names if name.startswith(prefixes)}
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=1e-3)
    image_loss(policy, random_tokens(policy, 2)).backward()
    for name, parameter in policy.named_parameters():
        assert (parameter.grad is not None) == name.startswith(prefixes), name
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    optimizer.step()
    assert set(map(id, optimizer.state)) == set(map(id, trained))
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained_names(policy)


def test_adapters_alone_train(janus_folder):
    policy = load(janus_folder, lora=LORA)
    names = trained_names(policy)
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    assert len(names) == 2 * 7 * len(policy.blocks())
    image_loss(policy, random_tokens(policy, 2)).backward()
    assert {name for name, p in policy.named_parameters() if p.grad is not None} == names


def test_fresh_adapters_change_nothing(janus_folder):
    policy, base = load(janus_folder, lora=LORA), load(janus_folder)
    tokens = random_tokens(policy, 3)
    with torch.no_grad():
        assert torch.equal(policy.logits(PROMPTS, tokens), base.logits(PROMPTS, tokens))


@pytest.mark.parametrize(
    "arguments", [{}, {"lora": LORA, "dtype": "bfloat16"}, {"trains": "both", "dtype": "float64"}]
)
def test_room_without_weights_is_that_of_the_weights(janus_folder, arguments):
    room = JanusPolicy(str(janus_folder), **arguments).load(empty=True)
    full = load(janus_folder, **arguments)

    def kinds(policy):
        tensors = [*policy.named_parameters(), *policy.named_buffers()]
        return [(name, t.shape, t.dtype, t.device, t.requires_grad) for name, t in tensors]

    assert len(kinds(full)) > 100
    assert kinds(room) == kinds(full)
    assert room.janus.generation_config.to_dict() == full.janus.generation_config.to_dict()


@pytest.mark.parametrize("arguments", [{}, {"lora": LORA}])
def test_training_mode_does_not_reach_the_model(janus_folder, arguments):
    policy = load(janus_folder, **arguments)
    torch.nn.ModuleList([policy]).train()
    policy.train()
    assert not [name for name, module in policy.named_modules() if module.training]


@pytest.mark.parametrize("unconditional", [False, True, torch.tensor([True, False, False, True])])
@pytest.mark.parametrize("arguments", [{}, {"lora": LORA}, {"attention": "eager"}])
def test_a_prompt_of_several_images_is_read_once_and_nothing_changes(
    janus_folder, arguments, unconditional, monkeypatch
):
    policy = load(janus_folder, **arguments)
    perturb(policy)
    prompts, tokens = [PROMPTS[0], PROMPTS[1], PROMPTS[0], PROMPTS[0]], random_tokens(policy, 4)
    shapes, found = [], []
    policy.blocks()[0].register_forward_pre_hook(lambda m, x: shapes.append(x[0].shape[:2]))
    for worth in (1, 0.1):
        monkeypatch.setattr("cotgen_pl.policies.janus.WORTH_SHARING", worth)
        policy.zero_grad()
        logits = policy.logits(prompts, tokens, unconditional)
        logits.log_softmax(-1).square().mean().backward()
        gradients = {n: p.grad for n, p in policy.named_parameters() if p.requires_grad}
        found.append((logits, gradients))
    behind = policy.num_tokens - 1
    length = shapes[0][1] - behind
    assert shapes == [(4, length + behind), (shapes[1][0], length), (4, behind)]
    assert shapes[1][0] < 4
    assert (found[0][0] - found[1][0]).abs().max() < 1e-5
    for name, gradient in found[0][1].items():
        assert (gradient - found[1][1][name]).norm() < 1e-4 * gradient.norm(), name


def test_prompts_are_read_for_each_image_where_that_costs_little(janus_folder):
    policy, rows = load(janus_folder), []
    policy.blocks()[0].register_forward_pre_hook(lambda m, x: rows.append(x[0].shape[0]))
    policy.logits(
        [*PROMPTS[:2], *(f"{n} circles" for n in range(30)), PROMPTS[0]], random_tokens(policy, 33)
    )
    assert rows == [33]


@pytest.mark.parametrize(
    "arguments", [{"dtype": "float64"}, {"gradient_checkpointing": True}, {"compile": True}]
)
def test_some_policies_read_a_prompt_for_each_image(janus_folder, arguments, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda body: body)
    policy, rows = load(janus_folder, **arguments), []
    policy.blocks()[0].register_forward_pre_hook(lambda m, x: rows.append(x[0].shape[0]))
    policy.logits([PROMPTS[0]] * 4, random_tokens(policy, 4))
    assert rows == [4]


@pytest.mark.parametrize("arguments", [{}, {"lora": LORA}, {"trains": "both"}])
def test_gradient_checkpointing_recomputes_and_changes_nothing(janus_folder, arguments):
    tokens, gradients, calls, losses = None, [], [], []
    for checkpointing in (False, True):
        policy = load(
            janus_folder, dtype="float64", gradient_checkpointing=checkpointing, **arguments
        )
        perturb(policy)
        tokens = random_tokens(policy, 3)
        count = []
        # Before the call: recomputing stops as soon as the last saved activation is there again.
        policy.blocks()[1].mlp.register_forward_pre_hook(lambda m, x, seen=count: seen.append(1))
        losses.append(image_loss(policy, tokens))
        forward_calls = len(count)
        losses[-1].backward()
        calls.append((forward_calls, len(count)))
        gradients.append({n: p.grad for n, p in policy.named_parameters() if p.requires_grad})
        assert not [name for name, module in policy.named_modules() if module.training]
    assert calls == [(1, 1), (1, 2)]
    assert losses[0].item() == losses[1].item()
    for name, gradient in gradients[0].items():
        assert (gradient - gradients[1][name]).abs().max() < 1e-12, name


def test_gradient_checkpointing_leaves_decoding_alone(janus_folder):
    plain = load(janus_folder, decoding=EAGER)
    recomputing = load(janus_folder, gradient_checkpointing=True, decoding=EAGER)
    with torch.enable_grad():
        logits, cache = recomputing.prefill(PROMPTS, guided=True)
        second = recomputing.step(random_tokens(plain, 3)[:, 0], cache)
    expected, cache = plain.prefill(PROMPTS, guided=True)
    assert torch.equal(logits, expected)
    assert torch.equal(second, plain.step(random_tokens(plain, 3)[:, 0], cache))


@pytest.mark.parametrize("arguments", [{}, {"trains": "both"}, {"lora": LORA}])
def test_bfloat16_is_for_what_does_not_train(janus_folder, arguments):
    policy = load(janus_folder, dtype="bfloat16", **arguments)
    for name, parameter in policy.named_parameters():
        full = parameter.requires_grad or ".vqmodel." in name
        assert parameter.dtype == (torch.float32 if full else torch.bfloat16), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_what_trains_is_in_bfloat16_when_asked_for(janus_folder, dtype):
    policy = load(janus_folder, dtype=dtype, trained_dtype="bfloat16")
    trained = {p.dtype for p in policy.parameters() if p.requires_grad}
    assert trained == {torch.bfloat16}
    assert policy.janus.model.generation_head.vision_head.weight.dtype == getattr(torch, dtype)
    assert next(policy.reference().blocks()[0].parameters()).dtype == torch.bfloat16
    tokens = random_tokens(policy, 6)
    exact = load(janus_folder, dtype="float64").logits(repeated(PROMPTS), tokens).detach()
    forced = policy.logits(repeated(PROMPTS), tokens)
    stepped = stepped_logits(policy, PROMPTS, tokens, guided=False, copies=2)
    assert max((forced - exact).abs().max(), (stepped - exact).abs().max()) < 0.1 * exact.std()


@pytest.mark.parametrize("arguments", [{"lora": LORA}, {"dtype": "float64"}], ids=str)
def test_bfloat16_for_what_trains_is_refused_where_it_saves_nothing(janus_folder, arguments):
    with pytest.raises(ValueError, match=r"expected trained_dtype: float32 .* got bfloat16; leave"):
        JanusPolicy(str(janus_folder), trained_dtype="bfloat16", **arguments)


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize(
    "arguments",
    [
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "trains": "generation"},
        {"dtype": "bfloat16", "lora": LORA},
        {"dtype": "float32"},
    ],
    ids=["language-model", "generation", "lora", "float32"],
)
def test_lower_precision_stays_near(janus_folder, arguments, attention, autocast):
    policy = load(janus_folder, attention=attention, **arguments)
    tokens = random_tokens(policy, 6)
    exact = load(janus_folder, dtype="float64").logits(repeated(PROMPTS), tokens).detach()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        forced = policy.logits(repeated(PROMPTS), tokens)
        stepped = stepped_logits(policy, PROMPTS, tokens, guided=False, copies=2)
    spread = exact.std()
    assert (forced - exact).abs().max() < 0.1 * spread
    assert (stepped - exact).abs().max() < 0.1 * spread
    forced.float().log_softmax(-1).gather(-1, tokens[..., None]).sum().backward()
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert all(p.grad.isfinite().all() and p.grad.dtype == torch.float32 for p in trained)


def test_pictures_are_not_drawn_in_lower_precision(janus_folder):
    policy = load(janus_folder)
    tokens = random_tokens(policy, 2)
    images = policy.decode(tokens)
    codes = policy.encode(images)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(policy.decode(tokens), images)
        assert torch.equal(policy.encode(images), codes)


def share_moved(policy, parameters, steps=100):
    """Share of the weights with a non-zero gradient that differ after steps of size 1e-6."""
    tokens = random_tokens(policy, 2)
    optimizer = torch.optim.AdamW(parameters, lr=1e-6, weight_decay=0.0)
    before = [parameter.detach().clone() for parameter in parameters]
    touched = [torch.zeros_like(parameter, dtype=torch.bool) for parameter in parameters]
    for _ in range(steps):
        optimizer.zero_grad()
        image_loss(policy, tokens).backward()
        for seen, parameter in zip(touched, parameters, strict=True):
            seen |= parameter.grad != 0
        optimizer.step()
    moved = sum(((p != b) & s).sum() for p, b, s in zip(parameters, before, touched, strict=True))
    return (moved / sum(seen.sum() for seen in touched)).item()


@pytest.mark.parametrize(
    "arguments",
    [
        {},
        {"dtype": "bfloat16"},
        {"dtype": "bfloat16", "trains": "both"},
        {"lora": LORA},
        {"lora": LORA, "dtype": "bfloat16"},
        {"lora": LORA, "quantize": "4bit"},
    ],
    ids=str,
)
def test_small_steps_are_not_lost(janus_folder, arguments):
    policy = load(janus_folder, **arguments)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled="dtype" in arguments):
        assert share_moved(policy, trained) >= 0.99


def test_small_steps_are_lost_in_plain_bfloat16(janus_folder):
    policy = load(janus_folder)
    policy.janus.model.language_model.to(torch.bfloat16)
    policy.janus.model.generation_head.to(torch.bfloat16)
    trained = [parameter for parameter in policy.parameters() if parameter.requires_grad]
    assert share_moved(policy, trained) < 0.5


@pytest.mark.parametrize(("attention", "used"), [("sdpa", True), ("eager", False)])
def test_attention_in_use_is_the_one_asked_for(janus_folder, attention, used, monkeypatch):
    policy = load(janus_folder, attention=attention)
    calls = []
    original = torch.nn.functional.scaled_dot_product_attention

    def counted(*arguments, **settings):
        calls.append(1)
        return original(*arguments, **settings)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", counted)
    with torch.no_grad():
        policy.logits(PROMPTS, random_tokens(policy, 3))
    assert len(calls) == (len(policy.blocks()) if used else 0)
    assert policy.janus.config.text_config._attn_implementation == attention


@pytest.mark.parametrize(
    ("backend", "checkpointing", "tolerance"),
    [
        ("aot_eager", False, 1e-9),  # captures and differentiates the graph, generates no code
        pytest.param("inductor", False, 1e-5, marks=pytest.mark.slow),  # norms are float32 inside,
        pytest.param(
            "inductor", True, 1e-5, marks=pytest.mark.slow
        ),  # and it sums in its own order
    ],
)
def test_compiled_pass_is_the_plain_one(
    janus_folder, monkeypatch, backend, checkpointing, tolerance
):
    if backend == "inductor" and not any(map(shutil.which, ("g++", "clang++", "cl"))):
        pytest.skip("no C++ compiler, which torch.compile needs on the CPU")
    torch.compiler.reset()
    original, compiled = torch.compile, []
    monkeypatch.setattr(
        torch, "compile", lambda f: compiled.append(f) or original(f, backend=backend)
    )
    plain = load(janus_folder, dtype="float64")
    policy = load(janus_folder, dtype="float64", compile=True, gradient_checkpointing=checkpointing)
    assert len(compiled) == 1
    for prompts in (PROMPTS, PROMPTS[:1] * 2):
        tokens = random_tokens(policy, len(prompts))
        expected, logits = plain.logits(prompts, tokens), policy.logits(prompts, tokens)
        assert (logits - expected).abs().max() < tolerance
    for each in (expected, logits):
        each.log_softmax(-1).square().mean().backward()
    for own, other in zip(policy.parameters(), plain.parameters(), strict=True):
        assert (own.grad is None) == (other.grad is None)
        assert own.grad is None or (own.grad - other.grad).abs().max() < tolerance
    assert greedy_tokens(policy).tolist() == greedy_tokens(plain).tolist()
    torch.compiler.reset()


def without_a_compiler(graph, inputs):
    raise RuntimeError("no compiler")


@torch.no_grad()
def test_what_cannot_be_compiled_runs_plain_with_one_warning(janus_folder, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend=without_a_compiler))
    plain, policy = load(janus_folder), load(janus_folder, compile=True)
    tokens = random_tokens(policy, 3)
    with pytest.warns(UserWarning, match="could not be compiled .*no compiler.* compile: false"):
        logits = policy.logits(PROMPTS, tokens)
    assert torch.allclose(logits, plain.logits(PROMPTS, tokens), atol=1e-6)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.logits(PROMPTS, tokens)


@torch.no_grad()
def test_strict_refuses_what_cannot_be_compiled(janus_folder, monkeypatch):
    original = torch.compile
    monkeypatch.setattr(torch, "compile", lambda f: original(f, backend=without_a_compiler))
    policy = load(janus_folder, compile=True, decoding=DecodingSettings(strict=True))
    with pytest.raises(
        ValueError, match=r"expected to compile the teacher-forced pass, got: .*no c"
    ):
        policy.logits(PROMPTS, random_tokens(policy, 3))


@torch.no_grad()
def test_reference_of_a_compiled_policy_keeps_its_weights(janus_folder, monkeypatch):
    # What torch.compile gives is a plain function, which is not copied with the policy.
    monkeypatch.setattr(torch, "compile", lambda f: lambda *inputs: f(*inputs))
    policy = load(janus_folder, dtype="float64", compile=True)
    tokens = random_tokens(policy, 3)
    start = policy.logits(PROMPTS, tokens)
    reference = policy.reference()
    perturb(policy)
    assert torch.equal(reference.logits(PROMPTS, tokens), start)
    assert (policy.logits(PROMPTS, tokens) - start).abs().max() > 1e-3
    assert reference._compiled_body is not None


@pytest.mark.parametrize("trains", ["language_model", "generation"])
def test_reference_is_frozen_and_shares_what_is_frozen(janus_folder, trains):
    policy = load(janus_folder, trains=trains)
    sample_tokens(policy, PROMPTS, guidance=2.0, seeds=range(3))
    twin = policy.reference()
    assert not trained_names(twin)
    assert trained_names(policy)
    own = dict(policy.named_parameters())
    assert own.keys() == dict(twin.named_parameters()).keys()
    for name, parameter in twin.named_parameters():
        assert torch.equal(parameter, own[name])
        assert (parameter.data_ptr() == own[name].data_ptr()) != own[name].requires_grad, name


def test_reference_of_a_fresh_lora_policy_is_the_base_model(janus_folder):
    base = load(janus_folder, dtype="float64")
    policy = load(janus_folder, dtype="float64", lora=LORA)
    reference = policy.reference()
    perturb(policy)
    tokens = random_tokens(policy, len(PROMPTS))
    with torch.no_grad():
        expected = base.logits(PROMPTS, tokens)
        assert torch.equal(reference.logits(PROMPTS, tokens), expected)
        assert (policy.logits(PROMPTS, tokens) - expected).abs().max() > 1e-3
    stepped = stepped_logits(reference, PROMPTS, tokens, guided=False, copies=1)
    assert (stepped - expected).abs().max() < 1e-9
    assert greedy_tokens(reference).tolist() == greedy_tokens(base).tolist()
    assert torch.equal(reference.decode(tokens), base.decode(tokens))
    assert reference.reference() is reference


def test_reference_of_a_trained_lora_policy_keeps_its_adapters(janus_folder):
    policy = perturb(load(janus_folder, dtype="float64", lora=LORA))
    tokens = random_tokens(policy, len(PROMPTS))
    with torch.no_grad():
        expected, greedy = policy.logits(PROMPTS, tokens), greedy_tokens(policy)
        reference = policy.reference()
        perturb(policy)
        assert torch.equal(reference.logits(PROMPTS, tokens), expected)
        assert (policy.logits(PROMPTS, tokens) - expected).abs().max() > 1e-3
    assert greedy_tokens(reference).tolist() == greedy.tolist()


@pytest.mark.parametrize("fresh", [True, False])
def test_reference_of_a_lora_policy_leaves_training_alone(janus_folder, fresh):
    policy = load(janus_folder, lora=LORA)
    policy = policy if fresh else perturb(policy)
    names, tokens = trained_names(policy), random_tokens(policy, 2)
    loss = image_loss(policy, tokens)
    policy.reference().logits(PROMPTS[:2], tokens)
    assert trained_names(policy) == names
    loss.backward()
    assert all(p.grad is not None for p in policy.parameters() if p.requires_grad)


def test_parameters_beside_a_lora_reference_are_counted_once(janus_folder):
    policy = load(janus_folder, lora=LORA)
    both = torch.nn.ModuleList([policy, policy.reference()])
    assert len(list(both.parameters())) == len(list(policy.parameters()))
    assert len(both.state_dict()) == len(policy.state_dict())


def test_reference_of_a_lora_policy_is_not_exported(janus_folder, tmp_path):
    policy = load(janus_folder, lora=LORA)
    with pytest.raises(ValueError, match="export the policy instead"):
        policy.reference().export(tmp_path)


@pytest.mark.parametrize(
    "arguments", [{"trains": "both"}, {"lora": LORA}, {"train_text_embedding": True}], ids=str
)
def test_transformers_alone_generates_from_an_export(janus_folder, tmp_path, arguments):
    policy = perturb(load(janus_folder, dtype="float64", **arguments))
    tokens = greedy_tokens(policy)
    assert tokens.tolist() != greedy_tokens(load(janus_folder, dtype="float64")).tolist()
    policy.export(tmp_path)
    model = JanusForConditionalGeneration.from_pretrained(tmp_path, dtype=torch.float64)
    processor = JanusProcessor.from_pretrained(tmp_path)
    assert transformers_tokens(model, processor).tolist() == tokens.tolist()
    assert greedy_tokens(load(tmp_path, dtype="float64")).tolist() == tokens.tolist()
    assert greedy_tokens(policy).tolist() == tokens.tolist(), "exporting changed the policy"
    assert trained_names(policy)


@pytest.mark.parametrize("bits", ["4bit", "8bit"])
def test_adapters_are_not_merged_into_quantised_weights(janus_folder, tmp_path, bits):
    policy = JanusPolicy(str(janus_folder), lora=LORA, quantize=bits)
    with pytest.raises(ValueError, match=f"merging into {bits} weights is not exact: set merge_"):
        policy.export(tmp_path / "merged")
    assert not (tmp_path / "merged").exists()


def test_adapters_of_quantised_weights_are_exported_alone(janus_folder, tmp_path):
    policy = perturb(load(janus_folder, lora=LORA, quantize="4bit"))
    policy.export(tmp_path, merge_adapters=False)
    assert (tmp_path / "adapter_config.json").exists()
    assert not (tmp_path / "model.safetensors").exists()


def test_peft_alone_generates_from_exported_adapters(janus_folder, tmp_path):
    from peft import PeftModel

    policy = perturb(load(janus_folder, dtype="float64", lora=LORA))
    policy.export(tmp_path, merge_adapters=False)
    assert not (tmp_path / "model.safetensors").exists()
    settings = json.loads((tmp_path / "adapter_config.json").read_text())
    assert settings["base_model_name_or_path"] == str(janus_folder)
    base = JanusForConditionalGeneration.from_pretrained(janus_folder, dtype=torch.float64)
    model = PeftModel.from_pretrained(base, tmp_path)
    processor = JanusProcessor.from_pretrained(tmp_path)
    expected = greedy_tokens(policy).tolist()
    assert transformers_tokens(model, processor).tolist() == expected


def test_bfloat16_policy_is_exported_whole(janus_folder, tmp_path):
    policy = perturb(load(janus_folder, dtype="bfloat16"))
    policy.export(tmp_path)
    stored = load_file(tmp_path / "model.safetensors")
    trained = {name.removeprefix("model.") for name in trained_names(policy)}
    assert trained <= stored.keys()
    assert all(stored[name].dtype == torch.float32 for name in trained)
    own = policy.janus.state_dict()
    assert stored.keys() == own.keys()
    assert all(torch.equal(values, own[name]) for name, values in stored.items())
    again = load(tmp_path)
    for name, values in again.janus.state_dict().items():
        assert torch.equal(values, own[name].float()), name


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("bits", "kind", "deviation"), [("4bit", Linear4bit, 0.4), ("8bit", Linear8bitLt, 0.1)]
)
def test_quantised_language_model_with_adapters_trains(janus_folder, bits, kind, deviation, dtype):
    policy = load(janus_folder, quantize=bits, lora=LORA, dtype=dtype)
    names = {name for name, module in policy.janus.named_modules() if isinstance(module, kind)}
    assert len(names) == 7 * len(policy.blocks())
    assert all(".language_model.layers." in name for name in names)
    tokens = random_tokens(policy, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == "bfloat16"):
        start = policy.reference()
        perturb(policy)
        image_loss(policy, tokens).backward()
        _, logprobs = sample_tokens(policy, PROMPTS, guidance=2.0, seeds=range(3))
        reference = start.logits(PROMPTS, tokens)
    assert trained_names(policy)
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            assert ".lora_" in name
            assert parameter.dtype == torch.float32
            assert parameter.grad.isfinite().all()
            assert parameter.grad.abs().sum() > 0
    assert logprobs.isfinite().all()
    exact = load(janus_folder, dtype="float64").logits(PROMPTS, tokens).detach()
    assert (reference - exact).abs().mean() < deviation * exact.std()
    assert not torch.equal(reference.double(), exact), "nothing was quantised"


def test_quantised_weights_need_adapters(janus_folder):
    with pytest.raises(ValueError, match="expected lora beside quantize: 4bit, got none"):
        JanusPolicy(str(janus_folder), quantize="4bit")


@pytest.mark.parametrize("arguments", [{"trains": "both"}, {"train_text_embedding": True}])
def test_adapters_exclude_other_training(janus_folder, arguments):
    with pytest.raises(ValueError, match=r"expected lora .* drop lora"):
        JanusPolicy(str(janus_folder), lora=LORA, **arguments)


@pytest.mark.parametrize("path", ["/nowhere/janus", "./janus", "janus", "a/b/janus"])
def test_missing_folder_is_refused(path):
    with pytest.raises(ValueError, match=r"janus, which does not exist; name an existing folder"):
        JanusPolicy(path)


def test_home_folder_is_found(janus_folder, monkeypatch):
    monkeypatch.setenv("HOME", str(janus_folder.parent))
    assert JanusPolicy(f"~/{janus_folder.name}").path == str(janus_folder)
    with pytest.raises(ValueError, match=f"{janus_folder.parent}/nothing, which does not exist"):
        JanusPolicy("~/nothing")


def test_missing_folder_in_one_that_exists_is_refused(tmp_path, monkeypatch):
    (tmp_path / "models").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="models/janus, which does not exist"):
        JanusPolicy("models/janus")


def test_hub_id_out_of_reach_is_refused():
    with pytest.raises(ValueError, match=r"that this machine can reach, .*give its folder"):
        JanusPolicy("nobody-at-all/janus-of-no-one")


def test_folder_without_configuration_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"expected a config.json in .*, got none"):
        JanusPolicy(str(tmp_path))


def test_other_models_are_refused(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"}))
    with pytest.raises(ValueError, match=r"expected a janus checkpoint .* got model_type 'llama'"):
        JanusPolicy(str(tmp_path))


@pytest.mark.parametrize("pattern", ["tokenizer*", "*processor*"])
def test_missing_processor_files_are_refused(copied, pattern):
    files = list(copied.glob(pattern))
    assert files
    for file in files:
        file.unlink()
    with pytest.raises(ValueError, match="expected tokenizer and processor files beside"):
        JanusPolicy(str(copied))


@pytest.mark.parametrize("token", ["<｜▁pad▁｜>", "<begin_of_image>"])
def test_missing_special_tokens_are_refused(copied, token):
    for file in copied.glob("*.json"):
        file.write_text(file.read_text().replace(token, "<other>"))
    with pytest.raises(ValueError, match=f"expected the token {token}"):
        JanusPolicy(str(copied))


def test_tokenizer_that_puts_no_beginning_is_refused(copied):
    tokenizer = json.loads((copied / "tokenizer.json").read_text())
    tokenizer["post_processor"] = None
    (copied / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match="to put BOS first and <begin_of_image> last"):
        JanusPolicy(str(copied)).prompt_ids("a dog")


def test_prompt_longer_than_the_context_is_refused_before_weights_load(janus_folder):
    policy = JanusPolicy(str(janus_folder))
    with pytest.raises(ValueError, match=r"at most 87 tokens beside 9 of the picture, got \d+"):
        policy.logits(["a red circle " * 50], torch.zeros(1, 9, dtype=torch.int64))
    assert policy.model is None


def test_missing_weights_are_refused(copied):
    (copied / "model.safetensors").unlink()
    with pytest.raises(ValueError, match="expected weights in"):
        load(copied)


def test_partly_missing_weights_are_refused(copied):
    weights = load_file(copied / "model.safetensors")
    del weights["model.generation_head.vision_head.weight"]
    save_file(weights, copied / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"got 1 missing .first: model.generation_head.vision"):
        load(copied)


def test_use_before_loading_is_refused(janus_folder):
    with pytest.raises(RuntimeError, match=r"call load\(\) first"):
        JanusPolicy(str(janus_folder)).blocks()


def test_loading_twice_keeps_the_weights(janus_folder):
    policy = perturb(load(janus_folder))
    before = copy.deepcopy(policy.state_dict())
    assert policy.load() is policy
    assert all(torch.equal(values, before[name]) for name, values in policy.state_dict().items())
