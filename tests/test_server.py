"""The server: its answers are the network's own, its limits hold, and hostile requests leave it well."""

import asyncio
import contextlib
import io
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import jax
import numpy as np
import pytest
from PIL import Image

from jaxcls import classify, config, explain, fit, runs, serving, sharding
from jaxcls import experiment as experiment_lib
from jaxcls.errors import UserError
from jaxcls.serving import batching, intake

testclient = pytest.importorskip('starlette.testclient')
import hostile_server  # noqa: E402
from jaxcls.serving import app as app_lib  # noqa: E402
from jaxcls.serving import server  # noqa: E402

SETTINGS = serving.Settings(max_batch=4, max_body=1 << 20, timeout=1, hosts=('testserver',))


@pytest.fixture(scope='module')
def run():
    """A network that is not trained."""
    c = config.get_config()
    c.update({'model': {'name': 'lenet_small'}})
    experiment = experiment_lib.build(experiment_lib.resolve(c), (8, 8, 1), 10, 100)
    shape = jax.ShapeDtypeStruct((1, 8, 8, 1), np.float32)
    like = jax.eval_shape(lambda x: experiment.model.init(jax.random.key(0), x, train=False), shape)
    rng = np.random.default_rng(0)
    variables = jax.tree_util.tree_map_with_path(
        lambda path, x: (
            np.float32(rng.normal(0, 0.15, x.shape)) + (path[-1].key in ('scale', 'var'))
        ),
        like,
    )
    names = tuple(f'<b>{i}' for i in range(10))
    return runs.Run(experiment, variables, 7, names, sharding.make_mesh())


@pytest.fixture(scope='module')
def app(run):
    return app_lib.make_app(run, SETTINGS)


@pytest.fixture(scope='module')
def client(app):
    with testclient.TestClient(app, raise_server_exceptions=False) as client:
        yield client


def png(seed: int = 0, size=(8, 8)) -> bytes:
    return hostile_server.image('PNG', size, seed)


def expected(run, body: bytes, top: int = 5):
    images = experiment_lib.decode_image(run.experiment, body)[None]
    return classify.ranked(run.class_names, classify.make_classifier(run)(images)[0], top)


def same(found, wanted):
    assert [guess['class'] for guess in found] == [guess['class'] for guess in wanted]
    for guess, other in zip(found, wanted, strict=True):
        assert guess['probability'] == pytest.approx(other['probability'], abs=1e-6)


@pytest.mark.parametrize('size', [(8, 8), (50, 31)])
def test_the_answer_is_the_networks_whether_it_is_sent_as_it_is_or_in_a_form(client, run, size):
    body = png(1, size)
    plain = client.post('/predict?top=3', content=body, headers={'content-type': 'image/png'})
    form = client.post('/predict?top=3', files={'file': ('a.png', body)})
    assert plain.status_code == form.status_code == 200
    assert plain.json() == form.json()
    same(plain.json()['predictions'], expected(run, body, 3))


def test_an_explanation_is_the_overlay_of_grad_cam(client, run):
    body = png(2)
    answer = client.post('/explain?label=3', content=body)
    image = experiment_lib.decode_image(run.experiment, body)
    heat = explain.make_explainer(run, ('grad_cam',))(image, 3).heat['grad_cam']
    found = np.asarray(Image.open(io.BytesIO(answer.content)))
    np.testing.assert_array_equal(found, explain.overlay(image, heat))
    assert client.post('/explain', content=body).headers['content-type'] == 'image/png'


REFUSED = [
    (('GET', '/nowhere'), {}, 404),
    (('GET', '/predict'), {}, 405),
    (('POST', '/'), {}, 405),
    (('POST', '/predict'), {'content': b''}, 422),
    (('POST', '/predict'), {'content': b'no image'}, 422),
    (('POST', '/predict'), {'content': hostile_server.image('TIFF')}, 422),
    (('POST', '/predict'), {'content': b'a', 'headers': {'content-type': 'text/html'}}, 415),
    (('POST', '/predict'), {'content': bytes(2 << 20)}, 413),
    (('POST', '/predict'), {'content': iter([bytes(1 << 20)] * 2)}, 413),
    (('POST', '/predict'), {'content': hostile_server.png(5000, 5000, b'')}, 413),
    (('POST', '/predict'), {'content': hostile_server.many_scans(200)}, 422),
    (('POST', '/predict'), {'files': [('a', b'a'), ('b', b'b')]}, 400),
    (('POST', '/predict'), {'files': {'a': (None, b'text')}}, 400),
    (('POST', '/predict?top=0'), {'content': png()}, 400),
    (('POST', '/predict?top=11'), {'content': png()}, 400),
    (('POST', '/explain?label=-1'), {'content': png()}, 400),
    (('GET', '/healthz'), {'headers': {'host': 'example.org'}}, 400),
    (('POST', '/predict'), {'content': png(), 'headers': {'sec-fetch-site': 'cross-site'}}, 403),
]  # fmt: skip


@pytest.mark.parametrize('what, more, status', REFUSED)
def test_what_is_refused_is_refused_with_one_message(client, what, more, status):
    answer = client.request(*what, **more)
    assert answer.status_code == status
    assert list(answer.json()) == ['error'] and answer.json()['error']
    assert answer.headers['x-content-type-options'] == 'nosniff'


def test_a_broken_network_is_a_500_of_that_request_alone(client, monkeypatch):
    monkeypatch.setattr(explain, 'overlay', lambda *_: 1 / 0)
    assert client.post('/explain', content=png()).status_code == 500
    assert client.post('/predict', content=png()).status_code == 200


def test_metrics_count_requests_batches_and_the_queue(client):
    before = client.get('/metrics').text
    client.post('/predict', content=png())
    text = client.get('/metrics').text
    name = 'jaxcls_requests_total{path="/predict",status="200"}'

    def value(text):
        return float(text.split(name)[1].split('\n')[0]) if name in text else 0

    assert value(text) == value(before) + 1
    assert 'jaxcls_queue 0.0' in text and 'jaxcls_batch_images_count' in text
    client.get('/secret-path')
    assert 'secret' not in client.get('/metrics').text  # names of paths would fill the memory


def test_the_openapi_document_is_valid_and_has_every_route(client, app):
    import jsonschema

    document = client.get('/openapi.json').json()
    for path, methods in document['paths'].items():
        for method, operation in methods.items():
            kind = 'content' if operation['responses']['200'].get('content') else None
            answer = client.request(method, path, content=png() if method == 'post' else None)
            [(media, content)] = operation['responses']['200'][kind].items()
            assert answer.headers['content-type'].startswith(media)
            if media == 'application/json':
                jsonschema.validate(answer.json(), content['schema'])
    refused = client.post('/predict', content=b'x')
    described = document['paths']['/predict']['post']['responses'][str(refused.status_code)]
    assert described['content']['application/json']['schema']['$ref'].endswith('/Error')
    jsonschema.validate(refused.json(), document['components']['schemas']['Error'])
    pages = {'/', '/page.js', '/page.css', '/openapi.json'}
    assert {route.path for route in app.routes} == set(document['paths']) | pages


def test_the_page_takes_nothing_from_elsewhere(client):
    page = client.get('/')
    assert "default-src 'none'" in page.headers['content-security-policy']
    assert '//' not in page.text.replace('<!doctype html>', '')
    assert client.get('/page.js').status_code == client.get('/page.css').status_code == 200


def batches_of(count: int, work, max_batch: int = 4, wait: float = 0.02):
    """What `count` requests at once get, and the sizes that the classifier saw."""
    from concurrent.futures import ThreadPoolExecutor

    seen, observed = [], []

    def classifier(images):
        seen.append(len(images))
        return work(images)

    async def main():
        with ThreadPoolExecutor(1) as device:
            batcher = batching.Batcher(
                classifier, device, max_batch, wait, lambda: count, observed.append
            )
            task = asyncio.create_task(batcher.run())
            images = [np.full((1, 1, 1), i, np.uint8) for i in range(count)]
            asked = [batcher.submit(image) for image in images]
            found = await asyncio.gather(*asked, return_exceptions=True)
            task.cancel()
            return found

    return asyncio.run(main()), seen, observed


def test_requests_share_batches_of_few_sizes_and_each_gets_its_own_answer():
    found, seen, observed = batches_of(11, lambda images: images[:, 0, 0, 0] * 2)
    assert found == [2 * i for i in range(11)]
    assert seen == [4, 4, 4] and observed == [4, 4, 3]
    assert batches_of(1, lambda images: images[:, 0, 0, 0])[1] == [1]
    assert batching.sizes(32) == [1, 4, 16, 32] and batching.sizes(1) == [1]


def test_nobody_waits_for_others_that_are_not_on_their_way():
    begin = time.monotonic()
    batches_of(1, lambda images: images[:, 0, 0, 0], wait=30)
    assert time.monotonic() - begin < 20


def test_a_batch_that_fails_is_not_the_next_ones_failure():
    def work(images):
        if images[0, 0, 0, 0] == 0:
            raise FloatingPointError
        return images[:, 0, 0, 0]

    found, _, _ = batches_of(6, work)
    assert [type(x) for x in found[:4]] == [FloatingPointError] * 4 and found[4:] == [4, 5]


def test_a_full_gate_refuses_with_a_time_to_come_back():
    gate = batching.Gate(1)
    with gate.enter(), pytest.raises(batching.Refusal) as refusal, gate.enter():
        pass
    assert refusal.value.status == 503 and refusal.value.headers['Retry-After'] == '1'
    with gate.enter():
        pass


def test_bodies_together_have_a_limit(run):
    class Request:
        headers = types.MappingProxyType({})

        async def stream(self):
            yield bytes(600)
            await both_began.wait()
            yield bytes(600)

    both_began = asyncio.Barrier(2)

    async def main():
        limits = SETTINGS._replace(max_held=2000)
        taken = intake.Intake(lambda body: body, limits)
        both = [taken.image(Request()), taken.image(Request())]
        found = await asyncio.gather(*both, return_exceptions=True)
        taken.close()
        return sorted(refusal.status for refusal in found), taken.held

    assert asyncio.run(main()) == ([422, 503], 0)


@pytest.fixture(scope='module')
def address(run, app):
    """A server on a socket of its own."""
    ready = threading.Event()
    bound = server.bind('127.0.0.1', 0)
    settings = SETTINGS._replace(connections=40)
    http = server.Server(app_lib.make_app(run, SETTINGS), settings, ready.set)
    thread = threading.Thread(target=http.run, kwargs={'sockets': [bound]})
    thread.start()
    assert ready.wait(20)
    yield bound.getsockname()[:2]
    http.should_exit = True
    thread.join()
    bound.close()


@pytest.mark.parametrize('data', [b'', b'GET', hostile_server.request(png())[:-5]])
def test_slow_clients_are_cut_off(address, data):
    begin = time.monotonic()
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(data)
        status = hostile_server.read_status(client)
    assert status == (408 if len(data) > 10 else 0)
    assert time.monotonic() - begin < 15


def test_a_body_that_nobody_wants_does_not_keep_the_connection(address):
    begin = time.monotonic()
    with socket.create_connection(address, timeout=20) as client:
        client.sendall(hostile_server.request(bytes(1000), '/predict?top=0')[:-900])
        assert hostile_server.read_status(client) == 400
        with contextlib.suppress(OSError):
            while time.monotonic() - begin < 15:
                client.sendall(b'a')
                time.sleep(0.1)
    assert time.monotonic() - begin < 10


def test_a_connection_too_many_is_told_so(address):
    with contextlib.ExitStack() as stack:
        for _ in range(40):
            stack.enter_context(socket.create_connection(address))
        time.sleep(0.1)
        assert hostile_server.status(address, hostile_server.request(png())) == 503
    time.sleep(0.1)
    assert hostile_server.status(address, hostile_server.request(png())) == 200


def test_hostile_requests_leave_it_well(address):
    seen = hostile_server.attack(address, 44, seed=1)
    assert seen.wrong == [] and sum(seen.counts.values()) == 44
    assert hostile_server.status(address, hostile_server.request(png())) == 200


def test_an_address_that_is_taken_is_a_mistake(address):
    with pytest.raises(UserError, match='Choose another --host or --port'):
        server.bind(*address)


def test_limits_below_one_are_a_mistake():
    with pytest.raises(UserError, match='--max-batch is 0'):
        serving.check(serving.Settings(max_batch=0))


@pytest.mark.parametrize(
    'host', ['localhost', 'LOCALHOST:80', '127.0.0.1:8000', '[::1]:1', 'a.org:1']
)
def test_hosts_of_this_server(host):
    assert serving.Settings(hosts=('a.org',)).knows(host)


@pytest.mark.parametrize(
    'host', ['', 'b.org', 'localhost.b.org', 'localhost:a', '[::1', 'x@localhost']
)
def test_hosts_of_other_servers(host):
    assert not serving.Settings(hosts=('a.org',)).knows(host)


@pytest.mark.slow
def test_the_command_serves_until_a_signal(tmp_path):
    c = config.get_config()
    c.update({'model': {'name': 'linear'}, 'epochs': 1})
    fit(c, tmp_path)
    environment = {**os.environ, 'PYTHONPATH': str(Path(serving.__file__).parents[2])}
    command = [sys.executable, '-m', 'jaxcls.main', 'serve', str(tmp_path), '--port=0']
    for name, status in (('SIGTERM', 143), ('SIGINT', 130)):
        with subprocess.Popen(
            command, stdout=subprocess.PIPE, text=True, env=environment
        ) as process:
            port = int(process.stdout.readline().split('http://127.0.0.1:')[1].split()[0])
            found = hostile_server.status(('127.0.0.1', port), hostile_server.request(png()))
            process.send_signal(signal.Signals[name])
            assert found == 200 and process.wait(30) == status
