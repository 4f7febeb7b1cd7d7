"""Colours and CSS of the page that `report_page.py` makes."""

from collections.abc import Sequence

# Okabe and Ito's colours, which are told apart by colour-blind readers too; for light and for dark pages.
LIGHT = ("#0072b2", "#d55e00", "#009e73", "#c05a94", "#2e9bd6", "#b87f00", "#6f5bd0", "#6b6b6b")
DARK = ("#4aa8e0", "#ff8a3d", "#2fd0a0", "#f0a6cc", "#9ad7ff", "#ffc14d", "#a99bff", "#b5b5b5")


def style() -> str:
    def colours(values: Sequence[str]) -> str:
        return "".join(f"--run{index}:{value};" for index, value in enumerate(values))

    light = f":root{{color-scheme:light dark;{ON_LIGHT}{colours(LIGHT)}}}"
    dark = f"@media(prefers-color-scheme:dark){{:root{{{ON_DARK}{colours(DARK)}}}}}"
    used = "".join(f".run{index}{{color:var(--run{index})}}" for index in range(len(LIGHT)))
    return light + dark + used + RULES


ON_LIGHT = "--page:#fff;--card:#f7f7f8;--ink:#1a1a1e;--soft:#65656e;--rule:#dedee3;"
ON_DARK = "--page:#131316;--card:#1c1c21;--ink:#ececf0;--soft:#9c9ca8;--rule:#35353d;"
RULES = """
body{margin:0 auto;max-width:1360px;padding:24px;background:var(--page);color:var(--ink);
font:15px/1.5 system-ui,sans-serif}
h1{font-size:24px;margin:0}h2{font-size:17px;margin:32px 0 10px}header p{margin:4px 0;color:var(--soft)}
.charts{display:grid;grid-template-columns:repeat(auto-fill,minmax(min(100%,440px),1fr));gap:16px}
figure{margin:0}.chart,.preview{background:var(--card);border-radius:8px;padding:12px}
.preview{display:inline-block;margin:0 16px 16px 0;max-width:100%;box-sizing:border-box}
.preview img{display:block;max-width:100%;image-rendering:auto;border-radius:4px}
figcaption{font-weight:600;margin-bottom:6px}small,.note{color:var(--soft);font-weight:400;font-size:13px}
svg{display:block;width:100%;height:auto}.swatch{display:inline-block;width:24px;height:8px}
.legend span{margin-right:6px}.legend>span{margin-right:22px;white-space:nowrap}
polyline{fill:none;stroke:currentColor;stroke-linejoin:round;stroke-linecap:round}
polyline.line{stroke-width:2}polyline.raw{stroke-width:1;opacity:.35}
circle{fill:currentColor}circle.raw{opacity:.35}circle:hover{opacity:1;stroke:currentColor;stroke-width:3}
text{fill:var(--soft);font:12px system-ui,sans-serif}text.y{text-anchor:end}text.x{text-anchor:middle}
.grid{stroke:var(--rule);stroke-width:1}.axis{stroke:var(--soft);stroke-width:1}
.wide{overflow-x:auto}table{border-collapse:collapse;font-variant-numeric:tabular-nums}
th,td{text-align:left;padding:5px 18px 5px 0;border-bottom:1px solid var(--rule);font-weight:400}
thead th{color:var(--soft);font-size:13px}code{font:13px ui-monospace,monospace}
"""
