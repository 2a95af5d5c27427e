"""The least time that a phase can take: bytes over bandwidth, operations over matrix rate.

These formulas count the work that the method needs, each prompt read once
and each position attended to once; what an implementation does beyond that lowers its share. A
model that fits into a processor's cache can exceed a bound by bytes: its weights are not fetched
from memory at each step.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from cotgen_pl.sampling import LogprobMode

# Forward passes' worth of work per image: a backward pass is two; with recomputation, each branch
# that has a gradient runs once more.
TRAINING_PASSES: dict[LogprobMode, int] = {"conditional": 3, "guided": 6, "guided_detached": 4}
GRADIENT_BRANCHES: dict[LogprobMode, int] = {"conditional": 1, "guided": 2, "guided_detached": 1}
BRANCHES: dict[LogprobMode, int] = {"conditional": 1, "guided": 2, "guided_detached": 2}


@dataclass(frozen=True)
class Network:
    """What costs depend on."""

    parameters: int
    """Of the language model's layers, its last norm and the image head."""
    layers: int
    width: int
    """Of all query heads together."""
    cache_width: int
    """Of all key heads together."""
    number_bytes: int
    """Bytes per weight and per cached number."""

    @classmethod
    def of(cls, janus: Any, number_bytes: int) -> Network:
        """Of transformers' Janus, computing in numbers of so many bytes."""
        text, inner = janus.config.text_config, janus.model
        parts = inner.language_model.layers, inner.language_model.norm, inner.generation_head
        return cls(
            sum(weight.numel() for part in parts for weight in part.parameters()),
            text.num_hidden_layers,
            text.num_attention_heads * text.head_dim,
            text.num_key_value_heads * text.head_dim,
            number_bytes,
        )

    @property
    def position_bytes(self) -> int:
        """Bytes of keys and values of one position of one sequence."""
        return 2 * self.layers * self.cache_width * self.number_bytes

    def forward_operations(self, length: int) -> int:
        """Operations of one sequence's causal forward pass: 2 P L + 2 N h L^2."""
        return 2 * self.parameters * length + 2 * self.layers * self.width * length**2


@dataclass(frozen=True)
class Work:
    """What a phase moves and computes."""

    moved: float
    """Bytes; 0 where operations bind, as in updates."""
    operations: float


@dataclass(frozen=True)
class Machine:
    """What was measured of the machine in the same run."""

    bandwidth: float
    """Bytes per second of a large copy, read and written bytes together."""
    matrix_rate: float
    """Operations per second of a large matrix product in the compute type."""

    def least_seconds(self, work: Work) -> float:
        """The larger of the two bounds."""
        return max(work.moved / self.bandwidth, work.operations / self.matrix_rate)

    def binding(self, work: Work) -> str:
        """Which of the two bounds it is."""
        by_bytes = work.moved / self.bandwidth >= work.operations / self.matrix_rate
        return "bytes" if by_bytes else "operations"


@dataclass(frozen=True)
class Load:
    """How much is asked of a network."""

    images: int
    """B."""
    prompts: int
    """Distinct ones among theirs."""
    prompt: int
    """Positions of a prompt, padding included."""
    tokens: int
    """T per image."""
    guided: bool
    """Whether guidance is on: it doubles the sequences of a rollout."""
    mode: LogprobMode
    """Whose log-probs train."""
    recompute: bool
    """Whether gradient checkpointing is on."""

    @property
    def trained_mode(self) -> LogprobMode:
        """Without guidance there is one branch, whatever the mode."""
        return self.mode if self.guided else "conditional"


def cache_bytes(network: Network, load: Load) -> int:
    """Keys and values of all images at their end."""
    sequences = 2 * load.images if load.guided else load.images
    return sequences * network.position_bytes * (load.prompt + load.tokens)


def phase_works(network: Network, load: Load) -> dict[str, Work]:
    """The work of each phase of a step that has one update and a reference."""
    forward = load.images * network.forward_operations(load.prompt + load.tokens)
    mode = load.trained_mode
    passes = TRAINING_PASSES[mode] + (GRADIENT_BRANCHES[mode] if load.recompute else 0)
    return {
        "rollout": rollout_work(network, load),
        "reference": Work(0, BRANCHES[mode] * forward),
        "update": Work(0, passes * forward),
    }


def rollout_work(network: Network, load: Load) -> Work:
    """Work of decoding image tokens, one step per token.

    Step k reads all weights and, of each sequence, the keys and values of `prompt` + k positions.
    The first token comes from the pass over the prompts, each of which is read once; so is one
    unconditional row.
    """
    sequences = 2 * load.images if load.guided else load.images
    contexts = sum(load.prompt + k for k in range(load.tokens))  # of one sequence, over all steps
    weights = load.tokens * network.number_bytes * network.parameters
    attended = 4 * network.layers * network.width * (contexts - load.prompt)
    decoded = 2 * network.parameters * (load.tokens - 1) + attended
    read = (load.prompts + load.guided) * network.forward_operations(load.prompt)
    moved = weights + sequences * network.position_bytes * contexts
    return Work(moved, sequences * decoded + read)
