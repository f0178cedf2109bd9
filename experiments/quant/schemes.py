"""The schemes of quantisation that are compared: a new one appears by being added here."""

import dataclasses
import functools
from collections.abc import Callable, Mapping

from effjax import quant
from effjax.core.typing import PyTree
from effjax.layers import capture, reductions
from effjax.layers.reductions import Reduction
from experiments.lab.subject import Subject

LINEAR = r"(query|key|value|out|up|gate|down)/kernel$"
TABLE = r"\bembedding$"
BASELINE = "float32"


class Seen:
  """What goes into the linear layers of a model over a text; each statistic is taken once."""

  def __init__(self, subject: Subject, batches: list[dict]):
    self._subject, self._batches = subject, batches
    self._of = functools.cache(self._captured)

  def __call__(self, reduce: Reduction) -> Mapping:
    return self._of(reduce)

  def _captured(self, reduce: Reduction) -> Mapping:
    module, params = self._subject.module, self._subject.params
    layer = LINEAR.replace("/kernel", "")
    return capture(module, params, self._batches, reduce=reduce, select=layer)


@dataclasses.dataclass(frozen=True)
class Scheme:
  """A row.

  Attributes:
    name: how `--config.schemes` calls it.
    kind: what the plots tell it by.
    change: (params, seen) → params with the linear layers quantised.
  """

  name: str
  kind: str
  change: Callable[[PyTree, Seen], PyTree]

  def __call__(self, subject: Subject, seen: Seen, table: str | None) -> Subject:
    """The model with its linear layers in this scheme, and its table quantised by `table`."""
    params = self.change(subject.params, seen)
    if table is not None and self.name != BASELINE:
      params = quant.quantize(params, table, targets=TABLE)
    return Subject(subject.config, params)


def nearest(method: str, **options) -> Callable[[PyTree, Seen], PyTree]:
  """Each weight to the nearest that the method has."""
  return lambda params, seen: quant.quantize(params, method, targets=LINEAR, **options)


def gptq(method: str, **options) -> Callable[[PyTree, Seen], PyTree]:
  return lambda params, seen: quant.gptq(params, seen(reductions.gram), method, **options)


def awq(method: str, **options) -> Callable[[PyTree, Seen], PyTree]:
  def change(params, seen):
    magnitudes = seen(reductions.mean_magnitude)
    return quant.awq(params, seen(reductions.gram), magnitudes, method, **options)

  return change


def qmoe(params: PyTree, seen: Seen) -> PyTree:
  return quant.qmoe(params, seen(reductions.gram))


def smooth(params: PyTree, seen: Seen) -> PyTree:
  return quant.smoothquant(params, seen(reductions.absmax))


EIGHT, FOUR, THREE, CALIBRATED = "8 bits", "4 bits, nearest", "ternary, nearest", "calibrated"
SCHEMES = {
  scheme.name: scheme
  for scheme in (
    Scheme(BASELINE, "baseline", lambda params, seen: params),
    Scheme("int8", EIGHT, nearest("int8")),
    Scheme("int8-dynamic", EIGHT, nearest("int8dynamic")),
    Scheme("llm-int8", EIGHT, nearest("llmint8")),
    Scheme("smoothquant", CALIBRATED, smooth),
    Scheme("int4", FOUR, nearest("int4")),
    Scheme("int4-affine", FOUR, nearest("int4affine")),
    Scheme("nf4", FOUR, nearest("nf4")),
    Scheme("nf4-double", FOUR, nearest("nf4", double=True)),
    Scheme("fp4", FOUR, nearest("fp4")),
    Scheme("palette", FOUR, nearest("palette")),
    Scheme("q4_0", FOUR, nearest("gguf", type="Q4_0")),
    Scheme("int4-gptq", CALIBRATED, gptq("int4")),
    Scheme("int4-awq", CALIBRATED, awq("int4")),
    Scheme("nf4-gptq", CALIBRATED, gptq("nf4")),
    Scheme("ternary", THREE, nearest("ternary")),
    Scheme("ternary-qmoe", CALIBRATED, qmoe),
  )
}
