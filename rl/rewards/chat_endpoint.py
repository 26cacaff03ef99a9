"""An OpenAI-compatible chat endpoint, asked until it gives an answer that can be read.

What may pass is tried again: 408, 409, 425, 429 and 5xx (``Retry-After`` holds back every call), dropped connections,
requests that take too long, replies that cannot be read. What only the user can put right is a ``ConfigError`` at once:
401, 402, 404, 405, a spent quota, and, as long as nothing was ever answered, an address that cannot be reached and any
other refusal.
"""

from __future__ import annotations

import asyncio
import email.utils
import functools
import json
import os
import random
import re
import ssl
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from posttrain.rl.errors import ConfigError, RewardError

if TYPE_CHECKING:
    import httpx

FIRST_WAIT_S = 0.5
"""Before the second attempt; doubled for each one after it, with jitter."""
LONGEST_WAIT_S = 8.0
CONNECT_TIMEOUT_S = 10.0
IDLE_S = 5.0
"""Connections are kept open this long for the next call."""
PASSING = (408, 409, 425, 429)
"""Besides 5xx: the same request may succeed later."""
USERS_OWN = (401, 402, 404, 405)
"""Key, account, address or model are wrong: no request will succeed."""


class _Passing(Exception):
    """A failed attempt; another may succeed, not before ``wait_s`` where the endpoint said so."""

    def __init__(self, message: str, wait_s: float = 0.0) -> None:
        super().__init__(message)
        self.wait_s = wait_s


@dataclass(slots=True)
class _Connections:
    """Of one event loop: a client for each call under way, since httpx's own pool takes time in the square of them."""

    keeper: asyncio.Task[None]
    """Closes them when no call was under way for a while, and when the loop ends."""
    idle: list[httpx.AsyncClient] = field(default_factory=list)
    calls: int = 0
    used: float = 0.0
    """When a call ended last, on the loop's clock."""


@dataclass(slots=True)
class ChatEndpoint:
    """Where to ask, and what calls share. May be used from several event loops, one after another or at once."""

    base_url: str
    """Up to and including ``/v1``."""
    model: str
    api_key_env: str | None
    """Name of the environment variable that holds the key; the key itself is read for use and not kept."""
    request: Mapping[str, Any]
    """Further fields of each request's body."""
    retries: int
    request_timeout: float
    """Seconds of one attempt."""
    _answered: bool = False
    _paused_until: float = 0.0
    _open: dict[asyncio.AbstractEventLoop, _Connections] = field(default_factory=dict)
    _jitter: random.Random = field(default_factory=random.Random)

    def __post_init__(self) -> None:
        """Raises ``ValueError`` for an address or a key that cannot be right."""
        if not re.match(r"https?://[^/\s]+", self.base_url):
            raise ValueError(f"base_url {self.base_url!r} is no address; like http://localhost:8000/v1")
        if self.api_key_env is None:
            return
        if not re.fullmatch(r"[A-Za-z_]\w*", self.api_key_env):
            raise ValueError("api_key_env is the name of an environment variable, not the key: api_key_env = 'MY_KEY'")
        if not os.environ.get(self.api_key_env):
            raise ValueError(f"the environment variable {self.api_key_env} (api_key_env) is not set")

    @property
    def url(self) -> str:
        """Where requests go."""
        return f"{self.base_url.rstrip('/')}/chat/completions"

    async def ask(self, text: str, read: Callable[[str], float]) -> float:
        """What ``read`` makes of the reply to ``text``; it raises ``ValueError`` for one that cannot be read.

        Raises ``RewardError`` when every attempt failed, ``ConfigError`` for what the user must put right.
        """
        body = {"model": self.model, "messages": [{"role": "user", "content": text}], **self.request}
        async with self._client() as http:
            for attempt in range(self.retries + 1):
                await self._wait(attempt)
                try:
                    return await self._attempt(http, body, read)
                except _Passing as error:
                    self._paused_until = max(self._paused_until, time.monotonic() + error.wait_s)
                    failed = error
        attempts = f"{self.retries + 1} attempts" if self.retries else "one attempt"
        message = f"{self.url}: {attempts}, the last: {failed}"
        if not self._answered:
            raise ConfigError(f"{message}; nothing was ever answered: check base_url, and that the server is up")
        raise RewardError(message)

    async def _wait(self, attempt: int) -> None:
        backoff = min(LONGEST_WAIT_S, FIRST_WAIT_S * 2 ** (attempt - 1)) if attempt else 0.0
        wait_s = max(backoff * self._jitter.uniform(0.5, 1.0), self._paused_until - time.monotonic())
        if wait_s > 0:
            await asyncio.sleep(wait_s)

    async def _attempt(self, http: httpx.AsyncClient, body: Mapping[str, Any], read: Callable[[str], float]) -> float:
        import httpx

        try:
            async with asyncio.timeout(self.request_timeout):
                response = await http.post(self.url, json=body)
        except TimeoutError:
            raise _Passing(f"no answer within {self.request_timeout:g} s") from None
        except (httpx.ConnectError, httpx.ConnectTimeout) as error:
            if not self._answered:
                raise ConfigError(f"{self.url} cannot be reached ({error}): check base_url") from None
            raise _Passing(f"cannot be reached ({error})") from None
        except (httpx.TransportError, httpx.DecodingError) as error:
            raise _Passing(f"{type(error).__name__} {error}".strip()) from None
        if response.status_code != 200:
            raise self._refusal(response)
        content = _content(response)
        self._answered = True
        try:
            return read(content)
        except ValueError as error:
            raise _Passing(str(error)) from None

    def _refusal(self, response: httpx.Response) -> Exception:
        status, (code, words) = response.status_code, _complaint(response)
        answered = f"{self.url} answered {status}: {words}"
        if status in USERS_OWN or code == "insufficient_quota":
            return ConfigError(f"{answered}; check {'api_key_env' if status in (401, 402) else 'base_url and model'}")
        if status in PASSING or status >= 500:
            return _Passing(answered, _retry_after(response))
        too_long = code == "context_length_exceeded" or "context length" in words.lower()
        if self._answered or too_long:
            return RewardError(answered)
        return ConfigError(f"{answered}; the first request was refused: check base_url, model and request")

    @asynccontextmanager
    async def _client(self) -> AsyncIterator[httpx.AsyncClient]:
        """With a connection that an earlier call used, where one is idle."""
        loop = asyncio.get_running_loop()
        if loop not in self._open:
            self._open[loop] = _Connections(loop.create_task(self._keep(loop)))
        connections = self._open[loop]
        http = connections.idle.pop() if connections.idle else self._new_client()
        connections.calls += 1
        try:
            yield http
        finally:
            connections.calls -= 1
            connections.used = loop.time()
            if self._open.get(loop) is connections:
                connections.idle.append(http)
            else:  # the loop is ending, and the keeper with it
                await http.aclose()

    def _new_client(self) -> httpx.AsyncClient:
        import httpx

        headers = {}
        if self.api_key_env is not None:
            headers["Authorization"] = f"Bearer {os.environ.get(self.api_key_env, '')}"
        return httpx.AsyncClient(
            headers=headers, verify=_certificates(), timeout=httpx.Timeout(None, connect=CONNECT_TIMEOUT_S)
        )

    async def _keep(self, loop: asyncio.AbstractEventLoop) -> None:
        try:
            await asyncio.sleep(IDLE_S)
            while self._open[loop].calls or loop.time() - self._open[loop].used < IDLE_S:
                await asyncio.sleep(IDLE_S)
        finally:
            for http in self._open.pop(loop).idle:
                await http.aclose()


@functools.cache
def _certificates() -> ssl.SSLContext:
    """Read once: it takes longer than a request."""
    import httpx

    return httpx.create_ssl_context()


def _content(response: httpx.Response) -> str:
    """The reply's text; raises ``_Passing`` where the body holds none."""
    try:
        choice = response.json()["choices"][0]
        content = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError, RecursionError):
        raise _Passing(f"the body is no chat completion: {response.text[:200]!r}") from None
    if not isinstance(content, str):
        raise _Passing("the reply holds no text (was max_tokens spent on thinking?)")
    if choice.get("finish_reason") == "length":
        raise _Passing("the reply was cut off: raise max_tokens in request")
    return content


def _complaint(response: httpx.Response) -> tuple[str | None, str]:
    """Code and words of an error's body."""
    try:
        error = response.json()
        error = error.get("error", error) if isinstance(error, dict) else error
    except (ValueError, RecursionError):
        error = None
    if not isinstance(error, dict):
        return None, response.text[:200].strip() or response.reason_phrase
    return error.get("code") or error.get("type"), str(error.get("message") or json.dumps(error))[:200]


def _retry_after(response: httpx.Response) -> float:
    """Seconds: the header holds a number or a date."""
    value = response.headers.get("retry-after", "").strip()
    if re.fullmatch(r"\d{1,9}(\.\d+)?", value):
        return float(value)
    try:
        return max(0.0, email.utils.parsedate_to_datetime(value).timestamp() - time.time())
    except ValueError:
        return 0.0
