"""Style and script of a search's report: light or dark as the reader's system is, plots drawn when they are seen."""

from __future__ import annotations

STYLE = """
:root { color-scheme: light dark; --text: #1d2530; --dim: #5d6b7c; --back: #f5f6f8; --card: #ffffff; --line: #dde2e8;
  --mark: #e7f1fb; }
@media (prefers-color-scheme: dark) { :root { --text: #e3e7ec; --dim: #9aa7b5; --back: #15191f; --card: #1d232b;
  --line: #323b46; --mark: #22384d; } }
* { box-sizing: border-box; }
body { margin: 0; background: var(--back); color: var(--text); font: 15px/1.5 system-ui, sans-serif; }
main { max-width: 1320px; margin: 0 auto; padding: 24px; }
h1 { font-size: 26px; margin: 0 0 12px; overflow-wrap: anywhere; }
h2 { font-size: 16px; margin: 0 0 8px; overflow-wrap: anywhere; }
dl { display: flex; flex-wrap: wrap; gap: 10px 36px; margin: 0; }
dt { color: var(--dim); font-size: 13px; }
dd { margin: 0; overflow-wrap: anywhere; }
section, header { background: var(--card); border: 1px solid var(--line); border-radius: 8px; padding: 16px 20px;
  margin: 0 0 16px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(390px, 1fr)); gap: 16px; margin: 0 0 16px; }
.grid section { margin: 0; min-width: 0; }
.plot { width: 100%; }
.none { color: var(--dim); font-style: italic; margin: 0; }
.caption { color: var(--dim); font-size: 13px; margin: 4px 0 0; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 13px; margin-top: 8px; }
th, td { text-align: left; padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: top;
  overflow-wrap: anywhere; min-width: 3em; max-width: 32em; }
th { color: var(--dim); font-weight: 600; }
td.number { font-variant-numeric: tabular-nums; white-space: nowrap; }
.sortable th { cursor: pointer; }
.sortable tr.best td { background: var(--mark); }
"""

SCRIPT = """
"use strict";
const dark = matchMedia("(prefers-color-scheme: dark)");
function themed(layout) {
  const text = dark.matches ? "#c9d1da" : "#3b4754", grid = dark.matches ? "#323b46" : "#e3e7ec";
  const copy = structuredClone(layout);
  copy.paper_bgcolor = copy.plot_bgcolor = "rgba(0,0,0,0)";
  copy.font = {color: text, size: 12};
  copy.modebar = {bgcolor: "rgba(0,0,0,0)", color: grid, activecolor: text};
  for (const note of copy.annotations || []) note.bgcolor = dark.matches ? "#1d232bb0" : "#ffffffb0";
  for (const name of Object.keys(copy)) {
    if (/^[xy]axis/.test(name)) Object.assign(copy[name], {gridcolor: grid, zerolinecolor: grid, linecolor: grid});
  }
  return copy;
}
const figures = new Map();
for (const source of document.querySelectorAll("script[data-plot]")) {
  figures.set(source.dataset.plot, source);
}
function draw(element) {
  const figure = JSON.parse(figures.get(element.id).textContent);
  Plotly.react(element, figure.data, themed(figure.layout), {responsive: true, displaylogo: false});
}
const seen = new IntersectionObserver(entries => {
  for (const entry of entries) {
    if (entry.isIntersecting) { seen.unobserve(entry.target); draw(entry.target); }
  }
}, {rootMargin: "600px"});
document.querySelectorAll(".plot").forEach(element => seen.observe(element));
dark.addEventListener("change", () => document.querySelectorAll(".plot.js-plotly-plot").forEach(draw));
for (const head of document.querySelectorAll(".sortable th")) {
  head.addEventListener("click", () => {
    const body = head.closest("table").tBodies[0], column = head.cellIndex;
    const down = head.dataset.order !== "down";
    head.dataset.order = down ? "down" : "up";
    const value = row => row.cells[column].textContent;
    const rank = (a, b) => {
      const [left, right] = [value(a), value(b)];
      if (left === "" || right === "") return (left === "") - (right === "");
      const [x, y] = [Number(left), Number(right)];
      const order = isNaN(x) || isNaN(y) ? left.localeCompare(right) : x - y;
      return down ? -order : order;
    };
    body.append(...[...body.rows].sort(rank));
  });
}
"""
