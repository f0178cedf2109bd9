"""Training some of a model's own parameters: its biases (BitFit), norms or head, the rest frozen.

BitFit: Ben Zaken et al., arXiv 2106.10199, section 3. The parameters that train stand beside the
frozen ones they replace, so that `peft.detach` gives the base back bit-identically.
"""

import jax.numpy as jnp

from effjax.core import trees
from effjax.core.trees import Chooser
from effjax.core.typing import PyTree
from effjax.core.weights import materialize
from effjax.peft.beside import Tuned, is_adapter

BIASES = r"(^|/)bias$"
NORMS = r"norm/(scale|bias)$"


def tune(params: PyTree, targets: Chooser) -> PyTree:
  """`params` with a `Tuned` over each targeted parameter; the model computes the same as before.

  Any array of floats is allowed, as at r"head/kernel$" or `NORMS`, and any weight but an adapter;
  in place of a quantised one stands what it dequantises to. `peft.detach` takes them off again,
  `peft.merge` keeps what they have become.

  Args:
    params: a parameter tree.
    targets: pattern or predicate on paths.

  Raises:
    ValueError: when nothing matches, and for an adapter or integers among what does.

  Example:
    >>> params = {"kernel": jnp.ones((2, 3)), "norm": {"scale": jnp.ones(3)}}
    >>> tuned = tune(params, NORMS)
    >>> sorted(trees.trained(tuned)), trees.count(tuned)
    (['norm/scale/value'], 9)
  """
  for path, leaf in trees.select(params, targets).items():
    if is_adapter(leaf):
      raise ValueError(f"{path} is a {type(leaf).__name__} already; merge or detach it first")
    if not jnp.issubdtype(leaf.dtype, jnp.inexact):
      raise ValueError(f"targets: {path} holds {leaf.dtype}; allowed: floats")
  # A copy, since a training step gives away the buffers of what trains.
  return trees.update(params, targets, lambda path, leaf: Tuned(leaf, jnp.array(materialize(leaf))))


def bitfit(params: PyTree) -> PyTree:
  """`params` with a `Tuned` over every bias, those of norms included (arXiv 2106.10199).

  The paper trains the task's head besides: `tune(bitfit(params), r"head/")`.

  Raises:
    ValueError: for a model without biases, or with adapted ones.

  Example:
    >>> params = {"query": {"kernel": jnp.ones((2, 3)), "bias": jnp.ones(3)}}
    >>> sorted(trees.trained(bitfit(params)))
    ['query/bias/value']
  """
  if not any(trees.chooses(BIASES, path, leaf) for path, leaf in trees.items(params).items()):
    names = trees.some(trees.items(params))
    allowed = "a model with biases; tune(params, NORMS) trains the scales of norms"
    raise ValueError(f"bitfit: params has no bias, but {names}; allowed: {allowed}")
  return tune(params, BIASES)
