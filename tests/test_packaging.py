"""What is shipped: a pure-Python package of light dependencies that imports lightly."""

import re
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import fastchgnet

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def name_of(requirement: str) -> str:
    return re.match(r"[\w.-]+", requirement).group().lower().replace("_", "-")


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert fastchgnet.__version__ == PROJECT["version"] == citation["version"]


def test_copy_that_is_not_installed_can_be_imported():
    command = [
        sys.executable,
        "-S",
        "-c",
        "import fastchgnet; print(fastchgnet.__version__)",
    ]  # -S: no packages
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == PROJECT["version"]


def test_hard_dependencies_are_light():
    heavy = {
        "lightning",
        "pytorch-lightning",
        "torch-geometric",
        "dgl",
        "e3nn",
        "pymatgen",
        "chgnet",
        "triton",
    }
    assert not heavy & set(map(name_of, PROJECT["dependencies"]))


def test_constraints_hold_every_dependency():
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pinned = {name_of(line) for line in lines if "==" in line}
    extras = PROJECT["optional-dependencies"]
    wanted = [*PROJECT["dependencies"], *extras["plot"], *extras["test"]]
    assert {name_of(requirement) for requirement in wanted} - {"fastchgnet"} <= pinned
    assert "torch==2.13.0" in lines


def test_import_brings_no_optional_package():
    code = "import sys, fastchgnet; print(*{'matplotlib', 'pymatgen', 'triton', 'chgnet'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == []


@pytest.mark.slow
def test_wheel_serves_every_platform_and_holds_the_package_only(tmp_path):
    build = [sys.executable, "-m", "build", "--wheel", "--outdir", tmp_path, ROOT]
    subprocess.run(build, capture_output=True, check=True)
    (wheel,) = tmp_path.glob("*.whl")
    assert wheel.name == f"fastchgnet-{PROJECT['version']}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    assert {name.split("/")[0] for name in names} == {
        "fastchgnet",
        f"fastchgnet-{PROJECT['version']}.dist-info",
    }
    packaged = {name for name in names if name.startswith("fastchgnet/")}
    # C++ travels as source, and is compiled where it runs
    assert {Path(name).suffix for name in packaged} == {".py", ".typed", ".cpp", ".h"}
    sources = (path.relative_to(ROOT) for path in (ROOT / "fastchgnet" / "ops" / "cpu").iterdir())
    assert {str(path) for path in sources if path.suffix in (".py", ".cpp", ".h")} <= packaged
