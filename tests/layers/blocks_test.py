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

TORCH = "torch is installed with Python 3.11 only"


@pytest.fixture
def x():
  return jax.random.normal(jax.random.key(1), (2, 5, 8)) * 3 + 1


def test_norms_equal_torch(x, key):
  torch = pytest.importorskip("torch", reason=TORCH)
  scale, bias = jax.random.normal(key, (2, 8))
  layer, rms = torch.nn.LayerNorm(8, eps=1e-5), torch.nn.RMSNorm(8, eps=1e-6)
  with torch.no_grad():
    layer.weight[:], layer.bias[:] = torch.tensor(np.array(scale)), torch.tensor(np.array(bias))
    rms.weight[:] = torch.tensor(np.array(scale))
    wanted = [m(torch.tensor(np.array(x))).numpy() for m in (layer, rms)]
  ours = LayerNorm(1e-5).apply({"params": {"scale": scale, "bias": bias}}, x)
  np.testing.assert_allclose(ours, wanted[0], atol=2e-6)
  ours = RMSNorm(1e-6).apply({"params": {"scale": scale}}, x)
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


def test_gated_mlp_is_the_written_formula(x, key):
  module = MLP(12, "silu", gated=True)
  p = module.init(key, x)["params"]
  gate, up = x @ p["gate"]["kernel"], x @ p["up"]["kernel"]
  wanted = (gate / (1 + jnp.exp(-gate)) * up) @ p["down"]["kernel"]
  np.testing.assert_allclose(module.apply({"params": p}, x), wanted, atol=1e-5)
  assert module.flops(8, 5) == 2 * 3 * 8 * 12


def test_unknown_activation_names_the_allowed():
  with pytest.raises(ValueError, match=r"'swish' is unknown; allowed: relu"):
    activation("swish")


def test_rope_scores_depend_on_distance_only(key):
  q, k = jax.random.normal(key, (2, 1, 1, 1, 16))
  rope, at = Rope(100.0), lambda p: jnp.full((1, 1), p)
  score = lambda i, j: float((rope(q, at(i)) * rope(k, at(j))).sum())
  assert score(7, 3) == pytest.approx(score(104, 100), rel=1e-4)
  assert score(7, 3) != pytest.approx(score(8, 3), rel=1e-3)


def test_rope_is_a_rotation_of_complex_pairs(key):
  x = jax.random.normal(key, (1, 6, 2, 8))
  positions = jnp.arange(6)[None]
  z = np.array(x[..., :4]) + 1j * np.array(x[..., 4:])
  angle = np.arange(6)[:, None, None] * 50.0 ** (-np.arange(4) / 4)
  z = z * np.exp(1j * angle)
  wanted = np.concatenate([z.real, z.imag], axis=-1)
  np.testing.assert_allclose(Rope(50.0)(x, positions), wanted, atol=1e-5)


def test_rope_refuses_odd_heads():
  with pytest.raises(ValueError, match="head width 3 is odd"):
    Rope()(jnp.ones((1, 1, 1, 3)), jnp.zeros((1, 1), int))


def test_sinusoidal_positions():
  table = sinusoidal_positions(jnp.arange(4)[None], 6)
  wanted = np.sin(3 * np.exp(-np.log(1e4) * np.arange(3) / 2))
  np.testing.assert_allclose(table[0, 3, :3], wanted, atol=1e-6)
  with pytest.raises(ValueError, match="width 5; allowed: even"):
    sinusoidal_positions(jnp.zeros((1, 1), int), 5)


def test_stored_parameter_of_another_shape_is_named(x):
  params = {"params": {"kernel": jnp.ones((8, 3))}}
  with pytest.raises(ValueError, match=r"'kernel' has shape \(8, 3\); allowed: \(8, 4\)"):
    Linear(4).apply(params, x)


def test_tied_logits_are_products_with_the_table(key):
  embed = Embed(7, 8)
  params = embed.init(key, jnp.zeros((1, 1), int))
  x = jax.random.normal(key, (1, 3, 8))
  logits = embed.apply(params, x, method="logits")
  chex.assert_trees_all_close(logits, x @ params["params"]["embedding"].T, atol=1e-6)
