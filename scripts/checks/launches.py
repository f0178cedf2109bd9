"""Whole programs of attention, as modules compile them, to count what each launches on a GPU.

"attend" is the forward pass, "gradients" both passes, "decode" one new token of a batch against a
cache.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax.attention import attend
from effjax.attention.masks import Causal
from scripts.checks.alone import MASKS, SCORES, Case

PROGRAMS = ("attend", "gradients", "decode")
_BATCH, _KEYS, _HEADS, _GROUPS = 8, 4096, 32, 8


def programs(case: Case) -> tuple[str, ...]:
  """Those worth counting: types and widths change nothing, a mask's decoding little."""
  if (case.dtype, case.width, case.group) != ("bfloat16", 128, Case.group):
    return ()
  return PROGRAMS if case.mask == "causal" else PROGRAMS[:2]


def arguments(case: Case, name: str) -> tuple[Any, ...]:
  """Shapes and types of what a program takes."""
  if name != "decode":
    query, *others = case.arguments("forward")[:5]
    return query, *others, query
  array = lambda *shape: jax.ShapeDtypeStruct((_BATCH, *shape), case.dtype)
  cache = array(_KEYS, _GROUPS, case.width)
  at = jax.ShapeDtypeStruct((_BATCH, 1), jnp.int32)
  return array(1, _HEADS, case.width), cache, cache, at


def program(case: Case, name: str) -> Callable[..., Any]:
  """A function of `arguments`."""

  def forward(query, key, value, ids, table):
    options = SCORES.get(case.mask, lambda table: {})(table)
    return attend(query, key, value, mask=MASKS[case.mask](ids), implementation="gpu", **options)

  def gradients(query, key, value, ids, table, cotangent):
    out, pull = jax.vjp(lambda *x: forward(*x, ids, table), query, key, value)
    return out, pull(cotangent)

  def decode(query, key, value, at):
    return attend(query, key, value, mask=Causal(), query_positions=at, implementation="gpu")

  programs: dict[str, Callable[..., Any]] = {
    "attend": lambda *arguments: forward(*arguments[:5]),
    "gradients": gradients,
    "decode": decode,
  }
  return programs[name]
