"""Tests of the loop: what it trains, logs, evaluates and saves, and when."""

import itertools
import multiprocessing.pool
import os
import re
import signal
import time
from unittest import mock

import numpy as np
import pytest
from tensorboard import plugin_util
from tensorboard.backend.event_processing import plugin_event_accumulator
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


@pytest.fixture
def log_steps(monkeypatch):
  return lambda steps: monkeypatch.setattr(cifar10_main, 'LOG_STEPS', steps)


def read_events(folder):
  """Returns the events of a folder and their steps by tag."""
  events = plugin_event_accumulator.EventAccumulator(str(folder)).Reload()
  return events, {tag: [event.step for event in events.Tensors(tag)]
                  for tag in events.Tags()['tensors']}


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
  for begins, between in (('Starting', 'T'), ('Finished', '-')):
    assert len(logged(rf'{begins} evaluation at \d{{4}}-\d\d-\d\d{between}'
                      r'\d\d:\d\d:\d\d')) == 2
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

  train, steps = read_events(model_dir)
  always, paced = [1, 11, 21, 26], [11, 21]
  assert steps == {
      'cross_entropy': always, 'learning_rate': always, 'loss': always,
      'train_accuracy': always, 'accuracy': always, 'images': always,
      'global_step/sec': paced, 'images/sec': paced, 'run': [0]}
  for event, (loss, *_) in zip(train.Tensors('loss'), lines):
    assert tf.make_ndarray(event.tensor_proto) == np.float32(loss)
  # Width, height and then the pictures themselves.
  width, height, *pictures = tf.make_ndarray(
      train.Tensors('images')[0].tensor_proto)
  assert (width, height, len(pictures)) == (b'32', b'32', 6)
  picture = tf.io.decode_png(pictures[0])
  assert picture.shape == [32, 32, 3]
  assert (picture.numpy().min(), picture.numpy().max()) == (0, 255)

  tags = ('accuracy', 'loss', 'confusion_matrix',
          *(f'per_class/{name}' for name in cifar10.CLASSES))
  assert read_events(model_dir / 'eval')[1] == {tag: [25, 29] for tag in tags}
  text = tf.make_ndarray(train.Tensors('run')[0].tensor_proto).item()
  for expected in (r'--batch_size\|10', r'seed\|\d+', 'ResNet-8',
                   rf'TensorFlow\|{tf.__version__}', r'device\|.*CPU'):
    assert re.search(expected, text.decode())


def test_tables_are_tables_in_tensorboard():
  table = cifar10_main.markdown_table(
      ['what', 'value'], ('network', 'ResNet-8'), ('--seed', np.int64(3)))
  html = plugin_util.markdown_to_safe_html(table)
  assert [html.count(f'<{tag}>') for tag in ('table', 'th', 'td')] == [1, 2, 4]
  assert '<td>--seed</td>\n<td>3</td>' in html


@pytest.mark.parametrize('is_file', [False, True])
def test_events_that_cannot_be_written(
    data_dir, tmp_path, monkeypatch, log, capsys, is_file):
  """The run trains, evaluates and saves without them; it says so once."""
  model_dir = tmp_path / 'model'
  if is_file:
    model_dir.mkdir()
    (model_dir / 'eval').touch()
  else:
    monkeypatch.setattr(tf.summary, 'scalar', mock.Mock(
        side_effect=tf.errors.ResourceExhaustedError(None, None, 'No space')))
  assert helpers.run(data_dir, model_dir)
  assert "'global_step': 4}" in capsys.readouterr().out
  assert (model_dir / 'model.ckpt-4.index').exists()
  expected = 'No events for TensorBoard in' if is_file else 'TensorBoard misses'
  assert len([line for line in log if expected in line]) == 1


def test_hooks_see_what_is_logged(
    data_dir, tmp_path, log, log_steps, usual_signals):
  """A notebook's stop button, the first KeyboardInterrupt, saves and ends."""
  log_steps(3)
  seen = []
  assert not helpers.run(
      data_dir, tmp_path / 'model', None, train_steps=400, steps_per_eval=400,
      hooks=[lambda *values: seen.append(values),
             lambda step, _: step == 7 and signal.raise_signal(signal.SIGINT)])
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
  assert f'Stopped after step 7, saved as {tmp_path}/model/model.ckpt-7' in (
      log[-1])
  assert [step for step, _ in seen] == [1, 4, 7]
  always = {'cross_entropy', 'loss', 'learning_rate', 'train_accuracy',
            'images'}
  paced = {'seconds', 'global_step/sec', 'images/sec'}
  assert seen[0][1].keys() & (always | paced) == always
  assert seen[-1][1].keys() >= always | paced
  for step, values in seen:
    # The images as the network saw them, not as TensorBoard shows them.
    np.testing.assert_allclose(
        values['images'].mean((1, 2, 3)), 0, atol=1e-4)
    assert any(line.startswith(f'loss = {values["loss"]!s}, step = {step}')
               for line in log)


def test_error_of_a_hook_is_its_own(data_dir, tmp_path, log_steps):
  """Not one of the model folder. Here in a thread, which has no signals."""
  log_steps(3)
  hook = mock.Mock(side_effect=[None, ConnectionError('no tracking server')])
  with (multiprocessing.pool.ThreadPool(1) as thread,
        pytest.raises(ConnectionError, match='no tracking server')):
    thread.apply(helpers.run, [data_dir, tmp_path / 'model', None, [hook]])
  assert [call.args[0] for call in hook.call_args_list] == [1, 4]


def test_only_a_seed_makes_operations_deterministic(tmp_path, monkeypatch):
  """Not only on the command line: a notebook has the same results."""
  switch = mock.Mock()
  monkeypatch.setattr(tf.config.experimental, 'enable_op_determinism', switch)
  for seed, calls in ((None, 0), (0, 1)):
    cifar10_main.open_model(helpers.small_settings(
        model_dir=tmp_path, seed=seed))
    assert switch.call_count == calls


def test_pieces_and_train_accuracy(monkeypatch):
  """Pieces take about a second: between them, clock and signals are looked at.
  The accuracy is the mean over the logged batches of a cycle.
  """
  step, clock = 0, 0.0
  correct = {1: 20, 101: 33}  # of 128; other batches do not count

  def inner_loop(iterator, num_steps):
    nonlocal step, clock
    step += num_steps.numpy()
    clock += 0.125 * num_steps.numpy()
    values = {'correct': correct.get(step, 128), 'finite_steps': num_steps,
              'loss': 2.0, 'cross_entropy': 1.0, 'learning_rate': 0.1}
    return {name: tf.constant(value) for name, value in values.items()}

  pieces, seen = [], {}
  monkeypatch.setattr(cifar10_main, 'make_inner_loop', lambda _: inner_loop)
  monkeypatch.setattr(cifar10_main, 'evaluate', lambda *_: ({}, None))
  monkeypatch.setattr(cifar10_main, 'write_evaluation', mock.Mock())
  monkeypatch.setattr(cifar10_main.time, 'perf_counter', lambda: clock)
  monkeypatch.setattr(cifar10_main, 'show_progress',
                      lambda settings, *values: pieces.append(values))
  assert cifar10_main.run_cycles(
      helpers.make_state(train_steps=210, steps_per_eval=108, batch_size=128),
      [], None, mock.Mock(), None, lambda: False,
      [lambda step, values: seen.update({step: str(values['train_accuracy'])})])
  # At first a single step, which is also traced; always up to a logged one, and
  # to the end of the cycle.
  steps, ends, seconds = zip(*pieces)
  assert steps == (1, *range(9, 98, 8), 101, 108, 109, *range(117, 206, 8), 209,
                   210)
  assert ends == (108,) * 15 + (210,) * 15
  assert seconds[0] is None
  np.testing.assert_allclose(seconds[1:], 0.125)
  assert seen == {1: '0.15625', 101: '0.20703125', 109: '1.0', 209: '1.0'}


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


def test_resumed_run_is_exact(data_dir, tmp_path, log, capsys, log_steps):
  """An interruption changes no bit, log line or result. The seed is kept.

  Interrupted cycles are finished first; what is trained is only evaluated.
  """
  log_steps(10)
  model_dir = tmp_path / 'model'

  def run(model_dir, **changes):
    """Returns what is logged, without times, saved and printed."""
    del log[:]
    helpers.run(data_dir, model_dir, **{
        'train_steps': 25, 'steps_per_eval': 12, **changes})
    return ([re.sub(r' \(.* sec\)', '', line) for line in log
             if re.match('cross_entropy = |loss = ', line)],
            helpers.matches(r'Saving checkpoints for (\d+) .*', log),
            capsys.readouterr().out.splitlines())

  whole_log, saved, whole_results = run(tmp_path / 'whole', seed=3)
  assert saved == [('0',), ('12',), ('24',), ('25',)]
  assert len(whole_log) == 10
  first_log, _, (stopped_at,) = run(model_dir, seed=3, train_steps=11)
  assert "'global_step': 11" in stopped_at
  resumed_log, saved, resumed_results = run(model_dir)
  assert any('Training steps 12 to 25' in line for line in log)
  assert saved == [('12',), ('24',), ('25',)]
  assert resumed_results == whole_results
  assert first_log + resumed_log == whole_log
  np.testing.assert_equal(
      *(helpers.tensors(tmp_path / name / 'model.ckpt-25')
        for name in ('model', 'whole')))

  before = helpers.contents(model_dir)
  assert run(model_dir) == ([], [], whole_results[-1:])
  assert any('Step 25 is trained already' in line for line in log)
  assert {item for item in before.items() if 'ckpt' in item[0].name} <= (
      helpers.contents(model_dir).items())
  with pytest.raises(cifar10.Cifar10Error, match='trained with --seed=3, not'):
    run(model_dir, seed=4)
  kernels = [helpers.make_state(seed=seed).network.kernel.numpy()
             for seed in (3, 3, 4)]
  np.testing.assert_array_equal(kernels[0], kernels[1])
  assert not np.array_equal(kernels[0], kernels[2])


@pytest.mark.parametrize('seconds', [600, 0])
def test_saves_by_the_clock_and_has_its_folder_to_itself(
    data_dir, tmp_path, log, seconds):

  def interrupted():
    with (pytest.raises(cifar10.Cifar10Error, match='in use by another run'),
          cifar10.sole_use(f'{tmp_path}/model', '--model_dir')):
      pass
    return False

  helpers.run(data_dir, tmp_path / 'model', interrupted,
              save_checkpoints_secs=seconds)
  saved = [step for step, in helpers.matches(
      r'Saving checkpoints for (\d+) .*', log)]
  assert len(saved) == len({*saved})
  assert {'0', '4'} <= {*saved}
  assert ('1' in saved) == (len(saved) > 2) == (seconds == 0)


def test_run_that_was_killed_at_the_end_of_a_cycle(
    data_dir, model_dir, capsys, trained):
  """It owes the evaluation. In TensorBoard no value stands there twice."""
  for path in model_dir.glob('model.ckpt-8*'):
    path.unlink()
  time.sleep(1)  # the files of events are ordered by seconds
  helpers.run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out.splitlines() == trained.printed
  assert read_events(model_dir)[1]['loss'] == [1, 5]
  assert read_events(model_dir / 'eval')[1]['accuracy'] == [4, 8]


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


def test_interrupted_evaluation(data_dir, model_dir, capsys, log, trained):
  """It ends after a batch; the same command makes it again."""
  for batches in (0, 1):
    interrupted = mock.Mock(side_effect=[False] * batches + [True])
    assert not helpers.run(data_dir, model_dir, interrupted, train_steps=8)
    assert not capsys.readouterr().out
    assert log[-1] == 'Stopped: the same command evaluates step 8'
  assert helpers.run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out.splitlines() == trained.printed[-1:]


def test_interrupted_at_the_end_of_a_cycle(data_dir, tmp_path, log):
  """The next run evaluates at once: all log lines of the training are there."""
  assert not helpers.run(
      data_dir, tmp_path / 'model', lambda: True, train_steps=1)
  assert log[-2].startswith('Loss for final step: ')
  assert log[-1].startswith('Stopped after step 1, ')


def test_other_images_or_cores(data_dir, tmp_path, monkeypatch, log):
  """A run says so once if they differ from those of the run before."""
  for step, (now, expected) in enumerate([
      ([1, 2], None),
      ([0, 2], 'on generated images with 2 cores, now on real images'),
      ([0, 1], 'with 2 cores, now on real images with 1: the numbers'),
      ([0, 1], None)], start=1):
    monkeypatch.setattr(
        cifar10_main, 'conditions', mock.Mock(return_value=now))
    del log[:]
    helpers.run(data_dir, tmp_path / 'model', train_steps=step)
    said = [line for line in log if line.startswith('Trained until now')]
    assert len(said) == bool(expected)
    assert all(expected in line for line in said)


def test_cores_that_the_process_may_use(monkeypatch):
  """Not every system tells them."""
  conditions = cifar10_main.conditions
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3},
                      raising=False)
  assert conditions(helpers.small_settings(use_synthetic_data=True)) == [1, 1]
  monkeypatch.delattr(os, 'sched_getaffinity')
  assert conditions(helpers.small_settings()) == [0, os.cpu_count()]
