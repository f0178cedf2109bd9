"""Compilers for accelerators that are not here, in a folder beside the environment.

They stay out of the environment itself, where jax would look for their devices at every start.
"""

import importlib.metadata
import pathlib
import re
import shutil
import subprocess
import sys


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
  """The folder, filled; NVIDIA's assembler is in it where there was none.

  Raises:
    RuntimeError: with what pip said, when it cannot install them.
  """
  home, wanted = folder(), requirements()
  stamp = home / ".installed"
  if stamp.exists() and stamp.read_text().split() == wanted:
    return home
  shutil.rmtree(home, ignore_errors=True)
  assembler = [] if ptxas() else ["nvidia-cuda-nvcc"]
  _pip("--target", str(home), *wanted, *assembler)
  stamp.write_text("\n".join(wanted))
  return home


def ptxas() -> str | None:
  """The assembler that tells registers: on PATH, in CUDA's folder, or of NVIDIA's wheels."""
  places = [*sys.path, str(folder())]
  wheels = (path for each in places for path in pathlib.Path(each).glob("nvidia/*/bin/ptxas"))
  found = (shutil.which("ptxas"), shutil.which("/usr/local/cuda/bin/ptxas"), next(wheels, None))
  return next((str(path) for path in found if path), None)


def _pip(*arguments: str) -> None:
  command = [sys.executable, "-m", "pip", "install", "-qq", "--no-deps", *arguments]
  done = subprocess.run(command, capture_output=True, text=True)
  if done.returncode:
    raise RuntimeError(f"pip cannot install {' '.join(arguments)}: {done.stderr.strip()}")
