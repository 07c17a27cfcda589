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
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
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


def train(strategy, num_steps, **changes):
  """Trains from seed 1; returns the state and the last step's values."""
  changes = {'seed': 1, 'batch_size': BATCH, **changes}
  with strategy.scope():
    state = helpers.make_state(**changes)
    inputs = cifar10_main.distributed_input(helpers.small_settings(
        use_synthetic_data=True, **changes), 1, 0)
    inner_loop = cifar10_main.make_inner_loop(state)
    values = inner_loop(iter(inputs), tf.constant(num_steps))
  for variable in state.variables:  # they are in sync
    first, *others = strategy.experimental_local_results(variable)
    for other in others:
      np.testing.assert_array_equal(other.numpy(), first.numpy())
  return state, {name: value.numpy() for name, value in values.items()}


def assert_close(state, expected, tolerance):
  """Compares by the L2 norm all variables of a state, step included."""
  for variable, theirs in zip(state.variables, expected):
    if np.any(theirs):
      difference = helpers.difference(variable.numpy(), theirs)
      assert difference <= tolerance, variable.name
    else:
      assert not np.any(variable.numpy()), variable.name


def test_each_replica_normalizes_its_share(mirrored):
  """After a step, all that there is is the mean of what each half gives alone:
  the momentum is the gradient, and the weights have changed in proportion.
  """
  features, labels = next(iter(
      helpers.input_fn('train', None, 1, batch_size=BATCH)))
  variables, values = [], []
  for half in (slice(BATCH // 2), slice(BATCH // 2, BATCH)):
    one = helpers.make_state(seed=1, batch_size=BATCH)
    values.append(
        cifar10_main.make_train_step(one)(features[half], labels[half]))
    variables.append([v.numpy() for v in one.variables])
  state, found = train(mirrored, 1)
  assert_close(state, [np.mean(pair, axis=0) for pair in zip(*variables)], 1e-5)
  assert found['correct'] == values[0]['correct'] + values[1]['correct']
  for name in ('cross_entropy', 'loss', 'learning_rate'):
    np.testing.assert_allclose(
        found[name], np.mean([half[name] for half in values]), rtol=1e-5)
  train(mirrored, 10)


@pytest.mark.slow
def test_replicas_with_xla(mirrored):
  expected, expected_values = train(mirrored, 1)
  state, values = train(mirrored, 1, xla='on')
  np.testing.assert_allclose(
      values['loss'], expected_values['loss'], rtol=1e-6)
  # As on one device, XLA rounds otherwise where gradients cancel out.
  assert_close(state, [v.numpy() for v in expected.variables], tolerance=5e-3)


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


def test_batch_that_cannot_be_shared(mirrored, tmp_path):
  with mirrored.scope(), pytest.raises(
      cifar10.Cifar10Error, match='--batch_size=25 is no multiple of the 2'):
    helpers.run(
        None, tmp_path / 'model', batch_size=25, use_synthetic_data=True)
  assert not (tmp_path / 'model').exists()


def free_ports(count):
  """Returns free ports below those that the system gives to other processes."""
  ports = []
  candidates = itertools.count(10000 + os.getpid() % 10000)
  while len(ports) < count:
    with contextlib.suppress(OSError), socket.socket() as one:
      one.bind(('127.0.0.1', next(candidates)))
      ports.append(one.getsockname()[1])
  return ports


def tf_config(role, index=None, **cluster):
  """Returns TF_CONFIG for one of the machines, whose addresses are given."""
  task = {} if index is None else {'task': {'type': role, 'index': index}}
  return json.dumps({'cluster': cluster, **task})


DUMP = """
import sys, cifar10_main as script, numpy as np
run_cycles = script.run_cycles
def run_and_dump(state, *args):
  finished = run_cycles(state, *args)
  np.savez(sys.argv[-1], **{v.name: v.numpy() for v in state.variables})
  return finished
script.run_cycles = run_and_dump
script.define_flags()
script.app.run(lambda argv: script.main(argv[:-1]))
"""


@contextlib.contextmanager
def machines(count, tmp_path, steps, second=()):
  """Runs a process for each machine; each writes its variables at the end."""
  addresses = [f'127.0.0.1:{port}' for port in free_ports(count)]
  with contextlib.ExitStack() as stack:
    processes = []
    for i in range(count):
      config = tf_config('worker', i, worker=addresses)
      processes.append(helpers.start(
          [sys.executable, '-c', DUMP, f'--data_dir={tmp_path}/data',
           f'--model_dir={tmp_path}/model{i}', '--resnet_size=8',
           f'--batch_size={BATCH}', f'--train_steps={steps}',
           '--steps_per_eval=40', '--save_checkpoints_secs=1',
           *(second if i == 1 else ()), f'{tmp_path}/machine{i}.npz'],
          env={**os.environ, 'TF_CONFIG': config}))
      stack.callback(processes[-1].communicate)
      stack.callback(processes[-1].kill)
    yield processes


def finish(processes):
  """Returns what the machines print on standard output, and on error."""
  with futures.ThreadPoolExecutor() as pool:
    return list(pool.map(helpers.finish, processes))


def assert_machines_agree(tmp_path, count, step):
  first, *others = [np.load(tmp_path / f'machine{i}.npz') for i in range(count)]
  assert first['global_step:0'] == step
  for other in others:
    for name in first:
      np.testing.assert_array_equal(other[name], first[name], name)


def assert_finishes(tmp_path, data_dir, count):
  """Starts all machines once more; they go on from the first one's folder."""
  state = helpers.make_state()
  helpers.restore(tmp_path / 'model0', state)
  step = state.global_step.numpy().item()
  assert step >= 40
  last_step = step + 60
  with machines(count, tmp_path, steps=last_step) as processes:
    outputs = finish(processes)
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
  assert [*tmp_path.glob('model*')] == [tmp_path / 'model0']
  assert_machines_agree(tmp_path, count, last_step)

  # One machine finds the same in the checkpoint, with all 23 images.
  helpers.restore(tmp_path / 'model0', state)
  inputs = helpers.input_fn('eval', data_dir, batch_size=BATCH)
  expected, _ = cifar10_main.evaluate(
      cifar10_main.make_eval_step(state), inputs, 'path', last_step)
  assert results['accuracy'] == expected['accuracy']
  np.testing.assert_allclose(results['loss'], expected['loss'], rtol=1e-6)


@pytest.mark.parametrize('told', [1, pytest.param(0, marks=pytest.mark.slow)])
def test_machine_that_is_told_to_stop(tmp_path, data_dir, told):
  """All save the same step and end. Started again, they finish."""
  with machines(2, tmp_path, steps=100000) as processes:
    helpers.read_until(processes[0], 'step = 41')  # the first of a cycle of 40
    processes[told].terminate()
    outputs = finish(processes)
  assert [process.returncode for process in processes] == [143, 143], outputs
  step = int(re.search(r'Stopped after step (\d+)', outputs[0][1])[1])
  assert tf.train.latest_checkpoint(tmp_path / 'model0').endswith(f'-{step}')
  assert_machines_agree(tmp_path, 2, step)
  assert_finishes(tmp_path, data_dir, 2)


@pytest.mark.slow
@pytest.mark.parametrize(('count', 'victim'), [(2, 0), (2, 1), (3, 1)])
def test_machine_that_dies(tmp_path, data_dir, count, victim):
  """The others end. Started again, they go on."""
  with machines(count, tmp_path, steps=100000) as processes:
    helpers.read_until(processes[0], 'step = 41')
    processes[victim].kill()
    outputs = finish(processes)
  for i, process in enumerate(processes):
    if i != victim:
      assert process.returncode == 1
      # TensorFlow's own log is not silenced here, and may have a word after it.
      last = [line for line in outputs[i][1].splitlines()
              if line.startswith('-c: ')][-1]
      assert 'Another machine does not answer' in last
  assert_finishes(tmp_path, data_dir, count)


@pytest.mark.slow
@pytest.mark.parametrize(('second', 'named'), [
    (['--batch_size=48', '--seed=3'], '--batch_size, --seed'),
    (['--steps_per_eval=20'], '--steps_per_eval'),
    (['--eval_only'], '--eval_only'),
    (['--data_dir={}/other'], 'training records')])
def test_machines_that_differ(tmp_path, data_dir, second, named):
  """All end, and name what differs; nothing is written."""
  helpers.write_random_data(tmp_path / 'other', 55)
  second = [argument.format(tmp_path) for argument in second]
  with machines(2, tmp_path, steps=100000, second=second) as processes:
    outputs = finish(processes)
  for process, (_, log) in zip(processes, outputs):
    assert process.returncode == 1
    assert f'-c: The machines differ in {named}: start all with the same' in log
  assert not [path for path in tmp_path.glob('model*/*')
              if path.name != '.lock']


@pytest.mark.parametrize(('index', 'number'), [
    (0, signal.SIGTERM),
    pytest.param(1, signal.SIGINT, marks=pytest.mark.slow),
    pytest.param(0, signal.SIGHUP, marks=pytest.mark.slow)])
def test_machine_that_waits_ends_at_once(index, number):
  addresses = [f'127.0.0.1:{port}' for port in free_ports(2)]
  process = helpers.start(
      [sys.executable, helpers.SCRIPT, '--use_synthetic_data'],
      env={**os.environ,
           'TF_CONFIG': tf_config('worker', index, worker=addresses)})
  helpers.read_until(
      process, f'{addresses[index]} waits for {addresses[1 - index]}')
  started = time.monotonic()
  process.send_signal(number)
  assert process.wait(timeout=30) == -number
  assert time.monotonic() - started < 3
  helpers.finish(process)


def test_values_that_differ_between_machines(monkeypatch):
  """With a second machine whose values are the first one's but for `b`."""
  # The first one's own values count; then where the second one differs.
  replies = iter([lambda ours: ours, lambda differ: np.add(differ, [0, 1, 0])])
  monkeypatch.setattr(cifar10_main, 'total', lambda ours: next(replies)(ours))
  with pytest.raises(cifar10.Cifar10Error, match='machines differ in b: start'):
    cifar10_main.require_same({'a': 1, 'b': None, 'c': 'x'})


def test_port_that_is_in_use():
  with socket.create_server(('', 0)) as server:
    address = f'127.0.0.1:{server.getsockname()[1]}'
    with pytest.raises(cifar10.Cifar10Error, match=(
        r'Cannot listen as .* \(Address already in use\)')):
      cifar10_main.wait_for_machines([address, '127.0.0.1:1'], address)


ONE, TWO = '127.0.0.1:1', '127.0.0.1:2'


@pytest.mark.parametrize('config', [
    'no JSON', '{"cluster": 3}', tf_config('worker', worker=[ONE, TWO]),
    tf_config('worker', 7, worker=[ONE, TWO]),
    tf_config('chief', 0, chief=[ONE], ps=[TWO]),
    *(tf_config('worker', 0, worker=[ONE, other]) for other in (
        ONE, 'host', 'host:99999', 'host:0', 'host:-1', 'host:x'))])
def test_cluster_that_is_none(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  with pytest.raises(cifar10.Cifar10Error,
                     match='TF_CONFIG names no cluster of workers'):
    cifar10_main.make_strategy(num_gpus=0)


@pytest.mark.parametrize('config', [
    '', ' ', '{}', tf_config('worker', worker=[ONE]), *(
        tf_config(role, 0, **{role: [ONE]})
        for role in ('chief', 'worker', 'master', 'evaluator'))])
def test_one_machine_trains_alone(monkeypatch, config):
  monkeypatch.setenv('TF_CONFIG', config)
  strategy = cifar10_main.make_strategy(num_gpus=0)
  assert strategy.num_replicas_in_sync == 1
  assert cifar10_main.is_chief()
