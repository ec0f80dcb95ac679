"""The options that ``vllm serve`` gains, and how they join vLLM's own configuration.

The options are ordinary ones. When a parser has read everything, command line and YAML file alike, they are
merged into vLLM's own arguments: their order never matters and only vLLM's own types leave the parser. This
file holds FlowKV's, ``scheduler_flags`` those of request scheduling, ``sparse_flags`` and ``prefix_flags``
those of attention.
"""

from __future__ import annotations

import dataclasses
from argparse import SUPPRESS, ArgumentParser, Namespace
from collections.abc import Callable, Mapping, Sequence
from typing import Any, get_args

from penstock.connectors.config import DigestMode, FlowKVConfig, Policy
from penstock.plugins.configuration import ConfigurationError, flowkv_config, merge
from penstock.plugins.features import FeatureError
from penstock.plugins.vllm import prefix_flags, scheduler_flags, sparse_flags

GROUP = "Penstock"
FLOWKV_NAMES = ("flowkv", "FlowKVConnector")
ROLES = ("kv_producer", "kv_consumer", "kv_both")
DEFAULT_ROLE = "kv_both"
PREFIX = "flowkv_"


@dataclasses.dataclass(frozen=True, slots=True)
class Option:
    """A short option for one field of ``FlowKVConfig``; the struct, not the parser, judges the value."""

    key: str
    kind: Callable[[str], Any]
    help: str
    choices: tuple[str, ...] = ()

    @property
    def flag(self) -> str:
        """The option as typed."""
        return "--" + self.dest.replace("_", "-")

    @property
    def dest(self) -> str:
        """The attribute of the parsed namespace."""
        return PREFIX + self.key


def whole(text: str) -> int | str:
    """A whole number, or the text as it is."""
    try:
        return int(text)
    except ValueError:
        return text


def real(text: str) -> float | str:
    """A number, or the text as it is."""
    try:
        return float(text)
    except ValueError:
        return text


OPTIONS = (
    Option("host", str, "Address that FlowKV's control channel binds to."),
    Option("port", whole, "TCP port of FlowKV's control channel; 0 takes a free one."),
    Option("advertise_host", str, "Address that peers use, where it differs from --flowkv-host."),
    Option("pickup_s", real, "Seconds that prefill keeps blocks for decode's first sign of life."),
    Option("lease_s", real, "Seconds that prefill keeps blocks after decode's last sign of life."),
    Option("digest", str, "Which blocks are hashed on both sides of a transfer.", get_args(DigestMode)),
    Option("allocation", str, "Prefer contiguous blocks, or keep vLLM's own order.", get_args(Policy)),
)


def extend(parser: ArgumentParser) -> None:
    """Add the options to a parser that has vLLM's engine arguments; a parser that has them is left alone."""
    if "--kv-connector" in parser._option_string_actions:
        return
    group = parser.add_argument_group(GROUP, "Plugins, see `penstock doctor`.")
    scheduler_flags.add_flag(group)
    sparse_flags.add_flag(group)
    prefix_flags.add_flag(group)
    group.add_argument(
        "--kv-connector",
        metavar="NAME",
        default=SUPPRESS,
        help="KV connector: flowkv, or the name of any connector that vLLM has. Joins --kv-transfer-config.",
    )
    help_text = f"Role of this server, {DEFAULT_ROLE} if not given."
    group.add_argument("--kv-role", metavar=_one_of(ROLES), default=SUPPRESS, help=help_text)
    for option in OPTIONS:
        default = getattr(FlowKVConfig(), option.key)
        text = option.help if default is None else f"{option.help} (default: {default})"
        metavar = _one_of(option.choices) if option.choices else None
        group.add_argument(option.flag, type=option.kind, metavar=metavar, default=SUPPRESS, help=text)
    _merge_after_parsing(parser)


def _one_of(choices: Sequence[str]) -> str:
    return "{" + ",".join(choices) + "}"


def _merge_after_parsing(parser: ArgumentParser) -> None:
    read = parser.parse_known_args

    def parse_known_args(
        args: Sequence[str] | None = None, namespace: Namespace | None = None
    ) -> tuple[Namespace, list[str]]:
        found, rest = read(args, namespace)
        try:
            found.kv_transfer_config = transfer_config(found)
            scheduler_flags.join(found)
            sparse_flags.join(found)
            prefix_flags.join(found)
        except (ConfigurationError, FeatureError) as error:
            # One line: the usage of an engine's parser fills screens.
            parser.exit(2, f"{parser.prog}: error: {error}\n")
        return found, rest

    # On this parser alone, which vLLM has just handed to us; the class stays as it is.
    parser.parse_known_args = parse_known_args  # type: ignore[method-assign, assignment]


def transfer_config(namespace: Namespace) -> Any:
    """vLLM's ``KVTransferConfig`` for a parsed command line, or None where none is asked for.

    Raises:
        ConfigurationError: options contradict ``--kv-transfer-config``, or a value is impossible.
        FeatureError: FlowKV is asked for and cannot be applied to this vLLM.
    """
    given = getattr(namespace, "kv_transfer_config", None)
    short = {
        option.key: value
        for option in OPTIONS
        if (value := getattr(namespace, option.dest, None)) is not None
    }
    name = getattr(namespace, "kv_connector", None) or (FLOWKV_NAMES[0] if short else None)
    role = getattr(namespace, "kv_role", None)
    fields = {} if given is None else {f.name: getattr(given, f.name) for f in dataclasses.fields(given)}
    if name is not None or role is not None:
        _join(fields, name, role, short)
    if _names_flowkv(fields):
        _check_flowkv(fields, getattr(namespace, "additional_config", None))
    if name is None and role is None:
        return given
    from vllm.config import KVTransferConfig

    return KVTransferConfig(**fields)


def _join(fields: dict[str, Any], name: str | None, role: str | None, short: Mapping[str, Any]) -> None:
    in_json = fields.get("kv_connector")
    if name is not None:
        if in_json is not None and not _same_connector(name, in_json):
            _contradiction("--kv-connector", name, "kv_connector", in_json)
        if in_json is None:
            _check_known(name, fields.get("kv_connector_module_path"))
            fields["kv_connector"] = name
    if role is not None and role not in ROLES:
        raise ConfigurationError(f"--kv-role: given {role}, allowed: {', '.join(ROLES)}")
    if role is not None and fields.get("kv_role") not in (None, role):
        _contradiction("--kv-role", role, "kv_role", fields["kv_role"])
    if fields.get("kv_connector") is not None:
        fields["kv_role"] = role or fields.get("kv_role") or DEFAULT_ROLE
    elif role is not None:
        raise ConfigurationError(f"--kv-role: given {role}, but no connector; add --kv-connector")
    if short:
        _join_short(fields, short)


def _join_short(fields: dict[str, Any], short: Mapping[str, Any]) -> None:
    if not _names_flowkv(fields):
        flag = next(option.flag for option in OPTIONS if option.key in short)
        raise ConfigurationError(f"{flag}: given, but the KV connector is {fields['kv_connector']}")
    extra = fields.get("kv_connector_extra_config") or {}
    fields["kv_connector_extra_config"] = merge(
        "flowkv", {"--flowkv-*": short, "kv_connector_extra_config": extra}
    )


def _same_connector(one: str, other: str) -> bool:
    return one == other or (one in FLOWKV_NAMES and other in FLOWKV_NAMES)


def _contradiction(flag: str, value: str, key: str, other: str) -> None:
    raise ConfigurationError(f"{flag} {value} contradicts --kv-transfer-config, where {key} is {other}")


def _check_known(name: str, module_path: str | None) -> None:
    if module_path:
        return
    from vllm.distributed.kv_transfer.kv_connector.factory import KVConnectorFactory

    known = KVConnectorFactory._registry
    if name not in known:
        raise ConfigurationError(f"--kv-connector: given {name}, allowed: {', '.join(known)}")


def _names_flowkv(fields: Mapping[str, Any]) -> bool:
    return fields.get("kv_connector") in FLOWKV_NAMES


def _check_flowkv(fields: Mapping[str, Any], additional_config: Any) -> None:
    from penstock.plugins.features import require
    from penstock.plugins.vllm.features import FLOWKV
    from penstock.plugins.vllm.installation import upstream

    extra = fields.get("kv_connector_extra_config")
    flowkv_config(additional_config if isinstance(additional_config, Mapping) else None, extra)
    require(FLOWKV, upstream())
