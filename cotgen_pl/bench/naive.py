"""A GRPO step on a Janus as published training codes write it: a baseline, no way to train.

Five habits cost it time or memory and change no number; each can be switched off by itself:

1. `growing_cache`: keys and values are concatenated anew at every token.
2. `text_head`: the text head runs on every position, in sampling and in training, and what it says
   is thrown away.
3. `full_logits`: the distributions [B, T, V] of rollout and reference are kept until the step ends,
   in place of one log-prob per token, and that of the policy until its backward pass.
4. `prompt_per_copy`: every copy of a prompt is read, and an unconditional row beside each.
5. `image_per_backward`: pictures go through reference and update one at a time.

A composite: of the published codes, no single one is claimed to have all five (T2I-R1 has the
second). Without any habit the step does the work of `cotgen_pl.modules.grpo`. It meets
transformers' model directly, not a policy: that is how the published ones are written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers.cache_utils import Cache, DynamicCache

from cotgen_pl.decoding.eager import CACHE, StaticCache
from cotgen_pl.losses import combined_advantages, grpo_loss, token_statistics
from cotgen_pl.sampling import LogprobMode, guide, uniform_noise


@dataclass(frozen=True)
class Habits:
    """Which of the five are on; see the top of this file."""

    growing_cache: bool = True
    text_head: bool = True
    full_logits: bool = True
    prompt_per_copy: bool = True
    image_per_backward: bool = True

    @classmethod
    def none(cls) -> Habits:
        """All off."""
        return cls(**dict.fromkeys(cls.names(), False))

    @classmethod
    def only(cls, name: str) -> Habits:
        """One on, all others off."""
        return replace(cls.none(), **{name: True})

    @classmethod
    def names(cls) -> list[str]:
        """Of all five."""
        return [habit.name for habit in fields(cls)]


@dataclass(frozen=True)
class Setting:
    """What a step does, whatever its habits."""

    copies: int
    """G, pictures of each prompt."""
    num_tokens: int
    """T."""
    guidance: float
    mode: LogprobMode
    kl_coef: float
    micro_batch_size: int
    """Pictures per pass without `image_per_backward`."""
    pad: int
    """Id that unconditional rows are filled with."""
    gradient_clip: float = 1.0


def pad_left(
    rows: Sequence[Sequence[int]], pad: int, device: torch.device
) -> tuple[Tensor, Tensor]:
    """Token ids and attention mask of prompts, [P, L] int64 each."""
    longest = max(map(len, rows))
    ids = [[pad] * (longest - len(row)) + list(row) for row in rows]
    mask = [[0] * (longest - len(row)) + [1] * len(row) for row in rows]
    return torch.tensor(ids, device=device), torch.tensor(mask, device=device)


class NaiveStep:
    """One step: roll out, decode, score, read the reference, update.

    Args:
        model: transformers' Janus, which trains.
        reference: A frozen one; read where `kl_coef` is above 0.
        optimizer: Over what trains.
        ids: Prompts from BOS to begin-of-image, padded on the left, [P, L].
        mask: 1 where they are not padding, [P, L].
        draw: Tokens [B, T] to pictures.
        score: Pictures to rewards [B].
        setting: What to do.
        habits: How.
    """

    def __init__(
        self,
        model: Any,
        reference: Any,
        optimizer: torch.optim.Optimizer,
        ids: Tensor,
        mask: Tensor,
        draw: Callable[[Tensor], Tensor],
        score: Callable[[Tensor], Tensor],
        setting: Setting,
        habits: Habits,
    ) -> None:
        self.model, self.reference, self.optimizer = model, reference, optimizer
        self.ids, self.mask, self.draw, self.score = ids, mask, draw, score
        self.setting, self.habits = setting, habits
        self.guided = setting.guidance != 1
        self.kept: list[Tensor] = []  # by the third habit

    def run(self, seeds: Sequence[int]) -> Tensor:
        """The step's loss before it; one seed per picture, as `sample_tokens` takes them."""
        tokens = self.roll_out(seeds)
        rewards = {"total": self.score(self.draw(tokens))}
        advantages = combined_advantages(rewards, {"total": 1.0}, self.setting.copies)
        reference = self.read_reference(tokens) if self.setting.kl_coef else None
        loss = self.update(tokens, advantages, reference)
        self.optimizer.zero_grad()  # as transformers' Trainer does after each step
        self.kept.clear()
        return loss

    # Rollout --------------------------------------------------------------------------------------

    @torch.no_grad()
    def roll_out(self, seeds: Sequence[int]) -> Tensor:
        """Tokens [B, T]."""
        logits, cache, mask = self._prefill()
        noise = uniform_noise(seeds, self.setting.num_tokens).to(logits.device)
        tokens: list[Tensor] = []
        distributions: list[Tensor] = []
        for position in range(self.setting.num_tokens):
            if position:
                mask = nn.functional.pad(mask, (0, 1), value=1)
                embedded = self._embed_codes(tokens[-1][:, None])
                embedded = embedded.repeat(2 if self.guided else 1, 1, 1)
                logits = self._head(self.model, self._body(self.model, embedded, mask, cache))[:, 0]
            distribution = self._guide(logits).log_softmax(-1)
            tokens.append(_pick(distribution.exp(), noise[:, position]))
            if self.habits.full_logits:
                distributions.append(distribution)
            else:
                distributions.append(distribution.gather(-1, tokens[-1][:, None]))
        self.kept.append(torch.stack(distributions, 1))
        return torch.stack(tokens, 1)

    def _prefill(self) -> tuple[Tensor, Cache, Tensor]:
        """Logits of the first token, the cache and its mask; unconditional rows come last."""
        copies, number = self.setting.copies, len(self.ids)
        ids, mask, index = self.ids, self.mask, torch.arange(number, device=self.ids.device)
        if self.habits.prompt_per_copy:
            ids, mask = ids.repeat_interleave(copies, 0), mask.repeat_interleave(copies, 0)
            index = torch.arange(len(ids), device=ids.device)
        else:
            index = index.repeat_interleave(copies)
        if self.guided:
            index = torch.cat([index, index + len(ids)])
            ids, mask = torch.cat([ids, self._unconditional(ids)]), mask.repeat(2, 1)
        prefix = DynamicCache()
        embedded = self.model.model.language_model.embed_tokens(ids)
        hidden = self._body(self.model, embedded, mask, prefix)[:, -1:]
        logits = self._head(self.model, hidden)[:, 0]
        return logits[index], self._cache(prefix, index), mask[index]

    def _cache(self, prefix: DynamicCache, index: Tensor) -> Cache:
        if self.habits.growing_cache:
            if not self.habits.prompt_per_copy:
                prefix.batch_select_indices(index)
            return prefix
        length = prefix.get_seq_length() + self.setting.num_tokens
        return StaticCache(prefix, index, length)

    def _unconditional(self, ids: Tensor) -> Tensor:
        """The same rows with pads between BOS and begin-of-image, as transformers makes them."""
        first = self.mask.argmax(-1)[0]
        begin, end = self.ids[0, first], self.ids[0, -1]
        return torch.where((ids == begin) | (ids == end), ids, self.setting.pad)

    # Log-probs ------------------------------------------------------------------------------------

    def read_reference(self, tokens: Tensor) -> Tensor:
        """Log-probs [B, T], or by the third habit distributions [B, T, V], of the reference."""
        parts = [self._logits(self.reference, tokens, rows) for rows in self._parts(tokens)]
        if not self.habits.full_logits:
            return torch.cat(parts)
        self.kept.append(torch.cat(parts))
        return self.kept[-1]

    def update(self, tokens: Tensor, advantages: Tensor, reference: Tensor | None) -> Tensor:
        """One optimizer step; gives the loss before it."""
        self.optimizer.zero_grad()
        losses = []
        for rows in self._parts(tokens):
            part = tokens[rows]
            logprobs, entropy = self._statistics(self._guided_logits(self.model, part, rows), part)
            compared = None
            if reference is not None:
                compared = reference[rows]
                if self.habits.full_logits:
                    compared = compared.gather(-1, part[..., None])[..., 0]
            loss, _ = grpo_loss(
                logprobs,
                logprobs.detach(),
                compared,
                advantages[rows],
                entropy=entropy,
                kl_coef=self.setting.kl_coef,
            )
            loss = loss * len(part) / len(tokens)
            loss.backward()
            losses.append(loss.detach())
        trained = [weight for group in self.optimizer.param_groups for weight in group["params"]]
        nn.utils.clip_grad_norm_(trained, self.setting.gradient_clip)
        self.optimizer.step()
        return torch.stack(losses).sum()

    def _statistics(self, logits: Tensor, tokens: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probs and entropies, [b, T] each; by the third habit, autograd keeps [b, T, V]."""
        if not self.habits.full_logits:
            return token_statistics(logits, tokens)
        distribution = logits.log_softmax(-1)
        entropy = -(distribution.exp() * distribution).sum(-1).detach()
        return distribution.gather(-1, tokens[..., None])[..., 0], entropy

    def _parts(self, tokens: Tensor) -> list[slice]:
        size = 1 if self.habits.image_per_backward else self.setting.micro_batch_size
        return [slice(start, start + size) for start in range(0, len(tokens), size)]

    @torch.no_grad()
    def _logits(self, model: Any, tokens: Tensor, rows: slice) -> Tensor:
        distribution = self._guided_logits(model, tokens[rows], rows).log_softmax(-1)
        if self.habits.full_logits:
            return distribution
        return distribution.gather(-1, tokens[rows][..., None])[..., 0]

    def _guided_logits(self, model: Any, tokens: Tensor, rows: slice) -> Tensor:
        """Logits [b, T, V] of the distribution that the mode names, in float32 at least."""
        ids = self.ids.repeat_interleave(self.setting.copies, 0)[rows]
        mask = self.mask.repeat_interleave(self.setting.copies, 0)[rows]
        conditional = self._forced_logits(model, ids, mask, tokens)
        if not self.guided or self.setting.mode == "conditional":
            return guide(conditional, conditional, 1.0)
        with torch.set_grad_enabled(torch.is_grad_enabled() and self.setting.mode == "guided"):
            unconditional = self._forced_logits(model, self._unconditional(ids), mask, tokens)
        return guide(conditional, unconditional, self.setting.guidance)

    def _forced_logits(self, model: Any, ids: Tensor, mask: Tensor, tokens: Tensor) -> Tensor:
        prompt = model.model.language_model.embed_tokens(ids)
        embedded = torch.cat([prompt, self._embed_codes(tokens[:, :-1]).to(prompt.dtype)], 1)
        mask = nn.functional.pad(mask, (0, tokens.shape[1] - 1), value=1)
        return self._head(model, self._body(model, embedded, mask)[:, -tokens.shape[1] :])

    # Parts of the model ---------------------------------------------------------------------------

    def _body(
        self, model: Any, embedded: Tensor, mask: Tensor, cache: Cache | None = None
    ) -> Tensor:
        """Last hidden states, [R, length, width], and by the second habit their text logits."""
        body = model.model.language_model
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -embedded.shape[1] :]
        hidden: Tensor = body(
            inputs_embeds=embedded.to(body.norm.weight.dtype),
            attention_mask=mask,
            position_ids=positions,
            use_cache=cache is not None,
            **{CACHE: cache},
        ).last_hidden_state
        if self.habits.text_head:
            model.lm_head(hidden.to(model.lm_head.weight.dtype))
        return hidden

    def _head(self, model: Any, hidden: Tensor) -> Tensor:
        head = model.model.generation_head
        logits: Tensor = head(hidden.to(head.vision_head.weight.dtype))
        return logits

    def _embed_codes(self, tokens: Tensor) -> Tensor:
        embedded: Tensor = self.model.prepare_embeddings_for_image_generation(tokens)
        return embedded

    def _guide(self, logits: Tensor) -> Tensor:
        """[2B, V] to [B, V] under guidance, in float32 at least."""
        if not self.guided:
            return guide(logits, logits, 1.0)
        conditional, unconditional = logits.chunk(2)
        return guide(conditional, unconditional, self.setting.guidance)


def _pick(probabilities: Tensor, noise: Tensor) -> Tensor:
    """The token [B] at which the running sum of [B, V] probabilities first passes noise [B]."""
    total = probabilities.double().cumsum(-1)
    return (total <= noise[:, None] * total[:, -1:]).sum(-1).clamp(max=probabilities.shape[-1] - 1)
