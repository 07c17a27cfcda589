"""Tests against the numbers and the checkpoint of the original."""

import numpy as np
import pytest
import tensorflow as tf

import cifar10_main
import resnet_model
from resnet_model import tf1_name
from tests.helpers import (
    GOLDEN,
    contents,
    difference,
    make_state,
    needs_xla,
    place_originals_checkpoint,
    restore,
    run,
    save,
    tensors,
)


def golden_dataset(golden, batches):
  features = tf.image.per_image_standardization(
      golden['images'][batches].astype(np.float32))
  labels = tf.one_hot(golden['labels'][batches], 10)
  return tf.data.Dataset.from_tensor_slices((features, labels))


def initial_state(golden, data_format, dtype='fp32'):
  # Not by make_state: it refuses a layout for which a CPU needs XLA.
  state = cifar10_main.TrainState(resnet_model.cifar10_resnet_v2_generator(
      8, 10, data_format, cifar10_main.DTYPES[dtype]))
  for variable in state.network.variables:
    variable.assign(golden[f'init/{tf1_name(variable)}'])
  state.global_step.assign(312490)
  return state


def test_training_has_the_originals_numbers(golden):
  state = initial_state(golden, 'channels_last')
  inner_loop = cifar10_main.make_inner_loop(state, batch_size=16)
  iterator = iter(golden_dataset(golden, slice(20)))
  steps = [inner_loop(iterator, tf.constant(1)) for _ in range(20)]

  for name in ('loss', 'cross_entropy'):
    ours = np.array([values[name] for values in steps])
    np.testing.assert_allclose(ours, golden[f'train/{name}'], rtol=2e-6)
  np.testing.assert_array_equal(
      np.array([values['learning_rate'] for values in steps]),
      golden['train/learning_rate'])
  assert state.global_step.numpy() == golden['final/global_step'] == 312510
  for variable in state.network.variables:
    name = tf1_name(variable)
    assert difference(variable.numpy(), golden[f'final/{name}']) < 2e-3, name
  for variable in state.momentum:
    name = tf1_name(variable)
    assert difference(variable.numpy(), golden[f'final/{name}']) < 2e-2, name


@pytest.fixture(scope='module')
def originals_steps(golden):
  """All variables before and after each golden step, in float32.

  On the CPU: on a GPU, where each run sums in another order, 20 steps may lead
  further from the original than one step may.
  """
  with tf.device('CPU'):
    state = initial_state(golden, 'channels_last')
    step = cifar10_main.make_train_step(state, 16)
    values = [[v.numpy() for v in state.variables]]
    for batch in golden_dataset(golden, slice(20)):
      step(*batch)
      values.append([v.numpy() for v in state.variables])
  return values


def steps_side_by_side(golden, originals_steps, data_format, dtype, xla):
  """Takes each golden step from the variables of channels_last in float32.

  Not a run of 20: an activation that is zero but for its rounding may fall on
  the other side of a ReLU, and the gradient jumps. Whether a run in another
  order of summation meets one of these in 20 steps is luck.

  Yields:
    The step's golden values and its own, the state, and the values that its
    variables should have after the step.
  """
  state = initial_state(golden, data_format, dtype)
  step = cifar10_main.make_train_step(state, 16, xla)
  for i, batch in enumerate(golden_dataset(golden, slice(20))):
    for variable, value in zip(state.variables, originals_steps[i]):
      variable.assign(value)
    names = 'loss', 'cross_entropy', 'learning_rate'
    yield ({name: golden[f'train/{name}'][i] for name in names}, step(*batch),
           state, originals_steps[i + 1])


def by_kind(state, expected):
  """Returns pairs of variables and values: the network's, and the momentum."""
  pairs = list(zip(state.variables, expected))
  momentum = {v.ref() for v in state.momentum}
  network = {v.ref() for v in state.network.variables}
  return ([pair for pair in pairs if pair[0].ref() in network],
          [pair for pair in pairs if pair[0].ref() in momentum])


@pytest.mark.parametrize(('data_format', 'xla'), [
    ('channels_last', True), ('channels_first', False),
    pytest.param('channels_first', True, marks=pytest.mark.slow)])
def test_each_step_has_the_originals_numbers(
    golden, originals_steps, data_format, xla):
  xla = xla or needs_xla(data_format)
  for expected_values, values, state, expected in steps_side_by_side(
      golden, originals_steps, data_format, 'fp32', xla):
    for name, value in expected_values.items():
      np.testing.assert_allclose(values[name], value, rtol=2e-6)
    network, momentum = by_kind(state, expected)
    assert len(network) == 40
    for ours, theirs in network:
      assert difference(ours.numpy(), theirs) < 2e-3, ours.name
    assert len(momentum) == 26
    for ours, theirs in momentum:
      assert difference(ours.numpy(), theirs) < 2e-2, ours.name


@pytest.mark.parametrize(('dtype', 'xla'), [
    ('bf16', False), ('fp16', False),
    pytest.param('bf16', True, marks=pytest.mark.slow),
    pytest.param('fp16', True, marks=pytest.mark.slow)])
def test_each_step_has_about_the_same_numbers_in_16_bits(
    golden, originals_steps, dtype, xla):
  for expected_values, values, state, expected in steps_side_by_side(
      golden, originals_steps, None, dtype, xla):
    for name, value in expected_values.items():
      assert values[name].dtype == tf.float32
      np.testing.assert_allclose(values[name], value, rtol=1e-3)
    _, momentum = by_kind(state, expected)
    ours, theirs = (
        np.concatenate([np.ravel(v) for v in side]) for side in zip(*momentum))
    assert 1e-4 < difference(ours, theirs) < 0.15
  assert all(v.dtype == tf.float32 for v in state.network.variables)


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_evaluation_of_the_originals_checkpoint(
    tmp_path, golden, data_format):
  state = initial_state(golden, data_format)
  place_originals_checkpoint(tmp_path / 'model')
  restore(tmp_path / 'model', state)
  for variable in (*state.network.variables, *state.momentum,
                   state.global_step):
    name = tf1_name(variable)
    np.testing.assert_array_equal(variable.numpy(), golden[f'final/{name}'])

  features, labels = golden_dataset(golden, slice(20, 21)).get_single_element()
  model_fn = tf.function(
      cifar10_main.cifar10_model_fn, jit_compile=needs_xla(data_format))
  outputs = model_fn(features, labels, 'eval', state.network)
  np.testing.assert_allclose(
      outputs['probabilities'], golden['eval/probabilities'], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(outputs['classes'], golden['eval/classes'])
  np.testing.assert_allclose(outputs['loss'], golden['eval/loss'], rtol=1e-6)
  inferred = model_fn(features, None, 'infer', state.network)
  assert set(inferred) == {'classes', 'probabilities'}
  np.testing.assert_array_equal(inferred['classes'], golden['eval/classes'])


def test_goes_on_from_a_model_folder_of_2017(data_dir, tmp_path, log, golden):
  model_dir = tmp_path / 'model'
  place_originals_checkpoint(model_dir)
  before = contents(model_dir)
  run(data_dir, model_dir, train_steps=312512, steps_per_eval=5, batch_size=16)
  assert any('step = 312511' in line for line in log)
  after = contents(model_dir)
  assert before.items() - after.items() == {
      (model_dir / 'checkpoint', before[model_dir / 'checkpoint'])}
  assert model_dir / 'model.ckpt-312512.index' in after
  kernel = tensors(model_dir / 'model.ckpt-312512')['conv2d/kernel/Momentum']
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


def test_checkpoint_is_the_originals_but_for_two_tensors(tmp_path):
  """A Saver of TensorFlow 1 restores it by the original's names."""
  state = make_state()
  for i, variable in enumerate(state.variables):
    variable.assign(tf.fill(variable.shape, tf.cast(i + 1, variable.dtype)))
  path = save(tmp_path, state).newest
  ours, originals = tensors(path), tensors(GOLDEN + '.ckpt')
  assert ours.keys() - originals.keys() == {'seed', 'train_accuracy'}
  for name, value in originals.items():
    assert (ours[name].dtype, ours[name].shape) == (value.dtype, value.shape)

  with tf.Graph().as_default(), tf.compat.v1.Session() as session:
    variables = {
        name: tf.Variable(np.zeros_like(value), name=name)
        for name, value in originals.items()}
    tf.compat.v1.train.Saver(variables).restore(
        session, tf.train.latest_checkpoint(tmp_path))
    restored = session.run(variables)
  for variable in state.variables:
    if tf1_name(variable) in originals:
      np.testing.assert_array_equal(
          restored[tf1_name(variable)], variable.numpy())
