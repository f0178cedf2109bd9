"""The flag of checks that can also run where there is no device."""

from absl import flags

INTERPRET = flags.DEFINE_bool("interpret", False, "Interpret the kernels, on small problems.")
