"""Master copies in float32 of parameters that are too coarse to take small steps.

Micikevicius et al., "Mixed Precision Training", arXiv 1710.03740, section 3.1. bfloat16 has 8 bits:
w + u is w again when |u| < 2⁻⁹|w|, and 0.999 is 1.
"""

import jax
import jax.numpy as jnp
import optax

from effjax.core.typing import PyTree


def master_copies(optimizer: optax.GradientTransformation) -> optax.GradientTransformation:
  """`optimizer` on float32 copies of all parameters of fewer bits; of others, as it is.

  The state is (copies, state of `optimizer`), the copies None where a parameter has float32 itself;
  where all have, it is that of `optimizer` alone. Updates are such that adding them gives the
  copies, rounded to the type of the parameters. `init_state` and `make_train_step` do this to every
  optimiser; twice is as once.

  Example:
    >>> optimizer = master_copies(optax.sgd(1e-3))
    >>> params, grads = {"w": jnp.ones(1, jnp.bfloat16)}, {"w": jnp.ones(1, jnp.bfloat16)}
    >>> state = optimizer.init(params)
    >>> for _ in range(3):
    ...   updates, state = optimizer.update(grads, state, params)
    ...   params = optax.apply_updates(params, updates)
    >>> round(float(state[0]["w"][0]), 6), float(params["w"][0])
    (0.997, 0.99609375)
  """

  def init(params: PyTree) -> PyTree:
    copies = _copies(params)
    inner = optimizer.init(_wide(copies, params))
    return (copies, inner) if jax.tree.leaves(copies) else inner

  def update(grads: PyTree, state: PyTree, params: PyTree, **extra):
    if not jax.tree.leaves(_copies(params)):
      return inner.update(grads, state, params, **extra)
    copies, state = state
    old = _wide(copies, params)
    grads = jax.tree.map(lambda x, like: x.astype(like.dtype), grads, old)
    updates, state = inner.update(grads, state, old, **extra)
    new = optax.apply_updates(old, updates)
    step = lambda copy, new, update, x: update if copy is None else new - x.astype(jnp.float32)
    updates = jax.tree.map(step, copies, new, updates, params, is_leaf=_is_none)
    kept = lambda copy, new: None if copy is None else new
    return updates, (jax.tree.map(kept, copies, new, is_leaf=_is_none), state)

  inner = optax.with_extra_args_support(optimizer)
  return optax.GradientTransformationExtraArgs(init, update)


def _copies(params: PyTree) -> PyTree:
  coarse = lambda x: jnp.issubdtype(x.dtype, jnp.floating) and x.dtype.itemsize < 4
  return jax.tree.map(lambda x: x.astype(jnp.float32) if coarse(x) else None, params)


def _wide(copies: PyTree, params: PyTree) -> PyTree:
  """The copies, and the parameters that have none."""
  pick = lambda copy, x: x if copy is None else copy
  return jax.tree.map(pick, copies, params, is_leaf=_is_none)


def _is_none(x) -> bool:
  return x is None
