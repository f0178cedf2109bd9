"""The registry of the survey: a technique is a row here, and a new one appears by being added.

Rows of the first kind treat the pretrained model as it is. Rows with `needs_training` are short
runs of a small model from scratch, because a model that was trained without them cannot show what
they are worth.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from effjax import cost, moe, quant
from effjax.attention import masks
from effjax.core.typing import Key
from effjax.distill import kd_objective
from effjax.layers import stack
from effjax.peft import lora
from experiments.lab.short_runs import Lab, Run
from experiments.lab.subject import Subject

KERNELS = r"(query|key|value|out|up|gate|down)/kernel$"


@dataclasses.dataclass(frozen=True)
class Technique:
  """A row.

  Attributes:
    name: how `--config.techniques` calls it.
    kind: which of the seven kinds of thing it is.
    make: (subject, key) → Subject; with `needs_training`, (lab, seed) → Run.
    needs_training: whether it is a short run of a small model.
    same_function: whether the model computes the same as before, at the start.
  """

  name: str
  kind: str
  make: Callable[[Any, Any], Any]
  needs_training: bool = False
  same_function: bool = False


def masked(mask: masks.Mask, every: int = 1) -> Callable[[Subject, Key], Subject]:
  """Puts `mask` into every `every`-th layer."""

  def make(subject: Subject, key: Key) -> Subject:
    return with_layers(subject, lambda i, spec: _with_mask(spec, mask) if i % every == 0 else spec)

  return make


def with_layers(subject: Subject, change: Callable) -> Subject:
  """The subject with `change(index, spec)` as its layers, their parameters regrouped."""
  keep = lambda index, spec, tree: (change(index, spec), tree)
  config, params = stack.change(subject.config, subject.params, keep)
  return dataclasses.replace(subject, config=config, params=params)


def _with_mask(spec, mask: masks.Mask):
  return dataclasses.replace(spec, mixer=spec.mixer.clone(mask=mask))


def bf16(subject: Subject, key: Key) -> Subject:
  """Every parameter in bfloat16; activations stay float32."""
  params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), subject.params)
  return dataclasses.replace(subject, params=params)


def int8(subject: Subject, key: Key) -> Subject:
  """Every matrix and the token table in int8, a scale for each output channel or row."""
  return dataclasses.replace(subject, params=quant.quantize(subject.params))


def with_lora(rank: int, *, merged: bool = False) -> Callable[[Subject, Key], Subject]:
  """LoRA of `rank` on every matrix, at its start or multiplied out again."""

  def make(subject: Subject, key: Key) -> Subject:
    params = lora.add(subject.params, key, rank=rank, targets=KERNELS)
    return dataclasses.replace(subject, params=lora.merge(params) if merged else params)

  return make


def int8_lora(subject: Subject, key: Key) -> Subject:
  """LoRA over an int8 base."""
  return with_lora(8)(int8(subject, key), key)


def upcycled(experts: int, every: int = 1) -> Callable[[Subject, Key], Subject]:
  """The MLP of every `every`-th layer copied into `experts` experts, two for each token."""

  def make(subject: Subject, key: Key) -> Subject:
    layers = range(0, len(subject.config.layers), every)
    config, params = moe.upcycle(
      subject.config, subject.params, key, experts=experts, top_k=2, layers=layers
    )
    return dataclasses.replace(subject, config=config, params=params)

  return make


def run_dense(lab: Lab, seed: int) -> Run:
  """The baseline of the short runs."""
  return Run(lab.fresh(lab.dense, seed))


def run_window(lab: Lab, seed: int) -> Run:
  """Each token sees the last 16 only."""
  mask = masks.SlidingWindow(15, 0)
  specs = tuple(_with_mask(spec, mask) for spec in lab.dense.layers)
  return Run(lab.fresh(dataclasses.replace(lab.dense, layers=specs), seed))


def run_moe(lab: Lab, seed: int) -> Run:
  """Eight experts of half the width, two for each token: the FLOPs of one MLP."""

  def sparse(spec):
    mlp = spec.ffn
    experts = moe.MoE(moe.TopK(8, 2), mlp.clone(width=mlp.width // 2))
    return dataclasses.replace(spec, ffn=experts)

  specs = tuple(sparse(spec) for spec in lab.dense.layers)
  return Run(lab.fresh(dataclasses.replace(lab.dense, layers=specs), seed))


def run_upcycled(lab: Lab, seed: int) -> Run:
  """Half the budget dense, then every MLP becomes four experts for the other half."""
  start = lab.dense_after(0.5, seed)
  return Run(upcycled(4)(start, jax.random.key(seed)), spent=0.5, learning_rate=2e-3)


def run_lora(lab: Lab, seed: int) -> Run:
  """Half the budget dense, then only LoRA of rank 8 for the other half."""
  start = with_lora(8)(lab.dense_after(0.5, seed), jax.random.key(seed))
  return Run(start, spent=0.5, passes=2.0)


def run_half_depth(lab: Lab, seed: int) -> Run:
  """Half the layers, for as many more steps."""
  return Run(lab.fresh(lab.config(max(1, lab.shape.layers // 2)), seed))


def run_distilled(lab: Lab, seed: int) -> Run:
  """Half the layers, taught by the dense baseline, whose own training is not counted."""
  student, teacher = run_half_depth(lab, seed).subject, lab.dense_after(1.0, seed)
  objective = kd_objective(student.module, teacher.module, teacher.params)
  extra = cost.flops(teacher.config, length=lab.shape.length)
  return Run(student, objective=objective, extra_flops=extra)


BASELINE, TRAINED_BASELINE = "dense", "trained-dense"

TECHNIQUES = (
  Technique(BASELINE, "baseline", lambda subject, key: subject, same_function=True),
  Technique("bf16", "weights", bf16),
  Technique("int8", "weights", int8),
  Technique("lora-r8", "weights", with_lora(8), same_function=True),
  Technique("lora-r8-merged", "weights", with_lora(8, merged=True), same_function=True),
  Technique("int8-lora-r8", "weights", int8_lora),
  Technique("window-128", "mask", masked(masks.SlidingWindow(127, 0))),
  Technique("window-128-alternating", "mask", masked(masks.SlidingWindow(127, 0), every=2)),
  Technique("upcycled-4x2", "transform", upcycled(4, every=3), same_function=True),
  Technique(TRAINED_BASELINE, "baseline", run_dense, needs_training=True),
  Technique("trained-window-16", "mask", run_window, needs_training=True),
  Technique("trained-moe-8x2", "ffn", run_moe, needs_training=True),
  Technique("trained-upcycled-4x2", "transform", run_upcycled, needs_training=True),
  Technique("trained-lora-r8", "weights", run_lora, needs_training=True),
  Technique("trained-half-depth", "baseline", run_half_depth, needs_training=True),
  Technique("trained-distilled", "objective", run_distilled, needs_training=True),
)
