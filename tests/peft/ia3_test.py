"""IA³ against numpy in float64, over other representations and in experts."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from chex import assert_trees_all_equal

from effjax import peft
from effjax.core import linear
from effjax.kernels.grouped_matmul import grouped_linear
from effjax.peft import IA3, LoRA, ia3
from effjax.quant import Int8, quantize
from tests.modules import normal

W, X, BIAS = normal(6, 4), normal(3, 6, seed=1), normal(4, seed=2)
OUT, IN = 1 + normal(1, 4, seed=3) / 4, 1 + normal(6, 1, seed=4) / 4


@pytest.mark.parametrize("scale", [OUT, IN], ids=["outputs", "inputs"])
@pytest.mark.parametrize("base", ["array", "int8", "lora"])
def test_it_multiplies_outputs_whole_or_inputs(scale, base):
  w = W if base == "array" else Int8.quantize(W)
  if base == "lora":
    w = LoRA(W, normal(6, 2), normal(2, 4), jnp.ones((1, 1)))
  x, matrix, vector, bias = (np.asarray(v, np.float64) for v in (X, w, scale, BIAS))
  expected = (x @ matrix + bias) * vector if scale is OUT else (x * vector[:, 0]) @ matrix + bias
  np.testing.assert_allclose(linear(X, IA3(w, scale), BIAS), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("implementation", ["tiles", "ragged", "reference"])
def test_experts_scale_their_biases_too(implementation):
  w, sizes, bias = normal(2, 6, 4), jnp.array([1, 2]), normal(2, 4, seed=2)
  adapted = IA3(w, 1 + normal(2, 1, 4, seed=3) / 4)
  y = grouped_linear(X, adapted, sizes, bias, implementation=implementation)
  group = np.array([0, 1, 1])
  expected = np.einsum("md,mdf->mf", X, w[group]) + bias[group]
  expected = expected * adapted.scale[group, 0]
  np.testing.assert_allclose(y, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("scale", [OUT, IN], ids=["outputs", "inputs"])
def test_float64_stays_so(scale):
  with jax.enable_x64(True):
    w, x, bias = (jnp.asarray(v, jnp.float64) / 3 for v in (W, X, BIAS))
    adapted = IA3(w, scale)
    matrix = np.asarray(w) * np.asarray(scale, np.float64)
    np.testing.assert_allclose(adapted.materialize(), matrix, rtol=1e-15)
    np.testing.assert_allclose(adapted.take(jnp.array([2])), matrix[[2]], rtol=1e-15)
    np.testing.assert_allclose(adapted.beneath(adapted.materialize()), w, rtol=1e-15)
    whole = np.asarray(x) @ matrix + np.asarray(adapted.offset(bias))
    np.testing.assert_allclose(linear(x, adapted, bias), whole, rtol=1e-12)


def test_a_square_matrix_and_vectors_of_one_entry():
  x = jnp.array([[2.0]])
  assert linear(x, IA3(jnp.ones((1, 1)), jnp.full((1, 1), 3.0)), jnp.ones(1)).item() == 9
  column = linear(X, IA3(normal(6, 1), jnp.full((1, 1), 3.0)), jnp.ones(1))
  np.testing.assert_allclose(column, 3 * (X @ normal(6, 1) + 1), rtol=1e-5)
  row = linear(x, IA3(normal(1, 4), jnp.full((1, 1), 3.0)), BIAS)[0]
  np.testing.assert_allclose(row, 6 * normal(1, 4)[0] + BIAS, rtol=1e-5)


def test_it_starts_as_the_base_and_comes_off_again(tmp_path):
  mixer = {"key": {"kernel": normal(2, 6, 4), "bias": normal(2, 4)}}
  base = quantize({"mixer": mixer, "ffn": {"experts": {"down": {"kernel": normal(2, 3, 6, 4)}}}})
  params = ia3.add(base)
  down = params["ffn"]["experts"]["down"]["kernel"]
  assert down.scale.shape == (2, 3, 6, 1) and down.parameters == 2 * 3 * 6 * 5
  first = jax.tree.map(lambda x: x[0], params["mixer"]["key"])
  plain = jax.tree.map(lambda x: x[0], base["mixer"]["key"])
  assert_trees_all_equal(
    linear(X, first["kernel"], first["bias"]), linear(X, plain["kernel"], plain["bias"])
  )
  peft.save(params, tmp_path)
  assert_trees_all_equal(peft.load(base, tmp_path), params)
  assert_trees_all_equal(peft.detach(params)[0], base)


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"targets": "absent"}, "'absent' matches no parameter"),
    ({"feedforward": "bias"}, "selects no matrix"),
    ({"targets": None, "feedforward": None}, "targets=None and feedforward=None; allowed"),
    ({"targets": "kernel"}, "targets and feedforward both match ffn/down/kernel"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  params = {"ffn": {"down": {"kernel": W, "bias": BIAS}}, "mixer": {"key": {"kernel": W}}}
  with pytest.raises(ValueError, match=message):
    ia3.add(params, **arguments)
  with pytest.raises(ValueError, match="key/kernel has an IA3 already"):
    ia3.add(ia3.add(params), feedforward=None)
  with pytest.raises(ValueError, match=r"scale has shape \(4,\); allowed: \(1, 4\), \(6, 1\)"):
    IA3(W, BIAS)
