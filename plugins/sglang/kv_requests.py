"""One request of a P/D pair of SGLang: its half on prefill and its half on decode."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sglang.srt.disaggregation.common.conn import CommonKVReceiver, CommonKVSender

if TYPE_CHECKING:
    from penstock.plugins.sglang.kv_manager import FlowKVManager


class FlowKVSender(CommonKVSender):
    """One request on prefill."""

    def __init__(self, mgr: FlowKVManager, *args: Any, **kwargs: Any) -> None:
        super().__init__(mgr, *args, **kwargs)
        # Decode may have come first.
        if (reason := mgr.refused.pop(self.bootstrap_room, None)) is not None:
            mgr.fail_room(self.bootstrap_room, reason)

    def poll(self) -> Any:
        """As stock's."""
        self.kv_mgr.advance_serving()
        return super().poll()

    def abort(self) -> None:
        """The request is given up here; decode hears of it."""
        super().abort()
        self.kv_mgr.fail_room(self.bootstrap_room, "prefill gave the request up")

    def clear(self) -> None:
        """The request's pages go back to the pool."""
        self.kv_mgr.serving.rooms.forget(self.bootstrap_room)
        super().clear()


class FlowKVReceiver(CommonKVReceiver):
    """One request on decode."""

    def poll(self) -> Any:
        """As stock's."""
        self.kv_mgr.advance_reading()
        return super().poll()

    def failure_exception(self) -> None:
        """As stock's; a prefill server that this one cannot work with hears that nobody will come."""
        if self.bootstrap_addr in self.kv_mgr.incompatible and not self.abort_notified:
            rank = self._get_bootstrap_info_from_server(0, 0, 0, 0)
            self.bootstrap_infos = None if rank is None else [rank]
            self.ensure_abort_notified()
        super().failure_exception()

    def clear(self) -> None:
        """The request's pages are decode's own now, or nobody's."""
        self.kv_mgr.forget_room(self.bootstrap_room)
        super().clear()
