"""What several families read from their fields, and write back."""

from typing import Any

from effjax.layers.spec import TransformerConfig
from effjax.models.families.fields import Fields

ACTIVATIONS = {
  "silu": "silu",
  "relu": "relu",
  "gelu": "gelu",
  "gelu_pytorch_tanh": "gelu_tanh",
  "gelu_new": "gelu_tanh",
  "gelu_fast": "gelu_tanh",
  "gelu_python": "gelu",
  "swish": "silu",
}


def activation(fields: Fields, name: str) -> str:
  """Our name of the activation in a field."""
  return ACTIVATIONS[fields.choice(name, ACTIVATIONS)]


def activation_name(ours: str) -> str:
  """The published name of an activation of ours.

  Raises:
    ValueError: for one that has none.
  """
  names = {value: name for name, value in reversed(ACTIVATIONS.items())}
  if ours not in names:
    raise ValueError(f"activation {ours!r}; allowed: {', '.join(names)}")
  return names[ours]


def width(fields: Fields, total: str, heads: str) -> int:
  """The width of a head where all together are as wide as the model."""
  size, number = fields.integer(total), fields.integer(heads)
  if size % number:
    raise fields.wrong(heads, f"divisors of {total}={size}")
  return size // number


def first_layer(config: TransformerConfig, family: str, mixer: type, *ffns: type) -> tuple:
  """Mixer and feed-forward of the first layer, of the only kinds that the family can save.

  Raises:
    ValueError: naming the first layer that has another kind.
  """
  if not config.layers:
    raise ValueError(f"layers: none; the layout of family {family!r} has at least one")
  for i, spec in enumerate(config.layers):
    check_kind(f"layers[{i}].mixer", spec.mixer, family, (mixer,))
    check_kind(f"layers[{i}].ffn", spec.ffn, family, ffns)
  return config.layers[0].mixer, config.layers[0].ffn


def check_kind(place: str, value: Any, family: str, kinds: tuple[type, ...]) -> None:
  """Raises ValueError for a module of another kind than a family can save at a place."""
  if type(value) not in kinds:
    names = " or ".join(kind.__name__ for kind in kinds)
    raise ValueError(
      f"{place} is {type(value).__name__}; the layout of family {family!r} holds {names} there"
    )


def eps(config: TransformerConfig) -> Any:
  """The epsilon of the norms, None where they have none."""
  return getattr(config.norm, "eps", None)
