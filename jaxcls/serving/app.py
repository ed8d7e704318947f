"""The routes of the server, as a Starlette application."""

import asyncio
import contextlib
import io
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

import jinja2
import numpy as np
import prometheus_client as prometheus
from PIL import Image
from starlette.applications import Starlette
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, JSONResponse, Response
from starlette.routing import Route

from jaxcls import classify, explain, runs
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.serving import Settings, openapi
from jaxcls.serving.batching import Batcher, Gate, Refusal, sizes
from jaxcls.serving.intake import FORMATS, Intake

_TEMPLATES = Path(__file__).parent / 'templates'
_EXPLANATIONS = 4  # that wait for the device at once
_HEADERS = {
    'Content-Security-Policy': "default-src 'none'; script-src 'self'; style-src 'self'; "
    "img-src 'self' blob: data:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'",
    'X-Content-Type-Options': 'nosniff',
    'X-Frame-Options': 'DENY',
    'Referrer-Policy': 'no-referrer',
    'Cross-Origin-Resource-Policy': 'same-origin',
    'Cache-Control': 'no-store',
}


class Metrics(NamedTuple):
    """What /metrics shows."""

    registry: prometheus.CollectorRegistry
    requests: prometheus.Counter
    seconds: prometheus.Histogram
    batch: prometheus.Histogram
    queue: prometheus.Gauge


def _make_metrics() -> Metrics:
    registry = prometheus.CollectorRegistry()
    return Metrics(
        registry,
        prometheus.Counter(
            'jaxcls_requests', 'Requests', ['path', 'status'], registry=registry
        ),
        prometheus.Histogram(
            'jaxcls_seconds', 'From headers to answer', ['path'], registry=registry,
            buckets=(0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1, 2, 5, 10),
        ),
        prometheus.Histogram(
            'jaxcls_batch_images', 'Images of a batch', registry=registry,
            buckets=(1, 2, 4, 8, 16, 32, 64, 128),
        ),
        prometheus.Gauge('jaxcls_queue', 'Requests that wait', registry=registry),
    )  # fmt: skip


def make_app(run: runs.Run, settings: Settings) -> Starlette:
    """The application of a run; everything that it will need is compiled before it returns."""
    metrics = _make_metrics()
    device = ThreadPoolExecutor(1, 'device')
    classifier = classify.make_classifier(run)
    for size in sizes(settings.max_batch):
        classifier(np.zeros((size, *run.experiment.image_shape), np.uint8))
    intake = Intake(lambda body: experiment_lib.decode_image(run.experiment, body), settings)
    gate = Gate(settings.queue)
    batcher = Batcher(
        classifier,
        device,
        settings.max_batch,
        settings.wait,
        expected=lambda: gate.inside,
        observe=metrics.batch.observe,
    )
    metrics.queue.set_function(lambda: gate.inside)
    method, explainer = make_overlay(run)

    async def predict(request: Request) -> Response:
        top = _integer(request, 'top', 1, len(run.class_names), 5)
        with gate.enter():
            row = await batcher.submit(await intake.image(request))
        return JSONResponse({'predictions': classify.ranked(run.class_names, row, top)})

    explaining = Gate(_EXPLANATIONS)

    async def explain_(request: Request) -> Response:
        label = _integer(request, 'label', 0, len(run.class_names) - 1, None)
        with gate.enter():
            image = await intake.image(request)
            with explaining.enter():
                loop = asyncio.get_running_loop()
                png = await loop.run_in_executor(device, explainer, image, label)
        return Response(png, media_type='image/png')

    async def healthz(_request: Request) -> Response:
        name = run.experiment.config.model.name
        return JSONResponse(
            {'status': 'ok', 'model': name, 'step': run.step, 'explained_by': method}
        )

    async def metrics_(_request: Request) -> Response:
        text = prometheus.generate_latest(metrics.registry)
        return Response(text, media_type=prometheus.CONTENT_TYPE_PLAIN_0_0_4)

    description = openapi.describe(run.class_names, settings)
    page = _page(run, settings, method)

    @contextlib.asynccontextmanager
    async def lifespan(_app):
        batches = asyncio.create_task(batcher.run())
        yield
        batches.cancel()
        intake.close()
        device.shutdown(wait=False, cancel_futures=True)

    routes = [
        Route('/', lambda _request: HTMLResponse(page)),
        Route('/page.js', _asset('page.js', 'text/javascript')),
        Route('/page.css', _asset('page.css', 'text/css')),
        Route('/predict', predict, methods=['POST']),
        Route('/explain', explain_, methods=['POST']),
        Route('/healthz', healthz),
        Route('/metrics', metrics_),
        Route('/openapi.json', lambda _request: JSONResponse(description)),
    ]
    app = Starlette(
        routes=routes,
        lifespan=lifespan,
        middleware=[Middleware(Front, settings=settings, metrics=metrics, routes=routes)],
        exception_handlers={
            Refusal: _refused,
            HTTPException: _no_such,
            ClientDisconnect: _gone,
            Exception: _failed,
        },
    )
    app.router.redirect_slashes = False
    return app


def make_overlay(run: runs.Run) -> tuple[str, Callable[[np.ndarray, int | None], bytes]]:
    """`overlay(image, label) -> PNG` of uint8 [H, W, C], compiled; and the name of its method.

    Grad-CAM, or the gradient's saliency where the network has no maps for it.
    """
    method = 'grad_cam'
    try:
        explainer = explain.make_explainer(run, (method,))
    except UserError:
        method = 'saliency'
        explainer = explain.make_explainer(run, (method,))

    def overlay(image, label):
        found = explainer(image, label)
        picture = Image.fromarray(explain.overlay(image, found.heat[method]))
        out = io.BytesIO()
        picture.save(out, 'PNG')
        return out.getvalue()

    overlay(np.zeros(run.experiment.image_shape, np.uint8), None)
    return method, overlay


class Front:
    """What every request goes through: who may ask, the headers of answers, and the metrics."""

    def __init__(self, app, settings: Settings, metrics: Metrics, routes):
        self.app, self.settings, self.metrics = app, settings, metrics
        self.paths = {route.path for route in routes}

    async def __call__(self, scope, receive, send):
        if scope['type'] != 'http':
            await self.app(scope, receive, send)
            return
        begin, status = time.perf_counter(), 0
        path = scope['path'] if scope['path'] in self.paths else 'other'

        async def answer(message):
            nonlocal status
            if message['type'] == 'http.response.start':
                status = message['status']
                MutableHeaders(scope=message).update(_HEADERS)
            await send(message)

        try:
            refusal = self._refusal(Request(scope))
            app = _error(refusal) if refusal else self.app
            await app(scope, receive, answer)
        finally:
            self.metrics.requests.labels(path, status or 'none').inc()
            self.metrics.seconds.labels(path).observe(time.perf_counter() - begin)

    def _refusal(self, request: Request) -> Refusal | None:
        hosts = request.headers.getlist('host')
        if len(hosts) != 1 or not self.settings.knows(hosts[0]):
            # Else a page of another site could ask under a name of its own (DNS rebinding).
            return Refusal(400, 'The Host header names another server; see --allowed-host.')
        if request.headers.get('sec-fetch-site') == 'cross-site' and request.method != 'GET':
            return Refusal(403, 'Pages of other sites may not ask.')
        return None


def _error(refusal: Refusal) -> JSONResponse:
    return JSONResponse({'error': refusal.message}, refusal.status, refusal.headers)


async def _refused(_request: Request, refusal: Refusal) -> Response:
    return _error(refusal)


async def _no_such(_request: Request, error: HTTPException) -> Response:
    return JSONResponse({'error': error.detail}, error.status_code, error.headers)


async def _gone(_request: Request, _error: ClientDisconnect) -> Response:
    return Response(status_code=400)  # nobody reads it


async def _failed(_request: Request, _error: Exception) -> Response:
    return JSONResponse({'error': 'The server failed; its log says how.'}, 500)


def _integer(request: Request, name: str, low: int, high: int, default: int | None) -> int | None:
    given = request.query_params.getlist(name)
    if not given:
        return default if default is None else min(default, high)
    text = given[0]
    ok = len(given) == 1 and text.isascii() and text.isdigit() and len(text) < 10
    if not ok or not low <= int(text) <= high:
        raise Refusal(400, f'{name} must be a whole number from {low} to {high}.')
    return int(text)


def _asset(name: str, kind: str):
    text = (_TEMPLATES / name).read_text(encoding='utf-8')
    return lambda _request: Response(text, media_type=kind)


def _page(run: runs.Run, settings: Settings, method: str) -> str:
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_TEMPLATES),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
    )
    values: dict[str, Any] = {
        'model': run.experiment.config.model.name,
        'step': run.step,
        'classes': len(run.class_names),
        'method': {'grad_cam': 'Grad-CAM', 'saliency': 'saliency'}[method],
        'formats': FORMATS,
        'max_body': settings.max_body,
    }
    return environment.get_template('page.html').render(values)
