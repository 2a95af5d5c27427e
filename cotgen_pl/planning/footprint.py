"""What a Janus of given sizes takes of memory and work: no weights, no device, formulas alone.

Letters as in `cotgen_pl.interfaces`; besides: N layers, h hidden width, m width of the MLP, L
positions that a pass reads (prompt and picture; images that share a prompt may read it once, which
takes less). Apart from `cotgen_pl.planning.work`, which puts together what a training step asks of
it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch

from cotgen_pl.decoding.settings import DecodingSettings, choose_bucket
from cotgen_pl.picture_tokens import PIXELS_PER_DECODE

PROMPT_TOKENS = 32  # a prompt of about 20 words in Janus-Pro's template
ITEM_BYTES = {"bfloat16": 2.0, "float32": 4.0, "float64": 8.0}
# NF4 in blocks of 64 with a float32 scale each, without double quantisation: 4 + 32 / 64 bits
# (arXiv 2305.14314, section 3). LLM.int8 has a float32 scale per row, which is nothing beside it.
QUANTIZED_BYTES = {"4bit": 0.5625, "8bit": 1.0}
NUMBERS_AT_ONCE = 1 << 22  # as in cotgen_pl.losses.logprobs
# Feature maps of the picture decoder's widest layer that live at once: counted on the CPU at
# Janus-Pro's widths (tests/planning/test_work.py). A GPU's convolutions may want room of their own.
MAPS_PER_DECODE = 4.2


@dataclass(frozen=True)
class PolicySizes:
    """What a Janus is made of: widths, and parameters of each part."""

    layers: int
    width: int
    mlp_width: int
    heads: int
    attention_width: int
    """Of all heads' queries together."""
    key_width: int
    """Of all heads' keys together; that of the values too."""
    num_tokens: int
    codebook_size: int
    body: int
    """Parameters of the layers and the last norm."""
    text_embedding: int
    generation_head: int
    generation_input: int
    """Of the code embedding and its aligner."""
    vq: int
    unused: int
    """What pictures do not pass through, loaded all the same: text head, vision tower, aligner."""
    side: int
    """Of a picture, in pixels."""
    decoder_width: int
    """Channels of the picture decoder at full resolution."""

    @property
    def total(self) -> int:
        """All parameters."""
        generation = self.generation_head + self.generation_input
        return self.body + self.text_embedding + generation + self.vq + self.unused


def read_sizes(config: Any) -> PolicySizes:
    """Sizes from a checkpoint's configuration (transformers' `JanusConfig`); builds no weights."""
    from transformers import JanusForConditionalGeneration

    with torch.device("meta"):
        model: Any = JanusForConditionalGeneration(config)

    def count(part: Any) -> int:
        return sum(parameter.numel() for parameter in part.parameters())

    inner, text, vq = model.model, config.text_config, config.vq_config
    head_width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    embedding = count(inner.language_model.embed_tokens)
    return PolicySizes(
        layers=text.num_hidden_layers,
        width=text.hidden_size,
        mlp_width=text.intermediate_size,
        heads=text.num_attention_heads,
        attention_width=text.num_attention_heads * head_width,
        key_width=text.num_key_value_heads * head_width,
        num_tokens=vq.num_patches**2,
        codebook_size=vq.num_embeddings,
        body=count(inner.language_model) - embedding,
        text_embedding=embedding,
        generation_head=count(inner.generation_head),
        generation_input=count(inner.generation_embeddings) + count(inner.generation_aligner),
        vq=count(inner.vqmodel),
        unused=count(inner.vision_model) + count(inner.aligner) + count(model.lm_head),
        side=vq.num_patches * 2 ** (len(vq.channel_multiplier) - 1),
        decoder_width=vq.base_channels * max(vq.channel_multiplier[:2]),
    )


@dataclass(frozen=True)
class PlannedPolicy:
    """A policy's sizes with the settings of `JanusPolicy` that decide what it takes."""

    sizes: PolicySizes
    precision: str = "bf16-mixed"
    """The trainer's."""
    dtype: str = "bfloat16"
    """Of the frozen weights."""
    trained_dtype: str = "float32"
    """Of those that train, unless `dtype` is float64."""
    trains: str = "language_model"
    train_text_embedding: bool = False
    lora_rank: int = 0
    quantize: str | None = None
    gradient_checkpointing: bool = False
    attention: str = "sdpa"
    drawn_by: DecodingSettings = field(default_factory=DecodingSettings)
    """How pictures are drawn."""
    device: str = "cuda"
    """Type of device, `cuda` or `cpu`."""
    prompt_tokens: int = PROMPT_TOKENS

    @classmethod
    def read(
        cls, sizes: PolicySizes, settings: Any, precision: str, device: str = "cuda"
    ) -> PlannedPolicy:
        """From a `JanusPolicy`, or from the arguments that a configuration has for it."""
        same = ("dtype", "trained_dtype", "trains", "train_text_embedding", "quantize")
        more = ("gradient_checkpointing", "attention")
        values = {name: getattr(settings, name) for name in (*same, *more)}
        rank = settings.lora.rank if settings.lora else 0
        named = settings.decoding or DecodingSettings()  # a configuration's is a namespace
        buckets = tuple(named.buckets) if named.buckets else None
        values |= {"drawn_by": DecodingSettings(named.path, buckets), "device": device}
        return cls(sizes, str(precision), lora_rank=rank, **values)

    @property
    def trained(self) -> int:
        """Parameters that train."""
        sizes = self.sizes
        if self.lora_rank:  # on queries, keys, values, output, gate, up and down of each layer
            attention = 2 * (2 * sizes.width + sizes.attention_width + sizes.key_width)
            return self.lora_rank * sizes.layers * (attention + 3 * (sizes.width + sizes.mlp_width))
        generation = sizes.generation_head + sizes.generation_input
        parts = {"language_model": sizes.body, "generation": generation}
        parts["both"] = sizes.body + generation
        return parts[self.trains] + (sizes.text_embedding if self.train_text_embedding else 0)

    @property
    def frozen_bytes(self) -> float:
        """Of one frozen number; the trainer's `64-true` makes all float64."""
        return 8.0 if self.precision == "64-true" else ITEM_BYTES[self.dtype]

    @property
    def trained_bytes(self) -> float:
        """Of one number that trains."""
        return 8.0 if self.frozen_bytes == 8 else ITEM_BYTES[self.trained_dtype]

    @property
    def stream_bytes(self) -> float:
        """Of one number between two layers: as that of the last norm."""
        adapts = self.lora_rank or self.trains == "generation"
        return self.frozen_bytes if adapts else self.trained_bytes

    @property
    def compute_bytes(self) -> float:
        """Of one number inside a layer."""
        return 2.0 if self.precision == "bf16-mixed" else self.stream_bytes

    @property
    def loss_bytes(self) -> float:
        """Of one number in the loss: float32 at least."""
        return max(4.0, self.compute_bytes)

    @property
    def frozen_weights(self) -> float:
        """Bytes of all weights that do not train; the VQ part is float32 at least."""
        sizes = self.sizes
        norms = (2 * sizes.layers + 1) * sizes.width
        small = sizes.body - norms if self.quantize else 0
        rest = sizes.total - sizes.vq - small - (0 if self.lora_rank else self.trained)
        quantized = small * QUANTIZED_BYTES[self.quantize] if self.quantize else 0.0
        return quantized + rest * self.frozen_bytes + sizes.vq * max(4.0, self.frozen_bytes)

    @property
    def compute_copy(self) -> float:
        """Bytes of the bfloat16 copies that autocast keeps of float32 weights that train."""
        casts = self.precision == "bf16-mixed" and self.trained_bytes > 2
        return 2.0 * self.trained if casts else 0.0

    @property
    def draws_fused(self) -> bool:
        """Whether `cotgen_pl.decoding` reads the layers, by a copy of them."""
        alike = self.sizes.key_width == self.sizes.attention_width
        return self.drawn_by.path != "eager" and not self.quantize and alike

    @property
    def drawing_copy(self) -> float:
        """Bytes of the weights that fused layers draw with, while a batch is drawn."""
        sizes = self.sizes
        copied = sizes.body + sizes.generation_head + sizes.codebook_size * sizes.width
        return self.compute_bytes * copied if self.draws_fused else 0.0

    @property
    def cache_per_position(self) -> float:
        """Bytes of keys and values of one position of one sequence."""
        return 2 * self.sizes.layers * self.sizes.key_width * self.compute_bytes

    @property
    def buckets(self) -> tuple[int, ...] | None:
        """Positions that fused attention reads up to; None where it reads what is filled."""
        length = self.prompt_tokens + self.sizes.num_tokens
        device = torch.device(self.device)
        return self.drawn_by.bucket_lengths(length, device) if self.draws_fused else None

    def positions_read(self, filled: int) -> int:
        """Of a sequence, when so many are filled: all of the bucket.

        Buckets that end before a planned prompt's picture are made for shorter prompts.
        """
        buckets = self.buckets
        return choose_bucket(min(filled, buckets[-1]), buckets) if buckets else filled

    def cache(self, images: int, guided: bool) -> float:
        """Bytes of keys and values for images drawn at once: up to the last bucket's end."""
        rows = images * (2 if guided else 1)
        length = self.buckets[-1] if self.buckets else self.prompt_tokens + self.sizes.num_tokens
        return rows * self.cache_per_position * length

    def decoding(self, images: int) -> float:
        """Bytes while so many pictures are made of their tokens, at float32."""
        pixels = min(images * self.sizes.side**2, max(PIXELS_PER_DECODE, self.sizes.side**2))
        return MAPS_PER_DECODE * 4.0 * self.sizes.decoder_width * pixels

    @property
    def layer_activations(self) -> float:
        """Bytes that one layer keeps of one image for the backward pass.

        Per position: in float32, twice a norm's input and output before its weight, 4 h; inputs of
        the linear layers, 3 where attention has the width h, or 6 where autocast casts one for each
        layer that reads it; queries, keys, values; in the MLP gate, up, their activation and
        product, 4 m. Attention keeps its mask, or (`eager`) its probabilities before and after the
        cast. Counted with torch's saved-tensor hooks in transformers 5.23's Llama.
        """
        sizes, item = self.sizes, self.compute_bytes
        length = self.prompt_tokens + sizes.num_tokens - 1
        casts = self.precision == "bf16-mixed" and self.stream_bytes > 2
        norms = 4 * max(4.0, self.stream_bytes) * sizes.width
        inputs = item * ((5 if casts else 2) * sizes.width + sizes.attention_width)
        heads = item * (sizes.attention_width + 2 * sizes.key_width)
        seen = item * length
        if self.attention == "eager":
            seen = sizes.heads * length * (4.0 + item)
        return length * (norms + inputs + heads + 4 * item * sizes.mlp_width + seen)

    @property
    def layer_input(self) -> float:
        """Bytes of one layer's input of one image, all that checkpointing keeps of it."""
        length = self.prompt_tokens + self.sizes.num_tokens - 1
        return length * self.sizes.width * self.stream_bytes

    def logits(self, guided: bool, images: int) -> float:
        """Bytes of one image's logits and of what the loss makes of them, at the worst moment.

        Backward: logits with their gradient, and twice the distribution of those rows that are read
        at a time. Guided logits are float32 at least, and before that, what they are made
        of: those of two branches, and two more, or four where the branches are not float32 yet.
        Counted in torch 2.15.

        Args:
            guided: Whether log-probs are those of guided logits.
            images: In a micro-batch, which share the rows that are read at a time.
        """
        size = self.sizes.num_tokens * self.sizes.codebook_size
        item, most = self.compute_bytes, self.loss_bytes
        read = 2 * most * min(size, NUMBERS_AT_ONCE / max(1, images))
        if not guided:
            return 2 * item * size + read
        copies = 2 if item == most else 4
        return max(2 * most * size + read, (2 * item + copies * most) * size)

    def forward_flop(self) -> float:
        """Operations of one image's teacher-forced pass: 2 P L + 2 N h L², causal attention.

        P are the parameters of body and image head; docs/performance.md.
        """
        sizes, length = self.sizes, self.prompt_tokens + self.sizes.num_tokens
        weights = 2 * (sizes.body + sizes.generation_head) * length
        return weights + 2 * sizes.layers * sizes.attention_width * length**2

    @property
    def weights_read(self) -> float:
        """Bytes of weights that one decoding step reads: body and image head.

        Fused layers read their copy. Without it, a weight in another type than is computed with, of
        which autocast keeps no copy either, is read, written in the other type and read again.
        """
        item = self.compute_bytes
        if self.draws_fused:
            return item * (self.sizes.body + self.sizes.generation_head)

        def moved(stored: float, trained: bool) -> float:
            return item if trained else stored + (0 if stored == item else 2 * item)

        adapts, head = bool(self.lora_rank), self.trains != "language_model"
        body = QUANTIZED_BYTES[self.quantize] if self.quantize else None
        if body is None:
            body = moved(self.frozen_bytes, not adapts and self.trains != "generation")
        read = self.sizes.body * body
        return read + self.sizes.generation_head * moved(self.frozen_bytes, head and not adapts)
