"""A run killed at random moments and begun again each time ends as one that was left alone.

Every life of the run is a process of its own. They are forked from one that has imported
everything and computed nothing, which spares each its imports.
"""

import json
import os
import pathlib
import random
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

KILLS, STEPS = 6, 80
ALIVE_OR_NOT = os.WEXITED | os.WNOHANG | os.WNOWAIT


@pytest.mark.slow
def test_killed_again_and_again_it_ends_bit_identical(tmp_path):
  text = tmp_path / "text"
  text.mkdir()
  draw = np.random.default_rng(0)
  for i in range(60):
    (text / f"{i}.txt").write_text(" ".join(draw.choice(["one", "two", "three", "four"], 60)))
  root = pathlib.Path(__file__).parents[3]
  environment = {**os.environ, "JAX_COMPILATION_CACHE_DIR": str(tmp_path / "compiled")}
  environment |= {"JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "PYTHONPATH": str(root)}
  environment |= {"XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
  command = [sys.executable, __file__, str(tmp_path)]
  subprocess.run(command, env=environment, check=True, timeout=900, cwd=root)
  killed = json.loads((tmp_path / "killed.json").read_text())
  assert len(killed["moments"]) == KILLS
  # The kills did hit training: they lie at many different steps, between the first and the last.
  assert len(set(killed["moments"])) >= KILLS // 2
  read = lambda name: (tmp_path / name / "metrics.jsonl").read_bytes()
  assert read("whole") == read("killed")
  whole, again = (np.load(tmp_path / f"{name}.npz") for name in ("whole", "killed"))
  assert whole.files == again.files and len(whole.files) > 20
  for name in whole.files:
    assert whole[name].tobytes() == again[name].tobytes(), name


def _config(text: pathlib.Path):
  from experiments.train import pretrain

  return pretrain.Config(
    text=f"path:{text}", tokenizer="byte", width=16, heads=2, kv_heads=1, hidden=16, depth=2,
    length=16, batch=4, steps=STEPS, warmup=5, checkpoint_every=7, evaluate_every=50,
    evaluate_rows=4, microbatches=2,
  )  # fmt: skip


def _life(folder: pathlib.Path, name: str) -> int:
  """A process that runs the experiment and exits, as a command would."""
  sys.stdout.flush()
  child = os.fork()
  if child:
    return child
  from experiments.train import pretrain

  os.setpgrp()
  pretrain.run(_config(folder / "text"), str(folder / name))
  os._exit(0)


def _lines(path: pathlib.Path) -> int:
  return path.read_bytes().count(b"\n") if path.exists() else 0


def _killed_life(folder: pathlib.Path, chance: random.Random, number: int) -> int:
  """Kills life `number` at a random moment, of each five one before it trains; rows it leaves."""
  metrics = folder / "killed" / "metrics.jsonl"
  child = _life(folder, "killed")
  if number % 5 == 0:
    time.sleep(chance.uniform(0.0, 2.0))
  else:
    rows = STEPS * (number + chance.random()) / (KILLS + 1)
    while _lines(metrics) < rows and not os.waitid(os.P_PID, child, ALIVE_OR_NOT):
      time.sleep(0.002)
    time.sleep(chance.uniform(0.0, 0.1))
  os.kill(child, signal.SIGKILL)
  _, status = os.waitpid(child, 0)
  assert os.WIFSIGNALED(status), f"life {number} ended by itself with {status}"
  return _lines(metrics)


def _finish(folder: pathlib.Path, name: str) -> None:
  _, status = os.waitpid(_life(folder, name), 0)
  assert status == 0, f"{name} ended with {status}"


def _save(folder: pathlib.Path, name: str) -> None:
  import jax
  from orbax.checkpoint import v1

  path = folder / name / "checkpoints" / str(_config(folder).steps)
  state = v1.load_checkpointables(path)["state"]
  leaves = jax.tree_util.tree_leaves_with_path(state)
  arrays = {jax.tree_util.keystr(path): np.asarray(x) for path, x in leaves}
  np.savez(folder / f"{name}.npz", **arrays)


def main(folder: pathlib.Path) -> None:
  import experiments.train.pretrain  # noqa: F401  (before the first fork)

  chance = random.Random(0)
  _finish(folder, "whole")
  moments = [_killed_life(folder, chance, i) for i in range(KILLS)]
  _finish(folder, "killed")
  (folder / "killed.json").write_text(json.dumps({"moments": moments}))
  for name in ("whole", "killed"):
    _save(folder, name)


if __name__ == "__main__":
  main(pathlib.Path(sys.argv[1]))
