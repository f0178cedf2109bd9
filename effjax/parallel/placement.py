"""What training calls to lay arrays out on devices."""

import contextlib
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeVar, runtime_checkable

from effjax.core.typing import Params, PyTree

T = TypeVar("T")


@runtime_checkable
class Placement(Protocol):
  """Where the arrays of a training state and its batches live; `Zero` is one.

  `batch` and `state` give shardings, for arrays that are put somewhere. The others are called while
  a step is traced: `scope` is entered around the objective, so that layers know how rows are split,
  `on_…` constrain what the step computes.
  """

  def batch(self, batch: PyTree) -> PyTree: ...
  def state(self, state: Any) -> Any: ...
  def scope(self) -> AbstractContextManager: ...
  def on_batch(self, batch: PyTree) -> PyTree: ...
  def on_params(self, params: Params) -> Params: ...
  def on_gradients(self, grads: PyTree) -> PyTree: ...
  def on_state(self, state: T) -> T: ...


class Anywhere:
  """The placement that leaves all arrays where they are."""

  def batch(self, batch: PyTree) -> PyTree:
    return None

  def state(self, state: Any) -> Any:
    return None

  def scope(self) -> AbstractContextManager:
    return contextlib.nullcontext()

  def _same(self, tree: T) -> T:
    return tree

  on_batch = on_params = on_gradients = on_state = _same
