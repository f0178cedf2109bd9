"""What the compiler says a program takes."""

import dataclasses
from collections.abc import Callable

import jax


@dataclasses.dataclass(frozen=True)
class Compiled:
  """Figures of one compiled program, for one device; None where the platform does not tell.

  Attributes:
    flops: floating-point operations, all kinds; loop bodies count once on some platforms.
    bytes_accessed: bytes read and written by all operations.
    temporaries: bytes of buffers that are neither argument nor output.
    arguments, outputs, aliased: bytes of each; aliased outputs share an argument's buffer.
    peak: arguments + outputs + temporaries − aliased, the most that is held at once.
  """

  flops: float | None
  bytes_accessed: float | None
  temporaries: int | None
  arguments: int | None
  outputs: int | None
  aliased: int | None
  peak: int | None


def compiled(fn: Callable, *args, **kwargs) -> Compiled:
  """Compiles `fn` for these arguments, without running it, and reads XLA's analyses.

  Args:
    fn: a function, jitted or not; a jitted one keeps its donations and shardings.
    *args, **kwargs: its arguments, or their shapes.

  Example:
    >>> import jax.numpy as jnp
    >>> x = jax.ShapeDtypeStruct((64, 64), jnp.float32)
    >>> found = compiled(lambda a, b: a @ b, x, x)
    >>> found.arguments, found.outputs, found.flops >= 2 * 64**3
    (32768, 16384, True)
  """
  jitted = fn if hasattr(fn, "lower") else jax.jit(fn)
  program = jitted.lower(*args, **kwargs).compile()
  costs = program.cost_analysis() or {}
  costs = costs[0] if isinstance(costs, list) else costs
  memory = program.memory_analysis()
  if memory is None:
    return Compiled(costs.get("flops"), costs.get("bytes accessed"), *[None] * 5)
  sizes = (
    memory.temp_size_in_bytes,
    memory.argument_size_in_bytes,
    memory.output_size_in_bytes,
    memory.alias_size_in_bytes,
  )
  temporaries, arguments, outputs, aliased = sizes
  peak = temporaries + arguments + outputs - aliased
  return Compiled(costs.get("flops"), costs.get("bytes accessed"), *sizes, peak)
