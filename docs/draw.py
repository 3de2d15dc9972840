"""The pictures of the manual, written as SVG: `python docs/draw.py` writes docs/images/*.svg anew.

One visual style: each picture is a card with a background of its own, in light or in dark as the reader's system asks
for, so that it reads on every page. Blue acts, orange judges, green is the world, violet is what is shared or stored;
dashed outlines are copies that follow. Coordinates are in pixels, y down.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from html import escape
from itertools import pairwise
from pathlib import Path
from random import Random

IMAGES = Path(__file__).parent / "images"

STYLE = """
  .card { fill: #fcfcfb; stroke: #d9d9d6 }
  text { fill: #26282b; font: 15px system-ui, 'Segoe UI', 'DejaVu Sans', sans-serif; text-anchor: middle }
  .small { font-size: 13px; fill: #55585d }
  .title { font-weight: 600 }
  .left { text-anchor: start }
  .right { text-anchor: end }
  .line { stroke: #55585d; fill: none; stroke-width: 1.8 }
  .faint { stroke: #c4c6c8; fill: none; stroke-width: 1 }
  .head { fill: #55585d }
  .box { stroke-width: 1.8 }
  .copy { stroke-dasharray: 6 4 }
  .actor { fill: #0072b21f; stroke: #0072b2 }
  .critic { fill: #d55e001f; stroke: #d55e00 }
  .world { fill: #009e731f; stroke: #009e73 }
  .store { fill: #8a63b01f; stroke: #8a63b0 }
  .plain { fill: #7f84881a; stroke: #7f8488 }
  .bar-actor { fill: #0072b2 } .bar-critic { fill: #d55e00 } .bar-world { fill: #009e73 } .bar-store { fill: #8a63b0 }
  .curve-actor { stroke: #0072b2 } .curve-critic { stroke: #d55e00 } .curve-world { stroke: #009e73 }
  .curve { fill: none; stroke-width: 2.4; stroke-linejoin: round }
  @media (prefers-color-scheme: dark) {
    .card { fill: #1d1f22; stroke: #3a3d41 }
    text { fill: #e4e5e7 }
    .small { fill: #b3b6ba }
    .line { stroke: #b3b6ba }
    .faint { stroke: #4a4d52 }
    .head { fill: #b3b6ba }
    .actor { fill: #56b4e926; stroke: #56b4e9 }
    .critic { fill: #f0873d26; stroke: #f0873d }
    .world { fill: #2fc79b26; stroke: #2fc79b }
    .store { fill: #b794dc26; stroke: #b794dc }
    .bar-actor { fill: #56b4e9 } .bar-critic { fill: #f0873d } .bar-world { fill: #2fc79b } .bar-store { fill: #b794dc }
    .curve-actor { stroke: #56b4e9 } .curve-critic { stroke: #f0873d } .curve-world { stroke: #2fc79b }
  }
"""

Point = tuple[float, float]


class Picture:
    """A drawing of a width and height, with a title for those who hear it read."""

    def __init__(self, width: int, height: int, title: str) -> None:
        self.width, self.height, self.title = width, height, title
        self._parts: list[str] = []

    def text(self, x: float, y: float, text: str, style: str = "") -> None:
        """Lines of text around a middle, or from the left or right with that style."""
        lines = text.split("\n")
        top = y - 9.5 * (len(lines) - 1)
        for i, line in enumerate(lines):
            self._parts.append(f'<text class="{style}" x="{x:g}" y="{top + 19 * i + 5:g}">{escape(line)}</text>')

    def box(self, x: float, y: float, width: float, height: float, kind: str, title: str, below: str = "") -> None:
        """A rounded box around its title and a smaller text below it; `kind` is a colour, and "copy" dashes it."""
        shape = f'x="{x:g}" y="{y:g}" width="{width:g}" height="{height:g}" rx="9"'
        self._parts.append(f'<rect class="box {kind}" {shape}/>')
        n_below = len(below.split("\n")) if below else 0
        middle = y + height / 2
        self.text(x + width / 2, middle - 9.5 * n_below, title, "title")
        if below:
            self.text(x + width / 2, middle + 10, below, "small")

    def arrow(self, *points: Point, label: str = "", at: Point | None = None, style: str = "") -> None:
        """A line through points with its head at the last; the label stands at a point of its own."""
        (x0, y0), (x1, y1) = points[-2:]
        length = ((x1 - x0) ** 2 + (y1 - y0) ** 2) ** 0.5
        dx, dy = (x1 - x0) / length, (y1 - y0) / length
        neck = (x1 - 8 * dx, y1 - 8 * dy)
        self.line(*points[:-1], neck, style="line copy" if style == "copy" else "line")
        sides = [(x1 - 10 * dx + s * 4.5 * dy, y1 - 10 * dy - s * 4.5 * dx) for s in (1, -1)]
        corners = " ".join(f"{x:g},{y:g}" for x, y in _rounded([(x1, y1), *sides]))
        self._parts.append(f'<polygon class="head" points="{corners}"/>')
        if label and at is not None:
            self.text(*at, label, "small")

    def line(self, *points: Point, style: str = "line") -> None:
        """A line through points."""
        path = " ".join(f"{x:g},{y:g}" for x, y in _rounded(points))
        self._parts.append(f'<polyline class="{style}" points="{path}"/>')

    def bar(self, x: float, bottom: float, width: float, height: float, kind: str) -> None:
        """A filled bar that stands on `bottom`."""
        shape = f'x="{x:.1f}" y="{bottom - height:.1f}" width="{width:.1f}" height="{height:.1f}"'
        self._parts.append(f'<rect class="bar-{kind}" {shape}/>')

    def dot(self, x: float, y: float, kind: str, radius: float = 9) -> None:
        """A circle with the colour of a kind."""
        self._parts.append(f'<circle class="box {kind}" cx="{x:g}" cy="{y:g}" r="{radius:g}"/>')

    def svg(self) -> str:
        """The whole file."""
        size = f'width="{self.width}" height="{self.height}" viewBox="0 0 {self.width} {self.height}"'
        card = f'<rect class="card" x="0.5" y="0.5" width="{self.width - 1}" height="{self.height - 1}" rx="12"/>'
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size} role="img">'
        parts = [head, f"<title>{escape(self.title)}</title>", f"<style>{STYLE}</style>", card, *self._parts, "</svg>"]
        return "\n".join(parts) + "\n"


def _rounded(points: Sequence[Point]) -> list[Point]:
    return [(round(x, 1), round(y, 1)) for x, y in points]


def actor_critic() -> Picture:
    """The loop of the one-step actor-critic."""
    p = Picture(720, 380, "The actor acts, the world answers, the critic judges, and both learn from the TD error")
    p.box(60, 40, 190, 74, "actor", "Actor", "π(a | s; θ)")
    p.box(470, 40, 190, 74, "world", "Environment")
    p.box(60, 266, 190, 74, "critic", "Critic", "V(s; w)")
    p.box(330, 266, 330, 74, "plain", "TD error = advantage", "δ = r + γ V(s′) − V(s)")
    p.arrow((250, 62), (470, 62), label="action a ~ π(· | s)", at=(360, 46))
    p.arrow((565, 114), (565, 266), label="reward r,\nnext state s′", at=(622, 190))
    p.arrow((470, 96), (250, 96), label="state s", at=(360, 112))
    p.line((300, 96), (300, 180), (200, 180))
    p.arrow((200, 180), (200, 266))
    p.arrow((250, 290), (330, 290), label="V(s), V(s′)", at=(290, 274))
    p.arrow((330, 318), (250, 318), label="learn", at=(290, 334))
    p.line((420, 266), (420, 226), (110, 226))
    p.arrow((110, 226), (110, 114), label="learn: δ ∇ log π(a | s)", at=(322, 212))
    return p


def a3c_parallel() -> Picture:
    """Workers around one set of weights."""
    p = Picture(720, 400, "Three workers with networks and environments of their own share one set of weights")
    p.box(160, 34, 400, 70, "store", "Shared weights θ, statistics g", "nobody locks, nobody waits")
    for i, x in enumerate((40, 270, 500)):
        p.box(x, 190, 180, 74, "actor copy", f"Worker {i + 1}", "copy θ′ of the weights")
        p.box(x, 326, 180, 46, "world", f"Environment {i + 1}")
        top = (x + 90) * 0.55 + 360 * 0.45
        p.arrow((top - 14, 104), (x + 62, 190))
        p.arrow((x + 118, 190), (top + 14, 104))
        p.arrow((x + 62, 264), (x + 62, 326), label="a", at=(x + 50, 294))
        p.arrow((x + 118, 326), (x + 118, 264), label="s, r", at=(x + 138, 294))
    p.text(92, 140, "pull: θ′ ← θ", "small")
    p.text(634, 140, "push: gradient dθ", "small")
    return p


def a2c_synchronisation() -> Picture:
    """Two timelines: without and with waiting."""
    p = Picture(
        720, 430, "Time lines: A3C's workers update whenever they are done; A2C's environments wait for each other"
    )
    p.text(30, 34, "A3C: each worker updates when its own rollout is done", "title left")
    spans = {
        0: (110, 96, 124, 104, 96),
        1: (150, 142, 166, 100),
        2: (88, 120, 80, 94, 110, 60),
    }
    for row, lengths in spans.items():
        y, x = 54 + 36 * row, 110.0
        p.text(100, y + 13, f"worker {row + 1}", "small right")
        for length in lengths:
            p.box(x, y, min(length, 690 - x) - 6, 26, "actor", "")
            x += length
            if x < 690:
                p.dot(x - 3, y + 13, "store", 5)
            if x >= 690:
                break
    p.text(30, 196, "A2C: all wait for the slowest, then one update from all rollouts", "title left")
    lengths = ((96, 140, 104), (136, 92, 150), (112, 118, 90))
    starts, x = [], 110.0
    for step in range(3):
        starts.append(x)
        x += max(row[step] for row in lengths) + 42
    for row, own in enumerate(lengths):
        y = 216 + 36 * row
        p.text(100, y + 13, f"env {row + 1}", "small right")
        for start, length, longest in zip(starts, own, map(max, zip(*lengths, strict=True)), strict=True):
            p.box(start, y, length, 26, "actor", "")
            if length < longest:
                p.line((start + length, y + 13), (start + longest, y + 13), style="line copy")
    for step, start in enumerate(starts):
        p.box(start + max(row[step] for row in lengths) + 8, 212, 22, 106, "store", "")
    p.line((110, 350), (690, 350), style="faint")
    p.box(110, 372, 40, 22, "actor", "")
    p.text(160, 383, "acts with the weights it has", "small left")
    p.dot(374, 383, "store", 5)
    p.box(384, 372, 22, 22, "store", "")
    p.text(414, 383, "update", "small left")
    p.line((490, 383), (534, 383), style="line copy")
    p.text(544, 383, "waits", "small left")
    return p


def lambda_weights() -> Picture:
    """How the lambda return weights the n-step returns."""
    p = Picture(720, 330, "The weight of the n-step return is (1 - lambda) lambda^(n-1), for lambda 0, 0.5 and 0.9")
    p.text(360, 32, "weight of the n-step return: (1 − λ) λⁿ⁻¹", "title")
    bottom, scale = 266.0, 200.0
    for tick in (0.0, 0.25, 0.5, 0.75, 1.0):
        y = bottom - scale * tick
        p.line((70, y), (690, y), style="faint")
        p.text(60, y, f"{tick:g}", "small right")
    for n in range(1, 13):
        middle = 70 + 620 / 12 * (n - 0.5)
        for i, (value, kind) in enumerate(((0.0, "critic"), (0.5, "actor"), (0.9, "world"))):
            weight = (1 - value) * value ** (n - 1)
            p.bar(middle - 19 + 13 * i, bottom, 12, scale * weight, kind)
        p.text(middle, bottom + 17, f"{n}", "small")
    p.text(380, bottom + 42, "n: how many rewards are real before the critic is asked", "small")
    for i, (label, kind) in enumerate((("λ = 0", "critic"), ("λ = 0.5", "actor"), ("λ = 0.9", "world"))):
        p.bar(500, 94 + 26 * i, 16, 14, kind)
        p.text(526, 87 + 26 * i, label, "left")
    return p


def lambda_return() -> Picture:
    """The lambda return as a sum of n-step returns."""
    p = Picture(720, 380, "The lambda return: each n-step return times its weight, and the sum of all")
    rows = (
        (1, "G⁽¹⁾", "(1 − λ)"),
        (2, "G⁽²⁾", "(1 − λ) λ"),
        (3, "G⁽³⁾", "(1 − λ) λ²"),
        (5, "Monte Carlo", "λᵀ⁻¹"),
    )
    p.text(505, 34, "weight", "title")
    p.text(632, 34, "with λ = 0.5", "title")
    p.text(150, 34, "n rewards, then V", "title")
    weights = ("0.5", "0.25", "0.125", "the rest")
    for row, (n, name, weight) in enumerate(rows):
        y = 74 + (56 * row if row < 3 else 56 * 3 + 40)
        p.text(30, y, name if row < 3 else "to the\nend", "left")
        for k in range(n):
            p.line((102 + 62 * k, y), (146 + 62 * k, y))
            p.dot(93 + 62 * k, y, "world")
            p.text(124 + 62 * k, y - 12, "r", "small")
        if row < 3:
            p.dot(155 + 62 * (n - 1), y, "critic", 12)
            p.text(155 + 62 * (n - 1), y, "V", "small")
        else:
            p.box(146 + 62 * (n - 1), y - 9, 18, 18, "plain", "")
        p.text(505, y, f"× {weight}")
        p.text(632, y, weights[row])
    p.text(124, 229, "⋮")
    p.text(505, 229, "⋮")
    p.line((30, 324), (690, 324), style="faint")
    p.text(360, 350, "their sum is the λ-return of the first state", "title")
    return p


def n_step_reach() -> Picture:
    """How far back one update carries a reward at the end of an episode, for n of 1, 3 and all."""
    p = Picture(720, 290, "A reward at the end: one update with n = 1 reaches one state, n = 3 three, Monte Carlo all")
    n_states, left, side, gap = 8, 190, 44, 12
    p.text(left + 4 * (side + gap), 30, "which states hear of the reward in one update", "title")
    for row, (n, name) in enumerate(((1, "n = 1"), (3, "n = 3"), (n_states, "n = ∞: Monte Carlo"))):
        y = 58 + 72 * row
        p.text(left - 20, y + side / 2, name, "right")
        for state in range(n_states):
            x = left + state * (side + gap)
            hears = state >= n_states - n
            p.box(x, y, side, side, "critic" if hears else "plain", f"s{'₁₂₃₄₅₆₇₈'[state]}")
            p.line((x + side, y + side / 2), (x + side + gap, y + side / 2))
        p.box(left + n_states * (side + gap), y, 56, side, "world", "+1")
    p.bar(left, 276, 16, 14, "critic")
    p.text(left + 26, 269, "its target contains the reward", "small left")
    return p


def hindsight() -> Picture:
    """A path that missed its goal, and the same path with a goal that it did reach."""
    p = Picture(720, 320, "An episode that missed its goal g becomes a success for the goal g' that it reached")
    path = [(40.0, 236.0), (84, 196), (132, 206), (172, 160), (220, 172), (262, 130)]
    for shift, title in ((0, "as it happened: the goal was g"), (370, "in hindsight: had g′ been the goal")):
        p.text(shift + 160, 32, title, "title")
        points = [(x + shift, y) for x, y in path]
        for step, (start, end) in enumerate(pairwise(points)):
            near = 1 - 8 / ((end[0] - start[0]) ** 2 + (end[1] - start[1]) ** 2) ** 0.5
            p.arrow(start, (start[0] + near * (end[0] - start[0]), start[1] + near * (end[1] - start[1])))
            reward = "0" if shift and step == len(path) - 2 else "−1"
            p.text((start[0] + end[0]) / 2 + 8, (start[1] + end[1]) / 2 + 22, reward, "small")
        for x, y in points[:-1]:
            p.dot(x, y, "plain", 6)
        p.dot(*points[-1], "world" if shift else "plain", 10 if shift else 6)
        p.dot(shift + 250, 250, "plain copy" if shift else "critic", 10)
        p.text(shift + 276, 250, "g")
        if shift:
            p.text(shift + 290, 130, "g′")
        p.text(shift + 40, 258, "s₀", "small")
    p.line((350, 24), (350, 290), style="faint")
    p.text(160, 294, "every reward is −1: nothing to learn from", "small")
    p.text(530, 294, "the last step is rewarded, and the path to it counts", "small")
    return p


def ddpg_networks() -> Picture:
    """Both networks of DDPG, with their targets, between environment and replay."""
    p = Picture(720, 420, "DDPG: actor and critic, their targets, the environment and the replay buffer")
    p.box(40, 40, 150, 64, "world", "Environment")
    p.box(285, 40, 150, 64, "actor", "Actor", "μ(s)")
    p.box(530, 40, 150, 64, "store", "Replay buffer", "s, a, r, s′, d")
    p.arrow((190, 56), (285, 56), label="s", at=(237, 43))
    p.line((300, 104), (300, 130), (140, 130))
    p.arrow((140, 130), (140, 104), label="a = μ(s) + noise", at=(168, 145))
    p.line((90, 40), (90, 20), (605, 20))
    p.arrow((605, 20), (605, 40), label="every transition", at=(480, 32))
    p.box(285, 190, 150, 64, "critic", "Critic", "Q(s, a)")
    p.arrow((400, 190), (400, 104))
    p.text(412, 150, "learn: uphill in a", "small left")
    p.box(40, 320, 150, 64, "actor copy", "Target actor", "μ′(s′)")
    p.box(285, 320, 150, 64, "critic copy", "Target critic", "Q′(s′, μ′(s′))")
    p.box(500, 320, 190, 64, "plain", "Target", "y = r + γ (1 − d) Q′")
    p.arrow((190, 352), (285, 352), label="a′", at=(237, 339))
    p.arrow((435, 352), (500, 352))
    p.arrow((595, 104), (595, 320), label="batch", at=(622, 284))
    p.line((595, 222), (560, 222), style="line")
    p.arrow((560, 222), (435, 222), label="batch", at=(500, 236))
    p.line((530, 320), (530, 246))
    p.arrow((530, 246), (435, 246), label="learn: Q → y", at=(484, 262))
    p.arrow((345, 254), (345, 320), style="copy")
    p.text(352, 290, "τ", "small left")
    p.line((285, 90), (232, 90), (232, 214), (115, 214), style="line copy")
    p.arrow((115, 214), (115, 320), style="copy")
    p.text(122, 276, "τ: follows slowly", "small left")
    return p


def ddpg_actor() -> Picture:
    """One action, and a distribution over actions."""
    p = Picture(720, 330, "A stochastic policy gives a distribution over actions, a deterministic one a single action")
    for x, kind, title in ((40, "plain", "stochastic: A2C, A3C"), (390, "actor", "deterministic: DDPG, TD3")):
        p.text(x + 145, 34, title, "title")
        p.arrow((x, 96), (x + 50, 96), label="s", at=(x + 20, 82))
        p.box(x + 50, 64, 110, 64, kind, "Actor", "π(a | s)" if kind == "plain" else "μ(s)")
        p.arrow((x + 160, 96), (x + 200, 96))
        p.text(x + 206, 96, "mean, deviation" if kind == "plain" else "the action", "small left")
        p.line((x, 280), (x + 290, 280), style="line")
        p.text(x, 298, "−1", "small")
        p.text(x + 290, 298, "1", "small")
        p.text(x + 145, 312, "action a", "small")
    bell = [(40 + 2.9 * i, 280 - 110 * 2.718281828 ** (-(((i - 62) / 17) ** 2) / 2)) for i in range(101)]
    p.line(*bell, style="curve curve-critic")
    for place in (41, 55, 60, 68, 79):
        p.dot(40 + 2.9 * place, 280, "critic", 5)
    p.text(98, 190, "a ~ π(· | s)", "small")
    p.line((570, 280), (570, 176), style="curve curve-actor")
    p.dot(570, 280, "actor", 6)
    p.text(562, 166, "a = μ(s) ≈ argmax Q(s, a)", "small")
    return p


def ddpg_critic() -> Picture:
    """A state and an action in, one number out; and why the action is an input."""
    p = Picture(720, 308, "DQN's network gives one value for each action; DDPG's critic takes the action as an input")
    p.text(175, 34, "DQN: one output for each action", "title")
    p.arrow((24, 150), (74, 150), label="s", at=(44, 136))
    p.box(74, 90, 120, 120, "plain", "Network")
    for y, name, value in ((112, "up", "−2.18"), (150, "down", "8.45"), (188, "left", "0.30")):
        p.arrow((194, y), (230, y))
        p.text(237, y, f"Q(s, {name}) = {value}", "small left")
    p.text(175, 256, "the largest is found by comparing", "small")
    p.text(175, 280, "for continuous actions: infinitely many", "small")
    p.line((372, 30), (372, 280), style="faint")
    p.text(546, 34, "DDPG: the action is an input", "title")
    p.arrow((400, 110), (460, 110), label="s", at=(424, 96))
    p.box(460, 78, 84, 64, "actor", "Actor", "μ(s)")
    p.box(590, 150, 84, 74, "critic", "Critic", "Q")
    p.line((544, 110), (632, 110))
    p.arrow((632, 110), (632, 150), label="a", at=(646, 130))
    p.line((424, 110), (424, 187))
    p.arrow((424, 187), (590, 187), label="s", at=(510, 174))
    p.arrow((632, 224), (632, 262))
    p.text(632, 274, "Q(s, a)", "small")
    p.line((590, 216), (500, 216))
    p.arrow((500, 216), (500, 142), label="∂Q / ∂a: where a\nbetter action lies", at=(500, 246))
    return p


def td3_target() -> Picture:
    """TD3's three ideas where they act in the networks."""
    p = Picture(720, 420, "TD3: a smoothed target action, the smaller of two target critics, an actor that waits")
    p.box(24, 50, 130, 64, "actor copy", "Target actor", "μ′(s′)")
    p.box(200, 50, 176, 64, "plain", "+ clipped noise", "then clipped to [−1, 1]")
    p.text(288, 32, "3. smoothing", "small")
    p.box(428, 20, 150, 56, "critic copy", "Target critic 1", "Q′₁(s′, ã)")
    p.box(428, 94, 150, 56, "critic copy", "Target critic 2", "Q′₂(s′, ã)")
    p.box(624, 54, 72, 60, "plain", "min")
    p.text(660, 38, "1. twins", "small")
    p.arrow((154, 82), (200, 82), label="a′", at=(174, 69))
    p.line((376, 82), (404, 82), (404, 48))
    p.arrow((404, 48), (428, 48))
    p.line((404, 82), (404, 122))
    p.arrow((404, 122), (428, 122))
    p.text(390, 69, "ã", "small")
    p.line((578, 48), (602, 48), (602, 74))
    p.arrow((602, 74), (624, 74))
    p.line((578, 122), (602, 122), (602, 94))
    p.arrow((602, 94), (624, 94))
    p.box(428, 196, 268, 56, "plain", "Target for both critics", "y = r + γ (1 − d) min(Q′₁, Q′₂)")
    p.arrow((660, 114), (660, 196))
    p.box(428, 304, 124, 64, "critic", "Critic 1", "Q₁(s, a)")
    p.box(572, 304, 124, 64, "critic", "Critic 2", "Q₂(s, a)")
    p.arrow((490, 252), (490, 304), label="learn", at=(516, 278))
    p.arrow((634, 252), (634, 304), label="learn", at=(660, 278))
    p.text(562, 388, "in every update, from the same batch", "small")
    p.box(24, 304, 130, 64, "actor", "Actor", "μ(s)")
    p.arrow((428, 336), (154, 336), label="uphill in a, by critic 1 only", at=(291, 322))
    p.text(291, 356, "2. delay: in every second update", "small")
    p.arrow((89, 304), (89, 114), style="copy")
    p.text(100, 200, "τ: follows slowly, when the actor learns;", "small left")
    p.text(100, 220, "so do the target critics follow the critics", "small left")
    return p


def noises() -> Picture:
    """A path of Gaussian noise, and one of Ornstein-Uhlenbeck noise with the same deviation."""
    p = Picture(720, 380, "Gaussian noise jumps at each step; Ornstein-Uhlenbeck noise keeps its side for some steps")
    random, theta, sigma, steps = Random(18), 0.15, 0.2, 100
    deviation = sigma / (1 - (1 - theta) ** 2) ** 0.5
    wandering = [0.0]
    for _ in range(steps):
        wandering.append((1 - theta) * wandering[-1] + sigma * random.gauss())
    jumping = [deviation * random.gauss() for _ in range(steps + 1)]
    rows = (
        (jumping, "actor", f"Gaussian, deviation {deviation:.2f}"),
        (
            wandering,
            "critic",
            f"Ornstein-Uhlenbeck, θ = {theta:g}, σ = {sigma:g}, Δt = 1, in the long run as wide",
        ),
    )
    for row, (path, kind, title) in enumerate(rows):
        zero = 108 + 166 * row
        p.text(70, zero - 74, title, "title left")
        for value in (-1, 0, 1):
            p.line((70, zero - 54 * value), (690, zero - 54 * value), style="faint")
            p.text(60, zero - 54 * value, f"{value}".replace("-", "−"), "small right")
        points = [(70 + 620 * k / steps, zero - 54 * value) for k, value in enumerate(path)]
        p.line(*points, style=f"curve curve-{kind}")
    p.text(380, 356, "100 steps", "small")
    return p


def soft_updates() -> Picture:
    """A weight, its hard target and its soft target."""
    p = Picture(
        720, 350, "A hard target jumps to the network's weight at intervals; a soft one follows it at each step"
    )
    p.text(360, 32, "one weight of the network, and of its target", "title")
    steps, every, tau = 300, 75, 0.02
    path = [0.15 + 0.72 * (1 - 2.718281828 ** (-k / 90)) + 0.035 * _wave(k) for k in range(steps + 1)]
    hard, soft = [path[0]], [path[0]]
    for k in range(1, steps + 1):
        hard.append(path[k] if k % every == 0 else hard[-1])
        soft.append(tau * path[k] + (1 - tau) * soft[-1])

    def place(k: int, value: float) -> Point:
        return 60 + 630 * k / steps, 290 - 240 * value

    p.line((60, 290), (690, 290))
    p.line((60, 50), (60, 290))
    p.line(*(place(k, v) for k, v in enumerate(path)))
    jumps = [
        place(k, v) for k in range(steps + 1) for v in ([hard[k - 1], hard[k]] if k % every == 0 and k else [hard[k]])
    ]
    p.line(*jumps, style="curve curve-critic")
    p.line(*(place(k, v) for k, v in enumerate(soft)), style="curve curve-actor")
    p.text(375, 312, "gradient steps", "small")
    for i, (style, label) in enumerate(
        (
            ("line", "the network's weight θ"),
            ("curve curve-actor", f"soft: θ′ ← τ θ + (1 − τ) θ′ at every step, τ = {tau:g}"),
            ("curve curve-critic", f"hard: θ′ ← θ every {every} steps"),
        )
    ):
        p.line((300, 212 + 22 * i), (330, 212 + 22 * i), style=style)
        p.text(340, 212 + 22 * i, label, "small left")
    return p


def _wave(k: int) -> float:
    """A wobble with a period of 23 steps, from -1 to 1: no random numbers, so that the file is always the same."""
    phase = k % 23 / 23
    return 4 * abs(phase - 0.5) - 1


PICTURES: dict[str, Callable[[], Picture]] = {
    "actor-critic.svg": actor_critic,
    "a3c-parallel.svg": a3c_parallel,
    "a2c-synchronisation.svg": a2c_synchronisation,
    "lambda-weights.svg": lambda_weights,
    "lambda-return.svg": lambda_return,
    "ddpg-networks.svg": ddpg_networks,
    "ddpg-actor.svg": ddpg_actor,
    "ddpg-critic.svg": ddpg_critic,
    "soft-updates.svg": soft_updates,
    "n-step-reach.svg": n_step_reach,
    "hindsight.svg": hindsight,
    "td3-target.svg": td3_target,
    "noises.svg": noises,
}


if __name__ == "__main__":
    for name, draw in PICTURES.items():
        (IMAGES / name).write_text(draw().svg(), encoding="utf-8")
