import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.decode import bucket, prefill, unrolled
from effjax.models import Transformer, presets


@pytest.fixture(scope="module")
def model():
  module = Transformer(presets.TINY)
  return module, module.init(jax.random.key(1), jnp.zeros((1, 1), jnp.int32))["params"]


def test_buckets_cover_waste_little_and_are_few():
  for n in range(1, 5000):
    assert n <= bucket(n) <= max(16, 1.25 * n)
    assert bucket(bucket(n)) == bucket(n)
  assert len({bucket(n) for n in range(1, 8193)}) <= 4 * 9 + 1


def test_prefill_then_one_step_is_the_whole_sequence(model):
  module, params = model
  tokens = jax.random.randint(jax.random.key(2), (2, 9), 0, 512)
  whole = module.apply({"params": params}, tokens)
  cache = prefill(module, params, tokens[:, :8], module.init_cache(2, 12))
  inputs = {"positions": jnp.full((2, 1), 8), "cache": cache}
  last, _ = module.apply({"params": params}, tokens[:, 8:], **inputs)
  np.testing.assert_allclose(last[:, 0], whole[:, -1], atol=1e-5)


def test_unrolled_is_the_same_model(model):
  module, params = model
  tokens = jnp.arange(10)[None]
  flat, flat_params = unrolled(module, params)
  assert len(flat_params) == len(params) + 1
  expected = module.apply({"params": params}, tokens)
  np.testing.assert_allclose(flat.apply({"params": flat_params}, tokens), expected, atol=1e-5)
