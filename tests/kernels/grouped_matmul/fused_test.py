"""The kernels of GPUs and TPUs, interpreted, against float64."""

import functools
import itertools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.kernels.grouped_matmul import fused, grouped_linear, visits
from effjax.kernels.grouped_matmul.sizes import Size, choose
from effjax.kernels.quantized_matmul import Lying, as_it_lies
from effjax.peft.lora import LoRA
from effjax.quant import NF4, Int4, Int8
from tests.modules import normal

ROWS, GROUPS = 70, 5
SIZES = (0, 37, 1, 20, 0), (20, 0, 0, 40, 10), (0, 0, 0, 0, 0)
TILES = {"gpu": Size(16, 32, 32), "tpu": Size(32, 128, 16)}  # several of each, with a rest
MAKE = {
  "nf4": NF4.quantize,
  "double": functools.partial(NF4.quantize, double=True),
  "affine": functools.partial(Int4.quantize, group=32, symmetric=False),
  "int8": Int8.quantize,
  "int8 rows": functools.partial(Int8.quantize, granularity="row"),
  "int8 turned": lambda w: Int8.quantize(jnp.matrix_transpose(w)).T,
}
MORE = "affine", "double", "int8 rows", "int8 turned"


@pytest.fixture(params=fused.KERNELS)
def platform(request, monkeypatch):
  """A platform's name, its kernels interpreted in small tiles where a device would run them."""
  name, kernels = request.param, fused.KERNELS[request.param]
  small = functools.partial(functools.partial, size=TILES[name], interpret=True)
  interpreted = types.SimpleNamespace(
    fits=kernels.fits, products=small(kernels.products), sums=small(kernels.sums)
  )
  monkeypatch.setitem(fused.KERNELS, name, interpreted)
  monkeypatch.setattr(jax, "default_backend", lambda: name)
  monkeypatch.setattr(jax, "device_count", lambda: 1)
  return name


def spans(sizes):
  ends = np.cumsum(sizes)
  return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]


def exact(x, w, sizes, dy):
  """Values and gradients by a loop in float64."""
  x, w, dy = (np.asarray(a, np.float64) for a in (x, w, dy))
  y, dx = np.zeros(dy.shape), np.zeros(x.shape)
  for e, rows in enumerate(spans(sizes)):
    y[rows], dx[rows] = x[rows] @ w[e], dy[rows] @ w[e].T
  return y, dx, np.stack([x[rows].T @ dy[rows] for rows in spans(sizes)])


def spoilt(x, sizes):
  return x.at[sum(sizes) :].set(jnp.nan)


def test_values_and_gradients_of_arrays(platform):
  dtype = {"gpu": jnp.float32, "tpu": jnp.bfloat16}[platform]
  x, w, dy = normal(ROWS, 40), normal(GROUPS, 40, 150), normal(ROWS, 150, seed=1)

  @jax.jit
  def run(x, w, sizes, dy):
    y, pull = jax.vjp(lambda x, w: fused.product(platform, x, as_it_lies(w), sizes), x, w)
    return y, *pull(dy)

  x, w, dy = (a.astype(dtype) for a in (x, w, dy))
  for sizes in SIZES:
    got = run(spoilt(x, sizes), w, jnp.array(sizes), spoilt(dy, sizes))
    for found, wanted in zip(got, exact(x, w, sizes, dy), strict=True):
      assert found.dtype == dtype
      tolerance = (1e-5 if dtype == jnp.float32 else 8e-3) * max(1, np.abs(wanted).max())
      np.testing.assert_allclose(np.asarray(found, np.float64), wanted, rtol=0, atol=tolerance)
      assert not found[jnp.asarray(wanted == 0)].any()


@pytest.mark.parametrize(
  ("platform", "name"),
  [*itertools.product(fused.KERNELS, ("nf4", "int8")), *zip(itertools.cycle(fused.KERNELS), MORE)],
  indirect=["platform"],
)
def test_packed_matrices_are_multiplied_as_they_lie(platform, name, monkeypatch):
  w, sizes = MAKE[name](normal(GROUPS, 64, 72)), SIZES[0]
  x, dy = normal(ROWS, 64, seed=1), normal(ROWS, 72, seed=2)
  lying = as_it_lies(w)
  assert fused.fits(platform, x, lying)
  dense = np.asarray(w.materialize())

  @jax.jit
  def run(x, dy, sizes):
    y, pull = jax.vjp(lambda x: fused.product(platform, x, lying, sizes), x)
    return y, *pull(dy)

  for kind in (NF4, Int4, Int8):
    monkeypatch.setattr(kind, "materialize", None)
  got = run(spoilt(x, sizes), spoilt(dy, sizes), jnp.array(sizes))
  for found, wanted in zip(got, exact(x, dense, sizes, dy), strict=False):
    np.testing.assert_allclose(found, wanted, rtol=1e-4, atol=3e-5 * np.abs(wanted).max())


@pytest.mark.parametrize("platform", ["gpu"], indirect=True)
def test_adapters_over_packed_experts_train(platform):
  """With a bias, and with what no kernel knows, as `implementation` None picks here."""
  sizes, bias = jnp.array(SIZES[0]), normal(GROUPS, 72, seed=5)
  base = NF4.quantize(normal(GROUPS, 64, 72))
  factors = normal(GROUPS, 64, 3, seed=1), normal(GROUPS, 3, 72, seed=2)
  x, dy = spoilt(normal(ROWS, 64, seed=3), SIZES[0]), normal(ROWS, 72, seed=4)

  @functools.partial(jax.jit, static_argnums=4)
  def run(x, factors, scale, bias, implementation):
    def apply(x, factors, scale, bias):
      nf4 = NF4(base.codes, scale, block=base.block)
      w = LoRA(nf4, *factors, jnp.ones((GROUPS, 1, 1)))
      return grouped_linear(x, w, sizes, bias, implementation=implementation)

    y, pull = jax.vjp(apply, x, factors, scale, bias)
    return y, pull(dy)

  given = x, factors, base.scale, bias
  jax.tree.map(
    functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-3),
    run(*given, platform),
    run(*given, "reference"),
  )
  text = str(jax.make_jaxpr(functools.partial(run, implementation=None))(*given))
  assert "grouped_products" in text and "grouped_sums" in text


def test_what_kernels_do_not_know_goes_another_way(platform):
  x, sizes = normal(ROWS, 16), jnp.array(SIZES[0])
  odd = Int4.quantize(normal(GROUPS, 16, 24), group=4)  # blocks of two bytes
  half, array = x.astype(jnp.float16), as_it_lies(normal(GROUPS, 16, 24))
  assert fused.fits(platform, half, array) == (platform == "gpu")
  assert fused.fits(platform, x, as_it_lies(odd)) == (platform == "tpu")
  if platform == "tpu":
    return
  y = jax.jit(functools.partial(grouped_linear, implementation=platform))(x, odd, sizes)
  wanted = grouped_linear(x, odd, sizes, implementation="reference")
  np.testing.assert_allclose(y, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("aligned", [False, True])
def test_visits_cover_every_row_once_for_its_group(aligned):
  listed = jax.jit(lambda sizes: visits.of_rows(sizes, ROWS, 16, aligned))
  for sizes in (*SIZES, (70, 0, 0, 0, 0), (14, 14, 14, 14, 14)):
    found = listed(jnp.array(sizes))
    group, tile, begin, end, (count,) = (np.asarray(x) for x in found)
    begin, end = ((x[:count]) for x in (begin, end))
    first = tile[:count] * 16 if aligned else tile[:count]
    assert (np.maximum(first, begin) < np.minimum(end, first + 16)).all()
    rows = [np.arange(max(a, f), min(b, f + 16)) for f, a, b in zip(first, begin, end, strict=True)]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(ROWS))
    of_row = np.repeat(np.arange(GROUPS + 1), (*sizes, ROWS - sum(sizes)))
    np.testing.assert_array_equal(np.repeat(group[:count], [len(x) for x in rows]), of_row)
    assert (np.asarray(found.begin)[count:] >= np.asarray(found.end)[count:]).all()


def test_visits_of_groups_without_rows_stay_within_the_tiles():
  found = visits.of_groups(jnp.array([0, 32, 0]), 32, 16)
  assert found.group.tolist()[: int(found.visited[0])] == [0, 1, 1, 2]
  assert max(found.tile.tolist()) == 1


def test_a_tile_has_no_more_rows_than_groups_have():
  many, few = (choose("gpu", jnp.bfloat16, rows, 8, "NVIDIA H100") for rows in (8192, 16))
  assert (few.products.rows, many.products.rows) == (16, 128)
  assert choose("tpu", jnp.float32, 16, 8, "TPU v5 lite").products.rows == 512


def test_kernels_of_another_platform_are_refused():
  with pytest.raises(ValueError, match=r"implementation='gpu'; allowed: one of \(None, 'tiles', "):
    grouped_linear(jnp.ones((2, 3)), jnp.ones((1, 3, 4)), jnp.array([2]), implementation="gpu")


def test_matrices_lie_as_their_shapes_say():
  w = NF4.quantize(normal(2, 64, 72))
  assert as_it_lies(w).shape == w.shape == (2, 64, 72)
  assert isinstance(as_it_lies(jnp.ones((2, 3, 4))), Lying)
  assert as_it_lies(LoRA(w, normal(2, 64, 3), normal(2, 3, 72), jnp.ones((2, 1, 1)))) is None
