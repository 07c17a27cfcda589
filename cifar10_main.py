"""Trains and evaluates a ResNet on CIFAR-10.

    python cifar10_download_and_extract.py
    python cifar10_main.py --resnet_size=32 --train_steps=100000

This is the CIFAR-10 script of TensorFlow's models repository of 2017, without
the `tf.estimator` that it stood on: the same recipe, flags, log lines and
checkpoints, in eager TensorFlow 2. In reading order: constants, input_fn,
model_fn, checkpoints, the training step and its loop, evaluation, hooks, the
run, flags.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: the augmentation.
  [2] The same authors: Identity Mappings in Deep Residual Networks.
      arXiv:1603.05027. The network.
"""

from collections.abc import Callable, Iterator
import functools
import os
import platform
import re
import sys
import tempfile
import time

from absl import app, flags, logging
import numpy as np
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import resnet_model

HEIGHT = 32
WIDTH = 32
DEPTH = 3
NUM_CLASSES = len(cifar10.CLASSES)
NUM_TRAIN_IMAGES = 50000

PAD = 4  # black pixels on each side, before a random crop back to size [1]
SHUFFLE_RECORDS = int(NUM_TRAIN_IMAGES * 0.4)  # and three batches

WEIGHT_DECAY = 2e-4
MOMENTUM = 0.9
INITIAL_LEARNING_RATE = 0.1  # for a batch of 128, in proportion for others
LEARNING_RATE_DECAYS = {100: 0.1, 150: 0.01, 200: 0.001}  # from epoch: factor

LOG_STEPS = 100  # steps between two log lines
SAVE_SECONDS = 600  # between two checkpoints, beside the one of each cycle
KEEP_CHECKPOINTS = 5
NUM_SUMMARY_IMAGES = 6
NUM_SYNTHETIC_RECORDS = {'train': 5000, 'eval': 1000}

Cifar10Error = cifar10.Cifar10Error
Values = dict[str, tf.Tensor]


# ---------------------------------------------------------------------- input


def filenames(mode: str, data_dir: str) -> list[str]:
  """Returns the paths of the record files of a mode.

  Args:
    mode: 'train', 'eval' or 'infer'.
    data_dir: The folder that holds cifar-10-batches-bin/, or that one itself.
  """
  folder = data_dir
  if os.path.basename(os.path.abspath(folder)) != cifar10.FOLDER_NAME:
    folder = os.path.join(folder, cifar10.FOLDER_NAME)
  names = cifar10.TRAIN_FILES if mode == 'train' else [cifar10.TEST_FILE]
  return [os.path.join(folder, name) for name in names]


def synthetic_records(mode: str) -> np.ndarray:
  """Makes records like those of a file, the same ones at each call.

  A class is a pattern of 8x8 coloured squares, an image its class under noise.

  Args:
    mode: 'train', 'eval' or 'infer'.

  Returns:
    uint8 [N, 3073].
  """
  patterns = np.random.default_rng(0).integers(
      64, 192, [NUM_CLASSES, DEPTH, HEIGHT // 8, WIDTH // 8], np.int16)
  patterns = patterns.repeat(8, axis=2).repeat(8, axis=3)
  train = mode == 'train'
  rng = np.random.default_rng(1 if train else 2)
  count = NUM_SYNTHETIC_RECORDS['train' if train else 'eval']
  labels = rng.integers(0, NUM_CLASSES, [count, 1])
  noise = rng.integers(-64, 64, [count, DEPTH * HEIGHT * WIDTH], np.int16)
  images = patterns.reshape(NUM_CLASSES, -1)[labels[:, 0]] + noise
  return np.concatenate([labels, images], axis=1).astype(np.uint8)


def record_dataset(records: tf.Tensor, mode: str,
                   batch_size: int) -> tf.data.Dataset:
  """Batches records: in order for evaluation, shuffled without end to train.

  Args:
    records: uint8 [number of records, 3073].
    mode: 'train', 'eval' or 'infer'.
    batch_size: Records per batch. The last one of an evaluation has the rest.

  Returns:
    Dataset of uint8 [N, 3073].
  """
  # Numbers are shuffled instead of records, which then move once, as a batch.
  dataset = tf.data.Dataset.range(len(records))
  if mode == 'train':
    dataset = dataset.repeat().shuffle(SHUFFLE_RECORDS + 3 * batch_size)
  dataset = dataset.batch(batch_size, drop_remainder=mode == 'train')
  return dataset.map(lambda numbers: tf.gather(records, numbers))


def dataset_parser(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Splits records, uint8 [N, 3073], into images and labels.

  Returns:
    Images, uint8 [N, 32, 32, 3], and one-hot labels, float32 [N, 10].
  """
  images = tf.reshape(records[:, 1:], [-1, DEPTH, HEIGHT, WIDTH])
  labels = tf.cast(records[:, 0], tf.int32)
  return tf.transpose(images, [0, 2, 3, 1]), tf.one_hot(labels, NUM_CLASSES)


def train_preprocess_fn(images: tf.Tensor,
                        labels: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Pads each image with black, crops it at random and flips half of them [1].

  Args:
    images: [N, 32, 32, 3] of any dtype, not standardized yet, so that zero is
      black, as it was in the original, and not the mean grey.
    labels: Passed through.

  Returns:
    The augmented images and the labels, shapes and dtypes as they came.
  """
  num_images = tf.shape(images)[0]
  images = tf.pad(images, [[0, 0], [PAD, PAD], [PAD, PAD], [0, 0]])
  top, left = tf.unstack(
      tf.random.uniform([2, num_images, 1], 0, 2 * PAD + 1, tf.int32))
  flip = tf.random.uniform([num_images, 1], 0, 2, tf.int32) == 1
  rows = top + tf.range(HEIGHT)  # [N, 32]
  columns = left + tf.where(
      flip, tf.range(WIDTH - 1, -1, -1), tf.range(WIDTH))  # [N, 32]
  images = tf.gather(images, rows, axis=1, batch_dims=1)  # [N, 32, 40, 3]
  return tf.gather(images, columns, axis=2, batch_dims=1), labels


def input_fn(mode: str, data_dir: str | None, batch_size: int,
             use_synthetic_data: bool = False) -> tf.data.Dataset:
  """Reads all records of a mode, checks them, and returns them as batches.

  Each iteration over a training dataset starts anew, and has no end.

  Args:
    mode: 'train', 'eval' or 'infer'.
    data_dir: The folder that holds cifar-10-batches-bin/, or that one itself.
    batch_size: Images per batch.
    use_synthetic_data: Whether to make up the records instead.

  Returns:
    Dataset of standardized images, float32 [N, 32, 32, 3], and one-hot labels,
    float32 [N, 10].

  Raises:
    Cifar10Error: A file is missing or damaged.
  """
  if use_synthetic_data:
    records, source = synthetic_records(mode), 'memory'
  else:
    files = filenames(mode, data_dir)
    records = np.concatenate([cifar10.read_records(file) for file in files])
    source = os.path.dirname(files[0])
  logging.info('%s records to %s from %s', f'{len(records):,}',
               'train' if mode == 'train' else 'evaluate', source)

  def preprocess(records):
    images, labels = dataset_parser(records)
    if mode == 'train':
      images, labels = train_preprocess_fn(images, labels)
    # Standardization would map uint8 to 0..1, and its lower bound of the
    # standard deviation, 1 / sqrt(3072), is meant for 0..255.
    images = tf.image.per_image_standardization(tf.cast(images, tf.float32))
    return images, labels

  with tf.device('CPU'):
    records = tf.constant(records)
  dataset = record_dataset(records, mode, batch_size)
  dataset = dataset.map(preprocess, num_parallel_calls=tf.data.AUTOTUNE)
  return dataset.prefetch(tf.data.AUTOTUNE)


# ---------------------------------------------------------------------- model


def model_fn(features: tf.Tensor, labels: tf.Tensor | None, mode: str,
             network: resnet_model.Cifar10ResnetV2) -> Values:
  """Computes the predictions and, unless to infer, the loss of a batch.

  Args:
    features: Standardized images, float32 [N, 32, 32, 3].
    labels: One-hot, float32 [N, 10]; not used to infer.
    mode: 'train', which updates the moving averages, 'eval' or 'infer'.
    network: The network.

  Returns:
    classes, int64 [N], and probabilities, float32 [N, 10]. Unless to infer also
    cross_entropy and loss, float32 [], and correct, the number of images whose
    class is the label's, int64 [].
  """
  logits = network(features, training=mode == 'train')
  predictions = {'classes': tf.argmax(logits, axis=1),
                 'probabilities': tf.nn.softmax(logits)}
  if mode == 'infer':
    return predictions
  cross_entropy = tf.reduce_mean(
      tf.nn.softmax_cross_entropy_with_logits(labels, logits))
  # As in the original, all trained variables decay: batch norm's scales and
  # offsets and the bias too, which later scripts leave out.
  decay = tf.add_n([tf.nn.l2_loss(v) for v in network.trainable_variables])
  correct = predictions['classes'] == tf.argmax(labels, axis=1)
  return {**predictions, 'cross_entropy': cross_entropy,
          'loss': cross_entropy + WEIGHT_DECAY * decay,
          'correct': tf.math.count_nonzero(correct)}


def learning_rate_schedule(
    batch_size: int) -> tf.keras.optimizers.schedules.PiecewiseConstantDecay:
  """Returns the learning rate as a function of global_step."""
  initial = INITIAL_LEARNING_RATE * batch_size / 128
  # Up to and including a boundary, the earlier rate holds, as in the original.
  return tf.keras.optimizers.schedules.PiecewiseConstantDecay(
      [int(NUM_TRAIN_IMAGES / batch_size * epoch)
       for epoch in LEARNING_RATE_DECAYS],
      [initial * factor for factor in (1, *LEARNING_RATE_DECAYS.values())])


class TrainState(tf.Module):
  """All variables of a run: those of the network, momentum and global_step."""

  def __init__(self, network: resnet_model.Cifar10ResnetV2):
    super().__init__()
    self.network = network
    self.momentum = [
        tf.Variable(
            tf.zeros_like(v), False, name=f'{variable_name(v)}/Momentum')
        for v in network.trainable_variables]
    self.global_step = tf.Variable(
        0, False, dtype=tf.int64, name='global_step')


def variable_name(variable: tf.Variable) -> str:
  """Returns the name as TensorFlow 1 checkpoints have it."""
  return variable.name.removesuffix(':0')


# ---------------------------------------------------------------- checkpoints


class Checkpoints:
  """The checkpoints of a model folder, model.ckpt-STEP.

  All variables stand side by side in a checkpoint, each under its name in the
  original. The original's own checkpoints hold the same names, so that one way
  of reading serves both.
  """

  def __init__(self, model_dir: str, state: TrainState):
    self._model_dir = model_dir
    self._prefix = os.path.join(model_dir, 'model.ckpt')
    self._variables = {variable_name(v): v for v in (
        *state.network.variables, *state.momentum, state.global_step)}
    self._manager = None  # made at the first save: reading changes no folder
    self._saved_at = time.monotonic()

  def newest(self) -> str | None:
    """Returns the path, without ending, of the newest one, None if none is.

    The names of the files decide. The file `checkpoint` beside them may still
    name the folder from which they were moved or copied.
    """
    if not os.path.isdir(self._model_dir):
      return None
    names = '\n'.join(os.listdir(self._model_dir))
    steps = re.findall(r'^model\.ckpt-(\d+)\.index$', names, re.MULTILINE)
    return f'{self._prefix}-{max(map(int, steps))}' if steps else None

  def restore(self, path: str) -> None:
    """Restores all variables.

    Args:
      path: A checkpoint without ending, this script's or the original's.

    Raises:
      Cifar10Error: The checkpoint is damaged or of another network.
    """
    try:
      reader = tf.train.load_checkpoint(path)
      # TensorFlow 2 adds an ending to the names and writes .S for a slash.
      keys = {key.partition('/.ATTRIBUTES/')[0].replace('.S', '/'): key
              for key in reader.get_variable_to_shape_map()}
      values = {name: reader.get_tensor(keys[name])
                for name in self._variables if name in keys}
    except (tf.errors.OpError, RuntimeError, LookupError, ValueError) as error:
      raise Cifar10Error(
          f'{path} is damaged ({first_line(error)}): move it away to go on '
          'from the one before, or name another --model_dir') from None
    for name, variable in self._variables.items():
      if name not in values or values[name].shape != variable.shape:
        there = list(values[name].shape) if name in values else 'missing'
        # A convolution for each layer but the last, and three projections.
        size = sum(bool(re.fullmatch(r'conv2d(_\d+)?/kernel', key))
                   for key in keys) - 2
        cure = f'--resnet_size={size} or ' if size % 6 == 2 else ''
        raise Cifar10Error(
            f'{path} is of another network ({name} is {there} there and '
            f'{variable.shape.as_list()} here): use {cure}another --model_dir')
    for name, variable in self._variables.items():
      variable.assign(values[name])

  def save(self) -> str:
    """Saves a checkpoint, deletes the sixth newest and returns the path.

    Raises:
      Cifar10Error: A variable is not finite, or the folder cannot be written.
        The older checkpoints are still there.
    """
    step = self._variables['global_step'].numpy()
    for name, variable in self._variables.items():
      if not np.isfinite(variable.numpy()).all():
        raise not_finite_error(name, step)
    logging.info('Saving checkpoints for %d into %s.', step, self._prefix)
    try:
      if self._manager is None:
        self._manager = self._make_manager()
      path = self._manager.save(checkpoint_number=step)
    except (tf.errors.OpError, OSError) as error:
      raise Cifar10Error(
          f'Cannot save a checkpoint in {self._model_dir} '
          f'({first_line(error)}): make room there and start again, the '
          'older checkpoints are whole') from None
    self._saved_at = time.monotonic()
    return path

  def save_if_due(self) -> None:
    """Saves a checkpoint if the last one is old enough."""
    if time.monotonic() - self._saved_at >= SAVE_SECONDS:
      self.save()

  def _make_manager(self):
    # A manager deletes what `checkpoint` lists: nothing of other folders, then.
    listed = tf.train.get_checkpoint_state(self._model_dir)
    if listed and not all(path.startswith(f'{self._prefix}-')
                          for path in listed.all_model_checkpoint_paths):
      os.remove(os.path.join(self._model_dir, 'checkpoint'))
    return tf.train.CheckpointManager(
        tf.train.Checkpoint(**self._variables), self._model_dir,
        KEEP_CHECKPOINTS, checkpoint_name='model.ckpt')


def not_finite_error(name: str, step: int) -> Cifar10Error:
  """Returns the error that ends a run whose numbers overflowed."""
  return Cifar10Error(
      f'{name} is not finite at step {step}, and no checkpoint of it is saved: '
      'the learning rate is 0.1 * batch_size / 128, try a smaller --batch_size')


def first_line(error: Exception) -> str:
  """Returns the first line of an error's message."""
  return str(error).partition('\n')[0]


# ----------------------------------------------------------------------- train


def train_step(state: TrainState, schedule: Callable, features: tf.Tensor,
               labels: tf.Tensor) -> Values:
  """Trains one batch.

  Returns:
    What the log shows of the step, all from before its update: cross_entropy,
    loss and learning_rate, float32 []; correct, the number of images classified
    correctly, int64 []; images, up to six of the batch.
  """
  variables = state.network.trainable_variables
  with tf.GradientTape() as tape:
    outputs = model_fn(features, labels, 'train', state.network)
  gradients = tape.gradient(outputs['loss'], variables)
  learning_rate = schedule(state.global_step)
  for variable, accum, gradient in zip(variables, state.momentum, gradients):
    # accum = 0.9 * accum + gradient; variable -= learning_rate * accum. Keras
    # has the learning rate in accum, which differs after each of its drops.
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle, accum=accum.handle, lr=learning_rate,
        grad=gradient, momentum=MOMENTUM)
  state.global_step.assign_add(1)
  return {'cross_entropy': outputs['cross_entropy'], 'loss': outputs['loss'],
          'learning_rate': learning_rate, 'correct': outputs['correct'],
          'images': features[:NUM_SUMMARY_IMAGES]}


def make_train_steps(state: TrainState, batch_size: int) -> Callable:
  """Returns the compiled inner loop, `train_steps(iterator, num_steps)`.

  It returns the values of the last step, and `finite_steps`, int64 []: how many
  steps it took until the loss was not finite any more.
  """
  schedule = learning_rate_schedule(batch_size)
  num_images = min(batch_size, NUM_SUMMARY_IMAGES)

  @tf.function
  def train_steps(iterator, num_steps):
    values = {'cross_entropy': 0.0, 'loss': 0.0, 'learning_rate': 0.0,
              'correct': tf.constant(0, tf.int64),
              'images': tf.zeros([num_images, HEIGHT, WIDTH, DEPTH])}
    finite_steps = tf.constant(0, tf.int64)
    for _ in tf.range(num_steps):
      values = train_step(state, schedule, *next(iterator))
      finite_steps += tf.cast(tf.math.is_finite(values['loss']), tf.int64)
    return {**values, 'finite_steps': finite_steps}

  return train_steps


def train(state: TrainState, train_steps: Callable, iterator: Iterator,
          last_step: int, hooks: list[Callable], checkpoints: Checkpoints,
          batch_size: int) -> None:
  """Trains one cycle, up to and including `last_step`.

  Calls `hook(step, values)` at the first step and every 100 steps from there.

  Raises:
    Cifar10Error: The loss is not finite any more.
  """
  step = state.global_step.numpy()
  first_step = step + 1
  correct = seen = 0
  looked_at = None
  for look in (*range(first_step, last_step, LOG_STEPS), last_step):
    # The number as a tensor: as a Python number, each would be traced anew.
    values = train_steps(iterator, tf.constant(look - step))
    values = {name: value.numpy() for name, value in values.items()}  # waits
    if values['finite_steps'] < look - step:
      raise not_finite_error('The loss', step + 1 + values['finite_steps'])
    step = look
    if (step - first_step) % LOG_STEPS == 0:
      # As in the original, the mean over the logged batches of this cycle.
      correct += values['correct']
      seen += batch_size
      values['train_accuracy'] = np.float32(correct / seen)
      now = time.perf_counter()
      if looked_at is not None:
        values['seconds'] = now - looked_at
        values['global_step/sec'] = LOG_STEPS / values['seconds']
      looked_at = now
      for hook in hooks:
        hook(step, values)
    checkpoints.save_if_due()
  logging.info('Loss for final step: %s.', values['loss'])


def log_values(step: int, values: dict) -> None:
  """Hook that logs the lines of the original, word for word."""
  duration = ''
  if 'seconds' in values:
    duration = f' ({values["seconds"]:.3f} sec)'
    logging.info('global_step/sec: %g', values['global_step/sec'])
  logging.info(
      'cross_entropy = %s, learning_rate = %s, train_accuracy = %s%s',
      values['cross_entropy'], values['learning_rate'],
      values['train_accuracy'], duration)
  logging.info('loss = %s, step = %d%s', values['loss'], step, duration)


def write_summaries(writer: tf.summary.SummaryWriter, step: int,
                    values: dict) -> None:
  """Hook that writes what TensorBoard shows of the training."""
  with writer.as_default(step):
    for name in ('cross_entropy', 'learning_rate', 'train_accuracy', 'loss',
                 'global_step/sec'):
      if name in values:
        tf.summary.scalar(name, values[name])
    # Zero, an image's mean, becomes grey, its farthest value black or white.
    images = values['images']
    farthest = np.abs(images).max(axis=(1, 2, 3), keepdims=True)
    tf.summary.image('images', 0.5 + 0.5 * images / np.maximum(farthest, 1e-6),
                     max_outputs=NUM_SUMMARY_IMAGES)


# -------------------------------------------------------------------- evaluate


def make_eval_step(network: resnet_model.Cifar10ResnetV2,
                   dataset: tf.data.Dataset) -> Callable:
  """Returns the compiled `eval_step(features, labels) -> loss, correct`."""

  # With the signature of the dataset, whose N is open, one trace serves the
  # short last batch too.
  @tf.function(input_signature=dataset.element_spec)
  def eval_step(features, labels):
    outputs = model_fn(features, labels, 'eval', network)
    return outputs['loss'], outputs['correct']

  return eval_step


def evaluate(eval_step: Callable, dataset: tf.data.Dataset, path: str,
             step: int) -> dict[str, float]:
  """Evaluates the network, logs and prints the results.

  Args:
    eval_step: Of make_eval_step.
    dataset: The batches to evaluate.
    path: The checkpoint that holds what is evaluated, for the log.
    step: global_step.

  Returns:
    accuracy, over all images; loss, the plain mean over the batches, in which
    the short last one counts like the others; global_step.
  """
  logging.info('Starting evaluation at %s', time.strftime('%Y-%m-%dT%H:%M:%S'))
  # The variables are in memory already, but people search logs for this line.
  logging.info('Restoring parameters from %s', path)
  loss = correct = images = batches = 0
  for features, labels in dataset:
    batch_loss, batch_correct = eval_step(features, labels)
    loss += batch_loss
    correct += batch_correct
    images += len(labels)
    batches += 1
  logging.info('Finished evaluation at %s', time.strftime('%Y-%m-%d-%H:%M:%S'))
  results = {'accuracy': shortest(correct / images),
             'loss': shortest(loss / batches), 'global_step': step}
  logging.info('Saving dict for global step %d: %s', step, ', '.join(
      f'{name} = {results[name]}' for name in sorted(results)))
  print(results, flush=True)
  return results


def shortest(value: tf.Tensor) -> float:
  """Returns the number that prints with no more digits than float32 has."""
  return float(str(np.float32(value)))


# ------------------------------------------------------------------------- run


def train_and_evaluate(
    data_dir: str | None, model_dir: str, resnet_size: int, train_steps: int,
    steps_per_eval: int, batch_size: int, data_format: str | None = None,
    use_synthetic_data: bool = False, eval_only: bool = False) -> None:
  """Trains and evaluates in turn until `train_steps` steps are done in all.

  Goes on from the newest checkpoint in `model_dir`, if there is one.

  Args:
    data_dir: The folder that holds cifar-10-batches-bin/, or that one itself.
    model_dir: Folder of the checkpoints and summaries.
    resnet_size: Depth of the network, 6n + 2.
    train_steps: Steps to train in all, those of earlier runs included.
    steps_per_eval: Steps between two evaluations.
    batch_size: Images per batch.
    data_format: 'channels_first', 'channels_last' or None, the device's choice.
    use_synthetic_data: Whether to make up the data.
    eval_only: Whether to evaluate the newest checkpoint and write nothing.

  Raises:
    Cifar10Error: Data, checkpoint or model folder are not as they should be, or
      the loss is not finite any more.
  """
  if not eval_only:
    train_data = input_fn('train', data_dir, batch_size, use_synthetic_data)
  eval_data = input_fn('eval', data_dir, batch_size, use_synthetic_data)
  check_data_format(data_format)
  network = resnet_model.cifar10_resnet_v2_generator(
      resnet_size, NUM_CLASSES, data_format)
  state = TrainState(network)
  checkpoints = Checkpoints(model_dir, state)
  path = checkpoints.newest()
  if path is not None:
    checkpoints.restore(path)
  elif eval_only:
    raise Cifar10Error(f'{model_dir} holds no checkpoint to evaluate: train '
                       'first, or name another --model_dir')
  step = state.global_step.numpy().item()
  log_run(network, resnet_size, path, step, train_steps, batch_size, eval_only)
  eval_step = make_eval_step(network, eval_data)
  if eval_only:
    evaluate(eval_step, eval_data, path, step)
    return

  make_writable(model_dir)
  train_writer = tf.summary.create_file_writer(model_dir)
  eval_writer = tf.summary.create_file_writer(os.path.join(model_dir, 'eval'))
  hooks = [log_values, functools.partial(write_summaries, train_writer)]
  inner_loop = make_train_steps(state, batch_size)
  if path is None:
    path = checkpoints.save()
  while True:
    if step < train_steps:
      # Cycles end at multiples of steps_per_eval, after an interruption too.
      step += steps_per_eval - step % steps_per_eval
      step = min(step, train_steps)
      train(state, inner_loop, iter(train_data), step, hooks, checkpoints,
            batch_size)
      path = checkpoints.save()
    results = evaluate(eval_step, eval_data, path, step)
    with eval_writer.as_default(step):
      tf.summary.scalar('accuracy', results['accuracy'])
      tf.summary.scalar('loss', results['loss'])
    train_writer.flush()
    eval_writer.flush()
    if step >= train_steps:
      return


def log_run(network: resnet_model.Cifar10ResnetV2, resnet_size: int,
            path: str | None, step: int, train_steps: int, batch_size: int,
            eval_only: bool) -> None:
  """Logs in a few lines what the run will use and do."""
  gpus = tf.config.list_physical_devices('GPU')
  if gpus:
    details = tf.config.experimental.get_device_details(gpus[0])
    device = details.get('device_name', 'GPU')
  else:
    device = f'CPU ({platform.machine()}, {os.cpu_count()} cores)'
  parameters = sum(v.shape.num_elements() for v in network.trainable_variables)
  logging.info('ResNet-%d, %s parameters, on %s, %s', resnet_size,
               f'{parameters:,}', device, network.data_format)
  if path is not None:
    logging.info('Restored %s', path)
  if eval_only:
    return
  if step >= train_steps:
    logging.info('All %d steps are trained already: this run evaluates only. '
                 'A higher --train_steps would train on', train_steps)
    return
  boundaries = learning_rate_schedule(batch_size).boundaries
  logging.info(
      'Training steps %d to %d, batch size %d; the learning rate drops after '
      'steps %s%s', step + 1, train_steps, batch_size,
      ', '.join(map(str, boundaries)),
      ', not in this run' if train_steps <= boundaries[0] else '')


def check_data_format(data_format: str | None) -> None:
  """Raises Cifar10Error where the device has no channels_first convolution."""
  if data_format == 'channels_first':
    try:
      one = tf.ones([1, 1, 1, 1])
      tf.nn.conv2d(one, one, 1, 'SAME', data_format='NCHW')
    except tf.errors.UnimplementedError:
      raise Cifar10Error('--data_format=channels_first does not run on this '
                         'CPU: use channels_last') from None


def make_writable(model_dir: str) -> None:
  """Makes the folder, or raises Cifar10Error if it cannot be written."""
  try:
    os.makedirs(model_dir, exist_ok=True)
    with tempfile.TemporaryFile(dir=model_dir):
      pass
  except OSError as error:
    raise Cifar10Error(f'Cannot write to {model_dir} ({error.strerror}): name '
                       'another --model_dir') from None


def define_flags() -> None:
  """Defines the flags of this script."""
  cifar10.define_data_dir()
  flags.DEFINE_string(
      'model_dir', '/tmp/cifar10_model',
      'Folder of the checkpoints and TensorBoard events. By default, synthetic '
      'data has a folder of its own, with _synthetic behind the name.')
  flags.DEFINE_integer(
      'resnet_size', 32, 'Depth of the network, 6n + 2: 8, 14, 20, 32, 44, ...')
  flags.DEFINE_integer(
      'train_steps', 100000,
      'Batches to train in all, those of earlier runs in model_dir included.',
      lower_bound=1)
  flags.DEFINE_integer(
      'steps_per_eval', 4000, 'Batches between evaluations.', lower_bound=1)
  flags.DEFINE_integer(
      'batch_size', 128,
      'Images per batch. The learning rate is in proportion to it.',
      lower_bound=1, upper_bound=NUM_TRAIN_IMAGES)
  flags.DEFINE_enum(
      'data_format', None, ['channels_first', 'channels_last'],
      'Layout of the images in the network. By default what the device runs '
      'faster: channels_first on a GPU, channels_last on a CPU.')
  flags.DEFINE_bool(
      'use_synthetic_data', False,
      'Train and evaluate on made-up images: needs no data and no network.')
  flags.DEFINE_bool(
      'eval_only', False,
      'Evaluate the newest checkpoint, print the results and end.')
  flags.register_validator(
      'resnet_size', lambda size: size >= 8 and size % 6 == 2,
      'must be 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...')


def main(argv: list[str]) -> None:
  # Before TensorFlow looks at it: cuDNN's faster 3x3 convolutions.
  os.environ['TF_ENABLE_WINOGRAD_NONFUSED'] = '1'
  values = flags.FLAGS
  if values['verbosity'].using_default_value:
    logging.set_verbosity(logging.INFO)
  model_dir = values.model_dir
  if values.use_synthetic_data and values['model_dir'].using_default_value:
    # Real training must not go on from weights that learned made-up images.
    model_dir += '_synthetic'
  try:
    if len(argv) > 1:
      raise Cifar10Error(f'unknown argument {argv[1]!r}: flags begin with --')
    train_and_evaluate(
        values.data_dir, os.path.normpath(model_dir), values.resnet_size,
        values.train_steps, values.steps_per_eval, values.batch_size,
        values.data_format, values.use_synthetic_data, values.eval_only)
  except Cifar10Error as error:
    sys.exit(f'{os.path.basename(sys.argv[0])}: {error}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
