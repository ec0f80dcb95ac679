"""``penstock bench``: the benches by name, each imported only when it is asked for."""

from __future__ import annotations

from importlib import import_module

import click

BENCHES = {
    "dlpm": "penstock.benchmarks.dlpm:bench",
    "flowkv": "penstock.benchmarks.flowkv:bench",
    "needle": "penstock.benchmarks.needle.bench:bench",
    "scheduler": "penstock.benchmarks.scheduler:bench",
    "sglang-dlpm": "penstock.benchmarks.sglang_dlpm:bench",
    "sglang-scheduler": "penstock.benchmarks.sglang_scheduler:bench",
    "sglang-flowkv": "penstock.benchmarks.sglang_flowkv:bench",
    "sglang-slo": "penstock.benchmarks.sglang_slo:bench",
    "sglang-sparse": "penstock.benchmarks.sglang_sparse:bench",
    "sglang-suffix": "penstock.benchmarks.sglang_suffix:bench",
    "shared-prefix": "penstock.benchmarks.shared_prefix:bench",
    "slo": "penstock.benchmarks.slo:bench",
    "slo-replan": "penstock.benchmarks.slo_replan:bench",
    "sparse": "penstock.benchmarks.sparse:bench",
    "sparse-kernel": "penstock.benchmarks.sparse_kernel:bench",
    "sparse-served": "penstock.benchmarks.sparse_served:bench",
    "speculation": "penstock.benchmarks.speculation:bench",
}


class LazyGroup(click.Group):
    """A group whose commands are ``module:attribute`` strings until somebody asks for one."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Names in alphabetical order."""
        return sorted(BENCHES)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import the bench of that name; None if there is none."""
        target = BENCHES.get(cmd_name)
        if target is None:
            return None
        module, _, attribute = target.partition(":")
        command = getattr(import_module(module), attribute)
        assert isinstance(command, click.Command)
        return command


@click.group(cls=LazyGroup)
def bench() -> None:
    """Measure a claim, with its peers in the same run.

    Every bench prints a table, writes a plot, and with --json FILE the rows and the claims.
    """
