"""Mixtures of experts in Llama's layout: where their tensors lie, and what is written of them."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn

from effjax.attention.multi_head import Attention
from effjax.layers import MLP
from effjax.layers.spec import TransformerConfig
from effjax.models.families import reading
from effjax.models.families.fields import Fields
from effjax.models.families.table import Entry, linear
from effjax.moe import MoE, TopK

# Fields of a router that say how it trains, and nothing of what it computes.
LOSSES: dict[str, Any] = {
  "load_balance": 0.0,
  "normalization": "switch",
  "devices": None,
  "device_balance": 0.0,
  "z": 0.0,
  "importance": 0.0,
  "mutual_information": 0.0,
}
NAMES = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


def entries(block: str = "mlp", names: dict[str, str] | None = None) -> tuple[Entry, ...]:
  """The router and the experts, each expert's matrices tensors of their own.

  Args:
    block: what the layer calls its mixture.
    names: ours → theirs, of an expert's matrices; None is `NAMES`.
  """
  where = f"layers.{{i}}.{block}"
  found = linear("ffn/router", f"{where}.gate", bias=False)
  for ours, theirs in (names or NAMES).items():
    found += linear(f"ffn/experts/{ours}", f"{where}.experts.{{e}}.{theirs}", bias=False)
  return found


def stacked(block: str = "mlp", names: dict[str, str] | None = None) -> dict[str, tuple[str, ...]]:
  """The tensors of transformers 5 for the experts of a layer → those of `entries`, in order."""
  theirs = names or NAMES
  own = {ours: f"{block}.experts.{{e}}.{name}.weight" for ours, name in theirs.items()}
  return {
    "mlp.experts.gate_up_proj": (own["gate"], own["up"]),
    "mlp.experts.down_proj": (own["down"],),
  }


def shared(path: str, name: str) -> tuple[Entry, ...]:
  """The MLP at `path` that every token visits, which the mixture calls `name`."""
  matrices = (
    linear(f"{path}/{ours}", f"layers.{{i}}.mlp.{name}.{theirs}", bias=False)
    for ours, theirs in NAMES.items()
  )
  return sum(matrices, ())


def mlp(fields: Fields, width: str) -> MLP:
  """A gated MLP of the width that a field says."""
  return MLP(fields.integer(width), reading.activation(fields, "hidden_act"), gated=True)


def router(
  fields: Fields, experts: str, *, renormalize: bool, loss: str = "router_aux_loss_coef"
) -> TopK:
  """The router of a mixture, whose balance loss is that of transformers.

  Args:
    fields: of the family.
    experts, loss: the fields that say how many experts there are, and the loss's coefficient.
    renormalize: whether the gates of a token sum to one.
  """
  fields.unused("output_router_logits")
  count, used = fields.integer(experts), fields.integer("num_experts_per_tok")
  if used > count:
    raise fields.wrong("num_experts_per_tok", f"up to {experts}={count}")
  coefficient = fields.number(loss, positive=False)
  return TopK(count, used, renormalize, **(LOSSES | {"load_balance": coefficient}))


def some(fields: Fields, moe: MoE, is_sparse: Callable[[int], bool]) -> Callable[[int], nn.Module]:
  """Number of a layer → `moe` where it is sparse, else an MLP of "intermediate_size"."""
  sparse = [is_sparse(i) for i in range(fields.depth("num_hidden_layers"))]
  if all(sparse):
    fields.unused("intermediate_size")
    return lambda i: moe
  dense = mlp(fields, "intermediate_size")
  return lambda i: moe if sparse[i] else dense


def parts(
  config: TransformerConfig, family: str, shared: tuple[type, ...] = (type(None),)
) -> tuple[Attention, MLP, Any]:
  """The first mixer, dense feed-forward layer (an expert where there is none), and mixture.

  Args:
    config: the configuration.
    family: its name.
    shared: what the family can have as shared expert.

  Raises:
    ValueError: naming what the family cannot save.
  """
  mixer, _ = reading.first_layer(config, family, Attention, MLP, MoE)
  ffns: list[Any] = [spec.ffn for spec in config.layers]
  found = [i for i, ffn in enumerate(ffns) if isinstance(ffn, MoE)]
  if not found:
    raise ValueError(f"layers: no MoE; the layout of family {family!r} has at least one")
  moe = ffns[found[0]]
  kinds = {"router": (TopK,), "expert": (MLP,), "shared": shared}
  for name, allowed in kinds.items():
    reading.check_kind(f"layers[{found[0]}].ffn.{name}", getattr(moe, name), family, allowed)
  return mixer, next((ffn for ffn in ffns if isinstance(ffn, MLP)), moe.expert), moe


def sparse(config: TransformerConfig) -> list[int]:
  """The numbers of the layers that are mixtures."""
  return [i for i, spec in enumerate(config.layers) if isinstance(spec.ffn, MoE)]


def computed(ffn: nn.Module | None) -> nn.Module | None:
  """A feed-forward layer without how its router trains."""
  if not isinstance(ffn, MoE) or not isinstance(ffn.router, TopK):
    return ffn
  return ffn.copy(router=ffn.router.copy(**LOSSES))
