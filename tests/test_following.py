"""How a model follows the machine's speed: what a profile keeps of it, what a table says, what a check makes of that."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from simulated_machines import TwoSpeeds
from small_tables import complete_table, header_here, session_rows, unlike_session_rows

from toolchain.blocks import PRIOR, Share, fitted
from toolchain.costs.following import LEAST, share_of
from toolchain.costs.rows import SessionRow
from toolchain.costs.table import CostTable, open_table
from toolchain.errors import DamagedFileError
from toolchain.package.manifest import open_package
from toolchain.profiler import following
from toolchain.profiler.profile import default_workload
from toolchain.spec import Workload

pytest.importorskip("random_models")

WORK = "model tokens"
MOVED = [0.7, 0.8, 0.9, 1.0, 1.1, 1.2, 1.3, 0.75, 1.05, 1.25]


@pytest.fixture(scope="module")
def bert(graphs: Any) -> Any:
    return graphs("bert")


def empty() -> CostTable:
    return CostTable(replace(header_here(), reference_ns={**header_here().reference_ns, WORK: 2e5}), {})


def table_of(graph: Any, slowness: list[float], share: float, noise: list[float]) -> CostTable:
    table = empty()
    return table.adding(session_rows(graph, table, default_workload(graph), dict(enumerate(slowness)), share, noise))


def found(graph: Any, table: CostTable, work: str = WORK) -> Share:
    return share_of(table, graph.fingerprint, default_workload(graph).phases[0], work)


@given(share=st.floats(0.6, 1.4), seed=st.integers(0, 10**6))
def test_a_table_tells_the_share_where_the_machine_moved(bert: Any, share: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    seen = found(bert, table_of(bert, list(rng.permutation(MOVED)), share, list(0.01 * rng.standard_normal(len(MOVED)))))
    assert abs(seen.value - share) < 2 * seen.unknown
    assert LEAST <= seen.unknown < 0.08


@given(level=st.floats(0.5, 2), seed=st.integers(0, 10**6))
def test_a_machine_that_stood_still_tells_nothing(bert: Any, level: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    slowness = level * np.exp(0.01 * rng.standard_normal(10))
    seen = found(bert, table_of(bert, list(slowness), 0.5, list(0.01 * rng.standard_normal(10))))
    assert seen.unknown > 0.9 * PRIOR.unknown
    assert abs(seen.value - PRIOR.value) < PRIOR.unknown


def test_a_table_without_such_sessions_tells_nothing(bert: Any) -> None:
    table = table_of(bert, MOVED, 0.5, [0.0] * 10)
    phase = default_workload(bert).phases[0]
    assert found(bert, table).value == pytest.approx(0.5, abs=0.06)
    for model, at, work in (
        ("another", phase, WORK),
        (bert.fingerprint, replace(phase, tokens=64), WORK),
        (bert.fingerprint, replace(phase, name="decode"), WORK),
        (bert.fingerprint, phase, "model token"),  # what the sessions did not see
        (bert.fingerprint, phase, "streamed token"),  # what did not bound them
    ):
        assert share_of(table, model, at, work) == PRIOR


def test_a_session_that_others_disturbed_says_nothing(bert: Any) -> None:
    noise = [0.0] * 9 + [1.0]
    table = table_of(bert, [*MOVED[:9], 1.3], 1.0, noise)
    disturbed = [replace(row, valid=False) for row in table.of(SessionRow) if row.session == 9]
    assert found(bert, table.adding(disturbed)).value == pytest.approx(1.0, abs=0.03)
    assert found(bert, table).unknown > 1.5 * found(bert, table.adding(disturbed)).unknown


def test_sessions_of_fewer_models_are_left_out(bert: Any) -> None:
    """One that holds other models would pass for another speed of the machine."""
    table = table_of(bert, [0.8, 1.0, 1.2, 1.4], 1.0, [0.0] * 4)
    last = max((row for row in table.of(SessionRow) if row.session == 3), key=lambda row: row.latency_ms)
    fewer = replace(table, rows={key: row for key, row in table.rows.items() if key != last.key})
    assert found(bert, fewer).value == pytest.approx(found(bert, table).value, abs=0.01)


def test_policies_that_differ_leave_more_unknown(bert: Any) -> None:
    def seen(shares: tuple[float, ...]) -> Share:
        table = empty()
        return found(bert, table.adding(unlike_session_rows(bert, table, default_workload(bert), dict(enumerate(MOVED)), shares)))

    alike, unlike = seen((1.0, 1.0, 1.0)), seen((0.9, 1.0, 1.1))
    assert unlike.value == pytest.approx(alike.value, abs=0.01)
    assert alike.unknown < 0.07
    assert 0.09 < unlike.unknown <= PRIOR.unknown


@given(slope=st.floats(-3, 6), seed=st.integers(0, 1000))
def test_whatever_the_processes_say_it_is_a_share(slope: float, seed: int) -> None:
    """A package carries it, and a package is read back."""
    x = 0.3 * np.random.default_rng(seed).standard_normal(10)
    seen = fitted([(float(each), slope * float(each)) for each in x])
    assert 0 < seen.unknown <= PRIOR.unknown
    assert slope <= 0.3 or slope >= 2.4 or seen.value == pytest.approx(slope, abs=0.15)


@pytest.mark.parametrize(("limit", "right"), [(1 / 0.9, "within"), (1 / 1.1, "over")])
def test_what_a_table_tells_decides_at_a_speed_that_it_has_seen(limit: float, right: str) -> None:
    """The check finds but the other speed, half as fast again: by itself it cannot tell."""
    said = []
    for seed in range(60):
        sessions = [TwoSpeeds(1000 * seed + place, 1.0, 0.5, 0.0, slow=1.5).measure() for place in range(20)]
        points = [(math.log(median(one.reference_ns["model token"])), math.log(one.level_ms("latency_ms"))) for one in sessions]
        share = fitted(points)
        known = Share(share.value, max(share.unknown, LEAST))
        said.append([TwoSpeeds(seed, 1.0, 1.0, slow=1.5).held(limit, one).verdict for one in (known, PRIOR)])
    with_table, without = zip(*said, strict=True)
    assert with_table.count(right) >= 57
    assert set(with_table) <= {right, "could not tell"}
    if right == "over":  # taken to follow in full it looks a tenth faster than it is: that hides here, and helps on the other side
        assert without.count("could not tell") >= 30


def test_a_share_that_is_off_by_what_is_unknown_of_it_errs_no_oftener_than_it_may() -> None:
    """At the limit itself, at the other speed alone, where only the table can tell."""
    rng = np.random.default_rng(0)
    said = [
        TwoSpeeds(seed, 1.0, 1.0).held(0.99999, Share(0.75 + 0.06 * rng.standard_normal(), 0.06)).verdict for seed in range(300)
    ]
    assert 300 - said.count("could not tell") <= 0.02 * 300 + 3 * math.sqrt(0.02 * 300)


def test_the_package_carries_what_the_table_tells(graphs: Any, tmp_path: Path, cli: Any) -> None:
    graph = graphs("bert")
    table = complete_table(graph)
    for name, slowness in (("moved", MOVED), ("still", [1.0] * 10)):
        rows = session_rows(graph, table, default_workload(graph), dict(enumerate(slowness)), 0.8)
        table.adding(rows).save(tmp_path / name / "local" / "table.jsonl")
        words = ("export", graph.directory, "--policy", "w4g32", "--profiles", tmp_path / name, "--out", tmp_path / f"of-{name}")
        assert cli(*words).code == 0
    moved, still = (open_package(tmp_path / f"of-{name}").speeds["latency_ms"].share for name in ("moved", "still"))
    assert moved.value == pytest.approx(0.8, abs=0.03)
    assert moved.unknown < still.unknown / 2


def test_each_workload_has_sessions_of_its_own(bert: Any) -> None:
    workload, other = default_workload(bert), Workload.parse("encode:2x16")
    table = empty()
    assert following.missing(bert, workload, table) == list(range(following.FOLLOWED))
    table = table.adding(session_rows(bert, table, workload, dict.fromkeys(range(30), 1.0), 1.0))
    assert following.missing(bert, workload, table) == []
    assert following.missing(bert, workload, table, more=True) == list(range(30, 30 + following.FOLLOWED))
    assert following.missing(bert, other, table) == list(range(following.FOLLOWED))


def test_a_table_of_a_session_without_end_is_refused(bert: Any, tmp_path: Path) -> None:
    path = tmp_path / "table.jsonl"
    table = complete_table(bert)
    table.save(path)
    lines = path.read_text().splitlines()
    place = next(place for place, line in enumerate(lines) if '"row": "session"' in line)
    lines[place] = lines[place].replace('"session": 0', '"session": 9007199254740991')
    path.write_text("\n".join(lines))
    with pytest.raises(DamagedFileError, match=f"line {place + 1} of .*session 9007199254740991"):
        open_table(path)
