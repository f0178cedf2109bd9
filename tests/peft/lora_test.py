import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import linear, trees
from effjax.peft import LoRA, lora, trainable
from effjax.quant import Int8, quantize
from tests.modules import normal

KEY = jax.random.key(0)


def trained(w: LoRA, seed=7) -> LoRA:
  """`w` with a B that is not zero."""
  return LoRA(w.base, w.a, jnp.asarray(0.1 * np.asarray(normal(*w.b.shape, seed=seed))), w.scale)


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


def test_merge_and_unmerge_are_bit_close():
  adapted = jax.tree.map(
    lambda w: trained(w) if isinstance(w, LoRA) else w,
    lora.add(tree(2), KEY, rank=2),
    is_leaf=lambda x: isinstance(x, LoRA),
  )
  merged = jax.jit(lora.merge)(adapted)
  chex.assert_trees_all_equal_shapes_and_dtypes(merged, tree(2))
  back = jax.jit(lora.unmerge)(merged, adapted)
  chex.assert_trees_all_equal_structs(back, adapted)
  chex.assert_trees_all_close(back, adapted, rtol=0, atol=1e-6)
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
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    lora.add(tree(), KEY, **arguments)


def test_what_is_adapted_already_or_not_at_all_is_refused():
  adapted = lora.add(tree(), KEY, rank=2, targets="query")
  with pytest.raises(ValueError, match="query/kernel has a LoRA already"):
    lora.add(adapted, jax.random.key(0), rank=2)
  for function in (lora.merge, trainable):
    with pytest.raises(ValueError, match=r"lora\.add"):
      function(tree())
  with pytest.raises(ValueError, match="merged has no plain matrix"):
    lora.unmerge(adapted, adapted)
