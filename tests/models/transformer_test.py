"""The stack of layers: against torch's own encoder-decoder, and what a stack must keep."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.layers import MLP, LayerNorm, Rope
from effjax.models import EncoderDecoder, LayerSpec, Transformer, TransformerConfig

V, D = 23, 16


def decoder(**changes) -> TransformerConfig:
  local = LayerSpec(
    Attention(4, 2, rope=Rope(), mask=masks.Causal() & masks.SlidingWindow(3, 0)),
    MLP(32, "silu", gated=True),
  )
  whole = LayerSpec(Attention(4, 2, rope=Rope(), qk_norm=1e-6), MLP(32))
  config = TransformerConfig(V, D, (local, local, whole) * 2 + (whole,), context=32)
  return dataclasses.replace(config, **changes)


@pytest.fixture
def tokens():
  return jax.random.randint(jax.random.key(3), (2, 12), 0, V)


@pytest.mark.parametrize("arrangement", ["pre", "post", "sandwich"])
def test_future_tokens_have_no_influence(arrangement, tokens, key):
  module = Transformer(decoder(arrangement=arrangement))
  params = jax.jit(module.init)(key, tokens)
  changed = tokens.at[:, 7:].set((tokens[:, 7:] + 1) % V)
  apply = jax.jit(module.apply)
  before, after = (apply(params, t) for t in (tokens, changed))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert jnp.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


def test_cached_steps_equal_one_pass(tokens, key):
  module = Transformer(decoder())
  params = jax.jit(module.init)(key, tokens)
  whole = jax.jit(module.apply)(params, tokens)
  step = jax.jit(lambda t, p, c: module.apply(params, t, positions=p, cache=c))
  first = jnp.broadcast_to(jnp.arange(5), (2, 5))
  logits, cache = step(tokens[:, :5], first, module.init_cache(2, 16))
  np.testing.assert_allclose(logits, whole[:, :5], atol=1e-5)
  for t in range(5, 12):
    logits, cache = step(tokens[:, t : t + 1], jnp.full((2, 1), t), cache)
    np.testing.assert_allclose(logits[:, 0], whole[:, t], atol=1e-5)


def test_packed_sequences_equal_separate_ones(tokens, key):
  module = Transformer(decoder())
  params = jax.jit(module.init)(key, tokens)
  segment_ids = jnp.array([[0] * 5 + [1] * 4 + [-1] * 3] * 2)
  positions = jnp.array([[*range(5), *range(4), 0, 0, 0]] * 2)
  packed = module.apply(params, tokens, segment_ids=segment_ids, positions=positions)
  np.testing.assert_allclose(packed[:, :5], module.apply(params, tokens[:, :5]), atol=1e-5)
  np.testing.assert_allclose(packed[:, 5:9], module.apply(params, tokens[:, 5:9]), atol=1e-5)


def test_what_padding_holds_has_no_influence(tokens, key):
  module = Transformer(decoder(positions="learned"))
  ids = jnp.array([[0] * 5 + [1] * 4 + [-1] * 3, [-1] * 4 + [0] * 8])
  place = jnp.where(ids < 0, 0, jnp.broadcast_to(jnp.arange(12), (2, 12)))
  params = jax.jit(module.init)(key, tokens)
  apply = jax.jit(lambda t, p: module.apply(params, t, segment_ids=ids, positions=p))
  wanted = apply(jnp.where(ids < 0, 0, tokens), place)
  assert np.isfinite(wanted).all()
  for junk in (-100, V, 10 * V):
    spoil = lambda x, junk=junk: jnp.where(ids < 0, junk, x)
    np.testing.assert_array_equal(apply(spoil(tokens), spoil(place)), wanted)


class Gate(nn.Module):
  """g · y for a number g, or an entry of `context.tokens`."""

  factor: float | None = None

  @nn.compact
  def __call__(self, y, context):
    g = self.param("g", lambda _: jnp.full((1, 1, 1), self.factor or 1.0))
    return y * (g if self.factor is not None else g * context.tokens[..., None])


def gated(module, **places):
  config = module.config
  layers = tuple(dataclasses.replace(spec, **places) for spec in config.layers)
  return module.copy(config=dataclasses.replace(config, layers=layers))


@pytest.mark.parametrize("arrangement", ["pre", "post", "sandwich"])
def test_what_stands_after_a_branch_scales_what_it_adds(arrangement, tokens, key):
  layer = LayerSpec(Attention(4), MLP(32))
  shape = {"arrangement": arrangement, "head": None, "embed_scale": 50.0}
  module = Transformer(decoder(layers=(layer,) * 3, **shape))
  none = gated(module, after_mixer=Gate(1e-9), after_ffn=Gate(1e-9))
  params = jax.jit(none.init)(key, tokens)["params"]
  assert params["segments_0"]["layers_0"]["after_ffn"]["g"].shape == (3, 1, 1, 1)
  apply = lambda module, tokens: jax.jit(module.apply)({"params": params}, tokens)
  # No branch adds anything: the embeddings alone are left, normalised.
  x = params["embed"]["embedding"][tokens]
  want = x / jnp.sqrt((x**2).mean(-1, keepdims=True))
  np.testing.assert_allclose(apply(none, tokens), want, atol=1e-4)
  ones = jax.tree.map(jnp.ones_like, params["segments_0"]["layers_0"]["after_ffn"])
  layers = params["segments_0"]["layers_0"] | {"after_ffn": ones, "after_mixer": ones}
  params["segments_0"] = {"layers_0": layers}
  np.testing.assert_allclose(apply(none, tokens), apply(module, tokens), atol=1e-6)


def test_what_stands_after_a_branch_sees_the_context(tokens, key):
  module = gated(Transformer(decoder()), after_ffn=Gate())
  params = jax.jit(module.init)(key, tokens)
  whole = jax.jit(module.apply)(params, tokens)
  first = jnp.broadcast_to(jnp.arange(12), (2, 12))
  logits, _ = jax.jit(module.apply)(params, tokens, positions=first, cache=module.init_cache(2, 12))
  np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_remat_and_unscanned_gradients_agree(tokens, key):
  module = Transformer(decoder())
  params = jax.jit(module.init)(key, tokens)
  gradient = lambda m: jax.jit(jax.grad(lambda p: (m.apply(p, tokens) ** 2).mean()))(params)
  chex.assert_trees_all_close(
    gradient(module), gradient(module.copy(remat=True)), rtol=1e-4, atol=1e-6
  )


def test_bfloat16_activations_leave_parameters_alone(tokens, key):
  module = Transformer(decoder(), dtype=jnp.bfloat16)
  params = jax.jit(module.init)(key, tokens)
  assert module.apply(params, tokens).dtype == jnp.bfloat16
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(params))


def test_sequence_past_the_context_is_refused(key):
  module = Transformer(decoder())
  with pytest.raises(ValueError, match="length 33; allowed: up to 32"):
    module.init(key, jnp.zeros((1, 33), int))
  with pytest.raises(ValueError, match="length 40 of a cache; allowed: up to 32"):
    module.init_cache(1, 40)


def test_a_mixer_without_caches_is_refused_by_name():
  first, *layers = decoder().layers
  module = Transformer(decoder(layers=(first, dataclasses.replace(first, mixer=MLP(4)), *layers)))
  with pytest.raises(
    ValueError, match="layer 1: mixer is MLP; allowed: modules that have `init_cache`"
  ):
    module.init_cache(1, 8)


@pytest.mark.parametrize(
  ("change", "message"),
  [
    ({"arrangement": "middle"}, "arrangement='middle'; allowed"),
    ({"positions": "relative"}, "positions='relative'; allowed"),
    ({"vocab_size": 0}, "vocab_size=0; allowed: from 1"),
  ],
)
def test_impossible_configurations_are_refused(change, message):
  with pytest.raises(ValueError, match=message):
    decoder(**change)


def test_encoder_decoder_equals_torch(key):
  torch = pytest.importorskip("torch", reason="torch is installed with Python 3.11 only")
  torch.manual_seed(0)
  peer = torch.nn.Transformer(
    D, 4, 2, 2, 32, dropout=0.0, activation="relu", batch_first=True, norm_first=True
  ).eval()
  table = torch.randn(V, D)
  attention = lambda **kw: Attention(4, use_bias=True, out_bias=True, **kw)
  mlp = MLP(32, "relu", use_bias=True)
  shape = {"norm": LayerNorm(), "head": None}
  side = LayerSpec(attention(mask=masks.Full()), mlp)
  encoder = TransformerConfig(V, D, (side,) * 2, **shape)
  side = LayerSpec(attention(), mlp, attention(cross=True))
  module = EncoderDecoder(encoder, TransformerConfig(V, D, (side,) * 2, **shape))
  params = {
    "encoder": _from_torch(peer.encoder, table, {"mixer": "self_attn"}, {"ffn": 2}),
    "decoder": _from_torch(
      peer.decoder,
      table,
      {"mixer": "self_attn", "cross": "multihead_attn"},
      {"cross": 2, "ffn": 3},
    ),
  }
  source, target = jax.random.randint(key, (2, 3, 9), 0, V)
  target = target[:, :6]
  padding = np.array([[False] * 9, [False] * 6 + [True] * 3, [False] * 9])
  with torch.no_grad():
    wanted = peer(
      table[torch.tensor(np.array(source))],
      table[torch.tensor(np.array(target))],
      tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(6),
      src_key_padding_mask=torch.tensor(padding),
      memory_key_padding_mask=torch.tensor(padding),
      tgt_is_causal=True,
    ).numpy()
  segments = jnp.where(padding, -1, 0)
  ours = module.apply({"params": params}, source, target, source_segment_ids=segments)
  np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_encoder_decoder_needs_cross_attention(key, tokens):
  module = EncoderDecoder(decoder(head=None), decoder())
  with pytest.raises(ValueError, match="no layer of `decoder` has a cross module"):
    module.init(key, tokens, tokens)


def _from_torch(side, table, attentions, norm_numbers):
  """Our stacked parameters of one side of `torch.nn.Transformer`."""
  array = lambda p: jnp.asarray(p.detach().numpy())
  norm = lambda m: {"scale": array(m.weight), "bias": array(m.bias)}
  linear = lambda w, b: {"kernel": array(w).T, "bias": array(b)}

  def layer(block):
    tree = {"mixer_norm": norm(block.norm1)}
    for ours, theirs in attentions.items():
      module = getattr(block, theirs)
      weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
      names = ("query", "key", "value")
      tree[ours] = {n: linear(w, b) for n, w, b in zip(names, weights, biases, strict=True)}
      tree[ours]["out"] = linear(module.out_proj.weight, module.out_proj.bias)
    for ours, number in norm_numbers.items():
      tree[f"{ours}_norm"] = norm(getattr(block, f"norm{number}"))
    up, down = block.linear1, block.linear2
    tree["ffn"] = {"up": linear(up.weight, up.bias), "down": linear(down.weight, down.bias)}
    return tree

  layers = jax.tree.map(lambda *xs: jnp.stack(xs), *[layer(b) for b in side.layers])
  return {
    "embed": {"embedding": jnp.asarray(table.numpy())},
    "segments_0": {"layers_0": layers},
    "final_norm": norm(side.norm),
  }
