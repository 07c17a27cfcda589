"""Tests of the checkpoints: which are written, kept, read, refused."""

import contextlib
import os
import re
import resource
import shutil
from unittest import mock

import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
import resnet_model
from tests import helpers

DATA = 'data-00000-of-00001'


def refused(message):
  return pytest.raises(cifar10.Cifar10Error, match=message)


def steps_in(folder):
  return sorted(int(path.stem.split('-')[1])
                for path in folder.glob('model.ckpt-*.index'))


@pytest.mark.parametrize('slash', ['', '/'])
def test_keeps_five_checkpoints_across_restarts(tmp_path, slash):
  """Not those of others: of the folder of 2017 that this is a copy of, whose
  list has absolute paths; of a neighbour with a name like this one's pattern.
  """
  original, model_dir = tmp_path / 'original', tmp_path / 'model'
  helpers.place_originals_checkpoint(original, named=original)
  shutil.copytree(original, model_dir)
  (tmp_path / 'model.ckpt-1.index').touch()
  before = helpers.contents(tmp_path)
  del before[model_dir / 'checkpoint']
  state, steps = helpers.make_state(), range(312511, 312521)
  for i, step in enumerate(steps):
    helpers.save(f'{model_dir}{slash}', state, step)
    kept = [*steps[max(0, i - 4):i + 1]]
    assert steps_in(model_dir) == [312510, *kept]
  assert before.items() <= helpers.contents(tmp_path).items()
  listed = tf.train.get_checkpoint_state(model_dir)
  assert [os.path.basename(path) for path in listed.all_model_checkpoint_paths
          ] == [f'model.ckpt-{step}' for step in kept]
  assert listed.model_checkpoint_path.endswith('/model.ckpt-312520')


def test_size_is_in_the_checkpoint(tmp_path):
  helpers.save(tmp_path, helpers.make_state(resnet_size=14))
  for folder, size in ((tmp_path, 14), (tmp_path / 'new', 32)):
    state, _ = cifar10_main.open_model(
        helpers.small_settings(None, folder, resnet_size=None))
    assert state.network.resnet_size == state.settings.resnet_size == size


def test_renamed_checkpoint(tmp_path):
  """Were it used, later ones would have lower numbers, and it stay the newest.
  """
  state = helpers.make_state()
  helpers.save(tmp_path, state, 3, 5)
  for ending in ('index', DATA):
    (tmp_path / f'model.ckpt-5.{ending}').rename(
        tmp_path / f'model.ckpt-9.{ending}')
  before = helpers.contents(tmp_path)
  state.global_step.assign(1)
  with refused(f'^{tmp_path}/model.ckpt-9 is of step 5: give it that number '
               'again, or move it away$'):
    helpers.restore(tmp_path, state)
  assert state.global_step == 1
  assert helpers.contents(tmp_path) == before


def test_no_checkpoint_to_evaluate(data_dir, tmp_path):
  with refused('holds no checkpoint: train first'):
    cifar10_main.evaluate_only(
        helpers.small_settings(data_dir, tmp_path / 'model'))
  assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize(('write', 'message'), [
    (lambda folder: helpers.save(folder, helpers.make_state(resnet_size=14), 9),
     r'\(.* differs\): use --resnet_size=14, or another --model_dir$'),
    (lambda folder: tf.train.Checkpoint(weights=tf.Variable([1.0])).write(
        f'{folder}/model.ckpt-9'), r'\(.*differs\): name another --model_dir$'),
    (lambda folder: helpers.save(folder, cifar10_main.TrainState(
        resnet_model.cifar10_resnet_v2_generator(8, 100),
        helpers.small_settings()), 9),
     r'\(.*dense/.* differs\): name another --model_dir$')],
    ids=['of another size', 'of something else', 'with other classes'])
def test_checkpoint_of_another_network(data_dir, model_dir, write, message):
  write(model_dir)
  before = helpers.contents(model_dir)
  with refused(f'^{model_dir}/model.ckpt-9 is of another network {message}'):
    helpers.run(data_dir, model_dir, train_steps=8)
  assert helpers.contents(model_dir) == before


def cut(path):
  path.write_bytes(path.read_bytes()[:-300])


def flip_a_bit(path):
  data = bytearray(path.read_bytes())
  data[len(data) // 3] ^= 4
  path.write_bytes(data)


@pytest.mark.parametrize('damage', [
    cut, lambda path: path.write_bytes(b''), lambda path: path.unlink(),
    flip_a_bit], ids=['cut', 'empty', 'missing', 'a bit'])
@pytest.mark.parametrize('ending', ['index', DATA])
def test_damaged_checkpoint(data_dir, model_dir, log, damage, ending):
  state = helpers.make_state()
  before = helpers.contents(model_dir)
  damage(model_dir / f'model.ckpt-8.{ending}')
  newest = helpers.restore(model_dir, state)
  assert any(re.match(rf'{model_dir}/model.ckpt-8 is damaged \(.+\): trying '
                      'the one before', line) for line in log)
  assert newest == f'{model_dir}/model.ckpt-4'
  assert state.global_step == 4
  for path in model_dir.glob('model.ckpt-[04].*'):
    assert path.read_bytes() == before[path]

  # Nothing whole is left: no other thing to do than to say so.
  for path in model_dir.glob(f'model.ckpt-[04].{ending}'):
    damage(path)
  before = helpers.contents(model_dir)
  for function in (cifar10_main.train_and_evaluate, cifar10_main.evaluate_only):
    with refused(f'{model_dir} holds no checkpoint that is not damaged'):
      function(helpers.small_settings(data_dir, model_dir))
    assert re.match(r'.*/model.ckpt-0 is damaged \(.*\)$', log[-1])
  assert helpers.contents(model_dir) == before


def damage_the_last(model_dir):
  flip_a_bit(model_dir / f'model.ckpt-8.{DATA}')
  return '8 is damaged'


def kill_the_first_save(model_dir):
  for path in (*model_dir.glob('model.ckpt-[48]*'),
               model_dir / 'model.ckpt-0.index'):
    path.unlink()
  (model_dir / f'model.ckpt-0.{DATA}.tempstate123').touch()
  return '0 is damaged'


@pytest.mark.parametrize('damage', [damage_the_last, kill_the_first_save])
def test_run_after_a_damaged_checkpoint(
    data_dir, model_dir, log, trained, damage):
  """It ends with the same bits, and leaves no part of the killed save."""
  said = damage(model_dir)
  helpers.run(data_dir, model_dir, train_steps=8, seed=1)
  assert any(f'model.ckpt-{said}' in line for line in log)
  assert said[0] == '0' or (
      f'Restoring parameters from {model_dir}/model.ckpt-4' in log)
  np.testing.assert_equal(helpers.tensors(model_dir / 'model.ckpt-8'),
                          helpers.tensors(trained.model_dir / 'model.ckpt-8'))
  assert not [*model_dir.glob('*temp*')]


@pytest.mark.parametrize('error', [
    tf.errors.PermissionDeniedError(None, None, 'a.index; Permission denied'),
    RuntimeError('a.data; Permission denied')])
def test_checkpoint_that_may_not_be_read(tmp_path, monkeypatch, error):
  """It is not damaged: the one before is not gone back to."""
  helpers.save(tmp_path, helpers.make_state(), 1, 2)
  monkeypatch.setattr(tf.train, 'load_checkpoint', mock.Mock(side_effect=error))
  with refused(r'model\.ckpt-2 may not be read: .* another --model_dir'):
    helpers.restore(tmp_path, helpers.make_state())


@pytest.mark.parametrize(
    'content', [bytes(range(256)), b'neither a list nor a protocol buffer'])
def test_list_of_checkpoints_does_not_matter(model_dir, content):
  (model_dir / 'checkpoint').write_bytes(content)
  state = helpers.make_state()
  assert helpers.restore(model_dir, state).endswith('model.ckpt-8')
  helpers.save(model_dir, state, 9)
  assert tf.train.latest_checkpoint(model_dir).endswith('model.ckpt-9')


def test_list_that_cannot_be_replaced(tmp_path):
  """The checkpoint itself is whole, and the next run goes on from it."""
  (tmp_path / 'checkpoint').mkdir()
  (tmp_path / 'checkpoint' / 'file').touch()
  with refused(f'Cannot write to {tmp_path}'):
    helpers.save(tmp_path, helpers.make_state(), 3)
  assert helpers.restore(tmp_path, helpers.make_state()).endswith('-3')


def test_model_dir_without_room(model_dir):
  """What could not be saved can be, where there is room again."""
  before, state = helpers.contents(model_dir), helpers.make_state()
  helpers.restore(model_dir, state)
  state.global_step.assign(9)
  size = resource.RLIMIT_FSIZE
  limits = resource.getrlimit(size)
  resource.setrlimit(size, (100_000, limits[1]))  # as if the disk were full
  try:
    with refused(f'^Cannot write to {model_dir} .*--model_dir'):
      helpers.save(model_dir, state)
  finally:
    resource.setrlimit(size, limits)
  assert before.items() <= helpers.contents(model_dir).items()
  helpers.save(model_dir, state)
  assert tf.train.latest_checkpoint(model_dir).endswith('model.ckpt-9')
  assert helpers.restore(model_dir, state).endswith('model.ckpt-9')
  assert not [*model_dir.glob('*temp*')]


@pytest.mark.parametrize('part', [0, 0.5, 0.9, 0.99, 1])
def test_disk_that_fills_at_any_part_of_a_save(small_disk, part):
  """The checkpoint before stays and is gone back to."""
  folder, state = small_disk(kilobytes=10_000), helpers.make_state()
  helpers.save(folder, state)
  used = sum(-(-path.stat().st_size // 4096) * 4 for path in folder.iterdir())
  small_disk(kilobytes=used + 4 * int(part * used / 4))
  before = helpers.contents(folder)
  no_room = refused('Cannot write to .*No space left .*: make room there')
  with no_room if part < 1 else contextlib.nullcontext():
    helpers.save(folder, state, 7)
  assert part == 1 or before.items() <= helpers.contents(folder).items()
  state.global_step.assign(9)
  helpers.restore(folder, state)
  assert state.global_step == (7 if part == 1 else 0)
