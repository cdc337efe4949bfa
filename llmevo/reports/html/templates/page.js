"use strict";
let data = JSON.parse(document.getElementById("data").textContent);

/* Texts that others wrote only ever become text nodes. */
function make(tag, attributes = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

async function unpacked(id) {
  const packed = document.getElementById(id).textContent;
  const bytes = Uint8Array.from(atob(packed), (letter) => letter.charCodeAt(0));
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("gzip"));
  return new Response(stream).text();
}

let opened;
const details = () => (opened ??= unpacked("details").then(JSON.parse));

/* Light and dark: as the system has it, until the button says otherwise. */
const root = document.documentElement;
const system = matchMedia("(prefers-color-scheme: dark)");
const dark = () => (root.dataset.theme ? root.dataset.theme === "dark" : system.matches);
const kept = { get: () => { try { return localStorage.getItem("llmevo-theme"); } catch { return null; } },
  set: (value) => { try { localStorage.setItem("llmevo-theme", value); } catch { /* a page from a file may not keep it */ } } };
if (["light", "dark"].includes(kept.get())) root.dataset.theme = kept.get();
document.getElementById("theme").addEventListener("click", () => {
  root.dataset.theme = dark() ? "light" : "dark";
  kept.set(root.dataset.theme);
  draw();
});
system.addEventListener("change", () => draw());

/* Pictures. The middle of the red and blue scale is nearly the paper. */
const SCALES = {
  sequential: { light: [[0, "#f3f7fb"], [0.5, "#7db4d8"], [1, "#0b4a7d"]], dark: [[0, "#1c2630"], [0.5, "#2f74a8"], [1, "#a8dcff"]] },
  diverging: { light: [[0, "#b2452c"], [0.25, "#e3a78f"], [0.5, "#f7f7f7"], [0.75, "#8fbcdc"], [1, "#1766a6"]],
    dark: [[0, "#f0876a"], [0.25, "#8a4534"], [0.5, "#22272d"], [0.75, "#2d6591"], [1, "#7cc4f5"]] },
};

function themed(figure, width) {
  const style = getComputedStyle(document.body), colour = (name) => style.getPropertyValue(name).trim();
  const narrow = width < 560;
  const axis = { gridcolor: colour("--line"), zerolinecolor: colour("--line"), linecolor: colour("--line"), automargin: true,
    title: { standoff: 8 }, ticks: "" };
  const traces = figure.data.map((trace) => {
    if (trace.type === "heatmap") {
      const room = (width - 7.5 * figure.layout.meta.label - (narrow ? 20 : 110)) / figure.layout.meta.columns;
      const wide = Math.max(...trace.text.flat().map((text) => text.length));
      return { ...trace, colorscale: SCALES[trace.meta][dark() ? "dark" : "light"], showscale: !narrow,
        texttemplate: room < 6.4 * wide + 3 ? "" : trace.texttemplate, textfont: { size: room < 7.5 * wide + 4 ? 10 : 12 } };
    }
    if (trace.meta === "ink") return { ...trace, line: { ...trace.line, color: colour("--ink") } };
    return trace;
  });
  const layout = { height: 340, margin: { l: 8, r: 8, t: 12, b: 8 }, uirevision: "kept", ...figure.layout,
    legend: { orientation: "h", x: 0, xanchor: "left", y: 1.02, yanchor: "bottom", font: { size: 13 } },
    template: { layout: { paper_bgcolor: colour("--paper"), plot_bgcolor: colour("--paper"), xaxis: axis, yaxis: axis,
      font: { color: colour("--ink"), size: 13, family: style.fontFamily },
      hoverlabel: { bgcolor: colour("--soft"), bordercolor: colour("--line"), font: { color: colour("--ink") }, align: "left" } } } };
  return [traces, layout];
}

let plotly;
const plots = () => (root.dataset.root ? fetch(`${root.dataset.root}plotly.js`).then((answer) => answer.text()) : unpacked("plotly"));
async function draw() {
  const figures = Object.entries(data.figures ?? {});
  if (figures.length) await (plotly ??= plots().then((text) => { document.head.append(make("script", {}, text)); }));
  for (const [name, figure] of figures) {
    const place = document.getElementById(`plot-${name}`), as = JSON.stringify([figure, dark()]);
    if (!place || place.drawnAs === as) continue;
    place.drawnAs = as;
    const [traces, layout] = themed(figure, place.clientWidth);
    await Plotly.react(place, traces, layout, { responsive: true, displaylogo: false, displayModeBar: false });
  }
  document.getElementById("js-plotly-tester")?.setAttribute("aria-hidden", "true"); /* Plotly's own, without a text */
  reach();
  root.dataset.drawn = dark() ? "dark" : "light";
}

/* What scrolls can be reached by keyboard, and scrolled by its arrows. */
function reach() {
  for (const place of document.querySelectorAll(".wide, .table, pre")) {
    const scrolls = place.scrollWidth > place.clientWidth + 1 || place.scrollHeight > place.clientHeight + 1;
    if (scrolls) place.tabIndex = 0;
    else place.removeAttribute("tabindex");
  }
}
new ResizeObserver(reach).observe(document.body);

/* Tables: sorted by a click, filtered by a word, a hundred rows at a time. */
const CHUNK = 100;

/* Give an element these children, moving only those that are elsewhere: the others keep their focus. */
function setChildren(parent, nodes) {
  let at = parent.firstChild;
  for (const node of nodes) {
    if (node === at) at = at.nextSibling;
    else parent.insertBefore(node, at);
  }
  while (at) { const next = at.nextSibling; at.remove(); at = next; }
}

/* Returns a function that takes other rows; `key` names a row that may change. */
function table(place, columns, rows, { expand, mark, sort, key, named } = {}) {
  const state = { sort: sort ?? [0, 1], shown: [], count: CHUNK };
  const body = make("tbody"), head = make("tr"), count_ = make("span", { class: "quiet", role: "status" });
  const search = make("input", { type: "search", placeholder: "filter", "aria-label": "filter rows" });
  const more = make("button", { type: "button" }, "show more");
  columns.forEach((column, number) => {
    const button = make("button", { type: "button" }, column.name);
    button.addEventListener("click", () => {
      const again = state.sort[0] === number;
      state.sort = [number, again ? -state.sort[1] : column.text ? 1 : column.first ?? -1];
      arrange();
    });
    head.append(make("th", { scope: "col", class: column.text ? "left" : "" }, button));
  });
  const order = (a, b) => {
    const [number, way] = state.sort, [one, other] = [a[number], b[number]];
    if (one === null || other === null) return (one === null) - (other === null);
    return way * (typeof one === "string" ? one.localeCompare(other) : one - other);
  };
  let cells = [];
  const lines = new Map(); /* of each row: its element, and what was opened below it */
  function take(fresh) {
    rows = fresh;
    cells = rows.map((row) => {
      const values = columns.map((column) => column.of(row));
      return { row, values, words: values.filter((value) => typeof value === "string").join(" ").toLowerCase() };
    });
    arrange(state.count);
  }
  function arrange(count = CHUNK) {
    const word = search.value.trim().toLowerCase();
    state.shown = cells.filter(({ words }) => words.includes(word)).sort((a, b) => order(a.values, b.values));
    [...head.children].forEach((cell, number) => {
      if (number === state.sort[0]) cell.setAttribute("aria-sort", state.sort[1] > 0 ? "ascending" : "descending");
      else cell.removeAttribute("aria-sort");
      cell.firstChild.textContent = columns[number].name + (number === state.sort[0] ? (state.sort[1] > 0 ? " ▲" : " ▼") : "");
    });
    show(Math.max(count, CHUNK));
  }
  const grow = () => show(state.count + CHUNK);
  function show(count) {
    state.count = Math.min(count, Math.max(state.shown.length, CHUNK));
    setChildren(body, state.shown.slice(0, state.count).flatMap((entry) => line(entry)));
    const to = Math.min(state.count, state.shown.length);
    more.hidden = to >= state.shown.length;
    count_.textContent = `${to} of ${state.shown.length}${state.shown.length < rows.length ? ` (of ${rows.length})` : ""} rows`;
  }
  function line(entry) {
    const name = key ? key(entry.row) : entry.row, as = JSON.stringify(entry.row);
    const known = lines.get(name) ?? { tr: make("tr"), below: null };
    if (known.as !== as) fill(known, entry);
    known.as = as;
    lines.set(name, known);
    return known.below ? [known.tr, known.below] : [known.tr];
  }
  function fill(known, { row, values }) {
    const { tr } = known, button = tr.querySelector(".open") ?? make("button", { type: "button", class: "open", "aria-expanded": "false" }, "▸");
    known.row = row;
    tr.className = `row ${mark?.(row) ?? ""}`;
    columns.forEach((column, number) => {
      const value = values[number];
      const shown = value === null ? "" : column.text ? value : column.show ? column.show(value, row) : String(value);
      const cell = tr.children[number] ?? tr.appendChild(number === 0 && expand ? make("th", { scope: "row" }) : make("td", { class: column.text ? "text" : "" }));
      setChildren(cell, [...(expand && number === 0 ? [button] : []), document.createTextNode(shown)]);
    });
    if (!expand) return;
    button.setAttribute("aria-label", `open ${tr.firstChild.lastChild.textContent}${row.best ? ", the best" : ""}`);
    if (known.opens) return;
    known.opens = true;
    tr.addEventListener("click", async () => {
      if (known.below) { known.below.remove(); known.below = null; button.firstChild.nodeValue = "▸"; }
      else {
        const inside = make("div", { class: "inside" });
        known.below = make("tr", { class: "opened" }, make("td", { colspan: columns.length }, inside));
        tr.after(known.below);
        button.firstChild.nodeValue = "▾";
        inside.append(...(await expand(known.row)));
      }
      button.setAttribute("aria-expanded", String(Boolean(known.below)));
    });
  }
  search.addEventListener("input", () => arrange());
  more.addEventListener("click", grow);
  new IntersectionObserver(([seen]) => { if (seen.isIntersecting && !more.hidden) grow(); }, { rootMargin: "400px" }).observe(more);
  place.append(make("div", { class: "tools" }, search, count_), make("table", named ? { "aria-labelledby": named } : {}, make("thead", {}, head), body), more);
  take(rows);
  return take;
}

const three = (value) => (Math.abs(value) < 100 ? value.toFixed(3) : value.toPrecision(4));

function code(text) {
  return make("div", { class: "code" }, make("button", { type: "button", class: "copy" }, "copy"), make("pre", {}, text));
}

document.addEventListener("click", async ({ target }) => {
  if (!target.classList?.contains("copy")) return;
  const pre = target.nextElementSibling;
  try { await navigator.clipboard.writeText(pre.textContent); }
  catch { getSelection().selectAllChildren(pre); document.execCommand("copy"); }
  target.textContent = "copied";
  setTimeout(() => { target.textContent = "copy"; }, 1500);
});

/* mergekit's YAML. What could be anything but a plain word is quoted as in JSON, which YAML reads as well. */
function yaml(value, indent = "") {
  if (Array.isArray(value)) {
    if (value.every((entry) => typeof entry !== "object")) return ` [${value.map((entry) => yaml(entry).trim()).join(", ")}]`;
    return value.map((entry) => `\n${indent}- ${yaml(entry, `${indent}  `).trimStart()}`).join("");
  }
  if (value !== null && typeof value === "object") {
    return Object.entries(value).map(([key, entry]) => `\n${indent}${yaml(key).trim()}:${yaml(entry, `${indent}  `)}`).join("");
  }
  if (typeof value === "string") return ` ${/^[A-Za-z_][\w./+@-]*$/.test(value) && !/^(true|false|yes|no|on|off|null|y|n)$/i.test(value) ? value : JSON.stringify(value)}`;
  return ` ${String(value).replace(/^(-?\d+)e/, "$1.0e")}`;
}

function candidates(place) {
  const some = (of) => data.candidates.some((row) => row[of] !== null && row[of] !== "");
  const columns = [
    { name: "#", of: (row) => row.id, first: 1 },
    { name: "score", of: (row) => row.score, show: (value, row) => `${three(value)} ± ${three(row.stderr)}` },
    ...data.tasks.map((name, number) => ({ name: name.replaceAll("_", "_\u200b"), of: (row) => row.tasks[number], show: three })),
    { name: "from", of: (row) => row.origin, text: true },
    { name: "gen.", of: (row) => row.generation, first: 1 },
    ...(some("predicted") ? [{ name: "predicted", of: (row) => row.predicted, show: three }] : []),
    { name: "seconds", of: (row) => row.seconds },
    { name: "note", of: (row) => (row.reason ? `failed: ${row.reason}` : row.note), text: true },
  ];
  return table(place, columns, data.candidates, {
    named: "candidates-title", sort: [1, -1],
    key: (row) => row.id,
    mark: (row) => (row.best ? "best" : row.reason ? "failed" : ""),
    expand: async (row) => {
      const parts = [];
      if (row.note) parts.push(make("p", {}, row.note));
      if (row.reason) parts.push(make("p", { class: "failed" }, row.reason));
      return [...parts, code(yaml((await details()).recipes[row.id]).trim())];
    },
  });
}

function effects(place) {
  const word = (name, at) => ({ name, of: (row) => row[at], text: true });
  const number = (name, at, show) => ({ name, of: (row) => row[at], show });
  const signed = (value, stderr) => `${value > 0 ? "+" : ""}${three(value)} ± ${three(stderr)}`;
  const columns = [
    word("task", 0), word("slice", 1), word("model", 2), word("parameter", 3),
    number("best", 4, three),
    number("tried", 6, (_, row) => `${row[5].toPrecision(2)} to ${row[6].toPrecision(3)}`),
    number("effect", 7, (value, row) => signed(value, row[8])),
    number("in std. errors", 9, (value) => value.toFixed(1)),
    number("against uniform", 10, (value, row) => signed(value, row[11])),
  ];
  return table(place, columns, data.effects, { named: "effects-title", sort: [7, -1], key: (row) => row.slice(0, 4).join("\n") });
}

/* Details that are filled when they are opened; the event does not bubble. */
document.addEventListener("toggle", async ({ target }) => {
  const selector = Object.keys(FILLED).find((each) => target.matches(each)), inside = target.querySelector("div");
  if (!selector || !target.open || inside.hasChildNodes()) return;
  inside.dataset.own = "";
  await FILLED[selector](target, inside);
}, true);

const tables = {};
const FILLED = {
  "#effects-table": (_, inside) => { tables.effects = effects(inside); },
  ".prompt": async (element, inside) => {
    const prompt = (await details()).prompts[element.dataset.place];
    for (const problem of prompt.problems) inside.append(make("p", { class: "problem" }, problem));
    for (const { role, content } of prompt.messages) inside.append(make("h3", {}, role), code(content));
    inside.append(make("h3", {}, "reply"), prompt.reply === null ? make("p", { class: "problem" }, "no answer came") : code(prompt.reply));
    if (prompt.analysis) inside.append(make("h3", {}, "its reason"), make("p", {}, prompt.analysis));
  },
  ".items": async (element, inside) => {
    const found = (await details()).items[element.dataset.task][element.dataset.kind];
    const mark = (value) => (value === 1 ? " ✓" : value === 0 ? " ✗" : ` (${three(value)})`);
    const more = make("button", { type: "button" }, "show more");
    let shown = 0;
    const grow = () => {
      for (const [question, answer, ours, theirs, best, rival] of found.slice(shown, shown + 50)) {
        const line = (name, text, score) => [make("dt", {}, name), make("dd", { class: score > 0 ? "right" : "" }, text + (score === null ? "" : mark(score)))];
        more.before(make("div", { class: "item" }, make("pre", {}, question),
          make("dl", {}, ...line("right", answer, null), ...line("best merge", ours, best), ...line("best parent", theirs, rival))));
      }
      shown += 50;
      more.hidden = shown >= found.length;
    };
    more.addEventListener("click", grow);
    inside.append(more);
    grow();
  },
};

function begin() {
  const place = document.getElementById("candidates-table");
  if (!place) delete tables.candidates;
  else if (place.hasChildNodes()) tables.candidates(data.candidates);
  else tables.candidates = candidates(place);
  if (tables.effects && document.contains(document.querySelector("#effects-table table"))) tables.effects(data.effects);
  return draw();
}
begin();
