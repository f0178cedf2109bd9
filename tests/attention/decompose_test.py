"""Attention as the sum of its heads, for random partitions of them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.attention.decompose import select_heads, split_heads
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.layers import Context, Rope

X = jax.device_put(np.random.default_rng(1).normal(size=(2, 5, 12)).astype(jnp.float32))
BIASES = {"use_bias": True, "out_bias": True}
FORMS = {
  "MHA": Attention(6, mask=masks.Full(), **BIASES),
  "GQA": Attention(6, kv_heads=2, head_width=4, rope=Rope(), qk_norm=1e-6),
  "MQA": Attention(6, kv_heads=1, logit_softcap=2.0, sinks=True, **BIASES),
}
forms = pytest.mark.parametrize("module", [pytest.param(m, id=name) for name, m in FORMS.items()])
GROUPS = ([[4, 0, 3], [1, 5], [2]], [[0, 1, 3, 4], [5, 2]], [[5], [4], [3], [2], [1], [0]])


def random_params(module):
  """Parameters with biases that are not zero."""
  params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
  rng = np.random.default_rng(0)
  return jax.tree.map(
    lambda x: jax.device_put((rng.normal(size=x.shape) / 3).astype(x.dtype)), params
  )


@functools.partial(jax.jit, static_argnums=0)
def value(module, params, context=Context()):
  return module.apply({"params": params}, X, context)[0]


@forms
@pytest.mark.parametrize("groups", GROUPS, ids=["by hand", "sharing stays", "one by one"])
def test_the_sum_of_the_parts_is_the_layer(module, groups):
  params = random_params(module)
  context = Context(segment_ids=jnp.array([[0, 0, 1, 1, 1], [3, 3, 3, 3, -1]]))
  parts = split_heads(module, params, groups)
  total = sum(value(part, tree, context) for part, tree in parts)
  np.testing.assert_allclose(total, value(module, params, context), atol=1e-5)
  assert [part.heads for part, _ in parts] == [len(group) for group in groups]


def test_a_random_partition_of_heads():
  module = FORMS["MHA"]
  params = random_params(module)
  rng = np.random.default_rng(0)
  cuts = np.sort(rng.choice(np.arange(1, 6), 2, replace=False))
  groups = [group.tolist() for group in np.split(rng.permutation(6), cuts)]
  total = sum(value(part, tree) for part, tree in split_heads(module, params, groups))
  np.testing.assert_allclose(total, value(module, params), atol=1e-5)


def test_one_head_is_the_formula_with_its_rows_of_the_output():
  module = FORMS["MHA"]
  params = random_params(module)
  part, tree = split_heads(module, params, [[0, 1, 2, 3, 5], [4]])[1]
  params = jax.tree.map(lambda x: np.asarray(x, np.float64), params)
  own = slice(8, 10)
  x = np.asarray(X, np.float64)
  line = lambda name: x @ params[name]["kernel"][:, own] + params[name]["bias"][own]
  weights = np.exp(np.einsum("bth,bsh->bts", line("query"), line("key")) / np.sqrt(2))
  mixed = weights / weights.sum(-1, keepdims=True) @ line("value")
  wanted = mixed @ params["out"]["kernel"][own]
  np.testing.assert_allclose(value(part, tree), wanted, atol=1e-5)


def test_key_value_heads_stay_shared_where_they_can():
  module = FORMS["GQA"]
  params = random_params(module)
  kv_heads = lambda heads: select_heads(module, params, heads)[0].kv_heads
  assert [kv_heads(h) for h in ([0, 1, 2], [3, 1], [0, 1, 4, 5], [0, 1, 3])] == [1, 2, 2, 3]


def test_all_heads_are_the_layer():
  module = FORMS["GQA"]
  params = random_params(module)
  same, tree = select_heads(module, params, range(6))
  assert same == module
  chex.assert_trees_all_equal(tree, params)


def test_what_cannot_be_selected_is_refused():
  module = FORMS["MHA"]
  params = random_params(module)
  with pytest.raises(ValueError, match=r"heads has 0 … 6; allowed: 0 … 5"):
    select_heads(module, params, [0, 6])
  with pytest.raises(ValueError, match=r"groups=.*; allowed: a partition of 0 … 5"):
    split_heads(module, params, [[0, 1, 2], [4, 5]])
  with pytest.raises(ValueError, match="qk_norm_joint=True: no sum over heads"):
    select_heads(module.clone(qk_norm=1e-6, qk_norm_joint=True), params, [0])
  with pytest.raises(ValueError, match="module is ShiftedSparseAttention with parameters"):
    select_heads(ShiftedSparseAttention(6), params, [0])
