import string

import chex
import hypothesis.strategies as st
import jax
import jax.numpy as jnp
import pytest
from hypothesis import given, settings

from effjax.core import trees
from effjax.peft import LoRA, lora
from effjax.quant import Int8

NAMES = st.text(string.ascii_lowercase, min_size=1, max_size=3)
TREES = st.recursive(
  st.integers(), lambda inner: st.dictionaries(NAMES, inner, min_size=1, max_size=3), max_leaves=8
)


def params():
  base = Int8.quantize(jnp.ones((4, 6)))
  return {
    "mixer": {
      "query": {"kernel": lora.init(base, jax.random.key(0), rank=2, scale=1.0)},
      "out": {"kernel": jnp.ones((6, 4)), "bias": jnp.ones((2, 4))},
    },
    "norm": {"scale": jnp.ones(4)},
  }


def test_a_weight_is_one_leaf_of_items_and_select():
  assert set(trees.items(params())) == {
    "mixer/query/kernel",
    "mixer/out/kernel",
    "mixer/out/bias",
    "norm/scale",
  }
  assert isinstance(trees.select(params(), "query")["mixer/query/kernel"], LoRA)


def test_partition_sees_inside_a_weight_and_merge_inverts_it():
  chosen, rest = trees.partition(params(), r"kernel/[ab]$")
  names = [trees.path_string(p) for p, _ in jax.tree_util.tree_leaves_with_path(chosen)]
  assert names == ["mixer/query/kernel/a", "mixer/query/kernel/b"]
  chex.assert_trees_all_equal(trees.merge(chosen, rest), params())
  chex.assert_trees_all_equal(trees.merge(rest, chosen), params())


def test_count_is_logical_and_nbytes_physical():
  weight = {"w": Int8.quantize(jnp.ones((4, 6)))}
  assert (trees.count(weight), trees.nbytes(weight)) == (24, 24 + 6 * 4)
  adapted = {"w": lora.init(weight["w"], jax.random.key(0), rank=2, scale=1.0)}
  assert trees.count(adapted) == 24 + 2 * (4 + 6)
  assert trees.nbytes(adapted) == 48 + 4 * 2 * (4 + 6) + 4
  abstract = jax.eval_shape(lambda: params())
  assert trees.count(abstract) == trees.count(params())
  assert trees.nbytes(abstract) == trees.nbytes(params())


def test_update_changes_the_selected_leaves_only():
  changed = trees.update(params(), r"out/kernel|norm", lambda path, leaf: path)
  assert changed["mixer"]["out"]["kernel"] == "mixer/out/kernel"
  assert changed["norm"]["scale"] == "norm/scale"
  chex.assert_trees_all_equal(changed["mixer"]["query"], params()["mixer"]["query"])


def test_matrices_leave_out_vectors_even_stacked_ones():
  assert list(trees.matrices(params(), "out|norm")) == ["mixer/out/kernel"]
  assert list(trees.matrices(params(), "mixer", exclude="out")) == ["mixer/query/kernel"]


@pytest.mark.parametrize("function", [trees.select, trees.partition, trees.matrices])
def test_no_match_names_the_pattern_and_the_paths(function):
  with pytest.raises(ValueError, match=r"'absent' matches no parameter; paths: mixer/"):
    function(params(), "absent")


def test_matrices_refuse_targets_without_a_matrix():
  with pytest.raises(ValueError, match=r"selects no matrix .* mixer/out/bias .*\[2, 4\]"):
    trees.matrices(params(), "bias")
  with pytest.raises(ValueError, match=r"exclude 'kernel' leaves nothing"):
    trees.matrices(params(), "out/kernel", exclude="kernel")
  with pytest.raises(ValueError, match=r"exclude 'absent' matches none of the targets mixer/out"):
    trees.matrices(params(), "out/kernel", exclude="absent")
  with pytest.raises(ValueError, match=r"ids is int32\[2, 3\]; allowed: matrices of floats"):
    trees.matrices({"ids": jnp.ones((2, 3), int)}, "ids")


@settings(max_examples=30, deadline=None)
@given(tree=st.dictionaries(NAMES, TREES, min_size=1, max_size=3), pattern=NAMES)
def test_partition_and_merge_are_inverse_on_any_tree(tree, pattern):
  if not any(pattern in path for path in trees.items(tree)):
    with pytest.raises(ValueError, match="matches no parameter"):
      trees.partition(tree, pattern)
    return
  chosen, rest = trees.partition(tree, pattern)
  assert trees.merge(chosen, rest) == tree
  assert len(jax.tree.leaves(chosen)) + len(jax.tree.leaves(rest)) == len(jax.tree.leaves(tree))
  assert set(trees.items(chosen)) == set(trees.select(tree, pattern))


def test_what_trains_is_the_knowledge_of_the_representation():
  w = jnp.ones((4, 6))
  plain = {"kernel": w, "scale": jnp.ones(4), "ids": jnp.ones(3, int)}
  assert trees.trained(plain) == {"kernel", "scale"}
  quantised = plain | {"kernel": Int8.quantize(w)}
  assert trees.trained(quantised) == {"scale"}
  factors = lora.add(plain, jax.random.key(0), rank=2, targets="kernel")
  assert trees.trained(factors) == {"kernel/a", "kernel/b"}
  over_int8 = lora.add(quantised, jax.random.key(0), rank=2, targets="kernel")
  assert trees.trained(over_int8) == {"kernel/a", "kernel/b"}
  twice = {"kernel": lora.init(factors["kernel"], jax.random.key(1), rank=1, scale=1.0)}
  assert trees.trained(twice) == {"kernel/a", "kernel/b", "kernel/base/a", "kernel/base/b"}
