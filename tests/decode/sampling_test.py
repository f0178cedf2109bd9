from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from effjax.decode import sampling

LOGITS = np.array([1.5, -0.3, 0.9, 0.9, -2.0, 2.2], np.float32)
RULES = [
  {"temperature": 1.0},
  {"temperature": 0.7, "top_k": 3},
  {"temperature": 1.3, "top_p": 0.8},
  {"temperature": 0.9, "top_k": 5, "top_p": 0.6},
]


def enumerated(logits, temperature=1.0, top_k=None, top_p=None):
  """The same distribution by walking over the tokens in order, in float64."""
  p = np.exp(np.float64(logits) / temperature)
  p /= p.sum()
  if top_k is not None:
    p[p < np.sort(p)[-min(top_k, len(p))]] = 0
    p /= p.sum()
  if top_p is not None:
    keep, held = set(), 0.0
    for value in sorted(set(p), reverse=True):
      if held >= top_p:
        break
      for token in np.flatnonzero(p == value):
        keep.add(int(token))
        held += value
    p[[i for i in range(len(p)) if i not in keep]] = 0
    p /= p.sum()
  return p


@pytest.mark.parametrize("rule", RULES)
def test_distribution_is_the_enumerated_one(rule):
  np.testing.assert_allclose(
    sampling.distribution(jnp.asarray(LOGITS), **rule), enumerated(LOGITS, **rule), atol=1e-6
  )


@jax.jit
def traced(logits, temperature, k, p):
  return sampling.distribution(logits, temperature=temperature, top_k=k, top_p=p)


@settings(max_examples=25, deadline=None)
@given(
  st.lists(st.integers(-20, 20), min_size=5, max_size=5, unique=True),
  st.integers(1, 7),
  st.floats(0.05, 0.95),
)
def test_distribution_of_any_logits(logits, k, p):
  logits = np.array(logits, np.float32) / 7
  expected = enumerated(logits, 0.8, k, p)
  found = traced(logits, 0.8, k, p)
  borders = np.cumsum(np.sort(enumerated(logits, 0.8, k))[::-1])
  if np.abs(borders - p).min() > 1e-5:
    np.testing.assert_allclose(found, expected, atol=1e-5)


@pytest.mark.parametrize("rule", RULES)
def test_draws_follow_the_distribution(rule):
  expected = enumerated(LOGITS, **rule)
  draws = 20_000
  keys = jax.random.split(jax.random.key(3), draws)
  draw = lambda key: sampling.sample(jnp.asarray(LOGITS), key, **rule)
  counts = np.bincount(jax.jit(jax.vmap(draw))(keys), minlength=len(LOGITS))
  assert counts[expected == 0].sum() == 0
  possible = expected > 0
  chi = ((counts - draws * expected)[possible] ** 2 / (draws * expected[possible])).sum()
  # 99.99 % quantiles of chi-square with 1 … 5 degrees of freedom.
  assert chi < [15.1, 18.4, 21.1, 23.5, 25.7][possible.sum() - 2]


def test_same_filters_as_transformers():
  reason = "compares with transformers' warpers on torch, which Python 3.11 has"
  torch = pytest.importorskip("torch", reason=reason)
  logits_process = pytest.importorskip("transformers.generation.logits_process", reason=reason)
  logits = np.random.default_rng(0).normal(size=(4, 50)).astype(np.float32) * 3
  warped = torch.tensor(logits)
  for warp in (
    logits_process.TemperatureLogitsWarper(0.7),
    logits_process.TopKLogitsWarper(20),
    logits_process.TopPLogitsWarper(0.9),
  ):
    warped = warp(None, warped)
  found = sampling.distribution(jnp.asarray(logits), temperature=0.7, top_k=20, top_p=0.9)
  np.testing.assert_allclose(found, torch.softmax(warped, -1).numpy(), atol=1e-6)


def test_temperature_zero_is_a_one_hot_at_the_first_maximum():
  logits = jnp.array([[1.0, 4.0, 4.0], [0.0, -1.0, -2.0]])
  expected = [[0.0, 1.0, 0.0], [1.0, 0.0, 0.0]]
  assert sampling.distribution(logits, temperature=0).tolist() == expected
  assert sampling.sample(logits, temperature=0).tolist() == [1, 0]


def test_traced_arguments_give_the_same():
  static = sampling.distribution(jnp.asarray(LOGITS), temperature=0.9, top_k=4, top_p=0.7)
  np.testing.assert_allclose(traced(LOGITS, 0.9, 4, 0.7), static, atol=1e-6)


@pytest.mark.parametrize(
  ("rule", "message"),
  [
    ({"temperature": -1.0}, "temperature -1.0"),
    ({"temperature": float("nan")}, "temperature nan"),
    ({"top_k": 0}, "top_k 0"),
    ({"top_p": 0.0}, "top_p 0.0"),
    ({"top_p": 1.5}, "top_p 1.5"),
  ],
)
def test_bad_rules(rule, message):
  with pytest.raises(ValueError, match=message):
    sampling.distribution(jnp.zeros(3), **rule)


def test_missing_key():
  with pytest.raises(ValueError, match="key is None"):
    sampling.sample(jnp.zeros(3))


def nucleus(counts, p):
  """Which of the tokens of probabilities counts / Σ counts stay, in exact arithmetic."""
  kept, held, total = np.zeros(len(counts), bool), 0, int(counts.sum())
  for value in np.unique(counts)[::-1].tolist():
    if Fraction(held, total) >= p:
      break
    kept |= counts == value
    held += value * int((counts == value).sum())
  return kept


def fractions(rng, size):
  """Whole numbers whose shares are a distribution: flat, peaked, or with one that has half."""
  counts = rng.integers(1, rng.integers(2, 60), size)
  if rng.random() < 0.4:
    counts = np.maximum(1, (50 * rng.random(size) ** 6).astype(int))
  if rng.random() < 0.3:
    counts[rng.integers(size)] = counts.sum()
  return counts


@pytest.mark.parametrize(("size", "draws"), [(4, 150), (50, 100), (1000, 30), (50_257, 10)])
def test_a_nucleus_is_exact_at_its_edges_and_beside_them(size, draws):
  rng, keep = np.random.default_rng(size), jax.jit(sampling.keep_top_p)
  for _ in range(draws):
    counts = fractions(rng, size)
    total = int(counts.sum())
    edge = int(rng.choice(np.cumsum(np.sort(counts)[::-1])))
    logits = jnp.asarray(np.log(counts / total), jnp.float32)
    for p in (Fraction(edge, total), Fraction(2 * edge - 1, 2 * total)):
      found = np.asarray(keep(logits, float(p))) > -np.inf
      np.testing.assert_array_equal(found, nucleus(counts, p) | (p == 1), str(p))


def test_the_nucleus_of_all_is_all():
  logits = jnp.array([0.0, -50.0, -200.0, -1e30])
  np.testing.assert_array_equal(sampling.keep_top_p(logits, 1.0), logits)
  almost = jnp.log(jnp.array([1 - 5e-7, 5e-7]))
  assert np.isfinite(sampling.keep_top_p(almost, 1 - 1e-7)).all()


draws = jax.jit(lambda logits, **rule: (
  sampling.distribution(logits, **rule), sampling.sample(logits, jax.random.key(0), **rule)
))  # fmt: skip
SHARED = np.array([1.0, 4.0, 4.0, -np.inf], np.float32)


@pytest.mark.parametrize(
  ("rule", "expected"),
  [
    ({"temperature": 0.0}, [0, 1, 0, 0]),
    ({"temperature": 1e-38}, [0, 1, 0, 0]),
    ({"temperature": 1e-30}, [0, 0.5, 0.5, 0]),
    ({"temperature": 1e38}, [1 / 3, 1 / 3, 1 / 3, 0]),
    ({"top_k": 1}, [0, 0.5, 0.5, 0]),
    ({"top_k": 2**31 - 1, "temperature": 1e38}, [1 / 3, 1 / 3, 1 / 3, 0]),
    ({"top_p": 1e-30}, [0, 0.5, 0.5, 0]),
  ],
)
def test_limits_are_the_same_of_known_and_traced_numbers(rule, expected):
  known = {name: np.float32(x) if isinstance(x, float) else np.int64(x) for name, x in rule.items()}
  eager = sampling.distribution(jnp.asarray(SHARED), **known)
  for found, token in (draws(SHARED, **rule), (eager, 1)):
    np.testing.assert_allclose(found, expected, atol=1e-6)
    assert expected[int(token)] > 0


@pytest.mark.parametrize(
  ("logits", "rule"),
  [
    (SHARED, {"temperature": -1.0}),
    (SHARED, {"temperature": np.nan}),
    (SHARED, {"temperature": np.inf}),
    (SHARED, {"top_k": 0}),
    (SHARED, {"top_p": 0.0}),
    (SHARED, {"top_p": 2.0}),
    ([1.0, np.nan, 0.0, 2.0], {"temperature": 0.0}),
    ([1.0, np.nan, 0.0, 2.0], {"top_k": 1, "top_p": 0.5}),
    ([-np.inf] * 4, {"temperature": 1.0}),
  ],
)
def test_no_distribution_is_nan_and_no_token(logits, rule):
  found, token = draws(np.float32(logits), **rule)
  assert np.isnan(found).all() and int(token) == -1


def test_infinite_logits_share_all():
  for logits in ([1.0, np.inf, 0.0, np.inf], [3e38, -3e38, 0.0, 3e38]):
    found, _ = draws(np.float32(logits), temperature=1.0, top_p=0.9)
    np.testing.assert_allclose(found, np.float32(logits == np.max(logits)) / 2)


def test_rows_may_have_rules_of_their_own():
  logits, keys = jnp.asarray(np.stack([LOGITS] * 3)), jax.random.split(jax.random.key(1), 200)
  rules = {"temperature": np.array([0.0, 0.5, 2.0]), "top_k": jnp.array([6, 1, 2])}
  found = sampling.distribution(logits, **rules)
  for row in range(3):
    own = {name: np.asarray(x)[row] for name, x in rules.items()}
    np.testing.assert_allclose(found[row], sampling.distribution(logits[row], **own), rtol=1e-6)
  drawn = np.asarray(jax.vmap(lambda key: sampling.sample(logits, key, **rules))(keys))
  assert (drawn[:, :2] == 5).all() and set(drawn[:, 2]) == {0, 5}
  for shape in ((2,), (3, 1), (3, 6)):
    with pytest.raises(ValueError, match=r"temperature float32.*; allowed: from 0"):
      sampling.sample(logits, keys[0], temperature=jnp.ones(shape))


def test_a_learned_temperature_has_a_gradient():
  spread = lambda t: sampling.distribution(jnp.asarray(SHARED), temperature=t)[0]
  found, step = jax.jit(jax.grad(spread))(0.7), 1e-3
  exact = lambda t: np.exp(1 / t) / (np.exp(1 / t) + 2 * np.exp(4 / t))
  np.testing.assert_allclose(found, (exact(0.7 + step) - exact(0.7 - step)) / (2 * step), rtol=1e-4)
