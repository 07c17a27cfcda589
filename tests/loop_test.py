"""Tests of the loop: what it trains, logs, evaluates and saves, and when."""

import ast
import functools
import itertools
import os
import re
import shutil
import signal
import time
from unittest import mock

import numpy as np
import pytest
from tensorboard.backend.event_processing import (
  event_accumulator,
  plugin_event_accumulator,
)
import tensorflow as tf

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error
import cifar10_main
from tests.helpers import (
    NUMBER,
    contents,
    evaluate_only,
    make_state,
    matches,
    run,
    small_settings,
    tensors,
)


def test_log_prints_and_summaries(
    data_dir, tmp_path, log, capsys, monkeypatch):
  monkeypatch.setattr(cifar10_main, 'LOG_STEPS', 10)
  model_dir = tmp_path / 'model'
  run(data_dir, model_dir, train_steps=29, steps_per_eval=25)

  lines = matches(rf'loss = ({NUMBER}), step = (\d+)( \(\d+\.\d{{3}} sec\))?',
                  log)
  assert [int(step) for _, step, _ in lines] == [1, 11, 21, 26]
  assert [bool(seconds) for *_, seconds in lines] == [False, True, True, False]
  accuracy = matches(
      rf'cross_entropy = ({NUMBER}), learning_rate = ({NUMBER}), '
      rf'train_accuracy = ({NUMBER})( \(\d+\.\d{{3}} sec\))?', log)
  assert len(accuracy) == 4
  assert {rate for _, rate, *_ in accuracy} == {'0.0078125'}
  assert len(matches(rf'global_step/sec: ({NUMBER})', log)) == 2
  assert matches(r'Saving checkpoints for (\d+) into (.*)\.', log) == [
      (str(step), f'{model_dir}/model.ckpt') for step in (0, 25, 29)]
  assert len(matches(rf'Loss for final step: {NUMBER}\.', log)) == 2
  assert len(matches(
      r'Starting evaluation at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d', log)) == 2
  assert len(matches(
      r'Finished evaluation at \d{4}-\d\d-\d\d-\d\d:\d\d:\d\d', log)) == 2
  assert matches(r'Restoring parameters from (.*)', log) == [
      (f'{model_dir}/model.ckpt-{step}',) for step in (25, 29)]
  results = matches(
      rf'Saving dict for global step (\d+): accuracy = ({NUMBER}), '
      rf'global_step = (\d+), loss = ({NUMBER})', log)
  printed = matches(
      rf"{{'accuracy': ({NUMBER}), 'loss': ({NUMBER}), 'global_step': (\d+)}}",
      capsys.readouterr().out.splitlines())
  assert [result[0] for result in results] == ['25', '29']
  assert [(accuracy, loss, step) for step, accuracy, _, loss in results
          ] == printed

  train = event_accumulator.EventAccumulator(str(model_dir)).Reload()
  tags = train.Tags()['tensors']
  assert set(tags) == {'cross_entropy', 'learning_rate', 'train_accuracy',
                       'loss', 'global_step/sec', 'images/sec', 'images',
                       'accuracy', 'run', '_hparams_/session_start_info'}
  for tag in tags:
    steps = [event.step for event in train.Tensors(tag)]
    expected = {'global_step/sec': [11, 21], 'images/sec': [11, 21],
                'run': [0], '_hparams_/session_start_info': [0]}
    assert steps == expected.get(tag, [1, 11, 21, 26])
  for event, (loss, *_) in zip(train.Tensors('loss'), lines):
    assert tf.make_ndarray(event.tensor_proto) == np.float32(loss)
  # Width, height and then the pictures themselves.
  width, height, *pictures = tf.make_ndarray(
      train.Tensors('images')[0].tensor_proto)
  assert (width, height, len(pictures)) == (b'32', b'32', 6)
  picture = tf.io.decode_png(pictures[0])
  assert picture.shape == [32, 32, 3]
  assert (picture.numpy().min(), picture.numpy().max()) == (0, 255)

  test = event_accumulator.EventAccumulator(str(model_dir / 'eval')).Reload()
  assert set(test.Tags()['tensors']) == {
      'accuracy', 'loss', 'confusion_matrix',
      *(f'per_class/{name}' for name in cifar10.CLASSES)}
  for tag in test.Tags()['tensors']:
    assert [event.step for event in test.Tensors(tag)] == [25, 29]
  text = tf.make_ndarray(train.Tensors('run')[0].tensor_proto).item()
  for expected in (r'--batch_size\|10', r'seed\|\d+', 'ResNet-8',
                   rf'TensorFlow\|{tf.__version__}', r'device\|.*CPU'):
    assert re.search(expected, text.decode())


def test_tensorboard_forgets_what_is_trained_again(
    data_dir, tmp_path, monkeypatch, capsys):
  """After step 8 the run goes on from step 4: no value stands there twice."""
  monkeypatch.setattr(cifar10_main, 'LOG_STEPS', 1)
  run(data_dir, tmp_path, train_steps=8)
  for path in tmp_path.glob('model.ckpt-8.*'):
    path.unlink()
  time.sleep(1)  # the files of events are ordered by seconds
  run(data_dir, tmp_path, train_steps=8)
  for folder, tag, steps in ((tmp_path, 'loss', range(1, 9)),
                             (tmp_path / 'eval', 'accuracy', (4, 8))):
    events = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Tensors(tag)] == list(steps)


def test_events_without_room(data_dir, tmp_path, monkeypatch, log, capsys):
  monkeypatch.setattr(cifar10_main, 'LOG_STEPS', 1)
  monkeypatch.setattr(cifar10_main.shutil, 'disk_usage',
                      lambda folder: mock.Mock(free=0))
  run(data_dir, tmp_path)
  assert log.count(f'No room in {tmp_path}: TensorBoard misses values') == 1


def test_batch_size_that_moves_the_learning_rate(log):
  """After 104 steps in batches of 10: two of them were logged."""
  state = make_state()
  state.global_step.assign(104)
  state.train_accuracy.assign([3, 20])
  boundaries = {10: [104, 150, 200], 25: [42, 103, 104], 9: [105, 150, 200]}
  with mock.patch.object(
      cifar10_main, 'learning_rate_boundaries', boundaries.get):
    for batch_size in (10, 9, 25):
      cifar10_main.warn_of_drops(
          small_settings(None, None, batch_size=batch_size, steps_per_eval=400),
          state)
  assert log == [
      'The batch size changes from 10 to 25, and with it the learning rate: 2 '
      'of its drops lie before step 104, not 0']


def run_cycles(monkeypatch, inner_loop, **changes):
  """Runs a stand-in for the inner loop; returns what the hooks are given."""
  monkeypatch.setattr(cifar10_main, 'make_inner_loop', lambda *_: inner_loop)
  seen = []
  assert cifar10_main.run_cycles(
      small_settings(None, 'unused', **changes), make_state(), [],
      lambda: False, hooks=[lambda *values: seen.append(values)])
  return seen


def test_train_accuracy_is_the_mean_over_logged_batches(monkeypatch):
  step = 0
  # Of steps 1 and 101, 20 and 33 right of 128; the others do not count.
  correct = {1: 20, 101: 33}

  def inner_loop(iterator, num_steps):
    nonlocal step
    step += num_steps.numpy()
    values = {'correct': correct.get(step, 128), 'finite_steps': num_steps,
              'loss': 2.0, 'cross_entropy': 1.0, 'learning_rate': 0.1}
    return {name: tf.constant(value) for name, value in values.items()}

  seen = run_cycles(monkeypatch, inner_loop, train_steps=400,
                    steps_per_eval=200, batch_size=128)
  assert step == 400
  assert {at: str(values['train_accuracy']) for at, values in seen} == {
      1: '0.15625', 101: '0.20703125', 201: '1.0', 301: '1.0'}


def test_pieces_take_about_a_second(monkeypatch):
  """The clock and signals are looked at between them."""
  clock = 0.0

  def inner_loop(iterator, num_steps):
    nonlocal clock
    clock += 0.125 * num_steps.numpy()
    values = {'correct': 1, 'finite_steps': num_steps, 'loss': 2.0}
    return {name: tf.constant(value) for name, value in values.items()}

  pieces = []
  monkeypatch.setattr(cifar10_main.time, 'perf_counter', lambda: clock)
  monkeypatch.setattr(cifar10_main, 'show_progress',
                      lambda settings, *values: pieces.append(values))
  run_cycles(monkeypatch, inner_loop, train_steps=110, steps_per_eval=108)
  # At first a single step, which is also traced; always up to a logged one, and
  # to the end of the cycle.
  steps, ends, seconds = zip(*pieces)
  assert steps == (1, *range(9, 98, 8), 101, 108, 109, 110)
  assert ends == (108,) * (len(steps) - 2) + (110, 110)
  assert seconds[0] is None
  np.testing.assert_allclose(seconds[1:], 0.125)


@pytest.mark.parametrize('xla', ['on', 'off'])
def test_each_step_is_traced_once(data_dir, tmp_path, monkeypatch, log, xla):
  model_fn, traced = cifar10_main.cifar10_model_fn, []

  def spy(features, labels, mode, network):
    traced.append(mode)
    return model_fn(features, labels, mode, network)

  monkeypatch.setattr(cifar10_main, 'cifar10_model_fn', spy)
  # Three cycles; the last one is shorter, as is the last batch to evaluate.
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=3, xla=xla)
  assert matches(r'loss = .*, step = (\d+)', log) == [('1',), ('4',), ('7',)]
  assert traced == ['train', 'eval']
  assert any(f'XLA {xla}' in line for line in log)


@pytest.mark.parametrize('xla', [False, True])
def test_xla_compiles_the_step(data_dir, xla):
  inner_loop = cifar10_main.make_inner_loop(make_state(), 10, xla)
  iterator = iter(cifar10_main.input_fn('train', str(data_dir), 10))
  function = inner_loop.get_concrete_function(iterator, tf.constant(1))
  library = function.graph.as_graph_def().library.function
  assert any(f.attr['_XlaMustCompile'].b for f in library) == xla


def test_evaluation_averages(data_dir, capsys):
  """Accuracy is over images, loss over batches, the short one included."""
  state = make_state()
  dataset = cifar10_main.input_fn('eval', str(data_dir), 10)
  eval_step = cifar10_main.make_eval_step(state.network)
  results, matrix = cifar10_main.evaluate(eval_step, dataset, 'path', 7)
  losses, correct, expected = [], 0, np.zeros([10, 10])
  for features, labels in dataset:
    outputs = cifar10_main.cifar10_model_fn(
        features, labels, 'eval', state.network)
    losses.append(outputs['loss'])
    correct += int(outputs['correct'])
    for label, predicted in zip(np.argmax(labels, 1), outputs['classes']):
      expected[label, predicted] += 1
  assert len(losses) == 3
  np.testing.assert_allclose(results['loss'], np.mean(losses), rtol=1e-6)
  assert results['accuracy'] == float(str(np.float32(correct / 23)))
  assert results['global_step'] == 7
  np.testing.assert_array_equal(matrix, expected)
  images = np.maximum(expected.sum(axis=1), 1)
  np.testing.assert_allclose(
      [*cifar10_main.accuracies(matrix).values()], expected.diagonal() / images)
  assert capsys.readouterr().out == f'{results}\n'


def test_batches_are_copied_to_a_gpu(data_dir, monkeypatch, capsys):
  """A second CPU stands in for the GPU."""
  state = make_state()
  eval_step = cifar10_main.make_eval_step(state.network)
  dataset = cifar10_main.input_fn('eval', str(data_dir), 10)
  expected, _ = cifar10_main.evaluate(eval_step, dataset, 'path', 7)
  device = tf.config.list_logical_devices('CPU')[1]
  monkeypatch.setattr(
      tf.config, 'list_logical_devices', lambda kind: [device])
  results, _ = cifar10_main.evaluate(
      cifar10_main.make_eval_step(state.network), dataset, 'path', 7)
  assert results == expected
  train_data = cifar10_main.distributed_input(10, functools.partial(
      cifar10_main.input_fn, 'train', str(data_dir), 10))
  for features, _ in itertools.islice(train_data, 2):
    assert features.backing_device.endswith('CPU:1')


def test_resumes_and_ends(data_dir, tmp_path, log, capsys):
  run(data_dir, tmp_path / 'model', train_steps=3, steps_per_eval=3)
  del log[:]
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=4)
  # An interrupted cycle is finished first, the last one may be shorter.
  assert [step for step, in matches(r'loss = .*, step = (\d+)', log)] == ['5']
  assert [step for step, in matches(r'Saving checkpoints for (\d+) .*', log)
          ] == ['4', '8']
  assert any('Training steps 4 to 8' in line for line in log)
  evaluated = capsys.readouterr().out.splitlines()
  assert len(evaluated) == 3

  before = contents(tmp_path / 'model')
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=4)
  assert any('All 8 steps are trained already' in line for line in log)
  assert capsys.readouterr().out.splitlines() == evaluated[-1:]
  checkpoints = {path: data for path, data in before.items()
                 if 'ckpt' in path.name}
  assert checkpoints.items() <= contents(tmp_path / 'model').items()


def test_resumed_run_is_exact(data_dir, tmp_path, log, capsys, monkeypatch):
  """An interruption changes no bit, log line or result. The seed is kept."""
  monkeypatch.setattr(cifar10_main, 'LOG_STEPS', 10)

  def lines():
    found = [re.sub(r' \(.* sec\)', '', line) for line in log
             if re.match('cross_entropy = |loss = ', line)]
    del log[:]
    return found, capsys.readouterr().out.splitlines()

  kwargs = {'train_steps': 25, 'steps_per_eval': 12}
  run(data_dir, tmp_path / 'whole', seed=3, **kwargs)
  whole_log, whole_results = lines()
  run(data_dir, tmp_path / 'model', seed=3, **{**kwargs, 'train_steps': 11})
  run(data_dir, tmp_path / 'model', **kwargs)
  resumed_log, (stopped_at, *resumed_results) = lines()
  assert "'global_step': 11" in stopped_at
  assert resumed_results == whole_results
  assert resumed_log == whole_log
  assert len(whole_log) == 10
  np.testing.assert_equal(tensors(tmp_path / 'model' / 'model.ckpt-25'),
                          tensors(tmp_path / 'whole' / 'model.ckpt-25'))

  with pytest.raises(Cifar10Error, match=r'trained with --seed=3, not 4'):
    run(data_dir, tmp_path / 'model', seed=4, **kwargs)
  kernels = [make_state(seed=seed).network.kernel.numpy() for seed in (3, 3, 4)]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize(
    ('save_checkpoints_secs', 'expected'), [(600, {0, 4}), (0, {0, 1, 4})])
def test_saves_by_the_clock(
    data_dir, tmp_path, log, save_checkpoints_secs, expected):
  run(data_dir, tmp_path / 'model', train_steps=4,
      save_checkpoints_secs=save_checkpoints_secs)
  saved = [int(step) for step, in matches(
      r'Saving checkpoints for (\d+) .*', log)]
  assert len(saved) == len(set(saved))
  assert expected <= set(saved)
  assert save_checkpoints_secs == 0 or expected == set(saved)


def test_evaluates_the_end_of_a_cycle_that_was_killed_there(
    data_dir, tmp_path, capsys, trained):
  model_dir = tmp_path / 'model'
  shutil.copytree(trained.model_dir, model_dir)
  for path in model_dir.glob('model.ckpt-8*'):
    path.unlink()
  run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out.splitlines() == trained.printed


def test_run_has_its_folder_to_itself(data_dir, tmp_path):
  asked = []

  def interrupted():
    asked.append(True)
    with (pytest.raises(Cifar10Error, match='is in use by another run'),
          cifar10.sole_use(str(tmp_path / 'model'))):
      pass
    return False

  run(data_dir, tmp_path / 'model', interrupted=interrupted)
  assert asked


def test_eval_only_writes_nothing(data_dir, tmp_path, capsys, trained):
  before = contents(trained.model_dir)
  for path in (data_dir / cifar10.FOLDER_NAME).glob('data_batch*'):
    path.unlink()  # not needed
  evaluate_only(data_dir, trained.model_dir)
  result, *classes = capsys.readouterr().out.splitlines()
  assert result == trained.printed[-1]
  names, accuracies = zip(*(line.split() for line in classes))
  assert names == cifar10.CLASSES
  # Of the 23 images, how many has each class?
  labels = cifar10.read_records(
      data_dir / cifar10.FOLDER_NAME / cifar10.TEST_FILE)[:, 0]
  right = np.bincount(labels, minlength=10) * np.array(accuracies, float)
  accuracy = ast.literal_eval(result)['accuracy']
  np.testing.assert_allclose(sum(right), accuracy * 23, atol=1e-2)
  assert contents(trained.model_dir) == before


@pytest.mark.parametrize('save_checkpoints_secs', [600, 0])
def test_loss_that_is_not_finite(
    data_dir, tmp_path, monkeypatch, save_checkpoints_secs):
  """Also if a checkpoint after step 1 is due, of finite but huge weights."""
  monkeypatch.setattr(cifar10_main, 'INITIAL_LEARNING_RATE', 1e30)
  at = (r'loss is not finite at step 2 \(looked at after steps 1 and [234]\)'
        if save_checkpoints_secs else 'is not finite after step 1, or its norm')
  with pytest.raises(Cifar10Error, match=(
      f'{at}, nothing of it is saved: .* try a smaller --batch_size')):
    run(data_dir, tmp_path / 'model',
        save_checkpoints_secs=save_checkpoints_secs)
  indices = (tmp_path / 'model').glob('*.index')
  assert [path.name for path in indices] == ['model.ckpt-0.index']


@pytest.mark.parametrize('batches', [0, 1])
def test_interrupted_evaluation(data_dir, tmp_path, capsys, log, batches):
  """It ends after a batch; the same command makes it again."""
  asked = []

  def interrupted():
    in_evaluation = 'Starting evaluation' in ''.join(log)
    asked.extend([True] * in_evaluation)
    return len(asked) > batches

  model_dir = tmp_path / 'model'
  assert not run(data_dir, model_dir, interrupted, train_steps=4)
  assert len(asked) == batches + 1
  assert not capsys.readouterr().out
  assert log[-1] == 'Stopped: the same command evaluates step 4'
  assert run(data_dir, model_dir, train_steps=4)
  assert "'global_step': 4" in capsys.readouterr().out


def test_stop_button_of_a_notebook(data_dir, tmp_path, log, monkeypatch):
  """The first KeyboardInterrupt saves; before the first step it ends at once.
  """
  monkeypatch.setattr(
      cifar10_main, 'log_values', lambda step, values: step == 5 and os.kill(
          os.getpid(), signal.SIGINT))
  model_dir = tmp_path / 'model'
  before = signal.signal(signal.SIGINT, signal.default_int_handler)
  try:
    assert not run(data_dir, model_dir, interrupted=None, train_steps=400)
    assert tf.train.latest_checkpoint(model_dir).endswith('-5')
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    monkeypatch.setattr(cifar10_main, 'describe_run', lambda *_: os.kill(
        os.getpid(), signal.SIGINT))
    with pytest.raises(KeyboardInterrupt):
      run(data_dir, model_dir, interrupted=None, train_steps=400)
  finally:
    signal.signal(signal.SIGINT, before)
