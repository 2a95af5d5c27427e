"""Reinforcement-learning post-training of autoregressive image generators.

Only the light parts are named here; policies, rewards, modules and callbacks are imported by path,
so that a piece whose library is missing never stops a run that does not name it.
"""

from cotgen_pl import interfaces, losses, sampling

__version__ = "0.1.0.dev0"

__all__ = ["__version__", "interfaces", "losses", "sampling"]
