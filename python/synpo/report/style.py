"""Style sheet of the report: system fonts, light and dark by the reader's preference, one column on a telephone, print rules.

Colours: s0 … s5 are systems; side0 (--better) is what is chosen or better, side1 (--worse) what is rejected or worse.
"""

_LIGHT = """
    --paper: #fbfaf8; --card: #ffffff; --ink: #1d1f24; --soft: #5f6570; --line: #e4e2dc; --shade: #1d1f2433;
    --better: #187a47; --worse: #b8322a; --better-tint: #e7f3ec; --worse-tint: #fbeae8;
    --c0: #777d88; --c1: #2f7fd0; --c2: #b06f00; --c3: #6a35b8; --c4: #b83a7e; --c5: #0d8295;
"""
_DARK = """
    --paper: #15171b; --card: #1d2026; --ink: #e8e8e6; --soft: #a3a9b4; --line: #343841; --shade: #000000aa;
    --better: #5ecb8f; --worse: #f28579; --better-tint: #1b3226; --worse-tint: #3b2322;
    --c0: #a3a9b4; --c1: #6db3f5; --c2: #e0a94a; --c3: #b596f2; --c4: #ee8fbe; --c5: #5cc6d8;
"""
CSS = (
    f":root {{ color-scheme: light dark; {_LIGHT} }}"
    f"@media (prefers-color-scheme: dark) {{ :root {{ {_DARK} }} }}"
    f"@media print {{ :root {{ color-scheme: light; {_LIGHT} }} }}"
    """
* { box-sizing: border-box; }
body { margin: 0; background: var(--paper); color: var(--ink); font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; }
main { max-width: 1080px; margin: 0 auto; padding: 3rem 1.5rem 4rem; }
h1 { font-size: 2.1rem; line-height: 1.2; letter-spacing: -.02em; margin: 0 0 .6rem; text-wrap: balance; }
h2 { font-size: 1.25rem; letter-spacing: -.01em; margin: 3rem 0 1rem; padding-top: 1.2rem; border-top: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .5rem; }
article + h3 { margin-top: 2rem; }
h4 { font-size: .9rem; margin: 0 0 .3rem; color: var(--c, var(--ink)); }
p { margin: 0 0 .8rem; max-width: 46rem; text-wrap: pretty; }
.lead { font-size: 1.1rem; color: var(--soft); }
.findings { margin: 0; padding-left: 1.2rem; max-width: 46rem; }
.note, figcaption, .legend { color: var(--soft); font-size: .86rem; }
.note { margin: .15rem 0; max-width: none; }
.card, .tile { background: var(--card); border: 1px solid var(--line); border-radius: 12px; }
.card { padding: 1.1rem 1.2rem; margin: 0 0 1rem; }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(11rem, 1fr)); gap: .8rem; margin: 1.6rem 0 1rem; }
.tile { padding: .9rem 1.1rem 1rem; }
.tile .label { color: var(--soft); font-size: .86rem; }
.tile .value { font-size: 1.9rem; line-height: 1.25; font-weight: 650; letter-spacing: -.02em; }
.tile .remark { color: var(--soft); font-size: .86rem; }
.terms { columns: 24rem; column-gap: 2.2rem; margin: 0; font-size: .9rem; }
.terms div { break-inside: avoid; margin-bottom: .5rem; }
.terms dt { font-weight: 600; }
.terms dd { margin: 0; }
.more { display: none; margin: 0 0 .3rem; text-align: right; color: var(--soft); font-size: .8rem; }
.scroll { /* a shade at the right edge until the last column is in sight */
  overflow-x: auto;
  background: linear-gradient(to left, var(--card) 40%, transparent) right / 3rem 100% no-repeat local,
    linear-gradient(to left, var(--shade), transparent) right / 1rem 100% no-repeat scroll;
}
table { border-collapse: separate; border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
th { color: var(--soft); font-weight: 600; font-size: .82rem; }
th, td { padding: .5rem .8rem; text-align: right; vertical-align: top; white-space: nowrap; }
th, td { border-bottom: 1px solid var(--line); }
th:first-child { text-align: left; padding-left: .2rem; position: sticky; left: 0; background: var(--card); }
tbody th { color: var(--ink); font-size: 1rem; }
tbody tr:last-child > * { border-bottom: 0; }
td small { display: block; color: var(--soft); font-size: .76rem; font-weight: 400; }
td.best { font-weight: 700; }
td.good { color: var(--better); background: var(--better-tint); font-weight: 700; }
td.bad { color: var(--worse); background: var(--worse-tint); font-weight: 700; }
.info th, .info td { text-align: left; white-space: normal; overflow-wrap: anywhere; }
.info tbody th { width: 9rem; color: var(--soft); font-size: .9rem; font-weight: 400; }
.triple { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 18rem), 1fr)); gap: 1rem; margin: 0 0 1rem; }
.triple > .card { margin: 0; }
figure { margin: 0; }
figcaption { max-width: 46rem; }
svg { display: block; width: 100%; height: auto; max-width: 30rem; }
svg text { fill: var(--ink); font: 13px system-ui, sans-serif; }
svg .soft { fill: var(--soft); font-size: 12px; }
svg .grid { stroke: var(--line); }
svg .zero { stroke: var(--soft); stroke-width: 1.5; }
svg .mark { stroke: var(--c, var(--ink)); fill: var(--c, var(--ink)); stroke-width: 2; }
svg polyline { fill: none; stroke: var(--c); stroke-width: 2; stroke-linejoin: round; }
svg polyline.faint { stroke-width: 1; opacity: .35; }
svg circle.side0, svg circle.side1 { fill: var(--c); }
svg polyline.bold.side1 { stroke-dasharray: 6 3; }
.s0 { --c: var(--c0); } .s1 { --c: var(--c1); } .s2 { --c: var(--c2); }
.s3 { --c: var(--c3); } .s4 { --c: var(--c4); } .s5 { --c: var(--c5); }
.side0 { --c: var(--better); } .side1 { --c: var(--worse); }
.key::before, .sides span::before { content: ""; display: inline-block; margin-right: .45rem; }
.key::before { width: .65rem; height: .65rem; border-radius: 50%; background: var(--c); }
.sides { margin: .2rem 0 .7rem; font-size: .86rem; }
.sides span { margin-right: 1.2rem; }
.sides span::before { width: 1.6rem; border-top: 3px solid var(--c); vertical-align: middle; }
.sides .side1::before { border-top-style: dashed; }
.sample img { display: block; max-width: 100%; max-height: 15rem; border-radius: 8px; margin-bottom: .8rem; }
.sample h4 { font-family: ui-monospace, "Cascadia Mono", Menlo, monospace; color: var(--soft); overflow-wrap: anywhere; }
.said { display: grid; grid-template-columns: minmax(6.5rem, max-content) 1fr; gap: .4rem 1rem; margin: 0; }
.said dt { font-size: .86rem; font-weight: 600; padding-top: .08rem; }
.said dt small { display: block; color: var(--soft); font-weight: 400; }
.said dd { margin: 0; overflow-wrap: anywhere; }
.said .reference, summary { color: var(--soft); }
summary { font-size: .86rem; cursor: pointer; }
mark { background: none; color: inherit; text-decoration: underline dotted var(--c, var(--ink)) 2px; text-underline-offset: 3px; }
.side0 mark, .side1 mark { color: var(--c); text-decoration-style: solid; }
.stages { display: grid; grid-template-columns: max-content 1fr; gap: .2rem 1rem; margin: 0; font-size: .9rem; }
.stages dd { margin: 0; display: flex; align-items: center; gap: .6rem; white-space: nowrap; }
.stages span { height: .6rem; min-width: 2px; max-width: 60%; border-radius: 3px; background: var(--soft); }
footer { margin-top: 3rem; color: var(--soft); font-size: .86rem; }
@media (max-width: 40rem) {
  main { padding: 1.5rem .8rem 3rem; }
  .card { padding: .9rem .8rem; }
  .tiles { grid-template-columns: 1fr 1fr; }
  .more { display: block; }
  .said { grid-template-columns: 1fr; gap: 0; }
  .said dd { margin-bottom: .7rem; }
  .info tbody th { width: 5rem; }
  .said dt small { display: inline; margin-left: .6rem; }
}
@media print {
  body { background: none; font-size: 10.5pt; print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  main { max-width: none; padding: 0; }
  .card, .tile, figure, tr { break-inside: avoid; }
  h2, h3, h4, .legend, .sample img { break-after: avoid; }
  .sample { break-inside: auto; }
  .sample dd { break-inside: avoid; }
  .tile .value { font-size: 1.4rem; }
  .triple { grid-template-columns: repeat(3, minmax(0, 1fr)); }
  .scroll { overflow: visible; background: none; }
}
"""
)
