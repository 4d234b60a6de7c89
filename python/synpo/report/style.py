"""Style sheet of the report: system fonts, light and dark by the reader's preference, two-column figures, print rules."""

CSS = """
:root {
  color-scheme: light dark;
  --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #646a75; --line: #e4e2dc; --accent: #0b6e6e; --tint: #e8f2f1;
  --c0: #8a8f98; --c1: #3b6fb6; --c2: #c4622d; --c3: #0b7a6f; --c4: #8a4fae; --c5: #a8871b;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #15171b; --card: #1d2026; --ink: #e8e8e6; --soft: #9aa1ad; --line: #30343c; --accent: #5cc4bb; --tint: #1c302f;
    --c0: #9aa1ad; --c1: #7aa7e8; --c2: #e8935f; --c3: #4fc4b2; --c4: #c193e0; --c5: #d9ba55;
  }
}
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .6rem; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 1rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
p { margin: 0 0 .8rem; }
.lead { font-size: 1.1rem; color: var(--soft); max-width: 46rem; text-wrap: pretty; white-space: pre-line; }
.note, figcaption, .legend { color: var(--soft); font-size: .86rem; }
.note { margin: .15rem 0; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 1.1rem 1.2rem; margin: 0 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.8rem 0 0; }
.tile { padding: .9rem 1.1rem 1rem; }
.tile .label { color: var(--soft); font-size: .82rem; }
.tile .value { font-size: 1.9rem; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; }
.tile .remark { color: var(--soft); font-size: .86rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; }
th, td { padding: .5rem .8rem; text-align: right; vertical-align: top; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child, td:first-child { text-align: left; padding-left: .2rem; font-weight: 600; }
tbody tr:last-child td { border-bottom: 0; }
td small { display: block; color: var(--soft); font-size: .76rem; font-weight: 400; }
td.good { background: var(--tint); color: var(--accent); font-weight: 700; }
td.bad { color: var(--c2); font-weight: 700; }
.info td, .info td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; padding-left: .2rem; }
.info td:first-child { width: 11rem; color: var(--soft); font-weight: 400; }
.plots { display: grid; gap: 1rem; margin-bottom: 1rem; }
.plots > .card { margin: 0; }
.triple { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; }
.triple > .card { margin: 0; }
figure { margin: 0; }
figure img { display: block; width: 100%; height: auto; border-radius: 8px; background: #fff; }
figcaption { margin-top: .6rem; }
svg { display: block; width: 100%; height: auto; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); font-size: 11px; }
svg .grid { stroke: var(--line); }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
svg .mark { stroke: var(--c); fill: var(--c); }
.sample img { display: block; max-width: 100%; max-height: 15rem; border-radius: 8px; margin-bottom: .8rem; }
.sample h3 { font: 600 .86rem ui-monospace, "Cascadia Mono", Menlo, monospace; color: var(--soft); overflow-wrap: anywhere; }
.said { display: grid; grid-template-columns: minmax(5.5rem, max-content) 1fr; gap: .35rem 1rem; margin: 0; }
.said dt { font-size: .86rem; font-weight: 600; padding-top: .08rem; color: var(--c, var(--soft)); }
.said dd { margin: 0; overflow-wrap: anywhere; }
.said .reference { color: var(--soft); }
mark { background: none; color: inherit; text-decoration: underline dotted var(--c2) 2px; text-underline-offset: 3px; }
.stages { display: flex; height: 1rem; border-radius: 6px; overflow: hidden; margin: .3rem 0 .9rem; }
.stages span { background: var(--c); min-width: 2px; border-right: 1px solid var(--card); }
.key { display: inline-block; margin-right: 1.1rem; white-space: nowrap; font-size: .86rem; }
.key::before { content: ""; display: inline-block; width: .7rem; height: .7rem; border-radius: 3px; }
.key::before { background: var(--c); margin-right: .4rem; }
footer { margin-top: 3rem; color: var(--soft); font-size: .86rem; }
@media print {
  :root {
    color-scheme: light;
    --paper: #fff; --card: #fff; --ink: #000; --soft: #555; --line: #ccc; --accent: #0b6e6e; --tint: #eef5f4;
    --c0: #8a8f98; --c1: #3b6fb6; --c2: #c4622d; --c3: #0b7a6f; --c4: #8a4fae; --c5: #a8871b;
  }
  body { font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .card, .tile, figure, tr { break-inside: avoid; }
  h2, h3, .legend, .sample img { break-after: avoid; }
  .sample { break-inside: auto; }
  .sample dd { break-inside: avoid; }
  .tile .value { font-size: 1.4rem; }
  .triple { grid-template-columns: 1fr 1fr 1fr; }
  .scroll { overflow: visible; }
}
"""
