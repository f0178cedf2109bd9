"""The training loop: batches in, checkpoints and metrics out, resumed to the bit."""

import contextlib
import dataclasses
import math
import os
import signal
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import jax
import numpy as np
from tqdm import tqdm

from effjax.core import known, trees
from effjax.core.typing import Key, Params
from effjax.parallel.placement import Placement
from effjax.peft.adapter import is_adapter
from effjax.train.checkpoint import Checkpoints
from effjax.train.objectives import Batch
from effjax.train.settings import Settings, moments
from effjax.train.state import TrainState
from effjax.train.step import Step
from effjax.train.workdir import METRICS, append_row, read_rows, write_rows


@runtime_checkable
class Batches(Protocol):
  """An iterator of batches whose place can be saved as JSON and gone back to.

  One that also has `observe(row)` is told the row of every step, what `evaluate` gave included,
  before the next batch is drawn: data may follow from losses. The device then waits for each step.
  """

  def __next__(self) -> Batch: ...
  def get_state(self) -> Any: ...
  def set_state(self, state: Any) -> None: ...


@dataclasses.dataclass
class LoopConfig:
  """How a run is watched and kept.

  Attributes:
    steps: how many to take.
    checkpoint_every: steps between checkpoints; the last step always has one.
    log_every: steps between rows of metrics.
    evaluate_every: steps between evaluations; the last step always has one.
    keep: how many checkpoints stay.
    progress: whether a bar is shown.
    tensorboard: whether scalars go to TensorBoard files too; wants tensorboardX.
  """

  steps: int = 1000
  checkpoint_every: int = 100
  log_every: int = 1
  evaluate_every: int = 100
  keep: int = 2
  progress: bool = True
  tensorboard: bool = False

  def __post_init__(self):
    for name in ("steps", "checkpoint_every", "log_every", "evaluate_every", "keep"):
      given = getattr(self, name)
      setattr(self, name, known.number(name, given, of="LoopConfig", integer=True, least=1))


def fit(
  step: Step,
  state: TrainState,
  batches: Batches,
  rng: Key,
  *,
  workdir: str | Path,
  config: LoopConfig,
  placement: Placement | None = None,
  evaluate: Callable[[Params], dict[str, float]] | None = None,
) -> TrainState:
  """Trains until `config.steps`, going on from the newest checkpoint in `workdir`.

  Rows of `workdir`/metrics.jsonl hold "step", the metrics of that step, and what `evaluate` gave.
  They hold no times: those of a run that was killed and resumed equal an undisturbed run's.
  Where there are adapters, checkpoints hold what trains, and name what is frozen by its digest.
  After SIGTERM or SIGINT the current step is finished and saved, and the process exits with status
  0. A checkpoint that is damaged is named in a warning, and the one before it is gone on from.

  Args:
    step: from `make_train_step`; it consumes `state`.
    state: the state of step 0, laid out as training wants it.
    batches: the data; may have `observe`, see `Batches`.
    rng: the randomness of the whole run.
    workdir: where everything is written.
    config: see `LoopConfig`.
    placement: lays batches out on a mesh.
    evaluate: params -> numbers, such as a loss on held-out text.

  Raises:
    FloatingPointError: when the loss or the gradients are not finite; checkpoints stay good.
    ValueError: when `workdir` holds checkpoints of another model or of other settings (step, rng,
      parameters at the start, data), or none that is undamaged.
    OSError: when `workdir` cannot be written, or another process trains in it.
  """
  directory = Path(workdir)
  opened = Checkpoints(directory / "checkpoints", keep=config.keep)
  with _Stop() as stop, opened as checkpoints, _naming(opened):
    settings, base = Settings(directory, step, rng, placement, moments(state)), _base(state)
    state = _resume(checkpoints, state, batches, config.steps, settings)
    number = start = int(state.step)
    log = Log(directory, start, tensorboard=config.tensorboard)
    pending, observe = [], getattr(batches, "observe", None)
    with tqdm(total=config.steps, initial=start, disable=not config.progress, unit="step") as bar:
      for number in range(start + 1, config.steps + 1):
        batch = _put(next(batches), placement)
        if number == start + 1:
          settings.write(state, batch)
        state, metrics = step(state, batch, rng)
        pending.append((number, metrics))
        due = lambda every, number=number: number in (config.steps, number // every * every)
        judge = evaluate if due(config.evaluate_every) else None
        if judge or due(config.log_every) or observe is not None:
          row = _drain(pending, checkpoints) | (judge(state.params) if judge else {})
          bar.set_postfix(loss=f"{row['loss']:.4f}", refresh=False)
        if observe is not None:
          observe(row)
        if judge or due(config.log_every):
          log.write(row)
        leaving = stop.asked  # read once: what is asked for later is for the next step
        if due(config.checkpoint_every) or leaving:
          _drain(pending, checkpoints)
          checkpoints.save(number, state, data=batches.get_state(), base=base)
        bar.update()
        if leaving:
          break
    stop.leave(f"step {number} is saved in {checkpoints.directory}; run again to go on")
  return state


class Log:
  """Rows of metrics in JSONL, and in TensorBoard files on demand."""

  def __init__(self, directory: Path, start: int, *, tensorboard: bool = False):
    """Opens the log of a run that goes on after step `start`: later rows are forgotten."""
    self._path = directory / METRICS
    rows = read_rows(self._path)
    kept = [row for row in rows if row["step"] <= start]
    if len(kept) < len(rows):
      write_rows(self._path, kept)
    self._writer = _tensorboard(directory / "tensorboard", start) if tensorboard else None

  def write(self, row: dict[str, Any]) -> None:
    append_row(self._path, row)
    if self._writer is not None:
      for name, value in row.items():
        add = self._writer.add_histogram if isinstance(value, list) else self._writer.add_scalar
        add(name, value, row["step"])
      self._writer.flush()


class _Stop:
  """Notes SIGTERM and SIGINT while it is open; Python takes signals in its main thread only.

  A second SIGINT interrupts at once. A signal that was noted and not obeyed by `leave` is sent
  again when all is done.
  """

  asked: signal.Signals | None = None

  def __enter__(self):
    main = threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGTERM, signal.SIGINT) if main else ()
    self._before = {number: signal.signal(number, self._ask) for number in numbers}
    return self

  def __exit__(self, kind, *_):
    for number, handler in self._before.items():
      signal.signal(number, handler)
    if self.asked and kind is None:
      signal.raise_signal(self.asked)

  def leave(self, saved: str) -> None:
    """Ends the process with status 0 if that was asked for."""
    if self.asked:
      print(f"{self.asked.name}: {saved}", flush=True)
      raise SystemExit(0)

  def _ask(self, number, _):
    if number == self.asked == signal.SIGINT:
      raise KeyboardInterrupt
    self.asked = signal.Signals(number)
    again = "; once more stops it unsaved" if number == signal.SIGINT else ""
    os.write(2, f"\n{self.asked.name}: the step is finished and saved{again}\n".encode())


@contextlib.contextmanager
def _naming(checkpoints: Checkpoints) -> Iterator[None]:
  """Adds to the error of a file where the run can go on from."""
  try:
    yield
  except OSError as error:
    if error.filename is None:
      raise
    what = f"{error.strerror}; {checkpoints.newest()}"
    raise OSError(error.errno, what, error.filename) from error


def _put(batch: Batch, placement: Placement | None) -> Batch:
  return batch if placement is None else jax.device_put(batch, placement.batch(batch))


def _resume(
  checkpoints: Checkpoints, state: TrainState, batches: Batches, steps: int, settings: Settings
) -> TrainState:
  """The newest saved state, with `batches` back at its place; `state` when none is saved.

  Raises:
    ValueError: when it is of other settings, or has taken more than `steps`.
  """
  if not checkpoints.steps():
    return state
  saved = checkpoints.restore(state)
  if saved.step > steps:
    raise ValueError(
      f"steps={steps}; {checkpoints.directory} has taken {saved.step}; allowed: from {saved.step}"
    )
  settings.check(state)
  batches.set_state(saved.data)
  print(f"going on from step {saved.step} of {steps} in {checkpoints.directory}", flush=True)
  return saved.state


def _base(state: TrainState) -> dict[str, str]:
  """Path → digest of what is frozen beside adapters; nothing where there are none."""
  if not any(is_adapter(leaf) for leaf in trees.items(state.params).values()):
    return {}
  frozen = jax.tree_util.tree_leaves_with_path(state.partition()[1])
  return trees.digests({f"params/{trees.path_string(path)}": x for path, x in frozen})


def _drain(pending: list[tuple[int, dict]], checkpoints: Checkpoints) -> dict[str, Any]:
  """Empties `pending`, the metrics not yet looked at, and gives the last as a row.

  Raises:
    FloatingPointError: when the loss or gradients of any of them are not finite.
  """
  row: dict[str, Any] = {}
  for number, metrics in jax.device_get(pending):
    row = {"step": number} | {name: np.asarray(x).tolist() for name, x in metrics.items()}
    if not row.pop("finite", math.isfinite(row["loss"])):
      raise FloatingPointError(
        f"step {number}: loss is {row['loss']} and the norm of the gradients"
        f" {row.get('grad_norm')}; {checkpoints.newest()}"
      )
  pending.clear()
  return row


def _tensorboard(directory: Path, start: int):
  try:
    from tensorboardX import SummaryWriter
  except ModuleNotFoundError as error:
    raise ModuleNotFoundError(
      "tensorboard=True needs tensorboardX: pip install 'effjax[tensorboard]'"
    ) from error
  return SummaryWriter(str(directory), purge_step=start + 1)
