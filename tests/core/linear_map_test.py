"""A linear function with a transpose of its own is differentiated like any other."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effjax.core.linear_map import linear_map

A = jnp.array([0.3, -1.2, 2.0])
X = jnp.array([1.0, 2.0, -0.5])


def plain(a, x):
  return jnp.sin(a) * x


def loop(a, x):
  """The same, in a loop that only `linear_map` can transpose."""
  step = lambda i, total: total + jnp.sin(a) * x / 4
  return jax.lax.fori_loop(0, jnp.where(a[0] > 1e9, 5, 4), step, jnp.zeros_like(a + x))


@jax.custom_jvp
def ours(a, x):
  return plain(a, x)


@ours.defjvp
def _ours_jvp(primals, tangents):
  y = ours(*primals)
  function = lambda known, moves: loop(known[0], moves[1]) + jnp.cos(known[0]) * known[1] * moves[0]
  back = lambda known, c: (jnp.cos(known[0]) * known[1] * c, jnp.sin(known[0]) * c)
  return y, linear_map(function, back, primals, tangents, y)


def mean_square(f):
  return lambda a, x: jnp.square(f(a, x)).mean()


ROWS = A[:, None] * X[None]


def mapped(f):
  return jax.grad(lambda x: jax.vmap(f, (0, None))(ROWS, x).sum())(X)


def scanned(f):
  again = lambda a, x: (f(a, x), None)
  return jax.grad(lambda a: jax.lax.scan(again, a, ROWS)[0].sum())(A)


def past_a_tangent(f):
  target = lambda a: jax.lax.stop_gradient(jax.jvp(f, (a, X), (X, A))[1])
  return jax.grad(lambda a: jnp.square(target(a) - f(a, X)).sum())(A)


FORMS = {
  "jvp": lambda f: jax.jvp(f, (A, X), (X, A))[1],
  "linearize": lambda f: jax.linearize(f, A, X)[1](X, A),
  "grad": lambda f: jax.grad(mean_square(f), (0, 1))(A, X),
  "grad in one": lambda f: jax.grad(mean_square(f), 1)(A, X),
  "checkpoint": lambda f: jax.grad(mean_square(jax.checkpoint(f)), (0, 1))(A, X),
  "map of grad": lambda f: jax.vmap(jax.grad(mean_square(f)), (1, None))(ROWS, X),
  "grad of map": mapped,
  "scan": scanned,
  "hessian": lambda f: jax.hessian(mean_square(f), (0, 1))(A, X),
  "forwards twice": lambda f: jax.jacfwd(jax.jacfwd(f))(A, X),
  "reverse past a tangent": past_a_tangent,
}


@pytest.mark.parametrize("name", FORMS)
def test_derivatives_are_those_of_the_function(name):
  got, want = (jax.jit(lambda f=f: FORMS[name](f))() for f in (ours, plain))
  jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-6), got, want)


def test_it_keeps_to_a_device():
  mesh = jax.make_mesh((8,), ("x",), axis_types=(jax.sharding.AxisType.Auto,))
  a = x = jnp.linspace(-1, 1, 16)

  def loss(f):
    run = jax.shard_map(f, mesh=mesh, in_specs=P("x"), out_specs=P("x"))
    return jax.jit(jax.grad(mean_square(run), (0, 1)))(a, x)

  for got, want in zip(loss(ours), loss(plain), strict=True):
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_reverse_over_forward_is_that_of_the_loop():
  with pytest.raises(ValueError, match="Reverse-mode"):
    jax.jit(jax.grad(lambda a: jax.jvp(ours, (a, X), (X, A))[1].sum()))(A)
