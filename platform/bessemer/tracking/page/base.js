// Helpers. Everything that comes from a run enters the page through `text`, as text.

const el = (tag, attributes = {}, ...children) => {
  const node = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (value === null || value === undefined || value === false) continue;
    if (name === "text") node.textContent = value;
    else if (name === "on") for (const [event, act] of Object.entries(value)) node.addEventListener(event, act);
    else node.setAttribute(name, value === true ? "" : value);
  }
  node.append(...children.flat().filter((child) => child !== null && child !== undefined));
  return node;
};

const svg = (tag, attributes = {}, ...children) => {
  const node = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) node.setAttribute(name, value);
  node.append(...children);
  return node;
};

const COLOURS = 8;
const colourOf = (index) => `c${index % COLOURS}`;
const MINUS = "\u2212";
const THIN_SPACE = "\u202f";

// Four significant digits, or as many decimals as a tick's step needs.
const number = (value, step) => {
  if (value === null || value === undefined || !Number.isFinite(value)) return "\u2013";
  if (value === 0) return "0";
  const size = Math.abs(value);
  let shown;
  if (size < 1e-4 || size >= 1e7) shown = value.toExponential(2).replace(/\.?0+e/, "e").replace("e+", "e");
  else if (step) {
    const decimals = Math.max(0, Math.ceil(-Math.log10(step) - 1e-9));
    const needed = Math.abs(Math.round(step * 10 ** decimals) - step * 10 ** decimals) > 1e-6 ? decimals + 1 : decimals;
    shown = value.toFixed(Math.min(needed, 12));
  } else shown = size >= 1000 ? value.toFixed(0) : String(Number(value.toPrecision(4)));
  const [whole, rest] = shown.split(".");
  const grouped = whole.replace(/\B(?=(\d{3})+$)/g, THIN_SPACE);
  return (rest === undefined ? grouped : `${grouped}.${rest}`).replace("-", MINUS);
};

const plusMinus = (error) => (error === null || error === undefined ? "" : `\u00b1 ${number(Number(error.toPrecision(2)))}`);

const duration = (hours) => {
  if (hours === null || hours === undefined) return "\u2013";
  const seconds = Math.max(0, Math.round(hours * 3600));
  const [h, m] = [Math.floor(seconds / 3600), Math.floor(seconds / 60) % 60];
  if (h >= 48) return `${Math.floor(h / 24)} d ${h % 24} h`;
  if (h) return `${h} h ${String(m).padStart(2, "0")} min`;
  return m ? `${m} min ${String(seconds % 60).padStart(2, "0")} s` : `${seconds} s`;
};

const date = (seconds) => {
  const moment = new Date(seconds * 1000);
  return Number.isNaN(moment.getTime()) ? "?" : moment.toISOString().slice(0, 16).replace("T", " ");
};

const plural = (count, word) => `${number(count)} ${word}${count === 1 ? "" : "s"}`;

const section = (title, ...children) => {
  const id = title.toLowerCase().replace(/[^a-z]+/g, "-");
  return el("section", { id, "aria-labelledby": `${id}-title` }, el("h2", { text: title, id: `${id}-title` }), ...children);
};

const table = (headers, rows) =>
  el(
    "div",
    { class: "scroll", tabindex: 0, role: "region", "aria-label": headers.map((header) => header.text).join(", ") },
    el(
      "table",
      {},
      el("thead", {}, el("tr", {}, headers.map((header) => el("th", { scope: "col", class: header.kind, text: header.text })))),
      el("tbody", {}, rows),
    ),
  );

const cell = (value, kind = null) => el("td", { class: kind }, value instanceof Node ? value : String(value ?? "\u2013"));

const runName = (run, index) => el("span", { class: `key ${colourOf(index)}`, text: run.name });

const stateOf = (run) => el("span", { class: `state ${["running", "finished", "failed"].includes(run.state) ? run.state : ""}`, text: run.state });
