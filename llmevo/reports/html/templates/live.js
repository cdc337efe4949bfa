"use strict";
/* The page follows its log. The server sends what happens now and the candidates that are new; the rest of the page is
   fetched anew when that is worth it, and what differs is changed in place, so that nothing open or focused is lost. */
const parse = (text) => new DOMParser().parseFromString(text, "text/html");
let version = root.dataset.version, at = version, offered = version, recent = [], fetching = false, source;
const count = (of) => Number(of.split("-").at(-1));

/* Make one element like another; elements that scripts fill stay as they are. */
function become(old, fresh) {
  if (old.nodeType !== Node.ELEMENT_NODE) {
    if (old.nodeValue !== fresh.nodeValue) old.nodeValue = fresh.nodeValue;
    return;
  }
  if (old.matches(".plot, .table, [data-own]")) {
    if (fresh.ariaLabel) old.ariaLabel = fresh.ariaLabel;
    return;
  }
  for (const { name, value } of [...fresh.attributes]) if (old.getAttribute(name) !== value) old.setAttribute(name, value);
  for (const { name } of [...old.attributes]) {
    if (!fresh.hasAttribute(name) && name !== "open" && name !== "tabindex" && !name.startsWith("data-")) old.removeAttribute(name);
  }
  const known = new Map([...old.children].filter((child) => child.id).map((child) => [child.id, child]));
  let next = old.firstChild;
  for (const child of [...fresh.childNodes]) {
    const same = known.get(child.id) ?? (next && !next.id && !child.id && next.nodeName === child.nodeName ? next : null);
    if (!same) { old.insertBefore(child, next); continue; }
    if (same === next) next = next.nextSibling;
    else old.insertBefore(same, next);
    become(same, child);
  }
  while (next) { const after = next.nextSibling; next.remove(); next = after; }
}

function addRows(rows) {
  const known = new Map(data.candidates.map((row, place) => [row.id, place]));
  for (const row of rows) {
    if (known.has(row.id)) data.candidates[known.get(row.id)] = row;
    else data.candidates.push(row);
  }
}

async function refresh() {
  if (fetching) return;
  fetching = true;
  try {
    const answer = await fetch(location.href, { cache: "no-store" });
    if (!answer.headers.get("Content-Type")?.startsWith("text/html")) return;
    const fresh = parse(await answer.text()), given = fresh.documentElement.dataset.version;
    if (!given) return;
    const before = at;
    for (const part of ["header", "nav", "main"]) become(document.querySelector(`body > ${part}`), fresh.querySelector(`body > ${part}`));
    document.title = fresh.title;
    data = JSON.parse(fresh.getElementById("data").textContent);
    document.getElementById("details").textContent = fresh.getElementById("details").textContent;
    opened = undefined;
    at = root.dataset.version = given;
    recent = recent.filter((message) => count(message.version) > count(at));
    if (data.candidates) for (const { rows } of recent) addRows(rows);
    await begin();
    if (count(offered) > count(at) && at !== before) setTimeout(refresh);
  } catch { /* the stream says when the server is there again */ } finally { fetching = false; }
}

/* The time left, by the clock until the next message; the server says what is expected. */
let heard = performance.now();
const clock = (seconds) => {
  const all = Math.round(seconds), two = (number) => String(number).padStart(2, "0");
  const minutes = `${Math.floor(all / 60) % 60}`, hours = Math.floor(all / 3600);
  return `${hours ? `${hours}:${two(minutes)}` : minutes}:${two(all % 60)}`;
};
function countDown() {
  const past = (performance.now() - heard) / 1000;
  for (const place of document.querySelectorAll("[data-later]")) {
    const { step, later, long } = place.dataset, ofStep = step === "" ? 0 : Number(step) - past;
    const time = clock(Math.max(0, ofStep) + Number(later)), late = ofStep < 0;
    const said = long === undefined ? `${time}${late ? ", late" : ""}` : `about ${time} left${late ? "; the next result takes longer than expected" : ""}`;
    if (place.textContent !== said) place.textContent = said;
  }
}
setInterval(countDown, 1000);

function take(message) {
  if (message.anew) { location.reload(); return; }
  heard = performance.now();
  become(document.getElementById("now"), parse(`<section id="now" aria-label="Now">${message.now}</section>`).getElementById("now"));
  if (message.list) become(document.getElementById("list"), parse(`<div class="wide" id="list">${message.list}</div>`).getElementById("list"));
  version = message.version;
  if (message.rows.length && data.candidates) {
    recent.push(message);
    addRows(message.rows);
    tables.candidates?.(data.candidates);
  }
  root.dataset.seen = version;
  offered = message.page;
  if (count(offered) > count(at)) refresh();
}

function follow() {
  source?.close();
  source = new EventSource(`events?from=${encodeURIComponent(version)}`);
  source.onmessage = ({ data: text }) => take(JSON.parse(text));
  source.onerror = () => {
    const said = document.getElementById("connection");
    if (said) said.textContent = "The connection to llmevo serve is lost; trying again.";
    for (const place of document.querySelectorAll("[data-later]")) { delete place.dataset.later; place.textContent = ""; }
    if (source.readyState === EventSource.CLOSED) setTimeout(() => document.hidden || follow(), 3000);
  };
}

/* A browser has six connections to a server; pages that are not seen leave theirs to the others. */
const attend = () => (document.hidden ? source?.close() : follow());
document.addEventListener("visibilitychange", attend);
attend();
