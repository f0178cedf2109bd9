import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from chex import assert_trees_all_close, assert_trees_all_equal

from effjax import peft
from effjax.attention import LSRA, Attention, Linformer
from effjax.core import trees
from effjax.layers import MLP, LayerNorm, LayerSpec, TransformerConfig
from effjax.models import Transformer
from effjax.moe import MoE, TopK
from effjax.peft import Tuned, tuning
from effjax.quant import quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, normal, random_params

TOKENS = np.random.default_rng(0).integers(0, 24, (2, 8)).astype(np.int32)
BIASED = {"use_bias": True, "out_bias": True}
ATTENTION = Attention(2, qk_norm=1e-6, sinks=True, **BIASED)
CONFIG = TransformerConfig(
  24,
  8,
  (LayerSpec(ATTENTION, MLP(8, use_bias=True)),) * 2,
  norm=LayerNorm(),
  positions="learned",
  token_types=2,
  context=8,
)


def large(width=1024, layers=24):
  """The encoder of BERT-large, as shapes."""
  layer = LayerSpec(Attention(16, **BIASED), MLP(4 * width, use_bias=True))
  config = TransformerConfig(
    30_522, width, (layer,) * layers, norm=LayerNorm(), positions="learned", context=512,
    arrangement="post", final_norm=False, head=None, embed_norm=True, token_types=2,
  )  # fmt: skip
  init = lambda: Transformer(config).init(jax.random.key(0), jnp.zeros((1, 4), jnp.int32))
  return config, jax.eval_shape(init)["params"]


def test_bitfit_trains_the_biases_of_bert_large_alone():
  _, params = large()
  with_pooler = trees.count(params) + 1024**2 + 1024
  assert with_pooler == 335_141_888
  tuned = jax.eval_shape(peft.bitfit, params)
  chosen, _ = trees.partition(tuned, peft.trainable(tuned))
  assert trees.count(chosen) == 24 * 11 * 1024 + 1024  # of each layer 11 d, and of the first norm
  assert round(100 * trees.count(chosen) / with_pooler, 2) == 0.08
  assert trees.count(tuned) == trees.count(params)


MODULES = [
  ATTENTION,
  LSRA(2, kernel=3),
  Linformer(2, length=8, rank=3),
  MoE(TopK(3, 2), MLP(6, use_bias=True)),
]


@pytest.mark.parametrize("module", MODULES, ids=lambda module: type(module).__name__)
def test_every_module_takes_tuned_parameters(module):
  x = normal(2, 8, 8)
  params = random_params(module, x)
  tuned = peft.tune(params, "")
  moved = jax.tree.map(lambda w: Tuned(w.base, 1.5 * w.value), tuned, is_leaf=trees.is_weight)
  values = jax.tree.map(lambda p: 1.5 * p, params)
  assert_trees_all_close(apply(module, moved, x), apply(module, values, x), atol=1e-5)
  assert_trees_all_equal(peft.detach(moved)[0], params)
  assert_trees_all_equal(peft.merge(moved), values)


@pytest.mark.parametrize("represent", [lambda p: p, quantize], ids=["float32", "int8"])
def test_a_step_moves_what_is_tuned_and_the_base_comes_back(represent):
  module = Transformer(CONFIG, remat=True)
  base = represent(random_params(module, TOKENS))
  kept = jax.tree.map(np.asarray, base)
  params = peft.tune(peft.bitfit(base), r"norm/scale$|positions/embedding$|sinks$")
  assert_trees_all_close(apply(module, params, TOKENS), apply(module, base, TOKENS), atol=1e-6)
  batch = {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, 1)}
  optimizer = optax.sgd(0.1)
  state, _ = make_train_step(next_token(module), optimizer)(
    init_state(params, optimizer), batch, jax.random.key(0)
  )
  chosen = trees.partition(state.params, peft.trainable(state.params))[0]
  assert len(jax.tree.leaves(chosen)) == 9 + 5 + 1 + 1
  still = [p for p, w in trees.items(state.params).items() if isinstance(w, Tuned)
           and np.array_equal(w.base, w.value)]  # fmt: skip
  assert still == [p for p in still if "key/bias" in p]  # keys' biases cancel in a softmax
  assert_trees_all_equal(peft.detach(state.params)[0], kept)
  merged = apply(module, peft.merge(state.params), TOKENS)
  assert_trees_all_close(merged, apply(module, state.params, TOKENS), atol=1e-6)


@pytest.mark.parametrize(
  ("call", "message"),
  [
    (lambda p: peft.tune(p, "absent"), "'absent' matches no parameter"),
    (lambda p: peft.tune(p, "ids"), "targets: ids holds int32; allowed: floats"),
    (lambda p: peft.tune(peft.tune(p, "kernel"), "k"), "query/kernel is a Tuned already"),
    (peft.bitfit, r"params has no bias, but ids, query/kernel; allowed: a model with biases"),
    (peft.merge, "params has no adapter"),
    (lambda p: peft.merge(p | {"new": Tuned(None, jnp.ones(2))}), "new: is new in the model"),
    (lambda p: Tuned(p["ids"], jnp.ones(2)), r"value has shape \(2,\); allowed: \(3,\)"),
  ],
)
def test_bad_arguments_are_named(call, message):
  params = {"query": {"kernel": jnp.ones((2, 3))}, "ids": jnp.arange(3)}
  with pytest.raises(ValueError, match=message):
    call(params)


def test_patterns_name_biases_and_norms():
  paths = list(trees.items(random_params(Transformer(CONFIG), TOKENS)))
  count = lambda pattern: sum(trees.chooses(pattern, path, None) for path in paths)
  assert count(tuning.BIASES) == 4 + 2 + 3 and count(tuning.NORMS) == 8
