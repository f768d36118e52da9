"""optimum's fp32 export, held to what this project allows: no remote code, no network, no validation run, no chatter."""

from __future__ import annotations

from pathlib import Path

from toolchain.errors import UnknownArchitectureError, require
from toolchain.graph.quiet import quiet


def export(folder: Path, made: Path, task: str, source: str) -> None:
    """Write the graphs of a checked model folder for an optimum task into `made`. UnknownArchitectureError where optimum gives up."""
    with quiet():
        exporters = require("optimum.exporters.onnx")
    try:
        with quiet():
            exporters.main_export(
                str(folder.absolute()),
                made,
                task=task,
                device="cpu",
                library_name="transformers",
                trust_remote_code=False,
                do_validation=False,
                no_post_process=True,
            )
    except OSError:
        raise
    except Exception as error:
        raise UnknownArchitectureError(
            f"expected a model that optimum can export, got {source!r} ({type(error).__name__}: {error})"
        ) from error


def copy_companions(made: Path, out: Path) -> None:
    """Tokenizer, config and generation settings that optimum wrote beside the graphs."""
    for path in made.iterdir():
        if path.suffix in (".json", ".txt", ".model"):
            (out / path.name).write_bytes(path.read_bytes())
