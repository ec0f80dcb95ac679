"""The one door for configuration: the sources that an engine has, merged into one frozen struct."""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping
from typing import Any, TypeVar

import msgspec
import msgspec.inspect

from penstock.connectors.config import FlowKVConfig
from penstock.kernels.shared_prefix.config import SharedPrefixConfig
from penstock.kernels.sparse.serving import ServingConfig
from penstock.schedulers.config import SchedulerConfig
from penstock.schedulers.suffix.config import SuffixConfig

T = TypeVar("T", bound=msgspec.Struct)

NAMESPACE = "penstock"
SECRETS = frozenset({"shared_key", "clients"})
SECTIONS = ("flowkv", "scheduler", "suffix", "sparse_attention", "shared_prefix_attention")

_PATH = re.compile(r"^(?P<what>.*?)(?: - at `\$\.(?P<path>[^`]*)`)?$", re.DOTALL)


class ConfigurationError(ValueError):
    """A value that cannot be used; the message names the key, what was given and what is allowed."""


def flowkv_config(
    additional_config: Mapping[str, Any] | None, extra_config: Mapping[str, Any] | None
) -> FlowKVConfig:
    """FlowKV's configuration from ``--additional-config`` (under ``penstock.flowkv``) and the connector's own
    ``kv_connector_extra_config``. The two merge; a key that both give must have one value.

    Raises:
        ConfigurationError: a contradiction, an unknown key, a wrong type or an impossible value.
    """
    ours = section(additional_config, "flowkv")
    merged = merge("flowkv", {"additional_config": ours, "kv_connector_extra_config": extra_config or {}})
    return convert("flowkv", merged, FlowKVConfig)


def scheduler_config(
    additional_config: Mapping[str, Any] | None, flags: Mapping[str, Any] | None = None
) -> SchedulerConfig:
    """Request scheduling's configuration from ``--additional-config`` (under ``penstock.scheduler``) and from
    flags. The two merge; a key that both give must have one value.

    Raises:
        ConfigurationError: a contradiction, an unknown key, a wrong type or an impossible value.
    """
    ours = section(additional_config, "scheduler")
    merged = merge("scheduler", {"additional_config": ours, "--request-scheduler": flags or {}})
    return convert("scheduler", merged, SchedulerConfig)


def suffix_config(additional_config: Mapping[str, Any] | None) -> SuffixConfig:
    """The suffix drafter's configuration from ``--additional-config`` (under ``penstock.suffix``).

    Raises:
        ConfigurationError: an unknown key, a wrong type or an impossible value.
    """
    return convert("suffix", section(additional_config, "suffix"), SuffixConfig)


def sparse_config(
    additional_config: Mapping[str, Any] | None, flags: Mapping[str, Any] | None = None
) -> ServingConfig:
    """Sparse attention's configuration from ``--additional-config`` (under ``penstock.sparse_attention``) and
    from flags. The two merge; a key that both give must have one value.

    Raises:
        ConfigurationError: a contradiction, an unknown key, a wrong type or an impossible value.
    """
    ours = section(additional_config, "sparse_attention")
    merged = merge("sparse_attention", {"additional_config": ours, "--sparse-attention": flags or {}})
    return convert("sparse_attention", merged, ServingConfig)


def shared_prefix_config(
    additional_config: Mapping[str, Any] | None, flags: Mapping[str, Any] | None = None
) -> SharedPrefixConfig:
    """The configuration of shared prefixes from ``--additional-config`` (under
    ``penstock.shared_prefix_attention``) and from flags. The two merge; a key that both give must have one
    value.

    Raises:
        ConfigurationError: a contradiction, an unknown key, a wrong type or an impossible value.
    """
    name = "shared_prefix_attention"
    ours = section(additional_config, name)
    merged = merge(name, {"additional_config": ours, "--shared-prefix-attention": flags or {}})
    return convert(name, merged, SharedPrefixConfig)


def section(additional_config: Mapping[str, Any] | None, name: str) -> Mapping[str, Any]:
    """One feature's part of ``additional_config["penstock"]``; empty where there is none.

    Raises:
        ConfigurationError: a part is no mapping, or belongs to no feature.
    """
    ours = (additional_config or {}).get(NAMESPACE, {})
    if not isinstance(ours, Mapping):
        raise ConfigurationError(f"{NAMESPACE}: given {ours!r}, allowed: an object with {_listed(SECTIONS)}")
    for key in ours:
        if key not in SECTIONS:
            raise ConfigurationError(f"{NAMESPACE}.{key}: unknown key, allowed: {_listed(SECTIONS)}")
    found = ours.get(name, {})
    if not isinstance(found, Mapping):
        raise ConfigurationError(f"{NAMESPACE}.{name}: given {found!r}, allowed: an object")
    return found


def merge(name: str, sources: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Join the keys of several sources, named for messages.

    Raises:
        ConfigurationError: two sources give one key different values.
    """
    merged: dict[str, Any] = {}
    origin: dict[str, str] = {}
    for source, values in sources.items():
        for key, value in values.items():
            if key in merged and merged[key] != value:
                one, other = _shown(key, merged[key]), _shown(key, value)
                raise ConfigurationError(
                    f"{name}.{key}: {origin[key]} says {one}, {source} says {other}; give it once"
                )
            merged[key] = value
            origin.setdefault(key, source)
    return merged


def convert(name: str, values: Mapping[str, Any], kind: type[T]) -> T:
    """Build the struct, strictly: no value is coerced into another type.

    Raises:
        ConfigurationError: an unknown key, a wrong type or an impossible value.
    """
    known = tuple(field.encode_name for field in msgspec.structs.fields(kind))
    for key in values:
        if key not in known:
            raise ConfigurationError(
                f"{name}.{key}: unknown key{_meant(key, known)}, allowed: {_listed(known)}"
            )
    try:
        return msgspec.convert(dict(values), kind, strict=True)
    except msgspec.ValidationError as error:
        raise ConfigurationError(_explain(name, values, kind, str(error))) from None


def _explain(name: str, values: Mapping[str, Any], kind: type[msgspec.Struct], message: str) -> str:
    match = _PATH.match(message)
    assert match is not None
    path = match["path"]
    if path is None:
        # The struct's own check of several fields, which names them itself.
        return f"{name}.{message}"
    key, *inner = re.split(r"[.\[]", path)
    allowed = match["what"].removeprefix("Expected ").split(", got ")[0].replace("`", "")
    value = values[key]
    if inner and isinstance(value, Mapping) and inner[0] in value:
        key, value = f"{key}.{inner[0]}", value[inner[0]]
    choices = "" if inner else _choices(kind, key)
    return f"{name}.{key}: given {_shown(key, value)}, allowed: {choices or allowed}"


def _choices(kind: type[msgspec.Struct], key: str) -> str:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    field = next(field for field in info.fields if field.encode_name == key)
    if not isinstance(field.type, msgspec.inspect.LiteralType):
        return ""
    return _listed(tuple(map(str, field.type.values)))


def _shown(key: str, value: Any) -> str:
    return "a secret" if key in SECRETS else repr(value)


def _meant(key: str, known: tuple[str, ...]) -> str:
    close = difflib.get_close_matches(str(key), known, n=1)
    return f" (did you mean {close[0]}?)" if close else ""


def _listed(names: tuple[str, ...]) -> str:
    return ", ".join(names)
