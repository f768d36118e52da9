"""Everything that can go wrong on purpose, each with what to type next.

BittailorError                 base: one line for the user, exit code 2
├── InputError                 an argument or a file is not what was expected
│   ├── UnknownArchitectureError   no graph builder for this model
│   ├── UnsafeModelError       the model could only be loaded by running or unpickling what it ships
│   ├── PolicyError            a policy names an unknown unit or kernel, or misses a unit
│   └── DamagedFileError       a file of ours does not read back as it was written
├── MissingCostError           the cost table lacks a row; the command that measures it
├── StaleTableError            the table was measured with another runtime, provider, thread count or CPU
├── UnreachableError           a device does not answer, does not let us in, or is not who it was; what to look at
│   └── LostLinkError          the link was cut: the device may answer again
├── InfeasibleBudgetError      no subnet can meet the budget; which limit binds and by how much
├── MeterError                 an energy meter cannot tell: there is no number, and this is the reason
└── MissingPackageError        an optional dependency is not installed; the pip line
"""

from __future__ import annotations

LONGEST = 1000
"""Characters of a problem: what came may be a stranger's, and as long as they like."""


class BittailorError(Exception):
    """Base class. `str(error)` is one line: what was expected, what came, and the remedy.

    Of what came, characters that would steer a terminal are replaced, and what is too long is cut.
    """

    def __init__(self, problem: str, remedy: str = "") -> None:
        if len(problem) > LONGEST:
            problem = f"{problem[:LONGEST]}…"
        line = " ".join(problem.split())
        line = line if line.isprintable() else "".join(one if one.isprintable() else "\ufffd" for one in line)
        if remedy:
            line = f"{line}; {' '.join(remedy.split())}"
        super().__init__(line)
        self.problem = problem
        self.remedy = remedy


class InputError(BittailorError):
    """An argument or a file is not what was expected."""


class UnknownArchitectureError(InputError):
    """No graph builder knows this model's architecture."""


class UnsafeModelError(InputError):
    """Loading the model would run or unpickle something that came with it."""


class PolicyError(InputError):
    """A policy names an unknown unit or kernel, or misses a unit."""


class DamagedFileError(InputError):
    """A file of ours does not read back as it was written."""


class MissingCostError(BittailorError):
    """The cost table lacks a row that a prediction needs."""


class StaleTableError(BittailorError):
    """The cost table describes another runtime, provider, thread count or CPU."""


class UnreachableError(BittailorError):
    """A device does not answer, does not let us in, or is not who it was."""


class LostLinkError(UnreachableError):
    """The link was cut: the device may answer again."""


class InfeasibleBudgetError(BittailorError):
    """No subnet can meet the budget."""


class MeterError(BittailorError):
    """An energy meter cannot tell. `str(error)` is the reason that stands where a number would."""


class MissingPackageError(BittailorError):
    """An optional dependency is not installed."""


def reason_of(error: BaseException) -> str:
    """Why something failed, in one line: what a BittailorError says, of others their type too."""
    text = " ".join(str(error).split())
    return text if isinstance(error, BittailorError) else f"{type(error).__name__}: {text}"


def require(module: str, extra: str = "train"):  # noqa: ANN201 - a module object, whatever it is
    """Import and return `module`; raises MissingPackageError naming the extra that brings it."""
    import importlib

    try:
        return importlib.import_module(module)
    except ImportError as error:
        raise MissingPackageError(
            f"this command needs the Python package {module.split('.')[0]!r}, which does not import here ({error})",
            f"type: pip install 'bittailor[{extra}]'",
        ) from error
