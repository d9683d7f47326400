"""lmlab: language-model research in JAX as pure functions that compose.

Import what you need from its module (`from lmlab.models.transformer import transformer`): nothing is
imported here, so that `lmlab --help` and the configs never wait for JAX.
"""

__version__ = "0.1.0"
