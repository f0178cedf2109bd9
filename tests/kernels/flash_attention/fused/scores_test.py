"""Scores as values and a soft cap that is data inside the kernels, against float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention.masks import Causal
from effjax.attention.scores import ALiBi, RelativeBias, Term
from effjax.kernels.flash_attention import cases
from effjax.kernels.flash_attention.fused import gpu, tpu
from effjax.kernels.flash_attention.fused.sizes import Size, Sizes

PLATFORMS = pytest.mark.parametrize("platform", [gpu, tpu], ids=["gpu", "tpu"])
SMALL = Sizes(Size(16, 32), Size(32, 16), Size(16, 16))
RNG = np.random.default_rng(5)
normal = lambda *shape: jnp.asarray(RNG.normal(size=shape), jnp.float32)
TERM = Term(
  lambda q, k, a, b, w: a * b + w * jnp.where(q - k > 3, 0.0, 1.0),
  queries={"a": normal(2, 1, 37)},
  keys={"b": normal(1, 4, 45)},
  distances={"w": normal(1, 4, 21)},
)
SCORES = {
  "alibi": (ALiBi.standard(4), None, None),
  "relative": (ALiBi(jnp.array([0.1, 0.2, 0.4, 0.5])) + RelativeBias(normal(8, 4)), 1.5, None),
  "term": (TERM, None, (1, 4, 37, 45)),
}


def check(platform, scores, cap=None, bias=None, **where):
  arrays = cases.operands(2, 37, 45, 4, 2, 8, 16, bias)
  where |= {"mask": Causal(), "scores": scores}
  if cap is not None:
    where["logit_softcap"] = jnp.float32(cap)
  run = functools.partial(platform.attention, sizes=SMALL, interpret=True, scale=0.4)
  got = jax.jit(functools.partial(cases.evaluate, run))(arrays, where)
  for name, error in cases.errors(got, cases.exact(scale=0.4)(arrays, where)).items():
    assert error < 3e-6, name


@PLATFORMS
@pytest.mark.parametrize("kind", SCORES)
def test_values_and_gradients(platform, kind):
  check(platform, *SCORES[kind])


def test_distances_are_looked_up_where_queries_have_positions():
  positions = jnp.asarray(RNG.integers(0, 45, (2, 37)), jnp.int32)
  scores = RelativeBias(normal(8, 4))
  check(gpu, scores, query_positions=positions)
  with pytest.raises(ValueError, match="implementation='xla'"):
    check(tpu, scores, query_positions=positions)
