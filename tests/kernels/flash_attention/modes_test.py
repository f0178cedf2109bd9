"""JAX's own modes around every implementation: 64 bits, strict types, explicit meshes, export."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

from effjax.attention.masks import Causal
from effjax.kernels.flash_attention import cases, reference
from effjax.kernels.flash_attention.fused import gpu, tpu
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tiled import xla
from effjax.kernels.flash_attention.tiled.tiles import Tiles

FUSED = {"sizes": Sizes(*[Size(16, 16)] * 3), "interpret": True}
IMPLEMENTATIONS = {
  "reference": reference.attention,
  "xla": functools.partial(xla.attention, tiles=Tiles(1, 1, 16, 16)),
  "gpu": functools.partial(gpu.attention, **FUSED),
  "tpu": functools.partial(tpu.attention, **FUSED),
}
EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)
IDS = np.sort(np.random.default_rng(0).integers(-1, 3, (2, 36)), axis=1)


@functools.cache
def results(name, mode=None):
  """Values and gradients of the same problem, as numpy arrays."""
  arrays = cases.operands(2, 36, 36, 2, 1, 8, 8, (1, 2, 36, 36))
  ids = jnp.asarray(IDS)
  run = functools.partial(IMPLEMENTATIONS[name], scale=0.4, logit_softcap=1.5, mask=Causal())
  found = jax.jit(functools.partial(cases.evaluate, run))(arrays, {"segment_ids": (ids, ids)})
  return jax.tree.map(np.asarray, found)


@EVERY
def test_64_bits_change_nothing_for_arrays_of_32(name):
  with jax.enable_x64(True):
    got = results(name, "x64")
  assert {x.dtype for x in got} == {np.dtype("float32")}
  chex.assert_trees_all_close(got, results(name), atol=1e-6)


@EVERY
def test_strict_types(name):
  with jax.numpy_dtype_promotion("strict"):
    chex.assert_trees_all_close(results(name, "strict"), results(name), atol=1e-6)


@EVERY
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_shards_with_checked_axes(name, kind):
  q, k, v, *_ = cases.operands(2, 36, 36, 4, 2, 8, 8)
  run = lambda *x: IMPLEMENTATIONS[name](*x, mask=Causal(), scale=0.4)[0]
  gradients = lambda run: jax.jit(jax.grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2)))
  want = gradients(run)(q, k, v)
  mesh = jax.make_mesh((2, 2), ("b", "h"), axis_types=(jax.sharding.AxisType[kind],) * 2)
  spec = P("b", None, "h")
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, jax.NamedSharding(mesh, spec)) for x in (q, k, v)]
    sharded = jax.shard_map(run, in_specs=spec, out_specs=spec)
    got = gradients(sharded)(*placed)
  chex.assert_trees_all_close(*jax.tree.map(np.asarray, (got, want)), atol=1e-5)


@pytest.mark.parametrize("name", ["gpu", "tpu"])
def test_derivatives_that_there_are_none_of_name_what_has_them(name):
  q, k, v, *_ = cases.operands(1, 36, 36, 1, 1, 8, 8)
  run = lambda q: (IMPLEMENTATIONS[name](q, k, v, mask=Causal(), scale=0.4)[0] ** 2).sum()
  for derivative in (
    lambda q: jax.jvp(run, (q,), (q,)),
    jax.grad(lambda q: jax.grad(run)(q).sum()),
    lambda q: jax.jvp(jax.grad(run), (q,), (q,)),
  ):
    with pytest.raises(NotImplementedError, match="implementation='xla'"):
      jax.jit(derivative).lower(q)
