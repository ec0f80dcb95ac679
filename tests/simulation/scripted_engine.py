"""A small engine with closed-form behaviour, and requests for it."""

from __future__ import annotations

import zlib

from penstock.simulation.records import Ask, Batch, Piece, Progress, Row


def ask(name, arrival=0.0, *, prompt=100, output=3, client="", **more):
    key = zlib.crc32(name.encode())
    return Ask(
        request_id=name,
        arrival_s=arrival,
        prompt=(Piece(key, prompt),),
        output_tokens=output,
        answer=key + 1,
        client=client,
        **more,
    )


class OneAtATime:
    """Serves in order of arrival, one request at a time: the whole prompt in a step, then a token a step."""

    def __init__(self):
        self.queue = []
        self.made = 0

    def add(self, one):
        self.queue.append(one)

    def schedule(self):
        if not self.queue:
            return Batch([])
        head = self.queue[0]
        start = head.prompt_tokens + self.made - 1 if self.made else 0
        return Batch([Row(head.request_id, start, 1 if self.made else head.prompt_tokens)])

    def complete(self, batch):
        if not batch.rows:
            return []
        head, self.made = self.queue[0], self.made + 1
        finished = self.made == head.output_tokens
        if finished:
            self.queue.pop(0)
            self.made = 0
        return [Progress(head.request_id, 1, finished)]

    def describe(self):
        return f"{len(self.queue)} wait"
