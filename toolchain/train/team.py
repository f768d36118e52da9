"""Several processes that train as one (`accelerate launch`, torchrun): who takes which windows, and how gradients become one.

Every process draws the same policies and holds the same parameters; only the windows differ, so the sum of the gradients is what one
process with all windows would have had. One process alone costs nothing here.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from toolchain.errors import InputError

T = TypeVar("T")
_PATIENCE = timedelta(hours=6)


class Team:
    """rank of size processes; the device this one trains on. `main` writes files."""

    def __init__(self, on: str = "auto") -> None:
        """on: "cpu", "cuda", or "auto": CUDA where torch finds one. InputError for "cuda" where it finds none."""
        if on == "cuda" and not torch.cuda.is_available():
            raise InputError("expected a CUDA device that torch can use, found none", "type: --on cpu")
        self._accelerator: Any = None
        self.rank, self.size = 0, 1
        cuda = on == "cuda" or (on == "auto" and torch.cuda.is_available())
        if int(os.environ.get("WORLD_SIZE", "1")) > 1:
            from accelerate import Accelerator
            from accelerate.utils import InitProcessGroupKwargs

            # The first process makes a graph, text and sensitivities while the others wait: of a large model longer than the ten minutes
            # after which NCCL would give up.
            self._accelerator = Accelerator(cpu=not cuda, kwargs_handlers=[InitProcessGroupKwargs(timeout=_PATIENCE)])
            self.rank, self.size = self._accelerator.process_index, self._accelerator.num_processes
            self.device = self._accelerator.device
        else:
            self.device = torch.device("cuda" if cuda else "cpu")

    @property
    def main(self) -> bool:
        return self.rank == 0

    @contextmanager
    def main_first(self) -> Iterator[None]:
        """The others enter once the first one has left."""
        if self._accelerator is None:
            yield
            return
        with self._accelerator.main_process_first():
            yield

    def agree(self, make: Callable[[], T]) -> T:
        """What `make` returns to the first process, for all: they must not differ in a rounding."""
        if self._accelerator is None:
            return make()
        from accelerate.utils import broadcast_object_list

        return broadcast_object_list([make() if self.main else None])[0]

    def total(self, value: Tensor) -> Tensor:
        """The sum of everyone's value, the same for all."""
        return value if self._accelerator is None else self._accelerator.reduce(value, "sum")

    def join_gradients(self, parameters: Iterable[nn.Parameter]) -> None:
        """Every gradient becomes the sum of everyone's, in one exchange."""
        if self._accelerator is None:
            return
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        summed = self.total(flat).split([gradient.numel() for gradient in gradients])
        for gradient, part in zip(gradients, summed, strict=True):
            gradient.copy_(part.view_as(gradient))

    def wait(self) -> None:
        """Until everyone is here."""
        if self._accelerator is not None:
            self._accelerator.wait_for_everyone()
