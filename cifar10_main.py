"""Trains and evaluates a ResNet on CIFAR-10.

    python cifar10_download_and_extract.py
    python cifar10_main.py --resnet_size=32 --train_steps=100000

The CIFAR-10 script of TensorFlow's models repository of 2017, without the
`tf.estimator` under it: recipe, flags, log lines and checkpoints are the same.
In this order: input, model, checkpoints, training, evaluation, export, the run
that joins these, and what starts it: flags, signals, devices, `main`.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: the augmentation.
  [2] The same authors: Identity Mappings in Deep Residual Networks.
      arXiv:1603.05027. The network.
"""

from collections.abc import Callable, Iterable, Iterator
import datetime
import functools
import glob
import os
import platform
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time

if __name__ == '__main__':
  # What TensorFlow reads when it is imported. cuDNN's faster 3x3 convolutions:
  os.environ['TF_ENABLE_WINOGRAD_NONFUSED'] = '1'
  # Of a GPU's memory what is needed, not all at once: others may use the rest.
  os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
  # oneDNN's convolutions, which TensorFlow leaves off on a CPU without AVX-512
  # although they are half as fast again there, and more.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
  # Its log is about itself. Errors arrive as exceptions.
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  # Until there is something to save, Ctrl-C ends it without a traceback.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  # Some notices come before TensorFlow looks at that level.
  if sys.stderr:
    stderr = os.dup(2)
    with open(os.devnull, 'wb') as nothing:
      os.dup2(nothing.fileno(), 2)
    try:
      import tensorflow  # noqa: F401
    finally:
      os.dup2(stderr, 2)
      os.close(stderr)

from absl import app, flags, logging
import numpy as np
import tensorflow as tf

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error
import resnet_model

HEIGHT = 32
WIDTH = 32
DEPTH = 3
NUM_CLASSES = len(cifar10.CLASSES)
NUM_TRAIN_IMAGES = 50000

PADDING = 4  # black pixels on each side, before a random crop to 32x32 [1]
SHUFFLE_RECORDS = int(NUM_TRAIN_IMAGES * 0.4)  # and three batches
PARALLEL_BATCHES = 4  # made at a time, over 100,000 images/s on two cores
PREFETCH_BATCHES = 2  # ready, beside those

WEIGHT_DECAY = 2e-4
MOMENTUM = 0.9
INITIAL_LEARNING_RATE = 0.1  # for a batch of 128, in proportion for others
LEARNING_RATE_DECAYS = {100: 0.1, 150: 0.01, 200: 0.001}  # by epoch

DTYPES = {'fp32': tf.float32, 'bf16': tf.bfloat16, 'fp16': tf.float16}
# Lifts small gradients over the least number that fp16 has. Without it they are
# off by up to 40 %; from 128 to 2**18 by 5 %, as those of bf16.
FP16_LOSS_SCALE = 128

LOG_STEPS = 100  # steps between two log lines
PIECE_SECONDS = 1  # at most, from one look at the clock and signals to the next
KEEP_CHECKPOINTS = 5
NUM_SUMMARY_IMAGES = 6


def filenames(mode: str, data_dir: str) -> list[str]:
  """Returns the paths of the record files for 'train', 'eval' or 'infer'."""
  if os.path.basename(os.path.abspath(data_dir)) != cifar10.FOLDER_NAME:
    data_dir = os.path.join(data_dir, cifar10.FOLDER_NAME)
  names = cifar10.TRAIN_FILES if mode == 'train' else [cifar10.TEST_FILE]
  return [os.path.join(data_dir, name) for name in names]


def synthetic_records(mode: str) -> np.ndarray:
  """Makes the same uint8 [N, 3073] at each call, of classes easy to learn.

  A class is a pattern of coloured 8x8 squares, an image that and noise.
  """
  patterns = np.random.default_rng(0).integers(
      64, 192, [NUM_CLASSES, DEPTH, HEIGHT // 8, WIDTH // 8])
  patterns = patterns.repeat(8, axis=2).repeat(8, axis=3)
  seed, num_records = (1, 5000) if mode == 'train' else (2, 1000)
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, NUM_CLASSES, num_records)
  images = patterns[labels].reshape(num_records, -1)
  images += generator.integers(-64, 64, images.shape)
  return np.column_stack([labels, images]).astype(np.uint8)


def record_dataset(
    records: tf.Tensor, mode: str, batch_size: int, seed: int = 0,
    step: int = 0, steps_per_eval: int = 4000,
    share: slice = slice(None)) -> tf.data.Dataset:
  """Batches records, uint8 [N, 3073], each with its batch's number, int64 [].

  To train: shuffled without end, in each cycle of `steps_per_eval` batches
  anew, by `seed`; begins with batch number `step`. For other modes once and in
  order; the last batch holds the rest. Only `share` of each batch is gathered.
  """
  # Dataset.shuffle mixes the global seed with its own: always the same one. Not
  # 0, with which it fails.
  tf.random.set_seed(1)
  # Shuffles numbers instead of records, which then move once, as a batch.
  numbers = tf.data.Dataset.range(len(records))

  def batches_of(cycle):
    cycle_seed = tf.random.stateless_uniform(
        [], [seed, cycle], None, None, tf.int64)
    shuffled = numbers.repeat().shuffle(
        SHUFFLE_RECORDS + 3 * batch_size, cycle_seed, False)
    return shuffled.batch(batch_size, drop_remainder=True).take(steps_per_eval)

  if mode == 'train':
    cycles = tf.data.Dataset.range(step // steps_per_eval, tf.int64.max)
    batches = cycles.flat_map(batches_of).skip(step % steps_per_eval)
  else:
    batches = numbers.batch(batch_size)
  return batches.enumerate(step).map(
      lambda number, batch: (number, tf.gather(records, batch[share])),
      num_parallel_calls=PARALLEL_BATCHES)


def dataset_parser(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Splits records, uint8 [N, 3073], into images and labels.

  Returns:
    Images, uint8 [N, 32, 32, 3], and one-hot labels, float32 [N, 10].
  """
  images = tf.reshape(records[:, 1:], [-1, DEPTH, HEIGHT, WIDTH])
  labels = tf.cast(records[:, 0], tf.int32)
  return tf.transpose(images, [0, 2, 3, 1]), tf.one_hot(labels, NUM_CLASSES)


def train_preprocess_fn(
    images: tf.Tensor, labels: tf.Tensor, seed: tf.Tensor,
    batch_size: int | None = None, share: slice = slice(None)
    ) -> tuple[tf.Tensor, tf.Tensor]:
  """Pads each image, [N, 32, 32, 3], crops it at random, flips half of them.

  Comes before standardization, so that the padding is black, not mean grey.
  The same seed, int64 [2], draws the same for an image, also where only that
  `share` of the batch is here.
  """
  if batch_size is None:
    batch_size = tf.shape(images)[0]
  # As rows of 96 values: tf.pad takes three times as long for rows of pixels.
  images = tf.reshape(images, [-1, HEIGHT, WIDTH * DEPTH])
  images = tf.pad(
      images, [[0, 0], [PADDING, PADDING], [PADDING * DEPTH, PADDING * DEPTH]])
  corners = 2 * PADDING + 1  # in each direction
  view = tf.random.stateless_uniform(
      [batch_size, 1], seed, 0, corners * corners * 2, tf.int32)[share]
  top, left, flip = view // 2 // corners, view // 2 % corners, view % 2
  rows = top + tf.range(HEIGHT)  # [N, 32]
  columns = left + tf.where(
      flip == 1, tf.range(WIDTH - 1, -1, -1), tf.range(WIDTH))  # [N, 32]
  images = tf.gather(images, rows, axis=1, batch_dims=1)
  images = tf.reshape(images, [-1, HEIGHT, WIDTH + 2 * PADDING, DEPTH])
  return tf.gather(images, columns, axis=2, batch_dims=1), labels


def input_fn(mode: str, data_dir: str | None, batch_size: int,
             use_synthetic_data: bool = False, seed: int = 0, step: int = 0,
             steps_per_eval: int = 4000,
             context: tf.distribute.InputContext | None = None
             ) -> tf.data.Dataset:
  """Reads and checks all records of a mode, and returns them as batches.

  Args:
    mode: 'train': augmented images, shuffled, without end; 'eval' or 'infer':
      the test images, in order.
    data_dir: Folder that holds cifar-10-batches-bin/, or that one itself.
    batch_size: Images per batch.
    use_synthetic_data: Whether to make the records up instead.
    seed: Of shuffle and augmentation, to train. The same seed and step give the
      same batch, wherever the training begins.
    step: How many steps are trained already: batches that are left out.
    steps_per_eval: Batches of a cycle. Each cycle shuffles all records anew, as
      the original's input did, which was started for each.
    context: Of the machine's replicas, which train by turns on what comes: each
      gets its share of the batch.

  Returns:
    Dataset of standardized images, float32 [N, 32, 32, 3], and one-hot labels,
    float32 [N, 10].

  Raises:
    Cifar10Error: A file is missing or damaged.
  """
  if use_synthetic_data:
    parts, source = [synthetic_records(mode)], 'memory'
  else:
    files = filenames(mode, data_dir)
    parts = [cifar10.read_records(file) for file in files]
    source = os.path.dirname(files[0])
  with tf.device('CPU'):
    records = tf.concat(parts, axis=0)
  logging.info('%s records to %s from %s', f'{len(records):,}',
               'train' if mode == 'train' else 'evaluate', source)
  share = slice(None)
  if context:
    size = batch_size // context.num_input_pipelines
    share = slice(size * context.input_pipeline_id,
                  size * (context.input_pipeline_id + 1))

  def preprocess(number, records):
    images, labels = dataset_parser(records)
    if mode == 'train':
      images, labels = train_preprocess_fn(
          images, labels, [seed, number], batch_size, share)
    return tf.image.per_image_standardization(images), labels

  dataset = record_dataset(
      records, mode, batch_size, seed, step, steps_per_eval, share)
  dataset = dataset.map(preprocess, num_parallel_calls=PARALLEL_BATCHES)
  options = tf.data.Options()
  # Rewriting the pipeline would copy the records and gain nothing. Tuning it
  # would gain nothing either, and delay the end of a cycle by a second or more.
  options.experimental_optimization.apply_default_optimizations = False
  options.autotune.enabled = False
  dataset = dataset.with_options(options)
  if context:
    dataset = dataset.rebatch(
        batch_size // context.num_replicas_in_sync, drop_remainder=True)
    # Else the replicas ask each other at each step whether there is more.
    dataset = dataset.apply(
        tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))
  return dataset.prefetch(PREFETCH_BATCHES)


def prefetch_to_gpu(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Copies batches to the GPU, if there is one, before a step takes them."""
  gpus = tf.config.list_logical_devices('GPU')
  if not gpus:
    return dataset
  return dataset.apply(tf.data.experimental.prefetch_to_device(
      gpus[0].name, PREFETCH_BATCHES))


def model_fn(features: tf.Tensor, labels: tf.Tensor | None, mode: str,
             network: resnet_model.Cifar10ResnetV2) -> dict[str, tf.Tensor]:
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
      [initial * decay for decay in (1, *LEARNING_RATE_DECAYS.values())])


class TrainState(tf.Module):
  """All that a checkpoint holds."""

  def __init__(self, network: resnet_model.Cifar10ResnetV2, seed: int = 0):
    super().__init__()
    self.network = network
    self.momentum = [
        tf.Variable(tf.zeros_like(v), False, name=f'{tf1_name(v)}/Momentum')
        for v in network.trainable_variables]
    self.global_step = tf.Variable(0, False, name='global_step', dtype=tf.int64)
    # Not in the original's checkpoints: what draws the batches, and of the
    # batches logged in this cycle the images that were right, and all.
    self.seed = tf.Variable(seed, False, name='seed', dtype=tf.int64)
    self.train_accuracy = tf.Variable(
        [0, 0], False, name='train_accuracy', dtype=tf.int64)


def make_state(resnet_size: int, data_format: str | None, dtype: str,
               seed: int | None) -> TrainState:
  """Returns a new network's state, by a seed that is drawn if None is given.

  Raises:
    Cifar10Error: The device has no such convolutions.
  """
  check_device(data_format, dtype)
  if seed is None:
    seed = np.random.SeedSequence().generate_state(1).item()
  tf.keras.utils.set_random_seed(seed)  # of the initial values
  network = resnet_model.cifar10_resnet_v2_generator(
      resnet_size, NUM_CLASSES, data_format, DTYPES[dtype])
  return TrainState(network, seed)


def check_device(data_format: str | None, dtype: str) -> None:
  """Raises Cifar10Error where the device has no such convolutions."""
  one = tf.ones([1, 1, 1, 1], DTYPES[dtype])
  layout = 'NCHW' if data_format == 'channels_first' else 'NHWC'
  try:
    tf.nn.conv2d(one, one, 1, 'SAME', layout)
  except tf.errors.OpError:
    flag = (f'--dtype={dtype}' if layout == 'NHWC'
            else '--data_format=channels_first')
    raise Cifar10Error(f'{flag} does not run on this device: leave it '
                       'out') from None


def tf1_name(variable: tf.Variable) -> str:
  """Returns the name that the variable has in a TensorFlow 1 checkpoint."""
  return variable.name.removesuffix(':0')


class DamagedError(Cifar10Error):
  """A checkpoint cannot be read."""


class Checkpoints:
  """The checkpoints of a model folder, model.ckpt-STEP.

  They hold the variables side by side, each under its name in the original. So
  do the original's own: one way of reading serves both.
  """

  def __init__(self, model_dir: str, state: TrainState,
               save_seconds: float = 600):
    self._model_dir = model_dir
    self._prefix = os.path.join(model_dir, 'model.ckpt')
    self._variables = {tf1_name(v): v for v in state.variables}
    # It deletes only what it wrote itself: files of 2017 stay, and those that
    # a `checkpoint` file copied from another folder may name.
    checkpoint = tf.train.Checkpoint(**self._variables)
    try:
      self._manager = tf.train.CheckpointManager(
          checkpoint, model_dir, KEEP_CHECKPOINTS, checkpoint_name='model.ckpt')
    except ValueError:  # of what it has read
      raise Cifar10Error(f'{model_dir}/checkpoint is damaged: delete it, the '
                         'model.ckpt-* files are enough') from None
    # A variable, which all machines have to make at the same time: not only
    # when one of them saves.
    self._save_counter = checkpoint.save_counter
    self._save_seconds = save_seconds
    self._saved_at = time.monotonic()
    self.newest = None  # the path of what was last restored or saved

  def steps(self) -> list[int]:
    """Returns the steps of the checkpoints, damaged ones too, newest first.

    The files decide. The list in `checkpoint` beside them may still name the
    folder from which they were moved or copied.
    """
    if not os.path.isdir(self._model_dir):
      return []
    names = '\n'.join(os.listdir(self._model_dir))
    found = re.findall(r'^model\.ckpt-(\d+)\.(?:index|data-\d+-of-\d+)$', names,
                       re.MULTILINE)
    return sorted(set(map(int, found)), reverse=True)

  def restore_newest(self) -> None:
    """Restores the newest that is whole, if there is one.

    Raises:
      Cifar10Error: None is whole, or the newest whole one is of no use.
    """
    steps = self.steps()
    for step in steps:
      try:
        self.restore(f'{self._prefix}-{step}')
        return
      except DamagedError as error:
        logging.warning('%s: trying the one before', error)
    if steps and steps[0] > 0:  # one of step 0 is no loss
      raise Cifar10Error(
          f'{self._model_dir} holds no checkpoint that is not damaged: move '
          'model.ckpt-* away to start anew, or name another --model_dir')

  def restore(self, path: str) -> None:
    """Restores all variables, or raises Cifar10Error and changes none."""
    logging.info('Restoring parameters from %s', path)
    try:
      reader = tf.train.load_checkpoint(path)
      # TensorFlow 2 adds an ending to the names and writes .S for a slash. All
      # are read, those too that are not needed: each has its checksum.
      values = {
          key.partition('/.ATTRIBUTES/')[0].replace('.S', '/'):
          reader.get_tensor(key) for key in reader.get_variable_to_shape_map()}
    except (tf.errors.OpError, RuntimeError, LookupError, ValueError) as error:
      raise DamagedError(f'{path} is damaged ({reason(error)})') from None
    for name in ('seed', 'train_accuracy'):  # not in those of 2017
      values.setdefault(name, self._variables[name].numpy())
    for name, variable in self._variables.items():
      if name not in values or values[name].shape != variable.shape:
        there = list(values[name].shape) if name in values else 'missing'
        raise Cifar10Error(
            f'{path} is of another network ({name} is {there} there and '
            f'{variable.shape.as_list()} here): use {fitting_size(values)}'
            'another --model_dir')
      if not np.isfinite(values[name]).all():
        raise Cifar10Error(
            f'{path} is of no use, {name} is not finite there: move it away to '
            'go on from the one before, or name another --model_dir')
    for name, variable in self._variables.items():
      variable.assign(values[name])
    self.newest = path

  def save(self) -> None:
    """Saves a checkpoint, of which the newest five stay.

    Raises:
      Cifar10Error: A variable is not finite, or the folder cannot be written.
        The older checkpoints stay.
    """
    step = self._variables['global_step'].numpy()
    for name, variable in self._variables.items():
      # The squares too, since of such weights the next loss is not finite.
      with np.errstate(over='ignore'):
        norm = np.linalg.norm(variable.numpy())
      if not np.isfinite(norm):
        raise not_finite(f'{name} is not finite after step {step}, or its norm')
    for left_by_a_killed_run in glob.glob(
        glob.escape(self._prefix) + '-*_temp'):
      shutil.rmtree(left_by_a_killed_run, ignore_errors=True)
    logging.info('Saving checkpoints for %d into %s.', step, self._prefix)
    try:
      self.newest = self._manager.save(checkpoint_number=step)
    except (tf.errors.OpError, OSError) as error:
      raise Cifar10Error(
          f'Cannot save a checkpoint in {self._model_dir} '
          f'({reason(error)}): make room there and start again, the '
          'older checkpoints are whole') from None
    self._saved_at = time.monotonic()

  def is_due(self) -> bool:
    """Tells whether the last save, or the start, is long enough ago."""
    return time.monotonic() - self._saved_at >= self._save_seconds


def fitting_size(names: Iterable[str]) -> str:
  """Returns '--resnet_size=N or ' where variables are those of a ResNet-N."""
  # A convolution for each layer but the last, and three projections.
  size = sum('conv2d' in name and name.endswith('kernel') for name in names) - 2
  fits = resnet_model.is_resnet_size(size)
  return f'--resnet_size={size} or ' if fits else ''


def not_finite(what: str) -> Cifar10Error:
  """Returns the error that ends a run whose numbers overflowed."""
  return Cifar10Error(
      f'{what}, nothing of it is saved: the learning rate is '
      '0.1 * batch_size / 128, try a smaller --batch_size')


def reason(error: Exception) -> str:
  """Returns an error's first line, without the names of graph nodes in it."""
  return re.sub(r'\{\{.*?\}\} ?| \[Op:.*', '', str(error).partition('\n')[0])


def compute_gradients(
    state: TrainState, features: tf.Tensor, labels: tf.Tensor
    ) -> tuple[list[tf.Tensor], dict[str, tf.Tensor]]:
  """Returns a replica's part of the gradients, and of what is logged.

  The sum of the parts of all replicas is that of the whole batch: its mean
  cross entropy, and the weight decay once.
  """
  variables = state.network.trainable_variables
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  scale = FP16_LOSS_SCALE if state.network.dtype == tf.float16 else 1
  with tf.GradientTape() as tape:
    outputs = model_fn(features, labels, 'train', state.network)
    scaled_loss = scale / replicas * outputs['loss']
  gradients = [gradient / scale
               for gradient in tape.gradient(scaled_loss, variables)]
  return gradients, {'cross_entropy': outputs['cross_entropy'] / replicas,
                     'loss': outputs['loss'] / replicas,
                     'correct': tf.cast(outputs['correct'], tf.float32)}


def train_step(state: TrainState, schedule: Callable, compute: Callable,
               features: tf.Tensor, labels: tf.Tensor) -> dict[str, tf.Tensor]:
  """Trains one batch, or a replica's share of it together with the others.

  Args:
    state: What is trained.
    schedule: The learning rate by step.
    compute: compute_gradients, compiled or not, of this state.
    features: Standardized images, float32 [N, 32, 32, 3].
    labels: One-hot, float32 [N, 10].

  Returns:
    What is logged of a step, from before its update: cross_entropy, loss and
    learning_rate, float32 []; correct, int64 []; up to six of the images.
  """
  gradients, values = compute(features, labels)
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  if replicas > 1:
    # Each normalizes its own share of the batch. The moving averages become the
    # mean over the replicas.
    averages = [v for v in state.network.variables if not v.trainable]
    gradients, values, moving = (
        tf.distribute.get_replica_context().all_reduce('SUM', [
            gradients, values, [v.read_value() / replicas for v in averages]]))
    for variable, value in zip(averages, moving):
      variable.assign(value)
  learning_rate = schedule(state.global_step)
  for variable, accum, gradient in zip(
      state.network.trainable_variables, state.momentum, gradients):
    # accum = 0.9 * accum + gradient; variable -= learning_rate * accum. Keras
    # accumulates the learning rate too: other numbers after each of its drops.
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle, accum=accum.handle, lr=learning_rate,
        grad=gradient, momentum=MOMENTUM)
  # Each replica has its own copy, as of the other variables.
  tf.raw_ops.AssignAddVariableOp(
      resource=state.global_step.handle, value=tf.constant(1, tf.int64))
  return {**values, 'correct': tf.cast(values['correct'], tf.int64),
          'learning_rate': learning_rate,
          'images': features[:NUM_SUMMARY_IMAGES]}


def uses_xla(xla: str) -> bool:
  """Tells what the flag --xla means on this device."""
  if xla == 'auto':
    return bool(tf.config.list_logical_devices('GPU'))
  return xla == 'on'


def make_train_step(state: TrainState, batch_size: int,
                    xla: bool = False) -> Callable:
  """Returns train_step as compiled `step(features, labels)`, by XLA or not."""
  schedule = learning_rate_schedule(batch_size)
  compute = functools.partial(compute_gradients, state)
  if tf.distribute.get_strategy().num_replicas_in_sync == 1:
    return tf.function(functools.partial(train_step, state, schedule, compute),
                       jit_compile=xla)
  # XLA cannot compile what the replicas exchange.
  compute = tf.function(compute, jit_compile=xla)
  return functools.partial(train_step, state, schedule, compute)


def make_inner_loop(state: TrainState, batch_size: int,
                    xla: bool = False) -> Callable:
  """Returns the compiled `inner_loop(iterator, num_steps)`.

  It trains and returns the values of the last step and, as `finite_steps`,
  int64 [], after how many steps the loss was not finite any more.
  """
  step = make_train_step(state, batch_size, xla)
  strategy = tf.distribute.get_strategy()
  num_images = min(
      batch_size // strategy.num_replicas_in_sync, NUM_SUMMARY_IMAGES)

  @tf.function
  def inner_loop(iterator, num_steps):
    values = {'cross_entropy': 0.0, 'loss': 0.0, 'learning_rate': 0.0,
              'correct': tf.constant(0, tf.int64),
              'images': tf.zeros([num_images, HEIGHT, WIDTH, DEPTH])}
    finite_steps = tf.constant(0, tf.int64)
    for _ in tf.range(num_steps):
      values = tf.nest.map_structure(
          lambda value: strategy.experimental_local_results(value)[0],
          strategy.run(step, next(iterator)))
      finite_steps += tf.cast(tf.math.is_finite(values['loss']), tf.int64)
    return {**values, 'finite_steps': finite_steps}

  return inner_loop


def train(inner_loop: Callable, iterator: Iterator, state: TrainState,
          cycle_start: int, last_step: int,
          batch_size: int) -> Iterator[tuple[int, float | None, dict]]:
  """Trains up to `last_step` in the cycle that begins after `cycle_start`.

  Yields after each piece of about a second the step; the seconds that a step
  takes of late, None after the first, which may have been compiled; and what is
  to be logged: at the first step of the cycle and every 100 steps from there,
  else {}.

  Raises:
    Cifar10Error: The loss is not finite any more.
  """
  step = state.global_step.numpy().item()
  if step == cycle_start:  # as in the original, anew in each cycle
    state.train_accuracy.assign([0, 0])
  first_step, num_steps, pace, logged_at = step + 1, 1, None, None
  while step < last_step:
    to_next_log = (cycle_start - step) % LOG_STEPS + 1
    num_steps = min(num_steps, to_next_log, last_step - step)
    started = time.perf_counter()
    # A tensor, since each Python number would be traced anew.
    values = inner_loop(iterator, tf.constant(num_steps))
    values = {name: value.numpy() for name, value in values.items()}  # waits
    now = time.perf_counter()
    if values['finite_steps'] < num_steps:
      raise not_finite(
          f'The loss is not finite at step {step + 1 + values["finite_steps"]} '
          f'(looked at after steps {step} and {step + num_steps})')
    step += num_steps
    seconds = (now - started) / num_steps
    if step > first_step:
      pace = 0.9 * (pace or seconds) + 0.1 * seconds
    is_logged = num_steps == to_next_log
    if is_logged:
      # As in the original, the mean over the logged batches of this cycle.
      correct, seen = state.train_accuracy.assign_add(
          [values['correct'], batch_size]).numpy()
      values['train_accuracy'] = np.float32(correct / seen)
      if logged_at is not None:
        values['seconds'] = now - logged_at
        values['global_step/sec'] = LOG_STEPS / values['seconds']
      logged_at = now
    yield step, pace, values if is_logged else {}
    # The speed of the first machine decides for all.
    num_steps = max(1, int(PIECE_SECONDS / seconds))
    num_steps = int(total(num_steps * is_chief()))
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
    # On one chart with the evaluations, which have this name too.
    tf.summary.scalar('accuracy', values['train_accuracy'])
    # An image's mean, zero, becomes grey, its farthest value black or white.
    images = values['images']
    farthest = np.abs(images).max(axis=(1, 2, 3), keepdims=True)
    tf.summary.image('images', 0.5 + 0.5 * images / np.maximum(farthest, 1e-6),
                     max_outputs=NUM_SUMMARY_IMAGES)


def show_progress(step: int, last_step: int, train_steps: int,
                  batch_size: int, seconds: float | None) -> None:
  """Shows on a terminal how far the training is, by the seconds of a step."""
  text = f'Step {step} of {train_steps}'
  if seconds:
    cycle, run = (datetime.timedelta(seconds=round((end - step) * seconds))
                  for end in (last_step, train_steps))
    text += (f', {batch_size / seconds:,.0f} images/s, '
             f'left: {cycle} of the cycle, {run} in all')
  cifar10.show_status(text)


def make_eval_step(network: resnet_model.Cifar10ResnetV2) -> Callable:
  """Returns the compiled `eval_step(iterator, loss, confusion_matrix)`.

  It evaluates a batch and returns the two sums with what that adds to them.
  """

  @tf.function
  def eval_step(iterator, loss, confusion_matrix):
    features, labels = next(iterator)
    outputs = model_fn(features, labels, 'eval', network)
    return loss + outputs['loss'], confusion_matrix + tf.math.confusion_matrix(
        tf.argmax(labels, axis=1), outputs['classes'], NUM_CLASSES,
        dtype=tf.int64)

  return eval_step


def evaluate(eval_step: Callable, dataset: tf.data.Dataset, path: str,
             step: int) -> tuple[dict[str, float], np.ndarray]:
  """Evaluates checkpoint `path` of `step`; logs and prints the results.

  Returns:
    The results: accuracy over all images, loss, the plain mean over the batches
    in which the last one counts like the others although it is short, and
    global_step. And how many images of each label (row) were taken for each
    class (column), int64 [10, 10].
  """
  logging.info('Starting evaluation at %s', time.strftime('%Y-%m-%dT%H:%M:%S'))
  # The variables are in memory already, but people search logs for this line.
  logging.info('Restoring parameters from %s', path)
  # The copy to a GPU does not know its length.
  iterator, num_batches = iter(prefetch_to_gpu(dataset)), len(dataset)
  loss, matrix = tf.zeros([]), tf.zeros([NUM_CLASSES] * 2, tf.int64)
  for batch in range(num_batches):
    cifar10.show_status(f'Evaluating batch {batch + 1} of {num_batches}')
    loss, matrix = eval_step(iterator, loss, matrix)
  loss, matrix = (loss / num_batches).numpy(), matrix.numpy()  # waits
  logging.info('Finished evaluation at %s', time.strftime('%Y-%m-%d-%H:%M:%S'))
  results = {'accuracy': shortest(matrix.trace() / matrix.sum()),
             'loss': shortest(loss), 'global_step': step}
  logging.info('Saving dict for global step %d: %s', step, ', '.join(
      f'{name} = {results[name]}' for name in sorted(results)))
  print(results, flush=True)
  return results, matrix


def write_evaluation(writer: tf.summary.SummaryWriter, results: dict,
                     confusion_matrix: np.ndarray) -> None:
  """Writes what TensorBoard shows of an evaluation, as evaluate returns it."""
  images = confusion_matrix.sum(axis=1, keepdims=True)
  shares = confusion_matrix / np.maximum(images, 1)
  # Squares of 24 pixels, white to black. The root lets a few percent be seen.
  image = 1 - np.sqrt(shares).repeat(24, axis=0).repeat(24, axis=1)
  names = ', '.join(cifar10.CLASSES)
  with writer.as_default(results['global_step']):
    tf.summary.scalar('accuracy', results['accuracy'])
    tf.summary.scalar('loss', results['loss'])
    for name, accuracy in class_accuracies(confusion_matrix).items():
      tf.summary.scalar(f'accuracy_of_class/{name}', accuracy)
    tf.summary.image('confusion_matrix', image[None, ..., None], description=(
        f'A row for each label, a column for each predicted class: {names}. '
        'The more of the row are in a square, the darker it is.'))
  writer.flush()


def class_accuracies(confusion_matrix: np.ndarray) -> dict[str, float]:
  """Returns by class the share of its images that were right, 0 of none."""
  images = np.maximum(confusion_matrix.sum(axis=1), 1)
  return dict(zip(cifar10.CLASSES, confusion_matrix.diagonal() / images))


def shortest(value: float) -> float:
  """Returns the number that prints with no more digits than float32 has."""
  return float(str(np.float32(value)))


def evaluate_only(data_dir: str | None, model_dir: str, resnet_size: int,
                  batch_size: int, data_format: str | None = None,
                  dtype: str = 'fp32', use_synthetic_data: bool = False
                  ) -> None:
  """Evaluates the newest checkpoint; prints the accuracy of each class too.

  Raises:
    Cifar10Error: There is none, or it or the data are not as they should be.
  """
  dataset = input_fn('eval', data_dir, batch_size, use_synthetic_data)
  state = make_state(resnet_size, data_format, dtype, seed=0)
  checkpoints = Checkpoints(model_dir, state)
  checkpoints.restore_newest()
  if checkpoints.newest is None:
    raise Cifar10Error(f'{model_dir} holds no checkpoint to evaluate: train '
                       'first, or name another --model_dir')
  _, confusion_matrix = evaluate(
      make_eval_step(state.network), dataset, checkpoints.newest,
      state.global_step.numpy().item())
  for name, accuracy in class_accuracies(confusion_matrix).items():
    print(f'{name:10} {accuracy:.4f}')


class Classifier(tf.Module):
  """What --export_dir holds: the network behind its standardization."""

  def __init__(self, network: resnet_model.Cifar10ResnetV2):
    super().__init__()
    self._network = network

  @tf.function(input_signature=[
      tf.TensorSpec([None, HEIGHT, WIDTH, DEPTH], tf.uint8, 'images')])
  def __call__(self, images):
    outputs = model_fn(tf.image.per_image_standardization(images), None,
                       'infer', self._network)
    return {**outputs, 'class_names': tf.gather(
        cifar10.CLASSES, outputs['classes'])}


def export(model_dir: str, export_dir: str, resnet_size: int,
           dtype: str) -> None:
  """Writes the newest checkpoint as a SavedModel, complete in itself.

  Its `serving_default` takes images, uint8 [N, 32, 32, 3], as they are. It
  returns classes, int64 [N], class_names of these, string [N], and
  probabilities, float32 [N, 10].

  Raises:
    Cifar10Error: There is no room.
  """
  # Not every device has convolutions with the channels first.
  state = make_state(resnet_size, 'channels_last', dtype, seed=0)
  checkpoints = Checkpoints(model_dir, state)
  checkpoints.restore_newest()
  try:
    tf.saved_model.save(Classifier(state.network), export_dir)
  except (OSError, tf.errors.OpError) as error:
    shutil.rmtree(export_dir, ignore_errors=True)  # a part of it
    raise Cifar10Error(
        f'Cannot export to {export_dir} ({reason(error)}): make room and run '
        'this again with --eval_only, or name another folder') from None
  logging.info('Exported %s to %s', checkpoints.newest, export_dir)


def train_and_evaluate(
    data_dir: str | None, model_dir: str, resnet_size: int, train_steps: int,
    steps_per_eval: int, batch_size: int, save_checkpoints_secs: int = 600,
    data_format: str | None = None, dtype: str = 'fp32', xla: str = 'auto',
    seed: int | None = None, use_synthetic_data: bool = False,
    flag_values: dict | None = None,
    interrupted: Callable[[], bool] = lambda: False) -> bool:
  """Trains and evaluates in turn, up to `train_steps` in all.

  Goes on from the newest checkpoint in `model_dir`. In the scope of a
  tf.distribute strategy, all its replicas share each batch.

  Args:
    flag_values: What TensorBoard is to show as the flags of the run.
    interrupted: Is asked after each piece of about a second whether to save and
      return. The others are the flags of the same names.

  Returns:
    Whether all is done: False if it was interrupted, here or elsewhere.

  Raises:
    Cifar10Error: Data, checkpoint or model folder are not as they should be, or
      the loss is not finite any more.
    OSError: The model folder cannot be written.
  """
  eval_data = input_fn('eval', data_dir, batch_size, use_synthetic_data)
  state = make_state(resnet_size, data_format, dtype, seed)
  checkpoints = Checkpoints(model_dir, state, save_checkpoints_secs)
  steps_there = checkpoints.steps()
  checkpoints.restore_newest()
  if tf.distribute.get_strategy().num_replicas_in_sync > 1:
    take_from_chief(state.variables)
  run_seed = state.seed.numpy().item()
  if seed not in (None, run_seed):
    raise Cifar10Error(f'{model_dir} was trained with --seed={run_seed}, not '
                       f'{seed}: leave it out, or name another --model_dir')
  step = state.global_step.numpy().item()
  train_data = distributed_input(batch_size, functools.partial(
      input_fn, 'train', data_dir, batch_size, use_synthetic_data, run_seed,
      step, steps_per_eval))
  with cifar10.sole_use(model_dir):
    if checkpoints.steps() != steps_there:
      raise Cifar10Error(f'Another run has just saved in {model_dir}: start '
                         'again, or name another --model_dir')
    facts = describe_run(state, resnet_size, xla, train_steps, batch_size)
    train_writer = tf.summary.create_file_writer(model_dir)
    eval_writer = tf.summary.create_file_writer(os.path.join(model_dir, 'eval'))
    with train_writer.as_default(step):
      facts.update(flag_values or {})
      tf.summary.text('run', '\n'.join(['| | |', '|---|---|', *(
          f'| {name} | {value} |' for name, value in facts.items())]))
    eval_step = make_eval_step(state.network)

    def evaluate_now(step):
      write_evaluation(eval_writer, *evaluate(
          eval_step, eval_data, checkpoints.newest, step))
      train_writer.flush()

    if checkpoints.newest is None:
      checkpoints.save()
    # One input for all cycles: the next one's first batches are ready when an
    # evaluation ends.
    return run_cycles(
        state, checkpoints, iter(train_data), train_steps, steps_per_eval,
        batch_size, uses_xla(xla), evaluate_now, interrupted,
        [log_values, functools.partial(write_summaries, train_writer)])


def run_cycles(
    state: TrainState, checkpoints: Checkpoints, iterator: Iterator,
    train_steps: int, steps_per_eval: int, batch_size: int, xla: bool,
    evaluate_now: Callable[[int], None], interrupted: Callable[[], bool],
    hooks: list[Callable[[int, dict], None]]) -> bool:
  """Trains, saves and evaluates; returns False where it was interrupted."""
  inner_loop = make_inner_loop(state, batch_size, xla)
  cifar10.show_status('Building the training step')
  step = state.global_step.numpy().item()
  while True:
    # A run that was killed at the end of a cycle still owes its evaluation.
    if is_chief() and (
        step >= train_steps or (step and step % steps_per_eval == 0)):
      evaluate_now(step)
    if step >= train_steps:
      return True
    # Cycles end at multiples of steps_per_eval, after an interruption too.
    cycle_start = step - step % steps_per_eval
    last_step = min(cycle_start + steps_per_eval, train_steps)
    for step, pace, values in train(
        inner_loop, iterator, state, cycle_start, last_step, batch_size):
      for hook in hooks if values else ():
        hook(step, values)
      show_progress(step, last_step, train_steps, batch_size, pace)
      stop = total(int(interrupted()))
      if stop or step == last_step or checkpoints.is_due():
        checkpoints.save()
      if stop:
        logging.warning('Stopped after step %d, saved as %s: the same command '
                        'goes on from there', step, checkpoints.newest)
        return False


def is_chief() -> bool:
  """Tells whether this is, of all machines, the one that saves and prints."""
  return tf.distribute.get_strategy().extended.should_checkpoint


def total(value: np.ndarray | int) -> np.ndarray | int:
  """Returns the sum of the machines' values; all have to call this."""
  strategy = tf.distribute.get_strategy()
  if strategy.num_replicas_in_sync == 1:
    return value
  value = tf.constant(value)
  replicas_here = len(strategy.extended.worker_devices)
  values = strategy.experimental_distribute_values_from_function(
      lambda context: value if (
          context.replica_id_in_sync_group % replicas_here == 0
          ) else tf.zeros_like(value))
  return strategy.reduce('SUM', values, axis=None).numpy()


def take_from_chief(variables: Iterable[tf.Variable]) -> None:
  """Gives all machines the values of the first one."""
  for variable in variables:
    variable.assign(total(variable.numpy() * is_chief()))


def distributed_input(batch_size: int, make_dataset: Callable) -> Iterable:
  """Returns a dataset of which each replica gets its share.

  Raises:
    Cifar10Error: The batch cannot be shared out evenly.
  """
  strategy = tf.distribute.get_strategy()
  replicas = strategy.num_replicas_in_sync
  if replicas == 1:
    return prefetch_to_gpu(make_dataset())
  if batch_size % replicas:
    raise Cifar10Error(f'--batch_size={batch_size} is no multiple of the '
                       f'{replicas} replicas that share it: make it one')
  return strategy.distribute_datasets_from_function(
      lambda context: make_dataset(context=context))


def describe_run(state: TrainState, resnet_size: int, xla: str,
                 train_steps: int, batch_size: int) -> dict:
  """Logs what the run will use and do; returns what it uses, by name."""
  device = f'CPU ({platform.machine()}, {os.cpu_count()} cores)'
  for gpu in tf.config.get_visible_devices('GPU')[:1]:
    details = tf.config.experimental.get_device_details(gpu)
    device = details.get('device_name', 'GPU')
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  if replicas > 1:
    device = f'{replicas} replicas: {device}'
  network = state.network
  parameters = sum(v.shape.num_elements() for v in network.trainable_variables)
  facts = {
      'network': f'ResNet-{resnet_size}, {parameters:,} parameters, '
                 f'{network.data_format}, {network.dtype.name}',
      'XLA': 'on' if uses_xla(xla) else 'off', 'device': device,
      'seed': state.seed.numpy(), 'TensorFlow': tf.__version__,
      'NumPy': np.__version__, 'Python': platform.python_version()}
  logging.info('%(network)s, XLA %(XLA)s, on %(device)s, seed %(seed)d', facts)
  step = state.global_step.numpy()
  if step >= train_steps:
    logging.info('All %d steps are trained already: only evaluating. A higher '
                 '--train_steps would train on', train_steps)
  else:
    logging.info(
        'Training steps %d to %d, batch size %d. The learning rate drops after '
        'steps %d, %d and %d', step + 1, train_steps, batch_size,
        *learning_rate_schedule(batch_size).boundaries)
  return facts


def define_flags() -> None:
  """Defines the flags of this script."""
  cifar10.define_data_dir()
  flags.declare_key_flag('data_dir')  # for --help to list it here too
  flags.DEFINE_string(
      'model_dir', '/tmp/cifar10_model',
      'Folder of the checkpoints and TensorBoard events. By default, synthetic '
      'data has a folder of its own, with _synthetic behind the name.')
  flags.DEFINE_integer('resnet_size', 32, 'Depth of the network, 6n + 2.')
  flags.register_validator('resnet_size', resnet_model.is_resnet_size,
                           'must be 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...')
  flags.DEFINE_integer(
      'train_steps', 100000,
      'Batches to train in all, earlier runs in model_dir included.', 1)
  flags.DEFINE_integer(
      'steps_per_eval', 4000, 'Batches between evaluations.', 1)
  flags.DEFINE_integer(
      'batch_size', 128,
      'Images per batch. The learning rate is in proportion to it.',
      1, NUM_TRAIN_IMAGES)
  flags.DEFINE_integer(
      'save_checkpoints_secs', 600,
      'Seconds between checkpoints, beside those at the ends of cycles.', 1)
  flags.DEFINE_enum(
      'data_format', None, ['channels_first', 'channels_last'],
      'Layout of the images in the network. By default the faster one: '
      'channels_first on a GPU, channels_last on a CPU.')
  flags.DEFINE_enum(
      'dtype', 'fp32', list(DTYPES),
      'Numbers in the convolutions. Variables, statistics and loss are fp32.')
  flags.DEFINE_enum(
      'xla', 'auto', ['auto', 'on', 'off'],
      'Compile the training step by XLA. auto: on a GPU, not on a CPU.')
  flags.DEFINE_integer(
      'num_gpus', None,
      'GPUs to use on this machine, which share each batch. -1: all, 0: the '
      'CPU. By default one, if there is one.', -1)
  flags.DEFINE_integer(
      'seed', None,
      'Draws the initial values and the batches. A run with a seed can be '
      'repeated exactly; without one it draws one and logs it.', 0, 2**32 - 1)
  flags.DEFINE_bool(
      'use_synthetic_data', False,
      'Train and evaluate on made-up images: needs no data and no network.')
  flags.DEFINE_bool(
      'eval_only', False,
      'Only evaluate the newest checkpoint, and print how each class does.')
  flags.DEFINE_string(
      'export_dir', None,
      'New folder for a SavedModel, written after the training or, with '
      '--eval_only, without it.')
  for name in ('model_dir', 'export_dir'):
    cifar10.register_path_validator(name)


def note_signals() -> list[int]:
  """Lets the first SIGTERM or SIGINT only be noted, in the list returned.

  A second one ends the process at once.
  """
  noted = []
  receiver, sender = socket.socketpair()

  def wait():
    noted.extend(receiver.recv(1))
    logging.warning('Stopping, to save first. A second signal ends at once')
    os._exit(128 + receiver.recv(1)[0])

  # In a thread, since the main one sees no signal before TensorFlow returns to
  # it. The handler itself has nothing left to do.
  threading.Thread(target=wait, daemon=True).start()
  sender.setblocking(False)
  signal.set_wakeup_fd(sender.detach())
  for number in (signal.SIGTERM, signal.SIGINT):
    signal.signal(number, lambda number, frame: None)
  return noted


def make_strategy(num_gpus: int | None) -> tf.distribute.Strategy:
  """Returns what spreads the training: over GPUs, or over machines.

  The machines are those that the environment variable TF_CONFIG names.

  Raises:
    Cifar10Error: There are not so many GPUs, or TF_CONFIG cannot be read.
  """
  gpus = tf.config.list_physical_devices('GPU')
  if num_gpus is None:
    num_gpus = min(1, len(gpus))
  if num_gpus > len(gpus):
    raise Cifar10Error(f'--num_gpus={num_gpus} is more than the {len(gpus)} '
                       'that TensorFlow finds here: lower it, or leave it out')
  if num_gpus >= 0:
    gpus = gpus[:num_gpus]
  tf.config.set_visible_devices(gpus, 'GPU')
  try:
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    machines = sum(map(len, resolver.cluster_spec().as_dict().values()))
    if machines > 1:
      return tf.distribute.MultiWorkerMirroredStrategy(resolver)
  except (ValueError, TypeError, KeyError, AttributeError,
          tf.errors.OpError) as error:
    raise Cifar10Error('TF_CONFIG names no cluster of workers '
                       f'({reason(error)}): correct or unset it') from None
  if len(gpus) > 1:
    return tf.distribute.MirroredStrategy(
        [f'GPU:{i}' for i in range(len(gpus))])
  return tf.distribute.get_strategy()


def warn_of_idle_gpu() -> None:
  """Logs how to use a GPU that is there but that TensorFlow cannot use."""
  if (tf.config.list_physical_devices('GPU')
      or not tf.test.is_built_with_cuda() or not shutil.which('nvidia-smi')
      or os.environ.get('CUDA_VISIBLE_DEVICES', '0') in ('', '-1')):
    return
  listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True, text=True,
                          check=False).stdout
  if listed.startswith('GPU '):
    logging.warning(
        'TensorFlow cannot use the GPU of this machine, its libraries are '
        'missing or do not fit: pip install "tensorflow[and-cuda]" brings them')


def log_filter(record: object) -> bool:
  """Lets a line of the log take the place of the status.

  Not a notice of TensorFlow's, as that of how long a save took.
  """
  if record.levelname == 'INFO' and record.pathname != __file__:
    return False
  cifar10.show_status()
  return True


def run(values: flags.FlagValues, strategy: tf.distribute.Strategy,
        model_dir: str, interrupted: Callable[[], bool]) -> bool:
  """Does what the flags ask for; returns False if it was interrupted."""
  with strategy.scope():
    chief = is_chief()
  if values['verbosity'].using_default_value:
    logging.set_verbosity(logging.INFO if chief else logging.WARNING)
  export_dir = values.export_dir if chief else None
  if values.num_gpus != 0:
    warn_of_idle_gpu()
  if export_dir and os.path.lexists(export_dir):
    raise Cifar10Error(f'--export_dir={export_dir} is there already: name a '
                       'new folder, or remove it')
  finished = True
  if not values.eval_only:
    flag_values = {f'--{flag.name}': flag.value
                   for flag in values.get_key_flags_for_module(
                       values.find_module_defining_flag('model_dir'))}
    with strategy.scope(), tempfile.TemporaryDirectory() as scratch:
      if not chief:
        logging.warning('The first machine logs, saves and prints')
      finished = train_and_evaluate(
          values.data_dir, model_dir if chief else scratch, values.resnet_size,
          values.train_steps, values.steps_per_eval, values.batch_size,
          values.save_checkpoints_secs, values.data_format, values.dtype,
          values.xla, values.seed, values.use_synthetic_data, flag_values,
          interrupted)
      total(0)  # no machine leaves before all have written
  elif chief:
    evaluate_only(
        values.data_dir, model_dir, values.resnet_size, values.batch_size,
        values.data_format, values.dtype, values.use_synthetic_data)
  if finished and export_dir:
    export(model_dir, export_dir, values.resnet_size, values.dtype)
  return finished


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  tf.get_logger().setLevel('ERROR')  # the rest is of no use to the user
  logging.get_absl_handler().addFilter(log_filter)
  if values.seed is not None:
    tf.config.experimental.enable_op_determinism()
  model_dir = os.path.normpath(values.model_dir)
  if values.use_synthetic_data and values['model_dir'].using_default_value:
    # Real training must not go on from weights that learned made-up images.
    model_dir += '_synthetic'
  try:
    if len(argv) > 1:
      raise Cifar10Error(f'unknown argument {argv[1]!r}: flags begin with --')
    strategy = make_strategy(values.num_gpus)
    signals = note_signals()  # now, since a cluster handles SIGTERM otherwise
    if run(values, strategy, model_dir, lambda: bool(signals)) and not signals:
      return 0
    return 128 + (signals or [signal.SIGTERM])[0]
  except Cifar10Error as error:
    message = str(error)
  except OSError as error:
    message = (f'Cannot write to {model_dir} ({error.strerror}): name another '
               '--model_dir')
  except tf.errors.ResourceExhaustedError:
    message = 'The device has too little memory: try a smaller --batch_size'
  except tf.errors.OpError as error:
    if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
      raise
    message = (f'Another machine does not answer ({reason(error)}): start all '
               'again, they go on from the last checkpoint')
  finally:
    cifar10.show_status()
  return sys.exit(f'{os.path.basename(sys.argv[0])}: {message}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
