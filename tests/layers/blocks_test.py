"""Norms, feed-forward layers, rotary and sinusoidal positions against torch and closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.layers import (
  MLP,
  Embed,
  LayerNorm,
  Linear,
  RMSNorm,
  Rope,
  activation,
  sinusoidal_positions,
)
from tests.modules import apply, normal, random_params

TORCH = "torch is installed with Python 3.11 only"


@pytest.fixture
def x():
  return jnp.asarray(np.asarray(normal(2, 5, 8)) * 3 + 1)


def test_norms_equal_torch(x):
  torch = pytest.importorskip("torch", reason=TORCH)
  scale, bias = np.asarray(normal(2, 8, seed=1))
  layer, rms = torch.nn.LayerNorm(8, eps=1e-5), torch.nn.RMSNorm(8, eps=1e-6)
  with torch.no_grad():
    layer.weight[:], layer.bias[:] = torch.tensor(scale), torch.tensor(bias)
    rms.weight[:] = torch.tensor(scale)
    wanted = [m(torch.tensor(np.array(x))).numpy() for m in (layer, rms)]
  ours = apply(LayerNorm(1e-5), {"scale": scale, "bias": bias}, x)
  np.testing.assert_allclose(ours, wanted[0], atol=2e-6)
  ours = apply(RMSNorm(1e-6), {"scale": scale}, x)
  np.testing.assert_allclose(ours, wanted[1], atol=2e-6)


@pytest.mark.parametrize(
  ("name", "torch_name", "extra"),
  [
    ("relu", "relu", {}),
    ("gelu", "gelu", {}),
    ("gelu_tanh", "gelu", {"approximate": "tanh"}),
    ("silu", "silu", {}),
  ],
)
def test_activations_equal_torch(name, torch_name, extra, x):
  torch = pytest.importorskip("torch", reason=TORCH)
  wanted = getattr(torch.nn.functional, torch_name)(torch.tensor(np.array(x)), **extra)
  np.testing.assert_allclose(activation(name)(x), wanted.numpy(), atol=1e-6)


def test_gated_mlp_is_the_written_formula(x):
  module = MLP(12, "silu", gated=True)
  params = random_params(module, x)
  wide, p = np.asarray(x, np.float64), jax.tree.map(np.asarray, params)
  gate, up = wide @ p["gate"]["kernel"], wide @ p["up"]["kernel"]
  wanted = (gate / (1 + np.exp(-gate)) * up) @ p["down"]["kernel"]
  np.testing.assert_allclose(apply(module, params, x), wanted, atol=1e-5)
  assert module.flops(8, 5) == 2 * 3 * 8 * 12


def test_unknown_activation_names_the_allowed():
  with pytest.raises(ValueError, match=r"'swish' is unknown; allowed: relu"):
    activation("swish")


def test_rope_scores_depend_on_distance_only():
  q, k = np.asarray(normal(2, 1, 1, 1, 16))
  rope, at = Rope(100.0), lambda p: jnp.full((1, 1), p)
  product = jax.jit(lambda i, j: (rope(jnp.asarray(q), at(i)) * rope(jnp.asarray(k), at(j))).sum())
  score = lambda i, j: float(product(i, j))
  assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
  assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-3)


def test_rope_is_a_rotation_of_complex_pairs():
  x = normal(1, 6, 2, 8)
  positions = np.arange(6)[None]
  z = np.array(x)[..., :4] + 1j * np.array(x)[..., 4:]
  angle = np.arange(6)[:, None, None] * 50.0 ** (-np.arange(4) / 4)
  z = z * np.exp(1j * angle)
  wanted = np.concatenate([z.real, z.imag], axis=-1)
  np.testing.assert_allclose(jax.jit(Rope(50.0))(x, positions), wanted, atol=1e-5)


def test_rope_refuses_odd_heads():
  with pytest.raises(ValueError, match="head width 3 is odd"):
    Rope()(jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1), int))


def test_sinusoidal_positions():
  table = jax.jit(sinusoidal_positions, static_argnums=1)(np.arange(4)[None], 6)
  wanted = np.sin(3 * np.exp(-np.log(1e4) * np.arange(3) / 2))
  np.testing.assert_allclose(np.asarray(table)[0, 3, :3], wanted, atol=1e-6)
  with pytest.raises(ValueError, match="width 5; allowed: even"):
    sinusoidal_positions(jnp.zeros((1, 1), int), 5)


def test_stored_parameter_of_another_shape_is_named(x):
  params = {"params": {"kernel": jnp.ones((8, 3))}}
  with pytest.raises(ValueError, match=r"'kernel' has shape \(8, 3\); allowed: \(8, 4\)"):
    Linear(4).apply(params, x)


def test_tied_logits_are_products_with_the_table():
  embed, x, table = Embed(7, 8), normal(1, 3, 8), normal(7, 8, seed=1)
  logits = jax.jit(lambda params, x: embed.apply({"params": params}, x, method="logits"))
  wanted = np.asarray(x) @ np.asarray(table).T
  chex.assert_trees_all_close(logits({"embedding": table}, x), wanted, atol=1e-6)
