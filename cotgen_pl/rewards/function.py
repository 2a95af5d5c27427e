"""A plain Python function as a reward, named by its import path; or several, weighted.

The function needs nothing of this package: it is given texts and pictures and returns numbers.
"""

from __future__ import annotations

import copy
import importlib
import inspect
import math
import numbers
import os
import reprlib
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import Any, Literal

import numpy
import torch
from torch import Tensor

from cotgen_pl.interfaces import Prompt, Reward, Scores, check_choice
from cotgen_pl.pixels import as_rgb, to_pillow

Signature = Literal["columns", "flow_grpo"]
GIVEN = ("prompts", "images")  # by keyword, beside the columns
FORMS = {"columns": "f(prompts, images, **columns)", "flow_grpo": "f(images, prompts, metadata)"}


class FunctionReward(Reward):
    """Scores by functions of the user's own. Each is one part, under the function's own name.

    `columns` is the form of TRL's reward functions (https://huggingface.co/docs/trl/grpo_trainer),
    with images for completions:

        def redness(prompts, images, **columns) -> list[float | None]

    It is called by keywords, with B texts, B Pillow images in RGB, and each fact of the prompts as
    a column of B values, None where a prompt does not have it. A column that the function names
    without a default is a required fact. None, or NaN, is no verdict.

    `flow_grpo` is the form of https://github.com/yifan123/flow_grpo (flow_grpo/rewards.py):

        def redness(images, prompts, metadata) -> (scores, extra) or scores

    It is called by position, with a tensor [B, 3, H, W] float32 in [0, 1], B texts, and B
    dictionaries of facts; `extra` is not used. What stands in that file are makers of such
    functions: call one in a module of your own, `clip = clip_score("cuda")`, and name the result.

    Modules are looked for in the working directory too.

    Args:
        function: An import path, like `my_rewards.redness`; or several, each with its weight in the
            total. Weight 0 only watches. A picture that lacks a verdict with a weight has none.
        signature: Which of the two forms it has, or they have.
    """

    def __init__(self, function: str | dict[str, float], signature: Signature = "columns") -> None:
        super().__init__()
        check_choice("signature", signature, Signature)
        weights = {function: 1.0} if isinstance(function, str) else function
        _check_weights(weights)
        self.signature = signature
        self.weights = {path: float(weight) for path, weight in weights.items()}
        self._functions = {path: find_function(path) for path in weights}
        self.name = _own_name(function) if isinstance(function, str) else "functions"
        columns = [read_required(f, path, signature) for path, f in self._functions.items()]
        self.required_facts = tuple(dict.fromkeys(fact for facts in columns for fact in facts))

    def check_prompt(self, prompt: Prompt) -> None:
        """Raise a ValueError for facts that would hide an argument of the function."""
        hidden = sorted(prompt.facts.keys() & set(GIVEN))
        if self.signature == "columns" and hidden:
            raise ValueError(
                f"reward {self.name}: expected facts with other names than prompts and images, "
                f"which are the functions' own arguments, got {hidden}; rename them"
            )

    def score(self, images: Tensor, prompts: Sequence[Prompt]) -> Scores:
        """Score pictures [B, 1, 3 or 4, H, W] in [0, 1]; details: which functions gave no number.

        Raises:
            ValueError: A function raised, or returned something else than B numbers or None.
        """
        parts, weights = {}, {}
        total = torch.zeros(len(prompts), device=images.device, dtype=torch.float32)
        for path, weight in self.weights.items():
            returned = self._call(path, images, prompts)
            values = total.new_tensor(read_scores(path, returned, len(prompts), self.signature))
            parts[_own_name(path)], weights[_own_name(path)] = values, weight
            if weight != 0:  # 0 * NaN would be NaN
                total = total + weight * values
        return Scores(total, parts, weights, _describe_missing(parts, len(prompts)))

    def _call(self, path: str, images: Tensor, prompts: Sequence[Prompt]) -> Any:
        """What a function returns; it is given copies, which it may change."""
        texts, pictures = [prompt.text for prompt in prompts], as_rgb(images).float()
        facts = [copy.deepcopy(prompt.facts) for prompt in prompts]
        function = self._functions[path]
        try:
            if self.signature == "flow_grpo":
                return function(pictures.clone(), texts, facts)
            return function(prompts=texts, images=to_pillow(pictures), **_as_columns(facts))
        except Exception as error:
            raise ValueError(
                f"function {path}: expected a score for each of {len(prompts)} pictures, got "
                f"{_describe(error)}; correct the function, or return None for a picture that it "
                "cannot judge"
            ) from error


def find_function(path: str) -> Callable[..., Any]:
    """What an import path names, in the working directory or among the installed packages."""
    module, _, attribute = path.rpartition(".")
    if not module or not all(part.isidentifier() for part in path.split(".")):
        raise ValueError(
            f"function: expected an import path like my_rewards.redness, got {path!r}; write the "
            "module's name, a dot and the function's"
        )
    if os.getcwd() not in sys.path:  # a script's own folder stands there instead
        sys.path.append(os.getcwd())
    try:
        found = getattr(importlib.import_module(module), attribute, None)
    except Exception as error:
        raise ValueError(
            f"function {path}: expected a module {module} that can be imported, got "
            f"{_describe(error)}; put it into the working directory, {os.getcwd()}, install its "
            "package, or correct it"
        ) from error
    if not callable(found):
        raise ValueError(
            f"function {path}: expected a function {attribute} in {module}, got "
            f"{reprlib.repr(found)}; correct the name"
        )
    return found


def read_required(function: Callable[..., Any], path: str, signature: Signature) -> list[str]:
    """The columns that a function cannot do without; a ValueError if it has another form."""
    try:
        form = inspect.signature(function)
        if signature == "flow_grpo":
            form.bind(None, None, None)
            return []
        columns = [
            name
            for name, parameter in form.parameters.items()
            if parameter.kind in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY)
            and parameter.default is parameter.empty
            and name not in GIVEN
        ]
        form.bind(**dict.fromkeys([*GIVEN, *columns, "any_other_column"]))
    except (TypeError, ValueError) as error:
        raise ValueError(
            f"function {path}: expected {FORMS[signature]}, got one that cannot be called so "
            f"({error}); write it so, or set signature, one of {list(FORMS)}, to its form"
        ) from error
    return columns


def read_scores(path: str, returned: Any, num_images: int, signature: Signature) -> list[float]:
    """B floats out of what a function returned, NaN for None."""
    scores = returned
    if signature == "flow_grpo" and isinstance(returned, tuple) and len(returned) == 2:
        scores = returned[0]
    if isinstance(scores, Tensor | numpy.ndarray):
        scores = scores.tolist()
    if not isinstance(scores, list | tuple) or len(scores) != num_images:
        count = f", {len(scores)} long" if isinstance(scores, list | tuple) else ""
        raise ValueError(
            f"function {path}: expected a list of {num_images} scores, one per picture, got "
            f"{reprlib.repr(returned)}{count}; return one number or None for each"
        )
    return [_read_number(path, score) for score in scores]


def _read_number(path: str, score: Any) -> float:
    if score is None:
        return math.nan
    value = score.item() if isinstance(score, Tensor) and score.ndim == 0 else score
    if not isinstance(value, numbers.Real):
        raise ValueError(
            f"function {path}: expected a number or None for each picture, got "
            f"{reprlib.repr(score)}; return floats"
        )
    return float(value)


def _as_columns(facts: Sequence[dict[str, Any]]) -> dict[str, list[Any]]:
    names = dict.fromkeys(name for row in facts for name in row)
    return {name: [row.get(name) for row in facts] for name in names}


def _describe_missing(parts: dict[str, Tensor], num_images: int) -> list[dict[str, Any]]:
    """Per image, which functions gave no number; an empty dictionary where all did."""
    missing = {name: values.isnan().tolist() for name, values in parts.items()}
    silent = [", ".join(name for name in parts if missing[name][i]) for i in range(num_images)]
    return [{"failure": f"no number from {names}"} if names else {} for names in silent]


def _describe(error: Exception) -> str:
    """What was raised, and the outermost line of the user's own that it came through."""
    ours = (__file__, importlib.__file__)
    frames = [f for f in traceback.extract_tb(error.__traceback__) if f.filename not in ours]
    lines = [f" at {f.filename}:{f.lineno}" for f in frames if not f.filename.startswith("<")]
    return f"{type(error).__name__}: {error}{lines[0] if lines else ''}"


def _own_name(path: str) -> str:
    return path.rpartition(".")[2]


def _check_weights(weights: dict[str, float]) -> None:
    names = [_own_name(path) for path in weights]
    if len(set(names)) < len(names):
        raise ValueError(
            f"function: expected functions with names of their own, got {list(weights)}; their "
            "parts would have one name, so give each a FunctionReward inside an Ensemble"
        )
    if not any(weights.values()) or not all(math.isfinite(w) for w in weights.values()):
        raise ValueError(
            f"function: expected finite weights, one other than 0, got {weights}; give the "
            "functions to train on a weight"
        )
