"""The operator I - beta k k^T on a cloud of states while beta goes from 0 to 2 and back, as an animated SVG."""

import math

import torch

from deepdelta import DeltaOperator

SECONDS = 10
WIDTH, HEIGHT, SCALE = 680, 400, 108
TIMES, BETAS = "0;.07;.33;.45;.71;.85;1", (0, 0, 1, 1, 2, 2, 0)
ANGLE = 30.0
NAMES = {"identity": 0.0, "under-relaxed": 0.5, "projection": 1.0, "over-relaxed": 1.5, "reflection": 2.0}
STYLE = """
text { font: 15px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: #525c6c; }
.card { fill: #fff; } .before { stroke: #7c8696; fill: none; } .after { fill: #1f63b8; } .path { stroke: #1f63b8; opacity: .3; }
.image { stroke: #1f63b8; fill: none; } .k { stroke: #b04a06; } .kt { fill: #b04a06; font-style: italic; } .rule { stroke: #dde1e8; }
.name { font-weight: 650; fill: #171c24; }
@media (prefers-color-scheme: dark) {
  text { fill: #a5aebc; } .card { fill: #161a21; } .before { stroke: #79828f; } .after { fill: #7db4f5; } .path { stroke: #7db4f5; }
  .image { stroke: #7db4f5; } .k { stroke: #f2a65e; } .kt { fill: #f2a65e; } .rule { stroke: #2b323c; } .name { fill: #e8ebf0; }
}"""  # noqa: E501


def states() -> torch.Tensor:
    """48 states in a disc, the same every time: a sunflower's seeds."""
    i = torch.arange(48, dtype=torch.float64)
    radius, angle = 1.55 * ((i + 0.5) / 48).sqrt(), i * math.pi * (3 - math.sqrt(5))
    return torch.stack([radius * angle.cos(), radius * angle.sin()], dim=-1)


def animate(name: str, values: list[str], kind: str = "animate") -> str:
    extra = f'attributeName="{name}"' if kind == "animate" else 'attributeName="transform" type="scale"'
    return f'<{kind} {extra} values="{";".join(values)}" keyTimes="{TIMES}" dur="{SECONDS}s" repeatCount="indefinite"/>'


def picture() -> str:
    """The SVG; where states go is what `DeltaOperator` says."""
    a = math.radians(ANGLE)
    k = torch.tensor([math.cos(a), math.sin(a)], dtype=torch.float64)
    X = states()
    ends = {b: DeltaOperator(k, torch.tensor(float(b), dtype=torch.float64)).apply(X) for b in (0, 1, 2)}
    factors = {b: DeltaOperator(k, torch.tensor(float(b), dtype=torch.float64)).determinant().item() for b in (0, 1, 2)}
    trails, dots = [], []
    for i, (x, y) in enumerate((X * SCALE).tolist()):
        places = {b: (end[i] * SCALE).tolist() for b, end in ends.items()}
        trails.append(f"M{x:.1f} {-y:.1f}L{places[2][0]:.1f} {-places[2][1]:.1f}")
        moves = [animate(n, [f"{s * places[b][j]:.1f}" for b in BETAS]) for n, j, s in (("cx", 0, 1), ("cy", 1, -1))]
        dots.append(
            f'<circle class="before" cx="{x:.1f}" cy="{-y:.1f}" r="3.4"/>'
            f'<circle class="after" cx="{x:.1f}" cy="{-y:.1f}" r="4">{"".join(moves)}</circle>'
        )
    top, bottom = 64, HEIGHT - 64
    at = {name: top + (bottom - top) * beta / 2 for name, beta in NAMES.items()}
    names = "".join(
        f'<text class="name" x="500" y="{at[n] + 5:.1f}">β = {b:.0f}, {n}</text>'
        if b % 1 == 0
        else f'<text x="500" y="{at[n] + 5:.1f}">{n}</text>'
        for n, b in NAMES.items()
    )
    marker = animate("cy", [f"{top + (bottom - top) * b / 2:.1f}" for b in BETAS])
    squeeze = animate("", [f"{factors[b]:.6f} 1" for b in BETAS], "animateTransform")
    return f"""<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="t d">
<title id="t">I − β k kᵀ while β goes from 0 to 2</title>
<desc id="d">States and the unit circle: unmoved at β = 0, pressed onto a line at β = 1, mirrored at β = 2.</desc>
<style>{STYLE}</style>
<rect class="card" width="{WIDTH}" height="{HEIGHT}" rx="14"/>
<g transform="translate(220 200)">
<g transform="rotate({-ANGLE})"><path class="k" stroke-width="1.6" d="M-195 0H195"/>
<circle class="before" stroke-dasharray="5 5" stroke-width="1.6" r="{SCALE}"/>
<circle class="image" stroke-width="2.4" vector-effect="non-scaling-stroke" r="{SCALE}">{squeeze}</circle></g>
<path class="path" fill="none" d="{"".join(trails)}"/>
{"".join(dots)}
<text class="kt" x="182" y="-100">k</text></g>
<path class="rule" stroke-width="4" stroke-linecap="round" d="M472 {top}V{bottom}"/>
<circle class="after" cx="472" cy="{top}" r="9">{marker}</circle>
{names}
</svg>
"""
