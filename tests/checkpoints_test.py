"""Tests of the checkpoints: which are written, kept, read, refused."""

import contextlib
import os
import re
import resource
import shutil

import numpy as np
import pytest
import tensorflow as tf

from cifar10_download_and_extract import Cifar10Error
import cifar10_main
import resnet_model
from resnet_model import tf1_name
from tests.helpers import (
    contents,
    evaluate_only,
    make_state,
    place_originals_checkpoint,
    restore,
    run,
    save,
    small_settings,
    tensors,
)


def test_a_copied_folder_leaves_the_one_it_came_from_alone(tmp_path):
  ours, copy = tmp_path / 'model', tmp_path / 'copy'
  state = make_state()
  ours.mkdir()
  save(ours, state)
  # TensorFlow 1 wrote absolute paths.
  (ours / 'checkpoint').write_text(
      f'model_checkpoint_path: "{ours}/model.ckpt-0"\n'
      f'all_model_checkpoint_paths: "{ours}/model.ckpt-0"\n')
  shutil.copytree(ours, copy)
  before = contents(ours)
  for step in range(1, 8):
    state.global_step.assign(step)
    save(copy, state)
  assert contents(ours) == before
  assert (copy / 'model.ckpt-7.index').exists()


def steps_in(folder):
  return sorted(int(path.stem.split('-')[1])
                for path in folder.glob('model.ckpt-*.index'))


def test_keeps_five_checkpoints_and_those_of_others(tmp_path):
  """Also of a neighbour whose name would match this one's as a pattern."""
  place_originals_checkpoint(tmp_path / 'model')
  (tmp_path / 'model.ckpt-1.index').touch()
  before = contents(tmp_path)
  state = make_state()
  for step in range(312511, 312518):
    state.global_step.assign(step)
    save(tmp_path / 'model', state)
  assert steps_in(tmp_path / 'model') == [312510, *range(312513, 312518)]
  for path, content in before.items():
    assert path.name == 'checkpoint' or path.read_bytes() == content
  listed = tf.train.get_checkpoint_state(tmp_path / 'model')
  assert [os.path.basename(path) for path in listed.all_model_checkpoint_paths
          ] == [f'model.ckpt-{step}' for step in range(312513, 312518)]
  assert listed.model_checkpoint_path.endswith('/model.ckpt-312517')


def test_checkpoints_of_the_version_before(tmp_path):
  """They were TensorFlow 2's, whose keys have an ending and .S for a slash."""
  state = make_state()
  variables = {tf1_name(v): v for v in state.variables}
  state.network.kernel.assign(tf.ones_like(state.network.kernel))
  for step in range(2, 7):
    state.global_step.assign(step)
    tf.train.Checkpoint(**variables).write(str(tmp_path / f'model.ckpt-{step}'))
  other = make_state(seed=1)
  assert restore(tmp_path, other).endswith('-6')
  for ours, theirs in zip(other.variables, state.variables):
    np.testing.assert_array_equal(ours.numpy(), theirs.numpy())
  other.global_step.assign(7)
  save(tmp_path, other)
  assert steps_in(tmp_path) == [3, 4, 5, 6, 7]


def test_size_is_in_the_checkpoint(data_dir, tmp_path, capsys):
  save(tmp_path, make_state(14))
  settings = small_settings(data_dir, tmp_path, resnet_size=None)
  state, _ = cifar10_main.open_model(settings)
  assert state.network.resnet_size == 14
  cifar10_main.evaluate_only(settings)
  cifar10_main.export(settings, str(tmp_path / 'exported'))
  assert (tmp_path / 'exported' / 'saved_model.pb').exists()
  state, _ = cifar10_main.open_model(
      small_settings(None, tmp_path / 'new', resnet_size=None))
  assert state.network.resnet_size == 32


def test_renamed_checkpoint(tmp_path, log):
  """Its contents decide, and it is not gone back to when there are newer ones.
  """
  state = make_state()
  for step in (3, 5):
    state.global_step.assign(step)
    save(tmp_path, state)
  for ending in ('index', 'data-00000-of-00001'):
    (tmp_path / f'model.ckpt-5.{ending}').rename(
        tmp_path / f'model.ckpt-9.{ending}')
  assert restore(tmp_path, state).endswith('-9')
  assert log[-1] == f'{tmp_path}/model.ckpt-9 is of step 5'
  assert state.global_step == 5
  state.global_step.assign(6)
  save(tmp_path, state)
  assert restore(tmp_path, state).endswith('-6')


def test_only_checkpoint_that_is_damaged(tmp_path, log):
  state = make_state()
  state.global_step.assign(4)
  save(tmp_path, state)
  cut(tmp_path / 'model.ckpt-4.index')
  with pytest.raises(Cifar10Error, match='holds no checkpoint that is not'):
    restore(tmp_path, state)
  assert 'is damaged' in log[-1]
  assert 'trying' not in log[-1]


def test_no_checkpoint_to_evaluate(data_dir, tmp_path):
  with pytest.raises(Cifar10Error, match='holds no checkpoint to evaluate'):
    evaluate_only(data_dir, tmp_path / 'model')
  assert not (tmp_path / 'model').exists()


def test_checkpoint_of_another_size(data_dir, tmp_path):
  model_dir = tmp_path / 'model'
  place_originals_checkpoint(model_dir)
  before = contents(model_dir)
  for resnet_size in (14, 32):
    with pytest.raises(Cifar10Error, match=(
        rf'of another network \(size 8, not {resnet_size}\): '
        'use --resnet_size=8 or another')):
      run(data_dir, model_dir, resnet_size=resnet_size)
  assert contents(model_dir) == before


def test_checkpoint_of_something_else(data_dir, tmp_path):
  model_dir = tmp_path / 'model'
  model_dir.mkdir()
  tf.train.Checkpoint(weights=tf.Variable([1.0])).write(
      str(model_dir / 'model.ckpt-5'))
  before = contents(model_dir)
  with pytest.raises(Cifar10Error,
                     match=r'missing there .*: use another --model_dir'):
    run(data_dir, model_dir)
  assert contents(model_dir) == before


def test_checkpoint_with_other_classes(data_dir, tmp_path):
  state = cifar10_main.TrainState(
      resnet_model.cifar10_resnet_v2_generator(8, 100))
  save(tmp_path, state)
  with pytest.raises(Cifar10Error, match=(
      r'is of another network \(dense/.* is \[.*100\] there and \[.*10\] here'
      r'\): use another --model_dir')):
    run(data_dir, tmp_path)


def cut(path):
  path.write_bytes(path.read_bytes()[:-300])


def empty(path):
  path.write_bytes(b'')


def remove(path):
  path.unlink()


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [cut, empty, remove, flip_a_bit])
@pytest.mark.parametrize('ending', ['index', 'data-00000-of-00001'])
def test_damaged_checkpoint(tmp_path, log, damage, ending):
  state = make_state()
  for step in (0, 2, 4):
    state.global_step.assign(step)
    save(tmp_path, state)
  before = contents(tmp_path)
  damage(tmp_path / f'model.ckpt-4.{ending}')
  newest = restore(tmp_path, state)
  assert any(re.match(rf'{tmp_path}/model.ckpt-4 is damaged \(.+\): trying '
                      'the one before', line) for line in log)
  assert newest == f'{tmp_path}/model.ckpt-2'
  assert state.global_step == 2
  for path in tmp_path.glob('model.ckpt-[02].*'):
    assert path.read_bytes() == before[path]

  # Nothing whole is left: no other thing to do than to say so.
  for path in tmp_path.glob(f'model.ckpt-[02].{ending}'):
    damage(path)
  before = contents(tmp_path)
  with pytest.raises(Cifar10Error,
                     match=f'{tmp_path} holds no checkpoint that is not'):
    restore(tmp_path, state)
  assert contents(tmp_path) == before


def test_run_after_a_damaged_checkpoint(
    data_dir, tmp_path, log, capsys, trained):
  model_dir = tmp_path / 'model'
  shutil.copytree(trained.model_dir, model_dir)
  flip_a_bit(model_dir / 'model.ckpt-8.data-00000-of-00001')
  run(data_dir, model_dir, train_steps=8)
  assert f'Restoring parameters from {model_dir}/model.ckpt-4' in log
  np.testing.assert_equal(tensors(model_dir / 'model.ckpt-8'),
                          tensors(trained.model_dir / 'model.ckpt-8'))
  for path in model_dir.glob('*.index'):
    cut(path)
  before = contents(model_dir)
  for function in (run, evaluate_only):
    with pytest.raises(Cifar10Error,
                       match=f'{model_dir} holds no checkpoint that is not'):
      function(data_dir, model_dir)
  assert contents(model_dir) == before


def test_first_save_that_was_killed(data_dir, tmp_path, log, trained):
  model_dir = tmp_path / 'model'
  shutil.copytree(trained.model_dir, model_dir)
  for path in (*model_dir.glob('model.ckpt-[48]*'),
               model_dir / 'model.ckpt-0.index'):
    path.unlink()
  partial = model_dir / 'model.ckpt-0.data-00000-of-00001.tempstate123'
  partial.touch()
  run(data_dir, model_dir, train_steps=8, seed=1)
  assert any('model.ckpt-0 is damaged' in line for line in log)
  np.testing.assert_equal(tensors(model_dir / 'model.ckpt-8'),
                          tensors(trained.model_dir / 'model.ckpt-8'))
  assert not partial.exists()


def test_list_of_checkpoints_does_not_matter(data_dir, tmp_path, trained):
  model_dir = tmp_path / 'model'
  shutil.copytree(trained.model_dir, model_dir)
  for content in (bytes(range(256)), b'neither a list nor a protocol buffer'):
    (model_dir / 'checkpoint').write_bytes(content)
    assert restore(model_dir, make_state()).endswith('model.ckpt-8')
  run(data_dir, model_dir, train_steps=9)
  assert tf.train.latest_checkpoint(model_dir).endswith('model.ckpt-9')


@pytest.mark.parametrize('eval_only', [False, True])
def test_checkpoint_that_is_not_finite(data_dir, tmp_path, eval_only):
  model_dir = tmp_path / 'model'
  state = make_state()
  state.network.trainable_variables[3].assign(
      state.network.trainable_variables[3] + np.nan)
  variables = {tf1_name(v): v for v in state.variables}
  tf.train.Checkpoint(**variables).write(str(model_dir / 'model.ckpt-5'))
  before = contents(model_dir)
  with pytest.raises(Cifar10Error,
                     match=r'ckpt-5 is of no use, .* is not finite there'):
    (evaluate_only if eval_only else run)(data_dir, model_dir)
  assert contents(model_dir) == before


def test_does_not_save_what_is_not_finite(tmp_path):
  state = make_state()
  state.momentum[3].assign(state.momentum[3] + np.nan)
  with pytest.raises(
      Cifar10Error, match='Momentum is not finite after step 0, or its norm'):
    save(tmp_path, state)
  assert not contents(tmp_path)


@contextlib.contextmanager
def largest_file(num_bytes):
  """Limits the size of files, which stands in for a disk that is full."""
  limits = resource.getrlimit(resource.RLIMIT_FSIZE)
  resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, limits[1]))
  try:
    yield
  finally:
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)


@pytest.mark.parametrize('num_bytes', [100_000, 1000, 100])
def test_model_dir_without_room(tmp_path, trained, num_bytes):
  """A save that fails, at the data, the index or the list, leaves nothing."""
  model_dir = tmp_path / 'model'
  shutil.copytree(trained.model_dir, model_dir)
  before, state = contents(model_dir), make_state()
  restore(model_dir, state)
  state.global_step.assign(9)
  message = f'Cannot save a checkpoint in {model_dir} .*make room'
  with largest_file(num_bytes), pytest.raises(Cifar10Error, match=message):
    save(model_dir, state)
  assert contents(model_dir) == before
  save(model_dir, state)  # with room again
  assert tf.train.latest_checkpoint(model_dir).endswith('model.ckpt-9')


@pytest.mark.parametrize('part', [0, 0.5, 0.9, 0.99, 1])
def test_disk_that_fills_at_any_part_of_a_save(small_disk, part):
  """The checkpoint before stays and is gone back to."""
  folder, state = small_disk(kilobytes=10_000), make_state()
  save(folder, state)
  used = sum(-(-path.stat().st_size // 4096) * 4 for path in folder.iterdir())
  small_disk(kilobytes=used + 4 * int(part * used / 4))
  before = contents(folder)
  state.global_step.assign(7)
  if part < 1:
    with pytest.raises(Cifar10Error, match='Cannot save'):
      save(folder, state)
    assert contents(folder) == before
  else:
    save(folder, state)
  state.global_step.assign(9)
  restore(folder, state)
  assert state.global_step == (7 if part == 1 else 0)
