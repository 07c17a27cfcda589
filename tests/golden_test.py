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


def test_training_has_the_originals_numbers(golden):
  state = initial_state(golden, data_format='channels_last')
  inner_loop = cifar10_main.make_inner_loop(state)
  iterator = iter(golden_dataset(golden, slice(20)))
  steps = [inner_loop(iterator, tf.constant(1)) for _ in range(20)]

  for name in ('loss', 'cross_entropy'):
    ours = np.array([values[name] for values in steps])
    np.testing.assert_allclose(ours, golden[f'train/{name}'], rtol=2e-6)
  np.testing.assert_array_equal(
      np.array([values['learning_rate'] for values in steps]),
      golden['train/learning_rate'])
  assert state.global_step.numpy() == golden['final/global_step'] == 312510
  for variables, tolerance in ((state.network.variables, 2e-3),
                               (state.momentum, 2e-2)):
    for variable in variables:
      theirs = golden[f'final/{tf1_name(variable)}']
      difference = helpers.difference(variable.numpy(), theirs)
      assert difference < tolerance, variable.name


@pytest.fixture(scope='module')
def originals_steps(golden):
  """All variables before and after each golden step, in float32.

  On the CPU: on a GPU, where each run sums in another order, 20 steps may lead
  further from the original than one step may.
  """
  with tf.device('CPU'):
    state = initial_state(golden, data_format='channels_last')
    step = cifar10_main.make_train_step(state)
    values = [[v.numpy() for v in state.variables]]
    for batch in golden_dataset(golden, slice(20)):
      step(*batch)
      values.append([v.numpy() for v in state.variables])
  return values


def steps_side_by_side(golden, originals_steps, **changes):
  """Takes each golden step from the variables of channels_last in float32.

  Not a run of 20: an activation that is zero but for its rounding may fall on
  the other side of a ReLU, and the gradient jumps. Whether a run in another
  order of summation meets one of these in 20 steps is luck.

  Yields:
    The step's golden values and its own; and, first for the network and then
    for the momentum, pairs of a variable and the value it should have after it.
  """
  state = initial_state(golden, **changes)
  step = cifar10_main.make_train_step(state)
  network = {v.ref() for v in state.network.variables}
  momentum = {v.ref() for v in state.momentum}
  for i, batch in enumerate(golden_dataset(golden, slice(20))):
    for variable, value in zip(state.variables, originals_steps[i]):
      variable.assign(value)
    values = step(*batch)
    pairs = list(zip(state.variables, originals_steps[i + 1]))
    yield ({name: golden[f'train/{name}'][i]
            for name in ('loss', 'cross_entropy', 'learning_rate')}, values,
           *([pair for pair in pairs if pair[0].ref() in kind]
             for kind in (network, momentum)))


@pytest.mark.parametrize(('data_format', 'xla'), [
    ('channels_first', 'off'),
    pytest.param('channels_last', 'on', marks=pytest.mark.slow),
    pytest.param('channels_first', 'on', marks=pytest.mark.slow)])
def test_each_step_has_the_originals_numbers(
    golden, originals_steps, data_format, xla):
  if helpers.needs_xla(data_format):
    xla = 'on'
  for expected, values, network, momentum in steps_side_by_side(
      golden, originals_steps, data_format=data_format, xla=xla):
    for name, value in expected.items():
      np.testing.assert_allclose(values[name], value, rtol=2e-6)
    assert len(network) == 40
    for ours, theirs in network:
      assert helpers.difference(ours.numpy(), theirs) < 2e-3, ours.name
    assert len(momentum) == 26
    for ours, theirs in momentum:
      assert helpers.difference(ours.numpy(), theirs) < 2e-2, ours.name


@pytest.mark.parametrize(('dtype', 'xla'), [
    ('bf16', 'off'), ('fp16', 'off'),
    pytest.param('bf16', 'on', marks=pytest.mark.slow),
    pytest.param('fp16', 'on', marks=pytest.mark.slow)])
def test_each_step_has_about_the_same_numbers_in_16_bits(
    golden, originals_steps, dtype, xla):
  for expected, values, network, momentum in steps_side_by_side(
      golden, originals_steps, dtype=dtype, xla=xla):
    for name, value in expected.items():
      assert values[name].dtype == tf.float32
      np.testing.assert_allclose(values[name], value, rtol=1e-3)
    assert all(variable.dtype == tf.float32 for variable, _ in network)
    ours, theirs = (np.concatenate([np.ravel(v) for v in side])
                    for side in zip(*momentum))
    assert 1e-4 < helpers.difference(ours, theirs) < 0.15


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_evaluation_of_the_originals_checkpoint(
    tmp_path, golden, data_format):
  state = initial_state(golden, data_format=data_format)
  helpers.place_originals_checkpoint(tmp_path / 'model')
  helpers.restore(tmp_path / 'model', state)
  for variable in (*state.network.variables, *state.momentum,
                   state.global_step):
    name = tf1_name(variable)
    np.testing.assert_array_equal(variable.numpy(), golden[f'final/{name}'])

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


def test_goes_on_from_a_model_folder_of_2017(data_dir, tmp_path, log, golden):
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
  kernel = helpers.tensors(
      model_dir / 'model.ckpt-312512')['conv2d/kernel/Momentum']
  assert np.isfinite(kernel).all()
  assert not np.array_equal(kernel, golden['final/conv2d/kernel/Momentum'])


@pytest.mark.parametrize(
    ('batch_size', 'boundaries'),
    [(128, (39062, 58593, 78125)), (16, (312500, 468750, 625000)),
     (1000, (5000, 7500, 10000))])
def test_learning_rate_drops_after_the_boundaries(batch_size, boundaries):
  assert cifar10_main.learning_rate_boundaries(batch_size) == list(boundaries)
  initial = 0.1 * batch_size / 128
  rates = [initial, initial * 0.1, initial * 0.01, initial * 0.001]
  for i, boundary in enumerate(boundaries):
    for step, rate in ((boundary, rates[i]), (boundary + 1, rates[i + 1])):
      actual = cifar10_main.learning_rate(
          tf.constant(step, tf.int64), batch_size).numpy()
      np.testing.assert_allclose(actual, rate, rtol=1e-7)
  actual = cifar10_main.learning_rate(tf.constant(0, tf.int64), batch_size)
  assert actual.numpy() == np.float32(initial)


def originals_graph():
  """Returns variables with the original's names, in the graph, and a Saver."""
  variables = {
      name: tf.Variable(np.zeros_like(value), name=name)
      for name, value in helpers.tensors(helpers.GOLDEN + '.ckpt').items()}
  return variables, tf.compat.v1.train.Saver(variables)


def steps_listed(model_dir):
  """Returns the steps of the checkpoints that the list names, and the files."""
  listed = tf.train.get_checkpoint_state(model_dir).all_model_checkpoint_paths
  found = sorted(int(path.stem.rpartition('-')[2])
                 for path in model_dir.glob('model.ckpt-*.index'))
  return [int(os.path.basename(path).split('-')[1]) for path in listed], found


def test_folder_is_one_of_the_originals_saver(tmp_path):
  """It restores what the port saved, adds its own and still keeps five."""
  state = helpers.make_state()
  for i, variable in enumerate(state.variables):
    variable.assign(tf.fill(variable.shape, tf.cast(i + 1, variable.dtype)))
  path = helpers.save(tmp_path, state, 3, 4, 5, 6).newest
  ours = helpers.tensors(path)
  originals = helpers.tensors(helpers.GOLDEN + '.ckpt')
  assert ours.keys() - originals.keys() == {
      'seed', 'train_accuracy', 'conditions'}
  for name, value in originals.items():
    assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)

  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    variables, saver = originals_graph()
    saver.restore(session, tf.train.latest_checkpoint(tmp_path))
    restored = session.run(variables)
    saver.recover_last_checkpoints(
        tf.train.get_checkpoint_state(tmp_path).all_model_checkpoint_paths)
    for step in (7, 8):
      saver.save(session, f'{tmp_path}/model.ckpt', step)
  for name, value in restored.items():
    np.testing.assert_array_equal(value, ours[name])
  assert steps_listed(tmp_path) == ([4, 5, 6, 7, 8],) * 2


def test_goes_on_from_a_folder_of_the_originals_saver(tmp_path):
  """With its .meta files, too, of which those of old checkpoints go."""
  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    variables, saver = originals_graph()
    session.run(tf.compat.v1.global_variables_initializer())
    for step in range(1, 7):
      variables['global_step'].load(step, session)
      saver.save(session, f'{tmp_path}/model.ckpt', step)
  state = helpers.make_state()
  assert helpers.restore(tmp_path, state) == f'{tmp_path}/model.ckpt-6'
  assert not state.network.kernel.numpy().any()
  helpers.save(tmp_path, state, 7, 8)
  assert steps_listed(tmp_path) == ([4, 5, 6, 7, 8],) * 2
  assert {path.stem for path in tmp_path.glob('*.meta')} == {
      'model.ckpt-4', 'model.ckpt-5', 'model.ckpt-6'}
