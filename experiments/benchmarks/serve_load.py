"""How fast the server answers: latency and throughput under 1, 8 and 64 clients, with batching and without.

    python experiments/benchmarks/serve_load.py [--workdir=RUN] [--seconds=10] [--clients 1 8 64]

The server is a process of its own, and so are the clients, who share the machine with it: each asks again as
soon as it is answered, on a connection that it keeps. Images are PNGs of the run's validation split; without
--workdir the run is the digits', trained first. Two warm-up seconds are not counted.

Measured on 2 cores of a virtual machine, lenet_small on the digits: 630 answers a second to 1 client (p50 1.5
ms, p99 2.1 ms), 1,023 to 8 (7.8 and 12 ms), 1,255 to 64 (44 and 193 ms); with --max-batch=1 656, 718 and 701.
"""

import argparse
import asyncio
import io
import json
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from PIL import Image

WARM = 2.0


def encoded_images(workdir: str, count: int = 64) -> list[bytes]:
    """PNGs of the run's validation split."""
    from jaxcls import experiment
    from jaxcls import workdir as workdir_lib

    config = experiment.resolve(workdir_lib.read_config(Path(workdir)))
    split = experiment.load_split(config, config.data.validation)
    reader = experiment.make_reader(config, split, train=False)
    found = []
    for i in range(min(count, len(split.source))):
        pixels, out = reader(i)[0], io.BytesIO()
        Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels).save(out, 'PNG')
        found.append(out.getvalue())
    return found


async def client(
    port: int, images: list[bytes], first: int, end: float
) -> list[tuple[float, float, int]]:
    """(when it was asked, seconds, status) of one request after the other until `end`."""
    reader, writer = await asyncio.open_connection('127.0.0.1', port)
    seen, i = [], first
    while (begin := time.perf_counter()) < end:
        body = images[i % len(images)]
        head = (
            'POST /predict HTTP/1.1\r\nHost: localhost\r\nContent-Type: image/png\r\n'
            f'Content-Length: {len(body)}\r\n\r\n'
        )
        writer.write(head.encode() + body)
        answer = await reader.readuntil(b'\r\n\r\n')
        length = re.search(rb'(?i)content-length: (\d+)', answer)[1]
        await reader.readexactly(int(length))
        seen.append((begin, time.perf_counter() - begin, int(answer[9:12])))
        i += 1
    writer.close()
    return seen


async def load(port: int, images: list[bytes], clients: int, seconds: float) -> dict[str, float]:
    begin = time.perf_counter()
    end = begin + WARM + seconds
    asked = [client(port, images, 7 * i, end) for i in range(clients)]
    found = [row for rows in await asyncio.gather(*asked) for row in rows if row[0] > begin + WARM]
    times = np.array([taken for _, taken, status in found if status == 200])
    return {
        'clients': clients,
        'answered': len(times),
        'refused': len(found) - len(times),
        'p50_ms': 1e3 * float(np.median(times)),
        'p99_ms': 1e3 * float(np.quantile(times, 0.99)),
        'per_second': len(times) / seconds,
    }


def work(args):
    """The clients' process: prints a row for each number of them."""
    images = encoded_images(args.workdir)
    for clients in args.clients:
        row = asyncio.run(load(args.port, images, clients, args.seconds))
        print(json.dumps(row), flush=True)


def measure(args, max_batch: int):
    command = [sys.executable, '-m', 'jaxcls.main', 'serve', args.workdir, '--port=0']
    with subprocess.Popen(
        [*command, f'--max-batch={max_batch}'], stdout=subprocess.PIPE, text=True
    ) as server:
        try:
            port = re.search(r':(\d+) ', server.stdout.readline())[1]
            asking = [sys.executable, __file__, f'--workdir={args.workdir}', f'--port={port}']
            asking += [f'--seconds={args.seconds}', '--clients', *map(str, args.clients)]
            with subprocess.Popen(asking, stdout=subprocess.PIPE, text=True) as clients:
                for line in clients.stdout:
                    row = json.loads(line)
                    print(
                        f'{max_batch:>9} {row["clients"]:>8} {row["p50_ms"]:>9.1f} {row["p99_ms"]:>9.1f} '
                        f'{row["per_second"]:>11.0f} {row["refused"]:>8}',
                        flush=True,
                    )
        finally:
            server.terminate()


def main():
    parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
    parser.add_argument('--workdir', default='', help='of a run; default: the digits, trained now')
    parser.add_argument('--seconds', type=float, default=10)
    parser.add_argument('--clients', type=int, nargs='+', default=[1, 8, 64])
    parser.add_argument('--max-batch', type=int, nargs='+', default=[1, 32])
    parser.add_argument('--port', type=int, default=0, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.port:
        work(args)
        return
    with tempfile.TemporaryDirectory() as directory:
        if not args.workdir:
            args.workdir = f'{directory}/run'
            command = [sys.executable, '-m', 'jaxcls.main', f'--workdir={args.workdir}']
            subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        print(
            f'{"max batch":>9} {"clients":>8} {"p50 ms":>9} {"p99 ms":>9} {"answers / s":>11} {"refused":>8}'
        )
        for max_batch in args.max_batch:
            measure(args, max_batch)


if __name__ == '__main__':
    main()
