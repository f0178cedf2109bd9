import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.core import trees
from effjax.models import presets

# Zhang et al., arXiv 2205.01068, counted from the released shapes.
OPT_PARAMETERS = {
  "125M": 125_239_296,
  "350M": 331_196_416,
  "1.3B": 1_315_758_080,
  "2.7B": 2_651_596_800,
  "6.7B": 6_658_473_984,
  "13B": 12_853_473_280,
  "30B": 29_974_540_288,
  "66B": 65_719_701_504,
  "175B": 174_604_468_224,
}
# The released checkpoints; BERT's include a pooler of D² + D, which is left out here.
PARAMETERS = {
  "smollm2-135m": 134_515_008,
  "gemma3-270m": 268_098_176,
  "bert-base": 109_482_240 - 768 * 769,
  "minilm": 22_713_216 - 384 * 385,
}


def parameters(config) -> int:
  tokens = jax.ShapeDtypeStruct((1, 1), np.int32)
  shapes = jax.eval_shape(models.Transformer(config).init, jax.random.key(0), tokens)
  return trees.count(shapes["params"])


@pytest.mark.parametrize("size", OPT_PARAMETERS)
def test_opt_table(size):
  assert parameters(presets.OPT[size]) == OPT_PARAMETERS[size]


@pytest.mark.parametrize("name", PARAMETERS)
def test_released_models(name):
  assert parameters(presets.preset(name)) == PARAMETERS[name]


def test_llama_of_any_size():
  config = presets.llama(100, 48, 3, 4, 2, 64, tied=False, context=32)
  layer = 48 * 48 * 2 + 48 * 24 * 2 + 3 * 48 * 64 + 2 * 48
  assert parameters(config) == 3 * layer + 2 * 100 * 48 + 48
  assert presets.llama(100, 48, 3, 4).layers[0].mixer.kv_heads == 4


@pytest.mark.parametrize("name", ["tiny", "small"])
def test_small_presets_compute(name):
  config = presets.preset(name)
  module = models.Transformer(config)
  tokens = jnp.zeros((1, 3), jnp.int32)
  logits = jax.eval_shape(lambda key: module.init_with_output(key, tokens)[0], jax.random.key(0))
  assert logits.shape == (1, 3, config.vocab_size)


def test_unknown_preset():
  with pytest.raises(ValueError, match="preset 'opt-9t'; allowed: tiny, small, smollm2-135m"):
    presets.preset("opt-9t")
