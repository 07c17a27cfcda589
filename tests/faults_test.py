"""Tests of what a run survives: signals, kills, damage, disks without room.

Those marked slow do this at random moments: each seed is a course of ten
faults, one after another, in one model folder.
"""

import itertools
import pathlib
import random
import re
import shutil
import signal
import subprocess
import time

import numpy as np
import pytest
import tensorflow as tf

from tests import helpers


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
  helpers.read_until(process, 'Saving checkpoints for')
  process.kill()
  printed += process.communicate()[0].splitlines()
  assert process.returncode == -signal.SIGKILL

  with open(tmp_path / 'printed', 'w') as file:
    status, screen = helpers.run_on_terminal(
        helpers.train_command(model_dir), stdout=file)
  assert status == 0
  assert not screen.status or not any(
      'Step' in line or 'Evaluating' in line for line in screen.status)
  printed += (tmp_path / 'printed').read_text().splitlines()
  assert helpers.only_log_and_results([*screen.rows[:-1], *printed])
  assert_finished_the_same(model_dir, undisturbed, printed)


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


FULL = 'No space left on device): make room there, or name another --model_dir'
READ_ONLY = 'Read-only file system): name another --model_dir'
IN_USE = 'is in use by another run: wait until it ends'


def run_until(chance, model_dir, *arguments):
  """Starts a run and returns it at a random moment."""
  process = helpers.start(helpers.train_command(model_dir, *arguments))
  for _ in itertools.islice(process.stderr, chance.randint(1, 20)):
    pass
  time.sleep(chance.uniform(0, 0.3))
  return process


def end(process, *statuses, cure=None):
  """Ends a run in at most a minute; returns the results that it printed.

  It ends with status 0, one of those given, or 1 and a line that has the cure.
  """
  printed, log = process.communicate(timeout=60)
  assert 'Traceback' not in log, log
  if cure and process.returncode == 1:
    assert cure in log.splitlines()[-1], log
  else:
    assert process.returncode in (0, *statuses), log
  return printed.splitlines()


def kill(chance, model_dir):
  """At a random moment or, every other time, in the midst of a save."""
  if chance.random() < 0.5:
    process = run_until(chance, model_dir)
  else:
    process = helpers.start(helpers.train_command(model_dir))
    any('Saving checkpoints' in line for line in process.stderr)  # up to it
  process.kill()
  return end(process, -signal.SIGKILL)


def send(number):
  def fault(chance, model_dir):
    process = run_until(chance, model_dir, '--save_checkpoints_secs=600')
    process.send_signal(number)
    return end(process, 128 + number, -number)
  return fault


def stop_and_continue(chance, model_dir):
  process = run_until(chance, model_dir)
  process.send_signal(signal.SIGSTOP)
  time.sleep(chance.uniform(0, 1))
  process.send_signal(signal.SIGCONT)
  return end(process)


def second_run(chance, model_dir):
  """It ends in one line, and the first one does not notice."""
  first = run_until(chance, model_dir)
  second = helpers.start(helpers.train_command(model_dir))
  printed_later = end(second, cure=IN_USE)
  return end(first) + printed_later


def flags_that_must_not_matter(chance, model_dir):
  return end(helpers.start(helpers.train_command(
      model_dir, f'--save_checkpoints_secs={chance.randint(0, 9)}',
      chance.choice(['--verbosity=0', '--num_gpus=0', '--xla=off']))))


def damage(chance, model_dir):
  """Cuts, changes or removes a part of the newest checkpoint, or the list."""
  steps = {int(path.stem.rpartition('-')[2])
           for path in model_dir.glob('model.ckpt-*.index')}
  parts = [*model_dir.glob('checkpoint'), *(
      model_dir.glob(f'model.ckpt-{max(steps)}.*') if len(steps) > 1 else ())]
  if parts:
    part = chance.choice(parts)
    data = part.read_bytes()
    at = chance.randrange(len(data) + 1)
    chance.choice([
        part.unlink, lambda: part.write_bytes(data[:at]),
        lambda: part.write_bytes(data[:at] + b'\xff' * 9 + data[at + 9:])])()
  return []


def full_disk(chance, model_dir):
  """There is room for nothing, for events alone, or for one more checkpoint."""
  filler, left = model_dir.parent / 'filler', chance.choice([0, 200_000, 10**6])
  free = shutil.disk_usage(model_dir.parent).free
  filler.write_bytes(bytes(max(0, free - left)))
  try:
    return end(helpers.start(helpers.train_command(model_dir)), cure=FULL)
  finally:
    filler.unlink()


def read_only(chance, model_dir):
  def remount(how):
    subprocess.run(
        ['mount', '-o', f'remount,{how}', model_dir.parent], check=True)

  remount('ro')
  try:
    return end(helpers.start(helpers.train_command(model_dir)), cure=READ_ONLY)
  finally:
    remount('rw')


FAULTS = [
    kill, kill, *map(send, (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)),
    stop_and_continue, second_run, flags_that_must_not_matter, damage, damage,
    full_disk, read_only]


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(20))
def test_ten_random_faults(small_disk, undisturbed, seed):
  """Each run ends in the undisturbed run's bits or says what to do.

  A run that a fault lets finish is compared; then a new one begins.
  """
  model_dir = small_disk(20_000) / 'model'
  chance, printed = random.Random(seed), []
  for _ in range(10):
    printed += chance.choice(FAULTS)(chance, model_dir)
    if undisturbed.printed[-1] in printed:
      assert_finished_the_same(model_dir, undisturbed, printed)
      shutil.rmtree(model_dir)
      printed = []
  assert_goes_on_to_the_same(model_dir, undisturbed, printed)
