"""Multi-head attention as a sum over its heads, in any groups.

MHSA(x) = Σ_n softmax(scale · q_n k_nᵀ) v_n W_out[n] + b_out, where W_out[n] are the H rows of the
output projection that head n meets: "Are Sixteen Heads Really Better than One?" (arXiv 1905.10650),
section 2. For the hidden units of a feed-forward layer see `effjax.layers.decompose`.
"""

from collections.abc import Sequence

import numpy as np

from effjax.attention.multi_head import Attention
from effjax.core.typing import Params
from effjax.layers.decompose import (
  Groups,
  bias_once,
  check_indices,
  check_partition,
  select_inputs,
  select_outputs,
)


def select_heads(module: Attention, params: Params, heads: Sequence[int]) -> tuple[Attention, dict]:
  """The `Attention` of the query heads `heads` alone, in ascending order, with the output's bias.

  Key-value heads are still shared if those that remain serve equally many of the query heads;
  otherwise each query head gets a copy of its own.

  Args:
    module: the layer.
    params: its parameters, with any leading axes (scanned layers). A `Weight` is multiplied out.
    heads: distinct indices 0 … N − 1.

  Raises:
    ValueError: when there is no such head, one comes twice, there are none, module and parameters
      are not those of an `Attention`, or its heads are normed jointly.

  Example:
    >>> import jax.numpy as jnp
    >>> names = ("query", "key", "value", "out")
    >>> params = {name: {"kernel": jnp.ones((8, 8))} for name in names}
    >>> module, params = select_heads(Attention(4), params, [1, 2, 3])
    >>> module.heads, module.head_width, params["out"]["kernel"].shape
    (3, 2, (6, 8))
  """
  if type(module) is not Attention or not {"query", "key", "value", "out"} <= set(params):
    given = f"{type(module).__name__} with parameters {sorted(params)}"
    raise ValueError(f"module is {given}; allowed: Attention with query, key, value and out")
  if module.qk_norm is not None and module.qk_norm_joint:
    raise ValueError(
      "module has qk_norm_joint=True: no sum over heads; allowed: a norm of each head"
    )
  width = params["out"]["kernel"].shape[-2] // module.heads
  index = check_indices("heads", heads, module.heads)
  kv_index = _kv_heads(index, module)
  columns = lambda heads: (heads[:, None] * width + np.arange(width)).ravel()
  chosen = {
    **params,
    "query": select_outputs(params["query"], columns(index)),
    "key": select_outputs(params["key"], columns(kv_index)),
    "value": select_outputs(params["value"], columns(kv_index)),
    "out": select_inputs(params["out"], columns(index)),
  }
  if "sinks" in params:
    chosen["sinks"] = params["sinks"][..., index]
  return module.clone(heads=len(index), kv_heads=len(kv_index), head_width=width), chosen


def split_heads(module: Attention, params: Params, groups: Groups) -> list[tuple[Attention, dict]]:
  """One `Attention` for each group of query heads; the sum of their outputs is the layer's.

  The first part keeps the output's bias, and that of the others is zero.

  Args:
    module, params: as in `select_heads`.
    groups: a partition of 0 … N − 1.

  Raises:
    ValueError: when `groups` is not a partition, or as in `select_heads`.

  Example:
    >>> import jax.numpy as jnp
    >>> names = ("query", "key", "value", "out")
    >>> params = {name: {"kernel": jnp.eye(4)} for name in names}
    >>> x = jnp.ones((1, 1, 4))
    >>> parts = split_heads(Attention(4), params, [[0, 3], [1], [2]])
    >>> [part.apply({"params": p}, x)[0][0, 0].tolist() for part, p in parts]
    [[1.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0], [0.0, 0.0, 1.0, 0.0]]
  """
  check_partition(groups, module.heads)
  parts = [select_heads(module, params, group) for group in groups]
  return bias_once(parts, "out")


def _kv_heads(heads: np.ndarray, module: Attention) -> np.ndarray:
  """The key-value heads that `heads` are left with, in the order in which they share them."""
  owners = heads // (module.heads // (module.kv_heads or module.heads))
  distinct, counts = np.unique(owners, return_counts=True)
  return distinct if (counts == counts[0]).all() else owners
