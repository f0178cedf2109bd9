"""`jax.export` with symbols for the batch and the length."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import export

from effjax.attention import Attention, attend, masks
from effjax.attention.scores import ALiBi, RelativeBias
from effjax.layers import MLP
from effjax.models import LayerSpec, Transformer, presets
from effjax.moe import MoE, TopK
from tests.modules import normal, random_params

CASES = {
  "window": {"mask": masks.SlidingWindow(3, 0), "scores": ALiBi((0.5, 0.25))},
  "global": {"mask": masks.longformer(1, (1, 4)), "scores": RelativeBias(normal(8, 2))},
  "prefix": {"mask": masks.Causal() | masks.Prefix(2), "logit_softcap": 5.0},
  "documents": {"mask": masks.Documents(jnp.zeros((1, 7), int)) & masks.Causal()},
}


def exported(function, *shapes, dtypes):
  specs = map(jax.ShapeDtypeStruct, shapes, dtypes)
  return export.export(jax.jit(function))(*specs).call


def problem(B, T):
  ids = np.sort(np.random.default_rng(T).integers(-1, 3, (B, T)), axis=1).astype(np.int32)
  return normal(B, T, 2, 4), normal(B, T, 1, 4, seed=1), normal(B, T, 1, 4, seed=2), ids


@pytest.mark.parametrize(
  ("implementation", "symbols", "name"),
  [
    (None, "b, t", "window"),
    ("reference", "b, t", "global"),
    ("reference", "b, t", "prefix"),
    ("reference", "b, 7", "documents"),
    ("xla", "b, 7", "window"),
    ("xla", "b, 7", "global"),
    ("xla", "b, 7", "documents"),
  ],
)
def test_attend(implementation, symbols, name):
  B, T = export.symbolic_shape(symbols)
  arguments = CASES[name] | {"implementation": implementation}
  run = lambda q, k, v, ids: attend(q, k, v, segment_ids=ids, **arguments)
  dtypes = (jnp.float32,) * 3 + (jnp.int32,)
  call = exported(run, (B, T, 2, 4), (B, T, 1, 4), (B, T, 1, 4), (B, T), dtypes=dtypes)
  for sizes in ((1, 7), (3, 7)) if T == 7 else ((1, 7), (3, 5)):
    given = problem(*sizes)
    np.testing.assert_allclose(call(*given), jax.jit(run)(*given), atol=1e-5)


@pytest.mark.parametrize("implementation", ["xla", "interpret"])
def test_tiles_refuse_a_symbol_for_a_length(implementation):
  B, T = export.symbolic_shape("b, t")
  x = jax.ShapeDtypeStruct((B, T, 2, 4), jnp.float32)
  with pytest.raises(ValueError, match="a length that is a symbol; available: 'reference'"):
    export.export(jax.jit(functools.partial(attend, implementation=implementation)))(x, x, x)


DENSE = presets.llama(32, 16, 2, 2, 1, hidden=24, context=16)
SPARSE = dataclasses.replace(
  DENSE, layers=(LayerSpec(Attention(2), MoE(TopK(4, 2), MLP(24), shared=MLP(8))),)
)


@pytest.mark.parametrize("config", [DENSE, SPARSE], ids=["dense", "experts"])
def test_a_model(config):
  model = Transformer(config)
  params = random_params(model, np.zeros((1, 4), np.int32))
  run = lambda tokens, ids: model.apply({"params": params}, tokens, segment_ids=ids)
  sizes = export.symbolic_shape("b, t")
  call = exported(run, sizes, sizes, dtypes=(jnp.int32,) * 2)
  for B, T in ((1, 9), (3, 4)):
    tokens = np.random.default_rng(T).integers(0, 32, (B, T)).astype(np.int32)
    ids = problem(B, T)[-1]
    np.testing.assert_allclose(call(tokens, ids), jax.jit(run)(tokens, ids), atol=1e-5)
