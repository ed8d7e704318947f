"""`python -m tests.hostile_server [--full] [--seed 0]`: hostile requests to a server of its own, counted.

2,000 with --full, else 200. No answer may be 5xx but 503, the server must neither end nor take more than
1 GB, and good requests between the hostile ones must be answered within a second.
"""

import argparse
import collections
import functools
import io
import re
import socket
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image

TIMEOUT = 2.0  # of the server, for slow clients
MAX_BODY = 8 << 20  # as `serving.Settings` has it
Address = tuple[str, int]


def image(kind: str = 'PNG', size=(40, 30), seed: int = 0) -> bytes:
    pixels = np.random.default_rng(seed).integers(0, 256, (*size, 3), np.uint8)
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, kind)
    return out.getvalue()


def request(
    body: bytes = b'',
    path: str = '/predict',
    method: str = 'POST',
    kind: str = 'image/png',
    host: str = 'localhost',
    more: str = '',
    length: int | None = None,
) -> bytes:
    length = len(body) if length is None else length
    head = f'{method} {path} HTTP/1.1\r\nHost: {host}\r\nContent-Type: {kind}\r\n'
    return f'{head}Content-Length: {length}\r\n{more}\r\n'.encode('latin-1') + body


def form(*parts: bytes, boundary: bytes = b'x', end: bytes = b'--x--\r\n') -> bytes:
    return b''.join(b'--' + boundary + b'\r\n' + part + b'\r\n' for part in parts) + end


def file_part(body: bytes, name: str = 'a.png', field: str = 'file') -> bytes:
    head = f'Content-Disposition: form-data; name="{field}"; filename="{name}"\r\n'
    return head.encode() + b'Content-Type: image/png\r\n\r\n' + body


def status(address: Address, data: bytes, half_close: bool = False) -> int:
    """Sends bytes and returns the status of the answer; 0 where the connection ended without one."""
    try:
        with socket.create_connection(address, timeout=30) as client:
            try:
                client.sendall(data)
                if half_close:
                    client.shutdown(socket.SHUT_WR)
            except OSError:
                pass  # the answer came before the end of the request
            return read_status(client)
    except ConnectionError:
        return 0


def read_status(client: socket.socket) -> int:
    found = b''
    try:
        while b'\r\n' not in found:
            part = client.recv(4096)
            if not part:
                break
            found += part
    except ConnectionError:
        pass
    match = re.match(rb'HTTP/1\.1 (\d{3})', found)
    return int(match[1]) if match else 0


def _chunk(name: bytes, data: bytes) -> bytes:
    check = zlib.crc32(name + data)
    return struct.pack('>I', len(data)) + name + data + struct.pack('>I', check)


def png(width: int, height: int, data: bytes, extra: bytes = b'', color: int = 2) -> bytes:
    header = struct.pack('>IIBBBBB', width, height, 8, color, 0, 0, 0)
    chunks = _chunk(b'IHDR', header) + extra + _chunk(b'IDAT', data) + _chunk(b'IEND', b'')
    return b'\x89PNG\r\n\x1a\n' + chunks


def many_scans(count: int) -> bytes:
    """A progressive JPEG that draws one of its scans again and again."""
    out = io.BytesIO()
    Image.new('L', (1000, 1000)).save(out, 'JPEG', progressive=True)
    data = out.getvalue()
    start = data.rindex(b'\xff\xda')
    return data[:start] + data[start:-2] * count + data[-2:]


# A hostile request: its kind, the statuses that are right (0: closed without an answer), and what sends it.
class Attack(NamedTuple):
    kind: str
    allowed: set[int]
    send: Callable[[Address], int]


def _of(kind: str, allowed: set[int], data: bytes, half_close: bool = False) -> Attack:
    return Attack(kind, allowed, lambda address: status(address, data, half_close))


@functools.cache
def small_files_of_much() -> dict[str, bytes]:
    zeros = zlib.compress(bytes(1000), 9)
    return {
        'header': png(60_000, 60_000, zeros),
        'gif': b'GIF89a' + struct.pack('<HHBBB', 65_000, 65_000, 0, 0, 0) + b',' + bytes(8),
        'bmp': b'BM' + struct.pack('<IHHIIiiHHIIiiII', 54, 0, 0, 54, 40, 30_000, 30_000, 1, 24, *[0] * 6),
        'text': png(
            10, 10, zlib.compress(bytes(310)), _chunk(b'zTXt', b'a\0\0' + zlib.compress(bytes(1 << 26), 9))
        ),
        'profile': png(
            10, 10, zlib.compress(bytes(310)), _chunk(b'iCCP', b'a\0\0' + zlib.compress(bytes(1 << 26), 9))
        ),
        'pixels': png(4000, 4000, zlib.compress(bytes(4000 * 16_001), 1), color=6),
        'scans': many_scans(5000),
        'long data': png(10, 10, zlib.compress(bytes(1 << 26), 9)),
    }  # fmt: skip


def bombs(rng) -> Attack:
    files = small_files_of_much()
    name = str(rng.choice(list(files)))
    path = str(rng.choice(['/predict', '/explain']))
    return _of('bombs', {200, 413, 422}, request(files[name], path))


def damaged(rng) -> Attack:
    kind = str(rng.choice(['PNG', 'JPEG', 'GIF', 'WEBP', 'BMP']))
    data = bytearray(image(kind, seed=int(rng.integers(1000))))
    for place in rng.integers(0, len(data), int(rng.integers(1, 20))):
        data[place] = rng.integers(256)
    if rng.random() < 0.5:
        del data[int(rng.integers(1, len(data))) :]
    return _of('damaged images', {200, 413, 422}, request(bytes(data)))


def truncated(rng) -> Attack:
    data = request(image())
    cut = data[: int(rng.integers(1, len(data)))]
    return _of('truncated', {0, 400, 408}, cut, half_close=True)


def slow(rng) -> Attack:
    data = request(image())
    start = int(rng.choice([1, 20, data.index(b'\r\n\r\n') + 4]))

    def send(address):
        try:
            with socket.create_connection(address, timeout=30) as client:
                client.sendall(data[:start])
                end = time.monotonic() + 5 * TIMEOUT
                for byte in data[start:]:
                    client.sendall(bytes([byte]))
                    time.sleep(0.2)
                    if time.monotonic() > end:
                        return -1  # never cut off
        except OSError:
            pass
        return 0

    return Attack('slow', {0}, send)


def paths(rng) -> Attack:
    path = str(
        rng.choice(
            [
                '/../../etc/passwd', '/%2e%2e/%2e%2e/etc/passwd', '/page.js/../../app.py', '//etc/passwd',
                '/templates/page.html', '/page.js%00', '/..%5c..%5cwindows', '/' + 'a' * 9000,
                '/%ff%fe', '/predict/', '/docs', '/.git/config', '/predict?path=/etc/passwd',
                '/predict?url=http://169.254.169.254/', '/explain?label=99', '/predict?top=-1',
                '/predict?top=1e9', '/predict?top=1&top=2', '/predict?top=%D9%A1', '/explain?label=0x1',
                'http://example.org/', '*', '/metrics?name[]=x', '/predict?top=' + '9' * 5000,
            ]
        )
    )  # fmt: skip
    body = b'' if 'path=' in path or 'url=' in path else image()
    method = str(rng.choice(['GET', 'POST']))
    return _of('paths and queries', {200, 400, 404, 405, 422}, request(body, path, method))


def types(rng) -> Attack:
    bodies = [
        b'', b'{}', b'<svg xmlns="http://www.w3.org/2000/svg"/>', b'%!PS-Adobe-3.0 EPSF-3.0\n', b'PK\3\4',
        b'%PDF-1.7', b'/etc/passwd', b'http://example.org/a.png', b'\0' * 1000, rng.bytes(5000),
        image('TIFF'), b'II*\0\xff\xff\xff\xff',
    ]  # fmt: skip
    kinds = [
        'image/png',
        'text/plain',
        'application/json',
        'a' * 500,
        'image/svg+xml',
        '\xe9',
        ';',
        '',
    ]
    body = bodies[int(rng.integers(len(bodies)))]
    kind = str(rng.choice(kinds))
    return _of('wrong types', {400, 415, 422}, request(body, kind=kind))


def headers(rng) -> Attack:
    more = [
        'X: ' + 'a' * 100_000 + '\r\n', 'X: a\r\n' * 5000, 'a' * 40_000 + '\r\n', 'X: \x00\r\n', ': a\r\n',
        ' folded\r\n', 'Transfer-Encoding: chunked\r\n', 'Content-Length: 5\r\n', 'Expect: 5\r\n',
        'Transfer-Encoding: gzip\r\n', 'Connection: upgrade\r\nUpgrade: websocket\r\n', 'Range: bytes=0-\r\n',
        'Sec-Fetch-Site: cross-site\r\n',
    ]  # fmt: skip
    text = more[int(rng.integers(len(more)))]
    data = request(image(), more=text)
    # Some are right to a server that does not look at them.
    return _of('headers', {0, 200, 400, 403, 422, 501}, data, half_close=True)


def hosts(rng) -> Attack:
    name = str(
        rng.choice(
            ['example.org', '', '127.0.0.1.example.org', 'localhost@a', 'a:80:90', '[::2]', '*']
        )
    )
    return _of('wrong hosts', {400}, request(image(), host=name))


def forms(rng) -> Attack:
    good = file_part(image())
    bodies = [
        (b'', 'boundary=x'), (form(good), ''), (form(good), 'boundary=y'), (form(good, good), 'boundary=x'),
        (form(b'Content-Disposition: form-data; name="a"\r\n\r\nb'), 'boundary=x'),
        (form(*[b'Content-Disposition: form-data; name="a"\r\n\r\nb'] * 5000), 'boundary=x'),
        (form(b'\r\n\r\n'), 'boundary=x'), (form(good)[:-30], 'boundary=x'), (rng.bytes(3000), 'boundary=x'),
        (form(b'A' * 100_000 + b': b\r\n\r\n'), 'boundary=x'), (form(good), 'boundary=' + 'x' * 5000),
        (form(file_part(b'', '../../x')), 'boundary=x'), (form(good), 'boundary=x; charset=nonsense'),
        (form(b'Content-Disposition: form-data\r\n\r\nb'), 'boundary=x'), (form(good), 'boundary="x'),
        (form(b'Content-Disposition: \xff\xfe; name=\xff\r\n\r\nb'), 'boundary=x'),
        (form(file_part(b'', 'a', 'f' * 100_000)), 'boundary=x'),
    ]  # fmt: skip
    body, boundary = bodies[int(rng.integers(len(bodies)))]
    kind = f'multipart/form-data; {boundary}'
    return _of('forms', {200, 400, 413, 422}, request(body, kind=kind))


def protocol(rng) -> Attack:
    chunked = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n'
    data = [
        b'GET /\r\n\r\n',
        b'PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n', b'\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03',
        rng.bytes(2000), b'\r\n' * 1000, b'GET / HTTP/1.1\r\n\r\n', request(method='DELETE'),
        request(method='A' * 100), request(b'', length=-1), request(b'', '/', 'GET', more='Host: a\r\n'),
        chunked + b'f' * 20 + b'\r\n',
        chunked + b'zz\r\n',
        b'POST /predict HTTP/1.0\r\n\r\n', request(image(), method='PATCH'), b'GET / HTTP/9.9\r\n\r\n',
    ]  # fmt: skip
    allowed = {0, 200, 400, 404, 405, 413, 422}
    return _of('protocol', allowed, data[int(rng.integers(len(data)))], half_close=True)


def long(rng) -> Attack:
    if rng.random() < 0.5:
        return _of('too long', {413}, request(b'x' * 1000, length=10**12))
    part = b'%x\r\n' % (1 << 20) + bytes(1 << 20) + b'\r\n'
    head = b'POST /predict HTTP/1.1\r\nHost: localhost\r\nTransfer-Encoding: chunked\r\n\r\n'
    # The answer is lost where it is sent while the client is still sending.
    return _of('too long', {0, 408, 413}, head + part * (MAX_BODY // (1 << 20) + 2))


ATTACKS = (
    bombs, damaged, truncated, slow, paths, types, headers, hosts, forms, protocol, long,
)  # fmt: skip


class Seen(NamedTuple):
    """Answers by kind and status, and answers that are wrong."""

    counts: dict[tuple[str, int], int]
    wrong: list[tuple[str, int]]


def attack(address: Address, count: int, seed: int, clients: int = 16) -> Seen:
    """Sends `count` hostile requests, `clients` at a time."""

    def one(i: int):
        kind = ATTACKS[i % len(ATTACKS)]
        made = kind(np.random.default_rng([seed, i]))
        return made.kind, made.send(address), made.allowed

    small_files_of_much()
    with ThreadPoolExecutor(clients) as pool:
        found = list(pool.map(one, range(count)))
    counts = collections.Counter((kind, answer) for kind, answer, _ in found)
    wrong = [(kind, answer) for kind, answer, allowed in found if answer not in {*allowed, 503}]
    return Seen(dict(counts), wrong)


def ask(address: Address):
    """Good requests, until it is ended: prints the status and the seconds of each."""
    body = request(image())
    while True:
        begin = time.perf_counter()
        answer = status(address, body)
        print(answer, time.perf_counter() - begin, flush=True)
        time.sleep(0.05)


def _megabytes(pid: int, field: str) -> float:
    text = Path(f'/proc/{pid}/status').read_text()
    return int(re.search(rf'{field}:\s+(\d+)', text)[1]) / 1024


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--full', action='store_true', help='2,000 requests, not 200')
    parser.add_argument('--seed', type=int, default=0)
    parser.add_argument('--clients', type=int, default=16, help='at once; default 16')
    parser.add_argument('--workdir', default='', help='of a run; default: the digits, trained now')
    parser.add_argument('--ask', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.ask:
        ask(('127.0.0.1', args.ask))
    with tempfile.TemporaryDirectory() as directory:
        workdir = args.workdir or f'{directory}/run'
        program = [sys.executable, '-m', 'jaxcls.main']
        if not args.workdir:
            command = [*program, f'--workdir={workdir}', '--config.epochs=2']
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        command = [*program, 'serve', workdir, '--port=0', f'--timeout={TIMEOUT}']
        with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as server:
            try:
                return _measure(server, 2000 if args.full else 200, args.seed, args.clients)
            finally:
                server.terminate()


def _measure(server: subprocess.Popen, count: int, seed: int, clients: int) -> int:
    address = '127.0.0.1', int(re.search(r':(\d+) ', server.stdout.readline())[1])
    before, begin = _megabytes(server.pid, 'VmRSS'), time.perf_counter()
    # Of a process of its own: this one's threads wait for each other.
    asking = [sys.executable, '-m', 'tests.hostile_server', f'--ask={address[1]}']
    with subprocess.Popen(asking, stdout=subprocess.PIPE, text=True) as asker:
        first = asker.stdout.readline()
        seen = attack(address, count, seed, clients)
        asker.terminate()
        lines = [first, *asker.stdout]
    seconds = time.perf_counter() - begin
    good = [(int(line.split()[0]), float(line.split()[1])) for line in lines]
    begin = time.perf_counter()
    after = status(address, request(image())), time.perf_counter() - begin
    for (kind, answer), n in sorted(seen.counts.items()):
        print(f'{kind:<20} {answer or "closed":>6} {n:>6}')
    times = np.array([taken for answer, taken in good if answer == 200])
    busy = sum(answer == 503 for answer, _ in good)
    other = [answer for answer, _ in good if answer not in (200, 503)]
    peak = _megabytes(server.pid, 'VmHWM')
    print(f'{count} hostile requests in {seconds:.0f} s; wrong answers: {seen.wrong}')
    print(
        f'good ones meanwhile: {len(times)} answered, median {np.median(times) * 1e3:.0f} ms, '
        f'99% {np.quantile(times, 0.99) * 1e3:.0f} ms, longest {times.max() * 1e3:.0f} ms; '
        f'{busy} times 503; other: {other}'
    )
    print(f'memory {before:.0f} MB before, {peak:.0f} MB at most; a good request after: {after}')
    fine = not seen.wrong and not other and times.max() < 1 and peak < 1000
    fine = fine and after[0] == 200 and server.poll() is None
    print('holds' if fine else 'BROKEN')
    return not fine


if __name__ == '__main__':
    sys.exit(main())
