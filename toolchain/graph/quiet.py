"""Keeps third-party builders' chatter off stdout and stderr, where results and progress of ours belong."""

from __future__ import annotations

import contextlib
import io
import logging
import warnings
from collections.abc import Iterator


@contextlib.contextmanager
def quiet() -> Iterator[io.StringIO]:
    """Yield the buffer that swallows prints, warnings and log lines below ERROR for the duration."""
    buffer = io.StringIO()
    before = logging.root.manager.disable
    with contextlib.redirect_stdout(buffer), contextlib.redirect_stderr(buffer), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        logging.disable(logging.WARNING)
        try:
            yield buffer
        finally:
            logging.disable(before)
