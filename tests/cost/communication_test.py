import pytest

from effjax.cost import zero_communication


def test_stage_three_sends_half_again_as_much():
  assert [zero_communication(7, stage) for stage in range(4)] == [14, 14, 14, 21]


def test_bad_stage():
  with pytest.raises(ValueError, match="stage 5"):
    zero_communication(7, 5)
