"""From a request's body to an image of the run's shape, within limits."""

import asyncio
import io
import time
from collections.abc import AsyncIterator, Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image
from starlette.datastructures import Headers
from starlette.formparsers import MultiPartException, MultiPartParser
from starlette.requests import Request

from jaxcls.errors import UserError
from jaxcls.serving import Settings
from jaxcls.serving.batching import Gate, Refusal, busy

# What browsers show. Decoders of other formats are slower, and fewer people look at them.
FORMATS = ('BMP', 'GIF', 'JPEG', 'PNG', 'WEBP')
# Above, images are decoded one at a time, so that they neither hold up small ones nor fill the memory.
_SMALL = 1_000_000
_LARGE_WAITING = 8
_PART = 64 << 10
# A progressive JPEG draws the whole image once a scan. Encoders use about ten.
_SCANS = 100


class Intake:
    """`await intake.image(request)`: the image in a request's body, uint8 [H, W, C] of the run's shape.

    The body is the image itself, or a form (multipart/form-data) with one file.

    Args:
      decode: bytes of a file to uint8 [H, W, C]; raises UserError.
    """

    def __init__(self, decode: Callable[[bytes], np.ndarray], settings: Settings):
        self.decode, self.settings, self.held = decode, settings, 0
        self.small = ThreadPoolExecutor(2, 'decode')
        self.large = ThreadPoolExecutor(1, 'decode-large')
        self.large_gate = Gate(_LARGE_WAITING)

    async def image(self, request: Request) -> np.ndarray:
        kind = request.headers.get('content-type', '').partition(';')[0].strip().lower()
        form = kind == 'multipart/form-data'
        if not (form or kind.startswith('image/') or kind in ('', 'application/octet-stream')):
            raise Refusal(
                415, f'The body is {kind[:80]!r}; send an image, or a form with one file.', _CLOSE
            )
        held = []
        try:
            body = await self._body(request, held)
            if form:
                body = await _file(request.headers, body)
            return await self._decoded(body)
        finally:
            self.held -= sum(held)

    async def _body(self, request: Request, held: list[int]) -> bytes:
        """Reads the body; `held` is what to take off `self.held` once it is done with."""
        limit = self.settings.max_body
        too_long = Refusal(413, f'The body has more than {limit:,} bytes, the limit.', _CLOSE)
        length = request.headers.get('content-length', '')
        if length.isdigit() and int(length[:20]) > limit:
            raise too_long
        chunks = []
        try:
            async with asyncio.timeout(self.settings.timeout):
                async for chunk in request.stream():
                    if self.held + len(chunk) > self.settings.max_held:
                        raise busy_and_close()
                    chunks.append(chunk)
                    held.append(len(chunk))
                    self.held += len(chunk)
                    if sum(held) > limit:
                        raise too_long
        except TimeoutError:
            raise Refusal(
                408, f'The body took more than {self.settings.timeout:g} seconds.', _CLOSE
            ) from None
        return b''.join(chunks)

    async def _decoded(self, body: bytes) -> np.ndarray:
        loop = asyncio.get_running_loop()
        try:
            image = await loop.run_in_executor(self.small, self._decode_small, body)
            if image is None:
                with self.large_gate.enter():
                    image = await loop.run_in_executor(self.large, self._decode_large, body)
        except UserError as error:
            raise Refusal(422, str(error)) from None
        return image

    def _decode_small(self, body: bytes) -> np.ndarray | None:
        pixels = check(body, self.settings.max_pixels)
        return self.decode(body) if pixels <= _SMALL else None

    def _decode_large(self, body: bytes) -> np.ndarray:
        begin = time.perf_counter()
        try:
            return self.decode(body)
        finally:
            # Pillow lets no other thread run while it converts millions of pixels; now they may.
            time.sleep(time.perf_counter() - begin)

    def close(self):
        self.small.shutdown(wait=False, cancel_futures=True)
        self.large.shutdown(wait=False, cancel_futures=True)


_CLOSE = {'Connection': 'close'}  # for the rest of the body is not read


def busy_and_close() -> Refusal:
    refusal = busy()
    refusal.headers |= _CLOSE
    return refusal


def check(body: bytes, max_pixels: int) -> int:
    """The number of pixels by the header of an image; nothing is decoded.

    Raises:
      Refusal: no image, or one that would take too long: 413 or 422.
    """
    if not body:
        raise Refusal(422, 'The body is empty; send an image.')
    try:
        with Image.open(io.BytesIO(body), formats=FORMATS) as picture:
            pixels, format = picture.width * picture.height, picture.format
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        pixels, format = max_pixels + 1, None
    except Exception:  # Pillow raises all kinds on damaged files
        raise Refusal(422, f'The body is no image of {", ".join(FORMATS)}.') from None
    if pixels > max_pixels:
        raise Refusal(413, f'The image has more than {max_pixels:,} pixels, the limit.')
    if format == 'JPEG' and body.count(b'\xff\xda') > _SCANS:
        raise Refusal(422, f'The image is a JPEG of more than {_SCANS} scans. Save it again.')
    return pixels


async def _file(headers: Headers, body: bytes) -> bytes:
    """The one file of a form."""

    async def stream() -> AsyncIterator[bytes]:
        for start in range(0, len(body), _PART):
            yield body[start : start + _PART]
            await asyncio.sleep(0)  # parsing takes a while: others' turn

    try:
        form = await MultiPartParser(headers, stream(), max_files=1, max_fields=4).parse()
    except MultiPartException as error:
        raise Refusal(400, f'The form cannot be read: {error.message}') from None
    except (KeyError, ValueError, LookupError):
        raise Refusal(400, 'The form cannot be read: its headers are damaged.') from None
    try:
        files = [value for _, value in form.multi_items() if not isinstance(value, str)]
        if len(files) != 1:
            raise Refusal(400, f'The form has {len(files)} files, expected one.')
        return await files[0].read()
    finally:
        await form.close()
