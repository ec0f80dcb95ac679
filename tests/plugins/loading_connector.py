"""A stand-in for a KV connector, as far as a scheduler asks one."""

from __future__ import annotations

from typing import Any

from vllm.v1.request import Request


class LoadingConnector:
    """Stands for a KV connector that has the first tokens of every prompt elsewhere."""

    requires_kv_delivery = False
    supports_divergent_local_hybrid_hits = False

    def __init__(self, tokens: int, *, later: bool) -> None:
        self.answer = tokens, later
        self.asked: set[str] = set()

    def get_num_new_matched_tokens(self, request: Request, num_computed_tokens: int) -> tuple[int, bool]:
        if request.request_id in self.asked:
            return 0, False
        self.asked.add(request.request_id)
        return self.answer

    def request_finished(self, *_: Any) -> tuple[bool, None]:
        return False, None

    def get_loaded_kv_cache_group_ids(self, request: Request) -> tuple[int, ...]:
        return (0,)

    def get_external_cache_hit_sources(self, *_: Any) -> dict[Any, int]:
        return {}

    def __getattr__(self, name: str) -> Any:
        return lambda *_, **__: None
