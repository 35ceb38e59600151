"""A page in a real headless browser, where there is one."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")


def open_page(file: Path, scratch: Path, *, width: int, scheme: str = "light") -> tuple[str, set[str]]:
    """The page as its script has made it, and the names of its figures, each of which must hold a line. Skips loudly where there is no
    browser; what it says in its console is a failure."""
    browser = next(filter(None, map(shutil.which, BROWSERS)), None)
    if browser is None:
        pytest.skip(f"NO BROWSER: {file.name} was not opened; install one of {', '.join(BROWSERS)} to have this tested")
    shown = subprocess.run(
        [browser, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={scratch / 'browser'}", f"--window-size={width},900",
         f"--blink-settings=preferredColorScheme={0 if scheme == 'dark' else 1}", "--enable-logging=stderr", "--log-level=0",
         "--virtual-time-budget=3000", "--dump-dom", file.as_uri()],
        capture_output=True, text=True, timeout=600,
    )  # fmt: skip
    assert shown.returncode == 0 and [line for line in shown.stderr.splitlines() if "CONSOLE" in line] == []
    figures = {figure.split('"')[0]: figure.split("</figure>")[0] for figure in shown.stdout.split('<figure id="')[1:]}
    for name, figure in figures.items():
        assert re.search(r'<path d="M', figure) and not re.search("NaN|Infinity|undefined", figure), name
    return shown.stdout, set(figures)
