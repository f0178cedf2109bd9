"""Attention experts against a loop in float64 and transformers' JetMoE; and in whole models."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax.attention import Attention
from effjax.attention.masks import Full
from effjax.core import trees
from effjax.decode import generate
from effjax.layers import MLP, Context, LayerSpec, Rope, TransformerConfig
from effjax.models import Transformer
from effjax.moe import Capacity, ExpertChoice, Gated, MoA, MoE, ResidualMoE, Switch, TopK
from effjax.parallel import Zero, make_mesh
from effjax.peft import LoRA, lora
from effjax.quant import quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal, random_params

E, K, D, T = 5, 2, 8, 6


def definition(layer, params, x):
  """Token by token, head by head, in float64; causal, without rotation."""
  p = jax.tree.map(lambda a: np.asarray(a, np.float64), dict(params))
  x, attention = np.asarray(x, np.float64), layer.attention
  heads, kv_heads, width = attention.heads, attention.kv_heads, attention.head_width
  split = lambda y: y.reshape(*y.shape[:-1], -1, width)
  key, value = (split(x @ p["shared"][name]["kernel"]) for name in ("key", "value"))
  out = np.zeros_like(x)
  for b, t in np.ndindex(x.shape[:2]):
    logits = x[b, t] @ p["router"]["kernel"]
    probs = np.exp(logits - logits.max()) / np.exp(logits - logits.max()).sum()
    chosen = np.argsort(-probs)[: layer.router.top_k]
    for e in chosen:
      query = split(x[b, t] @ p["query"]["kernel"][e])
      seen = []
      for n in range(heads):
        kv = n // (heads // kv_heads)
        scores = key[b, : t + 1, kv] @ query[n] / np.sqrt(width)
        weights = np.exp(scores) / np.exp(scores).sum()
        seen.append(weights @ value[b, : t + 1, kv])
      out[b, t] += probs[e] / probs[chosen].sum() * (np.concatenate(seen) @ p["out"]["kernel"][e])
  return out


@pytest.mark.parametrize(("heads", "kv_heads"), [(1, 1), (4, 2)])
def test_equals_float64(heads, kv_heads):
  layer = MoA(TopK(E, K), Attention(heads, kv_heads=kv_heads, head_width=3))
  x = normal(2, T, D)
  params = random_params(layer, x)
  y, _ = apply(layer, params, x)
  chex.assert_trees_all_close(y, definition(layer, params, x).astype(np.float32), atol=1e-5)


def test_equals_jetmoe_of_transformers():
  torch = pytest.importorskip(
    "torch", reason="compares with transformers, which needs torch (3.11)"
  )
  from transformers import JetMoeConfig
  from transformers.models.jetmoe import modeling_jetmoe

  config = JetMoeConfig(
    hidden_size=D,
    kv_channels=4,
    num_key_value_heads=3,
    num_local_experts=E,
    num_experts_per_tok=K,
    rope_parameters={"rope_type": "default", "rope_theta": 1e4},
    attn_implementation="eager",
  )
  config.head_dim = 4
  block = modeling_jetmoe.JetMoeAttention(config, 0).eval()
  x = torch.tensor(np.asarray(normal(2, T, D)))
  torch.manual_seed(0)
  with torch.no_grad():
    for parameter in block.parameters():
      parameter.normal_(std=0.4)
    positions = modeling_jetmoe.JetMoeRotaryEmbedding(config)(x, torch.arange(T)[None])
    mask = torch.full((T, T), -torch.inf).triu(1)[None, None]
    theirs = block(x, mask, positions)[0].numpy()
  state = {name: w.detach().numpy() for name, w in block.named_parameters()}
  kernel = lambda w: {"kernel": jnp.asarray(w.swapaxes(-1, -2))}
  key, value = np.split(state["kv_proj.weight"], 2)
  params = {
    "router": kernel(state["experts.router.layer.weight"]),
    "query": kernel(state["experts.input_linear.weight"]),
    "out": kernel(state["experts.output_linear.weight"]),
    "out_bias": jnp.asarray(state["experts.bias"]),
    "shared": {"key": kernel(key), "value": kernel(value)},
  }
  layer = MoA(TopK(E, K), Attention(3, head_width=4, rope=Rope(1e4), out_bias=True))
  chex.assert_trees_all_close(apply(layer, params, jnp.asarray(x.numpy()))[0], theirs, atol=1e-5)


def test_costs_and_roles():
  heads, kv_heads, width = 4, 2, 4
  attention = Attention(heads, kv_heads=kv_heads, head_width=width, use_bias=True, out_bias=True)
  layer, x = MoA(TopK(E, K), attention), jnp.zeros((1, T, D))
  shapes = trees.items(jax.eval_shape(layer.init, jax.random.key(0), x)["params"])
  assert {path: leaf.shape for path, leaf in shapes.items()} == {
    "router/kernel": (D, E),
    "query/kernel": (E, D, heads * width),
    "query/bias": (E, heads * width),
    "out/kernel": (E, heads * width, D),
    "out_bias": (D,),
    "shared/key/kernel": (D, kv_heads * width),
    "shared/key/bias": (kv_heads * width,),
    "shared/value/kernel": (D, kv_heads * width),
    "shared/value/bias": (kv_heads * width,),
  }
  assert {path: len(roles) for path, roles in layer.axes.items()} == {
    path: leaf.ndim for path, leaf in shapes.items()
  }
  matrices = {path: leaf for path, leaf in shapes.items() if "kernel" in path}
  used = sum(leaf.size * layer.share(path) for path, leaf in matrices.items())
  assert used == D * E + 2 * D * width * (K * heads + kv_heads)
  scores = 4 * K * heads * width * (T + 1) / 2
  assert layer.flops(D, T) == 2 * used + scores


def test_a_head_without_room_gives_nothing():
  x, attention = normal(2, T, D), Attention(2, head_width=4)
  router = Switch(E, capacity=Capacity(0.5, evaluation=0.5))
  layer = MoA(router, attention)
  params = random_params(layer, x)
  y, _ = apply(layer, params, x)
  whole, _ = apply(MoA(TopK(E, 1, renormalize=False), attention), params, x)
  rows = x.reshape(-1, D)
  placed = apply(router, params["router"], rows, Context(), None).experts < E
  assert 0 < placed.sum() < len(rows)
  expected = np.where(placed.reshape(2, T, 1), whole, 0)
  chex.assert_trees_all_close(y, expected, atol=1e-6)


def test_what_cannot_be_is_refused():
  x = jnp.zeros((1, T, D))
  init = lambda layer: jax.eval_shape(layer.init, jax.random.key(0), x)
  with pytest.raises(ValueError, match="MoA: attention with sinks=True; allowed: False"):
    init(MoA(TopK(E, K), Attention(2, sinks=True)))
  with pytest.raises(ValueError, match="MoA: attention is MLP; allowed: modules that have `heads`"):
    init(MoA(TopK(E, K), MLP(4)))
  with pytest.raises(ValueError, match="MoA: router=ExpertChoice, whose experts choose tokens"):
    init(MoA(ExpertChoice(E), Attention(2, mask=Full())))


ROPE = Rope(1e4)
HEADS = MoA(TopK(4, 2), Attention(2, kv_heads=1, head_width=4, rope=ROPE))
DENSE = LayerSpec(Attention(2, rope=ROPE), MLP(12, "silu", gated=True))


def sparse(experts):
  """A layer of all that a mixture can have, with so many experts."""
  mixture = MoE(TopK(experts, 2), MLP(6, "relu"), shared=Gated(MLP(6)))
  return LayerSpec(HEADS, ResidualMoE(mixture, MLP(8)))


EXTRA = LayerSpec(None, MLP(8, "gelu", gated=True))  # with a norm and a residual of its own
PYRAMID = TransformerConfig(16, D, (DENSE, *[sparse(3), EXTRA] * 2, sparse(5)))
TOKENS = jnp.asarray(np.random.default_rng(0).integers(0, 16, (8, 4)), jnp.int32)


def test_a_pyramid_that_begins_dense_with_extra_layers_is_a_list_of_layers(key):
  shapes = jax.eval_shape(Transformer(PYRAMID).init, key, TOKENS)["params"]
  assert set(shapes) == {"embed", "final_norm", "segments_0", "segments_1", "segments_2"}
  up = lambda segment: (
    shapes[segment]["layers_0"]["ffn"]["mixture"]["experts"]["up"]["kernel"].shape
  )
  assert (up("segments_1"), up("segments_2")) == ((2, 3, D, 6), (5, D, 6))
  extra = shapes["segments_1"]["layers_1"]
  assert set(extra) == {"ffn", "ffn_norm"} and extra["ffn"]["up"]["kernel"].shape == (2, D, 8)


SMALL = TransformerConfig(16, D, (LayerSpec(HEADS, Gated(MLP(6))), EXTRA))


def test_quantised_and_adapted_it_generates_what_it_computes(key):
  module, targets = Transformer(SMALL), r"(query|key|out|inner/up)/kernel$"
  params = lora.add(quantize(random_params(module, TOKENS)), key, rank=2, targets=targets)
  move = lambda path, w: dataclasses.replace(w, b=w.b + 0.1) if isinstance(w, LoRA) else w
  params = trees.update(params, "", move)
  assert sum(isinstance(w, LoRA) for w in trees.items(params).values()) == 4
  new = generate(module, params, TOKENS[:2], max_new_tokens=3).tokens
  whole = jnp.concatenate([TOKENS[:2], new], axis=1)
  logits = apply(module, params, whole)
  chex.assert_trees_all_equal(logits[:, 3:-1].argmax(-1), new)


def test_a_step_is_the_same_where_zero_3_splits_all_of_it(key):
  module = Transformer(SMALL)
  optimizer, zero = optax.sgd(0.1), Zero(make_mesh(data=4), 3)
  batch = {"tokens": TOKENS, "targets": TOKENS, "weights": jnp.ones(TOKENS.shape)}
  state = init_state(random_params(module, TOKENS), optimizer)
  placed = jax.device_put(state, zero.state(state)), jax.device_put(batch, zero.batch(batch))

  def after_a_step(placement, state, batch):
    step = make_train_step(next_token(module), optimizer, placement=placement)
    state, metrics = step(state, batch, key)
    return state.params, metrics["loss"]

  plain = after_a_step(None, jax.tree.map(jnp.array, state), batch)
  chex.assert_trees_all_close(after_a_step(zero, *placed), plain, atol=1e-5)
