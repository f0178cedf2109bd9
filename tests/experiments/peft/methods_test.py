"""The table of methods: what suits which model, what trains, and what a batch becomes."""

import jax
import numpy as np
import pytest

from effjax import cost, peft, quant
from effjax.core import trees
from effjax.models import presets
from effjax.peft import lora
from experiments.lab.subject import Subject, init, load
from experiments.peft.methods import KERNELS, METHODS, bidirectional, refusal, suited


@pytest.fixture(scope="module")
def tiny():
  return load("tiny")[0]


def shapes(name):
  """A published model, without its numbers."""
  config = presets.preset(name)
  module = Subject(config, None).module
  return Subject(config, jax.eval_shape(lambda: init(module, jax.random.key(0))))


def test_decoders_take_all_but_bitfit_and_encoders_all():
  decoder, encoder = shapes("smollm2-135m"), shapes("minilm")
  assert (bidirectional(decoder.config), bidirectional(encoder.config)) == (False, True)
  assert set(METHODS) - set(suited(decoder)) == {"bitfit"}
  assert suited(encoder) == list(METHODS)
  assert "no bias" in refusal(METHODS["bitfit"], decoder)


def test_quantised_bases_take_all_that_leaves_matrices_as_they_are(tiny):
  base = Subject(tiny.config, quant.quantize(tiny.params, "nf4", targets=KERNELS))
  assert set(METHODS) - set(suited(base)) == {"bitfit", "pissa", "full"}
  assert "PiSSA over NF4" in refusal(METHODS["pissa"], base)
  with pytest.raises(ValueError, match="is a NF4, which does not train; allowed: plain matrices"):
    METHODS["full"](base, jax.random.key(0))


def test_sizes_are_comparable():
  decoder = shapes("smollm2-135m")
  share = {}
  for name in ("lora", "dora", "houlsby", "pfeiffer", "lora-experts", "prefix", "soft-prompt"):
    change = METHODS[name].change
    made = jax.eval_shape(
      lambda p, c=change: c(decoder.config, p, jax.random.key(0))[1], decoder.params
    )
    share[name] = cost.trainable(made) / trees.count(decoder.params)
  few = {name: share.pop(name) for name in ("prefix", "soft-prompt")}
  assert all(0.015 < x < 0.025 for x in share.values()), share
  # 30 layers of 2 · 16 keys and values of 3 · 64 numbers, and 16 embeddings of 576.
  assert few["prefix"] == 30 * 2 * 16 * 3 * 64 / trees.count(decoder.params)
  assert few["soft-prompt"] == 16 * 576 / trees.count(decoder.params)


def test_soft_prompts_score_the_tokens_of_the_batch(tiny):
  method = METHODS["soft-prompt"]
  params = method(tiny, jax.random.key(0)).params
  tokens = np.array([[5, 6, 7]])
  batch = {"tokens": tokens, "targets": tokens + 1, "weights": np.array([[1.0, 0.0, 1.0]])}
  batch |= {"segment_ids": np.zeros((1, 3), int), "positions": np.arange(3)[None]}
  found = method.batch(params, batch)
  assert found["weights"].tolist() == [[0.0] * 16 + [1.0, 0.0, 1.0]]
  assert found["tokens"][0, 16:].tolist() == [5, 6, 7] and (found["tokens"][0, :16] >= 512).all()
  assert method.batch(params, [[9]]) == [[*range(512, 528), 9]]


def test_pissa_is_stored_over_the_matrices_that_were_there(tiny):
  method = METHODS["pissa"]
  started = method(tiny, jax.random.key(0))
  trained = trees.update(started.params, r"up/kernel$", lambda path, w: w)
  stored = method.stored(trained, started.params, tiny.params)
  assert jax.tree.all(jax.tree.map(lambda a, b: a is b, peft.detach(stored)[0], tiny.params))
  for path, w in trees.select(tiny.params, KERNELS).items():
    made = lora.merge(stored)
    np.testing.assert_allclose(trees.items(made)[path], w, atol=1e-5)
