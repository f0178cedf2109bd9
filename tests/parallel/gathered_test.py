import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import weights
from effjax.parallel import Zero, make_mesh
from effjax.parallel.gathered import Gathered


@weights.register()
class Scaled(weights.Weight):
  codes: object
  scale: object

  shape = property(lambda self: self.codes.shape)
  dtype = property(lambda self: self.scale.dtype)

  def materialize(self):
    return self.codes * self.scale


@pytest.fixture(params=["array", "weight"])
def pair(request):
  """(a plain weight, the same one split over 8 devices and gathered)."""
  draw = np.random.default_rng(0)
  base = jax.device_put(draw.normal(size=(16, 24)).astype(jnp.float32))
  if request.param == "weight":
    codes = jax.device_put(draw.integers(-9, 9, (16, 24)).astype(jnp.int8))
    base = Scaled(codes, jax.device_put(draw.normal(size=(1, 24)).astype(jnp.float32)))
  zero = Zero(make_mesh(data=8), 3)
  return base, Gathered(jax.device_put(base, zero.params(base)), zero.shards)


def test_it_is_the_weight_it_gathers(pair):
  plain, gathered = pair
  x = jax.device_put(np.random.default_rng(1).normal(size=(3, 16)).astype(jnp.float32))
  ids = jnp.array([[3, 0]])
  same = lambda f: np.testing.assert_allclose(jax.jit(f)(gathered), jax.jit(f)(plain), rtol=1e-5)
  same(lambda w: weights.linear(x, w))
  same(lambda w: weights.take(w, ids))
  same(lambda w: weights.linear(x[:, :1] * jnp.ones((1, 24)), weights.transpose(w)))
  same(weights.materialize)
  assert (gathered.shape, gathered.dtype, gathered.parameters) == ((16, 24), jnp.float32, 384)


@pytest.mark.usefixtures("optimized")
def test_gradients_are_those_of_the_weight_and_stay_split(pair):
  plain, gathered = pair
  x = jax.device_put(np.random.default_rng(1).normal(size=(3, 16)).astype(jnp.float32))
  loss = lambda w: jnp.square(weights.linear(x, w)).sum()
  grad = jax.jit(jax.grad(loss, allow_int=True))
  ours, theirs = jax.tree.leaves(grad(gathered))[-1], jax.tree.leaves(grad(plain))[-1]
  np.testing.assert_allclose(ours, theirs, rtol=1e-5)
  assert ours.addressable_shards[0].data.size == theirs.size // 8


def test_a_module_that_knows_arrays_only_takes_it_too(pair):
  plain, gathered = pair
  apply = jax.jit(
    lambda w: nn.Dense(24, use_bias=False).apply({"params": {"kernel": w}}, jnp.ones((2, 16)))
  )
  np.testing.assert_allclose(apply(gathered), apply(weights.materialize(plain)), rtol=1e-5)
