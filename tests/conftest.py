"""Fixtures that several test modules share."""

import contextlib
import dataclasses
import fcntl
import io
import logging
import os
import pathlib
import pickle
import shutil
import signal
import subprocess

from absl import flags
import numpy as np
import pytest

import cifar10_main
from tests import helpers


@pytest.fixture
def small_disk(tmp_path):
  """Mounts a file system of a given size, or gives it another size."""
  folder = tmp_path / 'disk'
  folder.mkdir()

  def mount(kilobytes):
    remount = 'remount,' if os.path.ismount(folder) else ''
    result = subprocess.run(
        ['mount', '-t', 'tmpfs', '-o', f'{remount}size={kilobytes}k', 'tmpfs',
         folder], capture_output=True, check=False)
    if result.returncode:
      pytest.skip('This user may not mount: see test_model_dir_without_room')
    return folder

  yield mount
  if os.path.ismount(folder):
    subprocess.run(['umount', folder], check=True)


@pytest.fixture(scope='module')
def script_flags():
  cifar10_main.define_flags()
  yield
  for name in flags.FLAGS.flags_by_module_dict()[cifar10_main.__name__]:
    delattr(flags.FLAGS, name.name)


@pytest.fixture
def usual_signals():
  """Python's own handlers, which processes that run tests may have changed."""
  usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGHUP: signal.SIG_DFL,
           signal.SIGINT: signal.default_int_handler}
  before = {number: signal.signal(number, handler)
            for number, handler in usual.items()}
  yield usual
  for number, handler in before.items():
    signal.signal(number, handler)


@pytest.fixture
def log():
  """The messages logged during a test."""
  messages, logger = [], logging.getLogger('absl')
  handler, level = logging.Handler(), logger.level
  handler.emit = lambda record: messages.append(record.getMessage())
  logger.addHandler(handler)
  logger.setLevel('INFO')
  yield messages
  logger.setLevel(level)
  logger.removeHandler(handler)


@pytest.fixture
def data_dir(tmp_path):
  """Small data files: 50 records to train, 23 to evaluate."""
  helpers.write_random_data(tmp_path / 'data')
  return tmp_path / 'data'


@dataclasses.dataclass
class Trained:
  """A model folder, to be copied and not changed, and what the run printed."""
  model_dir: pathlib.Path
  printed: list[str]


@pytest.fixture(scope='session')
def trained(tmp_path_factory):
  """A run of eight steps, seed 1, in two cycles on the data of data_dir."""
  folder = tmp_path_factory.mktemp('trained')
  helpers.write_random_data(folder / 'data')
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    helpers.run(folder / 'data', folder / 'model', train_steps=8, seed=1)
  return Trained(folder / 'model', printed.getvalue().splitlines())


@pytest.fixture
def model_dir(tmp_path, trained):
  """A copy of the folder of `trained`: checkpoints of steps 0, 4 and 8."""
  return shutil.copytree(trained.model_dir, tmp_path / 'model')


@dataclasses.dataclass
class Run:
  """A run of the script on a terminal."""
  model_dir: pathlib.Path
  export_dir: pathlib.Path
  screen: helpers.Screen
  printed: list[str]  # on standard output
  tensors: dict  # of the last checkpoint


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
  """What train_command does when nothing disturbs it; it also exports.

  The first process of the tests that needs it runs it for all.
  """
  folder = tmp_path_factory.getbasetemp()
  if 'PYTEST_XDIST_WORKER' in os.environ:
    folder = folder.parent
  kept = folder / 'undisturbed.pickle'
  with open(folder / 'undisturbed.lock', 'w') as lock:
    fcntl.flock(lock, fcntl.LOCK_EX)
    if not kept.exists():
      kept.write_bytes(pickle.dumps(run_undisturbed(folder / 'undisturbed')))
  return pickle.loads(kept.read_bytes())


def run_undisturbed(folder):
  folder.mkdir()
  status, screen = helpers.run_on_terminal(
      helpers.train_command(folder / 'model', f'--export_dir={folder}/export'))
  assert status == 0, screen.rows
  return Run(folder / 'model', folder / 'export', screen,
             [row for row in screen.rows if row.startswith('{')],
             helpers.tensors(folder / 'model' / 'model.ckpt-150'))


@pytest.fixture(scope='session')
def golden():
  """Numbers of the original and their inputs, as golden/README.md says."""
  with np.load(helpers.GOLDEN + '.npz') as values:
    golden = dict(values)
  generator = np.random.RandomState(1)
  golden['images'] = generator.randint(
      0, 256, (21, 16, 32, 32, 3)).astype(np.uint8)
  golden['labels'] = generator.randint(0, 10, (21, 16)).astype(np.int32)
  return golden
