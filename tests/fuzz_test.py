"""What random flags and checkpoints may do: end the run with one clear line.

Takes minutes, therefore not in the default run: python -m pytest -m slow
"""

import os
import re
import tempfile
from unittest import mock

from absl import flags
from absl.testing import flagsaver
import hypothesis
from hypothesis import strategies as st
import numpy as np
import pytest
import tensorflow as tf

from cifar10_download_and_extract import Cifar10Error
import cifar10_main
from tests.helpers import make_state, restore, save

pytestmark = pytest.mark.slow
many = hypothesis.settings(
    max_examples=2000, deadline=None, database=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture,
                           hypothesis.HealthCheck.too_slow])


@st.composite
def damaged(draw, data):
  """The bytes with a part of them replaced by others, or by nothing."""
  start = draw(st.integers(0, len(data)))
  end = draw(st.integers(start, min(len(data), start + 5000)))
  return data[:start] + draw(st.binary(max_size=300)) + data[end:]


def is_clear(message):
  return message and '\n' not in message


defined = flags.FlagValues()
cifar10_main.define_flags(defined)
# As a system passes them: any bytes but 0, also such as are no UTF-8.
arguments = st.binary(max_size=20).map(
    lambda data: os.fsdecode(data.replace(b'\0', b'')))
numbers = st.one_of(st.integers(), st.integers(0, 200), st.floats()).map(str)
given_flags = st.builds('--{}={}'.format, st.sampled_from([*defined]),
                        st.one_of(arguments, numbers))


@many
@hypothesis.given(st.lists(st.one_of(given_flags, given_flags, arguments)))
def test_flags(script_flags, arguments):
  """None ends in a traceback; test_settings_out_of_range has the bounds."""
  with flagsaver.flagsaver(), mock.patch.multiple(
      cifar10_main, train_and_evaluate=mock.DEFAULT,
      evaluate_only=mock.DEFAULT, predict=mock.DEFAULT, export=mock.DEFAULT,
      open_model=mock.MagicMock(), folder_beside=mock.MagicMock(),
      show_log=mock.DEFAULT):
    try:
      rest = flags.FLAGS(['script', *arguments])
      assert cifar10_main.main(rest) == 0
    except flags.Error as error:
      assert str(error)
    except SystemExit as error:
      assert re.search('unknown argument|is more than the|is there already',
                       error.code)
      assert is_clear(error.code)


@pytest.fixture(scope='module')
def model_dir(tmp_path_factory):
  """A folder with two checkpoints, and what they hold."""
  folder = tmp_path_factory.mktemp('model')
  state = make_state()
  values = {}
  for step in (3, 8):
    for variable in state.variables:
      variable.assign(tf.fill(variable.shape, tf.cast(step, variable.dtype)))
    save(folder, state)
    values[step] = [variable.numpy() for variable in state.variables]
  return state, values, {path.name: path.read_bytes()
                         for path in folder.iterdir()}


@many
@hypothesis.given(st.data())
def test_checkpoints(model_dir, data):
  """Whole values of one of them are restored, or none and this is said."""
  state, values, files = model_dir
  for variable in state.variables:
    variable.assign(tf.zeros_like(variable))
  unchanged = [variable.numpy() for variable in state.variables]
  with tempfile.TemporaryDirectory() as folder:
    for name in data.draw(st.sets(st.sampled_from(sorted(files)), min_size=1)):
      files = {**files, name: data.draw(st.one_of(
          damaged(files[name]), st.binary(max_size=300)))}
    for name, content in files.items():
      with open(os.path.join(folder, name), 'wb') as file:
        file.write(content)
    try:
      newest = restore(folder, state)
    except Cifar10Error as error:
      assert folder in str(error)
      assert is_clear(str(error))
      expected = unchanged
    else:
      expected = values[int(newest.rpartition('-')[2])]
  np.testing.assert_equal([v.numpy() for v in state.variables], expected)
