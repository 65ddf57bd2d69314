"""The wheel holds the five packages and what they need at run time."""

import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out)]
    done = subprocess.run([*command, str(ROOT)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    with zipfile.ZipFile(next(out.glob("*.whl"))) as file:
        yield file.namelist()


def test_exactly_the_five_packages(wheel):
    tops = {name.split("/")[0] for name in wheel if ".dist-info/" not in name}
    assert tops == {"interp", "probes", "patching", "heads", "app"}


def test_weights_and_type_marks_are_in_it(wheel):
    for package in ("interp", "probes", "patching", "heads", "app"):
        assert f"{package}/py.typed" in wheel
    for name in ("needle", "induction"):
        assert f"interp/zoo/weights/{name}/model.safetensors" in wheel


def test_nothing_is_pickled(wheel):
    assert not [n for n in wheel if n.endswith((".pkl", ".pt", ".bin", ".pickle"))]


def test_shipped_weights_are_small():
    weights = (ROOT / "interp" / "zoo" / "weights").rglob("*.safetensors")
    assert sum(p.stat().st_size for p in weights) < 15e6


def test_tested_versions_are_pinned():
    pins = (ROOT / "constraints.txt").read_text().splitlines()
    names = {line.split("==")[0].lower().replace("_", "-") for line in pins if "==" in line}
    assert "torch==2.13.0" in pins
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    wanted = [*project["dependencies"], *(name for extra in extras for name in extra)]
    missing = {w.split(">")[0].lower() for w in wanted} - names
    assert not missing, f"not pinned: {sorted(missing)}"
