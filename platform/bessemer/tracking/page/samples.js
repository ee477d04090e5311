// Sample grids over time, one slider for all runs; and a dialog that shows any picture as large as the window.

const samplesSection = (runs) => {
  const having = runs.map((run, index) => ({ run, index })).filter(({ run }) => run.pictures.grids.length || run.pictures.real);
  const notes = runs.flatMap((run) => run.pictures.notes.map((note) => (runs.length > 1 ? `${run.name}: ${note}` : note)));
  const remarks = notes.map((note) => el("p", { class: "note", text: note }));
  if (!having.length) return section("Samples", el("p", { class: "empty", text: "No sample grid yet: each evaluation draws one." }), ...remarks);
  const stops = [...new Set(having.flatMap(({ run }) => run.pictures.grids.map((grid) => grid.kimg)))].sort((a, b) => a - b);
  const zoom = zoomDialog();
  const panels = having
    .filter(({ run }) => run.pictures.grids.length)
    .map(({ run, index }) => {
      const picture = pictureButton(run.pictures.grids.at(-1), zoom);
      const player = playerOf(zoom);
      const when = el("span");
      const panel = el("figure", { class: "shown" }, el("figcaption", {}, runs.length > 1 ? runName(run, index) : el("b", { text: "Samples" }), when), picture.node, player.node);
      const show = (kimg) => {
        // The newest grid that the run had drawn by then.
        const grids = run.pictures.grids;
        const grid = grids.filter((one) => one.kimg <= kimg).at(-1) ?? grids[0];
        picture.show(grid, `${run.name}, ${grid.label}`);
        player.show(grid.plays, `${run.name}, ${grid.label}, played`);
        when.textContent = grid.label;
      };
      return { panel, show };
    });
  const content = (picture) => picture.src.split("?v=").at(-1); // an address says what it leads to
  const reals = new Map(having.filter(({ run }) => run.pictures.real).map(({ run }) => [content(run.pictures.real), run]));
  const realPanels = [...reals.values()].map((run) => {
    const picture = pictureButton(run.pictures.real, zoom);
    picture.show(run.pictures.real, "Real images");
    const player = playerOf(zoom);
    player.show(run.pictures.real.plays, "Real data, played");
    return el("figure", { class: "shown" }, el("figcaption", {}, el("b", { text: run.pictures.real.plays ? "Real data" : "Real images" }), el("span", { text: reals.size > 1 ? run.name : "from the data set" })), picture.node, player.node);
  });
  const slider = el("input", { type: "range", id: "grid-slider", min: 0, max: Math.max(stops.length - 1, 0), value: stops.length - 1, step: 1, "aria-label": "Samples over time" });
  const label = el("output", { for: "grid-slider", id: "grid-label" });
  if (remembered.kimg !== null) slider.value = stops.filter((kimg) => kimg <= remembered.kimg).length - 1;
  const show = () => {
    const kimg = stops[slider.value] ?? 0;
    remembered.kimg = Number(slider.value) === stops.length - 1 ? null : kimg; // the newest stays the newest
    label.textContent = `${number(kimg)} kimg`;
    slider.setAttribute("aria-valuetext", label.textContent);
    for (const panel of panels) panel.show(kimg);
    if (zoom.dialog.open) zoom.refresh();
  };
  const step = (by) => {
    slider.value = Number(slider.value) + by;
    show();
  };
  slider.addEventListener("input", show);
  zoom.onStep = step;
  const scrub = el(
    "div",
    { class: "scrub" },
    el("button", { type: "button", "aria-label": "Earlier", text: "\u2039", on: { click: () => step(-1) } }),
    slider,
    el("button", { type: "button", "aria-label": "Later", text: "\u203a", on: { click: () => step(1) } }),
    label,
  );
  show();
  const hint = "The same latents and classes in every grid of a run, drawn from the averaged weights. Click a picture to enlarge it; arrow keys move through time there too.";
  return section(
    "Samples",
    stops.length > 1 ? scrub : null,
    el("div", { class: panels.length + realPanels.length > 3 ? "panels" : "panels few" }, panels.map((one) => one.panel), realPanels),
    el("p", { class: "hint", text: hint }),
    ...remarks,
    ...sheets(runs, zoom),
    zoom.dialog,
  );
};

const sheets = (runs, zoom) =>
  runs.flatMap((run, index) =>
    run.pictures.sheets.length
      ? [
          el("h3", { class: "part" }, runs.length > 1 ? runName(run, index) : "Sheets"),
          el(
            "div",
            { class: "panels few" },
            run.pictures.sheets.map((sheet) => {
              const picture = pictureButton(sheet, zoom);
              picture.show(sheet, `${run.name}, ${sheet.label}`);
              return el(
                "figure",
                { class: "shown" },
                el("figcaption", {}, el("b", { text: sheet.label }), el("span", { text: `${number(sheet.kimg)} kimg` })),
                picture.node,
                sheet.note ? el("p", { class: "note", text: sheet.note }) : null,
              );
            }),
          ),
        ]
      : [],
  );

const isPicture = (source) => /^(data:(image\/(png|gif)|audio\/wav);base64,|\/pictures\/)/.test(source);

const pictureButton = (first, zoom) => {
  const image = el("img", { width: first.width, height: first.height, alt: "", decoding: "async" });
  const node = el("button", { type: "button", class: "picture", on: { click: () => zoom.open(image) } }, image);
  const show = (picture, label) => {
    if (isPicture(picture.src)) image.src = picture.src;
    image.alt = label;
    node.setAttribute("aria-label", `Enlarge: ${label}`);
  };
  return { node, show };
};

// Sound has controls. Clips move, unless they are folded, as they are from the start where people ask for less motion.
const playerOf = (zoom) => {
  const node = el("div", { class: "player" });
  let now = null;
  const show = (media, label) => {
    if ((media?.src ?? null) === now) return; // what plays goes on playing
    now = media?.src ?? null;
    node.replaceChildren();
    if (!media || !isPicture(media.src)) return;
    if (media.type === "audio/wav") node.append(el("audio", { controls: true, preload: "metadata", src: media.src, "aria-label": label }));
    else {
      const clip = pictureButton(media, zoom);
      clip.show(media, label);
      const still = matchMedia("(prefers-reduced-motion: reduce)").matches;
      node.append(el("details", { open: !still }, el("summary", { text: "Moving" }), clip.node));
    }
  };
  return { node, show };
};

const zoomDialog = () => {
  const image = el("img", { alt: "" });
  const label = el("p");
  const dialog = el("dialog", { id: "zoom", "aria-label": "Enlarged picture" }, image, el("form", { method: "dialog" }, label, el("button", { text: "Close" })));
  const zoom = { dialog, source: null, onStep: () => {} };
  zoom.refresh = () => {
    image.src = zoom.source.src;
    image.alt = label.textContent = zoom.source.alt;
    const [width, height] = [zoom.source.naturalWidth || 1, zoom.source.naturalHeight || 1];
    const factor = Math.min((innerWidth * 0.96) / width, (innerHeight * 0.86) / height);
    image.style.width = `${width * (factor > 1 ? Math.floor(factor * 2) / 2 : factor)}px`;
  };
  zoom.open = (source) => {
    zoom.source = source;
    zoom.refresh();
    dialog.showModal();
  };
  image.addEventListener("click", () => dialog.close());
  dialog.addEventListener("keydown", (event) => {
    const step = { ArrowLeft: -1, ArrowRight: 1 }[event.key];
    if (step) {
      event.preventDefault();
      zoom.onStep(step);
    }
  });
  return zoom;
};
