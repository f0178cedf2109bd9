"""Signals, damaged files, a full disk and a second process, at random, while a model trains.

    scripts/chaos --faults 100

`pretrain`, its model an embedding and a matrix, is run again and again, each life of it under one
fault, until it has ended. Then its rows and the bits of its last checkpoint must be those of a run
that was left alone. A life that does not end must say why: that step N is saved, which it then must
be, undamaged, or an error that names the cause and, when something could not be written, the newest
good step. Nothing may show a traceback. Ends with a line of JSON, and with status 1 if anything was
otherwise.

Every life is a process of its own, forked from one that has imported everything and computed
nothing. The full disk is a limit on the size of files.
"""

import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import flax.linen as nn
from absl import app, flags
from tqdm import tqdm

from effjax.train import checkpoint
from experiments import harness
from experiments.train import pretrain

FAULTS = flags.DEFINE_integer("faults", 20, "Faults.", lower_bound=1)
SEED = flags.DEFINE_integer("seed", 0, "What is drawn follows from it.")
STEPS = 40
SIGNALS = (signal.SIGKILL, signal.SIGTERM, signal.SIGINT)
CAUSES = {
  "disk": r"(cannot write|could not be written).*File too large",
  "second": r"in use by process \d+",
  "damage": r"step \d+ is damaged: .*good ones: none",
}


class Small(nn.Module):
  """Logits of the next token from the token alone; soon traced."""

  vocab: int
  width: int = 16

  @nn.compact
  def __call__(self, tokens, *, segment_ids=None, positions=None):
    x = nn.Embed(self.vocab, self.width, name="embed")(tokens)
    return nn.Dense(self.vocab, name="head")(nn.tanh(x))


class Trial:
  """One run in one folder, through as many lives as it takes."""

  def __init__(self, root: Path, number: int):
    self.root, self.folder = root, root / str(number)

  def live(self, prepare: Callable[[], None] | None = None, folder: Path | None = None) -> int:
    """A process that runs the experiment as a command does, after `prepare` in it; its id."""
    sys.stdout.flush()
    self._output, output = os.pipe()  # which a limit on the size of files does not cut
    child = os.fork()
    if child:
      os.close(output)
      return child
    os.dup2(output, 1)
    os.dup2(output, 2)
    os._exit(_command(self.root, folder or self.folder, prepare))

  def end(self, child: int) -> tuple[int, str]:
    """Status (negative for a signal) and output of a life."""
    with os.fdopen(self._output, "rb") as output:
      said = output.read().decode(errors="replace")
    _, status = os.waitpid(child, 0)
    return os.waitstatus_to_exitcode(status), said

  @property
  def checkpoints(self) -> checkpoint.Checkpoints:
    return checkpoint.Checkpoints(self.folder / "checkpoints")

  @property
  def ended(self) -> bool:
    return (self.folder / "bits").exists()

  def result(self) -> tuple[bytes, ...]:
    return tuple((self.folder / name).read_bytes() for name in ("metrics.jsonl", "bits"))


def _command(root: Path, folder: Path, prepare: Callable[[], None] | None) -> int:
  """What `scripts/run pretrain` does, and the bits of the last checkpoint; its exit status."""
  try:
    if prepare:
      prepare()
    vars(pretrain)["Transformer"] = lambda model, **_: Small(model.vocab_size)
    flags.FLAGS.unparse_flags()
    sys.argv = ["pretrain", f"--workdir={folder}"]
    harness.main(pretrain.run, _config(root / "text"))
  except SystemExit as error:
    last = folder / "checkpoints" / str(STEPS)
    if not error.code and last.exists() and (folder / "result.csv").exists():
      (folder / "bits").write_text(_bits(last))
    return error.code if isinstance(error.code, int) else bool(error.code)
  except BaseException:
    sys.excepthook(*sys.exc_info())
    return 1
  return 0


def _bits(path: Path) -> str:
  """A digest of every array of a checkpoint."""
  import jax
  import numpy as np
  from orbax.checkpoint import v1

  leaves = jax.tree.leaves(v1.load_checkpointables(path)["state"])
  return hashlib.sha256(b"".join(np.asarray(x).tobytes() for x in leaves)).hexdigest()


def _config(text: Path) -> pretrain.Config:
  return pretrain.Config(
    text=f"path:{text}", tokenizer="byte", length=16, batch=4, steps=STEPS, warmup=5,
    checkpoint_every=4, evaluate_every=3, evaluate_rows=4,
  )  # fmt: skip


def _later(chance: random.Random, longest: float, act: Callable, *arguments) -> None:
  timer = threading.Timer(chance.uniform(0, longest), act, arguments)
  timer.daemon = True
  timer.start()


def send(trial: Trial, chance: random.Random) -> tuple[str, int]:
  """A life that gets a signal at a random moment, in a save, or in an evaluation."""
  number, moment = chance.choice(SIGNALS), chance.choice(("anywhere", "save", "evaluation"))
  count, act = chance.randint(1, 3), lambda: os.kill(os.getpid(), number)
  owner, name, longest = {
    "save": (checkpoint.v1, "save_checkpointables", 0.06),
    "evaluation": (pretrain.jax, "device_get", 0.002),
    "anywhere": (None, "", 3.0),
  }[moment]

  def prepare() -> None:
    if owner is None:
      _later(chance, longest, act)
      return
    original, calls = getattr(owner, name), []

    def called(*arguments, **options):
      calls.append(0)
      if len(calls) == count:
        _later(chance, longest, act)
      return original(*arguments, **options)

    setattr(owner, name, called)

  return f"{number.name} {moment}", trial.live(prepare)


def damage(trial: Trial, chance: random.Random) -> tuple[str, int]:
  """A life that finds a file of the newest checkpoint changed, cut or gone."""
  steps = trial.checkpoints.steps()
  if not steps:
    return send(trial, chance)
  newest = trial.folder / "checkpoints" / str(steps[-1])
  paths = sorted(p for p in newest.rglob("*") if p.is_file() and p.stat().st_size)
  path, kind = chance.choice(paths), chance.choice(("flipped", "cut", "missing"))
  content = bytearray(path.read_bytes())
  if kind == "flipped":
    content[chance.randrange(len(content))] ^= 1 << chance.randrange(8)
  path.unlink()
  if kind != "missing":
    path.write_bytes(content[: chance.randrange(len(content))] if kind == "cut" else content)
  return f"damage {kind}", trial.live()


def disk(trial: Trial, chance: random.Random) -> tuple[str, int]:
  """A life whose disk is full from some moment on."""
  size = chance.choice((0, 200, 2000, 10_000))

  def fill() -> None:
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, resource.RLIM_INFINITY))

  return "disk", trial.live(fill)


def second(trial: Trial, chance: random.Random) -> tuple[str, int]:
  """A life beside which another is begun, which must be refused; then it is told to stop."""
  other = Trial(trial.root, 0)
  first = trial.live()
  lock = trial.folder / "checkpoints.lock"
  while not lock.exists() or f"process {first} " not in lock.read_text():
    if os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT):
      return "second", first
    time.sleep(0.005)
  status, output = other.end(other.live(folder=trial.folder))
  alone = status == 0 and os.waitid(os.P_PID, first, os.WEXITED | os.WNOHANG | os.WNOWAIT)
  os.kill(first, signal.SIGTERM)
  if not alone and not (status == 2 and re.search(CAUSES["second"], output)):
    raise AssertionError(f"a second process ended with {status}: {output}")
  return "second", first


def judge(trial: Trial, fault: str, status: int, output: str, whole: tuple[bytes, ...]) -> str:
  """How a life ended, in a word; says what is wrong in an AssertionError."""
  kind = fault.split()[0]
  require = lambda right, what: None if right else _fail(f"{what}; it ended with {status}")
  require("Traceback" not in output, "a traceback")
  if kind == "damage":
    require("is damaged: " in output, "damage was not named")
  if trial.ended:
    require(trial.result() == whole, "another result than that of the undisturbed run")
    return "ended as the undisturbed run"
  good = trial.checkpoints.good_steps()
  if status == 0:
    said = re.search(r"(SIGTERM|SIGINT): step (\d+) is saved", output)
    require(said and int(said[2]) in good[-1:], f"what it says is not so, good are {good}")
    return "saved and said so"
  if status < 0 or status == 130:
    require(fault.startswith("SIG"), "a signal that nobody sent")
    return "stopped before there was anything to save" if status != -9 else "killed"
  cause = re.search(CAUSES.get(kind, "$^"), output, re.DOTALL)
  require(status == 2 and "error: " in output and cause, "no cause")
  named = re.search(r"last good checkpoint: step (\d+)", output)
  require(int(named[1]) in good[-1:] if named else not good or STEPS in good, f"good are {good}")
  return "an error that names the cause"


def _fail(what: str) -> None:
  raise AssertionError(what)


def chaos(faults: int, seed: int, root: Path) -> tuple[dict[str, int], list[str]]:
  """How often each fault ended how, and a line for each that ended otherwise than it may."""
  chance, failures = random.Random(seed), list[str]()
  found: Counter[str] = Counter()
  _write_text(root / "text", chance)
  undisturbed = Trial(root, 0)
  status, output = undisturbed.end(undisturbed.live())
  if not undisturbed.ended:
    raise AssertionError(f"the undisturbed run ended with {status}: {output}")
  whole, number = undisturbed.result(), 1
  trial = Trial(root, number)
  for i in tqdm(range(faults), unit="fault"):
    fault, child = chance.choice((send, damage, damage, disk, second))(trial, chance)
    status, output = trial.end(child)
    try:
      how = judge(trial, fault, status, output, whole)
    except AssertionError as error:
      failures.append(f"fault {i} of seed {seed}, {fault}: {error}\n{output}")
      how = "WRONG"
    found[f"{fault}: {how}"] += 1
    if trial.ended or how == "WRONG" or "good ones: none" in output:
      number += 1
      trial = Trial(root, number)
  trial.end(trial.live())
  if trial.result() != whole:
    failures.append(f"the last run of seed {seed} ended otherwise than the undisturbed one")
  return dict(sorted(found.items())), failures


def _write_text(folder: Path, chance: random.Random) -> None:
  folder.mkdir()
  for i in range(60):
    (folder / f"{i}.txt").write_text(
      " ".join(chance.choices(["one", "two", "three", "four"], k=60))
    )


def main(_):
  root = Path(tempfile.mkdtemp(prefix="chaos"))
  os.environ |= {"JAX_COMPILATION_CACHE_DIR": str(root / "compiled"), "JAX_PLATFORMS": "cpu"}
  os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
  try:
    found, failures = chaos(FAULTS.value, SEED.value, root)
  finally:
    shutil.rmtree(root, ignore_errors=True)
  print(*failures, sep="\n")
  print(json.dumps({"faults": FAULTS.value, "failures": len(failures), "ended": found}))
  sys.exit(bool(failures))


if __name__ == "__main__":
  app.run(main)
