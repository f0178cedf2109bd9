"""The choice among tile sizes, with clocks that are made up, and a run of one interpreted size."""

import pytest

from effjax.kernels.flash_attention.fused.sizes import Size
from scripts.checks import tune
from scripts.checks.alone import Case


def test_the_fastest_is_chosen_and_all_are_shown(monkeypatch, capsys):
  pairs = [(2e-3, Size(64, 64)), (1e-3, Size(128, 64, 8, 2)), (3e-3, Size(32, 32))]
  monkeypatch.setattr(tune, "timed", lambda *arguments: iter(pairs))
  case = Case.of("bfloat16-64-causal")
  assert tune.best(case, "forward", "gpu", False) == Size(128, 64, 8, 2)
  lines = capsys.readouterr().out.splitlines()
  assert [line.split()[-2] for line in lines] == ["1.000", "2.000", "3.000"]
  assert "Size(128, 64, 8, 2)" in lines[0]


def test_no_candidate_ends_with_a_reason(monkeypatch):
  monkeypatch.setattr(tune, "timed", lambda *arguments: iter(()))
  with pytest.raises(SystemExit, match="no candidate for keys"):
    tune.best(Case.of("bfloat16-64-causal"), "keys", "gpu", False)


def test_a_size_that_does_not_run_is_left_out(monkeypatch, capsys):
  good, bad = Size(16, 16), Size(24, 16)  # tiles of Triton are powers of two
  monkeypatch.setattr(tune, "candidates", lambda *arguments: [bad, good])
  real = tune.program
  refused = ValueError("tile of 24")

  def program(case, kernel, platform, sizes, interpret):
    if sizes.forward == bad:
      raise refused
    return real(case, kernel, platform, sizes, interpret)

  monkeypatch.setattr(tune, "program", program)
  ((seconds, size),) = tune.timed(Case.of("bfloat16-64-causal"), "forward", "gpu", True)
  assert size == good and seconds > 0
  assert "tile of 24" in capsys.readouterr().err
