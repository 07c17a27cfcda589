"""Tests of the input: which images, in which order, how they are augmented."""

import functools
import os
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


def pixels(record):
  return record[1:].reshape(3, 32, 32).transpose(1, 2, 0)


def standardize(image):
  image = image.astype(np.float64)
  return (image - image.mean()) / max(image.std(), 1 / np.sqrt(3072))


def views_of(image):
  """Returns all views in the order of the numbers that stand for them."""
  padded = np.pad(image, [(4, 4), (4, 4), (0, 0)])
  return [view for top in range(9) for left in range(9)
          for crop in [padded[top:top + 32, left:left + 32]]
          for view in (crop, crop[:, ::-1])]


def test_augmented_images_are_views_of_their_sources(data_dir):
  records = np.concatenate([
      cifar10.read_records(path)
      for path in cifar10_main.filenames('train', str(data_dir))])
  views = np.array([
      [standardize(view) for view in views_of(pixels(record))]
      for record in records], np.float32)  # [50, 162, 32, 32, 3]
  seen = set()
  dataset = helpers.input_fn('train', data_dir, batch_size=16)
  assert dataset.element_spec[0].shape == [16, 32, 32, 3]
  for features, labels in dataset.take(5):
    for feature, label in zip(features.numpy(), labels.numpy()):
      errors = abs(views[:, :, ::8, ::8] - feature[::8, ::8]).max((2, 3, 4))
      source, view = np.unravel_index(errors.argmin(), errors.shape)
      np.testing.assert_allclose(feature, views[source, view], atol=1e-5)
      np.testing.assert_array_equal(label, np.eye(10)[records[source, 0]])
      seen.add((source, view))
  assert len(seen) > 60  # of 80 images


def test_all_views():
  image = np.arange(1, 3073, dtype=np.uint8).reshape(32, 32, 3)
  views = cifar10_main.train_preprocess_fn(
      np.stack([image] * 162), tf.range(162))
  np.testing.assert_array_equal(views, views_of(image))


def test_views_are_uniform_and_independent():
  dataset = cifar10_main.record_dataset(
      1000, 'train', helpers.small_settings(batch_size=20000), seed=3)
  _, views = next(iter(dataset))
  counts = np.bincount(views, minlength=cifar10_main.NUM_VIEWS)
  expected = 20000 / 162
  chi_square = ((counts - expected) ** 2 / expected).sum()
  # 161 degrees of freedom: mean 161, deviation 18; beyond once in a million.
  assert chi_square < 260
  # Nor does a view tell about that of the next image in the batch.
  for draws in (views // 18, views // 2 % 9, views % 2):
    correlation = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(20000)


@pytest.mark.parametrize('mode', ['eval', 'infer'])
def test_evaluation_sees_each_image_once_in_order(tmp_path, mode):
  records = np.random.default_rng(0).integers(
      0, 256, [500, cifar10.RECORD_BYTES], np.uint8)
  records[:, 0] = np.arange(500) % 10
  # One value differs: the deviation is 0.018, the least possible.
  records[7, 1:] = 7
  records[7, 1] = 8
  helpers.write_data(tmp_path, records[:5], records)
  batches = [*helpers.input_fn(mode, tmp_path, batch_size=128)]
  features, labels = map(np.concatenate, zip(*batches))
  assert [len(images) for images, _ in batches] == [128, 128, 128, 116]
  np.testing.assert_array_equal(labels, np.eye(10)[records[:, 0]])
  expected = [standardize(pixels(record)) for record in records]
  np.testing.assert_allclose(features, expected, atol=1e-4)
  assert features[7].max() > 50


def drawn(dataset, count):
  """Returns the record numbers and views of batches, each [count, N]."""
  return map(np.array, zip(*dataset.take(count).as_numpy_iterator()))


def test_training_order():
  draw = functools.partial(
      cifar10_main.record_dataset, 200, 'train',
      helpers.small_settings(batch_size=40, steps_per_eval=100))
  numbers, views = drawn(draw(seed=1), 300)
  # Each cycle goes on beyond the 200, and draws its own.
  first, second, third = np.split(numbers, 3)
  assert len({*np.ravel(first[:10])}) > 150
  assert not np.array_equal(np.ravel(first[:10]), np.arange(400) % 200)
  assert not np.array_equal(first, second)
  assert not np.array_equal(second, third)
  assert len(np.unique(views, axis=0)) == 300  # so does each batch

  # A seed draws the same again, from any step on; another one draws another.
  for step in (0, 1, 99, 100, 250):
    tf.random.set_seed(step)  # has no say
    for again, whole in zip(
        drawn(draw(seed=1, step=step), 300 - step), (numbers, views)):
      np.testing.assert_array_equal(again, whole[step:])
  for other, whole in zip(drawn(draw(seed=2), 100), (numbers, views)):
    assert not np.array_equal(other, whole[:100])


@pytest.fixture
def deterministic():
  tf.config.experimental.enable_op_determinism()  # as --seed does
  yield
  config.disable_op_determinism()


def test_seed_leaves_batches_prepared_ahead(deterministic):
  batches = iter(helpers.input_fn('train', batch_size=1000))

  def seconds_for_five():
    started = time.perf_counter()
    for _ in range(5):
      next(batches)
    return time.perf_counter() - started

  seconds_for_five()
  made = seconds_for_five()
  time.sleep(2)
  assert seconds_for_five() < made / 3


def test_shuffle_buffer_is_the_originals(monkeypatch):
  assert cifar10_main.SHUFFLE_RECORDS == 20000
  monkeypatch.setattr(cifar10_main, 'SHUFFLE_RECORDS', 10)
  dataset = cifar10_main.record_dataset(1000, 'train', helpers.small_settings(
      batch_size=5, steps_per_eval=100))
  # A buffer of 10 + 3 * 5: the n-th draw is one of the first n + 25 records.
  numbers, _ = drawn(dataset, 100)
  ahead = np.ravel(numbers) - np.arange(500)
  assert ahead.max() == 24


def test_synthetic_records_repeat_and_can_be_told_apart():
  train, test = map(cifar10.synthetic_records, ('train', 'eval'))
  np.testing.assert_array_equal(train, cifar10.synthetic_records('train'))
  for records in (train, test):
    assert (records.dtype, records.shape[1]) == (np.uint8, cifar10.RECORD_BYTES)
    assert set(records[:, 0]) == set(range(10))
  means = np.array([train[train[:, 0] == label, 1:].mean(0)
                    for label in range(10)])
  distances = ((test[:, None, 1:] - means) ** 2).mean(2)
  assert (distances.argmin(1) == test[:, 0]).mean() > 0.99


def test_unknown_mode(data_dir):
  for function, *arguments in (
      (helpers.input_fn,), (helpers.input_fn, data_dir),
      (cifar10_main.filenames, str(data_dir)),
      (lambda mode: cifar10_main.cifar10_model_fn(None, None, mode, None),)):
    with pytest.raises(ValueError, match=r"must be .* not 'training'"):
      function('training', *arguments)


def test_data_that_change_while_training(data_dir):
  """All records are read at the start. The next start finds the damage."""
  cut, *others = (data_dir / cifar10.FOLDER_NAME / name
                  for name in cifar10.TRAIN_FILES)
  whole, changed = (helpers.input_fn('train', data_dir) for _ in range(2))
  expected = [images.numpy() for images, _ in whole.take(30)]
  os.truncate(cut, 20_000)
  for file in others:
    file.write_bytes(bytes(file.stat().st_size))
  ours = [images.numpy() for images, _ in changed.take(30)]
  np.testing.assert_array_equal(ours, expected)
  with pytest.raises(cifar10.Cifar10Error, match=f'{cut} is damaged'):
    helpers.input_fn('train', data_dir)
