"""How a model follows the machine's speed: what a profile keeps of it, what a table says, what a check makes of that."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_machines import TwoSpeeds
from small_tables import complete_table, header_here, session_rows

from toolchain.blocks import PRIOR, Share
from toolchain.costs.following import OTHER_POLICY, share_of
from toolchain.costs.rows import SessionRow
from toolchain.costs.table import CostTable
from toolchain.package.manifest import open_package
from toolchain.profiler.following import SESSIONS
from toolchain.profiler.profile import default_workload

pytest.importorskip("random_models")

WORK = "model tokens"


def table_of(graph: Any, slowness: list[float], share: float, noise: list[float]) -> CostTable:
    header = replace(header_here(), reference_ns={**header_here().reference_ns, WORK: 2e5})
    table = CostTable(header, {})
    return table.adding(session_rows(graph, table, default_workload(graph), dict(enumerate(slowness)), share, noise))


def found(graph: Any, table: CostTable, work: str = WORK) -> Share:
    return share_of(table, graph.fingerprint, default_workload(graph).phases[0], work)


@given(share=st.floats(0.6, 1.4), seed=st.integers(0, 10**6))
def test_a_table_tells_the_share_where_the_machine_moved(bert: Any, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slowness = np.exp(rng.permutation(np.linspace(-0.3, 0.3, SESSIONS)))
    seen = found(bert, table_of(bert, list(slowness), share, list(0.01 * rng.standard_normal(SESSIONS))))
    assert abs(seen.value - share) < 4 * seen.unknown
    assert OTHER_POLICY <= seen.unknown < PRIOR.unknown / 2


@given(level=st.floats(0.5, 2), seed=st.integers(0, 10**6))
def test_a_machine_that_stood_still_tells_nothing(bert: Any, level: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slowness = level * np.exp(0.01 * rng.standard_normal(SESSIONS))
    seen = found(bert, table_of(bert, list(slowness), 0.5, list(0.01 * rng.standard_normal(SESSIONS))))
    assert seen.unknown > 0.9 * PRIOR.unknown
    assert abs(seen.value - PRIOR.value) < PRIOR.unknown


def test_a_table_without_sessions_of_this_model_tells_nothing(bert: Any) -> None:
    table = table_of(bert, [1.0, 1.5], 0.5, [0.0, 0.0])
    assert share_of(table, "another", default_workload(bert).phases[0], WORK) == PRIOR
    assert found(bert, table, "streamed token") != PRIOR
    assert found(bert, table, "model token") == PRIOR


def test_sessions_of_fewer_models_are_left_out(bert: Any) -> None:
    """One that holds other models would pass for another speed of the machine."""
    table = table_of(bert, [0.8, 1.0, 1.2, 1.4], 1.0, [0.0] * 4)
    last = max((row for row in table.of(SessionRow) if row.session == 3), key=lambda row: row.latency_ms)
    fewer = replace(table, rows={key: row for key, row in table.rows.items() if key != last.key})
    assert found(bert, fewer).value == pytest.approx(found(bert, table).value, abs=0.01)


@pytest.mark.parametrize(("limit", "right"), [(1 / 0.9, "within"), (1 / 1.1, "over")])
def test_what_the_table_knows_decides_at_a_speed_that_it_has_seen(limit: float, right: str) -> None:
    """The check finds but the other speed, at which the reference takes 1.9 times as long: by itself it cannot tell (`test_gate.py`)."""
    told = [TwoSpeeds(seed, 1.0, 1.0).held(limit, Share(0.75, 0.04)).verdict for seed in range(60)]
    assert told == [right] * 60


def test_the_package_carries_what_the_table_tells(models: Any, graphs: Any, tmp_path: Path, cli: Any) -> None:
    graph = graphs("bert")
    table = complete_table(graph)
    for name, slowness in (("moved", np.linspace(0.7, 1.3, SESSIONS)), ("still", np.ones(SESSIONS))):
        rows = session_rows(graph, table, default_workload(graph), dict(enumerate(map(float, slowness))), 0.8)
        table.adding(rows).save(tmp_path / name / "local" / "table.jsonl")
        words = ("export", models("bert"), "--policy", "w4g32", "--profiles", tmp_path / name, "--out", tmp_path / f"of-{name}")
        assert cli(*words).code == 0
    moved, still = (open_package(tmp_path / f"of-{name}").speeds["latency_ms"].share for name in ("moved", "still"))
    assert moved.value == pytest.approx(0.8, abs=0.03)
    assert moved.unknown < still.unknown / 2


@pytest.fixture(scope="module")
def bert(graphs: Any) -> Any:
    return graphs("bert")
