"""Progress on stderr for anything over a few seconds. By hand: a device has no tqdm, and stdout belongs to results."""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")


def note(text: str) -> None:
    """One line on stderr."""
    print(text, file=sys.stderr, flush=True)


def track(iterable: Iterable[T], total: int, label: str) -> Iterator[T]:
    """Yield from `iterable`, showing `label done/total elapsed left` on stderr: a redrawn line on a terminal, else one line every 10 s."""
    terminal = sys.stderr.isatty() and threading.current_thread() is threading.main_thread()  # several cannot redraw one line
    start = shown = time.monotonic()
    done = 0
    for item in iterable:
        yield item
        done += 1
        now = time.monotonic()
        if now - shown < (0.2 if terminal else 10) and not (terminal and done == total):
            continue
        shown = now
        left = (now - start) / done * (total - done)
        line = f"{label}: {done}/{total}  {now - start:.0f} s, about {left:.0f} s left"
        print(f"\r{line}\033[K" if terminal else line, end="" if terminal else "\n", file=sys.stderr, flush=True)
    if terminal and done:
        print(file=sys.stderr)
