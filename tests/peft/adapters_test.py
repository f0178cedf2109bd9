import dataclasses

import jax
import numpy as np
import optax
import pytest
from chex import assert_trees_all_equal

from effjax import models, peft
from effjax.attention import Attention
from effjax.core import trees
from effjax.cost import flops
from effjax.decode import generate
from effjax.layers import MLP, LayerSpec, RMSNorm, Rope, TransformerConfig
from effjax.models import Model, Transformer
from effjax.moe import MoE, TopK
from effjax.peft import Tuned, adapters
from effjax.quant import quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, random_params
from tests.peft.tuning_test import large

KEY = jax.random.key(0)
TOKENS = np.random.default_rng(0).integers(0, 24, (2, 6)).astype(np.int32)
LAYER = LayerSpec(Attention(2, kv_heads=1, rope=Rope(1e4)), MLP(12, "silu", gated=True))
CONFIG = TransformerConfig(24, 8, (LAYER,) * 3, context=8)
MIXTURE = MoE(TopK(3, 2), MLP(2, use_bias=True))


def drawn(config=CONFIG):
  return random_params(Transformer(config), TOKENS)


def trained(params, by=0.1):
  """`params` whose new parameters have moved."""
  move = lambda w: Tuned(None, w.value + by) if isinstance(w, Tuned) else w
  return jax.tree.map(move, params, is_leaf=trees.is_weight)


@pytest.mark.parametrize(
  ("width", "share", "with_norms_and_head"),
  [(8, 0.25, 0.28), (64, 1.89, 1.92), (256, 7.53, 7.56)],
)
def test_bert_large_trains_the_share_of_the_paper(width, share, with_norms_and_head):
  config, params = large()
  whole = trees.count(params) + 1024**2 + 1024  # the pooler
  new = lambda params: adapters.add(config, params, KEY, width=width)[1]
  adapted = jax.eval_shape(new, params)
  count = lambda params: trees.count(trees.partition(params, peft.trainable(params))[0])
  assert count(adapted) == 48 * (2 * width * 1024 + width + 1024)
  assert round(100 * count(adapted) / whole, 2) == share
  norms = jax.eval_shape(lambda p: peft.tune(p, r"(mixer|ffn|embed)_norm/(scale|bias)$"), adapted)
  head = 2 * 1024 + 2
  assert round(100 * (count(norms) + head) / whole, 2) == with_norms_and_head


def test_it_is_the_formula_at_the_places_of_the_paper():
  base = drawn(CONFIG)
  config, params = adapters.add(CONFIG, base, KEY, width=2, activation="relu")
  assert config.layers[0].modules.keys() == {"mixer", "after_mixer", "ffn", "after_ffn"}
  inner = params["segments_0"]["layers_0"]["after_ffn"]["inner"]
  up, down = (np.asarray(inner[name]["kernel"].value) for name in ("up", "down"))
  assert up.shape == (3, 8, 2) and down.shape == (3, 2, 8)
  assert not np.asarray(inner["up"]["bias"].value).any()
  for w in (
    up,
    down,
    params["segments_0"]["layers_0"]["after_mixer"]["inner"]["up"]["kernel"].value,
  ):
    assert 0 < np.abs(w).max() <= 0.02 and len(np.unique(w)) == w.size
  assert not np.isin(
    up, params["segments_0"]["layers_0"]["after_mixer"]["inner"]["up"]["kernel"].value
  ).any()
  module = config.layers[0].after_ffn
  x, one = np.ones((1, 1, 8), np.float32), jax.tree.map(lambda w: w[0], inner)
  moved = trained(one)
  w, b, v, c = (np.asarray(moved[n][m].value) for n in ("up", "down") for m in ("kernel", "bias"))
  y = apply(module, {"inner": moved}, x)
  np.testing.assert_allclose(y, x + np.maximum(x @ w + b, 0) @ v + c, rtol=1e-5)
  near = apply(Transformer(config), params, TOKENS) - apply(Transformer(CONFIG), base, TOKENS)
  assert 0 < np.abs(near).max() < 0.02


def test_standard_deviation_is_that_of_the_truncated_normal():
  config = TransformerConfig(4, 128, (LayerSpec(None, MLP(1)),))
  params = {"segments_0": {"layers_0": {"ffn": {}}}}
  _, params = adapters.add(config, params, KEY, width=64, kind="pfeiffer")
  w = params["segments_0"]["layers_0"]["after_ffn"]["inner"]["up"]["kernel"].value
  np.testing.assert_allclose(np.std(w), 0.8796e-2, rtol=0.03)  # of N(0, 1) cut at ±2
  assert np.abs(w).max() <= 2e-2


def test_they_train_alone_and_come_off_bit_identically(tmp_path):
  base = quantize(drawn())
  kept = jax.tree.map(np.asarray, base)
  config, params = adapters.add(CONFIG, base, KEY, width=2, kind="pfeiffer")
  assert trees.count(params) == trees.count(base) + 3 * (2 * 2 * 8 + 2 + 8)
  assert flops(config, 6, params) == flops(CONFIG, 6, base) + 3 * 2 * 2 * 2 * 8
  batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1)}
  optimizer = optax.adam(0.01)
  step = make_train_step(next_token(Transformer(config, remat=True)), optimizer)
  state = init_state(params, optimizer)
  for _ in range(2):
    state, _ = step(state, batch, KEY)
  _, fresh = adapters.add(CONFIG, kept, KEY, width=2, kind="pfeiffer")
  chosen = [trees.partition(p, peft.trainable(p))[0] for p in (state.params, fresh)]
  assert not any(jax.tree.leaves(jax.tree.map(np.array_equal, *chosen)))
  peft.save(state.params, tmp_path)
  assert_trees_all_equal(peft.load(peft.detach(fresh)[0], tmp_path), state.params)
  plain, removed = adapters.remove(config, state.params)
  assert plain == CONFIG
  assert_trees_all_equal(removed, kept)
  assert jax.tree.structure(removed) == jax.tree.structure(kept)


def test_a_mixture_of_bottlenecks_is_a_value():
  base, x = drawn(), np.ones((1, 1, 8), np.float32)
  config, params = adapters.insert(CONFIG, base, KEY, MIXTURE, layers=[0, -1], stddev=0.3)
  assert trees.count(params) == trees.count(base) + 2 * 2 * (8 * 3 + 3 * (2 * 2 * 8 + 2 + 8))
  assert {"segments_0", "segments_1", "segments_2"} <= set(params)
  own = params["segments_2"]["layers_0"]["after_mixer"]
  y = apply(config.layers[2].after_mixer, own, x) - x
  values = peft_values(own["inner"])
  np.testing.assert_allclose(y, apply(MIXTURE, values, x), rtol=1e-5, atol=1e-6)
  assert config.layers[0].after_ffn.share("inner/experts/up/kernel") == 2 / 3
  plain, removed = adapters.remove(config, params)
  assert plain == CONFIG
  assert_trees_all_equal(removed, base)


def peft_values(tree):
  return jax.tree.map(lambda w: w.value, tree, is_leaf=trees.is_weight)


def test_what_is_generated_step_by_step_is_of_the_whole():
  config, params = adapters.add(CONFIG, drawn(), KEY, width=2)
  module, params = Transformer(config), trained(params)
  new = np.asarray(generate(module, params, TOKENS[:, :3], max_new_tokens=3).tokens)
  logits = np.asarray(apply(module, params, np.concatenate([TOKENS[:, :3], new], 1)))
  np.testing.assert_array_equal(logits[:, 2:-1].argmax(-1), new)


def test_a_published_layout_does_not_hold_them(tmp_path):
  config = dataclasses.replace(CONFIG, family="llama", norm=RMSNorm())
  config, params = adapters.add(config, drawn(), KEY, width=2)
  with pytest.raises(ValueError, match=r"after_|Bottleneck|adapter"):
    models.save(Model(config, Transformer(config), params), tmp_path / "model")


@pytest.mark.parametrize(
  ("arguments", "message"),
  [
    ({"kind": "parallel"}, "kind='parallel'; allowed: houlsby, pfeiffer"),
    ({"width": 0}, "adapters: width=0; allowed: from 1"),
    ({"activation": "elu"}, "activation 'elu' is unknown"),
    ({"layers": [3]}, "layers 3; allowed: -3 … 2"),
    ({"layers": []}, r"layers=\[\]"),
    ({"stddev": -1}, "stddev=-1"),
  ],
)
def test_bad_arguments_are_named(arguments, message):
  with pytest.raises(ValueError, match=message):
    adapters.add(CONFIG, drawn(), KEY, **{"width": 2} | arguments)


def test_what_is_there_already_or_cannot_be_is_refused():
  base = drawn()
  config, params = adapters.add(CONFIG, base, KEY, width=2, layers=[1], kind="pfeiffer")
  with pytest.raises(ValueError, match="layer 1 has something after_ffn; remove it first"):
    adapters.add(config, params, KEY, width=2)
  loose = peft.attach(base, peft.detach(adapters.add(CONFIG, base, KEY, width=2)[1])[1])
  with pytest.raises(ValueError, match=r"has after_mixer, after_ffn, which .* does not read"):
    apply(Transformer(CONFIG), loose, TOKENS)
  with pytest.raises(ValueError, match="config has none"):
    adapters.remove(CONFIG, base)
  with pytest.raises(ValueError, match=r"inner is RMSNorm; allowed: a feed-forward module"):
    adapters.insert(CONFIG, base, KEY, RMSNorm())
  for places in ("after_ffn", (), ("ffn",)):
    with pytest.raises(ValueError, match="places"):
      adapters.insert(CONFIG, base, KEY, MLP(2), places=places)
  alone = TransformerConfig(24, 8, (LayerSpec(LAYER.mixer, None),))
  with pytest.raises(ValueError, match="layer 0 is LayerSpec"):
    adapters.add(alone, drawn(alone), KEY, kind="pfeiffer", layers=[0])
