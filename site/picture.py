"Take the picture of the explorer in figures/, from the page that `make docs` has written, in Chromium."
import argparse, base64, sys, tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from tests.chromium import chromium

SHOWN = "#quantum=4&picture=phantom+0&networks=yes"
LOOKED = "document.getElementById('networks-status').textContent.includes('ooked')"
TIDY = """document.getElementById('networks-status').textContent = ''
document.querySelector('.choices').style.display = 'none'
document.getElementById('field').open = false"""


def take(page, output, width=1280, height=1010):
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder, chromium(Path(folder)) as tab:
        tab.resize(width, height)
        tab.open(page.absolute().as_uri() + SHOWN, "document.body.dataset.ready")
        tab.wait(LOOKED, seconds=180)
        tab.evaluate(TIDY)
        shot = tab.send("Page.captureScreenshot", format="webp", quality=70)
        output.write_bytes(base64.b64decode(shot["data"]))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("page", type=Path, nargs="?", default=ROOT/"_docs"/"explorer.html", help="page of the explorer")
    parser.add_argument("output", type=Path, nargs="?", default=ROOT/"figures"/"explorer.webp", help="file to write")
    args = parser.parse_args()
    take(args.page, args.output)
    print(f"{args.output}: {args.output.stat().st_size/1024:.0f} kB")
