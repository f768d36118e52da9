"""Names and links that lead out of their folder: refused, and nothing that lies there by chance is published."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("random_models")

from refusals import refused

from toolchain.files import inside
from toolchain.graph.model import Graph


@pytest.mark.parametrize("name", ["", ".", "a/..", "da\0ta", "a" * 300, "loop", "../x", "/x", "up/x"])
def test_names_that_are_none_inside(tmp_path: Path, name: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / "loop").symlink_to("loop")
    (tmp_path / "folder" / "up").symlink_to(tmp_path)
    with refused("inside"):
        inside(tmp_path / "folder", name)


def test_a_companion_that_is_a_link_is_not_published(place: Path, tmp_path: Path) -> None:
    """What lies beside a graph goes into every package cut from it."""
    (tmp_path / "private_key").write_text("secret")
    (place / "graph" / "merges.txt").symlink_to(tmp_path / "private_key")
    with refused("inside"):
        Graph.open(place / "graph").companions()


def test_what_happens_to_lie_beside_a_graph_is_not_published(place: Path) -> None:
    before = Graph.open(place / "graph").companions()
    for name in ("ready", ".DS_Store", "id_ed25519", "model.onnx.data.swp", "credentials.json", "notes.md"):
        (place / "graph" / name).write_text("secret")
    (place / "graph" / "merges.txt").write_text("a b")
    assert Graph.open(place / "graph").companions() == sorted([*before, place / "graph" / "merges.txt"])


def test_a_graph_that_is_a_link_out_of_its_folder(place: Path, tmp_path: Path) -> None:
    (place / "graph" / "model.onnx").rename(tmp_path / "model.onnx")
    (place / "graph" / "model.onnx").symlink_to(tmp_path / "model.onnx")
    graph = Graph.open(place / "graph")
    with refused("inside"):
        graph.weight(graph.units[0])
