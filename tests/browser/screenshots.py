"""Open pages in Qt's Chromium at several widths, save screenshots, and print the measurements of the pages as JSON.

    .venv-browser/bin/python -m tests.browser.screenshots light|dark FOLDER WIDTH,WIDTH PAGE...

Screenshots are saved as FOLDER/PAGE-WIDTH-light.png or FOLDER/PAGE-WIDTH-dark.png.
"""

import json
import os
import sys
from pathlib import Path


SCHEME, FOLDER, WIDTHS, *PAGES = sys.argv[1:]
FLAGS = ["--no-sandbox", "--disable-gpu", f"--blink-settings=preferredColorScheme={int(SCHEME == 'light')}"]
os.environ |= {"QT_QPA_PLATFORM": "offscreen", "QTWEBENGINE_CHROMIUM_FLAGS": " ".join(FLAGS)}

from PySide6.QtCore import QEventLoop, QTimer, QUrl  # noqa: E402 - reads the environment
from PySide6.QtWebEngineWidgets import QWebEngineView  # noqa: E402
from PySide6.QtWidgets import QApplication  # noqa: E402


HEIGHT = 900
#: Time (ms) that Qt gets for painting a page after loading it.
PAINTED_MS = 400
MEASURE = """(() => {
  const all = [...document.querySelectorAll('body *')], box = e => e.getBoundingClientRect();
  const named = e => e.tagName + ' ' + e.textContent.slice(0, 60);
  const wide = [...document.querySelectorAll('.table, pre')].filter(e => e.scrollWidth > e.clientWidth + 1);
  return JSON.stringify({
    width: innerWidth,
    scroll_width: document.documentElement.scrollWidth,
    cut: all.filter(e => (box(e).right > innerWidth + 1 || box(e).left < -1) && !e.closest('.table, pre')).map(named),
    hidden: wide.filter(e => getComputedStyle(e).overflowX != 'auto').map(named),
    tiny: all.filter(e => e.innerText && parseFloat(getComputedStyle(e).fontSize) < 12).map(named),
    images: [...document.images].map(e => ({pixels: e.naturalWidth, width: box(e).width, bottom: box(e).bottom})),
    verdict: box(document.querySelector('h1 + p + p')).bottom,
    refresh: document.querySelector('meta[http-equiv=refresh]')?.content ?? null,
    loaded: performance.getEntriesByType('resource').map(e => e.name).filter(name => !name.startsWith('data:')),
    dark: matchMedia('(prefers-color-scheme: dark)').matches,
  });
})()"""


def main() -> None:
    """Open every page at every width."""
    app = QApplication(sys.argv[:1])
    view, wait, measured = QWebEngineView(), QEventLoop(), []
    view.loadFinished.connect(lambda _: QTimer.singleShot(PAINTED_MS, wait.quit))
    view.show()

    def keep(answer: str) -> None:
        measured.append(json.loads(answer))
        wait.quit()

    for page in map(Path, PAGES):
        for width in map(int, WIDTHS.split(",")):
            view.resize(width, HEIGHT)
            view.load(QUrl.fromLocalFile(str(page.resolve())))
            wait.exec()
            view.page().runJavaScript(MEASURE, keep)
            wait.exec()
            picture = Path(FOLDER) / f"{page.stem}-{width}-{SCHEME}.png"
            view.grab().save(str(picture))
            measured[-1] |= {"picture": str(picture), "asked": width, "page": page.stem}
    sys.stdout.write(json.dumps(measured) + "\n")
    del app


if __name__ == "__main__":
    main()
