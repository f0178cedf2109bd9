"""Experts made of hidden units: which go where, and what they are together."""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

from effjax.core import weights
from effjax.layers import MLP, LayerSpec, TransformerConfig, capture
from effjax.layers.stack import split
from effjax.models import Transformer
from effjax.moe import MoE, TopK, merge_experts, split_ffn
from effjax.moe.splitting import (
  Clusters,
  Graph,
  Important,
  Parts,
  Random,
  Residual,
  SharingInner,
  co_activation,
  equal_assignment,
  equal_clusters,
  importance,
  most_wanted,
)
from effjax.peft import DoRA, lora
from effjax.quant import NF4, Int8
from effjax.train import next_token
from tests.modules import apply, normal, random_params

D, F, E, V = 8, 12, 3, 11
DENSE = MLP(F, "silu", gated=True, use_bias=True)
CONFIG = TransformerConfig(V, D, (LayerSpec(None, DENSE),) * 2, family="llama")
DOWN = "segments_0/layers_0/ffn/down"
X = normal(2, 5, D, seed=3)
KEY = jax.random.key(0)
ALL = {"experts": E, "top_k": E, "stddev": 0.0}  # all experts on, with gates of one
rng = np.random.default_rng(0)
GROUPS = [{DOWN: rng.random((2, F))} for _ in range(E)]
AFFINITY = (lambda h: {DOWN: h @ h.swapaxes(1, 2)})(rng.random((2, F, 20)))
IN_ONE = {  # each unit is in one expert, or shared
  "random": Random(),
  "clusters": Clusters(),
  "clusters of up": Clusters("up"),
  "graph": Graph(AFFINITY),
  "important": Important(GROUPS),
  "residual": Residual(Random(), GROUPS, 3),
  "residual of a graph": Residual(Graph(AFFINITY), GROUPS[:1], 3),
}


@functools.cache
def params():
  return random_params(Transformer(CONFIG), np.zeros((1, 2), int))


def layers(config, found):
  return split(config, found)[0]


def dense(tree, x, units=slice(None)):
  """What hidden units of the MLP give, in float64."""
  up, gate, down = (jax.tree.map(lambda x: np.asarray(x, np.float64), tree[n]) for n in
                    ("up", "gate", "down"))  # fmt: skip
  h, g = (np.asarray(x) @ w["kernel"] + w["bias"] for w in (up, gate))
  return (h * g / (1 + np.exp(-g)))[..., units] @ down["kernel"][units] + down["bias"]


def after(by, **options):
  return split_ffn(CONFIG, params(), KEY, by=by, **{**ALL, **options})


@pytest.mark.parametrize("by", IN_ONE.values(), ids=IN_ONE)
def test_all_experts_with_gates_of_one_are_the_mlp(by):
  config, found = after(by)
  assert config.family is None
  for layer, ours, theirs in zip(
    config.layers, layers(config, found), layers(CONFIG, params()), strict=True
  ):
    y = apply(layer.ffn, ours["ffn"], X)
    np.testing.assert_allclose(y, dense(theirs["ffn"], X), atol=1e-5)
  merged = layers(*merge_experts(config, found))
  back = merge_experts(config, found)[0].layers[0].ffn
  assert back == DENSE
  np.testing.assert_allclose(
    apply(back, merged[1]["ffn"], X), dense(layers(CONFIG, params())[1]["ffn"], X), atol=1e-5
  )


def test_a_part_of_the_experts_is_what_their_units_give_times_the_gates():
  config, found = after(Random(), top_k=2, scale=5.0)
  tree, plain = layers(config, found)[0]["ffn"], layers(CONFIG, params())[0]["ffn"]
  assert config.layers[0].ffn == MoE(TopK(E, 2, scale=5.0), DENSE.clone(width=F // E))
  columns = np.asarray(plain["up"]["kernel"]).T.tolist()
  units = [columns.index(unit) for e in (0, 1) for unit in
           np.asarray(tree["experts"]["up"]["kernel"][e]).T.tolist()]  # fmt: skip
  bias = np.asarray(plain["down"]["bias"])
  # The router knows no difference: both gates are 5/2, and the lower experts win.
  expected = 2.5 * (dense(plain, X, units) - bias + 2 * bias / E)
  np.testing.assert_allclose(apply(config.layers[0].ffn, tree, X), expected, atol=1e-5)
  gates = after(Random(), top_k=2, stddev=1.0)[0].layers[0].ffn.router
  assert gates.scale == E


def test_layers_are_chosen_and_may_differ():
  config, found = after(Random(), layers=[-1], load_balance=0.5, z=0.0)
  first, last = config.layers
  assert first.ffn == DENSE and last.ffn.router == TopK(E, E, load_balance=0.5, z=0.0, scale=E)
  first, last = layers(config, found)
  np.testing.assert_array_equal(
    first["ffn"]["up"]["kernel"], layers(CONFIG, params())[0]["ffn"]["up"]["kernel"]
  )
  assert last["ffn"]["experts"]["up"]["kernel"].shape == (E, D, F // E)


def test_shared_units_are_the_most_wanted_and_inner_ones_the_best_of_each():
  at = lambda by: after(by)[1]["segments_0"]["layers_0"]["ffn"]
  own = np.asarray(params()["segments_0"]["layers_0"]["ffn"]["up"]["bias"])
  values = np.stack([group[DOWN][1] for group in GROUPS])
  inner = at(SharingInner(GROUPS, width=5))["experts"]["up"]["bias"]
  best = np.argsort(-values, axis=1)[:, :5]
  np.testing.assert_array_equal(inner[1], own[1][best])
  shared = at(Residual(SharingInner(GROUPS), GROUPS, 3))
  wanted = most_wanted(values, 3, width=3)
  np.testing.assert_array_equal(shared["shared"]["up"]["bias"][1], own[1][wanted])
  left = np.where(np.isin(np.arange(F), wanted), -1, values)
  best = np.argsort(-left, axis=1)[:, :3]
  np.testing.assert_array_equal(shared["experts"]["up"]["bias"][1], own[1][best])
  assert not np.asarray(shared["experts"]["down"]["bias"]).any()


def test_most_wanted_units_by_hand():
  values = np.array([[9, 8, 1, 7, 0, 2], [9, 1, 8, 0, 7, 2], [9, 0, 1, 2, 3, 8]], float)
  # Unit 0 is among the two best of three groups, then 4 of two, then 3 and 5, sums 9 and 12.
  assert most_wanted(values, 1, width=2).tolist() == [0]
  assert most_wanted(values, 3, width=2).tolist() == [0, 4, 5]


@pytest.mark.parametrize("points, parts", [(12, 3), (40, 8), (20, 20), (6, 1)])
def test_assignments_cost_least(points, parts):
  for kind in ("normal", "far apart", "ties"):
    rng = np.random.default_rng(points)
    cost = rng.normal(size=(points, parts))
    cost = cost + 9 * rng.normal(size=(1, parts)) if kind == "far apart" else cost
    cost = np.round(cost) if kind == "ties" else cost
    label = equal_assignment(cost)
    assert (np.bincount(label, minlength=parts) == points // parts).all()
    wide = np.repeat(cost, points // parts, axis=1)
    best = wide[linear_sum_assignment(wide)].sum()
    np.testing.assert_allclose(cost[np.arange(points), label].sum(), best, rtol=1e-9)


def test_clusters_are_those_of_equal_k_means():
  rng = np.random.default_rng(1)
  centres = 4 * np.eye(3)
  planted = np.repeat(np.arange(3), 5)
  points = centres[planted] + rng.normal(size=(15, 3)) / 2
  found = equal_clusters(points @ points.T, 3, seed=2)
  assert len(set(zip(planted, found, strict=True))) == 3
  points = rng.normal(size=(24, 4))
  found = equal_clusters(points @ points.T, 4)
  means = np.stack([points[found == c].mean(0) for c in range(4)])
  spread = lambda label: sum(((points[label == c] - points[label == c].mean(0)) ** 2).sum()
                             for c in range(4))  # fmt: skip
  distance = ((points[:, None] - means) ** 2).sum(-1)
  np.testing.assert_array_equal(found, equal_assignment(distance))
  assert spread(found) < min(spread(rng.permutation(found)) for _ in range(50))
  assert np.bincount(equal_clusters(np.ones((6, 6)), 3)).tolist() == [2, 2, 2]


BATCH = {
  "tokens": np.array([[1, 4, 9], [2, 2, 0]]),
  "segment_ids": np.array([[0, 0, 0], [0, -1, -1]]),
}


def test_units_are_active_together_as_the_activations_say():
  found = capture(Transformer(CONFIG), params(), BATCH, reduce=co_activation, select="down")
  kept = capture(Transformer(CONFIG), params(), BATCH, reduce=co_activation.__class__(
    lambda x, mask: x[None], lambda a, b: a), select="down")  # fmt: skip
  hidden = np.abs(np.asarray(kept[DOWN], np.float64))[:, 0][:, BATCH["segment_ids"] >= 0]
  np.testing.assert_allclose(found[DOWN], hidden.swapaxes(1, 2) @ hidden, rtol=1e-4, atol=1e-7)


def test_importance_is_what_a_unit_changes_in_the_loss():
  objective = next_token(Transformer(CONFIG))
  one = lambda *place: {
    **BATCH,
    "targets": BATCH["tokens"][:, ::-1],
    "weights": np.eye(6, dtype=np.float32)[3 * place[0] + place[1]].reshape(2, 3),
  }
  batches = [one(0, 1), one(0, 2), one(1, 0)]

  @jax.jit
  def of_rows(params, batch):
    """Of one token: what the loss would change by, to first order, without a row of "down"."""
    grads = jax.grad(lambda p: objective(p, batch, None)[0])(params)
    product = jax.tree.map(lambda w, g: w * g, params, grads)
    return product["segments_0"]["layers_0"]["ffn"]["down"]["kernel"].sum(-1)

  expected = np.mean([np.abs(of_rows(params(), batch)) for batch in batches], axis=0)
  found = importance(objective, params(), batches)
  assert list(found) == [DOWN]
  np.testing.assert_allclose(found[DOWN], expected, rtol=1e-4, atol=1e-7)


def with_kernels(**kernels):
  """The parameters of one unscanned layer, with other representations of its matrices."""
  config = dataclasses.replace(CONFIG, layers=CONFIG.layers[:1])
  ffn = layers(CONFIG, params())[0]["ffn"]
  ffn = {name: {**part, "kernel": kernels.get(name, lambda w: w)(part["kernel"])}
         for name, part in ffn.items()}  # fmt: skip
  rest = {name: tree for name, tree in params().items() if name != "segments_0"}
  tree = {**layers(CONFIG, params())[0], "ffn": ffn}
  return config, {**rest, "segments_0": {"layers_0": tree}}


def adapted(w):
  found = lora.init(w, KEY, rank=2, scale=1.0)
  return dataclasses.replace(found, b=normal(2, w.shape[1]))


def test_representations_are_split_or_refused_by_name():
  config, found = with_kernels(
    up=lambda w: NF4.quantize(w, block=4), gate=Int8.quantize, down=adapted
  )
  new, ours = split_ffn(config, found, KEY, by=Clusters("up"), **ALL)
  experts, plain = layers(new, ours)[0]["ffn"], layers(config, found)[0]["ffn"]
  assert isinstance(experts["experts"]["up"]["kernel"], NF4)
  plain = jax.tree.map(weights.materialize, plain, is_leaf=weights.is_weight)
  np.testing.assert_allclose(apply(new.layers[0].ffn, experts, X), dense(plain, X), atol=1e-4)
  with pytest.raises(ValueError, match="merge_experts: layer 0: down/kernel is LoRA"):
    merge_experts(new, ours)
  for name, kernel in (("NF4", lambda w: NF4.quantize(w, block=4)), ("DoRA", lambda w: DoRA.over(
    adapted(w)))):  # fmt: skip
    with pytest.raises(ValueError, match=f"split_ffn: layer 0: down/kernel: {name}"):
      split_ffn(*with_kernels(down=kernel), KEY, **ALL)


@pytest.mark.parametrize(
  "match, by, options",
  [
    ("layer 0: experts=5 of 12 hidden units; allowed: 1, 2, 3, 4, 6, 12", Random(), {"experts": 5}),
    ("count=5 of 12", Clusters(), {"experts": 5}),
    ("experts=4 of 9 hidden", Residual(Random(), GROUPS, 3), {"experts": 4}),
    ("top_k=4; allowed: 1 … 3", Random(), {"top_k": 4}),
    ("experts=0; allowed: from 1", Random(), {"experts": 0}),
    ("scale=nan", Random(), {"scale": float("nan")}),
    ("layers has 2", Random(), {"layers": [2]}),
    ("of='down'; allowed: up, gate", Clusters("down"), {}),
    ("Important: 3 groups; allowed: 4, one for each", Important(GROUPS), {"experts": 4}),
    ("width=13; allowed: 1 … 12", SharingInner(GROUPS, 13), {}),
    ("shared=12; allowed: 1 … 11", Residual(Random(), GROUPS, 12), {}),
    ("affinity has nothing; allowed: 'segments_0/layers_0/ffn/down'", Graph({}), {}),
    ("groups of shape", Important([AFFINITY] * E), {}),
    ("by gives experts .*2, 6.; allowed", lambda *_: Parts(np.arange(F).reshape(2, 6)), {}),
    ("by gives experts: id 12", lambda *_: Parts(np.arange(1, F + 1).reshape(E, -1)), {}),
  ],
)  # fmt: skip
def test_bad_arguments_are_named(match, by, options):
  options = {**options, **({"top_k": 1} if "top_k" not in options else {})}
  with pytest.raises(ValueError, match=match):
    after(by, **options)


def test_what_is_no_mixture_is_not_merged():
  with pytest.raises(ValueError, match="layers whose ffn is an MoE"):
    merge_experts(CONFIG, params())
  config, found = after(Random())
  with pytest.raises(ValueError, match="by='sum'; allowed: concatenation, mean, or an expert's"):
    merge_experts(config, found, by="sum")
  with pytest.raises(ValueError, match="by 3; allowed: 0 … 2"):
    merge_experts(config, found, by=3)
  with pytest.raises(ValueError, match="the ffn of layer 0 is MoE; allowed: MLP"):
    split_ffn(config, found, KEY, layers=[0])


def test_a_way_of_ones_own():
  halves = lambda site, among, experts, key: Parts(
    among[: F // 2].reshape(experts, -1), among[F // 2 :]
  )
  config, found = after(halves)
  y = apply(config.layers[1].ffn, layers(config, found)[1]["ffn"], X)
  np.testing.assert_allclose(y, dense(layers(CONFIG, params())[1]["ffn"], X), atol=1e-5)
