"""Tests of what a run survives: real processes, signals and full disks.

Those marked slow repeat the others at more moments.
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import time

import numpy as np
import pytest
import tensorflow as tf

from tests import helpers


def kill_in_a_save(process, number=1):
  """Kills a process when it begins its nth save; returns what it printed."""
  for _ in range(number):
    helpers.read_until(process, 'Saving checkpoints for')
  process.kill()
  printed, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL
  return printed.splitlines()


def assert_finished_the_same(model_dir, undisturbed, printed):
  """It ended with the same bits, and each evaluation was made."""
  assert list(dict.fromkeys(printed)) == undisturbed.printed
  np.testing.assert_equal(
      helpers.tensors(model_dir / 'model.ckpt-150'), undisturbed.tensors)
  assert not list(model_dir.glob('*temp*'))


def assert_goes_on_to_the_same(model_dir, undisturbed, printed_before):
  process = helpers.start(helpers.train_command(model_dir))
  printed, log = helpers.finish(process)
  assert process.returncode == 0, log
  assert_finished_the_same(
      model_dir, undisturbed, [*printed_before, *printed.splitlines()])


def assert_stopped_where_it_says(model_dir, log):
  step = int(re.search(r'Stopped after step (\d+), saved as', log[-1])[1])
  assert 0 < step <= 150
  path = model_dir / f'model.ckpt-{step}'
  assert helpers.tensors(path)['global_step'] == step
  assert tf.train.latest_checkpoint(model_dir) == str(path)


def test_interrupted_and_killed_run(tmp_path, undisturbed):
  """Interrupted on its terminal, then killed in a save, it ends the same.

  The last part has standard output in a file: its terminal has no status line.
  """
  model_dir = tmp_path / 'model'
  status, screen = helpers.run_on_terminal(
      helpers.train_command(model_dir, '--save_checkpoints_secs=600'),
      at=b'evaluation in', then=lambda process: process.send_signal(2))
  assert status == 130
  *rows, last = screen.rows
  assert not last
  assert helpers.only_log_and_results(rows)
  assert [re.search(r'Stopp\w+', row)[0] for row in rows if 'Stopp' in row] == [
      'Stopping', 'Stopped']
  assert_stopped_where_it_says(model_dir, rows)
  printed = [row for row in rows if row.startswith('{')]

  # A closed terminal does not stop what nohup runs.
  process = helpers.start(['nohup', *helpers.train_command(model_dir)],
                          stdin=subprocess.DEVNULL)
  helpers.read_until(process, 'Saving checkpoints for')
  process.send_signal(signal.SIGHUP)
  printed += kill_in_a_save(process)

  with open(tmp_path / 'printed', 'w') as file:
    status, screen = helpers.run_on_terminal(
        helpers.train_command(model_dir), stdout=file)
  assert status == 0
  assert not screen.status or not any(
      'Step' in line or 'Evaluating' in line for line in screen.status)
  printed += (tmp_path / 'printed').read_text().splitlines()
  assert helpers.only_log_and_results([*screen.rows[:-1], *printed])
  assert_finished_the_same(model_dir, undisturbed, printed)


@pytest.mark.slow
@pytest.mark.parametrize('moment', range(20))
def test_killed_run(tmp_path, undisturbed, moment):
  """At a random moment or, every other time, in the midst of a save."""
  chance = random.Random(moment)
  process = helpers.start(helpers.train_command(tmp_path))
  if moment % 2 == 0:
    printed = kill_in_a_save(process, chance.randint(1, 4))
  else:
    helpers.read_until(process, 'step = 1\n')
    time.sleep(undisturbed.seconds * chance.uniform(0, 0.7))
    process.kill()
    printed = process.communicate()[0].splitlines()
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed)


@pytest.mark.slow
@pytest.mark.parametrize('moment', range(10))
def test_signal(tmp_path, undisturbed, moment):
  """Soon after a logged step: that is before the end of the cycle."""
  process = helpers.start(
      helpers.train_command(tmp_path, '--save_checkpoints_secs=600'))
  chance = random.Random(moment)
  helpers.read_until(process, chance.choice(['step = 1\n', 'step = 101']))
  time.sleep(chance.uniform(0.3, 0.7))  # past the summaries of that step
  number = (signal.SIGTERM, signal.SIGINT)[moment % 2]
  process.send_signal(number)
  printed, log = helpers.finish(process)
  assert process.returncode == 128 + number
  assert_stopped_where_it_says(tmp_path, log.splitlines())
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed.splitlines())


def test_interrupted_before_the_training(tmp_path):
  process = helpers.start(helpers.train_command(tmp_path))
  maps = pathlib.Path(f'/proc/{process.pid}/maps')
  while 'libtensorflow' not in maps.read_text():  # it is being imported
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  helpers.finish(process)
  assert process.returncode == -signal.SIGINT
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    'number', [signal.SIGTERM, signal.SIGINT, signal.SIGHUP])
def test_signal_while_the_first_step_is_built(tmp_path, number):
  """Nothing is to be saved: it ends at once."""
  process = helpers.start(
      helpers.train_command(tmp_path, '--resnet_size=56'))
  helpers.read_until(process, 'Saving checkpoints for 0')
  process.send_signal(number)
  sent_at = time.monotonic()
  _, log = helpers.finish(process)
  assert time.monotonic() - sent_at < 3
  assert process.returncode == -number
  assert not log


@pytest.mark.slow
def test_run_without_any_output(undisturbed):
  """As of a process that a service starts."""
  process = subprocess.run(
      ['sh', '-c', 'exec "$@" >&- 2>&-', 'sh',
       *helpers.train_command(undisturbed.model_dir, '--eval_only')],
      capture_output=True, check=True)
  assert not process.stdout + process.stderr


@pytest.mark.slow
def test_full_disk(small_disk, undisturbed):
  """There is room for two checkpoints, but not for three."""
  data = helpers.GOLDEN + '.ckpt.data-00000-of-00001'
  kilobytes = os.path.getsize(data) // 1024
  model_dir = small_disk(int(2.5 * kilobytes)) / 'model'
  process = helpers.start(helpers.train_command(model_dir))
  printed, log = helpers.finish(process)
  assert process.returncode == 1
  assert re.search(f'Cannot write .*{model_dir} .*No space left on device',
                   log.splitlines()[-1])
  small_disk(20 * kilobytes)
  assert_goes_on_to_the_same(model_dir, undisturbed, printed.splitlines())
