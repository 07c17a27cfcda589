"""Tests of what a run survives: real processes, signals and full disks.

Those marked slow repeat the others at more moments.
"""

import os
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
import cifar10_main
from tests.cifar10_main_test import numbered_records, write_data

SCRIPT = os.path.abspath(cifar10_main.__file__)
STEPS = 250


def start(model_dir, *arguments, command=(SCRIPT,)):
  return subprocess.Popen(
      [sys.executable, *command, '--use_synthetic_data', '--resnet_size=8',
       '--batch_size=8', '--seed=1', f'--train_steps={STEPS}',
       '--steps_per_eval=120', '--save_checkpoints_secs=1',
       f'--model_dir={model_dir}', *arguments],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      cwd=os.path.dirname(SCRIPT))


def finish(process):
  """Returns what a process has printed on standard output and error."""
  output = process.communicate(timeout=120)
  assert 'Traceback' not in output[1]
  return output


def tensors(path):
  """Returns the values of a checkpoint, without TensorFlow's own of saving."""
  reader = tf.train.load_checkpoint(str(path))
  return {key: reader.get_tensor(key)
          for key in reader.get_variable_to_shape_map()
          if 'save_counter' not in key and 'OBJECT_GRAPH' not in key}


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  """What a run that nothing disturbs prints and ends with.

  And the seconds from its first checkpoint on.
  """
  model_dir = tmp_path_factory.mktemp('undisturbed')
  process = start(model_dir)
  wait_for_training(process, model_dir)
  started = time.monotonic()
  printed, _ = finish(process)
  assert process.returncode == 0
  return {'seconds': time.monotonic() - started,
          'printed': printed.splitlines(),
          'tensors': tensors(model_dir / f'model.ckpt-{STEPS}')}


def assert_goes_on_to_the_same(model_dir, undisturbed, printed_before):
  """The same command ends with the same bits, and each evaluation is made."""
  process = start(model_dir)
  printed, log = finish(process)
  assert process.returncode == 0, log
  printed = printed_before.splitlines() + printed.splitlines()
  assert list(dict.fromkeys(printed)) == undisturbed['printed']
  values = tensors(model_dir / f'model.ckpt-{STEPS}')
  assert values.keys() == undisturbed['tensors'].keys()
  for key, value in values.items():
    np.testing.assert_array_equal(value, undisturbed['tensors'][key], key)
  assert not list(model_dir.glob('*_temp'))


def wait_for(process, condition):
  """Waits until the condition is true, or the process has ended."""
  while process.poll() is None and not condition():
    pass


def wait_for_training(process, model_dir):
  wait_for(process, lambda: (model_dir / 'model.ckpt-0.index').exists())


def each(moments, quick):
  """Returns the moments as parameters, all but the first few marked slow."""
  return [pytest.param(moment, marks=() if i < quick else pytest.mark.slow)
          for i, moment in enumerate(moments)]


@pytest.mark.parametrize('moment', each(range(20), quick=1))
def test_killed_run(tmp_path, undisturbed, moment):
  """At a random moment or, every other time, in the midst of a save."""
  chance = random.Random(moment)
  process = start(tmp_path)
  if moment % 2 == 0:
    for _ in range(chance.randint(1, 4)):  # at steps 0, 120, 240, 250
      wait_for(process, lambda: not list(tmp_path.glob('*_temp')))
      wait_for(process, lambda: list(tmp_path.glob('*_temp')))
  else:
    wait_for_training(process, tmp_path)
    time.sleep(undisturbed['seconds'] * chance.uniform(0, 0.9))
  process.kill()
  printed, _ = process.communicate()
  assert process.returncode == -signal.SIGKILL
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed)


@pytest.mark.parametrize('moment', each(range(10), quick=1))
def test_signal(tmp_path, undisturbed, moment):
  process = start(tmp_path, '--save_checkpoints_secs=600')
  wait_for_training(process, tmp_path)
  time.sleep(undisturbed['seconds'] * random.Random(moment).uniform(0, 0.7))
  number = (signal.SIGTERM, signal.SIGINT)[moment % 2]
  process.send_signal(number)
  printed, log = finish(process)
  assert process.returncode == 128 + number
  *_, last = log.splitlines()
  step = int(re.search(r'Stopped after step (\d+), saved as', last)[1])
  assert 0 < step < STEPS
  newest, = tensors(tmp_path / f'model.ckpt-{step}')['global_step/.ATTRIBUTES'
                                                     '/VARIABLE_VALUE'].flat
  assert newest == step
  assert tf.train.latest_checkpoint(tmp_path).endswith(f'-{step}')
  assert_goes_on_to_the_same(tmp_path, undisturbed, printed)


@pytest.mark.parametrize(
    'number', each([signal.SIGINT, signal.SIGTERM], quick=1))
def test_second_signal_ends_at_once(tmp_path, number):
  """Both come in one step of training that takes ten seconds and more."""
  process = start(tmp_path, '--batch_size=20000')
  wait_for_training(process, tmp_path)
  time.sleep(2)
  process.send_signal(number)
  for line in process.stderr:
    if 'A second signal ends at once' in line:
      break
  process.send_signal(number)
  process.communicate(timeout=1)
  assert process.returncode == 128 + number
  assert not list(tmp_path.glob('model.ckpt-[1-9]*'))


def test_interrupted_before_the_training(tmp_path):
  process = start(tmp_path)
  time.sleep(0.5)  # TensorFlow is being imported
  process.send_signal(signal.SIGINT)
  finish(process)
  assert process.returncode == -signal.SIGINT
  assert not list(tmp_path.iterdir())


def test_second_run_in_the_same_folder(tmp_path):
  """The first one is of the download's module, which starts at once."""
  code = ('import sys, cifar10_download_and_extract as cifar10\n'
          f'with cifar10.sole_use("{tmp_path}"):\n'
          '  print("mine", flush=True)\n'
          '  sys.stdin.read()')
  first = subprocess.Popen(
      [sys.executable, '-c', code], cwd=os.path.dirname(SCRIPT),
      stdin=subprocess.PIPE, stdout=subprocess.PIPE)
  first.stdout.readline()
  second = start(tmp_path)
  _, log = finish(second)
  assert second.returncode == 1
  assert f'{tmp_path} is in use by another run: wait' in log.splitlines()[-1]
  first.kill()  # which also ends its claim
  first.communicate()
  with cifar10.sole_use(str(tmp_path)):
    pass


@pytest.mark.slow
def test_full_disk(small_disk, undisturbed):
  model_dir = small_disk(kilobytes=1500) / 'model'
  process = start(model_dir)
  printed, log = finish(process)
  assert process.returncode == 1
  last = log.splitlines()[-1]
  assert f'Cannot save a checkpoint in {model_dir}' in last
  assert 'No space left on device' in last
  small_disk(kilobytes=9000)
  assert_goes_on_to_the_same(model_dir, undisturbed, printed)


@pytest.mark.parametrize('kilobytes', [700, 1268, 1270, 1272])
def test_disk_that_fills_at_any_part_of_a_save(small_disk, kilobytes):
  """The checkpoint before, of 627 + 5 KiB, stays and is gone back to."""
  folder = small_disk(kilobytes)
  state = cifar10_main.make_state(8, None, 'fp32', seed=0)
  checkpoints = cifar10_main.Checkpoints(str(folder), state)
  checkpoints.save()
  before = checkpoints.newest
  state.global_step.assign(7)
  with pytest.raises(cifar10_main.Cifar10Error, match='Cannot save'):
    checkpoints.save()
  state.global_step.assign(9)
  checkpoints = cifar10_main.Checkpoints(str(folder), state)
  checkpoints.restore_newest()
  assert checkpoints.newest == before
  assert state.global_step == 0


def test_data_that_change_while_training(tmp_path):
  """All records are read at the start. The next start finds the damage."""
  folder = tmp_path / cifar10.FOLDER_NAME
  records = numbered_records(300)
  write_data(folder, records[:250], records[250:])
  inputs = [cifar10_main.input_fn('train', str(tmp_path), 16)
            for _ in range(2)]
  expected = [images.numpy() for images, _ in inputs[0].take(30)]
  changed = iter(inputs[1])
  ours = [next(changed)[0].numpy()]
  cut, *others = (folder / name for name in cifar10.TRAIN_FILES)
  os.truncate(cut, 20_000)
  for file in others:
    file.write_bytes(bytes(file.stat().st_size))
  ours += [next(changed)[0].numpy() for _ in range(29)]
  np.testing.assert_array_equal(ours, expected)
  with pytest.raises(cifar10.Cifar10Error, match=f'{cut} is damaged'):
    cifar10_main.input_fn('train', str(tmp_path), 16)


def test_loss_that_is_not_finite(tmp_path):
  """Also if the checkpoint after step 1 is due, of finite but huge weights."""
  process = start(tmp_path, command=(
      '-c', 'import cifar10_main as script\n'
      'script.INITIAL_LEARNING_RATE = 1e30\n'
      'script.define_flags()\nscript.app.run(script.main)'))
  _, log = finish(process)
  assert process.returncode == 1
  assert re.search(r'is not finite (at step 2|after step 1).*smaller '
                   '--batch_size', log.splitlines()[-1])
  assert not list(tmp_path.glob('model.ckpt-[1-9]*'))
  assert tf.train.latest_checkpoint(tmp_path).endswith('-0')
