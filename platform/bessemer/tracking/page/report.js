"use strict";

// Charts: a readout of the values nearest to the pointer; arrow keys move it when a chart has the focus.
for (const chart of document.querySelectorAll("figure.chart[data-low]")) {
  const area = chart.querySelector(".area");
  const cursor = chart.querySelector(".cursor");
  const readout = chart.querySelector(".readout");
  const low = Number(chart.dataset.low);
  const high = Number(chart.dataset.high);
  const series = [...chart.querySelectorAll(".series")].map((group) => ({
    label: group.dataset.label,
    colour: [...group.classList].find((name) => /^c\d$/.test(name)),
    points: JSON.parse(group.dataset.points),
  }));
  const stops = [...new Set(series.flatMap((one) => one.points.map((point) => point[0])))].sort((a, b) => a - b);
  let stop = stops.length - 1;

  const show = () => {
    const kimg = stops[stop];
    const fraction = (kimg - low) / (high - low);
    readout.replaceChildren();
    const head = document.createElement("b");
    head.textContent = `${Number(kimg.toPrecision(6))} kimg`;
    readout.append(head);
    for (const one of series) {
      const point = one.points.find((candidate) => candidate[0] === kimg);
      if (!point) continue;
      const row = document.createElement("span");
      row.className = one.colour;
      row.textContent = `${one.label} ${point[1]} ${point[2]}`.trim();
      readout.append(row);
    }
    cursor.style.left = `${fraction * 100}%`;
    readout.style.left = fraction < 0.5 ? `calc(${fraction * 100}% + 8px)` : "auto";
    readout.style.right = fraction < 0.5 ? "auto" : `calc(${(1 - fraction) * 100}% + 8px)`;
    cursor.hidden = readout.hidden = false;
  };
  const hide = () => {
    cursor.hidden = readout.hidden = true;
  };
  area.addEventListener("pointermove", (event) => {
    const box = area.getBoundingClientRect();
    const kimg = low + ((event.clientX - box.left) / box.width) * (high - low);
    stop = stops.reduce((best, value, index) => (Math.abs(value - kimg) < Math.abs(stops[best] - kimg) ? index : best), 0);
    show();
  });
  area.addEventListener("pointerleave", hide);
  chart.addEventListener("focus", () => chart.matches(":focus-visible") && show());
  chart.addEventListener("blur", hide);
  chart.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (!step) return;
    event.preventDefault();
    stop = Math.min(Math.max(stop + step, 0), stops.length - 1);
    show();
  });
}

// Sample grids over time.
const slider = document.querySelector("#grid-slider");
if (slider) {
  const frames = [...document.querySelectorAll(".frame")];
  const label = document.querySelector("#grid-label");
  const show = () => {
    frames.forEach((frame, index) => {
      frame.hidden = index !== Number(slider.value);
    });
    label.textContent = frames[slider.value].dataset.label;
    slider.setAttribute("aria-valuetext", label.textContent);
  };
  slider.addEventListener("input", show);
  for (const button of document.querySelectorAll("[data-step]")) {
    button.addEventListener("click", () => {
      slider.value = Number(slider.value) + Number(button.dataset.step);
      show();
    });
  }
  show();
}

// Click or Enter on a picture shows it as large as the window.
const zoom = document.querySelector("#zoom");
for (const button of document.querySelectorAll("button.picture")) {
  button.addEventListener("click", () => {
    const small = button.querySelector("img");
    const large = zoom.querySelector("img");
    large.src = small.src;
    large.alt = small.alt;
    const factor = Math.min((innerWidth * 0.96) / small.naturalWidth, (innerHeight * 0.9) / small.naturalHeight);
    large.style.width = `${small.naturalWidth * (factor > 1 ? Math.floor(factor * 2) / 2 : factor)}px`;
    zoom.showModal();
  });
}
zoom.addEventListener("click", () => zoom.close());

// Folded parts are printed too.
addEventListener("beforeprint", () => document.querySelectorAll("details").forEach((part) => (part.open = true)));
