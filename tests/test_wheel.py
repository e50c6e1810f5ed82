"""The wheel, built from the sdist and installed alone: every module imports and every data file is in it."""

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = sorted(
    path.relative_to(ROOT)
    for path in (ROOT / "prune_peak").rglob("*")
    if path.is_file() and "__pycache__" not in path.parts
)
MODULES = [".".join(path.with_suffix("").parts).removesuffix(".__init__") for path in SOURCES if path.suffix == ".py"]
DATA_FILES = {path.as_posix() for path in SOURCES if path.suffix != ".py"}

pytestmark = pytest.mark.skipif(
    not SOURCES, reason="no source tree of prune_peak beside the tests: they run on an installed wheel"
)


def run_python(arguments: list[str], folder: Path, python_path: Path | None = None) -> str:
    """Run this Python with `python_path` as the only PYTHONPATH; return stdout."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"PIP_NO_INDEX": "1", "PIP_DISABLE_PIP_VERSION_CHECK": "1"}
    if python_path is not None:
        environment["PYTHONPATH"] = str(python_path)
    done = subprocess.run([sys.executable, *arguments], cwd=folder, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The sdist, built from a copy: a build writes into its folder, and older builds must not leak into this one."""
    pytest.importorskip("setuptools", minversion="77")
    folder = tmp_path_factory.mktemp("wheel")
    shutil.copytree(ROOT / "prune_peak", folder / "source" / "prune_peak", ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder / "source")
    build = "import sys; from setuptools.build_meta import build_sdist; build_sdist(sys.argv[1])"
    run_python(["-c", build, str(folder)], folder / "source")
    [path] = folder.glob("*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(sdist: Path) -> Path:
    options = ["--quiet", "--no-deps", "--no-build-isolation"]
    run_python(["-m", "pip", "wheel", *options, "--wheel-dir", ".", sdist.name], sdist.parent)
    [path] = sdist.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel: Path) -> Path:
    """A folder with the installed wheel alone; its dependencies come from the running environment."""
    folder = wheel.parent / "installed"
    run_python(["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), wheel.name], wheel.parent)
    return folder


def test_sdist_files(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    assert {path.as_posix() for path in SOURCES} | {"LICENSE", "README.md", "pyproject.toml"} <= names


def test_wheel_files(wheel: Path) -> None:
    """The package data is complete, and the wheel holds the package and its metadata only."""
    assert wheel.name.startswith("prune_peak-")
    names = set(zipfile.ZipFile(wheel).namelist())
    metadata = {name for name in names if name.partition("/")[0].endswith(".dist-info")}
    assert {"prune_peak/py.typed", "prune_peak/export/card.md", "prune_peak/report.html"} <= DATA_FILES
    assert names - metadata == {path.as_posix() for path in SOURCES}
    assert any(name.endswith("/licenses/LICENSE") for name in metadata)


def test_imports(installed: Path, tmp_path: Path) -> None:
    """Every module of the source tree imports from the installed wheel."""
    code = "\n".join(
        [
            "import importlib, pathlib, sys",
            "for name in sys.argv[2:]:",
            "    path = pathlib.Path(importlib.import_module(name).__file__)",
            "    assert path.is_relative_to(sys.argv[1]), path",
            "    print(name)",
        ]
    )
    printed = run_python(["-W", "ignore", "-c", code, str(installed), *MODULES], tmp_path, installed)
    assert printed.split() == MODULES


def test_commands(installed: Path, tmp_path: Path) -> None:
    """`python -m prune_peak` and the script `prune-peak` run, with the version of prune_peak/version.py."""
    version = run_python(
        ["-c", "import importlib.metadata; print(importlib.metadata.version('prune-peak'))"], tmp_path, installed
    ).strip()
    assert f'__version__ = "{version}"' in (ROOT / "prune_peak" / "version.py").read_text()
    for command in (["-m", "prune_peak"], [str(installed / "bin" / "prune-peak")]):
        assert version in run_python([*command, "--version"], tmp_path, installed)
