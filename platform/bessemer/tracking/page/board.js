// The board: a list of all runs that keeps itself up to date, and the report of those that are chosen.

const POLL_SECONDS = { active: 3, idle: 20 };
const ROWS_AT_ONCE = 60;

const list = { rows: pageData.rows, fields: pageData.fields, broken: pageData.broken, sort: "created", down: true, words: "", metric: null, parameters: false };
const chosen = new Set();
const known = new Map(); // address -> tag of the last answer

// The answer as data; null if it is the one that we have.
const ask = async (address) => {
  const tag = known.get(address);
  const answer = await fetch(address, { headers: tag ? { "If-None-Match": tag } : {}, cache: "no-store" });
  if (answer.status === 304) return null;
  const content = await answer.json();
  if (!answer.ok) throw new Error(content.error ?? answer.statusText);
  known.set(address, answer.headers.get("ETag"));
  return content;
};

const shownRuns = () => new URLSearchParams(location.hash.slice(1)).getAll("run");

const metricsOf = () => {
  const counts = new Map();
  for (const row of list.rows) for (const metric of new Set(row.curves.map((curve) => curve.metric))) counts.set(metric, (counts.get(metric) ?? 0) + 1);
  return [...counts].sort((a, b) => b[1] - a[1]).map(([metric]) => metric);
};

const chosenCurve = (row) => row.curves.find((curve) => list.metric === null || curve.metric === list.metric) ?? null;

const COLUMNS = [
  { key: "name", title: "run" },
  { key: "state", title: "state" },
  { key: "best", title: "best", kind: "number", value: (row) => chosenCurve(row)?.best ?? null },
  { key: "error", title: "\u00b1", kind: "number", value: (row) => chosenCurve(row)?.error ?? null },
  { key: "spark", title: "over kimg", fixed: true },
  { key: "at", title: "at kimg", kind: "number", value: (row) => chosenCurve(row)?.kimg ?? null },
  { key: "last", title: "last", kind: "number", value: (row) => chosenCurve(row)?.last ?? null },
  { key: "kimg", title: "kimg", kind: "number" },
  { key: "img_per_s", title: "img/s", kind: "number" },
  { key: "device_hours", title: "device-h", kind: "number" },
  { key: "restarts", title: "restarts", kind: "number" },
  { key: "system", title: "system" },
  { key: "created", title: "made (UTC)", kind: "when" },
];

const valueIn = (row, column) => (column.value ? column.value(row) : row[column.key]);

const visibleRows = (protocols) => {
  const words = list.words.toLowerCase().split(/\s+/).filter(Boolean);
  const textOf = (row) => [row.name, row.state, row.system, ...row.curves.map((curve) => curve.metric), ...list.fields.map((field, i) => `${field}=${row.fields[i]}`)].join(" ").toLowerCase();
  const rows = list.rows.filter((row) => {
    const text = words.length ? textOf(row) : "";
    return words.every((word) => text.includes(word));
  });
  const field = list.fields.indexOf(list.sort);
  const column = COLUMNS.find((one) => one.key === list.sort);
  const value = (row) => (field >= 0 ? (Number.isNaN(Number(row.fields[field])) ? row.fields[field] : Number(row.fields[field])) : valueIn(row, column));
  const judged = ["best", "last"].includes(list.sort);
  const group = (row) => (judged && chosenCurve(row) ? protocols.indexOf(chosenCurve(row).protocol) : 0);
  return rows.sort((a, b) => {
    const [x, y] = [value(a), value(b)];
    if (x === null || y === null) return (x === null) - (y === null);
    const order = typeof x === "number" && typeof y === "number" ? x - y : String(x).localeCompare(String(y));
    return group(a) - group(b) || (list.down ? -order : order) || a.name.localeCompare(b.name); // one protocol at a time
  });
};

const sparkOf = (curve) => {
  if (!curve || curve.spark.length < 2) return "";
  const [xs, ys] = [curve.spark.map((point) => point[0]), curve.spark.map((point) => point[1])];
  const [[left, right], [low, high]] = [extremes(xs), extremes(ys)];
  const at = (index) => `${(((xs[index] - left) / (right - left || 1)) * 100).toFixed(1)} ${(23 - ((ys[index] - low) / (high - low || 1)) * 22).toFixed(1)}`;
  return svg("svg", { class: "spark", viewBox: "0 0 100 24", preserveAspectRatio: "none", "aria-hidden": "true" }, svg("path", { class: "line c0", d: `M${xs.map((_, index) => at(index)).join("L")}` }));
};

const reportLink = (names) => `#${new URLSearchParams(names.map((name) => ["run", name]))}`;

const rowOf = (row, protocols) => {
  const curve = chosenCurve(row);
  const box = el("input", { type: "checkbox", "aria-label": `choose ${row.name}`, checked: chosen.has(row.name) });
  box.addEventListener("change", () => {
    if (box.checked) chosen.add(row.name);
    else chosen.delete(row.name);
    refreshBar();
  });
  const done = row.total_kimg ? `${number(row.kimg)} of ${number(row.total_kimg)}` : number(row.kimg);
  const protocol = curve && protocols.length > 1 ? el("small", { class: "quiet", title: "Values of different protocols are not comparable", text: ` p${protocols.indexOf(curve.protocol) + 1}` }) : null;
  return el(
    "tr",
    {},
    el("td", { class: "pick" }, box),
    el("th", { scope: "row" }, el("a", { href: reportLink([row.name]), text: row.name })),
    cell(stateOf(row)),
    el("td", { class: "number strong" }, curve ? number(curve.best) : "\u2013", protocol),
    cell(curve && curve.error !== null ? number(Number(curve.error.toPrecision(2))) : "", "number quiet"),
    cell(sparkOf(curve)),
    cell(curve ? number(curve.kimg) : null, "number"),
    cell(curve ? number(curve.last) : null, "number"),
    cell(done, "number"),
    cell(number(row.img_per_s), "number"),
    cell(number(row.device_hours), "number"),
    cell(row.restarts || "", "number"),
    cell(row.system),
    cell(row.created === null ? null : date(row.created), "when"),
    list.parameters ? row.fields.map((value) => cell(value)) : [],
  );
};

const bar = el("div", { class: "board-bar" });
const tableHolder = el("div");
const searchBox = el("input", { type: "search", placeholder: "Filter: words, such as gan finished batch_size=64", "aria-label": "Filter runs" });
const metricChoice = el("select", { "aria-label": "Metric" });
const parameterBox = el("input", { type: "checkbox" });
const compareButton = el("button", { type: "button", class: "primary", on: { click: () => (location.hash = reportLink([...chosen])) } });
const counts = el("p", { class: "subtitle", role: "status" });
let listIsBuilt = false;

const refreshBar = () => {
  compareButton.textContent = chosen.size > 1 ? `Compare ${chosen.size} runs` : chosen.size ? "Show the run" : "Choose runs to compare";
  compareButton.disabled = !chosen.size;
};

const drawList = () => {
  const metrics = metricsOf();
  if (list.metric === null || !metrics.includes(list.metric)) list.metric = metrics[0] ?? null;
  metricChoice.replaceChildren(...metrics.map((metric) => el("option", { value: metric, text: metric, selected: metric === list.metric })));
  const tally = new Map();
  for (const row of list.rows) {
    const curve = chosenCurve(row);
    if (curve) tally.set(curve.protocol, (tally.get(curve.protocol) ?? 0) + 1);
  }
  const protocols = [...tally].sort((a, b) => b[1] - a[1]).map(([protocol]) => protocol);
  const rows = visibleRows(protocols);
  const states = new Map();
  for (const row of list.rows) states.set(row.state, (states.get(row.state) ?? 0) + 1);
  counts.textContent = `${plural(list.rows.length, "run")}${states.size ? `: ${[...states].map(([state, count]) => `${count} ${state}`).join(", ")}` : ""}${rows.length < list.rows.length ? `; ${rows.length} shown` : ""}`;
  const head = (title, key, kind, fixed) => {
    const sorted = list.sort === key;
    const sortBy = () => {
      list.down = sorted ? !list.down : !["name", "state", "system"].includes(key) && key !== "best" && key !== "last";
      list.sort = key;
      drawList();
      tableHolder.querySelector(`th[aria-sort] button`)?.focus();
    };
    return el("th", { scope: "col", class: kind, "aria-sort": sorted ? (list.down ? "descending" : "ascending") : null }, fixed ? title : el("button", { type: "button", text: `${title}${sorted ? (list.down ? " \u2193" : " \u2191") : ""}`, on: { click: sortBy } }));
  };
  // What fits a window first: hundreds of rows would keep the first picture waiting.
  const body = el("tbody", {}, rows.slice(0, ROWS_AT_ONCE).map((row) => rowOf(row, protocols)));
  const others = rows.slice(ROWS_AT_ONCE);
  if (others.length) requestAnimationFrame(() => setTimeout(() => body.isConnected && body.append(...others.map((row) => rowOf(row, protocols)))));
  tableHolder.replaceChildren(
    list.rows.length
      ? el(
          "div",
          { class: "scroll" },
          el(
            "table",
            { class: "runs" },
            el("thead", {}, el("tr", {}, el("th", { scope: "col" }, el("span", { class: "unseen", text: "choose" })), COLUMNS.map((one) => head(one.title, one.key, one.kind, one.fixed)), list.parameters ? list.fields.map((field) => head(field, field, null, false)) : [])),
            body,
          ),
        )
      : el("p", { class: "empty", text: list.looked ? "No runs yet. Start one: bessemer train JOB." : "Reading the journals\u2026" }),
    ...list.broken.map(([name, note]) => el("p", { class: "note", text: `skipped ${name}: ${note}` })),
  );
  refreshBar();
};

const showList = () => {
  if (!listIsBuilt) {
    searchBox.addEventListener("input", () => {
      list.words = searchBox.value;
      drawList();
    });
    metricChoice.addEventListener("change", () => {
      list.metric = metricChoice.value;
      drawList();
    });
    parameterBox.addEventListener("change", () => {
      list.parameters = parameterBox.checked;
      drawList();
    });
    bar.append(searchBox, metricChoice, el("label", {}, parameterBox, " parameters"), compareButton);
    listIsBuilt = true;
  }
  const root = pageData.root.split("/").filter(Boolean).at(-1) ?? pageData.root;
  document.body.replaceChildren(el("header", { class: "board" }, el("p", { class: "eyebrow", text: pageData.root }), el("h1", { text: root }), counts), el("main", { class: "board" }, bar, tableHolder));
  drawList();
};

const showReport = (data) => {
  const offset = scrollY;
  const open = [...document.querySelectorAll("details")].map((part) => part.open);
  document.body.replaceChildren(el("nav", {}, el("a", { href: "#", text: "\u2039 All runs" })), ...reportOf(data));
  document.querySelectorAll("details").forEach((part, index) => (part.open = open[index] ?? false));
  scrollTo(0, offset);
};

// One look at the store. A picture that is enlarged and a chart that is being read are not pulled away.
const look = async () => {
  const names = shownRuns();
  const busy = document.querySelector("dialog[open], figure.chart:hover, figure.chart:focus, select:focus");
  if (names.length) {
    if (busy && document.querySelector("main:not(.board)")) return;
    const data = await ask(`/report?${new URLSearchParams(names.map((name) => ["run", name]))}`);
    if (data && names.join() === shownRuns().join()) showReport(data);
    return;
  }
  const content = await ask("/rows");
  if (content) Object.assign(list, content, { looked: true });
  if (content && !shownRuns().length && !busy) drawList();
};

let timer = null;
const keepLooking = async () => {
  clearTimeout(timer);
  let failed = false;
  try {
    if (!document.hidden) await look();
  } catch (error) {
    failed = true; // the board was stopped, say: the page stays as it is
    counts.textContent = `Not up to date: ${error.message}`;
  }
  const active = !failed && (list.rows.some((row) => row.state === "running") || !list.looked);
  timer = setTimeout(keepLooking, 1000 * (active ? POLL_SECONDS.active : POLL_SECONDS.idle));
};

const route = () => {
  known.clear();
  scrollTo(0, 0);
  if (!shownRuns().length) {
    showList();
    requestAnimationFrame(() => setTimeout(keepLooking)); // what is known is shown first
    return;
  }
  document.body.replaceChildren(el("nav", {}, el("a", { href: "#", text: "\u2039 All runs" })), el("main", {}, el("p", { class: "empty", role: "status", text: "Reading the journals\u2026" })));
  keepLooking();
};

addEventListener("hashchange", route);
document.addEventListener("visibilitychange", () => !document.hidden && keepLooking());
route();
