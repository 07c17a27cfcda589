"""Tests of what people bring: folders, disks, other data, other machines."""

import errno
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
from tensorboard import plugin_util
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers

SMALL = ('--use_synthetic_data', '--resnet_size=8', '--batch_size=16',
         '--train_steps=2', '--steps_per_eval=2')


@pytest.mark.parametrize('command', [
    [f'.{os.sep}cifar10_main.py'],
    pytest.param(['tests/../cifar10_main.py'], marks=pytest.mark.slow),
    pytest.param(['-m', 'cProfile', '-o', os.devnull, 'cifar10_main.py'],
                 marks=pytest.mark.slow)])
def test_log_however_the_script_is_started(tmp_path, command):
  """Its standard streams may be closed, too."""
  command = [sys.executable, *command, *SMALL, f'--model_dir={tmp_path}/m']
  process = helpers.start(command)
  printed, log = helpers.finish(process)
  assert process.returncode == 0
  assert len(log.splitlines()) == 13
  assert "'global_step': 2}" in printed
  if 'cProfile' not in command:
    closed = subprocess.run(
        ['sh', '-c', '"$@" >&- 2>&-', 'sh', *command], cwd=helpers.ROOT,
        check=False)
    assert closed.returncode == 0


@pytest.mark.parametrize(('before', 'now', 'expected'), [
    ([1, 2], [0, 2], 'on generated images with 2 cores, from here on on real'),
    ([0, 2], [0, 1], 'with 2 cores, from here on on real images with 1:'),
    ([0, 2], [0, 2], None)])
def test_other_images_or_cores(
    data_dir, tmp_path, monkeypatch, log, before, now, expected):
  monkeypatch.setattr(cifar10_main, 'conditions', lambda settings: before)
  helpers.run(data_dir, tmp_path / 'model', train_steps=1)
  monkeypatch.setattr(cifar10_main, 'conditions', lambda settings: now)
  del log[:]
  for _ in range(2):  # it is said once
    helpers.run(data_dir, tmp_path / 'model', train_steps=2)
  said = [line for line in log if line.startswith('Trained until now')]
  assert len(said) == bool(expected)
  assert all(expected in line for line in said)


def test_conditions(monkeypatch):
  monkeypatch.setattr(os, 'sched_getaffinity', lambda process: {3},
                      raising=False)
  assert cifar10_main.conditions(
      helpers.small_settings(use_synthetic_data=True)) == [True, 1]
  monkeypatch.delattr(os, 'sched_getaffinity')
  assert cifar10_main.conditions(helpers.small_settings()) == [
      False, os.cpu_count()]


@pytest.mark.parametrize('is_file', [False, True])
def test_events_that_cannot_be_written(
    data_dir, tmp_path, monkeypatch, log, capsys, is_file):
  """The run trains, evaluates and saves without them; it says so once."""
  model_dir = tmp_path / 'model'
  if is_file:
    model_dir.mkdir()
    (model_dir / 'eval').touch()
  else:
    def scalar(name, value):
      raise tf.errors.ResourceExhaustedError(None, None, 'No space left')
    monkeypatch.setattr(tf.summary, 'scalar', scalar)
  assert helpers.run(data_dir, model_dir)
  assert "'global_step': 4}" in capsys.readouterr().out
  assert (model_dir / 'model.ckpt-4.index').exists()
  expected = 'No events for TensorBoard in' if is_file else 'TensorBoard misses'
  assert len([line for line in log if expected in line]) == 1


@pytest.mark.parametrize('part', ['index', 'data-00000-of-00001'])
def test_checkpoint_that_may_not_be_read(tmp_path, monkeypatch, part):
  """It is not damaged: the one before is not gone back to."""
  helpers.save(tmp_path, helpers.make_state(), 1, 2)

  class Reader:
    def __init__(self, path):
      self._path = path

    def get_variable_to_shape_map(self):
      raise tf.errors.PermissionDeniedError(
          None, None, f'{self._path}.{part}; Permission denied')

  monkeypatch.setattr(tf.train, 'load_checkpoint', Reader)
  with pytest.raises(cifar10.Cifar10Error, match=r'model\.ckpt-2 may not'):
    helpers.restore(tmp_path, helpers.make_state())


def test_list_that_cannot_be_replaced(tmp_path):
  """The checkpoint itself is whole, and the next run goes on from it."""
  (tmp_path / 'checkpoint').mkdir()
  (tmp_path / 'checkpoint' / 'file').touch()
  with pytest.raises(cifar10.Cifar10Error, match=f'Cannot write to {tmp_path}'):
    helpers.save(tmp_path, helpers.make_state(), 3)
  assert helpers.restore(tmp_path, helpers.make_state()).endswith('-3')


def test_export_is_tried_before_the_training(tmp_path, monkeypatch):
  (tmp_path / 'file').touch()
  with (pytest.raises(cifar10.Cifar10Error, match='name another --export_dir'),
        cifar10_main.folder_beside(str(tmp_path / 'file' / 'exported'))):
    pass

  def rename(*paths):
    raise OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))

  monkeypatch.setattr(os, 'rename', rename)  # another run was first
  with pytest.raises(cifar10.Cifar10Error, match=r'not empty.*--export_dir'):
    cifar10_main.export(helpers.make_state(), str(tmp_path / 'exported'))
  assert [path.name for path in tmp_path.iterdir()] == ['file']


def test_nothing_of_a_system_is_taken_for_granted(
    data_dir, tmp_path, monkeypatch, capsys):
  for module, name in ((os, 'geteuid'), (os, 'sched_getaffinity'),
                       (os, 'tcgetpgrp'), (os, 'getpgrp'), (signal, 'SIGHUP')):
    monkeypatch.delattr(module, name)
  monkeypatch.setitem(sys.modules, 'fcntl', None)
  stop = cifar10_main.StopRequest('SIGTERM', 'SIGHUP')
  assert helpers.run(data_dir, tmp_path / 'model', interrupted=stop)
  stop.end()


def test_tables_are_tables_in_tensorboard():
  table = cifar10_main.markdown_table(
      ['what', 'value'], ('network', 'ResNet-8'), ('--seed', np.int64(3)))
  html = plugin_util.markdown_to_safe_html(table)
  assert [html.count(f'<{tag}>') for tag in ('table', 'th', 'td')] == [1, 2, 4]
  assert '<td>--seed</td>\n<td>3</td>' in html


def test_status_fits_a_terminal(monkeypatch):
  shown = []
  monkeypatch.setattr(cifar10, 'show_status', shown.append)
  cifar10_main.show_progress(cifar10_main.Settings(), 1, 4000, 12.34)
  cifar10_main.show_progress(cifar10_main.Settings(), 99999, 100000, 0.0012)
  assert shown == [
      'Step 1 of 100000, 10 images/s, evaluation in 13:42:28, end in 342:46:28',
      'Step 99999 of 100000, 106,667 images/s, evaluation in 0:00:00, end in '
      '0:00:00']
  assert max(map(len, shown)) <= 80
