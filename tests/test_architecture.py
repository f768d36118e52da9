import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).parent.parent
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
DEVICE_SIDE = next(c for c in PROJECT["tool"]["importlinter"]["contracts"] if c["id"] == "device")["source_modules"]
TORCH = ["torch", "transformers", "peft", "accelerate", "optimum"]
TRAINING_STACK = [*TORCH, "onnx", "onnx_ir", "onnxscript", "onnxruntime_genai", "safetensors", "scipy", "sklearn", "tokenizers"]


def test_the_arrows_between_rooms_point_one_way():
    command = [str(Path(sys.executable).with_name("lint-imports")), "--config", str(ROOT / "pyproject.toml"), "--no-cache"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


def _without(names, code):
    blocked = f"import importlib, pkgutil, sys\nfor name in {names}: sys.modules[name] = None\n"
    return subprocess.run([sys.executable, "-c", blocked + code], cwd=ROOT, capture_output=True, text=True)


def test_what_runs_on_a_device_imports_without_the_training_stack():
    modules = [*DEVICE_SIDE, "toolchain.profiler.agent", "toolchain.commands.acceptance"]
    done = _without(TRAINING_STACK, f"for name in {modules}: importlib.import_module(name)")
    assert done.returncode == 0, done.stderr


def test_every_module_of_the_device_rooms_imports_without_torch():
    code = f"""
for name in {DEVICE_SIDE}:
    room = importlib.import_module(name)
    for _, inner, _ in pkgutil.walk_packages(getattr(room, "__path__", []), name + "."):
        importlib.import_module(inner)
"""
    done = _without(TORCH, code)
    assert done.returncode == 0, done.stderr


def test_the_command_starts_without_loading_what_only_some_commands_need():
    done = _without(TRAINING_STACK, "import toolchain.cli\nprint({'onnxruntime', 'numpy', 'yaml'} & {*sys.modules})")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "set()"


def test_a_device_lists_devices_and_checks_its_arguments_without_the_training_stack():
    done = _without(TRAINING_STACK, "from toolchain.cli import main\nsys.exit(main(['devices', '--device', 'local', '--json']))")
    assert done.returncode == 0, done.stderr
    assert '"local"' in done.stdout


def test_what_is_missing_is_one_line_with_the_command_that_installs_it(tmp_path):
    words = [
        "train",
        "pocket-llama-6m",
        "--device",
        "local",
        "--profiles",
        str(tmp_path / "profiles"),
        "--out",
        str(tmp_path / "out"),
    ]
    done = _without(TRAINING_STACK, f"from toolchain.cli import main\nsys.exit(main({words}))")
    assert done.returncode == 2
    assert "pip install 'bittailor[train]'" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_every_module_says_what_it_owns():
    silent = [str(path) for path in sorted((ROOT / "toolchain").rglob("*.py")) if not path.read_text().startswith('"""')]
    assert silent == []


def test_the_checkout_is_what_is_tested():
    import toolchain

    assert Path(toolchain.__file__).is_relative_to(ROOT)
