"""What importing costs: `import accelerate` and `accelerate --help` load neither torch nor numpy nor yaml."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from accelerate.commands.accelerate_cli import COMMANDS

from .source import modules

HEAVY = ("torch", "numpy", "yaml", "huggingface_hub", "safetensors", "questionary", "prompt_toolkit", "shtab")


def loaded_after(code: str, blocked: tuple[str, ...] = ()) -> set[str]:
    """Return the modules a fresh interpreter has loaded after `code`."""
    program = f"""
import contextlib, io, json, sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {blocked!r}:
            raise ImportError(name + " is blocked")
sys.meta_path.insert(0, Block())
with contextlib.redirect_stdout(io.StringIO()):
    try:
{chr(10).join("        " + line for line in code.splitlines())}
    except SystemExit as error:
        assert not error.code, error.code
print(json.dumps(sorted(sys.modules)))
"""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", program],
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr
    return set(json.loads(done.stdout.splitlines()[-1]))


def test_importing_the_package_loads_nothing_heavy():
    assert loaded_after("import accelerate").isdisjoint(HEAVY)


def test_the_check_sees_what_is_loaded():
    assert "yaml" in loaded_after("import yaml")


def test_the_package_can_be_imported_without_torch():
    loaded_after(
        "import accelerate; accelerate.__version__; dir(accelerate); accelerate.DistributedType.NO", ("torch",)
    )
    with pytest.raises(AssertionError, match="torch is blocked"):
        loaded_after("import accelerate; accelerate.Accelerator", ("torch",))


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        *([name, "--help"] for name in COMMANDS),
        *(["checkpoint", name, "--help"] for name in ("inspect", "verify", "convert")),
        *(["config", name, "--help"] for name in ("default", "update")),
    ],
)
def test_help_loads_nothing_heavy(words):
    code = f"sys.argv = {['accelerate', *words]!r}\nfrom accelerate.commands.accelerate_cli import main\nmain()"
    assert loaded_after(code).isdisjoint(HEAVY)


def test_help_of_launch_loads_its_parser_and_not_what_it_starts():
    """The launcher's modules and those that they need of Python take as long as Python itself."""
    code = "sys.argv = ['accelerate', 'launch', '--help']\nfrom accelerate.commands.accelerate_cli import main\nmain()"
    loaded = loaded_after(code)
    assert "accelerate.commands.options" in loaded
    assert {name for name in loaded if name.startswith(("accelerate.launch", "importlib.metadata"))} == set()


def light_modules() -> list[str]:
    names = [source.name for source in modules()]
    light = ("core", "settings", "commands")
    return [name for name in names if name.partition(".")[0] in light or name in ("launch.request", "launch.plan")]


def test_the_low_layers_load_no_torch():
    assert len(light_modules()) > 25
    code = "\n".join(f"import accelerate.{name}" for name in light_modules())
    assert "torch" not in loaded_after(code, blocked=("torch",))
