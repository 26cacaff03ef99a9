"""A chat endpoint on this machine that answers as it is told, in a thread of its own."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any


@dataclass(slots=True, frozen=True)
class Reply:
    """What one request is answered with."""

    text: str | None = None
    """The message's content."""
    status: int = 200
    body: str | None = None
    """In place of a chat completion."""
    headers: dict[str, str] = field(default_factory=dict)
    delay_s: float = 0.0
    drop: bool = False
    """The connection is closed without an answer."""
    finish_reason: str = "stop"

    def payload(self) -> bytes:
        body = self.body
        if body is None:
            choice = {"message": {"role": "assistant", "content": self.text}, "finish_reason": self.finish_reason}
            body = json.dumps({"choices": [choice]})
        content = body.encode()
        head = [f"HTTP/1.1 {self.status} X", f"Content-Length: {len(content)}", "Content-Type: application/json"]
        head += [f"{name}: {value}" for name, value in self.headers.items()]
        return "\r\n".join([*head, "", ""]).encode() + content


@dataclass(slots=True)
class Request:
    """What was asked."""

    path: str
    headers: dict[str, str]
    body: dict[str, Any]
    at: float
    """Seconds of the server's clock."""

    @property
    def text(self) -> str:
        """The last message."""
        content: str = self.body["messages"][-1]["content"]
        return content


Answer = Callable[[Request], Reply]


class FakeEndpoint:
    """Serves ``answer`` at ``base_url`` while it is open; ``requests`` holds what came, in order (``keep``)."""

    def __init__(self, answer: Answer, *, keep: bool = True) -> None:
        self.requests: list[Request] = []
        self.requested = 0
        self.most_at_once = 0
        self.connections = 0
        self.base_url = ""
        self._answer = answer
        self._keep = keep
        self._at_once = 0

    async def serve(self, ready: Callable[[str], None], stop: asyncio.Event) -> None:
        """Until ``stop``; ``ready`` is told the address."""
        async with await asyncio.start_server(self._connection, "127.0.0.1", 0, backlog=1024) as server:
            ready(f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}/v1")
            await stop.wait()
            for task in asyncio.all_tasks() - {asyncio.current_task()}:
                task.cancel()

    @contextlib.contextmanager
    def open(self) -> Iterator[FakeEndpoint]:
        started, loop = threading.Event(), asyncio.new_event_loop()
        stop = asyncio.Event()

        def ready(url: str) -> None:
            self.base_url = url
            started.set()

        thread = threading.Thread(target=lambda: loop.run_until_complete(self.serve(ready, stop)), daemon=True)
        thread.start()
        assert started.wait(10)
        try:
            yield self
        finally:
            loop.call_soon_threadsafe(stop.set)
            thread.join(10)
            loop.close()

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        try:
            with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
                while await self._exchange(reader, writer):
                    pass
        finally:
            writer.close()

    async def _exchange(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> bool:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in head[1:] if line)}
        body = json.loads(await reader.readexactly(int(headers["content-length"])))
        request = Request(head[0].split()[1], headers, body, asyncio.get_running_loop().time())
        self.requested += 1
        if self._keep:
            self.requests.append(request)
        self._at_once += 1
        self.most_at_once = max(self.most_at_once, self._at_once)
        try:
            reply = self._answer(request)
            if reply.delay_s:
                await asyncio.sleep(reply.delay_s)
        finally:
            self._at_once -= 1
        if reply.drop:
            writer.transport.abort()
            return False
        writer.write(reply.payload())
        await writer.drain()
        return True
