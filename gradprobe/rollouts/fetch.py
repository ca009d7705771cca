"""One JSON object over HTTP, within limits: of bytes, of time from the first byte sent to the last one read, of hosts.

urllib3 does the talking. Two things it leaves open are closed here: its timeouts bound single reads, so that a server
that sends a byte now and then would hold a request for ever, and its retries read the body of an error to the end.
"""

import json
import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.client import HTTPException, HTTPResponse
from types import ModuleType
from typing import Any

from ..common.errors import InputError, one_line, reason_of
from ..common.files import json_object

RETRIES: dict[str, Any] = {
    **{"total": 6, "connect": 2, "read": 0, "redirect": 0, "status_forcelist": (429, 502, 503, 504)},
    **{"raise_on_status": False, "backoff_factor": 1.0, "backoff_max": 30.0, "retry_after_max": 60},
}
"""How a busy server is asked again: after 0, 2, 4, 8, 16 and 30 seconds, or when it says. A request that it may be
working on is not sent twice."""
SECONDS_TO_CONNECT, MOST_BYTES = 30.0, 1 << 26
"""128,000 tokens with their log-probs are about half of these bytes; as Python's objects they can be 30 times more."""


def json_at(url: str, seconds: float, body: dict[str, Any] | None = None, api_key: str | None = None) -> dict[str, Any]:
    """The JSON object at `url`, asked for again where the server is busy; no redirect is followed.

    Args:
        seconds: for one attempt; a server that has been busy for as long is not asked again.
        body: posted as JSON; None gets.
        api_key: sent as a bearer token; an error that repeats it is shown without.

    Raises:
        InputError: anything else comes of it, more than `MOST_BYTES` (unpacked), or nothing whole within `seconds`.
    """
    urllib3 = _urllib3(url)
    method = "GET" if body is None else "POST"
    sent = None if body is None else json.dumps(body)
    headers = {"Content-Type": "application/json", "Connection": "close"}
    if api_key is not None:
        headers["Authorization"] = f"Bearer {api_key}"
    busy, end = urllib3.Retry(allowed_methods=None, **RETRIES), time.monotonic() + seconds
    to_connect = urllib3.Retry(**{**RETRIES, "status_forcelist": (), "respect_retry_after_header": False})
    content = None
    while content is None:
        try:
            with _within(seconds, urllib3, url) as pools:
                response = pools.request(
                    method,
                    url,
                    body=sent,
                    headers=headers,
                    retries=to_connect,
                    redirect=False,
                    timeout=urllib3.Timeout(connect=min(seconds, SECONDS_TO_CONNECT), read=seconds),
                    preload_content=False,
                )
                is_busy = response.status in RETRIES["status_forcelist"] and time.monotonic() < end
                try:
                    busy = busy.increment(method, url, response) if is_busy else busy
                except urllib3.exceptions.MaxRetryError:
                    is_busy = False
                content = None if is_busy else response.read(MOST_BYTES + 1)
                response.close()
            if content is None:
                busy.sleep(response)
        except (urllib3.exceptions.HTTPError, HTTPException, OSError) as error:
            reason = getattr(error, "reason", None) or error  # of retries: what the last one failed of
            raise InputError(f"{url}: can't be reached ({reason_of(reason)})") from error
    if len(content) > MOST_BYTES:
        raise InputError(f"{url}: its answer has more than {MOST_BYTES:,} bytes")
    if response.status != 200:
        said = f"{response.reason or ''}: {content.decode('utf-8', 'replace')}"
        if api_key is not None:
            said = said.replace(api_key, "(the key)")
        hint = "; `api_key_env` names the variable that holds its key" if response.status in (401, 403) else ""
        raise InputError(f"{url}: HTTP {response.status} {one_line(said)}{hint}")
    return json_object(content, url)


@contextmanager
def _within(seconds: float, urllib3: ModuleType, url: str) -> Iterator[Any]:
    """A urllib3 manager of pools whose connections end after `seconds`, whatever they are doing.

    Raises:
        InputError: they were ended; also where what came until then looks whole.
    """
    sockets: list[socket.socket] = []
    is_over = threading.Event()

    def end() -> None:
        is_over.set()
        for opened in sockets:
            with suppress(OSError):  # it is closed
                socket.socket.shutdown(opened, socket.SHUT_RDWR)  # not TLS's own, which would wait for the other side

    timer = threading.Timer(seconds, end)
    timer.daemon = True
    pools = urllib3.PoolManager()
    pools.pool_classes_by_scheme = {
        scheme: _recording(pool_class, sockets) for scheme, pool_class in pools.pool_classes_by_scheme.items()
    }
    timer.start()
    error: Exception | None = None
    try:
        yield pools
    except Exception as raised:
        error = raised
        reason = getattr(error, "reason", None) or error
        if not is_over.is_set() and not isinstance(reason, urllib3.exceptions.ReadTimeoutError):
            raise
        is_over.set()
    finally:
        timer.cancel()
        pools.clear()
    if is_over.is_set():
        raise InputError(f"{url}: no whole answer within {seconds:g} seconds") from error


def _recording(pool_class: type, sockets: list[socket.socket]) -> type:
    """A class of pools like `pool_class` that adds the socket of each connection to `sockets`."""
    connection_class = pool_class.ConnectionCls

    def connect(self: Any) -> None:
        connection_class.connect(self)
        sockets.append(self.sock)

    changes = {"connect": connect, "response_class": _Response}
    timed = type(connection_class.__name__, (connection_class,), changes)
    return type(pool_class.__name__, (pool_class,), {"ConnectionCls": timed})


class _Response(HTTPResponse):
    """The standard library's, which takes a chunk of length -1 for all that the server ever sends."""

    def _safe_read(self, amt: int) -> bytes:
        if amt < 0:
            raise HTTPException("a chunk's length is below zero")
        return super()._safe_read(amt)


def _urllib3(url: str) -> ModuleType:
    try:
        import urllib3
    except ImportError as error:
        raise InputError(f"`base_url` {url}: asking a server takes urllib3: pip install 'gradprobe[server]'") from error
    return urllib3
