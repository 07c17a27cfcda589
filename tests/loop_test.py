"""Tests of the loop: what it trains, logs, evaluates and saves, and when."""

import ast
import functools
import itertools
import re
import shutil
import time

import numpy as np
import pytest
from tensorboard.backend.event_processing import (
    event_accumulator,
    plugin_event_accumulator,
)
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


@pytest.fixture
def log_steps(monkeypatch):
  return functools.partial(monkeypatch.setattr, cifar10_main, 'LOG_STEPS')


def read_events(folder):
  return event_accumulator.EventAccumulator(str(folder)).Reload()


def test_log_prints_and_summaries(data_dir, tmp_path, log, capsys, log_steps):
  log_steps(10)
  model_dir, number = tmp_path / 'model', helpers.NUMBER
  helpers.run(data_dir, model_dir, train_steps=29, steps_per_eval=25)

  def logged(pattern):
    return helpers.matches(pattern, log)

  lines = logged(rf'loss = ({number}), step = (\d+)( \(\d+\.\d{{3}} sec\))?')
  assert [int(step) for _, step, _ in lines] == [1, 11, 21, 26]
  assert [bool(seconds) for *_, seconds in lines] == [False, True, True, False]
  accuracy = logged(
      rf'cross_entropy = ({number}), learning_rate = ({number}), '
      rf'train_accuracy = ({number})( \(\d+\.\d{{3}} sec\))?')
  assert len(accuracy) == 4
  assert {rate for _, rate, *_ in accuracy} == {'0.0078125'}
  assert len(logged(rf'global_step/sec: ({number})')) == 2
  assert logged(r'Saving checkpoints for (\d+) into (.*)\.') == [
      (str(step), f'{model_dir}/model.ckpt') for step in (0, 25, 29)]
  assert len(logged(rf'Loss for final step: {number}\.')) == 2
  assert len(logged(
      r'Starting evaluation at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d')) == 2
  assert len(logged(
      r'Finished evaluation at \d{4}-\d\d-\d\d-\d\d:\d\d:\d\d')) == 2
  assert logged(r'Restoring parameters from (.*)') == [
      (f'{model_dir}/model.ckpt-{step}',) for step in (25, 29)]
  results = logged(
      rf'Saving dict for global step (\d+): accuracy = ({number}), '
      rf'global_step = (\d+), loss = ({number})')
  printed = helpers.matches(
      rf"{{'accuracy': ({number}), 'loss': ({number}), 'global_step': (\d+)}}",
      capsys.readouterr().out.splitlines())
  assert [result[0] for result in results] == ['25', '29']
  assert [(accuracy, loss, step) for step, accuracy, _, loss in results
          ] == printed

  train = read_events(model_dir)
  tags = train.Tags()['tensors']
  assert set(tags) == {'cross_entropy', 'learning_rate', 'train_accuracy',
                       'loss', 'global_step/sec', 'images/sec', 'images',
                       'accuracy', 'run'}
  for tag in tags:
    expected = {'global_step/sec': [11, 21], 'images/sec': [11, 21],
                'run': [0]}.get(tag, [1, 11, 21, 26])
    assert [event.step for event in train.Tensors(tag)] == expected
  for event, (loss, *_) in zip(train.Tensors('loss'), lines):
    assert tf.make_ndarray(event.tensor_proto) == np.float32(loss)
  # Width, height and then the pictures themselves.
  width, height, *pictures = tf.make_ndarray(
      train.Tensors('images')[0].tensor_proto)
  assert (width, height, len(pictures)) == (b'32', b'32', 6)
  picture = tf.io.decode_png(pictures[0])
  assert picture.shape == [32, 32, 3]
  assert (picture.numpy().min(), picture.numpy().max()) == (0, 255)

  test = read_events(model_dir / 'eval')
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
    data_dir, tmp_path, log_steps, capsys):
  """After step 8 the run goes on from step 4: no value stands there twice."""
  log_steps(1)
  helpers.run(data_dir, tmp_path, train_steps=8)
  for path in tmp_path.glob('model.ckpt-8.*'):
    path.unlink()
  time.sleep(1)  # the files of events are ordered by seconds
  helpers.run(data_dir, tmp_path, train_steps=8)
  for folder, tag, steps in ((tmp_path, 'loss', range(1, 9)),
                             (tmp_path / 'eval', 'accuracy', (4, 8))):
    events = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
    assert [event.step for event in events.Tensors(tag)] == list(steps)


def test_hooks_see_what_is_logged_and_can_stop_the_run(
    data_dir, tmp_path, log, log_steps):
  log_steps(3)
  seen = []
  assert not helpers.run(
      data_dir, tmp_path / 'model', lambda: len(seen) == 6, train_steps=400,
      steps_per_eval=400, hooks=[lambda *values: seen.append(values)] * 2)
  assert [step for step, _ in seen] == [1, 1, 4, 4, 7, 7]
  always = {'cross_entropy', 'loss', 'learning_rate', 'train_accuracy',
            'images'}
  assert always <= seen[0][1].keys()
  assert not {'seconds', 'global_step/sec'} & seen[0][1].keys()
  assert always | {'seconds', 'global_step/sec', 'images/sec'} <= (
      seen[-1][1].keys())
  for step, values in seen[::2]:
    assert any(line.startswith(f'loss = {values["loss"]!s}, step = {step}')
               for line in log)
  assert f'Stopped after step 7, saved as {tmp_path}/model/model.ckpt-7' in (
      log[-1])


def run_cycles(monkeypatch, inner_loop, **changes):
  """Runs a stand-in for the inner loop; returns what the hooks are given."""
  monkeypatch.setattr(cifar10_main, 'make_inner_loop', lambda _: inner_loop)
  for name in ('save', 'evaluate', 'write_evaluation'):
    owner = cifar10_main.Checkpoints if name == 'save' else cifar10_main
    monkeypatch.setattr(owner, name, lambda *_: ({}, None))
  seen = []
  assert cifar10_main.run_cycles(
      helpers.make_state(**changes), [], None,
      cifar10_main.Checkpoints('unused'), None, lambda: False,
      hooks=[lambda *values: seen.append(values)])
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


@pytest.mark.parametrize('xla', [
    'off', pytest.param('on', marks=pytest.mark.slow)])
def test_each_step_is_traced_once(data_dir, tmp_path, monkeypatch, log, xla):
  model_fn, traced = cifar10_main.cifar10_model_fn, []

  def spy(features, labels, mode, state):
    traced.append(mode)
    return model_fn(features, labels, mode, state)

  monkeypatch.setattr(cifar10_main, 'cifar10_model_fn', spy)
  # Three cycles; the last one is shorter, as is the last batch to evaluate.
  helpers.run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=3,
              xla=xla)
  assert helpers.matches(r'loss = .*, step = (\d+)', log) == [
      ('1',), ('4',), ('7',)]
  assert traced == ['train', 'eval']
  assert any(f'XLA {xla}' in line for line in log)


@pytest.mark.parametrize('xla', ['off', 'on'])
def test_xla_compiles_the_step(data_dir, xla):
  inner_loop = cifar10_main.make_inner_loop(helpers.make_state(xla=xla))
  iterator = iter(helpers.input_fn('train', data_dir))
  function = inner_loop.get_concrete_function(iterator, tf.constant(1))
  library = function.graph.as_graph_def().library.function
  assert any(f.attr['_XlaMustCompile'].b for f in library) == (xla == 'on')


def evaluate(state, dataset):
  return cifar10_main.evaluate(
      cifar10_main.make_eval_step(state), dataset, 'path', 7)


def test_evaluation_averages(data_dir, capsys):
  """Accuracy is over images, loss over batches, the short one included."""
  state = helpers.make_state()
  dataset = helpers.input_fn('eval', data_dir)
  results, matrix = evaluate(state, dataset)
  losses, correct, expected = [], 0, np.zeros([10, 10])
  for features, labels in dataset:
    outputs = cifar10_main.cifar10_model_fn(features, labels, 'eval', state)
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
  state = helpers.make_state(data_format='channels_last')
  dataset = helpers.input_fn('eval', data_dir)
  expected, _ = evaluate(state, dataset)
  device = tf.config.list_logical_devices('CPU')[1]
  monkeypatch.setattr(tf.config, 'list_logical_devices', lambda kind: [device])
  assert evaluate(state, dataset)[0] == expected
  train_data = cifar10_main.distributed_input(
      helpers.small_settings(data_dir), 0, 0)
  for features, _ in itertools.islice(train_data, 2):
    assert features.backing_device.endswith('CPU:1')


def test_resumes_and_ends(data_dir, tmp_path, log, capsys):
  model_dir = tmp_path / 'model'

  def run_to(train_steps, steps_per_eval):
    """Returns the steps logged and saved, and what is printed."""
    del log[:]
    helpers.run(data_dir, model_dir, train_steps=train_steps,
                steps_per_eval=steps_per_eval)
    return (helpers.matches(r'loss = .*, step = (\d+)', log),
            helpers.matches(r'Saving checkpoints for (\d+) .*', log),
            capsys.readouterr().out.splitlines())

  run_to(3, 3)
  # An interrupted cycle is finished first, the last one may be shorter.
  logged, saved, evaluated = run_to(8, 4)
  assert logged == [('5',)]
  assert saved == [('4',), ('8',)]
  assert any('Training steps 4 to 8' in line for line in log)
  assert len(evaluated) == 2

  before = helpers.contents(model_dir)
  assert run_to(8, 4) == ([], [], evaluated[-1:])
  assert any('Step 8 is trained already' in line for line in log)
  checkpoints = {path: data for path, data in before.items()
                 if 'ckpt' in path.name}
  assert checkpoints.items() <= helpers.contents(model_dir).items()


def test_resumed_run_is_exact(data_dir, tmp_path, log, capsys, log_steps):
  """An interruption changes no bit, log line or result. The seed is kept."""
  log_steps(10)

  def run(name, **changes):
    """Returns what is logged, without times, and printed."""
    del log[:]
    helpers.run(data_dir, tmp_path / name, **{
        'train_steps': 25, 'steps_per_eval': 12, **changes})
    return ([re.sub(r' \(.* sec\)', '', line) for line in log
             if re.match('cross_entropy = |loss = ', line)],
            capsys.readouterr().out.splitlines())

  whole_log, whole_results = run('whole', seed=3)
  first_log, (stopped_at,) = run('model', seed=3, train_steps=11)
  resumed_log, resumed_results = run('model')
  assert "'global_step': 11" in stopped_at
  assert resumed_results == whole_results
  assert first_log + resumed_log == whole_log
  assert len(whole_log) == 10
  np.testing.assert_equal(
      *(helpers.tensors(tmp_path / name / 'model.ckpt-25')
        for name in ('model', 'whole')))

  with pytest.raises(cifar10.Cifar10Error, match='trained with --seed=3, not'):
    run('model', seed=4)
  kernels = [helpers.make_state(seed=seed).network.kernel.numpy()
             for seed in (3, 3, 4)]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize(
    ('save_checkpoints_secs', 'expected'), [(600, {0, 4}), (0, {0, 1, 4})])
def test_saves_by_the_clock_and_has_its_folder_to_itself(
    data_dir, tmp_path, log, save_checkpoints_secs, expected):
  model_dir, asked = tmp_path / 'model', []

  def interrupted():
    asked.append(True)
    with (pytest.raises(cifar10.Cifar10Error, match='in use by another run'),
          cifar10.sole_use(str(model_dir), '--model_dir')):
      pass
    return False

  helpers.run(data_dir, model_dir, interrupted,
              save_checkpoints_secs=save_checkpoints_secs)
  assert asked
  saved = [int(step) for step, in helpers.matches(
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
  helpers.run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out.splitlines() == trained.printed


def test_eval_only_writes_nothing(data_dir, capsys, trained):
  before = helpers.contents(trained.model_dir)
  for path in (data_dir / cifar10.FOLDER_NAME).glob('data_batch*'):
    path.unlink()  # not needed
  cifar10_main.evaluate_only(helpers.small_settings(
      data_dir, trained.model_dir))
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
  assert helpers.contents(trained.model_dir) == before


@pytest.mark.parametrize(('rate', 'save_checkpoints_secs', 'message'), [
    (1e30, 600, r'The loss is not finite at step 2 \(looked at after steps 1 '
     r'and [234]\)'), (1e40, 0, '.* is not finite after step 1')])
def test_training_that_is_not_finite(
    data_dir, tmp_path, monkeypatch, rate, save_checkpoints_secs, message):
  """Also where the loss before the step was, and a checkpoint is due."""
  monkeypatch.setattr(cifar10_main, 'INITIAL_LEARNING_RATE', rate)
  with pytest.raises(cifar10.Cifar10Error, match=(
      f'^{message}, nothing of it is saved: .* try a smaller --batch_size')):
    helpers.run(data_dir, tmp_path / 'model',
                save_checkpoints_secs=save_checkpoints_secs)
  assert [path.name for path in tmp_path.glob('model/*.index')] == [
      'model.ckpt-0.index']


@pytest.mark.parametrize('batches', [0, 1])
def test_interrupted_evaluation(
    data_dir, tmp_path, capsys, log, trained, batches):
  """It ends after a batch; the same command makes it again."""
  model_dir, asked = tmp_path / 'model', []
  shutil.copytree(trained.model_dir, model_dir)

  def interrupted():
    asked.append(True)
    return len(asked) > batches

  assert not helpers.run(data_dir, model_dir, interrupted, train_steps=8)
  assert len(asked) == batches + 1
  assert not capsys.readouterr().out
  assert log[-1] == 'Stopped: the same command evaluates step 8'
  assert helpers.run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out.splitlines() == trained.printed[-1:]
