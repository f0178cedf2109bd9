"""Layers and models: what they are, what they promise, what they reduce to.

A row says how to make parameters and how to compute y [B, T, …] from x [B, T, D] (or from token
ids), and what it promises. A new technique is one more entry.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.attention import (
  LSRA,
  Attention,
  BigBird,
  LinearAttention,
  Linformer,
  Longformer,
  ShiftedSparseAttention,
  TrainedPrefix,
)
from effjax.attention.masks import Causal, Full, SlidingWindow
from effjax.core import trees
from effjax.core.typing import PyTree
from effjax.layers import MLP, Context, LayerNorm, RMSNorm, Rope
from effjax.layers.spec import LayerSpec, Mixer, TransformerConfig
from effjax.layers.stack import unscan
from effjax.models.transformer import Transformer
from effjax.moe import Gated, Hash, MoA, MoE, MultiHash, ResidualMoE, TopK
from effjax.peft import LoRA, adapters, experts, lora
from effjax.peft.adapters import Bottleneck
from effjax.quant import quantize
from tests.modules import normal, random_params

B, T, D, V = 8, 6, 16, 32
KEY = jax.random.key(0)
X = normal(B, T, D, seed=1)
TOKENS = jnp.asarray(np.random.default_rng(2).integers(0, V, (B, T)), jnp.int32)
PADDED = jnp.asarray(np.where((np.arange(B) % 2 == 1)[:, None] & (np.arange(T) > 3), -1, 0))


CAUSAL = {"causal": True, "padding": True, "packed": True, "decodes": True}
BIDIRECTIONAL = {"padding": True, "packed": True}


@dataclasses.dataclass(frozen=True)
class Row:
  """A technique.

  Attributes:
    name: what the table calls it.
    init: () → parameters.
    apply: (params, inputs, segment_ids or None, dtype) → y.
    inputs: what it is computed on, the batch first.
    causal: y[t] does not depend on inputs after t.
    pointwise: y[t] depends on inputs at t alone.
    padding: takes segment_ids; where they are negative, neither inputs nor cotangents have any
      influence.
    packed: sequences packed into a row, by segment_ids and positions, do not know one another.
    decodes: with a cache, token by token, it gives what it gives for the whole, absent tokens
      (negative segment ids) at the end of some rows and at the beginning of others.
    absolute: where in a row a token stands matters, so that absent tokens come at the end only.
    module: called with inputs, context and cache, or, a model, with tokens and keywords.
    reduces: () → (a function to (its value at a special setting, the value of the baseline),
      its argument).
  """

  name: str
  init: Callable[[], PyTree]
  apply: Callable[..., jax.Array]
  inputs: jax.Array
  causal: bool = False
  pointwise: bool = False
  padding: bool = False
  packed: bool = False
  decodes: bool = False
  absolute: bool = False
  module: Any = None
  reduces: Callable[[], tuple[Callable, PyTree]] | None = None

  @functools.cached_property
  def params(self) -> PyTree:
    return self.init()

  @functools.cached_property
  def compiled(self):
    return jax.jit(self.apply, static_argnums=3)

  @functools.cached_property
  def output(self) -> jax.Array:
    return self.compiled(self.params, self.inputs, None, jnp.float32)

  @functools.cached_property
  def placed(self):
    """y of inputs whose segment ids and positions are given."""
    return jax.jit(lambda *arguments: self.run(*arguments)[0])

  def run(self, params, inputs, ids, positions, cache=None) -> tuple[jax.Array, Any]:
    """y and the new cache, for some of the tokens."""
    (y, cache), _ = self.sown(params, inputs, ids, positions, cache)
    return y, cache

  def sown(self, params, inputs, ids, positions, cache=None) -> tuple[tuple[jax.Array, Any], Any]:
    """What `run` gives, and what was sown."""
    facts = {"segment_ids": ids, "positions": positions}
    given = ((Context(**facts),), {})
    if isinstance(self.module, Transformer):
      given = ((), facts | {"cache": cache})
    elif isinstance(self.module, Mixer):
      given = ((*given[0], cache), {})
    y, sown = self.module.apply(
      {"params": params}, inputs, *given[0], **given[1], mutable=["losses", "metrics", "statistics"]
    )
    return y if isinstance(y, tuple) else (y, None), sown

  def empty_cache(self, batch: int, length: int) -> Any:
    sizes = (batch, length) if isinstance(self.module, Transformer) else (D, batch, length)
    return self.module.init_cache(*sizes)


def layer(name: str, module, **traits) -> Row:
  """A norm, feed-forward layer or mixer."""

  def apply(params, x, ids, dtype):
    context = () if isinstance(module, RMSNorm | LayerNorm) else (Context(segment_ids=ids),)
    y = module.apply({"params": params}, x.astype(dtype), *context)
    return y[0] if isinstance(y, tuple) else y

  return Row(name, lambda: random_params(module, X), apply, X, module=module, **traits)


def model(name: str, config: TransformerConfig, change=None, **traits) -> Row:
  """A Transformer whose parameters went through `change(params, key)`."""
  module = Transformer(config)

  def init():
    params = random_params(module, TOKENS)
    return params if change is None else jax.jit(change)(params, KEY)

  def apply(params, tokens, ids, dtype):
    return Transformer(config, dtype).apply({"params": params}, tokens, segment_ids=ids)

  def one_by_one(params):
    flat, flat_params = unscan(config, params)
    y = Transformer(config, remat=True).apply({"params": params}, TOKENS)
    return y, Transformer(flat).apply({"params": flat_params}, TOKENS)

  traits = CAUSAL | {"reduces": lambda: (one_by_one, init()), "module": module} | traits
  return Row(name, init, apply, TOKENS, **traits)


def value(module, params, x=X):
  y = module.apply({"params": params}, x)
  return y[0] if isinstance(y, tuple) else y


def same_as(special, baseline, change=lambda params: params):
  """`special` computes what `baseline` does with the same parameters, up to `change`."""
  pair = lambda params: (value(special, params), value(baseline, change(params)))
  return lambda: (pair, random_params(special, X))


def repeat_heads(params):
  """Key and value kernels of 2 heads repeated to 4."""
  kernel = lambda w: jnp.repeat(w.reshape(D, 2, -1), 2, axis=1).reshape(D, -1)
  return params | {name: jax.tree.map(kernel, params[name]) for name in ("key", "value")}


def identity_linformer():
  """As many projected positions as there are, each a position, against full attention."""
  module = Linformer(4, length=T, rank=T, shared=True)
  params = random_params(module, X) | {"key_length": {"kernel": jnp.eye(T)}}
  return lambda params: (value(module, params), value(Attention(4, mask=Full()), params)), params


def one_tap_lsra():
  """A convolution of one tap leaves each position as it is."""
  module = LSRA(2, kernel=1)

  def pair(params):
    far, near = jnp.split(X, 2, axis=-1)
    linear, gate = jnp.split(near @ params["glu"]["kernel"], 2, axis=-1)
    near = linear * jax.nn.sigmoid(gate) @ params["out"]["kernel"]
    parts = [value(Attention(2), params["attention"], far), near]
    return value(module, params), jnp.concatenate(parts, -1)

  return pair, random_params(module, X)


def first_tokens_as_a_prefix():
  """The keys and values of two tokens before the others, against attention to all."""
  whole = Attention(4, kv_heads=2, rope=ROPE, mask=Causal() & SlidingWindow(3, 0))
  prefixed = dataclasses.replace(whole, prefix=TrainedPrefix(2))

  def pair(params):
    absorbed = whole.apply({"params": params}, X[:1, :2], Context(), whole.init_cache(D, 1, 2))[1]
    kept = {f"prefix_{name}": getattr(absorbed, name)[0] for name in ("key", "value")}
    first = jnp.concatenate([X[:1, :2].repeat(B, 0), X], axis=1)
    return value(prefixed, params | kept), value(whole, params, first)[:, 2:]

  return pair, random_params(whole, X)


def first_expert(params):
  return jax.tree.map(lambda x: x[0], params["experts"])


def one_expert_of_attention():
  """One head expert of all heads."""
  params = random_params(GQA, X)

  def pair(params):
    routed = {name: jax.tree.map(lambda x: x[None], params[name]) for name in ("query", "out")}
    routed["shared"] = {name: params[name] for name in ("key", "value")}
    routed["router"] = {"kernel": jnp.ones((D, 1))}
    return value(MoA(TopK(1, 1), GQA), routed), value(GQA, params)

  return pair, params


def centred_rms_norm():
  def pair(scale):
    x = X - X.mean(-1, keepdims=True)
    params = {"scale": scale}
    return value(LayerNorm(1e-6), params | {"bias": jnp.zeros(D)}, x), value(RMSNorm(), params, x)

  return pair, np.linspace(0.5, 2, D, dtype=np.float32)


def config(*layers: LayerSpec, **fields) -> TransformerConfig:
  return TransformerConfig(
    **({"vocab_size": V, "width": D, "layers": layers, "context": 8} | fields)
  )


def quantised(params, key):
  return lora.add(quantize(params), key, rank=2)


def bank(params, key):
  """Experts that share the matrices of the first, with factors of their own."""
  dense, tree = config(LayerSpec(None, SWIGLU)), {"segments_0": {"layers_0": {}}}
  tree["segments_0"]["layers_0"]["ffn"] = first_expert(params)
  mixture = functools.partial(MoE, SMALL_MOE.router)
  made = experts.add(dense, tree, key, mixture, rank=2)[1]["segments_0"]["layers_0"]["ffn"]
  move = lambda path, w: dataclasses.replace(w, b=w.b + 0.1) if isinstance(w, LoRA) else w
  return trees.update(made, "", move)


def bottlenecks(params, key):
  """Adapters beside a quantised model."""
  layer = params["segments_0"]["layers_0"]
  kept = {name: x for name, x in layer.items() if name not in ("after_mixer", "after_ffn")}
  plain = quantize(params | {"segments_0": {"layers_0": kept}})
  return adapters.add(LLAMA, plain, key, width=4, stddev=0.3)[1]


ROPE, SWIGLU = Rope(1e4), MLP(24, "silu", gated=True)
NEAR = SlidingWindow(2, 2)
MHA, GQA = Attention(4), Attention(4, kv_heads=2, rope=ROPE)
BIASED = {"use_bias": True, "out_bias": True}
BOTH_WAYS = Attention(4, mask=Full(), **BIASED)
LOCAL = Attention(4, kv_heads=1, qk_norm=1e-6, mask=Causal() & SlidingWindow(2, 0), rope=ROPE)
GLOBAL = dataclasses.replace(LOCAL, mask=Causal(), rope=Rope(1e6))
SMALL_MOE = MoE(TopK(4, 2), SWIGLU)
PR_MOE = ResidualMoE(dataclasses.replace(SMALL_MOE, shared=Gated(SWIGLU)), SWIGLU)
HEADS = MoA(TopK(4, 2), Attention(4, kv_heads=2, head_width=4, rope=ROPE, **BIASED))
LLAMA = config(*[LayerSpec(GQA, SWIGLU)] * 2)
ADAPTER = Bottleneck(MLP(4, use_bias=True))
POINT = {"causal": True, "pointwise": True}

ROWS = [
  layer("RMSNorm", RMSNorm(), **POINT),
  layer("LayerNorm", LayerNorm(), reduces=centred_rms_norm, **POINT),
  layer("MLP", MLP(24, "relu", use_bias=True), padding=True, **POINT),
  layer("SwiGLU", SWIGLU, padding=True, **POINT),
  layer("MoE, gated, residual", PR_MOE, padding=True, **POINT,
        reduces=same_as(MoE(TopK(1, 1), SWIGLU), SWIGLU, first_expert)),
  dataclasses.replace(layer("LoRA experts", SMALL_MOE, padding=True, **POINT),
                      init=lambda: bank(random_params(SMALL_MOE, X), KEY)),
  layer("bottleneck", ADAPTER, padding=True, **POINT),
  layer("MHA", MHA, **CAUSAL),
  layer("GQA", GQA, **CAUSAL,
        reduces=same_as(GQA, dataclasses.replace(GQA, kv_heads=4), repeat_heads)),
  layer("MQA", Attention(4, kv_heads=1, **BIASED), **CAUSAL),
  layer("window", Attention(4, mask=Causal() & SlidingWindow(2, 0)), **CAUSAL,
        reduces=same_as(Attention(4, mask=Causal() & SlidingWindow(T, 0)), MHA)),
  layer("bidirectional", Attention(4, mask=Full()), **BIDIRECTIONAL,
        reduces=same_as(Attention(4, mask=Full()), Attention(4, mask=SlidingWindow(T, T)))),
  layer("softcap", Attention(4, logit_softcap=1.0), **CAUSAL,
        reduces=same_as(Attention(4, logit_softcap=1e3), MHA)),
  layer("MoA", HEADS, **CAUSAL, reduces=one_expert_of_attention),
  layer("sinks", Attention(4, sinks=True), **CAUSAL),
  layer("prefix", dataclasses.replace(GQA, prefix=TrainedPrefix(3), sinks=True), **CAUSAL),
  layer("prefix, window", Attention(4, mask=Causal() & SlidingWindow(3, 0),
        prefix=TrainedPrefix(2, modules=2)), reduces=first_tokens_as_a_prefix, **CAUSAL),
  layer("prefix, both ways", Attention(4, mask=Full(), prefix=TrainedPrefix(2, shift=False)),
        **BIDIRECTIONAL),
  layer("Linformer", Linformer(4, length=8, rank=3), padding=True, reduces=identity_linformer),
  layer("Longformer", Longformer(4, kv_heads=2, rope=ROPE, mask=NEAR, positions=1, causal=True),
        causal=True, padding=True, absolute=True,
        reduces=same_as(Longformer(4, mask=SlidingWindow(T, T), positions=0),
                        Attention(4, mask=Full()))),
  layer("BigBird", BigBird(4, kv_heads=2, block=1, number=1),
        causal=True, padding=True, decodes=True, absolute=True,
        reduces=same_as(BigBird(4, block=2, number=3), MHA)),
  layer("linear attention", LinearAttention(4, chunk=4), **CAUSAL,
        reduces=same_as(LinearAttention(4, chunk=1), LinearAttention(4))),
  layer("linear, both ways", LinearAttention(4, causal=False, chunk=4), **BIDIRECTIONAL),
  layer("LSRA", LSRA(2, kernel=3), **CAUSAL, reduces=one_tap_lsra),
  layer("LSRA, dynamic, both ways", LSRA(2, kernel=3, causal=False, dynamic=True), **BIDIRECTIONAL),
  layer("LongLoRA", ShiftedSparseAttention(4, kv_heads=2, rope=ROPE, group=4),
        causal=True, padding=True, absolute=True,
        reduces=same_as(ShiftedSparseAttention(4, group=T), MHA)),
  model("Llama", LLAMA),
  model("Gemma 3", config(*[LayerSpec(LOCAL, SWIGLU), LayerSpec(LOCAL, SWIGLU),
        LayerSpec(GLOBAL, SWIGLU)] * 2, arrangement="sandwich", embed_scale=4.0)),
  model("GPT-2", config(LayerSpec(Attention(4, **BIASED), MLP(64, "gelu_tanh", use_bias=True)),
        norm=LayerNorm(), positions="learned")),
  model("OPT", config(LayerSpec(Attention(4, **BIASED), MLP(64, "relu", use_bias=True)),
        norm=LayerNorm(), positions="learned", position_offset=2, embed_width=8,
        arrangement="post", final_norm=False)),
  model("BERT", config(*[LayerSpec(BOTH_WAYS, MLP(32, use_bias=True))] * 2,
        norm=LayerNorm(), positions="learned", arrangement="post", final_norm=False,
        head=None, embed_norm=True, token_types=2), causal=False, decodes=False),
  model("Llama, prefix", config(*[LayerSpec(dataclasses.replace(GQA, prefix=TrainedPrefix(2)),
        SWIGLU)] * 2)),
  model("MoE every second layer", config(*[LayerSpec(GQA, SWIGLU), LayerSpec(GQA, SMALL_MOE)] * 2,
        tied=False)),
  model("hash layers", config(LayerSpec(GQA, MoE(Hash(4, V), SWIGLU)),
        LayerSpec(GQA, MultiHash(Hash(4, V, hashes=2), 24))), reduces=None),
  model("Llama, LoRA on Int8", LLAMA, quantised, reduces=None),
  model("Llama, adapters on Int8",
        config(*[LayerSpec(GQA, SWIGLU, after_mixer=ADAPTER, after_ffn=ADAPTER)] * 2),
        bottlenecks, reduces=None),
]  # fmt: skip
