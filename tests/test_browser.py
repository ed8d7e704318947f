"""The page in a real browser: what its script draws, and that it never complains."""

import base64
import shutil

import numpy as np
import pytest

from jaxcls.report import page

webdriver = pytest.importorskip('selenium.webdriver')
CHROMIUM = shutil.which('chromium') or shutil.which('google-chrome')
DRIVER = shutil.which('chromedriver')
pytestmark = pytest.mark.skipif(not (CHROMIUM and DRIVER), reason='needs chromium and chromedriver')
BAD = '<img src=x onerror="window.broken=1"></script><script>window.broken=1</script>'
FLAGS = (
    'headless=new', 'no-sandbox', 'disable-gpu', 'disable-quic', 'no-first-run', 'window-size=1200,900',
    'disable-background-networking', 'disable-component-update', 'disable-sync',
)  # fmt: skip


def sections():
    curves = [
        {'name': f'{group} {part}', 'group': group, 'style': style, 'x': [1, 2, 3],
         'y': [0.5, base + k / 10, 0.9], 'half': [0.01, 0.02, None]}
        for k, group in enumerate(('lenet', BAD))
        for part, style, base in (('training', 'dashed', 0.75), ('validation', 'line', 0.7))
    ]  # fmt: skip
    bars = [
        {'name': n, 'style': 'bar', 'x': [0, 1, 2], 'y': [3, 20, 1], 'half': [1, 2, 0]}
        for n in 'ab'
    ]
    points = [{'name': 'net', 'style': 'points', 'x': [1e3, 1e6], 'y': [0.001, 9], 'half': [1, 1]}]
    rows = [[BAD, 0.9], ['b', None], ['c', {'mean': 0.95, 'half': 0.01, 'n': 3}], ['d' * 80, 0.1]]
    wide = [f'metric {i}' for i in range(20)]
    pixels = np.arange(64, dtype=np.uint8).reshape(8, 8, 1)
    percent = {'label': 'accuracy', 'format': 'percent'}
    return [
        {'kind': 'chart', 'title': 'Curves', 'x': {'label': 'epoch'}, 'y': percent, 'series': curves},
        {'kind': 'row', 'title': 'Row', 'sections': [
            {'kind': 'chart', 'title': 'Bars', 'x': {'label': 'x', 'categories': [BAD, 'b' * 30, 'c']},
             'y': {'label': 'count', 'format': 'integer'}, 'series': bars},
            {'kind': 'chart', 'title': 'Points', 'x': {'label': 'parameters', 'log': True},
             'y': {'label': 'loss', 'log': True}, 'series': points},
            {'kind': 'chart', 'title': 'Nothing', 'x': {'label': 'x'}, 'y': {'label': 'y'}, 'series': []},
        ]},
        {'kind': 'table', 'title': 'Table', 'columns': ['run', 'accuracy'], 'formats': ['text', 'percent'],
         'rows': rows},
        {'kind': 'table', 'title': 'Wide', 'columns': wide, 'formats': ['number'] * 20,
         'rows': [[12345.678] * 20]},
        {'kind': 'matrix', 'title': 'Matrix', 'names': [BAD, *'bcdefghijklmnopqrst'],
         'counts': (np.eye(20, dtype=int) * 7 + 1).tolist()},
        {'kind': 'images', 'title': 'Images', 'columns': 8,
         'images': [{'pixels': pixels, 'caption': BAD}] * 3},
        {'kind': 'details', 'title': 'Folded', 'sections': [
            {'kind': 'chart', 'title': 'Inner', 'x': {'label': 'x'}, 'y': {'label': 'y'},
             'series': [{'name': 'long', 'x': list(range(100)), 'y': list(range(100))}]}]},
    ]  # fmt: skip


def chrome(profile):
    """A browser without a window, with a profile of its own."""
    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    for flag in (*FLAGS, f'user-data-dir={profile}'):
        options.add_argument(f'--{flag}')
    options.set_capability('goog:loggingPrefs', {'browser': 'ALL'})
    service = webdriver.ChromeService(executable_path=DRIVER)
    return webdriver.Chrome(options=options, service=service)


@pytest.fixture(scope='module')
def driver(tmp_path_factory):
    directory = tmp_path_factory.mktemp('browser')
    (directory / 'page.html').write_text(page.render(BAD, sections(), subtitle=BAD))
    with chrome(directory / 'profile') as browser:
        browser.address = (directory / 'page.html').as_uri()
        yield browser


@pytest.fixture
def browser(driver):
    """The page, loaded afresh; nothing that a test does may leave a message in the console."""
    driver.get(driver.address)
    wait(driver, 'document.querySelectorAll(".plot svg").length >= 4')
    yield driver
    assert driver.get_log('browser') == []
    assert js(driver, 'window.broken') is None


def js(driver, expression: str):
    return driver.execute_script(f'return {expression}')


def wait(driver, condition: str):
    from selenium.webdriver.support.ui import WebDriverWait

    WebDriverWait(driver, 10, 0.02).until(lambda d: js(d, condition))


def find(driver, selector: str):
    return driver.find_elements('css selector', selector)


def emulate(driver, width: int, scheme: str = 'light'):
    metrics = {'width': width, 'height': 900, 'deviceScaleFactor': 1, 'mobile': width < 600}
    driver.execute_cdp_cmd('Emulation.setDeviceMetricsOverride', metrics)
    media = {'features': [{'name': 'prefers-color-scheme', 'value': scheme}]}
    driver.execute_cdp_cmd('Emulation.setEmulatedMedia', media)


def test_a_button_of_the_legend_hides_its_series_and_shows_them_again(browser):
    def drawn():
        return [g.get_attribute('data-index') for g in find(browser, '#s0 g[data-index]')]

    buttons = {b.text: b for b in find(browser, '#s0 .legend button')}
    assert list(buttons) == ['lenet', BAD, 'training', 'validation'] and drawn() == list('0123')
    buttons[BAD].click()
    assert drawn() == ['0', '1'] and buttons[BAD].get_attribute('aria-pressed') == 'false'
    buttons['training'].send_keys('\ue007')  # Enter: the keyboard does what the mouse does
    assert drawn() == ['1']
    buttons[BAD].click()
    assert drawn() == ['1', '3']


def test_a_point_under_the_pointer_or_the_arrow_keys_is_named(browser):
    from selenium.webdriver import ActionChains

    plot, tip = find(browser, '#s0 .plot')[0], find(browser, '#s0 .tip')[0]
    assert not tip.is_displayed()
    mark = find(browser, '#s0 g[data-index="1"] .mark')[1]
    ActionChains(browser).move_to_element(mark).perform()
    assert tip.text == 'lenet validation\nepoch 2\naccuracy 70.00% ± 2.00'
    plot.send_keys('\ue014')  # right: a point of all series
    names = [f'{group} {part}' for group in ('lenet', BAD) for part in ('training', 'validation')]
    assert tip.text.split('\n') == [*names, 'epoch 3', 'accuracy 90.00%']
    plot.send_keys('\ue00c')  # Escape
    assert not tip.is_displayed()


def test_a_cell_of_the_matrix_under_the_pointer_is_explained(browser):
    from selenium.webdriver import ActionChains

    ActionChains(browser).move_to_element(find(browser, '.matrix .right')[1]).perform()
    assert find(browser, '#cell-tip')[0].text == 'true b\npredicted b\n8 of 27, 29.63%'


def test_a_click_on_a_heading_sorts_with_missing_values_last(browser):
    def column(i):
        return [
            row.find_elements('css selector', 'td')[i].text for row in find(browser, '#s2 tbody tr')
        ]

    names, accuracies = find(browser, '#s2 thead button')
    accuracies.click()
    assert column(1) == ['95.00% ± 1.00', '90.00%', '10.00%', '–']
    accuracies.click()
    assert column(1) == ['10.00%', '90.00%', '95.00% ± 1.00', '–']
    names.click()
    assert column(0) == [BAD, 'b', 'c', 'd' * 80]
    assert find(browser, '#s2 th')[0].get_attribute('aria-sort') == 'ascending'


@pytest.mark.parametrize('width', [390, 1200])
def test_nothing_is_wider_than_the_window(browser, width):
    emulate(browser, width)
    wait(browser, f'innerWidth == {width}')
    assert js(browser, 'document.documentElement.scrollWidth') <= width
    assert js(browser, 'document.body.scrollWidth') <= width
    box = find(browser, '#s3 .box')[0]
    assert 'more' in box.get_attribute('class') or width > 390  # the table scrolls in its box
    wait(browser, 'document.querySelector("#s0 .plot svg").clientWidth <= innerWidth')


def test_both_schemes_are_readable_and_the_button_switches(browser):
    def colors():
        style = 'getComputedStyle(document.body)'
        return [js(browser, f'{style}.{name}') for name in ('backgroundColor', 'color')]

    seen = []
    for scheme in ('light', 'dark'):
        emulate(browser, 1200, scheme)
        seen.append(colors())
        for selector in ('body', '.note', '.plot text', '.legend button', '.tip'):
            for element in find(browser, selector)[:1]:
                assert _contrast(browser, element) >= 4.5, (scheme, selector)
    assert seen[0] != seen[1]
    find(browser, '#scheme')[0].click()
    assert colors() == seen[0] and find(browser, '#scheme')[0].text == 'Dark'
    find(browser, '#scheme')[0].click()
    assert colors() == seen[1]


def _contrast(browser, element) -> float:
    """WCAG's ratio of an element's text, or fill, to what is behind it."""
    found = browser.execute_script(
        """let node = arguments[0];
        const style = getComputedStyle(node), behind = () => getComputedStyle(node).backgroundColor;
        const own = node.ownerSVGElement ? style.fill : style.color;
        while (behind() === 'rgba(0, 0, 0, 0)') node = node.parentElement;
        return [own, behind()]""",
        element,
    )
    first, second = (
        _luminance([float(x) for x in c[c.index('(') + 1 : -1].split(',')[:3]]) for c in found
    )
    return (max(first, second) + 0.05) / (min(first, second) + 0.05)


def _luminance(rgb) -> float:
    c = np.array(rgb) / 255
    return float(
        np.where(c <= 0.04045, c / 12.92, ((c + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722]
    )


def test_a_folded_chart_is_drawn_when_it_is_opened(browser):
    assert not find(browser, '#s6 .plot svg')
    find(browser, '#s6 summary')[0].click()
    wait(browser, 'document.querySelector("#s6 .plot svg .line")')
    assert not find(browser, '#s6 .mark')  # of a hundred points only the line is drawn


def test_hostile_text_is_shown_as_it_is(browser):
    assert browser.title == BAD and find(browser, 'h1')[0].text == BAD
    assert len(find(browser, 'img')) == 3 and len(find(browser, 'script')) == 6
    assert BAD in [t.get_attribute('textContent') for t in find(browser, '#s1-0 svg title')]


def test_without_javascript_tables_still_show(driver):
    driver.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': True})
    try:
        driver.get(driver.address)
        assert find(driver, '#s2 td')[1].text == '90.00%'
        assert 'needs JavaScript' in find(driver, '#s0 noscript')[0].text
        picture = driver.execute_cdp_cmd('Page.captureScreenshot', {})['data']
        assert len(base64.b64decode(picture)) > 5000
    finally:
        driver.execute_cdp_cmd('Emulation.setScriptExecutionDisabled', {'value': False})
