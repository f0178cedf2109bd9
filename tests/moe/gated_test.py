"""Gated shared experts and residual mixtures against their definitions and transformers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.core import trees
from effjax.layers import MLP
from effjax.moe import Gated, MoE, ResidualMoE, TopK
from tests.modules import apply, normal, random_params

E, K, D, F = 5, 2, 6, 8
SWIGLU = MLP(F, "silu", gated=True)
QWEN = MoE(TopK(E, K, renormalize=False), SWIGLU, shared=Gated(MLP(3, "silu", gated=True)))
RESIDUAL = ResidualMoE(MoE(TopK(E, 1, renormalize=False), MLP(F)), MLP(F, "relu"))


@pytest.fixture
def x():
  return normal(2, 9, D)


def test_equals_qwen2_moe_of_transformers(x):
  torch = pytest.importorskip(
    "torch", reason="compares with transformers, which needs torch (3.11)"
  )
  from transformers import Qwen2MoeConfig
  from transformers.models.qwen2_moe.modeling_qwen2_moe import Qwen2MoeSparseMoeBlock

  sizes = {"moe_intermediate_size": F, "shared_expert_intermediate_size": 3, "num_experts": E}
  block = Qwen2MoeSparseMoeBlock(
    Qwen2MoeConfig(hidden_size=D, num_experts_per_tok=K, norm_topk_prob=False, **sizes)
  ).eval()
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      parameter.normal_(std=0.5)
    theirs = block(torch.tensor(np.asarray(x))).numpy()
  state = {n: jnp.asarray(w.detach().numpy().swapaxes(-1, -2)) for n, w in block.named_parameters()}
  gate_up = state["experts.gate_up_proj"]
  experts = {"gate": gate_up[..., :F], "up": gate_up[..., F:], "down": state["experts.down_proj"]}
  shared = {n: state[f"shared_expert.{n}_proj.weight"] for n in ("gate", "up", "down")}
  kernels = lambda matrices: {name: {"kernel": w} for name, w in matrices.items()}
  params = {
    "router": {"kernel": state["gate.weight"]},
    "experts": kernels(experts),
    "shared": {
      "gate": {"kernel": state["shared_expert_gate.weight"]},
      "inner": kernels(shared),
    },
  }
  chex.assert_trees_all_close(apply(QWEN, params, x), theirs, atol=1e-5)


def test_residual_is_a_learned_softmax_of_two(x):
  params = random_params(RESIDUAL, x)
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), params)
  logits = np.asarray(x, np.float64) @ p["coefficient"]["kernel"] + p["coefficient"]["bias"]
  weights = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
  parts = [RESIDUAL.mixture, RESIDUAL.mlp]
  outputs = [apply(m, params[n], x) for n, m in zip(("mixture", "mlp"), parts, strict=True)]
  expected = sum(weights[..., i, None] * np.asarray(y) for i, y in enumerate(outputs))
  chex.assert_trees_all_close(apply(RESIDUAL, params, x), expected, atol=1e-5)


@pytest.mark.parametrize(
  ("layer", "used"),
  [(QWEN, D * E + 3 * K * D * F + 3 * 3 * D + D), (RESIDUAL, D * E + 4 * D * F + 2 * D)],
)
def test_what_they_cost_is_what_a_token_uses(x, layer, used):
  shapes = jax.eval_shape(layer.init, jax.random.key(0), x)["params"]
  leaves = {path: leaf for path, leaf in trees.items(shapes).items() if "bias" not in path}
  assert sum(leaf.size * layer.share(path) for path, leaf in leaves.items()) == used
  assert layer.flops(D, 9) == 2 * used
  roles = layer.axes
  assert {path: len(roles[path]) for path in trees.items(shapes)} == {
    path: leaf.ndim for path, leaf in trees.items(shapes).items()
  }
  for role in {role for each in roles.values() for role in each}:
    sizes = {
      leaf.shape[i]
      for path, leaf in trees.items(shapes).items()
      for i, other in enumerate(roles[path])
      if other == role
    }
    assert len(sizes) == 1, role
