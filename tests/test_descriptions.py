"""What is written down of a reward."""

from cotgen_pl.descriptions import describe
from cotgen_pl.rewards.shapes_oracle import ShapesOracle


def test_a_reward_is_described_by_what_it_was_made_with():
    assert describe(ShapesOracle("geneval")) == {
        "class_path": "cotgen_pl.rewards.shapes_oracle.ShapesOracle",
        "rules": "geneval",
    }
