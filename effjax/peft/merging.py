"""A model with its adapters multiplied out, so that it needs none."""

import re
from typing import Any

from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.core.weights import materialize, offset
from effjax.peft.adapter import is_adapter
from effjax.peft.detached import is_new


def merge(params: PyTree) -> PyTree:
  """`params` with a plain array in place of each adapter over a parameter; it computes the same.

  Over a quantised base that is what it dequantises to, with what the adapter makes of it, in the
  base's type. A bias beside a matrix whose outputs IA³ multiplies is multiplied too.

  Raises:
    ValueError: when there is no adapter, and for one that is a new parameter, as in a prefix.

  Example:
    >>> import jax.numpy as jnp
    >>> from effjax.peft import IA3
    >>> w = IA3(jnp.ones((2, 2)), jnp.array([[1.0, 3.0]]))
    >>> merged = merge({"kernel": w, "bias": jnp.ones(2)})
    >>> merged["kernel"].tolist(), merged["bias"].tolist()
    ([[1.0, 3.0], [1.0, 3.0]], [1.0, 3.0])
  """
  found = {path: leaf for path, leaf in trees.items(params).items() if is_adapter(leaf)}
  if not found:
    raise ValueError(
      "params has no adapter to merge; allowed: what lora.add, ia3.add, tune, … give"
    )
  if new := [path for path, leaf in found.items() if is_new(leaf)]:
    allowed = "adapters over parameters; take it off with its module, or with peft.detach"
    raise ValueError(f"merge: {new[0]} is a new parameter, with nothing below; allowed: {allowed}")
  kernels = {path: leaf for path, leaf in found.items() if path.endswith("kernel")}
  beside = {re.sub("kernel$", "bias", path): leaf for path, leaf in kernels.items()}

  def change(path: str, leaf: Any) -> Any:
    return offset(beside.get(path), materialize(leaf))

  return trees.update(params, lambda path, leaf: path in found or path in beside, change)
