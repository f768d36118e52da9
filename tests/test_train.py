"""Samplers, losses, the joint loop with its checkpoints, and text the model writes itself."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from random_models import HIDDEN, VOCABULARY, random_model
from small_costs import bytes_and_time
from test_supernet import moved, tiny_bert, tiny_llama

from toolchain.errors import InputError
from toolchain.kernels import CATALOGUE
from toolchain.policy.sensitivity import measure
from toolchain.spec import Policy, Unit
from toolchain.supernet.loading import load_model
from toolchain.supernet.model import Supernet
from toolchain.supernet.starts import input_moments
from toolchain.train import checkpoint
from toolchain.train.loop import Run, Trained, adapt, train
from toolchain.train.losses import Interference
from toolchain.train.quality import scorer
from toolchain.train.settings import Settings
from toolchain.train.step import Batch, step_gradients
from toolchain.train.team import Team
from toolchain.train.text_source import self_written

pytestmark = pytest.mark.usefixtures("one_thread")

KERNELS = ("fp32", "w8g32", "w4g32", "w3g32", "w2g32")
WORDS = "embeddings.word_embeddings"
POCKET = Path(__file__).parents[1] / "toolchain" / "models" / "pocket-llama-6m"
QUICK = Settings(scenarios=12, imitation_steps=20, meta_every=3, checkpoint_seconds=0.0)


def run(
    out: Path, steps: int = 8, seed: int = 0, make=tiny_llama, kind_masks: bool = False, calls: list[int] | None = None
) -> tuple[Supernet, Trained]:  # type: ignore[no-untyped-def]
    model, units = make()
    supernet = Supernet(model, units, KERNELS, rank=4)
    rng = np.random.default_rng(0)
    windows = rng.integers(0, 48, (16, 10))
    masks = None
    if kind_masks:
        masks = np.ones_like(windows)
        masks[:, 7:] = 0

    def losses() -> dict[str, dict[str, float]]:
        if calls is not None:
            calls.append(1)
        table = {"fp32": 0.0, "w8g32": 0.01, "w4g32": 0.1, "w3g32": 0.3, "w2g32": 2.0}
        return {unit: {name: table[name] for name in names} for unit, names in supernet.kernels.items()}

    costs = bytes_and_time(units, KERNELS)
    return supernet, train(supernet, Run(windows, steps, 4, out, seed, masks, QUICK), costs, losses)


class Stop(Exception):
    """Stands for the kill."""


def test_a_killed_run_ends_where_an_uninterrupted_one_does(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, trained = run(tmp_path / "whole")
    assert trained.resumed_from == 0
    assert len(trained.history) == 8
    saved = []
    real = checkpoint.save

    def dies_after_the_fifth(*arguments: object, **more: object) -> None:
        real(*arguments, **more)  # type: ignore[arg-type]
        saved.append(1)
        if len(saved) == 6:  # the first one comes before step 0
            raise Stop

    monkeypatch.setattr(checkpoint, "save", dies_after_the_fifth)
    calls: list[int] = []
    with pytest.raises(Stop):
        run(tmp_path / "cut", calls=calls)
    monkeypatch.setattr(checkpoint, "save", real)
    again, resumed = run(tmp_path / "cut", calls=calls)
    assert resumed.resumed_from == 5
    assert len(calls) == 1  # the sensitivities came from the checkpoint
    for name, parameter in whole.parameters.items():
        assert torch.equal(parameter, again.parameters[name]), name
    for ours, theirs in zip(trained.meta_network.parameters(), resumed.meta_network.parameters(), strict=True):
        assert torch.equal(ours, theirs)
    assert run(tmp_path / "cut")[1].resumed_from == 8


def test_a_checkpoint_of_another_setup_or_a_broken_one_is_not_continued(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run(tmp_path, steps=2)
    assert run(tmp_path, steps=2, seed=1)[1].resumed_from == 0
    assert "another set-up" in capsys.readouterr().err
    file = tmp_path / checkpoint.FILE
    file.write_bytes(file.read_bytes()[:1000])
    assert run(tmp_path, steps=2, seed=1)[1].resumed_from == 0
    assert "does not read back" in capsys.readouterr().err


@pytest.mark.parametrize(
    "on", ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU"))]
)
def test_a_start_that_was_kept_and_loaded_continues_the_checkpoint_of_the_one_that_was_made(on: str, tmp_path: Path) -> None:
    model, units = tiny_llama()
    windows = np.random.default_rng(0).integers(0, 48, (16, 10))
    made = Supernet(model.to(on), units, KERNELS, rank=4, moments=input_moments(model, units, torch.from_numpy(windows).to(on)))
    kept = made.arrays()
    cut = Run(windows, 4, 8, tmp_path, settings=QUICK, team=Team(on))
    policy = made.policy("w2g32")
    assert adapt(made, cut, [policy]).resumed_from == 0
    loaded = Supernet(model, units, KERNELS, rank=4, start=False)
    loaded.load(kept)
    assert adapt(loaded, cut, [policy]).resumed_from == 4
    assert all(torch.equal(parameter, loaded.parameters[name]) for name, parameter in made.parameters.items())


@pytest.mark.slow
def test_kill_9_in_the_middle_and_again(tmp_path: Path) -> None:
    """The same through a real SIGKILL of a process that trains."""
    script = f"import sys; sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}\n"
    script += "import torch; torch.set_num_threads(1)\nfrom pathlib import Path\nimport test_train\n"
    script += f"test_train.run(Path({str(tmp_path / 'cut')!r}), steps=60)"
    child = subprocess.Popen([sys.executable, "-c", script], stderr=subprocess.DEVNULL)
    file = tmp_path / "cut" / checkpoint.FILE
    deadline = time.monotonic() + 60
    while not file.exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    time.sleep(0.3)
    os.kill(child.pid, signal.SIGKILL)
    assert child.wait() == -signal.SIGKILL
    again, resumed = run(tmp_path / "cut", steps=60)
    whole, _ = run(tmp_path / "whole", steps=60)
    assert resumed.resumed_from < 60
    assert all(torch.equal(parameter, again.parameters[name]) for name, parameter in whole.parameters.items())


def test_training_refuses_too_little_text_and_a_foreign_cost_model(tmp_path: Path) -> None:
    model, units = tiny_llama()
    supernet = Supernet(model, units, KERNELS, rank=2)
    with pytest.raises(InputError, match="at least 4 windows"):
        train(supernet, Run(np.zeros((3, 8), int), 5, 4, tmp_path), bytes_and_time(units, KERNELS), dict)
    with pytest.raises(InputError, match="another model's"):
        train(supernet, Run(np.zeros((8, 8), int), 5, 4, tmp_path), bytes_and_time(units[1:3], KERNELS), dict)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(("make", "masked"), [(tiny_llama, False), (tiny_bert, True)])
def test_accumulated_gradients_are_those_of_the_whole_batch(make, masked: bool) -> None:  # type: ignore[no-untyped-def]
    """Padding differs between the micro-batches, so each must count by its kept tokens. Only the policies' own kernels get a gradient."""
    model, units = make()
    supernet = moved(Supernet(model, units, KERNELS, rank=4))
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 48, (8, 10)))
    mask = torch.ones_like(ids)
    mask[:4, 4:] = 0
    batch = Batch(ids, mask if masked else None)
    policies = [supernet.policy("w2g32"), supernet.policy("w4g32")]
    gradients = []
    for size in (0, 3):
        for parameter in supernet.parameters.values():
            parameter.grad = None
        visits = step_gradients(supernet, policies, batch, Interference(units, policies), Settings(micro_batch=size), Team("cpu"))
        gradients.append({name: tensor.grad for name, tensor in supernet.parameters.items() if tensor.grad is not None})
        if not masked:  # of windows with padding the scorer takes the mean over windows, training that over tokens
            scored = scorer(supernet, ids.numpy())(policies[0])
            assert float(visits[0].distance) == pytest.approx(scored, rel=1e-4)
    assert {name.split("/")[0] for name in gradients[0]} == {"w2g32", "w4g32"}
    for name, gradient in gradients[0].items():
        assert torch.allclose(gradient, gradients[1][name], rtol=1e-3, atol=1e-3 * float(gradient.abs().max())), name


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_windows_that_are_scored_together_count_as_alone() -> None:
    """A kernel that quantises its input per tensor sees one window at a time, as on a device: together, the widest would set the range."""
    model, units = tiny_llama()
    supernet = moved(Supernet(model.cuda(), units, (*KERNELS, "w8a8"), rank=4))
    windows = np.random.default_rng(0).integers(0, 48, (6, 10))
    for name in ("w2g32", "w8a8"):
        policy = supernet.policy(name)
        alone = np.mean([scorer(supernet, windows[place : place + 1])(policy) for place in range(6)])
        assert scorer(supernet, windows)(policy) == pytest.approx(alone, rel=1e-4), name


def test_a_dedicated_run_trains_its_policy_and_nothing_else(tmp_path: Path) -> None:
    model, units = tiny_llama()
    supernet, untouched = (Supernet(model, units, KERNELS, rank=4) for _ in range(2))
    windows = np.random.default_rng(0).integers(0, 48, (16, 10))
    policy = supernet.policy("w2g32")
    adapt(supernet, Run(windows, 20, 8, tmp_path, settings=replace(QUICK, lr=1e-2)), [policy])
    score = scorer(supernet, windows), scorer(untouched, windows)
    assert score[0](policy) < 0.9 * score[1](policy)
    changed = {
        name.split("/")[0] for name, value in supernet.parameters.items() if not torch.equal(value, untouched.parameters[name])
    }
    assert changed == {"w2g32"}


def test_an_embeddings_row_moves_only_in_steps_that_use_it(tmp_path: Path) -> None:
    """Every window has a token of its own, seen once: its row moves by one step of Adam, which is at most the learning rate here, and not
    for as long as Adam remembers. A token of no window stays."""
    model, units = random_model("bert"), (Unit("words", "Gather", HIDDEN, VOCABULARY, "embedding", (WORDS,), "", ""),)
    windows = np.stack([[place, *range(1, 8)] for place in range(100, 124)])
    supernet = Supernet(model, units, ("w4g32",), rank=4)
    settings = replace(QUICK, average=0, meta_every=0, last_lr=1.0, warm_up=1)
    adapt(supernet, Run(windows, 24, 1, tmp_path, settings=settings), [supernet.policy("w4g32")])
    moved = supernet.parameters[f"w4g32/{WORDS}/B"].detach().abs().amax(1)
    assert float(moved[100:124].min()) > 0
    assert float(moved[100:124].max()) <= 1.01 * settings.lr
    assert float(moved[1:8].min()) > 2 * settings.lr  # in every window
    assert float(moved[200:].max()) == 0


def test_hidden_states_that_count_come_nearer_to_the_teachers(tmp_path: Path) -> None:
    model, units = tiny_llama()
    ids = np.random.default_rng(0).integers(0, 48, (16, 10))
    errors = []
    for weight in (0.0, 30.0):
        supernet = Supernet(model, units, KERNELS, rank=4)
        policy, settings = supernet.policy("w2g32"), replace(QUICK, lr=1e-2, hidden_weight=weight)
        adapt(supernet, Run(ids, 20, 8, tmp_path / str(weight), settings=settings), [policy])
        windows = torch.from_numpy(ids)
        with torch.no_grad():
            pairs = zip(
                supernet.trace(policy, windows, hidden=True).hidden,
                supernet.teacher_trace(windows, hidden=True).hidden,
                strict=True,
            )
            errors.append(sum(float((ours - theirs).square().sum() / theirs.square().sum()) for ours, theirs in pairs))
    assert errors[1] < 0.9 * errors[0]


def test_the_average_of_one_step_is_nine_parts_of_it_and_one_of_the_start(tmp_path: Path) -> None:
    model, units = tiny_llama()
    nets = [Supernet(model, units, KERNELS, rank=4) for _ in range(3)]
    windows = np.random.default_rng(0).integers(0, 48, (16, 10))
    for net, average in zip(nets[:2], (0, 9), strict=True):
        adapt(net, Run(windows, 1, 8, tmp_path / str(average), settings=replace(QUICK, average=average)), [net.policy("w2g32")])
    last, averaged, start = (net.parameters["w2g32/model.embed_tokens/low"] for net in nets)
    assert not torch.equal(last, start)
    torch.testing.assert_close(averaged, 0.1 * start + 0.9 * last)


def test_a_checkpoint_of_another_start_is_not_continued(tmp_path: Path) -> None:
    model, units = tiny_llama()
    windows = np.random.default_rng(0).integers(0, 48, (16, 10))
    moments = input_moments(model, units, torch.from_numpy(windows))
    policy = [Supernet(model, units, KERNELS, rank=4).policy("w2g32")]
    for start in (None, moments, moments):
        found = adapt(Supernet(model, units, KERNELS, rank=4, moments=start), Run(windows, 2, 8, tmp_path, settings=QUICK), policy)
    assert found.resumed_from == 2  # the third finds the second's
    again = adapt(Supernet(model, units, KERNELS, rank=4), Run(windows, 2, 8, tmp_path, settings=QUICK), policy)
    assert again.resumed_from == 0


TEAM_SCRIPT = """
import sys; sys.path[:0] = {paths!r}
import torch; torch.set_num_threads(1)
from pathlib import Path
import numpy as np, test_train as t
from toolchain.train.team import Team
from toolchain.train.loop import Run, train
team = Team("cpu")
model, units = t.tiny_llama()
net = t.Supernet(model, units, t.KERNELS, rank=4)
table = dict(fp32=0.0, w8g32=0.01, w4g32=0.1, w3g32=0.3, w2g32=2.0)
losses = lambda: team.agree(lambda: {{u.name: {{k: table[k] for k in net.kernels[u.name]}} for u in units}})
windows = np.random.default_rng(0).integers(0, 48, (16, 10))
done = train(net, Run(windows, 6, 4, Path({out!r}), settings=t.QUICK, team=team), t.bytes_and_time(units, t.KERNELS), losses)
if team.main:
    network = {{"meta:" + name: value.detach() for name, value in done.meta_network.named_parameters()}}
    np.savez({out!r} + "/result.npz", size=team.size, **net.arrays(), **network)
"""


@pytest.mark.slow
def test_two_processes_train_what_one_does(tmp_path: Path) -> None:
    """Through torch's launcher and accelerate: the same adapters and the same meta-network, but for the order of sums."""
    results = {}
    for size in (1, 2):
        out = tmp_path / str(size)
        out.mkdir()
        paths = [str(Path(__file__).parent), str(Path(__file__).parents[1])]
        (tmp_path / "script.py").write_text(TEAM_SCRIPT.format(paths=paths, out=str(out)))
        launch = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(size)]
        subprocess.run([*launch, str(tmp_path / "script.py")], check=True, capture_output=True, timeout=300)
        results[size] = np.load(out / "result.npz")
    assert int(results[2]["size"]) == 2
    for name in results[1].files:
        if name != "size":
            assert np.allclose(results[1][name], results[2][name], atol=2e-4), name


def bert_layers() -> tuple[torch.nn.Module, tuple[Unit, ...]]:
    """Without the embedding: its rows are rounded best one by one, which the search for bounds has done before any training."""
    model, units = tiny_bert()
    return model, units[1:]


def test_an_encoder_learns_on_hidden_states_with_masks(tmp_path: Path) -> None:
    """A random tiny BERT at 2 bits comes nearer to its full-precision self, on tokens it was not trained on; padding does not count."""
    ids = np.random.default_rng(3).integers(0, 48, (8, 10))
    masks = np.ones_like(ids)
    masks[:, 7:] = 0
    model, units = bert_layers()
    untrained = Supernet(model, units, KERNELS, rank=4)
    trained, _ = run(tmp_path, steps=60, make=bert_layers, kind_masks=True)
    assert trained.kind == "encoder"
    policy = trained.policy("w2g32")
    before, after = (scorer(net, ids, masks)(policy) for net in (untrained, trained))
    assert after < 0.85 * before, (before, after)
    padded = ids.copy()
    padded[:, 7:] = 1
    assert scorer(trained, padded, masks)(policy) == pytest.approx(after, rel=1e-3)


def pocket_units() -> tuple[Unit, ...]:
    names = [("embed_tokens", "Gather", 256, 4096, "embedding", ("model.embed_tokens",), "lm_head")]
    for layer in range(6):
        stem = f"model.layers.{layer}."
        parts = {
            "qkv": (256, 512, tuple(f"{stem}self_attn.{x}_proj" for x in "qkv")),
            "o": (256, 256, (f"{stem}self_attn.o_proj",)),
        }
        parts |= {x: (256, 768, (f"{stem}mlp.{x}_proj",)) for x in ("gate", "up")} | {"down": (768, 256, (f"{stem}mlp.down_proj",))}
        names += [(f"layers.{layer}.{name}", "MatMul", K, N, "linear", modules, "") for name, (K, N, modules) in parts.items()]
    names.append(("lm_head", "MatMul", 256, 4096, "head", ("lm_head",), "embed_tokens"))
    return tuple(Unit(n, op, K, N, role, modules, tied_to=tied) for n, op, K, N, role, modules, tied in names)


def test_the_pocket_model_writes_text_it_finds_likely_and_learns_two_bits_from_it(tmp_path: Path) -> None:
    """End to end on the embedded model: self-written windows, sensitivities, a few steps; 2 bits must get clearly better."""
    model = load_model(POCKET)
    windows = self_written(model, 24 * 48, seed=1, eos=0, length=48)
    assert windows.shape == (24, 48)
    assert np.array_equal(windows[:, :4], self_written(model, 24 * 4, seed=1, eos=0, length=4))
    with torch.no_grad():
        logits = model(input_ids=torch.as_tensor(windows)).logits[:, :-1]
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), torch.as_tensor(windows)[:, 1:].flatten())
    assert float(loss) < 4.5  # uniform would be 8.3
    units = pocket_units()
    kernels = ("w8g32", "w2g32")
    supernet = Supernet(model, units, kernels, rank=8)
    score = scorer(supernet, windows[:4])
    some = (units[0], units[5])
    losses = measure(score, some, {unit.name: kernels for unit in some}, supernet.policy("w8g32"))
    assert losses["embed_tokens"]["w2g32"] > losses["embed_tokens"]["w8g32"] == 0
    before = score(supernet.policy("w2g32"))
    values = {unit.name: {"w8g32": 0.0, "w2g32": 1.0} for unit in units}
    quick = replace(QUICK, checkpoint_seconds=60.0, warm_up=2, lr=5e-3)
    run = Run(windows[4:], 10, 4, tmp_path, settings=quick)
    trained = train(supernet, run, bytes_and_time(units, kernels), lambda: values)
    assert {"0", "1", "excess", "imitation"} <= set(trained.history[2])
    assert score(supernet.policy("w2g32")) < 0.8 * before
    assert score(supernet.policy("w8g32")) < 0.02
    assert isinstance(trained.meta_network.policy(trained.meta_network(torch.ones(4))), Policy)
    assert set(CATALOGUE) >= set(kernels)
