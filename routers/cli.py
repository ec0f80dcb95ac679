"""``penstock proxy``: the command line of the prefill/decode proxy."""

from __future__ import annotations

import asyncio
import logging
from typing import Literal, get_args

import click

from penstock.routers.config import ConfigError, Engine, ProxyConfig, split_prefill, split_urls


@click.command()
@click.option(
    "--prefill",
    multiple=True,
    metavar="URL[,PORT]",
    help="A prefill server; repeat, or separate by commas. PORT: its bootstrap port, on SGLang.",
)
@click.option(
    "--decode", multiple=True, metavar="URL", help="A decode server; repeat, or separate by commas."
)
@click.option(
    "--engine",
    type=click.Choice((*get_args(Engine), "auto")),
    default="auto",
    show_default=True,
    help="What the servers are; auto asks them.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", default=8080, show_default=True, help="Port to listen on; 0: any free one.")
@click.option("--max-body-mib", default=64.0, show_default=True, help="Largest request body.")
@click.option("--connect-timeout", default=5.0, show_default=True, help="Seconds to open a connection.")
@click.option("--prefill-timeout", default=600.0, show_default=True, help="Seconds for the prefill step.")
@click.option(
    "--first-byte-timeout", default=600.0, show_default=True, help="Seconds to the first byte of an answer."
)
@click.option("--idle-timeout", default=600.0, show_default=True, help="Seconds between two chunks.")
@click.option(
    "--drain-timeout", default=60.0, show_default=True, help="Seconds that requests may go on after SIGTERM."
)
@click.option("--probe-interval", default=5.0, show_default=True, help="Seconds between health probes.")
@click.option("--access-log", is_flag=True, help="One log line a request.")
def proxy(
    prefill: tuple[str, ...],
    decode: tuple[str, ...],
    engine: Literal["vllm", "sglang", "auto"],
    host: str,
    port: int,
    max_body_mib: float,
    connect_timeout: float,
    prefill_timeout: float,
    first_byte_timeout: float,
    idle_timeout: float,
    drain_timeout: float,
    probe_interval: float,
    access_log: bool,
) -> None:
    """Serve OpenAI's API in front of prefill and decode servers.

    A prompt is prefilled on one server and decoded on another; the KV cache moves between the two by their
    KV connector. The servers are all vLLM's, or all SGLang's.
    Example: penstock proxy --prefill http://a:8000 --decode http://b:8000,http://c:8000
    """
    prefill_urls, bootstrap_ports = split_prefill(prefill)
    try:
        config = ProxyConfig(
            prefill=prefill_urls,
            decode=split_urls(decode),
            engine=engine,
            bootstrap_ports=bootstrap_ports,
            host=host,
            port=port,
            max_body_bytes=int(max_body_mib * (1 << 20)),
            connect_timeout_s=connect_timeout,
            prefill_timeout_s=prefill_timeout,
            first_byte_timeout_s=first_byte_timeout,
            idle_timeout_s=idle_timeout,
            drain_timeout_s=drain_timeout,
            probe_interval_s=probe_interval,
        )
    except ConfigError as error:
        raise click.UsageError(str(error)) from None
    try:
        from penstock.routers.serve import serve
    except ModuleNotFoundError as error:
        raise click.ClickException(f"the proxy needs {error.name}: pip install 'penstock[proxy]'") from None
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s: %(message)s")
    try:
        cut = asyncio.run(
            serve(config, access_log=access_log, announce=lambda url: click.echo(f"proxy ready at {url}"))
        )
    except ConfigError as error:
        raise click.ClickException(str(error)) from None
    except OSError as error:
        raise click.ClickException(f"cannot listen on {host}:{port}: {error.strerror}") from None
    if cut:
        click.echo(f"{cut} requests were cut off", err=True)
