"""Tests of what a user sees on a terminal, and does not see elsewhere."""

import os
import pty
import re
import subprocess
import sys
import threading

import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import resnet_model
from tests.helpers import (
    each,
  numbered_records,
  only_log_and_results,
  read_all,
  run_on_terminal,
  train_command,
)


def test_status_of_training(undisturbed):
  *rows, last = undisturbed.screen.rows
  assert not last  # the status is gone
  assert only_log_and_results(rows), rows
  assert len(undisturbed.printed) == 2
  shown = '\n'.join(undisturbed.screen.status)
  number, time_left = r'[\d,]+', r'\d:\d\d:\d\d'
  left = rf'left: {time_left} of the cycle, {time_left} in all'
  for expected in ('Building the training step', 'Step 1 of 150',
                   rf'Step \d+ of 150, {number} images/s, {left}',
                   'Step 100 of 150, .* 0:00:00 of the cycle, 0:00:0. in all',
                   'Evaluating batch 1 of 63', 'Evaluating batch 63 of 63'):
    assert re.search(f'^{expected}$', shown, re.MULTILINE), expected


def test_no_status_of_a_job_in_the_background():
  """In a session of its own, whose terminal a child in another group has."""
  code = ('import fcntl, os, termios, signal\n'
          'import cifar10_download_and_extract as cifar10\n'
          'os.setsid()\n'
          'fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n'
          'cifar10.show_status("in front")\n'
          'signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n'
          'if os.fork() == 0:\n'
          '  os.setpgid(0, 0)\n'
          '  cifar10.show_status("behind")\n'
          'else:\n'
          '  os.wait()\n')
  _, screen = run_on_terminal([sys.executable, '-c', code])
  assert screen.status
  assert set(screen.status) == {'in front'}


def test_status_is_cut_to_a_narrow_terminal():
  code = ('import cifar10_download_and_extract as cifar10\n'
          'cifar10.show_status("0123456789" * 9)\n'
          'cifar10.show_status()')
  _, screen = run_on_terminal(
      [sys.executable, '-c', code], env={**os.environ, 'COLUMNS': '26'})
  assert set(screen.status) == {'0123456789012345678901234'}
  assert screen.rows == ['']


@pytest.mark.parametrize('ends', each([('stdout',), ('stdout', 'stderr')], 1))
def test_no_status_and_no_notices_without_a_terminal(tmp_path, ends):
  """Each end may be a file; what is still on the terminal has no status."""
  terminal, end = pty.openpty()
  outputs = {name: (tmp_path / name).open('wb') if name in ends else end
             for name in ('stdout', 'stderr')}
  seen = []
  reader = threading.Thread(target=lambda: seen.extend(read_all(terminal)))
  process = subprocess.Popen(train_command(
      tmp_path / 'model', '--train_steps=3', '--steps_per_eval=2'), **outputs)
  os.close(end)
  reader.start()
  assert process.wait() == 0
  reader.join()
  os.close(terminal)
  text = b''.join(seen).decode().replace('\r\n', '\n')
  for name in ends:
    outputs[name].close()
    text += (tmp_path / name).read_text()
  assert '\r' not in text
  assert only_log_and_results(text.splitlines())
  assert len(re.findall('^{', text, re.MULTILINE)) == 2


def test_run_without_any_output(undisturbed):
  """As of a process that a service starts."""
  process = subprocess.run(
      ['sh', '-c', 'exec "$@" >&- 2>&-', 'sh',
       *train_command(undisturbed.model_dir, '--eval_only')],
      capture_output=True, check=True)
  assert not process.stdout + process.stderr


@pytest.mark.parametrize(('listed', 'visible', 'expected'), [
    ('GPU 0: NVIDIA Something (UUID: GPU-1)', None, True),
    ('GPU 0: NVIDIA Something (UUID: GPU-1)', '0', True),
    ('GPU 0: NVIDIA Something (UUID: GPU-1)', '', False),
    ('No devices were found', None, False),
])
def test_gpu_that_cannot_be_used(
    tmp_path, monkeypatch, log, listed, visible, expected):
  """A stand-in for its driver's tool lists one that TensorFlow cannot see."""
  tool = tmp_path / 'nvidia-smi'
  tool.write_text(f'#!/bin/sh\necho "{listed}"\n')
  tool.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
  monkeypatch.setattr(tf.test, 'is_built_with_cuda', lambda: True)
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  if visible is not None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  resnet_model.warn_of_idle_gpu()
  assert any('cannot use the GPU' in line for line in log) == expected


def test_progress_of_the_download(tmp_path):
  records = numbered_records(10000)
  folder = tmp_path / 'source' / cifar10.FOLDER_NAME
  folder.mkdir(parents=True)
  for name in cifar10.FILE_SHA256:
    np.random.default_rng(0).permutation(records).tofile(folder / name)
  archive = tmp_path / 'archive.tar.gz'
  subprocess.run(['tar', 'czf', archive, '-C', folder.parent,
                  cifar10.FOLDER_NAME], check=True)
  status, screen = run_on_terminal(
      [sys.executable, cifar10.__file__, f'--data_dir={tmp_path}/data',
       f'--data_url=file://{archive}', '--skip_checksums'])
  assert status == 0
  assert [row.split(' ')[0] for row in screen.rows] == [
      'Successfully', f'{tmp_path}/data/{cifar10.FOLDER_NAME}', '']
  shares = re.findall(r'>> Downloading cifar-10-binary.tar.gz (\d+\.\d)%',
                      '\n'.join(screen.status))
  assert float(shares[0]) < float(shares[-1]) == 100


def test_retries_of_the_download_have_lines_of_their_own(tmp_path):
  code = (
      'import cifar10_download_and_extract as cifar10\n'
      'cifar10.RETRY_SECONDS = (0, 0)\n'
      'def receive(url, size):\n'
      '  yield size, bytes(1 << 20) if size < 3 << 20 else b"", 100 << 20\n'
      '  raise cifar10.UnfinishedError("the line is dead")\n'
      'cifar10.receive = receive\n'
      'cifar10.define_flags()\n'
      'cifar10.app.run(cifar10.main)')
  status, screen = run_on_terminal(
      [sys.executable, '-c', code, f'--data_dir={tmp_path}/data'])
  assert status == 1
  *retries, error, last = screen.rows
  assert retries == ['the line is dead: trying again in 0 s'] * 4
  assert 'Cannot fetch' in error
  assert not last
  assert '>> Downloading cifar-10-binary.tar.gz 3.0%' in screen.status
