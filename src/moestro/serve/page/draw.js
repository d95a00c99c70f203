// Draws on canvases: the map of experts, strips of lanes, charts of lines. Knows neither the stream nor the page's texts.

export const PLACES = ["disk", "ram", "gpu", "arriving"];
const OCTAVES = 3; // of an even share, up and down, that colours tell apart
const LEVELS = 63, PER_OCTAVE = 5; // as scene.py writes a cell

export function colour(name) {
  return getComputedStyle(document.documentElement).getPropertyValue(`--${name}`).trim();
}

function rgb(text) {
  const hex = text.slice(1);
  return [0, 2, 4].map((at) => parseInt(hex.slice(at, at + 2), 16));
}

const mixed = (a, b, share) => a.map((value, i) => Math.round(value + (b[i] - value) * share));
const css = (parts) => `rgb(${parts.join(" ")})`;

// A canvas whose pixels are the screen's, and its context in CSS pixels.
function sized(canvas, width, height) {
  const ratio = window.devicePixelRatio || 1;
  const [w, h] = [Math.round(width * ratio), Math.round(height * ratio)];
  if (canvas.width !== w || canvas.height !== h) [canvas.width, canvas.height] = [w, h];
  const context = canvas.getContext("2d");
  context.setTransform(ratio, 0, 0, ratio, 0, 0);
  return context;
}

// The share of its layer's choices that a cell's byte stands for.
export const shareOf = (cell) => ((cell & LEVELS) === 0 ? 0 : 2 ** (((cell & LEVELS) - LEVELS) / PER_OCTAVE));

// How warm a share is, 0 to 1: a half where every expert of the layer is chosen alike.
export function warmth(share, experts) {
  return share === 0 ? 0 : Math.min(1, Math.max(0, (Math.log2(share * experts) + OCTAVES) / (2 * OCTAVES)));
}

function cellColour(place, warm, palette) {
  return mixed(palette.card, palette[PLACES[place]], 0.16 + 0.84 * warm);
}

function paletteNow() {
  return Object.fromEntries(["card", ...PLACES].map((name) => [name, rgb(colour(name))]));
}

export function rampColours() {
  const palette = paletteNow();
  return [0, 0.25, 0.5, 0.75, 1].map((warm) => css(cellColour(1, warm, palette)));
}

// Cells of layers x experts, a row for each layer.
export class ExpertMap {
  constructor(canvas, experts) {
    this.canvas = canvas;
    this.experts = experts;
    this.columns = Math.max(...experts);
    this.firsts = experts.map((_, layer) => experts.slice(0, layer).reduce((a, b) => a + b, 0));
    this.cells = new Uint8Array(experts.reduce((a, b) => a + b, 0));
    this.cursor = null; // [layer, expert]
    this.small = document.createElement("canvas");
    [this.small.width, this.small.height] = [this.columns, experts.length];
    this.image = new ImageData(this.columns, experts.length);
    this.recolour();
  }

  recolour() {
    const palette = paletteNow();
    this.tables = new Map();
    for (const experts of new Set(this.experts)) {
      const table = new Uint32Array(256);
      for (let cell = 0; cell < 256; cell++) {
        const [r, g, b] = cellColour(cell >> 6, warmth(shareOf(cell), experts), palette);
        table[cell] = (255 << 24) | (b << 16) | (g << 8) | r;
      }
      this.tables.set(experts, table);
    }
  }

  layout(width) {
    const ratio = window.devicePixelRatio || 1;
    const rows = this.experts.length;
    const left = 30, bottom = 20;
    const wide = Math.max(2, Math.floor(((width - left - 2) / this.columns) * ratio) / ratio);
    const high = Math.min(30, Math.max(4, Math.floor(300 / rows)));
    const gap = Math.min(wide, high) >= 9 ? 2 : Math.min(wide, high) >= 5 ? 1 : 0;
    return { left, bottom, wide, high, gap, width: left + wide * this.columns, height: high * rows + bottom };
  }

  draw(width) {
    const at = (this.at = this.layout(width));
    this.canvas.style.width = `${at.width}px`;
    this.canvas.style.height = `${at.height}px`;
    const context = sized(this.canvas, at.width, at.height);
    context.clearRect(0, 0, at.width, at.height);
    const pixels = new Uint32Array(this.image.data.buffer);
    for (let layer = 0; layer < this.experts.length; layer++) {
      const count = this.experts[layer], table = this.tables.get(count);
      const from = this.firsts[layer], to = layer * this.columns;
      for (let expert = 0; expert < count; expert++) pixels[to + expert] = table[this.cells[from + expert]];
    }
    this.small.getContext("2d").putImageData(this.image, 0, 0);
    context.imageSmoothingEnabled = false;
    context.drawImage(this.small, at.left, 0, at.wide * this.columns, at.high * this.experts.length);
    this.#drawGaps(context, at);
    this.#drawNumbers(context, at);
    if (this.cursor) this.#drawCursor(context, at);
  }

  #drawGaps(context, at) {
    if (!at.gap) return;
    context.fillStyle = colour("card");
    const height = at.high * this.experts.length;
    for (let i = 1; i <= this.columns; i++) context.fillRect(at.left + i * at.wide - at.gap, 0, at.gap, height);
    for (let i = 1; i <= this.experts.length; i++) {
      context.fillRect(at.left, i * at.high - at.gap, at.width, at.gap);
    }
  }

  #drawNumbers(context, at) {
    context.fillStyle = colour("muted");
    context.font = "11px system-ui, sans-serif";
    context.textBaseline = "middle";
    context.textAlign = "right";
    const everyRow = niceStep(14 / at.high), everyColumn = niceStep(28 / at.wide);
    for (let i = 0; i < this.experts.length; i += everyRow) {
      context.fillText(String(i), at.left - 7, i * at.high + (at.high - at.gap) / 2);
    }
    context.textAlign = "center";
    const under = at.high * this.experts.length + 10;
    for (let i = 0; i < this.columns; i += everyColumn) {
      context.fillText(String(i), Math.max(at.left + 4, at.left + i * at.wide + (at.wide - at.gap) / 2), under);
    }
  }

  #drawCursor(context, at) {
    const [x, y, w, h] = this.boxOf(...this.cursor);
    context.lineWidth = 2;
    context.strokeStyle = colour("card");
    context.strokeRect(x - 2, y - 2, w + 4, h + 4);
    context.strokeStyle = colour("ink");
    context.strokeRect(x - 0.5, y - 0.5, w + 1, h + 1);
  }

  boxOf(layer, expert) {
    const { left, wide, high, gap } = this.at;
    return [left + expert * wide, layer * high, wide - gap, high - gap];
  }

  // Which expert is at a point of the canvas; null beside them.
  find(x, y) {
    const layer = Math.floor(y / this.at.high), expert = Math.floor((x - this.at.left) / this.at.wide);
    return layer >= 0 && expert >= 0 && expert < (this.experts[layer] ?? 0) ? [layer, expert] : null;
  }

  cell(layer, expert) {
    return this.cells[this.firsts[layer] + expert];
  }
}

function niceStep(least) {
  return [1, 2, 4, 5, 8, 10, 16, 20, 32, 50, 64, 100, 128, 200].find((step) => step >= least) ?? 256;
}

// A strip of shares, 0 to 1, the latest at the right.
export function drawStrip(canvas, values, room, name) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const context = sized(canvas, width, height), step = width / (room - 1);
  context.clearRect(0, 0, width, height);
  const known = values.slice(-room);
  const x = (i) => width - (known.length - 1 - i) * step;
  context.beginPath();
  context.moveTo(x(0), height);
  known.forEach((value, i) => context.lineTo(x(i), height - 1 - (value ?? 0) * (height - 3)));
  context.lineTo(width, height);
  context.fillStyle = `${colour(name)}33`;
  context.fill();
  context.beginPath();
  known.forEach((value, i) => context.lineTo(x(i), height - 1 - (value ?? 0) * (height - 3)));
  context.strokeStyle = colour(name);
  context.lineWidth = 1.5;
  context.stroke();
}

// Lines over time: series of {name, values} with a value, or null for none, each half second.
export function drawLines(canvas, series, { room, everyS, unit, top: fixed }) {
  const { clientWidth: width, clientHeight: height } = canvas;
  const context = sized(canvas, width, height);
  context.clearRect(0, 0, width, height);
  const most = Math.max(1, ...series.flatMap((one) => one.values.map((value) => value ?? 0)));
  const top = fixed ?? niceTop(most);
  const left = 44, right = 6, upper = 18, lower = 20;
  const wide = width - left - right, high = height - upper - lower;
  context.font = "11px system-ui, sans-serif";
  context.textBaseline = "middle";
  context.textAlign = "right";
  for (const share of [0, 0.5, 1]) {
    const y = Math.round(upper + high * (1 - share)) + 0.5;
    context.strokeStyle = colour("line");
    context.lineWidth = 1;
    context.beginPath();
    context.moveTo(left, y);
    context.lineTo(width - right, y);
    context.stroke();
    context.fillStyle = colour("muted");
    context.fillText(short(top * share), left - 7, y);
  }
  context.textAlign = "left";
  context.fillText(unit, 0, 7);
  const seconds = Math.round(room * everyS);
  for (const share of [0, 0.5, 1]) {
    context.textAlign = share === 0 ? "left" : share === 1 ? "right" : "center";
    const said = share === 1 ? "now" : `${Math.round(seconds * (1 - share))} s ago`;
    context.fillText(said, left + wide * share, height - 8);
  }
  for (const { name, values } of series) {
    context.strokeStyle = colour(name);
    context.lineWidth = 1.8;
    context.lineJoin = "round";
    context.beginPath();
    const known = values.slice(-room);
    let isDown = false;
    known.forEach((value, i) => {
      if (value === null) return (isDown = false);
      const x = left + wide * (1 - (known.length - 1 - i) / (room - 1)), y = upper + high * (1 - Math.min(1, value / top));
      isDown ? context.lineTo(x, y) : context.moveTo(x, y);
      isDown = true;
    });
    context.stroke();
  }
}

function niceTop(value) {
  const power = 10 ** Math.floor(Math.log10(value));
  return [1, 2, 4, 5, 8, 10].find((step) => step * power >= value) * power;
}

export function short(value) {
  if (value >= 1000) return `${(value / 1000).toFixed(value >= 10000 ? 0 : 1)}k`;
  return value >= 100 || Number.isInteger(value) ? value.toFixed(0) : value.toPrecision(2).replace(/\.0$/, "");
}
