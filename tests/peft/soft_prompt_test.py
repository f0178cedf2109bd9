"""Soft prompts: virtual tokens whose embeddings train, wherever tokens go."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from effjax import models, peft
from effjax.attention import Attention
from effjax.core import trees, weights
from effjax.decode import generate
from effjax.layers import MLP, LayerSpec, Rope, TransformerConfig
from effjax.models import Transformer
from effjax.parallel import Zero, make_mesh
from effjax.peft import compose, lora, named, soft_prompt
from effjax.quant import quantize
from effjax.train import init_state, make_train_step, next_token
from tests.modules import apply, random_params

KEY, P, V = jax.random.key(0), 3, 32
GQA = Attention(4, kv_heads=2, rope=Rope(1e4))
CONFIG = TransformerConfig(V, 16, (LayerSpec(GQA, MLP(24)),) * 2, context=16, embed_scale=4.0)
MODULE = Transformer(CONFIG)
TOKENS = np.int32([[5, 9, 2, 6], [1, 2, 3, 4]])


@pytest.fixture(scope="module")
def params():
  return random_params(MODULE, jnp.asarray(TOKENS))


def prompted(params, **given):
  return soft_prompt.add(CONFIG, params, KEY, length=P, **given)[1]


def test_a_prompt_of_a_text_is_that_text(params):
  tuned = prompted(params, start=[7, 8])
  text = np.tile(np.int32([7, 8, 7]), (2, 1))
  whole = apply(MODULE, params, np.concatenate([text, TOKENS], axis=1))
  tokens = soft_prompt.prepend(tuned, TOKENS)
  np.testing.assert_allclose(apply(MODULE, tuned, tokens), whole, atol=1e-6)
  assert whole.shape[-1] == V
  chex.assert_trees_all_equal(soft_prompt.remove(CONFIG, tuned)[1], params)

  found = generate(MODULE, tuned, soft_prompt.prepend(tuned, [[5, 9], [1]]), max_new_tokens=4)
  same = generate(MODULE, params, [[7, 8, 7, 5, 9], [7, 8, 7, 1]], max_new_tokens=4)
  np.testing.assert_array_equal(found.tokens, same.tokens)


def test_ids_that_nobody_has_are_refused(params):
  tuned = prompted(params, prompts=2)
  model = models.Model(CONFIG, MODULE, tuned)
  assert np.isfinite(model(np.int32([[V + 2 * P - 1, 0]]))).all()
  with pytest.raises(ValueError, match=f"tokens: id {V + 2 * P} at .*; allowed: 0 to 37"):
    model(np.int32([[V + 2 * P]]))
  with pytest.raises(ValueError, match=f"tokens: id {V} at .*; allowed: 0 to 31"):
    models.Model(CONFIG, MODULE, params)(np.int32([[V]]))
  with pytest.raises(ValueError, match=r"prompts: id 38 at .*; allowed: 0 to 37"):
    generate(MODULE, tuned, [[38]], max_new_tokens=1)
  with pytest.raises(ValueError, match="has a prompt already"):
    prompted(tuned)
  with pytest.raises(ValueError, match="has no prompt"):
    soft_prompt.remove(CONFIG, params)
  with pytest.raises(ValueError, match=r"prompt 2; allowed: 0 … 1"):
    soft_prompt.prepend(tuned, TOKENS, prompt=2)
  with pytest.raises(ValueError, match=r"prompt: shape \(3,\); allowed: one, or 2"):
    soft_prompt.prepend(tuned, TOKENS, prompt=[0, 1, 0])
  with pytest.raises(ValueError, match="one of its prompts is no sequence"):
    soft_prompt.prepend(tuned, [1, 2])
  with pytest.raises(ValueError, match=r"batch: has text; allowed: with tokens \[B, T\]"):
    soft_prompt.prepend(tuned, {"text": TOKENS})
  with pytest.raises(ValueError, match="allowed: 'vocabulary', 'random'"):
    prompted(params, start="text")
  with pytest.raises(ValueError, match="start: id 32"):
    prompted(params, start=[32])


def test_a_batch_is_widened():
  params = {"embed": {"embedding": jnp.zeros((10, 4))}}
  _, params = soft_prompt.add(TransformerConfig(10, 4, ()), params, KEY, length=2, prompts=2)
  batch = {
    "tokens": np.int32([[5, 6, 7, 8], [9, 1, 2, 0]]),
    "targets": np.int32([[6, 7, 8, 9], [1, 2, 3, 0]]),
    "segment_ids": np.int32([[4, 4, 9, 9], [-1, 0, 0, -1]]),
    "positions": np.int32([[0, 1, 0, 1], [0, 0, 1, 0]]),
    "previous": np.int32([[-1, 5, -1, 7], [-1, -1, 1, -1]]),
    "weights": np.float32([[1, 1, 0, 1], [0, 1, 1, 0]]),
    "global_positions": np.int32([[0, 2], [1, -1]]),
    "attributes": np.int32([[0, 1, 0, 1], [0, 1, 0, 1]]),
  }
  found = soft_prompt.prepend(params, batch, prompt=[0, 1])
  expected = {
    "tokens": [[10, 11, 5, 6, 10, 11, 7, 8], [9, 12, 13, 1, 2, 0, 0, 0]],
    "targets": [[0, 5, 6, 7, 0, 7, 8, 9], [1, 0, 1, 2, 3, 0, 0, 0]],
    "segment_ids": [[4] * 4 + [9] * 4, [-1, 0, 0, 0, 0, -1, -1, -1]],
    "weights": [[0, 1, 1, 1, 0, 0, 0, 1], [0, 0, 1, 1, 1, 0, 0, 0]],
    "global_positions": [[2, 6], [3, -1]],
    "attributes": [[0, 1, 0, 1]] * 2,
  }
  for name, value in expected.items():
    assert found[name].tolist() == value, name
  token = np.asarray(expected["segment_ids"]) >= 0
  assert found["positions"][token].tolist() == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1, 2, 3]
  assert found["previous"][token].tolist() == [-1, 10, 11, 5, -1, 10, 11, 7, -1, 12, 13, 1]
  with pytest.raises(ValueError, match="tokens is traced"):
    jax.eval_shape(lambda x: soft_prompt.prepend(params, x), TOKENS)


def test_packed_documents_are_as_they_are_alone(params):
  tuned = prompted(params, start="random")
  ids, positions = np.int32([[0, 0, 3, 3]] * 2), np.int32([[0, 1, 0, 1]] * 2)
  batch = {"tokens": TOKENS, "segment_ids": ids, "positions": positions}
  packed = soft_prompt.prepend(tuned, batch)
  whole = apply(MODULE, tuned, packed.pop("tokens"), **packed)
  for part in (slice(0, 2), slice(2, 4)):
    alone = apply(MODULE, tuned, soft_prompt.prepend(tuned, TOKENS[:, part]))
    width = 2 + P
    np.testing.assert_allclose(
      whole[:, part.start // 2 * width :][:, :width], alone, rtol=1e-5, atol=1e-6
    )


@pytest.mark.parametrize("stage", [0, 3])
def test_a_step_moves_the_prompt_alone_over_a_quantised_table(params, stage):
  tuned = prompted(quantize(jax.tree.map(jnp.array, params), targets="embedding|kernel"))
  assert trees.trained(tuned) == {"embed/embedding/prompt"}
  batch = soft_prompt.prepend(tuned, {"tokens": TOKENS, "targets": np.roll(TOKENS, -1, axis=1)})
  state = init_state(tuned, optax.sgd(1.0))
  placement = Zero(make_mesh(data=2), stage) if stage else None
  step = make_train_step(next_token(MODULE), optax.sgd(1.0), placement=placement)
  state = state if placement is None else jax.device_put(state, placement.state(state))
  before = np.asarray(tuned["embed"]["embedding"].prompt)
  new = step(state, batch, KEY)[0].params["embed"]["embedding"]
  slope = before - np.asarray(new.prompt)
  assert (np.abs(slope).max(-1) > 0).all()


def test_prompts_are_kept_apart_from_the_model(params, tmp_path):
  tuned = prompted(params)
  base, kept = peft.detach(tuned)
  chex.assert_trees_all_equal(base, params)
  chex.assert_trees_all_equal(peft.attach(base, kept), tuned)
  peft.save(tuned, tmp_path)
  chex.assert_trees_all_equal(peft.load(params, tmp_path), tuned)


def test_the_table_is_its_base_but_for_virtual_ids(params):
  table = prompted(params)["embed"]["embedding"]
  base, x = params["embed"]["embedding"], jnp.ones((2, V))
  np.testing.assert_array_equal(weights.linear(x, table), weights.linear(x, base))
  np.testing.assert_array_equal(weights.transpose(table), base.T)
  np.testing.assert_array_equal(table.materialize(), base)
  assert table.parameters == base.size + P * 16 and weights.entries(table) == V + P
  bad = jax.jit(weights.take)(table, jnp.array([V + P, -1, V - 1]))
  assert np.isnan(bad[:2]).all() and (bad[2] == base[V - 1]).all()
  with pytest.raises(ValueError, match="Prompted: prompt has shape"):
    soft_prompt.Prompted(base, jnp.ones((1, P, 15)), jnp.ones((1, 1)))


def test_no_adapter_stands_over_a_prompt_and_none_is_merged(params):
  tuned = prompted(params)
  with pytest.raises(ValueError, match="has a Prompted already; merge or remove it first"):
    lora.add(tuned, KEY, rank=2, targets="embedding")
  with pytest.raises(ValueError, match=r"IA3: base Prompted.* has rows beside its matrix"):
    peft.ia3.add(tuned, "embedding", None)
  other = lora.add(params, KEY, rank=2, targets="embedding")
  with pytest.raises(ValueError, match=r"Named: base Prompted.* has rows beside its matrix"):
    named.add(tuned, "a", other)
  with pytest.raises(ValueError, match=r"^embed/embedding: Prompted.* soft_prompt\.remove does"):
    lora.merge(prompted(other))


def test_composing_refuses_what_does_not_fit():
  general, modules = {"a": jnp.ones(2)}, {"law": {"a": jnp.ones(2)}, "bad": {"a": jnp.ones(3)}}
  assert compose(general, modules, {"law": 2.0}, mean=True)["a"].tolist() == [3.0, 3.0]
  assert compose(general, modules, {}) is general
  with pytest.raises(ValueError, match="module 'tax' is unknown; allowed: 'law', 'bad'"):
    compose(general, modules, {"tax": 1.0})
  with pytest.raises(ValueError, match=r"'a' of 'bad' is \(3,\); allowed: \(2,\)"):
    compose(general, modules, {"bad": 1.0})
