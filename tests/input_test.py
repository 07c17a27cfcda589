"""Tests of the input: which images, in which order, how they are augmented."""

import functools
import itertools
import os
import time

import numpy as np
import pytest
import tensorflow as tf
from tensorflow.python.framework import config

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


def standardize(image):
  image = image.astype(np.float64)
  return (image - image.mean()) / max(image.std(), 1 / np.sqrt(3072))


def test_augmented_images_are_views_of_their_sources(data_dir):
  records = np.concatenate([
      cifar10.read_records(path)
      for path in cifar10_main.filenames('train', str(data_dir))])
  views = []
  for record in records:
    image = record[1:].reshape(3, 32, 32).transpose(1, 2, 0)
    padded = np.pad(image, [(4, 4), (4, 4), (0, 0)])
    crops = [padded[top:top + 32, left:left + 32]
             for top in range(9) for left in range(9)]
    views.append([standardize(view) for crop in crops
                  for view in (crop, crop[:, ::-1])])
  views = np.array(views, np.float32)  # [50, 162, 32, 32, 3]

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


def test_standardization_of_a_uniform_image(tmp_path):
  records = np.full([5, cifar10.RECORD_BYTES], 7, np.uint8)
  records[:, 1] = 8  # one value in 3,072 differs: the deviation is 0.018
  helpers.write_data(tmp_path, records, records)
  features, _ = next(iter(helpers.input_fn('eval', tmp_path)))
  expected = standardize(records[0, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
  np.testing.assert_allclose(features[0], expected, atol=1e-4)
  assert features.numpy().max() > 50


def test_all_views():
  """Each number below 162 is one view, in the order that it stands for."""
  image = np.arange(1, 3073, dtype=np.uint8).reshape(32, 32, 3)
  padded = np.pad(image, [(4, 4), (4, 4), (0, 0)])
  expected = [view for top in range(9) for left in range(9)
              for crop in [padded[top:top + 32, left:left + 32]]
              for view in (crop, crop[:, ::-1])]
  views = cifar10_main.train_preprocess_fn(
      np.stack([image] * 162), tf.range(162))
  np.testing.assert_array_equal(views, expected)


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


def test_evaluation_sees_each_image_once_in_order(tmp_path):
  records = helpers.numbered_records(10000)
  helpers.write_data(tmp_path, records[:5], records)
  dataset = helpers.input_fn('eval', tmp_path, batch_size=128)
  sizes, labels = [], []
  seen = []
  for features, one_hot in dataset:
    sizes.append(len(features))
    labels.extend(np.argmax(one_hot, axis=1))
    # All values but two are 0: the standardized ones undo by their ratio.
    values = features.numpy()[:, 0, :, 0]
    first, second, zero = values[:, 0], values[:, 1], values[:, 2]
    seen.extend(zip(first - zero, second - zero))
  assert sizes == [128] * 78 + [16]
  assert labels == [number % 10 for number in range(10000)]
  scale = [np.hypot(*pair) for pair in seen]
  expected = [np.hypot(number // 100, number % 100) for number in range(10000)]
  for number in range(1, 10000):
    np.testing.assert_allclose(
        np.array(seen[number]) / scale[number] * expected[number],
        [number // 100, number % 100], atol=1e-2)


def record_numbers(dataset, count):
  """Returns the numbers of the records in the next batches, [count, N]."""
  return np.array([numbers.numpy() for numbers, _ in dataset.take(count)])


def test_training_order():
  draw = functools.partial(
      cifar10_main.record_dataset, 200, 'train',
      helpers.small_settings(batch_size=40, steps_per_eval=100))
  first, second, third = np.split(record_numbers(draw(seed=1), 300), 3)
  # Each cycle goes on beyond the 200, and draws its own.
  assert len({*np.ravel(first[:10])}) > 150
  assert not np.array_equal(np.ravel(first[:10]), np.arange(400) % 200)
  assert not np.array_equal(first, second)
  assert not np.array_equal(second, third)

  # A seed draws the same again, from any step on; another one draws another.
  for step in (0, 1, 99, 100, 250):
    tf.random.set_seed(step)  # has no say
    np.testing.assert_array_equal(
        record_numbers(draw(seed=1, step=step), 300 - step),
        np.concatenate([first, second, third])[step:])
  assert not np.array_equal(record_numbers(draw(seed=2), 100), first)


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
  monkeypatch.setattr(cifar10_main, 'SHUFFLE_RECORDS', 10)
  dataset = cifar10_main.record_dataset(1000, 'train', helpers.small_settings(
      batch_size=5, steps_per_eval=100))
  # A buffer of 10 + 3 * 5: the n-th draw is one of the first n + 25 records.
  ahead = np.ravel(record_numbers(dataset, 100)) - np.arange(500)
  assert ahead.max() == 24
  assert int(50000 * 0.4) + 3 * 128 == 20384


def test_augmentation_is_drawn_by_seed_and_step(data_dir):
  """Also where the batches hold the same images."""

  def batches(seed, step=0):
    dataset = helpers.input_fn('train', data_dir, seed, step, batch_size=50,
                               steps_per_eval=2)
    return [np.sort(features.numpy(), axis=0)
            for features, _ in dataset.take(4 - step)]

  ours = batches(7)
  for first, second in itertools.combinations([*ours, *batches(8)], 2):
    assert not np.array_equal(first, second)
  np.testing.assert_array_equal(batches(7), ours)
  np.testing.assert_array_equal(batches(7, step=1), ours[1:])


def test_data_dir_may_be_the_folder_itself(data_dir):
  folder = data_dir / cifar10.FOLDER_NAME
  for mode in ('train', 'eval', 'infer'):
    expected = cifar10_main.filenames(mode, str(data_dir))
    assert all(map(os.path.isfile, expected))
    assert cifar10_main.filenames(mode, str(folder)) == expected
    assert list(map(os.path.samefile, expected, cifar10_main.filenames(
        mode, f'{folder}/'))) == [True] * len(expected)


def test_synthetic_records_repeat_and_can_be_told_apart():
  train = cifar10.synthetic_records('train')
  test = cifar10.synthetic_records('eval')
  np.testing.assert_array_equal(train, cifar10.synthetic_records('train'))
  assert train.dtype == test.dtype == np.uint8
  assert train.shape[1] == test.shape[1] == cifar10.RECORD_BYTES
  assert set(train[:, 0]) == set(test[:, 0]) == set(range(10))
  means = np.array([train[train[:, 0] == label, 1:].mean(0)
                    for label in range(10)])
  distances = ((test[:, None, 1:] - means) ** 2).mean(2)
  assert (distances.argmin(1) == test[:, 0]).mean() > 0.99


@pytest.mark.parametrize('is_real', [False, True])
def test_unknown_mode(data_dir, is_real):
  with pytest.raises(ValueError, match=r"must be .* not 'training'"):
    helpers.input_fn('training', data_dir if is_real else None)
  with pytest.raises(ValueError, match=r"must be .* not 'training'"):
    cifar10_main.filenames('training', str(data_dir))
  with pytest.raises(ValueError, match=r"must be .* not 'test'"):
    cifar10_main.cifar10_model_fn(None, None, 'test', None)


def test_data_that_change_while_training(tmp_path):
  """All records are read at the start. The next start finds the damage."""
  folder = tmp_path / cifar10.FOLDER_NAME
  records = helpers.numbered_records(300)
  helpers.write_data(tmp_path, records[:250], records[250:])
  inputs = [helpers.input_fn('train', tmp_path, batch_size=16)
            for _ in range(2)]
  expected = [images.numpy() for images, _ in inputs[0].take(30)]
  changed = iter(inputs[1])
  ours = [next(changed)[0].numpy()]
  cut, *others = (folder / name for name in cifar10.TRAIN_FILES)
  os.truncate(cut, 20_000)
  for file in others:
    file.write_bytes(bytes(file.stat().st_size))
  ours += [next(changed)[0].numpy() for _ in range(29)]
  np.testing.assert_array_equal(ours, expected)
  with pytest.raises(cifar10.Cifar10Error, match=f'{cut} is damaged'):
    helpers.input_fn('train', tmp_path, batch_size=16)
