"""Draw docs/preview.png: what `--preview` shows in a terminal, in Chinese and English.

It runs the real command in a pseudo-terminal, and Chromium draws what the terminal would. Chromium and the fonts DejaVu Sans Mono
and Noto Sans Mono CJK are needed (Debian: chromium fonts-dejavu fonts-noto-cjk).
"""

import argparse
import os
import pty
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
RECORDS = """\
{"messages": [{"role": "user", "content": "你好，你会做算术吗？"}, {"role": "assistant", "content": "会的，请出题。"}, {"role": "user", "content": "6 times 7?"}, {"role": "assistant", "content": "6 times 7 is 42."}]}
{"instruction": "Tell a long story about a small model.", "output": "Once upon a time there was a model of a few million parameters, and it lived in a small house beside a large cluster."}
"""
COMMAND = "--preview 1 model=tiny_glm data.dataset=belle_sample,chat.jsonl,story.jsonl data.max_target_length=24"
COLUMNS = 100


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--to", type=Path, default=ROOT / "docs/preview.png")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        page.write_text(html_of(terminal_output(Path(folder))), encoding="utf-8")
        draw(page, options.to)


def terminal_output(folder: Path) -> str:
    """What the command writes to a terminal of COLUMNS columns; its data are written into the folder."""
    for name, record in zip(("chat.jsonl", "story.jsonl"), RECORDS.splitlines(), strict=True):
        (folder / name).write_text(f"{record}\n", encoding="utf-8")
    main_end, child_end = pty.openpty()
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "COLUMNS": str(COLUMNS), "TERM": "xterm-256color"}
    environment.pop("NO_COLOR", None)
    words = [sys.executable, "-m", "glmtuner", *COMMAND.split()]
    child = subprocess.Popen(words, cwd=folder, env=environment, stdin=child_end, stdout=child_end, stderr=child_end)
    os.close(child_end)
    output = b""
    while True:
        try:
            part = os.read(main_end, 65536)
        except OSError:  # the child has closed its end
            break
        if not part:
            break
        output += part
    if child.wait():
        raise SystemExit(output.decode())
    return output.decode().replace("\r\n", "\n")


def html_of(output: str) -> str:
    """A page that looks like the terminal."""
    from rich.console import Console
    from rich.terminal_theme import MONOKAI
    from rich.text import Text

    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, file=nowhere, width=COLUMNS, force_terminal=True, color_system="truecolor")
        console.print(Text(f"$ python -m glmtuner {COMMAND}", style="bold"), soft_wrap=True)
        console.print(Text.from_ansi(output.rstrip()), soft_wrap=True)
    style = (
        "margin:0;padding:18px 22px;background:#0c0c0c;color:#d9d9d9;font:15px/1.35 'DejaVu Sans Mono','Noto Sans Mono CJK SC',"
        "monospace;white-space:pre-wrap;width:960px"
    )
    text = console.export_html(theme=MONOKAI, inline_styles=True, code_format="{code}")
    return f"<!doctype html><meta charset='utf-8'><body style='margin:0;background:#0c0c0c'><div style=\"{style}\">{text}</div>"


def draw(page: Path, picture: Path) -> None:
    """Take a screenshot of the page, and cut away what is below its last line."""
    chromium = shutil.which("chromium") or shutil.which("chromium-browser")
    if chromium is None:
        raise SystemExit("chromium is not installed; type apt-get install chromium")
    subprocess.run(
        [chromium, "--headless", "--no-sandbox", "--hide-scrollbars", "--force-device-scale-factor=1.5",
         "--window-size=1004,1400", f"--screenshot={picture}", page.as_uri()],
        check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    from PIL import Image, ImageChops

    image = Image.open(picture).convert("RGB")
    background = Image.new("RGB", image.size, image.getpixel((image.width - 1, image.height - 1)))
    box = ImageChops.difference(image, background).getbbox()
    assert box is not None  # the page has text
    image.crop((0, 0, image.width, min(box[3] + 24, image.height))).quantize(64).save(picture, optimize=True)


if __name__ == "__main__":
    main()
