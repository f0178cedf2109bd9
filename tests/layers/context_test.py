"""What padding and decoding make of the facts about a batch."""

import inspect

import jax
import jax.numpy as jnp
import pytest

from effjax.layers import Context, without_padding
from effjax.models import Transformer

IDS = jnp.array([[-1, 0, 0, 3, 3, -1, 3]])
TOKENS = jnp.array([[-100, 5, 6, 7, 8, 9, 10]])


def test_the_previous_id_is_of_the_same_segment():
  assert Context(TOKENS).previous_ids().tolist() == [[-1, -100, 5, 6, 7, 8, 9]]
  assert Context(TOKENS, segment_ids=IDS).previous_ids().tolist() == [[-1, -1, 5, -1, 7, -1, -1]]
  assert Context(previous=TOKENS).previous_ids() is TOKENS
  with pytest.raises(ValueError, match="tokens=None and previous=None"):
    Context().previous_ids()


def test_padding_is_blanked():
  context = Context(TOKENS, positions=TOKENS, segment_ids=IDS, previous=TOKENS).blanked()
  assert context.tokens.tolist() == context.positions.tolist() == [[0, 5, 6, 7, 8, 0, 10]]
  assert context.previous.tolist() == [[-1, 5, 6, 7, 8, -1, 10]]
  assert Context(segment_ids=IDS).blanked().tokens is None


def test_padding_of_the_memory_is_blanked_by_its_own_ids():
  memory = jnp.array([[[1.0], [jnp.nan], [jnp.inf]]])
  context = Context(memory=memory, memory_segment_ids=jnp.array([[0, -1, -1]]))
  assert context.blanked().memory.tolist() == [[[1.0], [0.0], [0.0]]]
  assert Context(memory=memory, segment_ids=IDS).blanked().memory is memory


class Sums:
  """A mixer, and a feed-forward layer where there is no cache: Σ_t x_t at every position."""

  @without_padding
  def __call__(self, x, context=Context(), cache=None):
    y = jnp.broadcast_to(x.sum(1, keepdims=True), x.shape)
    return y if cache is None else (y, (context, cache))


def test_a_call_without_padding_reads_and_gives_zeros_there():
  x = jnp.array([[[jnp.nan], [1.0], [2.0], [3.0], [4.0], [jnp.inf], [5.0]]])
  context = Context(TOKENS, segment_ids=IDS)
  y, (blanked, cache) = Sums()(x, context, cache="as it was")
  assert y[0, :, 0].tolist() == [0, 15, 15, 15, 15, 0, 15] and cache == "as it was"
  assert blanked.tokens.tolist() == [[0, 5, 6, 7, 8, 0, 10]]
  dy = jnp.where(jnp.isfinite(x), 1.0, jnp.nan)
  y, pull = jax.vjp(lambda x: Sums()(x, context), x)
  assert pull(dy)[0][0, :, 0].tolist() == [0, 5, 5, 5, 5, 0, 5]
  assert jnp.isnan(Sums()(x)).all()


def test_a_model_takes_every_fact():
  given = inspect.signature(Transformer.__call__).parameters
  assert set(Context.__dataclass_fields__) <= set(given)
