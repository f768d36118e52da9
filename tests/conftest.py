"""Shared by the tests: tiny random models and their graphs, made once per session, and the command run in-process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from cables import board  # noqa: F401 - a fixture of several files
from fast_host import FastHost
from hypothesis import HealthCheck, settings

from toolchain.costs.table import CostTable
from toolchain.graph.model import Graph
from toolchain.package.manifest import manifest_text
from toolchain.profiler import ask
from toolchain.profiler.ask import Host
from toolchain.spec import Kernel

if TYPE_CHECKING:
    from report_fleet import Fleet

ROOT = Path(__file__).parent.parent

# A busy 2-core machine is no reason to fail; in CI the examples are the same in every run.
settings.register_profile("here", deadline=None, suppress_health_check=[HealthCheck.too_slow], derandomize="CI" in os.environ)
settings.load_profile("here")


LONGEST = ("test_profile", "test_energy", "test_journey", "test_train_export", "test_bad_input", "test_train_kinds", "test_jobs")
"""Files that take a minute begin first: one that begins last leaves the other worker idle."""
SHARING = {
    "test_profile.py": "profiled",
    "test_energy.py": "profiled",
    "test_journey.py": "profiled",
    "test_html_report.py": "fleet",
    "test_html_report_missing.py": "fleet",
    "test_html_report_strangers.py": "fleet",
    "test_report_browser.py": "fleet",
}
"""Files of a fixture that takes long: one worker runs them, so that it is made once."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    places = {name: place for place, name in enumerate(LONGEST)}
    items.sort(key=lambda item: places.get(item.path.stem, len(places)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> object:
    from xdist.scheduler import LoadFileScheduling

    class Sharing(LoadFileScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = super()._split_scope(nodeid)
            return SHARING.get(Path(file).name, file)

    if config.getoption("dist") != "loadfile":
        return None
    config.option.loadscopereorder = False  # the order is LONGEST's, not that of how many tests a file has
    return Sharing(config, log)


@pytest.fixture(scope="session", autouse=True)
def no_meters(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """This machine's own meters are not read: `local` says meter: auto, and a profile by one takes minutes and has rows of its own.

    Agents are processes of their own: /sys goes with the request, and what they must not import lies first on their path.
    """
    hidden = tmp_path_factory.mktemp("hidden")
    (hidden / "pynvml.py").write_text("raise ImportError('hidden from tests')\n")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ask, "SYSFS", str(tmp_path_factory.mktemp("sys")))
        patch.setitem(sys.modules, "pynvml", None)
        patch.setenv("PYTHONPATH", str(hidden), prepend=os.pathsep)
        yield


@dataclass(frozen=True)
class Result:
    """What one run of the command gave."""

    code: int
    out: str
    err: str

    @property
    def json(self) -> dict[str, Any]:
        return json.loads(self.out)

    @property
    def error(self) -> str:
        """The one line of stderr that a refusal must be: fails the test for any other exit code, and for any other output."""
        assert self.code == 2, f"exit code {self.code}, stdout {self.out!r}, stderr {self.err!r}"
        assert self.out == ""
        lines = self.err.splitlines()
        assert len(lines) == 1, self.err
        assert lines[0].startswith("bittailor")
        return lines[0]


@pytest.fixture
def cli(capfd: pytest.CaptureFixture[str]) -> Callable[..., Result]:
    """`cli("units", folder, "--json")` → Result. The file descriptors are captured, so C++ that prints is seen too."""
    from toolchain.cli import main

    def run(*words: object) -> Result:
        capfd.readouterr()
        try:
            code = main([str(word) for word in words])
        except SystemExit as stop:  # argparse
            code = int(stop.code or 0)
        out, err = capfd.readouterr()
        return Result(code, out, err)

    return run


@pytest.fixture(scope="session")
def models(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """`models("bert", architecture="BertForMaskedLM")` → its Hugging Face folder. Shared: copy it before changing it."""
    pytest.importorskip("torch")
    import torch
    from random_models import save_random_model

    torch.set_num_threads(1)  # these models are tiny: two threads would only wait for each other
    made: dict[tuple, Path] = {}

    def get(name: str, architecture: str = "", **changes: Any) -> Path:
        key = (name, architecture, *sorted(changes.items()))
        if key not in made:
            made[key] = save_random_model(name, tmp_path_factory.mktemp("models") / name, architecture, **changes)
        return made[key]

    return get


@pytest.fixture(scope="session")
def graphs(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Graph]:
    """`graphs("llama")` → the fp32 graph of `models("llama")`. Shared: never write into its folder."""
    from toolchain.graph.build import build

    made: dict[Path, Graph] = {}

    def get(name: str, architecture: str = "", **changes: Any) -> Graph:
        folder = models(name, architecture, **changes)
        if folder not in made:
            made[folder] = build(str(folder), tmp_path_factory.mktemp("graph"))
        return made[folder]

    return get


@pytest.fixture(scope="session")
def packages(models: Any, graphs: Any, tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """`packages("qwen2")` → its w4g32 package, cut with a made-up table. Shared: copy it before changing it."""
    from small_tables import complete_table

    from toolchain.cli import main

    made: dict[str, Path] = {}

    def get(name: str) -> Path:
        if name not in made:
            place = tmp_path_factory.mktemp("package")
            complete_table(graphs(name)).save(place / "profiles" / "local" / "table.jsonl")
            words = [
                "export",
                models(name),
                "--policy",
                "w4g32",
                "--profiles",
                place / "profiles",
                "--out",
                place / "out",
                "--json",
            ]
            out = io.StringIO()
            with contextlib.redirect_stdout(out):
                assert main([str(word) for word in words]) == 0
            (place / "said.json").write_text(out.getvalue())
            made[name] = place / "out"
        return made[name]

    return get


TINY_BERT = {"intermediate_size": 64, "num_hidden_layers": 1}
"""Changes that leave BERT two unit shapes, so that profiling it takes seconds."""


@pytest.fixture(scope="session")
def tiny_bert(models: Callable[..., Path]) -> Path:
    return models("bert", **TINY_BERT)


@pytest.fixture(scope="session")
def tiny_graph(graphs: Callable[..., Graph]) -> Path:
    """The graph folder of `tiny_bert`, for tests that are not about how a graph is built."""
    return graphs("bert", **TINY_BERT).directory


@pytest.fixture
def made_up_table(tmp_path: Path) -> Callable[[Graph], Path]:
    """`made_up_table(graph)` → a --profiles folder whose table is complete for the graph and this machine, with made-up times."""
    from small_tables import complete_table

    def write(graph: Graph) -> Path:
        table: CostTable = complete_table(graph)
        table.save(tmp_path / "profiles" / "local" / "table.jsonl")
        return tmp_path / "profiles"

    return write


@pytest.fixture
def fast(monkeypatch: pytest.MonkeyPatch) -> FastHost:
    """No agent is started but to say who it is: measurements are made up (`fast_host.py`)."""
    from toolchain.profiler import following, model_rows

    made = FastHost()
    monkeypatch.setattr(model_rows, "MIXED", FEWER_MIXED)  # the policies of `profiled`
    monkeypatch.setattr(following, "FOLLOWED", FEWER_FOLLOWED)
    monkeypatch.setattr(Host, "time", lambda self, *words: made.time(self, *words))
    monkeypatch.setattr(Host, "identify", _once)
    monkeypatch.setattr(Host, "peak", lambda self, subject: made.peak(self, subject))
    monkeypatch.setattr(Host, "energy", lambda self, *words: made.energy(self, *words))
    return made


_known: dict[Any, dict[str, Any]] = {}


def _once(host: Host, ask_agent: Callable[[Host], dict[str, Any]] = Host.identify) -> dict[str, Any]:
    """What the agent really says, asked once per device and place of meters: each time takes a process."""
    key = (host.device, ask.SYSFS)
    if key not in _known:
        _known[key] = ask_agent(host)
    return _known[key]


def listing(folder: Path) -> set[str]:
    """Every path below `folder`: equal before and after means that nothing was left behind."""
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def copied(folder: Path, to: Path) -> Path:
    """A copy of a shared folder that a test may damage."""
    return Path(shutil.copytree(folder, to))


def edited(package: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """What somebody does who changes the manifest and its digest."""
    data = yaml.safe_load((package / "manifest.yaml").read_text())
    (package / "manifest.yaml").write_bytes(manifest_text(change(data)))


def environment(**more: str) -> dict[str, str]:
    """For subprocesses: the checkout importable from any working directory, this machine's NVML hidden as it is here."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), os.environ["PYTHONPATH"]]), **more}


def quantised(kernels: dict[str, Kernel]) -> list[Kernel]:
    return [kernel for kernel in kernels.values() if kernel.quantised]


@pytest.fixture(scope="session")
def strangers(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with graph, table, package, supernet, checkpoint (`fuzz_seeds.py`). Shared: copy what you change."""
    pytest.importorskip("torch")
    from fuzz_seeds import make

    return make(tmp_path_factory.mktemp("strangers") / "seeds")


@pytest.fixture
def place(strangers: Path, tmp_path: Path) -> Path:
    """Folders of `strangers` that a test may damage."""
    return copied(strangers, tmp_path / "place")


@pytest.fixture(scope="session")
def fleet(models: Callable[..., Path], tmp_path_factory: pytest.TempPathFactory) -> Fleet:
    """Packages, their supernet and cost table, and reports of each (`report_fleet.py`). Shared: copy what you change."""
    from report_fleet import make

    return make(models("llama", vocab_size=4096), tmp_path_factory.mktemp("fleet"))


@dataclass(frozen=True)
class Profiled:
    """A model that was really measured through the command, once for all tests: its folder, its graph's, its --profiles, what the command
    said."""

    model: Path
    graph: Path
    profiles: Path
    result: Result

    @property
    def table(self) -> Path:
        return self.profiles / "local" / "table.jsonl"


FEWER_MIXED = 2
"""Mixed policies measured in tests: each is another process to start."""
FEWER_FOLLOWED = 2
"""Processes that follow the machine's speed in tests."""
FEWER_WINDOWS = 5
"""Trials per row in tests: the fewest that the protocol calls valid. On a busy machine every one saved is seconds."""
FEWER_PROCESSES = (3,)
"""After how many processes a check that really measures looks in tests: once, after the fewest that tell anything."""


@pytest.fixture(scope="session")
def profiled(tiny_bert: Path, tiny_graph: Path, tmp_path_factory: pytest.TempPathFactory) -> Profiled:
    from toolchain.cli import main
    from toolchain.profiler import following, model_rows, unit_rows

    folder = tmp_path_factory.mktemp("profiled") / "profiles"
    time = Host.time
    out, err = io.StringIO(), io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(unit_rows, "WINDOWS", FEWER_WINDOWS)
        patch.setattr(model_rows, "WINDOWS", FEWER_WINDOWS)
        patch.setattr(model_rows, "SESSIONS", 1)
        patch.setattr(following, "FOLLOWED", FEWER_FOLLOWED)
        patch.setattr(model_rows, "MIXED", FEWER_MIXED)
        # Before others, where the system lets it: other tests run beside, and waiting for quiet takes longer than measuring.
        patch.setattr(Host, "time", lambda self, subjects, windows: time(self, subjects, windows, first=True))
        code = main(["profile", str(tiny_bert), "--profiles", str(folder), "--json"])
    return Profiled(tiny_bert, tiny_graph, folder, Result(code, out.getvalue(), err.getvalue()))


@pytest.fixture(scope="module")
def quick_training() -> Iterator[None]:
    """For tests of commands that train where how well the meta-network learns is not the subject: a tenth of its budgets and steps."""
    from toolchain.train import settings

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(settings, "Settings", partial(settings.Settings, scenarios=24, imitation_steps=40))
        yield


@pytest.fixture
def one_thread() -> Iterator[None]:
    """For tests of tiny tensors: a second thread only waits."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
