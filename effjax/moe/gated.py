"""Feed-forward layers in whose outputs learned gates have a say, beside or inside a mixture."""

import flax.linen as nn
import jax
import jax.numpy as jnp

from effjax.core.typing import Array, Float
from effjax.layers import Context, Linear, without_padding
from effjax.layers.axes import linear_axes, renamed, under
from effjax.layers.meshes import on_any_mesh
from effjax.layers.spec import ask, share


class Gated(nn.Module):
  """sigmoid(x w) · inner(x): one number for each token says how much of `inner` it gets.

  As `MoE.shared` it is the shared expert of Qwen2-MoE (arXiv 2407.10671, section 2.2.2).
  Parameters: "gate", a kernel [D, 1]; "inner", the layer's.

  Attributes:
    inner: a feed-forward module.

  Example:
    >>> from effjax.layers import MLP
    >>> layer, x = Gated(MLP(1, "relu")), jnp.ones((1, 1, 1))
    >>> params = {"gate": {"kernel": jnp.zeros((1, 1))}}
    >>> params["inner"] = {name: {"kernel": jnp.full((1, 1), 2.0)} for name in ("up", "down")}
    >>> layer.apply({"params": params}, x).tolist()
    [[[2.0]]]
  """

  inner: nn.Module

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    return jax.nn.sigmoid(Linear(1, name="gate")(x)) * self.inner(x, context)

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that `inner` reads."""
    return set(getattr(self.inner, "reads", ()))

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: those of `inner`, and the gate's."""
    return 2.0 * width + self.inner.flops(width, length, queries)

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses."""
    return share({"inner": self.inner}, path)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    inner = under("inner", ask(self.inner, "axes", "Gated: inner"))
    return inner | linear_axes("gate", "embed", "gate")


class ResidualMoE(nn.Module):
  """c₀ · mixture(x) + c₁ · mlp(x) with c = softmax(x W + b), in float32, of each token.

  The Residual-MoE of DeepSpeed-MoE (Rajbhandari et al., arXiv 2201.05596, section 4.1.2): every
  token visits the MLP, and an expert corrects it, so that top-1 costs and does what top-2 would.
  With more experts in deeper layers, which is a matter of the model's list of layers, it is
  PR-MoE. Parameters: "mixture", "mlp", theirs; "coefficient", a kernel [D, 2] and a bias [2].

  Attributes:
    mixture: a `MoE`, in the paper with a top-1 router.
    mlp: the feed-forward module that every token visits.
  """

  mixture: nn.Module
  mlp: nn.Module

  @on_any_mesh
  @nn.compact
  @without_padding
  def __call__(
    self, x: Float[Array, "B T D"], context: Context = Context()
  ) -> Float[Array, "B T D"]:
    logits = Linear(2, use_bias=True, name="coefficient")(x.astype(jnp.float32))
    first, second = jnp.split(jax.nn.softmax(logits, axis=-1).astype(x.dtype), 2, axis=-1)
    return first * self.mixture(x, context) + second * self.mlp(x, context)

  @property
  def reads(self) -> set[str]:
    """The fields of `Context` that its parts read."""
    return {name for part in (self.mixture, self.mlp) for name in getattr(part, "reads", ())}

  def flops(self, width: int, length: int, queries: int | None = None) -> float:
    """Matrix-product FLOPs a token, forward: those of both, and of the coefficients."""
    sizes = (width, length, queries)
    return 4.0 * width + self.mixture.flops(*sizes) + self.mlp.flops(*sizes)

  def share(self, path: str) -> float:
    """The share of the parameter at `path` that one token uses."""
    return share({"mixture": self.mixture, "mlp": self.mlp}, path)

  @property
  def axes(self) -> dict[str, tuple[str, ...]]:
    """The roles of its parameters' axes, see `effjax.layers.axes`."""
    stated = lambda name: under(name, ask(getattr(self, name), "axes", f"ResidualMoE: {name}"))
    mlp = renamed(stated("mlp"), hidden="residual_hidden")
    return stated("mixture") | mlp | linear_axes("coefficient", "embed", "branches", use_bias=True)
