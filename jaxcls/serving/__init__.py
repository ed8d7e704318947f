"""A local server of one run: an HTTP interface and a page. `server.serve` is where it starts.

`app` has the routes, `intake` what becomes of a request's body, `batching` how requests share the device,
`server` connections and signals. All but this file need the extra `serve`.
"""

import importlib.util
from typing import NamedTuple

from jaxcls.errors import UserError, require

_PACKAGES = ('starlette', 'uvicorn', 'h11', 'python_multipart', 'prometheus_client')
_LOOPBACK = ('127.0.0.1', 'localhost', '[::1]')


class Settings(NamedTuple):
    """Limits of a server. What exceeds one is refused, and the rest goes on.

    Attributes:
      max_batch: images that go through the network together.
      wait: seconds that the first of them waits for others that are on their way.
      queue: requests that are decoded or wait for the network; 503 for one more.
      max_body: bytes of a request's body.
      max_held: bytes of all bodies together; 503 beyond.
      max_pixels: of an image, by its header.
      timeout: seconds for a request's headers, and again for its body.
      connections: open at once; 503 for one more.
      hosts: what the Host header may name, besides this machine: 'classify.example.org', '192.0.2.7'.
    """

    max_batch: int = 32
    wait: float = 0.002
    queue: int = 64
    max_body: int = 8 << 20
    max_held: int = 64 << 20
    max_pixels: int = 16_000_000
    timeout: float = 10.0
    connections: int = 512
    hosts: tuple[str, ...] = ()

    def knows(self, host: str) -> bool:
        """Whether a Host header, with a port or without, names this server."""
        name, colon, port = host.lower().rpartition(':')
        name = name if colon and port.isdigit() else host.lower()
        return name in _LOOPBACK or name in self.hosts


def check(settings: Settings):
    """Raises UserError for a limit below 1, or where a package of the extra is missing."""
    for name in ('max_batch', 'queue', 'max_body', 'max_pixels', 'connections', 'timeout'):
        value = getattr(settings, name)
        require(value >= 1, f'--{name.replace("_", "-")}', value, 'at least 1')
    missing = [name for name in _PACKAGES if importlib.util.find_spec(name) is None]
    if missing:
        raise UserError(f'A server needs {", ".join(missing)}: pip install "jaxcls[serve]".')
