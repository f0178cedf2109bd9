"""What padding and decoding make of the facts about a batch."""

import inspect

import jax.numpy as jnp
import pytest

from effjax.layers import Context
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


def test_a_model_takes_every_fact():
  given = inspect.signature(Transformer.__call__).parameters
  assert set(Context.__dataclass_fields__) <= set(given)
