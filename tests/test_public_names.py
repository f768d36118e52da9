import inspect

from toolchain import check, ci, errors, evaluate, hardware, spec


def test_public_names():
    def names(module):
        return " ".join(sorted(name for name, it in vars(module).items() if inspect.getmodule(it) is module and name[0] != "_"))

    assert names(spec) == "Budget Cost Device Estimate Kernel Measurement Phase Policy Unit Verdict Workload"
    assert names(check) == "decide exit_code hold_latency hold_peak_ratio hold_ratio median_interval overall"
    assert names(ci) == "append facts junit markdown"
    assert names(hardware).startswith(
        "Availability has_provider list_devices load meter named_budget reachable read_budget shipped"
    )
    assert {"BittailorError", "InfeasibleBudgetError", "InputError", "MissingCostError", "StaleTableError"} <= {
        *names(errors).split()
    }
    assert evaluate.__all__ == ["Fidelity", "fidelity", "perplexity"]
