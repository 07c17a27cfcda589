"""Tests of what a user sees on a terminal, and does not see elsewhere."""

import os
import re
import sys

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


def test_status_of_training(undisturbed):
  """Each row that stays is a whole line: of the log, or a result."""
  *rows, last = undisturbed.screen.rows
  assert not last  # the status is gone
  assert helpers.only_log_and_results(rows), rows
  assert any(re.fullmatch(
      rf'INFO:tensorflow:loss = {helpers.NUMBER}, step = 1', row)
             for row in rows)
  assert len(undisturbed.printed) == 2
  shown = '\n'.join(undisturbed.screen.status)
  number, time_left = r'[\d,]+', r'\d:\d\d:\d\d'
  left = rf'evaluation in {time_left}, end in {time_left}'
  for expected in ('Loading TensorFlow', 'Building the training step',
                   'Step 1 of 150',
                   rf'Step \d+ of 150, {number} images/s, {left}',
                   'Step 100 of 150, .* evaluation in 0:00:00, end in 0:00:0.',
                   'Evaluating batch 1 of 63', 'Evaluating batch 63 of 63'):
    assert re.search(f'^{expected}$', shown, re.MULTILINE), expected


def run_code(code, *arguments, **kwargs):
  """Runs code with the download's module on a terminal: status and screen."""
  code = f'import os, cifar10_download_and_extract as cifar10\n{code}'
  return helpers.run_on_terminal(
      [sys.executable, '-c', code, *arguments], **kwargs)


def test_no_status_of_a_job_in_the_background():
  """In a session of its own, whose terminal a child in another group has."""
  _, screen = run_code(
      'import fcntl, termios, signal\n'
      'os.setsid()\n'
      'fcntl.ioctl(0, termios.TIOCSCTTY, 0)\n'
      'cifar10.show_status("in front")\n'
      'signal.signal(signal.SIGTTOU, signal.SIG_IGN)\n'
      'if os.fork() == 0:\n'
      '  os.setpgid(0, 0)\n'
      '  cifar10.show_status("behind")\n'
      'else:\n'
      '  os.wait()\n')
  assert screen.status
  assert set(screen.status) == {'in front'}


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


def test_status_is_cut_to_a_narrow_terminal():
  """Also where nothing is known of jobs, as on Windows."""
  _, screen = run_code('del os.tcgetpgrp\n'
                       'cifar10.show_status("0123456789" * 9)\n'
                       'cifar10.show_status()',
                       env={**os.environ, 'COLUMNS': '26'})
  assert set(screen.status) == {'0123456789012345678901234'}
  assert screen.rows == ['']


def test_error_takes_the_place_of_the_status():
  status, screen = run_code(
      'with cifar10.errors_in_one_line():\n'
      '  cifar10.show_status("what is longer than the error")\n'
      '  raise cifar10.Cifar10Error("the error")')
  assert status == 1
  assert screen.rows == ['-c: the error', '']


DOWNLOAD = """
cifar10.RECORDS_PER_FILE, cifar10.RETRY_SECONDS = 50, (0, 0)
cifar10.define_flags()
cifar10.app.run(cifar10.main)
"""


def test_progress_of_the_download(tmp_path):
  """A hundredth comes at a time, then nothing, then the rest in pieces.

  Each retry has a line of its own; the status has gone at the end.
  """
  with helpers.serve(helpers.pack(helpers.make_files(count=50))) as server:
    server.script = [
        *(helpers.part(1 / left) for left in (100, 99, 98)), helpers.part(0)]
    status, screen = run_code(
        DOWNLOAD, f'--data_dir={tmp_path}', f'--data_url={server.url}',
        '--skip_checksums')
  assert status == 0, screen.rows
  *retries, fetched, complete, last = screen.rows
  assert len(retries) == 4
  assert all(row.endswith('trying again in 0 s') for row in retries)
  assert fetched.startswith('Successfully downloaded')
  assert complete.startswith(f'{tmp_path}/{cifar10.FOLDER_NAME} is complete')
  assert not last
  shares = [float(share) for share in re.findall(
      r'>> Downloading cifar-10-binary.tar.gz (\d+\.\d)%',
      '\n'.join(screen.status))]
  assert shares[0] < 2
  assert shares == sorted(shares)
  assert shares[-1] == 100
