"""Several LoRAs as one: sums, concatenation, truncated SVD, TIES and DARE.

TIES: Yadav et al., arXiv 2306.01708, section 3. DARE: Yu et al., arXiv 2311.03099, section 3.2.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from effjax.core import trees
from effjax.core.known import number
from effjax.core.typing import Array, Float, Key, PyTree, Scalar, Size
from effjax.peft.beside import is_adapter
from effjax.peft.detached import attach, detach
from effjax.peft.low_rank import LoRA
from effjax.peft.members import family, is_same


class _Rule(NamedTuple):
  """A weighted sum of tensors: what is kept of each, and whether signs are elected."""

  keep: str | None = None
  elect: bool = False


RULES = {
  "linear": _Rule(),
  "magnitude_prune": _Rule("largest"),
  "ties": _Rule("largest", elect=True),
  "dare_linear": _Rule("random"),
  "dare_ties": _Rule("random", elect=True),
}
OF_PRODUCTS = {"svd" if name == "linear" else f"{name}_svd": rule for name, rule in RULES.items()}
METHODS = ("cat", *RULES, *OF_PRODUCTS)
SIGNS = {"total": lambda x: x, "frequency": jnp.sign}


def combine(
  adapters: Sequence[PyTree],
  weights: Sequence[Scalar] | Float[Array | np.ndarray, "n"],
  *,
  method: str = "cat",
  rank: Size | None = None,
  density: Scalar | None = None,
  sign: str = "total",
  key: Key | None = None,
) -> PyTree:
  """One LoRA at each path, made of several with weights w_i; −1 negates.

  "cat" is exact: A = [w₁s₁A₁, w₂s₂A₂, …], B = [B₁; B₂; …], the ranks added up. "svd" is the best
  approximation of Σ wᵢsᵢAᵢBᵢ that has `rank`, exact from the sum of the ranks on; Aᵀ A = I.
  The other rules mix A's with A's and B's with B's, with √|wᵢsᵢ| each and the sign of wᵢ on A, and
  are not linear in the products. With each tensor t:
    "linear" Σ wᵢtᵢ;
    "magnitude_prune" keeps the ⌊density · size⌋ largest of |tᵢ| first;
    "ties" keeps those, elects the sign of Σ tᵢ for each entry (+ for 0), and is Σ wᵢtᵢ over
    those of that sign, divided by how many there are;
    "dare_linear" keeps each entry with probability `density`, divides it by that, and sums;
    "dare_ties" does so and elects signs.
  With "_svd" after its name a rule mixes the products sᵢAᵢBᵢ with weights wᵢ, the scale once, and
  an SVD makes factors of `rank`. Stacked layers and experts are combined one by one.

  Args:
    adapters: parameter trees over the same base, that of the first being kept, or what `detach`
      takes off them; one that has nothing at a path adds nothing there.
    weights: wᵢ, one for each; may be traced.
    method: "cat", "svd", "linear", "ties", "dare_linear", "dare_ties", "magnitude_prune", or
      "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd".
    rank: of what an SVD gives, 1 … min(D, F); None is the largest of the ranks.
    density: the share that is kept, 0 < density ≤ 1, where something is pruned.
    sign: what is summed to elect one: "total" the values, "frequency" their signs.
    key: PRNG key of DARE's draws.

  Returns:
    A tree, or path → LoRA, as the adapters are given; scales are 1, dropout is the first's.

  Raises:
    ValueError: for adapters of another kind than LoRA or several at a path, factors that do not
      fit, weights that are not one for each, and for options that are out of range, missing, or
      of another method.

  Example:
    >>> from effjax.peft import lora
    >>> params = {"kernel": jnp.ones((3, 4))}
    >>> fr, de = (lora.add(params, jax.random.key(i), rank=i, targets="kernel") for i in (1, 2))
    >>> combine([fr, de], [0.7, 0.3])["kernel"].rank, combine([fr], [-1], method="svd")["kernel"]
    (3, LoRA[3, 4] float32)
  """
  _check(method, rank=rank, density=density, sign=sign, key=key)
  weights = _numbers(adapters, weights)
  found = [family(f"number {i}", adapter) for i, adapter in enumerate(adapters)]
  paths = dict.fromkeys(path for each in found for path in each)
  base = None if _is_detached(adapters[0]) else detach(adapters[0])[0]
  bases = {} if base is None else trees.items(base)

  def at(path: str) -> LoRA:
    shares = [w for w, each in zip(weights, found, strict=True) if path in each]
    loras = [each[path] for each in found if path in each]
    _check_alike(path, loras, bases.get(path, loras[0].base), method, rank)
    draw = None if key is None else trees.path_key(key, path)
    mix = functools.partial(_mixed, density=density, sign=sign, key=draw)
    a, b = _combined(shares, loras, method, rank, mix)
    scale = jnp.ones(loras[0].scale.shape, jnp.float32)
    return dataclasses.replace(loras[0], base=None, a=a, b=b, scale=scale)

  combined = {path: at(path) for path in paths}
  return combined if base is None else attach(base, combined)


def _combined(
  weights: Sequence[Any], loras: Sequence[LoRA], method: str, rank: Size | None, mix: Callable
) -> tuple[Array, Array]:
  """Factors [..., D, r], [..., r, F] of the combination, whose scale is 1."""
  shares = [w * lora.scale for w, lora in zip(weights, loras, strict=True)]
  if method in RULES:
    root = [jnp.sqrt(jnp.abs(share)) for share in shares]
    signed = [jnp.where(share < 0, -x, x) for share, x in zip(shares, root, strict=True)]
    a = mix(RULES[method], [lora.a for lora in loras], signed, 0)
    return a, mix(RULES[method], [lora.b for lora in loras], root, 1)
  rank = rank or max(lora.rank for lora in loras)
  if method in OF_PRODUCTS and method != "svd":
    product = mix(OF_PRODUCTS[method], [lora.delta() for lora in loras], weights, 0)
    *lead, _, F = product.shape
    return truncated(product, jnp.broadcast_to(jnp.eye(F), (*lead, F, F)), rank)
  a = jnp.concatenate([lora.a * share for lora, share in zip(loras, shares, strict=True)], -1)
  b = jnp.concatenate([lora.b for lora in loras], -2)
  return (a, b) if method == "cat" else truncated(a, b, rank)


def truncated(
  a: Float[Array, "... D r"], b: Float[Array, "... r F"], rank: Size
) -> tuple[Float[Array, "... D k"], Float[Array, "... k F"]]:
  """The factors U, S Vᵀ of the best approximation of A B that has `rank`, filled with zeros.

  The SVD is that of the small product R_A R_Bᵀ, where A = Q_A R_A and Bᵀ = Q_B R_B.

  Example:
    >>> a, b = truncated(jnp.eye(3), jnp.diag(jnp.array([1.0, 3.0, 2.0])), 2)
    >>> jnp.diag(a @ b).tolist()
    [0.0, 3.0, 2.0]
  """
  (left, r_a), (right, r_b) = jnp.linalg.qr(a), jnp.linalg.qr(jnp.matrix_transpose(b))
  times = functools.partial(jnp.matmul, precision=jax.lax.Precision.HIGHEST)
  u, s, vt = jnp.linalg.svd(times(r_a, jnp.matrix_transpose(r_b)), full_matrices=False)
  vt = s[..., None] * times(vt, jnp.matrix_transpose(right))
  u, vt = times(left, u)[..., :rank], vt[..., :rank, :]
  lack = [(0, rank - u.shape[-1])]
  none = [(0, 0)]
  lead = none * (u.ndim - 2)
  return jnp.pad(u, lead + none + lack), jnp.pad(vt, lead + lack + none)


def _mixed(
  rule: _Rule,
  tensors: Sequence[Array],
  weights: Sequence[Any],
  part: int,
  *,
  density: Scalar | None,
  sign: str,
  key: Any,
) -> Array:
  """The sum by `rule` of tensors [..., D, F] with weights; `part` tells draws apart."""
  if rule.keep == "largest":
    tensors = [_largest(x, density) for x in tensors]
  if rule.keep == "random":
    keys = jax.random.split(jax.random.fold_in(key, part), len(tensors))
    tensors = [_drawn(x, density, each) for x, each in zip(tensors, keys, strict=True)]
  x = jnp.stack(tensors)
  weighted = x * jnp.stack([jnp.broadcast_to(w, x[0].shape) for w in weights])
  if not rule.elect:
    return weighted.sum(0)
  elected = jnp.where(SIGNS[sign](x).sum(0, keepdims=True) >= 0, 1, -1)
  agree = jnp.sign(x) == elected
  return jnp.where(agree, weighted, 0).sum(0) / jnp.maximum(agree.sum(0), 1)


def _largest(x: Float[Array, "... D F"], density: Any) -> Array:
  """x with zeros in all but the ⌊density · D F⌋ largest entries of each matrix."""
  flat = jnp.abs(x).reshape(*x.shape[:-2], -1)
  place = jnp.argsort(jnp.argsort(flat, axis=-1, descending=True), axis=-1).reshape(x.shape)
  return jnp.where(place < int(density * flat.shape[-1]), x, 0)


def _drawn(x: Array, density: Any, key: Key) -> Array:
  return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)


def _is_detached(adapter: PyTree) -> bool:
  leaves = trees.items(adapter).values()
  return all(is_adapter(leaf) and leaf.base is None for leaf in leaves)


def _check_alike(
  path: str, loras: Sequence[LoRA], base: Any, method: str, rank: Size | None
) -> None:
  """Raises ValueError where the factors at a path cannot be combined over `base`."""
  for lora in loras:
    if type(lora) is not LoRA:
      raise ValueError(f"adapters: {type(lora).__name__} at {path}; allowed: plain LoRA")
  shapes = [(*lora.a.shape[:-1], lora.b.shape[-1]) for lora in loras]
  if len(set(shapes)) > 1:
    raise ValueError(f"adapters: at {path} they are of matrices {shapes}; allowed: one shape")
  if not all(is_same(lora.base, base) for lora in loras):
    raise ValueError(f"adapters: over several bases at {path}; allowed: one, or what detach gives")
  ranks = {lora.rank for lora in loras}
  if method in RULES and len(ranks) > 1:
    raise ValueError(
      f"method={method!r}: ranks {sorted(ranks)} at {path}; allowed: one rank, or 'cat', 'svd' "
      "and the methods of that ending"
    )
  most = min(shapes[0][-2:])
  if rank is not None and rank > most:
    raise ValueError(f"rank {rank} for {path} {shapes[0]}; allowed: 1 … {most}")


def _check(method: str, **given: Any) -> None:
  """Raises ValueError for a method that there is none of, and options that are not its own."""
  if method not in METHODS:
    raise ValueError(f"method={method!r}; allowed: {', '.join(METHODS)}")
  rule = {**RULES, **OF_PRODUCTS}.get(method, _Rule())
  if given["sign"] not in SIGNS:
    raise ValueError(f"sign={given['sign']!r}; allowed: {', '.join(SIGNS)}")
  needed = {"density": rule.keep is not None, "key": rule.keep == "random"}
  for name, wanted in needed.items():
    if (given[name] is not None) != wanted:
      allowed = "a value" if wanted else "None"
      raise ValueError(f"method={method!r} with {name}={given[name]}; allowed: {allowed}")
  if given["density"] is not None:
    number("density", given["density"], above=0, most=1)
  if given["rank"] is not None:
    if method not in OF_PRODUCTS:
      raise ValueError(f"method={method!r} with rank={given['rank']}; allowed: None")
    number("rank", given["rank"], integer=True, least=1)


def _numbers(adapters: Sequence[PyTree], weights: Any) -> list[Any]:
  if not len(adapters) or len(weights) != len(adapters):
    raise ValueError(f"weights: {len(weights)} of {len(adapters)}; allowed: one for each adapter")
  if len({_is_detached(each) for each in adapters}) > 1:
    raise ValueError("adapters: some with a base and some without; allowed: all alike")
  return [number("weights", w) for w in weights]
