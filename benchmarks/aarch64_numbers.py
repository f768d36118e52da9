"""What a machine computes: outputs of one-unit graphs and of packages on given inputs. Runs on the desk and on the board, bare install.

    python aarch64_numbers.py FOLDER OUT.npz KIND ...

FOLDER holds KIND/<name>/: under `units` one-unit graphs, each with its inputs.npz; else packages, each
with its ids [T] beside it, <name>.npy. OUT: of a unit
"units/<name>/<input>" [M, N]; of a decoder "KIND/<name>/prefill" (all tokens at once) and ".../decode" (one after the other), logits
[T, V]; of an encoder ".../encode" [T, V]; and "identity", a line of JSON. One thread, so that sums have one order.
"""

from __future__ import annotations

import json
import platform
import sys
from pathlib import Path

import numpy as np

from toolchain.decoding import Decoder
from toolchain.profiler.agent import identify
from toolchain.session import cache_slots, open_session, token_feeds


def main(folder: Path, out: Path, kinds: list[str]) -> None:
    seen = {"identity": np.array(json.dumps({"machine": platform.machine(), **identify({})}))}
    for kind in kinds:
        for place in sorted(path for path in (folder / kind).iterdir() if path.is_dir()):
            made = unit(place) if kind == "units" else package(place)
            seen.update({f"{kind}/{place.name}/{name}": array for name, array in made.items()})
    np.savez(out, **seen)


def unit(folder: Path) -> dict[str, np.ndarray]:
    session = open_session(folder, threads=1)
    with np.load(folder / "inputs.npz") as inputs:
        return {name: session.run(None, {"x": x})[0] for name, x in inputs.items()}


def package(folder: Path) -> dict[str, np.ndarray]:
    ids = np.load(folder.with_name(f"{folder.name}.npy"))
    session = open_session(folder, threads=1)
    feeds = token_feeds(session, ids[None], every_position=True)
    slots = cache_slots(session)
    if not slots:
        return {"encode": session.run(None, feeds)[0].reshape(len(ids), -1)}
    prefill = session.run(["logits"], {**feeds, **{slot.past: slot.zeros(0) for slot in slots}})[0][0]
    decoder = Decoder(folder, threads=1, capacity=len(ids))
    first = decoder.prefill(ids[:1]).copy()
    return {"prefill": prefill, "decode": np.stack([first, *(decoder.step(int(token)).copy() for token in ids[1:])])}


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:])
