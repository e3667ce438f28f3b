"""Pages in a browser: opened so that nothing leaves them, and looked at for what is cut, covered or out of reach."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

AXE = Path(__file__).parents[1] / "build/axe/package/axe.min.js"
NASTY = "<script>alert(1)</script>"
SIZES = [(width, theme) for width in (390, 1440) for theme in ("light", "dark")]
# Texts that stand on each other, or are cut: rectangles of what each element says itself.
LAYOUT = """() => {
  const problems = [], boxes = [];
  const wide = document.documentElement.scrollWidth;
  if (wide > innerWidth) problems.push(`the page is ${wide} wide`);
  const walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode()); ) {
    const parent = node.parentElement;
    if (!node.textContent.trim() || parent.closest("script, style, .handle, [hidden]") || !parent.checkVisibility()) continue;
    const range = document.createRange();
    range.selectNodeContents(node);
    const scroller = parent.closest(".scroll, .tokens")?.getBoundingClientRect();
    for (const r of range.getClientRects()) {
      if (r.width < 1 || (scroller && (r.right > scroller.right || r.bottom > scroller.bottom))) continue;
      if (getComputedStyle(parent).visibility === "hidden") continue;
      const text = node.textContent.trim().slice(0, 40);
      if (r.left < -1 || r.right > innerWidth + 1) problems.push(`cut at the side: ${text}`);
      const frame = parent.closest("svg")?.getBoundingClientRect();
      if (frame && (r.left < frame.left - 1 || r.right > frame.right + 1 || r.top < frame.top - 1 || r.bottom > frame.bottom + 1)) problems.push(`cut by its picture: ${text}`);
      boxes.push([r, text, node, getComputedStyle(parent.closest("#panel, .stage") ?? parent).position]);
    }
    const box = parent.getBoundingClientRect();
    if (getComputedStyle(parent).overflow === "hidden" && parent.scrollWidth > parent.clientWidth + 1 && getComputedStyle(parent).textOverflow !== "ellipsis") problems.push(`cut: ${node.textContent}`);
  }
  for (let i = 0; i < boxes.length; i += 1) for (let j = i + 1; j < boxes.length; j += 1) {
    const [a, s, m, p] = boxes[i], [b, t, n, q] = boxes[j];
    if (m === n || p === "sticky" || q === "sticky") continue;
    const across = Math.min(a.right, b.right) - Math.max(a.left, b.left);
    const down = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
    if (across > 2 && down > 0.35 * Math.min(a.height, b.height)) problems.push(`${s} | ${t}`);
  }
  return problems;
}"""  # noqa: E501


@contextmanager
def opened(
    chromium: Any, file: Path, width: int = 1440, theme: str = "light", beside: tuple[str, ...] = ()
) -> Iterator[Any]:
    """The page; nothing it does may leave it and `beside` it, be written to the console, or ask the person."""
    context = chromium.new_context(
        viewport={"width": width, "height": 900}, color_scheme=theme, reduced_motion="reduce"
    )
    page, wrong = context.new_page(), []
    own = (file.as_uri(), *(file.with_name(name).as_uri() for name in beside))
    page.on("request", lambda one: None if one.url.startswith((*own, "data:", "blob:")) else wrong.append(one.url))
    page.on("console", lambda message: wrong.append(message.text))
    page.on("pageerror", lambda error: wrong.append(str(error)))
    page.on("dialog", lambda dialog: (wrong.append(dialog.message), dialog.dismiss()))
    page.goto(file.as_uri())
    yield page
    context.close()
    assert wrong == []


def serious(page: Any) -> list[tuple[str, str, str]]:
    """What axe-core finds that keeps people out."""
    page.evaluate(AXE.read_text(encoding="utf-8"))
    return [
        (one["id"], one["nodes"][0]["html"][:200], one["nodes"][0]["failureSummary"][:300])
        for one in page.evaluate("axe.run()")["violations"]
        if one["impact"] in ("serious", "critical")
    ]


def focused(page: Any) -> Iterator[str]:
    """What Tab comes to, from the beginning of the page to its end."""
    page.keyboard.press("Tab")
    focus = "document.activeElement"
    while label := page.evaluate(f"{focus} === document.body ? '' : {focus}.id || {focus}.textContent"):
        yield label
        page.keyboard.press("Tab")
