// The page: takes the events of /live (docs/live.md) and shows them, at most once for each update.

import { Chat } from "./chat.js";
import { colour, drawLines, drawStrip, ExpertMap, PLACES, rampColours, shareOf } from "./draw.js";
import { ask, events } from "./server.js";

const $ = (id) => document.getElementById(id);
const EVERY_S = 0.5, STRIP = 120, CHART = 240; // updates
const COLOURS = { gpu: "gpu", link: "arriving", cpu: "ram" };
const NAMES = { gpu: "GPU", link: "Link", cpu: "CPU", ram: "RAM" };
const WHERE = { disk: "on the disk", ram: "in RAM", gpu: "on the GPU", arriving: "on its way to the GPU" };
const history = { gpu: [], link: [], cpu: [], prompt: [], answer: [], hits: [] };
let map = null, model = null, hovered = null, drawing = false;

function element(tag, values = {}, ...children) {
  const made = Object.assign(document.createElement(tag), values);
  made.append(...children);
  return made;
}

function bytes(value) {
  const units = ["B", "KiB", "MiB", "GiB", "TiB"];
  let at = 0;
  for (; value >= 1024 && at < units.length - 1; at++) value /= 1024;
  return `${at === 0 || value >= 100 ? value.toFixed(0) : value.toFixed(1)} ${units[at]}`;
}

const percent = (share) => `${(share * 100).toFixed(share < 0.0995 ? 1 : 0)} %`;

const rateOf = (gbps) => (gbps >= 0.1 ? `${gbps.toFixed(1)} GB/s` : `${(gbps * 1000).toFixed(0)} MB/s`);

// The state of the server and of the connection to it.

const SAID = { ready: "Ready", loading: "Loading", failed: "Failed", closing: "Closing", gone: "Not reached" };

function showState({ state, what, share, error, model: name }) {
  $("state").dataset.state = state;
  $("state").textContent = SAID[state] ?? state;
  if (name) {
    $("model").textContent = name;
    document.title = `${name} · Moestro`;
  }
  $("loading").hidden = state === "ready";
  $("loading-share").hidden = state !== "loading";
  if (state === "loading") {
    $("loading-text").textContent = `The model is being loaded: ${what}${share === null ? "" : `, ${percent(share)}`}`;
    if (share === null) $("loading-share").removeAttribute("value");
    else $("loading-share").value = share;
  } else {
    const lines = {
      failed: `The server has failed: ${error}`,
      closing: "The server is being closed. Running answers are finished; this page tries again until it is back.",
      gone: "The server cannot be reached, or has ended. This page tries again every few seconds.",
    };
    $("loading-text").textContent = lines[state] ?? "";
  }
}

// What does not change.

function showModel(value) {
  model = value;
  const { layers, experts, top_k: chosen } = value.shape;
  const sizes = [...new Set(experts)].sort((a, b) => a - b);
  $("map-shape").textContent =
    `${layers} layers × ${sizes.join(" or ")} experts${chosen ? `, ${chosen} chosen for each token` : ""}`;
  map = new ExpertMap($("map"), experts);
  hovered = null;
  $("uncounted").hidden = !value.uncounted.length;
  $("uncounted").textContent =
    `Of ${value.uncounted.length} layers all experts are on the GPU for good, so that nothing passes the host and ` +
    "their choices are not counted.";
  showPlan(value);
  showMemory(value);
  showLanes(value);
  $("no-hits").hidden = value.lanes.link.is_there;
  $("hits").hidden = !value.lanes.link.is_there;
  for (const list of Object.values(history)) list.length = 0;
}

function showPlan({ plan, machine, formats, policy, family }) {
  $("plan").replaceChildren(...plan.map((line) => element("p", { textContent: line })));
  const facts = {
    CPU: `${machine.cpu}, ${machine.threads} threads`,
    GPU: machine.gpu ?? "none",
    RAM: bytes(machine.ram_bytes),
    Kernels: machine.kernels,
    Experts: formats.join(", "),
    Family: family,
    Policy: policy,
  };
  $("machine").replaceChildren(
    ...Object.entries(facts).flatMap(([name, text]) => [
      element("dt", { textContent: name }), element("dd", { textContent: text }),
    ]),
  );
}

function showMemory({ memory }) {
  $("memory").replaceChildren(
    ...memory.map(({ tier, limit_bytes: limit, parts }) => {
      const used = parts.reduce((sum, part) => sum + part.bytes, 0), whole = Math.max(limit ?? used, used, 1);
      const said = limit === null ? bytes(used) : `${bytes(used)} of ${bytes(limit)}`;
      const bar = element("div", { className: "bar", role: "img", ariaLabel: `${NAMES[tier]}: ${said}` });
      const list = element("ul");
      parts.forEach((part, i) => {
        const piece = element("i", { className: `part${i}` });
        piece.style.width = `${(part.bytes / whole) * 100}%`;
        bar.append(piece);
        list.append(element("li", {}, element("i", { className: `part${i}` }), `${part.name} ${bytes(part.bytes)}`));
      });
      const head = element("h3", {}, NAMES[tier], element("span", { textContent: said }));
      return element("div", { className: "tier" }, head, bar, list);
    }),
    element("p", { className: "muted", id: "process" }),
  );
}

function showLanes({ lanes }) {
  $("lanes").replaceChildren(
    ...["gpu", "link", "cpu"].map((name) => {
      const { is_there: isThere, what } = lanes[name];
      const head = element("div", {}, element("p", {}, element("b", { textContent: NAMES[name] })));
      if (!isThere) {
        return element("div", { className: "lane" }, head, element("p", { className: "absent", textContent: what }));
      }
      const said = { gpu: "experts on it", link: "", cpu: lanes.link.is_there ? "experts in RAM" : "all of a step" }[name];
      head.append(element("p", { className: "muted", id: `said-${name}`, textContent: said }));
      const strip = element("canvas", { id: `lane-${name}`, role: "img", ariaLabel: `${NAMES[name]}: ${what}`, title: what });
      return element("div", { className: "lane" }, head, strip, element("p", { className: "share", id: `share-${name}` }));
    }),
  );
}

// What changes.

function showNow(now) {
  for (const name of ["gpu", "link", "cpu"]) push(history[name], now.lanes[name]);
  push(history.prompt, now.tok_s.prompt);
  push(history.answer, now.tok_s.answer);
  push(history.hits, now.hit_rate);
  const rate = (value) => (value === 0 ? "0" : value >= 100 ? value.toFixed(0) : value.toFixed(1));
  $("answer-rate").textContent = rate(now.tok_s.answer);
  $("prompt-rate").textContent = rate(now.tok_s.prompt);
  if (now.hit_rate !== null) $("hit-rate").textContent = (now.hit_rate * 100).toFixed(0);
  $("running").textContent = now.running;
  $("running-of").textContent = `of ${model.max_requests}`;
  $("waiting").textContent = now.waiting;
  $("waiting-of").textContent = `of ${model.queue}`;
  [$("prefix").textContent, $("prefix-unit").textContent] = bytes(now.prefix_bytes).split(" ");
  $("process").textContent =
    `The process holds ${bytes(now.process_bytes)} of RAM, ${bytes(now.prefix_bytes)} of it for ${now.prefixes} kept ` +
    `prefix${now.prefixes === 1 ? "" : "es"}.`;
  for (const name of ["gpu", "link", "cpu"]) {
    const share = $(`share-${name}`);
    if (share && now.lanes[name] !== null) share.textContent = `${Math.round(now.lanes[name] * 100)} %`;
  }
  if ($("said-link")) $("said-link").textContent = rateOf(now.link_gbps);
  showPlaces(now.places);
  draw();
}

function push(list, value) {
  list.push(value);
  if (list.length > CHART) list.shift();
}

function showPlaces(places) {
  const shown = ["gpu", "ram", "disk", ...(model.lanes.link.is_there ? ["arriving"] : [])];
  const names = { gpu: "GPU", ram: "RAM", disk: "disk", arriving: "arriving" };
  if ($("places").childElementCount !== shown.length) {
    $("places").replaceChildren(
      ...shown.map((name) => {
        const swatch = element("i");
        swatch.dataset.place = name;
        return element("li", {}, swatch, element("span", { textContent: names[name] }), element("b", { id: `at-${name}` }));
      }),
    );
    recolour();
  }
  for (const name of shown) $(`at-${name}`).textContent = places[name];
}

// Drawing, once for whatever came since the last frame.

function draw() {
  if (drawing) return;
  drawing = true;
  requestAnimationFrame(() => {
    drawing = false;
    const begun = performance.now();
    if (map) drawMap();
    for (const name of ["gpu", "link", "cpu"]) {
      if ($(`lane-${name}`)) drawStrip($(`lane-${name}`), history[name], STRIP, COLOURS[name]);
    }
    const series = [{ name: "ram", values: history.prompt }, { name: "gpu", values: history.answer }];
    drawLines($("speed"), series, { room: CHART, everyS: EVERY_S, unit: "tok/s" });
    if (!$("hits").hidden) {
      const values = history.hits.map((share) => (share === null ? null : share * 100));
      drawLines($("hits"), [{ name: "gpu", values }], { room: CHART, everyS: EVERY_S, unit: "%", top: 100 });
    }
    note("draw", begun);
  });
}

function drawMap() {
  map.cursor = hovered;
  map.draw($("map-scroll").clientWidth - 4);
  if (hovered) showTip();
}

// Notes how long something took, for what observes the page's performance.
function note(name, begun) {
  performance.measure(`moestro-${name}`, { start: begun, end: performance.now() });
  performance.clearMeasures(`moestro-${name}`);
}

// The cursor of the map.

function lines([layer, expert]) {
  const cell = map.cell(layer, expert), share = shareOf(cell), even = share * map.experts[layer];
  const heat = model.uncounted.includes(layer)
    ? "its layer's choices are not counted"
    : share === 0
      ? "not chosen lately"
      : `about ${percent(share)} of its layer's choices, ${even.toFixed(even < 1 ? 2 : even < 10 ? 1 : 0)} × an even share`;
  return [`Layer ${layer}, expert ${expert}`, `${WHERE[PLACES[cell >> 6]]}; ${heat}`];
}

function showTip() {
  const tip = $("tip"), [head, text] = lines(hovered), [x, y, w, h] = map.boxOf(...hovered);
  tip.replaceChildren(element("b", { textContent: head }), text);
  tip.hidden = false;
  const scroll = $("map-scroll"), card = scroll.parentElement;
  const left = scroll.offsetLeft + 2 + x + w / 2 - scroll.scrollLeft - tip.offsetWidth / 2;
  tip.style.left = `${Math.max(6, Math.min(card.clientWidth - tip.offsetWidth - 6, left))}px`;
  tip.style.top = `${scroll.offsetTop + y + h + 10}px`;
}

function hover(found, says = false) {
  hovered = found;
  if (found === null) $("tip").hidden = true;
  if (says) $("map-said").textContent = found === null ? "" : lines(found).join(": ");
  if (map) drawMap();
}

function moveCursor(event) {
  if (!map || event.ctrlKey || event.metaKey || event.altKey) return;
  if (event.key === "Escape") return hover(null, true);
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  let [layer, expert] = hovered ?? [0, 0];
  const move = moves[event.key];
  if (move && hovered) [layer, expert] = [layer + move[0], expert + move[1]];
  else if (event.key === "Home") expert = 0;
  else if (event.key === "End") expert = map.columns - 1;
  else if (!move) return;
  event.preventDefault();
  layer = Math.max(0, Math.min(map.experts.length - 1, layer));
  expert = Math.max(0, Math.min(map.experts[layer] - 1, expert));
  hover([layer, expert], true);
  const [x, , w] = map.boxOf(layer, expert), scroll = $("map-scroll");
  if (x < scroll.scrollLeft + 30) scroll.scrollLeft = x - 40;
  else if (x + w > scroll.scrollLeft + scroll.clientWidth) scroll.scrollLeft = x + w - scroll.clientWidth + 40;
  showTip();
}

// Colours.

const THEMES = ["auto", "light", "dark"], THEME = "moestro-theme";

function setTheme(theme) {
  const said = { auto: "as the system has them", light: "light", dark: "dark" };
  if (theme === "auto") delete document.documentElement.dataset.theme;
  else document.documentElement.dataset.theme = theme;
  localStorage.setItem(THEME, theme);
  $("theme").textContent = theme[0].toUpperCase() + theme.slice(1);
  $("theme").setAttribute("aria-label", `Colours: ${said[theme]}`);
  recolour();
}

function recolour() {
  $("ramp").style.background = `linear-gradient(to right, ${rampColours().join(", ")})`;
  for (const swatch of document.querySelectorAll("[data-place]")) swatch.style.background = colour(swatch.dataset.place);
  map?.recolour();
  draw();
}

// The stream.

const takes = {
  state: showState,
  model: showModel,
  cells: ({ cells }) => map.cells.set(Uint8Array.from(atob(cells), (letter) => letter.charCodeAt(0))),
  now: showNow,
};

async function follow() {
  for (let waitS = 1; ; waitS = Math.min(8, waitS * 2)) {
    try {
      let ended = "gone";
      for await (const { name, data } of events(await ask("/live"))) {
        const begun = performance.now(), value = JSON.parse(data);
        takes[name]?.(value);
        if (name === "state") ended = value.state === "ready" || value.state === "loading" ? "gone" : null;
        note("update", begun);
        waitS = 1;
      }
      if (ended) showState({ state: ended });
    } catch (error) {
      showState({ state: "gone" });
      if (error.constructor.name !== "Unreachable") $("loading-text").textContent = error.message;
    }
    await new Promise((done) => setTimeout(done, waitS * 1000));
  }
}

$("theme").addEventListener("click", () => {
  setTheme(THEMES[(THEMES.indexOf(localStorage.getItem(THEME) ?? "auto") + 1) % THEMES.length]);
});
matchMedia("(prefers-color-scheme: dark)").addEventListener("change", recolour);
new ResizeObserver(draw).observe($("map-scroll"));
$("map").addEventListener("pointermove", (event) => {
  if (map?.at) hover(map.find(event.offsetX, event.offsetY));
});
$("map").addEventListener("pointerleave", () => hover(null));
$("map").addEventListener("keydown", moveCursor);
$("map").addEventListener("focus", () => {
  if (map && !hovered && $("map").matches(":focus-visible")) hover([0, 0], true);
});
$("map").addEventListener("blur", () => hover(null));
setTheme(THEMES.includes(localStorage.getItem(THEME)) ? localStorage.getItem(THEME) : "auto");
new Chat();
follow();
