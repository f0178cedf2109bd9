"""Prefix-tuning: a prefix of a text is that text, and modules choose and compose exactly."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import cost
from effjax.attention import (
  Attention,
  BigBird,
  Longformer,
  ShiftedSparseAttention,
  TrainedPrefix,
)
from effjax.attention.masks import Causal, Dilated, Full, Global, SlidingWindow
from effjax.core import trees
from effjax.decode import generate
from effjax.layers import MLP, Context, LayerNorm, LayerSpec, Rope, TransformerConfig
from effjax.layers.objective import through
from effjax.models import Transformer
from effjax.peft import prefix
from effjax.peft.prefix.layers import replaced
from effjax.train import next_token
from tests.modules import apply, random_params

KEY = jax.random.key(0)
TEXT = np.int32([3, 1, 4])
TOKENS = np.int32([[5, 9, 2, 6, 5], [1, 2, 3, 4, 5]])
ROPE = Rope(1e4)
GQA = Attention(4, kv_heads=2, rope=ROPE)
LOCAL = Attention(
  4, kv_heads=1, qk_norm=1e-6, mask=Causal() & SlidingWindow(4, 0), rope=ROPE, logit_softcap=2.0
)


def config(*mixers, **fields):
  layers = tuple(LayerSpec(mixer, MLP(24)) for mixer in mixers)
  return TransformerConfig(32, 16, layers, **{"context": 16} | fields)


def drawn(config):
  return random_params(Transformer(config), jnp.asarray(TOKENS))


LLAMA = config(GQA, GQA)
CASES = {
  "llama": LLAMA,
  "gemma": config(LOCAL, dataclasses.replace(GQA, sinks=True), arrangement="sandwich"),
  "gpt2": config(Attention(4, use_bias=True), norm=LayerNorm(), positions="learned"),
  "sinusoidal": config(Attention(4), positions="sinusoidal"),
}


@pytest.mark.parametrize("name", CASES)
def test_a_prefix_of_a_text_is_that_text(name):
  plain, params = CASES[name], drawn(CASES[name])
  tuned, adapted = prefix.from_tokens(Transformer(plain), params, TEXT)
  text = np.concatenate([np.tile(TEXT, (2, 1)), TOKENS], axis=1)
  whole = apply(Transformer(plain), params, text)[:, len(TEXT) :]
  found = apply(Transformer(tuned, remat=True), adapted, TOKENS)
  np.testing.assert_allclose(found, whole, atol=1e-6)
  assert np.abs(whole - apply(Transformer(plain), params, TOKENS)).max() > 1e-2

  back = prefix.remove(tuned, adapted)
  assert back[0] == plain
  chex.assert_trees_all_equal(back[1], params)


def test_generation_goes_on_after_the_text():
  plain, params = CASES["gemma"], drawn(CASES["gemma"])
  tuned, adapted = prefix.from_tokens(Transformer(plain), params, TEXT)
  found = generate(Transformer(tuned), adapted, [[5, 9], [1]], max_new_tokens=5)
  prompts = [[*TEXT.tolist(), 5, 9], [*TEXT.tolist(), 1]]
  whole = generate(Transformer(plain), params, prompts, max_new_tokens=5)
  np.testing.assert_array_equal(found.tokens, whole.tokens)


@pytest.fixture(scope="module")
def modular():
  """A model whose prefix has three modules, drawn."""
  tuned, params = prefix.add(LLAMA, drawn(LLAMA), KEY, length=2, modules=3)
  draw = lambda path, w: dataclasses.replace(w, value=jax.random.normal(KEY, w.shape))
  return tuned, trees.update(params, "module_", draw)


ROWS = np.int32([[0, 2], [2, -1], [-1, -1], [1, 1]])
COMBINATIONS = ((0, 2), (2,), (), (1,))


@pytest.mark.parametrize("mean", [False, True])
def test_rows_choose_modules(modular, mean):
  tuned, params = modular
  tuned = replaced(tuned, TrainedPrefix(2, 3, mean))
  tokens = np.tile(TOKENS[:1], (4, 1))
  found = np.asarray(apply(Transformer(tuned), params, tokens, attributes=ROWS))
  for row, chosen in enumerate(COMBINATIONS):
    one, folded = prefix.fold(tuned, params, dict.fromkeys(chosen, 1.0))
    alone = apply(Transformer(one), folded, tokens)[row]
    np.testing.assert_allclose(found[row], alone, atol=1e-6)
  assert np.abs(found[0] - found[1]).max() > 1e-3
  general = apply(Transformer(tuned), params, tokens)
  np.testing.assert_allclose(general[2], found[2], atol=1e-6)


def test_modules_that_are_not_chosen_have_no_influence(modular):
  tuned, params = modular
  module, batch = Transformer(tuned), {"tokens": TOKENS, "targets": TOKENS}
  batch["attributes"] = np.int32([[2, -1], [-1, -1]])
  grad = jax.jit(jax.value_and_grad(next_token(module), has_aux=True))
  spoil = lambda path, w: dataclasses.replace(w, value=w.value.at[:, :2].set(jnp.nan))
  (loss, _), slopes = grad(params, batch, None)
  (spoilt, _), others = grad(trees.update(params, "module_", spoil), batch, None)
  assert float(loss) == float(spoilt)
  chex.assert_trees_all_equal(slopes, others)
  chex.assert_tree_all_finite(slopes)
  of_modules = [leaf.value for leaf in trees.select(slopes, "module_").values()]
  assert all(x[:, 2].any() and not x[:, :2].any() for x in of_modules)


def test_modules_come_and_go_exactly(modular):
  tuned, params = modular
  more = prefix.add_modules(tuned, params, 2)
  assert prefix.of(more[0]).modules == 5
  chex.assert_trees_all_equal(prefix.remove_modules(*more, [3, 4])[1], params)
  less = prefix.remove_modules(tuned, params, [0])
  kept = lambda found: np.asarray(apply(Transformer(found[0]), found[1], TOKENS, attributes=at))
  at = np.int32([[1], [-1]])
  moved = kept(less)
  at = np.int32([[2], [-1]])
  np.testing.assert_array_equal(moved, kept((tuned, params)))
  none = prefix.remove_modules(tuned, params, [0, 1, 2])
  plain = prefix.add(LLAMA, drawn(LLAMA), KEY, length=2)
  assert none[0] == plain[0]
  chex.assert_trees_all_equal(none[1], plain[1])


ENCODER = config(Attention(4, mask=Full()), positions="learned", head=None)


def test_an_encoder_takes_a_prefix_where_it_is_said():
  params = drawn(ENCODER)
  with pytest.raises(ValueError, match=r"layer 0: .* allowed: bidirectional=True"):
    prefix.add(ENCODER, params, KEY, length=2)
  tuned, adapted = prefix.add(ENCODER, params, KEY, length=2, modules=1, bidirectional=True)
  assert not prefix.of(tuned).shift and tuned.position_offset == 0
  found = apply(Transformer(tuned), adapted, TOKENS, attributes=np.int32([[0], [-1]]))
  assert np.abs(found - apply(Transformer(ENCODER), params, TOKENS)).max() > 1e-4
  shifted, _ = prefix.add(ENCODER, params, KEY, length=2, bidirectional=True, shift=True)
  assert (shifted.context, shifted.position_offset) == (14, 2)
  back = prefix.remove(shifted, _)
  assert back[0] == ENCODER
  chex.assert_trees_all_equal(back[1], params)


def with_mixer(mixer):
  return config(mixer), {"segments_0": {"layers_0": {"mixer": {}}}}


@pytest.mark.parametrize(
  "mixer, message",
  [
    (Longformer(4, causal=True, mask=SlidingWindow(2, 0)), "Longformer: prefix=.*; allowed: None"),
    (BigBird(4), "BigBird: prefix=.*; allowed: None"),
    (Attention(4, mask=Causal() & ~Global(1)), "allowed: masks of distances"),
    (MLP(8), "layer 0: the mixer is MLP; allowed: Attention"),
  ],
)
def test_what_cannot_have_a_prefix_is_refused_by_name(mixer, message):
  with pytest.raises(ValueError, match=message):
    prefix.add(*with_mixer(mixer), KEY, length=2)


def test_bad_input_is_refused(modular):
  params = jax.eval_shape(lambda: drawn(LLAMA))
  for given, message in (
    ({"length": 0}, "TrainedPrefix: length=0"),
    ({"length": 2, "layers": [2]}, "layers has 2; allowed: -2 … 1"),
    ({"length": 2, "layers": [True]}, "layers has True"),
    ({"length": 2, "modules": -1}, "modules=-1"),
  ):
    with pytest.raises(ValueError, match=message):
      prefix.add(LLAMA, params, KEY, **given)
  learned = CASES["gpt2"]
  with pytest.raises(ValueError, match="16 learned positions; allowed: up to 15, or shift=False"):
    prefix.add(learned, jax.eval_shape(lambda: drawn(learned)), KEY, length=16)
  with pytest.raises(ValueError, match="has a prefix already"):
    prefix.add(*modular, KEY, length=2)
  with pytest.raises(ValueError, match="attributes: id 3 at"):
    Transformer(modular[0]).apply(
      {"params": modular[1]}, jnp.asarray(TOKENS), attributes=jnp.full((2, 1), 3)
    )
  for config, part in (
    (LLAMA, "prefix"),
    (prefix.remove_modules(*modular, [0, 1, 2])[0], "module"),
  ):
    with pytest.raises(ValueError, match=f"mixer has {part}_key, which prefix=.* does not read"):
      apply(Transformer(config), modular[1], TOKENS)
  with pytest.raises(ValueError, match="weights: module 3 is unknown; allowed: 0, 1, 2"):
    prefix.fold(*modular, {3: 1.0})
  with pytest.raises(ValueError, match="allowed: a prefix with modules"):
    prefix.remove_modules(*prefix.add(LLAMA, drawn(LLAMA), KEY, length=2), [0])
  with pytest.raises(ValueError, match="params: has no segments_0/layers_0/mixer/prefix_key"):
    prefix.flat(modular[0], params)
  with pytest.raises(ValueError, match="config has no prefix"):
    prefix.remove(LLAMA, params)
  with pytest.raises(ValueError, match="tokens: id 32"):
    prefix.from_tokens(Transformer(LLAMA), params, [32])


def test_attributes_that_are_none_of_the_modules_give_nan_while_tracing(modular):
  found = apply(Transformer(modular[0]), modular[1], TOKENS, attributes=np.int32([[3], [2]]))
  assert np.isnan(found[0]).all() and np.isfinite(found[1]).all()


def test_masks_and_costs_count_the_prefix():
  windowed = Attention(4, mask=Causal() & SlidingWindow(2, 0))
  with_prefix = dataclasses.replace(windowed, prefix=TrainedPrefix(3))
  extra = with_prefix.flops(16, 5) - windowed.flops(16, 5)
  assert extra == pytest.approx(4 * 16 * (2 + 1) / 5)  # the first two tokens see 2 keys and 1
  assert (Causal() & Dilated(1, 2)).relative and not (Causal() | Global(1)).relative
  tuned, params = jax.eval_shape(lambda: prefix.add(LLAMA, drawn(LLAMA), KEY, length=3)[1]), None
  assert params is None and cost.trainable(tuned) == 2 * 2 * 3 * 2 * 4


def test_layers_choose_who_gets_one():
  tuned, params = prefix.add(LLAMA, drawn(LLAMA), KEY, length=2, layers=[-1])
  assert [spec.mixer.prefix is None for spec in tuned.layers] == [True, False]
  assert len(trees.trained(params)) == 2
  assert np.isfinite(apply(Transformer(tuned), params, TOKENS)).all()


def test_learned_weights_mix_modules(modular):
  tuned, params = modular
  mixed = prefix.fold(tuned, params, {0: 0.5, 2: 2.0})[0]
  view = lambda trained: prefix.fold(tuned, params, dict(enumerate(trained)))[1]
  objective = through(next_token(Transformer(mixed)), view)
  batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, 1)}
  grad = jax.jit(jax.grad(lambda w, batch: objective(w, batch, None)[0]))
  slope = np.asarray(grad(jnp.zeros(3), batch))
  assert np.isfinite(slope).all() and (np.abs(slope) > 0).all()


def test_shifted_groups_and_memory_are_seen_beside_a_prefix():
  mixer = Attention(4, kv_heads=2, prefix=TrainedPrefix(2))
  x = jax.random.normal(KEY, (1, 6, 16))
  params = random_params(mixer, x)
  whole, _ = apply(mixer, params, x)
  grouped, _ = apply(ShiftedSparseAttention(4, 2, prefix=mixer.prefix, group=6), params, x)
  np.testing.assert_allclose(grouped, whole, atol=1e-6)

  cross = dataclasses.replace(mixer, cross=True)
  two = jnp.concatenate([x[:, :2], x[:, :2]], axis=1)
  key, value = ((x[0, :2] @ params[name]["kernel"]).reshape(2, 2, 4) for name in ("key", "value"))
  drawn = params | {"prefix_key": key, "prefix_value": value}
  seen, _ = apply(cross, drawn, x, Context(memory=x[:, :2]))
  plain = {name: tree for name, tree in params.items() if not name.startswith("prefix_")}
  twice, _ = apply(dataclasses.replace(cross, prefix=None), plain, x, Context(memory=two))
  np.testing.assert_allclose(seen, twice, atol=1e-6)
