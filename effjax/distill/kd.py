"""Distillation by logits (Hinton et al., arXiv 1503.02531, section 2)."""

import functools

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
from jax.tree_util import Partial

from effjax.core.numerics import weighted_mean
from effjax.core.typing import Array, Float, Int, Params
from effjax.layers.forward import forward
from effjax.layers.objective import Objective, per_token


def kd_loss(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  targets: Int[Array, "..."],
  *,
  temperature: float | int = 1.0,
  alpha: float | int = 0.5,
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
  losses, _ = _losses(student_logits, teacher_logits, targets, temperature, alpha)
  return weighted_mean(losses, weights)


def _losses(student_logits, teacher_logits, targets, temperature, alpha):
  """The loss of each position, and its two parts."""
  if student_logits.shape != teacher_logits.shape:
    raise ValueError(
      f"student_logits {student_logits.shape} and teacher_logits {teacher_logits.shape} differ; "
      "allowed: one shape, over one vocabulary"
    )
  if targets.shape != student_logits.shape[:-1]:
    raise ValueError(f"targets {targets.shape}; allowed: {student_logits.shape[:-1]}")
  apart = divergence(student_logits, teacher_logits, temperature)
  nll = optax.softmax_cross_entropy_with_integer_labels(student_logits.astype(jnp.float32), targets)
  return alpha * temperature**2 * apart + (1 - alpha) * nll, {"nll": nll, "divergence": apart}


def divergence(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  temperature: float | int = 1.0,
) -> Float[Array, "..."]:
  """KL(softmax(teacher/T) ‖ softmax(student/T)) per position, in nats and float32.

  Example:
    >>> round(float(divergence(jnp.zeros(2), jnp.array([jnp.log(3.0), 0.0]))), 4)
    0.1308
  """
  teacher = jax.lax.stop_gradient(teacher_logits).astype(jnp.float32) / temperature
  log_p = jax.nn.log_softmax(teacher)
  log_q = jax.nn.log_softmax(student_logits.astype(jnp.float32) / temperature)
  return optax.losses.kl_divergence_with_log_targets(log_q, log_p, where=~jnp.isneginf(log_p))


def kd_objective(
  student: nn.Module,
  teacher: nn.Module,
  teacher_params: Params,
  *,
  temperature: float | int = 1.0,
  alpha: float | int = 0.5,
) -> Objective:
  """A training objective (params, batch, rng) → (loss, metrics) that distils `teacher`.

  The loss is `kd_loss` plus what the student's layers sow under "losses". Metrics: "nll" (cross
  entropy with the targets), "divergence" (KL at the temperature), and those of `per_token`.
  The result is a pytree of the teacher's parameters: handed to jit as an argument they are
  arguments of the program; closed over they are constants in it.

  Args:
    student, teacher: modules of tokens [B, T] → logits [B, T, V]; only the student gets randomness.
    teacher_params: the teacher's parameters, not trained.
    temperature, alpha: as for `kd_loss`.

  The batch has tokens and targets [B, T]; see `per_token` for the rest.

  Raises:
    ValueError: as `kd_loss`.

  Example:
    >>> module = nn.Embed(3, 3)
    >>> params = {"embedding": jnp.zeros((3, 3))}
    >>> batch = {"tokens": jnp.array([[0, 1]]), "targets": jnp.array([[1, 2]])}
    >>> loss, metrics = kd_objective(module, module, params, alpha=1.0)(params, batch, None)
    >>> float(loss), round(float(metrics["nll"]), 4)
    (0.0, 1.0986)
  """
  _check_share(temperature, alpha)
  loss = functools.partial(_token_loss, teacher, temperature, alpha)
  return per_token(student, Partial(loss, teacher_params))


def _token_loss(teacher, temperature, alpha, teacher_params, logits, batch):
  taught, _ = forward(teacher, teacher_params, batch)
  return _losses(logits, taught, batch["targets"], temperature, alpha)


def _check_share(temperature: float | int, alpha: float | int) -> None:
  if not temperature > 0:
    raise ValueError(f"temperature {temperature}; allowed: above 0")
  if not 0 <= alpha <= 1:
    raise ValueError(f"alpha {alpha}; allowed: 0 … 1")
