"""The server's page in a real browser: an image goes in, classes and the heat map come out."""

import threading

import numpy as np
import pytest

pytest.importorskip('selenium.webdriver')
pytest.importorskip('starlette')
from jaxcls import serving
from jaxcls.serving import app as app_lib
from jaxcls.serving import server
from test_browser import CHROMIUM, DRIVER, chrome, emulate, find, js, wait
from test_server import png, run  # noqa: F401 (a fixture)

pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver')


@pytest.fixture(scope='module')
def address(run):  # noqa: F811
    ready, bound = threading.Event(), server.bind('127.0.0.1', 0)
    settings = serving.Settings(max_batch=1, max_body=1 << 20)
    http = server.Server(app_lib.make_app(run, settings), settings, ready.set)
    thread = threading.Thread(target=http.run, kwargs={'sockets': [bound]})
    thread.start()
    assert ready.wait(20)
    yield f'http://127.0.0.1:{bound.getsockname()[1]}'
    http.should_exit = True
    thread.join()
    bound.close()


@pytest.fixture(scope='module')
def driver(address, tmp_path_factory):
    with chrome(tmp_path_factory.mktemp('browser')) as browser:
        yield browser


@pytest.fixture
def page(driver, address):
    driver.get(address)
    wait(driver, 'document.readyState === "complete"')
    yield driver
    refused = [line for line in driver.get_log('browser') if '422' not in line['message']]
    assert refused == []


def shown(page):
    wait(
        page,
        '!document.getElementById("seen").hidden && document.getElementById("overlay").naturalWidth',
    )
    return [row.text.split('\n')[0] for row in find(page, '#classes li')]


def test_a_chosen_image_has_classes_bars_and_the_heat_map(page, tmp_path, run):  # noqa: F811
    (tmp_path / 'a.png').write_bytes(png(3))
    find(page, '#file')[0].send_keys(str(tmp_path / 'a.png'))
    names = shown(page)
    assert len(names) == 5 and set(names) <= set(run.class_names)  # markup in a name is text
    assert find(page, '#status')[0].text.startswith(f'{names[0]}, ')
    widths = [js(page, f'document.querySelectorAll(".bar")[{i}].clientWidth') for i in range(5)]
    assert widths == sorted(widths, reverse=True) and widths[0] > widths[4]
    assert (
        js(page, 'document.getElementById("overlay").alt') == f'Heat map: where {names[0]} is seen'
    )
    assert js(page, 'document.getElementById("given").naturalWidth') == 8


DROP = """
const bytes = new Uint8Array(arguments[0]), data = new DataTransfer();
data.items.add(new File([bytes], 'a.png', {type: 'image/png'}));
const drop = (name) => document.getElementById('drop').dispatchEvent(
  new DragEvent(name, {dataTransfer: data, bubbles: true, cancelable: true}));
drop('dragover');
const over = document.getElementById('drop').classList.contains('over');
drop('drop');
return over;
"""


def test_an_image_can_be_dropped_and_what_is_none_is_named(page):
    assert page.execute_script(DROP, list(png(4)))
    assert len(shown(page)) == 5
    page.execute_script(DROP, list(b'no image'))
    wait(page, 'document.getElementById("error").textContent')
    assert 'is no image' in find(page, '#error')[0].text
    assert not find(page, '#result')[0].is_displayed()
    page.execute_script(DROP, list(png(4)))
    assert len(shown(page)) == 5 and find(page, '#error')[0].text == ''


def test_a_file_too_long_is_not_sent(page, tmp_path):
    (tmp_path / 'long.png').write_bytes(bytes(2 << 20))
    find(page, '#file')[0].send_keys(str(tmp_path / 'long.png'))
    wait(page, 'document.getElementById("error").textContent')
    assert find(page, '#error')[0].text == 'The file has 2.0 MB; the limit is 1 MB.'


@pytest.mark.parametrize('scheme', ['light', 'dark'])
@pytest.mark.parametrize('width', [360, 1200])
def test_it_fits_the_window_and_the_keyboard(page, width, scheme):
    emulate(page, width, scheme)
    wait(page, f'innerWidth == {width}')
    page.execute_script(DROP, list(png(5, (30, 90))))
    shown(page)
    assert js(page, 'document.documentElement.scrollWidth') <= width
    page.execute_script('document.activeElement.blur()')
    find(page, 'body')[0].send_keys('\ue004')  # Tab
    assert js(page, 'document.activeElement.id') == 'file'
    assert js(page, 'getComputedStyle(document.getElementById("drop")).outlineStyle') == 'solid'
    picture = page.get_screenshot_as_png()
    assert len(np.frombuffer(picture, np.uint8)) > 5000
