"""Functions compiled by numba."""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable
from typing import Any

from numba import njit

from fastnet.errors import InputError


def jit(**options: Any) -> Callable[[Callable], Any]:
    """numba's compiler, without the interpreter's lock. It keeps what it compiles where there is a place for it."""

    def compiler(function: Callable) -> Any:
        try:
            return njit(nogil=True, error_model="numpy", cache=True, **options)(function)
        except RuntimeError:  # neither the function's folder nor the user's cache is writable
            return njit(nogil=True, error_model="numpy", **options)(function)

    return compiler


def compile_for(function: Any, *arguments: Any, what: str) -> None:
    """Calls a function of `jit`, which compiles it for such arguments.

    Says on stderr how long that took, unless it was found in numba's cache. Raises InputError if that is damaged.
    """
    began = time.perf_counter()
    try:
        function(*arguments)
    except (EOFError, pickle.UnpicklingError) as error:  # numba syncs no file before a crash of the machine
        raise InputError(
            f"{function.stats.cache_path}: numba's cache is damaged; remove its *.nbi files"
        ) from error
    if function.stats.cache_hits.total() == 0:
        print(f"{what} in {time.perf_counter() - began:.1f} s", file=sys.stderr, flush=True)
