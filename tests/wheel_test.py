"""The wheel: what is in it, and that it stands alone."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = {"effjax": ROOT / "effjax", "effjax/kernels": ROOT / "kernels"}
BUILD = "import sys; from setuptools import build_meta; build_meta.build_wheel(sys.argv[1])"
IMPORT_ALL = """
import importlib, json, pkgutil, sys
sys.path[:0] = sys.argv[1:2]
sys.path += sys.argv[2:]
import effjax
names = [module.name for module in pkgutil.walk_packages(effjax.__path__, "effjax.")]
print(json.dumps({name: importlib.import_module(name).__file__ for name in names}))
"""


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
  """A folder that the wheel of this tree was unzipped in."""
  source, made, folder = (tmp_path_factory.mktemp(name) for name in ("source", "made", "wheel"))
  for name in ("effjax", "kernels"):
    leave = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / name, source / name, symlinks=True, ignore=leave)
  for name in ("pyproject.toml", "setup.py", "requirements.txt", "README.md", "LICENSE"):
    shutil.copy(ROOT / name, source)
  command = [sys.executable, "-c", BUILD, str(made)]
  subprocess.run(command, cwd=source, check=True, capture_output=True)
  (file,) = made.glob("*.whl")
  with zipfile.ZipFile(file) as archive:
    archive.extractall(folder)
  return folder


def sources() -> dict[str, Path]:
  """The files of the library, by their names in the wheel."""
  return {
    f"{top}/{path.relative_to(folder)}": path
    for top, folder in PACKAGES.items()
    for path in folder.rglob("*.py")
  }


def test_it_holds_the_library_and_the_licence_and_nothing_else(wheel):
  files = {str(path.relative_to(wheel)): path for path in wheel.rglob("*") if path.is_file()}
  (about,) = wheel.glob("effjax-*.dist-info")
  code = {name: path for name, path in files.items() if not path.is_relative_to(about)}
  assert set(code) == set(sources())
  assert all(code[name].read_bytes() == path.read_bytes() for name, path in sources().items())
  assert (about / "licenses" / "LICENSE").read_bytes() == (ROOT / "LICENSE").read_bytes()


@pytest.mark.slow
def test_every_module_is_imported_from_it(wheel):
  """Without `site`, so that an editable installation, here or elsewhere, is not seen."""
  libraries = {sysconfig.get_path(name) for name in ("purelib", "platlib")}
  command = [sys.executable, "-I", "-S", "-c", IMPORT_ALL, str(wheel), *libraries]
  run = subprocess.run(command, check=True, capture_output=True, text=True, env=os.environ)
  found = json.loads(run.stdout.splitlines()[-1])
  assert all(Path(file).is_relative_to(wheel) for file in found.values())
  assert "effjax.kernels.flash_attention.tiled.xla" in found
  assert len(found) == len(sources()) - 1  # all but effjax itself
