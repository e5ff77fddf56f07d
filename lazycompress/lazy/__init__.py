"""The module engine: the user's own module, some of whose calls are not computed."""
