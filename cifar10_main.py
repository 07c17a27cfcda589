"""Trains and evaluates a ResNet on CIFAR-10.

    python cifar10_download_and_extract.py
    python cifar10_main.py --resnet_size=32 --train_steps=100000

A port of the CIFAR-10 script in TensorFlow's models repository of 2017 to plain
TensorFlow 2. Recipe, flags, log lines and checkpoints are the original's.

Flags by purpose:
  training       --train_steps --batch_size --resnet_size --seed
  evaluation     --steps_per_eval --eval_only
  folders        --data_dir --model_dir --export_dir --save_checkpoints_secs
  device, speed  --num_gpus --dtype --data_format --xla
  without data   --use_synthetic_data

The code goes from the input to the command line: input, model, training, hooks,
evaluation, export, the run with its loop, devices, command.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: the augmentation.
"""

from collections.abc import Callable, Iterable
import contextlib
import dataclasses
import datetime
import functools
import os
import platform
import shutil
import signal
import threading
import time
import zlib

if __name__ == '__main__':
  # TensorFlow reads these when it is imported. cuDNN's faster 3x3 convolutions:
  os.environ['TF_ENABLE_WINOGRAD_NONFUSED'] = '1'
  # Take GPU memory as it is needed, and leave the rest to other processes.
  os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
  # oneDNN's convolutions, which TensorFlow leaves off on a CPU without AVX-512
  # although they are at least 1.5 times as fast there.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
  # Until there is something to save, Ctrl-C simply ends the process.
  if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, signal.SIG_DFL)
  import cifar10_download_and_extract as cifar10
  cifar10.show_status('Loading TensorFlow')
  with cifar10.quiet_import():
    import tensorflow  # noqa: F401
  cifar10.show_status()

from absl import app, flags, logging
import numpy as np
from tensorboard.plugins.hparams import summary_v2  # `api` imports Keras
import tensorflow as tf

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error, reason
import resnet_model
from resnet_model import Checkpoints, Cifar10ResnetV2, tf1_name

HEIGHT, WIDTH, DEPTH = 32, 32, 3
NUM_CLASSES = len(cifar10.CLASSES)
NUM_DATA_BATCHES = len(cifar10.TRAIN_FILES)
NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN = NUM_DATA_BATCHES * cifar10.RECORDS_PER_FILE
NUM_EXAMPLES_PER_EPOCH_FOR_EVAL = cifar10.RECORDS_PER_FILE

PADDING = 4  # black pixels on each side, before a random crop to 32x32 [1]
NUM_CORNERS = 2 * PADDING + 1  # places of a crop in each direction
NUM_VIEWS = NUM_CORNERS * NUM_CORNERS * 2  # crops of an image, flipped or not
SHUFFLE_RECORDS = int(NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN * 0.4)  # + 3 batches
PARALLEL_BATCHES = 4  # prepared at a time: over 100,000 images/s on two cores
PREFETCH_BATCHES = 2  # kept ready, in addition to those
WEIGHT_DECAY = 2e-4
MOMENTUM = 0.9
INITIAL_LEARNING_RATE = 0.1  # for a batch of 128; scales with the batch size
LEARNING_RATE_EPOCHS = (100, 150, 200)  # after these it drops
LEARNING_RATE_DECAYS = (1, 0.1, 0.01, 0.001)  # factor before and after each
DTYPES = {'fp32': tf.float32, 'bf16': tf.bfloat16, 'fp16': tf.float16}
# Keeps small gradients above fp16's smallest number. Without it they are wrong
# by up to 40 %; with any scale from 128 to 2**18 by 5 %, like bf16's.
FP16_LOSS_SCALE = 128
LOG_STEPS = 100  # steps between two log lines
PIECE_SECONDS = 1  # training time between two looks at clock and signals
MAX_STEPS = 10**15
NUM_SUMMARY_IMAGES = 6


@dataclasses.dataclass(frozen=True)
class Settings:
  """What a run is to do. Each field is the flag of the same name."""
  data_dir: str | None = '/tmp/cifar10_data'
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

  @property
  def of_training(self) -> dict:
    """What changes the training, by name."""
    return {name: value for name, value in vars(self).items()
            if name not in ('data_dir', 'model_dir', 'save_checkpoints_secs')}


def filenames(mode: str, data_dir: str) -> list[str]:
  """Returns the paths of the record files for 'train', 'eval' or 'infer'."""
  cifar10.check_mode(mode)
  folder = cifar10.batches_folder(data_dir)
  names = cifar10.TRAIN_FILES if mode == 'train' else [cifar10.TEST_FILE]
  return [os.path.join(folder, name) for name in names]


def record_dataset(
    num_records: int, mode: str, batch_size: int, seed: int = 0, step: int = 0,
    steps_per_eval: int = 4000,
    context: tf.distribute.InputContext | None = None) -> tf.data.Dataset:
  """Draws the records of each batch and, for training, how they are augmented.

  It shuffles and shares out numbers; images move only when they are gathered.

  Args:
    mode: 'train': shuffled, without end; else in order, the last batch short.
    batch_size: Records per batch.
    seed: With the step, determines a batch wherever training began.
    step: Number of batches to skip: those trained already.
    steps_per_eval: Batches per cycle; as in the original, each shuffles anew.
    context: Which share of the batches this machine takes; by default all.

  Returns:
    Dataset of record numbers, int64 [N], and, for training, views, int32 [N].
  """
  numbers = tf.data.Dataset.range(num_records)
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


def input_fn(mode: str, data_dir: str | None, batch_size: int,
             use_synthetic_data: bool = False, **order) -> tf.data.Dataset:
  """Reads and checks all records of a mode, and returns them as batches.

  Args:
    mode: 'train': augmented images, shuffled, without end; 'eval' or 'infer':
      the test images, in order.
    data_dir: Folder that contains cifar-10-batches-bin/, or that folder.
    batch_size: Images per batch.
    use_synthetic_data: Whether to generate the records instead.
    **order: For training: see record_dataset, from `seed` on.

  Returns:
    Dataset of standardized images, float32 [N, 32, 32, 3], and one-hot labels,
    float32 [N, 10].

  Raises:
    Cifar10Error: A file is missing or damaged.
  """
  cifar10.check_mode(mode)
  if use_synthetic_data:
    parts, source = [cifar10.synthetic_records(mode)], 'memory'
  else:
    files = filenames(mode, data_dir)
    parts = [cifar10.read_records(file) for file in files]
    source = os.path.dirname(files[0])
  with tf.device('CPU'):
    records = tf.concat(parts, axis=0)
  logging.info('%s records to %s from %s', f'{len(records):,}',
               'train' if mode == 'train' else 'evaluate', source)
  if mode == 'train' and tf.distribute.get_strategy().num_replicas_in_sync > 1:
    require_same({'training records': zlib.crc32(records.numpy())})

  def load(numbers, views=None):
    images, labels = dataset_parser(tf.gather(records, numbers))
    if mode == 'train':
      images = train_preprocess_fn(images, views)
    return tf.image.per_image_standardization(images), labels

  dataset = record_dataset(len(records), mode, batch_size, **order)
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


def cifar10_model_fn(features: tf.Tensor, labels: tf.Tensor | None, mode: str,
                     network: Cifar10ResnetV2) -> dict[str, tf.Tensor]:
  """Computes the predictions and, unless the mode is 'infer', the loss.

  Args:
    features: Standardized images, float32 [N, 32, 32, 3].
    labels: One-hot, float32 [N, 10]; not used in mode 'infer'.
    mode: 'train', which updates the moving averages, 'eval' or 'infer'.

  Returns:
    classes, int64 [N]; probabilities, float32 [N, 10]. Unless the mode is
    'infer' also cross_entropy, loss, float32 []; correct, int64 [], a number.
  """
  cifar10.check_mode(mode)
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


def learning_rate_boundaries(batch_size: int) -> list[int]:
  """Returns the steps after which the learning rate drops."""
  return [int(NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN / batch_size * epoch)
          for epoch in LEARNING_RATE_EPOCHS]


def learning_rate(global_step: tf.Tensor, batch_size: int) -> tf.Tensor:
  """Returns the learning rate, float32 [], of the step after global_step."""
  initial = INITIAL_LEARNING_RATE * batch_size / 128
  rates = tf.constant([initial * decay for decay in LEARNING_RATE_DECAYS])
  # As in the original, the step at a boundary still has the earlier rate.
  drops = global_step > learning_rate_boundaries(batch_size)
  return tf.gather(rates, tf.math.count_nonzero(drops))


class TrainState(tf.Module):
  """All that a checkpoint contains."""

  def __init__(self, network: Cifar10ResnetV2, seed: int = 0):
    super().__init__()
    self.network = network
    self.momentum = [
        tf.Variable(tf.zeros_like(v), False, name=f'{tf1_name(v)}/Momentum')
        for v in network.trainable_variables]
    integer = functools.partial(tf.Variable, trainable=False, dtype=tf.int64)
    self.global_step = integer(0, name='global_step')
    # Not in the original's checkpoints: the seed of the batches; and, over the
    # batches logged in this cycle, the numbers of correct and of all images.
    self.seed = integer(seed, name='seed')
    self.train_accuracy = integer([0, 0], name='train_accuracy')


def make_state(resnet_size: int, data_format: str | None = None,
               dtype: str = 'fp32', seed: int | None = None) -> TrainState:
  """Returns a new network with its training state; None is a random seed."""
  if not resnet_model.has_convolutions(data_format, DTYPES[dtype]):
    flag = ('data_format=channels_first' if data_format == 'channels_first'
            else f'dtype={dtype}')
    raise Cifar10Error(f'--{flag} does not run on this device: leave it out')
  network = resnet_model.cifar10_resnet_v2_generator(
      resnet_size, NUM_CLASSES, data_format, DTYPES[dtype], seed)
  return TrainState(network, network.seed)


def open_model(settings: Settings) -> tuple[TrainState, Checkpoints]:
  """Returns the state of the newest checkpoint in model_dir, or a new one."""
  checkpoints = Checkpoints(settings.model_dir)
  # Of several machines, only the first has the folder.
  values = checkpoints.read_newest() if is_chief() else {}
  size = resnet_model.size_in_checkpoint(values) or 32
  state = make_state(settings.resnet_size or int(total(size * is_chief())),
                     settings.data_format, settings.dtype, settings.seed)
  if values:
    checkpoints.restore(state, values)
  if tf.distribute.get_strategy().num_replicas_in_sync > 1:
    for variable in state.variables:
      variable.assign(total(variable.numpy() * is_chief()))
  return state, checkpoints


def compute_gradients(state: TrainState, features: tf.Tensor,
                      labels: tf.Tensor) -> tuple[list, dict]:
  """Returns a replica's part of the whole batch's gradients and values."""
  variables = state.network.trainable_variables
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  scale = FP16_LOSS_SCALE if state.network.dtype == tf.float16 else 1
  with tf.GradientTape() as tape:
    outputs = cifar10_model_fn(features, labels, 'train', state.network)
    scaled_loss = scale / replicas * outputs['loss']
  gradients = [gradient / scale
               for gradient in tape.gradient(scaled_loss, variables)]
  return gradients, {'cross_entropy': outputs['cross_entropy'] / replicas,
                     'loss': outputs['loss'] / replicas,
                     'correct': tf.cast(outputs['correct'], tf.float32)}


def train_step(state: TrainState, batch_size: int, compute: Callable,
               features: tf.Tensor, labels: tf.Tensor) -> dict[str, tf.Tensor]:
  """Trains on one batch or, together with the others, on a replica's share.

  `compute` is compute_gradients of this state, compiled or not. Returns what to
  log, from before the update: cross_entropy, loss and learning_rate, float32
  []; correct, int64 []; images, up to six.
  """
  gradients, values = compute(features, labels)
  # Each replica normalizes its own share of the batch; the moving averages
  # become the mean over the replicas. With one replica this changes nothing.
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  averages = [v for v in state.network.variables if not v.trainable]
  gradients, values, moving = (
      tf.distribute.get_replica_context().all_reduce('SUM', [
          gradients, values, [v.read_value() / replicas for v in averages]]))
  for variable, value in zip(averages, moving):
    variable.assign(value)
  rate = learning_rate(state.global_step, batch_size)
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


def make_train_step(state: TrainState, batch_size: int,
                    xla: bool = False) -> Callable:
  """Returns train_step as a compiled `step(features, labels)`."""
  compute = functools.partial(compute_gradients, state)
  if tf.distribute.get_strategy().num_replicas_in_sync == 1:
    step = functools.partial(train_step, state, batch_size, compute)
    return tf.function(step, jit_compile=xla)
  # XLA cannot compile the exchange between the replicas.
  compute = tf.function(compute, jit_compile=xla)
  return functools.partial(train_step, state, batch_size, compute)


def make_inner_loop(state: TrainState, batch_size: int,
                    xla: bool = False) -> Callable:
  """Returns the compiled `inner_loop(iterator, num_steps)`, which trains.

  It returns the last step's values and finite_steps, int64 [], the number of
  steps with a finite loss.
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


def log_values(step: int, values: dict) -> None:
  """Hook that logs the original's lines, word for word."""
  duration = f' ({values["seconds"]:.3f} sec)' if 'seconds' in values else ''
  if duration:
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
                 'global_step/sec', 'images/sec'):
      if name in values:
        tf.summary.scalar(name, values[name])
    # Under the name that evaluations use, so that both are on one chart.
    tf.summary.scalar('accuracy', values['train_accuracy'])
    # Each image's least value becomes black, its greatest white.
    images = values['images']
    images -= images.min(axis=(1, 2, 3), keepdims=True)
    greatest = images.max(axis=(1, 2, 3), keepdims=True)
    tf.summary.image('images', images / np.maximum(greatest, 1e-6),
                     max_outputs=NUM_SUMMARY_IMAGES)
  writer.flush()


def warn_of_full_disk(folder: str, step: int, values: dict) -> None:
  """Hook that logs once if the events of TensorBoard find no room."""
  if not shutil.disk_usage(folder).free:  # tf.summary does not tell
    logging.log_first_n(
        logging.WARNING, 'No room in %s: TensorBoard misses values', 1, folder)


def mark_start(folder: str, step: int) -> None:
  """Lets TensorBoard drop what an earlier run has logged from this step on."""
  v1 = tf.compat.v1
  with tf.Graph().as_default(), v1.summary.FileWriter(folder) as writer:
    writer.add_session_log(v1.SessionLog(status=v1.SessionLog.START), step)


def markdown_table(*rows: Iterable) -> str:
  """Returns rows of values, the first one the head, for tf.summary.text."""
  head, *rest = ('|'.join(map(str, row)) for row in rows)
  return '\n'.join([head, '|'.join(['---'] * len(rows[0])), *rest])


def show_progress(settings: Settings, step: int, cycle_end: int,
                  seconds: float | None) -> None:
  """Shows in the status line how far training is, given seconds per step."""
  text = f'Step {step} of {settings.train_steps}'
  if seconds:
    cycle, run = (datetime.timedelta(seconds=round((end - step) * seconds))
                  for end in (cycle_end, settings.train_steps))
    text += (f', {settings.batch_size / seconds:,.0f} images/s, '
             f'left: {cycle} of the cycle, {run} in all')
  cifar10.show_status(text)


def make_eval_step(network: Cifar10ResnetV2) -> Callable:
  """Returns a compiled function that adds the next batch to two sums."""
  @tf.function
  def eval_step(iterator, loss, confusion_matrix):
    features, labels = next(iterator)
    outputs = cifar10_model_fn(features, labels, 'eval', network)
    matrix = tf.math.confusion_matrix(
        tf.argmax(labels, axis=1), outputs['classes'], NUM_CLASSES,
        dtype=tf.int64)
    return loss + outputs['loss'], confusion_matrix + matrix
  return eval_step


def evaluate(eval_step: Callable, dataset: tf.data.Dataset, path: str,
             step: int, interrupted: Callable[[], bool] = lambda: False
             ) -> tuple[dict[str, float], np.ndarray] | None:
  """Evaluates the network, saved as `path` at a step; prints the results.

  Returns:
    None if interrupted; else accuracy over all images, loss, the mean over the
    batches, in which the short last one counts like the others, global_step;
    and how many images of each label (row) were given each class, int64
    [10, 10].
  """
  logging.info('Starting evaluation at %s', time.strftime('%Y-%m-%dT%H:%M:%S'))
  # The variables are in memory already, but people search logs for this line.
  logging.info('Restoring parameters from %s', path)
  # Ask for the length here: the copy to a GPU does not know it.
  iterator, num_batches = iter(prefetch_to_gpu(dataset)), len(dataset)
  loss, matrix = tf.zeros([]), tf.zeros([NUM_CLASSES] * 2, tf.int64)
  for batch in range(num_batches):
    if interrupted():
      return None
    cifar10.show_status(f'Evaluating batch {batch + 1} of {num_batches}')
    loss, matrix = eval_step(iterator, loss, matrix)
  loss, matrix = (loss / num_batches).numpy(), matrix.numpy()  # waits
  logging.info('Finished evaluation at %s', time.strftime('%Y-%m-%d-%H:%M:%S'))
  results = {'accuracy': matrix.trace() / matrix.sum(), 'loss': loss}
  # With float32's digits and no more, as the original printed them.
  results = {name: float(str(np.float32(x))) for name, x in results.items()}
  results['global_step'] = step
  logging.info('Saving dict for global step %d: %s', step, ', '.join(
      f'{name} = {results[name]}' for name in sorted(results)))
  cifar10.say(str(results))
  return results, matrix


def write_evaluation(writer: tf.summary.SummaryWriter, results: dict,
                     matrix: np.ndarray) -> None:
  """Writes what TensorBoard shows of an evaluation, as evaluate returns it."""
  with writer.as_default(results['global_step']):
    tf.summary.scalar('accuracy', results['accuracy'])
    tf.summary.scalar('loss', results['loss'])
    for name, accuracy in accuracies(matrix).items():
      tf.summary.scalar(f'per_class/{name}', accuracy)
    tf.summary.text('confusion_matrix', markdown_table(
        [r'label \ predicted', *cifar10.CLASSES],
        *([name, *row] for name, row in zip(cifar10.CLASSES, matrix))))
  writer.flush()


def accuracies(matrix: np.ndarray) -> dict[str, float]:
  """Returns the accuracy of each class, given its confusion matrix."""
  shares = matrix.diagonal() / np.maximum(matrix.sum(axis=1), 1)
  return dict(zip(cifar10.CLASSES, shares.tolist()))


def evaluate_only(settings: Settings) -> tuple[dict[str, float], np.ndarray]:
  """Evaluates the newest checkpoint; prints the accuracy of each class too.

  Returns results and confusion matrix: see evaluate.
  """
  dataset = input_fn('eval', settings.data_dir, settings.batch_size,
                     settings.use_synthetic_data)
  state, checkpoints = open_model(settings)
  if checkpoints.newest is None:
    raise Cifar10Error(f'{settings.model_dir} holds no checkpoint to evaluate: '
                       'train first, or name another --model_dir')
  results, matrix = evaluate(
      make_eval_step(state.network), dataset, checkpoints.newest,
      state.global_step.numpy().item())
  for name, accuracy in accuracies(matrix).items():
    cifar10.say(f'{name:10} {accuracy:.4f}')
  return results, matrix


def export(settings: Settings, export_dir: str) -> None:
  """Writes the newest checkpoint as a SavedModel, complete in itself.

  Of raw images, uint8 [N, 32, 32, 3], it gives classes, int64 [N], class_names,
  string [N], and probabilities, float32 [N, 10]; by its signature
  `standardized`, of standardized ones, float32, which can be quantized.
  """
  # Not every device has convolutions with the channels first.
  state, checkpoints = open_model(
      dataclasses.replace(settings, data_format='channels_last'))

  def classifier(dtype, prepare):
    shape = [None, HEIGHT, WIDTH, DEPTH]

    @tf.function(input_signature=[tf.TensorSpec(shape, dtype, 'images')])
    def classify(images):
      # An error here; in the convolution, the process would be aborted.
      images = prepare(tf.ensure_shape(images, shape))
      outputs = cifar10_model_fn(images, None, 'infer', state.network)
      names = tf.gather(cifar10.CLASSES, outputs['classes'])
      return {**outputs, 'class_names': names}
    return classify

  try:
    tf.saved_model.save(state.network, export_dir, {
        'serving_default': classifier(
            tf.uint8, tf.image.per_image_standardization),
        'standardized': classifier(tf.float32, tf.identity)})
  except (OSError, tf.errors.OpError) as error:
    shutil.rmtree(export_dir, ignore_errors=True)  # a part of it
    raise Cifar10Error(
        f'Cannot export to {export_dir} ({reason(error)}): make room, then run '
        'this again with --eval_only') from None
  logging.info('Exported %s to %s', checkpoints.newest, export_dir)


def train_and_evaluate(
    settings: Settings,
    interrupted: Callable[[], bool] | None = None) -> bool:
  """Trains and evaluates, up to `train_steps`; returns False if interrupted.

  Goes on from the newest checkpoint in `model_dir`. In the scope of a
  tf.distribute strategy, all its replicas share each batch.

  Args:
    settings: What to do.
    interrupted: Tells, once a second, whether to save and end. By default, the
      first KeyboardInterrupt does (a notebook's stop button).

  Raises:
    Cifar10Error: Data, checkpoint, loss or folder are not as they should be.
  """
  eval_data = input_fn('eval', settings.data_dir, settings.batch_size,
                       settings.use_synthetic_data)
  with contextlib.ExitStack() as stack:
    if is_chief():
      stack.enter_context(cifar10.sole_use(
          settings.model_dir, cure='name another --model_dir'))
    interrupted = interrupted or stack.enter_context(cifar10.stop_button())
    state, checkpoints = open_model(settings)
    seed, step = state.seed.numpy().item(), state.global_step.numpy().item()
    if settings.seed not in (None, seed):
      raise Cifar10Error(
          f'{settings.model_dir} was trained with --seed={seed}, not '
          f'{settings.seed}: leave it out, or name another --model_dir')
    train_data = distributed_input(settings.batch_size, functools.partial(
        input_fn, 'train', settings.data_dir, settings.batch_size,
        settings.use_synthetic_data, seed=seed, step=step,
        steps_per_eval=settings.steps_per_eval))
    facts = describe_run(settings, state)
    if not is_chief():
      return run_cycles(settings, state, train_data, interrupted)
    eval_dir = os.path.join(settings.model_dir, 'eval')
    mark_start(settings.model_dir, step + 1)
    mark_start(eval_dir, step)
    train_writer, eval_writer = map(
        tf.summary.create_file_writer, (settings.model_dir, eval_dir))
    with train_writer.as_default(step):
      tf.summary.text('run', markdown_table(['', ''], *facts.items()))
      summary_v2.hparams(
          {**settings.of_training, 'resnet_size': state.network.resnet_size,
           'data_format': state.network.data_format, 'seed': str(seed)},
          trial_id=settings.model_dir)
    eval_step = make_eval_step(state.network)

    def evaluate_now(path, step):
      evaluation = evaluate(eval_step, eval_data, path, step, interrupted)
      if evaluation:
        write_evaluation(eval_writer, *evaluation)
      return bool(evaluation)

    if checkpoints.newest is None:
      checkpoints.save(state)
    return run_cycles(
        settings, state, train_data, interrupted, checkpoints, evaluate_now,
        [log_values, functools.partial(write_summaries, train_writer),
         functools.partial(warn_of_full_disk, settings.model_dir)])


def run_cycles(
    settings: Settings, state: TrainState, train_data: Iterable,
    interrupted: Callable[[], bool], checkpoints: Checkpoints | None = None,
    evaluate_now: Callable[[str, int], bool] = lambda path, step: True,
    hooks: Iterable[Callable[[int, dict], None]] = ()) -> bool:
  """Trains, logs, evaluates and saves; returns False if it was interrupted.

  A cycle ends with an evaluation, at each multiple of `steps_per_eval`. Steps
  run in pieces of about a second, which end at the steps to log. Only the first
  machine has checkpoints, hooks and evaluations.
  """
  inner_loop = make_inner_loop(
      state, settings.batch_size, uses_xla(settings.xla))
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
      path = checkpoints and checkpoints.newest
      if total(int(not evaluate_now(path, step))):
        logging.warning('Stopped: the same command evaluates step %d', step)
        return False
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
          f'{resnet_model.WHEN_NOT_FINITE}')
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
    if checkpoints and (
        stop or step == cycle_end
        or time.monotonic() - saved_at >= settings.save_checkpoints_secs):
      checkpoints.save(state)
      saved_at = time.monotonic()
    if stop:
      logging.warning(
          'Stopped after step %d, saved as %s: the same command goes on from '
          'there', step, checkpoints.newest if checkpoints else 'elsewhere')
      return False
    if step == cycle_end:
      logging.info('Loss for final step: %s.', values['loss'])


def describe_run(settings: Settings, state: TrainState) -> dict:
  """Logs what the run uses and will do; returns that and the flags by name."""
  device = f'CPU ({platform.machine()}, {os.cpu_count()} cores)'
  for gpu in tf.config.get_visible_devices('GPU')[:1]:
    details = tf.config.experimental.get_device_details(gpu)
    device = details.get('device_name', 'GPU')
  replicas = tf.distribute.get_strategy().num_replicas_in_sync
  if replicas > 1:
    device = f'{replicas} replicas: {device}'
  facts = {'network': repr(state.network), 'device': device,
           'XLA': 'on' if uses_xla(settings.xla) else 'off',
           'seed': state.seed.numpy(), 'TensorFlow': tf.__version__,
           'NumPy': np.__version__, 'Python': platform.python_version()}
  logging.info('%(network)s, XLA %(XLA)s, on %(device)s, seed %(seed)d', facts)
  step = state.global_step.numpy()
  if step >= settings.train_steps:
    logging.info('All %d steps are trained already: only evaluating. A higher '
                 '--train_steps would train on', settings.train_steps)
  else:
    logging.info(
        'Training steps %d to %d, batch size %d. The learning rate drops after '
        'steps %d, %d and %d', step + 1, settings.train_steps,
        settings.batch_size, *learning_rate_boundaries(settings.batch_size))
  warn_of_drops(settings, state)
  return facts | {f'--{name}': value for name, value in vars(settings).items()}


def warn_of_drops(settings: Settings, state: TrainState) -> None:
  """Logs if another batch size than before changes the learning rate's drops.

  What was logged in this cycle tells the batch size before.
  """
  step, seen = state.global_step.numpy(), state.train_accuracy[1].numpy()
  in_cycle = (step - 1) % settings.steps_per_eval + 1
  before = seen // -(-in_cycle // LOG_STEPS)
  drops = [np.searchsorted(learning_rate_boundaries(size), step)
           for size in (before or settings.batch_size, settings.batch_size)]
  if drops[0] != drops[1]:
    logging.warning(
        'The batch size changes from %d to %d, and with it the learning rate: '
        '%d of its drops lie before step %d, not %d', before,
        settings.batch_size, drops[1], step, drops[0])


def make_strategy(num_gpus: int | None) -> tf.distribute.Strategy:
  """Returns what shares training among GPUs or the machines of TF_CONFIG."""
  gpus = tf.config.list_physical_devices('GPU')
  if num_gpus is not None and num_gpus > len(gpus):
    raise Cifar10Error(f'--num_gpus={num_gpus} is more than the {len(gpus)} '
                       'that TensorFlow finds here: lower it, or leave it out')
  if num_gpus != -1:
    gpus = gpus[:1 if num_gpus is None else num_gpus]
  tf.config.set_visible_devices(gpus, 'GPU')
  try:
    resolver = tf.distribute.cluster_resolver.TFConfigClusterResolver()
    cluster = resolver.cluster_spec()
    addresses = [address for role in cluster.jobs
                 for address in cluster.job_tasks(role)]
    if addresses and {*cluster.jobs, resolver.task_type} - {'chief', 'worker'}:
      raise ValueError('all machines train: no roles but chief and worker')
    if len(set(addresses)) < len(addresses):
      raise ValueError('an address is there twice')
    if len(addresses) > 1:
      cifar10.wait_for_machines(addresses, cluster.task_address(
          resolver.task_type, resolver.task_id))
      return tf.distribute.MultiWorkerMirroredStrategy(resolver)
  except (ValueError, TypeError, LookupError, AttributeError,
          tf.errors.OpError) as error:
    raise Cifar10Error('TF_CONFIG names no cluster of workers '
                       f'({reason(error)}): correct or unset it') from None
  if len(gpus) > 1:
    return tf.distribute.MirroredStrategy()
  return tf.distribute.get_strategy()


def require_same(facts: dict) -> None:
  """Raises Cifar10Error on all machines if they differ in these values."""
  ours = np.array([zlib.crc32(repr(fact).encode()) for fact in facts.values()])
  differ = total((ours != total(ours * is_chief())).astype(int))
  names = [name for name, number in zip(facts, differ) if number]
  if names:
    raise Cifar10Error(f'The machines differ in {", ".join(names)}: start all '
                       'with the same')


def is_chief() -> bool:
  """Returns whether this is the first machine, which saves and prints."""
  resolver = tf.distribute.get_strategy().cluster_resolver
  if not resolver or not resolver.task_type:
    return True
  first = 'chief' if 'chief' in resolver.cluster_spec().jobs else 'worker'
  return (resolver.task_type, resolver.task_id) == (first, 0)


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


def distributed_input(batch_size: int, make_dataset: Callable) -> Iterable:
  """Returns a dataset of which each replica gets an equal share."""
  strategy = tf.distribute.get_strategy()
  replicas = strategy.num_replicas_in_sync
  if batch_size % replicas:
    raise Cifar10Error(f'--batch_size={batch_size} is no multiple of the '
                       f'{replicas} replicas that share it: make it one')
  dataset = strategy.distribute_datasets_from_function(
      lambda context: make_dataset(context=context))
  # Only the default strategy does not copy batches to its device by itself.
  return prefetch_to_gpu(dataset) if replicas == 1 else dataset


def define_flags() -> None:
  """Defines the flags of this script."""
  if cifar10.are_defined('model_dir'):
    return
  cifar10.define_data_dir()
  flags.declare_key_flag('data_dir')  # for --help to list it here too
  flags.DEFINE(
      cifar10.PathParser(), 'model_dir', Settings.model_dir,
      'Folder of checkpoints and TensorBoard events. With --use_synthetic_data '
      'the default ends with _synthetic.')
  flags.DEFINE_integer(
      'resnet_size', Settings.resnet_size,
      'Depth of the network, 6n + 2: 8, 14, 20, ... The default is that of the '
      'newest checkpoint in --model_dir, and 32 in a new folder.')
  flags.register_validator(
      'resnet_size',
      lambda size: size is None or resnet_model.is_resnet_size(size),
      'must be 6n + 2: 8, 14, 20, 32, 44, 56, 110, ...')
  flags.DEFINE_integer('train_steps', Settings.train_steps,
                       'Training steps (batches) in total.', 1, MAX_STEPS)
  flags.DEFINE_integer('steps_per_eval', Settings.steps_per_eval,
                       'Training steps between evaluations.', 1, MAX_STEPS)
  flags.DEFINE_integer(
      'batch_size', Settings.batch_size, 'Images per batch. The learning rate '
      'scales with it.', 1, NUM_EXAMPLES_PER_EPOCH_FOR_TRAIN)
  flags.DEFINE_integer(
      'save_checkpoints_secs', Settings.save_checkpoints_secs,
      'Seconds between checkpoints. Each cycle also ends with one.', 1)
  flags.DEFINE_enum(
      'data_format', Settings.data_format, list(resnet_model.LAYOUTS), 'Layout '
      'of the images in the network. The default is channels_first on a GPU, '
      'else channels_last.')
  flags.DEFINE_enum('dtype', Settings.dtype, list(DTYPES),
                    'Number type of the convolutions. All else is fp32.')
  flags.DEFINE_enum('xla', Settings.xla, ['auto', 'on', 'off'],
                    'Compile the training step with XLA. auto: on a GPU only.')
  flags.DEFINE_integer(
      'num_gpus', None, 'GPUs of this machine that share each batch: -1 all, 0 '
      'none. The default is one, if there is one.', -1)
  flags.DEFINE_integer(
      'seed', Settings.seed, 'Seed of initial values and batches, to repeat a '
      'run exactly. The default is random, and logged.', 0, 2**32 - 1)
  flags.DEFINE_bool('use_synthetic_data', Settings.use_synthetic_data,
                    'Train and evaluate on generated images: no data needed.')
  flags.DEFINE_bool('eval_only', False, 'Only evaluate the newest checkpoint '
                    'and print the accuracy of each class.')
  flags.DEFINE(
      cifar10.PathParser(), 'export_dir', None, 'New folder for a SavedModel, '
      'written after training or with --eval_only.')


def settings_from(values: flags.FlagValues) -> Settings:
  """Returns the settings that the flags give."""
  given = {f.name: values[f.name].value for f in dataclasses.fields(Settings)}
  given['model_dir'] = os.path.normpath(values.model_dir)
  if values.use_synthetic_data and values['model_dir'].using_default_value:
    # Real training must not go on from weights that learned generated images.
    given['model_dir'] += '_synthetic'
  return Settings(**given)


def run(settings: Settings, values: flags.FlagValues,
        strategy: tf.distribute.Strategy,
        interrupted: Callable[[], bool]) -> bool:
  """Does what the flags ask for; returns False if it was interrupted."""
  with strategy.scope():
    chief = is_chief()
    require_same({
        **{f'--{name}': value for name, value in settings.of_training.items()},
        '--eval_only': values.eval_only, 'TensorFlow': tf.__version__})
  if not chief:
    logging.warning('The first machine logs, saves and prints')
    logging.set_verbosity(min(logging.get_verbosity(), logging.WARNING))
  if values.num_gpus != 0:  # beside the rest, since the driver's tool may hang
    threading.Thread(target=resnet_model.warn_of_idle_gpu, daemon=True).start()
  export_dir = values.export_dir if chief else None
  if export_dir and os.path.lexists(export_dir):
    raise Cifar10Error(f'--export_dir={export_dir} is there already: name a '
                       'new folder, or remove it')
  finished = True
  if not values.eval_only:
    # Only training is shared: the rest would wait for the other machines.
    with strategy.scope():
      finished = train_and_evaluate(settings, interrupted)
      total(0)  # no machine leaves before all have written
  elif chief:
    evaluate_only(settings)
  if finished and export_dir:
    export(settings, export_dir)
  return finished


def main(argv: list[str]) -> int:
  values = flags.FLAGS
  cifar10.show_log()
  if values.seed is not None:
    tf.config.experimental.enable_op_determinism()
  settings, strategy, stop = settings_from(values), None, cifar10.StopRequest()
  with cifar10.errors_in_one_line():
    cifar10.refuse_arguments(argv)
    try:
      cifar10.receive_signals(stop)
      strategy = make_strategy(values.num_gpus)
      cifar10.catch_signals()  # again: a cluster's own handling hangs
      finished = run(settings, values, strategy, stop)
      return 128 + stop.signal if stop.signal else 0 if finished else 143
    except tf.errors.ResourceExhaustedError:
      raise Cifar10Error('The device has too little memory: try a smaller '
                         '--batch_size') from None
    except tf.errors.OpError as error:
      if not isinstance(strategy, tf.distribute.MultiWorkerMirroredStrategy):
        raise
      raise Cifar10Error(
          f'Another machine does not answer ({reason(error)}): start all '
          'again, they go on from the last checkpoint') from None


if __name__ == '__main__':
  define_flags()
  app.run(main)
