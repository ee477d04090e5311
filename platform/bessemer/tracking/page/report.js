// The report: sections in the order in which they are asked for, the best number first.

const GROUPS = {
  loss: "Losses",
  scores: "Discriminator scores",
  grad_norm: "Gradient norms",
  ada: "Adaptive augmentation",
  throughput: "Images per second",
  "throughput/mfu": "Model FLOP utilisation",
  time: "Seconds per 1000 images, by part of the step",
  collapse: "Signs of collapse",
  "system/percent": "Machines: per cent busy",
  "system/memory": "Machines: memory in GiB",
};
const PARTS = ["data", "forward", "backward", "communicate", "optimizer", "ema"];
const MOST_LINES = 6;
const MOST_UNFOLDED = 12;

// What a person chose, which outlives a page that is drawn again with newer numbers.
const remembered = { axis: "x", kimg: null };

// More sections, such as those of a search: functions of the page's data that return an element or null.
const moreSections = [];

const bestOf = (curve) => (curve.best === null ? null : { value: curve.y[curve.best], error: curve.error[curve.best], kimg: curve.x[curve.best] });
const mainCurve = (run) => run.metrics.find((curve) => curve.best !== null) ?? null;
const protocolKey = (curve) => JSON.stringify([curve.metric, curve.protocol.map((field) => field[2])]);

const headerOf = (data) => {
  const { runs } = data;
  if (runs.length === 1) return oneHeader(runs[0]);
  return el(
    "header",
    {},
    el("p", { class: "eyebrow", text: "Bessemer" }),
    el("h1", { text: `${runs.length} runs` }),
    atAGlance(runs),
    runs.flatMap((run) => alarms(run, `${run.name}: `)),
  );
};

const alarms = (run, prefix = "") => [
  run.failure ? el("p", { class: "failure", text: prefix + run.failure }) : null,
  ...run.warnings.map((warning) => el("p", { class: "warning", text: prefix + warning })),
];

const systemOf = (run) => [run.system, run.preset].filter(Boolean).join(" ") || "unknown system";

const oneHeader = (run) => {
  const main = mainCurve(run);
  const facts = [];
  const fact = (label, value, detail, extra = null) => facts.push(el("div", {}, el("dt", { text: label }), el("dd", {}, value, el("small", { text: detail }), extra)));
  const seen = new Set([main?.metric]);
  for (const curve of run.metrics) {
    if (curve.best === null || seen.has(curve.metric)) continue;
    seen.add(curve.metric);
    fact(curve.metric, number(bestOf(curve).value), `at ${number(bestOf(curve).kimg)} kimg, ${curve.higher ? "higher" : "lower"} is better`);
  }
  const total = run.total_kimg;
  fact("Images seen", `${number(run.kimg)} k`, total ? `of ${number(total)} kimg` : "kimg", total ? el("progress", { max: 1, value: Math.min(run.kimg / total, 1), "aria-label": "Progress" }) : null);
  if (run.img_per_s !== null) fact("Images per second", number(run.img_per_s), "median of the last lines");
  if (run.hours !== null) fact("Time up", duration(run.hours), `${number(run.device_hours)} device-hours`);
  if (run.workers !== null) fact("Workers", worldText(run), plural(run.restarts, "restart"));
  return el(
    "header",
    {},
    el("p", { class: "eyebrow", text: "Bessemer run" }),
    el("h1", { text: run.name }),
    el("p", { class: "subtitle" }, stateOf(run), ` \u00b7 ${systemOf(run)}${run.created ? ` \u00b7 ${date(run.created)} UTC` : ""}`),
    alarms(run),
    main ? hero(main) : null,
    el("dl", { class: "facts" }, facts),
  );
};

const worldText = (run) => {
  const sizes = run.worlds.map((world) => world[1]);
  return sizes.length > 1 ? sizes.slice(-4).join(" \u2192 ") : String(run.workers);
};

const hero = (curve) => {
  const best = bestOf(curve);
  const [first, last] = [curve.y[0], curve.y.at(-1)];
  const story = curve.y.length > 1 ? `from ${number(first)} at ${number(curve.x[0])} kimg; last ${number(last)}` : "one evaluation";
  return el(
    "p",
    { class: "hero" },
    el("span", { class: "metric", text: curve.metric }),
    el("strong", { text: number(best.value) }),
    el("span", { class: "error", text: plusMinus(best.error) }),
    el("span", { class: "story", text: `best, at ${number(best.kimg)} kimg (${curve.higher ? "higher" : "lower"} is better); ${story}` }),
  );
};

// Runs in order of the first metric: those that one protocol measured, the largest such group first.
const atAGlance = (runs) => {
  const curves = runs.map(mainCurve);
  const keys = curves.map((curve) => (curve ? protocolKey(curve) : ""));
  const size = (key) => (key ? keys.filter((other) => other === key).length : 0);
  const first = [...new Set(keys)].sort((a, b) => size(b) - size(a))[0];
  const main = curves[keys.indexOf(first)];
  const alike = main && keys.every((key) => key === first);
  const sign = (index) => (curves[index]?.higher ? -1 : 1);
  const order = [...runs.keys()].sort(
    (a, b) =>
      size(keys[b]) - size(keys[a]) ||
      keys.indexOf(keys[a]) - keys.indexOf(keys[b]) ||
      (curves[a] ? sign(a) * (bestOf(curves[a]).value - bestOf(curves[b]).value) : 0),
  );
  const rows = order.map((index, place) => {
    const [run, curve] = [runs[index], curves[index]];
    const best = curve && bestOf(curve);
    return el(
      "tr",
      { class: main && place === 0 && size(first) > 1 ? "best" : null },
      el("th", { scope: "row" }, runName(run, index)),
      cell(best ? number(best.value) : null, "number big"),
      cell(best ? plusMinus(best.error) : null, "number"),
      alike ? null : cell(curve ? curve.metric : null),
      cell(best ? number(best.kimg) : null, "number"),
      cell(curve ? number(curve.y.at(-1)) : null, "number"),
      cell(number(run.kimg), "number"),
      cell(number(run.img_per_s), "number"),
      cell(duration(run.hours), "number"),
      cell(number(run.device_hours), "number"),
      cell(systemOf(run)),
      cell(stateOf(run)),
    );
  });
  const head = (text, kind = null) => ({ text, kind });
  const headers = [
    head("run"),
    head(alike ? `${main.metric} (${main.higher ? "higher" : "lower"} is better)` : "best", "number"),
    head("\u00b1", "number"),
    alike ? null : head("metric"),
    head("at kimg", "number"),
    head("last", "number"),
    head("kimg", "number"),
    head("img/s", "number"),
    head("time up", "number"),
    head("device-h", "number"),
    head("system"),
    head("state"),
  ].filter(Boolean);
  const parts = [el("div", { class: "glance" }, table(headers, rows))];
  const others = order.filter((index) => keys[index] !== first).map((index) => runs[index].name);
  if (main && !alike) {
    parts.push(el("p", { class: "warning", text: `Not ranked with the first, because another metric or protocol measured them: ${others.join(", ")}.` }));
  }
  return el("div", {}, parts);
};

// One x axis for all curves: images seen, or hours up.
const curvesSections = (data) => {
  const holder = el("div");
  const choice = (value, label) => {
    const input = el("input", { type: "radio", name: "axis", value, checked: value === remembered.axis, on: { change: () => draw(value) } });
    return el("label", {}, input, el("span", { text: label }));
  };
  const draw = (axis) => {
    remembered.axis = axis;
    charts.length = 0;
    holder.replaceChildren(metricsSection(data.runs, axis), trainingSection(data.runs, axis));
  };
  draw(remembered.axis);
  const bar = el("fieldset", { class: "axis" }, el("legend", { text: "Curves against" }), choice("x", "images (kimg)"), choice("h", "hours up"));
  const key = data.runs.length > 1 ? el("ul", { class: "legend runs" }, data.runs.map((run, index) => el("li", { class: colourOf(index), text: run.name }))) : null;
  return el("div", {}, el("div", { class: "bar" }, bar, key), holder);
};

const unitOf = (axis) => (axis === "x" ? "kimg" : "hours");

const rangeOf = (runs, axis) => {
  let end = 0;
  for (const run of runs) {
    end = Math.max(end, axis === "x" ? run.kimg : (run.hours ?? 0));
    for (const curve of [...run.metrics, ...Object.values(run.series)]) end = Math.max(end, curve[axis].at(-1) ?? 0);
  }
  return [0, end || 1];
};

const markersOf = (runs, axis) =>
  runs.flatMap((run, index) =>
    run.events
      .filter((event) => event.mark)
      .slice(-60)
      .map((event) => ({
        at: axis === "x" ? event.kimg : event.hours,
        mark: event.mark,
        colour: runs.length > 1 ? colourOf(index) : "",
        label: `${runs.length > 1 ? `${run.name}: ` : ""}${event.event} at ${number(event.kimg)} kimg`,
      })),
  );

const metricsSection = (runs, axis) => {
  const names = [...new Set(runs.flatMap((run) => run.metrics.map((curve) => curve.metric)))];
  if (!names.length) return section("Metrics", el("p", { class: "empty", text: "No evaluation yet." }));
  const [range, markers] = [rangeOf(runs, axis), markersOf(runs, axis)];
  const unlike = new Map(); // in what the protocols differ -> metrics
  const figures = [];
  for (const name of names) {
    const curves = runs.flatMap((run, index) => run.metrics.filter((curve) => curve.metric === name).map((curve) => ({ run, index, curve })));
    const protocols = [...new Set(curves.map(({ curve }) => protocolKey(curve)))];
    const lines = curves.map(({ run, index, curve }) => {
      const number_ = protocols.indexOf(protocolKey(curve)) + 1;
      const own = protocols.length > 1 ? `protocol ${number_}` : "";
      return {
        label: [runs.length > 1 ? run.name : "", own].filter(Boolean).join(", "),
        colour: colourOf(runs.length > 1 ? index : number_ - 1),
        x: curve[axis],
        y: curve.y,
        error: curve.error,
        dots: true,
      };
    });
    const bad = curves.reduce((sum, { curve }) => sum + curve.bad, 0);
    const note = [
      curves.some(({ curve }) => curve.error.some((error) => error)) ? "The band is plus and minus one standard error." : "",
      bad ? `${plural(bad, "evaluation")} gave no finite number.` : "",
    ].join(" ").trim();
    if (protocols.length > 1) {
      const why = protocolDifference(curves, protocols);
      unlike.set(why, [...(unlike.get(why) ?? []), name]);
    }
    const better = curves[0].curve.higher ? "higher is better" : "lower is better";
    figures.push(chart({ title: `${name}, ${better}`, lines, range, unit: unitOf(axis), markers, note, tall: true, legend: protocols.length > 1 }));
  }
  const warnings = [...unlike].map(([why, metrics]) =>
    el("p", { class: "warning", text: `${metrics.join(", ")}: measured by ${why}. Values of different protocols are not comparable.` }),
  );
  return section("Metrics", ...warnings, el("div", { class: "charts" }, figures), el("details", {}, el("summary", { text: "Values and protocols" }), names.flatMap((name) => valuesOf(runs, name))));
};

const protocolDifference = (curves, protocols) => {
  const fields = new Map();
  for (const { curve } of curves) for (const [label, , value] of curve.protocol) fields.set(label, (fields.get(label) ?? new Set()).add(value));
  const differing = [...fields].filter(([, values]) => values.size > 1).map(([label]) => label);
  return `${protocols.length} protocols, which differ in: ${differing.join(", ") || "what they say"}`;
};

const valuesOf = (runs, name) =>
  runs.flatMap((run, index) =>
    run.metrics
      .filter((curve) => curve.metric === name)
      .map((curve) =>
        el(
          "div",
          { class: "values" },
          el("h3", {}, runs.length > 1 ? runName(run, index) : "", ` ${name}`),
          el(
            "div",
            { class: "panels" },
            table(
              [{ text: "kimg", kind: "number" }, { text: "value", kind: "number" }, { text: "standard error", kind: "number" }, { text: "", kind: null }],
              curve.x.map((kimg, at) =>
                el("tr", { class: at === curve.best ? "best" : null }, cell(number(kimg), "number"), cell(number(curve.y[at]), "number"), cell(plusMinus(curve.error[at]), "number"), cell(at === curve.best ? "best" : "", "mark")),
              ),
            ),
            pairs(curve.protocol.map(([label, shown, value]) => [label, shown, value])),
          ),
        ),
      ),
  );

// One run: a chart for each group of series. Several: a chart for each series, one line per run.
const trainingSection = (runs, axis) => {
  const [range, markers] = [rangeOf(runs, axis), markersOf(runs, axis)];
  const names = [...new Set(runs.flatMap((run) => Object.keys(run.series)))];
  if (!names.length) return section("Training", el("p", { class: "empty", text: "No training metrics yet." }));
  const groups = new Map();
  for (const name of names) {
    let group = Object.hasOwn(GROUPS, name) ? name : name.split("/")[0];
    if (group === "system") group = name.endsWith("percent") ? "system/percent" : "system/memory";
    groups.set(group, [...(groups.get(group) ?? []), name]);
  }
  const rank = (group) => (Object.keys(GROUPS).includes(group) ? Object.keys(GROUPS).indexOf(group) : 99);
  const order = [...groups.keys()].sort((a, b) => rank(a) - rank(b) || a.localeCompare(b));
  const line = (run, name, label, colour) => {
    const series = run.series[name];
    return { label, colour, x: series[axis], y: series.y, low: series.low, high: series.high };
  };
  const badNote = (runs_, names_) => {
    const bad = runs_.reduce((sum, run) => sum + names_.reduce((inner, name) => inner + (run.series[name]?.bad ?? 0), 0), 0);
    return bad ? `${plural(bad, "value")} ${bad === 1 ? "was" : "were"} not finite and ${bad === 1 ? "is" : "are"} left out.` : "";
  };
  const figures = [];
  for (const group of order) {
    const title = Object.hasOwn(GROUPS, group) ? GROUPS[group] : group;
    const own = groups.get(group);
    if (group === "time") own.sort((a, b) => PARTS.indexOf(labelOf(a)) - PARTS.indexOf(labelOf(b)));
    if (runs.length === 1) {
      for (let start = 0; start < own.length; start += MOST_LINES) {
        const part = own.slice(start, start + MOST_LINES);
        const lines = part.map((name, index) => line(runs[0], name, labelOf(name), colourOf(index)));
        figures.push(chart({ title, lines, range, unit: unitOf(axis), markers, note: badNote(runs, part) }));
      }
    } else {
      for (const name of own) {
        const lines = runs.flatMap((run, index) => (Object.hasOwn(run.series, name) ? [line(run, name, run.name, colourOf(index))] : []));
        figures.push(chart({ title: `${title}: ${labelOf(name)}`, lines, range, unit: unitOf(axis), markers, note: badNote(runs, [name]), legend: false }));
      }
    }
  }
  const thinned = runs.some((run) => Object.values(run.series).some((series) => series.low));
  const hint = [
    markers.length ? "Vertical lines are events: restarts dashed, guards and failures solid." : "",
    thinned ? "Each point is a mean of neighbouring lines of the journal, the band their range." : "",
    "Move over a chart, or focus it and use the arrow keys, to read values; the line runs through all charts.",
  ].filter(Boolean).join(" ");
  return section("Training", stepBars(runs), el("div", { class: "charts small" }, figures), el("p", { class: "hint", text: hint }));
};

const labelOf = (name) => (name === "throughput/img_per_s" ? "images per second" : (name.split("/").slice(1).join("/") || name).replaceAll("_", " "));

// Where the time of a step goes: one bar per run, as long as its seconds per 1000 images.
const stepBars = (runs) => {
  const rows = runs.map((run, index) => {
    const parts = PARTS.map((part) => {
      const values = (run.series[`time/${part}`]?.y ?? []).slice(-40);
      return { part, seconds: values.length ? values.reduce((sum, value) => sum + value, 0) / values.length : 0 };
    });
    return { run, index, parts, total: parts.reduce((sum, one) => sum + one.seconds, 0) };
  }).filter((row) => row.total > 0);
  if (!rows.length) return null;
  const longest = Math.max(...rows.map((row) => row.total));
  const bars = rows.map(({ run, index, parts, total }) => {
    const bar = el("div", { class: "bar-parts", role: "img", "aria-label": parts.map((one) => `${one.part} ${number(one.seconds)} s`).join(", ") });
    bar.style.width = `${(total / longest) * 100}%`;
    parts.forEach((one, place) => {
      const piece = el("i", { class: colourOf(place), title: `${one.part}: ${number(one.seconds)} s, ${Math.round((one.seconds / total) * 100)} %` });
      piece.style.flexGrow = String(one.seconds / total);
      bar.append(piece);
    });
    return [runs.length > 1 ? runName(run, index) : el("span", { text: "now" }), el("div", { class: "track" }, bar), el("span", { class: "quiet", text: `${number(total)} s` })];
  });
  const legend = el("ul", { class: "legend" }, PARTS.map((part, place) => el("li", { class: colourOf(place), text: part })));
  return el("figure", { class: "steps" }, el("figcaption", {}, el("h3", { text: "Where the time goes: seconds per 1000 images" }), legend), el("div", { class: "bars" }, bars.flat()));
};

const eventsSection = (runs) => {
  const events = runs.flatMap((run, index) => run.events.map((event) => ({ run, index, event }))).sort((a, b) => a.event.time - b.event.time);
  if (!events.length) return section("Events", el("p", { class: "empty", text: "No events yet." }));
  const several = runs.length > 1;
  const rows = events.map(({ run, index, event }) =>
    el(
      "tr",
      { class: event.mark ? "marked" : null },
      cell(date(event.time), "when"),
      several ? cell(runName(run, index)) : null,
      cell(number(event.kimg), "number"),
      cell(event.event, "event"),
      cell(event.detail, "detail"),
    ),
  );
  const list = table([{ text: "time (UTC)" }, ...(several ? [{ text: "run" }] : []), { text: "kimg", kind: "number" }, { text: "event" }, { text: "details" }], rows);
  return section("Events", events.length > MOST_UNFOLDED ? el("details", {}, el("summary", { text: `${events.length} events` }), list) : list);
};

const differencesSection = (data) => {
  if (data.runs.length < 2) return null;
  if (!data.differing.length) return section("What differs", el("p", { class: "empty", text: "The jobs are the same." }));
  const rows = data.differing.map(([name, values]) => el("tr", {}, el("th", { scope: "row", text: name }), values.map((value) => cell(value))));
  return section("What differs", table([{ text: "field of the job" }, ...data.runs.map((run) => ({ text: run.name }))], rows));
};

const pairs = (list) => el("dl", { class: "pairs" }, list.flatMap(([name, shown, whole]) => [el("dt", { text: name }), el("dd", { text: shown, title: whole !== shown ? whole : null })]));

const provenanceSection = (runs) =>
  section(
    "Provenance",
    runs.map((run, index) => {
      const job = run.job.trim() ? el("details", {}, el("summary", { text: "job.yaml" }), el("pre", { text: run.job, tabindex: 0 })) : el("p", { class: "empty", text: "job.yaml is missing." });
      const facts = pairs(run.facts.map(([name, value]) => [name, name === "created" ? `${date(Number(value))} UTC` : value, value]));
      return runs.length > 1 ? el("details", {}, el("summary", {}, runName(run, index)), facts, job) : el("div", {}, facts, job);
    }),
  );

const reportOf = (data) => {
  charts.length = 0;
  return [
    headerOf(data),
    el(
      "main",
      {},
      samplesSection(data.runs),
      curvesSections(data),
      differencesSection(data),
      ...moreSections.map((draw) => draw(data)),
      eventsSection(data.runs),
      provenanceSection(data.runs),
    ),
  ];
};

const pageData = JSON.parse(document.getElementById("data").textContent);
if (pageData.runs && !pageData.board) {
  const written = `Written by Bessemer ${pageData.version} on ${date(pageData.written)} UTC from ${plural(pageData.runs.reduce((sum, run) => sum + run.records, 0), "record")}.`;
  document.body.append(...reportOf(pageData), el("footer", { text: written }));
}

// Folded parts are printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
