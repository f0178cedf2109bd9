"""JAX's own modes around attention and models: explicit meshes, 64 bits, strict types."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from effjax.attention import LSRA, Attention, LinearAttention, attend, masks, ring_attend
from effjax.core import trees
from effjax.decode import generate
from effjax.layers import MLP, Context, Linear, Rope, capture
from effjax.layers.reductions import sum_of_squares
from effjax.models import LayerSpec, Transformer, TransformerConfig
from effjax.moe import MoE, TopK
from effjax.peft import lora, trainable
from effjax.quant import quantize
from tests.modules import normal, random_params

P = PartitionSpec
MESH = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType.Explicit,) * 2)
Q, K, V = (normal(4, 24, n, 8, seed=i) for i, n in enumerate((4, 2, 2)))
TOKENS = np.random.default_rng(1).integers(0, 32, (4, 6)).astype(np.int32)
LAYERS = (
  LayerSpec(Attention(4, 2, rope=Rope(), qk_norm=1e-6), MLP(24, "silu", gated=True)),
  LayerSpec(LSRA(2, kernel=3), MoE(TopK(4, 2), MLP(24))),
  LayerSpec(LinearAttention(4, chunk=4), None),
)
MODEL = Transformer(TransformerConfig(32, 16, LAYERS, context=16, positions="learned"))


@pytest.fixture(scope="module")
def params():
  return random_params(MODEL, TOKENS)


def put(tree, *spec):
  return jax.tree.map(lambda x: jax.device_put(x, NamedSharding(MESH, P(*spec))), tree)


def split(x):
  """The last axis that four devices divide, over the axis of the rows, as ZeRO splits it."""
  axes = [i for i, size in enumerate(x.shape) if size % 4 == 0]
  return put(x, *([None] * axes[-1] + ["data"])) if axes else put(x)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("spec", [("data",), ("data", None, "model"), (None, "data")])
def test_attend_on_an_explicit_mesh(spec, implementation):
  run = functools.partial(attend, mask=masks.Causal(), implementation=implementation)
  placed = [put(x, *spec) for x in (Q, K, V)]
  y, lse = jax.jit(functools.partial(run, return_lse=True))(*placed)
  assert y.sharding.spec[: len(spec)] == spec == lse.sharding.spec[: len(spec)]
  np.testing.assert_allclose(y, jax.jit(run)(Q, K, V), atol=1e-5)


@pytest.mark.parametrize("implementation", ["reference", "xla"])
def test_gradients_of_attend_on_an_explicit_mesh(implementation):
  loss = lambda *x: (attend(*x, mask=masks.Causal(), implementation=implementation) ** 2).sum()
  gradients = jax.jit(jax.grad(loss, (0, 1, 2)))
  with jax.set_mesh(MESH):
    got = gradients(*(put(x, "data", None, "model") for x in (Q, K, V)))
  assert all(x.sharding.spec[:3] == ("data", None, "model") for x in got)
  chex.assert_trees_all_close(*jax.tree.map(np.asarray, (got, gradients(Q, K, V))), atol=1e-4)


def test_ring_attend_on_an_explicit_mesh():
  spec = P(None, "data")
  ring = functools.partial(ring_attend, axis="data", mask=masks.Causal())
  run = jax.shard_map(ring, mesh=MESH, in_specs=spec, out_specs=spec, check_vma=True)
  y = jax.jit(run)(*(put(x, *spec) for x in (Q, K, V)))
  np.testing.assert_allclose(y, jax.jit(functools.partial(attend, mask=masks.Causal()))(Q, K, V),
                             atol=1e-5)  # fmt: skip


@jax.jit
def value_and_gradient(params, tokens):
  loss = lambda params: (MODEL.apply({"params": params}, tokens) ** 2).mean()
  return MODEL.apply({"params": params}, tokens), jax.grad(loss)(params)


@pytest.mark.parametrize("place", [put, split])
def test_a_model_on_an_explicit_mesh(place, params):
  placed = jax.tree.map(place, params)
  y, grads = value_and_gradient(placed, put(TOKENS, "data"))
  assert y.sharding.spec[0] == "data"
  chex.assert_trees_all_equal(*jax.tree.map(jax.typeof, (grads, placed)))
  plain = value_and_gradient(params, TOKENS)
  chex.assert_trees_all_close(*jax.tree.map(np.asarray, ((y, grads), plain)), atol=1e-4)


@pytest.mark.parametrize(("context", "dtype"), [(False, None), (True, jnp.int8)])
def test_decoding_on_an_explicit_mesh(context, dtype, params):
  @jax.jit
  def decode(params, tokens, cache):
    y, cache = MODEL.apply({"params": params}, tokens[:, :4], cache=cache)
    z, cache = MODEL.apply({"params": params}, tokens[:, 4:], cache=cache)
    return jnp.concatenate([y, z], axis=1), cache

  cache = MODEL.init_cache(4, 8, dtype=dtype)
  want, _ = decode(params, TOKENS, cache)
  plain = generate(MODEL, params, TOKENS, max_new_tokens=3, cache_dtype=dtype)
  with jax.set_mesh(MESH) if context else jax.default_matmul_precision("default"):
    placed, tokens = put(params), put(TOKENS, "data")
    cache = put(cache, "data")
    y, after = decode(placed, tokens, cache)
    new = generate(MODEL, placed, TOKENS, max_new_tokens=3, cache_dtype=dtype)
  np.testing.assert_allclose(y, want, atol=1e-5)
  assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(after))
  np.testing.assert_array_equal(new.tokens, plain.tokens)


def test_what_is_captured_on_an_explicit_mesh(params):
  run = functools.partial(capture, reduce=sum_of_squares, kind=(Linear, Attention), select="")
  got = run(MODEL, put(params), {"tokens": put(TOKENS, "data")})
  chex.assert_trees_all_close(got, run(MODEL, params, {"tokens": TOKENS}), rtol=1e-4)


@pytest.mark.parametrize("mode", ["x64", "strict"])
def test_64_bits_and_strict_types_change_nothing(mode, params):
  """Parameters stay of 32 bits, and ids are of 64."""
  ids = np.where(np.arange(6)[None] < np.array([[6], [4], [6], [1]]), 0, -1)

  @jax.jit
  def results(params, tokens, ids):
    loss = lambda params: (MODEL.apply({"params": params}, tokens, segment_ids=ids) ** 2).mean()
    cache = MODEL.init_cache(4, 8)
    y, cache = MODEL.apply({"params": params}, tokens[:, :4], segment_ids=ids[:, :4], cache=cache)
    z, cache = MODEL.apply({"params": params}, tokens[:, 4:], segment_ids=ids[:, 4:], cache=cache)
    return y, z, jax.grad(loss)(params), cache

  want = results(params, TOKENS, ids.astype(np.int32))
  kind = np.int64 if mode == "x64" else np.int32
  with jax.enable_x64(True) if mode == "x64" else jax.numpy_dtype_promotion("strict"):
    got = results(params, TOKENS.astype(kind), ids.astype(kind))
    eager = MODEL.apply({"params": params}, jnp.asarray(TOKENS.astype(kind)))
    text = generate(MODEL, params, TOKENS.astype(kind), max_new_tokens=3).tokens
  np.testing.assert_array_equal(text, generate(MODEL, params, TOKENS, max_new_tokens=3).tokens)
  chex.assert_trees_all_equal_dtypes(got, want)
  chex.assert_trees_all_close(got, want, atol=1e-4)
  assert eager.dtype == jnp.float32


@pytest.mark.parametrize(("mode", "dtype"), [("x64", jnp.bfloat16), ("strict", jnp.float32)])
def test_64_bits_and_strict_types_around_low_rank_updates_of_integers(mode, dtype, params):
  """Of activations of 16 bits too."""
  model = MODEL.copy(dtype=dtype)
  adapted = lora.add(quantize(params), jax.random.key(0), rank=2)
  updates, base = trees.partition(adapted, trainable(adapted))

  @jax.jit
  def results(updates, tokens):
    run = lambda updates: model.apply({"params": trees.merge(updates, base)}, tokens)
    return run(updates), jax.grad(lambda updates: (run(updates) ** 2).mean())(updates)

  want = results(updates, TOKENS)
  with jax.enable_x64(True) if mode == "x64" else jax.numpy_dtype_promotion("strict"):
    got = results(updates, TOKENS.astype(np.int64 if mode == "x64" else np.int32))
  chex.assert_trees_all_equal_dtypes(got, want)
  chex.assert_trees_all_close(*jax.tree.map(np.asarray, (got, want)), atol=1e-2)


@pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])
@pytest.mark.parametrize("kind", ["Auto", "Explicit"])
def test_attend_where_each_device_has_its_part(kind, implementation):
  run = functools.partial(attend, mask=masks.Causal(), implementation=implementation)
  results = lambda run: jax.jit(jax.value_and_grad(lambda *x: (run(*x) ** 2).sum(), (0, 1, 2)))
  mesh = jax.make_mesh((4, 2), ("data", "model"), axis_types=(AxisType[kind],) * 2)
  spec = P("data", None, "model")
  with jax.set_mesh(mesh):
    placed = [jax.device_put(x, NamedSharding(mesh, spec)) for x in (Q, K, V)]
    sharded = jax.shard_map(run, in_specs=spec, out_specs=spec, check_vma=True)
    got = results(sharded)(*placed)
  chex.assert_trees_all_close(*jax.tree.map(np.asarray, (got, results(run)(Q, K, V))), rtol=1e-4,
                              atol=1e-4)  # fmt: skip


def test_a_cache_under_vmap_and_checkpoint():
  module = Attention(2, mask=masks.SlidingWindow(2, 2))
  x = normal(3, 2, 5, 8)
  params = random_params(module, x[0])

  @jax.checkpoint
  def decode(x):
    _, cache = module.apply({"params": params}, x[:, :3], Context(), module.init_cache(8, 2, 6))
    return module.apply({"params": params}, x[:, 3:], Context(), cache)[0]

  whole = jax.jit(jax.vmap(decode))(x)
  np.testing.assert_allclose(whole[1], jax.jit(decode)(x[1]), atol=1e-6)
  assert np.isfinite(jax.jit(jax.grad(lambda x: jax.vmap(decode)(x).sum()))(x)).all()
