"""One module with E sets of parameters, computed on the rows of all of them at once."""

from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp
from flax.errors import ScopeParamShapeError

from effjax.core.typing import Array, Dim, Float, Params, PyTree, Size
from effjax.core.weights import is_weight
from effjax.kernels.grouped_matmul import Grouped, Groups
from effjax.layers import taps

Apply = Callable[[Array, Groups], Array]


def bank(parent: nn.Module, name: str, count: Size, expert: nn.Module, *facts: object) -> Apply:
  """What `dispatch` asks of experts: rows, and which expert has which → outputs.

  The parameters lie under `name`, each with a leading axis E, drawn for each expert by itself. The
  module is called once, with parameters that are another array for each row (`Grouped`).

  Args:
    parent: the module in whose call this is.
    name: of the experts among its parameters.
    count: number of experts E.
    expert: a module that treats each row by itself and fetches its parameters by `layers.weight`.
    *facts: what `expert` is called with after the rows [1, M, D].

  Raises:
    ValueError: for an expert that fetches parameters in another way, when it is applied.
  """

  def apply(rows: Float[Array, "M D"], groups: Groups) -> Float[Array, "M F"]:
    if parent.is_mutable_collection("params") and not parent.has_variable("params", name):
      key = parent.make_rng("params")
      parent.put_variable("params", name, _drawn(key, count, expert, rows.shape[-1], facts))

    def group(variables: PyTree) -> PyTree:
      wrap = lambda w: Grouped(w, groups, rows.shape[0])
      return jax.tree.map(wrap, variables, is_leaf=is_weight)

    call = nn.map_variables(lambda expert, x: expert(x, *facts), "params", group)
    try:
      ids = groups.of_row(rows.shape[0])[None]
      with taps.tokens(jnp.where(ids < count, ids, -1), groups=count):
        return call(expert.copy(name=name), rows[None])[0]
    except ScopeParamShapeError as error:
      given = f"{type(parent).__name__}: expert={expert!r}: {error}"
      allowed = "an expert that fetches its parameters by layers.weight"
      raise ValueError(f"{given}; allowed: {allowed}") from error

  return apply


def _drawn(key: Array, count: Size, expert: nn.Module, width: Dim, facts: tuple) -> Params:
  """Parameters with a leading axis E, each expert's drawn by itself."""
  alone = expert.clone(parent=None, name=None)
  init = lambda key: alone.init(key, jnp.zeros((1, 1, width)), *facts).get("params", {})
  return jax.vmap(init)(jax.random.split(key, count))
