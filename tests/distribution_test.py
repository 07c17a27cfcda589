"""Tests of several replicas, on devices and machines that this one plays."""

import ast
from concurrent import futures
import contextlib
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
import resnet_model
from resnet_model import tf1_name
from tests import helpers

BATCH = 24


@pytest.fixture(scope='module')
def mirrored():
  # Another one would take the keys of this one's exchanges.
  return tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])


def test_inputs_share_each_batch(mirrored):
  """Augmented images of the replicas, side by side, are those of one."""
  expected = helpers.input_fn('train', None, 3, 5, batch_size=BATCH)
  for machines, replicas in ((1, 2), (2, 1), (3, 1), (2, 2)):
    inputs = [
        iter(helpers.input_fn('train', None, 3, 5, tf.distribute.InputContext(
            machines, machine, machines * replicas), batch_size=BATCH))
        for machine in range(machines)]
    for whole in itertools.islice(expected, 5):
      parts = [next(machine) for _ in range(replicas) for machine in inputs]
      for part, value in zip(zip(*parts), whole):
        np.testing.assert_array_equal(np.concatenate(part), value)


def train(strategy, num_steps, xla=False, seed=1):
  """Trains from the same values on the same batches; returns what comes out."""
  with strategy.scope():
    state = helpers.make_state(
        seed=seed, batch_size=BATCH, xla='on' if xla else 'off')
    inputs = cifar10_main.distributed_input(helpers.small_settings(
        batch_size=BATCH, use_synthetic_data=True), seed, 0)
    inner_loop = cifar10_main.make_inner_loop(state)
    values = inner_loop(iter(inputs), tf.constant(num_steps))
  return state, {name: value.numpy() for name, value in values.items()}


def assert_alike(ours, theirs, tolerance):
  """Compares by the L2 norm all variables of two states, step included."""
  for variable, other in zip(ours.variables, theirs.variables):
    assert tf1_name(variable) == tf1_name(other)
    ours, theirs = variable.numpy(), other.numpy()
    if np.any(theirs):
      assert helpers.difference(ours, theirs) <= tolerance, other.name
    else:
      assert not np.any(ours), other.name


def assert_in_sync(strategy, state):
  for variable in state.variables:
    first, *others = strategy.experimental_local_results(variable)
    for other in others:
      np.testing.assert_array_equal(other.numpy(), first.numpy())


def test_gradients_are_those_of_the_whole_batch(mirrored, monkeypatch):
  """Where batch norm takes no notice of the batch."""
  call = resnet_model.Cifar10ResnetV2.__call__
  monkeypatch.setattr(resnet_model.Cifar10ResnetV2, '__call__',
                      lambda network, images, training: call(
                          network, images, training=False))
  expected, expected_values = train(tf.distribute.get_strategy(), 1)
  state, values = train(mirrored, 1)
  # The momentum is the gradient, after the first step.
  assert_alike(state, expected, tolerance=1e-5)
  assert_in_sync(mirrored, state)
  for name in ('cross_entropy', 'loss', 'learning_rate'):
    np.testing.assert_allclose(values[name], expected_values[name], rtol=1e-5)
  assert values['correct'] == expected_values['correct']


def train_halves(num_steps, seed=1):
  """Trains on one device so that each half of a batch is normalized alone."""
  state = helpers.make_state(seed=seed)
  network = state.network
  variables = network.trainable_variables
  moving = [v for v in network.variables if not v.trainable]
  dataset = helpers.input_fn('train', None, seed, batch_size=BATCH)

  @tf.function
  def compute(features, labels):
    with tf.GradientTape() as tape:
      loss = cifar10_main.cifar10_model_fn(
          features, labels, 'train', state)['loss']
    return loss, tape.gradient(loss, variables)

  for step, (features, labels) in enumerate(dataset.take(num_steps)):
    before = [v.numpy() for v in moving]
    losses, averages, gradients = [], [], []
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
      for variable, value in zip(moving, before):
        variable.assign(value)
      loss, gradient = compute(features[half], labels[half])
      losses.append(loss.numpy())
      gradients.append([g.numpy() for g in gradient])
      averages.append([v.numpy() for v in moving])
    for variable, *values in zip(moving, *averages):
      variable.assign(np.mean(values, axis=0))
    for variable, accum, *values in zip(variables, state.momentum, *gradients):
      accum.assign(0.9 * accum + np.mean(values, axis=0))
      variable.assign_sub(
          cifar10_main.learning_rate(tf.constant(step), BATCH) * accum)
    state.global_step.assign_add(1)
  return state, np.mean(losses)


def test_each_replica_normalizes_its_share(mirrored):
  expected, loss = train_halves(20)
  state, values = train(mirrored, 20)
  np.testing.assert_allclose(values['loss'], loss, rtol=1e-5)
  assert_alike(state, expected, tolerance=1e-5)
  assert_in_sync(mirrored, state)


@pytest.mark.slow
def test_replicas_with_xla(mirrored):
  expected, expected_values = train(mirrored, 1)
  state, values = train(mirrored, 1, xla=True)
  np.testing.assert_allclose(
      values['loss'], expected_values['loss'], rtol=1e-6)
  # As on one device, XLA rounds otherwise where gradients cancel out.
  assert_alike(state, expected, tolerance=5e-3)
  assert_in_sync(mirrored, state)


def test_checkpoints_go_from_devices_to_devices(
    mirrored, data_dir, tmp_path, capsys):

  def train_to(step, folder):
    with mirrored.scope():
      helpers.run(data_dir, tmp_path / folder, train_steps=step,
                  batch_size=BATCH, seed=1)
    return helpers.tensors(tmp_path / folder / f'model.ckpt-{step}')

  whole = train_to(5, 'whole')
  train_to(3, 'parts')
  shutil.copytree(tmp_path / 'parts', tmp_path / 'to_one')
  np.testing.assert_equal(train_to(5, 'parts'), whole)
  state = helpers.make_state()  # on one device
  expected = helpers.tensors(helpers.restore(tmp_path / 'to_one', state))
  for variable in state.variables:
    np.testing.assert_array_equal(
        variable.numpy(), expected[tf1_name(variable)])


def test_checkpoint_of_2017_on_devices(mirrored, tmp_path, capsys):
  model_dir = tmp_path / 'model'
  helpers.place_originals_checkpoint(model_dir)
  with mirrored.scope():
    state = helpers.make_state()
    expected = helpers.tensors(helpers.restore(model_dir, state))
  for variable in state.network.variables + tuple(state.momentum):
    for copy in mirrored.experimental_local_results(variable):
      np.testing.assert_array_equal(copy.numpy(), expected[tf1_name(variable)])


def test_batch_that_cannot_be_shared(mirrored, tmp_path):
  with mirrored.scope(), pytest.raises(
      cifar10.Cifar10Error, match='--batch_size=25 is no multiple of the 2'):
    helpers.run(
        None, tmp_path / 'model', batch_size=25, use_synthetic_data=True)
  assert not (tmp_path / 'model').exists()


# ---------------------------------------------------------------- machines


def free_ports(count):
  """Returns free ports below those that the system gives to other processes."""
  ports = []
  candidates = itertools.count(10000 + os.getpid() % 10000)
  while len(ports) < count:
    with contextlib.suppress(OSError), socket.socket() as one:
      one.bind(('127.0.0.1', next(candidates)))
      ports.append(one.getsockname()[1])
  return ports


@contextlib.contextmanager
def machines(count, tmp_path, *arguments, steps, second=()):
  """Runs a process for each machine; each writes its variables at the end."""
  code = (
      'import sys, cifar10_main as script, numpy as np\n'
      'open_model = script.open_model\n'
      'def open_and_keep(settings):\n'
      '  global state\n'
      '  state, checkpoints = open_model(settings)\n'
      '  return state, checkpoints\n'
      'train = script.train_and_evaluate\n'
      'def train_and_dump(*args):\n'
      '  finished = train(*args)\n'
      '  np.savez(sys.argv[-1],\n'
      '           **{v.name: v.numpy() for v in state.variables})\n'
      '  return finished\n'
      'script.open_model = open_and_keep\n'
      'script.train_and_evaluate = train_and_dump\n'
      'script.define_flags()\n'
      'script.app.run(lambda argv: script.main(argv[:-1]))')
  ports = free_ports(count)
  with contextlib.ExitStack() as stack:
    processes = []
    for i in range(count):
      config = {'cluster': {'worker': [f'127.0.0.1:{port}' for port in ports]},
                'task': {'type': 'worker', 'index': i}}
      processes.append(subprocess.Popen(
          [sys.executable, '-c', code, f'--data_dir={tmp_path}/data',
           f'--model_dir={tmp_path}/model{i}', '--resnet_size=8',
           f'--batch_size={BATCH}', f'--train_steps={steps}',
           '--steps_per_eval=40', '--save_checkpoints_secs=1', *arguments,
           *(second if i == 1 else ()), f'{tmp_path}/machine{i}.npz'],
          stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
          cwd=helpers.ROOT,
          env={**os.environ, 'TF_CONFIG': json.dumps(config)}))
      stack.callback(processes[-1].communicate)
      stack.callback(processes[-1].kill)
    yield processes


def communicate(processes, timeout=60):
  """Returns what the machines print on standard output, and on error."""
  with futures.ThreadPoolExecutor() as pool:
    outputs = list(pool.map(
        lambda process: process.communicate(timeout=timeout), processes))
  for _, log in outputs:
    assert 'Traceback' not in log, log
  return outputs


@pytest.fixture
def data(tmp_path):
  helpers.write_random_data(tmp_path / 'data', 500, 97)
  return str(tmp_path / 'data')


def assert_machines_agree(tmp_path, count, step):
  first, *others = [np.load(tmp_path / f'machine{i}.npz') for i in range(count)]
  assert first['global_step:0'] == step
  for other in others:
    for name in first:
      np.testing.assert_array_equal(other[name], first[name], name)


def assert_finishes(tmp_path, data_dir, count):
  """Starts all machines once more; they go on from the first one's folder."""
  state = helpers.make_state()
  step = restored_step(tmp_path / 'model0', state)
  assert step >= 40
  last_step = step + 60
  with machines(count, tmp_path, steps=last_step) as processes:
    outputs = communicate(processes)
  assert [process.returncode for process in processes] == [0] * count, outputs
  results = ast.literal_eval(outputs[0][0].splitlines()[-1])
  assert results['global_step'] == last_step
  assert 'Restoring parameters from' in outputs[0][1]
  assert f'Training steps {step + 1} to {last_step}' in outputs[0][1]
  for output, log in outputs[1:]:
    assert not output
    ours = [line for line in log.splitlines() if ':tensorflow:' in line]
    assert re.match(r'INFO:tensorflow:127.0.0.1:\d+ waits for 127', ours[0])
    assert ours[1:] == [
        'WARNING:tensorflow:The first machine logs, saves and prints']
  for i in range(1, count):
    assert not (tmp_path / f'model{i}').exists()
  assert_machines_agree(tmp_path, count, last_step)

  # One machine finds the same in the checkpoint, with all 97 images.
  assert restored_step(tmp_path / 'model0', state) == last_step
  inputs = helpers.input_fn('eval', data_dir, batch_size=BATCH)
  expected, _ = cifar10_main.evaluate(
      cifar10_main.make_eval_step(state), inputs, 'path', last_step)
  assert results['accuracy'] == expected['accuracy']
  np.testing.assert_allclose(results['loss'], expected['loss'], rtol=1e-6)


def restored_step(model_dir, state):
  helpers.restore(model_dir, state)
  return state.global_step.numpy().item()


@pytest.mark.parametrize('told', [1, pytest.param(0, marks=pytest.mark.slow)])
def test_machine_that_is_told_to_stop(tmp_path, data, told):
  """All save the same step and end. Started again, they finish."""
  with machines(2, tmp_path, steps=100000) as processes:
    helpers.read_until(processes[0], 'step = 41')  # the first of a cycle of 40
    processes[told].terminate()
    outputs = communicate(processes)
  assert [process.returncode for process in processes] == [143, 143], outputs
  step = int(re.search(r'Stopped after step (\d+)', outputs[0][1])[1])
  assert tf.train.latest_checkpoint(tmp_path / 'model0').endswith(f'-{step}')
  assert_machines_agree(tmp_path, 2, step)
  assert_finishes(tmp_path, data, 2)


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'victim'), [(2, 0), (2, 1), (3, 1)])
def test_machine_that_dies(tmp_path, data, count, victim):
  """The others end. Started again, they go on."""
  with machines(count, tmp_path, steps=100000) as processes:
    helpers.read_until(processes[0], 'step = 41')
    processes[victim].kill()
    outputs = communicate(processes)
  for i, process in enumerate(processes):
    if i != victim:
      assert process.returncode == 1
      # TensorFlow's own log is not silenced here, and may have a word after it.
      last = [line for line in outputs[i][1].splitlines()
              if line.startswith('-c: ')][-1]
      assert 'Another machine does not answer' in last
  assert_finishes(tmp_path, data, count)


@pytest.mark.slow
@pytest.mark.parametrize(('second', 'named'), [
    (['--batch_size=48', '--seed=3'], '--batch_size, --seed'),
    (['--steps_per_eval=20'], '--steps_per_eval'),
    (['--eval_only'], '--eval_only'),
    (['--data_dir={}/other'], 'training records')])
def test_machines_that_differ(tmp_path, data, second, named):
  """All end, and name what differs; nothing is written."""
  helpers.write_random_data(tmp_path / 'other', 505, 97)
  second = [argument.format(tmp_path) for argument in second]
  with machines(2, tmp_path, steps=100000, second=second) as processes:
    outputs = communicate(processes)
  for process, (_, log) in zip(processes, outputs):
    assert process.returncode == 1
    assert f'-c: The machines differ in {named}: start all with the same' in log
  assert not [path for path in tmp_path.glob('model*/*')
              if path.name != '.lock']


def with_marks(index, number):
  """A process that waits for another, and a signal; most are slow."""
  quick = (index, number) == (0, signal.SIGTERM)
  return pytest.param(index, number, marks=() if quick else pytest.mark.slow)


@pytest.mark.parametrize(('index', 'number'), [
    with_marks(index, number) for index in (0, 1)
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)])
def test_machine_that_waits_ends_at_once(index, number):
  own, other = [f'127.0.0.1:{port}' for port in free_ports(2)]
  config = {'cluster': {'worker': [own, other] if index == 0 else [other, own]},
            'task': {'type': 'worker', 'index': index}}
  process = helpers.start(
      [sys.executable, helpers.SCRIPT, '--use_synthetic_data'],
      env={**os.environ, 'TF_CONFIG': json.dumps(config)})
  helpers.read_until(process, f'{own} waits for {other}')
  started = time.monotonic()
  process.send_signal(number)
  assert process.wait(timeout=30) == -number
  assert time.monotonic() - started < 3
  helpers.finish(process)


def test_values_that_differ_between_machines(monkeypatch):
  """With a second machine whose values are the first one's but for `b`."""
  number = {}

  def total(value):
    number[len(number)] = value
    # The first one's own values count; then where the second one differs.
    return value if len(number) == 1 else value + np.array([0, 1, 0])

  monkeypatch.setattr(cifar10_main, 'total', total)
  with pytest.raises(cifar10.Cifar10Error, match='machines differ in b: start'):
    cifar10_main.require_same({'a': 1, 'b': None, 'c': 'x'})


def test_port_that_is_in_use():
  with socket.create_server(('', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(cifar10.Cifar10Error, match=(
        r'Cannot listen as .* \(Address already in use\)')):
      cifar10_main.wait_for_machines([address, '127.0.0.1:1'], address)


@pytest.mark.parametrize('config', [
    'no JSON', '{"cluster": 3}',
    '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}}',
    '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},'
    ' "task": {"type": "worker", "index": 7}}',
    *(f'{{"cluster": {cluster}, "task": {{"type": "{role}", "index": 0}}}}'
      for cluster, role in (
        ('{"chief": ["127.0.0.1:1"], "ps": ["127.0.0.1:2"]}', 'chief'),
        ('{"worker": ["127.0.0.1:1", "127.0.0.1:1"]}', 'worker'),
        ('{"worker": ["127.0.0.1:1", "127.0.0.1"]}', 'worker'),
        ('{"worker": ["127.0.0.1:1", "127.0.0.1:99999"]}', 'worker'),
        ('{"worker": ["127.0.0.1:1", "127.0.0.1:x"]}', 'worker')))])
def test_cluster_that_is_none(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(cifar10.Cifar10Error,
                     match='TF_CONFIG names no cluster of workers'):
    cifar10_main.make_strategy(num_gpus=0)


@pytest.mark.parametrize('config', [
    '', ' ', '{}', '{"cluster": {"worker": ["127.0.0.1:1"]}}', *(
        f'{{"cluster": {{"{role}": ["127.0.0.1:1"]}}, '
        f'"task": {{"type": "{role}", "index": 0}}}}'
        for role in ('chief', 'worker', 'master', 'evaluator'))])
def test_one_machine_trains_alone(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  strategy = cifar10_main.make_strategy(num_gpus=0)
  assert strategy.num_replicas_in_sync == 1
  assert cifar10_main.is_chief()
