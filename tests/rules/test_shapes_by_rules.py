"""The Shapes world's own judges against the benchmarks' rules, on pictures of the small Janus.

The exact recogniser takes the detector's place. A picture is right by T2I-CompBench's rules if it
has full marks; its rules never count what was not asked for, as the in-domain suite does, so the
total is asked for as one more thing.
"""

from collections import Counter

import pytest
import torch

from cotgen_pl.data.formats import PromptFile, read_prompts
from cotgen_pl.policies.janus import JanusPolicy
from cotgen_pl.rules.compbench import LEAST_SPATIAL_SCORE, numeracy_score, spatial_score
from cotgen_pl.rules.geneval import Found, judge, keep_sure
from cotgen_pl.rules.position import score_position
from cotgen_pl.sampling import noise_seed, sample_tokens
from cotgen_pl.shapes.judge import judge_compbench, judge_geneval, strict
from cotgen_pl.shapes.recognise import recognise

PICTURES = 1000
SCALE = 479 / 32  # T2I-CompBench's distances are pixels of its 479-pixel pictures
RELATIONS = {
    "left": "on the left of",
    "right": "on the right of",
    "above": "on the top of",
    "below": "on the bottom of",
    "next to": "next to",
}


@pytest.fixture(scope="module")
def policy(repository):
    return JanusPolicy(str(repository / "cotgen_pl/shapes/assets/janus")).load()


def draw(policy, prompts):
    """Pictures of the prompts in turn, read by the recogniser: (prompt, recognition) pairs."""
    torch.set_grad_enabled(False)
    try:
        for start in range(0, PICTURES, 250):
            part = [prompts[n % len(prompts)] for n in range(start, start + 250)]
            seeds = [noise_seed(0, "test", start + n) for n in range(len(part))]
            texts = [prompt.text for prompt in part]
            tokens, _ = sample_tokens(policy, texts, seeds=seeds, guidance=2.0, temperature=1.0)
            yield from zip(part, recognise(policy.decode(tokens)), strict=True)
    finally:
        torch.set_grad_enabled(True)


def test_out_of_domain_by_genevals_rules(policy, repository):
    verdicts = Counter()
    for prompt, recognition in draw(policy, prompts_of(repository, "ood_geneval")):
        by_box = {placed.box: placed for placed in recognition.objects}
        found = [Found(placed.shape, 1.0, placed.box) for placed in recognition.objects]
        clauses = judge(
            prompt.facts,
            keep_sure(found, prompt.category),
            lambda item, name, by_box=by_box: getattr(by_box[item.box], name),
        )
        right = all(clauses.values()) and recognition.is_picture
        verdicts[right, bool(strict(judge_geneval(prompt.facts, recognition)))] += 1
    assert verdicts.keys() == {(True, True), (False, False)}, verdicts
    assert verdicts.total() == PICTURES


def test_in_domain_by_t2i_compbenchs_rules(policy, repository):
    prompts = [
        prompt
        for prompt in prompts_of(repository, "id_validation")
        if prompt.category in ("spatial", "numeracy")
    ]
    verdicts = Counter()
    for prompt, recognition in draw(policy, prompts):
        facts = prompt.facts
        fitting = [[o for o in recognition.objects if fits(item, o)] for item in facts["objects"]]
        right = count_score(facts, fitting, recognition) == 1.0 and recognition.is_picture
        for relation in facts["relations"]:
            right = right and relation_score(relation, fitting) == 1.0
        verdicts[right, bool(strict(judge_compbench(facts, recognition)))] += 1
    assert verdicts.keys() == {(True, True), (False, False)}, verdicts
    assert verdicts.total() == PICTURES


def prompts_of(repository, name):
    path = repository / f"cotgen_pl/shapes/assets/prompts/{name}.jsonl"
    return read_prompts(PromptFile(str(path), "jsonl"))


def fits(item, placed):
    """Whether an object is what a phrase asks for: the detector's label."""
    return all(
        item[name] in (None, getattr(placed, name)) for name in ("shape", "color", "texture")
    )


def count_score(facts, fitting, recognition):
    asked = [(str(i), item["count"]) for i, item in enumerate(facts["objects"])]
    found = {str(i): len(own) for i, own in enumerate(fitting)}
    asked.append(("everything", sum(number for _, number in asked)))
    found["everything"] = len(recognition.objects) + len(recognition.unreadable)
    return numeracy_score(asked, found)


def relation_score(relation, fitting):
    first, name, second = relation
    if not (fitting[first] and fitting[second]):
        return spatial_score(None, None, 0.0, least=LEAST_SPATIAL_SCORE)
    boxes = [[SCALE * side for side in fitting[i][0].box] for i in (first, second)]
    holds = score_position(RELATIONS[name], *boxes)
    return spatial_score(1.0, 1.0, holds, least=LEAST_SPATIAL_SCORE)
