"""Routers as modules: what they do in training alone, what they sow, and how they learn."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import Context
from effjax.moe import (
  BatchPriority,
  Capacity,
  ExpertChoice,
  GShard,
  NoisyTopK,
  SigmoidTopK,
  Switch,
  TopK,
  smooth_load,
)
from tests.modules import normal, random_params
from tests.moe import brute_force

M, D, E = 24, 6, 4
KINDS = ["losses", "metrics", "statistics"]
KEY = jax.random.key(5)


def run(router, rows, params, key=None, mask=None):
  rngs = {} if key is None else {"router": key}
  mask = None if mask is None else jnp.asarray(mask)
  return router.apply({"params": params}, rows, Context(), mask, rngs=rngs, mutable=KINDS)


def test_switch_jitters_in_training_and_limits_by_what_it_is_doing():
  router = Switch(E, jitter=0.3)
  rows, params = normal(M, D), {"kernel": normal(D, E, seed=1)}

  @jax.jit
  def both(rows, params):
    return run(router, rows, params)[0], jax.vmap(lambda key: run(router, rows, params, key)[0])(
      jax.random.split(KEY, 500)
    )

  still, jittered = both(rows, params)
  assert (still.capacity, jittered.capacity) == (12, 8)  # 2 and 1.25 times 6, rounded up
  logits = np.asarray(rows, np.float64) @ np.asarray(params["kernel"], np.float64)
  experts, gates = brute_force.limited(*brute_force.top_k(logits, 1, False), still.capacity, E)
  chex.assert_trees_all_equal(np.asarray(still.experts), experts)
  chex.assert_trees_all_close(still.gates, gates, atol=1e-6)
  spread = np.asarray(jittered.logits) - logits
  expected = np.sqrt(np.square(rows) @ np.square(params["kernel"]) * 0.3**2 / 3)
  np.testing.assert_allclose(spread.std(0), expected, rtol=0.15)
  np.testing.assert_allclose(spread.mean(0), 0, atol=0.2 * expected.max())


def test_noise_has_the_size_that_is_learned_and_is_off_in_evaluation():
  router = NoisyTopK(E, 2)
  rows = normal(M, D)
  params = {"kernel": normal(D, E, seed=1), "noise": normal(D, E, seed=2)}

  @jax.jit
  def both(rows, params):
    still, _ = run(router, rows, params)
    noisy = jax.vmap(lambda key: run(router, rows, params, key)[0])(jax.random.split(KEY, 1000))
    return still, noisy.logits

  still, noisy = both(rows, params)
  clean, size = np.asarray(rows @ params["kernel"]), np.asarray(rows @ params["noise"])
  chex.assert_trees_all_close(still.logits, clean, atol=1e-5)
  np.testing.assert_allclose(np.std(noisy, axis=0), np.log1p(np.exp(size)) + 1e-2, rtol=0.1)
  fresh = router.init(KEY, rows)["params"]
  assert not any(np.asarray(x).any() for x in fresh.values()) and set(fresh) == set(params)


@pytest.mark.parametrize("router", [NoisyTopK(E, 2), BatchPriority(E, 2, noise=2.0)])
def test_importance_and_load_are_those_of_the_paper(router):
  rows, mask = normal(M, D), np.arange(M) % 4 > 0
  params = random_params(router, rows)
  routing, sown = jax.jit(lambda rows: run(router, rows, params, KEY, mask))(
    np.where(mask[:, None], rows, np.float32(np.nan))
  )
  real = rows[mask]
  clean, noisy = real @ params["kernel"], routing.logits[mask]
  if isinstance(router, NoisyTopK):
    stddev = np.log1p(np.exp(real @ params["noise"])) + 1e-2
    load = smooth_load(clean, noisy, jnp.asarray(stddev), k=2).sum(0)
    gates = np.zeros((len(real), E))
    np.put_along_axis(gates, np.asarray(routing.experts[mask]), np.asarray(routing.gates[mask]), 1)
  else:
    load = smooth_load(clean, noisy, 0.5, k=2, estimator="v_moe").sum(0)
    gates = brute_force.softmax(clean)
  variation = lambda x: np.var(x) / np.mean(x) ** 2
  found = {name: float(value[0]) for name, value in sown["metrics"].items()}
  assert found["importance_raw"] == pytest.approx(variation(gates.sum(0)), rel=1e-3)
  assert found["load_raw"] == pytest.approx(variation(np.asarray(load)), rel=1e-3)
  losses = {name: float(value[0]) for name, value in sown["losses"].items()}
  assert losses == pytest.approx(
    {n: getattr(router, n) * found[f"{n}_raw"] for n in ("importance", "load")}
  )


def test_health_says_what_was_chosen_and_what_was_dropped():
  router = TopK(E, 2, capacity=Capacity(0.5, evaluation=0.5))
  rows, mask = normal(M, D), np.arange(M) % 3 > 0
  kernel = normal(D, E, seed=1).at[:, 3].set(0.0)
  rows = rows.at[:, 0].set(9.0)
  kernel = kernel.at[0].set(jnp.array([1.0, 1.0, 1.0, -9.0]))
  _, sown = jax.jit(lambda rows: run(router, rows, {"kernel": kernel}, None, mask))(rows)
  experts, gates = brute_force.top_k(rows @ kernel, 2, True)
  kept, _ = brute_force.limited(experts, gates, 6, E, mask)
  load = np.bincount(experts[mask].ravel(), minlength=E) / (2 * mask.sum())
  found = {name: float(value[0]) for name, value in sown["metrics"].items()}
  chex.assert_trees_all_close(sown["statistics"]["load"][0], load, atol=1e-6)
  some = load[load > 0]
  assert found["load_entropy"] == pytest.approx(-(some * np.log(some)).sum(), rel=1e-5)
  assert found["dead_experts"] == (load == 0).sum() == 1
  assert found["max_load"] == pytest.approx(E * load.max())
  assert found["dropped_share"] == pytest.approx((kept[mask] == E).mean())
  assert found["dropped_share"] > 0


ROUTERS = [
  Switch(E),
  GShard(E),
  NoisyTopK(E, 2),
  SigmoidTopK(E, 2, scale=2.5, renormalize=False),
  TopK(E, 2, renormalize="after", capacity=Capacity(1.0, evaluation=1.0)),
]


def test_untouched_experts_get_no_gradient_and_the_router_learns_through_the_gate():
  rows = normal(M, D).at[:, 0].set(4.0)
  params = [random_params(router, rows) for router in ROUTERS]
  away = lambda p: {**p, "kernel": p["kernel"].at[0, 2].set(-9.0)}

  def loss(router, params, experts):
    routing, _ = run(router, rows, params, KEY)
    chosen = experts.at[routing.experts].get(mode="fill", fill_value=0)
    return jnp.square((routing.gates[..., None] * chosen).sum(1)).sum()

  @jax.jit
  def slopes(params, experts):
    each = zip(ROUTERS, params, strict=True)
    return [jax.grad(loss, argnums=(1, 2))(router, own, experts) for router, own in each]

  for own, experts in slopes(list(map(away, params)), normal(E, 5)):
    assert not experts[2].any() and experts[jnp.array([0, 1, 3])].any()
    assert np.abs(own["kernel"]).max() > 1e-3
    assert "bias" not in own or not own["bias"].any()


@pytest.mark.parametrize("make", [TopK, NoisyTopK, SigmoidTopK, BatchPriority])
@pytest.mark.parametrize("top_k", [0, E + 1])
def test_more_choices_than_experts_or_none(make, top_k):
  with pytest.raises(ValueError, match=f"top_k={top_k}, experts={E}; allowed: 1 ≤ top_k ≤ experts"):
    jax.eval_shape(make(E, top_k).init, KEY, normal(M, D))


@pytest.mark.parametrize(
  ("router", "message"),
  [
    (Switch(0), "Switch: experts=0; allowed: from 1"),
    (Switch(E, jitter=1.0), "jitter=1.0; allowed"),
    (GShard(1), "GShard: experts=1; allowed: from 2"),
    (GShard(E, renormalize="before"), "renormalize='before'; allowed: True, False or 'after'"),
    (TopK(E, 2, load_balance=float("nan")), "load_balance=nan"),
    (TopK(E, 2, device_balance=0.1, devices=3), "devices=3; allowed: divisors of 4"),
    (ExpertChoice(-1), "ExpertChoice: experts=-1"),
  ],
)
def test_bad_fields(router, message):
  with pytest.raises(ValueError, match=message):
    jax.eval_shape(
      lambda rows: router.init_with_output({"params": KEY, "router": KEY}, rows), normal(M, D)
    )


def test_every_loss_has_a_coefficient():
  coefficients = {
    "load_balance": 0.1, "device_balance": 0.2, "importance": 0.3, "mutual_information": 0.4
  }  # fmt: skip
  router = TopK(E, 2, devices=2, z=0.5, **coefficients)
  rows = normal(M, D)
  _, sown = jax.jit(lambda rows: run(router, rows, {"kernel": normal(D, E)}))(rows)
  for name, coefficient in {**coefficients, "router_z": 0.5}.items():
    raw = float(sown["metrics"][f"{name}_raw"][0])
    assert float(sown["losses"][name][0]) == pytest.approx(coefficient * raw)
