"""Loops over tiles are found in machine code, and counted as one counts them by hand."""

import types

import pytest

from effjax.kernels.flash_attention.fused.sizes import Size
from scripts.checks import sass

HOPPER = """
        .section .text.forward,"ax",@progbits
.text.forward:
        /*0000*/                   MOV R1, c[0x0][0x28] ;
        /*0010*/                   LDGDEPBAR ;
        /*0020*/              @P1  BRA `(.L_x_2) ;
.L_x_0:
        /*0030*/                   IADD3 R9, R9, 0x1, RZ ;
.L_x_1:
        /*0040*/                   DEPBAR.LE SB0, 0x2 ;
        /*0050*/                   WARPGROUP.ARRIVE ;
        /*0060*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], RZ, !UPT ;
        /*0070*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR8], R24, gsb0 ;
        /*0080*/                   WARPGROUP.DEPBAR.LE gsb0, 0x0 ;
        /*0090*/                   MUFU.EX2 R4, R4 ;
        /*00a0*/             @!P2  BRA `(.L_x_3) ;
        /*00b0*/                   FADD R4, R4, R5 ;
.L_x_3:
        /*00c0*/                   LDGDEPBAR ;
        /*00d0*/              @P0  BRA `(.L_x_1) ;
        /*00e0*/              @P3  BRA `(.L_x_0) ;
.L_x_2:
        /*00f0*/                   DEPBAR.LE SB0, 0x0 ;
.L_x_4:
        /*0100*/                   DEPBAR.LE SB0, 0x1 ;
        /*0110*/                   DEPBAR.LE SB0, 0x3 ;
        /*0120*/                   HGMMA.64x128x16.F32.BF16 R24, gdesc[UR4], R24, gsb0 ;
        /*0130*/              @P0  BRA `(.L_x_4) ;
.L_x_5:
        /*0140*/                   IADD3 R9, R9, 0x1, RZ ;
        /*0150*/              @P0  BRA `(.L_x_5) ;
        /*0160*/                   EXIT ;
.L_x_6:
        /*0170*/                   BRA `(.L_x_6);
"""
AMPERE = """
.L_x_0:
        /*0000*/                   HMMA.16816.F32.BF16 R4, R8, R10, R4 ;
        /*0010*/                   HMMA.1688.F32.TF32 R4, R8, R10, R4 ;
        /*0020*/                   FFMA R4, R8, R10, R4 ;
        /*0030*/              @P0  BRA `(.L_x_0) ;
"""
NUMBERS = """
.L_x_0:
        /*0000*/                   FFMA R4, R8, R10, R4 ;
        /*0010*/              @P0  BRA `(.L_x_0) ;
"""


def test_innermost_loops_with_products_in_order():
  first, second = sass.loops(HOPPER)
  assert (len(first.instructions), first.products, first.rest, first.exponentials) == (10, 2, 8, 1)
  assert (len(second.instructions), second.products, second.rest) == (4, 1, 3)
  assert (first.wait, second.wait) == (2, 1)
  assert first.multiplied * 4 == 2 * 64 * 128 * 16


def test_products_of_other_shapes_and_of_numbers():
  (loop,) = sass.loops(AMPERE)
  assert (loop.products, loop.rest, loop.wait) == (2, 2, None)
  assert loop.multiplied == 16 * 8 * (16 + 8)
  (loop,) = sass.loops(NUMBERS)
  assert (loop.products, loop.multiplied) == (1, 32)


def test_instructions_for_tensor_cores_are_counted():
  assert [sass.tensor(code) for code in (HOPPER, AMPERE, NUMBERS, "")] == [3, 2, 0, 0]


def test_figures_are_those_of_a_tile_of_128_squared_and_eight_warps():
  job = types.SimpleNamespace(
    any_full=True, any_partial=True, query=types.SimpleNamespace(shape=(1, 64, 1, 16))
  )
  figures = sass.figures(HOPPER, "forward", job, Size(64, 128, 4))
  assert figures == {
    "wait": 1,
    "rest": 8,
    "partial": 3,
    "exponentials": 1,
    "wgmma": True,
    "useful": pytest.approx(1.0),
  }
  twice = sass.figures(HOPPER, "forward", job, Size(64, 128, 8))
  assert (twice["rest"], twice["useful"]) == (16, 0.5)


def test_no_figures_where_there_are_not_as_many_loops_as_kinds_of_tiles():
  job = types.SimpleNamespace(any_full=True, any_partial=True)
  assert sass.figures("", "forward", job, Size(64, 128, 4)) == {}
