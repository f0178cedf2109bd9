"""`attend` is exact attention whatever the implementation, and says what does not fit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import attend
from effjax.attention.masks import Causal, Documents, SlidingWindow

IMPLEMENTATIONS = pytest.mark.parametrize("implementation", ["reference", "xla", "interpret"])


def qkv(B=2, T=24, S=24, N=4, K=2, H=8, Hv=8):
  shapes = (B, T, N, H), (B, S, K, H), (B, S, K, Hv)
  rng = np.random.default_rng(0)
  return [jax.device_put(rng.normal(size=shape).astype(jnp.float32)) for shape in shapes]


def jitted(**arguments):
  return jax.jit(functools.partial(attend, **arguments))


@IMPLEMENTATIONS
def test_equals_jax_nn(implementation):
  q, k, v = qkv()
  bias = jax.device_put(np.random.default_rng(5).normal(size=(2, 4, 24, 24)).astype(jnp.float32))
  got = jitted(mask=Causal(), implementation=implementation)(q, k, v, bias=bias)
  peer = jax.jit(functools.partial(jax.nn.dot_product_attention, is_causal=True))
  want = peer(q, k, v, bias=bias)
  chex.assert_trees_all_close(got, want, atol=1e-5)


@IMPLEMENTATIONS
def test_equals_torch(implementation):
  torch = pytest.importorskip("torch", reason="torch is installed on Python 3.11 only")
  q, k, v = qkv()
  got = jitted(mask=SlidingWindow(5, 2), scale=0.2, implementation=implementation)(q, k, v)
  t = [torch.tensor(np.asarray(x)).transpose(1, 2) for x in (q, k, v)]
  seen = torch.tensor(np.asarray(SlidingWindow(5, 2).dense(24)))
  want = torch.nn.functional.scaled_dot_product_attention(
    *t, attn_mask=seen, scale=0.2, enable_gqa=True
  )
  chex.assert_trees_all_close(got, want.transpose(1, 2).numpy(), atol=1e-5)


@IMPLEMENTATIONS
def test_causal_by_gradient(implementation):
  q, k, v = qkv(B=1, N=2)
  function = lambda v: attend(q, k, v, mask=Causal(), implementation=implementation)[0, :, 0, 0]
  reach = jnp.abs(jax.jit(jax.jacrev(function))(v)).sum((1, 3, 4))
  np.testing.assert_array_equal(np.asarray(reach) > 0, np.tril(np.ones((24, 24), bool)))


@IMPLEMENTATIONS
def test_packing_changes_nothing(implementation):
  """Two documents in one row, with padding, are the two documents alone."""
  q, k, v = qkv(B=1, T=30, S=30)
  ids = jnp.array([[0] * 11 + [4] * 14 + [-1] * 5])
  run = jitted(mask=Causal(), implementation=implementation)
  packed = run(q, k, v, segment_ids=ids)
  for a, b in ((0, 11), (11, 25)):
    alone = run(q[:, a:b], k[:, a:b], v[:, a:b])
    chex.assert_trees_all_close(packed[:, a:b], alone, atol=1e-5)
  assert (packed[:, 25:] == 0).all()


@IMPLEMENTATIONS
def test_decoding_equals_the_whole_sequence(implementation):
  """Queries at their positions against a cache longer than what has been written."""
  q, k, v = qkv()
  whole = jitted(mask=Causal() & SlidingWindow(9, 0))(q, k, v)
  cache = [np.pad(x, ((0, 0), (0, 8), (0, 0), (0, 0)), constant_values=7) for x in (k, v)]
  positions = np.array([[3, 17], [8, 23]])
  there = positions[:, :, None, None]
  chosen, want = (np.take_along_axis(np.asarray(x), there, 1) for x in (q, whole))
  run = jitted(mask=Causal() & SlidingWindow(9, 0), implementation=implementation)
  got = run(chosen, *cache, query_positions=positions)
  chex.assert_trees_all_close(got, want, atol=1e-5)


@IMPLEMENTATIONS
def test_segments_of_a_sequence_follow_query_positions(implementation):
  q, k, v = qkv()
  ids = jnp.array([[0] * 10 + [1] * 14, [0] * 20 + [-1] * 4])
  run = jitted(mask=Causal(), segment_ids=ids, implementation=implementation)
  positions = np.broadcast_to(np.arange(24), (2, 24))
  chex.assert_trees_all_close(run(q, k, v), run(q, k, v, query_positions=positions), atol=1e-6)


@IMPLEMENTATIONS
def test_log_sum_exp_joins_two_halves_of_the_keys(implementation):
  q, k, v = qkv()
  run = jitted(return_lse=True, implementation=implementation)
  whole, lse = run(q, k, v)
  (a, la), (b, lb) = run(q, k[:, :12], v[:, :12]), run(q, k[:, 12:], v[:, 12:])
  a, la, b, lb, lse = map(np.asarray, (a, la, b, lb, lse))
  chex.assert_trees_all_close(np.logaddexp(la, lb), lse, atol=1e-5)
  joined = a * np.exp(la - lse)[..., None] + b * np.exp(lb - lse)[..., None]
  chex.assert_trees_all_close(joined, whole, atol=1e-5)


def test_soft_cap_bounds_the_scores():
  q, k, v = qkv()
  _, lse = jitted(logit_softcap=2.0, return_lse=True)(100 * q, k, v)
  assert (np.abs(lse) <= 2.0 + np.log(24) + 1e-5).all()


def test_mask_is_a_traced_argument_too():
  q, k, v = qkv()
  ids = np.sort(np.random.default_rng(3).integers(0, 3, (2, 24)), axis=1).astype(np.int32)
  got = jax.jit(lambda mask: attend(q, k, v, mask=mask))(Causal() & Documents(ids))
  want = jitted(mask=Causal(), implementation="reference")(q, k, v, segment_ids=ids)
  chex.assert_trees_all_close(got, want, atol=1e-5)


BAD = {
  "heads": ({"N": 3}, {}, "3 heads, not a multiple of key's 2"),
  "mask": ({}, {"mask": jnp.ones((24, 24))}, "expected a mask"),
  "documents": ({}, {"mask": Documents(jnp.zeros((2, 23), int))}, r"\(2, 23\)"),
  "documents and positions": (
    {},
    {"mask": Documents((jnp.zeros((2, 24), int),) * 2), "query_positions": jnp.zeros((2, 24), int)},
    "query_positions",
  ),
  "bias": ({}, {"bias": jnp.ones((2, 3, 24, 24))}, r"bias has shape \(2, 3, 24, 24\)"),
  "bias rank": ({}, {"bias": jnp.ones((24, 24))}, "bias has shape"),
  "segments": ({}, {"segment_ids": jnp.zeros((2, 5), int)}, r"keys have shape \(2, 5\)"),
  "segment pair": (
    {},
    {"segment_ids": (jnp.zeros((2, 5), int), jnp.zeros((2, 24), int))},
    r"queries have shape \(2, 5\)",
  ),
  "segment type": ({}, {"segment_ids": jnp.zeros((2, 24))}, "expected integers"),
  "positions": ({}, {"query_positions": jnp.zeros((24,), int)}, "query_positions has shape"),
  "not here": ({}, {"implementation": "gpu"}, "'gpu' is not available on cpu; available: 'ref"),
  "unknown": ({}, {"implementation": "fast"}, "'fast' is unknown"),
}


@pytest.mark.parametrize("case", BAD)
def test_what_does_not_fit_is_named(case):
  shapes, arguments, message = BAD[case]
  with pytest.raises(ValueError, match=message):
    attend(*qkv(**shapes), **arguments)


def test_arrays_that_do_not_fit_are_named():
  q, k, v = qkv()
  for arrays, message in (
    ((q, k[..., :4], v), "head width: query has 8, key 4"),
    ((q, k, v[:, :20]), r"value has \[length, heads\] \(20, 2\)"),
    ((q, k[:1], v[:1]), "batch: query has 2, key 1"),
    ((q[0], k, v), r"query has shape \(24, 4, 8\)"),
    ((q.astype(int), k, v), "query has type int"),
  ):
    with pytest.raises(ValueError, match=message):
      attend(*arrays)
