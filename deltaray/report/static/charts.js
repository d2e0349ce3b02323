// Draws the figures, themes them from the style sheet's variables, and serves the training controls.
"use strict";
(() => {
  const figures = JSON.parse(document.getElementById("figure-data").textContent);
  const scheme = window.matchMedia("(prefers-color-scheme: dark)");
  const finePointer = window.matchMedia("(pointer: fine)").matches;
  const hiddenGroups = new Set();
  let smooth = true;

  // "@name" anywhere in a figure stands for the CSS variable --name.
  function themed(value, style) {
    if (typeof value === "string" && value.startsWith("@")) {
      return style.getPropertyValue("--" + value.slice(1)).trim();
    }
    if (Array.isArray(value)) return value.map((item) => themed(item, style));
    if (value && typeof value === "object") {
      return Object.fromEntries(Object.entries(value).map(([key, item]) => [key, themed(item, style)]));
    }
    return value;
  }

  // A centred moving average over about a twentieth of the curve.
  function averaged(values) {
    const reach = Math.max(1, Math.round(values.length / 40));
    return values.map((_, i) => {
      const part = values.slice(Math.max(0, i - reach), i + reach + 1);
      return part.reduce((sum, value) => sum + value, 0) / part.length;
    });
  }

  function traces(figure) {
    if (figure.kind !== "curve") return figure.data;
    const shown = figure.data.filter((trace) => !hiddenGroups.has(trace.meta));
    if (!smooth) return shown;
    const faint = shown.map((trace) => ({ ...trace, opacity: 0.25, hoverinfo: "skip", hovertemplate: null }));
    return [...faint, ...shown.map((trace) => ({ ...trace, y: averaged(trace.y), line: { ...trace.line, width: 2.2 } }))];
  }

  function draw(figure) {
    const style = getComputedStyle(document.documentElement);
    const layout = themed(figure.layout, style);
    layout.font.family = getComputedStyle(document.body).fontFamily;
    layout.dragmode = figure.kind === "curve" && finePointer ? "zoom" : false;
    const options = { displayModeBar: false, responsive: true, doubleClick: "reset" };
    const place = document.getElementById(figure.id);
    Plotly.react(place, themed(traces(figure), style), layout, options);
    place.dataset.drawn = scheme.matches ? "dark" : "light";
  }

  // Charts are drawn when they come near the window: a study may have dozens.
  const near = new IntersectionObserver((entries) => {
    for (const entry of entries.filter((item) => item.isIntersecting)) {
      near.unobserve(entry.target);
      draw(figures.find((figure) => figure.id === entry.target.id));
    }
  }, { rootMargin: "600px" });

  const drawn = () => figures.filter((figure) => document.getElementById(figure.id).dataset.drawn);

  for (const figure of figures) near.observe(document.getElementById(figure.id));
  scheme.addEventListener("change", () => drawn().forEach(draw));
  window.addEventListener("beforeprint", () => figures.forEach(draw));

  const redrawCurves = () => drawn().filter((figure) => figure.kind === "curve").forEach(draw);
  for (const box of document.querySelectorAll("input[data-group]")) {
    box.checked = true;
    box.addEventListener("change", () => {
      hiddenGroups[box.checked ? "delete" : "add"](box.dataset.group);
      redrawCurves();
    });
  }
  const smoothing = document.getElementById("smooth");
  if (smoothing) smoothing.checked = true;
  smoothing?.addEventListener("change", (event) => {
    smooth = event.target.checked;
    redrawCurves();
  });
})();
