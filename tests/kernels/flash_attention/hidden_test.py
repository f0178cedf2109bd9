"""What is hidden has no influence, NaN and infinity included, and nothing but −inf hides."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.masks import Causal, Full, Predicate, SlidingWindow
from effjax.attention.scores import Term
from effjax.kernels.flash_attention import cases, reference
from effjax.kernels.flash_attention.fused import gpu, tpu
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes
from effjax.kernels.flash_attention.tiled import xla
from effjax.kernels.flash_attention.tiled.tiles import Tiles

B, T, S, N, K, H = 2, 37, 45, 4, 2, 8
FUSED = {"sizes": Sizes(*[Size(16, 16)] * 3), "interpret": True}
IMPLEMENTATIONS = {
  "reference": reference.attention,
  "xla": functools.partial(xla.attention, tiles=Tiles(1, 1, 16, 8)),
  "fixed": functools.partial(xla.attention, tiles=Tiles(2, 2, 8, 16, fixed=True)),
  "gpu": functools.partial(gpu.attention, **FUSED),
  "tpu": functools.partial(tpu.attention, **FUSED),
}
EVERY = pytest.mark.parametrize("name", IMPLEMENTATIONS)
BAD = 20  # of the keys and, as far as it is among the queries, of the queries
POSITIONS = np.sort(np.random.default_rng(3).integers(0, S, (B, T)), axis=1).astype(np.int32)
IDS = np.where(np.arange(S) < 30, np.arange(S) // 7, -1)[None].repeat(B, 0)
CASES = {
  "causal": {"mask": Causal()},
  "window": {"mask": SlidingWindow(6, 2)},
  "segments": {"mask": Causal(), "segment_ids": (IDS[:, S - T :], IDS)},
  "positions": {"mask": Causal(), "query_positions": POSITIONS},
  "predicate": {"mask": Predicate(lambda q, k: (q * 7 + k * 5) % 3 != 1)},
  "bias": {"mask": Full()},
}


@functools.cache
def program(name, case, softcap=None):
  where = {
    key: x if key == "mask" else jax.tree.map(jnp.asarray, x) for key, x in CASES[case].items()
  }
  run = functools.partial(IMPLEMENTATIONS[name], scale=0.4, logit_softcap=softcap, **where)
  return jax.jit(lambda arrays: cases.evaluate(run, arrays, {}))


@functools.cache
def problem(case, softcap=None):
  """Arrays, which rows see the key that will be bad, [B, T], and what they give in float64."""
  arrays = cases.operands(B, T, S, N, K, H, H, (B, 1, T, S) if case == "bias" else None)
  arrays = [None if x is None else np.array(x) for x in arrays]
  where = CASES[case]
  if case == "bias":
    arrays[3][:, :, np.random.default_rng(2).random((T, S)) < 0.5] = -np.inf
    seen = arrays[3][:, 0] > -np.inf
  else:
    seen = np.asarray(where["mask"].dense(T, S, where.get("query_positions")))
    seen = np.broadcast_to(seen.reshape(-1, T, S), (B, T, S))
  if "segment_ids" in where:
    q, k = where["segment_ids"][0][:, :, None], where["segment_ids"][1][:, None]
    seen = seen & (q == k) & (q >= 0)
  touched = seen[:, :, BAD].copy()
  touched[:, BAD - (S - T)] = True  # the query that will be bad
  keep = ~touched[:, :, None]
  arrays[4], arrays[5] = arrays[4] * keep[..., None], arrays[5] * keep
  want = cases.exact(scale=0.4, logit_softcap=softcap)(arrays, where)
  return arrays, seen, touched, want


def check(got, seen, touched, want):
  """Rows that see nothing bad, and keys that no other row sees, are as if nothing were bad."""
  untouched, sees = ~touched, seen & touched[:, :, None]
  kept = ~sees.any(1)
  rows, keys = np.nonzero(untouched), np.nonzero(kept)
  out, lse, d_query, d_key, d_value, *d_bias = (np.asarray(x, np.float64) for x in got)
  for found, expected, at in (
    (out, want[0], rows),
    (lse, want[1], rows),
    (d_query, want[2], rows),
    (d_key, want[3], keys),
    (d_value, want[4], keys),
    *((x[:, 0], y[:, 0], rows) for x, y in zip(d_bias, want[5:], strict=True)),
  ):
    np.testing.assert_allclose(found[at], expected[at], rtol=0, atol=1e-5)
  assert not np.isfinite(out[np.nonzero(touched)]).all(-1).any()


@EVERY
@pytest.mark.parametrize("case", CASES)
def test_what_is_hidden_may_be_anything(name, case):
  arrays, seen, touched, want = problem(case)
  blind = ~seen.any(-1)
  for bad in (np.nan, np.inf, -np.inf):
    query, key, value, bias, d_out, d_lse = (None if x is None else x.copy() for x in arrays)
    key[:, BAD, :, 3] = np.nan
    value[:, BAD] = bad
    query[:, BAD - (S - T), :, 1] = np.nan
    query[blind] = d_out[blind] = d_lse[blind] = bad
    d_out[touched & ~blind] = bad
    got = program(name, case)([query, key, value, bias, d_out, d_lse])
    check(got, seen, touched & ~blind, want)


WIDE = {
  "all least": lambda least: np.full((T, S), least),
  "huge": lambda least: np.full((T, S), -2e30),
  "two": lambda least: np.where(np.arange(S) % 3 == 1, -1e30, least)[None].repeat(T, 0),
  "one row of each": lambda least: np.where(
    np.arange(T)[:, None] % 2 == 0, least, np.where(np.arange(S) % 2 == 0, -50.0, -1e4)[None]
  ),
}


@EVERY
def test_only_minus_infinity_hides(name):
  """Rows of scores that are all finfo.min, or huge, are uniform; so are their gradients."""
  arrays = cases.operands(B, T, S, N, K, H, H, (1, 1, T, S))
  for wide in WIDE.values():
    arrays[3] = jnp.asarray(wide(np.finfo(np.float32).min), jnp.float32)[None, None]
    got = program(name, "bias")(arrays)
    want = cases.exact(scale=0.4, logit_softcap=None)(arrays, CASES["bias"])
    for x, y in zip(got, want, strict=True):
      np.testing.assert_allclose(np.asarray(x, np.float64), y, rtol=1e-5, atol=2e-5)


@EVERY
@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_least_number_of_a_short_type_does_not_hide(name, dtype):
  arrays = cases.operands(B, T, S, N, K, H, H, (1, 1, T, S), dtype)
  arrays[3] = jnp.full((1, 1, T, S), jnp.finfo(dtype).min, dtype)
  got = program(name, "bias")(arrays)
  errors = cases.errors(got, cases.exact(scale=0.4, logit_softcap=None)(arrays, CASES["bias"]))
  errors.pop("lse")
  assert max(errors.values()) < cases.TOLERANCE[dtype], errors


@pytest.mark.parametrize("name", ["reference", "xla", "gpu"])
def test_what_a_score_holds_for_hidden_pairs_may_be_anything(name):
  """Hidden by the mask, and by a bias; of keys, and of distances that no query sees."""
  query, key, value, *_ = cases.operands(B, T, S, N, K, H, H)
  rng = np.random.default_rng(1)
  ids = np.where(np.arange(S) == BAD, -1, 0)[None].repeat(B, 0)
  bias = np.where(np.arange(S) == BAD + 3, -np.inf, 0.0).astype(np.float32)[None, None, None]
  u, w, z = (rng.normal(size=(1, 1, n)).astype(np.float32) for n in (T, S, 2 * S + 1))
  unread = [np.isin(np.arange(S), (BAD, BAD + 3)), np.arange(2 * S + 1) < S]

  def results(u, w, z, query):
    score = Term(lambda q, k, u, w, z: jnp.sin(u * w) + z * u, {"u": u}, {"w": w}, {"z": z})
    segments = jnp.asarray(ids[:, S - T :] * 0), jnp.asarray(ids)
    out, lse = IMPLEMENTATIONS[name](
      query, key, value, mask=Causal(), scale=0.4, scores=score, segment_ids=segments,
      bias=jnp.broadcast_to(bias, (1, 1, T, S)),
    )  # fmt: skip
    return (out**2).sum() + jnp.cos(lse).sum()

  graded = jax.jit(jax.value_and_grad(results, (0, 1, 2, 3)))
  want = graded(u, w, z, query)
  for bad in (np.nan, np.inf):
    poisoned = (np.where(at, np.float32(bad), x) for at, x in zip(unread, (w, z), strict=True))
    got = graded(u, *poisoned, query)
    for x, y in zip(*map(jax.tree.leaves, (got, want)), strict=True):
      np.testing.assert_allclose(x, y, rtol=1e-5, atol=1e-5)
    for at, x in zip(unread, got[1][1:3], strict=True):
      assert not np.asarray(x)[..., at].any()
