import dataclasses

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.tree_util import Partial

from effjax.attention import Attention, Longformer, masks
from effjax.layers import MLP, Context, LayerSpec, TransformerConfig
from effjax.layers.forward import forward, sown_values, taken_by
from effjax.layers.objective import per_token, through
from effjax.models.transformer import EncoderDecoder, Transformer
from effjax.train import next_token
from tests.modules import apply, random_params

TOKENS = jnp.arange(6).reshape(2, 3)


class Facts(nn.Module):
  """Gives back what it is told of the batch; sows one of each kind."""

  @nn.compact
  def __call__(self, tokens, *, positions=None, attributes=None):
    self.sow("losses", "size", jnp.float32(0.5))
    self.sow("metrics", "mean", tokens.mean())
    self.sow("statistics", "load", jnp.arange(3.0))
    scale = self.param("scale", nn.initializers.ones, ())
    return scale * (positions if attributes is None else attributes)


PARAMS = {"scale": jnp.float32(2.0)}


def test_the_context_reaches_the_module_whole():
  batch = {"tokens": TOKENS, "positions": TOKENS, "attributes": 7 * jnp.ones((2, 3), int)}
  output, _ = forward(Facts(), PARAMS, batch)
  np.testing.assert_array_equal(output, 14 * np.ones((2, 3)))


@pytest.mark.parametrize("name", ["segment_ids", "domain"])
def test_an_entry_that_nobody_reads_is_refused(name):
  batch = {"tokens": TOKENS, "positions": TOKENS, name: TOKENS}
  with pytest.raises(ValueError, match=f"nobody reads {name}; allowed for Facts: .*positions"):
    forward(Facts(), PARAMS, batch)
  if name == "domain":
    assert forward(Facts(), PARAMS, batch, read=("domain",))[0].shape == (2, 3)


def test_scalars_are_averaged_and_statistics_kept_by_path():
  sown = {
    "losses": {"a": {"z": (jnp.ones(3),)}, "b": {"z": (jnp.zeros(()), jnp.ones(()))}},
    "statistics": {"a": {"load": (jnp.ones((3, 4)),)}, "b": {"load": (jnp.ones(4),)}},
  }
  found = sown_values(sown)
  assert float(found["z"]) == pytest.approx(4 / 5)
  assert {name: x.shape for name, x in found.items()} == {
    "z": (), "a/load": (3, 4), "b/load": (4,)
  }  # fmt: skip


def test_an_objective_is_assembled_from_a_loss_of_each_token():
  weights = jnp.array([[1.0, 0.0, 2.0], [0.0, 0.0, 1.0]])
  batch = {"tokens": TOKENS, "positions": TOKENS, "weights": weights, "domain": TOKENS}
  loss = lambda held, output, batch: (output * held, {"output": output})
  objective = per_token(Facts(), Partial(loss, jnp.float32(3.0)), reads=("domain",))
  assert jax.tree.leaves(objective) == [3.0]
  value, metrics = objective(PARAMS, batch, None)
  mean = 2 * (0 * 1 + 2 * 2 + 5 * 1) / 4
  assert float(value) == pytest.approx(3 * mean + 0.5)
  assert float(metrics["output"]) == pytest.approx(mean)
  assert float(metrics["weight"]) == 4
  assert {"size", "mean", "load"} < set(metrics)


def test_an_objective_is_taken_through_a_view():
  batch = {"tokens": TOKENS, "positions": TOKENS}
  objective = per_token(Facts(), lambda output, batch, *extra: (output + sum(extra), {}),
                        reads_extra=True)  # fmt: skip
  view = lambda trained: {"scale": trained["root"] ** 2}
  shared = through(objective, view)
  run = jax.jit(jax.value_and_grad(lambda p: shared(p, batch, None)[0]))
  value, grads = run({"root": jnp.float32(3.0)})
  assert float(value) == pytest.approx(9 * 2.5 + 0.5)
  assert float(grads["root"]) == pytest.approx(2 * 3 * 2.5)
  extra = shared({"root": jnp.float32(3.0)}, batch, None, jnp.float32(1.0))[0]
  assert float(extra) == pytest.approx(float(value) + 1)
  scaled = through(objective, lambda trained, extra: view(trained) | {}, reads_extra=True)
  both = scaled({"root": jnp.float32(3.0)}, batch, None, jnp.float32(1.0))[0]
  assert float(both) == float(extra)


def test_what_does_not_read_an_extra_is_not_given_it():
  batch = {"tokens": TOKENS, "positions": TOKENS}
  objective = through(per_token(Facts(), lambda output, batch: (output, {})), lambda params: params)
  with_extra, _ = objective(PARAMS, batch, None, jnp.float32(7.0))
  assert float(with_extra) == float(objective(PARAMS, batch, None)[0])


def test_every_fact_of_a_context_can_be_a_batch_entry():
  from effjax.layers.forward import FACTS

  assert {*FACTS, "tokens"} == set(Context.__dataclass_fields__)


CONFIG = TransformerConfig(8, 4, (LayerSpec(None, MLP(4)),), context=8)


@pytest.mark.parametrize("name", ["memory", "attributes", "global_positions", "previous"])
def test_a_fact_that_no_layer_reads_is_refused(name):
  batch = {"tokens": TOKENS, "targets": TOKENS, name: jnp.zeros((2, 3, 4))}
  with pytest.raises(ValueError, match=f"nobody reads {name}"):
    next_token(Transformer(CONFIG))({}, batch, None)


def test_layers_say_what_they_read():
  cross = dataclasses.replace(
    CONFIG, layers=(LayerSpec(Attention(2), None, Attention(2, cross=True)),)
  )
  longformer = dataclasses.replace(CONFIG, layers=(LayerSpec(Longformer(2), None),))
  plain = {"tokens", "segment_ids", "positions"}
  assert taken_by(Transformer(CONFIG)) == plain
  assert taken_by(Transformer(cross)) == plain | {"memory", "memory_segment_ids"}
  assert taken_by(Transformer(longformer)) == plain | {"global_positions"}


def test_an_encoder_and_decoder_read_two_sequences():
  encoder = dataclasses.replace(CONFIG, head=None)
  spec = LayerSpec(Attention(2), None, Attention(2, mask=masks.Full(), cross=True))
  module = EncoderDecoder(encoder, dataclasses.replace(CONFIG, layers=(spec,)))
  params = random_params(module, TOKENS, TOKENS)
  batch = {"source": TOKENS + 1, "tokens": TOKENS, "targets": TOKENS}
  logits = np.asarray(apply(module, params, batch["source"], TOKENS), np.float64)
  logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
  expected = -np.take_along_axis(logp, np.asarray(TOKENS)[..., None], -1).mean()
  found = jax.jit(next_token(module))(params, batch, None)[0]
  assert float(found) == pytest.approx(expected, 1e-5)
