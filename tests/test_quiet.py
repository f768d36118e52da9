"""What a library writes to the process's stdout or stderr is led nowhere, and what we write afterwards is not."""

from __future__ import annotations

import os
import subprocess
import sys
import threading
import time

import pytest
from conftest import environment

from toolchain.quiet import STDERR, STDOUT, to_nowhere


@pytest.mark.parametrize("descriptor", [STDOUT, STDERR])
def test_a_descriptor_comes_back_when_two_threads_lead_it_nowhere_at_once(
    descriptor: int, capfd: pytest.CaptureFixture[str]
) -> None:
    """As where several devices are profiled, each of which derives budgets."""

    def held() -> None:
        with to_nowhere(descriptor):
            os.write(descriptor, b"there")
            time.sleep(0.2)

    threads = [threading.Thread(target=held) for _ in range(2)]
    for thread in threads:
        thread.start()
        time.sleep(0.1)
    for thread in threads:
        thread.join()
    os.write(descriptor, b"here")
    assert capfd.readouterr()[descriptor - 1] == "here"


WRITES = """
import ctypes
from toolchain.quiet import STDERR, STDOUT, to_nowhere
with to_nowhere(STDERR), to_nowhere(STDOUT):
    ctypes.CDLL(None).puts(b"there")
print("here")
"""


def test_what_is_still_in_cs_buffer_goes_nowhere_too() -> None:
    """C's stdout is a pipe here, so `puts` keeps its line until somebody flushes it."""
    done = subprocess.run([sys.executable, "-c", WRITES], env=environment(), capture_output=True, text=True, check=True)
    assert done.stdout == "here\n"


@pytest.mark.parametrize("closed", ["1>&-", "2>&-"])
def test_a_descriptor_that_is_closed_is_no_fault(closed: str) -> None:
    command = f'"{sys.executable}" -c "$0" {closed}'
    done = subprocess.run(["sh", "-c", command, WRITES], env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
