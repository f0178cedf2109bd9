"""The registry of the survey: a technique is a row here, and a new one appears by being added.

Rows of the first kind treat the pretrained model as it is. Rows with `against` train a small model
within the budget of a study, because a model that was trained without them cannot show what they
are worth; each stands against another trained row, with what is expected of the two.
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
from effjax.peft import lora
from experiments.lab.budget import Spending
from experiments.lab.study import Run, Study
from experiments.lab.subject import Subject
from experiments.moe.mixtures import sparse
from experiments.peft.methods import METHODS

KERNELS = r"(query|key|value|out|up|gate|down)/kernel$"


@dataclasses.dataclass(frozen=True)
class Technique:
  """A row.

  Attributes:
    name: how `--config.techniques` calls it.
    kind: which of the seven kinds of thing it is.
    make: (subject, key) → Subject; of a trained row, study → Run.
    same_function: whether the model computes the same as before, at the start.
    against: the trained row that this one is compared with; itself for the baseline of them.
    better: whether it is expected to predict better than that.
  """

  name: str
  kind: str
  make: Callable[..., Any]
  same_function: bool = False
  against: str | None = None
  better: bool = True

  @property
  def trained(self) -> bool:
    return self.against is not None


def masked(mask: masks.Mask, every: int = 1) -> Callable[[Subject, Key], Subject]:
  """Puts `mask` into every `every`-th layer."""

  def make(subject: Subject, key: Key) -> Subject:
    return subject.with_layers(lambda i, spec: spec if i % every else _with_mask(spec, mask))

  return make


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


def nf4(subject: Subject, key: Key) -> Subject:
  """Every matrix in NF4, its scales quantised again, and the token table in int8."""
  params = quant.quantize(subject.params, "nf4", targets=KERNELS, double=True)
  params = quant.quantize(params, targets=r"\bembedding$")
  return dataclasses.replace(subject, params=params)


def lora_over(base: Callable[[Subject, Key], Subject]) -> Callable[[Subject, Key], Subject]:
  """LoRA over a quantised base; over NF4 it is QLoRA."""
  return lambda subject, key: with_lora(8)(base(subject, key), key)


def upcycled(experts: int, every: int = 1) -> Callable[[Subject, Key], Subject]:
  """The MLP of every `every`-th layer copied into `experts` experts, two for each token."""

  def make(subject: Subject, key: Key) -> Subject:
    layers = range(0, len(subject.config.layers), every)
    config, params = moe.upcycle(
      subject.config, subject.params, key, experts=experts, top_k=2, layers=layers
    )
    return dataclasses.replace(subject, config=config, params=params)

  return make


def run_dense(study: Study) -> Run:
  """The baseline of the trained rows."""
  return Run(study.fresh(study.dense))


def run_window(study: Study) -> Run:
  """Each token sees the last 16 only."""
  mask = masks.SlidingWindow(15, 0)
  specs = tuple(_with_mask(spec, mask) for spec in study.dense.layers)
  return Run(study.fresh(dataclasses.replace(study.dense, layers=specs)))


def run_moe(study: Study) -> Run:
  """Eight experts of half the width, two for each token: the FLOPs of one MLP."""
  return Run(study.fresh(sparse(study.dense, moe.TopK(8, 2), 2)))


def run_switch(study: Study) -> Run:
  """As many parameters in four experts of the full width, one for each token, if it has room."""
  return Run(study.fresh(sparse(study.dense, moe.Switch(4), 1)))


def run_hash(study: Study) -> Run:
  """As the last, but a token's expert is drawn once and for all, by its id (Roller et al.)."""
  return Run(study.fresh(sparse(study.dense, moe.Hash(4, study.dense.vocab_size), 1)))


def run_fine(study: Study) -> Run:
  """As many in sixteen of a quarter, four for each token, one of them always (DeepSeekMoE)."""
  return Run(study.fresh(sparse(study.dense, moe.TopK(15, 3), 4, shared=1)))


def run_half_depth(study: Study) -> Run:
  """Half the layers, for as many more steps."""
  return Run(study.fresh(study.rung.config(max(1, study.rung.layers // 2))))


def run_distilled(study: Study) -> Run:
  """Half the layers, taught by the dense baseline, whose own training is not counted."""
  student, teacher = (
    run_half_depth(study).subject,
    study.trained(TRAINED_BASELINE, run_dense(study)),
  )
  objective = kd_objective(student.module, teacher.module, teacher.params)
  extra = cost.flops(teacher.config, study.rung.length)
  return Run(student, objective, Spending(extra_flops=extra))


def run_continued(study: Study) -> Run:
  """Half the budget dense, then the same for the other half, on a schedule of its own."""
  return Run(study.dense_after(0.5), spending=Spending(spent=0.5), order=1)


def run_upcycled(study: Study) -> Run:
  """Half the budget dense, then every MLP becomes four experts for the other half."""
  start = study.each(upcycled(4), study.dense_after(0.5))
  return Run(start, spending=Spending(spent=0.5), order=1)


def run_lora(study: Study) -> Run:
  """Half the budget dense, then only LoRA of rank 8 for the other half."""
  start = study.each(with_lora(8), study.dense_after(0.5))
  plain, length = cost.flops(start.config, study.rung.length), study.rung.length
  factors = cost.flops(start.config, length, start.at(0).params) - plain
  return Run(start, spending=Spending(spent=0.5, passes=2.0, extra_flops=3 * factors), order=1)


BASELINE, TRAINED_BASELINE = "dense", "trained-dense"
HALF, CONTINUED = "trained-half-depth", "trained-continued"
MIXTURE, SWITCH = "trained-moe-8x2", "trained-switch-4x1"

TECHNIQUES = (
  Technique(BASELINE, "baseline", lambda subject, key: subject, same_function=True),
  Technique("bf16", "weights", bf16),
  Technique("int8", "weights", int8),
  Technique("lora-r8", "weights", with_lora(8), same_function=True),
  Technique("lora-r8-merged", "weights", with_lora(8, merged=True), same_function=True),
  Technique("int8-lora-r8", "weights", lora_over(int8)),
  Technique("ia3", "weights", METHODS["ia3"], same_function=True),
  Technique("houlsby-32", "transform", METHODS["houlsby"]),
  Technique("prefix-16", "transform", METHODS["prefix"]),
  Technique("nf4", "weights", nf4),
  Technique("window-128", "mask", masked(masks.SlidingWindow(127, 0))),
  Technique("window-128-alternating", "mask", masked(masks.SlidingWindow(127, 0), every=2)),
  Technique("upcycled-4x2", "transform", upcycled(4, every=3), same_function=True),
  Technique(TRAINED_BASELINE, "baseline", run_dense, against=TRAINED_BASELINE),
  Technique("trained-window-16", "mask", run_window, against=TRAINED_BASELINE, better=False),
  Technique(MIXTURE, "ffn", run_moe, against=TRAINED_BASELINE),
  Technique(SWITCH, "ffn", run_switch, against=MIXTURE, better=False),
  Technique("trained-hash-4x1", "ffn", run_hash, against=SWITCH),
  Technique("trained-fine-15x3+1", "ffn", run_fine, against=MIXTURE),
  Technique(HALF, "baseline", run_half_depth, against=TRAINED_BASELINE, better=False),
  Technique("trained-distilled", "objective", run_distilled, against=HALF),
  Technique(CONTINUED, "baseline", run_continued, against=TRAINED_BASELINE, better=False),
  Technique("trained-upcycled-4x2", "transform", run_upcycled, against=CONTINUED),
  Technique("trained-lora-r8", "weights", run_lora, against=CONTINUED, better=False),
)
NAMED = {technique.name: technique for technique in TECHNIQUES}
