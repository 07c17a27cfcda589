"""What random bytes may do to the two scripts: end them with one clear line.

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

import cifar10_download_and_extract as cifar10
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


@many
@hypothesis.given(st.one_of(
    st.binary(max_size=2 * cifar10.RECORD_BYTES),
    damaged(bytes(3 * cifar10.RECORD_BYTES))))
def test_data(data):
  with tempfile.TemporaryDirectory() as folder:
    path = os.path.join(folder, cifar10.TEST_FILE)
    with open(path, 'wb') as file:
      file.write(data)
    try:
      records = cifar10.read_records(path)
    except Cifar10Error as error:
      assert path in str(error)
      assert is_clear(str(error))
    else:
      assert records.tobytes() == data
      assert records[:, 0].max() < 10


NAMES = ('data_dir', 'model_dir', 'export_dir', 'resnet_size', 'train_steps',
         'steps_per_eval', 'batch_size', 'save_checkpoints_secs', 'data_format',
         'dtype', 'xla', 'num_gpus', 'seed', 'use_synthetic_data', 'eval_only',
         'predict')
# As a system passes them: any bytes but 0, also such as are no UTF-8.
arguments = st.binary(max_size=20).map(
    lambda data: os.fsdecode(data.replace(b'\0', b'')))
numbers = st.one_of(st.integers(), st.integers(0, 200), st.floats()).map(str)
given_flags = st.builds(
    '--{}={}'.format, st.sampled_from(NAMES), st.one_of(arguments, numbers))


@many
@hypothesis.given(st.lists(st.one_of(given_flags, given_flags, arguments)))
def test_flags(script_flags, arguments):
  """What comes through to the training is of the right kind and size."""
  with flagsaver.flagsaver(), mock.patch.multiple(
      cifar10_main, train_and_evaluate=mock.DEFAULT,
      evaluate_only=mock.DEFAULT, predict=mock.DEFAULT, export=mock.DEFAULT,
      open_model=mock.MagicMock(), folder_beside=mock.MagicMock(),
      show_log=mock.DEFAULT), mock.patch.object(
          tf.config.experimental, 'enable_op_determinism'):
    try:
      rest = flags.FLAGS(['script', *arguments])
      assert cifar10_main.main(rest) == 0
    except flags.Error as error:
      assert str(error)
    except SystemExit as error:
      assert re.search('unknown argument|is more than the|is there already',
                       error.code)
      assert is_clear(error.code)
    else:
      values = flags.FLAGS
      for path in (values.data_dir, values.model_dir, values.export_dir):
        if path is not None:
          path.encode()
          assert is_clear(path)
      assert values.resnet_size is None or (
          values.resnet_size % 6 == 2 and values.resnet_size > 2)
      assert values.train_steps > 0
      assert values.steps_per_eval > 0
      assert 0 < values.batch_size <= 50000
      assert values.save_checkpoints_secs >= 0
      assert values.data_format in (None, 'channels_first', 'channels_last')
      assert values.dtype in cifar10_main.DTYPES
      assert values.xla in ('auto', 'on', 'off')
      assert values.seed is None or 0 <= values.seed < 2**32
      assert {values.use_synthetic_data, values.eval_only} <= {False, True}


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
