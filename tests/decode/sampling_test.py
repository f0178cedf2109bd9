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
