"""Everything that touches private parts of the libraries that this package stands on.

Each module names the version that it was written for, which pyproject.toml pins, and why there is no public way. After
an update of a library, these are the modules to read again. A test keeps private parts out of all others.
"""
