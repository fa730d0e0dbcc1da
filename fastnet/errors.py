from __future__ import annotations


class InputError(Exception):
    """Bad input. The message is one line that names what is wrong and what to do."""


class LostError(Exception):
    """Other ranks are gone, or ask this one to start anew. The message is one line; every rank says its own."""
