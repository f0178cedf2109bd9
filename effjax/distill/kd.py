"""Distillation by logits (Hinton et al., arXiv 1503.02531, section 2)."""

import functools
import math

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from jax.tree_util import Partial

from effjax.core.known import number
from effjax.core.numerics import cross_entropy, weighted_mean, zero_unless
from effjax.core.typing import Array, Float, Integer, Params, Scalar, Shaped
from effjax.layers.forward import forward
from effjax.layers.objective import Objective, per_token


def kd_loss(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  targets: Integer[Array | np.ndarray, "..."],
  *,
  temperature: Scalar = 1.0,
  alpha: Scalar = 0.5,
  weights: Shaped[Array | np.ndarray, "..."] | None = None,
) -> Float[Array, ""]:
  """α·T²·KL(softmax(teacher/T) ‖ softmax(student/T)) + (1−α)·CE(student, targets), in nats.

  The mean over positions, weighted by `weights`. T² keeps the gradient's size as T grows. No
  gradient flows to the teacher.

  Args:
    student_logits, teacher_logits: [..., V].
    targets: the right tokens, [...]; a traced one that is no token gives NaN.
    temperature: T > 0.
    alpha: share of the teacher, 0 … 1; one that is 0 does not read the teacher.
    weights: [...], from 0; where it is 0 neither logits nor target are read. None counts all alike.

  Raises:
    ValueError: when the shapes differ; and for a temperature, alpha, target or weight, where it is
      known, that is out of range.

  Example:
    >>> logits, targets = jnp.zeros((1, 4)), jnp.array([2])
    >>> round(float(kd_loss(logits, logits, targets, alpha=0.5)), 4)
    0.6931
  """
  losses, _ = _losses(student_logits, teacher_logits, targets, weights, temperature, alpha)
  return weighted_mean(losses, weights)


def _losses(student_logits, teacher_logits, targets, weights, temperature, alpha):
  """The loss of each position, and its two parts; 0 where the weight is."""
  temperature, alpha = _checked(temperature, alpha)
  nll = cross_entropy(student_logits, targets, weights)
  read = None if weights is None else jnp.asarray(weights) != 0
  student, teacher = zero_unless(read, student_logits), zero_unless(read, teacher_logits)
  apart = _scaled_divergence(student, teacher, temperature)
  parts = ((alpha, apart), (1 - alpha, nll))
  loss = sum(share * part for share, part in parts if isinstance(share, Array) or share > 0)
  return loss, {"nll": nll, "divergence": apart / temperature / temperature}


def divergence(
  student_logits: Float[Array, "... V"],
  teacher_logits: Float[Array, "... V"],
  temperature: Scalar = 1.0,
) -> Float[Array, "..."]:
  """KL(softmax(teacher/T) ‖ softmax(student/T)) per position, in nats and float32.

  Raises:
    ValueError: as `kd_loss`.

  Example:
    >>> round(float(divergence(jnp.zeros(2), jnp.array([jnp.log(3.0), 0.0]))), 4)
    0.1308
  """
  temperature, _ = _checked(temperature)
  return _scaled_divergence(student_logits, teacher_logits, temperature) / temperature / temperature


def _scaled_divergence(student: Array, teacher: Array, temperature: Scalar) -> Array:
  """T²·KL, which has limits as T goes to 0 and to infinity.

  At small T it is T·Σ p·(T·log p − T·log q), where no quotient by T is left. At large T the two
  logarithms are nearly equal. With y the difference of the logits less its mean under p, KL is
  log Σ p·exp(−y/T) = log(1 + m), m = Σ p·(exp(−y/T) − 1 + y/T), whose first two orders cancel.
  """
  if student.shape != teacher.shape:
    raise ValueError(
      f"student_logits {student.shape} and teacher_logits {teacher.shape} differ; "
      "allowed: one shape, over one vocabulary"
    )
  temperature = jnp.maximum(temperature, jnp.finfo(jnp.float32).tiny)
  below = lambda x: x - jax.lax.stop_gradient(x.max(axis=-1, keepdims=True))
  student, teacher = below(student.astype(jnp.float32)), below(teacher.astype(jnp.float32))
  teacher = jax.lax.stop_gradient(teacher)
  log_p, log_q = (_scaled_log_softmax(x, temperature) for x in (teacher, student))
  p = jnp.exp(log_p / temperature)
  small_t = temperature * jnp.where(p > 0, p * (log_p - log_q), 0).sum(axis=-1)
  y = jnp.where(p > 0, teacher - student, 0)
  y = y - (p * y).sum(axis=-1, keepdims=True)
  near = jnp.abs(y / temperature).max(axis=-1) < 0.5
  y = zero_unless(near, y)
  m_t2 = (p * y**2 * _second_order(y / temperature)).sum(axis=-1)
  m = jnp.maximum(m_t2 / temperature / temperature, 1e-12)
  return jnp.where(near, m_t2 * (jnp.log1p(m) / m), small_t)


def _scaled_log_softmax(below: Array, temperature: Array) -> Array:
  """T·log softmax(z/T) for logits z from −∞ to 0, one of them 0."""
  return below - temperature * jax.nn.logsumexp(below / temperature, axis=-1, keepdims=True)


def _second_order(v: Array) -> Array:
  """(exp(−v) − 1 + v) / v² for |v| < 1/2, by Taylor's series."""
  total = jnp.zeros_like(v)
  for n in range(9, 1, -1):
    total = total * -v + 1 / math.factorial(n)
  return total


def kd_objective(
  student: nn.Module,
  teacher: nn.Module,
  teacher_params: Params,
  *,
  temperature: Scalar = 1.0,
  alpha: Scalar = 0.5,
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
  temperature, alpha = _checked(temperature, alpha)
  loss = functools.partial(_token_loss, teacher, temperature, alpha)
  return per_token(student, Partial(loss, teacher_params))


def _token_loss(teacher, temperature, alpha, teacher_params, logits, batch):
  taught, _ = forward(teacher, teacher_params, batch)
  return _losses(logits, taught, batch["targets"], batch.get("weights"), temperature, alpha)


def _checked(temperature: Scalar, alpha: Scalar = 0.0) -> tuple[Scalar, Scalar]:
  return number("temperature", temperature, above=0), number("alpha", alpha, least=0, most=1)
