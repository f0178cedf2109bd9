"""ZeRO: which part of the training state each data-parallel device holds.

Rajbhandari et al., "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models",
arXiv 1910.02054, section 5. With N devices on the data axis, stage 1 splits the optimiser's state,
stage 2 also the gradients, stage 3 also the parameters; stage 0 is plain data parallelism. Here a
stage is shardings; the compiler derives the all-gathers and reduce-scatters. Expert parallelism
lies within it: a device's own experts are split further over the data axis, and all else over both.
"""

import contextlib
import dataclasses
import warnings
from typing import Any, TypeVar

import jax
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core import spmd, trees
from effjax.core.typing import Params, PyTree, Size
from effjax.core.weights import is_weight
from effjax.parallel.experts import Experts
from effjax.parallel.gathered import Gathered, gather
from effjax.parallel.shards import Shards

T = TypeVar("T")
NOTEWORTHY = 0.05


@dataclasses.dataclass(frozen=True)
class Zero:
  """Shardings of a training state for a stage of ZeRO.

  Attributes:
    mesh: the devices.
    stage: 0 (all replicated), 1 (moments split), 2 (gradients too), 3 (parameters too).
    axis: the data-parallel axis of `mesh`.
    experts: how experts are split over another axis, or over that one; None is not at all.

  Raises:
    ValueError: for another stage, or an axis that the mesh lacks.
  """

  mesh: Mesh
  stage: Size = 0
  axis: str = "data"
  experts: Experts | None = None

  def __post_init__(self):
    if isinstance(self.stage, bool) or self.stage not in (0, 1, 2, 3):
      raise ValueError(f"zero={self.stage!r}; allowed: 0, 1, 2, 3")
    kinds = dict(zip(self.mesh.axis_names, self.mesh.axis_types, strict=True))
    for axis in self.axes:
      if axis not in kinds:
        raise ValueError(f"mesh has axes {tuple(kinds)}; ZeRO needs {axis!r}")
      if kinds[axis] != AxisType.Auto:
        raise ValueError(
          f"mesh: its axis {axis!r} is {kinds[axis]}; allowed: AxisType.Auto, as "
          "`parallel.make_mesh` makes it"
        )

  @property
  def axes(self) -> tuple[str, ...]:
    """The axes over which the rows of a batch are split."""
    experts = () if self.experts is None else (self.experts.axis,)
    return tuple(dict.fromkeys((self.axis, *experts)))

  @property
  def shards(self) -> Shards:
    """How what is split lies over the devices."""
    return Shards(self.mesh, self.axis if len(self.axes) == 1 else self.axes)

  def batch(self, batch: PyTree) -> PyTree:
    """Shardings of a batch: rows over the axes.

    Raises:
      ValueError: when N does not divide the batch.
    """
    for x in jax.tree.leaves(batch):
      if x.shape[0] % self.shards.count:
        raise ValueError(f"batch of {x.shape[0]} rows; allowed: multiples of {self._devices}")
    return jax.tree.map(lambda x: self.shards.rows, batch)

  def params(self, params: PyTree) -> PyTree:
    """Shardings of parameters.

    Raises:
      ValueError: for experts that their axis does not divide, or where there are none.
    """
    if self.experts is not None:
      self.experts.check(params, self.mesh)
    return self._from(3, params)

  def gradients(self, grads: PyTree) -> PyTree:
    """Shardings of gradients."""
    return self._from(2, grads)

  def state(self, state: Any) -> Any:
    """Shardings of a `train.TrainState`; warns where much of it cannot be split."""
    self._report((state.opt_state, state.params) if self.stage >= 3 else (state.opt_state,))
    return dataclasses.replace(
      state,
      step=self.shards.replicated,
      params=self.params(state.params),
      opt_state=self._from(1, state.opt_state),
      extra=jax.tree.map(lambda x: self.shards.replicated, state.extra),
    )

  @property
  def _devices(self) -> str:
    return " · ".join(f"{axis}={self.mesh.shape[axis]}" for axis in self.axes)

  def _report(self, parts: tuple[PyTree, ...]) -> None:
    """Warns when more than a twentieth of what this stage splits stays whole on every device."""
    n = self.shards.count
    leaves = jax.tree_util.tree_leaves_with_path(parts)
    whole = [(p, x) for p, x in leaves if self._lies(p, x, True).is_fully_replicated]
    size, of = (trees.nbytes([x for _, x in each]) for each in (whole, leaves))
    if not self.stage or n == 1 or size <= of * NOTEWORTHY:
      return
    names = trees.some((f"{trees.path_string(p)} {tuple(x.shape)}" for p, x in whole), 4)
    warnings.warn(
      f"zero={self.stage} splits {len(leaves) - len(whole)} of {len(leaves)} arrays over "
      f"{self._devices}: {size:,} of {of:,} bytes stay whole on every device, having no axis that "
      f"{n} divides: {names}",
      stacklevel=3,
    )

  def scope(self) -> contextlib.AbstractContextManager:
    """What the objective is traced in: rows are split over the axes, and experts over theirs."""
    dealt = None if self.experts is None else self.experts.dealt
    return spmd.rows_split(self.mesh, self.axes, dealt)

  def on_batch(self, batch: PyTree) -> PyTree:
    """Inside a jitted function: `batch`, laid out so; likewise the next three."""
    return jax.lax.with_sharding_constraint(batch, self.batch(batch))

  def on_params(self, params: Params, matrices: str = "kernel|embedding") -> Params:
    """Parameters as the objective reads them: where they are split, it gathers them.

    A parameter at a path that matches `matrices` becomes a `Gathered` weight, put together layer
    by layer as the model gets to it; the others are small, and are gathered at once.
    """
    if self.stage < 3:
      return params

    def visit(path, x):
      name = trees.path_string(path)
      shards = self._shards(name)
      return Gathered(x, shards) if trees.chooses(matrices, name, x) else gather(x, shards)

    return jax.tree_util.tree_map_with_path(visit, params, is_leaf=is_weight)

  def on_gradients(self, grads: PyTree) -> PyTree:
    return jax.lax.with_sharding_constraint(grads, self.gradients(grads))

  def on_state(self, state: T) -> T:
    return jax.lax.with_sharding_constraint(state, self.state(state))

  def _from(self, stage: int, tree: PyTree) -> PyTree:
    lies = lambda path, x: self._lies(path, x, self.stage >= stage)
    return jax.tree_util.tree_map_with_path(lies, tree)

  def _lies(self, path: Any, x: Any, split: bool) -> NamedSharding:
    """Where an array lies: one of experts with them, and split over the data axis or not."""
    name = trees.path_string(path)
    kept = PartitionSpec() if self.experts is None else self.experts.spec(name, x, self.mesh)
    return self._shards(name).split(x, kept) if split else NamedSharding(self.mesh, kept)

  def _shards(self, path: str) -> Shards:
    """How the parameter at `path` is split."""
    if self.experts is None or self.experts.place(path) is None:
      return self.shards
    others = tuple(axis for axis in self.axes if axis != self.experts.axis)
    return Shards(self.mesh, others[0] if others else (), self.experts.kept(path))


def place(state: T, mesh: Mesh, *, zero: Size = 0, experts: Experts | None = None) -> T:
  """A training state laid out on `mesh` for stage `zero` of ZeRO over its axis "data".

  Train it with `train.make_train_step(..., placement=Zero(mesh, zero, experts=experts))`.

  Raises:
    ValueError: for another stage, or a mesh without the axis.

  Example:
    >>> import jax.numpy as jnp
    >>> from effjax.parallel import make_mesh
    >>> from effjax.train import TrainState
    >>> state = TrainState(jnp.int32(0), {"w": jnp.ones(8)}, ())
    >>> tuple(place(state, make_mesh(data=1), zero=3).params["w"].sharding.spec)
    ('data',)
  """
  return jax.device_put(state, Zero(mesh, zero, experts=experts).state(state))
