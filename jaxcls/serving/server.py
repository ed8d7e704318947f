"""Connections and signals: uvicorn, with limits that it does not have."""

import json
import logging
import signal
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import H11Protocol

from jaxcls import runs
from jaxcls.errors import UserError
from jaxcls.serving import Settings, check
from jaxcls.serving import app as app_lib

_MAX_HEADERS = 16 << 10
_GRACE = 10  # seconds for requests that are under way when it is stopped


def serve(
    workdir: str | Path,
    host: str,
    port: int,
    settings: Settings,
    checkpoint: str = 'latest',
    report: Callable[[str], Any] = lambda address: None,
) -> str:
    """Serves a run until SIGINT or SIGTERM, whose name it returns.

    Requests that are under way are answered first; a second SIGINT ends at once.

    Args:
      port: 0 takes a free one.
      report: is told the address once requests are answered.

    Raises:
      UserError: no run, or an address that cannot be had.
    """
    check(settings)
    logging.getLogger('python_multipart').setLevel(logging.ERROR)  # as uvicorn's, below
    with bind(host, port) as bound:
        name = f'[{host}]' if ':' in host else host
        settings = settings._replace(hosts=(*settings.hosts, name.lower()))
        app = app_lib.make_app(runs.open_run(workdir, checkpoint), settings)
        address = f'http://{name}:{bound.getsockname()[1]}'
        server = Server(app, settings, lambda: report(address))
        server.run(sockets=[bound])
        return server.stopped_by


def bind(host: str, port: int) -> socket.socket:
    """A socket that is the server's, but does not listen before the run is ready."""
    family = socket.AF_INET6 if ':' in host else socket.AF_INET
    # asyncio sends answers without delay (TCP_NODELAY) only where the protocol is named.
    bound = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        bound.bind((host, port))
    except (OSError, OverflowError) as error:
        bound.close()
        reason = str(error).rstrip('.')
        raise UserError(
            f'{host}:{port} cannot be had: {reason}. Choose another --host or --port; 0 takes a free one.'
        ) from None
    return bound


def _config(app: Starlette, settings: Settings) -> uvicorn.Config:
    return uvicorn.Config(
        app,
        http=_protocol(settings),
        ws='none',
        loop='asyncio',
        log_config=None,
        log_level='error',  # a damaged request is not worth a line: whoever sends many fills the disk
        access_log=False,
        server_header=False,
        timeout_keep_alive=5,
        timeout_graceful_shutdown=_GRACE,
        h11_max_incomplete_event_size=_MAX_HEADERS,
    )


class Server(uvicorn.Server):
    """uvicorn's, which calls `ready` once it answers and keeps the name of the signal that stops it."""

    def __init__(self, app: Starlette, settings: Settings, ready: Callable[[], Any]):
        super().__init__(_config(app, settings))
        self.ready, self.stopped_by = ready, ''

    async def startup(self, sockets=None):
        await super().startup(sockets)
        if self.started:
            self.ready()

    def handle_exit(self, sig, frame):
        # uvicorn's own raises the signal again at the end, which is another exit status.
        self.force_exit = bool(self.stopped_by) and sig == signal.SIGINT
        self.stopped_by = signal.Signals(sig).name
        self.should_exit = True


def _answer(status: str, message: str, *headers: str) -> bytes:
    body = json.dumps({'error': message})
    lines = ['Content-Type: application/json', f'Content-Length: {len(body)}', 'Connection: close']
    return '\r\n'.join([f'HTTP/1.1 {status}', *lines, *headers, '', body]).encode()


_DAMAGED = _answer('400 Bad Request', 'This is no HTTP request, or its headers are too long.')
_FULL = _answer(
    '503 Service Unavailable', 'Too many connections. Try again in a second.', 'Retry-After: 1'
)


def _protocol(settings: Settings) -> type[H11Protocol]:
    class Protocol(H11Protocol):
        """Closes connections above the limit, and those whose requests do not come in time."""

        deadline = None

        def connection_made(self, transport):
            super().connection_made(transport)
            if len(self.connections) > settings.connections:
                transport.write(_FULL)
                transport.close()
            else:
                self._watch()

        def data_received(self, data):
            if self.transport.is_closing():
                return
            super().data_received(data)
            self._watch()

        def connection_lost(self, exc):
            super().connection_lost(exc)
            self._watch(over=True)

        def on_response_complete(self):
            super().on_response_complete()
            if self.conn.their_state is h11.SEND_BODY:
                self._watch()

        def _watch(self, over: bool = False):
            """A clock runs where headers are awaited, or the rest of a body that nobody wants any more."""
            theirs, answered = self.conn.their_state, self.conn.our_state is h11.DONE
            awaited = theirs is h11.IDLE or (theirs is h11.SEND_BODY and answered)
            if awaited and not over and self.deadline is None:
                self.deadline = self.loop.call_later(settings.timeout, self.transport.close)
            elif (over or not awaited) and self.deadline is not None:
                self.deadline.cancel()
                self.deadline = None

        def send_400_response(self, msg):
            self.transport.write(_DAMAGED)
            self.transport.close()

    return Protocol
