import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from effjax.cost.compiled import compiled
from effjax.kernels.quantized_matmul import Integers, gpu, tpu
from effjax.kernels.quantized_matmul.fused import branches
from effjax.quant import FP4, GGUF, NF4, Int4

FORMATS = {
  "nf4": NF4.quantize,
  "double": functools.partial(NF4.quantize, double=True),
  "fp4": functools.partial(FP4.quantize, block=32),
  "int4": functools.partial(Int4.quantize, group=32),
  "affine": functools.partial(Int4.quantize, group=96, symmetric=False),
  "q4_0": functools.partial(GGUF.quantize, type="Q4_0"),
}


def normal(*shape, seed=0):
  return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


@functools.cache
def packed(name, inputs=192, outputs=70):
  w = FORMATS[name](normal(inputs, outputs))
  return w, np.asarray(w.materialize(), np.float64)


@jax.jit
def both(x, w, dy):
  y, pull = jax.vjp(w.matmul, x)
  return y, pull(dy)[0]


@pytest.mark.parametrize("name", FORMATS)
@pytest.mark.parametrize("rows", [0, 1, 9])
def test_products_and_gradients_are_those_of_the_matrix(name, rows):
  w, m = packed(name)
  x, dy = normal(rows, 192, seed=1), normal(rows, 70, seed=2)
  y, dx = both(x, w, dy)
  np.testing.assert_allclose(y, np.asarray(x, np.float64) @ m, rtol=1e-5, atol=1e-4)
  np.testing.assert_allclose(dx, np.asarray(dy, np.float64) @ m.T, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bit_activations_are_multiplied_in_32(dtype):
  w, m = packed("nf4")
  x = normal(3, 192, seed=1).astype(dtype)
  y = jax.jit(w.matmul)(x)
  expected = np.asarray(x, np.float64) @ m
  assert y.dtype == dtype
  np.testing.assert_allclose(np.asarray(y, np.float64), expected, rtol=1e-2, atol=1e-3)


def test_forward_mode_maps_and_scans():
  w, m = packed("int4", 64, 64)
  x = normal(2, 64, seed=1)
  y, dy = jax.jvp(w.matmul, (x,), (2 * x,))
  np.testing.assert_allclose(dy, 2 * y, rtol=1e-5)
  np.testing.assert_allclose(jax.vmap(w.matmul)(x), y, rtol=1e-5, atol=1e-5)
  two = jax.tree.map(lambda x: jnp.stack([x, x]), w)
  np.testing.assert_allclose(jax.vmap(lambda w: w.matmul(x))(two)[1], y, rtol=1e-5, atol=1e-5)
  scanned = jax.lax.scan(lambda x, w: (w.matmul(x) / 8, None), x, two)[0]
  np.testing.assert_allclose(scanned, np.asarray(x) @ m @ m / 64, rtol=1e-4, atol=1e-4)


def test_constants_that_are_differentiated_have_their_gradient():
  w, _ = packed("nf4")
  x = normal(3, 192, seed=1)
  of = lambda product: (
    lambda scale: product(jax.tree.unflatten(jax.tree.structure(w), [w.codes, scale])).sum()
  )
  ours = jax.grad(of(lambda w: w.matmul(x)))(w.scale)
  dense = jax.grad(of(lambda w: x @ w.materialize()))(w.scale)
  np.testing.assert_allclose(ours, dense, rtol=1e-4, atol=1e-4)


def test_rows_on_several_devices():
  w, m = packed("nf4")
  x = normal(16, 192, seed=1)
  mesh = jax.make_mesh((8,), ("data",), axis_types=(AxisType.Auto,))
  apart = jax.shard_map(
    lambda x, w: w.matmul(x), mesh=mesh, in_specs=(P("data"), P()), out_specs=P("data")
  )
  np.testing.assert_allclose(jax.jit(apart)(x, w), np.asarray(x) @ m, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("rows", [1, 8, 128])
def test_unrolled_layers_hold_no_expanded_matrices(optimized, rows):
  make = jax.eval_shape(NF4.quantize, jax.ShapeDtypeStruct((1024, 1024), jnp.float32))
  x = jax.ShapeDtypeStruct((rows, 1024), jnp.float32)
  layers = [make] * 10

  def chain(x, layers):
    for w in layers:
      x = jnp.tanh(w.matmul(x))
    return x

  held = 4 * 1024 * rows * 4
  packed_bytes = sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(layers))
  assert compiled(chain, x, layers).temporaries < packed_bytes / 8 + held


def nibbles(make):
  w = make(normal(128, 72))
  return w.format, w.codes, w.constants, np.asarray(w.materialize(), np.float64).T


def integers():
  q = np.random.default_rng(0).integers(-127, 128, (72, 128)).astype(np.int8)
  return Integers(64), jnp.asarray(q), (), q.astype(np.float64)


KERNELS_KNOW = {
  "nf4": lambda: nibbles(NF4.quantize),
  "affine": lambda: nibbles(functools.partial(Int4.quantize, symmetric=False)),
  "integers": integers,
}


@pytest.mark.parametrize("kernels", [gpu, tpu])
@pytest.mark.parametrize("name", KERNELS_KNOW)
@pytest.mark.parametrize("rows", [1, 7, 100])
def test_the_fused_kernels_equal_the_matrix(kernels, name, rows):
  format, codes, constants, m = KERNELS_KNOW[name]()
  x, dy = normal(rows, 128, seed=1).at[-1, 3].set(jnp.nan), normal(rows, 72, seed=2)
  dy = dy.at[0, 70].set(jnp.inf).at[0, 71].set(-jnp.inf)
  assert kernels.fits(x, format, codes, constants)
  y = kernels.outputs(x, format, codes, constants, interpret=True)
  dx = kernels.inputs(dy, format, codes, constants, interpret=True)
  for found, given, by in ((y, x, m.T), (dx, dy, m)):
    given = np.asarray(given, np.float64)
    known = np.isfinite(given).all(1)
    np.testing.assert_allclose(
      np.asarray(found)[known], given[known] @ by, rtol=1e-4, atol=3e-4 * np.abs(by).max()
    )
  assert np.isnan(np.asarray(y)[-1]).all()


def test_kernels_serve_integers_where_they_fit():
  x, q = jnp.ones((3, 576)), jnp.ones((1536, 576), jnp.int8)
  of = lambda block, x: set(branches(Integers(block), True, x, (q, ())))
  assert of(64, x) == {"cuda", "tpu"}
  assert of(9, x) == {"tpu"}
  assert of(64, x.astype(jnp.int32)) == set()
