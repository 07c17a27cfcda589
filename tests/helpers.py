"""What several test modules use."""

import contextlib
import gzip
import http.server
import os
import pty
import re
import shutil
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

import numpy as np
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main

SCRIPT = os.path.abspath(cifar10_main.__file__)
ROOT = os.path.dirname(SCRIPT)
GOLDEN = os.path.join(os.path.dirname(__file__), 'golden', 'resnet8_b16')
NUMBER = r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?'


# ------------------------------------------------------------------ data


def write_data(data_dir, train_records, test_records):
  """Writes record files; the training files share the records out evenly."""
  folder = data_dir / cifar10.FOLDER_NAME
  folder.mkdir(parents=True)
  for name, part in zip(cifar10.TRAIN_FILES, np.split(train_records, 5)):
    part.tofile(folder / name)
  test_records.tofile(folder / cifar10.TEST_FILE)


def write_random_data(data_dir, num_train=50, num_test=23):
  """Writes record files with random images and labels, always the same."""
  records = np.random.default_rng(0).integers(
      0, 256, [num_train + num_test, cifar10.RECORD_BYTES], np.uint8)
  records[:, 0] %= 10
  write_data(data_dir, records[:num_train], records[num_train:])


def make_files(seed=0, count=10):
  """Returns the six files of a data set, as a dict of bytes by their names."""
  records = np.random.default_rng(seed).integers(
      0, 256, [6, count, cifar10.RECORD_BYTES], np.uint8)
  records[:, :, 0] %= 10
  return {name: file.tobytes()
          for name, file in zip(cifar10.FILE_SHA256, records)}


def member(name, data=b'', kind=tarfile.REGTYPE, target='', size=None):
  """Returns one entry of an archive, which may lie about its size."""
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  info.size = len(data) if size is None else size
  padding = bytes(-len(data) % tarfile.BLOCKSIZE)
  return info.tobuf(tarfile.GNU_FORMAT) + data + padding


def pack(files, first=b'', last=b''):
  """Returns an archive of the files, with other entries around them."""
  entries = [member(f'{cifar10.FOLDER_NAME}/{name}', data)
             for name, data in files.items()]
  end = bytes(tarfile.RECORDSIZE)
  return gzip.compress(b''.join([first, *entries, last, end]), 1, mtime=0)


def contents(folder):
  """Returns all files below a folder but locks, as a dict of bytes by path."""
  return {path: path.read_bytes() for path in folder.rglob('*')
          if path.is_file() and path.name != '.lock'}


# ------------------------------------------------------------------ runs


def small_settings(data_dir=None, model_dir='unused', **changes):
  """Returns settings of four steps on small batches."""
  return cifar10_main.Settings(data_dir, model_dir, **{
      'resnet_size': 8, 'train_steps': 4, 'steps_per_eval': 4,
      'batch_size': 10, **changes})


def input_fn(mode, data_dir=None, *order, **changes):
  """Returns the input; of generated records if there is no folder."""
  return cifar10_main.input_fn(mode, small_settings(
      data_dir, use_synthetic_data=data_dir is None, **changes), *order)


def make_state(**changes):
  return cifar10_main.make_state(small_settings(**{'seed': 0, **changes}))


def run(data_dir, model_dir, interrupted=lambda: False, hooks=(), **changes):
  return cifar10_main.train_and_evaluate(
      small_settings(data_dir, model_dir, **changes), interrupted, hooks)


def matches(pattern, lines):
  """Returns the groups of the lines that match as a whole."""
  found = [re.fullmatch(pattern, line) for line in lines]
  return [match.groups() for match in found if match]


def needs_xla(data_format):
  """Tells whether the device has no convolutions of its own for a layout."""
  image, kernel = np.ones([1, 9, 9, 9], 'f'), np.ones([3, 3, 9, 9], 'f')
  layout = 'NCHW' if data_format == 'channels_first' else 'NHWC'
  try:
    tf.nn.conv2d(image, kernel, 1, 'SAME', layout)
    return False
  except tf.errors.UnimplementedError:
    return True


# ----------------------------------------------------------- checkpoints


def save(model_dir, state, *steps):
  """Saves checkpoints, of the steps if any are given, as one run does."""
  checkpoints = cifar10_main.Checkpoints(str(model_dir))
  for step in steps or [state.global_step]:
    state.global_step.assign(step)
    checkpoints.save(state)
  return checkpoints


def restore(model_dir, state):
  """Restores the newest checkpoint; returns the path of it."""
  checkpoints = cifar10_main.Checkpoints(str(model_dir))
  checkpoints.restore(state, checkpoints.read_newest())
  return checkpoints.newest


def tensors(path):
  """Returns the values of a checkpoint by name."""
  reader = tf.train.load_checkpoint(str(path))
  return {key: reader.get_tensor(key)
          for key in reader.get_variable_to_shape_map()}


def place_originals_checkpoint(model_dir, named='/elsewhere'):
  """Makes a folder as the 2017 script left it in another place, now here."""
  model_dir.mkdir()
  for ending in ('.index', '.data-00000-of-00001'):
    shutil.copy(GOLDEN + '.ckpt' + ending,
                model_dir / f'model.ckpt-312510{ending}')
  (model_dir / 'checkpoint').write_text(
      f'model_checkpoint_path: "{named}/model.ckpt-312510"\n'
      f'all_model_checkpoint_paths: "{named}/model.ckpt-312510"\n')


def difference(ours, theirs):
  """Returns the relative difference in the L2 norm."""
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


# ------------------------------------------------------------- processes


def train_command(model_dir, *arguments):
  """Returns the command of a run that ends within seconds."""
  return [sys.executable, SCRIPT, '--use_synthetic_data', '--resnet_size=8',
          '--batch_size=16', '--seed=1', '--train_steps=150',
          '--steps_per_eval=100', '--save_checkpoints_secs=1',
          f'--model_dir={model_dir}', *arguments]


def start(command, **kwargs):
  return subprocess.Popen(command, **{
      'stdout': subprocess.PIPE, 'stderr': subprocess.PIPE, 'text': True,
      'cwd': ROOT, **kwargs})


def finish(process):
  """Returns what a process has printed on standard output and error."""
  output = process.communicate(timeout=120)
  assert 'Traceback' not in output[1], output[1]
  return output


def read_until(process, text):
  """Returns the log of a process up to a line that contains the text."""
  lines = []
  for line in process.stderr:
    lines.append(line.rstrip('\n'))
    if text in line:
      return lines
  raise AssertionError(f'it has ended without {text!r}: {lines}')


def only_log_and_results(rows):
  """Tells whether each row is a whole line of one of the two."""
  return all(re.fullmatch(r"(INFO|WARNING):tensorflow:.*|\{'acc.*\}", row)
             for row in rows)


# --------------------------------------------------------------- servers


class Handler(http.server.BaseHTTPRequestHandler):
  protocol_version = 'HTTP/1.1'

  def do_GET(self):
    self.server.ranges.append(self.headers['Range'])
    script = self.server.script
    (script.pop(0) if script else part())(self)

  def log_message(self, *args):
    pass


@contextlib.contextmanager
def serve(data):
  """Serves data on the loopback address, in the ways of a script of answers.

  The first request gets the first, and so on; after the last one, right ones.
  """
  with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Handler) as server:
    server.block_on_close = False
    server.handle_error = lambda *_: None  # clients that have seen enough
    server.data, server.script = data, []
    server.ranges = []  # that were asked for, None for the whole
    server.url = f'http://127.0.0.1:{server.server_port}/archive.tar.gz'
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    try:
      yield server
    finally:
      server.shutdown()


def answer(status, *blocks, reason=None, pause=0, then=None, **headers):
  """Makes an answer that is always the same; without a status no header."""
  def send(request):
    if status:
      request.send_response(status, reason)
      for name, value in headers.items():
        request.send_header(name.replace('_', '-'), value)
      request.end_headers()
    for block in blocks:
      request.wfile.write(block)
      time.sleep(pause)
    if then:
      then(request.connection)
  return send


def moved(target, status=302):
  return answer(status, Location=target)


def part(share=1, **kwargs):
  """Makes that of a server that knows ranges, with a share of the bytes."""
  def send(request):
    data = request.server.data
    start = int((request.headers['Range'] or 'bytes=0-')[len('bytes='):-1])
    rest, size = data[start:], len(data)
    now = answer(416, Content_Range=f'bytes */{size}')
    if rest:
      now = answer(206 if start else 200, rest[:int(share * len(rest))],
                   Content_Range=f'bytes {start}-{size - 1}/{size}',
                   Content_Length=len(rest), **kwargs)
    now(request)
  return send


def reset(connection):
  """Ends a connection as a crash does."""
  connection.setsockopt(
      socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
  connection.close()


# --------------------------------------------------------------- screens


class Screen:
  """The rows of an endless terminal, and all that its last row has shown."""

  def __init__(self, output):
    self.rows, self.status = [''], []
    column = 0
    for text in re.findall(r'\r\n|\r|[^\r\n]+', output):
      if text == '\r':
        column = 0
        if self.rows[-1].strip():
          self.status.append(self.rows[-1].strip())
      elif text == '\r\n':
        column = 0
        self.rows.append('')
      else:
        row = self.rows[-1].ljust(column)
        self.rows[-1] = row[:column] + text + row[column + len(text):]
        column += len(text)
    self.rows = [row.rstrip() for row in self.rows]


def run_on_terminal(command, at=None, then=None, **kwargs):
  """Returns the exit status and the screen of a process on a terminal.

  Where its output has shown the bytes `at`, `then` is called with the process.
  """
  terminal, end = pty.openpty()
  process = subprocess.Popen(command, cwd=ROOT, **{
      'stdin': end, 'stdout': end, 'stderr': end, **kwargs})
  os.close(end)
  output = b''
  with contextlib.suppress(OSError):  # so a terminal ends on Linux
    while data := os.read(terminal, 1 << 16):
      output += data
      if at and at in output:
        then(process)
        at = None
  os.close(terminal)
  return process.wait(), Screen(output.decode())
