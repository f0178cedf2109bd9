"""Where a result comes from: its text, the versions that computed it, and the processor."""

import json
import os
import platform
import subprocess
from pathlib import Path

import jax

import effjax
from effjax.data import Corpus
from effjax.train import workdir as files
from experiments.harness import Row

PROVENANCE = "provenance.json"


def provenance(corpus: Corpus) -> Row:
  """Name and digest of the text, versions of Python, jax and effjax, and the processor."""
  return {
    "text": corpus.name,
    "text_sha256": corpus.fingerprint,
    "text_bytes": corpus.nbytes,
    "python": platform.python_version(),
    "jax": jax.__version__,
    "effjax": effjax.__version__,
    "commit": _commit(),
    "processor": processor(),
  }


def write(folder: Path, corpus: Corpus) -> Row:
  """What is in `provenance.json`, written by whoever began the folder.

  Raises:
    ValueError: when the folder was begun with another text.
  """
  path = folder / PROVENANCE
  if not path.exists():
    files.write_text(path, json.dumps(provenance(corpus), indent=2) + "\n")
  found = json.loads(path.read_text())
  if found["text_sha256"] != corpus.fingerprint:
    raise ValueError(
      f"text {corpus.name!r} has SHA-256 {corpus.fingerprint[:16]}…; allowed in {folder}: that of "
      f"its rows, {found['text_sha256'][:16]}…"
    )
  return found


def sentence(found: Row) -> str:
  """The same in one line."""
  commit = f" at {found['commit']}" if found["commit"] else ""
  return (
    f"text {found['text']} ({found['text_bytes']:,} bytes, SHA-256 {found['text_sha256'][:16]}…); "
    f"effjax {found['effjax']}{commit}, jax {found['jax']}, Python {found['python']}; "
    f"{found['processor']}"
  )


def processor() -> str:
  """The device, and its cores where it is a CPU."""
  device = jax.devices()[0]
  if device.platform != "cpu":
    return device.device_kind
  return f"{_cpu_name()}, {os.cpu_count()} cores"


def _cpu_name() -> str:
  path = Path("/proc/cpuinfo")
  lines = path.read_text().splitlines() if path.exists() else []
  names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
  return names[0] if names else platform.processor() or platform.machine()


def _commit() -> str | None:
  """The commit of the source, with a "+" where files differ from it; None outside of git."""
  here = Path(__file__).parent
  git = lambda *words: subprocess.run(["git", *words], cwd=here, capture_output=True, text=True)
  try:
    head = git("rev-parse", "--short=12", "HEAD")
    changed = git("status", "--porcelain", "--untracked-files=no")
  except FileNotFoundError:
    return None
  return head.stdout.strip() + "+" * bool(changed.stdout) if head.returncode == 0 else None
