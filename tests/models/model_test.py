import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax import models
from effjax.models import presets
from tests.modules import apply, random_params

CONFIG = dataclasses.replace(presets.TINY, context=8)


@pytest.mark.parametrize(
  ("tokens", "message"),
  [
    (np.array([[0, 512]]), r"tokens: id 512 at \[0, 1\]; allowed: 0 to 511"),
    (jnp.array([[0], [-1]]), r"tokens: id -1 at \[1, 0\]; allowed: 0 to 511"),
    (np.zeros((1, 9), int), "tokens: length 9; allowed: up to 8"),
    (np.zeros(4, int), r"tokens: int64\[4\]; allowed: integers \[B, T\]"),
    (np.zeros((1, 4)), r"tokens: float64\[1, 4\]; allowed: integers"),
  ],
)
def test_bad_tokens_are_named(tokens, message):
  with pytest.raises(ValueError, match=message):
    models.check_tokens(CONFIG, tokens)


def test_good_tokens_and_traced_ones_pass():
  models.check_tokens(CONFIG, np.array([[0, 511]]))
  jax.jit(lambda x: models.check_tokens(CONFIG, x))(np.array([[0, 9999]]))
  with pytest.raises(ValueError, match="length 9"):
    jax.jit(lambda x: models.check_tokens(CONFIG, x))(np.zeros((1, 9), int))


def test_a_model_checks_and_computes():
  module = models.Transformer(CONFIG)
  tokens = np.arange(6)[None]
  params = random_params(module, tokens)
  model = models.Model(CONFIG, module, params)
  np.testing.assert_allclose(model(tokens), apply(module, params, tokens), atol=1e-5)
  with pytest.raises(ValueError, match="tokens: id 600"):
    model(jnp.array([[600]]))


def test_padding_may_hold_any_id():
  ids, tokens = np.array([[0, -1]]), np.array([[5, -100]])
  models.check_tokens(CONFIG, tokens, ids)
  with pytest.raises(ValueError, match=r"id -100 at \[0, 1\]"):
    models.check_tokens(CONFIG, tokens)
