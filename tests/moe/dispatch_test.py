"""Sorting tokens by expert and back."""

import itertools

import chex
import hypothesis
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import spmd
from effjax.layers import ExpertRouting, Routing
from effjax.moe.dispatch import dropped_share, mix, mix_experts, mix_rows
from effjax.moe.plan import sort_by_expert
from effjax.parallel import make_mesh
from tests.modules import normal

sort_by_four = jax.jit(lambda experts: sort_by_expert(experts, 4))


@hypothesis.settings(max_examples=30, deadline=None)
@hypothesis.given(experts=st.lists(st.integers(0, 4), min_size=8, max_size=8))
def test_sorting_is_stable_and_counts(experts):
  order, sizes = sort_by_four(np.array(experts, np.int32))
  assert np.asarray(order).tolist() == sorted(range(8), key=lambda i: experts[i])
  assert np.asarray(sizes).tolist() == [experts.count(e) for e in range(4)]


def scale_by_expert(factors):
  """Experts that multiply by a number each."""

  def apply(rows, groups):
    expert = groups.of_row(rows.shape[0])
    return rows * jnp.take(factors, expert, mode="fill", fill_value=0)[:, None]

  return apply


def test_mixture_and_gradients_equal_the_definition():
  x = normal(6, 3)
  experts = jnp.array([[0, 1], [2, 0], [1, 2], [2, 1], [0, 2], [1, 0]])
  gates, factors = np.abs(normal(6, 2, seed=1)), jnp.array([1.0, -2.0, 3.0])

  def ours(x, gates, factors):
    return mix_experts(scale_by_expert(factors), x, experts, gates, count=3)

  def definition(x, gates, factors):
    return x * (gates * factors[experts]).sum(-1, keepdims=True)

  def evaluate(mix):
    loss = lambda *args: jnp.sin(mix(*args)).sum()
    run = jax.jit(lambda *args: (mix(*args), jax.grad(loss, (0, 1, 2))(*args)))
    return run(x, gates, factors)

  (found, slopes), (expected, wanted) = evaluate(ours), evaluate(definition)
  chex.assert_trees_all_close(found, expected, atol=1e-6)
  chex.assert_trees_all_close(slopes, wanted, atol=1e-5)


def test_masked_tokens_are_not_computed():
  x, mask = normal(4, 3), np.array([True, False, True, False])
  experts = np.array([[1], [1], [0], [0]])

  @jax.jit
  def run(x, experts, mask):
    seen = []

    def apply(rows, groups):
      seen.append(groups.sizes[0])
      return rows + 1

    return mix_experts(apply, x, experts, jnp.ones((4, 1)), count=2, mask=mask), seen

  y, seen = jax.tree.map(np.asarray, run(x, experts, mask))
  assert [sizes.tolist() for sizes in seen] == [[1, 1]]
  assert not y[~mask].any()
  chex.assert_trees_all_close(y[mask], np.asarray(x)[mask] + 1, atol=1e-6)


def test_what_is_no_expert_and_what_is_masked_have_no_influence():
  x, dy, factors = normal(4, 3), normal(4, 3, seed=1), jnp.array([2.0, -1.0])
  token = np.array([True, True, True, False])

  @jax.jit
  def run(x, experts, gates, dy):
    mix = lambda x, gates, factors: mix_experts(
      scale_by_expert(factors), x, experts, gates, count=2, mask=jnp.asarray(token)
    )
    y, pull = jax.vjp(mix, x, gates, factors)
    return y, *pull(dy)

  experts, gates = np.array([[0, 2], [-1, 1], [5, -9], [0, 1]]), np.ones((4, 2), np.float32)
  clean = y, dx, d_gates, _ = run(x, experts, gates, dy)
  expected = np.array([2, -1, 0, 0])[:, None] * np.asarray(x)
  chex.assert_trees_all_close(y, expected, atol=1e-6)
  assert not dx[2:].any() and not d_gates[2:].any()
  for fill in np.float32([np.nan, np.inf, 1e30]):
    spoil = lambda a, fill=fill: np.where(token[:, None], a, fill)
    unused = np.where((experts >= 0) & (experts < 2) & token[:, None], gates, fill)
    chex.assert_trees_all_equal(run(spoil(x), experts, unused, spoil(dy)), clean)
  assert not any(np.asarray(a).any() for a in run(x, np.full((4, 2), 2), gates, dy))


TOKENS, WIDTH, COUNT = 16, 3, 8
CHOSEN = np.argsort(np.random.default_rng(0).normal(size=(TOKENS, COUNT)), axis=1)[:, :3]
CHOSEN = CHOSEN.astype(np.int32)
CHOSEN[::5, 1], CHOSEN[3] = COUNT, -1  # what overflowed, and a token of no expert
BUSIEST = int(np.bincount(CHOSEN[CHOSEN >= 0], minlength=COUNT)[:COUNT].max())
ROWS = np.argsort(np.random.default_rng(1).normal(size=(COUNT, TOKENS)), axis=1)[:, :5]
ROWS = ROWS.astype(np.int32)
ROWS[2, 1], ROWS[4] = TOKENS, TOKENS  # an empty slot before full ones, and an idle expert


def given():
  """Tokens, gates of tokens, gates of experts, experts' factors, and a cotangent."""
  shapes = ((TOKENS, WIDTH), CHOSEN.shape, ROWS.shape, (COUNT,), (TOKENS, WIDTH))
  return [normal(*shape, seed=i) for i, shape in enumerate(shapes)]


def by_tokens(x, gates, by_expert, factors, dy, experts=CHOSEN):
  """Values and gradients of the definition, float64."""
  own = np.arange(COUNT) == experts[..., None]  # [M, k, E]
  weight = np.einsum("mke,mk,e->m", own, gates, factors)
  slopes = (x * dy).sum(1)
  d_gates = np.einsum("mke,e,m->mk", own, factors, slopes)
  d_factors = np.einsum("mke,mk,m->e", own, gates, slopes)
  return weight[:, None] * x, weight[:, None] * dy, d_gates, np.zeros(ROWS.shape), d_factors


def by_experts(x, gates, by_expert, factors, dy):
  own = np.arange(TOKENS) == ROWS[..., None]  # [E, C, M]
  weight, slopes = np.einsum("ecm,ec,e->m", own, by_expert, factors), (x * dy).sum(1)
  d_by_expert = np.einsum("ecm,e,m->ec", own, factors, slopes)
  d_factors = np.einsum("ecm,ec,m->e", own, by_expert, slopes)
  return weight[:, None] * x, weight[:, None] * dy, np.zeros(gates.shape), d_by_expert, d_factors


def routing(kind, gates, by_expert):
  if kind == "rows":
    return ExpertRouting(jnp.asarray(ROWS), by_expert)
  return Routing(jnp.asarray(CHOSEN), gates, capacity=BUSIEST if kind == "slots" else None)


def run(kind, mask=None):
  """Values and gradients of the mixture, jitted."""

  def values(x, gates, by_expert, factors):
    decided = routing(kind, gates, by_expert)
    return mix(scale_by_expert(factors), x, decided, count=COUNT, mask=mask)

  def gradients(*operands):
    y, pull = jax.vjp(values, *operands[:-1])
    return y, *pull(operands[-1])

  return jax.jit(gradients)


KINDS = {"sorted": by_tokens, "slots": by_tokens, "rows": by_experts}
SPLITS = {
  "one device": None,
  "data": ({"data": 8}, None),
  "experts": ({"data": 2, "expert": 4}, spmd.Dealt("expert")),
}


def assert_close(got, expected):
  for a, b in zip(got, expected, strict=True):
    np.testing.assert_allclose(a, b, atol=2e-6)


@pytest.mark.parametrize(
  ("kind", "split"),
  [*itertools.product(KINDS, ["one device", "experts"]), ("rows", "data")],
)
def test_every_dispatch_computes_the_definition(kind, split):
  operands = given()
  if SPLITS[split] is None:
    got = run(kind)(*operands)
  else:
    sizes, dealt = SPLITS[split]
    with spmd.rows_split(make_mesh(**sizes), list(sizes), dealt):
      got = run(kind)(*operands)
  assert_close(got, KINDS[kind](*(np.asarray(a, np.float64) for a in operands)))


@pytest.mark.parametrize("kind", ["slots", "rows"])
def test_what_is_in_padding_has_no_influence_on_slots(kind):
  x, gates, by_expert, factors, dy = given()
  mask = np.arange(TOKENS) % 3 > 0
  program = run(kind, jnp.asarray(mask))
  spoil = lambda a: np.where(mask[:, None], a, np.nan)
  clean = program(x, gates, by_expert, factors, dy)
  spoilt = program(spoil(x), spoil(gates), by_expert, factors, spoil(dy))
  chex.assert_trees_all_equal(spoilt, clean)
  y, dx, d_gates, *_ = clean
  assert not any(np.asarray(a)[~mask].any() for a in (y, dx, d_gates))
  assert np.asarray(y)[mask].any()


def test_a_promise_that_is_broken_gives_nan():
  x, experts = jnp.ones((4, 2)), jnp.array([[0], [1], [0], [0]])
  run = lambda capacity: mix_experts(
    scale_by_expert(jnp.ones(4)), x, experts, jnp.ones((4, 1)), count=2, capacity=capacity
  )
  lost, kept = jax.jit(lambda: (run(2), run(3)))()
  assert np.isnan(lost).all(axis=1).tolist() == [False, False, False, True]
  assert np.asarray(kept).all()
  with pytest.raises(ValueError, match=r"mix_experts: capacity=0; allowed: "):
    run(0)


@pytest.mark.parametrize("capacity", [None, BUSIEST])
def test_vmap_and_x64(capacity):
  with jax.enable_x64(True):
    x, gates, _, factors, _ = (jnp.asarray(a, np.float64) for a in given())
    one = lambda x: mix_experts(
      scale_by_expert(factors),
      x,
      jnp.asarray(CHOSEN),
      gates,
      count=COUNT,
      capacity=capacity,
    )
    y = jax.jit(jax.vmap(one))(jnp.stack([x, -x]))
    expected = by_tokens(*map(np.asarray, (x, gates, 0, factors, x)))[0]
    assert y.dtype == np.float64
    np.testing.assert_allclose(y, np.stack([expected, -expected]), rtol=1e-12)


def test_room_between_devices_drops_and_says_so():
  x, gates, by_expert, factors, dy = given()
  mesh, dealt = make_mesh(data=1, expert=4), spmd.Dealt("expert", 0.5)
  decided = Routing(jnp.asarray(CHOSEN), gates)
  with spmd.rows_split(mesh, ["data", "expert"], dealt):
    y, *_ = run("sorted")(x, gates, by_expert, factors, dy)
    share = jax.jit(lambda: dropped_share(decided, count=COUNT))()
  # Each device has 4 tokens, and room for ⌈0.5 · 4 · 3 / 4⌉ = 2 to each device, of two experts.
  kept = CHOSEN.copy()
  for first in range(0, TOKENS, 4):
    for device in range(4):
      goes = [m for m in range(first, first + 4) if (CHOSEN[m] // 2 == device).any()]
      for m in goes[2:]:
        kept[m][CHOSEN[m] // 2 == device] = COUNT
  there = (CHOSEN >= 0) & (CHOSEN < COUNT)
  lost = (kept != CHOSEN).sum()
  assert lost and float(share) == pytest.approx(lost / there.sum())
  expected, *_ = by_tokens(*(np.asarray(a, np.float64) for a in given()), experts=kept)
  np.testing.assert_allclose(y, expected, atol=2e-6)
  assert dropped_share(decided, count=COUNT) is None


def test_experts_that_devices_do_not_divide_are_refused():
  x = jnp.ones((8, 2))
  with spmd.rows_split(make_mesh(data=2, expert=4), ["data", "expert"], spmd.Dealt("expert")):
    with pytest.raises(ValueError, match=r"of 6 experts; allowed: multiples of .* expert=4"):
      mix_experts(lambda rows, _: rows, x, jnp.zeros((8, 1), int), jnp.ones((8, 1)), count=6)
    with pytest.raises(ValueError, match=r"of 6 experts; allowed: multiples of .* expert=4"):
      mix_rows(lambda rows, _: rows, x, jnp.zeros((6, 1), int), jnp.ones((6, 1)))


@pytest.mark.parametrize("shape", [(0, 2), (4, 0)])
def test_no_tokens_and_no_choices(shape):
  experts, gates = jnp.zeros(shape, int), jnp.ones(shape)
  for capacity in (None, 2):
    apply = scale_by_expert(jnp.ones(3))
    y = mix_experts(apply, jnp.ones((shape[0], 2)), experts, gates, count=3, capacity=capacity)
    assert y.shape == (shape[0], 2) and not y.any()
