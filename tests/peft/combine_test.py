"""Combinations of LoRAs against Hugging Face's peft, and by what they are."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.peft import LoRA, attach, combine, detach, lora
from effjax.peft.combine import METHODS, OF_PRODUCTS, RULES
from effjax.quant import Int8
from tests.modules import normal

D, F, WEIGHTS = 8, 12, (0.7, -0.4, 1.3)
REASON = "peer comparisons run on Python 3.11, which has torch and peft"
SAMPLED = [name for name, rule in {**RULES, **OF_PRODUCTS}.items() if rule.keep == "random"]


def member(rank, scale, seed, lead=()):
  a, b = normal(*lead, D, rank, seed=seed), normal(*lead, rank, F, seed=seed + 50) / 10
  return LoRA(None, a, b, jnp.full((*lead, 1, 1), scale))


def members(ranks=(4, 4, 4), lead=()):
  return [
    {
      "first/kernel": member(rank, 2.0 + i, i, lead),
      "second/kernel": member(rank, 1.5, 9 + i, lead),
    }
    for i, rank in enumerate(ranks)
  ]


def products(w):
  return np.asarray(w.scale, np.float64) * (
    np.asarray(w.a, np.float64) @ np.asarray(w.b, np.float64)
  )


def options(method):
  rule = {**RULES, **OF_PRODUCTS}.get(method)
  pruned = {"density": 0.6} if rule and rule.keep else {}
  return pruned | ({"key": jax.random.key(3)} if method in SAMPLED else {})


def of_peft(adapters, method, **given):
  """ΔW, A, B of each path by peft's add_weighted_adapter."""
  torch, peft = pytest.importorskip("torch", reason=REASON), pytest.importorskip("peft")
  names = [path.partition("/")[0] for path in adapters[0]]
  bare = torch.nn.ModuleDict({name: torch.nn.Linear(D, F, bias=False) for name in names})
  config = lambda each: peft.LoraConfig(
    r=each["first/kernel"].rank, lora_alpha=1, target_modules=names
  )
  model = peft.get_peft_model(bare, config(adapters[0]), adapter_name="0")
  for i, each in enumerate(adapters):
    if i:
      model.add_adapter(str(i), config(each))
    for name in names:
      layer, w = model.base_model.model[name], each[f"{name}/kernel"]
      layer.lora_A[str(i)].weight.data = torch.tensor(np.asarray(w.a).T)
      layer.lora_B[str(i)].weight.data = torch.tensor(np.asarray(w.b).T)
      layer.scaling[str(i)] = w.scale.item()
  every = [str(i) for i in range(len(adapters))]
  model.add_weighted_adapter(every, list(WEIGHTS), "all", combination_type=method, **given)
  found = {}
  for name in names:
    layer = model.base_model.model[name]
    a, b = (part["all"].weight.data.numpy().T for part in (layer.lora_A, layer.lora_B))
    found[f"{name}/kernel"] = (a, b, layer.get_delta_weight("all").numpy().T)
  return found


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SAMPLED])
@pytest.mark.parametrize("sign", ["total", "frequency"])
def test_it_is_what_peft_makes(method, sign):
  if sign == "frequency" and "ties" not in method:
    return
  adapters, given = members(), options(method)
  found = combine(adapters, WEIGHTS, method=method, sign=sign, **given)
  for path, (a, b, product) in of_peft(
    adapters, method, majority_sign_method=sign, **given
  ).items():
    np.testing.assert_allclose(products(found[path]), product, atol=2e-5)
    if method in RULES:
      np.testing.assert_allclose(found[path].a, a, atol=1e-5)
      np.testing.assert_allclose(found[path].b, b, atol=1e-5)


@pytest.mark.parametrize("method", SAMPLED)
def test_dare_is_what_peft_makes_of_the_same_draws(method, monkeypatch):
  """peft's draws are replaced by ours, in the order in which it asks for them."""
  torch = pytest.importorskip("torch", reason=REASON)
  adapters, given, draws = members(), options(method), []
  bernoulli = jax.random.bernoulli

  def recorded(key, share, shape):
    draws.append(np.asarray(bernoulli(key, share, shape)))
    return draws[-1]

  with monkeypatch.context() as patch:
    patch.setattr(jax.random, "bernoulli", recorded)
    found = combine(adapters, WEIGHTS, method=method, **given)
  queue = iter(draws)
  monkeypatch.setattr(torch, "bernoulli", lambda input: torch.tensor(next(queue).T).float())
  for path, (_, _, product) in of_peft(adapters, method, density=given["density"]).items():
    np.testing.assert_allclose(products(found[path]), product, atol=2e-5)
  assert 0.4 < np.mean([draw.mean() for draw in draws]) < 0.8
  assert len({draw.tobytes() for draw in draws}) == len(draws)


def test_cat_and_svd_of_full_rank_are_exact_for_any_ranks():
  adapters = members((2, 5, 1))
  exact = {
    path: sum(w * products(each[path]) for w, each in zip(WEIGHTS, adapters, strict=True))
    for path in adapters[0]
  }
  cat = combine(adapters, WEIGHTS)
  svd = combine(adapters, WEIGHTS, method="svd", rank=8)
  for path, expected in exact.items():
    assert (cat[path].rank, svd[path].rank) == (8, 8)
    np.testing.assert_allclose(products(cat[path]), expected, atol=1e-5)
    np.testing.assert_allclose(products(svd[path]), expected, atol=2e-5)
    cut = products(combine(adapters, WEIGHTS, method="svd")[path])
    s = np.linalg.svd(expected, compute_uv=False)
    np.testing.assert_allclose(np.linalg.norm(expected - cut), np.linalg.norm(s[5:]), rtol=1e-4)
  padded = combine(adapters[2:], [1], method="svd", rank=3)["first/kernel"]
  np.testing.assert_allclose(products(padded), products(adapters[2]["first/kernel"]), atol=1e-5)
  chex.assert_trees_all_equal(padded.b[1:], np.zeros((2, F)))


@pytest.mark.parametrize("method", [name for name in METHODS if name not in SAMPLED])
def test_layers_and_experts_are_combined_one_by_one(method):
  adapters = members((3, 3, 3), lead=(2,))
  run = lambda adapters: combine(adapters, WEIGHTS, method=method, **options(method))
  whole, apart = jax.jit(lambda adapters: (run(adapters), [
    run(jax.tree.map(lambda x, i=i: x[i], adapters)) for i in range(2)
  ]))(adapters)  # fmt: skip
  for i, alone in enumerate(apart):
    for path, w in alone.items():
      np.testing.assert_allclose(products(whole[path])[i], products(w), atol=1e-5)


def test_trees_keep_the_base_and_a_path_that_one_lacks_is_the_others():
  base = {"query": Int8.quantize(normal(D, F)), "value": normal(D, F, seed=1)}
  one = attach(base, {"query": member(2, 1.0, 3)})
  two = attach(base, {"query": member(3, 2.0, 4), "value": member(1, 0.5, 5)})
  both = combine([one, two], [1, 0.5])
  chex.assert_trees_all_equal(detach(both)[0], base)
  assert (both["query"].rank, both["value"].rank) == (5, 1)
  delta = products(both["value"])
  np.testing.assert_allclose(delta, 0.5 * products(two["value"]), rtol=1e-6)
  chex.assert_trees_all_equal(
    detach(both)[1], combine([detach(x)[1] for x in (one, two)], [1, 0.5])
  )


def test_a_negated_adapter_takes_its_own_away():
  tree = attach({"kernel": normal(D, F)}, {"kernel": member(2, 1.5, 3)})
  for method in ("linear", "cat", "svd"):
    negated = combine([tree], [-1], method=method)["kernel"]
    np.testing.assert_allclose(products(negated), -products(tree["kernel"]), atol=1e-5)
  assert np.abs(products(combine([tree, tree], [1, -1])["kernel"])).max() < 1e-5


def test_weights_can_be_learned_and_shapes_suffice():
  adapters = members((2, 1, 3))
  total = lambda weights: combine(adapters, weights)["first/kernel"].delta().sum()
  expected = [products(each["first/kernel"]).sum() for each in adapters]
  np.testing.assert_allclose(jax.grad(total)(jnp.asarray(WEIGHTS)), expected, rtol=1e-4)
  made = jax.eval_shape(lambda x: combine(x, WEIGHTS, method="ties_svd", density=0.5), adapters)
  assert made["first/kernel"].a.shape == (D, 3)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"method": "sum"}, "method='sum'; allowed: cat, linear"),
    ({"weights": [1.0]}, "weights: 1 of 3; allowed: one for each"),
    ({"weights": [1, 2, np.nan]}, "weights nan"),
    ({"method": "linear"}, r"ranks \[2, 3\] at first/kernel; allowed: one rank, or 'cat', 'svd'"),
    ({"method": "svd", "rank": 9}, r"rank 9 for first/kernel \(8, 12\); allowed: 1 … 8"),
    ({"method": "svd", "rank": 0}, "rank 0; allowed: from 1, an integer"),
    ({"rank": 4}, "method='cat' with rank=4; allowed: None"),
    ({"method": "ties"}, "method='ties' with density=None; allowed: a value"),
    ({"method": "ties", "density": 1.5}, "density 1.5; allowed: above 0, up to 1"),
    ({"method": "dare_ties", "density": 0.5}, "with key=None"),
    ({"density": 0.5}, "method='cat' with density=0.5; allowed: None"),
    ({"sign": "most"}, "sign='most'; allowed: total, frequency"),
  ],
)
def test_bad_arguments_are_named(change, message):
  given = {"adapters": members((2, 2, 3)), "weights": WEIGHTS} | change
  with pytest.raises(ValueError, match=message):
    combine(given.pop("adapters"), given.pop("weights"), **given)


def test_what_is_no_lora_over_one_base_is_refused():
  base = {"kernel": normal(D, F)}
  one = lora.add(base, jax.random.key(0), rank=2, targets="kernel")
  twice = dataclasses.replace(one["kernel"], base=one["kernel"])
  for adapters, message in (
    ([], "weights: 0 of 0"),
    ([base], "number 0 has none; allowed: a tree with LoRA"),
    ([one, {"kernel": twice}], "number 1 has several at kernel; allowed: one"),
    ([one, detach(one)[1]], "some with a base and some without"),
    ([one, {"kernel": dataclasses.replace(one["kernel"], base=normal(D, 3), b=normal(2, 3))}],
     r"at kernel they are of matrices \[\(8, 12\), \(8, 3\)\]"),
    ([attach(base | {"other": 1 + base["kernel"]}, detach(one)[1]), {"other": one["kernel"]}],
     "over several bases at other"),
  ):  # fmt: skip
    with pytest.raises(ValueError, match=message):
      combine(adapters, [1.0] * len(adapters))
