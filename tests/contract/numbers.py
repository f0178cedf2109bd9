"""What takes weights, ids and numbers, and what all of it must do with them.

A new loss, reader of ids or function of numbers is one entry here.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from effjax import cost, decode, moe, parallel
from effjax.core import weights
from effjax.core.numerics import cross_entropy, weighted_mean
from effjax.data import packing
from effjax.decode import sampling
from effjax.distill import kd_loss, kd_objective
from effjax.layers import Embed, Rope, TransformerConfig, sinusoidal_positions
from effjax.models import Transformer
from effjax.peft import lora, ranking, retrieval
from effjax.quant import basics
from effjax.train import (
  LoopConfig,
  OptimizerConfig,
  init_state,
  make_optimizer,
  next_token,
  per_token,
)
from tests.contract.weights import ROWS as REPRESENTATIONS
from tests.contract.weights import D as WIDTH
from tests.contract.weights import V as ENTRIES
from tests.modules import normal, random_params

B, T, V = 2, 5, 7
IDS = np.random.default_rng(0).integers(0, V, (B, T)).astype(np.int32)
WEIGHTS = np.array([[1, 0, 2, 1, 0], [0, 0, 1, 3, 1]], np.float32)


class Given(nn.Module):
  """Logits that the batch brings, each times a parameter."""

  @nn.compact
  def __call__(self, tokens, *, memory):
    return memory * self.param("scale", nn.initializers.ones, (V,))[None, None]


def through(objective: Callable) -> Callable:
  """An objective of `Given` as a function of its logits."""

  def loss(logits, targets, weights):
    batch = {"tokens": jnp.zeros((B, T), int), "targets": targets, "memory": logits}
    return objective({"scale": jnp.ones(V)}, batch | {"weights": weights}, None)[0]

  return loss


def last_logit(output, batch):
  """A loss of a stranger, which guards nothing."""
  table = jnp.arange(float(V))
  return output[..., -1] ** 2 + table[batch["targets"]], {}


def distilled(module, alpha=0.5):
  shifted = lambda logits: logits[..., ::-1]
  return lambda logits, targets, weights: kd_loss(
    logits, shifted(logits), targets, temperature=2.0, alpha=alpha, weights=weights
  )


@dataclasses.dataclass(frozen=True)
class LossRow:
  """A mean over positions: `loss(logits [B, T, V], targets [B, T], weights [B, T])`.

  Attributes:
    of: the public function that it is.
    ids: it reads the targets.
    masks: its weights are booleans.
  """

  name: str
  loss: Callable
  of: Callable
  ids: bool = True
  masks: bool = False


def balance(probs, _, mask):
  return moe.load_balance_loss(probs, jnp.asarray(IDS)[..., None], mask=mask)


def informed(logits, _, mask):
  probs = jnp.where(logits > 0.1, logits, 0.1)  # whose derivative does not multiply
  return moe.mutual_information_loss(probs, mask=mask)


LOSSES = [
  LossRow("weighted mean", lambda x, _, w: weighted_mean(x[..., 0], w), weighted_mean, ids=False),
  LossRow("cross entropy", lambda x, t, w: weighted_mean(cross_entropy(x, t, w), w), cross_entropy),
  LossRow("kd_loss", distilled(None), kd_loss),
  LossRow("kd_loss of the targets alone", distilled(None, alpha=0), kd_loss),
  LossRow("next token", through(next_token(Given())), next_token),
  LossRow("distillation", through(kd_objective(Given(), Given(), {"scale": normal(V)})),
          kd_objective),
  LossRow("of each token", through(per_token(Given(), last_logit)), per_token),
  LossRow("z-loss", lambda x, _, w: moe.z_loss(x, mask=w), moe.z_loss, ids=False, masks=True),
  LossRow("load balance", balance, moe.load_balance_loss, ids=False, masks=True),
  LossRow("importance", lambda x, _, w: moe.importance_loss(x, mask=w),
          moe.importance_loss, ids=False, masks=True),
  LossRow("load", lambda x, _, w: moe.load_loss(x, x[..., ::-1], 1.0, k=2, mask=w),
          moe.load_loss, ids=False, masks=True),
  LossRow("mutual information", informed, moe.mutual_information_loss, ids=False, masks=True),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class IdsRow:
  """What reads floats [B, T, …] by ids [B, T] that are 0 … `count` − 1."""

  name: str
  read: Callable[[jax.Array], jax.Array]
  count: int


SMALL = TransformerConfig(V, 4, (), positions="learned", context=8, position_offset=2, head=None)
MODEL = Transformer(SMALL)
PARAMS = random_params(MODEL, IDS)


def of_representation(row: Any) -> IdsRow:
  table = row.of(ENTRIES, WIDTH)
  count = weights.entries(table)
  return IdsRow(f"rows of {row.name}", lambda ids: weights.take(table, ids), count)


READERS = [of_representation(row) for row in REPRESENTATIONS] + [
  IdsRow("Embed", lambda ids: Embed(V, 4).apply({"params": {"embedding": normal(V, 4)}}, ids), V),
  IdsRow("cross entropy", lambda ids: cross_entropy(normal(B, T, V), ids)[..., None], V),
  IdsRow("tokens", lambda ids: MODEL.apply({"params": PARAMS}, ids), V),
  IdsRow("positions", lambda ids: MODEL.apply({"params": PARAMS}, jnp.asarray(IDS), positions=ids),
         8),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class NumberRow:
  """A function of one number.

  Attributes:
    call: number → anything.
    good: a number that is allowed; an integer where the argument is one.
    bad: numbers that are not.
  """

  name: str
  call: Callable[[Any], Any]
  good: int | float
  bad: tuple[int | float, ...]


LOGITS = np.array([1.5, -0.3, 0.9, 0.9, -2.0, 2.2], np.float32)
MATRIX = {"mixer": {"query": {"kernel": np.ones((4, 6), np.float32)}}}


def with_lora(**options):
  return lora.add(MATRIX, jax.random.key(0), **{"rank": 2, **options})


drawn = lambda name: lambda x: sampling.distribution(jnp.asarray(LOGITS), **{name: x})
distils = lambda name: (
  lambda x: kd_loss(normal(2, V), normal(2, V, seed=1), jnp.array([0, 1]), **{name: x})
)
shape = {"vocab_size": 9, "width": 4, "layers": ()}
config = lambda name: lambda x: getattr(TransformerConfig(**{**shape, name: x}), name)
optimizer = lambda name: lambda x: make_optimizer(OptimizerConfig(**{name: x})) and None
loop = lambda name: lambda x: getattr(LoopConfig(**{name: x}), name)
router = lambda **sizes: moe.TopK(**{"experts": 4, "top_k": 2, **sizes}).init_with_output(
  jax.random.key(0), jnp.ones((3, 4))
)
lengths = np.array([3, 4])
NUMBERS = [
  NumberRow("temperature", drawn("temperature"), 0.5, (-1.0,)),
  NumberRow("temperature zero", drawn("temperature"), 0, (-1,)),
  NumberRow("top_k", drawn("top_k"), 2, (0, 2.0)),
  NumberRow("top_p", drawn("top_p"), 0.75, (0.0, 1.5)),
  NumberRow("keep_top_k", lambda x: decode.keep_top_k(jnp.asarray(LOGITS), x), 2, (0, -1)),
  NumberRow("keep_top_p", lambda x: decode.keep_top_p(jnp.asarray(LOGITS), x), 0.75, (0, 2)),
  NumberRow("bucket", decode.bucket, 100, (-1, 2.5)),
  NumberRow("kd_loss temperature", distils("temperature"), 2.0, (0, -1.0)),
  NumberRow("kd_loss alpha", distils("alpha"), 0.25, (-0.5, 1.5)),
  *[NumberRow(name, config(name), 6, (0, -1, 2.5)) for name in ("vocab_size", "width", "context")],
  *[NumberRow(name, config(name), 2, (-1, 0.5)) for name in ("position_offset", "token_types")],
  NumberRow("embed_scale", config("embed_scale"), 2.0, ()),
  NumberRow("logit_softcap", config("logit_softcap"), 30.0, (0, -1.0)),
  NumberRow("learning_rate", optimizer("learning_rate"), 0.5, (-1.0,)),
  NumberRow("warmup", optimizer("warmup"), 3, (-1, 1.5)),
  NumberRow("b1", optimizer("b1"), 0.5, (1.0, -0.5)),
  NumberRow("steps", loop("steps"), 3, (0, 1.5)),
  NumberRow("keep", loop("keep"), 3, (0,)),
  NumberRow("experts", lambda x: router(experts=x)[0].gates, 4, (0, 1, 4.0)),
  NumberRow("top_k of a router", lambda x: router(top_k=x)[0].gates, 2, (0, 5, 2.0)),
  NumberRow("capacity factor", lambda x: moe.Capacity(x).of(9, experts=4), 1.5, (0, -1.0)),
  NumberRow("kept groups", lambda x: moe.GroupLimit(4, x).kept, 2, (0, 5, 1.5)),
  NumberRow("bias speed", lambda x: moe.move_bias(
    init_state({"bias": jnp.zeros(2)}, optax.sgd(1.0)), {"load": jnp.array([1.0, 0.0])}, speed=x
  ).params, 0.5, (-1.0,)),
  NumberRow("top_k_routing", lambda x: moe.top_k_routing(normal(3, 4), k=x).gates, 2, (0, 5)),
  NumberRow("capacity", lambda x: moe.mix_experts(
    lambda rows, _: rows, normal(3, 4), jnp.array([[0], [1], [0]]), jnp.ones((3, 1)), count=2,
    capacity=x), 2, (0, 1.5)),
  NumberRow("room", lambda x: parallel.Experts(
    {"up": ("experts", "hidden")}, room=x).dealt.room, 1.5, (0, -1.0)),
  NumberRow("rank", lambda x: with_lora(rank=x), 2, (0, 5, 1.5)),
  NumberRow("rank of a path", lambda x: with_lora(rank={"": x}), 2, (0, 5, 1.5)),
  NumberRow("dropout", lambda x: with_lora(dropout=x), 0.5, (-0.1, 1)),
  NumberRow("alpha", lambda x: with_lora(alpha=x), 8.0, ()),
  NumberRow("in-batch temperature", lambda x: retrieval.in_batch_nll(
    normal(2, V), normal(2, V, seed=1), temperature=x), 0.5, (0, -1.0)),
  NumberRow("recall", lambda x: ranking.recall(np.array([1, 3]), x), 2, (0, 1.5)),
  NumberRow("bits", lambda x: basics.symmetric(normal(4, 6), bits=x), 4, (1, 9, 4.0)),
  NumberRow("group", lambda x: basics.symmetric(normal(4, 6), granularity="group", group=x), 2,
            (0, 3)),
  NumberRow("make_mesh", lambda x: dict(parallel.make_mesh(data=x).shape), 2, (0, -2, 1.5)),
  NumberRow("theta", lambda x: Rope(x)(normal(1, 2, 1, 4), jnp.ones((1, 2), int)), 100.0, (0, -1)),
  NumberRow("sinusoids", lambda x: sinusoidal_positions(jnp.ones((1, 2), int), x), 6, (2, 5, 6.0)),
  NumberRow("row length", lambda x: packing.pack(lengths, x).sizes, 5, (1, 2.5)),
  NumberRow("expected tokens, α", lambda x: cost.expected_tokens(x, 3), 0.5, (-1, 2)),
  NumberRow("expected tokens, γ", lambda x: cost.expected_tokens(0.5, x), 3, (-1, 1.5)),
  NumberRow("speedup", lambda x: cost.speedup(0.5, 3, x), 0.5, (-1,)),
  NumberRow("operations", lambda x: cost.operations(0.5, 3, x), 0.5, (-1,)),
  NumberRow("zero memory", lambda x: cost.zero_memory(1e6, x, 2), 4, (0, 1.5)),
  NumberRow("zero stage", lambda x: cost.zero_memory(1e6, 4, x), 2, (-1, 4)),
  NumberRow("vram", lambda x: cost.vram(x).total, 2_000_000_000, (-1,)),
  NumberRow("communication", lambda x: cost.zero_communication(x, 3), 2_000_000_000, (-1,)),
  NumberRow("activations", lambda x: cost.transformer_activations(1, x, 64, 4, 2), 100_000, (-1,)),
  NumberRow("standard traffic", lambda x: cost.standard_traffic(x, 64), 100_000, (-1, 1.5)),
  NumberRow("flash traffic", lambda x: cost.flash_traffic(x, 64, 50_176), 100_000, (-1, 1.5)),
  NumberRow("score bytes", lambda x: cost.score_bytes(x, 4), 100_000, (-1, 1.5)),
  NumberRow("flops", lambda x: cost.flops(SMALL, x), 5, (0, 1.5)),
  NumberRow("sequence flops", lambda x: cost.sequence_flops(x, 2, 64, 100), 100_000, (-1, 1.5)),
]  # fmt: skip
