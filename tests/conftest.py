"""Fixtures that several test modules share."""

import os
import subprocess

from absl import flags, logging
import pytest

import cifar10_main


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
