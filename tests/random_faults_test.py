"""Random faults: whatever happens to a run, it ends with the same bits.

    python -m pytest -m slow tests/random_faults_test.py

Each seed is a course of ten faults, one after another, in one model folder. A
run that a fault lets finish is compared; then the course begins a new one.
"""

import itertools
import os
import random
import shutil
import signal
import subprocess
import time

import pytest

from tests import faults_test, helpers

FULL = 'No space left on device): make room there, or name another --model_dir'
READ_ONLY = 'Read-only file system): name another --model_dir'
IN_USE = 'is in use by another run: wait until it ends'


def run_until(chance, model_dir):
  """Starts a run and returns it at a random moment."""
  process = helpers.start(helpers.train_command(model_dir))
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


def send(number, *statuses):
  def fault(chance, model_dir):
    process = run_until(chance, model_dir)
    process.send_signal(number)
    return end(process, *statuses)
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
  return end(second, cure=IN_USE) + end(first)


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


def one_core(chance, model_dir):
  """It goes on, and says that the numbers will differ: so with a copy."""
  copy = model_dir.parent / 'copy'
  if model_dir.exists():
    shutil.copytree(model_dir, copy)
  goes_on = list(copy.glob('model.ckpt-*.index'))
  cores = os.sched_getaffinity(0)
  process = helpers.start(
      helpers.train_command(copy),
      preexec_fn=lambda: os.sched_setaffinity(0, {min(cores)}))
  _, log = helpers.finish(process)
  shutil.rmtree(copy)
  assert process.returncode == 0, log
  warned = 'with 1: the numbers will differ' in log
  assert warned == bool(goes_on and len(cores) > 1), log
  return []


FAULTS = [
    send(signal.SIGKILL, -signal.SIGKILL),
    send(signal.SIGTERM, 143, -signal.SIGTERM),
    send(signal.SIGINT, 130, -signal.SIGINT),
    send(signal.SIGHUP, 129, -signal.SIGHUP),
    stop_and_continue, second_run, flags_that_must_not_matter, damage, damage,
    full_disk, read_only, one_core]


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(20))
def test_ten_random_faults(small_disk, undisturbed, seed):
  """A run ends with the undisturbed run's bits, or says what to do."""
  model_dir = small_disk(20_000) / 'model'
  chance, printed = random.Random(seed), []
  for _ in range(10):
    printed += chance.choice(FAULTS)(chance, model_dir)
    if undisturbed.printed[-1] in printed:
      faults_test.assert_finished_the_same(model_dir, undisturbed, printed)
      shutil.rmtree(model_dir)
      printed = []
  faults_test.assert_goes_on_to_the_same(model_dir, undisturbed, printed)
