"""The contract: every technique is a row of `ROWS` and goes through every test below.

A row says how to make parameters and how to compute y [B, T, …] from x [B, T, D] (or from token
ids), what it promises (`causal`, `pointwise`, `padding`) and what it reduces to at some setting.
A new technique is one more entry.
"""

import dataclasses
import functools
from collections.abc import Callable

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from effjax.attention.big_bird import BigBird
from effjax.attention.linear import LinearAttention
from effjax.attention.linformer import Linformer
from effjax.attention.longformer import Longformer
from effjax.attention.longlora import ShiftedSparseAttention
from effjax.attention.lsra import LSRA
from effjax.attention.masks import Causal, Full, SlidingWindow
from effjax.attention.multi_head import Attention
from effjax.core import linear, trees
from effjax.core.typing import PyTree
from effjax.layers import MLP, Context, LayerNorm, RMSNorm, Rope
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.layers.stack import unscan
from effjax.models.transformer import Transformer
from effjax.moe import MoE, TopK
from effjax.parallel.mesh import make_mesh
from effjax.peft import LoRA, lora
from effjax.quant import Int8, dequantize, quantize
from effjax.train.checkpoint import Checkpoints

B, T, D, V = 8, 6, 16, 32
KEY = jax.random.key(0)
X = jax.random.normal(jax.random.key(1), (B, T, D))
TOKENS = jax.random.randint(jax.random.key(2), (B, T), 0, V)
PADDED = jnp.zeros((B, T), jnp.int32).at[1::2, 4:].set(-1)


@dataclasses.dataclass(frozen=True)
class Row:
  """A technique.

  Attributes:
    name: what the table calls it.
    init: key → parameters.
    apply: (params, inputs, segment_ids or None, dtype) → y.
    inputs: what it is computed on, the batch first.
    causal: y[t] does not depend on inputs after t.
    pointwise: y[t] depends on inputs at t alone.
    padding: takes segment_ids; a negative one keeps that input from every other output.
    reduces: () → (its value at a special setting, the value of the baseline).
  """

  name: str
  init: Callable[[jax.Array], PyTree]
  apply: Callable[..., jax.Array]
  inputs: jax.Array
  causal: bool = False
  pointwise: bool = False
  padding: bool = False
  reduces: Callable[[], tuple[jax.Array, jax.Array]] | None = None

  @functools.cached_property
  def params(self) -> PyTree:
    return jax.jit(self.init)(KEY)

  @functools.cached_property
  def compiled(self):
    return jax.jit(self.apply, static_argnums=3)

  @functools.cached_property
  def output(self) -> jax.Array:
    return self.compiled(self.params, self.inputs, None, jnp.float32)


def weight(name: str, represent: Callable, reduces=None) -> Row:
  """A representation of a matrix: `represent(matrix, key)`."""
  init = lambda key: {"kernel": represent(jax.random.normal(key, (D, 24)) / 4, key)}
  apply = lambda params, x, ids, dtype: linear(x.astype(dtype), params["kernel"])
  return Row(name, init, apply, X, causal=True, pointwise=True, reduces=reduces)


def layer(name: str, module, **traits) -> Row:
  """A norm, feed-forward layer or mixer."""

  def apply(params, x, ids, dtype):
    context = () if isinstance(module, RMSNorm | LayerNorm) else (Context(segment_ids=ids),)
    y = module.apply({"params": params}, x.astype(dtype), *context)
    return y[0] if isinstance(y, tuple) else y

  return Row(name, lambda key: module.init(key, X)["params"], apply, X, **traits)


def model(name: str, config: TransformerConfig, change=lambda params, key: params, **traits) -> Row:
  """A Transformer whose parameters went through `change(params, key)`."""

  def init(key):
    return change(Transformer(config).init(key, TOKENS)["params"], key)

  def apply(params, tokens, ids, dtype):
    return Transformer(config, dtype).apply({"params": params}, tokens, segment_ids=ids)

  def one_by_one():
    flat, params = unscan(config, init(KEY))
    y = Transformer(config, remat=True).apply({"params": init(KEY)}, TOKENS)
    return y, Transformer(flat).apply({"params": params}, TOKENS)

  traits = {"causal": True, "padding": True, "reduces": one_by_one, **traits}
  return Row(name, init, apply, TOKENS, **traits)


def value(module, params, x=X):
  y = module.apply({"params": params}, x)
  return y[0] if isinstance(y, tuple) else y


def same_as(special, baseline, change=lambda params: params):
  """`special` computes what `baseline` does with the same parameters, up to `change`."""

  def pair():
    params = special.init(KEY, X)["params"]
    return value(special, params), value(baseline, change(params))

  return pair


def start_of_lora(base):
  return lambda: (linear(X, lora.init(base, KEY, rank=4, scale=2.0)), linear(X, base))


def exact_int8():
  w = jnp.ones((D, 1)) * jnp.arange(1.0, 25.0)[None] * jnp.where(jnp.arange(D) % 2, 1, -1)[:, None]
  return linear(X, Int8.quantize(w)), linear(X, w)


def adapted(base, key) -> LoRA:
  """LoRA after some training: B is not zero."""
  w = lora.init(base, key, rank=4, scale=2.0)
  return LoRA(w.base, w.a, jax.random.normal(key, w.b.shape) / 10, w.scale)


def repeat_heads(params):
  """Key and value kernels of 2 heads repeated to 4."""
  kernel = lambda w: jnp.repeat(w.reshape(D, 2, -1), 2, axis=1).reshape(D, -1)
  return params | {name: jax.tree.map(kernel, params[name]) for name in ("key", "value")}


def identity_linformer():
  """As many projected positions as there are, each a position, against full attention."""
  module = Linformer(4, length=T, rank=T, shared=True)
  params = module.init(KEY, X)["params"] | {"key_length": {"kernel": jnp.eye(T)}}
  return value(module, params), value(Attention(4, mask=Full()), params)


def one_tap_lsra():
  """A convolution of one tap leaves each position as it is."""
  module = LSRA(2, kernel=1)
  params = module.init(KEY, X)["params"]
  far, near = jnp.split(X, 2, axis=-1)
  linear, gate = jnp.split(near @ params["glu"]["kernel"], 2, axis=-1)
  near = linear * jax.nn.sigmoid(gate) @ params["out"]["kernel"]
  parts = [value(Attention(2), params["attention"], far), near]
  return value(module, params), jnp.concatenate(parts, -1)


def first_expert(params):
  return jax.tree.map(lambda x: x[0], params["experts"])


def centred_rms_norm():
  x = X - X.mean(-1, keepdims=True)
  params = {"scale": jnp.linspace(0.5, 2, D)}
  return value(LayerNorm(1e-6), params | {"bias": jnp.zeros(D)}, x), value(RMSNorm(), params, x)


def config(*layers: LayerSpec, **fields) -> TransformerConfig:
  return TransformerConfig(
    **({"vocab_size": V, "width": D, "layers": layers, "context": 8} | fields)
  )


def quantised(params, key):
  return lora.add(quantize(params), key, rank=2)


ROPE, SWIGLU = Rope(1e4), MLP(24, "silu", gated=True)
NEAR = SlidingWindow(2, 2)
MHA, GQA = Attention(4), Attention(4, kv_heads=2, rope=ROPE)
BIASED = {"use_bias": True, "out_bias": True}
BOTH_WAYS = Attention(4, mask=Full(), **BIASED)
LOCAL = Attention(4, kv_heads=1, qk_norm=1e-6, mask=Causal() & SlidingWindow(2, 0), rope=ROPE)
GLOBAL = dataclasses.replace(LOCAL, mask=Causal(), rope=Rope(1e6))
SMALL_MOE = MoE(TopK(4, 2), SWIGLU)
MATRIX = jax.random.normal(KEY, (D, 24))
CAUSAL = {"causal": True, "padding": True}
POINT = {"causal": True, "pointwise": True}

ROWS = [
  weight("dense", lambda w, key: w),
  weight("Int8", lambda w, key: Int8.quantize(w), exact_int8),
  weight("Int8 by row", lambda w, key: Int8.quantize(w, granularity="row")),
  weight("LoRA", adapted, start_of_lora(MATRIX)),
  weight("LoRA on Int8", lambda w, key: adapted(Int8.quantize(w), key),
         start_of_lora(Int8.quantize(MATRIX))),
  weight("LoRA on LoRA", lambda w, key: adapted(adapted(w, key), key)),
  layer("RMSNorm", RMSNorm(), **POINT),
  layer("LayerNorm", LayerNorm(), reduces=centred_rms_norm, **POINT),
  layer("MLP", MLP(24, "relu", use_bias=True), **POINT),
  layer("SwiGLU", SWIGLU, **POINT),
  layer("MoE", SMALL_MOE, padding=True, **POINT,
        reduces=same_as(MoE(TopK(1, 1), SWIGLU), SWIGLU, first_expert)),
  layer("MHA", MHA, **CAUSAL),
  layer("GQA", GQA, **CAUSAL,
        reduces=same_as(GQA, dataclasses.replace(GQA, kv_heads=4), repeat_heads)),
  layer("MQA", Attention(4, kv_heads=1, **BIASED), **CAUSAL),
  layer("window", Attention(4, mask=Causal() & SlidingWindow(2, 0)), **CAUSAL,
        reduces=same_as(Attention(4, mask=Causal() & SlidingWindow(T, 0)), MHA)),
  layer("bidirectional", Attention(4, mask=Full()), padding=True,
        reduces=same_as(Attention(4, mask=Full()), Attention(4, mask=SlidingWindow(T, T)))),
  layer("softcap", Attention(4, logit_softcap=1.0), **CAUSAL,
        reduces=same_as(Attention(4, logit_softcap=1e3), MHA)),
  layer("sinks", Attention(4, sinks=True), **CAUSAL),
  layer("Linformer", Linformer(4, length=8, rank=3), padding=True, reduces=identity_linformer),
  layer("Longformer", Longformer(4, kv_heads=2, rope=ROPE, mask=NEAR, positions=1, causal=True),
        **CAUSAL, reduces=same_as(Longformer(4, mask=SlidingWindow(T, T), positions=0),
                                  Attention(4, mask=Full()))),
  layer("BigBird", BigBird(4, kv_heads=2, block=1, number=1), **CAUSAL,
        reduces=same_as(BigBird(4, block=2, number=3), MHA)),
  layer("linear attention", LinearAttention(4, chunk=4), **CAUSAL,
        reduces=same_as(LinearAttention(4, chunk=1), LinearAttention(4))),
  layer("linear, both ways", LinearAttention(4, causal=False, chunk=4), padding=True),
  layer("LSRA", LSRA(2, kernel=3), **CAUSAL, reduces=one_tap_lsra),
  layer("LSRA, dynamic, both ways", LSRA(2, kernel=3, causal=False, dynamic=True), padding=True),
  layer("LongLoRA", ShiftedSparseAttention(4, kv_heads=2, rope=ROPE, group=4), **CAUSAL,
        reduces=same_as(ShiftedSparseAttention(4, group=T), MHA)),
  model("Llama", config(*[LayerSpec(GQA, SWIGLU)] * 2)),
  model("Gemma 3", config(*[LayerSpec(LOCAL, SWIGLU), LayerSpec(LOCAL, SWIGLU),
        LayerSpec(GLOBAL, SWIGLU)] * 2, arrangement="sandwich", embed_scale=4.0)),
  model("GPT-2", config(LayerSpec(Attention(4, **BIASED), MLP(64, "gelu_tanh", use_bias=True)),
        norm=LayerNorm(), positions="learned")),
  model("OPT", config(LayerSpec(Attention(4, **BIASED), MLP(64, "relu", use_bias=True)),
        norm=LayerNorm(), positions="learned", position_offset=2, embed_width=8,
        arrangement="post", final_norm=False)),
  model("BERT", config(*[LayerSpec(BOTH_WAYS, MLP(32, use_bias=True))] * 2,
        norm=LayerNorm(), positions="learned", arrangement="post", final_norm=False,
        head=None, embed_norm=True, token_types=2), causal=False),
  model("MoE every second layer", config(*[LayerSpec(GQA, SWIGLU), LayerSpec(GQA, SMALL_MOE)] * 2,
        tied=False)),
  model("Llama, LoRA on Int8", config(*[LayerSpec(GQA, SWIGLU)] * 2), quantised, reduces=None),
]  # fmt: skip


def rows(trait: str | None = None, *, slow_models: bool = False):
  """The rows that promise `trait`."""
  chosen = [row for row in ROWS if trait is None or getattr(row, trait)]
  marks = lambda row: [pytest.mark.slow] if slow_models and row.inputs is TOKENS else []
  cases = [pytest.param(row, id=row.name, marks=marks(row)) for row in chosen]
  return pytest.mark.parametrize("row", cases)


def assert_close(got, expected, tolerance=1e-4):
  expected = np.asarray(expected, np.float32)
  scale = np.abs(expected).max()
  np.testing.assert_allclose(np.asarray(got, np.float32), expected, rtol=0, atol=tolerance * scale)


def vary(inputs, at):
  """`inputs` with other values where `at` [B, T] is True."""
  other = (inputs + 1) % V if inputs.ndim == 2 else inputs + 1.0
  return jnp.where(at if inputs.ndim == 2 else at[..., None], other, inputs)


@rows(slow_models=True)
def test_jit_equals_eager(row):
  assert row.output.dtype == jnp.float32
  assert_close(row.apply(row.params, row.inputs, None, jnp.float32), row.output)


@rows(slow_models=True)
def test_vmap_equals_a_larger_batch(row):
  halves = row.inputs.reshape(2, B // 2, *row.inputs.shape[1:])
  apply = jax.vmap(lambda params, x: row.apply(params, x, None, jnp.float32), (None, 0))
  assert_close(jax.jit(apply)(row.params, halves).reshape(row.output.shape), row.output)


@rows()
def test_gradients_are_finite_and_not_all_zero(row):
  floats, rest = trees.partition(row.params, lambda path, x: jnp.issubdtype(x.dtype, jnp.floating))

  @jax.jit
  def grad(floats):
    y = lambda floats: row.apply(trees.merge(floats, rest), row.inputs, PADDED, jnp.float32)
    return jax.grad(lambda floats: jnp.square(y(floats)).sum())(floats)

  grads = grad(floats)
  chex.assert_tree_all_finite(grads)
  chex.assert_trees_all_equal_structs(grads, floats)
  assert any(bool(g.any()) for g in jax.tree.leaves(grads))


@rows()
def test_bfloat16_is_close_to_float32(row):
  half = row.compiled(row.params, row.inputs, None, jnp.bfloat16)
  assert half.dtype == jnp.bfloat16
  error = np.abs(np.asarray(half, np.float32) - np.asarray(row.output))
  # The median: rounding may move a token to another expert.
  assert np.median(error) < 0.02 * np.abs(np.asarray(row.output)).max()
  assert np.isfinite(error).all()


@rows("causal")
def test_causality(row):
  if row.inputs.ndim == 2:
    later = vary(row.inputs, jnp.broadcast_to(jnp.arange(T) > 3, (B, T)))
    changed = row.compiled(row.params, later, None, jnp.float32)
    assert_close(changed[:, :4], row.output[:, :4], 1e-6)
    assert float(jnp.abs(changed[:, 4:] - row.output[:, 4:]).max()) > 0
    return
  at_3 = lambda x, params: row.apply(params, x, None, jnp.float32)[:, 3].sum()
  seen = np.abs(jax.jit(jax.grad(at_3))(row.inputs, row.params)).sum((0, 2))
  assert (seen[4:] == 0).all()
  assert seen[3] > 0
  assert (seen[:3].max() == 0) == row.pointwise


@rows("padding")
def test_padding_does_not_matter(row):
  real = np.asarray(PADDED >= 0)
  y = row.compiled(row.params, row.inputs, PADDED, jnp.float32)
  other = row.compiled(row.params, vary(row.inputs, PADDED < 0), PADDED, jnp.float32)
  assert_close(np.asarray(other)[real], np.asarray(y)[real], 1e-6)
  assert bool(jnp.isfinite(y).all())
  if row.causal:
    assert_close(np.asarray(y)[real], np.asarray(row.output)[real])


@rows("reduces")
def test_it_reduces_to_the_baseline(row):
  got, expected = jax.jit(row.reduces)()
  assert_close(got, expected, 2e-5)


@rows()
def test_it_works_on_a_mesh(row):
  mesh = make_mesh(data=8)

  def place(x):
    divisible = [i for i, n in enumerate(x.shape) if n % 8 == 0]
    spec = [None] * x.ndim
    if divisible:
      spec[divisible[0]] = "data"
    return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*spec)))

  params, inputs = jax.tree.map(place, (row.params, row.inputs))
  y = row.compiled(params, inputs, None, jnp.float32)
  assert len(y.sharding.device_set) == 8
  assert_close(y, row.output)


@pytest.fixture(scope="module")
def restored(tmp_path_factory):
  params = {row.name: row.params for row in ROWS}
  with Checkpoints(tmp_path_factory.mktemp("contract")) as checkpoints:
    checkpoints.save(1, params)
    return checkpoints.restore(jax.eval_shape(lambda: params)).state


@rows()
def test_parameters_survive_a_checkpoint(row, restored):
  chex.assert_trees_all_equal(restored[row.name], row.params)
  chex.assert_trees_all_equal_structs(restored[row.name], row.params)


def test_merging_and_dequantising_leave_plain_arrays():
  row = next(row for row in ROWS if row.name == "Llama, LoRA on Int8")
  plain = dequantize(lora.merge(row.params))
  assert_close(row.compiled(plain, row.inputs, None, jnp.float32), row.output)
  assert trees.nbytes(plain) == 4 * trees.count(plain)
