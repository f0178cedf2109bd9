"""The lecture's table of mixture-of-experts designs, and what the models' own papers say besides.

The table follows Cai et al., "A Survey on Mixture of Experts", arXiv 2407.06204, Table 2, and is
here as it is printed, so that what cannot be true in it can be found by counting. What it leaves
out, as vocabularies and shared key-value heads, comes from the papers or published configurations.
"""

import dataclasses
import re
from typing import Any

# Reference, model, activated/all experts, model width, FFN, expert, layers, heads, head width,
# every how many-th layer is sparse, activation, shared experts.
PRINTED = """
  GShard         600B         2/2048  1024   8192   8192  36   16  128  2  ReLU    0
  GShard         200B         2/2048  1024   8192   8192  12   16  128  2  ReLU    0
  GShard         150B         2/512   1024   8192   8192  36   16  128  2  ReLU    0
  GShard         37B          2/128   1024   8192   8192  36   16  128  2  ReLU    0
  Switch         7B           1/128    768   2048   2048  12   12   64  2  GEGLU   0
  Switch         26B          1/128   1024   2816   2816  24   16   64  2  GEGLU   0
  Switch         395B         1/64    4096  10240  10240  24   64   64  2  GEGLU   0
  Switch         1571B        1/2048  2080   6144   6144  15   32   64  1  ReLU    0
  GLaM           0.1B/1.9B    2/64     768   3072   3072  12   12   64  2  GEGLU   0
  GLaM           1.7B/27B     2/64    2048   8192   8192  24   16  128  2  GEGLU   0
  GLaM           8B/143B      2/64    4096  16384  16384  32   32  128  2  GEGLU   0
  GLaM           64B/1.2T     2/64    8192  32768  32768  64  128  128  2  GEGLU   0
  DeepSpeed-MoE  350M/13B     2/128   1024   4096   4096  24   16   64  2  GELU    0
  DeepSpeed-MoE  1.3B/52B     2/128   2048   8192   8192  24   16  128  2  GELU    0
  DeepSpeed-MoE  PR-350M/4B   2/32    1024   4096   4096  24   16   64  2  GELU    1
  DeepSpeed-MoE  PR-1.3B/31B  2/64    2048   8192   8192  24   16  128  2  GELU    1
  ST-MoE         0.8B/4.1B    2/32    1024   2816   2816  27   16   64  4  GEGLU   0
  ST-MoE         32B/269B     2/64    5120  20480  20480  27   64  128  4  GEGLU   0
  Mixtral        13B/47B      2/8     4096  14336  14336  32   32  128  1  SwiGLU  0
  Mixtral        39B/141B     2/8     6144  16384  16384  56   48  128  1  SwiGLU  0
  LLaMA-MoE      3.0B/6.7B    2/16    4096  11008    688  32   32  128  1  SwiGLU  0
  LLaMA-MoE      3.5B/6.7B    4/16    4096  11008    688  32   32  128  1  SwiGLU  0
  LLaMA-MoE      3.5B/6.7B    2/8     4096  11008   1376  32   32  128  1  SwiGLU  0
  DeepSeekMoE    0.24B/1.89B  8/64    1280   3413    853   9   10  128  1  SwiGLU  1
  DeepSeekMoE    2.8B/16.4B   8/66    2048  10944   1408  28   16  128  1  SwiGLU  2
  DeepSeekMoE    22B/145B     16/132  4096  22528   1408  62   32  128  1  SwiGLU  4
  OpenMoE        339M/650M    2/16     768   3072   3072  12   12   64  4  SwiGLU  1
  OpenMoE        2.6B/8.7B    2/32    2048   8192   8192  24   24  128  6  SwiGLU  1
  OpenMoE        6.8B/34B     2/32    3072  12288  12288  32   24  128  4  SwiGLU  1
  Qwen1.5-MoE    2.7B/14.3B   8/64    2048   5632   1408  24   16  128  1  SwiGLU  4
  DBRX           36B/132B     4/16    6144  10752  10752  40   48  128  1  SwiGLU  0
  Jamba          12B/52B      2/16    4096  14336  14336  32   32  128  2  SwiGLU  0
  Skywork-MoE    22B/146B     2/16    4608  12288  12288  52   36  128  1  SwiGLU  0
  Yuan-2.0-M32   3.7B/40B     2/32    2048   8192   8192  24   16  256  1  SwiGLU  0
"""


@dataclasses.dataclass(frozen=True)
class Design:
  """One model of the table.

  Attributes:
    reference, model: what it is called; `model` is what is activated of how much.
    active: experts that a token visits.
    experts: of a sparse layer; several with the number of sparse layers of each, in a pyramid.
    width, ffn, expert: D, F of dense layers, F of an expert.
    layers: of each stack.
    heads, head_width: of attention.
    every: the last of so many layers is sparse.
    activation: of dense layers, and of experts unless `expert_activation` says otherwise.
    shared: experts that every token visits.
    vocab: entries of the token table.
    kv_heads: key-value heads; None means `heads`.
    stacks: 2 for an encoder and a decoder.
    tied: whether the head is the token table.
    counted: whether `active` and `experts` count the shared ones too.
    first_dense: layers that are dense whatever `every` says.
    extra: whether a feed-forward layer follows each sparse one (ST-MoE).
    gated: whether a gate weighs the shared experts (Qwen).
    residual: whether the shared expert is an MLP that is mixed with the others (PR-MoE), which
      `active` counts and `experts` does not.
    mamba: of so many layers one attends, and the others are Mamba's; 0 for none.
  """

  reference: str
  model: str
  active: int
  experts: int | tuple[tuple[int, int], ...]
  width: int
  ffn: int
  expert: int
  layers: int
  heads: int
  head_width: int
  every: int
  activation: str
  shared: int
  vocab: int = 0
  kv_heads: int | None = None
  stacks: int = 1
  tied: bool = True
  counted: bool = False
  first_dense: int = 0
  extra: bool = False
  gated: bool = False
  residual: bool = False
  mamba: int = 0
  expert_activation: str | None = None

  @property
  def claimed(self) -> tuple[float | None, float]:
    """The parameters that `model` says are activated, if it does, and there in all."""
    sizes = [float(x) * _UNITS[unit] for x, unit in re.findall(r"([\d.]+)([MBT])", self.model)]
    return (None, *sizes)[-2], sizes[-1]

  @property
  def name(self) -> str:
    """What tells it from the others."""
    experts = ((1, self.experts),) if isinstance(self.experts, int) else self.experts
    counts = (f"{self.active}/{count}" for _, count in experts)
    return f"{self.reference} {self.model} {'-'.join(counts)}"


_UNITS = {"M": 1e6, "B": 1e9, "T": 1e12}
_FIELDS = [field.name for field in dataclasses.fields(Design)]

# What is not in the table, of all models of a reference or of one.
FACTS: dict[str, dict[str, Any]] = {
  "GShard": {"vocab": 32_000, "stacks": 2},
  "Switch": {"vocab": 32_128, "stacks": 2},
  "GLaM": {"vocab": 256_000},
  "DeepSpeed-MoE": {"vocab": 50_304},
  "PR-350M/4B": {"experts": ((10, 32), (2, 64)), "residual": True},
  "PR-1.3B/31B": {"experts": ((10, 64), (2, 128)), "residual": True},
  "ST-MoE": {"vocab": 32_128, "stacks": 2, "extra": True},
  "Mixtral": {"vocab": 32_000, "kv_heads": 8, "tied": False},
  "39B/141B": {"vocab": 32_768},
  "LLaMA-MoE": {"vocab": 32_000, "tied": False},
  "DeepSeekMoE": {"vocab": 102_400, "tied": False, "counted": True, "first_dense": 1},
  "0.24B/1.89B": {"vocab": 8192, "first_dense": 0},
  "OpenMoE": {"vocab": 256_384},
  "6.8B/34B": {"tied": False},
  "Qwen1.5-MoE": {"vocab": 151_936, "tied": False, "counted": True, "gated": True},
  "DBRX": {"vocab": 100_352, "kv_heads": 8, "tied": False},
  "Jamba": {"vocab": 65_536, "kv_heads": 8, "tied": False, "mamba": 8},
  "Skywork-MoE": {"vocab": 65_536, "tied": False},
  "Yuan-2.0-M32": {"vocab": 135_040, "tied": False},
}

# What is printed and is not so: the right values, and how that is known.
CORRECTIONS: dict[str, tuple[dict[str, Any], str]] = {
  "GShard": ({"layers": 18}, "#L counts encoder and decoder together, that of Switch each"),
  "GShard 200B": ({"layers": 6}, "#L counts encoder and decoder together, that of Switch each"),
  "Switch 395B": ({"experts": 128}, "128 experts, as the published checkpoint has"),
  "GLaM": ({"expert_activation": "GELU"}, "only dense layers are gated, experts are not"),
  "DeepSpeed-MoE 350M/13B": ({"active": 1}, "a token visits one expert"),
  "DeepSpeed-MoE 1.3B/52B": ({"active": 1}, "a token visits one expert"),
  "ST-MoE": ({"layers": 24}, "24 layers a stack, beside 6 extra feed-forward layers"),
}

# What the first figure of a name is, or both, where it is not what a token uses of the whole model.
NAMED = {
  "GLaM": "the first figure is the size of the dense model whose layers were replaced",
  "0.24B/1.89B": "the pair counts experts alone",
  "PR-350M/4B": "the first figure is the size of the dense model",
  "PR-1.3B/31B": "the first figure is the size of the dense model",
  "ST-MoE": "the first figure is the size of a dense model of as many FLOPs",
  "6.8B/34B": "the first figure leaves out token table and head",
}
DENSE_7B = Design(
  "DeepSeek", "7B", 0, 0, 4096, 11008, 0, 30, 32, 128, 31, "SwiGLU", 0, 102_400, tied=False
)


def printed() -> list[Design]:
  """The designs as the table has them."""
  designs = []
  for line in PRINTED.strip().splitlines():
    reference, model, counts, *sizes, activation, shared = line.split()
    numbers = map(int, (*counts.split("/"), *sizes))
    values: tuple[Any, ...] = (reference, model, *numbers, activation, int(shared))
    facts = FACTS.get(reference, {}) | FACTS.get(model, {})
    given: dict[str, Any] = dict(zip(_FIELDS, values, strict=False))
    designs.append(Design(**given | facts))
  return designs


def right(design: Design) -> tuple[Design, str]:
  """What a printed design is in truth, and why; "" where it is as it is printed."""
  for name in (f"{design.reference} {design.model}", design.reference):
    if name in CORRECTIONS:
      values, why = CORRECTIONS[name]
      return dataclasses.replace(design, **values), why
  return design, ""
