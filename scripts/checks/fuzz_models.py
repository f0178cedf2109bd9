"""Random damage to checkpoints: each is refused with its file named, or computed with rightly.

    scripts/fuzz_models --cases 400

Tiny checkpoints of every family, in one file, in shards and as GGUF, with tokenizers, get another
value of a field, other bytes, a wrong header, missing files, links and paths out of the folder.
Loading then ends in a ValueError or FileNotFoundError that names the file; or in a model whose
logits, and a tokenizer whose ids, are those of the undamaged files or of transformers on the same
files. No file outside the folder is opened. Ends with a line of JSON, and with status 1 if a case
failed; a case is drawn again by `--seed N --cases 1`.
"""

import contextlib
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from absl import app, flags
from tqdm import tqdm

from effjax import models
from scripts.checks import model_damage

CASES = flags.DEFINE_integer("cases", 100, "Cases.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "Of the first case; the next ones count up.")
TOKENS = np.random.default_rng(0).integers(3, 200, (2, 24)).astype(np.int32)
TEXTS = ("hello  hell</s>o", " é x", "")
TOLERANCE = 1e-4
SECONDS = 30.0
LARGEST = 1e3
# Where Python, its packages and this repository lie, and what tells of the machine.
PROGRAM = (
  *{sys.prefix, sys.base_prefix, str(Path(__file__).resolve().parents[2])},
  *("/proc", "/sys", "/dev", "/usr/lib"),
)
CLEAN = (ValueError, FileNotFoundError)
_opened: list[str] = []
_watching = False


def _hook(event: str, arguments: tuple) -> None:
  if _watching and event == "open" and isinstance(arguments[0], str | bytes):
    _opened.append(str(arguments[0]))


@contextlib.contextmanager
def watched() -> Iterator[list[str]]:
  """The names of all files that are opened meanwhile."""
  global _watching
  _opened.clear()
  _watching = True
  try:
    yield _opened
  finally:
    _watching = False


def seen(model: models.Model) -> dict[str, Any]:
  """What a model computes, and what its tokenizer makes of texts."""
  ids = None if model.tokenizer is None else [model.tokenizer.encode(text) for text in TEXTS]
  return {"logits": np.asarray(model(TOKENS[:, : model.config.context])), "ids": ids}


def of_transformers(path: Path, model: models.Model) -> dict[str, Any]:
  """The same by transformers, of what it can read; nothing where it cannot."""
  import torch
  import transformers

  found: dict[str, Any] = {}
  folder, file = (path.parent, path.name) if path.is_file() else (path, None)
  options = {} if file is None else {"gguf_file": file}
  kind = transformers.AutoModel if model.config.head is None else transformers.AutoModelForCausalLM
  with contextlib.suppress(Exception), torch.no_grad():
    theirs = kind.from_pretrained(folder, dtype=torch.float32, **options).eval()
    out = theirs(torch.tensor(TOKENS[:, : model.config.context]).long())
    found["logits"] = (out.logits if hasattr(out, "logits") else out.last_hidden_state).numpy()
  with contextlib.suppress(Exception):
    theirs = transformers.AutoTokenizer.from_pretrained(folder, **options)
    found["ids"] = [theirs(text)["input_ids"] for text in TEXTS]
  return found


def fault(path: Path, undamaged: dict[str, Any]) -> tuple[str, str | None]:
  """How loading ended, and what is wrong with that, None if nothing is."""
  start = time.monotonic()
  try:
    with watched() as opened:
      model = models.load(path)
  except CLEAN as error:
    named = str(path) in str(error)
    ended, wrong = "refused", None if named else f"does not name the file: {error}"
  except Exception as error:
    ended, wrong = "failed", f"{type(error).__name__}: {error}"
  else:
    ended, wrong = "loaded", _difference(path, model, undamaged)
  allowed = (path if path.is_dir() else path.parent, *PROGRAM)
  strange = [name for name in opened if not any(Path(name).is_relative_to(at) for at in allowed)]
  if strange:
    wrong = f"opened {strange[0]}"
  if time.monotonic() - start > SECONDS:
    wrong = f"took {time.monotonic() - start:.0f} s"
  return ended, wrong


def _difference(path: Path, model: models.Model, undamaged: dict[str, Any]) -> str | None:
  """What the model computes otherwise than the undamaged one and than transformers."""
  try:
    ours = seen(model)
  except Exception as error:
    return f"loads, and then {type(error).__name__}: {error}"
  wrong = [name for name in ours if not _same(ours[name], undamaged[name])]
  if model.tokenizer is None:  # there are no files of one
    wrong = [name for name in wrong if name != "ids"]
  if not wrong:
    return None
  # With a weight of 1e30 the last digit of a sum decides.
  if max(float(np.abs(leaf).max()) for leaf in jax.tree.leaves(model.params)) > LARGEST:
    wrong = [name for name in wrong if name != "logits"]
  theirs = of_transformers(path, model)
  still = [name for name in wrong if not _same(ours[name], theirs.get(name))]
  return (
    f"other {' and '.join(still)}, transformers: {', '.join(theirs) or 'none'}" if still else None
  )


def _same(ours: Any, theirs: Any) -> bool:
  if not (isinstance(ours, np.ndarray) and isinstance(theirs, np.ndarray)):
    return type(ours) is type(theirs) and ours == theirs
  return ours.shape == theirs.shape and float(np.abs(ours - theirs).max()) <= TOLERANCE


def fuzz(cases: int, seed: int, root: Path) -> tuple[dict[str, int], list[str]]:
  """How often loading ended how, and a line for each failure."""
  bases = model_damage.bases(root / "bases")
  undamaged = {name: seen(models.load(path)) for name, path in bases.items()}
  (root / "cases").mkdir()
  shutil.copy(bases["llama"] / "model.safetensors", root / "cases" / "secret.safetensors")
  counts, failures = {"refused": 0, "loaded": 0, "failed": 0}, []
  for number in tqdm(range(seed, seed + cases), unit="case"):
    rng = np.random.default_rng(number)
    name = list(bases)[rng.integers(len(bases))]
    folder = bases[name] if bases[name].is_dir() else bases[name].parent
    copy = root / "cases" / f"{number}"
    shutil.copytree(folder, copy)
    path = copy if bases[name].is_dir() else copy / bases[name].name
    what = model_damage.damaged(rng, path)
    ended, wrong = fault(path, undamaged[name])
    counts[ended] += 1
    if wrong is not None:
      failures.append(f"seed {number}, {name}, {what}: {wrong}")
    shutil.rmtree(copy)
  return counts, failures


def main(_):
  sys.addaudithook(_hook)
  with tempfile.TemporaryDirectory() as root:
    counts, failures = fuzz(CASES.value, SEED.value, Path(root).resolve())
  print(*failures, sep="\n")
  print(json.dumps({"cases": CASES.value, "failures": len(failures), **counts}))
  sys.exit(bool(failures))


if __name__ == "__main__":
  app.run(main)
