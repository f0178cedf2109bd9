"""Checkpoints over Orbax: written whole or not at all, restored to the bit, never pickled."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
from orbax.checkpoint import v1

from effjax.core.known import number
from effjax.core.trees import path_string
from effjax.core.typing import PyTree, Size
from effjax.train import workdir


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

  A process that is killed while it writes leaves the previous checkpoints as they were.

  Example:
    >>> import tempfile, jax.numpy as jnp
    >>> with Checkpoints(tempfile.mkdtemp(), keep=1) as checkpoints:
    ...   checkpoints.save(5, {"w": jnp.ones(2)}, data={"row": 3})
    ...   saved = checkpoints.restore({"w": jnp.zeros(2)})
    >>> saved.step, saved.data, saved.state["w"].tolist()
    (5, {'row': 3}, [1.0, 1.0])
  """

  def __init__(self, directory: str | Path, *, keep: Size = 2):
    """Opens a directory, made if missing; what an interrupted save left there is removed.

    Raises:
      ValueError: for `keep` below 1.
      OSError: when the directory cannot be written.
    """
    self._keep = number("keep", keep, of="Checkpoints", integer=True, least=1)
    self.directory = Path(directory).resolve()
    workdir.make(self.directory)
    self._open()

  def _open(self) -> None:
    self._checkpointer = v1.training.Checkpointer(
      self.directory,
      preservation_policy=v1.training.preservation_policies.LatestN(self._keep),
      cleanup_tmp_directories=True,
    )

  def __enter__(self):
    return self

  def __exit__(self, *_):
    self._checkpointer.close()

  def steps(self) -> list[int]:
    """Steps that have a checkpoint, ascending."""
    return [checkpoint.step for checkpoint in self._checkpointer.checkpoints]

  def save(self, step: int, state: PyTree, *, data: Any = None) -> None:
    """Writes a checkpoint and removes those beyond `keep`; returns when it is on disk.

    Args:
      step: its number, above that of every checkpoint there is.
      state: a pytree of arrays; `Weight` and optax states are pytrees too.
      data: JSON, such as the state of the data iterator.

    Raises:
      OSError: when it cannot be written: disk full, read-only, quota.
    """
    metadata = {"data": data}
    try:
      self._checkpointer.save_checkpointables(
        step, {"state": state}, custom_metadata=metadata, force=True
      )
    except Exception as error:  # Orbax and TensorStore raise many types for a failed write.
      self._open()
      good = f"; last good checkpoint: step {self.steps()[-1]}" if self.steps() else ""
      message = f"checkpoint of step {step} could not be written to {self.directory}{good}: {error}"
      raise OSError(message) from error

  def restore(self, like: PyTree, *, step: int | None = None) -> Saved:
    """The checkpoint of `step` (None: the newest), laid out as `like`.

    Args:
      like: arrays or `jax.ShapeDtypeStruct`s that give structure, shapes, types and shardings.
      step: one of `steps()`.

    Raises:
      FileNotFoundError: when there is no such checkpoint.
      ValueError: when its structure, shapes or types are not those of `like`.
    """
    steps = self.steps()
    if not steps or (step is not None and step not in steps):
      raise FileNotFoundError(f"no checkpoint of step {step} in {self.directory}; steps: {steps}")
    step = steps[-1] if step is None else step
    metadata = self._checkpointer.checkpointables_metadata(step)
    _check_layout(metadata.metadata["state"], like, f"{self.directory}/{step}")
    abstract = jax.tree.map(_abstract, like)
    state = self._checkpointer.load_checkpointables(step, {"state": abstract})["state"]
    return Saved(step, state, metadata.custom_metadata["data"])


def _abstract(x) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=getattr(x, "sharding", None))


def _check_layout(saved: PyTree, like: PyTree, where: str) -> None:
  describe = lambda tree: {
    path_string(path): (tuple(x.shape), str(x.dtype))
    for path, x in jax.tree_util.tree_leaves_with_path(tree)
  }
  there, here = describe(saved), describe(like)
  for path in sorted({*there, *here}):
    if there.get(path) != here.get(path):
      raise ValueError(
        f"{where}: {path} is {there.get(path)} in the checkpoint and {here.get(path)} here"
      )
