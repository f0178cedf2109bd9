from effjax.layers.spec import *  # noqa: F403
