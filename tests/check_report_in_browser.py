"""Open a report in headless Chromium: it renders, the console stays quiet, it fits a phone, and its tables a screen.

Its rollouts are shaded along the step, too, once the box for that is ticked.

All that is folded is opened first. On a phone tables scroll in their own boxes.

    python tests/check_report_in_browser.py out/exp12/exp12_figures/report.html [SCREENSHOT.png]

Exits non-zero otherwise. Needs `chromium` (Debian's package of that name).
"""

import html
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PHONE_WIDTH, SCREEN_WIDTH = 390, 1100
QUIET = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking
    --disable-component-update --disable-sync --hide-scrollbars""".split()
PROBE = """<!doctype html><title>waiting</title><iframe id="page" width="{width}" height="800" srcdoc="{page}"></iframe>
<script>addEventListener("load", () => {{
  const page = document.getElementById("page").contentDocument, images = [...page.images];
  const folded = [...page.querySelectorAll("details")], closed = page.documentElement.scrollWidth;
  folded.forEach(one => one.open = true);
  const pushed = [...page.querySelectorAll(".reading span")].filter(one => one.style.getPropertyValue("--u"));
  const colours = () => pushed.map(one => getComputedStyle(one).backgroundColor), before = colours();
  page.getElementById("by-step")?.click();
  const turned = colours().filter((colour, i) => colour != before[i]).length;
  document.title = ["measured", Math.max(closed, page.documentElement.scrollWidth),
    page.documentElement.clientWidth, images.length,
    images.filter(i => i.complete && i.naturalWidth > 0).length, page.querySelectorAll("script").length,
    folded.length, page.querySelectorAll(".answer").length, page.querySelectorAll(".reading span").length, turned,
    Math.max(...[...page.querySelectorAll(".scroll")].map(one => one.scrollWidth - one.clientWidth))].join(" ");
}});</script>"""


def chromium(profile: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run Chromium to its end; stderr holds what pages wrote to the console."""
    command = ["chromium", *QUIET, f"--user-data-dir={profile}", "--enable-logging=stderr", *arguments]
    return subprocess.run(command, capture_output=True, text=True, timeout=120, check=True)


def measure(report: Path, width: int, scratch: str) -> tuple[list[int], list[str]]:
    """What `PROBE` tells of the page at a width, and what it said on the console."""
    probe = Path(scratch) / "probe.html"
    probe.write_text(PROBE.format(width=width, page=html.escape(report.read_text(encoding="utf-8"))))
    result = chromium(f"{scratch}/profile", "--virtual-time-budget=20000", "--dump-dom", probe.as_uri())
    measured = re.search(r"<title>measured ([\d ]+)</title>", result.stdout)
    assert measured, "the page did not load"
    return list(map(int, measured[1].split())), [line for line in result.stderr.splitlines() if "CONSOLE" in line]


def main(report: Path, screenshot: Path | None = None) -> int:
    """Check one report."""
    with tempfile.TemporaryDirectory() as scratch:
        (*_, overhang), _ = measure(report, SCREEN_WIDTH, scratch)
        found, console = measure(report, PHONE_WIDTH, scratch)
        scroll_width, client_width, n_images, n_loaded, n_scripts, n_folded, n_answers, n_tokens, n_turned, _ = found
        if screenshot is not None:
            size = "--window-size=1100,6000"
            chromium(f"{scratch}/profile", size, f"--screenshot={screenshot.resolve()}", report.resolve().as_uri())
    widths = f"{scroll_width} px wide on {client_width} px"
    print(f"{n_loaded} of {n_images} images, {widths}, console: {console or 'quiet'}")
    assert scroll_width <= client_width, "wider than a phone"
    assert n_loaded == n_images >= 6, "an image did not load"
    assert overhang == 0, f"a table is {overhang} px wider than the page at {SCREEN_WIDTH} px"
    assert n_tokens > 0, "no token is shown"
    assert n_turned > n_tokens / 10, "no token is shaded by where the step pushes it"
    assert n_scripts == 0
    assert n_folded >= 4, "nothing is folded"
    assert n_answers == 3, "the page does not lead with three answers"
    assert not console
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1]), *map(Path, sys.argv[2:3])))
