"""What looks at later tokens stands in no causal model, and has no caches."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import LSRA, BigBird, LinearAttention, Linformer, Longformer, masks
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.attention.multi_head import Attention
from effjax.layers import Context, LayerSpec, TransformerConfig
from effjax.layers.peeking import is_causal
from effjax.models import Transformer

CAUSAL, FULL = masks.Causal(), masks.Full()


class Peeking(nn.Module):
  """Gives each token what comes after it."""

  peeks = True

  def __call__(self, x, context=Context()):
    return jnp.roll(x, -1, axis=1)


class ForEncoders(Peeking):
  encoder_only = True


class Around(nn.Module):
  inside: tuple[nn.Module, ...]


def model(ffn, *mixers):
  return TransformerConfig(11, 8, tuple(LayerSpec(mixer, ffn) for mixer in mixers))


def seen(mask, length=16):
  """Whether no query sees a later key, by the matrix."""
  return not np.triu(np.asarray(mask.dense(length)), 1).any()


TABLE = masks.RandomBlocks(jnp.zeros((1, 1, 16, 1), jnp.int32), 1)
IDS = jnp.arange(16)[None] // 4


@pytest.mark.parametrize(
  "mask",
  [
    CAUSAL,
    FULL,
    masks.SlidingWindow(3, 0),
    masks.SlidingWindow(3, 1),
    masks.Dilated(1, 2),
    masks.BlockWindow(1, 0, 1),
    masks.BlockWindow(1, 0, 2),
    CAUSAL & masks.Documents(IDS),
    masks.Documents(IDS),
    CAUSAL | masks.Global(1),
    CAUSAL | masks.SlidingWindow(2, 0),
    CAUSAL & (TABLE | masks.Global(2)),
    masks.PerHead((CAUSAL, masks.SlidingWindow(1, 0), FULL), (0, 1)),
    masks.PerHead((CAUSAL, FULL), (0, 1)),
    masks.Predicate(lambda q, k: k <= q),
    masks.Predicate(lambda q, k: jnp.abs(k - q) < 2),
    masks.Predicate(lambda q, k: q > -1, visited=CAUSAL),
    masks.Predicate(lambda q, k, ids: (k <= q) & (ids > 0), keys={"ids": IDS[:, None]}),
  ],
)
def test_masks_know_whether_they_hide_what_comes_after(mask):
  assert mask.causal == seen(mask)


def test_a_prefix_language_model_is_causal_past_its_prefix():
  assert (CAUSAL | masks.Prefix(3)).causal and not (FULL | masks.Prefix(3)).causal


def test_a_predicate_of_traced_arrays_is_not_known_and_others_are_in_a_program():
  found = []

  @jax.jit
  def trace(ids):
    found.append(masks.Predicate(lambda q, k, ids: ids >= 0, keys={"ids": ids}).causal)
    found.append(masks.Predicate(lambda q, k: jnp.less_equal(k, q)).causal)
    return ids

  trace(IDS[:, None])
  assert found == [False, True]


@pytest.mark.parametrize(
  ("mixer", "causal"),
  [
    (Attention(2), True),
    (Attention(2, mask=FULL), False),
    (Attention(2, mask=CAUSAL & masks.SlidingWindow(2, 0)), True),
    (LSRA(2, kernel=3), True),
    (LSRA(2, kernel=3, causal=False), False),
    (LinearAttention(2), True),
    (LinearAttention(2, causal=False), False),
    (Linformer(2, length=8, rank=2), False),
    (Longformer(2, mask=masks.SlidingWindow(2, 2)), False),
    (Longformer(2, mask=masks.SlidingWindow(2, 2), causal=True), True),
    (BigBird(2), True),
    (BigBird(2, mask=FULL), False),
    (ShiftedSparseAttention(2), True),
    (nn.Dense(3), True),  # one that says nothing
  ],
)
def test_mixers_say_whether_they_are_causal(mixer, causal):
  assert is_causal(mixer) is causal


def test_what_is_for_encoders_is_refused_in_causal_models_alone():
  inside, both = Around((Peeking(), Around((ForEncoders(),)))), Attention(2, mask=FULL)
  for ffn in (ForEncoders(), inside):
    with pytest.raises(ValueError, match=r"layer 0: ffn has ForEncoders, .* allowed: mixers that"):
      model(ffn, Attention(2), Attention(2))
    model(ffn, both, both)
    model(ffn, Attention(2), both)
    model(ffn, None)
  model(Peeking(), Attention(2))


def test_what_peeks_has_no_caches():
  for ffn in (Peeking(), Around((Peeking(),))):
    module = Transformer(model(ffn, Attention(2)))
    with pytest.raises(ValueError, match="layer 0: ffn has Peeking, which looks at later tokens"):
      module.init_cache(1, 8)
