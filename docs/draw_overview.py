#!/usr/bin/env python3
"""Draw docs/pages/overview.svg, the way of one batch: python docs/draw_overview.py"""
import math
import random
from pathlib import Path

FILE = Path(__file__).resolve().parent / 'pages' / 'overview.svg'
WIDTH, HEIGHT = 1220, 560
INK, GREY, LINE = '#1f2933', '#5f6c7b', '#8795a5'
STUDENT, TEACHER, LOSS = ('#e8eefc', '#3559b5'), ('#fdf1e2', '#b8690f'), ('#eaf6ec', '#2c7a3f')
STAGES = 'stage 1', 'stage 2', 'stage 3', 'stage 4', 'pooled'
LEFT, STEP, BOX = 335, 142, 96  # of the columns of stages
STUDENT_Y, MIDDLE_Y, TEACHER_Y, TALL = 84, 232, 390, 80
LOSSES_X = 1070
TIMESTEPS, SHIFT = 4, 6  # cards of a student's stage, and how far each lies behind the one before it


def text(x, y, words, size=14, color=INK, anchor='middle', weight='normal', style='normal'):
    return (f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{color}" text-anchor="{anchor}" '
            f'font-weight="{weight}" font-style="{style}">{words}</text>')


def box(x, y, w, h, colors, radius=8):
    fill, stroke = colors
    return (f'<rect x="{x:g}" y="{y:g}" width="{w}" height="{h}" rx="{radius}" fill="{fill}" stroke="{stroke}" '
            f'stroke-width="1.5"/>')


def path(points, color=LINE, width=1.6, fill='none'):
    line = ' L '.join(f'{x:.1f} {y:.1f}' for x, y in points)
    return f'<path d="M {line}" fill="{fill}" stroke="{color}" stroke-width="{width}"/>'


def arrow(*points, color=LINE):
    """A line through the points with a head at its end."""
    (x0, y0), (x1, y1) = points[-2:]
    angle = math.atan2(y1 - y0, x1 - x0)
    head = [(x1 - 9 * math.cos(angle + turn), y1 - 9 * math.sin(angle + turn)) for turn in (.4, 0, -.4)]
    stop = (x1 - 7 * math.cos(angle), y1 - 7 * math.sin(angle))
    return path([*points[:-1], stop], color) + path([head[0], (x1, y1), head[2]], color, 1, color)


def spikes(x, y, w, h, rows=4, slots=13, seed=0):
    """A raster: in every row, one neuron's spikes over time."""
    draw = random.Random(seed)
    parts = []
    for row in range(rows):
        base = y + h * (row + 1) / rows
        parts.append(path([(x, base), (x + w, base)], '#b6c4e6', .8))
        fired = [x + w * (i + .5) / slots for i in range(slots) if draw.random() < .35]
        parts += [path([(at, base), (at, base - h / rows * .75)], STUDENT[1], 1.8) for at in fired]
    return ''.join(parts)


def waves(x, y, w, h, rows=3, seed=0):
    """Curves: real values."""
    draw = random.Random(seed)
    parts = []
    for row in range(rows):
        base, phase, rate = y + h * (row + .5) / rows, draw.uniform(0, 6), draw.uniform(1.2, 2.6)
        curve = [(x + w * i / 40, base - h / rows * .4 * math.sin(phase + rate * i / 5)) for i in range(41)]
        parts.append(path(curve, TEACHER[1], 1.5))
    return ''.join(parts)


def student_stage(i, x):
    cards = [box(x + SHIFT * k, STUDENT_Y - SHIFT * k, BOX, TALL, STUDENT) for k in reversed(range(TIMESTEPS))]
    return ''.join([*cards, text(x + BOX / 2, STUDENT_Y + 20, STAGES[i], 13, STUDENT[1], weight='bold'),
                    spikes(x + 10, STUDENT_Y + 28, BOX - 20, TALL - 38, seed=i)])


def teacher_stage(i, x):
    return (box(x, TEACHER_Y, BOX, TALL, TEACHER)
            + text(x + BOX / 2, TEACHER_Y + 20, STAGES[i], 13, TEACHER[1], weight='bold')
            + waves(x + 10, TEACHER_Y + 27, BOX - 20, TALL - 36, seed=i))


def comparison(x):
    """What stands between a pair of stages."""
    middle, w, h = x + BOX / 2, BOX + 18, 74
    return ''.join([
        arrow((middle, STUDENT_Y + TALL), (middle, MIDDLE_Y)), arrow((middle, TEACHER_Y), (middle, MIDDLE_Y + h)),
        box(middle - w / 2, MIDDLE_Y, w, h, LOSS),
        text(middle, MIDDLE_Y + 24, 'contrastive', 13), text(middle, MIDDLE_Y + 41, 'loss', 13),
        text(middle, MIDDLE_Y + 62, '&#215; 1 / CKA', 14, LOSS[1], weight='bold')])


def draw():
    xs = [LEFT + STEP * i for i in range(len(STAGES))]
    lane, below = STUDENT_Y + TALL / 2, TEACHER_Y + TALL / 2
    plain = '#f2f4f7', GREY
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" height="{HEIGHT}" '
        f'font-family="Helvetica, Arial, DejaVu Sans, sans-serif" role="img">',
        '<title>The way of one batch: a spiking student and a real-valued teacher see the same images; between each '
        'pair of stages stands a contrastive loss, weighted by 1/CKA.</title>',
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="12" fill="#ffffff"/>',
        text(LEFT, 38, 'student: the timm model with spiking neurons', 16, STUDENT[1], 'start', 'bold'),
        text(LEFT, TEACHER_Y + TALL + 30, 'teacher: the real-valued twin, frozen, once per image', 16, TEACHER[1],
             'start', 'bold'),
        box(28, 238, 118, 62, plain), text(87, 264, 'images', 15, weight='bold'),
        text(87, 285, '[B, C, H, W]', 13, GREY),
        arrow((87, 238), (87, lane), (172, lane)), arrow((87, 300), (87, below), (xs[0], below)),
        box(172, lane - 32, 128, 64, STUDENT), text(236, lane - 6, 'repeat T times', 14),
        text(236, lane + 15, '[T&#183;B, C, H, W]', 13, GREY), arrow((300, lane), (xs[0], lane)),
        text(236, below - 10, 'no gradient', 13, GREY, style='italic')]
    for x, following in zip(xs, [*xs[1:], LOSSES_X]):  # behind the cards
        parts.append(arrow((x + BOX, lane), (following, lane)))
        if following != LOSSES_X:
            parts.append(arrow((x + BOX, below), (following, below)))
    for i, x in enumerate(xs):
        parts += [student_stage(i, x), teacher_stage(i, x), comparison(x)]
    return '\n'.join([*parts, *losses(xs, lane), '</svg>', ''])


def losses(xs, lane):
    """The column on the right, and the sum that leads to it."""
    middle, level = LOSSES_X + 62, MIDDLE_Y + 37
    parts = [
        box(LOSSES_X, lane - 40, 124, 80, STUDENT), text(middle, lane - 14, 'mean over T', 14),
        text(middle, lane + 6, 'logits [B, K]', 13, GREY), text(middle, lane + 26, 'cross-entropy', 14, weight='bold'),
        arrow((middle, lane + 40), (middle, MIDDLE_Y - 4)),
        box(LOSSES_X, MIDDLE_Y - 4, 124, 82, LOSS), text(middle, MIDDLE_Y + 21, 'loss', 15, weight='bold'),
        text(middle, MIDDLE_Y + 43, 'cross-entropy', 13), text(middle, MIDDLE_Y + 63, '+ 0.1 &#183; sum', 13),
        arrow((xs[-1] + BOX + 9, level), (LOSSES_X, level), color=LOSS[1]),
        text(WIDTH - 28, HEIGHT - 22, 'T timesteps are folded into the batch: the student&#8217;s tensors are '
             '[T&#183;B, ...]', 13, GREY, 'end')]
    for x, following in zip(xs, xs[1:]):
        parts += [path([(x + BOX + 9, level), (following - 9, level)], LOSS[1]),
                  text((x + BOX + following) / 2, level - 5, '+', 15, LOSS[1], weight='bold')]
    return parts


if __name__ == '__main__':
    FILE.write_text(draw())
