"""The agent as one file that Python runs: `python3 bittailor-agent.pyz REQUEST.json`. Only the modules it needs, the same bytes every time.

What it needs is read from its modules' own imports, from `agent.py` on. onnxruntime cannot read a graph inside a zip, so the file unpacks
itself into a temporary folder first; on a device that is the job's.
"""

from __future__ import annotations

import ast
import hashlib
import io
import zipfile
from functools import cache
from pathlib import Path
from threading import Lock

import toolchain

ENTRY = "toolchain.profiler.agent"
DATA = ("toolchain/profiler/graphs/*/model.onnx",)
_ROOT = Path(toolchain.__file__).resolve().parent.parent
_ONE_AT_A_TIME = Lock()
"""Several devices ask at once, and Python 3.11 may fail where two threads parse (SystemError: AST constructor recursion depth mismatch)."""
_MAIN = b'''"""The agent of bittailor: unpacks itself, and answers one request."""
import sys
import tempfile
import zipfile

if sys.version_info < (3, 11):
    sys.exit("expected Python 3.11 or newer for the agent, got %d.%d" % sys.version_info[:2])
with tempfile.TemporaryDirectory(prefix="bittailor-agent-") as folder:
    zipfile.ZipFile(sys.argv[0]).extractall(folder)
    sys.path[0] = folder
    from toolchain.profiler.agent import main

    code = main(sys.argv[1:])
sys.exit(code)
'''


def agent_bytes() -> bytes:
    """The zipapp. Stored, not deflated: other versions of zlib would make other bytes."""
    with _ONE_AT_A_TIME:
        return _made()


@cache
def _made() -> bytes:
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w", zipfile.ZIP_STORED) as archive:
        for name, data in sorted({"__main__.py": _MAIN, **_files()}.items()):
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            entry.create_system, entry.external_attr = 3, 0o100644 << 16
            archive.writestr(entry, data)
    return stream.getvalue()


@cache
def agent_sha256() -> str:
    return hashlib.sha256(agent_bytes()).hexdigest()


def modules() -> list[str]:
    """Names of the modules that the agent imports, itself included, and of the packages they are in."""
    found: set[str] = set()
    left = [ENTRY]
    while left:
        name = left.pop()
        if name in found or _path(name) is None:
            continue
        found.add(name)
        left += [name.rpartition(".")[0]] if "." in name else []
        left += _imports(name)
    return sorted(found)


def _files() -> dict[str, bytes]:
    paths = [path for name in modules() if (path := _path(name))]
    paths += [path for pattern in DATA for path in _ROOT.glob(pattern)]
    return {path.relative_to(_ROOT).as_posix(): path.read_bytes() for path in paths}


def _path(name: str) -> Path | None:
    """A module's file; None where the name is a thing inside a module."""
    base = _ROOT.joinpath(*name.split("."))
    return next((path for path in (base.with_suffix(".py"), base / "__init__.py") if path.is_file()), None)


def _imports(name: str) -> list[str]:
    """Modules of ours that a module imports, at its top or later; not those that only a type checker sees."""
    path = _path(name)
    assert path
    wanted: list[str] = []
    left: list[ast.AST] = [ast.parse(path.read_text(encoding="utf-8"))]
    while left:
        node = left.pop()
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == "TYPE_CHECKING":
            left += node.orelse
            continue
        if isinstance(node, ast.Import):
            wanted += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom) and node.module:
            wanted += [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        left += ast.iter_child_nodes(node)
    return [module for module in wanted if module.partition(".")[0] == "toolchain"]
