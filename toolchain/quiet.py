"""A library's own words on the process's stdout or stderr, led nowhere: a command's one JSON object or one line belongs there.

By hand: what contextlib turns away is Python's; C and Rust write to the descriptor.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
from collections.abc import Iterator

STDOUT, STDERR = 1, 2

_C = ctypes.CDLL(None) if os.name == "posix" else None  # here, since whoever reads what a stranger wrote is to load no library
_LOCKS = {STDOUT: threading.Lock(), STDERR: threading.Lock()}


@contextlib.contextmanager
def to_nowhere(descriptor: int) -> Iterator[None]:
    """Nothing that C or Rust writes to STDOUT or STDERR meanwhile is seen; one that is closed stays so.

    C's own buffer is flushed while it leads nowhere: its lines would otherwise come out when the process ends. One thread at a time:
    the second would keep the first one's nowhere, and the descriptor would stay there.
    """
    stream = sys.stdout if descriptor == STDOUT else sys.stderr
    with _LOCKS[descriptor], open(os.devnull, "wb") as nowhere:
        try:
            kept = os.dup(descriptor)
        except OSError:  # closed: nobody reads it
            kept = None
        if kept is None:
            yield
            return
        if stream:
            stream.flush()
        os.dup2(nowhere.fileno(), descriptor)
        try:
            yield
        finally:
            if _C:
                _C.fflush(None)
            os.dup2(kept, descriptor)
            os.close(kept)
