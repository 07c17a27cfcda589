"""Fixtures that several test modules share."""

import contextlib
import dataclasses
import io
import os
import pathlib
import pickle
import subprocess
import time

from absl import flags, logging
import numpy as np
import pytest

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests.helpers import (
    GOLDEN,
    Screen,
    run,
    run_on_terminal,
    tensors,
    train_command,
    write_random_data,
)


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
def log():
  """The messages logged during a test."""
  messages = []

  class Handler(logging.PythonHandler):

    def emit(self, record):
      messages.append(record.getMessage())

  handler = Handler()
  logger = logging.get_absl_logger()
  logger.addHandler(handler)
  verbosity = logging.get_verbosity()
  logging.set_verbosity(logging.INFO)
  yield messages
  logging.set_verbosity(verbosity)
  logger.removeHandler(handler)


@pytest.fixture
def data_dir(tmp_path):
  """Small data files: 50 records to train, 23 to evaluate."""
  write_random_data(tmp_path / 'data', 50, 23)
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
  write_random_data(folder / 'data', 50, 23)
  with contextlib.redirect_stdout(io.StringIO()) as printed:
    run(folder / 'data', folder / 'model', train_steps=8, seed=1)
  return Trained(folder / 'model', printed.getvalue().splitlines())


@dataclasses.dataclass
class Run:
  """A run of the script on a terminal."""
  model_dir: pathlib.Path
  export_dir: pathlib.Path
  screen: Screen
  printed: list[str]  # on standard output
  tensors: dict  # of the last checkpoint
  seconds: float  # from the first step on


@pytest.fixture(scope='session')
def undisturbed(tmp_path_factory):
  """What train_command does when nothing disturbs it; it also exports.

  The first process of the tests that needs it runs it for all.
  """
  folder = tmp_path_factory.getbasetemp().parent / 'undisturbed'
  with cifar10.sole_use(str(folder), wait=True):
    if not (folder / 'run').exists():
      (folder / 'run').write_bytes(pickle.dumps(run_undisturbed(folder)))
  return pickle.loads((folder / 'run').read_bytes())


def run_undisturbed(folder):
  started = []
  status, screen = run_on_terminal(
      train_command(folder / 'model', f'--export_dir={folder}/exported'),
      at=b'Step 1 of', then=lambda _: started.append(time.monotonic()))
  assert status == 0, screen.rows
  return Run(folder / 'model', folder / 'exported', screen,
             [row for row in screen.rows if row.startswith('{')],
             tensors(folder / 'model' / 'model.ckpt-150'),
             time.monotonic() - started[0])


@pytest.fixture(scope='session')
def golden():
  """Numbers of the original and their inputs, as golden/README.md says."""
  with np.load(GOLDEN + '.npz') as values:
    golden = dict(values)
  generator = np.random.RandomState(1)
  golden['images'] = generator.randint(
      0, 256, (21, 16, 32, 32, 3)).astype(np.uint8)
  golden['labels'] = generator.randint(0, 10, (21, 16)).astype(np.int32)
  return golden
