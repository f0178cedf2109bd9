"""The stack of layers: against torch's own encoder-decoder, and what a stack must keep."""

import dataclasses

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, LinearAttention, masks
from effjax.layers import MLP, LayerNorm, Rope
from effjax.models import EncoderDecoder, LayerSpec, Transformer, TransformerConfig
from tests.modules import apply, random_params

V, D = 23, 16


def decoder(**changes) -> TransformerConfig:
  local = LayerSpec(
    Attention(4, 2, rope=Rope(), mask=masks.Causal() & masks.SlidingWindow(3, 0)),
    MLP(32, "silu", gated=True),
  )
  whole = LayerSpec(Attention(4, 2, rope=Rope(), qk_norm=1e-6), MLP(32))
  config = TransformerConfig(V, D, (local, local, whole) * 2 + (whole,), context=32)
  return dataclasses.replace(config, **changes)


TOKENS = np.random.default_rng(3).integers(0, V, (2, 12)).astype(np.int32)
MODULE = Transformer(decoder())


@pytest.fixture(scope="module")
def params():
  return random_params(MODULE, TOKENS)


@pytest.mark.parametrize("arrangement", ["pre", "post", "sandwich"])
def test_future_tokens_have_no_influence(arrangement):
  module = Transformer(decoder(arrangement=arrangement))
  params = random_params(module, TOKENS)
  changed = np.where(np.arange(12) < 7, TOKENS, (TOKENS + 1) % V)
  before, after = (np.asarray(apply(module, params, t)) for t in (TOKENS, changed))
  np.testing.assert_array_equal(before[:, :7], after[:, :7])
  assert np.abs(before[:, 7:] - after[:, 7:]).max() > 1e-3


def places(length):
  return np.broadcast_to(np.arange(length), (2, length))


def test_cached_steps_equal_one_pass(params):
  whole = np.asarray(apply(MODULE, params, TOKENS))
  step = lambda t, p, c: apply(MODULE, params, t, positions=p, cache=c)
  logits, cache = step(TOKENS[:, :5], places(5), MODULE.init_cache(2, 16))
  np.testing.assert_allclose(logits, whole[:, :5], atol=1e-5)
  for t in range(5, 12):
    logits, cache = step(TOKENS[:, t : t + 1], np.full((2, 1), t), cache)
    np.testing.assert_allclose(np.asarray(logits)[:, 0], whole[:, t], atol=1e-5)


@pytest.mark.parametrize("positions", ["learned", "sinusoidal"])
@pytest.mark.parametrize("mixer", [Attention(4), LinearAttention(4)])
def test_calls_without_positions_go_on_where_each_row_ended(positions, mixer):
  """The token that is not there in the first call, and the rows' own ends, count for nothing."""
  module = Transformer(decoder(layers=(LayerSpec(mixer, None),) * 2, positions=positions))
  params = random_params(module, TOKENS)
  whole = np.asarray(apply(module, params, TOKENS[:, :8]))
  first = np.stack([[*TOKENS[0, :3], -100], TOKENS[1, :4]])
  ids = np.array([[0, 0, 0, -1], [0] * 4])
  _, cache = apply(module, params, first, segment_ids=ids, cache=module.init_cache(2, 9))
  assert cache.ends.tolist() == [3, 4]
  second = np.stack([TOKENS[0, 3:7], TOKENS[1, 4:8]])
  logits, cache = apply(module, params, second, cache=cache)
  assert cache.ends.tolist() == [7, 8]
  np.testing.assert_allclose(logits, np.stack([whole[0, 3:7], whole[1, 4:8]]), atol=1e-5)


def test_a_position_past_the_end_of_a_cache(params):
  """Refused where it is known, layers that are scanned included; else NaN, and the row is whole."""
  cache = MODULE.init_cache(2, 8)
  tokens, far = jnp.asarray(TOKENS[:, :2]), jnp.array([[0, 1], [0, 8]])
  with pytest.raises(ValueError, match=r"positions: 8 at \[1, 1\]; allowed: 0 … 7, the slots"):
    MODULE.apply({"params": params}, tokens, positions=far, cache=cache)
  logits, cache = apply(MODULE, params, tokens, positions=far, cache=cache)
  assert np.isnan(logits[1, 1]).all()
  assert cache.ends.tolist() == [2, 1]
  then, _ = apply(MODULE, params, TOKENS[:, 1:3], cache=cache)
  whole = apply(MODULE, params, TOKENS[:, :4])
  np.testing.assert_allclose(logits[0], whole[0, :2], atol=1e-5)
  np.testing.assert_allclose(then[1], whole[1, 1:3], atol=1e-5)


def test_packed_sequences_equal_separate_ones(params):
  segment_ids = np.array([[0] * 5 + [1] * 5 + [-1] * 2] * 2)
  positions = np.array([[*range(5), *range(5), 0, 0]] * 2)
  packed = apply(MODULE, params, TOKENS, segment_ids=segment_ids, positions=positions)
  for part in (slice(0, 5), slice(5, 10)):
    alone = apply(MODULE, params, TOKENS[:, part])
    np.testing.assert_allclose(np.asarray(packed)[:, part], alone, atol=1e-5)


def test_what_padding_holds_has_no_influence():
  module = Transformer(decoder(positions="learned"))
  ids = np.array([[0] * 5 + [1] * 4 + [-1] * 3, [-1] * 4 + [0] * 8])
  params = random_params(module, TOKENS)

  def run(junk):
    spoil = lambda x: np.where(ids < 0, junk, x)
    return apply(module, params, spoil(TOKENS), segment_ids=ids, positions=spoil(places(12)))

  wanted = run(0)
  assert np.isfinite(wanted).all()
  for junk in (-100, V, 10 * V):
    np.testing.assert_array_equal(run(junk), wanted)


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
def test_what_stands_after_a_branch_scales_what_it_adds(arrangement):
  layer = LayerSpec(Attention(4), MLP(32))
  shape = {"arrangement": arrangement, "head": None, "embed_scale": 50.0}
  module = Transformer(decoder(layers=(layer,) * 3, **shape))
  none = gated(module, after_mixer=Gate(1e-9), after_ffn=Gate(1e-9))
  fixed = {"g": 1e-9, "scale": 1.0}
  params = jax.tree_util.tree_map_with_path(
    lambda path, x: np.full_like(x, fixed[path[-1].key]) if path[-1].key in fixed else x,
    random_params(none, TOKENS),
  )
  assert params["segments_0"]["layers_0"]["after_ffn"]["g"].shape == (3, 1, 1, 1)
  # No branch adds anything: the embeddings alone are left, normalised.
  x = np.asarray(params["embed"]["embedding"])[TOKENS]
  want = x / np.sqrt((x**2).mean(-1, keepdims=True))
  np.testing.assert_allclose(apply(none, params, TOKENS), want, atol=1e-4)
  ones = {"g": np.ones((3, 1, 1, 1), np.float32)}
  layers = params["segments_0"]["layers_0"]
  after = {"after_ffn": ones, "after_mixer": ones}
  scaled = params | {"segments_0": {"layers_0": layers | after}}
  plain = params | {"segments_0": {"layers_0": {n: x for n, x in layers.items() if n not in after}}}
  np.testing.assert_allclose(apply(none, scaled, TOKENS), apply(module, plain, TOKENS), atol=1e-6)


def test_what_stands_after_a_branch_sees_the_context():
  module = gated(MODULE, after_ffn=Gate())
  params = random_params(module, TOKENS)
  whole = apply(module, params, TOKENS)
  cache = module.init_cache(2, 12)
  logits, _ = apply(module, params, TOKENS, positions=places(12), cache=cache)
  np.testing.assert_allclose(logits, whole, atol=1e-5)


def test_remat_and_unscanned_gradients_agree(params):
  loss = lambda p, tokens, module: (module.apply({"params": p}, tokens) ** 2).mean()
  gradient = lambda module: jax.jit(jax.grad(loss), static_argnums=2)(params, TOKENS, module)
  chex.assert_trees_all_close(
    gradient(MODULE), gradient(MODULE.copy(remat=True)), rtol=1e-4, atol=1e-6
  )


def test_bfloat16_activations_leave_parameters_alone():
  module = Transformer(decoder(), dtype=jnp.bfloat16)
  logits, variables = jax.eval_shape(module.init_with_output, jax.random.key(0), TOKENS)
  assert logits.dtype == jnp.bfloat16
  assert all(p.dtype == jnp.float32 for p in jax.tree.leaves(variables))


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


def test_encoder_decoder_equals_torch():
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
  source, target = np.random.default_rng(0).integers(0, V, (2, 3, 9))
  target = target[:, :6]
  padding = np.array([[False] * 9, [False] * 6 + [True] * 3, [False] * 9])
  with torch.no_grad():
    wanted = peer(
      table[torch.tensor(source)],
      table[torch.tensor(target)],
      tgt_mask=torch.nn.Transformer.generate_square_subsequent_mask(6),
      src_key_padding_mask=torch.tensor(padding),
      memory_key_padding_mask=torch.tensor(padding),
      tgt_is_causal=True,
    ).numpy()
  segments = np.where(padding, -1, 0)
  ours = apply(module, params, source, target, source_segment_ids=segments)
  np.testing.assert_allclose(ours, wanted, atol=2e-5)


def test_encoder_decoder_needs_cross_attention(key):
  module = EncoderDecoder(decoder(head=None), decoder())
  with pytest.raises(ValueError, match="no layer of `decoder` has a cross module"):
    module.init(key, TOKENS, TOKENS)


def _from_torch(side, table, attentions, norm_numbers):
  """Our stacked parameters of one side of `torch.nn.Transformer`."""
  array = lambda p: p.detach().numpy()
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

  layers = jax.tree.map(lambda *xs: np.stack(xs), *[layer(b) for b in side.layers])
  return {
    "embed": {"embedding": table.numpy()},
    "segments_0": {"layers_0": layers},
    "final_norm": norm(side.norm),
  }
