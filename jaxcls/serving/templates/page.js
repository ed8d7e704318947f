'use strict';
const find = (id) => document.getElementById(id);
const limit = Number(document.body.dataset.maxBody);
let turn = 0;

function show(image, source, alt) {
  URL.revokeObjectURL(image.src);
  image.onload = () => image.classList.toggle('small', image.naturalWidth < 200);
  image.src = source;
  if (alt) image.alt = alt;
}

function bars(predictions) {
  find('classes').replaceChildren(...predictions.map((guess) => {
    const row = document.createElement('li');
    const percent = (100 * guess.probability).toFixed(1) + '%';
    const parts = ['name', 'share', 'track'].map((name) => {
      const part = document.createElement('span');
      part.className = name;
      return part;
    });
    parts[0].textContent = guess.class;
    parts[1].textContent = percent;
    const bar = document.createElement('div');
    bar.className = 'bar';
    bar.style.width = percent;
    parts[2].append(bar);
    parts[2].setAttribute('aria-hidden', 'true');
    row.append(...parts);
    return row;
  }));
}

async function ask(path, file) {
  const answer = await fetch(path, {
    method: 'POST', body: file, headers: {'Content-Type': 'application/octet-stream'},
  });
  if (answer.ok) return answer;
  const found = await answer.json().catch(() => ({}));
  throw new Error(found.error || 'The server answered ' + answer.status + '.');
}

async function classify(file) {
  const mine = ++turn;
  find('error').textContent = '';
  find('result').hidden = true;
  find('seen').hidden = true;
  if (file.size > limit) {
    find('status').textContent = '';
    find('error').textContent = 'The file has ' + (file.size / 1048576).toFixed(1) + ' MB; the limit is ' +
      (limit / 1048576).toFixed(0) + ' MB.';
    return;
  }
  find('status').textContent = 'Looking…';
  try {
    const found = await (await ask('/predict', file)).json();
    if (mine !== turn) return;
    const best = found.predictions[0];
    show(find('given'), URL.createObjectURL(file));
    bars(found.predictions);
    find('result').hidden = false;
    find('status').textContent = best.class + ', ' + (100 * best.probability).toFixed(1) + '%';
    const picture = await (await ask('/explain', file)).blob();
    if (mine !== turn) return;
    show(find('overlay'), URL.createObjectURL(picture), 'Heat map: where ' + best.class + ' is seen');
    find('seen').hidden = false;
  } catch (problem) {
    if (mine !== turn) return;
    if (find('result').hidden) find('status').textContent = '';
    find('error').textContent = problem instanceof TypeError ? 'The server cannot be reached.' : problem.message;
  }
}

const drop = find('drop');
find('file').addEventListener('change', (event) => {
  if (event.target.files.length) classify(event.target.files[0]);
  event.target.value = '';
});
for (const name of ['dragenter', 'dragover']) {
  document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.add('over'); });
}
for (const name of ['dragleave', 'drop']) {
  document.addEventListener(name, (event) => { event.preventDefault(); drop.classList.remove('over'); });
}
const take = (files) => { if (files && files.length) classify(files[0]); };
document.addEventListener('drop', (event) => take(event.dataTransfer.files));
document.addEventListener('paste', (event) => take(event.clipboardData.files));
