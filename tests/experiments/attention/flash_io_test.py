"""The published table against figures worked out by hand, sweeps, and a small run."""

import math

import pytest

from experiments.attention import flash_io

TINY = flash_io.Config(
  lengths="256,512", widths="8,16", memories="512,1024", length=256, width=8, memory=512
)


def test_the_table_by_hand():
  table = flash_io.table()
  scores = 1024 * 1024**2  # heads · N²
  assert table["matmul GFLOPs, standard"] == pytest.approx(6 * 2 * scores * 64 / 1e9)
  assert table["matmul GFLOPs, flash"] == pytest.approx(7 * 2 * scores * 64 / 1e9)
  assert table["FLOPs, flash / standard"] == pytest.approx(7 / 6)
  # Eleven passes of 16 bits over the scores, twelve matrices of N·d a head.
  assert table["GB moved, standard"] == pytest.approx(
    (11 * 2 * scores + 12 * 2 * scores / 16) / 1e9
  )
  assert table["passes over N², standard"] == pytest.approx(11.75)
  # 98,304 elements hold 384 keys a block: three blocks. Matrices 2 + 3·3 and 4 + 3·5; vectors 18.
  matrix, vector = 1024 * 1024 * 64 * 2, 1024 * 1024 * 2
  assert table["GB moved, flash"] == pytest.approx((30 * matrix + 18 * vector) / 1e9)


def test_only_the_flash_traffic_of_the_table_comes_out():
  cells = [flash_io.published(name) for name in flash_io.PUBLISHED]
  assert list(flash_io.published_claims(cells).values()) == [False, False, False, True, True]


def test_sweeps_vary_one_thing_at_a_time():
  sweeps = flash_io.sweeps(TINY)
  assert sweeps["N"] == [(256, 8, 512), (512, 8, 512)]
  assert sweeps["d"] == [(256, 8, 512), (256, 16, 512)]
  assert sweeps["M"] == [(256, 8, 512), (256, 8, 1024)]


@pytest.mark.parametrize("text", ["", "16", "16,x", "16,0", "16,16"])
def test_a_sweep_of_less_than_two_sizes_is_refused(text):
  with pytest.raises(ValueError, match=r"widths=.*; allowed: two or more integers"):
    flash_io.sweeps(flash_io.Config(widths=text))


def test_exponents_of_a_known_law():
  sizes = flash_io.sweeps(flash_io.Config())
  rows = [
    {"N": n, "d": d, "M": m, "flash": n**2 * d**1.5 / m, "standard": n}
    for sweep in sizes.values()
    for n, d, m in sweep
  ]
  found = list(flash_io.exponents(rows, sizes).values())
  assert found == pytest.approx([1, 0, 0, 2, 1.5, -1], abs=1e-9)


def test_a_run_counts_and_resumes(tmp_path, capsys):
  rows = flash_io.run(TINY, str(tmp_path))
  assert len(rows) == 4 + len(flash_io.PUBLISHED)
  assert all(math.isfinite(row["error"]) for row in rows if "flash" in row)
  said = capsys.readouterr().out
  assert "held:         4 runs moved what the formulas say" in said
  assert "did NOT hold: the printed GFLOPs are those" in said
  for name in ("config.json", "metrics.jsonl", "result.csv", "plot.png"):
    assert (tmp_path / name).stat().st_size > 0
  assert flash_io.run(TINY, str(tmp_path)) == rows
