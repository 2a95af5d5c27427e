"""A suite's pictures drawn and judged by several processes."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch

from cotgen_pl.evaluation.judging import judge_suite
from cotgen_pl.evaluation.suites import OWN, JudgedSuite, Suite, read_suite
from tests.toys import Brightness, attach_grpo, write_prompts


@pytest.fixture
def module(tiny_janus, tmp_path):
    """A module that is loaded and attached to a trainer."""
    return attach_grpo(tiny_janus, tmp_path)


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_judge_their_shares_of_a_suite(module, tmp_path, processes):
    """Each gives zeros for what is the others', so that their sum is the whole."""
    suite = Suite("near", "id", [write_prompts(tmp_path)], Brightness())

    def judge(rank: int, number: int) -> JudgedSuite:
        trainer = SimpleNamespace(world_size=number, progress_bar_callback=None)
        one = SimpleNamespace(global_rank=rank, trainer=trainer)
        one.draw, one.policy, one.own_random_state = (
            module.draw,
            module.policy,
            module.own_random_state,
        )
        one.sum_over_processes = lambda values: values
        one.gathered = nullcontext
        return judge_suite(one, suite, read_suite(suite), {OWN: Brightness()}, 2, 2)

    whole, parts = judge(0, 1), [judge(rank, processes) for rank in range(processes)]
    for name, values in whole.verdicts[OWN].items():
        shares = [part.verdicts[OWN][name] for part in parts]
        assert all((share == 0).any() for share in shares)
        torch.testing.assert_close(sum(shares), values)
    torch.testing.assert_close(sum(part.diversity for part in parts), whole.diversity)
