"""Requests that share the device: images that come at about the same time are one batch."""

import asyncio
import contextlib
from collections.abc import Callable
from concurrent.futures import Executor

import numpy as np


class Refusal(Exception):
    """What a request is answered with when it is not served: a status and one message."""

    def __init__(self, status: int, message: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.message, self.headers = status, message, headers or {}


def busy() -> Refusal:
    return Refusal(503, 'The server is busy. Try again in a second.', {'Retry-After': '1'})


class Gate:
    """Lets at most `limit` requests in at once; the next is refused with 503."""

    def __init__(self, limit: int):
        self.limit, self.inside = limit, 0

    @contextlib.contextmanager
    def enter(self):
        if self.inside >= self.limit:
            raise busy()
        self.inside += 1
        try:
            yield
        finally:
            self.inside -= 1


def sizes(max_batch: int) -> list[int]:
    """The sizes of batches that are compiled: 1, 4, 16, ..., and the largest."""
    found = [1]
    while found[-1] * 4 < max_batch:
        found.append(found[-1] * 4)
    return sorted({*found, max_batch})


class Batcher:
    """`await batcher.submit(image)`: uint8 [H, W, C] to the classifier's row, while `run` is running.

    Where others are `expected`, the first image of a batch waits `wait` seconds for them; those that come
    while the device is at work are the next batch. Batches are padded to one of `sizes`, so that nothing
    is compiled under load.

    Args:
      classifier: uint8 [B, H, W, C] to [B, K]; called on `device`.
      expected: how many requests are on their way, those that wait included.
      observe: is told the number of images of each batch.
    """

    def __init__(
        self,
        classifier: Callable[[np.ndarray], np.ndarray],
        device: Executor,
        max_batch: int,
        wait: float,
        expected: Callable[[], int],
        observe: Callable[[int], None],
    ):
        self.classifier, self.device, self.observe = classifier, device, observe
        self.sizes, self.wait, self.expected = sizes(max_batch), wait, expected
        self.waiting: list[tuple[np.ndarray, asyncio.Future]] = []
        self.came = asyncio.Event()

    async def submit(self, image: np.ndarray) -> np.ndarray:
        future = asyncio.get_running_loop().create_future()
        self.waiting.append((image, future))
        self.came.set()
        return await future

    async def run(self):
        """Serves until it is cancelled."""
        loop = asyncio.get_running_loop()
        while True:
            await self.came.wait()
            if len(self.waiting) < min(self.sizes[-1], self.expected()):
                await asyncio.sleep(self.wait)
            batch, self.waiting = self.waiting[: self.sizes[-1]], self.waiting[self.sizes[-1] :]
            if not self.waiting:
                self.came.clear()
            batch = [(image, future) for image, future in batch if not future.done()]
            if not batch:
                continue
            self.observe(len(batch))
            images = pad([image for image, _ in batch], self.sizes)
            try:
                rows = await loop.run_in_executor(self.device, self.classifier, images)
            except Exception as error:  # whatever it is, it is these requests', and the next go on
                rows = [error] * len(batch)
            for (_, future), row in zip(batch, rows, strict=False):
                if future.done():  # its client has gone
                    continue
                if isinstance(row, Exception):
                    future.set_exception(row)
                else:
                    future.set_result(row)


def pad(images: list[np.ndarray], allowed: list[int]) -> np.ndarray:
    """Images uint8 [H, W, C] as [B, H, W, C], with zeros up to the next of the allowed sizes."""
    size = next(size for size in allowed if size >= len(images))
    batch = np.zeros((size, *images[0].shape), np.uint8)
    batch[: len(images)] = images
    return batch
