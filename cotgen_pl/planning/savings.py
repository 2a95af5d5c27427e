"""Which setting to change when a run does not fit: each change, and the plan that it leads to."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from cotgen_pl.planning.footprint import PlannedPolicy
from cotgen_pl.planning.work import OptimizerMemory, PlannedWork, memory, peak

Change = tuple[str, PlannedPolicy, PlannedWork]
EIGHT_BITS = OptimizerMemory(2.062, 0.0)  # AdamW8bit of bitsandbytes, by `try_optimizer`
LORA_RANK = 16  # that of configs/policies/janus_pro_7b_lora_4bit.yaml
LEAST_SAVED = 0.005  # of the peak; smaller savings are not worth a line


def policy_changes(policy: PlannedPolicy, work: PlannedWork) -> Iterator[Change]:
    """Changes of what the policy is and what of it trains."""
    if not policy.gradient_checkpointing:
        checkpointed = replace(policy, gradient_checkpointing=True)
        yield "model.init_args.policy.init_args.gradient_checkpointing: true", checkpointed, work
    if policy.precision == "32-true":
        yield "trainer.precision: bf16-mixed", replace(policy, precision="bf16-mixed"), work
    if policy.dtype == "float32":
        smaller = replace(policy, dtype="bfloat16")
        yield "model.init_args.policy.init_args.dtype: bfloat16", smaller, work
    adapted, alone = replace(policy, lora_rank=LORA_RANK), replace(work, twin=False)
    if policy.trains == "language_model" and not policy.train_text_embedding:
        lora = f"model.init_args.policy.init_args.lora: {{rank: {LORA_RANK}}}"
        if not policy.lora_rank:
            yield lora, adapted, alone
        if not policy.quantize:
            quantized = replace(policy, lora_rank=policy.lora_rank or LORA_RANK, quantize="4bit")
            yield f"{lora} and quantize: 4bit beside it", quantized, alone


def work_changes(policy: PlannedPolicy, work: PlannedWork) -> Iterator[Change]:
    """Changes of what an update keeps beside the policy."""
    if work.micro_batch > 2:
        yield "model.init_args.micro_batch_size: 1", policy, replace(work, micro_batch=1)
    if work.twin:
        name = "no reference beside the policy: kl_coef: 0, or under DPO reference_logps: stored"
        yield name, policy, replace(work, twin=False)
    if work.optimizer.state > EIGHT_BITS.state:
        name = "model.init_args.optimizer: bitsandbytes.optim.AdamW8bit"
        yield name, policy, replace(work, optimizer=EIGHT_BITS)
    if work.forced_guidance:
        yield "model.init_args.logprobs: conditional", policy, replace(work, logprobs="conditional")
    if work.reward and work.reward_stays:
        yield "the reward's init_args.offload: true", policy, replace(work, reward_stays=False)


def drawing_changes(policy: PlannedPolicy, work: PlannedWork) -> Iterator[Change]:
    """Changes of how many pictures are drawn at once."""
    largest = max(work.drawn, work.evaluated)
    half = largest // 2
    if half:
        fewer = replace(work, drawn=min(work.drawn, half), evaluated=min(work.evaluated, half))
        names = [
            name
            for name, number in (
                ("drawn_at_once or pairs.images_per_batch", work.drawn),
                ("batch_size of callbacks", work.evaluated),
            )
            if number > half
        ]
        yield f"at most {half} pictures drawn at once: {' and '.join(names)}", policy, fewer


def format_savings(policy: PlannedPolicy, work: PlannedWork, room: float) -> str:
    """A line for each change that makes the peak smaller, the best one first."""
    before, found = peak(memory(policy, work))[1], []
    for changes in (policy_changes, work_changes, drawing_changes):
        for name, other, less in changes(policy, work):
            after = peak(memory(other, less))[1]
            verdict = "fits" if after <= room else f"{after / 1e9:.3g} GB, not enough alone"
            if after < before * (1 - LEAST_SAVED):
                found.append((after, f"  {(before - after) / 1e9:6.3g} GB less, {verdict}: {name}"))
    return "\n".join(["one change, and what it saves:", *(text for _, text in sorted(found))])
