"""Draws the learning curve of a run: accuracy and loss over steps, as an SVG.

    python tests/learning_curve.py /tmp/cifar10_model .github/learning_curve.svg

It takes the values from the event files in the model folder.
"""

from collections.abc import Iterable
import itertools
import os
import sys
from xml.sax import saxutils

from tensorboard.backend.event_processing import event_accumulator
import tensorflow as tf

WIDTH, HEIGHT = 760, 240  # of a chart with its margins, in pixels
LEFT, RIGHT, TOP, BOTTOM = 50, 15, 30, 30
MAX_POINTS = 500  # of a curve
# Both are easy to see on white and on black.
COLOURS = ('#2f81f7', '#d97706')
STYLE = ('text{font:12px sans-serif;fill:#7d8590}'
         'line{stroke:#7d8590;stroke-opacity:.35}'
         'line.drop{stroke-opacity:1;stroke-dasharray:4 3}'
         'polyline{fill:none;stroke-width:1.5}')

Curve = dict[int, float]  # values by step


def read_curve(folder: str, tag: str) -> Curve:
  """Returns the values of a tag; of those logged twice, the later ones."""
  events = event_accumulator.EventAccumulator(
      folder, {event_accumulator.TENSORS: 0}).Reload()
  return {event.step: tf.make_ndarray(event.tensor_proto).item()
          for event in events.Tensors(tag)}


def drops(rates: Curve) -> list[int]:
  """Returns the steps at which the learning rate was first seen lower."""
  return [step for (_, before), (step, rate)
          in itertools.pairwise(sorted(rates.items())) if rate < before]


def text(x: float, y: float, words: str, anchor: str = 'middle',
         colour: str = '') -> str:
  style = f' style="fill:{colour}"' if colour else ''
  return (f'<text x="{x:.0f}" y="{y:.0f}" text-anchor="{anchor}"{style}>'
          f'{saxutils.escape(words)}</text>')


def chart(curves: dict[str, Curve], marks: Iterable[int], last_step: int,
          ticks: list[float], offset: int) -> str:
  """Returns a chart of curves by name, from the first tick to the last."""
  low, high = ticks[0], ticks[-1]

  def x(step):
    return LEFT + step / last_step * (WIDTH - LEFT - RIGHT)

  def y(value):
    share = (min(max(value, low), high) - low) / (high - low)
    return offset + HEIGHT - BOTTOM - share * (HEIGHT - TOP - BOTTOM)

  parts = []
  for tick in ticks:
    parts.append(f'<line x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y(tick):.0f}" '
                 f'y2="{y(tick):.0f}"/>')
    parts.append(text(LEFT - 6, y(tick) + 4, f'{tick:g}', 'end'))
  for i in range(5):
    step = last_step * i // 4
    parts.append(text(x(step), offset + HEIGHT - 10, f'{step:,}',
                      'end' if i == 4 else 'middle'))
  for mark in marks:
    parts.append(f'<line class="drop" x1="{x(mark):.0f}" x2="{x(mark):.0f}" '
                 f'y1="{y(low):.0f}" y2="{y(high):.0f}"/>')
  for i, (name, curve) in enumerate(curves.items()):
    steps = sorted(curve)[::max(1, len(curve) // MAX_POINTS)]
    points = ' '.join(f'{x(s):.0f},{y(curve[s]):.1f}' for s in steps)
    parts.append(f'<polyline points="{points}" stroke="{COLOURS[i]}"/>')
    parts.append(text(LEFT + 170 * i, offset + TOP - 12, name, 'start',
                      COLOURS[i]))
  parts.append(text(WIDTH - RIGHT, offset + TOP - 12, 'by training step; '
                    'dashed lines: the learning rate drops', 'end'))
  return '\n'.join(parts)


def draw(model_dir: str) -> str:
  """Returns the SVG of a run."""
  rates = read_curve(model_dir, 'learning_rate')
  train = read_curve(model_dir, 'train_accuracy')
  test = read_curve(os.path.join(model_dir, 'eval'), 'accuracy')
  losses = {'loss of a training batch': read_curve(model_dir, 'loss'),
            'test loss': read_curve(os.path.join(model_dir, 'eval'), 'loss')}
  last_step = max(*train, *test)
  charts = [
      chart({'training accuracy': train, 'test accuracy': test}, drops(rates),
            last_step, [0, 0.2, 0.4, 0.6, 0.8, 1], 0),
      chart(losses, drops(rates), last_step, [0, 0.5, 1, 1.5, 2, 2.5], HEIGHT)]
  return '\n'.join([
      f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} '
      f'{2 * HEIGHT}">', f'<style>{STYLE}</style>', *charts, '</svg>', ''])


if __name__ == '__main__':
  svg = draw(sys.argv[1])
  with open(sys.argv[2], 'w', encoding='utf-8') as file:
    file.write(svg)
