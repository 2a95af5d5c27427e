"""Runs in processes of their own, to be killed or to end, without a new start of Python."""

import os
import signal
import sys
import time
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

LONGEST_S = 240.0


class Fork:
    """A copy of this process that calls a function and ends; its output goes to a file.

    Args:
        function: What it does.
        output: The file.
    """

    def __init__(self, function: Callable[[], Any], output: Path) -> None:
        self.output = output
        sys.stdout.flush()
        self.process = os.fork()
        if self.process == 0:
            self._carry_out(function)

    def _carry_out(self, function: Callable[[], Any]) -> None:
        code = 1
        try:
            file = os.open(self.output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
            os.dup2(file, 1)
            os.dup2(file, 2)
            sys.stdout = os.fdopen(1, "w")
            sys.stderr = os.fdopen(2, "w")
            function()
            code = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)

    def kill(self) -> None:
        """As `kill -9` does."""
        os.kill(self.process, signal.SIGKILL)

    def wait(self) -> int:
        """Wait for the end; gives the exit status, negative for the number of a signal."""
        end = time.monotonic() + LONGEST_S
        while time.monotonic() < end:
            process, status = os.waitpid(self.process, os.WNOHANG)
            if process:
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        self.kill()
        os.waitpid(self.process, 0)
        raise TimeoutError(self.output.read_text())
