// Maps over pictures: brings to life what `looks_html` wrote. No library, no network.
(() => {
'use strict';
const TOP = 127;                                   // levels are integers from -TOP to TOP; 0 is neutral
const bytes = text => Uint8Array.from(atob(text), c => c.charCodeAt(0));
const clamp = (v, low, high) => Math.min(Math.max(v, low), high);

function make(name, attributes = {}, ...inside) {
  const element = document.createElement(name);
  for (const [key, value] of Object.entries(attributes)) {
    if (key.startsWith('on')) element.addEventListener(key.slice(2), value);
    else if (value !== false) element.setAttribute(key, value === true ? '' : value);
  }
  element.append(...inside);
  return element;
}

// Where the pixels of a longer line lie between the cells of a short one: four cells and their weights (Catmull-Rom).
function taps(cells, pixels) {
  return Array.from({length: pixels}, (_, i) => {
    const at = (i + .5) * cells / pixels - .5, first = Math.floor(at), t = at - first;
    const weights = [((2 - t) * t - 1) * t / 2, ((3 * t - 5) * t * t + 2) / 2, ((4 - 3 * t) * t + 1) * t / 2,
                     (t - 1) * t * t / 2];
    return weights.map((weight, k) => [clamp(first - 1 + k, 0, cells - 1), weight]);
  });
}

function enlarge(levels, h, w, times) {
  const across = taps(w, w * times), down = taps(h, h * times), W = w * times, H = h * times;
  const wide = new Float32Array(h * W), out = new Float32Array(H * W);
  for (let y = 0; y < h; y++) across.forEach((tap, x) => {
    for (const [cell, weight] of tap) wide[y * W + x] += weight * levels[y * w + cell];
  });
  down.forEach((tap, y) => {
    for (const [cell, weight] of tap) for (let x = 0; x < W; x++) out[y * W + x] += weight * wide[cell * W + x];
  });
  return out.map(v => clamp(v, -TOP, TOP));
}

// Each map from its own lowest to its own highest level; one that is the same everywhere stays neutral.
function stretched(levels) {
  const low = Math.min(...levels), span = Math.max(...levels) - low;
  return Float32Array.from(levels, v => span > 1 ? (2 * (v - low) / span - 1) * TOP : 0);
}

function paint(canvas, levels, h, w, table) {
  canvas.width = w;
  canvas.height = h;
  const image = new ImageData(w, h);
  levels.forEach((level, i) => {
    const row = 4 * (Math.round(level) + TOP);
    image.data.set(table.subarray(row, row + 4), 4 * i);
  });
  canvas.getContext('2d').putImageData(image, 0, 0);
}

function amount(scale, level) {
  const end = Math.abs(level) >= TOP - .5, signed = scale.log ? scale.high ** (level / TOP) : scale.high * level / TOP;
  const size = Math.abs(signed), digits = size >= 100 ? 0 : size >= 9.95 ? 1 : size >= .995 ? 1 : 2;
  const text = (scale.log ? '' : signed < 0 ? '−' : '+') + size.toFixed(digits);
  return text + scale.here + (end ? level > 0 ? ' or more' : ' or less' : '');
}

// One run on one picture: its canvas, its maps, which of them is chosen and which is shown.
class View {
  constructor(page, column, run, card, source) {
    Object.assign(this, {page, column, card, run, dirty: true, seen: false, shown: 0});
    this.stage = column.querySelector('.stage');
    if (!this.stage.querySelector('img')) this.stage.prepend(source.cloneNode());
    const data = page.data.runs[run], index = Number(card.dataset.index);
    this.parts = data.parts;                       // of a run: {unit, h, w, n}, one after the other in `levels`
    this.levels = new Int8Array(bytes(data.levels[index]).buffer);
    const [left, top, right, bottom] = data.crops[index];
    this.canvas = make('canvas', {'aria-hidden': 'true'});
    this.saw = make('span', {class: left > .002 || top > .002 || right < .998 || bottom < .998 ? 'saw part' : 'saw',
      style: `left:${100 * left}%;top:${100 * top}%;width:${100 * (right - left)}%;height:${100 * (bottom - top)}%`},
      this.canvas);
    this.stage.append(this.saw);
    this.picks = [...column.querySelectorAll('.pick')];
    this.pinned = this.shown = Number(this.picks[0]?.dataset.map ?? 0);
    for (const pick of this.picks) {
      const i = Number(pick.dataset.map), show = () => this.show(i), back = () => this.show(this.pinned);
      for (const [name, does] of Object.entries({pointerenter: show, focus: show, pointerleave: back, blur: back}))
        pick.addEventListener(name, does);
      pick.addEventListener('click', () => this.pin(i));
    }
    this.mark();
    this.stage.addEventListener('pointermove', e => this.read(e));
    this.stage.addEventListener('pointerdown', e => this.read(e));
    this.stage.addEventListener('pointerleave', e =>   // a finger hides what it points at
      page.timer = setTimeout(() => page.value.hidden = true, e.pointerType === 'touch' ? 1500 : 0));
    this.stage.addEventListener('click', e => page.large.contains(card) || page.open(card));
  }
  map(i = this.shown) {                            // {scale, h, w, levels} of a map
    let start = 0;
    for (const {unit, h, w, n} of this.parts) {
      if (i < n) return {unit, scale: this.page.scales[unit], h, w,
                         levels: this.levels.subarray(start + i * h * w, start + (i + 1) * h * w)};
      start += n * h * w;
      i -= n;
    }
  }
  show(i) { if (i !== this.shown) { this.shown = i; this.changed(); } this.mark(); }
  pin(i) { this.pinned = i; this.show(i); }
  mark() {
    for (const pick of this.picks) {
      pick.setAttribute('aria-pressed', Number(pick.dataset.map) === this.pinned);
      pick.classList.toggle('shown', Number(pick.dataset.map) === this.shown);
    }
    this.page.markScales();
  }
  changed() { this.dirty = true; if (this.seen) this.draw(); }
  draw() {
    if (!this.dirty) return;
    this.dirty = false;
    const {scale, h, w, levels} = this.map(), {smooth, stretch} = this.page.state;
    const times = smooth ? clamp(Math.floor(224 / Math.max(h, w)), 1, 16) : 1;
    const values = stretch ? stretched(levels) : levels;
    this.drawn = {scale, times, w: w * times, h: h * times, levels: times > 1 ? enlarge(levels, h, w, times) : levels};
    paint(this.canvas, times > 1 ? enlarge(values, h, w, times) : values, h * times, w * times, scale.table);
    this.canvas.classList.toggle('cells', times === 1);
  }
  read(event) {                                    // the value under the pointer
    clearTimeout(this.page.timer);
    this.draw();
    const box = this.saw.getBoundingClientRect(), {w, h, levels, scale} = this.drawn, {value} = this.page;
    const x = Math.floor((event.clientX - box.left) / box.width * w);
    const y = Math.floor((event.clientY - box.top) / box.height * h);
    const inside = x >= 0 && y >= 0 && x < w && y < h;
    value.textContent = inside ? amount(scale, levels[y * w + x]) : 'the network did not see this part';
    value.hidden = false;
    (this.page.large.open ? this.page.large : this.page.root).append(value);   // what is modal hides all else
    value.style.left = `${clamp(event.clientX + 14, 4, innerWidth - value.offsetWidth - 4)}px`;
    value.style.top = `${clamp(event.clientY - 34, 4, innerHeight - value.offsetHeight - 4)}px`;
  }
}

const KEYS = [['m', 'maps on or off'], ['+ −', 'maps stronger or weaker'], ['c', 'cells of the map, or smooth'],
  ['w', 'where the head looks, or what speaks for the answer'], ['x', 'stretch each map by itself'],
  ['← →', 'the picture before or after'], ['Enter', 'the picture large; Esc closes it'],
  ['1 … 9', 'one run alone; 0 for all'], ['?', 'this list']];

class Page {
  constructor(root) {
    this.root = root;
    this.data = JSON.parse(root.querySelector('script[type="application/json"]').textContent);
    this.scales = this.data.scales;
    for (const scale of Object.values(this.scales)) scale.table = bytes(scale.table);
    this.many = this.data.runs.length > 1;
    this.state = {on: true, smooth: true, stretch: false, strength: 90, run: -1, sort: 'order', look: true};
    this.value = make('span', {class: 'value', hidden: true});
    this.cards = [...root.querySelectorAll('.card')];
    this.list = root.querySelector('.cards');
    this.makeDialogs();
    this.views = [];
    for (const card of this.cards) {
      const source = card.querySelector('img');
      for (const column of card.querySelectorAll('.column'))
        this.views.push(new View(this, column, Number(column.dataset.run), card, source));
    }
    this.makeBar();
    root.append(this.value, this.large, this.keys);
    const views = new Map(this.views.map(view => [view.stage, view]));
    const near = new IntersectionObserver(entries => entries.forEach(({target, isIntersecting}) => {
      const view = views.get(target);
      view.seen = isIntersecting;
      if (isIntersecting) view.draw();
    }), {rootMargin: '400px'});
    for (const stage of views.keys()) near.observe(stage);
    addEventListener('beforeprint', () => this.views.forEach(view => view.draw()));
    this.run(this.many && matchMedia('(max-width: 40rem)').matches ? 0 : -1);
    this.update();
    this.markScales();
  }
  toggle(text, key, change) {
    return make('button', {type: 'button', 'aria-pressed': 'false', title: `key ${key}`, onclick: change}, text);
  }
  makeBar() {
    const set = (name, value) => { this.state[name] = value; this.update(); };
    this.buttons = {
      on: this.toggle('Map', 'm', () => set('on', !this.state.on)),
      smooth: this.toggle('Smooth', 'c', () => set('smooth', !this.state.smooth)),
      stretch: this.toggle('Stretch each map', 'x', () => set('stretch', !this.state.stretch)),
    };
    this.strength = make('input', {type: 'range', min: 10, max: 100, step: 5, class: 'strength', 'aria-label':
      'Strength of the maps', title: 'keys + and −', oninput: () => set('strength', Number(this.strength.value))});
    const row = make('div', {class: 'row', role: 'toolbar', 'aria-label': 'How the maps are shown'},
      this.buttons.on, make('label', {}, make('span', {class: 'strength-word'}, 'Strength'), this.strength));
    const more = make('div', {class: 'row more'}, this.buttons.smooth, this.buttons.stretch);
    if (this.views.some(v => v.parts.length > 1)) {
      const [look, speak] = [true, false].map(choice => make('button', {type: 'button', title: 'key w',
        onclick: () => this.choose(choice)}, choice ? 'Where it looks' : 'What speaks for the answer'));
      this.buttons.look = look;
      this.buttons.speak = speak;
      more.prepend(make('span', {class: 'group'}, look, speak));
    }
    if (this.many) {
      this.runs = [-1, ...this.data.runs.keys()].map(i => make('button', {type: 'button', title: `key ${i + 1}`,
        onclick: () => this.run(i)}, ...i < 0 ? ['All'] : [i + 1, make('span', {class: 'run-name'},
        this.data.runs[i].name)]));
      row.append(make('span', {class: 'group', role: 'group', 'aria-label': 'Runs'}, ...this.runs));
    }
    const sorts = Object.entries({order: 'as given', error: 'most wrong first', unsure: 'least sure first',
      spread: 'widest map first', name: 'by name'}).filter(([key]) => key === 'order' || this.cards.some(card =>
      key === 'name' ? card.dataset.name : card.querySelector(`[data-${key}]`)));
    const order = make('select', {onchange: () => this.sort(order.value)},
      ...sorts.map(([value, text]) => make('option', {value}, text)));
    this.order = order;
    if (this.cards.length > 1) more.append(make('label', {}, 'Order', order));
    more.append(make('button', {type: 'button', title: 'key ?', onclick: () => this.keys.showModal()}, 'Keys'));
    row.append(make('button', {type: 'button', class: 'more-switch', 'aria-expanded': 'false', onclick: e =>
      e.target.setAttribute('aria-expanded', more.classList.toggle('open'))}, 'More'), more);
    this.bars = Object.fromEntries(Object.entries(this.scales).map(([unit, scale]) => {
      const strip = make('canvas', {role: 'img', 'aria-label': `Colours of ${scale.title}`});
      const ticks = scale.ticks.map(([level, text]) => make('span', {style: `left:${50 + 50 * level}%`}, text));
      paint(strip, Int8Array.from({length: 2 * TOP + 1}, (_, i) => i - TOP), 1, 2 * TOP + 1, scale.table);
      return [unit, make('div', {class: 'scale'}, make('div', {}, scale.title), strip,
                         make('div', {class: 'ticks'}, ...ticks))];
    }));
    this.warn = make('p', {class: 'warn', hidden: true},
      'Each map is stretched by itself, from its lowest to its highest value: colours cannot be compared.');
    this.bar = make('div', {class: 'bar'}, row, make('div', {class: 'scales'}, ...Object.values(this.bars)), this.warn);
    this.list.before(this.bar);
  }
  makeDialogs() {
    const turn = by => () => this.turn(by);
    this.slot = make('div');
    const close = make('button', {type: 'button', onclick: () => this.large.close()}, 'Close');
    this.large = make('dialog', {class: 'large', 'aria-label': 'One picture, large'}, make('div', {class: 'turn'},
      make('button', {type: 'button', onclick: turn(-1), 'aria-label': 'Picture before'}, '←'),
      make('button', {type: 'button', onclick: turn(1), 'aria-label': 'Picture after'}, '→'), close), this.slot);
    this.large.addEventListener('close', () => this.putBack()?.querySelector('.stage').focus());
    this.large.addEventListener('click', e => e.target === this.large && this.large.close());
    const rows = KEYS.filter(([key]) => this.many || !key.startsWith('1'));
    this.keys = make('dialog', {class: 'keys', 'aria-label': 'Keys'}, make('strong', {}, 'Keys'), make('dl', {},
      ...rows.flatMap(([key, does]) => [make('dt', {}, make('kbd', {}, key)), make('dd', {}, does)])),
      make('button', {type: 'button', onclick: () => this.keys.close()}, 'Close'));
  }
  update() {
    const {on, smooth, stretch, strength, look} = this.state, {root, buttons} = this;
    const looks = {on, smooth, stretch, look, speak: !look};
    for (const [name, button] of Object.entries(buttons)) button.setAttribute('aria-pressed', looks[name]);
    root.classList.toggle('off', !on);
    root.classList.toggle('stretched', stretch);
    root.style.setProperty('--strength', strength / 100);
    this.strength.value = strength;
    this.warn.hidden = !stretch;
    if (this.was !== `${smooth}${stretch}`) this.views.forEach(view => view.changed());
    this.was = `${smooth}${stretch}`;
  }
  markScales() {
    if (!this.bars) return;
    const used = new Set(this.views.filter(v => !v.column.hidden).map(v => v.map().unit));
    for (const [unit, bar] of Object.entries(this.bars)) bar.classList.toggle('idle', !used.has(unit));
  }
  choose(look) {
    this.state.look = look;
    for (const view of this.views) if (view.parts.length > 1) view.pin(look ? 0 : view.parts[0].n);
    this.update();
  }
  run(i) {
    if (!this.many || i >= this.data.runs.length) return;
    this.state.run = i;
    for (const view of this.views) view.column.hidden = i >= 0 && view.run !== i;
    this.root.classList.toggle('together', i < 0);
    this.slot.classList.toggle('alone', i >= 0);
    this.runs.forEach((button, k) => button.setAttribute('aria-pressed', k === i + 1));
    this.markScales();
  }
  sort(by) {
    this.state.sort = by;
    const key = card => {
      const columns = [...card.querySelectorAll('.column:not([hidden])')];
      return Math.max(...columns.map(c => Number(c.dataset[by] ?? -Infinity)));
    };
    const compare = by === 'order' ? (a, b) => a.dataset.index - b.dataset.index : by === 'name' ?
      (a, b) => a.dataset.name.localeCompare(b.dataset.name, undefined, {numeric: true}) : (a, b) => key(b) - key(a);
    this.cards.sort(compare);
    this.list.append(...this.cards);
  }
  putBack() {                                      // the card that was large, into its place among the others
    const card = this.slot.firstElementChild;
    if (!card) return null;
    this.place.replaceWith(card);
    this.value.hidden = true;
    return card;
  }
  open(card) {
    this.putBack();
    this.place = make('div', {style: `height:${card.offsetHeight}px`});
    card.replaceWith(this.place);
    this.slot.replaceChildren(card);
    this.slot.classList.toggle('alone', !this.many || this.state.run >= 0);
    if (!this.large.open) this.large.showModal();
    this.views.filter(v => v.card === card).forEach(v => v.draw());
    this.large.scrollTop = 0;
  }
  turn(by) {
    if (this.large.open) {
      const at = this.cards.indexOf(this.slot.firstElementChild) + by;
      if (this.cards[at]) this.open(this.cards[at]);
      return;
    }
    const stages = this.cards.map(card => card.querySelector('.column:not([hidden]) .stage'));
    const here = this.cards.findIndex(card => card.contains(document.activeElement));
    const next = stages[here < 0 ? 0 : clamp(here + by, 0, stages.length - 1)];
    next.focus({preventScroll: true});
    next.scrollIntoView({block: 'center'});
  }
  press(key) {
    const {state} = this, press = {
      m: () => this.buttons.on.click(), c: () => this.buttons.smooth.click(), x: () => this.buttons.stretch.click(),
      w: () => this.buttons.look && this.choose(!state.look), '?': () => this.keys.open || this.keys.showModal(),
      '+': () => state.strength = Math.min(100, state.strength + 10), ArrowLeft: () => this.turn(-1),
      '-': () => state.strength = Math.max(10, state.strength - 10), ArrowRight: () => this.turn(1)};
    press['='] = press['+'];
    press['−'] = press['_'] = press['-'];
    if (/^[0-9]$/.test(key) && this.many) this.run(Number(key) - 1);
    else if (press[key]) press[key]();
    else return false;
    this.update();
    return true;
  }
}

const pages = [...document.querySelectorAll('.looks')].map(root => new Page(root));
addEventListener('keydown', event => {             // to the part of the document that one is in, or that is in view
  if (event.ctrlKey || event.metaKey || event.altKey || event.target.matches?.('input, select, textarea')) return;
  const inView = ({root}) => {
    const box = root.getBoundingClientRect();
    return box.bottom > 0 && box.top < innerHeight;
  };
  const page = pages.find(p => p.root.contains(document.activeElement)) ?? pages.find(inView) ?? pages[0];
  if (page?.press(event.key)) event.preventDefault();
});
})();
