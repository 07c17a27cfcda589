"""Tests of what a run survives: real processes, signals and full disks.

Those marked slow repeat the others at more moments.
"""

import os
import pathlib
import random
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
from tests.helpers import (
  GOLDEN,
  ROOT,
  each,
  finish,
  only_log_and_results,
  read_until,
  run,
  run_on_terminal,
  start,
  tensors,
  train_command,
)


def assert_goes_on_to_the_same(model_dir, undisturbed, printed_before):
  """The same command ends with the same bits, and each evaluation is made."""
  process = start(train_command(model_dir))
  printed, log = finish(process)
  assert process.returncode == 0, log
  printed = [*printed_before, *printed.splitlines()]
  assert list(dict.fromkeys(printed)) == undisturbed.printed
  np.testing.assert_equal(
      tensors(model_dir / 'model.ckpt-150'), undisturbed.tensors)
  assert not list(model_dir.glob('*temp*'))


def kill_in_a_save(process, number):
  """Kills a process when it begins its nth save."""
  for _ in range(number):
    read_until(process, 'Saving checkpoints for')
  process.kill()
  printed, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL
  return printed.splitlines()


def test_interrupted_and_killed_run(tmp_path, undisturbed):
  """Interrupted on its terminal, then killed in a save, it ends the same."""
  status, screen = run_on_terminal(
      train_command(tmp_path, '--save_checkpoints_secs=600'),
      at=b'of the cycle', then=lambda process: process.send_signal(2))
  assert status == 130
  *rows, last = screen.rows
  assert not last
  assert only_log_and_results(rows)
  assert [re.search(r'Stopp\w+', row)[0] for row in rows if 'Stopp' in row] == [
      'Stopping', 'Stopped']
  assert_stopped_where_it_says(tmp_path, rows)
  printed = [row for row in rows if row.startswith('{')]
  printed += kill_in_a_save(start(train_command(tmp_path)), 1)
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed)


def assert_stopped_where_it_says(model_dir, log):
  step = int(re.search(r'Stopped after step (\d+), saved as', log[-1])[1])
  assert 0 < step <= 150
  assert tensors(model_dir / f'model.ckpt-{step}')['global_step'] == step
  assert tf.train.latest_checkpoint(model_dir).endswith(f'-{step}')


@pytest.mark.slow
@pytest.mark.parametrize('moment', range(20))
def test_killed_run(tmp_path, undisturbed, moment):
  """At a random moment or, every other time, in the midst of a save."""
  chance = random.Random(moment)
  process = start(train_command(tmp_path))
  if moment % 2 == 0:
    printed = kill_in_a_save(process, chance.randint(1, 4))
  else:
    read_until(process, 'step = 1\n')
    time.sleep(undisturbed.seconds * chance.uniform(0, 0.7))
    process.kill()
    printed = process.communicate()[0].splitlines()
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed)


@pytest.mark.slow
@pytest.mark.parametrize('moment', range(10))
def test_signal(tmp_path, undisturbed, moment):
  """Soon after a logged step: that is before the end of the cycle."""
  process = start(train_command(tmp_path, '--save_checkpoints_secs=600'))
  chance = random.Random(moment)
  read_until(process, chance.choice(['step = 1\n', 'step = 101']))
  time.sleep(chance.uniform(0.3, 0.7))  # past the summaries of that step
  number = (signal.SIGTERM, signal.SIGINT)[moment % 2]
  process.send_signal(number)
  printed, log = finish(process)
  assert process.returncode == 128 + number
  assert_stopped_where_it_says(tmp_path, log.splitlines())
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed.splitlines())


@pytest.mark.parametrize(
    'number', each([signal.SIGINT, signal.SIGTERM], quick=1))
def test_second_signal_ends_at_once(tmp_path, number):
  """Both come in one step of some seconds."""
  process = start(train_command(tmp_path, '--batch_size=5000',
                                '--save_checkpoints_secs=1'))
  read_until(process, 'Saving checkpoints for 1 ')
  process.send_signal(number)
  read_until(process, 'A second signal ends at once')
  process.send_signal(number)
  process.communicate(timeout=1)
  assert process.returncode == 128 + number
  assert not list(tmp_path.glob('model.ckpt-[2-9]*'))


def test_interrupted_before_the_training(tmp_path):
  process = start(train_command(tmp_path))
  maps = pathlib.Path(f'/proc/{process.pid}/maps')
  while 'libtensorflow' not in maps.read_text():  # it is being imported
    time.sleep(0.01)
  process.send_signal(signal.SIGINT)
  finish(process)
  assert process.returncode == -signal.SIGINT
  assert not list(tmp_path.iterdir())


@pytest.mark.parametrize('number', each(
    [signal.SIGTERM, signal.SIGINT, signal.SIGHUP], quick=1))
def test_signal_while_the_first_step_is_built(tmp_path, number):
  """Nothing is to be saved: it ends at once."""
  process = start(train_command(tmp_path, '--resnet_size=56'))
  read_until(process, 'Saving checkpoints for 0')
  process.send_signal(number)
  sent_at = time.monotonic()
  _, log = finish(process)
  assert time.monotonic() - sent_at < 3
  assert process.returncode == 128 + number
  assert not log


def test_closed_terminal(tmp_path):
  """SIGHUP saves as SIGTERM does, but not under nohup."""
  process = start(['nohup', *train_command(
      tmp_path, '--train_steps=100000')], stdin=subprocess.DEVNULL)
  read_until(process, 'step = 1\n')
  process.send_signal(signal.SIGHUP)
  read_until(process, 'step = 101')
  process.terminate()
  _, log = finish(process)
  assert process.returncode == 128 + signal.SIGTERM
  assert 'Stopped after step' in log


def test_second_run_in_the_same_folder(tmp_path):
  """The first one is of the download's module, which starts at once."""
  code = ('import sys, cifar10_download_and_extract as cifar10\n'
          f'with cifar10.sole_use("{tmp_path}"):\n'
          '  print("mine", flush=True)\n'
          '  sys.stdin.read()')
  first = subprocess.Popen([sys.executable, '-c', code], cwd=ROOT,
                           stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  first.stdout.readline()
  with pytest.raises(cifar10.Cifar10Error,
                     match=f'{tmp_path} is in use by another run: wait'):
    run(None, tmp_path, use_synthetic_data=True)
  first.kill()  # which also ends its claim
  first.communicate()
  with cifar10.sole_use(str(tmp_path)):
    pass


def test_folder_of_a_run_that_wrote_nothing(tmp_path):
  """It is removed, unless it was there before or has something in it."""
  for name, was_there, content in (
      ('new', False, False), ('old', True, False), ('full', False, True)):
    folder = tmp_path / name
    if was_there:
      folder.mkdir()
    with cifar10.sole_use(str(folder)):
      if content:
        (folder / 'file').touch()
    assert folder.exists() == (was_there or content)


@pytest.mark.slow
def test_full_disk(small_disk, undisturbed):
  """There is room for two checkpoints, but not for three."""
  kilobytes = os.path.getsize(GOLDEN + '.ckpt.data-00000-of-00001') // 1024
  model_dir = small_disk(int(2.5 * kilobytes)) / 'model'
  process = start(train_command(model_dir))
  printed, log = finish(process)
  assert process.returncode == 1
  last = log.splitlines()[-1]
  assert f'Cannot save a checkpoint in {model_dir}' in last
  assert 'No space left on device' in last
  small_disk(20 * kilobytes)
  assert_goes_on_to_the_same(model_dir, undisturbed, printed.splitlines())
