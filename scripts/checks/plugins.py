"""Compilers for accelerators that are not here, in a folder beside the environment.

They stay out of the environment itself, where jax would look for their devices at every start.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys

# The assembler tells registers and spills; the disassembler, what is in a loop.
_TOOLS = {"ptxas": "nvidia-cuda-nvcc", "nvdisasm": "nvidia-cuda-nvdisasm"}


def folder() -> pathlib.Path:
  """Where they are, for this version of Python."""
  version = f"{sys.version_info[0]}.{sys.version_info[1]}"
  return pathlib.Path(__file__).parents[2] / ".venv" / f"devices-{version}"


def requirements() -> list[str]:
  """What pip is asked for: libtpu as jax's extra pins it, the plugin for CUDA as old as jax."""
  jax = importlib.metadata.version("jax")
  (libtpu,) = re.findall(
    r"libtpu\S*(?=;.*tpu)", "\n".join(importlib.metadata.requires("jax") or ())
  )
  return [libtpu, f"jax-cuda13-plugin=={jax}", f"jax-cuda13-pjrt=={jax}"]


def install() -> pathlib.Path:
  """The folder, filled; NVIDIA's tools are in it where they were nowhere.

  Raises:
    RuntimeError: with what pip said, when it cannot install them.
  """
  home, wanted = folder(), requirements()
  stamp = home / ".installed"
  if not stamp.exists() or stamp.read_text().split() != wanted:
    shutil.rmtree(home, ignore_errors=True)
    _pip("--target", str(home), *wanted)
    stamp.write_text("\n".join(wanted))
  for name, package in _TOOLS.items():
    if tool(name) is None:
      _pip("--target", str(home / package), package)
  return home


def tool(name: str) -> str | None:
  """One of NVIDIA's: on PATH, in CUDA's folder, or of its wheels."""
  places = [*map(pathlib.Path, sys.path), folder() / _TOOLS[name]]
  wheels = (path for each in places for path in each.glob(f"nvidia/*/bin/{name}"))
  found = (shutil.which(name), shutil.which(f"/usr/local/cuda/bin/{name}"), next(wheels, None))
  return next((str(path) for path in found if path), None)


def versions() -> dict[str, str]:
  """Of what compiles, by name."""
  found = {
    each.name: each.version for each in importlib.metadata.distributions(path=[str(folder())])
  }
  said = subprocess.run([tool("ptxas") or "true", "--version"], capture_output=True, text=True)
  release = re.search(r"release ([\d.]+)", said.stdout)
  return found | ({"ptxas": release[1]} if release else {})


def _pip(*arguments: str) -> None:
  command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"pip cannot install {' '.join(arguments)}: {done.stderr.strip()}")
