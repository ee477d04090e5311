// Charts. The plot area is an SVG that stretches with the page (lines keep their width through `non-scaling-stroke`);
// tick labels are HTML placed by percentages, so that text keeps its size on a phone and in print. One crosshair runs
// through all charts of the page.

const SIDE = 1000; // of the SVG's own coordinates
const LOG_RATIO = 100;

const scaleOf = (low, high, log) => ({
  low,
  high,
  log,
  fraction: log
    ? (value) => (Math.log(value) - Math.log(low)) / (Math.log(high) - Math.log(low))
    : (value) => (value - low) / (high - low),
});

const valueScale = (low, high) => {
  const size = Math.max(Math.abs(low), Math.abs(high));
  if (size < 1e-290) return scaleOf(0, 1, false);
  if (high - low <= 1e-9 * size) return scaleOf(low - 0.1 * size, high + 0.1 * size, false);
  if (low > 1e-290 && high / low > LOG_RATIO) return scaleOf(low / 1.2, high * 1.2, true);
  if (low >= 0 && low < 0.4 * high) return scaleOf(0, high * 1.06, false);
  const margin = 0.06 * (high - low);
  return scaleOf(low - margin, high + margin, false);
};

const ticksOf = (scale, count) => {
  if (scale.log) {
    const first = Math.ceil(Math.log10(scale.low) - 1e-9);
    const last = Math.floor(Math.log10(scale.high) + 1e-9);
    const step = Math.max(1, Math.round((last - first) / count));
    const powers = [];
    for (let power = first; power <= last; power += step) powers.push(10 ** power);
    if (last - first > 1) return { values: powers, step: undefined };
    const fine = [];
    for (let power = first - 1; power <= last; power += 1) for (const factor of [1, 2, 5]) fine.push(factor * 10 ** power);
    return { values: fine.filter((value) => value >= scale.low && value <= scale.high), step: undefined };
  }
  const rough = (scale.high - scale.low) / count;
  const power = 10 ** Math.floor(Math.log10(rough));
  const step = power * [1, 2, 2.5, 5, 10].find((factor) => factor * power >= rough * 0.75);
  const values = [];
  const [begin, end] = [Math.ceil(scale.low / step - 1e-6), Math.floor(scale.high / step + 1e-6)];
  for (let index = begin; index <= end && values.length < 20; index += 1) values.push(index * step);
  return { values, step };
};

const px = (fraction) => String(Math.round(Math.min(Math.max(fraction, -1), 2) * SIDE * 10) / 10);
const percent = (fraction) => `${(fraction * 100).toFixed(3)}%`;

const charts = []; // all that are on the page, for the crosshair

const extremes = (values) => {
  let [low, high] = [Infinity, -Infinity];
  for (const value of values) {
    if (value < low) low = value;
    if (value > high) high = value;
  }
  return [low, high];
};

// One line: {label, colour, x, y, low, high, error, dots}.
const drawLine = (line, x, y) => {
  const at = (index, values) => `${px(x.fraction(line.x[index]))} ${px(1 - y.fraction(values[index]))}`;
  const indices = [...line.x.keys()];
  const parts = [];
  if (line.low && line.high) {
    const upper = indices.map((index) => at(index, line.high));
    const lower = indices.map((index) => at(index, line.low)).reverse();
    parts.push(svg("path", { class: "band", d: `M${upper.concat(lower).join("L")}Z` }));
  }
  if (indices.length > 1) parts.push(svg("path", { class: "line", d: `M${indices.map((index) => at(index, line.y)).join("L")}` }));
  // A line of no length with round ends is a dot that stays round while the area stretches.
  if (line.dots || indices.length === 1) {
    for (const index of indices) parts.push(svg("path", { class: "dot", d: `M${at(index, line.y)}h.001` }));
  }
  return svg("g", { class: `series ${line.colour}` }, ...parts);
};

const spreadText = (line, index) => {
  if (line.error && line.error[index] !== null) return plusMinus(line.error[index]);
  if (line.error || !line.low || line.high[index] <= line.low[index]) return "";
  return `(${number(line.low[index])} to ${number(line.high[index])})`;
};

// Draws one chart. `range` is that of the x axis, shared by all charts so that they line up; `unit` names it. Without
// `legend` the colours are explained elsewhere on the page.
const chart = ({ title, lines, range, unit, markers = [], note = "", tall = false, legend: hasLegend = true }) => {
  const drawn = lines
    .filter((line) => line.x.length)
    .map((line) => {
      if (!line.error || !line.error.some((error) => error)) return line;
      const errors = line.error.map((error) => error ?? 0);
      return { ...line, low: line.y.map((value, i) => value - errors[i]), high: line.y.map((value, i) => value + errors[i]) };
    });
  const legend = hasLegend && lines.some((line) => line.label) ? lines.map((line) => el("li", { class: line.colour, text: line.label })) : [];
  const caption = el("figcaption", {}, el("h3", { text: title }), legend.length ? el("ul", { class: "legend" }, legend) : null);
  if (!drawn.length) return el("figure", { class: "chart" }, caption, el("p", { class: "empty", text: `No values yet. ${note}` }));

  const [low, high] = extremes(drawn.flatMap((line) => [...(line.low ?? line.y), ...(line.high ?? line.y)]));
  const [x, y] = [scaleOf(range[0], range[1], false), valueScale(low, high)];
  const [xTicks, yTicks] = [ticksOf(x, 5), ticksOf(y, 4)];
  const plot = svg("svg", { viewBox: `0 0 ${SIDE} ${SIDE}`, preserveAspectRatio: "none", role: "img" });
  plot.setAttribute(
    "aria-label",
    `${title} against ${unit}: ${drawn.map((line) => `${line.label || title} from ${number(line.y[0])} to ${number(line.y.at(-1))}`).join("; ")}`,
  );
  for (const value of yTicks.values) plot.append(svg("path", { class: "grid", d: `M0 ${px(1 - y.fraction(value))}H${SIDE}` }));
  for (const marker of markers) {
    const line = svg("path", { class: `marker ${marker.mark} ${marker.colour}`, d: `M${px(x.fraction(marker.at))} 0V${SIDE}` });
    line.append(svg("title"));
    line.firstChild.textContent = marker.label;
    plot.append(line);
  }
  for (const line of drawn) plot.append(drawLine(line, x, y));

  const label = (value, step, side, scale) => {
    const node = el("span", { text: number(value, step) });
    node.style[side] = percent(scale.fraction(value));
    return node;
  };
  const cursor = el("i", { class: "cursor", hidden: true });
  const readout = el("output", { class: "readout", hidden: true });
  const area = el("div", { class: "area" }, plot, cursor, readout);
  const notes = [y.log ? "Logarithmic scale." : "", note].filter(Boolean).join(" ");
  const figure = el(
    "figure",
    { class: tall ? "chart tall" : "chart", tabindex: 0 },
    caption,
    el(
      "div",
      { class: "plot" },
      el("div", { class: "ylabels", "aria-hidden": "true" }, yTicks.values.map((value) => label(value, yTicks.step, "bottom", y))),
      area,
      el("div", { class: "xlabels", "aria-hidden": "true" }, xTicks.values.map((value) => label(value, xTicks.step, "left", x)), el("b", { text: unit })),
    ),
    notes ? el("p", { class: "note", text: notes }) : null,
  );
  const one = { figure, area, cursor, readout, drawn, x, unit, markers };
  charts.push(one);
  listen(one);
  return figure;
};

const nearest = (values, wanted) => {
  let [low, high] = [0, values.length - 1];
  while (high - low > 1) {
    const middle = (low + high) >> 1;
    if (values[middle] < wanted) low = middle;
    else high = middle;
  }
  return Math.abs(values[high] - wanted) < Math.abs(values[low] - wanted) ? high : low;
};

// The crosshair goes through all charts; the one under the pointer, or with the focus, says the values.
const pointAt = (chosen, value) => {
  for (const one of charts) {
    if (!one.figure.isConnected) continue;
    const fraction = one.x.fraction(value);
    one.cursor.hidden = fraction < 0 || fraction > 1;
    one.cursor.style.left = percent(fraction);
    one.readout.hidden = one !== chosen;
    if (one !== chosen) continue;
    const reach = 0.02 * (one.x.high - one.x.low);
    const near = one.markers.filter((marker) => Math.abs(marker.at - value) < reach);
    one.readout.replaceChildren(
      el("b", { text: `${number(value)} ${one.unit}` }),
      ...one.drawn.map((line) => {
        const index = nearest(line.x, value);
        return el("span", { class: line.colour, text: `${line.label} ${number(line.y[index])} ${spreadText(line, index)}`.trim() });
      }),
      ...near.slice(0, 4).map((marker) => el("em", { text: marker.label })),
    );
    one.readout.style.left = fraction < 0.5 ? `calc(${percent(fraction)} + 10px)` : "auto";
    one.readout.style.right = fraction < 0.5 ? "auto" : `calc(${percent(1 - fraction)} + 10px)`;
  }
};

const pointAway = () => {
  for (const one of charts) one.cursor.hidden = one.readout.hidden = true;
};

const listen = (one) => {
  const longest = one.drawn.reduce((best, line) => (line.x.length > best.x.length ? line : best));
  let index = longest.x.length - 1;
  one.area.addEventListener("pointermove", (event) => {
    const box = one.area.getBoundingClientRect();
    const value = one.x.low + ((event.clientX - box.left) / box.width) * (one.x.high - one.x.low);
    index = nearest(longest.x, value);
    pointAt(one, longest.x[index]);
  });
  one.area.addEventListener("pointerleave", pointAway);
  one.figure.addEventListener("focus", () => one.figure.matches(":focus-visible") && pointAt(one, longest.x[index]));
  one.figure.addEventListener("blur", pointAway);
  one.figure.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1, PageUp: -10, PageDown: 10, Home: -Infinity, End: Infinity }[event.key];
    if (!step) return;
    event.preventDefault();
    index = Math.min(Math.max(index + step, 0), longest.x.length - 1);
    pointAt(one, longest.x[index]);
  });
};
