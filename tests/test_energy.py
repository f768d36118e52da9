"""Energy from rows to verdict: what is measured of a model, what is predicted from it, and what a package is held to."""

from __future__ import annotations

import importlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import FEWER_FOLLOWED, Profiled, copied
from constructed_sysfs import advancing, package, write
from fast_host import FastHost
from small_board import GRAPH, HEADER, UNITS, WORKLOAD, board_model, board_table
from small_tables import OVERHEAD_MJ, unit_mj, with_energy

from toolchain.costs.rows import Energy, ModelEnergyRow, UnitEnergyRow
from toolchain.costs.table import CostTable, open_table
from toolchain.errors import DamagedFileError
from toolchain.kernels import uniform
from toolchain.profiler import ask, energy_rows
from toolchain.spec import WORKS, Workload

# ---- prediction


def _powered() -> CostTable:
    return with_energy(GRAPH, board_table(), WORKLOAD)


@pytest.mark.parametrize("name", ["w4g32", "w8a8", "w4g32+w8a8", "fp32"])
def test_an_inference_is_one_prefill_and_a_step_for_each_new_token(name: str) -> None:
    """Idle power included; a kernel of two phases costs what each of its parts does in the phase it runs in."""
    model = board_model(_powered())
    policy = uniform(name, GRAPH.units)
    prefill = OVERHEAD_MJ + sum(
        unit_mj(unit, policy[unit.name], 1 if unit.role == "head" else WORKLOAD.prompt_tokens) for unit in UNITS
    )
    decode = OVERHEAD_MJ + sum(unit_mj(unit, policy[unit.name], 1) for unit in UNITS)
    cost = model.predict(policy).energy_mj
    assert cost.value == pytest.approx(prefill + WORKLOAD.new_tokens * decode, rel=0.01)
    assert cost.spread is not None
    assert cost.spread < 0.02 * (cost.value or 0)


def test_energy_that_whole_models_do_not_bear_out_has_a_spread(monkeypatch: pytest.MonkeyPatch) -> None:
    table = _powered()
    odd = next(row for row in table.of(ModelEnergyRow) if (row.phase, row.policy) == ("decode", "energy-mixed-1"))
    wrong = board_model(table.adding([replace(odd, energy_mj=1.2 * odd.energy_mj)]))
    assert wrong.relative_spread["energy_mj"] > 0.1


@pytest.mark.parametrize("kind", [UnitEnergyRow, ModelEnergyRow])
def test_without_its_rows_energy_is_a_reason_and_the_rest_stays(kind: type) -> None:
    table = _powered()
    without = CostTable(table.header, {key: row for key, row in table.rows.items() if not isinstance(row, kind)})
    cost = board_model(without).predict(uniform("w4g32", GRAPH.units))
    assert cost.energy_mj.value is None
    assert "by rapl in the cost table, found none; type: bittailor profile" in cost.energy_mj.reason
    assert cost.latency_ms.value


@pytest.mark.parametrize("kind", [UnitEnergyRow, ModelEnergyRow])
def test_rows_of_another_meter_are_not_mixed_in(kind: type) -> None:
    """A board's energy and a CPU's are not the same thing."""
    table, other = _powered(), with_energy(GRAPH, board_table(), WORKLOAD, "hwmon")
    mixed = table.adding(other.of(kind))
    assert board_model(table).predict(uniform("w4g32", GRAPH.units)).energy_mj.value
    assert board_model(mixed).predict(uniform("w4g32", GRAPH.units)).energy_mj.value is None
    missing = energy_rows.missing_units if kind is UnitEnergyRow else energy_rows.missing_models
    assert missing(GRAPH, WORKLOAD, mixed, "rapl")
    assert not missing(GRAPH, WORKLOAD, mixed, "hwmon")


def test_a_meter_that_did_not_work_is_the_reason() -> None:
    table = replace(board_table(), header=replace(HEADER, meter="none: the counter of rapl did not move in 2 s"))
    cost = board_model(table).predict(uniform("w4g32", GRAPH.units))
    assert cost.energy_mj.reason == "no energy meter was read: the counter of rapl did not move in 2 s"


# ---- rows


def test_there_are_as_few_rows_as_predict() -> None:
    """No grid of token counts, no kernel made of two others: of decoding one, of prefilling one, six whole models."""
    table = board_table()
    wanted = energy_rows.missing_units(GRAPH, WORKLOAD, table, "rapl")
    assert {case.tokens for item in wanted for case in item.cases} == {1, WORKLOAD.prompt_tokens}
    head = next(item for item in wanted if item.unit.N == 512 and item.unit.op == "MatMul")
    assert {case.tokens for case in head.cases} == {1}  # the last position alone
    assert not any("+" in case.kernel for item in wanted for case in item.cases)
    models = energy_rows.missing_models(GRAPH, WORKLOAD, table, "rapl")
    assert len(models) == 6
    assert all(len(item.phases) == 2 and item.anchor.layers == GRAPH.layers for item in models)


def test_a_slow_gauge_is_asked_for_less_at_once() -> None:
    """A battery's window is a minute, of some gauges three: what one process measures must end before the desk gives up."""
    table = board_table()
    quick, slow = (energy_rows.missing_units(GRAPH, WORKLOAD, table, meter) for meter in ("nvml", "battery"))
    assert len(quick) == len({unit.shape for unit in UNITS})
    assert max(len(item.cases) for item in slow) * energy_rows.UNIT_WINDOWS * 180 < ask.TIMEOUT_SECONDS
    assert sorted(case.label for item in slow for case in item.cases) == sorted(case.label for item in quick for case in item.cases)


def test_energy_rows_read_back_and_damaged_ones_do_not(tmp_path: Path) -> None:
    table, path = _powered(), tmp_path / "table.jsonl"
    table.save(path)
    assert open_table(path) == table
    row = table.of(UnitEnergyRow)[0]
    for change in ({"energy_mj": 0.0}, {"idle_mw": -1.0}, {"window_s": 0.0}, {"n": 0}):
        with pytest.raises(ValueError, match="instead of a positive number"):
            replace(row, **change)
    lines = path.read_text().splitlines()
    place = next(number for number, line in enumerate(lines) if '"unit energy"' in line)
    lines[place] = json.dumps({**json.loads(lines[place]), "energy_mj": "much"})
    path.write_text("\n".join(lines) + "\n")
    with pytest.raises(DamagedFileError, match=f"line {place + 1}"):
        open_table(path)


def test_on_a_machine_that_became_slower_idle_powers_part_is_taken_back_to_the_tables_speed(
    profiled: Profiled, profiles: Path, counter: Path, cli: Any, fast: FastHost
) -> None:
    """The reference takes twice as long as when the table began: of 20 mJ the 5 of idle power would have been 2.5."""
    fast.reference_ns = 2e5
    table = _profile(cli, profiled, profiles)[1]
    assert {(row.energy_mj, row.above_idle_mj, row.run_ms) for row in table.of(ModelEnergyRow)} == {(17.5, 15.0, 0.5)}
    for row in table.of(UnitEnergyRow):
        assert row.energy_mj == pytest.approx(row.above_idle_mj + row.idle_mw * row.run_ms / 1e3)


# ---- the commands, with a host that answers at once


@pytest.fixture
def counter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A constructed RAPL counter that stands still: it can be read, so there is a meter."""
    tree = write(tmp_path / "sys", package(0, 0))
    monkeypatch.setattr(ask, "SYSFS", str(tree))
    return tree


@pytest.fixture
def profiles(profiled: Profiled, tmp_path: Path) -> Path:
    """The profile of a tiny model as a machine without meter left it, all rows valid, when the host that answers at once was as fast."""
    folder = copied(profiled.profiles, tmp_path / "profiles")
    path = folder / "local" / "table.jsonl"
    table = open_table(path)
    table = replace(table, header=replace(table.header, reference_ns=dict.fromkeys(WORKS, 1e5)))
    table.adding([replace(row, valid=True) for row in table.rows.values() if hasattr(row, "valid")]).save(path)
    return folder


def _profile(cli: Any, profiled: Profiled, profiles: Path) -> tuple[Any, CostTable]:
    result = cli("profile", profiled.graph, "--profiles", profiles, "--json")
    assert result.code == 0, result.err
    return result, open_table(profiles / "local" / "table.jsonl")


def test_a_meter_that_works_now_adds_energy_to_an_old_table(
    profiled: Profiled, profiles: Path, counter: Path, cli: Any, fast: FastHost
) -> None:
    before = open_table(profiles / "local" / "table.jsonl")
    assert not before.of(Energy)
    result, table = _profile(cli, profiled, profiles)
    assert fast.timed == []
    assert table.header.meter == "rapl"
    assert "energy by rapl takes" in result.err
    seen = table.of(UnitEnergyRow)
    assert {row.tokens for row in seen} == {128}
    assert {row.energy_mj for row in table.of(ModelEnergyRow)} == {20.0}
    assert max(row.energy_mj for row in seen) <= 10.0  # of one of at least two copies
    assert all(row.energy_mj == pytest.approx(row.above_idle_mj * 20 / 15) for row in table.of(Energy))
    predicted = cli("predict", profiled.graph, "--policy", "w4g32", "--profiles", profiles, "--json").json
    assert predicted["energy_mj"]["value"] > 0
    fast.powered.clear()
    _profile(cli, profiled, profiles)
    assert fast.powered == []  # nothing is measured twice


def test_a_meter_that_vanishes_leaves_a_reason_and_is_asked_again(
    profiled: Profiled, profiles: Path, counter: Path, cli: Any, fast: FastHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    answers = fast.energy

    def vanishing(*words: Any) -> dict[str, Any]:
        fast.power_fails = "the meter vanished" if fast.powered else ""
        return answers(*words)

    monkeypatch.setattr(fast, "energy", vanishing)
    result, table = _profile(cli, profiled, profiles)
    assert "the meter vanished" in result.err
    assert table.header.meter == "none: the meter vanished"
    assert len({(row.op, row.K, row.N) for row in table.of(UnitEnergyRow)}) == 1
    said = cli("predict", profiled.graph, "--policy", "w4g32", "--profiles", profiles, "--json").json["energy_mj"]
    assert said == {"value": None, "reason": "no energy meter was read: the meter vanished"}
    held = len(fast.powered)
    fast.powered, fast.power_fails = [], ""
    monkeypatch.setattr(fast, "energy", answers)
    _, table = _profile(cli, profiled, profiles)
    assert table.header.meter == "rapl"
    assert len(table.of(ModelEnergyRow)) == 6
    alone = [name for name in fast.powered if "@" in name]
    assert len(alone) == len(table.of(UnitEnergyRow)) - held  # what was measured before the meter vanished is not measured again


def test_check_holds_the_energy_of_a_whole_inference(
    profiled: Profiled, counter: Path, tmp_path: Path, cli: Any, fast: FastHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "package"
    folder = ("--profiles", profiled.profiles, "--out", out)
    assert cli("export", profiled.graph, "--policy", "w4g32", *folder).code == 0
    for limit, code in ((21, 0), (19, 1)):  # every execution takes 20 mJ
        checked = cli("check", out, "--energy-mj", limit, "--json")
        assert checked.code == code, checked.err
        assert checked.json["measured"]["energy_mj"]["value"] == 20
        assert checked.json["measured"]["energy_mj"]["n"] == 6
        assert checked.json["energy"] == {
            "meter": "rapl: made up",
            "idle_mw": 5000.0,
            "above_idle_mj": 15.0,
            "above_idle_spread_mj": 0.0,
            "window_s": 1.0,
            "meter_error": 0.001,
            "phases": {
                "encode": {"energy_mj": 20.0, "above_idle_mj": 15.0, "run_ms": 1.0, "reference_ns": dict.fromkeys(WORKS, 1e5)}
            },
        }
    assert "15 mJ of it above idle, which draws 5000 mW" in cli("check", out, "--energy-mj", 21).out
    fast.power_fails = "the counter of rapl (package-0) did not move in 2 s"
    checked = cli("check", out, "--energy-mj", 21, "--json")
    assert checked.code == 3
    assert checked.json["limits"][0]["reason"] == fast.power_fails
    unasked = cli("check", out, "--latency-ms", 100, "--json").json
    assert (unasked["measured"]["energy_mj"]["value"], unasked["energy"]) == (None, None)


def test_a_decoders_inference_is_its_prefill_and_all_its_steps(fast: FastHost) -> None:
    from toolchain.hardware import load
    from toolchain.profiler.measure import measure_energy

    seen = measure_energy(ask.Host(load("local"), 1), Path("nowhere"), Workload.parse("generate:8+5"), 16, "rapl")
    assert (seen.total.value, seen.above_idle.value) == (20 * 6, 15 * 6)
    assert (seen.meter, seen.idle_mw) == ("rapl: made up", 5000)


# ---- the whole way, with a real agent


@pytest.mark.slow
def test_profile_and_check_by_a_constructed_counter(
    tiny_bert: Path, tmp_path: Path, cli: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """No machine of ours has RAPL. The tree is constructed, and a thread advances its counter by 30 W whatever runs; the agent, its
    windows and all arithmetic are real. So every row must say 30 W times its own run's time, and nothing above idle."""
    from toolchain.profiler import following, model_rows, profile, unit_rows

    monkeypatch.setattr(profile, "working_kernels_of", lambda host: ("fp32", "w8g32", "w4g32"))
    for module, name, few in ((unit_rows, "WINDOWS", 5), (model_rows, "WINDOWS", 5), (model_rows, "SESSIONS", 1)):
        monkeypatch.setattr(module, name, few)
    monkeypatch.setattr(model_rows, "MIXED", 2)
    monkeypatch.setattr(following, "FOLLOWED", FEWER_FOLLOWED)
    profiles, out = tmp_path / "profiles", tmp_path / "package"
    with advancing(tmp_path / "sys", watts=30.0) as tree:
        monkeypatch.setattr(ask, "SYSFS", str(tree))
        assert cli("profile", tiny_bert, "--profiles", profiles, "--json").code in (0, 3)
        table = open_table(profiles / "local" / "table.jsonl")
        assert table.header.meter == "rapl"
        rows: list[Energy] = table.of(Energy)
        assert len(table.of(ModelEnergyRow)) == 6
        assert len(table.of(UnitEnergyRow)) == 2 * 3
        for row in rows:
            assert row.meter == "rapl: package-0"
            assert row.idle_mw == pytest.approx(30_000, rel=0.03)
            assert row.energy_mj == pytest.approx(30 * row.run_ms, rel=0.03)
            assert abs(row.above_idle_mj) < 0.05 * row.energy_mj
            assert row.window_s >= 1.0
            assert row.step_s < 0.02
        exported = cli("export", tiny_bert, "--policy", "w4g32", "--profiles", profiles, "--out", out, "--json")
        assert exported.json["predicted"]["energy_mj"]["value"] > 0, exported.err
        most = max(row.energy_mj for row in table.of(ModelEnergyRow))
        for limit, expected in ((100 * most, "within"), (most / 100, "over")):
            checked = cli("check", out, "--energy-mj", limit, "--json")
            seen = checked.json["limits"][0]
            if seen["measured"] is None:
                assert "other processes used the CPU" in seen["reason"]  # a busy machine is no reason to fail
            else:
                assert seen["verdict"] == expected


def test_the_benchmark_goes_as_far_as_it_can_without_a_meter_of_this_machines_own(
    profiled: Profiled, profiles: Path, tmp_path: Path, fast: FastHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The agent's numbers are made up, 20 mJ for whatever runs; the windows beside Zeus are real, on a constructed counter of 30 W."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "benchmarks"))
    energy = importlib.import_module("energy")
    monkeypatch.setitem(sys.modules, "zeus", None)  # as on a machine without it
    monkeypatch.setitem(sys.modules, "zeus.monitor", None)
    words = [str(profiled.graph), "--policies", "3", "--repeats", "2", "--zeus", "2", "--work", str(profiles)]
    with advancing(tmp_path / "sys", watts=30.0) as tree:
        monkeypatch.setattr(ask, "SYSFS", str(tree))
        energy.main([*words, "--json", str(tmp_path / "out.json")])
        measured = len(fast.powered)
        energy.main(words)
        assert len(fast.powered) == measured  # a run goes on where it was, and measures nothing twice
    written = json.loads((tmp_path / "out.json").read_text())
    said, beside = written["summary"], written["measured"]["zeus"]
    assert (said["policies"], said["repeats"], said["zeus_windows"]) == (3, 2, 0)
    assert said["largest_distance_of_repeats"] == 0
    assert said["within_10_percent"] in (0, 1 / 3, 2 / 3, 1)
    assert "type: pip install zeus" in said["zeus_reason"]
    assert [row["zeus_mj"] for row in beside] == [None, None]
    for row in beside:
        assert row["ours_mj"] == pytest.approx(30_000 * row["seconds"], rel=0.1)
