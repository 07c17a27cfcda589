"""Tests against the numbers and the checkpoint of the original."""

import os

import numpy as np
import pytest
import tensorflow as tf

import cifar10_main
from resnet_model import tf1_name
from tests import helpers


def golden_dataset(golden, batches):
  features = tf.image.per_image_standardization(
      golden['images'][batches].astype(np.float32))
  labels = tf.one_hot(golden['labels'][batches], 10)
  return tf.data.Dataset.from_tensor_slices((features, labels))


def initial_state(golden, **changes):
  state = helpers.make_state(batch_size=16, **changes)
  for variable in state.network.variables:
    variable.assign(golden[f'init/{tf1_name(variable)}'])
  state.global_step.assign(312490)
  return state


@pytest.fixture(scope='module')
def originals_run(golden):
  """A state after the golden steps in float32; what each step gave, and all
  variables before and after each.

  On the CPU: on a GPU, where each run sums in another order, 20 steps may lead
  further from the original than one step may.
  """
  with tf.device('CPU'):
    state = initial_state(golden, data_format='channels_last')
    inner_loop = cifar10_main.make_inner_loop(state)
    iterator = iter(golden_dataset(golden, slice(20)))
    values, variables = [], [[v.numpy() for v in state.variables]]
    for _ in range(20):
      values.append(inner_loop(iterator, tf.constant(1)))
      variables.append([v.numpy() for v in state.variables])
  return state, values, variables


def test_training_has_the_originals_numbers(golden, originals_run):
  state, steps, _ = originals_run
  for name, tolerance in (('loss', 2e-6), ('cross_entropy', 2e-6),
                          ('learning_rate', 0)):
    ours = np.array([values[name] for values in steps])
    np.testing.assert_allclose(ours, golden[f'train/{name}'], rtol=tolerance)
  assert state.global_step.numpy() == golden['final/global_step'] == 312510
  for variables, tolerance in ((state.network.variables, 2e-3),
                               (state.momentum, 2e-2)):
    for variable in variables:
      theirs = golden[f'final/{tf1_name(variable)}']
      difference = helpers.difference(variable.numpy(), theirs)
      assert difference < tolerance, variable.name


SLOW = pytest.mark.slow


@pytest.mark.parametrize(('data_format', 'dtype', 'xla'), [
    ('channels_first', 'fp32', 'off'), (None, 'bf16', 'off'),
    (None, 'fp16', 'off'), *(pytest.param(*values, 'on', marks=SLOW)
                             for values in (('channels_last', 'fp32'),
                                            ('channels_first', 'fp32'),
                                            (None, 'bf16'), (None, 'fp16')))])
def test_each_step_has_the_originals_numbers(
    golden, originals_run, data_format, dtype, xla):
  """Each step begins with the variables of channels_last in float32.

  Not a run of 20: an activation that is zero but for its rounding may fall on
  the other side of a ReLU, and the gradient jumps. Whether a run in another
  order of summation meets one of these in 20 steps is luck.
  """
  if dtype == 'fp32' and helpers.needs_xla(data_format):
    xla = 'on'
  state = initial_state(golden, data_format=data_format, dtype=dtype, xla=xla)
  network, momentum = state.network.variables, state.momentum
  assert (len(network), len(momentum)) == (40, 26)
  step = cifar10_main.make_train_step(state)
  for i, batch in enumerate(golden_dataset(golden, slice(20))):
    before, after = originals_run[2][i:i + 2]
    for variable, value in zip(state.variables, before):
      variable.assign(value)
    expected = {v.ref(): value for v, value in zip(state.variables, after)}
    values = step(*batch)
    for name in ('loss', 'cross_entropy', 'learning_rate'):
      assert values[name].dtype == tf.float32
      np.testing.assert_allclose(values[name], golden[f'train/{name}'][i],
                                 rtol=2e-6 if dtype == 'fp32' else 1e-3)
    assert all(variable.dtype == tf.float32 for variable in network)
    if dtype == 'fp32':
      for v in (*network, *momentum):
        tolerance = 2e-2 if v.name.endswith('Momentum:0') else 2e-3
        difference = helpers.difference(v.numpy(), expected[v.ref()])
        assert difference < tolerance, v.name
    else:
      ours = np.concatenate([np.ravel(v) for v in momentum])
      theirs = np.concatenate([np.ravel(expected[v.ref()]) for v in momentum])
      assert 1e-4 < helpers.difference(ours, theirs) < 0.15


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_evaluation_of_the_originals_checkpoint(
    tmp_path, golden, data_format):
  state = initial_state(golden, data_format=data_format)
  helpers.place_originals_checkpoint(tmp_path / 'model')
  helpers.restore(tmp_path / 'model', state)
  for v in (*state.network.variables, *state.momentum, state.global_step):
    np.testing.assert_array_equal(v.numpy(), golden[f'final/{tf1_name(v)}'])

  features, labels = golden_dataset(golden, slice(20, 21)).get_single_element()
  model_fn = tf.function(cifar10_main.cifar10_model_fn,
                         jit_compile=helpers.needs_xla(data_format))
  outputs = model_fn(features, labels, 'eval', state)
  np.testing.assert_allclose(
      outputs['probabilities'], golden['eval/probabilities'], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(outputs['classes'], golden['eval/classes'])
  np.testing.assert_allclose(outputs['loss'], golden['eval/loss'], rtol=1e-6)
  inferred = model_fn(features, None, 'infer', state)
  assert set(inferred) == {'classes', 'probabilities'}
  np.testing.assert_array_equal(inferred['classes'], golden['eval/classes'])


def test_goes_on_from_a_model_folder_of_2017(data_dir, tmp_path, log):
  model_dir = tmp_path / 'model'
  helpers.place_originals_checkpoint(model_dir)
  before = helpers.contents(model_dir)
  helpers.run(data_dir, model_dir, train_steps=312512, steps_per_eval=5,
              batch_size=16)
  assert any('step = 312511' in line for line in log)
  after = helpers.contents(model_dir)
  assert before.items() - after.items() == {
      (model_dir / 'checkpoint', before[model_dir / 'checkpoint'])}
  assert model_dir / 'model.ckpt-312512.index' in after


@pytest.mark.parametrize(
    ('batch_size', 'boundaries'),
    [(128, [39062, 58593, 78125]), (16, [312500, 468750, 625000]),
     (1000, [5000, 7500, 10000])])
def test_learning_rate_drops_after_the_boundaries(batch_size, boundaries):
  assert cifar10_main.learning_rate_boundaries(batch_size) == boundaries
  for i, boundary in enumerate([0, *boundaries]):
    for step in (boundary, boundary + 1):
      drops = i - (step == boundary > 0)
      actual = cifar10_main.learning_rate(
          tf.constant(step, tf.int64), batch_size).numpy()
      np.testing.assert_allclose(
          actual, 0.1 * batch_size / 128 * 0.1 ** drops, rtol=1e-7)


@pytest.mark.parametrize(
    ('drops', 'steps', 'last'), [({}, '', 0.1), ({1: 0.5}, '390', 0.05), (
        dict.fromkeys((1, 2, 3, 4), 0.2), '390, 781, 1171, 1562', 0.02)])
def test_any_number_of_drops(monkeypatch, log, drops, steps, last):
  monkeypatch.setattr(cifar10_main, 'LEARNING_RATE_DROPS', drops)
  cifar10_main.describe_run(helpers.make_state(batch_size=128))
  assert log[-1].endswith(f'The learning rate drops after steps {steps}')
  assert cifar10_main.learning_rate(
      tf.constant(10**9, tf.int64), 128).numpy() == np.float32(last)


def test_folder_is_one_of_the_originals_saver(tmp_path):
  """Either goes on from what the other saved and keeps five of both's. Of the
  original's .meta files, those of old checkpoints go.
  """
  def steps(ending):
    return sorted(int(path.stem.rpartition('-')[2])
                  for path in tmp_path.glob(f'model.ckpt-*.{ending}'))

  def listed():
    return tf.train.get_checkpoint_state(tmp_path).all_model_checkpoint_paths

  originals = helpers.tensors(helpers.GOLDEN + '.ckpt')
  graph = tf.Graph()
  with graph.as_default():
    session = tf.compat.v1.Session()
    variables = {name: tf.Variable(np.zeros_like(value), name=name)
                 for name, value in originals.items()}
    saver = tf.compat.v1.train.Saver(variables)
    session.run(tf.compat.v1.global_variables_initializer())
    for step in range(1, 7):
      variables['global_step'].load(step, session)
      saver.save(session, f'{tmp_path}/model.ckpt', step)

  state = helpers.make_state()
  assert helpers.restore(tmp_path, state) == f'{tmp_path}/model.ckpt-6'
  assert not state.network.kernel.numpy().any()
  for i, variable in enumerate(state.variables):
    variable.assign(tf.fill(variable.shape, tf.cast(i + 1, variable.dtype)))
  ours = helpers.tensors(helpers.save(tmp_path, state, 7, 8).newest)
  assert steps('index') == [4, 5, 6, 7, 8]
  assert steps('meta') == [4, 5, 6]
  assert [os.path.basename(path) for path in listed()] == [
      f'model.ckpt-{step}' for step in steps('index')]

  with graph.as_default(), session:
    saver.restore(session, tf.train.latest_checkpoint(tmp_path))
    restored = session.run(variables)
    saver.recover_last_checkpoints(listed())
    for step in (9, 10):
      saver.save(session, f'{tmp_path}/model.ckpt', step)
  assert steps('index') == [6, 7, 8, 9, 10]
  assert ours.keys() - originals.keys() == {
      'seed', 'train_accuracy', 'conditions'}
  for name, value in originals.items():
    assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)
    np.testing.assert_array_equal(restored[name], ours[name])
