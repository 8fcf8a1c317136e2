"""The CSS of every page: one column, one blue, thin lines."""

STYLE = """
:root{--ink:#1d2733;--soft:#5d6b7a;--faint:#e4e8ed;--blue:#1f6feb;--grey:#98a3b0;--red:#c2410c}
*{box-sizing:border-box}
body{margin:0;background:#fbfcfd;color:var(--ink);
font:16px/1.55 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}
main{max-width:1080px;margin:0 auto;padding:48px 24px 72px}
h1{font-size:34px;line-height:1.2;margin:0 0 8px;letter-spacing:-.015em}
h2{font-size:22px;margin:0 0 6px;letter-spacing:-.01em}
h3{font-size:15px;margin:22px 0 8px;font-weight:600}
p{margin:0 0 14px;max-width:74ch;color:var(--soft)}
.lead{font-size:18px;color:var(--ink)}
section{margin-top:44px;padding-top:28px;border-top:1px solid var(--faint)}
.tiles{display:grid;grid-template-columns:repeat(auto-fit,minmax(190px,1fr));gap:12px;margin-top:24px}
.tile{background:#fff;border:1px solid var(--faint);border-radius:8px;padding:14px 16px}
.tile span,.tile small{display:block;font-size:13px;color:var(--soft)}
.tile b{display:block;font-size:25px;font-weight:600;line-height:1.35;
font-variant-numeric:tabular-nums}
.row{display:grid;grid-template-columns:repeat(4,1fr);gap:10px;margin-bottom:10px;align-items:start}
figure{margin:0}
.row img{display:block;width:100%;background:#000;border-radius:4px;image-rendering:pixelated}
figcaption{font-size:13px;color:var(--soft);padding-top:4px}
.legend{display:flex;flex-wrap:wrap;gap:4px 18px;font-size:13px;margin-top:12px;max-width:none}
i{display:inline-block;width:11px;height:11px;border-radius:2px;margin-right:7px;vertical-align:-1px}
i.dot{border-radius:50%}i.trained{background:var(--blue)}i.untrained{background:var(--grey)}
.curves{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:20px}
.curves figcaption{font-weight:600;color:var(--ink);font-size:14px}
.curves small{display:block;font-weight:400;color:var(--soft)}
svg{display:block;width:100%;height:auto}
svg text{font-size:12px;fill:var(--soft);font-variant-numeric:tabular-nums}
.grid{stroke:var(--faint)}
.raw{fill:none;stroke:#b9d2f8;stroke-width:1.2}
.mean{fill:none;stroke:var(--blue);stroke-width:2.2;stroke-linejoin:round}
line.interval{stroke:#a9c7f5;stroke-width:3}
line.uniform{stroke:var(--red);stroke-dasharray:5 4;stroke-width:1.3}
svg text.uniform{fill:var(--red)}
table{border-collapse:collapse;width:100%;font-size:14px}
th{font-weight:500;color:var(--soft);text-align:left;font-size:13px}
th,td{padding:5px 10px 5px 0;border-bottom:1px solid var(--faint);vertical-align:middle}
td:nth-child(2){color:var(--soft)}
.number{font-variant-numeric:tabular-nums;white-space:nowrap}
.number small{color:var(--soft)}
.scores .bar{width:220px}
th.bar .one{float:right}
line.trained{stroke:var(--blue);stroke-width:2.5}circle.trained{fill:var(--blue)}
line.untrained{stroke:var(--grey);stroke-width:2.5}circle.untrained{fill:var(--grey)}
.bars{max-width:640px;margin-bottom:22px}
.bars td:nth-child(1){width:34%}
.bars td.number{width:90px;padding-right:14px;color:var(--ink);text-align:right}
.bars i{height:8px;background:#a9c7f5;min-width:1px}
dl{display:grid;grid-template-columns:180px 1fr;gap:4px 16px;font-size:14px;margin:0}
dt{color:var(--soft)}dd{margin:0;overflow-wrap:anywhere}
.reasons .bars{max-width:none}.reasons td:nth-child(1){width:55%}
.findings td{vertical-align:top}.findings td:nth-child(-n+3){white-space:nowrap}
.scroll{overflow-x:auto}
.plain{width:auto;min-width:min(100%,420px)}
.plain :is(td,th){padding-right:28px}.plain :is(td,th):last-child{padding-right:0}
.plain td{vertical-align:baseline}.plain td:nth-child(2){color:inherit}
.plain .right{text-align:right}.remark{font-size:13px;margin-top:8px}
.intervals td{vertical-align:middle}.intervals .bar{width:220px}
summary{cursor:pointer;font-size:14px;color:var(--soft);padding:8px 0}
summary:hover{color:var(--ink)}
.histograms{display:grid;grid-template-columns:repeat(auto-fit,minmax(380px,1fr));gap:0 40px}
section>dl+:is(details,.scroll),section>.scroll+dl,section>.scroll+.scroll{margin-top:18px}
.limits{padding-left:20px;color:var(--soft);max-width:74ch}
@media (max-width:640px){.row{grid-template-columns:repeat(2,1fr)}dl{grid-template-columns:1fr}
.curves{grid-template-columns:1fr}}
"""
