"""Measures the port's speed and memory; prints one table.

    python tests/benchmark.py --resnet_size=32 --batch_size=128 --seconds=5

All rows are measured in turn and the turn is repeated, so that a machine that
slows down meets all of them. A figure is the median over the repeats, and so is
a ratio: of the ratio within each. Generated records in files of the real sizes
stand in for CIFAR-10.

Measured with ResNet-32, batch 128, fp32, TensorFlow 2.21.0, Keras 3.15.1,
Python 3.11.7 on two cores of an AMD EPYC with AVX-512, five turns of 4 seconds,
in images/s: input 176,919 (9.31 of one at a time), bare step 704, loop 707,
Keras fit 552 (0.76 of the loop), evaluation 2,365 (3.37 of the bare step). From
the last step to the first evaluation batch 0.58 s, from the evaluation to the
next step 0.19 s. The process takes 0.75 GB more than TensorFlow's import, and
no more after 300 cycles. By tf.profiler, 86 % of a step's time is convolution,
9 % batch norm. With AVX2 only, turns differ by 20 %.

Tried on a CPU without gain: XLA (half the speed), channels_first (half), other
numbers of threads, TensorFlow's tuning of the input pipeline.

What several GPUs should give, on paper, not measured: a step takes
128 * F / 10 TFLOP/s for 128 images a GPU, with F = 0.39 GFLOP an image
(ResNet-32) or 1.52 (ResNet-110). Then P GPUs exchange S = 4 bytes *
(parameters + moving averages), 1.87 or 6.96 MB, in a ring:
2 (P - 1) a + 2 (P - 1) / P * S / b, with a = 10 us and b = 100 GB/s within a
machine, 20 us and 10 GB/s between machines. For ResNet-32 that leaves 97 % of
the speed with 8 GPUs, 63 % with 64 on 8 machines; for ResNet-110 99 and 83 %.
"""

from collections.abc import Callable
import contextlib
import dataclasses
import functools
import os
import platform
import re
import statistics
import subprocess
import sys
import tempfile
import time
from unittest import mock

sys.path.insert(0, os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
if __name__ == '__main__':
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')  # as the script does

from absl import app, flags, logging
import keras
import numpy as np
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
import resnet_model

# What a row is compared with: the name of the ratio, and the other row.
RATIOS = {
    'input pipeline': ('of one at a time', 'input pipeline, one at a time'),
    'training loop': ('of the bare step', 'bare training step'),
    'Keras fit': ('of the training loop', 'training loop'),
    'bare inference': ('of the bare step', 'bare training step'),
    'evaluation': ('of the bare step', 'bare training step'),
}


def write_records(data_dir: str, num_records: int = 10000) -> None:
  """Writes generated records into files named, and sized, as CIFAR-10's."""
  folder = os.path.join(data_dir, cifar10.FOLDER_NAME)
  os.makedirs(folder)
  records = np.tile(cifar10.synthetic_records('train'), (2, 1))
  for name in (*cifar10.TRAIN_FILES, cifar10.TEST_FILE):
    records[:num_records].tofile(os.path.join(folder, name))


def one_record_at_a_time(data_dir: str, batch_size: int) -> tf.data.Dataset:
  """Returns the training input as the original made it, one image by one."""

  def parse_and_augment(record):
    images, labels = cifar10_main.dataset_parser(
        tf.io.decode_raw(record, tf.uint8)[tf.newaxis])
    image = tf.image.resize_with_crop_or_pad(images[0], 40, 40)
    image = tf.image.random_crop(tf.cast(image, tf.float32), [32, 32, 3])
    return tf.image.random_flip_left_right(image), labels[0]

  dataset = tf.data.FixedLengthRecordDataset(
      cifar10_main.filenames('train', data_dir), cifar10.RECORD_BYTES)
  dataset = dataset.repeat().map(parse_and_augment)
  dataset = dataset.shuffle(cifar10_main.SHUFFLE_RECORDS + 3 * batch_size)
  dataset = dataset.map(lambda image, label: (
      tf.image.per_image_standardization(image), label))
  return dataset.batch(batch_size).prefetch(1)


def keras_network(settings: cifar10_main.Settings) -> keras.Model:
  """Builds the same network from Keras layers, weight decay included.

  It is compiled with our settings: by itself Keras takes XLA on a CPU too.
  """
  layers = keras.layers
  decay = keras.regularizers.L2(cifar10_main.WEIGHT_DECAY / 2)
  dtype = cifar10_main.DTYPES[settings.dtype]
  keras.config.set_dtype_policy(
      dtype if dtype == 'float32' else f'mixed_{dtype}')

  def batch_norm_relu(x):
    return layers.ReLU()(layers.BatchNormalization(
        momentum=resnet_model.BATCH_NORM_DECAY,
        epsilon=resnet_model.BATCH_NORM_EPSILON,
        beta_regularizer=decay, gamma_regularizer=decay)(x))

  def conv2d(x, filters, kernel_size, strides=1):
    if strides > 1 and kernel_size > 1:
      x = layers.ZeroPadding2D(kernel_size // 2)(x)
    return layers.Conv2D(
        filters, kernel_size, strides, 'valid' if strides > 1 else 'same',
        use_bias=False, kernel_regularizer=decay)(x)

  inputs = keras.Input([32, 32, 3])
  x = conv2d(inputs, 16, 3)
  for filters, strides in resnet_model.BLOCK_LAYERS:
    for i in range((settings.resnet_size - 2) // 6):
      h = batch_norm_relu(x)
      x = x if i else conv2d(h, filters, 1, strides)
      h = conv2d(h, filters, 3, 1 if i else strides)
      x = layers.Add()([conv2d(batch_norm_relu(h), filters, 3), x])
  x = layers.GlobalAveragePooling2D()(batch_norm_relu(x))
  outputs = layers.Dense(cifar10_main.NUM_CLASSES, dtype='float32',
                         kernel_regularizer=decay, bias_regularizer=decay)(x)
  network = keras.Model(inputs, outputs)
  network.compile(
      keras.optimizers.SGD(
          cifar10_main.INITIAL_LEARNING_RATE, cifar10_main.MOMENTUM),
      keras.losses.CategoricalCrossentropy(from_logits=True),
      metrics=['accuracy'], jit_compile=cifar10_main.uses_xla(settings.xla))
  return network


def measures(settings: cifar10_main.Settings, seconds: float
             ) -> list[Callable[[], dict[str, float]]]:
  """Returns the functions that measure one or more rows each."""
  batch_size = settings.batch_size
  train_data = cifar10_main.prefetch_to_gpu(
      cifar10_main.input_fn('train', settings))
  eval_data = cifar10_main.input_fn('eval', settings)
  batch, bare = next(iter(train_data)), {}
  state = cifar10_main.make_state(settings)
  inner_loop = cifar10_main.make_inner_loop(state)
  train_step = cifar10_main.make_train_step(state)
  eval_step = cifar10_main.make_eval_step(state)
  inference = tf.function(functools.partial(
      cifar10_main.cifar10_model_fn, mode='eval', state=state))
  fit = functools.partial(keras_network(settings).fit, train_data,
                          shuffle=False, verbose=0)

  def rate(function):
    """Returns the images/s of a function that takes a batch each time."""
    function()
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + seconds:
      result = function()
      count += 1
    tf.nest.flatten(result)[0].numpy()  # waits, on a GPU
    return count * batch_size / (time.perf_counter() - started)

  def steps():
    """Returns how many steps to time: as many as bare ones in the seconds."""
    return max(2, round(seconds * bare['bare training step'] / batch_size))

  def measure_step():
    """Steps on one batch in memory, nothing looked at between."""
    bare['bare training step'] = rate(lambda: train_step(*batch)['loss'])
    return bare

  def measure_input(name, dataset):
    """From the start of an iteration to its first batch, then on from there.

    That of input_fn has read the files before: a part of the start.
    """
    started, iterator = time.perf_counter(), iter(dataset)
    next(iterator)
    return {f'{name}, first batch [s]': time.perf_counter() - started,
            name: rate(lambda: next(iterator))}

  def measure_loop():
    """The loop with input, hooks, log and summaries, without its first step."""
    hooks = [cifar10_main.log_values, functools.partial(
        cifar10_main.write_summaries,
        tf.summary.create_file_writer(settings.data_dir))]
    ends = []
    state.settings = dataclasses.replace(settings, train_steps=steps() + 1)
    state.global_step.assign(0)
    with mock.patch.multiple(
        cifar10_main, make_inner_loop=lambda state: timed(inner_loop, ends),
        evaluate=lambda *_: (None, None), write_evaluation=mock.DEFAULT):
      cifar10_main.run_cycles(
          state, train_data, None, mock.Mock(), None, lambda: False, hooks)
    return {'training loop': steps() * batch_size / (ends[-1] - ends[0])}

  def measure_keras():
    """`fit` on the same input, from the end of its second step on."""
    ends = []
    fit(steps_per_epoch=steps() + 2, callbacks=[
        keras.callbacks.LambdaCallback(on_train_batch_end=lambda batch, logs: (
            ends.append(time.perf_counter())))])
    return {'Keras fit': steps() * batch_size / (ends[-1] - ends[1])}

  def measure_evaluation():
    """All 10,000 images, from the call of evaluate to its results."""
    started = time.perf_counter()
    cifar10_main.evaluate(eval_step, eval_data, 'none', 0)
    return {'evaluation': 10000 / (time.perf_counter() - started)}

  partial = functools.partial
  return [
      partial(measure_input, 'input pipeline, one at a time',
              one_record_at_a_time(settings.data_dir, batch_size)),
      partial(measure_input, 'input pipeline', train_data),
      measure_step, measure_loop, measure_keras,
      lambda: {'bare inference': rate(lambda: inference(*batch)['loss'])},
      measure_evaluation, partial(measure_cycle_changes, settings),
      partial(measure_start, settings)]


def timed(function: Callable, ends: list[float]) -> Callable:
  """Returns a function that waits for its results and appends the time."""
  def call(*args):
    result = tf.nest.map_structure(lambda value: value.numpy(), function(*args))
    ends.append(time.perf_counter())
    return tf.nest.map_structure(tf.constant, result)
  return call


def measure_cycle_changes(settings: cifar10_main.Settings) -> dict[str, float]:
  """Two short cycles of a new run that evaluates a single batch.

  A change lasts from the end of the last step, or of the evaluation, to the end
  of the evaluation batch or step that follows: saving, tracing and the first
  batch of the input count. Of the two evaluations, the longer change is taken.
  """
  steps, evaluations = [], []
  make_inner_loop = cifar10_main.make_inner_loop
  make_eval_step = cifar10_main.make_eval_step
  with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
      cifar10_main,
      make_inner_loop=lambda state: timed(make_inner_loop(state), steps),
      make_eval_step=lambda state: timed(make_eval_step(state), evaluations)):
    write_records(folder, settings.batch_size)
    cifar10_main.train_and_evaluate(dataclasses.replace(
        settings, data_dir=folder, model_dir=os.path.join(folder, 'model'),
        train_steps=6, steps_per_eval=3))
  first, second = evaluations
  before = max(end for end in steps if end < first)
  after = min(end for end in steps if end > first)
  return {'last step to first evaluation batch [s]': max(
              first - before, second - steps[-1]),
          'evaluation to next step [s]': after - first}


def measure_start(settings: cifar10_main.Settings) -> dict[str, float]:
  """Processes that import TensorFlow, or run the script for two cycles.

  Times are from their start to the end of the import, or to the first logged
  step, of which the import's is taken off. So are the peaks of memory.
  """
  (imported, imported_peak), = seen_in_output(
      [sys.executable, '-c',
       'import sys, tensorflow; print("done", flush=True); sys.stdin.read()'],
      'done')
  with tempfile.TemporaryDirectory() as model_dir:
    values = vars(settings) | {
        'model_dir': model_dir, 'train_steps': 6, 'steps_per_eval': 3}
    (first, _), (_, peak) = seen_in_output(
        [sys.executable, cifar10_main.__file__, *(
            f'--{name}={value}' for name, value in values.items()
            if value is not None)], ', step = 1\n', "'global_step': 6")
  return {'import tensorflow [s]': imported,
          'from there to the first logged step [s]': first - imported,
          'import tensorflow, peak memory [GB]': imported_peak,
          'whole run, peak memory above that [GB]': peak - imported_peak}


def seen_in_output(command: list[str],
                   *texts: str) -> list[tuple[float, float]]:
  """Runs a command until its output has shown the texts, one after another.

  Returns, for each text, the seconds until then and the peak memory in GB.
  """
  started, seen = time.perf_counter(), []
  process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  for text in texts:
    if not any(text in line for line in process.stdout):  # reads up to it
      raise RuntimeError(f'{command} has not printed {text!r}')
    seconds = time.perf_counter() - started
    with open(f'/proc/{process.pid}/status', encoding='ascii') as status:
      kilobytes = re.search(r'VmHWM:\s+(\d+)', status.read()).group(1)
    seen.append((seconds, int(kilobytes) * 1024 / 1e9))
  process.communicate()
  return seen


def table(results: dict[str, list[float]]) -> str:
  """Returns the table: medians, their spread, and the ratios."""
  lines = ['| what | median | least - most | ratio |', '|---|---|---|---|']
  for name, values in results.items():
    unit = '{:.2f}' if name.endswith(']') else '{:,.0f} images/s'
    ratio = ''
    if name in RATIOS:
      words, other = RATIOS[name]
      median = statistics.median(
          ours / theirs for ours, theirs in zip(values, results[other]))
      ratio = f'{median:.2f} {words}'
    median = unit.format(statistics.median(values))
    spread = ' - '.join(unit.format(f(values)).split()[0] for f in (min, max))
    lines.append(f'| {name} | {median} | {spread} | {ratio} |')
  return '\n'.join(lines)


def main(argv: list[str]) -> None:
  values, results = flags.FLAGS, {}
  with tempfile.TemporaryDirectory() as folder:
    settings = cifar10_main.Settings(
        folder, resnet_size=values.resnet_size, batch_size=values.batch_size,
        dtype=values.dtype, xla=values.xla)
    write_records(folder)
    # Log lines cost what they cost, but are not to be seen here.
    logging.set_verbosity(logging.INFO)
    logging.get_absl_handler().use_absl_log_file('benchmark', folder)
    functions = measures(settings, values.seconds)
    for i, measure in enumerate(functions * values.repeats):
      print(f'\r{i} of {len(functions) * values.repeats}', end='',
            file=sys.stderr, flush=True)
      with contextlib.redirect_stdout(None):
        for name, value in measure().items():
          results.setdefault(name, []).append(value)
  network = cifar10_main.make_state(settings).network
  print(f'\r{network}, batch {settings.batch_size}, XLA '
        f'{"on" if cifar10_main.uses_xla(settings.xla) else "off"}; '
        f'{platform.machine()}, {os.cpu_count()} cores; '
        f'TensorFlow {tf.__version__}, Keras {keras.__version__}, '
        f'Python {platform.python_version()}\n\n{table(results)}')


if __name__ == '__main__':
  flags.DEFINE_integer('resnet_size', 32, 'Depth of the network.')
  flags.DEFINE_integer('batch_size', 128, 'Images per batch.')
  flags.DEFINE_string('dtype', 'fp32', 'Numbers in the convolutions.')
  flags.DEFINE_string('xla', 'auto', 'Compile the training step by XLA.')
  flags.DEFINE_float('seconds', 5, 'Time for each figure.', lower_bound=0)
  flags.DEFINE_integer('repeats', 5, 'Turns of all rows.', lower_bound=1)
  app.run(main)
