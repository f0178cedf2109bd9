"""Computing each row on the device that has it, and what the compiler splits by itself.

The compiler splits matrix products and maps over elements as their operands are split. A sort, or a
loop whose trip count depends on the data, it runs on every device for all rows, after gathering
them. `map_rows` runs such a function on each device for its own rows alone.

On a mesh of explicit axes, which `jax.make_mesh` makes, the type of an array says how it is split,
and an operation whose result types do not determine is an error. `automatic` computes there as on
any other mesh, and types what comes out.
"""

import contextlib
import dataclasses
import functools
import inspect
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, ParamSpec, TypeVar

import jax
from jax.sharding import AbstractMesh, AxisType, Mesh, NamedSharding, PartitionSpec

from effjax.core.typing import PyTree

T = TypeVar("T")
Given = ParamSpec("Given")
AnyMesh = Mesh | AbstractMesh

_split = jax.make_user_context()  # part of the key of every cache of traced functions


@dataclasses.dataclass(frozen=True)
class Dealt:
  """The experts of every mixture are split over a mesh axis of S devices, E / S to each.

  Attributes:
    axis: its name; rows are split over it too.
    room: how many rows a device can send to each other one, as a multiple of the mean; rows beyond
      it are dropped. None is room for all.
  """

  axis: str
  room: float | None = None


def rows_split(
  mesh: AnyMesh, axes: Sequence[str], experts: Dealt | None = None
) -> contextlib.AbstractContextManager:
  """While a function is traced in it, the first axis of a batch is split over `axes` of `mesh`.

  Args:
    mesh: the devices.
    axes: names of axes.
    experts: how experts are split over the last of them; None is not at all.

  Raises:
    ValueError: when the mesh lacks one of the axes, or experts are not split over the last.

  Example:
    >>> from effjax.parallel import make_mesh
    >>> with rows_split(make_mesh(data=1), ["data"]):
    ...   map_rows(lambda x, scale: x * scale, jax.numpy.ones(2), 3.0).tolist()
    [3.0, 3.0]
  """
  if not set(axes) <= set(mesh.axis_names):
    raise ValueError(f"rows_split: axes {tuple(axes)}; allowed: of {mesh.axis_names}")
  if experts is not None and experts.axis != tuple(axes)[-1]:
    raise ValueError(f"rows_split: experts over {experts.axis!r}; allowed: the last of {axes}")
  return _split((mesh, tuple(axes), experts))


def devices(rows: PyTree) -> int:
  """How many devices `map_rows` has compute these rows, each its own; 1 where it is just a call."""
  return _devices(rows)[2]


def experts_dealt(rows: PyTree) -> tuple[Dealt, int] | None:
  """How experts are split, and over how many devices, where each device has its own of `rows`."""
  mesh, axes, count = _devices(rows)
  dealt = _dealt(axes)
  return None if count == 1 or dealt is None else (dealt, mesh.shape[dealt.axis])


def map_rows(
  function: Callable[[PyTree, PyTree], T], rows: PyTree, whole: PyTree, specs: PyTree = None
) -> T:
  """function(rows, whole), where each device computes its own part of `rows`.

  Rows are split as the array types say where a mesh is explicit, else as `rows_split` does. The
  function sees a part of each array of `rows` and all of `whole`, and must give arrays whose first
  axis goes with the rows: they are laid end to end. Gradients of `whole` are summed over devices.
  Other axes of the mesh stay the compiler's. Where no split is in force, in a region that is a
  device's own already, or when the devices do not divide some first axis, it is just that call.

  Args:
    function: (rows, whole) → arrays [M', …].
    rows: arrays [M, …], perhaps of several M.
    whole: arrays that every device needs whole.
    specs: partition specifications of `whole`, where not every device needs all of it.
  """
  mesh, axes, count = _devices(rows)
  if count == 1:
    return function(rows, whole)
  split = PartitionSpec(axes)
  if specs is None:
    whole, specs = jax.tree.map(lambda x: _gathered(x, axes), whole), PartitionSpec()
  local = jax.shard_map(
    function, mesh=mesh, in_specs=(split, specs), out_specs=split, axis_names=set(axes)
  )
  return local(rows, whole)


def automatic(
  function: Callable[..., T],
  arguments: Sequence[PyTree],
  rows: Any,
  split: Callable[[T], Iterable[PartitionSpec]],
) -> T:
  """function(*arguments), split over the devices by the compiler on a mesh of explicit axes too.

  Within it types do not say how arrays are split, and `map_rows` is for the rows of `rows`. Where
  no argument lies on explicit axes it is just that call.

  Args:
    function: of pytrees of arrays and of anything else.
    arguments: its arguments.
    rows: the one whose first axis is that of the rows.
    split: result → the partition specification of each of its leaves.
  """
  mesh = explicit_mesh(tuple(arguments))
  if mesh is None:
    return function(*arguments)
  shape = mesh.abstract_mesh
  free = shape.update_axis_types(dict.fromkeys(shape.explicit_axes, AxisType.Auto))
  compilers = NamedSharding(free, PartitionSpec())
  release = lambda x: jax.sharding.reshard(x, compilers) if isinstance(x, jax.Array) else x
  axes = _axes(next(iter(spec(rows)), None))
  with jax.sharding.use_abstract_mesh(free), rows_split(free, axes, _dealt(axes)):
    result = function(*jax.tree.map(release, tuple(arguments)))
  tree: Any
  leaves, tree = jax.tree.flatten(result)
  places = (NamedSharding(mesh, spec) for spec in split(result))
  return tree.unflatten(map(jax.sharding.reshard, leaves, places))


def on_any_mesh(function: Callable[Given, T]) -> Callable[Given, T]:
  """`function`, made `automatic`, with results that are split as its first argument is.

  Example:
    >>> on_any_mesh(lambda x, *, scale: x * scale)(jax.numpy.ones(2), scale=3.0).tolist()
    [3.0, 3.0]
  """

  signature = inspect.signature(function)

  @functools.wraps(function)
  def anywhere(*arguments: Given.args, **named: Given.kwargs) -> T:
    first = next(iter(signature.bind(*arguments, **named).arguments.values()))
    call = lambda arguments, named: function(*arguments, **named)
    alike = lambda result: (spec_like(first, x) for x in jax.tree.leaves(result))
    return automatic(call, (arguments, named), first, alike)

  return anywhere


def explicit_mesh(tree: PyTree) -> AnyMesh | None:
  """The mesh of explicit axes that is in force here, or on which some array of `tree` lies."""
  arrays = (x for x in jax.tree.leaves(tree) if isinstance(x, jax.Array))
  meshes = map(_mesh, arrays)
  here = jax.sharding.get_abstract_mesh()
  return next((mesh for mesh in (*meshes, here) if mesh.abstract_mesh.explicit_axes), None)


def _mesh(x: jax.Array) -> AnyMesh:
  """That of the devices where an array is known, else that of its type."""
  if not isinstance(x, jax.core.Tracer) and isinstance(x.sharding, NamedSharding):
    return x.sharding.mesh
  return jax.typeof(x).sharding.mesh


def nowhere(result: PyTree) -> list[PartitionSpec]:
  """Specifications of arrays that are not split."""
  return [PartitionSpec()] * len(jax.tree.leaves(result))


def spec_like(x: Any, y: jax.Array) -> PartitionSpec:
  """The partition specification of `y` split as `x` is, along the axes that are of one size."""
  axes = zip(spec(x), x.shape, y.shape, strict=False)
  return PartitionSpec(*(entry if size == other else None for entry, size, other in axes))


def spec(x: Any) -> PartitionSpec:
  """How the type of `x` says that it is split; that of what is no array says nothing."""
  return jax.typeof(x).sharding.spec if isinstance(x, jax.Array) else PartitionSpec()


def _devices(rows: PyTree) -> tuple[AnyMesh, tuple[str, ...], int]:
  """Mesh, axes and number of the devices that each have a part of `rows`; 1 where all have all."""
  mesh, axes = _in_force(rows)
  count = math.prod(mesh.shape[axis] for axis in axes)
  return mesh, axes, 1 if any(x.shape[0] % count for x in jax.tree.leaves(rows)) else count


def _dealt(axes: Sequence[str]) -> Dealt | None:
  """How experts are split, where that is over the last of these axes."""
  dealt = _split.value[2] if _split.value else None
  return dealt if dealt is not None and axes and dealt.axis == axes[-1] else None


def _in_force(rows: PyTree) -> tuple[AnyMesh, tuple[str, ...]]:
  """Mesh and axes of the split, no axes where there is none."""
  here = jax.sharding.get_abstract_mesh()
  mesh, axes = _explicit(rows) or (_split.value or (here, ()))[:2]
  if set(axes) & set(here.manual_axes):
    return here, ()
  return (here if here.manual_axes else mesh), axes


def _explicit(rows: PyTree) -> tuple[AnyMesh, tuple[str, ...]] | None:
  """Mesh and axes that the type of some array of `rows` says its first axis is split over."""
  for sharding in (jax.typeof(x).sharding for x in jax.tree.leaves(rows)):
    axes = _axes(sharding.spec[0]) if len(sharding.spec) else ()
    if axes:
      return sharding.mesh, axes
  return None


def _gathered(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """`x` split over none of `axes`, where its type says that it is."""
  spec = jax.typeof(x).sharding.spec
  kept = [tuple(axis for axis in _axes(entry) if axis not in axes) or None for entry in spec]
  if all(_axes(entry) == _axes(old) for entry, old in zip(kept, spec, strict=True)):
    return x
  return jax.sharding.reshard(x, PartitionSpec(*kept))


def _axes(entry: str | tuple[str, ...] | None) -> tuple[str, ...]:
  """The mesh axes that one entry of a partition specification names."""
  return () if entry is None else (entry,) if isinstance(entry, str) else tuple(entry)
