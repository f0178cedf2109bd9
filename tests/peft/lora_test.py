import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear, trees
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.layers import MLP, Embed, LayerSpec, TransformerConfig
from effjax.models import Transformer
from effjax.peft import LoRA, detach, load, lora, save, trainable
from effjax.peft.beside import Tuned
from effjax.quant import Int8, quantize
from effjax.train import next_token
from tests.modules import normal, random_params

KEY = jax.random.key(0)


def trained(w: LoRA, seed=7) -> LoRA:
  """`w` with a B that is not zero."""
  return dataclasses.replace(w, b=jnp.asarray(0.1 * np.asarray(normal(*w.b.shape, seed=seed))))


def tree(*lead):
  query = {"kernel": normal(*lead, 8, 12), "bias": jnp.zeros((*lead, 12))}
  return {"mixer": {"query": query, "value": {"kernel": normal(*lead, 8, 4, seed=1)}}}


@jax.jit
def views(w, x, ids):
  """The matrix, a product with it, its transpose and some of its rows."""
  return w.materialize(), linear(x, w), w.T.materialize(), w.take(ids)


def test_it_starts_as_the_base_to_the_bit():
  base, x = normal(8, 12), normal(3, 8, seed=1)
  w = lora.init(base, KEY, rank=4, scale=2.0)
  chex.assert_trees_all_equal(linear(x, w), linear(x, base))
  chex.assert_trees_all_equal(w.materialize(), base)


@pytest.mark.parametrize("base", ["array", "int8", "lora"])
def test_product_is_base_plus_scaled_low_rank(base):
  matrix, x = normal(8, 12), normal(2, 3, 8, seed=1)
  if base == "int8":
    matrix = Int8.quantize(matrix)
  if base == "lora":
    matrix = trained(lora.init(matrix, jax.random.key(1), rank=2, scale=1.0), seed=3)
  w = trained(lora.init(matrix, KEY, rank=4, scale=0.5))
  wide = lambda v: np.asarray(v, np.float64)
  expected = wide(matrix) + 0.5 * wide(w.a) @ wide(w.b)
  ids = np.array([[7, 0]])
  whole, product, transposed, taken = views(w, x, ids)
  np.testing.assert_allclose(whole, expected, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(product, wide(x) @ expected, rtol=1e-4, atol=1e-5)
  np.testing.assert_allclose(transposed, expected.T, rtol=1e-5, atol=1e-6)
  np.testing.assert_allclose(taken, expected[ids], rtol=1e-5, atol=1e-5)


def test_factors_start_as_in_the_paper_and_peft():
  w = lora.init(jnp.zeros((64, 32)), jax.random.key(0), rank=16, scale=1.0)
  a, b = np.asarray(w.a), np.asarray(w.b)
  assert np.abs(a).max() <= 1 / 8
  np.testing.assert_allclose(a.std(), 1 / 8 / np.sqrt(3), rtol=0.05)
  assert not b.any()


@pytest.mark.parametrize(("rs", "scale"), [(False, 16 / 4), (True, 16 / 2)])
def test_scale(rs, scale):
  adapted = lora.add(tree(), KEY, rank=4, alpha=16, rs=rs)
  assert adapted["mixer"]["query"]["kernel"].scale.item() == scale


@pytest.mark.parametrize("lead", [(), (3,), (2, 3)])
def test_layers_and_experts_have_factors_of_their_own(lead):
  adapted = lora.add(tree(*lead), KEY, rank=2)
  w = adapted["mixer"]["query"]["kernel"]
  assert (w.a.shape, w.b.shape, w.scale.shape) == ((*lead, 8, 2), (*lead, 2, 12), (*lead, 1, 1))
  if lead:
    a, at = np.asarray(w.a), (0,) * len(lead)
    assert not np.allclose(a[0], a[-1])
    w, first = trained(w), jax.tree.map(lambda x: jnp.asarray(np.asarray(x)[at]), trained(w))
    whole = jax.jit(lambda *weights: [w.materialize() for w in weights])
    whole, alone = map(np.asarray, whole(w, first))
    np.testing.assert_allclose(whole[at], alone, rtol=1e-5, atol=1e-6)


def test_a_path_draws_the_same_factors_whatever_else_is_targeted():
  both = lora.add(tree(), KEY, rank=2)
  one = lora.add(tree(), KEY, rank=2, exclude="query")
  chex.assert_trees_all_equal(both["mixer"]["value"], one["mixer"]["value"])
  assert not isinstance(one["mixer"]["query"]["kernel"], LoRA)
  assert not np.allclose(both["mixer"]["query"]["kernel"].a, both["mixer"]["value"]["kernel"].a)


@pytest.mark.parametrize(("rank", "parameters"), [(1, 4_718_592), (4, 18_874_368), (8, 37_748_736)])
def test_gpt3_query_value_trains_the_parameters_of_the_paper(rank, parameters):
  kernel = jax.ShapeDtypeStruct((96, 12288, 12288), jnp.float16)
  params = {"mixer": {name: {"kernel": kernel} for name in ("query", "key", "value", "out")}}
  adapted = jax.eval_shape(lambda p, key: lora.add(p, key, rank=rank), params, jax.random.key(0))
  chosen, _ = trees.partition(adapted, trainable(adapted))
  assert trees.count(chosen) == parameters
  assert trees.count(adapted) == trees.count(params) + parameters


def moved(params):
  """`params` with no B that is zero."""
  return trees.update(params, lambda path, w: isinstance(w, LoRA), lambda path, w: trained(w))


def test_merge_and_unmerge_are_bit_close():
  adapted = moved(lora.add(tree(2), KEY, rank=2))
  merged = jax.jit(lora.merge)(adapted)
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, tree(2))
  back = jax.jit(lora.unmerge)(merged, adapted)
  chex.assert_trees_all_equal_structs(back, adapted)
  chex.assert_trees_all_equal(back, adapted)
  second = lambda params: jax.tree.map(lambda v: v[1], params["mixer"]["query"]["kernel"])
  products = jax.jit(lambda x, *trees: [linear(x, second(params)) for params in trees])
  np.testing.assert_allclose(*products(normal(3, 8, seed=5), merged, adapted), rtol=1e-4, atol=1e-5)


def test_merge_over_a_quantised_base_adds_to_what_it_stands_for():
  quantised = jax.jit(lambda params: quantize(params, targets="kernel"))(tree())
  adapted = lora.add(quantised, KEY, rank=2, targets="query")
  merged = jax.jit(lora.merge)(adapted)["mixer"]
  chex.assert_trees_all_equal(
    merged["query"]["kernel"], np.asarray(quantised["mixer"]["query"]["kernel"])
  )
  assert isinstance(merged["value"]["kernel"], Int8)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"targets": "absent"}, "'absent' matches no parameter"),
    ({"targets": "bias"}, r"selects no matrix .* mixer/query/bias"),
    ({"rank": 0}, r"rank 0 for mixer/query/kernel \(8, 12\); allowed: 1 … 8"),
    ({"rank": 5}, r"rank 5 for mixer/value/kernel \(8, 4\); allowed: 1 … 4"),
    ({"exclude": "kernel"}, "leaves nothing"),
    ({"exclude": "out"}, "exclude 'out' matches none of the targets mixer/query/kernel, "),
    ({"rank": {"query": 2}}, r"rank: none of the patterns \['query'\] is in mixer/value/kernel"),
    ({"rank": {"query": 5, "": 2}, "targets": "value"}, "rank: pattern 'query' is in none of"),
    ({"alpha": {"layers_3": 2, "": 1}}, r"alpha: pattern 'layers_3' .* scanned together"),
    ({"rank": {"value": 5, "": 2}}, r"rank 5 for mixer/value/kernel \(8, 4\); allowed: 1 … 4"),
    ({"dropout": 1.0}, r"dropout 1\.0; allowed: from 0, below 1"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    lora.add(tree(), KEY, **arguments)


@pytest.mark.parametrize(
  ("base", "options", "message"),
  [
    (jnp.ones((3, 4)), {"rank": 4}, r"rank 4 for base \(3, 4\); allowed: 1 … 3"),
    (jnp.ones((3, 4)), {"rank": True}, "rank True; allowed"),
    (jnp.ones((3, 4)), {"scale": jnp.nan}, "scale nan; allowed"),
    (jnp.ones(3), {}, r"base \(3,\); allowed: a matrix"),
  ],
)
def test_one_matrix_gets_factors_that_fit(base, options, message):
  with pytest.raises(ValueError, match=message):
    lora.init(base, KEY, **{"rank": 1, "scale": 1.0, **options})


def test_what_is_adapted_already_or_not_at_all_is_refused():
  adapted = lora.add(tree(), KEY, rank=2, targets="query")
  with pytest.raises(ValueError, match="query/kernel has a LoRA already"):
    lora.add(adapted, jax.random.key(0), rank=2)
  for function in (lora.merge, trainable):
    with pytest.raises(ValueError, match=r"lora\.add"):
      function(tree())
  with pytest.raises(ValueError, match="merged has no plain matrix"):
    lora.unmerge(adapted, adapted)


def test_the_first_pattern_in_a_path_says_rank_and_alpha():
  ranks, alphas = {"query": 4, "": 2}, {"value": 3, "que": 8, "query": 1}
  adapted = lora.add(tree(), KEY, rank=ranks, alpha=alphas)["mixer"]
  query, value = adapted["query"]["kernel"], adapted["value"]["kernel"]
  assert (query.rank, query.scale.item(), value.rank, value.scale.item()) == (4, 2.0, 2, 1.5)


def test_numbers_that_have_changed_since_come_back_within_a_rounding():
  adapted = moved(lora.add(tree(), KEY, rank=4))
  adapted["mixer"]["value"]["kernel"] = trained(
    lora.init(adapted["mixer"]["value"]["kernel"], KEY, rank=1, scale=2.0), seed=8
  )
  merged = lora.merge(adapted)
  for name in ("query", "value"):
    w, matrix = adapted["mixer"][name]["kernel"], merged["mixer"][name]["kernel"]
    base, total = w.base.base if name == "value" else w.base, np.asarray(matrix)
    other = np.nextafter(total, np.float32(np.inf))
    back = lora.unmerge({"kernel": jnp.asarray(other)}, {"kernel": w})["kernel"]
    got = back.base.base if name == "value" else back.base
    rounding = np.spacing(np.maximum(abs(np.asarray(base)), abs(other)))
    assert (abs(np.asarray(got) - base) <= (4 if name == "value" else 2) * rounding).all()
    chex.assert_trees_all_equal(lora.unmerge({"kernel": matrix}, {"kernel": w})["kernel"], w)


def test_a_difference_is_within_one_rounding():
  """Where nothing of `merged` is what `merge` gave, and so no number of the base is kept."""
  w = trained(lora.init(normal(64, 48), KEY, rank=4, scale=2.0))
  merged = np.asarray(w.materialize())
  rounding = np.spacing(np.maximum(abs(np.asarray(w.base)), abs(merged)))
  assert (abs(np.asarray(w.beneath(jnp.asarray(merged))) - w.base) <= rounding).all()


@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_bases_of_half_precision_come_back_to_the_bit(dtype):
  params = jax.tree.map(lambda x: x.astype(dtype), tree())
  adapted = moved(lora.add(params, KEY, rank=2))
  merged = lora.merge(adapted)
  assert merged["mixer"]["query"]["kernel"].dtype == dtype
  chex.assert_trees_all_equal(lora.unmerge(merged, adapted), adapted)


def test_a_quantised_base_is_merged_into_an_array_or_what_is_asked_for():
  quantised = quantize(tree(), targets="query/kernel")
  adapted = moved(lora.add(quantised, KEY, rank=2))
  small, plain = (lora.merge(adapted, represent)["mixer"] for represent in (Int8.represent, None))
  chex.assert_trees_all_equal(small["query"]["kernel"], Int8.quantize(plain["query"]["kernel"]))
  assert not isinstance(small["value"]["kernel"], Int8)
  back = lora.unmerge({"mixer": plain}, adapted)["mixer"]["query"]["kernel"]
  base = quantised["mixer"]["query"]["kernel"]
  chex.assert_trees_all_equal(back.base, base.materialize())


def test_what_is_new_in_a_model_is_not_merged():
  params = lora.add(tree(), KEY, rank=2) | {"prefix": {"keys": Tuned(None, jnp.ones((3, 4)))}}
  with pytest.raises(ValueError, match=r"^prefix/keys: is new in the model, .* such as LoRA"):
    lora.merge(params)
  with pytest.raises(ValueError, match=r"^prefix/keys: is new in the model"):
    lora.unmerge({"prefix": {"keys": jnp.ones((3, 4))}}, {"prefix": params["prefix"]})
  biases = {"bias": Tuned(jnp.zeros(4), jnp.ones(4))}
  merged = lora.merge(biases)
  chex.assert_trees_all_equal(merged, {"bias": jnp.ones(4)})
  chex.assert_trees_all_equal(lora.unmerge(merged, biases), biases)


def test_tables_start_the_other_way_round():
  params = {"embed": {"embedding": normal(9, 6)}}
  adapted = lora.add(params, KEY, rank=6, targets="embedding")
  w = adapted["embed"]["embedding"]
  assert not np.asarray(w.a).any() and 0.6 < np.asarray(w.b).std() < 1.4
  chex.assert_trees_all_equal(w.take(jnp.arange(9)), params["embed"]["embedding"])
  module, x = Embed(9, 6), normal(2, 3, 6, seed=4)
  w = dataclasses.replace(w, a=normal(9, 6, seed=5), dropout=0.5).drawn(KEY)
  params = {"params": {"embedding": w}}
  ids, matrix = jnp.array([[8, 0]]), np.asarray(w.materialize(), np.float64)
  np.testing.assert_allclose(module.apply(params, ids), matrix[np.asarray(ids)], rtol=1e-4)
  logits = module.apply(params, x, method="logits")
  np.testing.assert_allclose(logits, x @ matrix.T, rtol=1e-4, atol=1e-4)


def dropping(*shape, rate=0.5):
  w = trained(lora.init(normal(*shape), KEY, rank=2, scale=0.5))
  return dataclasses.replace(w, dropout=rate)


def test_dropout_is_of_what_the_factors_see():
  w, x = dropping(40, 12), normal(5, 10, 40, seed=1)
  drawn, other = w.drawn(jax.random.key(1)), w.drawn(jax.random.key(2))
  seen = np.asarray(drawn.dropped(x))
  kept = seen != 0
  np.testing.assert_allclose(seen, np.where(kept, 2 * np.asarray(x), 0))
  assert abs(kept.mean() - 0.5) < 0.05 and (kept != (np.asarray(other.dropped(x)) != 0)).any()
  expected = np.asarray(x) @ w.base + seen @ np.asarray(w.delta())
  np.testing.assert_allclose(linear(x, drawn), expected, rtol=1e-4, atol=1e-4)
  chex.assert_trees_all_equal(linear(x, w), linear(x, dataclasses.replace(w, dropout=0.0)))
  assert linear(x.astype(jnp.bfloat16), drawn).dtype == jnp.bfloat16


def test_what_is_not_drawn_or_has_no_rate_is_as_it_was():
  params = lora.add(tree(), KEY, rank=2)
  assert trees.drawn(params, KEY)["mixer"]["query"]["kernel"] is params["mixer"]["query"]["kernel"]
  over = dropping(8, 12, rate=0.0)
  outer = lora.init(dropping(8, 12), KEY, rank=1, scale=1.0)
  assert outer.drawn(KEY).base.key is not None and outer.drawn(KEY).key is None
  text = lambda w: str(jax.make_jaxpr(linear)(normal(3, 8), w))
  assert text(over) == text(over.drawn(KEY)) == text(dropping(8, 12))


def test_each_matrix_of_a_stack_and_each_path_drops_by_itself():
  params = {name: {"kernel": dropping(3, 8, 12)} for name in ("up", "down")}
  drawn = trees.drawn(params, KEY)
  x = jnp.ones((20, 8))
  masks = [
    np.asarray(jax.tree.map(lambda leaf, i=i: leaf[i], w["kernel"]).dropped(x))
    for w in drawn.values() for i in range(3)
  ]  # fmt: skip
  assert len({mask.tobytes() for mask in masks}) == 6
  nested = LoRA(dropping(8, 12), *normal_factors(8, 12), dropout=0.5).drawn(KEY)
  assert (np.asarray(nested.dropped(x)) != np.asarray(nested.base.dropped(x))).any()


def normal_factors(D, F):
  return normal(D, 2, seed=2), normal(2, F, seed=3), jnp.ones((1, 1))


def test_experts_drop_by_row_and_have_right_gradients():
  x, sizes = jnp.ones((50, 8)), jnp.array([37, 0, 9])
  w = dropping(3, 8, 12).drawn(KEY)
  for implementation in ("tiles", "ragged"):
    apply = lambda x, how=implementation: grouped_linear(x, w, sizes, implementation=how)
    y, pull = jax.vjp(apply, x)
    assert len(np.unique(np.asarray(y[:37]).round(3), axis=0)) > 30
    np.testing.assert_allclose(  # linear in x, if both passes drop the same
      (pull(normal(50, 12))[0] * x).sum(), (y * normal(50, 12)).sum(), rtol=1e-4
    )
  params = {"w": dropping(3, 8, 12)}
  loss = lambda params: (grouped_linear(x, trees.drawn(params, KEY)["w"], sizes) ** 2).sum()
  grads = jax.grad(loss)(params)["w"]
  for factor in (grads.a, grads.b):
    assert [bool(each.any()) for each in np.asarray(factor)] == [True, False, True]


def test_a_model_drops_alike_when_layers_are_recomputed_and_keeps_no_keys(tmp_path):
  config = TransformerConfig(11, 8, (LayerSpec(None, MLP(12)),) * 2)
  tokens = jnp.arange(10).reshape(2, 5)
  batch = {"tokens": tokens, "targets": tokens}
  params = random_params(Transformer(config), tokens)
  params = moved(lora.add(params, KEY, rank=2, targets="kernel", dropout=0.5))
  chosen, rest = trees.partition(params, trainable(params))

  def grads(remat):
    objective = next_token(Transformer(config, remat=remat))
    loss = lambda chosen, key: objective(trees.merge(chosen, rest), batch, key)[0]
    return jax.jit(jax.value_and_grad(loss))

  plain, recomputed = grads(False), grads(True)
  chex.assert_trees_all_close(plain(chosen, KEY), recomputed(chosen, KEY), rtol=1e-5)
  assert float(plain(chosen, KEY)[0]) != float(plain(chosen, jax.random.key(1))[0])
  assert not [x for x in jax.tree.leaves(params) if not jnp.issubdtype(x.dtype, jnp.floating)]
  save(params, tmp_path)
  loaded = load(detach(params)[0], tmp_path)
  chex.assert_trees_all_equal_structs(loaded, params)
