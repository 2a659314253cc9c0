"""The token store: tokens on disk, written safely, read for training, exported.

Raises MissingExtra if Lance is not installed; nothing else in smalto needs this folder.
"""

from importlib.util import find_spec

from smalto.core.errors import MissingExtra

if find_spec("lance") is None or find_spec("pyarrow") is None:
    raise MissingExtra("pylance", "store", "the token store")
