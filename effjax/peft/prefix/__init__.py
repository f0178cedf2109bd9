"""Prefix-tuning: trained keys and values before the tokens, the model frozen (arXiv 2101.00190).

What trains are the arrays at "prefix_key" and "prefix_value" of each attention, and those of the
modules that attributes choose at "module_key" and "module_value": `GENERAL` and `MODULES` are their
patterns, for training in stages (`trainable=`). A prefix has no merged form: it is served as it is.
"""

from effjax.peft.prefix.change import add, from_tokens, remove
from effjax.peft.prefix.flat import flat, put, reparametrize
from effjax.peft.prefix.layers import of
from effjax.peft.prefix.modules import add_modules, fold, remove_modules

GENERAL = r"/prefix_(key|value)/value$"
MODULES = r"/module_(key|value)/value$"

__all__ = [
  "GENERAL",
  "MODULES",
  "add",
  "add_modules",
  "flat",
  "fold",
  "from_tokens",
  "of",
  "put",
  "remove",
  "remove_modules",
  "reparametrize",
]
