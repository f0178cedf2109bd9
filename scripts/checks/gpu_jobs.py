"""What is timed on a GPU: programs, their arguments, and the rows that their times make."""

import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator
from typing import Any, Protocol

import jax
import jax.numpy as jnp

from effjax.attention import attend, masks
from effjax.attention.scores import ALiBi
from effjax.kernels.flash_attention.fused.sizes import choose
from scripts.checks import gpu_torch, grouped, model
from scripts.checks.alone import HEADS, KERNELS, MASKS, Case, program
from scripts.checks.processes import Row
from scripts.checks.sass import PRODUCTS

TOKENS, MODEL = 16384, 2048  # tokens of a batch and heads × width, whatever the length
WIDTHS = (64, 128)

Arrays = tuple[Any, ...]


class Job(Protocol):
  """Programs of the same arguments, timed in turns."""

  def arguments(self) -> Arrays:
    """On the device."""

  def programs(self) -> dict[str, Callable]:
    """By name."""

  def peers(self, arguments: Arrays) -> dict[str, Callable[[], Any]]:
    """What makes the contenders that are no programs of jax's."""
    return {}

  def rows(self, seconds: dict[str, float], device: Row) -> Iterator[Row]:
    """From the time of each that ran, and what the device can do, the row of `Device`."""


@dataclasses.dataclass(frozen=True)
class Device(Job):
  """What the device can do: a product of square bfloat16 matrices; reading as much as it writes."""

  size: int = 8192
  copied: int = 1 << 29

  def arguments(self):
    keys = jax.random.split(jax.random.key(0), 3)
    shapes = [(self.size, self.size)] * 2 + [(self.copied,)]
    return tuple(map(lambda *x: jax.random.normal(*x, jnp.bfloat16), keys, shapes))

  def programs(self):
    return {"matmul": lambda a, b, _: a @ b, "copy": lambda a, b, x: -x}

  def rows(self, seconds, device):
    yield {
      "device": jax.devices()[0].device_kind,
      "matmul TFLOP/s": 2 * self.size**3 / seconds["matmul"] / 1e12,
      "copy TB/s": 2 * 2 * self.copied / seconds["copy"] / 1e12,
    }


@dataclasses.dataclass(frozen=True)
class Dense(Job):
  """Ours, cuDNN's and torch's, forward or forward + backward."""

  width: int
  length: int
  causal: bool
  backward: bool

  @property
  def mask(self) -> masks.Mask:
    """Of the programs."""
    return masks.Causal() if self.causal else masks.Full()

  def arguments(self):
    return _arrays(self.length, self.width)

  def programs(self):
    return {by: _program(self.mask, by, self.backward) for by in ("gpu", "cudnn")}

  def peers(self, arguments):
    make = functools.partial(gpu_torch.contender, arguments, self.causal, self.backward)
    return {"torch": make} if gpu_torch.here() else {}

  def rows(self, seconds, device):
    if "gpu" in seconds:
      own = seconds["gpu"]
      rate = work(self.length, self.causal, self.backward) / own / 1e12
      figures = {"ms": own * 1e3, "TFLOP/s": rate, "of matmul": rate / device["matmul TFLOP/s"]}
      figures |= _model(self, "causal" if self.causal else "full", self.mask, device)
      peers = {f"× {by}": x / own for by, x in seconds.items() if by != "gpu"}
      yield dataclasses.asdict(self) | figures | peers


@dataclasses.dataclass(frozen=True)
class Varied(Job):
  """Attention of one size under several masks or scores, forward or forward + backward."""

  width: int
  length: int
  backward: bool

  def arguments(self):
    return _arrays(self.length, self.width)


class Sparse(Varied):
  """How much faster than without a mask, beside how many fewer tiles."""

  def programs(self):
    every = patterns(self.length) | {"full": masks.Full()}
    return {name: _program(mask, "gpu", self.backward) for name, mask in every.items()}

  def rows(self, seconds, device):
    for name, mask in patterns(self.length).items():
      if {name, "full"} <= seconds.keys():
        times = {"ms": seconds[name] * 1e3, "faster": seconds["full"] / seconds[name]}
        times["tiles"] = fewer(mask, self.length, self.width)
        times |= _model(self, name, mask, device)
        yield {"mask": name} | dataclasses.asdict(self) | times


class Scores(Varied):
  """ALiBi as scores, as a bias, and causal attention without either."""

  def programs(self):
    alibi = ALiBi.standard(MODEL // self.width)
    bias = lambda: alibi.dense(self.length).astype(jnp.bfloat16)
    extra = {"scores": lambda: {"scores": alibi}, "bias": lambda: {"bias": bias()}, "none": dict}
    return {
      name: lambda *x, more=more: _program(masks.Causal(), "gpu", self.backward, **more())(*x)
      for name, more in extra.items()
    }

  def rows(self, seconds, device):
    if "scores" in seconds:
      own = seconds["scores"]
      peers = {f"× {by}": x / own for by, x in seconds.items() if by != "scores"}
      figures = {"ms": own * 1e3} | _model(self, "alibi", masks.Causal(), device)
      yield dataclasses.asdict(self) | figures | peers


@dataclasses.dataclass(frozen=True)
class Kernels(Job):
  """Each kernel alone, so that a slow one is known by its name."""

  case: Case
  length: int

  def arguments(self):
    return self.case.draw("forward", self.length)

  def programs(self):
    return {name: program(self.case, name, "gpu") for name in KERNELS[:3]}

  def rows(self, seconds, device):
    B, T, N, H = self.case.arguments("forward", self.length)[0].shape
    product = 2 * B * T * T * N * H * _seen(T, self.case.mask == "causal") / 1e12
    sizes = self.case.sizes("gpu", self.length)
    for name, x in seconds.items():
      size, rate = getattr(sizes, name), PRODUCTS[name] * product / x
      names = {"kernel": name, "case": str(self.case), "length": T}
      names |= {"tile": f"{size.queries}×{size.keys}"}
      figures = {"ms": x * 1e3, "TFLOP/s": rate, "of matmul": rate / device["matmul TFLOP/s"]}
      mask = MASKS[self.case.mask](None)
      yield names | figures | model.columns(self.case, [name], mask, T, B, device)


@dataclasses.dataclass(frozen=True)
class Decode(Job):
  """One new token of each of a batch, whose keys and values have to be read."""

  keys: int
  batch: int = 8
  heads: int = 32
  groups: int = 8
  width: int = 128

  def arguments(self):
    keys = jax.random.split(jax.random.key(0), 3)
    sizes = [(1, self.heads), (self.keys, self.groups), (self.keys, self.groups)]
    arrays = [
      jax.random.normal(key, (self.batch, *size, self.width), jnp.bfloat16)
      for key, size in zip(keys, sizes, strict=True)
    ]
    return *arrays, jnp.full((self.batch, 1), self.keys - 1)

  def programs(self):
    def run(q, k, v, at, *, by):
      return attend(q, k, v, mask=masks.Causal(), query_positions=at, implementation=by)

    return {by: functools.partial(run, by=by) for by in ("gpu", "xla")}

  def rows(self, seconds, device):
    if "gpu" in seconds:
      own = seconds["gpu"]
      terabytes = 2 * 2 * self.batch * self.keys * self.groups * self.width / 1e12
      rate, copy = terabytes / own, device["copy TB/s"]
      figures = {"µs": own * 1e6, "model µs": terabytes / copy * 1e6}
      figures |= {"TB/s": rate, "of copy": rate / copy}
      peers = {f"× {by}": x / own for by, x in seconds.items() if by != "gpu"}
      yield dataclasses.asdict(self) | figures | peers


@dataclasses.dataclass(frozen=True)
class Grouped(Job):
  """A kernel of grouped products, beside `jax.lax.ragged_dot` and one dense product of its rows."""

  case: grouped.Case
  product: str

  def arguments(self):
    x, other, sizes = self.case.draw(self.product)
    return jnp.nan_to_num(x), jax.tree.map(_finite, other), sizes

  def programs(self):
    runs = {"gpu": grouped.program(self.case, self.product, "gpu")}
    if self.case.format == "array":
      runs |= {"ragged": grouped.ragged(self.product), "dense": functools.partial(_dense, self)}
    return runs

  def rows(self, seconds, device):
    if "gpu" in seconds:
      own, case = seconds["gpu"], self.case
      rate = 2 * case.rows * case.width * case.outputs / own / 1e12
      figures = {"ms": own * 1e3, "TFLOP/s": rate, "of matmul": rate / device["matmul TFLOP/s"]}
      peers = {f"× {by}": x / own for by, x in seconds.items() if by != "gpu"}
      yield {"case": str(case), "product": self.product} | figures | peers


def _dense(job: Grouped, x: Any, other: Any, sizes: Any) -> Any:
  if job.product == "sums":
    return other.T @ x
  w = other[0][0]
  return x @ (w if job.product == "products" else w.T)


def _finite(x: Any) -> Any:
  return jnp.nan_to_num(x) if jnp.issubdtype(x.dtype, jnp.floating) else x


def jobs(lengths: list[int]) -> dict[str, Job]:
  """By name, as in "dense/128/4096/causal/backward"; that of the device first."""
  longest = max(lengths)
  kinds = [f"bfloat16-{H}-{mask}" for H in (*WIDTHS, 256) for mask in ("full", "causal")]
  passes = {"forward": False, "backward": True}
  dense = {
    f"dense/{H}/{T}/{mask}/{name}": Dense(H, T, mask == "causal", backward)
    for H, T, mask, (name, backward) in itertools.product(
      WIDTHS, lengths, ("full", "causal"), passes.items()
    )
  }
  sparse = {
    f"sparse/{T}/{name}": Sparse(WIDTHS[0], T, backward)
    for T, (name, backward) in itertools.product(lengths, passes.items())
    if T >= 4096
  }
  scores = {
    f"scores/{T}/{name}": Scores(WIDTHS[0], T, backward)
    for T, (name, backward) in itertools.product(lengths, passes.items())
    if 4096 <= T <= 8192
  }
  kernels = {f"kernels/{kind}": Kernels(Case.of(kind), longest) for kind in kinds}
  last = {"decode": Decode(longest)}
  cases = (case for case in map(grouped.Case.of, grouped.CASES) if case.dtype == "bfloat16")
  groups = {
    f"grouped/{case}/{name}": Grouped(case, name) for case in cases for name in case.products
  }
  return {"device": Device(), **kernels, **groups, **dense, **sparse, **scores, **last}


def work(length: int, causal: bool, backward: bool) -> float:
  """FLOPs: 4·T·S·N·H a batch row by the share of pairs seen; 2.5 times that for backward."""
  return 4 * TOKENS * length * MODEL * _seen(length, causal) * (3.5 if backward else 1)


def _seen(length: int, causal: bool) -> float:
  return (length + 1) / (2 * length) if causal else 1.0


def patterns(length: int) -> dict[str, masks.Mask]:
  """A window, BigBird and Longformer."""
  return {
    "window": masks.SlidingWindow(1023, 0),
    "bigbird": masks.bigbird(jax.random.key(0), length),
    "longformer": masks.longformer(512, 1),
  }


def fewer(mask: masks.Mask, length: int, width: int) -> float:
  """All tiles over those of the forward kernel that the mask visits."""
  size = choose("gpu", jnp.bfloat16, width, length, length).forward
  tiles = mask.blocks(length, length, size.queries, size.keys).rows
  return -(-length // size.queries) * -(-length // size.keys) / tiles.visited


def _model(job: Any, name: str, mask: masks.Mask, device: Row) -> Row:
  """Of all heads and batch rows of a job, by the reports of the mask of that name."""
  case = Case("bfloat16", job.width, name, group=1)
  kernels = KERNELS[:3] if job.backward else KERNELS[:1]
  batch = TOKENS * MODEL // (job.length * job.width * HEADS)
  return model.columns(case, kernels, mask, job.length, batch, device)


def _arrays(length: int, width: int) -> Arrays:
  """Query, key, value and the cotangent of the output."""
  shape = (TOKENS // length, length, MODEL // width, width)
  keys = jax.random.split(jax.random.key(0), 4)
  return tuple(jax.random.normal(key, shape, jnp.bfloat16) for key in keys)


def _program(mask: masks.Mask, by: str, backward: bool, **more: Any) -> Callable:
  attention = functools.partial(attend, mask=mask, implementation=by, **more)

  def both(q, k, v, cotangent):
    out, pull = jax.vjp(attention, q, k, v)
    return out, pull(cotangent)

  return both if backward else lambda q, k, v, _: attention(q, k, v)
