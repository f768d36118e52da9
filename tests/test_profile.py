"""Measuring: the command on a tiny model, resuming after kill -9, drift, and what whole models are measured."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FEWER_FOLLOWED, Profiled, copied, environment, listing
from fast_host import FastHost

from toolchain.costs.rows import MemoryRow, ModelMemoryRow, ModelRow, Row, SessionRow, UnitRow
from toolchain.costs.table import CostTable, open_table
from toolchain.hardware import load
from toolchain.kernels import candidates, offered, runs_as
from toolchain.profiler import model_rows
from toolchain.profiler.ask import Host
from toolchain.profiler.measure import summarise
from toolchain.profiler.profile import _adding, current_header
from toolchain.spec import FINER, TOKENS, WORKS, Unit, Workload

SHAPES = (Unit("embedding", "Gather", 64, 512, side="source"), Unit("linear", "MatMul", 64, 64, side="source"))
"""What a one-layer BERT of width 64 is made of."""


# ---- the command


def _rows(table: CostTable) -> set[tuple]:
    return {key for key in table.rows if key[0] in ("unit", "memory")}


def _wanted(table: CostTable) -> set[tuple]:
    wanted: set[tuple] = set()
    for unit in SHAPES:
        for kernel in {runs_as(name) for name in candidates(unit, table.header.kernels)}:
            wanted |= {("unit", *unit.shape, "cached", tokens, kernel) for tokens in (16, 64, 128, 256)}
            wanted.add(("memory", *unit.shape, kernel))
    return wanted


def test_profile_fills_the_table(profiled: Profiled) -> None:
    """Exit code 3 where others used the CPU meanwhile: the rows are there all the same, and say that they are not valid."""
    assert profiled.result.code in (0, 3), profiled.result.err
    table = open_table(profiled.table)
    assert _rows(table) == _wanted(table)
    assert {row.policy for row in table.of(ModelRow)} >= {"fp32", "w8a8", "w4g32"}
    for row in table.of(UnitRow):
        assert row.latency_ms > 0
        assert row.n >= 5
    # One policy is measured around the workload as well, so that others can be predicted; the rest at the workload itself.
    for row in table.of(ModelRow):
        assert (row.phase, row.batch, row.past, row.layers) == ("encode", 1, 0, 1)
        assert row.tokens in ((16, 64, 128, 256) if row.policy == "w8g32" else (128,))
        assert row.latency_ms > 0
        assert set(row.units) > {"embeddings.word_embeddings"}
    for row in table.of(ModelMemoryRow):
        assert row.peak_bytes >= row.running_bytes > 100_000
    assert table.header.command == f"bittailor profile {profiled.model.name} --device local"
    assert str(profiled.model.parent) not in profiled.table.read_text()
    said = profiled.result.json
    assert said["rows"] == len(table.rows)
    sessions = table.of(SessionRow)
    assert {row.session for row in sessions} == set(range(FEWER_FOLLOWED))
    assert len({row.policy for row in sessions}) == 3
    invalid = sum(not row.valid for row in [*table.of(UnitRow), *table.of(ModelRow), *sessions])
    assert said["invalid"] == invalid
    assert profiled.result.code == (3 if invalid else 0)
    # The measure of all later rows is taken from an undisturbed job only: on a machine that was never quiet there is none yet.
    assert set(table.header.reference_ns) == {*WORKS, *FINER.values()} or invalid


def test_profile_writes_the_budgets_it_derives(profiled: Profiled) -> None:
    (path,) = profiled.table.parent.glob("budgets-*-encode-1x128.json")
    found = json.loads(path.read_text())
    assert [found[name]["name"] for name in ("low", "medium", "high")] == ["low", "medium", "high"]
    assert found["low"]["latency_ms"] <= found["medium"]["latency_ms"] <= found["high"]["latency_ms"]
    assert listing(profiled.profiles) == {"local", "local/table.jsonl", f"local/{path.name}"}


def _all_valid(path: Path) -> CostTable:
    table = open_table(path)
    rows: list[Row] = [replace(row, valid=True) for row in [*table.of(UnitRow), *table.of(ModelRow), *table.of(SessionRow)]]
    return table.adding(rows)


def test_a_second_run_measures_nothing_when_all_rows_are_valid(
    profiled: Profiled, tmp_path: Path, cli: Any, fast: FastHost
) -> None:
    folder = copied(profiled.profiles, tmp_path / "profiles")
    table = _all_valid(folder / "local" / "table.jsonl")
    table.save(folder / "local" / "table.jsonl")
    before = (folder / "local" / "table.jsonl").read_bytes()
    result = cli("profile", profiled.graph, "--profiles", folder, "--json")
    assert result.code == 0, result.err
    assert (fast.timed, fast.weighed) == ([], 0)
    assert (folder / "local" / "table.jsonl").read_bytes() == before


def test_a_second_run_measures_again_only_what_was_not_valid(profiled: Profiled, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    folder = copied(profiled.profiles, tmp_path / "profiles")
    table = _all_valid(folder / "local" / "table.jsonl")
    bad = next(row for row in table.of(UnitRow) if (row.op, row.kernel) == ("MatMul", "w4g32"))
    table.adding([replace(bad, valid=False)]).save(folder / "local" / "table.jsonl")
    result = cli("profile", profiled.graph, "--profiles", folder, "--json")
    assert result.code == 0, result.err
    assert fast.timed == ["w4g32@128"]
    assert fast.weighed == 0
    after = open_table(folder / "local" / "table.jsonl")
    changed = {key for key, row in after.rows.items() if _seen(row) != _seen(table.rows[key])}
    assert changed == {bad.key}


def test_a_machine_is_followed_on_where_that_is_asked_for(profiled: Profiled, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    folder = copied(profiled.profiles, tmp_path / "profiles")
    path = folder / "local" / "table.jsonl"
    table = _all_valid(path)
    table.save(path)
    result = cli("profile", profiled.graph, "--profiles", folder, "--follow", "--json")
    assert result.code == 0
    assert result.json["follows"]["latency_ms"]["work"] in FINER.values()
    after = open_table(path)
    assert {row.session for row in after.of(SessionRow)} == set(range(2 * FEWER_FOLLOWED))
    assert all(after.rows[key] == row for key, row in table.rows.items())


def _seen(row: Row) -> Row:
    """What was measured: a row's neighbours on the grid say something else of it once they are measured again."""
    return replace(row, interpolation_error=None) if isinstance(row, UnitRow) else row


def test_another_workload_shares_the_memory_rows(profiled: Profiled, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    folder = copied(profiled.profiles, tmp_path / "profiles")
    _all_valid(folder / "local" / "table.jsonl").save(folder / "local" / "table.jsonl")
    result = cli("profile", profiled.graph, "--profiles", folder, "--workload", "encode:2x16", "--json")
    assert result.code in (0, 3), result.err
    units = [name for name in fast.timed if "@" in name]
    assert {name.partition("@")[2] for name in units} == {"32"}  # 16, 64 and 256 were there
    assert fast.weighed > 0
    assert len(open_table(folder / "local" / "table.jsonl").of(MemoryRow)) == len(open_table(profiled.table).of(MemoryRow))


@pytest.mark.parametrize("workload", ["generate:8+8", "encode:1x257", "encode:0x8", "words"])
def test_a_workload_that_the_model_cannot_run_is_refused(profiled: Profiled, tmp_path: Path, cli: Any, workload: str) -> None:
    line = cli("profile", profiled.graph, "--profiles", tmp_path / "profiles", "--workload", workload).error
    assert "expected" in line
    assert listing(tmp_path) == set()


def test_a_stale_table_is_refused_until_it_is_renewed(profiled: Profiled, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    folder = copied(profiled.profiles, tmp_path / "profiles")
    path = folder / "local" / "table.jsonl"
    table = _all_valid(path)
    replace(table, header=replace(table.header, runtime="onnxruntime 0.1")).save(path)
    for words in (("profile",), ("predict", "--policy", "w4g32")):
        line = cli(words[0], profiled.graph, "--profiles", folder, *words[1:]).error
        assert "bittailor profile MODEL --device local --renew" in line
    assert fast.timed == []
    assert cli("profile", profiled.graph, "--profiles", folder, "--renew").code == 0
    assert len(open_table(path).rows) == len(table.rows)
    assert fast.timed


def _wait(condition: Callable[[], bool], seconds: float) -> bool:
    deadline = time.monotonic() + seconds
    while time.monotonic() < deadline:
        if condition():
            return True
        time.sleep(0.02)
    return condition()


def _children(pid: int) -> list[int]:
    try:
        return [int(word) for word in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def _alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="looks for the agent in /proc")
def test_a_killed_run_resumes_and_ends_whole(tiny_graph: Path, tmp_path: Path, cli: Any, fast: FastHost) -> None:
    path = tmp_path / "profiles" / "local" / "table.jsonl"
    words = [sys.executable, "-m", "toolchain.cli", "profile", str(tiny_graph), "--profiles", str(tmp_path / "profiles")]
    run = subprocess.Popen(words, env=environment(TMPDIR=str(tmp_path)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    try:
        assert _wait(lambda: path.exists() or run.poll() is not None, 120)
        assert run.poll() is None, run.stderr and run.stderr.read()
        assert _wait(lambda: bool(_children(run.pid)), 10)
        agents = _children(run.pid)
    finally:
        run.send_signal(signal.SIGKILL)
        run.wait()
        if run.stderr:
            run.stderr.close()
    killed = open_table(path)
    assert 0 < len(killed.rows) < 2 * len(_wanted(killed))
    # An agent that outlived its host would be the "others" that disturb the next run.
    assert _wait(lambda: not any(map(_alive, agents)), 5), "the agent went on without its host"
    result = cli("profile", tiny_graph, "--profiles", tmp_path / "profiles", "--json")
    assert result.code in (0, 3), result.err
    whole = open_table(path)
    assert _rows(whole) == _wanted(whole)
    assert len(whole.of(ModelRow)) >= 5
    kept = [key for key, row in killed.rows.items() if getattr(row, "valid", True)]
    assert all(whole.rows[key] == killed.rows[key] for key in kept), "what was measured before the kill was measured again"
    assert listing(path.parent) == {"table.jsonl", *(found.name for found in path.parent.glob("budgets-*.json"))}


# ---- drift and summaries


def test_rows_are_scaled_to_the_speed_the_machine_had_when_the_table_began(profiled: Profiled) -> None:
    header = replace(open_table(profiled.table).header, reference_ns={})
    row = UnitRow("MatMul", 8, 8, "fp32", 1, "cached", 10.0, 1.0, 7, True)
    table = _adding(CostTable(header, {}), [row], {work: [90.0, 100.0, 200.0] for work in WORKS})
    assert table.header.reference_ns == dict.fromkeys(WORKS, 100.0)
    assert table.rows[row.key] == row
    memory = MemoryRow("MatMul", 16, 8, "fp32", 5.0, 4, 2)
    model = ModelRow("m", "decode", 1, 1, 80, 2, "p", {}, "streamed", 10.0, 1.0, 7, True)
    works = {
        "token": replace(row, K=16),
        "streamed token": replace(row, working_set="streamed"),
        "tokens": replace(row, tokens=64, working_set="streamed"),
    }
    others = {"streamed token": model, "tokens": replace(model, phase="prefill", tokens=64)}
    for work, slower in [*works.items(), *others.items()]:
        # Twice as slow now at this kind of work, and only at this: half of the time was the machine's.
        table = _adding(table, [slower, memory], {name: [200.0 if name == work else 100.0] for name in WORKS})
        assert table.rows[slower.key] == replace(slower, latency_ms=5.0, spread_ms=0.5)
        assert table.rows[memory.key] == memory


def test_a_summary_is_the_median_and_half_the_distance_of_the_deciles() -> None:
    seen = summarise(map(float, range(11)), valid=True)
    assert (seen.value, seen.spread, seen.n, seen.valid) == (5.0, 4.0, 11, True)
    assert not summarise([1.0], valid=True).valid
    assert not summarise([1.0, 2.0, 3.0], valid=False).valid
    assert summarise([], valid=True).value is None


# ---- whole models


def test_a_prompt_as_long_as_the_context_is_weighed_inside_it(graphs: Any, tmp_path: Path) -> None:
    graph = graphs("llama")
    anchor = model_rows.anchors(graph, ("w4g32",), cache_bytes=2**25)[0]
    wanted = model_rows.Wanted(anchor, times=(), memory=(graph.context,))
    packages = model_rows.Packages(graph, tmp_path)
    (row,) = model_rows.weigh(Host(load("local"), 1), graph, Workload.parse("generate:64+32"), wanted, packages)
    assert isinstance(row, ModelMemoryRow)
    assert row.peak_bytes > 0


@pytest.mark.parametrize(
    ("disturbed", "ms", "valid"),
    [((), (6 + 6 + 9) / 3, True), ((2,), 6.0, True), ((0,), (12 + 18) / 2, True), ((0, 2), 7.0, False)],
)
def test_whole_models_are_timed_in_sessions_that_are_brought_to_one_speed(
    disturbed: tuple[int, ...], ms: float, valid: bool, graphs: Any, tmp_path: Path
) -> None:
    """The second session's machine is half as fast, and its references say so; in the third the models alone took longer. A disturbed one
    is left out where two are left; the first of those used sets the speed."""
    graph, workload = graphs("bert"), Workload.parse("encode:1x16")
    table = CostTable(replace(current_header(load("local"), 1), kernels=offered(), cache_bytes=2**30), {})
    orders: list[list[str]] = []

    class Scripted(Host):
        def time(self, subjects: Any, windows: int) -> dict[str, Any]:
            turn = len(orders)
            took, reference = [(6e6, 100.0), (12e6, 200.0), (9e6, 100.0)][turn]
            orders.append([item["name"] for item in subjects])
            trials = {item["name"]: [{phase["label"]: took for phase in item["phases"]}] * windows for item in subjects}
            return {
                "trials": trials,
                "reference_ns": {name: [reference if name == TOKENS else 100.0] for name in WORKS},
                "dropped": 0,
                "valid": turn not in disturbed,
            }

    sessions = model_rows.Sessions(
        Scripted(load("local"), 1),
        graph,
        table.header.cache_bytes,
        model_rows.missing(graph, workload, table),
        model_rows.Packages(graph, tmp_path),
    )
    assert [sessions.time() for _ in range(model_rows.SESSIONS - 1)] == [([], {})] * 2
    rows, references = sessions.time()
    assert {(row.latency_ms, row.valid) for row in rows} == {(ms, valid)}
    used = model_rows.SESSIONS - len(disturbed) if valid else model_rows.SESSIONS
    assert {row.n for row in rows} == {used * model_rows.WINDOWS}
    assert references == {name: [200.0 if name == TOKENS and disturbed == (0,) else 100.0] for name in WORKS}
    assert sorted(orders[0]) == sorted(orders[1]) == sorted(orders[2])
    assert orders[0] != orders[1], "each session has its own order"


def test_of_a_model_that_is_cut_some_are_measured_whole(graphs: Any) -> None:
    """The smallest depth is as many layers as these have, so a model of more is made of the same units."""
    graph = graphs("llama", num_hidden_layers=6)
    kernels = offered()
    cut = model_rows.anchors(graph, kernels, cache_bytes=1)
    assert {anchor.layers for anchor in cut} == {4, 6}
    for name in model_rows.WHOLE:
        whole = next(anchor for anchor in cut if anchor.name == name and anchor.layers == graph.layers)
        assert set(whole.policy) == {unit.name for unit in graph.units}
    assert len({anchor.label for anchor in cut}) == len(cut) > len(model_rows.anchors(graph, kernels, cache_bytes=2**30))
    table = CostTable(replace(current_header(load("local"), 1), kernels=kernels, cache_bytes=1), {})
    wanted = model_rows.missing(graph, Workload.parse("generate:64+32"), table)
    assert [item.anchor.label for item in wanted if item.times and item.memory] == [anchor.label for anchor in cut]
