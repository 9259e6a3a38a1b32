"""JSON over HTTP to a server that draws responses; every fault is one line that says what to do."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from typing import Any
from urllib.parse import urlsplit

from training.engines import EngineError
from training.errors import UserError

LONGEST = 300  # characters of a server's own words in a message


class Refused(EngineError):
    """The server answered, and not with success. status: of HTTP."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status


class Service:
    """A server at `url`; calls may come from several threads.

    timeout: seconds that one answer may take. log: the file that the server writes to, for messages; "" where it is unknown.
    """

    def __init__(self, url: str, timeout: float, log: str = "") -> None:
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise UserError(f"rollout.url: expected such as http://127.0.0.1:8000, got {url!r}")
        self.url, self.timeout = url.rstrip("/"), timeout
        self._parts = parts
        self._log = f"; its log is {log}" if log else ""
        self._reached = False
        self._open: set[http.client.HTTPConnection] = set()
        self._lock = threading.Lock()

    def call(self, method: str, path: str, body: Any = None) -> Any:
        """The JSON value that the server answers; None where it answers nothing.

        Raises:
            EngineError: the server is absent, dies or is slow; `Refused`: it answers anything but success.
        """
        connection = self._connection()
        try:
            connection.request(
                method,
                self._parts.path.rstrip("/") + path,
                None if body is None else json.dumps(body),
                {"Content-Type": "application/json"},
            )
            response = connection.getresponse()
            text = response.read().decode("utf-8", "replace")
        except TimeoutError:
            raise EngineError(
                f"{self.url} did not answer {path} within {self.timeout:g} s (rollout.timeout){self._log}"
            ) from None
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise self._gone(path, error) from None
        finally:
            with self._lock:
                self._open.discard(connection)
            connection.close()
        self._reached = True
        if response.status != 200:
            raise Refused(
                f"{self.url} refuses {path} ({response.status}): {_words(text)}{self._log}", response.status
            )
        try:
            return json.loads(text) if text else None
        except ValueError:
            raise EngineError(f"{self.url} answers {path} with what is no JSON: {_words(text)}") from None

    def hang_up(self) -> None:
        """Breaks off the calls that other threads are waiting for: a vLLM server then drops their requests."""
        with self._lock:
            waiting = list(self._open)
        for connection in waiting:
            with contextlib.suppress(AttributeError, OSError):  # one that is not open yet, or no longer
                connection.sock.shutdown(socket.SHUT_RDWR)

    def _connection(self) -> http.client.HTTPConnection:
        secure = self._parts.scheme == "https"
        kind = http.client.HTTPSConnection if secure else http.client.HTTPConnection
        assert self._parts.hostname is not None
        connection = kind(self._parts.hostname, self._parts.port, timeout=self.timeout)
        with self._lock:
            self._open.add(connection)
        return connection

    def _gone(self, path: str, error: Exception) -> EngineError:
        reason = str(error) or type(error).__name__
        if not self._reached:
            return EngineError(f"no server answers at {self.url} ({reason}): start it{self._log}")
        return EngineError(
            f"the server at {self.url} died before it answered {path} ({reason}): start it again and run the same command, "
            f"which draws the step again{self._log}"
        )


def _words(text: str) -> str:
    """What a server says in the body of an error, in one line."""
    try:
        told = json.loads(text)
    except ValueError:
        told = text
    if isinstance(told, dict):
        told = told.get("error", told.get("detail", told))
    if isinstance(told, dict):
        told = told.get("message", told)
    line = " ".join(str(told).split())
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."
