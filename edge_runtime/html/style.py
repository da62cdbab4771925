"""The style sheet of all pages: light and dark, wide and narrow, screen and paper."""

STYLE = """
:root {
  color-scheme: light dark;
  --paper: #f6f7f6; --card: #ffffff; --ink: #19212b; --muted: #56626e; --line: #dfe4e6; --soft: #eef1f1;
  --measured: #0f766e; --predicted: #76838f; --anonymous: #3d57b8; --file: #b07a16; --cap: #b3261e;
  --pass: #17683a; --fail: #b3261e; --rest: #8a4b9c;
}
@media (prefers-color-scheme: dark) { :root {
  --paper: #11161b; --card: #181f26; --ink: #e6ebef; --muted: #9ca9b5; --line: #2c3640; --soft: #212a33;
  --measured: #3fb6a8; --predicted: #8493a1; --anonymous: #7f95f2; --file: #d9a84c; --cap: #ff8a7d;
  --pass: #63d293; --fail: #ff8a7d; --rest: #cf9be0;
} }
* { box-sizing: border-box }
body { margin: 0; overflow-wrap: anywhere; background: var(--paper); color: var(--ink);
  font: 16px/1.55 -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif }
main { max-width: 61rem; margin: 0 auto; padding: 2.2rem 1.5rem 4rem }
h1 { font-size: 1rem; font-weight: 600; color: var(--muted); margin: 0 0 .9rem }
h2 { font-size: 1.3rem; line-height: 1.3; margin: 0 0 .35rem; letter-spacing: -.01em }
p { margin: .4rem 0 }
.lead { color: var(--muted); max-width: 46rem }
section { margin-top: 3.2rem }
.verdict { background: var(--card); border: 1px solid var(--line); border-top: 5px solid var(--tone);
  border-radius: .6rem; padding: 1.6rem 1.8rem 1.5rem }
.pass { --tone: var(--pass) }
.fail { --tone: var(--fail) }
.open { --tone: var(--muted) }
.word { font-size: 1.05rem; font-weight: 700; letter-spacing: .06em; color: var(--tone); margin: 0 }
.figure { font-size: clamp(1.5rem, 4.6vw, 2.35rem); line-height: 1.2; font-weight: 650;
  letter-spacing: -.02em; text-wrap: balance; margin: .25rem 0 1.1rem }
.failures { margin: .2rem 0 1.1rem; padding-left: 1.2rem; color: var(--fail); font-weight: 600 }
.verdict .lead { margin-top: .5rem }
.advice { font-size: 1.05rem; max-width: 50rem; margin: 0 0 .7rem }
.basis { max-width: 50rem; margin: .7rem 0 }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(8.6rem, 1fr)); gap: 1px;
  margin: 1.2rem 0 0; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  overflow: hidden }
.tiles:has(> :nth-child(7)) { grid-template-columns: repeat(4, 1fr) }
.tiles div { padding: .8rem 1rem; box-shadow: 0 0 0 1px var(--line) }
.tiles dt { font-size: .83rem; color: var(--muted) }
.tiles dd { margin: 0; font-size: 1.2rem; font-weight: 600 }
.tiles dd small { display: block; font-size: .8rem; font-weight: 400; color: var(--muted) }
.box { background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  padding: 1.1rem 1.3rem; margin: 1rem 0 0 }
.scroll { overflow-x: auto; background: var(--card); border: 1px solid var(--line); border-radius: .6rem;
  margin-top: 1rem }
.scroll:focus-visible, pre:focus-visible, summary:focus-visible { outline: 3px solid var(--anonymous);
  outline-offset: 2px }
table { border-collapse: collapse; width: 100%; font-size: .92rem; font-variant-numeric: tabular-nums }
caption { text-align: left; color: var(--muted); font-size: .85rem; padding: .7rem 1.1rem .3rem }
th, td { padding: .42rem 1.1rem; text-align: left; border-top: 1px solid var(--line);
  vertical-align: baseline; white-space: nowrap }
thead td { border-top: 0 }
thead th { border-top: 0; color: var(--muted); font-weight: 600; font-size: .85rem }
tbody th { font-weight: 500; white-space: normal; min-width: 8.6rem }
td.n, th.n { text-align: right }
.rounds th, .rounds td { padding-left: .6rem; padding-right: .6rem }
.rounds thead th { white-space: normal; vertical-align: bottom }
.rounds tbody th { min-width: 2.5rem }
td.t { white-space: normal; min-width: 8.6rem }
tr.chosen > *, tr.owner > *, tr.total > * { font-weight: 700; background: var(--soft) }
tr.no > * { color: var(--muted) }
tr.grew > * { font-weight: 700 }
.gauge { overflow: visible; margin-bottom: .6rem }
.tag { font-weight: 700 }
.tag.bad { color: var(--fail) }
.tag.good { color: var(--pass) }
.facts { background: var(--card); border: 1px solid var(--line); border-radius: .6rem; margin-top: 1rem }
.facts th { color: var(--muted); width: 1%; white-space: nowrap }
header > .lead { margin-bottom: .9rem }
.facts td { white-space: normal; overflow-wrap: anywhere }
pre { background: var(--soft); border-radius: .4rem; padding: .7rem .9rem; margin: .5rem 0 0;
  white-space: pre-wrap; overflow-x: auto;
  font: .86rem/1.5 ui-monospace, "Liberation Mono", monospace }
pre span { display: inline-block; max-width: 100%; overflow-wrap: anywhere }
figure { margin: 0 }
figcaption { color: var(--muted); font-size: .85rem; margin-bottom: .7rem }
.key { display: flex; flex-wrap: wrap; gap: .2rem 1.2rem; list-style: none; padding: 0; margin: 0 }
.key svg { width: 26px; height: 13px; margin-right: .4rem; vertical-align: -1px }
details { margin-top: .8rem }
summary { cursor: pointer; color: var(--muted); font-size: .9rem }
details .scroll { margin-top: .6rem }
summary h2 { display: inline; color: var(--ink) }
.line { fill: none; stroke-width: 2.4; stroke-linejoin: round }
.dot { stroke: var(--card); stroke-width: 1.5 }
.line-0 { stroke: var(--measured) }
.line-1 { stroke: var(--anonymous); stroke-dasharray: 7 4 }
.line-2 { stroke: var(--file); stroke-dasharray: 2 3 }
.dot.line-0 { fill: var(--measured); stroke: var(--card) }
.dot.line-1 { fill: var(--anonymous); stroke: var(--card); stroke-dasharray: none }
.dot.line-2 { fill: var(--file); stroke: var(--card); stroke-dasharray: none }
svg text { fill: var(--ink); font-size: 13px; font-family: inherit }
svg .muted { fill: var(--muted) }
svg .small { font-size: 12px }
svg .strong { font-weight: 700 }
svg .end { text-anchor: end }
svg .middle { text-anchor: middle }
svg .number { font-variant-numeric: tabular-nums }
svg .phase { font-size: 12px; font-weight: 600; fill: var(--muted) }
svg .halo { paint-order: stroke; stroke: var(--card); stroke-width: 4px; stroke-linejoin: round }
.wide, .narrow { display: block; width: 100%; height: auto }
.narrow { display: none; max-width: 32rem }
.measured { fill: var(--measured) }
.predicted { fill: url(#hatch-predicted); stroke: var(--predicted); stroke-width: 1 }
.measured.rest { fill: url(#hatch-rest); stroke: var(--rest); stroke-width: 1 }
.anonymous { fill: var(--anonymous); fill-opacity: .82 }
.file { fill: url(#hatch-file) }
.resident { fill: none; stroke: var(--ink); stroke-width: 1.4; stroke-linejoin: round }
.room { fill: var(--soft); stroke: var(--line) }
.charge { fill: var(--card); stroke: var(--ink); stroke-width: 2 }
.predicted-mark { stroke: var(--ink); stroke-width: 2; stroke-dasharray: 3 2 }
.plate { fill: var(--card) }
.grid { stroke: var(--line) }
.tick { stroke: var(--muted) }
.sum { stroke: var(--line); stroke-width: 1.5 }
.step { stroke: var(--line) }
.band { fill: none }
.band.other { fill: var(--soft); fill-opacity: .75 }
.cap { stroke: var(--cap); stroke-width: 2; stroke-dasharray: 7 4 }
.cap.solid { stroke-dasharray: none; stroke-width: 3 }
.mark { stroke: var(--ink); stroke-width: 1; stroke-dasharray: 2 3 }
svg .cap-text { fill: var(--cap); font-weight: 600 }
.peak { fill: var(--card); stroke: var(--ink); stroke-width: 2.5 }
.way { fill: var(--measured) }
.way.over { fill: url(#hatch-over); stroke: var(--cap) }
.spark { width: 6rem; height: .6rem; display: inline-block; margin-left: .7rem }
.spark rect { fill: var(--measured) }
.spark .room { fill: var(--soft); stroke: none }
.defs { position: absolute; width: 0; height: 0 }
@media (max-width: 56rem) {
  .wide text { font-size: 15px }
  .wide .small, .wide .phase { font-size: 14px }
}
@media (max-width: 42rem) {
  .tiles, .tiles:has(> :nth-child(7)) { grid-template-columns: repeat(2, 1fr) }
  .rounds tbody th::before { content: "round " }
  main { padding: 1.2rem .9rem 3rem }
  .wide, .spark { display: none }
  .narrow { display: block }
  .verdict { padding: 1.1rem 1.1rem }
  .box { padding: .9rem }
  section { margin-top: 2.5rem }
  th, td { padding-left: .8rem; padding-right: .8rem }
  caption { padding-left: .8rem; padding-right: .8rem }
  .facts table, .facts caption, .facts tbody, .facts tr, .facts th, .facts td { display: block; width: auto }
  .facts td { border-top: 0; padding-top: 0 }
  .facts th { white-space: normal }
  .facts th { padding-bottom: 0 }
  .scroll table, .scroll caption, .scroll tbody { display: block }
  .scroll thead { display: none }
  .scroll tr { display: grid; grid-template-columns: repeat(auto-fill, minmax(5.6rem, 1fr)); gap: .15rem .6rem;
    border-top: 1px solid var(--line); padding: .55rem .8rem }
  .scroll tr > th { grid-column: 1 / -1; font-weight: 650; background: none }
  .scroll tr > * { border-top: 0; padding: 0; white-space: normal; overflow-wrap: anywhere; min-width: 0 }
  .scroll tr > td { text-align: left; background: none }
  .scroll tr > td.t { grid-column: span 2 }
  .scroll td::before { content: attr(data-name); display: block; font-size: .78rem; font-weight: 400;
    color: var(--muted) }
  .scroll td:empty { display: none }
  tr.chosen, tr.owner, tr.total { background: var(--soft) }
}
@media print {
  :root { --paper: #fff; --card: #fff; --ink: #000; --muted: #444; --line: #bbb; --soft: #eee;
    --measured: #0f766e; --predicted: #555; --anonymous: #3d57b8; --file: #b07a16; --cap: #b3261e;
    --pass: #17683a; --fail: #b3261e; --rest: #8a4b9c }
  body { font-size: 11pt; print-color-adjust: exact; -webkit-print-color-adjust: exact }
  main { max-width: none; padding: 0 }
  section { margin-top: 1.6rem }
  .wide text { font-size: 15px }
  table { font-size: 8.5pt }
  th, td { padding: .25rem .5rem }
  figure, tr, .verdict, .tiles { break-inside: avoid }
  h2 { break-after: avoid }
  .scroll { overflow: visible }
}"""
