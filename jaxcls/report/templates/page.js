'use strict';
// Charts, sorting and the colour scheme of a page of sections; text only ever enters as textContent.

const svg = (tag, attributes, parent, text) => {
  const node = document.createElementNS('http://www.w3.org/2000/svg', tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  if (text !== undefined) node.textContent = text;
  parent?.append(node);
  return node;
};
const clamp = (value, low, high) => Math.max(low, Math.min(high, value));
const digits = (value, n) => String(Number(value.toPrecision(n)));

function short(value) {
  const size = Math.abs(value);
  if (size >= 1e15 || (size > 0 && size < 1e-4)) return value.toExponential(1).replace('.0e', 'e').replace('+', '');
  for (const [limit, unit] of [[1e12, 'T'], [1e9, 'G'], [1e6, 'M'], [1e4, 'k']]) {
    if (size >= limit) return digits(value / (limit === 1e4 ? 1e3 : limit), 3) + unit;
  }
  return digits(value, 4);
}

function bytes(value) {
  const units = ['B', 'KiB', 'MiB', 'GiB', 'TiB'];
  const i = clamp(Math.floor(Math.log2(Math.max(Math.abs(value), 1)) / 10), 0, 4);
  return `${digits(value / 1024 ** i, 3)} ${units[i]}`;
}

const exact = {
  percent: (value) => `${(100 * value).toFixed(2)}%`,
  integer: (value) => Math.round(value).toLocaleString('en'),
  number: short,
  seconds: (value) => `${short(value)} s`,
  bytes,
  text: short,
};
const onAxis = (format) => (format === 'percent' ? (value) => `${digits(100 * value, 5)}%` : format === 'integer' ? short : exact[format]);

function linearTicks(low, high, count) {
  const rough = (high - low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * ([1, 2, 5].find((s) => s * power >= 0.7 * rough) ?? 10);
  const ticks = [];
  for (let i = Math.ceil(low / step - 1e-9); i * step <= high + step * 1e-9; i++) ticks.push(i * step);
  return ticks;
}

function logTicks(low, high, count) {
  const [first, last] = [Math.floor(Math.log10(low)), Math.ceil(Math.log10(high))];
  const decades = last - first;
  const steps = decades <= 2 ? [1, 2, 5] : [1];
  const every = Math.max(1, Math.ceil(decades / count));
  const ticks = [];
  for (let power = first; power <= last; power += every) {
    for (const step of steps) ticks.push(step * 10 ** power);
  }
  const inside = ticks.filter((tick) => tick >= low * 0.999 && tick <= high * 1.001);
  return inside.length > 1 ? inside : linearTicks(low, high, count);
}

// A scale of numbers to pixels, with its ticks.
function scale(values, log, pad, [from, to], count) {
  let [low, high] = [Math.min(...values), Math.max(...values)];
  if (!(low <= high)) [low, high] = [log ? 0.1 : 0, 1];
  if (low === high) [low, high] = log ? [low / 2, high * 2] : [low - (Math.abs(low) / 10 || 0.5), high + (Math.abs(low) / 10 || 0.5)];
  const [forward, back] = log ? [Math.log10, (v) => 10 ** v] : [(v) => v, (v) => v];
  let [a, b] = [forward(low), forward(high)];
  const margin = (b - a) * pad;
  [a, b] = [a - margin, b + margin];
  const map = (value) => from + ((forward(value) - a) / (b - a)) * (to - from);
  return { map, low: back(a), high: back(b), ticks: (log ? logTicks : linearTicks)(back(a), back(b), count) };
}

const MARKS = ['M-3.5 0a3.5 3.5 0 1 0 7 0a3.5 3.5 0 1 0 -7 0', 'M-3 -3h6v6h-6z', 'M0 -4.4L4.4 0L0 4.4L-4.4 0z',
  'M-4 3.2L0 -4L4 3.2z', 'M-4 -3.2L0 4L4 -3.2z', 'M-1.3 -4h2.6v2.7h2.7v2.6h-2.7v2.7h-2.6v-2.7h-2.7v-2.6h2.7z',
  'M-4 -2.5L-2.5 -4L0 -1.5L2.5 -4L4 -2.5L1.5 0L4 2.5L2.5 4L0 1.5L-2.5 4L-4 2.5L-1.5 0z', 'M0 -4.5L1.3 -1.4L4.5 0L1.3 1.4L0 4.5L-1.3 1.4L-4.5 0L-1.3 -1.4z'];
// After all colours the marks move on by one, so that no pair comes twice.
const mark = (color) => MARKS[Math.max(color + Math.floor(color / 8), 0) % MARKS.length];
const colorClass = (color) => (color < 0 ? 'cm' : `c${color % 8}`);

// An interval about a share ends at 0 and 1 where all shares lie between them.
function bounds(chart) {
  const share = chart.y.format === 'percent' && chart.series.every((s) => s.y.every((v) => v === null || (v >= 0 && v <= 1)));
  return share ? [0, 1] : [-Infinity, Infinity];
}

// The least distance between bars on an axis without categories, 0 where there are none.
function spacing(shown) {
  const xs = [...new Set(shown.filter((s) => s.style === 'bar').flatMap((s) => s.x))].sort((a, b) => a - b);
  return xs.length ? Math.min(...xs.slice(1).map((x, i) => x - xs[i]), xs.length > 1 ? Infinity : 1) : 0;
}

function domain(chart, shown) {
  const { x, y } = chart;
  const usable = (value, log) => value !== null && (!log || value > 0);
  const xs = [], ys = [];
  const [low, high] = bounds(chart);
  for (const s of shown) {
    s.x.forEach((value, i) => {
      if (!usable(value, x.log) || !usable(s.y[i], y.log)) return;
      xs.push(value);
      const half = s.half?.[i] ?? 0;
      for (const end of [s.y[i], s.y[i] - half, s.y[i] + half]) if (usable(end, y.log)) ys.push(clamp(end, low, high));
    });
    if (s.style === 'bar' && !y.log) ys.push(0);
  }
  const half = x.categories || x.log ? 0 : spacing(shown) / 2;
  if (half && xs.length) xs.push(Math.min(...xs) - half, Math.max(...xs) + half);
  return [xs, ys];
}

function axes(chart, shown, width, height, root) {
  const { x, y } = chart;
  const [xs, ys] = domain(chart, shown);
  const format = onAxis(y.format);
  const tilted = Boolean(x.categories) && Math.max(...x.categories.map((name) => name.length)) > (width - 60) / x.categories.length / 6.6;
  const base = height - (tilted ? 82 : 44);
  const vertical = scale(ys, y.log, 0.06, [base, 22], 5);
  if (bounds(chart)[1] === 1) vertical.ticks = vertical.ticks.filter((v) => v >= -1e-9 && v <= 1 + 1e-9);
  const labels = vertical.ticks.map(format);
  const left = 12 + 7 * Math.max(3, ...labels.map((label) => label.length));
  const right = width - 12, inner = right - left;
  let horizontal;
  if (x.categories) {
    const band = inner / x.categories.length;
    horizontal = { map: (i) => left + (i + 0.5) * band, band, ticks: x.categories.map((_, i) => i) };
  } else {
    horizontal = scale(xs, x.log, 0.02, [left, right], clamp(inner / 70, 2, 9));
    horizontal.band = spacing(shown) && !x.log ? horizontal.map(spacing(shown)) - horizontal.map(0) : 0;
  }
  vertical.ticks.forEach((tick, i) => {
    const at = vertical.map(tick);
    svg('path', { class: 'grid', d: `M${left} ${at}H${right}` }, root);
    svg('text', { x: left - 7, y: at + 4, 'text-anchor': 'end' }, root, labels[i]);
  });
  xLabels(x, horizontal, base, tilted, root);
  svg('text', { x: 0, y: 10 }, root, y.label);
  svg('text', { x: left + inner / 2, y: height - 4, 'text-anchor': 'middle' }, root, x.label);
  return { horizontal, vertical, base, limits: bounds(chart) };
}

function xLabels(x, horizontal, base, tilted, root) {
  const format = x.categories ? (i) => x.categories[i] : short;
  const limit = tilted ? 13 : 60;
  horizontal.ticks.forEach((tick) => {
    const at = horizontal.map(tick);
    const name = format(tick);
    const text = name.length > limit ? `${name.slice(0, limit - 1)}…` : name;
    const place = tilted ? { transform: `translate(${at + 5} ${base + 14}) rotate(-35)`, 'text-anchor': 'end' } : { x: at, y: base + 18, 'text-anchor': 'middle' };
    const node = svg('text', place, root, text);
    if (text !== name) svg('title', {}, node, name);
  });
}

// Draws one series and returns its points in pixels.
function drawSeries(s, index, frame, bars, root) {
  const { horizontal, vertical } = frame;
  const group = svg('g', { class: colorClass(s.color), 'data-index': index }, root);
  const slot = bars.indexOf(s);
  const width = (0.8 * horizontal.band) / Math.max(bars.length, 1);
  const shift = slot < 0 ? 0 : (slot - (bars.length - 1) / 2) * width;
  const top = (value) => vertical.map(value > 0 || !frame.log ? clamp(value, ...frame.limits) : vertical.low);
  const points = [];
  s.x.forEach((value, i) => {
    const y = s.y[i];
    if (value === null || y === null || (frame.log && y <= 0) || (frame.logX && value <= 0)) return points.push(null);
    const half = s.half?.[i] ?? null;
    points.push({ s, i, x: horizontal.map(value) + shift, y: vertical.map(y), half,
      low: half === null ? null : Math.min(top(y - half), frame.base), high: half === null ? null : top(y + half) });
  });
  const real = points.filter(Boolean);
  if (slot >= 0) {
    group.classList.add('bars');
    for (const p of real) {
      const zero = frame.log ? frame.base : vertical.map(0);
      svg('rect', { class: 'bar', x: p.x - width * 0.46, width: width * 0.92, y: Math.min(p.y, zero), height: Math.abs(zero - p.y) }, group);
    }
  } else if (s.style !== 'points') {
    drawLine(s, points, group);
  }
  if (slot >= 0 || s.style === 'points') {
    for (const p of real) if (p.half !== null) svg('path', { class: 'whisker', d: `M${p.x} ${p.low}V${p.high}m-3 0h6M${p.x - 3} ${p.low}h6` }, group);
  }
  if (slot < 0 && s.color >= 0 && (s.style === 'points' || real.length <= 40)) {
    for (const p of real) svg('path', { class: s.style === 'dashed' ? 'hollow' : 'mark', d: mark(s.color), transform: `translate(${p.x} ${p.y})` }, group);
  }
  return real;
}

function drawLine(s, points, group) {
  const runs = [[]];
  for (const p of points) p ? runs.at(-1).push(p) : runs.push([]);
  for (const run of runs.filter((r) => r.length)) {
    const banded = run.filter((p) => p.half !== null);
    if (banded.length > 1) {
      const edge = [...banded.map((p) => `${p.x} ${p.high}`), ...banded.reverse().map((p) => `${p.x} ${p.low}`)];
      svg('path', { class: 'band', d: `M${edge.join('L')}Z` }, group);
    }
    svg('path', { class: `line ${s.style}`, d: `M${run.map((p) => `${p.x} ${p.y}`).join('L')}` }, group);
  }
}

function makeChart(element) {
  const chart = JSON.parse(element.querySelector('script').textContent);
  const plot = element.querySelector('.plot'), tip = element.querySelector('.tip');
  const buttons = [...element.querySelectorAll('.legend button')];
  let points = [], current = -1, root;

  function draw() {
    const off = new Set(buttons.filter((b) => b.getAttribute('aria-pressed') === 'false').flatMap((b) => b.dataset.series.split(' ').map(Number)));
    const shown = chart.series.filter((_, i) => !off.has(i));
    const width = Math.max(plot.clientWidth, 200), height = clamp(width * 0.56, 230, 400);
    root = svg('svg', { viewBox: `0 0 ${width} ${height}`, height });
    const frame = { ...axes(chart, shown, width, height, root), log: chart.y.log, logX: chart.x.log };
    const bars = shown.filter((s) => s.style === 'bar');
    points = shown.flatMap((s) => drawSeries(s, chart.series.indexOf(s), frame, bars, root));
    plot.replaceChildren(root);
    hide();
  }
  function hide() {
    tip.hidden = true;
    current = -1;
    root.querySelector('.focus')?.remove();
  }
  function show(index) {
    hide();
    current = index;
    const { s, i, x, y, half } = points[index];
    const format = exact[chart.y.format];
    const where = chart.x.categories ? chart.x.categories[s.x[i]] : `${chart.x.label} ${short(s.x[i])}`;
    const interval = half === null ? '' : ` ± ${format(half).replace('%', '')}`;
    const names = points.filter((p) => Math.hypot(p.x - x, p.y - y) < 1.5).map((p) => p.s.name);
    tip.textContent = `${names.join('\n')}\n${where}\n${chart.y.label} ${format(s.y[i])}${interval}`;
    tip.hidden = false;
    tip.style.left = '0';
    svg('circle', { class: 'focus', cx: x, cy: y, r: 6.5 }, root);
    tip.style.left = `${clamp(x + 12, 0, element.clientWidth - tip.offsetWidth)}px`;
    const above = plot.offsetTop + y - tip.offsetHeight - 12;
    tip.style.top = `${above < 0 ? plot.offsetTop + y + 14 : above}px`;
  }
  function nearest(event) {
    const box = root.getBoundingClientRect();
    const [x, y] = [event.clientX - box.left, event.clientY - box.top];
    const distance = (p) => (p.x - x) ** 2 + (p.y - y) ** 2 / 4;
    let best = -1;
    points.forEach((p, i) => { if (best < 0 || distance(p) < distance(points[best])) best = i; });
    if (best >= 0 && best !== current) show(best);
  }
  plot.addEventListener('pointermove', nearest);
  plot.addEventListener('pointerdown', nearest);
  plot.addEventListener('pointerleave', hide);
  plot.addEventListener('blur', hide);
  plot.addEventListener('keydown', (event) => {
    const step = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (event.key === 'Escape') hide();
    if (!step || !points.length) return;
    event.preventDefault();
    show((current + step + points.length) % points.length);
  });
  for (const button of buttons) {
    drawSwatch(button.querySelector('svg'));
    button.addEventListener('click', () => {
      button.setAttribute('aria-pressed', button.getAttribute('aria-pressed') !== 'true');
      draw();
    });
  }
  // Folded charts have no width until they are opened.
  let width = 0;
  new ResizeObserver(() => {
    if (plot.clientWidth && plot.clientWidth !== width) {
      width = plot.clientWidth;
      draw();
    }
  }).observe(plot);
}

function drawSwatch(node) {
  const { style, color } = node.dataset;
  if (style === 'bar') svg('rect', { class: 'bar', x: 4, y: 0, width: 14, height: 10 }, node);
  if (style === 'line' || style === 'dashed') svg('path', { class: `line ${style}`, d: 'M0 5H22' }, node);
  if (style !== 'bar' && Number(color) >= 0) svg('path', { class: style === 'dashed' ? 'hollow' : 'mark', d: mark(Number(color)), transform: 'translate(11 5)' }, node);
}

function makeSortable(table) {
  const headers = [...table.tHead.rows[0].cells];
  headers.forEach((header, column) => {
    const button = document.createElement('button');
    button.type = 'button';
    button.textContent = header.textContent;
    header.replaceChildren(button);
    button.addEventListener('click', () => {
      const numeric = header.classList.contains('number');
      const was = header.getAttribute('aria-sort');
      const now = was === null ? (numeric ? 'descending' : 'ascending') : was === 'ascending' ? 'descending' : 'ascending';
      headers.forEach((other) => other.removeAttribute('aria-sort'));
      header.setAttribute('aria-sort', now);
      sortRows(table.tBodies[0], column, numeric, now === 'ascending' ? 1 : -1);
    });
  });
}

function sortRows(body, column, numeric, sign) {
  const key = (row) => (numeric ? Number(row.cells[column].dataset.value ?? NaN) : row.cells[column].textContent);
  const compare = numeric ? (a, b) => a - b : (a, b) => a.localeCompare(b, undefined, { numeric: true });
  const missing = (value) => numeric && Number.isNaN(value);
  const rows = [...body.rows].sort((first, second) => {
    const [a, b] = [key(first), key(second)];
    return missing(a) || missing(b) ? missing(a) - missing(b) : sign * compare(a, b);
  });
  body.append(...rows);
}

function makeMatrix(table) {
  const tip = document.createElement('p');
  tip.className = 'tip';
  tip.id = 'cell-tip';
  tip.hidden = true;
  table.parentElement.append(tip);
  const names = [...table.tHead.rows[0].cells].slice(1).map((cell) => cell.textContent);
  table.addEventListener('pointerover', (event) => {
    const cell = event.target.closest('td[data-count]');
    if (!cell) return;
    const row = cell.parentElement, count = Number(cell.dataset.count);
    const total = [...row.cells].slice(1).reduce((sum, c) => sum + Number(c.dataset.count), 0);
    tip.textContent = `true ${row.cells[0].textContent}\npredicted ${names[cell.cellIndex - 1]}\n${count.toLocaleString('en')} of ${total.toLocaleString('en')}, ${exact.percent(total ? count / total : 0)}`;
    tip.hidden = false;
    tip.style.left = '0';
    const box = cell.getBoundingClientRect();
    tip.style.left = `${clamp(box.right + 8, 0, innerWidth - tip.offsetWidth)}px`;
    tip.style.top = `${clamp(box.bottom + 6, 0, innerHeight - tip.offsetHeight)}px`;
  });
  table.addEventListener('pointerleave', () => { tip.hidden = true; });
}

function makeScheme(button) {
  const root = document.documentElement;
  const dark = () => (root.dataset.scheme ?? (matchMedia('(prefers-color-scheme: dark)').matches ? 'dark' : 'light')) === 'dark';
  const label = () => { button.textContent = dark() ? 'Light' : 'Dark'; };
  button.hidden = false;
  button.setAttribute('aria-label', 'Change the colour scheme');
  button.addEventListener('click', () => {
    root.dataset.scheme = dark() ? 'light' : 'dark';
    label();
  });
  matchMedia('(prefers-color-scheme: dark)').addEventListener('change', label);
  label();
}

// The right edge of a box fades while columns are hidden behind it.
function makeBox(box) {
  const fade = () => box.classList.toggle('more', box.scrollLeft + box.clientWidth < box.scrollWidth - 2);
  box.addEventListener('scroll', fade, { passive: true });
  new ResizeObserver(fade).observe(box);
}

document.querySelectorAll('.chart').forEach(makeChart);
document.querySelectorAll('.box').forEach(makeBox);
document.querySelectorAll('table.sortable').forEach(makeSortable);
document.querySelectorAll('table.matrix').forEach(makeMatrix);
makeScheme(document.getElementById('scheme'));
