"""Checkpoints over Orbax: written whole or not at all, restored to the bit, never pickled.

Each is a directory named by its step: what Orbax writes, and a record of it with the SHA-256 of
every file. It is made under another name and renamed when all of it is on disk.
"""

import contextlib
import dataclasses
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import PyTree, Size
from effjax.train import records, workdir
from effjax.train.lock import locked
from effjax.train.records import Damaged

UNFINISHED, DAMAGED = ".unfinished", ".damaged"


@dataclasses.dataclass(frozen=True)
class Saved:
  """What a checkpoint holds.

  Attributes:
    step: its number.
    state: the pytree, leaf for leaf as it was saved.
    data: what was saved with it, JSON.
  """

  step: int
  state: PyTree
  data: Any


class Checkpoints:
  """The checkpoints of one run, the newest `keep` of them.

  A process that is killed while it writes leaves the previous checkpoints as they were. To write,
  open it by `with`: that keeps other processes from writing, and removes what an interrupted save
  left. To read, that is not needed.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpoints(tempfile.mkdtemp(), keep=1) as checkpoints:
    ...   checkpoints.save(5, {"w": jnp.ones(2)}, data={"row": 3})
    ...   saved = checkpoints.restore({"w": jnp.zeros(2)})
    >>> saved.step, saved.data, saved.state["w"].tolist()
    (5, {'row': 3}, [1.0, 1.0])
  """

  def __init__(self, directory: str | Path, *, keep: Size = 2):
    """Names a directory, made if missing.

    Raises:
      ValueError: for `keep` below 1.
      OSError: when the directory cannot be made.
    """
    keep = number("keep", keep, of="Checkpoints", integer=True, least=1)
    self.directory = Path(directory).resolve()
    workdir.make(self.directory)
    self._keep, self._held = keep, contextlib.ExitStack()
    self._writes = False

  def __enter__(self):
    self._held.enter_context(locked(self.directory.with_name(self.directory.name + ".lock")))
    self._writes = True
    self._clear()
    return self

  def __exit__(self, *_):
    self._writes = False
    self._held.close()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    names = (path.name for path in self.directory.iterdir() if path.is_dir())
    return sorted(int(name) for name in names if name.isascii() and name.isdigit())

  def save(
    self, step: int, state: PyTree, *, data: Any = None, base: Mapping[str, str] | None = None
  ) -> None:
    """Writes a checkpoint and removes those beyond `keep`; returns when it is on disk.

    Args:
      step: its number, above that of every checkpoint there is.
      state: a pytree of arrays; `Weight` and optax states are pytrees too.
      data: JSON, such as the state of the data iterator.
      base: path → digest (`trees.digests`) of arrays that whoever restores has, such as what stands
        under adapters; those of `state` that are still the same are named and not written.

    Raises:
      ValueError: for a `step` that is not above the others.
      OSError: when it cannot be written: disk full, read-only, quota.
    """
    before = self.steps()
    if before and step <= before[-1]:
      raise ValueError(
        f"save: step={step}; allowed: above {before[-1]}, which {self.directory} has"
      )
    unfinished = self.directory / f"{step}{UNFINISHED}"
    same = _digests(state, base or {})
    named = {path: digest for path, digest in same.items() if (base or {})[path] == digest}
    written = _split(state, named)[1]
    try:
      with _quiet():
        v1.save_checkpointables(unfinished, {"state": written}, overwrite=True)
      records.write(unfinished, {"data": data, "arrays": _layout(written), "base": named})
      unfinished.rename(self.directory / str(step))
      _to_disk(self.directory)
    except Exception as error:  # Orbax and TensorStore raise many types for a failed write.
      self._clear()
      told = f"checkpoint of step {step} could not be written to disk; {self.newest()}: {error}"
      raise OSError(told) from error
    for old in self.steps()[: -self._keep]:
      shutil.rmtree(self.directory / str(old))

  def restore(self, like: PyTree, *, step: int | None = None) -> Saved:
    """The checkpoint of `step` (None: the newest that is not damaged), laid out as `like`.

    Damaged ones that were passed over are named in a warning, and are kept under another name
    where this may write.

    Args:
      like: arrays or `jax.ShapeDtypeStruct`s that give structure, shapes, types and shardings; of
        the `base` that was saved without, arrays, which come back as they are.
      step: one of `steps()`.

    Raises:
      FileNotFoundError: when there is no such checkpoint.
      ValueError: when its structure, shapes or types are not those of `like`, or its base is
        another; `Damaged`, when files of it are missing or changed, and of all others too where
        `step` is None.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; steps: {steps}")
    damage: dict[int, str] = {}
    for each in reversed(steps) if step is None else [step]:
      try:
        saved = self._read(each, like)
      except Damaged as error:
        damage[each] = str(error)
        continue
      self._pass_over(damage, each)
      return saved
    raise Damaged(f"{self.directory}: {_told(damage)}; good ones: {self.good_steps() or 'none'}")

  def newest(self) -> str:
    """Where a run could go on from, for messages."""
    steps = self.steps()
    return (
      f"last good checkpoint: {f'step {steps[-1]}' if steps else 'none yet'} in {self.directory}"
    )

  def good_steps(self) -> list[int]:
    """Steps that have an undamaged checkpoint, ascending; reads all of their files."""
    good = []
    for step in self.steps():
      with contextlib.suppress(Damaged):
        records.read(self.directory / str(step))
        good.append(step)
    return good

  def _clear(self) -> None:
    for path in self.directory.glob(f"*{UNFINISHED}*"):
      shutil.rmtree(path, ignore_errors=True)

  def _read(self, step: int, like: PyTree) -> Saved:
    path = self.directory / str(step)
    record = records.read(path)
    named = record.get("base", {})
    _check_base(named, like, str(path))
    base, rest = _split(like, named)
    _check_layout(record["arrays"], _layout(rest), str(path))
    state = v1.load_checkpointables(path, {"state": jax.tree.map(_abstract, rest)})["state"]
    return Saved(step, trees.merge(state, base), record["data"])

  def _pass_over(self, damage: dict[int, str], good: int) -> None:
    if not damage:
      return
    aside = ""
    if self._writes:
      for step in damage:
        target = self.directory / f"{step}{DAMAGED}"
        shutil.rmtree(target, ignore_errors=True)
        (self.directory / str(step)).rename(target)
      aside = f", and kept as *{DAMAGED}"
    told = f"{self.directory}: {_told(damage)}; passed over{aside}: going on from step {good}"
    warnings.warn(told, stacklevel=3)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
  """Without the log of what goes wrong, tracebacks in it: that is raised too."""
  loggers = [logging.getLogger(name) for name in ("absl", "asyncio")]
  before = [logger.disabled for logger in loggers]
  for logger in loggers:
    logger.disabled = True
  try:
    yield
  finally:
    for logger, disabled in zip(loggers, before, strict=True):
      logger.disabled = disabled


def _told(damage: dict[int, str]) -> str:
  return "; ".join(f"checkpoint of step {step} is damaged: {what}" for step, what in damage.items())


def _to_disk(directory: Path) -> None:
  handle = os.open(directory, os.O_RDONLY)
  try:
    os.fsync(handle)
  finally:
    os.close(handle)


def _abstract(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _split(tree: PyTree, paths: Mapping[str, Any]) -> tuple[PyTree, PyTree]:
  """`tree` as (the arrays at `paths`, the others), None elsewhere."""
  take = lambda there: jax.tree_util.tree_map_with_path(
    lambda path, x: x if (trees.path_string(path) in paths) == there else None, tree
  )
  return take(True), take(False)


def _digests(tree: PyTree, paths: Mapping[str, Any]) -> dict[str, str]:
  """Digests of the arrays that are at `paths`."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  named = ((trees.path_string(path), x) for path, x in leaves)
  return trees.digests({path: x for path, x in named if path in paths})


def _check_base(there: Mapping[str, str], like: PyTree, where: str) -> None:
  base = _split(like, there)[0]
  if any(isinstance(x, jax.ShapeDtypeStruct) for x in jax.tree.leaves(base)):
    raise ValueError(f"{where}: is without its base; allowed: a `like` with the arrays of that")
  here = _digests(like, there)
  for path, digest in there.items():
    if here.get(path) != digest:
      raise ValueError(
        f"{where}: was trained over another base: {path} is {digest} there and "
        f"{here.get(path, 'absent')} here; allowed: the base that it was trained over"
      )


def _layout(tree: PyTree) -> dict[str, list]:
  """Path → shape and type of every array, as JSON."""
  leaves = jax.tree_util.tree_leaves_with_path(tree)
  return {trees.path_string(path): [list(x.shape), str(x.dtype)] for path, x in leaves}


def _check_layout(there: dict[str, list], here: dict[str, list], where: str) -> None:
  describe = lambda form: None if form is None else (tuple(form[0]), form[1])
  for path in sorted({*there, *here}):
    if there.get(path) != here.get(path):
      raise ValueError(
        f"{where}: {path} is {describe(there.get(path))} in the checkpoint and "
        f"{describe(here.get(path))} here; allowed: a `like` of what the checkpoint has, and to "
        "change what it restores"
      )
