from effjax.layers.stack import *  # noqa: F403
