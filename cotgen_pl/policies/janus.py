"""Janus and Janus-Pro as a policy, through transformers' own class, from a hub id or a folder.

Sampling does not use transformers' `generate`: that keeps 50 codes of the codebook when it samples,
fails without guidance, reads the prompt once per copy and gives no log-probabilities. The two agree
token by token when greedy.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from transformers import JanusConfig, JanusForConditionalGeneration, JanusProcessor
from transformers.cache_utils import DynamicCache

from cotgen_pl.adapters import (
    AdaptersThen,
    LoraSettings,
    add_adapters,
    check_training,
    quantization_config,
    train_parts,
)
from cotgen_pl.checkpoints import (
    TEMPLATES,
    expand_home,
    prepare_pictures,
    read_config,
    read_processor,
    read_weights,
    recognise_template,
    token_id,
)
from cotgen_pl.compiling import Compiled
from cotgen_pl.decoding.eager import CACHE, EagerDrawing, StaticCache
from cotgen_pl.decoding.fused import FusedDrawing, start_drawing
from cotgen_pl.decoding.masks import read_behind, read_from_the_start
from cotgen_pl.decoding.settings import DecodingSettings
from cotgen_pl.decoding.weights import read_network, why_unreadable
from cotgen_pl.interfaces import Policy, freeze
from cotgen_pl.picture_tokens import decode_tokens, encode_pictures
from cotgen_pl.products import products_on
from cotgen_pl.prompt_ids import BEGIN_OF_IMAGE, PromptReader
from cotgen_pl.understanding import answer_questions

PAD = "<｜▁pad▁｜>"  # by name: the originals' tokenizer_config.json leaves pad_token empty
EXAMPLE = "deepseek-community/Janus-Pro-1B"
OF_IMAGES = "vision_model aligner vqmodel generation_embeddings generation_aligner generation_head"
NOT_QUANTIZED = [*(f"model.{part}" for part in OF_IMAGES.split()), "lm_head"]
WORTH_SHARING = 0.1  # of the positions; for fewer, a second pass costs what it spares
Rows = Sequence[Sequence[int]]  # token ids
LORA_TARGETS = r"model\.language_model\.layers\.\d+\..*\.(q|k|v|o|gate|up|down)_proj"


class JanusPolicy(Policy):
    """A Janus checkpoint that draws.

    Args:
        path: A folder in transformers' format, where `~` is the home folder, or a hub id:
            `deepseek-community/Janus-Pro-1B`.
        trains: `language_model` (layers and last norm), `generation` (code embedding, its aligner
            and the image head) or `both`. What pictures do not pass through stays frozen.
        train_text_embedding: Train the text embedding too, as T2I-R1 does; 0.21 B more parameters
            at 1B.
        lora: Train low-rank adapters on all seven projections of each layer, not the weights.
        quantize: Keep the language model's weights in 4 or 8 bits through bitsandbytes; needs
            `lora`.
        gradient_checkpointing: Recompute each layer in the backward pass instead of keeping its
            activations.
        attention: Attention implementation.
        dtype: Type of the frozen weights; `float64` is that of all.
        trained_dtype: Type of the weights that train. In bfloat16, 98 % of the steps of size 1e-6
            round to nothing, so it takes an optimizer that rounds by chance:
            `cotgen_pl.optimizers.StochasticAdamW8bit`. With float32, use the trainer's
            `precision: bf16-mixed` to compute in bfloat16.
        compile: Compile the teacher-forced pass; where that fails, warn and go on without.
        template: Prompt form; by default read from the checkpoint's own chat template. A Janus-1.3B
            converted by transformers' script carries Janus-Pro's template: name `janus` for it.
        decoding: How pictures are drawn token by token; see `DecodingSettings`.

    Raises:
        ValueError: The path is neither a folder nor a reachable hub id, is not a Janus, or
            arguments exclude each other. All before weights load.
    """

    def __init__(
        self,
        path: str,
        trains: Literal["language_model", "generation", "both"] = "language_model",
        train_text_embedding: bool = False,
        lora: LoraSettings | None = None,
        quantize: Literal["4bit", "8bit"] | None = None,
        gradient_checkpointing: bool = False,
        attention: Literal["sdpa", "eager"] = "sdpa",
        dtype: Literal["float32", "bfloat16", "float64"] = "float32",
        compile: bool = False,
        template: Literal["janus", "janus_pro"] | None = None,
        decoding: DecodingSettings | None = None,
        trained_dtype: Literal["float32", "bfloat16"] = "float32",
    ) -> None:
        super().__init__()
        path = expand_home(path)
        self.path, self.trains, self.train_text_embedding = path, trains, train_text_embedding
        self.lora, self.quantize, self.merges_exactly = lora, quantize, quantize is None
        self.gradient_checkpointing, self.compile_forward = gradient_checkpointing, compile
        self.is_made_once = not (gradient_checkpointing or compile)
        self.attention, self.dtype, self.trained_dtype = attention, dtype, trained_dtype
        self.decoding = decoding or DecodingSettings()
        check_training(self)
        self.config: Any = read_config(path, JanusConfig, EXAMPLE)
        self.processor = read_processor(path, JanusProcessor)
        self.template = template or recognise_template(self.processor, path)
        self.num_tokens: int = self.config.vq_config.num_patches**2
        self.codebook_size: int = self.config.vq_config.num_embeddings
        self.begin_of_image = token_id(self.processor.tokenizer, BEGIN_OF_IMAGE, path)
        self.pad = token_id(self.processor.tokenizer, PAD, path)
        self.reader = PromptReader(
            path,
            self.processor.tokenizer,
            TEMPLATES[self.template],
            self.begin_of_image,
            self.pad,
            self.config.text_config.max_position_embeddings,
            self.num_tokens,
        )
        self.model: Any = None
        self._compiled_body: Any = None

    def load(self, *, empty: bool = False) -> JanusPolicy:
        """Read the weights and decide what trains; see `Policy.load`."""
        if self.model is not None:
            return self
        dtype = getattr(torch, self.dtype)
        model = read_weights(
            self.path,
            JanusForConditionalGeneration,
            empty=empty and not self.quantize,  # packed weights have their shapes from values
            dtype=dtype,
            attn_implementation=self.attention,
            quantization_config=quantization_config(self.quantize, dtype, NOT_QUANTIZED),
        )
        freeze(model)
        model.model.vqmodel.to(torch.float64 if self.dtype == "float64" else torch.float32)
        self.model = add_adapters(model, self.lora, LORA_TARGETS) if self.lora else model
        self._choose_trainable()
        if self.gradient_checkpointing:
            self.janus.gradient_checkpointing_enable({"use_reentrant": False})
        self._compile()
        return self.train()

    def _compile(self) -> None:
        if self.compile_forward:
            self._compiled_body = Compiled(self._body, strict=self.decoding.strict)

    def _choose_trainable(self) -> None:
        inner = self.janus.model
        language = [inner.language_model.layers, inner.language_model.norm]
        generation = [inner.generation_embeddings, inner.generation_aligner, inner.generation_head]
        both = language + generation
        parts = {"language_model": language, "generation": generation, "both": both}
        words = [inner.language_model.embed_tokens] if self.train_text_embedding else []
        train_parts(self, [] if self.lora else [*parts[self.trains], *words])

    def describe(self) -> dict[str, Any]:
        """Checkpoint, prompt template and special ids, as they were found."""
        return {
            "path": self.path,
            "template": TEMPLATES[self.template],
            "template_name": self.template,
            "pad_id": self.pad,
            "begin_of_image_id": self.begin_of_image,
        }

    @property
    def janus(self) -> JanusForConditionalGeneration:
        """The model of transformers, without the adapters' shell."""
        if self.model is None:
            raise RuntimeError("the policy's weights are not read yet; call load() first")
        return self.model.get_base_model() if self.lora else self.model

    def train(self, mode: bool = True) -> JanusPolicy:
        """Stay in evaluation mode: nothing has dropout, and the frozen VQ part keeps its mode."""
        return super().train(False)

    def prompt_ids(self, prompt: str) -> list[int]:
        """BOS, the templated prompt, begin-of-image; see `PromptReader.read`."""
        return self.reader.read([prompt])[0]

    def check_prompts(self, prompts: Sequence[str]) -> None:
        """Raise a ValueError for a prompt longer than the model's context or than the buckets."""
        for ids in self.reader.read(list(dict.fromkeys(prompts))):
            self.decoding.check_length(len(ids), self.num_tokens)

    def logits(
        self, prompts: Sequence[str], tokens: Tensor, unconditional: bool | Tensor = False
    ) -> Tensor:
        """Logits of every token by teacher forcing, [B, T, V]; see `Policy.logits`.

        The text head never runs and no layer's hidden states are kept. A prompt of several images
        is read once where that pays.
        """
        rows = self.reader.read_branches(prompts, unconditional)
        with products_on(self.janus.device, made_once=self.is_made_once):
            return self._head(self._read(rows, tokens))

    def _read(self, rows: Rows, tokens: Tensor) -> Tensor:
        """Hidden states that tell each token, [B, T, width]."""
        texts = list(dict.fromkeys(rows))
        if not self._pays_to_share(rows, len(texts), tokens.shape[1]):
            return self._read_whole(rows, tokens)
        index = torch.tensor([texts.index(row) for row in rows], device=self.janus.device)
        return self._read_texts_once(texts, index, tokens)

    def _pays_to_share(self, rows: Rows, distinct: int, num_tokens: int) -> bool:
        exact = self.dtype == "float64"  # where sums that transformers' norms round would tell
        if exact or not self.is_made_once or num_tokens == 1:
            return False
        length = max(map(len, rows))
        return length * (1 - distinct / len(rows)) >= WORTH_SHARING * (length + num_tokens - 1)

    def _read_whole(self, rows: Rows, tokens: Tensor) -> Tensor:
        """In one pass over texts and pictures."""
        ids, mask = self.reader.pad_left(rows, self.janus.device)
        embedded = torch.cat([self._embed_text(ids), self._embed_codes(tokens[:, :-1])], 1)
        mask = nn.functional.pad(mask, (0, tokens.shape[1] - 1), value=True)
        with self._checkpointing():
            hidden = (self._compiled_body or self._body)(embedded, *read_from_the_start(mask))
        return hidden[:, -tokens.shape[1] :]

    def _read_texts_once(self, texts: Rows, index: Tensor, tokens: Tensor) -> Tensor:
        """The same in two passes: over the texts, then over pictures; picture b is of index[b]."""
        kept, hidden, mask = self._read_prompts(texts)
        kept.batch_select_indices(index)
        behind = read_behind(mask[index], tokens.shape[1] - 1)
        pictures = self._body(self._embed_codes(tokens[:, :-1]), *behind, kept)
        return torch.cat([hidden[index, -1:], pictures], 1)

    def _read_prompts(self, rows: Rows) -> tuple[DynamicCache, Tensor, Tensor]:
        """What is kept of texts for what follows them, hidden states and mask [R, L, ...]."""
        ids, mask = self.reader.pad_left(rows, self.janus.device)
        kept = DynamicCache()
        hidden = self._body(self._embed_text(ids), *read_from_the_start(mask), kept)
        return kept, hidden, mask

    def _body(self, embedded: Tensor, seen: Tensor, positions: Tensor, cache: Any = None) -> Tensor:
        if self.attention == "eager":
            lowest = torch.finfo(embedded.dtype).min
            seen = torch.zeros_like(seen, dtype=embedded.dtype).masked_fill(~seen, lowest)
        return self.janus.model.language_model(
            inputs_embeds=embedded,
            attention_mask=seen,
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state

    @contextmanager
    def _checkpointing(self) -> Iterator[None]:
        """Recompute layers in passes with gradient; transformers reads each one's training flag."""
        recompute = self.gradient_checkpointing and torch.is_grad_enabled()
        for layer in self.blocks():
            layer.training = recompute
        try:
            yield
        finally:
            for layer in self.blocks():
                layer.training = False

    def _embed_text(self, ids: Tensor) -> Tensor:
        return self.janus.model.language_model.embed_tokens(ids).to(self._width_type)

    def _embed_codes(self, tokens: Tensor) -> Tensor:
        return self.janus.prepare_embeddings_for_image_generation(tokens).to(self._width_type)

    def _head(self, hidden: Tensor) -> Tensor:
        head = self.janus.model.generation_head
        return head(hidden.to(head.vision_head.weight.dtype))

    @property
    def _width_type(self) -> torch.dtype:
        return self.janus.model.language_model.norm.weight.dtype

    def prefill(
        self, prompts: Sequence[str], *, guided: bool, copies: int = 1
    ) -> tuple[Tensor, FusedDrawing | EagerDrawing]:
        """Read each distinct prompt once, and one unconditional row per distinct length.

        See `Policy.prefill`.
        """
        texts = list(dict.fromkeys(prompts))
        rows = self.reader.read(texts)
        lengths = list(dict.fromkeys(map(len, rows))) if guided else []
        source = [texts.index(prompt) for prompt in prompts for _ in range(copies)]
        images = len(source)
        if guided:
            source += [len(rows) + lengths.index(len(rows[row])) for row in source]
        rows += [self.reader.unconditional(length) for length in lengths]
        if not self._draws_fused():
            return self._prefill_eagerly(rows, source, images)
        inner, head = self.janus.model, self.janus.model.generation_head
        codes = self._embed_codes(torch.arange(self.codebook_size, device=self.janus.device))
        return start_drawing(
            self.decoding,
            read_network(inner.language_model, head, codes),
            inner.language_model.rotary_emb,
            self._embed_text,
            rows,
            source,
            images=images,
            num_tokens=self.num_tokens,
        )

    def step(self, tokens: Tensor, cache: FusedDrawing | EagerDrawing) -> Tensor:
        """Append one token to each image and give the next logits, [R, V]; see `Policy.step`."""
        return cache.step(tokens)

    def _draws_fused(self) -> bool:
        """Whether the layers can be read; warns once, or fails if that is asked for, if not."""
        if self.decoding.path == "eager":
            return False
        reason = why_unreadable(self.janus.model.language_model)
        if reason:
            self.decoding.fall_back(reason)
        return reason is None

    def _prefill_eagerly(
        self, rows: Rows, source: Sequence[int], images: int
    ) -> tuple[Tensor, EagerDrawing]:
        """Through transformers' layers, which are what the fused ones are held to."""
        prefix, hidden, mask = self._read_prompts(rows)
        index = torch.tensor(source, device=mask.device)
        mask = nn.functional.pad(mask[index], (0, self.num_tokens), value=True)
        memory = StaticCache(prefix, index, mask.shape[1])
        drawing = EagerDrawing(
            memory, mask, len(source) // images, self._embed_codes, self._body, self._head
        )
        return self._head(hidden[:, -1])[index], drawing

    @torch.no_grad()
    def decode(self, tokens: Tensor) -> Tensor:
        """Draw tokens [B, T] as pictures [B, 3, H, W], float32 in [0, 1]; never under autocast."""
        return decode_tokens(self.janus.model.vqmodel, tokens)

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """Read pictures [B, 3, H, W] in [0, 1] as tokens [B, T].

        Tokens of a decoded picture need not come back: keep sampled tokens for training.
        """
        return encode_pictures(self.janus.model.vqmodel, images)

    def prepare(self, pictures: Sequence[Any]) -> Tensor:
        """Resize and pad as the checkpoint's own processor does; see `Policy.prepare`."""
        return prepare_pictures(self.processor.image_processor, pictures)

    def answer(
        self, pictures: Sequence[Any], questions: Sequence[str], max_tokens: int
    ) -> list[str]:
        """The picture first, then the question, as Janus was trained; see `Policy.answer`."""
        image, form = self.processor.image_token, TEMPLATES[self.template]
        texts = [form.format(prompt=f"{image}\n{question.strip()}") for question in questions]
        return answer_questions(self.janus, self.processor, pictures, texts, max_tokens)

    def reference(self) -> Policy:
        """A frozen twin that shares what is frozen already; under LoRA, see `AdaptersThen`."""
        if self.lora:
            return AdaptersThen(self)
        shared: dict[int, Any] = {id(p): p for p in self.parameters() if not p.requires_grad}
        twin = copy.deepcopy(self, shared)
        twin._compile()  # a compiled function is not copied: it would still read this policy
        return cast(Policy, freeze(twin))

    def blocks(self) -> list[nn.Module]:
        """The language model's layers."""
        return list(self.janus.model.language_model.layers)

    def check_export(self, *, merge_adapters: bool) -> None:
        """Raise a ValueError if adapters are to be merged into quantised weights; loads nothing."""
        if self.quantize and merge_adapters:
            raise ValueError(
                f"expected merge_adapters: false beside quantize: {self.quantize}, got true, and "
                f"merging into {self.quantize} weights is not exact: set merge_adapters: false"
            )

    def export(self, folder: Path, *, merge_adapters: bool = True) -> None:
        """Write a folder that transformers loads; with adapters kept apart, one that peft loads."""
        self.check_export(merge_adapters=merge_adapters)
        if not self.lora:
            self.janus.save_pretrained(folder)
        elif merge_adapters:
            copy.deepcopy(self.model).merge_and_unload().save_pretrained(folder)
        else:
            self.model.save_pretrained(folder)
        self.processor.save_pretrained(folder)
