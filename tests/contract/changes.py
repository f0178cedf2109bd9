"""Transforms, objectives, routers and placements: what they are and what they promise."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax import moe, peft, quant
from effjax.attention import Attention, longformer
from effjax.distill import kd_objective
from effjax.layers import MLP, Router, capture, reductions
from effjax.layers.reductions import Reduction
from effjax.layers.spec import LayerSpec, TransformerConfig
from effjax.layers.stack import unscan
from effjax.models import Transformer
from effjax.moe import hash_tables
from effjax.parallel import Anywhere, Placement, Zero, make_mesh
from effjax.peft import adapters, experts, ia3, lora, named, prefix, soft_prompt
from effjax.train import next_token
from tests.contract.layers import GQA, KEY, MHA, SWIGLU, TOKENS, B, T, V, config
from tests.modules import random_params

DENSE = config(*[LayerSpec(GQA, SWIGLU)] * 2)
EXPERTS = config(*[LayerSpec(GQA, moe.MoE(moe.TopK(3, 2), SWIGLU))] * 2)
PLAIN = config(*[LayerSpec(MHA, SWIGLU)] * 2, positions="learned")
HASHED = config(*[LayerSpec(None, moe.MoE(moe.Hash(4, V), SWIGLU))] * 2)
WITH_BIASES = config(LayerSpec(Attention(4, use_bias=True), SWIGLU))
MIXTURE = functools.partial(moe.MoE, moe.TopK(3, 2))
Change = Callable[[TransformerConfig, Any], tuple[TransformerConfig, Any]]


@dataclasses.dataclass(frozen=True)
class Transform:
  """(config, params) → (config, params).

  Attributes:
    name: what the table calls it.
    change: the transform.
    of: the functions of the library that it goes through.
    same: the model computes what it did, to this part of its largest logit; None promises nothing.
    config: what it starts from.
    traced: whether it works in a program, and on shapes.
  """

  name: str
  change: Change
  of: tuple[Callable, ...]
  same: float | None = 1e-5
  config: TransformerConfig = DENSE
  traced: bool = True


def on_params(change: Callable) -> Change:
  return lambda config, params: (config, change(params))


def with_lora(params: Any, rank: int = 2) -> Any:
  """Adapters after some training."""
  params = lora.add(params, KEY, rank=rank)
  paths = peft.trainable(params)
  move = lambda path, x: x + 0.1 if paths("/".join(k.key if hasattr(k, "key") else k.name
                                                   for k in path), x) else x  # fmt: skip
  return jax.tree_util.tree_map_with_path(move, params)


def merged_and_back(params: Any) -> Any:
  adapted = with_lora(params)
  return lora.merge(lora.unmerge(lora.merge(adapted), adapted))


def stored_without_its_base(params: Any) -> Any:
  started = lora.add(params, KEY, rank=2, start="pissa")
  return lora.rebase(started, started, params)


def exchanged(params: Any) -> Any:
  return lora.merge(peft.attach(*peft.detach(with_lora(params))))


def mixed(params: Any) -> Any:
  return named.use(named.add(params, "trained", with_lora(params)), {"trained": 0.5})


def alone(params: Any) -> Any:
  """One that changes nothing yet, after another has come and gone."""
  both = named.add(mixed(params), "new", lora.add(params, KEY, rank=3))
  return named.take(named.remove(both, "trained"), "new")


def seen(params: Any, reduce: Reduction, config: TransformerConfig = DENSE) -> dict[str, Any]:
  """What goes into the linear layers of a model."""
  return capture(Transformer(config), params, {"tokens": TOKENS}, reduce=reduce)


def rounded_by_gptq(params: Any) -> Any:
  return quant.gptq(params, seen(params, reductions.gram), group=8)


def rounded_by_awq(params: Any) -> Any:
  statistics = (seen(params, reduce) for reduce in (reductions.gram, reductions.mean_magnitude))
  return quant.awq(params, *statistics, group=8)


def smoothed(params: Any) -> Any:
  return quant.smoothquant(params, seen(params, reductions.absmax))


def with_ternary_experts(params: Any) -> Any:
  grams = seen(params, reductions.gram, EXPERTS)
  return quant.qmoe(params, {path: h for path, h in grams.items() if "experts" in path})


def with_modules(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  """LoRA experts, and a mixture of adapters after them."""
  config, params = experts.add(config, params, KEY, MIXTURE, rank=2)
  inner = MIXTURE(MLP(4, use_bias=True))
  return adapters.insert(config, params, KEY, inner, places=("after_ffn",))


def without_modules(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  return experts.remove(*adapters.remove(*with_modules(config, params)))


def folded(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  """A prefix whose three modules became two, then one prefix."""
  model = prefix.add(config, params, KEY, length=2, modules=2, mean=True)
  return prefix.fold(*prefix.remove_modules(*prefix.add_modules(*model), [0]), {0: 1.0, 1: 0.5})


def there_and_back(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  """A prefix that was trained through its reparametrisation, taken away again."""
  config, params = prefix.add(config, params, KEY, length=2)
  trained, view = prefix.reparametrize(config, params, KEY, hidden=4)
  params = prefix.put(config, params, prefix.flat(config, view(trained)))
  return soft_prompt.remove(*soft_prompt.add(*prefix.remove(config, params), KEY, length=2))


def finely(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  return moe.upcycle(config, params, KEY, experts=4, top_k=2, width=10, redrawn=0.5)


def all_on(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  """A split model whose gates are one."""
  return moe.split_ffn(config, params, KEY, experts=4, top_k=4, stddev=0.0)


def clustered_and_back(config: TransformerConfig, params: Any) -> tuple[TransformerConfig, Any]:
  by = moe.splitting.Clusters()
  return moe.merge_experts(*moe.split_ffn(config, params, KEY, by=by, experts=4))


TRANSFORMS = [
  Transform("upcycle", lambda c, p: moe.upcycle(c, p, KEY, experts=3, top_k=2), (moe.upcycle,)),
  Transform("Qwen's upcycling", finely, (moe.upcycle,), same=None),
  Transform("split, all experts on", all_on, (moe.split_ffn,)),
  Transform("split by clusters and back", clustered_and_back, (moe.split_ffn, moe.merge_experts),
            traced=False),
  Transform("int8", on_params(quant.quantize), (quant.quantize,), same=0.1),
  Transform("int8 and back", on_params(lambda p: quant.dequantize(quant.quantize(p))),
            (quant.quantize, quant.dequantize), same=0.1),
  Transform("rounded", on_params(lambda p: quant.fake_quantize(p, "int4", group=8)),
            (quant.fake_quantize,), same=0.5),
  Transform("GPTQ", on_params(rounded_by_gptq), (quant.gptq,), same=0.5),
  Transform("AWQ", on_params(rounded_by_awq), (quant.awq,), same=0.5),
  Transform("QMoE", on_params(with_ternary_experts), (quant.qmoe,), None, EXPERTS, traced=False),
  Transform("SmoothQuant", on_params(smoothed), (quant.smoothquant,), same=0.1),
  Transform("lora at its start", on_params(lambda p: lora.add(p, KEY, rank=2)), (lora.add,)),
  Transform("lora on int8", on_params(lambda p: lora.add(quant.quantize(p), KEY)),
            (lora.add, quant.quantize), same=0.1),
  Transform("lora merged", on_params(lambda p: lora.merge(with_lora(p))), (lora.merge,), same=None),
  Transform("lora merged, unmerged", on_params(merged_and_back), (lora.unmerge,), same=None),
  Transform("PiSSA over the base that it began with", on_params(stored_without_its_base),
            (lora.rebase,)),
  Transform("adapters exchanged", on_params(exchanged), (peft.detach, peft.attach), same=None),
  Transform("tuned", on_params(lambda p: peft.tune(peft.bitfit(p), "norm/scale$")),
            (peft.tune, peft.bitfit), config=WITH_BIASES),
  Transform("IA3 and merged", on_params(lambda p: peft.merge(ia3.add(p))), (ia3.add, peft.merge)),
  Transform("Houlsby", lambda c, p: adapters.add(c, p, KEY, width=4), (adapters.add,), 0.1),
  Transform("modules", with_modules, (experts.add, adapters.insert), 0.1),
  Transform("modules and removed", without_modules, (experts.remove, adapters.remove), 0),
  Transform("named adapters", on_params(mixed), (named.add, named.use), same=None),
  Transform("one named adapter alone", on_params(alone), (named.take, named.remove)),
  Transform("prefix", lambda c, p: prefix.add(c, p, KEY, length=2), (prefix.add,), same=None),
  Transform("prefix of a text", lambda c, p: prefix.from_tokens(Transformer(c), p, [1, 2]),
            (prefix.from_tokens,), same=None, config=PLAIN),
  Transform("prefix, modules folded", folded,
            (prefix.add_modules, prefix.remove_modules, prefix.fold), same=None),
  Transform("prefix and back", there_and_back, (prefix.reparametrize, prefix.put, prefix.flat,
            prefix.remove, soft_prompt.remove), same=0.0),
  Transform("soft prompt", lambda c, p: soft_prompt.add(c, p, KEY, length=2), (soft_prompt.add,),
            same=0.0),
  Transform("unscan", unscan, (unscan,)),
  Transform("tables", lambda c, p: (c, hash_tables.put(c, p, np.arange(V) % 4)), (hash_tables.put,),
            same=None, config=HASHED),
  Transform("Longformer", lambda c, p: longformer.convert(c, p, window=T, positions=1),
            (longformer.convert,), config=PLAIN),
]  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ObjectiveRow:
  """An objective of the parameters of `Transformer(DENSE)`: `make(module)` gives it."""

  name: str
  make: Callable[[Transformer], Callable]
  of: tuple[Callable, ...]


def teacher(module: Transformer) -> Any:
  return random_params(module, TOKENS, seed=9)


OBJECTIVES = [
  ObjectiveRow("next token", next_token, (next_token,)),
  ObjectiveRow("distillation", lambda m: kd_objective(m, m, teacher(m), temperature=2.0, alpha=0.7),
               (kd_objective,)),
]  # fmt: skip

PADDING = (np.arange(B) % 2 == 1)[:, None] & (np.arange(T) > 2)
COUNTS = np.where(PADDING, 0.0, 1.0)
COUNTS[0, 0] = 0.25
BATCH = {
  "tokens": TOKENS,
  "targets": jnp.asarray(np.roll(TOKENS, -1, axis=1)),
  "weights": jnp.asarray(COUNTS, jnp.float32),
  "segment_ids": jnp.asarray(np.where(PADDING, -1, 0)),
}


def elsewhere(batch: dict) -> dict:
  """`batch` with other tokens and targets where the weight is zero."""
  masked = np.asarray(batch["weights"]) == 0
  other = lambda x: np.where(masked, (x + 7) % V, x)
  return batch | {"tokens": other(batch["tokens"]), "targets": other(batch["targets"])}


@dataclasses.dataclass(frozen=True)
class RouterRow:
  """A router.

  Attributes:
    name: what the table calls it.
    router: the module.
    sums: what the gates of a token sum to; None promises nothing.
    drops: whether a token may get fewer experts than it wants, or an expert fewer tokens.
  """

  name: str
  router: Router
  sums: float | None = None
  drops: bool = False


ROUTERS = [
  RouterRow("top 1", moe.TopK(4, 1, renormalize=False)),
  RouterRow("top 2", moe.TopK(4, 2), sums=1.0),
  RouterRow("all", moe.TopK(4, 4, renormalize=False), sums=1.0),
  RouterRow("noisy", moe.NoisyTopK(4, 2), sums=1.0),
  RouterRow("Switch", moe.Switch(4), drops=True),
  RouterRow("GShard", moe.GShard(4), drops=True),
  RouterRow("batch priority", moe.BatchPriority(4, 2), drops=True),
  RouterRow("sigmoid", moe.SigmoidTopK(4, 2, limit=moe.GroupLimit(2, 1, best=2)), sums=1.0),
  RouterRow("expert choice", moe.ExpertChoice(4), drops=True),
]


@dataclasses.dataclass(frozen=True)
class PlacementRow:
  """A placement of a training state."""

  name: str
  make: Callable[[], Placement]


PLACEMENTS = [PlacementRow("anywhere", Anywhere)] + [
  PlacementRow(f"ZeRO-{stage}", lambda stage=stage: Zero(make_mesh(data=4), stage))
  for stage in (0, 1, 2, 3)
]
