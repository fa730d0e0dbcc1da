"""Settings from files and back: the TOML of --config, a run's manifest.json, and what --print-config writes."""

from __future__ import annotations

import dataclasses
import sys
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import msgspec
import tomli_w

from fastnet.config import PRESETS, Augment, Config, choose_preset, with_flags
from fastnet.errors import InputError

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

MAX_BYTES = 1 << 24  # of a manifest, which grows by an entry each time its run is started


def settings_of(given: dict[str, Any], data_kind: str) -> Config:
    """The settings that a command line means: those of the preset, over them the file of --config, over both the flags.

    `given` is what `cli.SettingsParser.parse` returns. Raises InputError for values that are out of range.
    """
    values = file_settings(given)
    preset = PRESETS[choose_preset(given["preset"], data_kind)]
    try:
        before = preset(given.get("network") or values.get("network") or Config.network).to_json()
        augment = {**before["augment"], **values.get("augment", {})}
        config = Config.from_json({**before, **values, "augment": augment})
    except (msgspec.ValidationError, InputError, TypeError) as error:
        raise InputError(f"--config {given['config']}: {error}") from error
    return with_flags(config, given)


def meeting_of(given: dict[str, Any]) -> tuple[float, str]:
    """The `timeout` and `device` of the same command line. The ranks meet by them before they know the data, and so the
    preset, which sets neither."""
    names = ("timeout", "device")
    values = file_settings(given)
    try:
        config = Config.from_json({name: values[name] for name in names if name in values})
    except (msgspec.ValidationError, InputError) as error:
        raise InputError(f"--config {given['config']}: {error}") from error
    config = with_flags(config, {name: given[name] for name in names if name in given})
    return config.timeout, config.device


def file_settings(given: dict[str, Any]) -> dict[str, Any]:
    """What the file of --config sets, {} without one. Raises InputError, naming the file, for what is no setting."""
    path: Path | None = given["config"]
    if path is None:
        return {}
    values = _read(path)
    augment = values.get("augment", {})
    for owner, names in ((Config, values), (Augment, augment if isinstance(augment, dict) else {})):
        known = [item.name for item in dataclasses.fields(owner)]
        for name in names:
            if name not in known:
                close = get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else f"; known are {', '.join(known)}"
                raise InputError(f"--config {path}: {name} is no setting{hint}")
    if not isinstance(values.get("network", ""), str):
        raise InputError(f"--config {path}: network must be a string")
    return values


def _read(path: Path) -> dict[str, Any]:
    if not path.is_file() or path.stat().st_size > MAX_BYTES:
        raise InputError(f"--config {path}: no such file; give a TOML file, or a run's manifest.json")
    try:
        if path.suffix == ".json":
            content = msgspec.json.decode(path.read_bytes(), type=dict[str, Any])
            if not isinstance(content.get("config"), dict):
                raise InputError(f"--config {path}: is no run's manifest.json; it has no config")
            return content["config"]
        return tomllib.loads(path.read_text(encoding="utf-8"))
    except (msgspec.MsgspecError, ValueError, RecursionError, OSError) as error:
        raise InputError(f"--config {path}: cannot be read ({error})") from error


def as_toml(config: Config) -> str:
    """The settings as TOML, for --config to read."""
    return tomli_w.dumps(config.to_json())
