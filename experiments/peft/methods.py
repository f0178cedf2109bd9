"""The methods of fine-tuning that are compared: a new one appears by being added here.

Sizes are those at which the low-rank family, adapters and experts train about 2 % of SmolLM2; the
others have what their papers use. Which method suits which model and which representation of its
matrices, the methods say themselves (`refusal`): BitFit wants biases, which Llamas have none of;
PiSSA and full fine-tuning want plain matrices; a mixture of experts wants layers with an `MLP`.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.typing import Key, Params, PyTree
from effjax.core.weights import is_weight
from effjax.models import TransformerConfig
from effjax.moe import MoE, TopK
from effjax.peft import adapters, bitfit, experts, ia3, lora, prefix, soft_prompt
from experiments.lab.subject import Subject

KERNELS = r"(query|key|value|out|up|gate|down)/kernel$"
RANK, HOULSBY, PFEIFFER, VIRTUAL = 8, 32, 64, 16
EXPERTS, CHOSEN, EXPERT_RANK = 4, 2, 4

Change = Callable[[TransformerConfig, Params, Key], tuple[TransformerConfig, Params]]


@dataclasses.dataclass(frozen=True)
class Method:
  """A row.

  Attributes:
    name: how `--config.method` calls it.
    kind: what the plots tell it by.
    rate: peak learning rate of AdamW where no other is asked for.
    change: (config, params, key) → the model with what trains, which alone does.
    batch: (params, batch) → the batch, or the prompts, as that model reads it.
    stored: (trained, started, original) → `trained` as it stands over the parameters `original`,
      of which `change` made `started`.
  """

  name: str
  kind: str
  rate: float
  change: Change
  batch: Callable[[Params, Any], Any] = lambda params, batch: batch
  stored: Callable[[Params, Params, Params], Params] = lambda trained, started, original: trained

  def __call__(self, subject: Subject, key: Key) -> Subject:
    """The model with what trains.

    Raises:
      ValueError: for a model that the method does not suit.
    """
    return Subject(*self.change(subject.config, subject.params, key))


def refusal(method: Method, subject: Subject) -> str | None:
  """Why a method does not suit a model; None where it does. Shapes suffice.

  Example:
    >>> from experiments.lab.subject import load
    >>> refusal(METHODS["bitfit"], load("tiny")[0])
    'bitfit: params has no bias, ...'
  """
  change = lambda params: method.change(subject.config, params, jax.random.key(0))[1]
  try:
    jax.eval_shape(change, subject.params)
  except ValueError as error:
    return str(error)
  return None


def suited(subject: Subject) -> list[str]:
  """The names of the methods that suit a model."""
  return [name for name, method in METHODS.items() if refusal(method, subject) is None]


def low_rank(**options: Any) -> Change:
  """Factors beside every linear layer."""
  options = {"rank": RANK, "targets": KERNELS, **options}
  return lambda config, params, key: (config, lora.add(params, key, **options))


def beside(change: Callable[[PyTree], PyTree]) -> Change:
  """What changes parameters and draws nothing."""
  return lambda config, params, key: (config, change(params))


def bottlenecks(kind: str, width: int) -> Change:
  """Adapters of one width in every layer."""
  return functools.partial(adapters.add, kind=kind, width=width)


def prefixed(config: TransformerConfig, params: Params, key: Key):
  """A prefix, which an encoder is to be told is meant for tokens that see later ones."""
  seen = bidirectional(config)
  return prefix.add(config, params, key, length=VIRTUAL, bidirectional=seen)


def prompted(params: Params, batch: Any) -> Any:
  """Virtual tokens before each sequence; the tokens that are scored are those of other methods."""
  found = soft_prompt.prepend(params, batch)
  if not isinstance(found, Mapping) or "weights" not in found:
    return found
  real = found["tokens"] < params["embed"]["embedding"].shape[0]
  return {**found, "weights": found["weights"] * real.astype(np.float32)}


def bidirectional(config: TransformerConfig) -> bool:
  """Whether the first of two tokens sees the second in a layer, as in encoders."""
  masks: set[Any] = {getattr(spec.mixer, "mask", None) for spec in config.layers} - {None}
  with jax.ensure_compile_time_eval():
    first = jnp.zeros((1, 1), jnp.int32)
    return any(bool(mask.dense(1, 2, first)[..., 1].any()) for mask in masks)


def mixed(config: TransformerConfig, params: Params, key: Key):
  """A mixture of LoRA experts in place of each MLP."""
  mixture = functools.partial(MoE, TopK(EXPERTS, CHOSEN))
  return experts.add(config, params, key, mixture, rank=EXPERT_RANK)


def full(config: TransformerConfig, params: Params, key: Key):
  """All parameters as they are."""
  del key
  for path, leaf in trees.items(params).items():
    if is_weight(leaf):
      given = f"full: {path} is a {type(leaf).__name__}, which does not train"
      raise ValueError(f"{given}; allowed: plain matrices, or a method that adds to frozen ones")
  return config, params


LOW_RANK, SCALES, MODULES, VIRTUAL_TOKENS = "low rank", "vectors", "modules", "virtual tokens"
# Rates: factors that start at 0 beside matrices take 1e-3, and less by α/√r over α/r where rsLoRA
# scales by that, and where PiSSA begins with the principal part, which moves as the matrix does.
# Few numbers far from the loss (scales, biases, virtual tokens) take ten times as much and more;
# all matrices at once a twentieth.
METHODS = {
  method.name: method
  for method in (
    Method("lora", LOW_RANK, 1e-3, low_rank()),
    Method("rslora", LOW_RANK, 1e-3 / math.sqrt(RANK), low_rank(rs=True)),
    Method("dora", LOW_RANK, 1e-3, low_rank(dora=True)),
    Method("pissa", LOW_RANK, 2e-4, low_rank(start="pissa"), stored=lora.rebase),
    Method("lora-dropout", LOW_RANK, 1e-3, low_rank(dropout=0.1)),
    Method("ia3", SCALES, 1e-2, beside(ia3.add)),
    Method("bitfit", SCALES, 1e-2, beside(bitfit)),
    Method("houlsby", MODULES, 1e-3, bottlenecks("houlsby", HOULSBY)),
    Method("pfeiffer", MODULES, 1e-3, bottlenecks("pfeiffer", PFEIFFER)),
    Method("lora-experts", MODULES, 1e-3, mixed),
    Method("prefix", VIRTUAL_TOKENS, 1e-2, prefixed),
    Method(
      "soft-prompt",
      VIRTUAL_TOKENS,
      1e-2,
      functools.partial(soft_prompt.add, length=VIRTUAL),
      batch=prompted,
    ),
    Method("full", "everything", 5e-5, full),
  )
}
