"""A decoder of our own for Llama's layers, made for drawing many tokens one by one.

It computes what transformers' layers compute, to which the tests hold it, with fewer and larger
operations: `weights.py` has the products, `prefixes.py` the prompts, `layers.py` the arithmetic. In
a step nothing waits for the device: positions are tensors, and lengths are known beforehand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from cotgen_pl.decoding.graphs import step_recorder
from cotgen_pl.decoding.layers import Memory, decode_step, make_memory, read_prompts
from cotgen_pl.decoding.prefixes import find_prefixes
from cotgen_pl.decoding.settings import DecodingSettings, buckets_between, choose_bucket
from cotgen_pl.decoding.weights import Network


@dataclass
class FusedDrawing:
    """Where a batch of images stands while it is drawn."""

    memory: Memory
    run: Callable[[int], Tensor]
    """Gives the logits of the next step when it is told how many positions to read."""
    filled: int
    """Positions."""
    lengths: tuple[int, ...] | None
    """See `DecodingSettings.bucket_lengths`."""

    @torch.no_grad()
    def step(self, tokens: Tensor) -> Tensor:
        """Append one token to each image, [images] int64, and give the next logits, [R, V]."""
        self.filled += 1
        self.memory.position += 1
        self.memory.tokens.copy_(tokens)
        return self.run(choose_bucket(self.filled, self.lengths))


@torch.no_grad()
def start_drawing(
    settings: DecodingSettings,
    network: Network,
    rotary: Callable[..., tuple[Tensor, Tensor]],
    embed: Callable[[Tensor], Tensor],
    rows: Sequence[Sequence[int]],
    source: Sequence[int],
    *,
    images: int,
    num_tokens: int,
) -> tuple[Tensor, FusedDrawing]:
    """Read prompts, and make room for their pictures.

    Args:
        settings: Which path, which buckets.
        network: The weights of now; see `read_network`.
        rotary: transformers' rotation: a tensor of the type wanted and positions [1, S] to cosines
            and sines, [1, S, head width] each.
        embed: Token ids [N] to embeddings [N, width].
        rows: P prompts' token ids, unconditional ones among them.
        source: Which of them each of the R sequences continues.
        images: R, or half of it under guidance: what `step` appends a token to.
        num_tokens: T.

    Returns:
        Logits of the first token, [R, V], and the batch that goes on from there. It owns the memory
        that drawing takes, so that an update finds it free, but for what one captured step computes
        with: that is kept for the next batch.
    """
    device, longest = network.norm.device, max(map(len, rows))
    settings.check_length(longest, num_tokens)
    lengths = settings.bucket_lengths(longest + num_tokens, device)
    last = lengths[-1] if lengths else longest + num_tokens
    like = torch.empty(0, dtype=torch.promote_types(network.codes.dtype, torch.float32))
    cosines, sines = rotary(like.to(device), torch.arange(last, device=device)[None])
    memory = make_memory(network, len(source), images, last, (cosines[0], sines[0]))
    prefixes, index = find_prefixes(rows, device), torch.tensor(source, device=device)
    masked = lengths is not None or len(set(map(len, rows))) > 1
    run: Callable[[int], Tensor] = partial(decode_step, network, memory, masked=masked)
    recorder = step_recorder(device) if settings.path == "graph" else None
    if recorder:
        # Steps are tried here: they write to the first position, and prompts then write over that.
        needed = buckets_between(longest + 1, longest + num_tokens, lengths)
        run = recorder.record(run, needed, strict=settings.strict)
    memory.start(prefixes, index)
    logits = read_prompts(network, memory, prefixes, index, embed(prefixes.ids))[index]
    return logits, FusedDrawing(memory, run, longest, lengths)
