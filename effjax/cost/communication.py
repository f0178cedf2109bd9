"""What data parallelism sends between devices."""

from effjax.core.known import number
from effjax.core.typing import Size


def zero_communication(parameters: Size, stage: Size) -> int:
  """Elements each device sends a step: 2Φ, and 3Φ at stage 3 (ZeRO, arXiv 1910.02054, section 7).

  Plain data parallelism (stage 0) reduces gradients in two halves, a reduce-scatter and an
  all-gather, Φ elements each. Stages 1 and 2 gather updated parameters instead of gradients: the
  same volume. Stage 3 gathers parameters twice, forward and backward, and scatters gradients. The
  figures are the limit of many devices; N devices send (N − 1)/N of them.

  Args:
    parameters: Φ.
    stage: 0, 1, 2 or 3.

  Raises:
    ValueError: for another stage, and parameters below 0.

  Example:
    >>> [zero_communication(1_000, stage) for stage in range(4)]
    [2000, 2000, 2000, 3000]
  """
  parameters = number("parameters", parameters, least=0)
  stage = number("stage", stage, integer=True, least=0, most=3)
  return (3 if stage == 3 else 2) * parameters
