"""Distillation by logits (Hinton et al., arXiv 1503.02531, section 2)."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.tree_util import Partial

from effjax.core.numerics import cross_entropy, weighted_mean
from effjax.core.typing import Array, Float, Int, PyTree


def kd_loss(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  targets: Int[Array, "..."],
  *,
  temperature: float = 1.0,
  alpha: float = 0.5,
  weights: Float[Array, "..."] | None = None,
) -> Float[Array, ""]:
  """α·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + (1−α)·CE(student, targets), in nats.

  The mean over positions, weighted by `weights`. T² keeps the gradient's size as T grows. No
  gradient flows to the teacher.

  Args:
    student_logits, teacher_logits: [..., V].
    targets: the right tokens, [...]; read even where the weight is 0.
    temperature: T > 0.
    alpha: share of the teacher, 0 … 1.
    weights: [...], 0 for positions that do not count; None counts all.

  Raises:
    ValueError: when the shapes differ, or the temperature or alpha is out of range.

  Example:
    >>> logits, targets = jnp.zeros((1, 4)), jnp.array([2])
    >>> round(float(kd_loss(logits, logits, targets, alpha=0.5)), 4)
    0.6931
  """
  _check_share(temperature, alpha)
  if student_logits.shape != teacher_logits.shape:
    raise ValueError(
      f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} differ; "
      "allowed: one shape, over one vocabulary"
    )
  if targets.shape != student_logits.shape[:-1]:
    raise ValueError(f"targets {targets.shape}; allowed: {student_logits.shape[:-1]}")
  soft = temperature**2 * divergence(student_logits, teacher_logits, temperature)
  losses = alpha * soft + (1 - alpha) * cross_entropy(student_logits, targets)
  return weighted_mean(losses, weights)


def divergence(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  temperature: float = 1.0,
) -> Float[Array, "..."]:
  """KL(softmax(teacher/T) ‖ softmax(student/T)) per position, in nats and float32.

  Example:
    >>> round(float(divergence(jnp.zeros(2), jnp.array([jnp.log(3.0), 0.0]))), 4)
    0.1308
  """
  teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature
  log_p = jax.nn.log_softmax(teacher)
  log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
  return jnp.where(jnp.isneginf(log_p), 0.0, jnp.exp(log_p) * (log_p - log_q)).sum(-1)


def kd_objective(
  student: Callable[..., Array],
  teacher: Callable[..., Array],
  teacher_params: PyTree,
  *,
  temperature: float = 1.0,
  alpha: float = 0.5,
) -> Callable[[PyTree, dict, Array], tuple[Array, dict]]:
  """A training objective (params, batch, rng) → (loss, metrics) that distils `teacher`.

  The batch holds tokens and targets [B, T], and optionally weights, segment_ids and positions. The
  result is a pytree of the teacher's parameters: handed to jit as an argument they are arguments of
  the program; closed over they are constants in it.

  Args:
    student, teacher: a module's `apply`: ({"params": params}, tokens, segment_ids=, positions=)
      → logits [B, T, V]; the student's is also given `rngs={"dropout": rng}`.
    teacher_params: the teacher's parameters, not trained.
    temperature, alpha: as for `kd_loss`.

  Raises:
    ValueError: as `kd_loss`.
  """
  _check_share(temperature, alpha)
  return Partial(
    functools.partial(_objective, student, teacher, temperature, alpha), teacher_params
  )


def _objective(student, teacher, temperature, alpha, teacher_params, params, batch, rng):
  tokens, targets, weights = batch["tokens"], batch["targets"], batch.get("weights")
  layout = {name: batch[name] for name in ("segment_ids", "positions") if name in batch}
  logits = student({"params": params}, tokens, **layout, rngs={"dropout": rng})
  taught = teacher({"params": teacher_params}, tokens, **layout)
  loss = kd_loss(logits, taught, targets, temperature=temperature, alpha=alpha, weights=weights)
  metrics = {
    "cross_entropy": weighted_mean(cross_entropy(logits, targets), weights),
    "divergence": weighted_mean(divergence(logits, taught, temperature), weights),
  }
  return loss, metrics


def _check_share(temperature: float, alpha: float) -> None:
  if not temperature > 0:
    raise ValueError(f"temperature {temperature}; allowed: above 0")
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha {alpha}; allowed: 0 … 1")
