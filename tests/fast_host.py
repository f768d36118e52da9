"""Instead of the agent: answers at once, always the same, and notes what it was asked."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from toolchain.profiler.ask import Host
from toolchain.spec import WORKS

_PHASES = {"unit": ("run_ns",), "encode": ("encode_ns",), "generate": ("prefill_ns", "decode_ns")}


def _labels(subject: dict[str, Any]) -> list[str]:
    return [phase["label"] for phase in subject["phases"]] if "phases" in subject else list(_PHASES[subject["kind"]])


class FastHost:
    """Every trial takes 1 ms, the reference 0.1 ms, every process 1 MB, every execution 20 mJ of which 5 are idle power's.

    timed, powered: names of the subjects; weighed: memory trials. power_fails: what the meter says from then on instead of a number.
    reference_ns: the reference's time in windows of energy.
    """

    def __init__(self) -> None:
        self.timed: list[str] = []
        self.powered: list[str] = []
        self.weighed = 0
        self.power_fails = ""
        self.reference_ns = 1e5

    def time(
        self, _: Host, subjects: Sequence[dict[str, Any]], windows: int, quantile: float = 0.0, first: bool = False
    ) -> dict[str, Any]:
        self.timed += [subject["name"] for subject in subjects]
        trials = {item["name"]: [dict.fromkeys(_labels(item), 1e6)] * 7 for item in subjects}
        answer = {"trials": trials, "reference_ns": dict.fromkeys(WORKS, [1e5] * 7), "dropped": 0, "valid": True}
        answer["niceness"] = -20 if first else 0
        tails = {item["name"]: dict.fromkeys(_labels(item), 1.5e6) for item in subjects}
        return answer | ({"quantiles": tails} if quantile else {})

    def peak(self, _: Host, subject: dict[str, Any]) -> dict[str, int]:
        self.weighed += 1
        return {"peak_bytes": 10**6, "running_bytes": 10**6}

    def energy(
        self, _: Host, subjects: Sequence[dict[str, Any]], meter: str, windows: int, window_s: float = 0.0
    ) -> dict[str, Any]:
        if self.power_fails:
            return {"reason": self.power_fails}
        self.powered += [subject["name"] for subject in subjects]
        seen = {"energy_mj": [20.0] * windows, "above_idle_mj": [15.0] * windows, "run_ms": [1.0] * windows}
        seen |= {"reference_ns": dict.fromkeys(WORKS, [self.reference_ns] * windows)}
        seen |= {"error": 0.001, "dropped": 0, "valid": True, "reason": ""}
        measured = {item["name"]: {label.removesuffix("_ns"): seen for label in _labels(item)} for item in subjects}
        return {
            "reason": "",
            "meter": f"{meter}: made up",
            "step_s": 0.001,
            "window_s": 1.0,
            "idle_mw": 5000.0,
            "measured": measured,
        }
