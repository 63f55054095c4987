"""A plain install, without the development tools, is complete; the main job of README.md runs from it."""
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
PACKAGE = ROOT / "dit_nb"
SOURCES = ["setup.py", "settings.ini", "pyproject.toml", "MANIFEST.in", "README.md", "LICENSE"]


@pytest.fixture(scope="module")
def installed(tmp_path_factory):
    "A folder that holds what `pip install .` installs of this project itself."
    source, target = tmp_path_factory.mktemp("source"), tmp_path_factory.mktemp("site")
    for name in SOURCES: shutil.copy(ROOT / name, source)
    shutil.copytree(PACKAGE, source / PACKAGE.name, ignore=shutil.ignore_patterns("__pycache__"))
    pip = [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--no-build-isolation", "--no-input"]
    done = subprocess.run([*pip, "--target", target, source], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return target


def python(installed, *args, **kwargs):
    "Runs this Python with the installed package first on its path."
    return subprocess.run([sys.executable, *args], env=os.environ | {"PYTHONPATH": str(installed)},
                          capture_output=True, text=True, **kwargs)


def modules(folder): return {path.relative_to(folder).as_posix() for path in folder.rglob("*.py")}


def test_install_holds_every_module(installed):
    assert modules(installed / PACKAGE.name) == modules(PACKAGE)


def test_import_needs_no_development_tool(installed, tmp_path):
    code = "import sys; sys.modules.update(nbdev=None, fastcore=None, execnb=None); import dit_nb; print(dit_nb.__file__)"
    done = python(installed, "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(installed), "the import came from elsewhere"


@pytest.mark.skipif(not (PACKAGE / "__main__.py").exists(), reason="dit_nb/__main__.py does not exist yet")
def test_main_job(installed, tmp_path):
    done = python(installed, "-m", "dit_nb", "--out", tmp_path / "out", cwd=tmp_path, timeout=600)
    assert done.returncode == 0, done.stderr
    assert any((tmp_path / "out").iterdir()), "python -m dit_nb wrote nothing into its output folder"
    assert [path.name for path in tmp_path.iterdir()] == ["out"], "it wrote outside its output folder"
