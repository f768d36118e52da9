"""Every kernel of the catalogue is asked of the runtime: offered when it computes right, not offered when it is wrong."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from toolchain.errors import DamagedFileError
from toolchain.kernels import CATALOGUE, legal, offered, parts
from toolchain.profiler import agent, probe
from toolchain.quantize.affine import Quantized
from toolchain.spec import CPU, Device, Kernel, Unit

UNITS = {op: Unit("probe", op, 256, 48) for op in ("MatMul", "Gather")}


@pytest.fixture
def fresh() -> Iterator[None]:
    """The answer is kept for the process: forget it, before and after a test that makes a kernel wrong."""
    probe.working_kernels.cache_clear()
    yield
    probe.working_kernels.cache_clear()


@pytest.mark.parametrize(
    ("op", "name"), [(op, name) for op, unit in UNITS.items() for name in offered() if legal(unit, CATALOGUE[name])]
)
def test_each_kernel_is_offered_exactly_when_the_runtime_computes_it(op: str, name: str) -> None:
    """On the runtime that pyproject.toml asks for, all of them are: relative error 1e-6 or so, measured against 1e-3."""
    assert probe.relative_error(UNITS[op], CATALOGUE[name]) < 1e-5
    assert name in probe.working_kernels()


def test_offered_kernels_are_in_catalogue_order() -> None:
    assert list(probe.working_kernels()) == [name for name in CATALOGUE if name in probe.working_kernels()]


@pytest.mark.parametrize("shape", [(160, 64), (200, 24), (257, 3)])
@pytest.mark.parametrize("name", offered())
def test_widths_that_no_group_divides_compute_right_too(shape: tuple[int, int], name: str) -> None:
    unit, kernel = Unit("odd", "MatMul", *shape), CATALOGUE[name]
    assert legal(unit, kernel)
    assert probe.relative_error(unit, kernel) < 1e-5


@pytest.mark.usefixtures("fresh")
@pytest.mark.parametrize("name", [name for name in offered() if CATALOGUE[name].quantised])
def test_a_kernel_that_is_one_step_off_is_not_offered(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    """What a zero point read one off, or swapped nibbles, would do: every code's lowest bit is wrong in the graph."""
    right = probe.write_one_unit

    def wrong(unit: Unit, kernel: Kernel, weights: tuple[Quantized, ...] | np.ndarray, copies: int, out: Path) -> None:
        if kernel.name == name:
            assert isinstance(weights, tuple)
            weights = tuple(replace(part, codes=part.codes ^ 1) for part in weights)
        right(unit, kernel, weights, copies, out)

    monkeypatch.setattr(probe, "write_one_unit", wrong)
    # A kernel of two phases goes with either of its parts.
    whole = tuple(other for other in offered() if name != other and name not in [part.name for part in parts(CATALOGUE[other])])
    assert probe.working_kernels() == whole


@pytest.mark.usefixtures("fresh")
def test_a_kernel_that_the_runtime_refuses_is_not_offered(monkeypatch: pytest.MonkeyPatch) -> None:
    real = probe.open_session

    def refusing(folder: Path, **how: Any) -> object:
        if b"GatherBlockQuantized" in (folder / "model.onnx").read_bytes():
            raise DamagedFileError("not here")
        return real(folder, **how)

    monkeypatch.setattr(probe, "open_session", refusing)
    assert probe.working_kernels() == ("fp32", "w8a8")


class _Spoilt:
    """A session whose answer to the last token count is no number in one place."""

    def __init__(self, real: Any) -> None:
        self._real = real

    def run(self, names: None, feeds: dict[str, np.ndarray]) -> list[np.ndarray]:
        (y,) = self._real.run(names, feeds)
        if len(feeds["x"]) == probe._TOKENS[-1]:
            y[0, 0] = np.nan
        return [y]


@pytest.mark.usefixtures("fresh")
def test_what_is_no_number_is_not_right(monkeypatch: pytest.MonkeyPatch) -> None:
    """NaN is no larger than a tolerance, and what max makes of it depends on the order."""
    real = probe.open_session

    def spoiling(folder: Path, **how: Any) -> object:
        quantised = b"MatMulNBits" in (folder / "model.onnx").read_bytes()
        return _Spoilt(real(folder, **how)) if quantised else real(folder, **how)

    monkeypatch.setattr(probe, "open_session", spoiling)
    assert probe.working_kernels() == ("fp32", "w8a8")


def test_what_is_no_number_is_not_right_on_another_machine_either() -> None:
    class Board:
        """Computes everything right on this runtime, but for one NaN."""

        device = Device("board", transport="ssh", host="board.lan")

        def identify(self) -> dict[str, Any]:
            return agent.identify({})

        def outputs(self, subjects: list[dict[str, Any]]) -> dict[str, list[Any] | None]:
            made: dict[str, list[Any] | None] = agent.outputs({"subjects": [{**item, "provider": CPU} for item in subjects]})[
                "outputs"
            ]
            for name, outputs in made.items():
                if name.startswith("w8a8 ") and outputs:
                    outputs[0][0][0] = float("nan")
            return made

    whole = tuple(name for name in offered() if "w8a8" not in name)
    assert probe.working_kernels_of(Board()) == whole  # type: ignore[arg-type]
