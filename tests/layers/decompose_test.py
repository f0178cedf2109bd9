"""Feed-forward layers as sums of their parts, for random partitions of the hidden units."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import MLP
from effjax.layers.decompose import select_neurons, split_neurons
from effjax.quant import dequantize, quantize
from tests.modules import apply

F = 12
X = np.random.default_rng(1).normal(size=(2, 3, 8)).astype(np.float32)
FORMS = {
  "ReLU": MLP(F, "relu", use_bias=True),
  "GELU": MLP(F, "gelu"),
  "GEGLU": MLP(F, "gelu", gated=True, use_bias=True),
  "SwiGLU": MLP(F, "silu", gated=True),
}
forms = pytest.mark.parametrize("module", [pytest.param(m, id=name) for name, m in FORMS.items()])


def random_params(module, seed=0):
  """Parameters with biases that are not zero."""
  params = jax.eval_shape(module.init, jax.random.key(0), X)["params"]
  rng = np.random.default_rng(seed)
  return jax.tree.map(lambda x: jnp.asarray(rng.normal(size=x.shape) / 3, x.dtype), params)


def random_partition(rng, count):
  cuts = np.sort(rng.choice(np.arange(1, count), rng.integers(0, count - 1), replace=False))
  return [group.tolist() for group in np.split(rng.permutation(count), cuts)]


@forms
@pytest.mark.parametrize("seed", range(3))
def test_the_sum_of_the_parts_is_the_layer(module, seed):
  params = random_params(module, seed)
  groups = random_partition(np.random.default_rng(seed), F)
  widths = []

  @jax.jit
  def both(params, x):
    parts = split_neurons(module, params, groups)
    widths.extend(part.width for part, _ in parts)
    total = sum(part.apply({"params": tree}, x) for part, tree in parts)
    return total, module.apply({"params": params}, x)

  total, whole = both(params, X)
  np.testing.assert_allclose(total, whole, atol=1e-5)
  assert widths == [len(group) for group in groups]


@forms
def test_one_part_is_the_formula_of_its_unit(module):
  params = random_params(module)
  part, tree = split_neurons(module, params, [[i for i in range(F) if i != 2], [2]])[1]
  act = {
    "relu": lambda x: np.maximum(x, 0),
    "silu": lambda x: x / (1 + np.exp(-x)),
    "gelu": np.vectorize(lambda x: x * (1 + math.erf(x / 2**0.5)) / 2),
  }[module.activation]
  written = jax.tree.map(np.asarray, params)
  line = lambda name: X @ written[name]["kernel"][:, 2] + written[name].get("bias", np.zeros(F))[2]
  hidden = act(line("gate")) * line("up") if module.gated else act(line("up"))
  wanted = hidden[..., None] * written["down"]["kernel"][2]
  np.testing.assert_allclose(apply(part, tree, X), wanted, atol=1e-5)


def test_parameters_of_scanned_layers_are_split_alike():
  module = FORMS["GEGLU"]
  trees = [random_params(module, seed) for seed in (0, 1)]
  stacked = jax.tree.map(lambda *x: jnp.asarray(np.stack(x)), *trees)
  _, both = select_neurons(module, stacked, [7, 1])
  for layer, tree in enumerate(trees):
    one = select_neurons(module, tree, [1, 7])[1]
    same = lambda a, b, i=layer: np.testing.assert_array_equal(np.asarray(a)[i], b)
    jax.tree.map(same, both, one)


def test_quantised_weights_are_multiplied_out():
  module = FORMS["SwiGLU"]
  params = quantize(random_params(module))
  _, tree = select_neurons(module, params, [0, 5])
  same = select_neurons(module, dequantize(params), [0, 5])[1]
  jax.tree.map(np.testing.assert_array_equal, tree, same)


@pytest.mark.parametrize("groups", [[[0, 1]], [[0, 1, 2], [2]], [[0, 1, 2], []], [[0, 1], [3]]])
def test_what_is_no_partition_is_refused(groups):
  module = MLP(3)
  with pytest.raises(ValueError, match=r"groups=.*; allowed: a partition of 0 … 2, no group empty"):
    split_neurons(module, random_params(module), groups)


def test_impossible_selections_are_refused():
  module = MLP(3)
  params = random_params(module)
  with pytest.raises(ValueError, match=r"neurons has 0 … 3; allowed: 0 … 2"):
    select_neurons(module, params, [3, 0])
  with pytest.raises(ValueError, match=r"neurons=\[1, 1\]; allowed: distinct indices"):
    select_neurons(module, params, [1, 1])
  with pytest.raises(ValueError, match=r"neurons=\[\]; allowed: distinct indices, at least one"):
    select_neurons(module, params, [])
  with pytest.raises(ValueError, match=r"params has \['router', 'up'\]; allowed: up, down"):
    select_neurons(module, {"up": params["up"], "router": {}}, [0])
