// The report of a search: every trial as a line through its settings, what matters, quality against cost, the table.

const MOST_ROWS = 300;
const [WIDTH, HEIGHT, TOP, BOTTOM] = [1100, 300, 34, 52];

const searchHeader = (search) => {
  const best = search.trials.find((trial) => trial.trial === search.best);
  const counts = best && search.final?.counts && best.final !== null; // the final has the last word once it is over
  const rung = best && `${counts ? `${search.metric} ${number(best.value)} ${plusMinus(best.standard_error)} ` : ""}at ${number(best.kimg)} kimg`;
  const better = (counts ? search.final : search).mode === "max" ? "higher" : "lower";
  const story = best && [best.trial, counts ? `final of ${plural(search.final.finalists, "finalist")}, ${search.final.draws} \u00d7 ${search.final.samples} samples` : null, rung].filter(Boolean).join(", ");
  const facts = [
    ["Trials", plural(search.trials.length, "trial"), Object.entries(search.states).map(([state, count]) => `${count} ${state}`).join(", ")],
    ["Time up", duration(search.hours), `${number(search.device_hours)} device-hours`],
    ["Images seen", `${number(search.kimg)} k`, "by all trials"],
    ["Scheduler", search.scheduler, `points by ${search.searcher}`],
  ];
  return el(
    "header",
    {},
    el("p", { class: "eyebrow", text: "Bessemer search" }),
    el("h1", { text: search.name }),
    best
      ? el(
          "p",
          { class: "hero" },
          el("span", { class: "metric", text: counts ? search.final.metric : search.metric }),
          el("strong", { text: number(counts ? best.final : best.value) }),
          el("span", { class: "error", text: plusMinus(counts ? best.final_standard_error : best.standard_error) }),
          el("span", { class: "story", text: `${story} (${better} is better)${search.as_good.length ? `; within one standard error: ${search.as_good.slice(0, 5).join(", ")}` : ""}` }),
        )
      : el("p", { class: "empty", text: "No trial was judged yet." }),
    el("dl", { class: "facts" }, facts.map(([label, value, detail]) => el("div", {}, el("dt", { text: label }), el("dd", {}, value, el("small", { text: detail }))))),
  );
};

// One trial at a time is pointed out, in every picture and in the table.
const marked = new Map();
const mark = (trial) => {
  for (const [name, nodes] of marked) for (const node of nodes) node.classList.toggle("picked", name === trial);
  for (const node of marked.get(trial) ?? []) if (node instanceof SVGElement) node.parentNode.append(node); // on top
};
const marks = (trial, node) => {
  marked.set(trial, [...(marked.get(trial) ?? []), node]);
  node.addEventListener("pointerenter", () => mark(trial));
  node.addEventListener("focus", () => mark(trial));
  return node;
};

const nodeTitle = (text) => {
  const title = svg("title", {});
  title.textContent = text;
  return title;
};

const writing = (text, attributes) => {
  const node = svg("text", attributes);
  node.textContent = text;
  return node;
};

const settings = (trial) => Object.entries(trial.point).map(([field, value]) => `${field} ${typeof value === "number" ? number(value) : String(value)}`).join(", ");

const figureOf = (title, drawing, ...more) =>
  el("figure", {}, el("figcaption", {}, el("h3", { text: title })), el("div", { class: "scroll", tabindex: 0, role: "region", "aria-label": title }, drawing), ...more);

const parallelSection = (search) => {
  const lines = search.lines;
  if (lines.length < 2) return null;
  const byName = new Map(search.trials.map((trial) => [trial.trial, trial]));
  const values = lines.map((line) => byName.get(line.trial).value);
  const axes = [...search.axes, { field: `${search.metric} (${search.mode === "max" ? "higher" : "lower"} is better)`, low: number(Math.min(...values)), high: number(Math.max(...values)) }];
  const left = 110;
  const width = Math.max(WIDTH, 190 * axes.length);
  const x = (index) => left + (index * (width - 2 * left)) / (axes.length - 1);
  const y = (share) => (share === null ? HEIGHT - 18 : HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM));
  const picture = svg("svg", { class: "parallel", viewBox: `0 0 ${width} ${HEIGHT}`, width, height: HEIGHT, role: "img", "aria-label": `${lines.length} trials; the table below has their numbers` });
  axes.forEach((axis, index) => {
    const name = writing(index < search.axes.length ? axis.field.split(".").slice(-2).join(".") : axis.field, { x: x(index), y: 12, class: "name" });
    name.append(nodeTitle(axis.field));
    picture.append(
      svg("path", { class: "grid", d: `M${x(index)} ${y(0)}V${y(1)}` }),
      name,
      writing(axis.high, { x: x(index), y: 27 }),
      writing(axis.low, { x: x(index), y: y(0) + 15 }),
    );
    if (lines.some((line) => line.at[index] === null)) picture.append(writing("not varied", { x: x(index), y: HEIGHT - 3 }));
  });
  const group = svg("g", {});
  // The worst first, so that the best lie on top.
  [...lines.entries()].reverse().forEach(([place, line]) => {
    const path = line.at.map((share, index) => `${index ? "L" : "M"}${x(index)} ${y(share)}`).join("");
    const strength = 1 - place / lines.length;
    const drawn = svg("path", { class: place ? "trial" : "trial first", d: path, "stroke-opacity": (0.15 + 0.75 * strength ** 2).toFixed(3) });
    const trial = byName.get(line.trial);
    drawn.append(nodeTitle(`${line.trial}: ${search.metric} ${number(trial.value)}; ${settings(trial)}`));
    group.append(marks(line.trial, drawn));
  });
  picture.append(group);
  const hint = `The stronger a line, the better its trial; the best is in colour. ${lines.length < search.trials.length ? "Trials that were judged, the best of them." : ""} Point at a line or at a row of the table to follow a trial.`;
  return section("Settings of all trials", figureOf("Parallel coordinates", picture), el("p", { class: "hint", text: hint }));
};

const importanceSection = (search) => {
  if (!search.importance.length) return section("What matters", el("p", { class: "empty", text: "Too few trials to say which field matters." }));
  const bars = search.importance.flatMap((one) => {
    const bar = el("div", { class: "bar-parts c1" }, el("i", { class: "c1" }));
    bar.style.width = `${Math.max(one.share * 100, 0.4)}%`;
    bar.firstChild.style.flexGrow = "1";
    return [el("span", { text: one.field }), el("div", { class: "track" }, bar), el("span", { class: "quiet", text: `${number(one.share)} ${plusMinus(one.spread)}` })];
  });
  return section("What matters", el("figure", {}, el("div", { class: "bars importance" }, bars)), el("p", { class: "hint", text: "Permutation importance: what a random forest that predicts a trial's rank loses when a field is shuffled; shares of the sum, \u00b1 their spread." }));
};

const costSection = (search) => {
  const judged = search.trials.filter((trial) => trial.value !== null);
  if (judged.length < 2) return null;
  const ends = (values) => [Math.min(...values), Math.max(...values)];
  const [hours, values] = [ends(judged.map((trial) => trial.device_hours)), ends(judged.map((trial) => trial.value))];
  const spread = ([low, high], value, from, to) => from + ((to - from) * (value - low)) / (high - low || 1);
  const place = (trial) => [spread(hours, trial.device_hours, 80, WIDTH - 30), spread(values, trial.value, HEIGHT - 40, 20)];
  const picture = svg("svg", { class: "parallel cost", viewBox: `0 0 ${WIDTH} ${HEIGHT}`, width: WIDTH, height: HEIGHT, role: "img", "aria-label": `${search.metric} against device-hours` });
  const front = judged.filter((trial) => search.pareto.includes(trial.trial)).sort((a, b) => a.device_hours - b.device_hours);
  picture.append(
    svg("path", { class: "grid", d: `M80 20V${HEIGHT - 40}H${WIDTH - 30}` }),
    writing(number(values[1]), { x: 72, y: 24, class: "end" }),
    writing(number(values[0]), { x: 72, y: HEIGHT - 37, class: "end" }),
    writing(number(hours[0]), { x: 80, y: HEIGHT - 22 }),
    writing(`${number(hours[1])} device-hours`, { x: WIDTH - 30, y: HEIGHT - 22, class: "end" }),
    svg("path", { class: "front", d: front.map((trial, index) => `${index ? "L" : "M"}${place(trial).join(" ")}`).join("") }),
  );
  const group = svg("g", {});
  for (const trial of judged) {
    const [cx, cy] = place(trial);
    const dot = svg("circle", { class: front.includes(trial) ? "trial front" : "trial", cx, cy, r: 4 });
    dot.append(nodeTitle(`${trial.trial}: ${number(trial.value)} after ${number(trial.device_hours)} device-hours at ${number(trial.kimg)} kimg`));
    group.append(marks(trial.trial, dot));
  }
  picture.append(group);
  return section("Quality against cost", figureOf(search.metric, picture), el("p", { class: "hint", text: "Every trial that was judged, where it stands now. The line joins those of the furthest rung that no other beats in quality and cost." }));
};

const trialsSection = (search) => {
  const fields = search.axes.map((axis) => axis.field);
  const { final } = search;
  const rows = search.trials.slice(0, MOST_ROWS).map((trial) =>
    marks(
      trial.trial,
      el(
        "tr",
        { class: trial.trial === search.best ? "best" : null, tabindex: 0 },
        el("th", { scope: "row", text: trial.trial }),
        cell(trial.state),
        ...(final ? [cell(number(trial.final), "number"), cell(plusMinus(trial.final_standard_error), "number")] : []),
        cell(number(trial.kimg), "number"),
        cell(number(trial.value), "number"),
        cell(plusMinus(trial.standard_error), "number"),
        cell(number(trial.device_hours), "number"),
        ...fields.map((field) => cell(typeof trial.point[field] === "number" ? number(trial.point[field]) : trial.point[field], "number")),
        cell(trial.reason ?? "", "detail"),
      ),
    ),
  );
  const columns = [...(final ? [`final ${final.metric}`, "\u00b1"] : []), "kimg", search.metric, "\u00b1", "device-h", ...fields];
  const headers = [...["trial", "state"].map((text) => ({ text, kind: null })), ...columns.map((text) => ({ text, kind: "number" })), { text: "", kind: null }];
  const left = search.trials.length - rows.length;
  return section("Trials", table(headers, rows), left > 0 ? el("p", { class: "note", text: `and ${plural(left, "trial")} more; report.json has all.` }) : null);
};

const searchData = JSON.parse(document.getElementById("data").textContent);
document.body.append(
  searchHeader(searchData.search),
  el("main", {}, ...[parallelSection, importanceSection, costSection, trialsSection].map((draw) => draw(searchData.search)).filter(Boolean)),
  el("footer", { text: `Written by Bessemer ${searchData.version} on ${date(searchData.written)} UTC.` }),
);
