"""What the servers are: one engine for all of them, and the role of each, found out from the servers
themselves."""

from __future__ import annotations

import logging

import aiohttp
import msgspec

from penstock.routers.config import ConfigError, Engine, ProxyConfig
from penstock.routers.pool import Role, Server

SERVER_INFO_PATH = "/server_info"
"""What SGLang was started with."""
MODEL_INFO_PATH = "/model_info"
"""What of that has changed since, the role among it."""
NAMES: dict[Engine, str] = {"vllm": "vLLM", "sglang": "SGLang"}

log = logging.getLogger("penstock.proxy")


class Misfit(Exception):
    """A healthy server that requests cannot be sent to; the message says which and why."""


class NotReady(Exception):
    """A server that cannot say yet what it is."""


class ServerInfo(msgspec.Struct):
    """What SGLang's ``/server_info`` says of its part in a hand-off."""

    disaggregation_mode: str
    disaggregation_bootstrap_port: int | None = None
    enable_pd_role_switch: bool = False


class ModelInfo(msgspec.Struct):
    """What SGLang's ``/model_info`` says of it."""

    disaggregation_mode: Role


class Deployment:
    """The engine of the servers, once the first of them is up or an option has said it."""

    def __init__(self, config: ProxyConfig) -> None:
        self._told: Engine | None = None if config.engine == "auto" else config.engine
        self.engine = self._told
        self._ports = config.bootstrap_ports
        self._misfits: dict[Server, str] = {}
        self._started = False

    def check_start(self) -> None:
        """Refuse to start in front of servers that are up and do not fit.

        Raises:
            ConfigError: the first of them.
        """
        for misfit in self._misfits.values():
            raise ConfigError(misfit)
        self._started = True

    async def admit(
        self, session: aiohttp.ClientSession, server: Server, timeout: aiohttp.ClientTimeout
    ) -> None:
        """Find out what ``server`` is and whether it fits; it is healthy, and was not before.

        Raises:
            Misfit: it does not.
            NotReady, aiohttp.ClientError, TimeoutError: it did not say.
        """
        try:
            await self._look_at(session, server, timeout)
        except Misfit as misfit:
            if self._started and self._misfits.get(server) != str(misfit):
                log.warning("%s", misfit)
            self._misfits[server] = str(misfit)
            raise
        self._misfits.pop(server, None)

    async def _look_at(
        self, session: aiohttp.ClientSession, server: Server, timeout: aiohttp.ClientTimeout
    ) -> None:
        if self._told == "vllm":
            return
        info = await self._info_of(session, server, timeout)
        engine: Engine = self._told or ("vllm" if info is None else "sglang")
        if self.engine is not None and self.engine != engine:
            raise Misfit(
                f"{server.url} runs {NAMES[engine]} and the others {NAMES[self.engine]}: "
                "a KV cache does not move between engines"
            )
        if engine == "sglang":
            await self._check_sglang(session, server, info, timeout)
        elif server.url in self._ports:
            raise Misfit(f"{server.url} runs vLLM, which has no bootstrap port")
        self.engine = engine

    async def _check_sglang(
        self,
        session: aiohttp.ClientSession,
        server: Server,
        info: ServerInfo | None,
        timeout: aiohttp.ClientTimeout,
    ) -> None:
        said = None if info is None else info.disaggregation_bootstrap_port
        server.bootstrap_port = self._ports.get(server.url, said)
        server.may_switch = info is not None and info.enable_pd_role_switch
        if server.may_switch:
            await self.follow(session, server, timeout)
        elif info is not None and info.disaggregation_mode != server.role:
            raise Misfit(
                f"{server.url} is given as a {server.role} server and runs with "
                f"--disaggregation-mode {info.disaggregation_mode}"
            )
        if server.role == "prefill" and server.bootstrap_port is None:
            raise Misfit(
                f"{server.url} does not say its bootstrap port: give it, --prefill {server.url},PORT"
            )

    async def follow(
        self, session: aiohttp.ClientSession, server: Server, timeout: aiohttp.ClientTimeout
    ) -> None:
        """Ask a server that may change roles which one it has, and count it there from now on.

        Raises:
            NotReady, aiohttp.ClientError, TimeoutError: it did not say.
        """
        async with session.get(server.url + MODEL_INFO_PATH, timeout=timeout) as response:
            if response.status != 200:
                raise NotReady(f"{MODEL_INFO_PATH} answered {response.status}")
            try:
                role = msgspec.json.decode(await response.read(), type=ModelInfo).disaggregation_mode
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                raise NotReady(f"{MODEL_INFO_PATH} names neither prefill nor decode") from None
        if role != server.role:
            log.warning("%s was a %s server and is a %s server now", server.url, server.role, role)
            server.switch(role)

    async def _info_of(
        self, session: aiohttp.ClientSession, server: Server, timeout: aiohttp.ClientTimeout
    ) -> ServerInfo | None:
        """What an SGLang server says of itself; None for another one."""
        async with session.get(server.url + SERVER_INFO_PATH, timeout=timeout) as response:
            if response.status in (401, 403) and not self._told:
                raise Misfit(
                    f"{server.url} does not say what it is without a key: give --engine vllm or sglang"
                )
            if response.status >= 500:
                raise NotReady(f"{SERVER_INFO_PATH} answered {response.status}")
            if response.status != 200:
                return None
            try:
                return msgspec.json.decode(await response.read(), type=ServerInfo)
            except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError):
                return None
