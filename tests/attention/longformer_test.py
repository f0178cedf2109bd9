"""Longformer: transformers' on the same weights, and what causal and converted ones must keep."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.attention.longformer import Longformer, convert, from_attention
from effjax.layers import MLP, Context, LayerSpec, Rope, TransformerConfig
from effjax.models import Transformer

D, T = 16, 24


def theirs(x, params, marked, padding, window):
  """transformers' self-attention, without the output's projection."""
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  from transformers import LongformerConfig
  from transformers.models.longformer.modeling_longformer import LongformerSelfAttention

  sizes = {"hidden_size": D, "num_attention_heads": 4, "attention_probs_dropout_prob": 0.0}
  module = LongformerSelfAttention(LongformerConfig(attention_window=[2 * window], **sizes), 0)
  tensors = {
    f"{name}.{kind}": torch.tensor(np.asarray(params[name][ours]).T)
    for name in params
    if name != "out"
    for kind, ours in (("weight", "kernel"), ("bias", "bias"))
  }
  module.load_state_dict(tensors)
  state = torch.tensor(np.where(padding, -10000.0, np.where(marked, 10000.0, 0.0)))
  with torch.no_grad():
    (y,) = module.eval()(
      torch.tensor(np.asarray(x)),
      attention_mask=state.float(),
      is_index_masked=state < 0,
      is_index_global_attn=state > 0,
      is_global_attn=bool(marked.any()),
    )[:1]
  return y.numpy()


@pytest.mark.parametrize("marked", [(), (0, 13)])
def test_it_equals_transformers(marked, key):
  x = jax.random.normal(key, (2, T, D))
  module = Longformer(4, mask=masks.SlidingWindow(4, 4), use_bias=True)
  positions = jnp.array([marked, marked[:1] + (-1,) * len(marked[1:])], jnp.int32)
  ids = jnp.zeros((2, T), int).at[1, 20:].set(-1)
  context = Context(segment_ids=ids, global_positions=positions)
  params = jax.jit(module.init)(key, x, context)["params"]
  if not marked:
    params |= {f"{name}_global": params[name] for name in ("query", "key", "value")}
  params = jax.tree.map(lambda p: np.asarray(p) + np.float32(0.1), params)
  y, _ = jax.jit(module.apply)({"params": params | {"out": {"kernel": jnp.eye(D)}}}, x, context)
  flags = np.zeros((2, T), bool)
  for row, at in enumerate(np.asarray(positions)):
    flags[row, at[at >= 0]] = True
  padding = np.asarray(ids) < 0
  want = theirs(x, params, flags, padding, 4)
  np.testing.assert_allclose(np.asarray(y)[~padding], want[~padding], atol=2e-6)


def test_positions_of_the_module_and_of_the_context_agree(key):
  x = jax.random.normal(key, (2, T, D))
  module = Longformer(4, mask=masks.SlidingWindow(2, 2), positions=2, rope=Rope())
  params = jax.jit(module.init)(key, x)
  value = lambda module, context: jax.jit(module.apply)(params, x, context)[0]
  free = dataclasses.replace(module, positions=None)
  context = Context(global_positions=jnp.array([[1, 0, -1]]))
  want = value(module, Context())
  for other, given in ((dataclasses.replace(module, positions=(0, 1)), Context()), (free, context)):
    np.testing.assert_allclose(value(other, given), want, atol=1e-6)


def test_causal_global_tokens_see_nothing_later(key):
  x = jax.random.normal(key, (1, T, D))
  dilated = masks.PerHead((masks.SlidingWindow(3, 3), masks.Dilated(2, 3)), (0, 0, 1, 1))
  module = Longformer(4, mask=dilated, positions=(2, 9), causal=True, rope=Rope())
  params = jax.jit(module.init)(key, x)
  sums = lambda x: module.apply(params, x)[0].sum(-1)[0]
  reach = np.abs(jax.jit(jax.jacrev(sums))(x)[:, 0].sum(-1)) > 0
  assert not np.triu(reach, 1).any()
  assert reach[T - 1, [2, 9]].all() and reach[9, :10].all()


def test_converted_models_compute_the_same_within_the_window(key):
  mixer = Attention(4, kv_heads=2, mask=masks.Full(), use_bias=True)
  spec = LayerSpec(mixer, MLP(32))
  config = TransformerConfig(11, D, (spec,) * 3, positions="learned", context=12, position_offset=2)
  tokens = jax.random.randint(key, (2, 12), 0, 11)
  value = lambda config, params: jax.jit(Transformer(config).apply)({"params": params}, tokens)
  params = jax.jit(Transformer(config).init)(key, tokens)["params"]
  before = value(config, params)
  changed, new = convert(config, params, window=12, context=30)
  after = value(changed, new)
  np.testing.assert_allclose(after, before, atol=1e-5)
  table = new["positions"]["embedding"]
  assert table.shape == (32, D)
  np.testing.assert_array_equal(table[14:26], params["positions"]["embedding"][2:])
  longer = jnp.tile(tokens, (1, 2))
  assert jax.eval_shape(Transformer(changed).apply, {"params": new}, longer).shape == (2, 24, 11)


def test_from_attention_copies_the_projections(key):
  x = jnp.ones((1, 4, D))
  shapes = lambda module: jax.eval_shape(module.init, key, x)["params"]
  params = shapes(Attention(4))
  new = from_attention(params)
  wanted = shapes(Longformer(4, positions=1))
  assert jax.tree.map(jnp.shape, wanted) == jax.tree.map(jnp.shape, new)
  assert new["query_global"] is params["query"]


@pytest.mark.parametrize(
  ("module", "message"),
  [
    (Longformer(4), "positions=None needs context.global_positions"),
    (Longformer(4, positions=1, qk_norm=1e-6), "qk_norm=1e-06"),
    (Longformer(4, positions=(30,)), "position 30; allowed: 0 … 23"),
  ],
)
def test_what_cannot_be_is_named(module, message, key):
  with pytest.raises(ValueError, match=message):
    module.init(key, jnp.ones((1, T, D)))


def test_a_cache_and_layers_without_attention_are_refused(key):
  with pytest.raises(ValueError, match="a cache; allowed: none"):
    Longformer(4, positions=1).init_cache(D, 1, 8)
  spec = LayerSpec(None, MLP(8))
  config = TransformerConfig(11, D, (spec,))
  params = jax.eval_shape(Transformer(config).init, key, jnp.zeros((1, 2), int))["params"]
  with pytest.raises(ValueError, match="mixer of layer 0 is None"):
    convert(config, params, window=2)
