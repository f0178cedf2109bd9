"""Whole programs of attention, as modules compile them, to count what each launches on a GPU.

    python -m scripts.checks.launches

A row for each target, program and mask. "attend" is the forward pass, "gradients" both passes,
"decode" one new token of a batch against a cache; of masks see `alone.MASKS`.
"""

import tempfile
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from absl import app

from effjax.attention import attend
from effjax.attention.masks import Causal
from scripts.checks import plugins
from scripts.checks.alone import MASKS, SCORES, Case
from scripts.checks.processes import Row, Worker, spread
from scripts.checks.targets import GPU, TARGETS, environment

PROGRAMS = ("attend", "gradients", "decode")
MEASURED = ("full", "causal", "window", "longformer", "bigbird", "drawn", "documents", "alibi")
DECODE = "bfloat16-128-causal/decode"
_BATCH, _KEYS, _HEADS, _GROUPS = 8, 4096, 32, 8


def jobs() -> list[str]:
  """CASE/PROGRAM, as `compile_target` is asked for them."""
  passes = PROGRAMS[:2]
  return [f"bfloat16-128-{mask}/{name}" for name in passes for mask in MEASURED] + [DECODE]


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

  attention = lambda *arguments: forward(*arguments[:5])
  return {"attend": attention, "gradients": gradients, "decode": decode}[name]


def rows(target: str) -> Iterator[Row]:
  """Launches of every program, by a process of its own."""
  with tempfile.TemporaryDirectory() as folder:
    command = ["scripts.checks.compile_target", target, folder, "", ""]
    worker = Worker(lambda: command, environment(target, folder, plugins.folder()))
    for job, found in spread([worker], jobs()):
      case, name = job.split("/")
      for row in found:
        yield {"target": target, "case": case, "program": name} | row


def main(_) -> None:
  plugins.install()
  for target in (name for name, device in TARGETS.items() if isinstance(device, GPU)):
    for row in rows(target):
      found = row.get("launches", row.get("error"))
      print(f"{target:6s}{row['case']:24s}{row['program']:12s}{found:>6}", flush=True)


if __name__ == "__main__":
  app.run(main)
