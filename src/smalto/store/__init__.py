"""Token store: tokens on disk, with atomic commits, a training data set and exports.

Importing it raises MissingExtra if Lance is not installed. Nothing else in smalto needs Lance.
"""

from importlib.util import find_spec

from smalto.core.errors import MissingExtra

if find_spec("lance") is None or find_spec("pyarrow") is None:
    raise MissingExtra("pylance", "store", "the token store")
