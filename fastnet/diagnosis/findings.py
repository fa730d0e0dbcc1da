"""What a check of this machine finds, in one line, and what to do about it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from fastnet.errors import InputError


class Failed(Exception):
    """Something does not work. `remedy` is what to do, where it is more particular than the check's own."""

    def __init__(self, problem: str, remedy: str = "") -> None:
        super().__init__(problem)
        self.remedy = remedy


class Skipped(Exception):
    """There is nothing to check here. The message says why."""


class Check(NamedTuple):
    """`run` returns what it found, or raises; `remedy` is what to do where it raises any other error than Skipped."""

    name: str
    run: Callable[[], str]
    remedy: str


@dataclass(frozen=True)
class Finding:
    """`outcome` is ok, fails or skipped; `remedy` is empty unless it fails."""

    name: str
    outcome: str
    text: str
    remedy: str = ""


def examine(check: Check) -> Finding:
    """Runs a check. Whatever it raises is a finding, so that the next check can run."""
    try:
        return Finding(check.name, "ok", check.run())
    except Skipped as reason:
        return Finding(check.name, "skipped", str(reason))
    except Failed as problem:
        return Finding(check.name, "fails", str(problem), problem.remedy or check.remedy)
    except InputError as problem:  # says itself what to do
        return Finding(check.name, "fails", str(problem))
    except Exception as problem:  # whatever a library raises is what is to be found out
        text = " ".join(f"{type(problem).__name__}: {problem}".split())
        return Finding(check.name, "fails", f"{text:.300}", check.remedy)
