"""Measures the port's speed and memory; prints one table.

    python tests/benchmark.py --resnet_size=32 --batch_size=128 --seconds=5

All rows are measured in turn and the turn is repeated, so that a machine that
slows down meets all of them. A figure is the median over the repeats, and so is
a ratio: of the ratio within each. Each function says what its timer covers.
Generated records in files of the real sizes stand in for CIFAR-10.

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
import functools
import itertools
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

  def parse(record):
    record = tf.io.decode_raw(record, tf.uint8)
    label = tf.one_hot(tf.cast(record[0], tf.int32), cifar10_main.NUM_CLASSES)
    image = tf.transpose(tf.reshape(record[1:], [3, 32, 32]), [1, 2, 0])
    return tf.cast(image, tf.float32), label

  def augment(image, label):
    image = tf.image.resize_with_crop_or_pad(image, 40, 40)
    image = tf.image.random_crop(image, [32, 32, 3])
    return tf.image.random_flip_left_right(image), label

  def standardize(image, label):
    return tf.image.per_image_standardization(image), label

  dataset = tf.data.FixedLengthRecordDataset(
      cifar10_main.filenames('train', data_dir), cifar10.RECORD_BYTES)
  dataset = dataset.repeat().map(parse).map(augment)
  dataset = dataset.shuffle(cifar10_main.SHUFFLE_RECORDS + 3 * batch_size)
  return dataset.map(standardize).batch(batch_size).prefetch(1)


def keras_network(resnet_size: int) -> keras.Model:
  """Builds the same network from Keras layers, weight decay included."""
  layers = keras.layers
  decay = keras.regularizers.L2(cifar10_main.WEIGHT_DECAY / 2)

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
    for i in range((resnet_size - 2) // 6):
      h = batch_norm_relu(x)
      x = x if i else conv2d(h, filters, 1, strides)
      h = conv2d(h, filters, 3, 1 if i else strides)
      x = layers.Add()([conv2d(batch_norm_relu(h), filters, 3), x])
  x = layers.GlobalAveragePooling2D()(batch_norm_relu(x))
  outputs = layers.Dense(cifar10_main.NUM_CLASSES, dtype='float32',
                         kernel_regularizer=decay, bias_regularizer=decay)(x)
  return keras.Model(inputs, outputs)


class Benchmark:
  """One network, its data and all that is measured with them."""

  def __init__(self, values: flags.FlagValues, folder: str):
    self._size, self._batch = values.resnet_size, values.batch_size
    self._dtype, self._seconds = values.dtype, values.seconds
    self._xla_flag = values.xla
    self._xla = cifar10_main.uses_xla(values.xla)
    self._folder = folder
    write_records(folder)
    self._train_data = cifar10_main.prefetch_to_gpu(
        cifar10_main.input_fn('train', self._settings()))
    self._eval_data = cifar10_main.input_fn('eval', self._settings())
    self._state = state = cifar10_main.make_state(self._settings())
    self.setting = (
        f'ResNet-{self._size}, batch {self._batch}, {self._dtype}, XLA '
        f'{"on" if self._xla else "off"}, {state.network.data_format}')
    self._inner_loop = cifar10_main.make_inner_loop(state)
    self._step = cifar10_main.make_train_step(state)
    self._evaluation_step = cifar10_main.make_eval_step(state)
    self._eval_step = tf.function(functools.partial(
        cifar10_main.cifar10_model_fn, mode='eval', state=state))
    self._one_batch = next(iter(self._train_data))
    self._keras_network = self._compiled_keras_network()

  def _compiled_keras_network(self):
    """Compiles Keras with our settings: by itself it takes XLA on a CPU too."""
    keras.config.set_dtype_policy({
        'fp32': 'float32', 'bf16': 'mixed_bfloat16', 'fp16': 'mixed_float16',
    }[self._dtype])
    network = keras_network(self._size)
    network.compile(
        keras.optimizers.SGD(
            keras.optimizers.schedules.PiecewiseConstantDecay(
                cifar10_main.learning_rate_boundaries(self._batch),
                [cifar10_main.INITIAL_LEARNING_RATE * self._batch / 128 * decay
                 for decay in cifar10_main.LEARNING_RATE_DECAYS]),
            cifar10_main.MOMENTUM),
        keras.losses.CategoricalCrossentropy(from_logits=True),
        metrics=['accuracy'],
        jit_compile=self._xla)
    return network

  def _settings(self, **changes) -> cifar10_main.Settings:
    return cifar10_main.Settings(
        **{'data_dir': self._folder, 'resnet_size': self._size,
           'batch_size': self._batch, 'dtype': self._dtype,
           'xla': self._xla_flag, **changes})

  def measures(self) -> list[Callable[[], dict[str, float]]]:
    """Returns the functions that measure one or more rows each."""
    return [self.reference_input, self.input, self.bare_step, self.loop,
            self.keras_fit, self.bare_inference, self.evaluation,
            self.cycle_changes, self.start]

  def _input(self, name: str, dataset: tf.data.Dataset) -> dict[str, float]:
    started = time.perf_counter()
    iterator = iter(dataset)
    next(iterator)
    first = time.perf_counter() - started
    return {f'{name}, first batch [s]': first,
            name: self._rate(lambda: next(iterator))}

  def _rate(self, function: Callable) -> float:
    """Returns the images/s of a function that takes a batch each time."""
    count, started = 0, time.perf_counter()
    while time.perf_counter() < started + self._seconds:
      result = function()
      count += 1
    tf.nest.flatten(result)[0].numpy()  # waits, on a GPU
    return count * self._batch / (time.perf_counter() - started)

  def reference_input(self) -> dict[str, float]:
    """From the start of an iteration to its first batch, then on from there."""
    return self._input('input pipeline, one at a time',
                       one_record_at_a_time(self._folder, self._batch))

  def input(self) -> dict[str, float]:
    """The same of input_fn, which has read the files: a part of the start."""
    return self._input('input pipeline', self._train_data)

  def bare_step(self) -> dict[str, float]:
    """Training steps on one batch in memory, nothing looked at between."""
    step = functools.partial(self._step, *self._one_batch)
    step()
    return {'bare training step': self._rate(lambda: step()['loss'])}

  def loop(self) -> dict[str, float]:
    """The loop with input, hooks, log and summaries, without its first step."""
    writer = tf.summary.create_file_writer(self._folder)
    hooks = [cifar10_main.log_values,
             functools.partial(cifar10_main.write_summaries, writer)]

    def seconds_for(num_steps):
      """From the end of the first step to that of the last."""
      started = []

      def inner_loop(*args):
        values = self._inner_loop(*args)
        if not started:
          values['loss'].numpy()  # waits, on a GPU
          started.append(time.perf_counter())
        return values

      settings = self._settings(train_steps=num_steps + 1)
      state = self._state
      state.settings = settings
      state.global_step.assign(0)
      with mock.patch.multiple(
          cifar10_main, make_inner_loop=lambda state: inner_loop,
          evaluate=lambda *_: (None, None), write_evaluation=mock.DEFAULT):
        cifar10_main.run_cycles(
            state, self._train_data, None, mock.Mock(), None, lambda: False,
            hooks)
      return time.perf_counter() - started[0]

    steps = max(2, round(self._seconds / seconds_for(1)))
    return {'training loop': steps * self._batch / seconds_for(steps)}

  def keras_fit(self) -> dict[str, float]:
    """`fit` on the same input, from the end of its second step on."""
    times = []
    callback = keras.callbacks.LambdaCallback(
        on_train_batch_end=lambda batch, logs: times.append(
            time.perf_counter()))
    fit = functools.partial(self._keras_network.fit, self._train_data,
                            callbacks=[callback], shuffle=False, verbose=0)
    fit(steps_per_epoch=4)
    steps = max(4, round(self._seconds / (times[-1] - times[-2])))
    del times[:]
    fit(steps_per_epoch=steps)
    seconds = times[-1] - times[1]
    return {'Keras fit': (steps - 2) * self._batch / seconds}

  def bare_inference(self) -> dict[str, float]:
    """The network and its loss on one batch in memory, without training."""
    step = functools.partial(self._eval_step, *self._one_batch)
    step()
    return {'bare inference': self._rate(lambda: step()['loss'])}

  def evaluation(self) -> dict[str, float]:
    """All 10,000 images, from the call of evaluate to its results."""
    started = time.perf_counter()
    cifar10_main.evaluate(self._evaluation_step, self._eval_data, 'none', 0)
    num_images = cifar10.RECORDS_PER_FILE
    return {'evaluation': num_images / (time.perf_counter() - started)}

  def cycle_changes(self) -> dict[str, float]:
    """Two short cycles of a new run that evaluates a single batch.

    Each change lasts from the end of the last step, or of the evaluation, to
    the end of the first evaluation batch or step that follows: saving, tracing
    and the first batch of the input count. The longest of its kind is returned.
    """
    ends = []

    def timed(what, make):
      def make_timed(*args):
        function = make(*args)
        def call(*args):
          result = tf.nest.map_structure(
              lambda value: value.numpy(), function(*args))  # waits, on a GPU
          ends.append((what, time.perf_counter()))
          return tf.nest.map_structure(tf.constant, result)
        return call
      return make_timed

    with tempfile.TemporaryDirectory() as folder, mock.patch.multiple(
        cifar10_main,
        make_inner_loop=timed('train', cifar10_main.make_inner_loop),
        make_eval_step=timed('evaluate', cifar10_main.make_eval_step)):
      write_records(folder, self._batch)
      cifar10_main.train_and_evaluate(self._settings(
          data_dir=folder, model_dir=os.path.join(folder, 'model'),
          train_steps=6, steps_per_eval=3))
    changes = {'train': [], 'evaluate': []}
    for (before, start), (what, end) in itertools.pairwise(ends):
      if what != before:
        changes[what].append(end - start)
    return {'last step to first evaluation batch [s]': max(changes['evaluate']),
            'evaluation to next step [s]': max(changes['train'])}

  def start(self) -> dict[str, float]:
    """Processes that import TensorFlow, or run the script for two cycles.

    Times are from their start to the end of the import, or to the first logged
    step, of which the import's is taken off. So are the peaks of memory.
    """
    imported, imported_peak = seen_in_output(
        [sys.executable, '-c',
         'import sys, tensorflow; print("done", flush=True); sys.stdin.read()'],
        'done')[0]
    with tempfile.TemporaryDirectory() as model_dir:
      (first, _), (_, peak) = seen_in_output(
          [sys.executable, cifar10_main.__file__,
           f'--data_dir={self._folder}', f'--model_dir={model_dir}',
           f'--resnet_size={self._size}', f'--batch_size={self._batch}',
           f'--dtype={self._dtype}', f'--xla={self._xla_flag}',
           '--train_steps=6', '--steps_per_eval=3'],
          ', step = 1\n', "'global_step': 6")
    return {'import tensorflow [s]': imported,
            'from there to the first logged step [s]': first - imported,
            'import tensorflow, peak memory [GB]': imported_peak,
            'whole run, peak memory above that [GB]': peak - imported_peak}


def seen_in_output(command: list[str],
                   *texts: str) -> list[tuple[float, float]]:
  """Runs a command until its output has shown the texts, one after another.

  Returns:
    For each text, the seconds from the start and the peak memory in GB by then.
  """
  started = time.perf_counter()
  process = subprocess.Popen(command, stdin=subprocess.PIPE, text=True,
                             stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
  seen = []
  for line in process.stdout:
    if texts[len(seen)] in line:
      seconds = time.perf_counter() - started
      with open(f'/proc/{process.pid}/status', encoding='ascii') as status:
        kilobytes = re.search(r'VmHWM:\s+(\d+)', status.read()).group(1)
      seen.append((seconds, int(kilobytes) * 1024 / 1e9))
      if len(seen) == len(texts):
        break
  process.communicate()
  if len(seen) < len(texts):
    raise RuntimeError(f'{command} has not printed {texts[len(seen)]!r}')
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


def define_flags() -> None:
  """Defines the flags, of which four are those of the script."""
  flags.DEFINE_integer('resnet_size', 32, 'Depth of the network.')
  flags.DEFINE_integer('batch_size', 128, 'Images per batch.')
  flags.DEFINE_enum('dtype', 'fp32', list(cifar10_main.DTYPES),
                    'Numbers in the convolutions.')
  flags.DEFINE_enum('xla', 'auto', ['auto', 'on', 'off'],
                    'Compile the training step by XLA.')
  flags.DEFINE_float('seconds', 5, 'Time for each figure.', lower_bound=0)
  flags.DEFINE_integer('repeats', 5, 'Turns of all rows.', lower_bound=1)


def main(argv: list[str]) -> None:
  del argv  # not used
  logging.set_verbosity(logging.INFO)
  results = {}
  with tempfile.TemporaryDirectory() as folder:
    # Log lines cost what they cost, but are not to be seen here.
    logging.get_absl_handler().use_absl_log_file('benchmark', folder)
    benchmark = Benchmark(flags.FLAGS, folder)
    for repeat in range(flags.FLAGS.repeats):
      for measure in benchmark.measures():
        print(f'\r{repeat + 1} of {flags.FLAGS.repeats}: '
              f'{measure.__name__:20}', end='', file=sys.stderr, flush=True)
        with contextlib.redirect_stdout(None):
          for name, value in measure().items():
            results.setdefault(name, []).append(value)
  print(file=sys.stderr)
  print(f'{benchmark.setting}; {platform.machine()}, {os.cpu_count()} cores; '
        f'TensorFlow {tf.__version__}, Keras {keras.__version__}, '
        f'Python {platform.python_version()}\n\n{table(results)}')


if __name__ == '__main__':
  define_flags()
  app.run(main)
