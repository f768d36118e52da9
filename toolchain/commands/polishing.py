"""`export --polish N`: a few more training steps for the one policy that was chosen, from where the supernet left it.

A supernet's adapters serve every neighbourhood; those of a package need to serve one. Each step is a step of a dedicated run (`adapt`), so
thirty of them cost what thirty such steps do, and the supernet stays as it was.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from toolchain.commands.training import BATCH, CALIBRATION, MOST_RATE, WINDOW
from toolchain.commands.workflow import Source
from toolchain.errors import InputError, require
from toolchain.files import scratch
from toolchain.kernels import CATALOGUE, parts
from toolchain.progress import note
from toolchain.spec import Policy

if TYPE_CHECKING:
    from toolchain.supernet.store import SupernetFolder


def polished(
    source: Source, policy: Policy, steps: int, text: Sequence[Path] | None, on: str = "auto", seed: int = 0
) -> tuple[Source, dict[str, Any]]:
    """The source with the policy's units polished, and what the manifest says of it. Where it did not help, the source as it was.

    text: files to train on, None for the prose every CPython carries; the supernet's held-out windows are left out of either. on: "cpu",
    "cuda" or "auto". Raises InputError for a model, steps below 1 or too little text.
    """
    require("torch")
    from toolchain import text as texts
    from toolchain.supernet import saving
    from toolchain.train.loop import Run, adapt
    from toolchain.train.quality import scorer
    from toolchain.train.settings import Settings, polishing
    from toolchain.train.team import Team

    if source.supernet is None or steps < 1:
        raise InputError(f"expected a supernet to polish and one step or more, got {'a model' if steps > 0 else steps}")
    if other := sorted(
        {name for name in policy.values() if not {part.name for part in parts(CATALOGUE[name])} & {*source.supernet.kernels}}
    ):
        raise InputError(
            f"expected a policy of kernels that the supernet was trained with to polish, got {other[0]}", "leave --polish out"
        )
    graph, team = source.graph, Team(on)
    supernet = saving.restore(source.supernet, team.device)
    found = texts.documents(text) if text else texts.pydoc_documents()
    separator = texts.separator_id(graph.directory)
    framed = graph.kind == "encoder"
    windows = texts.windows(texts.load_tokenizer(graph.directory), found, min(WINDOW, graph.context), separator, framed=framed)
    if (source.supernet.directory / "heldout.safetensors").is_file():  # they stay unseen
        unseen = {row.tobytes() for row in source.supernet.heldout()}
        windows = np.array([row for row in windows if row.tobytes() not in unseen]).reshape(-1, windows.shape[1])
    if len(windows) <= CALIBRATION:
        raise InputError(
            f"expected more than {CALIBRATION} windows of {windows.shape[1]} tokens to polish on, got {len(windows)}",
            "give more text: --text FILE",
        )
    # A kernel of two phases is polished in what it decodes with.
    trained = Policy.of({unit: parts(CATALOGUE[kernel])[0].name for unit, kernel in policy.items()})
    score = scorer(supernet, windows[:CALIBRATION])
    before = score(trained)
    settings = polishing(Settings(precision="bf16" if team.device.type == "cuda" else "fp32"), steps)
    rate = _rate(source.supernet)
    settings = replace(settings, lr=rate * settings.lr, bound_lr=rate * settings.bound_lr)
    batch = min(BATCH, len(windows) - CALIBRATION)
    with scratch() as folder:
        adapt(supernet, Run(windows[CALIBRATION:], steps, batch, folder, seed, settings=settings, team=team), [trained])
    after = score(trained)
    name = ", ".join(path.name for path in text) if text else texts.pydoc_description()
    distances = {"distance_before": round(before, 5), "distance_after": round(after, 5)}
    facts = {
        "steps": steps,
        "text": name,
        "windows": len(windows) - CALIBRATION,
        **({"rate": rate} if rate != 1 else {}),
        **distances,
    }
    if not after < before:  # also where it is not a number
        note(
            f"bittailor: polishing did not bring the package nearer to the model ({before:.4f} before, {after:.4f} after): left as it was"
        )
        return source, {**facts, "taken": False}
    return replace(source, weights=supernet.quantized), {**facts, "taken": True}


def _rate(supernet: SupernetFolder) -> float:
    """Times the tuned learning rates, as the supernet was trained (`train --rate`). Raises InputError."""
    rate = supernet.description["training"].get("rate", 1.0)
    if type(rate) not in (int, float) or not 0 < rate <= MOST_RATE:
        raise InputError(f"expected the training's rate above 0, at most {MOST_RATE}, in {supernet.directory}, got {rate!r}")
    return float(rate)
