"""Parameters and values of modules, with as few programs as there can be."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.partial(jax.jit, static_argnums=0)
def apply(module, params, *args, **kwargs):
  """What the module computes: one program for each module and each form of its arguments."""
  return module.apply({"params": params}, *args, **kwargs)


def random_params(module, *args, seed=0, **kwargs):
  """A parameter tree drawn by numpy: matrices of unit gain, and no bias is 0, no scale 1.

  Integers, which are the experts of a table, are 0 or 1.
  """
  shapes = jax.eval_shape(module.init, jax.random.key(0), *args, **kwargs)["params"]
  rng = np.random.default_rng(seed)

  def draw(path, like):
    if jnp.issubdtype(like.dtype, jnp.integer):
      return jnp.asarray(rng.integers(0, 2, like.shape), like.dtype)
    x = rng.normal(size=like.shape)
    name = getattr(path[-1], "key", None)
    if name == "scale":
      x = 1 + 0.1 * x
    elif name == "embedding":
      x *= 0.02
    elif name == "bias" or x.ndim < 2:
      x *= 0.1
    else:
      x /= np.sqrt(like.shape[-2])
    return jnp.asarray(x, like.dtype)

  return jax.tree_util.tree_map_with_path(draw, shapes)


def normal(*shape, seed=0):
  """Standard normal numbers, float32."""
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)
