"""torch.compile where it works, and the plain function where it does not."""

from __future__ import annotations

import warnings
from collections.abc import Callable

import torch
from torch import Tensor


class Compiled:
    """A function that is compiled when it is first called.

    Args:
        function: Of tensors; keeps what it needs of a model itself.
        strict: Raise an error where it cannot be compiled, do not go on without.
    """

    def __init__(self, function: Callable[..., Tensor], *, strict: bool) -> None:
        self.function, self.strict = function, strict
        self.compiled: Callable[..., Tensor] | None = torch.compile(function)

    def __call__(self, *inputs: Tensor) -> Tensor:
        """What the function gives.

        Raises:
            ValueError: It cannot be compiled, under `strict`.
        """
        from torch._dynamo.exc import TorchDynamoException

        if self.compiled is not None:
            try:
                return self.compiled(*inputs)
            except TorchDynamoException as error:
                self._give_up(error)
        return self.function(*inputs)

    def _give_up(self, error: Exception) -> None:
        reason = " ".join((str(error) or type(error).__name__).splitlines()[:2])
        if self.strict:
            raise ValueError(
                f"expected to compile the teacher-forced pass, got: {reason}; set compile to "
                "false, or decoding.strict to false"
            ) from error
        self.compiled = None
        warnings.warn(
            f"the teacher-forced pass could not be compiled ({reason}); log-probs and updates take "
            "as long as with compile: false, which spares the try",
            stacklevel=3,
        )
