"""Trains and evaluates a ResNet on CIFAR-10.

    python cifar10_download_and_extract.py
    python cifar10_main.py --resnet_size=32 --train_steps=100000

A port of the CIFAR-10 script in TensorFlow's models repository of 2017 to plain
TensorFlow 2. Recipe, flags, log lines and checkpoints are the original's.

Flags by purpose:
  training       --train_steps --steps_per_eval --batch_size --resnet_size
                 --seed
  use            --eval_only --predict --export_dir
  folders        --data_dir --model_dir --save_checkpoints_secs
  device, speed  --num_gpus --dtype --data_format --xla
  without data   --use_synthetic_data

The code goes from the settings to the command line: settings and flags, log and
signals, machines, input, model, checkpoints, training, hooks, evaluation,
export, the run with its loop, prediction, devices, command. Each uses what
stands above it.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: the augmentation.
"""

from collections.abc import Callable, Iterable, Iterator
import contextlib
import dataclasses
import functools
import glob
import logging as python_logging
import os
import platform
import re
import shutil
import signal
import socket
import struct
import sys
import tempfile
import threading
import time
import zlib

from absl import app, flags, logging

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error, reason

DTYPES = {'fp32': 'float32', 'bf16': 'bfloat16', 'fp16': 'float16'}
MAX_STEPS = 10**15
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = (
    len(cifar10.TRAIN_FILES) * cifar10.RECORDS_PER_FILE)


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is to do. Each field is the flag of the same name.

  Raises:
    ValueError: A field has a value that the flag would not take.
  """
  data_dir: str = '/tmp/cifar10_data'
  model_dir: str = '/tmp/cifar10_model'
  resnet_size: int | None = None  # the newest checkpoint's; 32 in a new folder
  train_steps: int = 100000
  steps_per_eval: int = 4000
  batch_size: int = 128
  save_checkpoints_secs: int = 600
  data_format: str | None = None  # the faster one on the device
  dtype: str = 'fp32'
  xla: str = 'auto'
  seed: int | None = None  # random
  use_synthetic_data: bool = False

  def __post_init__(self):
    parsed = flags.FlagValues()
    define_flags(parsed)
    try:  # the flags have the rules
      parsed(['Settings', *(f'--{name}={value}' for name, value
                            in vars(self).items() if value is not None)])
    except flags.Error as error:
      raise ValueError(str(error)) from None
    for name in vars(self):
      object.__setattr__(self, name, parsed[name].value)
    # Real training must not go on from weights that learned generated images.
    if self.use_synthetic_data and self.model_dir == Settings.model_dir:
      object.__setattr__(self, 'model_dir', f'{self.model_dir}_synthetic')


def define_flags(values: flags.FlagValues = flags.FLAGS) -> None:
  """Defines the flags of this script."""
  if 'model_dir' in values:  # a second %run in a notebook
    values.unparse_flags()
    return
  integer, choice, switch = (
      functools.partial(define, flag_values=values) for define in (
          flags.DEFINE_integer, flags.DEFINE_enum, flags.DEFINE_bool))
  path = functools.partial(
      flags.DEFINE, cifar10.PathParser(), flag_values=values)
  path('data_dir', Settings.data_dir, 'Folder that contains '
       f'{cifar10.FOLDER_NAME}/.', allow_override=True)  # the download's, too
  path('model_dir', Settings.model_dir, 'Folder of checkpoints and TensorBoard '
       'events. With --use_synthetic_data the default ends with _synthetic.')
  integer('resnet_size', Settings.resnet_size,
          'Depth of the network, 6n + 2: 8, 14, 20, ... The default is that of '
          'the newest checkpoint in --model_dir, and 32 in a new folder.')
  flags.register_validator(
      'resnet_size', lambda n: n is None or (n >= 8 and n % 6 == 2),
      'must be 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...', values)
  integer('train_steps', Settings.train_steps,
          'Training steps (batches) in total.', 1, MAX_STEPS)
  integer('steps_per_eval', Settings.steps_per_eval,
          'Training steps between evaluations.', 1, MAX_STEPS)
  integer('batch_size', Settings.batch_size,
          'Images per batch. The learning rate scales with it.',
          1, NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
  integer('save_checkpoints_secs', Settings.save_checkpoints_secs,
          'Seconds between checkpoints. Each cycle also ends with one.', 0)
  choice('data_format', Settings.data_format,
         ['channels_first', 'channels_last'], 'Layout of the images in the '
         'network. The default is channels_first on a GPU, else channels_last.')
  choice('dtype', Settings.dtype, list(DTYPES),
         'Number type of convolutions and activations. Variables, statistics '
         'of batch norm and logits are always fp32.')
  choice('xla', Settings.xla, ['auto', 'on', 'off'],
         'Compile the training step with XLA. auto: on a GPU only.')
  switch('eval_only', False, 'Only evaluate the newest checkpoint and print '
         'the accuracy of each class.')
  flags.DEFINE_list(
      'predict', None, 'Only print the likeliest classes of these pictures, by '
      'the newest checkpoint: cat.jpg,dog.png. JPEG, PNG, GIF, BMP or WebP.',
      flag_values=values)
  flags.register_validator(
      'predict', lambda paths: paths is None or (paths and all(paths)),
      'must name pictures, with commas between them', values)
  integer('num_gpus', None, 'GPUs of this machine that share each batch: -1 '
          'all, 0 none. The default is one, if there is one.', -1)
  integer('seed', Settings.seed, 'Seed of initial values and batches, to '
          'repeat a run exactly. The default is random, and logged.',
          0, 2**32 - 1)
  switch('use_synthetic_data', Settings.use_synthetic_data,
         'Train and evaluate on generated images: no data needed.')
  path('export_dir', None, 'New folder for a SavedModel, written after '
       'training or with --eval_only.')
  flags.register_multi_flags_validator(
      ['predict', 'eval_only', 'export_dir'], lambda given: not (
          given['predict'] and (given['eval_only'] or given['export_dir'])),
      'use --predict alone', values)


if __name__ == '__main__':
  cifar10.open_standard_streams()
  # Bad flags and --help are answered before TensorFlow, which takes seconds.
  define_flags()
  app.define_help_flags()
  app.parse_flags_with_usage(sys.argv)
  # Until there is something to save, Ctrl-C simply ends the process.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  cifar10.show_status('Loading TensorFlow')
  with cifar10.errors_in_one_line(), cifar10.quiet_import():
    try:
      import tensorboard  # noqa: F401
      import tensorflow
      if tuple(map(int, tensorflow.__version__.split('.')[:2])) < (2, 16):
        raise ImportError(f'TensorFlow {tensorflow.__version__} is too old')
    except ImportError as error:
      raise Cifar10Error(f'{error}: pip install -r requirements.txt brings '
                         'what this needs') from None

import numpy as np
import tensorflow as tf

import resnet_model
from resnet_model import Cifar10ResnetV2, tf1_name

HEIGHT, WIDTH, DEPTH = resnet_model.IMAGE_SHAPE
NUM_CLASSES = len(cifar10.CLASSES)

PADDING = 4  # black pixels on each side, before a random crop to 32x32 [1]
NUM_CORNERS = 2 * PADDING + 1  # places of a crop in each direction
NUM_VIEWS = NUM_CORNERS * NUM_CORNERS * 2  # crops of an image, flipped or not
SHUFFLE_RECORDS = int(NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN * 0.4)  # + 3 batches
PARALLEL_BATCHES = 4  # prepared at a time: over 100,000 images/s on two cores
PREFETCH_BATCHES = 2  # kept ready, in addition to those
WEIGHT_DECAY = 2e-4  # [1]: 1e-4
MOMENTUM = 0.9
INITIAL_LEARNING_RATE = 0.1  # for a batch of 128; scales with the batch size
# By epochs trained; 100,000 steps are 256. [1] drops at 82 and 123 of 164.
LEARNING_RATE_DROPS = {100: 0.1, 150: 0.01, 200: 0.001}
# Keeps small gradients above fp16's smallest number. Without it they are wrong
# by up to 40 %; with any scale from 128 to 2**18 by 5 %, like bf16's.
FP16_LOSS_SCALE = 128
KEEP_CHECKPOINTS = 5
LOG_STEPS = 100  # steps between two log lines
PIECE_SECONDS = 1  # training time between two looks at clock and signals
NUM_SUMMARY_IMAGES = 6
WHEN_NOT_FINITE = (', nothing of it is saved: the learning rate is 0.1 * '
                   'batch_size / 128, try a smaller --batch_size')
# What reading a damaged checkpoint raises.
READ_ERRORS = (tf.errors.OpError, RuntimeError, LookupError, ValueError)
# What an operation, a type or XLA raises that the device does not have.
CANNOT_COMPUTE = (tf.errors.UnimplementedError, tf.errors.InternalError,
                  tf.errors.NotFoundError)

# By its name, show_log tells this script's lines from those of other packages.
log = logging.get_absl_logger().getChild('cifar10')


def show_log() -> None:
  """Shows the log lines, with the prefix they had in 2017, and nothing else."""
  logging.use_absl_handler()
  flags.FLAGS.mark_as_parsed()  # in a notebook absl would complain
  if flags.FLAGS['verbosity'].using_default_value:  # app.run sets it just once
    logging.set_verbosity(logging.INFO)
  # The rest of TensorFlow's notices does not help the user.
  python_logging.getLogger('tensorflow').setLevel('ERROR')
  handler = logging.get_absl_handler()
  handler.setFormatter(
      python_logging.Formatter('%(levelname)s:tensorflow:%(message)s'))

  def filter_line(record):
    cifar10.show_status()  # the line takes its place
    return record.name == log.name or record.levelname != 'INFO'

  handler.addFilter(filter_line)


class StopRequest:
  """Tells, when called, whether a signal has asked to stop.

  Until the first call there is nothing to save: a signal does what it usually
  does. So does the second one. Only the main thread can ask for signals.
  """

  def __init__(self, *names: str):
    self.signal, self._names, self._usual = None, names, {}

  def __call__(self) -> bool:
    is_main = threading.current_thread() is threading.main_thread()
    if is_main and not self._usual:
      for number in (getattr(signal, name, None) for name in self._names):
        # Not those that nohup or a shell lets be ignored; Windows lacks some.
        if number and signal.getsignal(number) in (
            signal.SIG_DFL, signal.default_int_handler):
          self._usual[number] = signal.signal(number, self._receive)
    return self.signal is not None

  def _receive(self, number, frame):
    self.signal = number
    self.end()
    log.warning('Stopping. A second signal ends at once')

  def end(self) -> None:
    """Lets signals do again what they usually do."""
    for number, usual in self._usual.items():
      signal.signal(number, usual)


def is_chief() -> bool:
  """Returns whether this is the first machine, which saves and prints."""
  return tf.distribute.get_strategy().extended.should_checkpoint


def total(value: np.ndarray | int) -> np.ndarray | int:
  """Returns the sum of the machines' values; all machines have to call this."""
  strategy = tf.distribute.get_strategy()
  if strategy.num_replicas_in_sync == 1:
    return value
  replicas_here = len(strategy.extended.worker_devices)
  values = strategy.experimental_distribute_values_from_function(
      lambda context: tf.constant(
          value * (context.replica_id_in_sync_group % replicas_here == 0)))
  return strategy.reduce('SUM', values, axis=None).numpy()


def require_same(facts: dict) -> None:
  """Raises Cifar10Error on all machines if they differ in these values."""
  ours = np.array([zlib.crc32(repr(fact).encode()) for fact in facts.values()])
  differ = total((ours != total(ours * is_chief())).astype(int))
  names = [name for name, number in zip(facts, differ) if number]
  if names:
    raise Cifar10Error(f'The machines differ in {", ".join(names)}: start all '
                       'with the same')


def check_mode(mode: str) -> None:
  """Raises ValueError unless the mode is 'train', 'eval' or 'infer'."""
  if mode not in ('train', 'eval', 'infer'):
    raise ValueError(f"mode must be 'train', 'eval' or 'infer', not {mode!r}")


def filenames(mode: str, data_dir: str) -> list[str]:
  """Returns the paths of the record files for 'train', 'eval' or 'infer'."""
  check_mode(mode)
  folder = cifar10.batches_folder(data_dir)
  names = cifar10.TRAIN_FILES if mode == 'train' else [cifar10.TEST_FILE]
  return [os.path.join(folder, name) for name in names]


def record_dataset(
    num_records: int, mode: str, settings: Settings, seed: int = 0,
    step: int = 0, context: tf.distribute.InputContext | None = None
    ) -> tf.data.Dataset:
  """Draws the records of each batch and, for training, how they are augmented.

  It shuffles and shares out numbers; images move only when they are gathered.

  Args:
    mode: 'train': shuffled, without end; else in order, the last batch short.
    settings: Its batch_size and, as each cycle shuffles anew, steps_per_eval.
    seed: With the step, determines a batch wherever training began.
    step: Number of batches to skip: those trained already.
    context: Which share of the batches this machine takes; by default all.

  Returns:
    Dataset of record numbers, int64 [N], and, for training, views, int32 [N].
  """
  numbers = tf.data.Dataset.range(num_records)
  batch_size, steps_per_eval = settings.batch_size, settings.steps_per_eval
  if mode != 'train':
    return numbers.batch(batch_size)

  def batches_of(cycle):
    cycle_seed = tf.random.stateless_uniform(
        [], [seed, cycle], None, None, tf.int64)
    # What numbers.shuffle draws from this seed when the global one is 1. But
    # shuffle has a state, and because of it no batch would be prepared ahead or
    # in parallel when ops are deterministic, as with --seed.
    shuffled = tf.data.experimental.from_variant(tf.raw_ops.ShuffleDataset(
        input_dataset=tf.data.experimental.to_variant(numbers.repeat()),
        buffer_size=SHUFFLE_RECORDS + 3 * batch_size, seed=1,
        seed2=cycle_seed % tf.int32.max, reshuffle_each_iteration=False,
        output_types=[tf.int64], output_shapes=[[]]), numbers.element_spec)
    return shuffled.batch(batch_size, drop_remainder=True).take(steps_per_eval)

  cycles = tf.data.Dataset.range(step // steps_per_eval, tf.int64.max)
  batches = cycles.flat_map(batches_of).skip(step % steps_per_eval)
  batches = batches.enumerate(step).map(lambda step, numbers: (
      numbers, tf.random.stateless_uniform(
          [batch_size], [seed, step], 0, NUM_VIEWS, tf.int32)))
  context = context or tf.distribute.InputContext()
  shares = batches.rebatch(batch_size // context.num_replicas_in_sync, True)
  shares = shares.shard(context.num_input_pipelines, context.input_pipeline_id)
  # Otherwise the replicas ask each other before each step if there is more.
  return shares.apply(
      tf.data.experimental.assert_cardinality(tf.data.INFINITE_CARDINALITY))


def dataset_parser(records: tf.Tensor) -> tuple[tf.Tensor, tf.Tensor]:
  """Splits records, uint8 [N, 3073], into images and one-hot labels."""
  images = tf.reshape(records[:, 1:], [-1, DEPTH, HEIGHT, WIDTH])
  labels = tf.cast(records[:, 0], tf.int32)
  # [N, 32, 32, 3] and [N, 10]
  return tf.transpose(images, [0, 2, 3, 1]), tf.one_hot(labels, NUM_CLASSES)


def train_preprocess_fn(images: tf.Tensor, views: tf.Tensor) -> tf.Tensor:
  """Pads images, [N, 32, 32, 3], crops them to 32x32 again and flips some [1].

  Each view, int32 [N], is (9 * top + left) * 2 for the crop, plus 1 to flip it.
  Standardization comes later, so the padding is black, not the mean grey.
  """
  # As rows of 96 values: tf.pad takes three times as long for rows of pixels.
  images = tf.reshape(images, [-1, HEIGHT, WIDTH * DEPTH])
  images = tf.pad(
      images, [[0, 0], [PADDING, PADDING], [PADDING * DEPTH, PADDING * DEPTH]])
  corner, flip = views[:, tf.newaxis] // 2, views[:, tf.newaxis] % 2
  rows = corner // NUM_CORNERS + tf.range(HEIGHT)  # [N, 32]
  columns = corner % NUM_CORNERS + tf.where(
      flip == 1, tf.range(WIDTH - 1, -1, -1), tf.range(WIDTH))  # [N, 32]
  images = tf.gather(images, rows, axis=1, batch_dims=1)
  images = tf.reshape(images, [-1, HEIGHT, WIDTH + 2 * PADDING, DEPTH])
  return tf.gather(images, columns, axis=2, batch_dims=1)


def input_fn(mode: str, settings: Settings, *order) -> tf.data.Dataset:
  """Reads and checks all records of a mode, and returns them as batches.

  Args:
    mode: 'train': augmented images, shuffled, without end; 'eval' or 'infer':
      the test images, in order.
    settings: Where the records are, and how many images are in a batch.
    *order: For training: seed, step and context of record_dataset.

  Returns:
    Dataset of standardized images, float32 [N, 32, 32, 3], and one-hot labels,
    float32 [N, 10].

  Raises:
    Cifar10Error: A file is missing or damaged.
  """
  check_mode(mode)
  if settings.use_synthetic_data:
    parts, source = [cifar10.synthetic_records(mode)], 'memory'
  else:
    files = filenames(mode, settings.data_dir)
    parts = [cifar10.read_records(file) for file in files]
    source = os.path.dirname(files[0])
  with tf.device('CPU'):
    records = tf.concat(parts, axis=0)
  log.info('%s records to %s from %s', f'{len(records):,}',
           'train' if mode == 'train' else 'evaluate', source)
  if mode == 'train' and tf.distribute.get_strategy().num_replicas_in_sync > 1:
    require_same({'training records': zlib.crc32(records.numpy())})

  def load(numbers, views=None):
    images, labels = dataset_parser(tf.gather(records, numbers))
    if mode == 'train':
      images = train_preprocess_fn(images, views)
    # Each image by itself, where [1] subtracts the mean of all.
    return tf.image.per_image_standardization(images), labels

  dataset = record_dataset(len(records), mode, settings, *order)
  options = tf.data.Options()
  # Rewriting the pipeline would copy the records and gain nothing. Tuning it
  # would gain nothing either, and delay the end of a cycle by a second or more.
  options.experimental_optimization.apply_default_optimizations = False
  options.autotune.enabled = False
  return dataset.map(load, num_parallel_calls=PARALLEL_BATCHES).with_options(
      options).prefetch(PREFETCH_BATCHES)


def prefetch_to_gpu(dataset: tf.data.Dataset) -> tf.data.Dataset:
  """Copies batches to the GPU, if there is one, before a step needs them."""
  for gpu in tf.config.list_logical_devices('GPU')[:1]:
    return dataset.apply(tf.data.experimental.prefetch_to_device(
        gpu.name, PREFETCH_BATCHES))
  return dataset


def distributed_input(settings: Settings, seed: int, step: int) -> Iterable:
  """Returns the input to train on, of which each replica gets its share."""
  strategy = tf.distribute.get_strategy()
  replicas = strategy.num_replicas_in_sync
  if settings.batch_size % replicas:
    raise Cifar10Error(
        f'--batch_size={settings.batch_size} is no multiple of the {replicas} '
        'replicas that share it: make it one')
  dataset = strategy.distribute_datasets_from_function(functools.partial(
      input_fn, 'train', settings, seed, step))
  # Only the default strategy does not copy batches to its device by itself.
  return prefetch_to_gpu(dataset) if replicas == 1 else dataset


def conditions(settings: Settings) -> list[int]:
  """Returns whether images are generated, and the cores the process may use."""
  cores = (len(os.sched_getaffinity(0)) if hasattr(os, 'sched_getaffinity')
           else os.cpu_count())
  return [settings.use_synthetic_data, cores]


class TrainState(tf.Module):
  """The settings of a training, and all that a checkpoint contains."""

  def __init__(self, network: Cifar10ResnetV2, settings: Settings):
    super().__init__()
    self.network = network
    self.settings = settings
    self.momentum = [
        tf.Variable(tf.zeros_like(v), False, name=f'{tf1_name(v)}/Momentum')
        for v in network.trainable_variables]
    integer = functools.partial(tf.Variable, trainable=False, dtype=tf.int64)
    self.global_step = integer(0, name='global_step')
    # Not in the original's checkpoints: the seed of the batches; over the
    # batches logged in this cycle, the numbers of correct and of all images;
    # and what the numbers also depend on.
    self.seed = integer(network.seed, name='seed')
    self.train_accuracy = integer([0, 0], name='train_accuracy')
    self.conditions = integer(conditions(settings), name='conditions')


def make_state(settings: Settings) -> TrainState:
  """Returns a new network with its training state."""
  network = resnet_model.cifar10_resnet_v2_generator(
      settings.resnet_size or 32, NUM_CLASSES, settings.data_format,
      tf.as_dtype(DTYPES[settings.dtype]), settings.seed)
  return TrainState(network, settings)


def cifar10_model_fn(features: tf.Tensor, labels: tf.Tensor | None, mode: str,
                     state: TrainState) -> dict[str, tf.Tensor]:
  """Computes the predictions and, unless the mode is 'infer', the loss.

  Args:
    features: Standardized images, float32 [N, 32, 32, 3].
    labels: One-hot, float32 [N, 10]; not used in mode 'infer'.
    mode: 'train', which updates the moving averages, 'eval' or 'infer'.
    state: Holds the network, and the settings for who adds to them.

  Returns:
    classes, int64 [N]; probabilities, float32 [N, 10]. Unless the mode is
    'infer' also cross_entropy, loss, float32 []; correct, int64 [], a number.
  """
  check_mode(mode)
  logits = state.network(features, training=mode == 'train')
  predictions = {'classes': tf.argmax(logits, axis=1),
                 'probabilities': tf.nn.softmax(logits)}
  if mode == 'infer':
    return predictions
  cross_entropy = tf.reduce_mean(
      tf.nn.softmax_cross_entropy_with_logits(labels, logits))
  # As in the original, all trained variables decay: batch norm's scales and
  # offsets and the bias too, which later scripts leave out.
  decay = tf.add_n(
      [tf.nn.l2_loss(v) for v in state.network.trainable_variables])
  correct = predictions['classes'] == tf.argmax(labels, axis=1)
  return {**predictions, 'cross_entropy': cross_entropy,
          'loss': cross_entropy + WEIGHT_DECAY * decay,
          'correct': tf.math.count_nonzero(correct)}


def learning_rate_boundaries(batch_size: int) -> list[int]:
  """Returns the steps after which the learning rate drops."""
  return [int(NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN / batch_size * epoch)
          for epoch in LEARNING_RATE_DROPS]


def learning_rate(global_step: tf.Tensor, batch_size: int) -> tf.Tensor:
  """Returns the learning rate, float32 [], of the step after global_step."""
  initial = INITIAL_LEARNING_RATE * batch_size / 128
  rates = tf.constant(
      [initial * decay for decay in (1, *LEARNING_RATE_DROPS.values())])
  # As in the original, the step at a boundary still has the earlier rate.
  drops = global_step > learning_rate_boundaries(batch_size)
  return tf.gather(rates, tf.math.count_nonzero(drops))


class Checkpoints:
  """The checkpoints of a model folder, model.ckpt-STEP, as the original's."""

  def __init__(self, model_dir: str):
    self._model_dir = model_dir
    self._prefix = os.path.join(model_dir, 'model.ckpt')
    self._saver = None  # made once: it knows which checkpoints to keep
    self.newest = None  # the path of what was last read or saved

  def read_newest(self) -> dict[str, np.ndarray]:
    """Returns the values of the newest whole checkpoint, {} in a new folder."""
    # Not from the list in `checkpoint`: a copied one may name the old place.
    pattern = re.compile(
        re.escape(self._prefix) + r'-(\d+)\.(index|data-\d+-of-\d+)')
    found = map(pattern.fullmatch, glob.glob(glob.escape(self._prefix) + '-*'))
    steps = sorted({int(match[1]) for match in found if match}, reverse=True)
    for step in steps:
      path = f'{self._prefix}-{step}'
      try:
        reader = tf.train.load_checkpoint(path)
        values = {name: reader.get_tensor(name)  # this verifies checksums
                  for name in reader.get_variable_to_shape_map()}
        self.newest = path
        return values
      except READ_ERRORS as error:
        if 'Permission denied' in str(error):  # of various types
          raise Cifar10Error(f'{path} may not be read: change its permissions, '
                             'or name another --model_dir') from None
        log.warning('%s is damaged (%s)%s', path, reason(error), '' if
                    step == steps[-1] else ': trying the one before')
    if any(steps):  # without the one of step 0, nothing is lost
      raise Cifar10Error(
          f'{self._model_dir} holds no checkpoint that is not damaged: move '
          'model.ckpt-* away to start anew, or name another --model_dir')
    return {}

  def restore(self, state: TrainState, values: dict[str, np.ndarray]) -> None:
    """Assigns the values just read; changes none if one cannot be used."""
    for name in ('seed', 'train_accuracy', 'conditions'):  # not the original's
      values.setdefault(name, getattr(state, name).numpy())
    for variable in state.variables:
      name = tf1_name(variable)
      if name not in values or values[name].shape != variable.shape:
        size, cure = resnet_model.size_in_checkpoint(values), 'name another'
        if size not in (None, state.network.resnet_size):
          cure = f'use --resnet_size={size}, or another'
        raise Cifar10Error(f'{self.newest} is of another network ({name} '
                           f'differs): {cure} --model_dir')
    if not self.newest.endswith(f'-{values["global_step"]}'):
      # Else it would stay the newest, whatever is trained from here on.
      raise Cifar10Error(f'{self.newest} is of step {values["global_step"]}: '
                         'give it that number again, or move it away')
    for variable in state.variables:
      variable.assign(values[tf1_name(variable)])

  def save(self, state: TrainState) -> None:
    """Saves a checkpoint on the first machine; keeps the newest five.

    Raises:
      Cifar10Error: A variable is not finite, or the folder cannot be written.
    """
    if not is_chief():
      return
    step = state.global_step.numpy().item()
    for variable in state.variables:
      if not np.isfinite(variable.numpy()).all():
        raise Cifar10Error(f'{tf1_name(variable)} is not finite after step '
                           f'{step}{WHEN_NOT_FINITE}')
    self._saver = self._saver or self._make_saver(state)
    log.info('Saving checkpoints for %d into %s.', step, self._prefix)
    try:
      for part in glob.glob(glob.escape(self._prefix) + '-*.tempstate*'):
        os.remove(part)  # of a save that was killed
      self.newest = self._saver.save(
          None, self._prefix, step, write_meta_graph=False)
    except (tf.errors.OpError, OSError) as error:
      raise cifar10.cannot_write(
          self._model_dir, error, '--model_dir') from None

  def _make_saver(self, state):
    """Returns the original's saver, which goes on from the folder's list."""
    local = tf.distribute.get_strategy().experimental_local_results
    saver = tf.compat.v1.train.Saver(
        {tf1_name(v): local(v)[0] for v in state.variables},
        max_to_keep=KEEP_CHECKPOINTS, save_relative_paths=True)
    listed = None
    with contextlib.suppress(ValueError):  # it is damaged, and no UTF-8
      listed = tf.train.get_checkpoint_state(self._model_dir)
    # A copied list may name the folder that it came from.
    saver.recover_last_checkpoints([
        path for path in (listed.all_model_checkpoint_paths if listed else ())
        if os.path.join(self._model_dir, os.path.basename(path)) == path])
    return saver


def open_model(settings: Settings, may_be_new: bool = True
               ) -> tuple[TrainState, Checkpoints]:
  """Returns the state of the newest checkpoint in model_dir, or a new one."""
  if settings.seed is not None:  # the same bits each time
    tf.config.experimental.enable_op_determinism()
  checkpoints = Checkpoints(settings.model_dir)
  # Of several machines, only the first has the folder.
  values = checkpoints.read_newest() if is_chief() else {}
  if not (values or may_be_new):
    raise Cifar10Error(f'{settings.model_dir} holds no checkpoint: train '
                       'first, or name another --model_dir')
  size = resnet_model.size_in_checkpoint(values) or 32
  state = make_state(dataclasses.replace(
      settings, resnet_size=settings.resnet_size or
      int(total(size * is_chief()))))
  if values:
    checkpoints.restore(state, values)
  if tf.distribute.get_strategy().num_replicas_in_sync > 1:
    for variable in state.variables:
      variable.assign(total(variable.numpy() * is_chief()))
  return state, checkpoints


def compute_gradients(state: TrainState, features: tf.Tensor,
                      labels: tf.Tensor) -> tuple[list, dict]:
  """Returns a replica's part of the whole batch's gradients and values."""
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  scale = FP16_LOSS_SCALE if state.network.dtype == tf.float16 else 1
  with tf.GradientTape() as tape:
    outputs = cifar10_model_fn(features, labels, 'train', state)
    scaled_loss = scale / replicas * outputs['loss']
  gradients = tape.gradient(scaled_loss, state.network.trainable_variables)
  if scale > 1:
    gradients = [gradient / scale for gradient in gradients]
  return gradients, {'cross_entropy': outputs['cross_entropy'] / replicas,
                     'loss': outputs['loss'] / replicas,
                     'correct': tf.cast(outputs['correct'], tf.float32)}


def train_step(state: TrainState, compute: Callable, features: tf.Tensor,
               labels: tf.Tensor) -> dict[str, tf.Tensor]:
  """Trains on one batch or, together with the others, on a replica's share.

  `compute` is compute_gradients of this state, compiled or not. Returns what to
  log, from before the update: cross_entropy, loss and learning_rate, float32
  []; correct, int64 []; images, up to six.
  """
  gradients, values = compute(features, labels)
  context = tf.distribute.get_replica_context()
  if context.num_replicas_in_sync > 1:
    # Each replica normalizes its own share of the batch; the moving averages
    # become the mean over the replicas.
    averages = [v for v in state.network.variables if not v.trainable]
    gradients, values, moving = context.all_reduce('SUM', [
        gradients, values,
        [v.read_value() / context.num_replicas_in_sync for v in averages]])
    for variable, value in zip(averages, moving):
      variable.assign(value)
  rate = learning_rate(state.global_step, state.settings.batch_size)
  for variable, accum, gradient in zip(
      state.network.trainable_variables, state.momentum, gradients):
    # accum = 0.9 * accum + gradient; variable -= learning_rate * accum. Keras
    # puts the learning rate into accum, which differs after each of its drops.
    tf.raw_ops.ResourceApplyMomentum(
        var=variable.handle, accum=accum.handle, lr=rate, grad=gradient,
        momentum=MOMENTUM)
  # By its handle too: each replica updates a copy of its own.
  tf.raw_ops.AssignAddVariableOp(
      resource=state.global_step.handle, value=tf.constant(1, tf.int64))
  return {**values, 'correct': tf.cast(values['correct'], tf.int64),
          'learning_rate': rate, 'images': features[:NUM_SUMMARY_IMAGES]}


def uses_xla(xla: str) -> bool:
  """Returns what the flag --xla means on this device."""
  return xla == 'on' or (
      xla == 'auto' and bool(tf.config.list_logical_devices('GPU')))


def make_train_step(state: TrainState) -> Callable:
  """Returns train_step as a compiled `step(features, labels)`."""
  # Without autograph, which has nothing to convert here, tracing is faster.
  compiled = functools.partial(
      tf.function, autograph=False, jit_compile=uses_xla(state.settings.xla))
  compute = functools.partial(compute_gradients, state)
  if tf.distribute.get_strategy().num_replicas_in_sync == 1:
    return compiled(functools.partial(train_step, state, compute))
  # XLA cannot compile the exchange between the replicas.
  return tf.autograph.experimental.do_not_convert(
      functools.partial(train_step, state, compiled(compute)))


def make_inner_loop(state: TrainState) -> Callable:
  """Returns the compiled `inner_loop(iterator, num_steps)`, which trains.

  It returns the last step's values and finite_steps, int64 [], the number of
  steps with a finite loss.
  """
  step = make_train_step(state)
  strategy = tf.distribute.get_strategy()
  num_images = min(NUM_SUMMARY_IMAGES,
                   state.settings.batch_size // strategy.num_replicas_in_sync)

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


def log_values(step: int, values: dict) -> None:
  """Hook that logs the original's lines, word for word."""
  duration = f' ({values["seconds"]:.3f} sec)' if 'seconds' in values else ''
  if duration:
    log.info('global_step/sec: %g', values['global_step/sec'])
  log.info(
      'cross_entropy = %s, learning_rate = %s, train_accuracy = %s%s',
      values['cross_entropy'], values['learning_rate'],
      values['train_accuracy'], duration)
  log.info('loss = %s, step = %d%s', values['loss'], step, duration)


def make_writer(folder: str, step: int) -> tf.summary.SummaryWriter:
  """Returns a writer of events, which replace earlier ones from `step` on."""
  v1 = tf.compat.v1
  try:
    if is_chief():
      with tf.Graph().as_default(), v1.summary.FileWriter(folder) as writer:
        writer.add_session_log(v1.SessionLog(status=v1.SessionLog.START), step)
      return tf.summary.create_file_writer(folder)
  except (OSError, tf.errors.OpError) as error:
    log.warning('No events for TensorBoard in %s (%s)', folder, reason(error))
  return tf.summary.create_noop_writer()


@contextlib.contextmanager
def events(writer: tf.summary.SummaryWriter, step: int) -> Iterator[None]:
  """Lets the block write events. If they cannot be written, this is logged."""
  try:
    with writer.as_default(step):
      yield
    writer.flush()
  except tf.errors.OpError as error:
    logging.log_first_n(
        logging.WARNING, 'TensorBoard misses values: %s', 1, reason(error))


def write_summaries(writer: tf.summary.SummaryWriter, step: int,
                    values: dict) -> None:
  """Hook that writes what TensorBoard shows of the training."""
  # Each image's least value becomes black, its greatest white.
  images = values['images']  # which other hooks see too: no -= here
  images = images - images.min(axis=(1, 2, 3), keepdims=True)
  images /= np.maximum(images.max(axis=(1, 2, 3), keepdims=True), 1e-6)
  with events(writer, step):
    for name in ('cross_entropy', 'learning_rate', 'train_accuracy', 'loss',
                 'global_step/sec', 'images/sec'):
      if name in values:
        tf.summary.scalar(name, values[name])
    # Under the name that evaluations use, so that both are on one chart.
    tf.summary.scalar('accuracy', values['train_accuracy'])
    tf.summary.image('images', images, max_outputs=NUM_SUMMARY_IMAGES)


def markdown_table(*rows: Iterable) -> str:
  """Returns rows of values, the first one the head, for tf.summary.text."""
  head, *rest = ('|'.join(map(str, row)) for row in rows)
  return '\n'.join([head, '|'.join(['---'] * len(rows[0])), *rest])


def show_progress(settings: Settings, step: int, cycle_end: int,
                  seconds: float | None) -> None:
  """Shows in the status line how far training is, given seconds per step."""
  def time_to(end):
    minutes, rest = divmod(round((end - step) * seconds), 60)
    return f'{minutes // 60}:{minutes % 60:02}:{rest:02}'

  text = f'Step {step} of {settings.train_steps}'
  if seconds:
    text += (f', {settings.batch_size / seconds:,.0f} images/s, evaluation in '
             f'{time_to(cycle_end)}, end in {time_to(settings.train_steps)}')
  cifar10.show_status(text)


def make_eval_step(state: TrainState) -> Callable:
  """Returns a compiled function that adds the next batch to two sums."""
  @tf.function(autograph=False)
  def eval_step(iterator, loss, confusion_matrix):
    features, labels = next(iterator)
    outputs = cifar10_model_fn(features, labels, 'eval', state)
    matrix = tf.math.confusion_matrix(
        tf.argmax(labels, axis=1), outputs['classes'], NUM_CLASSES,
        dtype=tf.int64)
    return loss + outputs['loss'], confusion_matrix + matrix
  return eval_step


def evaluate(eval_step: Callable, dataset: tf.data.Dataset, path: str | None,
             step: int, interrupted: Callable[[], bool] = lambda: False
             ) -> tuple[dict[str, float], np.ndarray] | None:
  """Evaluates the network, saved as `path` at a step; prints the results.

  Returns:
    None if interrupted; else accuracy over all images, loss, the mean over the
    batches, in which the short last one counts like the others, global_step;
    and how many images of each label (row) were given each class, int64
    [10, 10].
  """
  log.info('Starting evaluation at %s', time.strftime('%Y-%m-%dT%H:%M:%S'))
  # The variables are in memory already, but people search logs for this line.
  log.info('Restoring parameters from %s', path)
  # Ask for the length here: the copy to a GPU does not know it.
  iterator, num_batches = iter(prefetch_to_gpu(dataset)), len(dataset)
  loss, matrix = tf.zeros([]), tf.zeros([NUM_CLASSES] * 2, tf.int64)
  for batch in range(num_batches):
    if interrupted():
      return None
    cifar10.show_status(f'Evaluating batch {batch + 1} of {num_batches}')
    loss, matrix = eval_step(iterator, loss, matrix)
  loss, matrix = (loss / num_batches).numpy(), matrix.numpy()  # waits
  log.info('Finished evaluation at %s', time.strftime('%Y-%m-%d-%H:%M:%S'))
  results = {'accuracy': matrix.trace() / matrix.sum(), 'loss': loss}
  # With float32's digits and no more, as the original printed them.
  results = {name: float(str(np.float32(x))) for name, x in results.items()}
  results['global_step'] = step
  log.info('Saving dict for global step %d: %s', step, ', '.join(
      f'{name} = {results[name]}' for name in sorted(results)))
  if is_chief():
    cifar10.say(str(results))
  return results, matrix


def accuracies(matrix: np.ndarray) -> dict[str, float]:
  """Returns the accuracy of each class, given its confusion matrix."""
  shares = matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
  return dict(zip(cifar10.CLASSES, shares.tolist()))


def write_evaluation(writer: tf.summary.SummaryWriter, results: dict,
                     matrix: np.ndarray) -> None:
  """Writes what TensorBoard shows of an evaluation, as evaluate returns it."""
  with events(writer, results['global_step']):
    tf.summary.scalar('accuracy', results['accuracy'])
    tf.summary.scalar('loss', results['loss'])
    for name, accuracy in accuracies(matrix).items():
      tf.summary.scalar(f'per_class/{name}', accuracy)
    tf.summary.text('confusion_matrix', markdown_table(
        [r'label \ predicted', *cifar10.CLASSES],
        *([name, *row] for name, row in zip(cifar10.CLASSES, matrix))))


@contextlib.contextmanager
def folder_beside(path: str) -> Iterator[str]:
  """Makes a folder, until the block ends, on the disk of a path.

  Raises:
    Cifar10Error: The path is there, or the block or this raised an OSError.
  """
  parent, name = os.path.split(os.path.abspath(path))
  if os.path.lexists(path):
    raise Cifar10Error(f'--export_dir={path} is there already: name a new '
                       'folder, or remove it')
  try:
    os.makedirs(parent, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f'{name}.', dir=parent) as folder:
      yield folder
  except (OSError, tf.errors.OpError) as error:
    raise cifar10.cannot_write(path, error, '--export_dir') from None


def export(state: TrainState, export_dir: str) -> None:
  """Writes a trained network as a SavedModel, complete in itself.

  Of raw images, uint8 [N, 32, 32, 3], it gives classes, int64 [N], class_names,
  string [N], and probabilities, float32 [N, 10]; by its signature
  `standardized`, of standardized ones, float32, which can be quantized.

  Raises:
    Cifar10Error: The folder exists or cannot be written.
    ValueError: The flag would not take its path.
  """
  export_dir = cifar10.PathParser().parse(export_dir)
  # Not every device has convolutions with the channels first.
  exported = make_state(dataclasses.replace(
      state.settings, data_format='channels_last'))
  for variable, value in zip(exported.variables, state.variables):
    variable.assign(value)

  def classifier(dtype, prepare):
    shape = [None, HEIGHT, WIDTH, DEPTH]

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype, 'images')])
    def classify(images):
      # An error here; in the convolution, the process would be aborted.
      images = prepare(tf.ensure_shape(images, shape))
      outputs = cifar10_model_fn(images, None, 'infer', exported)
      names = tf.gather(cifar10.CLASSES, outputs['classes'])
      return {**outputs, 'class_names': names}
    return classify

  # Written beside its place, then renamed: who finds the folder finds it whole.
  with folder_beside(export_dir) as folder:
    written = os.path.join(folder, 'export')
    tf.saved_model.save(exported.network, written, {
        'serving_default': classifier(
            tf.uint8, tf.image.per_image_standardization),
        'standardized': classifier(tf.float32, tf.identity)})
    os.rename(written, export_dir)
  log.info('Exported step %d to %s', state.global_step.numpy(), export_dir)


def run_cycles(
    state: TrainState, train_data: Iterable, eval_data: tf.data.Dataset,
    checkpoints: Checkpoints, eval_writer: tf.summary.SummaryWriter,
    interrupted: Callable[[], bool],
    hooks: Iterable[Callable[[int, dict], None]] = ()) -> bool:
  """Trains, logs, evaluates and saves; returns False if it was interrupted.

  A cycle ends with an evaluation, at each multiple of `steps_per_eval`. Steps
  run in pieces of about a second, which end at the steps to log.
  """
  settings = state.settings
  inner_loop, eval_step = make_inner_loop(state), make_eval_step(state)
  # One input for all cycles: during an evaluation it prepares the next cycle's
  # first batches.
  iterator = iter(train_data)
  cifar10.show_status('Building the training step')
  step = first_step = state.global_step.numpy().item()
  num_steps, pace, logged_at, saved_at = 1, None, None, time.monotonic()
  while True:
    # At the start too: a run killed at the end of a cycle owes its evaluation.
    in_cycle = step % settings.steps_per_eval
    done = step >= settings.train_steps
    if done or (step and not in_cycle):
      evaluation = evaluate(
          eval_step, eval_data, checkpoints.newest, step, interrupted)
      if total(int(evaluation is None)):
        log.warning('Stopped: the same command evaluates step %d', step)
        return False
      write_evaluation(eval_writer, *evaluation)
    if done:
      return True
    if not in_cycle:  # as in the original, anew in each cycle
      state.train_accuracy.assign([0, 0])
      logged_at = None
    cycle_end = min(
        step - in_cycle + settings.steps_per_eval, settings.train_steps)
    to_next_log = -in_cycle % LOG_STEPS + 1
    num_steps = min(num_steps, to_next_log, cycle_end - step)
    started = time.perf_counter()
    # A tensor, since each new Python number would be traced.
    values = inner_loop(iterator, tf.constant(num_steps))
    values = {name: value.numpy() for name, value in values.items()}  # waits
    now = time.perf_counter()
    if values['finite_steps'] < num_steps:
      raise Cifar10Error(
          f'The loss is not finite at step {step + 1 + values["finite_steps"]} '
          f'(looked at after steps {step} and {step + num_steps})'
          f'{WHEN_NOT_FINITE}')
    step += num_steps
    seconds = (now - started) / num_steps
    if num_steps == to_next_log:
      # As in the original, of this cycle's logged batches only.
      correct, seen = state.train_accuracy.assign_add(
          [values['correct'], settings.batch_size]).numpy()
      values['train_accuracy'] = np.float32(correct / seen)
      if logged_at is not None:
        values['seconds'] = now - logged_at
        values['global_step/sec'] = LOG_STEPS / values['seconds']
        values['images/sec'] = values['global_step/sec'] * settings.batch_size
      logged_at = now
      for hook in hooks:
        hook(step, values)
    if step > first_step + 1:  # the time of the first one includes compiling
      pace = 0.9 * (pace or seconds) + 0.1 * seconds
    show_progress(settings, step, cycle_end, pace)
    # All machines stop when one does, and go at the first one's pace.
    stop, num_steps = total(np.array([
        interrupted(), is_chief() * max(1, int(PIECE_SECONDS / seconds))
        ])).tolist()
    if (stop or step == cycle_end
        or time.monotonic() - saved_at >= settings.save_checkpoints_secs):
      checkpoints.save(state)
      saved_at = time.monotonic()
    if step == cycle_end:
      log.info('Loss for final step: %s.', values['loss'])
    if stop:
      log.warning(
          'Stopped after step %d, saved as %s: the same command goes on from '
          'there', step, checkpoints.newest or 'the first machine has it')
      return False


def describe_run(state: TrainState) -> dict:
  """Logs what the run uses and will do; returns that and the flags by name."""
  settings = state.settings
  before, now = state.conditions.numpy().tolist(), conditions(settings)
  device = f'CPU ({platform.machine()}, {now[1]} cores)'
  for gpu in tf.config.get_visible_devices('GPU')[:1]:
    device = tf.config.experimental.get_device_details(gpu).get(
        'device_name', 'GPU')
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  if replicas > 1:
    device = f'{replicas} replicas: {device}'
  facts = {'network': repr(state.network), 'device': device,
           'XLA': 'on' if uses_xla(settings.xla) else 'off',
           'seed': state.seed.numpy(), 'TensorFlow': tf.__version__,
           'NumPy': np.__version__, 'Python': platform.python_version()}
  log.info('%(network)s, XLA %(XLA)s, on %(device)s, seed %(seed)d', facts)
  step = state.global_step.numpy()
  if step >= settings.train_steps:
    log.info('Step %d is trained already: only evaluating. A --train_steps '
             'above it would train on', step)
  else:
    drops = map(str, learning_rate_boundaries(settings.batch_size))
    log.info('Training steps %d to %d, batch size %d. The learning rate drops '
             'after steps %s', step + 1, settings.train_steps,
             settings.batch_size, ', '.join(drops))
  if before != now:
    log.warning('Trained until now on %s images with %d cores, now on %s '
                'images with %d: the numbers will differ; another --model_dir '
                'begins anew',
                *(x for images, cores in (before, now)
                  for x in (('real', 'generated')[images], cores)))
    state.conditions.assign(now)
  return facts | {f'--{name}': value for name, value in vars(settings).items()}


def train_and_evaluate(
    settings: Settings, interrupted: Callable[[], bool] | None = None,
    hooks: Iterable[Callable[[int, dict], None]] = ()) -> bool:
  """Trains and evaluates, up to `train_steps`; returns False if interrupted.

  Goes on from the newest checkpoint in `model_dir`. In the scope of a
  tf.distribute strategy, all its replicas share each batch.

  Args:
    settings: What to do.
    interrupted: Tells, once a second, whether to save and end. By default, the
      first KeyboardInterrupt does (a notebook's stop button).
    hooks: Called as `hook(step, values)` at each logged step, with what the log
      shows: cross_entropy, loss, learning_rate, train_accuracy; images, the
      first of the batch; except at a cycle's first step also seconds,
      global_step/sec and images/sec.

  Raises:
    Cifar10Error: Data, checkpoint, loss or folder are not as they should be.
  """
  eval_data = input_fn('eval', settings)
  stop_button = StopRequest('SIGINT')
  with (cifar10.sole_use(settings.model_dir, '--model_dir') if is_chief()
        else contextlib.nullcontext()):
    state, checkpoints = open_model(settings)
    if checkpoints.newest:
      log.info('Restoring parameters from %s', checkpoints.newest)
    seed, step = state.seed.numpy().item(), state.global_step.numpy().item()
    if settings.seed not in (None, seed):
      raise Cifar10Error(
          f'{settings.model_dir} was trained with --seed={seed}, not '
          f'{settings.seed}: use that, or name another --model_dir')
    train_data = distributed_input(settings, seed, step)
    facts = describe_run(state)
    writer = make_writer(settings.model_dir, step + 1)
    eval_writer = make_writer(os.path.join(settings.model_dir, 'eval'), step)
    with events(writer, step):
      tf.summary.text('run', markdown_table(['what', 'value'], *facts.items()))
    if checkpoints.newest is None:
      checkpoints.save(state)
    try:
      return run_cycles(
          state, train_data, eval_data, checkpoints, eval_writer,
          interrupted or stop_button,
          [log_values, functools.partial(write_summaries, writer), *hooks])
    finally:
      stop_button.end()


def evaluate_only(
    settings: Settings,
    export_dir: str | None = None) -> tuple[dict[str, float], np.ndarray]:
  """Evaluates the newest checkpoint; prints the accuracy of each class too.

  Given a folder, exports what it has evaluated. Returns results and confusion
  matrix: see evaluate.
  """
  dataset = input_fn('eval', settings)
  state, checkpoints = open_model(settings, may_be_new=False)
  results, matrix = evaluate(make_eval_step(state), dataset, checkpoints.newest,
                             state.global_step.numpy().item())
  for name, accuracy in accuracies(matrix).items():
    cifar10.say(f'{name:10} {accuracy:.4f}')
  if export_dir:
    export(state, export_dir)
  return results, matrix


def quarter_turns(data: bytes) -> int:
  """Returns by how many quarters to turn a camera's picture, counterclockwise.

  That is in tag 0x0112 of its EXIF, a single SHORT. TensorFlow ignores it.
  """
  exif = data[:65536].partition(b'Exif\0\0')[2]
  order = '<' if exif.startswith(b'II') else '>'
  value = exif.partition(struct.pack(order + 'HHI', 0x0112, 3, 1))[2][:2]
  orientation, = struct.unpack(order + 'H', value.rjust(2, b'\0'))
  return {3: 2, 6: 3, 8: 1}.get(orientation, 0)


def read_picture(path: str) -> tf.Tensor:
  """Returns the middle square of a picture, scaled to float32 [32, 32, 3].

  Raises:
    OSError: It cannot be read.
    OpError: It is no JPEG, PNG, GIF, BMP or WebP.
  """
  with open(os.path.expanduser(path), 'rb') as file:
    data = file.read()
  if data.startswith(b'BM') and data[28:29] < b'\x18':  # bits of each pixel
    # TensorFlow would take the numbers of its colours for shades of grey.
    raise tf.errors.UnimplementedError(
        None, None, 'a BMP with a palette: save it as PNG')
  picture = tf.cast(
      tf.io.decode_image(data, expand_animations=False), tf.float32)
  picture = tf.image.rot90(picture, quarter_turns(data))
  height, width, channels = picture.shape
  if channels in (2, 4):  # what is transparent becomes white
    opacity = picture[..., -1:] / 255
    picture = picture[..., :-1] * opacity + 255 * (1 - opacity)
  if channels < 3:
    picture = tf.image.grayscale_to_rgb(picture)
  size = min(height, width)
  picture = tf.image.resize_with_crop_or_pad(picture, size, size)
  # Rounded, as the images are that it was trained on.
  return tf.round(tf.image.resize(picture, [HEIGHT, WIDTH], method='area'))


def predict(settings: Settings, paths: Iterable[str]) -> bool:
  """Prints the likeliest classes of pictures, by the newest checkpoint.

  Returns False if one of them cannot be read.
  """
  state, _ = open_model(settings, may_be_new=False)
  all_read = True
  for path in paths:
    shown = cifar10.printable(path)
    try:
      image = tf.image.per_image_standardization(read_picture(path))
    except (OSError, tf.errors.OpError) as error:
      log.error('Cannot read the picture %s (%s)', shown, reason(error))
      all_read = False
      continue
    outputs = cifar10_model_fn(image[tf.newaxis], None, 'infer', state)
    likeliest = zip(*tf.math.top_k(outputs['probabilities'][0], 3))
    cifar10.say(f'{shown}: ' + ', '.join(
        f'{cifar10.CLASSES[i]} {share:.1%}' for share, i in likeliest))
  return all_read


def wait_for_machines(addresses: list[str], own: str) -> None:
  """Waits until all machines of a cluster, host:port, have been started.

  TensorFlow would wait too, but without a word and deaf to signals.

  Raises:
    Cifar10Error: The own port is in use.
    ValueError: An address has no port, or one that cannot be.
  """
  parts = [address.rpartition(':') for address in addresses]
  hosts = [(host.strip('[]'), int(port)) for host, _, port in parts]
  if not all(0 < port < 65536 for _, port in hosts):
    raise ValueError('a port is not between 1 and 65535')
  try:
    server = socket.create_server(('', hosts[addresses.index(own)][1]))
  except OSError as error:
    raise Cifar10Error(
        f'Cannot listen as {own} ({os.strerror(error.errno)}): end what uses '
        'the port, or name another in TF_CONFIG') from None
  log.info('%s waits for %s', own, ', '.join({*addresses} - {own}))
  with server:
    while hosts:
      try:
        socket.create_connection(hosts[0], timeout=5).close()
        del hosts[0]
      except OSError:
        time.sleep(0.5)


def join_machines() -> tf.distribute.Strategy | None:
  """Returns what shares training among the machines of TF_CONFIG, if any."""
  if not os.environ.get('TF_CONFIG', '').strip():
    return None
  try:
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    cluster = resolver.cluster_spec()
    addresses = [address for tasks in cluster.as_dict().values()
                 for address in tasks]
    if len(addresses) < 2:  # clouds name a single machine as they like
      return None
    if {*cluster.jobs, resolver.task_type} - {'chief', 'worker'}:
      raise ValueError('all machines train: no roles but chief and worker')
    if len({*addresses}) < len(addresses):
      raise ValueError('an address is there twice')
    wait_for_machines(addresses, cluster.task_address(
        resolver.task_type, resolver.task_id))
    strategy = tf.distribute.MultiWorkerMirroredStrategy(resolver)
  except (ValueError, TypeError, LookupError, AttributeError,
          tf.errors.OpError) as error:
    raise Cifar10Error('TF_CONFIG names no cluster of workers '
                       f'({reason(error)}): correct or unset it') from None
  # TensorFlow has taken this signal, and would not end by it.
  signal.signal(signal.SIGTERM, signal.SIG_DFL)
  return strategy


def make_strategy(num_gpus: int | None) -> tf.distribute.Strategy:
  """Returns what shares training among GPUs or the machines of TF_CONFIG."""
  gpus = tf.config.list_physical_devices('GPU')
  if num_gpus is not None and num_gpus > len(gpus):
    raise Cifar10Error(f'--num_gpus={num_gpus} is more than the {len(gpus)} '
                       'that TensorFlow finds here: lower it, or leave it out')
  if (not gpus and num_gpus != 0 and shutil.which('nvidia-smi')
      and os.environ.get('CUDA_VISIBLE_DEVICES', '0') not in ('', '-1')):
    log.warning('TensorFlow finds no GPU. If there is one, its libraries are '
                'missing: pip install "tensorflow[and-cuda]" brings them')
  if num_gpus != -1:
    gpus = gpus[:1 if num_gpus is None else num_gpus]
  tf.config.set_visible_devices(gpus, 'GPU')
  return join_machines() or (
      tf.distribute.MirroredStrategy() if len(gpus) > 1
      else tf.distribute.get_strategy())


def run(settings: Settings, values: flags.FlagValues,
        strategy: tf.distribute.Strategy,
        interrupted: Callable[[], bool]) -> int:
  """Does what the flags ask for; returns the exit status."""
  with strategy.scope():
    chief = is_chief()
    shared = {'eval_only', 'predict', *vars(settings)} - {
        'data_dir', 'model_dir', 'save_checkpoints_secs'}
    require_same({'TensorFlow': tf.__version__} | {
        f'--{name}': values[name].value for name in sorted(shared)})
  if not chief:
    log.warning('The first machine logs, saves and prints')
    logging.set_verbosity(min(logging.get_verbosity(), logging.WARNING))
  export_dir = values.export_dir if chief else None
  if export_dir:
    with folder_beside(export_dir):
      pass  # it can be written
  # Only training is shared: the rest would wait for the other machines.
  if values.predict:
    return int(chief and not predict(settings, values.predict))
  if values.eval_only:
    if chief:
      evaluate_only(settings, export_dir)
    return 0
  with strategy.scope():
    finished = train_and_evaluate(settings, interrupted)
    total(0)  # no machine leaves before all have written
  if finished and export_dir:
    export(open_model(settings)[0], export_dir)
  return 0 if finished else 143


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  show_log()
  settings = Settings(**{field.name: values[field.name].value
                         for field in dataclasses.fields(Settings)})
  stop, strategy = StopRequest('SIGTERM', 'SIGINT', 'SIGHUP'), None
  with cifar10.errors_in_one_line():
    cifar10.refuse_arguments(argv)
    try:
      strategy = make_strategy(values.num_gpus)
      status = run(settings, values, strategy, stop)
      return 128 + stop.signal if stop.signal else status
    except tf.errors.OpError as error:
      if isinstance(error, tf.errors.ResourceExhaustedError):
        what = 'The device has too little memory: try a smaller --batch_size'
      elif isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        what = (f'Another machine does not answer ({reason(error)}): start all '
                'again, they go on from the last checkpoint')
      elif (isinstance(error, CANNOT_COMPUTE)
            or 'only supports NHWC' in str(error)):  # as bf16 on a CPU
        what = (f'This device cannot do that ({reason(error)}): try --xla=off, '
                'without --data_format and --dtype')
      else:
        raise
      raise Cifar10Error(what) from None
    finally:
      stop.end()


if __name__ == '__main__':
  app.run(main)
