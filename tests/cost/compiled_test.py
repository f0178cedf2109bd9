import jax
import jax.numpy as jnp
import pytest

from effjax.cost import compiled

pytestmark = pytest.mark.usefixtures("optimized")


def test_donated_arguments_are_not_counted_twice():
  x = jax.ShapeDtypeStruct((256, 256), jnp.float32)
  add = lambda x: x + 1
  plain = compiled(add, x)
  donated = compiled(jax.jit(add, donate_argnums=0), x)
  assert plain.arguments == plain.outputs == donated.aliased == 256 * 256 * 4
  assert plain.peak - donated.peak == 256 * 256 * 4


def test_temporaries_hold_what_a_program_needs_between():
  x = jax.ShapeDtypeStruct((64, 4), jnp.float32)
  scores = lambda x: jax.nn.softmax(x @ x.T) @ x
  assert compiled(scores, x).temporaries >= 64 * 64 * 4
  assert compiled(scores, x).flops >= 2 * 2 * 64 * 64 * 4


def test_keyword_arguments_reach_the_function():
  found = compiled(lambda *, x: x * 2, x=jnp.ones(8))
  assert found.outputs == 32
