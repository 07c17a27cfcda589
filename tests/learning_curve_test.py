"""Tests of the drawing of a learning curve."""

import re
from xml.etree import ElementTree

from tests import learning_curve


def test_drops():
  assert learning_curve.drops({1: 0.1, 101: 0.1, 201: 0.01, 301: 0.001}) == [
      201, 301]


def test_curve_of_a_run(trained):
  """It has an evaluation after steps 4 and 8, at 0 or more."""
  svg = learning_curve.draw(str(trained.model_dir))
  assert len(svg) < 60_000
  names = re.findall(r'>([a-z ]+)</text>', svg)
  assert names == ['training accuracy', 'test accuracy',
                   'loss of a training batch', 'test loss']
  curves = [line.get('points').split() for line in ElementTree.fromstring(
      svg).iter('{http://www.w3.org/2000/svg}polyline')]
  assert [len(points) for points in curves] == [2, 2, 2, 2]
  middle = (learning_curve.LEFT + learning_curve.WIDTH
            - learning_curve.RIGHT) / 2
  assert [float(point.split(',')[0]) for point in curves[1]] == [
      round(middle), learning_curve.WIDTH - learning_curve.RIGHT]
