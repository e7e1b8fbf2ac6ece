"""The look of the page: light and dark, desk, phone and paper. No fonts or files from elsewhere."""

from __future__ import annotations

CSS = """
:root {
  color-scheme: light dark;
  --blue: #0072b2; --ink: #1b1f24; --muted: #57606b; --grid: #d9dee4; --paper: #ffffff; --empty: #e9edf1;
  --back: #f5f6f8; --line: #dfe3e8; --link: #00588c; --code: #f1f3f5; --shade: rgb(0 0 0 / .16);
}
@media (prefers-color-scheme: dark) {
  :root {
    --blue: #56b4e9; --ink: #e7eaee; --muted: #a3acb6; --grid: #3a424b; --paper: #1a1e23; --empty: #2b323a;
    --back: #121519; --line: #333b44; --link: #7cc4f0; --code: #232930; --shade: rgb(0 0 0 / .55);
  }
}
* { box-sizing: border-box; }
html { -webkit-text-size-adjust: 100%; scroll-behavior: smooth; }
body {
  margin: 0; background: var(--back); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
}
a { color: var(--link); }
header, main, footer { max-width: 60rem; margin: 0 auto; padding: 0 1.25rem; }
header { padding-top: 2.2rem; }
h1 { font-size: 1.75rem; line-height: 1.2; margin: 0 0 .3rem; overflow-wrap: anywhere; letter-spacing: -.01em; }
h2 { font-size: 1.35rem; line-height: 1.25; margin: 2.6rem 0 .8rem; overflow-wrap: anywhere; }
h3 { font-size: 1.02rem; margin: 0 0 .8rem; }
h4 { font-size: .95rem; margin: 0 0 .5rem; }
p { margin: .4rem 0 .8rem; max-width: 46rem; }
.lead { color: var(--muted); overflow-wrap: anywhere; }
nav { margin: 1rem 0 0; display: flex; flex-wrap: wrap; gap: .35rem .5rem; font-size: .88rem; }
nav a {
  text-decoration: none; border: 1px solid var(--line); background: var(--paper); border-radius: 99px;
  padding: .15rem .75rem; overflow-wrap: anywhere;
}
.card {
  background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 1.1rem 1.25rem;
  margin: 0 0 1rem;
}
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(10.5rem, 1fr)); gap: .75rem; margin: 0 0 1rem; }
.tile { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: .8rem 1rem; }
.tile b { display: block; font-size: 1.5rem; line-height: 1.25; letter-spacing: -.01em; }
.tile span { display: block; color: var(--muted); font-size: .85rem; }
.tile span.name { color: var(--ink); }
figure { margin: 0; }
figure + figure, figure + .scroll, .scroll + figure, figure + details, .scroll + details { margin-top: 1.4rem; }
.picture svg { display: block; max-width: 100%; height: auto; margin: 0 auto; }
.picture svg text { font-family: system-ui, -apple-system, "Segoe UI", Roboto, Arial, sans-serif !important; }
.narrow { display: none; }
figcaption { color: var(--muted); font-size: .88rem; margin-top: .6rem; max-width: 46rem; }
.files { white-space: nowrap; }
.scroll {
  overflow-x: auto; max-width: 100%;
  background:
    linear-gradient(to right, var(--paper) 30%, transparent) left / 2rem 100% no-repeat local,
    linear-gradient(to left, var(--paper) 30%, transparent) right / 2rem 100% no-repeat local,
    linear-gradient(to right, var(--shade), transparent) left / .7rem 100% no-repeat scroll,
    linear-gradient(to left, var(--shade), transparent) right / .7rem 100% no-repeat scroll;
}
table { border-collapse: collapse; font-size: .88rem; font-variant-numeric: tabular-nums; min-width: 100%; }
th, td { text-align: right; padding: .3rem .6rem; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--muted); font-weight: 600; vertical-align: bottom; white-space: normal; }
th.text, td.text { text-align: left; }
th:first-child, td:first-child { padding-left: 0; }
tbody tr:last-child td { border-bottom: 0; }
td.text:first-child { white-space: normal; overflow-wrap: anywhere; min-width: 8rem; }
table.steps td.text:first-child { min-width: 0; }
dl { margin: 0; display: grid; gap: .35rem; }
dl > div { display: grid; grid-template-columns: 9.5rem minmax(0, 1fr); gap: .75rem; }
dt { color: var(--muted); }
dd { margin: 0; overflow-wrap: anywhere; }
pre {
  background: var(--code); border-radius: 8px; padding: .75rem .9rem; margin: .4rem 0 .9rem;
  white-space: pre-wrap; overflow-wrap: anywhere;
  font: .84rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, monospace;
}
details { margin-top: .9rem; }
summary { cursor: pointer; color: var(--link); font-size: .92rem; }
details .scroll { margin-top: .6rem; }
.stage { display: inline-block; width: .7em; height: .7em; border-radius: 2px; margin-right: .45em; }
footer { color: var(--muted); font-size: .85rem; padding-top: 1.5rem; padding-bottom: 2.5rem; }
@media (max-width: 640px) {
  body { font-size: 15px; }
  header, main, footer { padding-left: .8rem; padding-right: .8rem; }
  header { padding-top: 1.3rem; }
  .card { padding: .9rem .8rem; border-radius: 10px; }
  .wide { display: none; }
  .narrow { display: block; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); gap: .55rem; }
  .tile { padding: .65rem .75rem; }
  .tile b { font-size: 1.2rem; }
  table { font-size: .8rem; }
  th, td { padding: .3rem .4rem; }
  table:not(.steps) :is(th, td) { white-space: normal; }
  td.text:first-child { min-width: 5.5rem; }
  pre { font-size: .78rem; }
  dl > div { grid-template-columns: minmax(0, 1fr); gap: 0; }
  dl { gap: .55rem; }
}
@media print {
  :root {
    color-scheme: light;
    --blue: #0072b2; --ink: #1b1f24; --muted: #57606b; --grid: #d9dee4; --paper: #ffffff; --empty: #e9edf1;
    --back: #ffffff; --line: #dfe3e8; --link: #1b1f24; --code: #f6f7f8;
  }
  @page { margin: 14mm; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  body { font-size: 10.5pt; }
  header, main, footer { max-width: none; padding-left: 0; padding-right: 0; }
  nav, .files { display: none; }
  .wide { display: block; }
  .narrow { display: none; }
  .card, .tile { border-radius: 0; }
  .card { border: 0; padding: 0; margin-bottom: 1.2rem; }
  .tiles { grid-template-columns: repeat(4, minmax(0, 1fr)); }
  figure, .tile, tr, pre { break-inside: avoid; }
  h2, h3, h4 { break-after: avoid; }
  .scroll { overflow: visible; background: none; }
  th, td { white-space: normal; padding: .2rem .4rem; font-size: 8.5pt; }
  details::details-content { content-visibility: visible; display: block; block-size: auto; }
  section.run + section.run { break-before: page; }
}
""".strip()
