"""Parts of the keys, sinks among them, against one softmax over all columns in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, attend, parts
from effjax.attention.longformer import Longformer
from effjax.attention.longlora import ShiftedSparseAttention, shifted_group_attention
from effjax.attention.masks import Causal, SlidingWindow

B, T, N, K, H = 2, 20, 4, 2, 8
SEEN = (Causal() & SlidingWindow(6, 0)).dense(T)
SINKS = np.array([-3.0, 0.0, 0.5, 4.0], np.float32)
PADDED = np.where(np.arange(T) < 15, 0, -1).astype(np.int32)[None].repeat(B, 0)
IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla"])


def draw(*shapes, dtype="float32"):
  rng = np.random.default_rng(0)
  return [jax.device_put(rng.normal(size=shape).astype(dtype)) for shape in shapes]


def problem(dtype="float32"):
  """Query, key, value, and cotangents of out and the log-sum-exp."""
  *qkv, d_out = draw((B, T, N, H), (B, T, K, H), (B, T, K, H), (B, T, N, H), dtype=dtype)
  return *qkv, d_out, *draw((B, T, N))


def written_out(query, key, value, sinks, seen):
  """One more column of scores, dropped after the softmax."""
  key, value = (jnp.repeat(x, N // K, axis=2) for x in (key, value))
  scores = jnp.einsum("btnh,bsnh->bnts", query, key) * H**-0.5
  scores = jnp.where(seen, scores, -jnp.inf)
  column = jnp.broadcast_to(sinks[None, :, None, None], (B, N, T, 1))
  scores = jnp.concatenate([scores, column], -1)
  weights = jax.nn.softmax(scores, -1)[..., :-1]
  lse = jax.nn.logsumexp(scores, -1)
  return jnp.einsum("bnts,bsnh->btnh", weights, value), jnp.swapaxes(lse, 1, 2)


def evaluate(function, query, key, value, d_out, d_lse, sinks=SINKS):
  """out, lse and the gradients of query, key, value, sinks."""
  results, backward = jax.vjp(function, query, key, value, sinks)
  return *results, *backward(tuple(map(lambda d, x: d.astype(x.dtype), (d_out, d_lse), results)))


def exact(seen, arrays):
  with jax.enable_x64(True):
    arrays = [jax.device_put(np.asarray(x, np.float64)) for x in (*arrays, SINKS)]
    function = functools.partial(written_out, seen=np.asarray(seen)[None, None])
    return jax.tree.map(np.asarray, jax.jit(functools.partial(evaluate, function))(*arrays))


@IMPLEMENTATIONS
@pytest.mark.parametrize("dtype, tolerance", [("float32", 2e-6), ("bfloat16", 2e-2)])
def test_a_sink_is_one_more_column_of_scores(implementation, dtype, tolerance):
  arrays = problem(dtype)

  def function(q, k, v, sinks):
    mask = Causal() & SlidingWindow(6, 0)
    options = {"sinks": sinks, "return_lse": True, "implementation": implementation}
    return attend(q, k, v, mask=mask, **options)

  got = jax.jit(functools.partial(evaluate, function))(*arrays)
  assert got[0].dtype == dtype and got[1].dtype == jnp.float32
  for x, y in zip(got, exact(SEEN, arrays), strict=True):
    scale = max(np.abs(y).max(), 1)
    np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=0, atol=tolerance * scale)


@IMPLEMENTATIONS
def test_a_query_that_sees_nothing_gives_zeros_and_no_gradients(implementation):
  def function(q, k, v, sinks):
    options = {"sinks": sinks, "return_lse": True, "implementation": implementation}
    return attend(q, k, v, segment_ids=PADDED, **options)

  q, k, v, d_out, d_lse = problem()
  d_lse = np.where(np.arange(T)[:, None] < 15, d_lse, 0)
  results = jax.jit(functools.partial(evaluate, function))(q, k, v, d_out, d_lse)
  out, lse, *gradients = map(np.asarray, results)
  assert (out[:, 15:] == 0).all() and (lse[:, 15:] == SINKS).all()
  assert all((gradient[:, 15:] == 0).all() for gradient in gradients[:3])
  assert all(np.isfinite(gradient).all() and gradient.any() for gradient in gradients)


def test_a_sink_far_below_the_scores_changes_nothing():
  q, k, v, *_ = problem()
  sinks = jnp.array([-1e4, -1e30, -jnp.inf, -200.0])
  run = jax.jit(functools.partial(attend, mask=Causal()))
  np.testing.assert_allclose(run(q, k, v, sinks=sinks), run(q, k, v), atol=1e-7)


def test_parts_join_in_any_order_and_empty_ones_do_not_count():
  q, k, v, *_ = problem()
  cuts = [slice(0, 3), slice(3, 4), slice(4, T)]
  run, join = jax.jit(functools.partial(attend, return_lse=True)), jax.jit(parts.join)
  some = [run(q, k[:, c], v[:, c]) for c in cuts]
  empty = jnp.zeros_like(q), jnp.full((B, T, N), -jnp.inf)
  whole = run(q, k, v)
  for order in ([0, 1, 2], [2, 0, 1]):
    out, lse = functools.reduce(join, (empty, *(some[i] for i in order), empty))
    np.testing.assert_allclose(out, whole[0], atol=1e-6)
    np.testing.assert_allclose(lse, whole[1], atol=1e-6)
  out, lse = join(empty, empty)
  assert (out == 0).all() and (lse == -jnp.inf).all()


@pytest.mark.parametrize(
  "sinks, came",
  [
    (jnp.zeros(2), r"\(2,\) of float32"),
    (jnp.zeros((1, 4)), r"\(1, 4\)"),
    (jnp.arange(4), "int32"),
  ],
)
def test_sinks_that_do_not_fit_are_named(sinks, came):
  with pytest.raises(ValueError, match=f"sinks has shape .*{came}.*, expected \\(4,\\) of floats"):
    attend(*problem()[:3], sinks=sinks)


def test_shifted_heads_keep_their_sinks():
  """Groups as long as the sequence are plain attention; shorter ones see their own sinks too."""
  q, k, v, *_ = problem()
  shifted = jax.jit(shifted_group_attention, static_argnames="group")
  got = shifted(q, k, v, group=T, sinks=SINKS)
  plain = jax.jit(functools.partial(attend, mask=Causal()))(q, k, v, sinks=SINKS)
  np.testing.assert_allclose(got, plain, atol=1e-6)
  got = shifted(q, k, v, group=4, sinks=SINKS)
  for n in range(N):
    alone = shifted(q, k, v, group=4, sinks=jnp.full(N, SINKS[n]))
    np.testing.assert_allclose(got[:, :, n], alone[:, :, n], atol=1e-6)


@pytest.mark.parametrize(
  "module",
  [
    Attention(4, sinks=True),
    ShiftedSparseAttention(4, sinks=True, group=4),
    Longformer(4, sinks=True, mask=SlidingWindow(3, 3), positions=1),
  ],
  ids=lambda module: type(module).__name__,
)
def test_modules_learn_their_sinks(module):
  x = draw((2, 8, 16))[0]
  params = jax.jit(module.init)(jax.random.key(0), x)["params"]
  assert params["sinks"].shape == (4,) and not params["sinks"].any()
  loss = lambda params: jnp.square(module.apply({"params": params}, x)[0]).sum()
  gradient = jax.jit(jax.grad(loss))(params)["sinks"]
  assert (gradient != 0).all() and jnp.isfinite(gradient).all()
  value = lambda module, params: jax.jit(module.apply)({"params": params}, x)[0]
  without = value(module.clone(sinks=False), params | {"sinks": None})
  dropped = params | {"sinks": jnp.full(4, -1e9)}
  np.testing.assert_allclose(value(module, dropped), without, atol=1e-6)
