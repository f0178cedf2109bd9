"""Reading configuration dicts and layer specs with errors that name the field."""

from collections.abc import Mapping
from typing import Any

from effjax.layers import Rope
from effjax.layers.spec import TransformerConfig

ACTIVATIONS = {
  "silu": "silu",
  "relu": "relu",
  "gelu": "gelu",
  "gelu_new": "gelu_tanh",
  "gelu_pytorch_tanh": "gelu_tanh",
}


def field(config: Mapping[str, Any], name: str):
  """`config[name]`.

  Raises:
    ValueError: when the field is missing.
  """
  if config.get(name) is None:
    raise ValueError(f"config: field {name!r} is missing")
  return config[name]


def need(config: Mapping[str, Any], name: str, default: Any, *allowed: Any) -> Any:
  """The field, or `default`, which must be one of `allowed` (`default` alone if none are given).

  Raises:
    ValueError: for another value, since ignoring it would compute something else.
  """
  value, allowed = config.get(name, default), allowed or (default,)
  if value not in allowed:
    raise ValueError(f"config: {name}={value!r}; allowed: {', '.join(map(repr, allowed))}")
  return value


def activation(config: Mapping[str, Any], name: str, default: str) -> str:
  """Our name of the activation in a field."""
  return ACTIVATIONS[need(config, name, default, *ACTIVATIONS)]


def activation_name(ours: str) -> str:
  """The published name of an activation of ours."""
  names = {value: name for name, value in ACTIVATIONS.items()}
  if ours not in names:
    raise ValueError(f"activation {ours!r}; allowed: {', '.join(names)}")
  return names[ours]


def rope(parameters: Mapping[str, Any] | None, theta: float) -> Rope:
  """Rotary positions of `rope_scaling` or `rope_parameters`; `theta` is the base if they lack it.

  Raises:
    ValueError: for a kind of scaling other than none and linear.
  """
  parameters = parameters or {}
  kind = parameters.get("rope_type", parameters.get("type", "default"))
  if kind not in ("default", "linear"):
    raise ValueError(f"config: rope_type={kind!r}; allowed: 'default', 'linear'")
  need(parameters, "partial_rotary_factor", 1.0, None, 1.0)
  return Rope(float(parameters.get("rope_theta", theta)), float(parameters.get("factor", 1.0)))


def rope_scaling(value: Rope) -> dict[str, Any] | None:
  """The `rope_scaling` field of a `Rope`."""
  return None if value.factor == 1.0 else {"rope_type": "linear", "factor": value.factor}


def first_layer(config: TransformerConfig, family: str, mixer: type, ffn: type) -> tuple:
  """Mixer and feed-forward of the first layer, of the only kinds that the family can save.

  Raises:
    ValueError: naming the first layer that has another kind.
  """
  if not config.layers:
    raise ValueError(f"layers: none; the layout of family {family!r} has at least one")
  for i, spec in enumerate(config.layers):
    for place, value, kind in (("mixer", spec.mixer, mixer), ("ffn", spec.ffn, ffn)):
      if type(value) is not kind:
        raise ValueError(
          f"layers[{i}].{place} is {type(value).__name__}; the layout of family {family!r} "
          f"holds {kind.__name__} there"
        )
  return config.layers[0].mixer, config.layers[0].ffn
