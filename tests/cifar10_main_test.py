"""Tests of the input, the model, the loop and the command line."""

import ast
import itertools
import os
import re
import resource
import shutil
import subprocess
import sys
from unittest import mock

from absl import flags
import numpy as np
import pytest
from tensorboard.backend.event_processing import event_accumulator
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
import resnet_model

SCRIPT = os.path.abspath(cifar10_main.__file__)
GOLDEN = os.path.join(os.path.dirname(__file__), 'golden', 'resnet8_b16')
Cifar10Error = cifar10.Cifar10Error
NUMBER = r'-?\d+(?:\.\d+)?(?:e[+-]?\d+)?'


def needs_xla(data_format):
  """Tells whether the device, a CPU, has no convolutions of its own for it."""
  try:
    cifar10_main.check_device(data_format, 'fp32')
  except Cifar10Error:
    return True
  return False


def make_state(resnet_size=8, data_format=None, dtype=tf.float32):
  return cifar10_main.TrainState(resnet_model.cifar10_resnet_v2_generator(
      resnet_size, 10, data_format, dtype))


def numbered_records(count):
  """Makes records whose first red values are the record's number in digits."""
  numbers = np.arange(count)
  records = np.zeros([count, cifar10.RECORD_BYTES], np.uint8)
  records[:, 0] = numbers % 10
  records[:, 1] = numbers // 100
  records[:, 2] = numbers % 100
  return records


def write_data(folder, train_records, test_records):
  """Writes record files; the training files share the records out evenly."""
  folder.mkdir(parents=True)
  for name, part in zip(cifar10.TRAIN_FILES, np.split(train_records, 5)):
    part.tofile(folder / name)
  test_records.tofile(folder / cifar10.TEST_FILE)


@pytest.fixture
def data_dir(tmp_path):
  """Small data files: 50 records to train, 23 to evaluate."""
  rng = np.random.default_rng(0)
  records = rng.integers(0, 256, [73, cifar10.RECORD_BYTES], np.uint8)
  records[:, 0] %= 10
  folder = tmp_path / 'data' / cifar10.FOLDER_NAME
  write_data(folder, records[:50], records[50:])
  return folder.parent


def contents(folder):
  """Returns all files below a folder, as a dict of bytes by path."""
  return {path: path.read_bytes()
          for path in folder.rglob('*') if path.is_file()}


# ---------------------------------------------------------- golden values


@pytest.fixture(scope='module')
def golden():
  with np.load(GOLDEN + '.npz') as values:
    golden = dict(values)
  generator = np.random.RandomState(1)
  golden['images'] = generator.randint(
      0, 256, (21, 16, 32, 32, 3)).astype(np.uint8)
  golden['labels'] = generator.randint(0, 10, (21, 16)).astype(np.int32)
  return golden


def golden_dataset(golden, batches):
  features = tf.image.per_image_standardization(
      golden['images'][batches].astype(np.float32))
  labels = tf.one_hot(golden['labels'][batches], 10)
  return tf.data.Dataset.from_tensor_slices((features, labels))


def difference(ours, theirs):
  """Returns the relative difference in the L2 norm."""
  return np.linalg.norm(ours - theirs) / np.linalg.norm(theirs)


def initial_state(golden, data_format, dtype=tf.float32):
  state = make_state(data_format=data_format, dtype=dtype)
  for variable in state.network.variables:
    variable.assign(golden[f'init/{cifar10_main.tf1_name(variable)}'])
  state.global_step.assign(312490)
  return state


def test_training_has_the_originals_numbers(golden):
  state = initial_state(golden, 'channels_last')
  inner_loop = cifar10_main.make_inner_loop(state, batch_size=16)
  iterator = iter(golden_dataset(golden, slice(20)))
  steps = [inner_loop(iterator, tf.constant(1)) for _ in range(20)]

  for name in ('loss', 'cross_entropy'):
    ours = np.array([values[name] for values in steps])
    np.testing.assert_allclose(ours, golden[f'train/{name}'], rtol=2e-6)
  np.testing.assert_array_equal(
      np.array([values['learning_rate'] for values in steps]),
      golden['train/learning_rate'])
  assert state.global_step.numpy() == golden['final/global_step'] == 312510
  for variable in state.network.variables:
    name = cifar10_main.tf1_name(variable)
    assert difference(variable.numpy(), golden[f'final/{name}']) < 2e-3, name
  for variable in state.momentum:
    name = cifar10_main.tf1_name(variable)
    assert difference(variable.numpy(), golden[f'final/{name}']) < 2e-2, name


def steps_side_by_side(golden, data_format, dtype, xla):
  """Takes each golden step from the variables of channels_last in float32.

  Not a run of 20: an activation that is zero but for its rounding may fall on
  the other side of a ReLU, and the gradient jumps. Whether a run in another
  order of summation meets one of these in 20 steps is luck.

  Yields:
    The step's golden values and its own, the state, and the one it started from
    after the same step.
  """
  expected = initial_state(golden, 'channels_last')
  state = initial_state(golden, data_format, dtype)
  expected_step = cifar10_main.make_train_step(expected, 16)
  step = cifar10_main.make_train_step(state, 16, xla)
  for i, batch in enumerate(golden_dataset(golden, slice(20))):
    for ours, theirs in zip(state.variables, expected.variables):
      ours.assign(theirs)
    expected_step(*batch)
    names = 'loss', 'cross_entropy', 'learning_rate'
    yield ({name: golden[f'train/{name}'][i] for name in names}, step(*batch),
           state, expected)


@pytest.mark.parametrize(('data_format', 'xla'), [
    ('channels_last', True), ('channels_first', False),
    pytest.param('channels_first', True, marks=pytest.mark.slow)])
def test_each_step_has_the_originals_numbers(golden, data_format, xla):
  xla = xla or needs_xla(data_format)
  for expected_values, values, state, expected in steps_side_by_side(
      golden, data_format, tf.float32, xla):
    for name, value in expected_values.items():
      np.testing.assert_allclose(values[name], value, rtol=2e-6)
    for ours, theirs in zip(state.network.variables,
                            expected.network.variables):
      assert difference(ours.numpy(), theirs.numpy()) < 2e-3, ours.name
    for ours, theirs in zip(state.momentum, expected.momentum):
      assert difference(ours.numpy(), theirs.numpy()) < 2e-2, ours.name


@pytest.mark.parametrize(('dtype', 'xla'), [
    ('bf16', False), ('fp16', True),
    pytest.param('bf16', True, marks=pytest.mark.slow),
    pytest.param('fp16', False, marks=pytest.mark.slow)])
def test_each_step_has_about_the_same_numbers_in_16_bits(golden, dtype, xla):
  for expected_values, values, state, expected in steps_side_by_side(
      golden, None, cifar10_main.DTYPES[dtype], xla):
    for name, value in expected_values.items():
      assert values[name].dtype == tf.float32
      np.testing.assert_allclose(values[name], value, rtol=1e-3)
    ours, theirs = (
        np.concatenate([np.ravel(v) for v in a_state.momentum])
        for a_state in (state, expected))
    assert 1e-4 < difference(ours, theirs) < 0.15
  assert all(v.dtype == tf.float32 for v in state.network.variables)


@pytest.mark.parametrize('data_format', ['channels_last', 'channels_first'])
def test_evaluation_of_the_originals_checkpoint(golden, data_format):
  state = make_state(data_format=data_format)
  checkpoints = cifar10_main.Checkpoints('unused', state)
  checkpoints.restore(GOLDEN + '.ckpt')
  for variable in (*state.network.variables, *state.momentum,
                   state.global_step):
    name = cifar10_main.tf1_name(variable)
    np.testing.assert_array_equal(variable.numpy(), golden[f'final/{name}'])

  features, labels = golden_dataset(golden, slice(20, 21)).get_single_element()
  model_fn = tf.function(
      cifar10_main.model_fn, jit_compile=needs_xla(data_format))
  outputs = model_fn(features, labels, 'eval', state.network)
  np.testing.assert_allclose(
      outputs['probabilities'], golden['eval/probabilities'], rtol=0, atol=1e-6)
  np.testing.assert_array_equal(outputs['classes'], golden['eval/classes'])
  np.testing.assert_allclose(outputs['loss'], golden['eval/loss'], rtol=1e-6)
  inferred = model_fn(features, None, 'infer', state.network)
  assert set(inferred) == {'classes', 'probabilities'}
  np.testing.assert_array_equal(inferred['classes'], golden['eval/classes'])


def place_originals_checkpoint(model_dir):
  """Makes a folder as the 2017 script left it, moved here from elsewhere."""
  model_dir.mkdir()
  for ending in ('.index', '.data-00000-of-00001'):
    with open(GOLDEN + '.ckpt' + ending, 'rb') as file:
      (model_dir / f'model.ckpt-312510{ending}').write_bytes(file.read())
  (model_dir / 'checkpoint').write_text(
      'model_checkpoint_path: "/elsewhere/model.ckpt-312510"\n'
      'all_model_checkpoint_paths: "/elsewhere/model.ckpt-312510"\n')


def test_goes_on_from_a_model_folder_of_2017(data_dir, tmp_path, log, golden):
  model_dir = tmp_path / 'model'
  place_originals_checkpoint(model_dir)
  before = contents(model_dir)
  run(data_dir, model_dir, train_steps=312512, steps_per_eval=5, batch_size=16)
  assert any('step = 312511' in line for line in log)
  after = contents(model_dir)
  assert before.items() - after.items() == {
      (model_dir / 'checkpoint', before[model_dir / 'checkpoint'])}
  assert model_dir / 'model.ckpt-312512.index' in after
  reader = tf.train.load_checkpoint(str(model_dir))
  kernel = reader.get_tensor(
      'conv2d.Skernel.SMomentum/.ATTRIBUTES/VARIABLE_VALUE')
  assert np.isfinite(kernel).all()
  assert not np.array_equal(kernel, golden['final/conv2d/kernel/Momentum'])


# ------------------------------------------------------------------ input


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
  dataset = cifar10_main.input_fn('train', str(data_dir), 16)
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
  write_data(tmp_path / cifar10.FOLDER_NAME, records, records)
  features, _ = next(iter(cifar10_main.input_fn('eval', str(tmp_path), 5)))
  expected = standardize(records[0, 1:].reshape(3, 32, 32).transpose(1, 2, 0))
  np.testing.assert_allclose(features[0], expected, atol=1e-4)
  assert features.numpy().max() > 50


def draw_views(num_images):
  """Augments one image many times; returns the corners and flips drawn."""
  numbers = np.arange(32 * 32, dtype=np.float32).reshape(1, 32, 32, 1)
  image = np.repeat(numbers, 3, axis=3) + 1
  images, _ = cifar10_main.train_preprocess_fn(
      np.repeat(image, num_images, axis=0), np.zeros(num_images), [3, 4])
  # Pixel [15, 15] is never of the border, and its right neighbour tells of the
  # flip.
  middle, right = images[:, 15, 15, 0].numpy() - 1, images[:, 15, 16, 0] - 1
  flip = right.numpy() < middle
  top = middle // 32 - 15 + 4
  left = np.where(flip, middle % 32 - 16, middle % 32 - 15) + 4
  return top.astype(int), left.astype(int), flip.astype(int)


def test_augmentation_is_uniform_and_independent():
  top, left, flip = draw_views(20000)
  assert {*top} == {*left} == set(range(9))
  counts = np.bincount((top * 9 + left) * 2 + flip, minlength=162)
  expected = 20000 / 162
  chi_square = ((counts - expected) ** 2 / expected).sum()
  # 161 degrees of freedom: mean 161, deviation 18; beyond once in a million.
  assert chi_square < 260
  # Nor does a draw tell about the next image of the batch.
  for draws in (top, left, flip):
    correlation = np.corrcoef(draws[:-1], draws[1:])[0, 1]
    assert abs(correlation) < 5 / np.sqrt(20000)


def test_evaluation_sees_each_image_once_in_order(tmp_path):
  records = numbered_records(10000)
  write_data(tmp_path / cifar10.FOLDER_NAME, records[:5], records)
  dataset = cifar10_main.input_fn('eval', str(tmp_path), 128)
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
  steps, batches = zip(*dataset.take(count))
  assert [int(step) for step in steps] == list(
      range(int(steps[0]), int(steps[0]) + count))
  return np.array([batch[:, 1].numpy().astype(int) * 100 + batch[:, 2]
                   for batch in batches])


def test_training_order():
  records = tf.constant(numbered_records(200))
  dataset = cifar10_main.record_dataset(
      records, 'train', 40, seed=1, steps_per_eval=100)
  first, second, third = np.split(record_numbers(dataset, 300), 3)
  # Each cycle goes on beyond the 200, and draws its own.
  assert len({*np.ravel(first[:10])}) > 150
  assert not np.array_equal(np.ravel(first[:10]), np.arange(400) % 200)
  assert not np.array_equal(first, second)
  assert not np.array_equal(second, third)

  # A seed draws the same again, from any step on; another one draws another.
  for step in (0, 1, 99, 100, 250):
    tf.random.set_seed(step)  # has no say
    again = cifar10_main.record_dataset(
        records, 'train', 40, seed=1, step=step, steps_per_eval=100)
    np.testing.assert_array_equal(
        record_numbers(again, 300 - step),
        np.concatenate([first, second, third])[step:])
  other = cifar10_main.record_dataset(
      records, 'train', 40, seed=2, steps_per_eval=100)
  assert not np.array_equal(record_numbers(other, 100), first)


def test_shuffle_buffer_is_the_originals(monkeypatch):
  monkeypatch.setattr(cifar10_main, 'SHUFFLE_RECORDS', 10)
  records = tf.constant(numbered_records(1000))
  dataset = cifar10_main.record_dataset(
      records, 'train', 5, steps_per_eval=100)
  # A buffer of 10 + 3 * 5: the n-th draw is one of the first n + 25 records.
  ahead = np.ravel(record_numbers(dataset, 100)) - np.arange(500)
  assert ahead.max() == 24
  assert int(50000 * 0.4) + 3 * 128 == 20384


def test_augmentation_is_drawn_by_seed_and_step(data_dir):
  """Also where the batches hold the same images."""

  def batches(seed, step=0):
    dataset = cifar10_main.input_fn(
        'train', str(data_dir), 50, seed=seed, step=step, steps_per_eval=2)
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
  train = cifar10_main.synthetic_records('train')
  test = cifar10_main.synthetic_records('eval')
  np.testing.assert_array_equal(train, cifar10_main.synthetic_records('train'))
  assert train.dtype == test.dtype == np.uint8
  assert train.shape[1] == test.shape[1] == cifar10.RECORD_BYTES
  assert set(train[:, 0]) == set(test[:, 0]) == set(range(10))
  means = np.array([train[train[:, 0] == label, 1:].mean(0)
                    for label in range(10)])
  distances = ((test[:, None, 1:] - means) ** 2).mean(2)
  assert (distances.argmin(1) == test[:, 0]).mean() > 0.99


# ---------------------------------------------------------- learning rate


@pytest.mark.parametrize(
    ('batch_size', 'boundaries'),
    [(128, (39062, 58593, 78125)), (16, (312500, 468750, 625000)),
     (1000, (5000, 7500, 10000))])
def test_learning_rate_drops_after_the_boundaries(batch_size, boundaries):
  schedule = cifar10_main.learning_rate_schedule(batch_size)
  initial = 0.1 * batch_size / 128
  rates = [initial, initial * 0.1, initial * 0.01, initial * 0.001]
  for i, boundary in enumerate(boundaries):
    for step, rate in ((boundary, rates[i]), (boundary + 1, rates[i + 1])):
      actual = schedule(tf.constant(step, tf.int64)).numpy()
      np.testing.assert_allclose(actual, rate, rtol=1e-7)
  assert schedule(tf.constant(0, tf.int64)).numpy() == np.float32(initial)


# --------------------------------------------------------------- the loop


def run(data_dir, model_dir, eval_only=False, **kwargs):
  """Runs on small data with small batches and the smallest network."""
  if eval_only:
    cifar10_main.evaluate_only(str(data_dir), str(model_dir), 8, 10)
    return
  arguments = {'resnet_size': 8, 'train_steps': 4, 'steps_per_eval': 4,
               'batch_size': 10, **kwargs}
  cifar10_main.train_and_evaluate(str(data_dir), str(model_dir), **arguments)


def matches(pattern, lines):
  found = [re.fullmatch(pattern, line) for line in lines]
  return [match.groups() for match in found if match]


def test_log_prints_and_summaries(data_dir, tmp_path, log, capsys):
  model_dir = tmp_path / 'model'
  run(data_dir, model_dir, train_steps=209, steps_per_eval=205,
      flag_values={'--batch_size': 10})

  lines = matches(rf'loss = ({NUMBER}), step = (\d+)( \(\d+\.\d{{3}} sec\))?',
                  log)
  assert [int(step) for _, step, _ in lines] == [1, 101, 201, 206]
  assert [bool(seconds) for *_, seconds in lines] == [False, True, True, False]
  accuracy = matches(
      rf'cross_entropy = ({NUMBER}), learning_rate = ({NUMBER}), '
      rf'train_accuracy = ({NUMBER})( \(\d+\.\d{{3}} sec\))?', log)
  assert len(accuracy) == 4
  assert {rate for _, rate, *_ in accuracy} == {'0.0078125'}
  assert len(matches(rf'global_step/sec: ({NUMBER})', log)) == 2
  assert matches(r'Saving checkpoints for (\d+) into (.*)\.', log) == [
      (str(step), f'{model_dir}/model.ckpt') for step in (0, 205, 209)]
  assert len(matches(rf'Loss for final step: {NUMBER}\.', log)) == 2
  assert len(matches(
      r'Starting evaluation at \d{4}-\d\d-\d\dT\d\d:\d\d:\d\d', log)) == 2
  assert len(matches(
      r'Finished evaluation at \d{4}-\d\d-\d\d-\d\d:\d\d:\d\d', log)) == 2
  assert matches(r'Restoring parameters from (.*)', log) == [
      (f'{model_dir}/model.ckpt-{step}',) for step in (205, 209)]
  results = matches(
      rf'Saving dict for global step (\d+): accuracy = ({NUMBER}), '
      rf'global_step = (\d+), loss = ({NUMBER})', log)
  printed = matches(
      rf"{{'accuracy': ({NUMBER}), 'loss': ({NUMBER}), 'global_step': (\d+)}}",
      capsys.readouterr().out.splitlines())
  assert [result[0] for result in results] == ['205', '209']
  assert [(accuracy, loss, step) for step, accuracy, _, loss in results
          ] == printed

  train = event_accumulator.EventAccumulator(str(model_dir)).Reload()
  tags = train.Tags()['tensors']
  assert set(tags) == {'cross_entropy', 'learning_rate', 'train_accuracy',
                       'loss', 'global_step/sec', 'images', 'accuracy', 'run'}
  for tag in tags:
    steps = [event.step for event in train.Tensors(tag)]
    expected = {'global_step/sec': [101, 201], 'run': [0]}
    assert steps == expected.get(tag, [1, 101, 201, 206])
  for event, (loss, *_) in zip(train.Tensors('loss'), lines):
    assert tf.make_ndarray(event.tensor_proto) == np.float32(loss)
  # Width, height and then the pictures themselves.
  width, height, *pictures = tf.make_ndarray(
      train.Tensors('images')[0].tensor_proto)
  assert (width, height, len(pictures)) == (b'32', b'32', 6)
  picture = tf.io.decode_png(pictures[0])
  assert picture.shape == [32, 32, 3]
  assert picture.numpy().min() == 0 or picture.numpy().max() == 255

  test = event_accumulator.EventAccumulator(str(model_dir / 'eval')).Reload()
  assert set(test.Tags()['tensors']) == {
      'accuracy', 'loss', 'confusion_matrix',
      *(f'accuracy_of_class/{name}' for name in cifar10.CLASSES)}
  for tag in test.Tags()['tensors']:
    assert [event.step for event in test.Tensors(tag)] == [205, 209]
  text = tf.make_ndarray(train.Tensors('run')[0].tensor_proto).item()
  for expected in (r'\| --batch_size \| 10 \|', r'\| seed \| \d+ \|',
                   rf'\| TensorFlow \| {tf.__version__} \|', 'ResNet-8',
                   r'\| device \| .*CPU'):
    assert re.search(expected, text.decode())


def test_train_accuracy_is_the_mean_over_logged_batches(log):
  step = 0
  # Of steps 1 and 101, 20 and 33 right of 128; the others do not count.
  correct = {1: 20, 101: 33}

  def inner_loop(iterator, num_steps):
    nonlocal step
    step += num_steps.numpy()
    state.global_step.assign(step)
    values = {'correct': correct.get(step, 128), 'finite_steps': num_steps,
              'loss': 2.0, 'cross_entropy': 1.0, 'learning_rate': 0.1}
    return {name: tf.constant(value) for name, value in values.items()}

  state = make_state()
  accuracy = {}
  for start in (0, 200):
    for at, _, values in cifar10_main.train(
        inner_loop, None, state, start, start + 200, 128):
      assert at == step
      if values:
        accuracy[at] = str(values['train_accuracy'])
  assert step == 400
  assert accuracy == {
      1: '0.15625', 101: '0.20703125', 201: '1.0', 301: '1.0'}


def test_pieces_take_about_a_second(monkeypatch):
  """The clock and signals are looked at between them."""
  clock = 0.0

  def inner_loop(iterator, num_steps):
    nonlocal clock
    clock += 0.125 * num_steps.numpy()
    values = {'correct': 1, 'finite_steps': num_steps, 'loss': 2.0}
    return {name: tf.constant(value) for name, value in values.items()}

  monkeypatch.setattr(cifar10_main.time, 'perf_counter', lambda: clock)
  pieces = cifar10_main.train(inner_loop, None, make_state(), 0, 110, 128)
  # At first a single step, which is also traced; always up to a logged one.
  steps, seconds, _ = zip(*pieces)
  assert steps == (1, *range(9, 98, 8), 101, 109, 110)
  assert seconds[0] is None
  np.testing.assert_allclose(seconds[1:], 0.125)


@pytest.mark.parametrize('xla', ['on', 'off'])
def test_each_step_is_traced_once(data_dir, tmp_path, monkeypatch, log, xla):
  model_fn, traced = cifar10_main.model_fn, []

  def spy(features, labels, mode, network):
    traced.append(mode)
    return model_fn(features, labels, mode, network)

  monkeypatch.setattr(cifar10_main, 'model_fn', spy)
  # Three cycles; the last one is shorter, as is the last batch to evaluate.
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=3, xla=xla)
  assert matches(r'loss = .*, step = (\d+)', log) == [('1',), ('4',), ('7',)]
  assert traced == ['train', 'eval']
  assert any(f'XLA {xla}' in line for line in log)


@pytest.mark.parametrize('xla', [False, True])
def test_xla_compiles_the_step(data_dir, xla):
  inner_loop = cifar10_main.make_inner_loop(make_state(), 10, xla)
  iterator = iter(cifar10_main.input_fn('train', str(data_dir), 10))
  function = inner_loop.get_concrete_function(iterator, tf.constant(1))
  library = function.graph.as_graph_def().library.function
  assert any(f.attr['_XlaMustCompile'].b for f in library) == xla


def test_evaluation_averages(data_dir, capsys):
  """Accuracy is over images, loss over batches, the short one included."""
  state = make_state()
  dataset = cifar10_main.input_fn('eval', str(data_dir), 10)
  eval_step = cifar10_main.make_eval_step(state.network)
  results, matrix = cifar10_main.evaluate(eval_step, dataset, 'path', 7)
  losses, correct, expected = [], 0, np.zeros([10, 10])
  for features, labels in dataset:
    outputs = cifar10_main.model_fn(features, labels, 'eval', state.network)
    losses.append(outputs['loss'])
    correct += int(outputs['correct'])
    for label, predicted in zip(np.argmax(labels, 1), outputs['classes']):
      expected[label, predicted] += 1
  assert len(losses) == 3
  np.testing.assert_allclose(results['loss'], np.mean(losses), rtol=1e-6)
  assert results['accuracy'] == float(str(np.float32(correct / 23)))
  assert results['global_step'] == 7
  np.testing.assert_array_equal(matrix, expected)
  assert capsys.readouterr().out == f'{results}\n'


def test_batches_are_copied_to_a_gpu(data_dir, monkeypatch, capsys):
  """A second CPU stands in for the GPU."""
  state = make_state()
  eval_step = cifar10_main.make_eval_step(state.network)
  dataset = cifar10_main.input_fn('eval', str(data_dir), 10)
  expected, _ = cifar10_main.evaluate(eval_step, dataset, 'path', 7)
  device = tf.config.list_logical_devices('CPU')[1]
  monkeypatch.setattr(
      tf.config, 'list_logical_devices', lambda kind: [device])
  results, _ = cifar10_main.evaluate(
      cifar10_main.make_eval_step(state.network), dataset, 'path', 7)
  assert results == expected
  train_data = cifar10_main.distributed_input(
      10, lambda: cifar10_main.input_fn('train', str(data_dir), 10))
  for features, _ in itertools.islice(train_data, 2):
    assert features.backing_device.endswith('CPU:1')


def test_resumes_and_ends(data_dir, tmp_path, log, capsys):
  run(data_dir, tmp_path / 'model', train_steps=3, steps_per_eval=3)
  del log[:]
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=4)
  # An interrupted cycle is finished first, the last one may be shorter.
  assert [step for step, in matches(r'loss = .*, step = (\d+)', log)] == ['5']
  assert [step for step, in matches(r'Saving checkpoints for (\d+) .*', log)
          ] == ['4', '8']
  assert any('Training steps 4 to 8' in line for line in log)
  evaluated = capsys.readouterr().out.splitlines()
  assert len(evaluated) == 3

  before = contents(tmp_path / 'model')
  run(data_dir, tmp_path / 'model', train_steps=8, steps_per_eval=4)
  assert any('All 8 steps are trained already' in line for line in log)
  assert capsys.readouterr().out.splitlines() == evaluated[-1:]
  checkpoints = {path: data for path, data in before.items()
                 if 'ckpt' in path.name}
  assert checkpoints.items() <= contents(tmp_path / 'model').items()


def test_a_copied_folder_leaves_the_one_it_came_from_alone(tmp_path):
  ours, copy = tmp_path / 'model', tmp_path / 'copy'
  state = make_state()
  cifar10_main.Checkpoints(str(ours), state).save()
  # TensorFlow 1 wrote absolute paths.
  (ours / 'checkpoint').write_text(
      f'model_checkpoint_path: "{ours}/model.ckpt-0"\n'
      f'all_model_checkpoint_paths: "{ours}/model.ckpt-0"\n')
  shutil.copytree(ours, copy)
  before = contents(ours)
  checkpoints = cifar10_main.Checkpoints(str(copy), state)
  for step in range(1, 8):
    state.global_step.assign(step)
    checkpoints.save()
  assert contents(ours) == before
  assert (copy / 'model.ckpt-7.index').exists()


def test_resumed_run_is_exact(data_dir, tmp_path, log, capsys, monkeypatch):
  """An interruption changes no bit, log line or result. The seed is kept."""
  monkeypatch.setattr(cifar10_main, 'LOG_STEPS', 10)

  def lines():
    found = [re.sub(r' \(.* sec\)', '', line) for line in log
             if re.match('cross_entropy = |loss = ', line)]
    del log[:]
    return found, capsys.readouterr().out.splitlines()

  kwargs = {'train_steps': 25, 'steps_per_eval': 12}
  run(data_dir, tmp_path / 'whole', seed=3, **kwargs)
  whole_log, whole_results = lines()
  run(data_dir, tmp_path / 'model', seed=3, **{**kwargs, 'train_steps': 11})
  run(data_dir, tmp_path / 'model', **kwargs)
  resumed_log, (stopped_at, *resumed_results) = lines()
  assert "'global_step': 11" in stopped_at
  assert resumed_results == whole_results
  assert resumed_log == whole_log
  assert len(whole_log) == 10
  whole, resumed = (
      tf.train.load_checkpoint(str(tmp_path / folder / 'model.ckpt-25'))
      for folder in ('whole', 'model'))
  for key in whole.get_variable_to_shape_map():
    if 'save_counter' not in key and 'OBJECT_GRAPH' not in key:
      np.testing.assert_array_equal(
          resumed.get_tensor(key), whole.get_tensor(key))

  with pytest.raises(Cifar10Error, match=r'trained with --seed=3, not 4'):
    run(data_dir, tmp_path / 'model', seed=4, **kwargs)
  run(data_dir, tmp_path / 'other', seed=4, **{**kwargs, 'train_steps': 1})
  assert lines()[0] != whole_log[:2]


def test_keeps_five_checkpoints(data_dir, tmp_path):
  run(data_dir, tmp_path / 'model', train_steps=6, steps_per_eval=1)
  steps = sorted(int(path.stem.split('-')[1])
                 for path in (tmp_path / 'model').glob('model.ckpt-*.index'))
  assert steps == [2, 3, 4, 5, 6]
  assert tf.train.latest_checkpoint(str(tmp_path / 'model')).endswith('-6')


@pytest.mark.parametrize(
    ('save_checkpoints_secs', 'expected'), [(600, {0, 4}), (0, {0, 1, 4})])
def test_saves_by_the_clock(
    data_dir, tmp_path, log, save_checkpoints_secs, expected):
  run(data_dir, tmp_path / 'model', train_steps=4,
      save_checkpoints_secs=save_checkpoints_secs)
  saved = [int(step) for step, in matches(
      r'Saving checkpoints for (\d+) .*', log)]
  assert len(saved) == len(set(saved))
  assert expected <= set(saved)
  assert save_checkpoints_secs == 0 or expected == set(saved)


def test_evaluates_the_end_of_a_cycle_that_was_killed_there(
    data_dir, tmp_path, capsys):
  model_dir = tmp_path / 'model'
  run(data_dir, model_dir, train_steps=8, seed=1)
  expected = capsys.readouterr().out
  for path in model_dir.glob('model.ckpt-8*'):
    path.unlink()
  run(data_dir, model_dir, train_steps=8)
  assert capsys.readouterr().out == expected


def test_run_has_its_folder_to_itself(data_dir, tmp_path):
  asked = []

  def interrupted():
    asked.append(True)
    with (pytest.raises(Cifar10Error, match='is in use by another run'),
          cifar10.sole_use(str(tmp_path / 'model'))):
      pass
    return False

  run(data_dir, tmp_path / 'model', interrupted=interrupted)
  assert asked


def test_eval_only_writes_nothing(data_dir, tmp_path, capsys):
  run(data_dir, tmp_path / 'model')
  trained = capsys.readouterr().out
  before = contents(tmp_path / 'model')
  for path in (data_dir / cifar10.FOLDER_NAME).glob('data_batch*'):
    path.unlink()  # not needed
  run(data_dir, tmp_path / 'model', eval_only=True)
  result, *classes = capsys.readouterr().out.splitlines()
  assert result == trained.strip()
  names, accuracies = zip(*(line.split() for line in classes))
  assert names == cifar10.CLASSES
  # Of the 23 images, how many has each class?
  labels = cifar10.read_records(
      data_dir / cifar10.FOLDER_NAME / cifar10.TEST_FILE)[:, 0]
  right = np.bincount(labels, minlength=10) * np.array(accuracies, float)
  accuracy = ast.literal_eval(result)['accuracy']
  np.testing.assert_allclose(sum(right), accuracy * 23, atol=1e-2)
  assert contents(tmp_path / 'model') == before


# -------------------------------------------------------------- bad input


def test_no_checkpoint_to_evaluate(data_dir, tmp_path):
  with pytest.raises(Cifar10Error, match='holds no checkpoint to evaluate'):
    run(data_dir, tmp_path / 'model', eval_only=True)
  assert not (tmp_path / 'model').exists()


def test_checkpoint_of_another_size(data_dir, tmp_path):
  model_dir = tmp_path / 'model'
  place_originals_checkpoint(model_dir)
  before = contents(model_dir)
  for resnet_size in (14, 32):
    with pytest.raises(Cifar10Error,
                       match=r'another network .*: use --resnet_size=8 or'):
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
  checkpoints = cifar10_main.Checkpoints(str(tmp_path), state)
  for step in (0, 2, 4):
    state.global_step.assign(step)
    checkpoints.save()
  before = contents(tmp_path)
  damage(tmp_path / f'model.ckpt-4.{ending}')
  checkpoints = cifar10_main.Checkpoints(str(tmp_path), state)
  checkpoints.restore_newest()
  assert any(re.match(rf'{tmp_path}/model.ckpt-4 is damaged \(.+\): trying '
                      'the one before', line) for line in log)
  assert checkpoints.newest == f'{tmp_path}/model.ckpt-2'
  assert state.global_step == 2
  for path in tmp_path.glob('model.ckpt-[02].*'):
    assert path.read_bytes() == before[path]

  # Nothing whole is left: no other thing to do than to say so.
  for path in tmp_path.glob(f'model.ckpt-[02].{ending}'):
    damage(path)
  before = contents(tmp_path)
  with pytest.raises(Cifar10Error,
                     match=f'{tmp_path} holds no checkpoint that is not'):
    checkpoints.restore_newest()
  assert contents(tmp_path) == before


def test_run_after_a_damaged_checkpoint(data_dir, tmp_path, log, capsys):
  model_dir = tmp_path / 'model'
  run(data_dir, model_dir, train_steps=4, steps_per_eval=2, seed=1)
  expected = capsys.readouterr().out
  flip_a_bit(model_dir / 'model.ckpt-4.data-00000-of-00001')
  del log[:]
  run(data_dir, model_dir, train_steps=4, steps_per_eval=2)
  assert f'Restoring parameters from {model_dir}/model.ckpt-2' in log
  assert capsys.readouterr().out == expected
  for path in model_dir.glob('*.index'):
    cut(path)
  before = contents(model_dir)
  for eval_only in (False, True):
    with pytest.raises(Cifar10Error,
                       match=f'{model_dir} holds no checkpoint that is not'):
      run(data_dir, model_dir, eval_only=eval_only)
  assert contents(model_dir) == before


def test_first_save_that_was_killed(data_dir, tmp_path, log, capsys):
  model_dir = tmp_path / 'model'
  run(data_dir, model_dir, seed=1)
  expected = capsys.readouterr().out
  for name in ('model.ckpt-0.index', 'model.ckpt-4.index',
               'model.ckpt-4.data-00000-of-00001'):
    (model_dir / name).unlink()
  (model_dir / 'model.ckpt-0_temp').mkdir()
  (model_dir / 'model.ckpt-0_temp' / 'part').touch()
  del log[:]
  run(data_dir, model_dir, seed=1)
  assert any('model.ckpt-0 is damaged' in line for line in log)
  assert capsys.readouterr().out == expected
  assert not (model_dir / 'model.ckpt-0_temp').exists()


def test_garbage_in_the_list_of_checkpoints(data_dir, tmp_path, capsys):
  run(data_dir, tmp_path / 'model')
  expected = capsys.readouterr().out
  listed = tmp_path / 'model' / 'checkpoint'
  listed.write_bytes(bytes(range(256)))
  with pytest.raises(Cifar10Error, match=f'{listed} is damaged: delete it'):
    run(data_dir, tmp_path / 'model')
  listed.write_text('neither a list nor a protocol buffer')
  run(data_dir, tmp_path / 'model')
  assert capsys.readouterr().out == expected


@pytest.mark.parametrize('eval_only', [False, True])
def test_checkpoint_that_is_not_finite(data_dir, tmp_path, eval_only):
  model_dir = tmp_path / 'model'
  state = make_state()
  state.network.trainable_variables[3].assign(
      state.network.trainable_variables[3] + np.nan)
  variables = {cifar10_main.tf1_name(v): v for v in state.variables}
  tf.train.Checkpoint(**variables).write(str(model_dir / 'model.ckpt-5'))
  before = contents(model_dir)
  with pytest.raises(Cifar10Error,
                     match=r'ckpt-5 is of no use, .* is not finite there'):
    run(data_dir, model_dir, eval_only=eval_only)
  assert contents(model_dir) == before


def test_loss_that_is_not_finite(data_dir, tmp_path, monkeypatch):
  monkeypatch.setattr(cifar10_main, 'INITIAL_LEARNING_RATE', 1e30)
  with pytest.raises(
      Cifar10Error, match=r'The loss is not finite at step 2 \(looked at after '
      r'steps 1 and [234]\), nothing of it is saved: .* smaller --batch_size'):
    run(data_dir, tmp_path / 'model')
  indices = (tmp_path / 'model').glob('*.index')
  assert [path.name for path in indices] == ['model.ckpt-0.index']


def test_does_not_save_what_is_not_finite(tmp_path):
  state = make_state()
  state.momentum[3].assign(state.momentum[3] + np.nan)
  with pytest.raises(Cifar10Error, match='Momentum is not finite after step 0'):
    cifar10_main.Checkpoints(str(tmp_path), state).save()
  assert not contents(tmp_path)


def run_main(*arguments):
  """Parses flags and runs main; returns what it exits with."""
  flags.FLAGS.unparse_flags()
  try:
    flags.FLAGS([SCRIPT, *arguments])
  except flags.Error as error:
    return str(error)
  with (mock.patch.object(cifar10_main, 'note_signals', list),
        pytest.raises(SystemExit) as exit_info):
    cifar10_main.main([SCRIPT])
  return exit_info.value.code


@pytest.mark.parametrize('flag', [
    '--resnet_size=0', '--resnet_size=33', '--resnet_size=2',
    '--resnet_size=-4', '--resnet_size=x', '--train_steps=0',
    '--train_steps=-1', '--train_steps=1.5', '--steps_per_eval=0',
    '--steps_per_eval=x', '--batch_size=0', '--batch_size=-128',
    '--batch_size=50001', '--data_format=NCHW', '--eval_only=maybe',
    '--dtype=half', '--xla=maybe', '--save_checkpoints_secs=0', '--seed=-1',
    '--num_gpus=-2', '--num_gpus=9999',
    '--model_dir=', '--model_dir=a\tb', '--data_dir=\udcff'])
def test_flags_out_of_range(script_flags, flag):
  name = flag.partition('=')[0]
  message = run_main(flag)
  assert name in message
  assert len(message.splitlines()) == 1


def test_unknown_flag(script_flags):
  assert 'bach_size' in run_main('--bach_size=3')


@pytest.mark.parametrize('damage', ['folder', 'file', 'cut', 'label', 'empty'])
def test_damaged_data(script_flags, data_dir, tmp_path, damage):
  path = data_dir / cifar10.FOLDER_NAME / 'data_batch_3.bin'
  data = path.read_bytes()
  expected = str(path)
  if damage == 'folder':
    data_dir = tmp_path / 'nothing'
    expected = f'{data_dir}.*run cifar10_download_and_extract.py first'
  elif damage == 'file':
    path.unlink()
    expected += '.*run cifar10_download_and_extract.py first'
  elif damage == 'cut':
    path.write_bytes(data[:-1])
    expected += '.*not a whole number of 3,073-byte records'
  elif damage == 'label':
    path.write_bytes(data[:3073] + b'\x0a' + data[3074:])
    expected += '.*record 1 has label 10, not 0-9'
  else:
    path.write_bytes(b'')
    expected += '.*0 bytes'
  message = run_main(f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model')
  assert re.search(expected, message)
  assert len(message.splitlines()) == 1
  assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize(
    'flag', ['--data_format=channels_first', '--dtype=bf16'])
def test_device_without_such_convolutions(
    script_flags, data_dir, tmp_path, monkeypatch, flag):

  def conv2d(*args, **kwargs):
    raise tf.errors.UnimplementedError(None, None, 'not here')

  monkeypatch.setattr(tf.nn, 'conv2d', conv2d)
  message = run_main(
      f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model', flag)
  assert message.endswith(f': {flag} does not run on this device: leave it out')
  assert not (tmp_path / 'model').exists()


def test_too_little_memory(script_flags, monkeypatch):

  def train_and_evaluate(*args):
    raise tf.errors.ResourceExhaustedError(None, None, 'OOM')

  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', train_and_evaluate)
  assert run_main().endswith('too little memory: try a smaller --batch_size')


def test_model_dir_that_cannot_be_written(script_flags, data_dir):
  message = run_main(f'--data_dir={data_dir}', '--model_dir=/dev/null/model',
                     '--resnet_size=8')
  assert message == (f'{os.path.basename(sys.argv[0])}: Cannot write to '
                     '/dev/null/model (Not a directory): name another '
                     '--model_dir')


def run_script(*arguments, **kwargs):
  return subprocess.run(
      [sys.executable, SCRIPT, '--use_synthetic_data', '--resnet_size=8',
       '--batch_size=8', *arguments],
      text=True, capture_output=True, check=False, **kwargs)


def test_model_dir_without_room(tmp_path, capsys):
  """A limit on the size of files stands in for a disk that is full."""
  model_dir = tmp_path / 'model'
  run(None, model_dir, train_steps=2, use_synthetic_data=True)
  before = contents(model_dir)
  result = run_script(
      f'--model_dir={model_dir}', '--train_steps=4',
      preexec_fn=lambda: resource.setrlimit(
          resource.RLIMIT_FSIZE, (100_000, 100_000)))
  assert result.returncode == 1
  assert 'Traceback' not in result.stderr
  *_, last = result.stderr.splitlines()
  assert f'Cannot save a checkpoint in {model_dir}' in last
  assert {path: data for path, data in before.items()
          if 'ckpt' in path.name}.items() <= contents(model_dir).items()
  # With room again, the run goes on.
  run(None, model_dir, train_steps=3, use_synthetic_data=True)
  assert "'global_step': 3}" in capsys.readouterr().out


@pytest.mark.parametrize(('argument', 'message'), [
    ('--batch_size=0', 'flag --batch_size=0'),
    ('stray', "unknown argument 'stray'"),
])
def test_bad_command_line_ends_the_script(argument, message):
  result = run_script(argument, '--eval_only')
  assert result.returncode == 1
  assert not result.stdout
  assert 'Traceback' not in result.stderr
  assert message in result.stderr


# ----------------------------------------------------------------- export


def test_export(tmp_path, log, capsys):
  """Raw test images give, in a fresh process, what the evaluation found."""
  model_dir, export_dir = tmp_path / 'model', tmp_path / 'exported'
  result = run_script(f'--model_dir={model_dir}', '--train_steps=30',
                      f'--export_dir={export_dir}')
  assert result.returncode == 0
  assert f'Exported {model_dir}/model.ckpt-30 to {export_dir}' in result.stderr
  records = cifar10_main.synthetic_records('eval')
  images, one_hot = cifar10_main.dataset_parser(records)
  np.save(tmp_path / 'images.npy', images)
  code = (
      'import sys, numpy as np, tensorflow as tf\n'
      'serve = tf.saved_model.load("exported").signatures["serving_default"]\n'
      'images = np.load("images.npy")\n'
      'one, rest = serve(images=images[:1]), serve(images=images[1:])\n'
      'np.savez("outputs.npz", **{name: np.array(\n'
      '    [*one[name].numpy(), *rest[name].numpy()]) for name in one})\n'
      'assert not any("cifar10_" in name for name in sys.modules)')
  subprocess.run([sys.executable, '-c', code], cwd=tmp_path, check=True)

  outputs = np.load(tmp_path / 'outputs.npz')
  assert outputs['classes'].dtype == np.int64
  np.testing.assert_array_equal(outputs['class_names'].astype(str),
                                np.array(cifar10.CLASSES)[outputs['classes']])
  state = make_state()
  cifar10_main.Checkpoints(str(model_dir), state).restore_newest()
  dataset = cifar10_main.input_fn('eval', None, 100, use_synthetic_data=True)
  for i, (features, _) in enumerate(dataset):
    expected = cifar10_main.model_fn(features, None, 'infer', state.network)
    batch = slice(100 * i, 100 * (i + 1))
    np.testing.assert_allclose(outputs['probabilities'][batch],
                               expected['probabilities'], atol=1e-5)
  accuracy = (outputs['classes'] == np.argmax(one_hot, axis=1)).mean()
  assert accuracy == ast.literal_eval(result.stdout)['accuracy']


def test_saved_model_cli(tmp_path):
  """The tool that comes with TensorFlow can show and run the export."""
  model_dir, export_dir = tmp_path / 'model', tmp_path / 'exported'
  state = cifar10_main.make_state(8, None, 'fp32', seed=0)
  cifar10_main.Checkpoints(str(model_dir), state).save()
  cifar10_main.export(str(model_dir), str(export_dir), 8, 'fp32')
  tool = os.path.join(os.path.dirname(sys.executable), 'saved_model_cli')
  command = ['--dir', export_dir, '--tag_set', 'serve',
             '--signature_def', 'serving_default']
  shown = subprocess.run([tool, 'show', *command], text=True,
                         capture_output=True, check=True).stdout
  shown = re.sub(r'\s+', ' ', shown)
  assert ("inputs['images'] tensor_info: dtype: DT_UINT8 "
          'shape: (-1, 32, 32, 3)') in shown
  for name in ('classes', 'probabilities', 'class_names'):
    assert f"outputs['{name}']" in shown
  np.save(tmp_path / 'images.npy', np.zeros([3, 32, 32, 3], np.uint8))
  subprocess.run([tool, 'run', *command, '--outdir', tmp_path, '--inputs',
                  f'images={tmp_path}/images.npy'], check=True)
  assert np.load(tmp_path / 'probabilities.npy').shape == (3, 10)


def test_export_folder_that_is_there(script_flags, data_dir, tmp_path):
  (tmp_path / 'mine').touch()
  message = run_main(f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model',
                     f'--export_dir={tmp_path}/mine', '--resnet_size=8',
                     '--train_steps=1')
  assert f'--export_dir={tmp_path}/mine is there already' in message
  assert not (tmp_path / 'model').exists()


def test_export_without_room(tmp_path, small_disk):
  folder = small_disk(kilobytes=300)
  model_dir = tmp_path / 'model'
  cifar10_main.Checkpoints(str(model_dir), make_state()).save()
  with pytest.raises(Cifar10Error, match=r'Cannot export to .* make room'):
    cifar10_main.export(str(model_dir), f'{folder}/exported', 8, 'fp32')
  assert not (folder / 'exported').exists()


# ----------------------------------------------------------------- README


def readme_code(beginning):
  """Returns the block of Python in the README that holds such a line."""
  path = os.path.join(os.path.dirname(SCRIPT), 'README.md')
  with open(path, encoding='utf-8') as file:
    blocks = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
  code, = (block for block in blocks if beginning in block)
  return code


def test_readme_on_notebooks(data_dir, capsys):
  code = readme_code('import cifar10_main')
  assert '/tmp/cifar10_data' in code
  exec(code.replace('/tmp/cifar10_data', str(data_dir)), {})
  *steps, last = capsys.readouterr().out.splitlines()
  numbers, losses = zip(*(line.split() for line in steps))
  assert [int(number) for number in numbers] == list(range(1, len(steps) + 1))
  assert all(0.5 < float(loss) < 10 for loss in losses)
  assert set(re.findall(r'\w+', last)) <= set(cifar10.CLASSES)


def test_readme_on_pictures(tmp_path, capsys):
  state = make_state()
  cifar10_main.Checkpoints(str(tmp_path / 'model'), state).save()
  cifar10_main.export(
      str(tmp_path / 'model'), str(tmp_path / 'exported'), 8, 'fp32')
  image = np.random.default_rng(0).integers(0, 256, [32, 32, 3], np.uint8)
  outputs = cifar10_main.model_fn(
      tf.image.per_image_standardization(image[None]), None, 'infer',
      state.network)
  expected = (f"{cifar10.CLASSES[outputs['classes'][0]]} "
              f"{tf.reduce_max(outputs['probabilities']):.1%}")
  code = readme_code('decode_image')
  for path, ours in (('/tmp/cifar10_export', 'exported'),
                     ('picture.jpg', 'picture.png')):
    assert path in code
    code = code.replace(path, str(tmp_path / ours))
  for width, pattern in ((32, re.escape(expected)), (200, r'\w+ \d+\.\d%')):
    picture = np.resize(image, [32, width, 3])
    tf.io.write_file(
        str(tmp_path / 'picture.png'), tf.io.encode_png(picture))
    exec(code, {})
    assert re.fullmatch(f'{pattern}\n', capsys.readouterr().out)
