"""Tests of several replicas, on devices and machines that this one plays."""

import ast
from concurrent import futures
import contextlib
import functools
import itertools
import json
import os
import re
import shutil
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
from tests.cifar10_main_test import (
    difference,
    place_originals_checkpoint,
    write_data,
)
from tests.faults_test import each, tensors

BATCH = 24


@pytest.fixture(scope='module')
def mirrored():
  # Another one would take the keys of this one's exchanges.
  return tf.distribute.MirroredStrategy(['CPU:0', 'CPU:1'])


def test_inputs_share_each_batch(mirrored):
  """Augmented images of the replicas, side by side, are those of one."""
  kwargs = {'use_synthetic_data': True, 'seed': 3, 'step': 5}
  expected = cifar10_main.input_fn('train', None, BATCH, **kwargs)
  for machines, replicas in ((1, 2), (2, 1), (3, 1), (2, 2)):
    inputs = [
        iter(cifar10_main.input_fn(
            'train', None, BATCH, **kwargs, context=tf.distribute.InputContext(
                machines, machine, machines * replicas)))
        for machine in range(machines)]
    for whole in itertools.islice(expected, 5):
      parts = [next(machine) for machine in inputs for _ in range(replicas)]
      for part, value in zip(zip(*parts), whole):
        np.testing.assert_array_equal(np.concatenate(part), value)


def train(strategy, num_steps, xla=False, seed=1):
  """Trains from the same values on the same batches; returns what comes out."""
  with strategy.scope():
    state = cifar10_main.make_state(8, None, 'fp32', seed)
    inputs = cifar10_main.distributed_input(BATCH, functools.partial(
        cifar10_main.input_fn, 'train', None, BATCH, True, seed))
    inner_loop = cifar10_main.make_inner_loop(state, BATCH, xla)
    values = inner_loop(iter(inputs), tf.constant(num_steps))
  return state, {name: value.numpy() for name, value in values.items()}


def assert_alike(ours, theirs, tolerance):
  """Compares by the L2 norm all variables of two states, step included."""
  for variable, other in zip(ours.variables, theirs.variables):
    assert cifar10_main.tf1_name(variable) == cifar10_main.tf1_name(other)
    ours, theirs = variable.numpy(), other.numpy()
    if np.any(theirs):
      assert difference(ours, theirs) <= tolerance, other.name
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
                      lambda network, inputs, training: call(
                          network, inputs, training=False))
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
  state = cifar10_main.make_state(8, None, 'fp32', seed)
  network = state.network
  variables = network.trainable_variables
  moving = [v for v in network.variables if not v.trainable]
  schedule = cifar10_main.learning_rate_schedule(BATCH)
  dataset = cifar10_main.input_fn('train', None, BATCH, True, seed)
  for step, (features, labels) in enumerate(dataset.take(num_steps)):
    before = [v.numpy() for v in moving]
    losses, averages, gradients = [], [], []
    for half in (slice(0, BATCH // 2), slice(BATCH // 2, BATCH)):
      for variable, value in zip(moving, before):
        variable.assign(value)
      with tf.GradientTape() as tape:
        loss = cifar10_main.model_fn(
            features[half], labels[half], 'train', network)['loss']
      losses.append(loss.numpy())
      gradients.append([g.numpy() for g in tape.gradient(loss, variables)])
      averages.append([v.numpy() for v in moving])
    for variable, *values in zip(moving, *averages):
      variable.assign(np.mean(values, axis=0))
    for variable, accum, *values in zip(variables, state.momentum, *gradients):
      accum.assign(0.9 * accum + np.mean(values, axis=0))
      variable.assign_sub(schedule(step) * accum)
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


def run(strategy, model_dir, train_steps):
  with strategy.scope():
    cifar10_main.train_and_evaluate(
        None, str(model_dir), 8, train_steps, 4, BATCH,
        use_synthetic_data=True, seed=1)
  return tensors(model_dir / f'model.ckpt-{train_steps}')


def test_checkpoints_go_from_devices_to_devices(mirrored, tmp_path, capsys):
  one = tf.distribute.get_strategy()
  whole = run(mirrored, tmp_path / 'whole', 5)
  run(mirrored, tmp_path / 'parts', 3)
  shutil.copytree(tmp_path / 'parts', tmp_path / 'to_one')
  np.testing.assert_equal(run(mirrored, tmp_path / 'parts', 5), whole)
  # On one device, batch norm sees the whole batch: other numbers, of the same
  # variables.
  assert run(one, tmp_path / 'to_one', 5).keys() == whole.keys()


def test_checkpoint_of_2017_on_devices(mirrored, tmp_path, capsys):
  model_dir = tmp_path / 'model'
  place_originals_checkpoint(model_dir)
  with mirrored.scope():
    state = cifar10_main.make_state(8, None, 'fp32', seed=1)
    checkpoints = cifar10_main.Checkpoints(str(model_dir), state)
    checkpoints.restore_newest()
  expected = tf.train.load_checkpoint(checkpoints.newest)
  for variable in state.network.variables + tuple(state.momentum):
    for copy in mirrored.experimental_local_results(variable):
      np.testing.assert_array_equal(copy.numpy(), expected.get_tensor(
          cifar10_main.tf1_name(variable)))


def test_batch_that_cannot_be_shared(mirrored, tmp_path):
  with mirrored.scope(), pytest.raises(
      cifar10.Cifar10Error, match='--batch_size=25 is no multiple of the 2'):
    cifar10_main.train_and_evaluate(
        None, str(tmp_path), 8, 1, 1, 25, use_synthetic_data=True)


# ---------------------------------------------------------------- machines


STEPS = 50


def free_ports(count):
  with contextlib.ExitStack() as stack:
    sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
    for each in sockets:
      each.bind(('127.0.0.1', 0))
    return [each.getsockname()[1] for each in sockets]


def start_machines(count, tmp_path, *arguments, steps=STEPS):
  """Starts a process for each machine; each writes its variables at the end."""
  workers = [f'127.0.0.1:{port}' for port in free_ports(count)]
  processes = []
  for i in range(count):
    config = {'cluster': {'worker': workers},
              'task': {'type': 'worker', 'index': i}}
    code = (
        'import cifar10_main as script, numpy as np\n'
        'make_state = script.make_state\n'
        'def make_and_keep(*args):\n'
        '  global state\n'
        '  state = make_state(*args)\n'
        '  return state\n'
        'train = script.train_and_evaluate\n'
        'def train_and_dump(*args):\n'
        '  finished = train(*args)\n'
        f'  np.savez("{tmp_path}/machine{i}.npz",\n'
        '           **{v.name: v.numpy() for v in state.variables})\n'
        '  return finished\n'
        'script.make_state = make_and_keep\n'
        'script.train_and_evaluate = train_and_dump\n'
        'script.define_flags()\n'
        'script.app.run(script.main)')
    processes.append(subprocess.Popen(
        [sys.executable, '-c', code, f'--data_dir={tmp_path}/data',
         f'--model_dir={tmp_path}/model{i}', '--resnet_size=8',
         f'--batch_size={BATCH}', f'--train_steps={steps}',
         '--steps_per_eval=40', '--save_checkpoints_secs=1', *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        cwd=os.path.dirname(cifar10_main.__file__),
        env={**os.environ, 'TF_CONFIG': json.dumps(config)}))
  return processes


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
  rng = np.random.default_rng(0)
  records = rng.integers(0, 256, [597, cifar10.RECORD_BYTES], np.uint8)
  records[:, 0] %= 10
  write_data(tmp_path / 'data' / cifar10.FOLDER_NAME,
             records[:500], records[500:])


@pytest.mark.parametrize('count', each([2, 3], quick=1))
def test_machines(tmp_path, data, count):
  """They go on from a checkpoint that only the first one has."""
  state = cifar10_main.make_state(8, None, 'fp32', seed=0)
  state.global_step.assign(30)
  cifar10_main.Checkpoints(str(tmp_path / 'model0'), state).save()
  processes = start_machines(count, tmp_path)
  outputs = communicate(processes)
  assert [process.returncode for process in processes] == [0] * count, outputs
  printed = outputs[0][0].splitlines()
  assert [ast.literal_eval(line)['global_step'] for line in printed
          ] == [40, STEPS]
  assert 'Restoring parameters from' in outputs[0][1]
  assert f'Training steps 31 to {STEPS}' in outputs[0][1]
  for output, _ in outputs[1:]:
    assert not output
  assert tf.train.latest_checkpoint(tmp_path / 'model0').endswith(f'-{STEPS}')
  for i in range(1, count):
    assert not (tmp_path / f'model{i}').exists()

  first, *others = [np.load(tmp_path / f'machine{i}.npz')
                    for i in range(count)]
  assert first['global_step:0'] == STEPS
  for other in others:
    for name in first:
      np.testing.assert_array_equal(other[name], first[name], name)

  # One machine finds the same in the checkpoint, with all 97 images.
  checkpoints = cifar10_main.Checkpoints(str(tmp_path / 'model0'), state)
  checkpoints.restore_newest()
  inputs = cifar10_main.input_fn('eval', str(tmp_path / 'data'), BATCH)
  results, _ = cifar10_main.evaluate(
      cifar10_main.make_eval_step(state.network), inputs, 'path', STEPS)
  last = ast.literal_eval(printed[-1])
  assert last['accuracy'] == results['accuracy']
  np.testing.assert_allclose(last['loss'], results['loss'], rtol=1e-6)


def wait_for_step(process, step):
  """Reads the log of the first machine up to a step."""
  for line in process.stderr:
    if line.endswith(f'step = {step}\n') or f'step = {step} ' in line:
      return
  raise AssertionError('it has ended')


@pytest.mark.parametrize('victim', each([1, 0], quick=1))
def test_machine_that_dies(tmp_path, data, victim):
  processes = start_machines(2, tmp_path, steps=100000)
  wait_for_step(processes[0], 81)
  processes[victim].kill()
  killed_at = time.monotonic()
  survivor = processes[1 - victim]
  _, log = survivor.communicate(timeout=60)
  print(f'The other one ended after {time.monotonic() - killed_at:.1f} s')
  processes[victim].communicate()
  assert survivor.returncode == 1
  assert 'Another machine does not answer' in log.splitlines()[-1]

  state = cifar10_main.make_state(8, None, 'fp32', seed=0)
  cifar10_main.Checkpoints(str(tmp_path / 'model0'), state).restore_newest()
  assert state.global_step >= 80


@pytest.mark.parametrize('told', each([1, 0], quick=1))
def test_machine_that_is_told_to_stop(tmp_path, data, told):
  processes = start_machines(2, tmp_path, steps=100000)
  wait_for_step(processes[0], 41)  # the first of a cycle of 40
  processes[told].terminate()
  outputs = communicate(processes)
  assert [process.returncode for process in processes] == [143, 143], outputs
  step = int(re.search(r'Stopped after step (\d+)', outputs[0][1])[1])
  assert tf.train.latest_checkpoint(tmp_path / 'model0').endswith(f'-{step}')


@pytest.mark.parametrize('config', [
    'no JSON', '{"cluster": 3}', '{"cluster": {"worker": "a:1"}}',
    '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]}}',
    '{"cluster": {"worker": ["127.0.0.1:1", "127.0.0.1:2"]},'
    ' "task": {"type": "worker", "index": 7}}'])
def test_cluster_that_is_none(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(cifar10.Cifar10Error,
                     match='TF_CONFIG names no cluster of workers'):
    cifar10_main.make_strategy(num_gpus=0)
