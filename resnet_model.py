"""Pre-activation ("v2") residual network for the 32x32 images of CIFAR-10.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: depth 6n + 2.
  [2] The same authors: Identity Mappings in Deep Residual Networks.
      arXiv:1603.05027. Batch norm and ReLU come before each convolution.

Variables have the names that the graph of the 2017 script gave them, so that
checkpoints can be exchanged with it. The numbers in the names count the layers
in the order of their creation: if that order changed, an old checkpoint would
be restored into the wrong layers.

The file goes from the layers to the network, two questions to the device, and
the checkpoints.
"""

import collections
from collections.abc import Iterable
import contextlib
import glob
import os
import random
import re
import shutil
import subprocess

from absl import logging
import numpy as np
import tensorflow as tf

from cifar10_download_and_extract import Cifar10Error, reason

BATCH_NORM_DECAY = 0.997
BATCH_NORM_EPSILON = 1e-5
TRUNCATED_DEVIATION = 0.87962566103423978  # of a normal cut at two deviations
NUM_CHANNELS = 3  # red, green, blue
BLOCK_LAYERS = ((16, 1), (32, 2), (64, 2))  # filters, strides; [1]
KEEP_CHECKPOINTS = 5
WHEN_NOT_FINITE = (', nothing of it is saved: the learning rate is 0.1 * '
                   'batch_size / 128, try a smaller --batch_size')
# What reading a damaged checkpoint raises.
READ_ERRORS = (tf.errors.OpError, RuntimeError, LookupError, ValueError)
# TensorFlow's names of the data formats.
LAYOUTS = {'channels_first': 'NCHW', 'channels_last': 'NHWC'}


class BatchNormRelu(tf.Module):
  """Fused batch normalization, then ReLU."""

  def __init__(self, channels: int, data_format: str, name: str):
    super().__init__()
    self._layout = LAYOUTS[data_format]
    zeros, ones = tf.zeros([channels]), tf.ones([channels])
    self.gamma = tf.Variable(ones, name=f'{name}/gamma')
    self.beta = tf.Variable(zeros, name=f'{name}/beta')
    # On several devices each updates a copy of its own; the training step then
    # makes all copies equal again.
    local = {'trainable': False,
             'synchronization': tf.VariableSynchronization.ON_READ,
             'aggregation': tf.VariableAggregation.ONLY_FIRST_REPLICA}
    self.moving_mean = tf.Variable(zeros, name=f'{name}/moving_mean', **local)
    self.moving_variance = tf.Variable(
        ones, name=f'{name}/moving_variance', **local)

  def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    # In training the operation takes empty moments and returns the batch's. It
    # applies Bessel's correction to that variance, so the moving variance has
    # it too. Keras 3's layer does not: its evaluations give other numbers.
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=self.gamma, offset=self.beta,
        mean=[] if training else self.moving_mean,
        variance=[] if training else self.moving_variance,
        epsilon=BATCH_NORM_EPSILON, data_format=self._layout,
        is_training=training)
    if training:
      for moving, batch in ((self.moving_mean, mean),
                            (self.moving_variance, variance)):
        moving.assign_sub((moving - batch) * (1 - BATCH_NORM_DECAY))
    return tf.nn.relu(outputs)


class Conv2dFixedPadding(tf.Module):
  """Convolution without bias; the padding depends only on the kernel size."""

  def __init__(self, kernel: tf.Tensor, strides: int, data_format: str,
               name: str):
    super().__init__()
    self._strides = strides
    self._data_format = data_format
    self.kernel = tf.Variable(kernel, name=f'{name}/kernel')

  def __call__(self, inputs: tf.Tensor) -> tf.Tensor:
    padding = 'SAME'
    if self._strides > 1:  # SAME would depend on the input's size here
      inputs = fixed_padding(inputs, self.kernel.shape[0], self._data_format)
      padding = 'VALID'
    return tf.nn.conv2d(inputs, tf.cast(self.kernel, inputs.dtype),
                        self._strides, padding, LAYOUTS[self._data_format])


class LayerFactory:
  """Makes layers, named as TensorFlow 1 did: conv2d, conv2d_1, conv2d_2, ..."""

  def __init__(self, data_format: str, seed: int):
    self._data_format = data_format
    self._counts = collections.Counter()
    self._random = random.Random(seed)

  def batch_norm_relu(self, channels: int) -> BatchNormRelu:
    return BatchNormRelu(
        channels, self._data_format, self._next_name('batch_normalization'))

  def conv2d(self, in_channels: int, filters: int, kernel_size: int,
             strides: int) -> Conv2dFixedPadding:
    # Variance 1 / fan-in, corrected for the truncation at two deviations, which
    # leaves 0.88 of it. TensorFlow has corrected this since mid-2018.
    deviation = (kernel_size**2 * in_channels) ** -0.5 / TRUNCATED_DEVIATION
    kernel = tf.random.stateless_truncated_normal(
        [kernel_size, kernel_size, in_channels, filters], self._next_seed(),
        stddev=deviation)
    return Conv2dFixedPadding(kernel, strides, self._data_format,
                              self._next_name('conv2d'))

  def _next_seed(self):
    # As Keras did in earlier versions, so that a seed gives the same values.
    return [self._random.randint(1, 10**9), 0]

  def dense_kernel(self, in_channels: int, units: int) -> tf.Tensor:
    """Returns initial values, Glorot uniform."""
    limit = (6 / (in_channels + units)) ** 0.5
    return tf.random.stateless_uniform(
        [in_channels, units], self._next_seed(), -limit, limit)

  def _next_name(self, name):
    count = self._counts[name]
    self._counts[name] += 1
    return f'{name}_{count}' if count else name


class BuildingBlock(tf.Module):
  """Two 3x3 convolutions and a shortcut around them [2].

  The first block of each block layer projects its shortcut. block_layer1 does
  not need that, but the original does it there too, and its checkpoints hold
  the kernel.
  """

  def __init__(self, make: LayerFactory, in_channels: int, filters: int,
               strides: int, project: bool):
    super().__init__()
    self.batch_norm_relu1 = make.batch_norm_relu(in_channels)
    self.projection = (
        make.conv2d(in_channels, filters, 1, strides) if project else None)
    self.conv1 = make.conv2d(in_channels, filters, 3, strides)
    self.batch_norm_relu2 = make.batch_norm_relu(filters)
    self.conv2 = make.conv2d(filters, filters, 3, 1)

  def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    shortcut = inputs
    inputs = self.batch_norm_relu1(inputs, training)
    if self.projection is not None:
      shortcut = self.projection(inputs)  # after batch norm and ReLU
    inputs = self.conv1(inputs)
    inputs = self.batch_norm_relu2(inputs, training)
    return self.conv2(inputs) + shortcut


class Cifar10ResnetV2(tf.Module):
  """The network of cifar10_resnet_v2_generator."""

  def __init__(self, resnet_size: int, num_classes: int, data_format: str,
               dtype: tf.DType, seed: int):
    super().__init__()
    self.resnet_size = resnet_size
    self.data_format = data_format
    self.dtype = dtype
    self.seed = seed  # of the initial values
    make = LayerFactory(data_format, seed)
    channels = BLOCK_LAYERS[0][0]
    self.initial_conv = make.conv2d(NUM_CHANNELS, channels, 3, 1)
    self.blocks = []
    for filters, strides in BLOCK_LAYERS:
      self.blocks += [
          BuildingBlock(make, channels, filters, strides, project=True),
          *(BuildingBlock(make, filters, filters, 1, project=False)
            for _ in range((resnet_size - 2) // 6 - 1))]
      channels = filters
    self.final_batch_norm_relu = make.batch_norm_relu(channels)
    self.kernel = tf.Variable(
        make.dense_kernel(channels, num_classes), name='dense/kernel')
    self.bias = tf.Variable(tf.zeros([num_classes]), name='dense/bias')

  def __repr__(self):
    parameters = sum(v.shape.num_elements() for v in self.trainable_variables)
    return (f'ResNet-{self.resnet_size}, {parameters:,} parameters, '
            f'{self.data_format}, {self.dtype.name}')

  def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    """Returns logits, float32 [N, num_classes].

    Args:
      inputs: Standardized images, float32 [N, 32, 32, 3] in any data format.
      training: If True, batch norm uses the moments of the batch and updates
        the moving averages; if False, it uses the moving averages.
    """
    inputs = tf.cast(inputs, self.dtype)
    channels_first = self.data_format == 'channels_first'
    if channels_first:
      inputs = tf.transpose(inputs, [0, 3, 1, 2])
    inputs = self.initial_conv(inputs)  # [N, 32, 32, 16]
    for block in self.blocks:  # [N, 32, 32, 16], [N, 16, 16, 32], [N, 8, 8, 64]
      inputs = block(inputs, training)
    inputs = self.final_batch_norm_relu(inputs, training)
    inputs = tf.cast(inputs, tf.float32)
    inputs = tf.reduce_mean(inputs, [2, 3] if channels_first else [1, 2])
    return tf.matmul(inputs, self.kernel) + self.bias  # [N, 64] to [N, 10]


def fixed_padding(inputs: tf.Tensor, kernel_size: int,
                  data_format: str) -> tf.Tensor:
  """Pads height and width by kernel_size - 1 zeros in total, half before.

  Args:
    inputs: Images, [N, C, H, W] or [N, H, W, C].
    kernel_size: Height and width of the kernel that follows.
    data_format: 'channels_first' or 'channels_last'.
  """
  before = (kernel_size - 1) // 2
  paddings = [[before, kernel_size - 1 - before]] * 2
  if data_format == 'channels_first':
    return tf.pad(inputs, [[0, 0], [0, 0], *paddings])
  return tf.pad(inputs, [[0, 0], *paddings, [0, 0]])


def is_resnet_size(size: int) -> bool:
  """Returns whether a depth is 6n + 2 with n > 0."""
  return size >= 8 and size % 6 == 2


def cifar10_resnet_v2_generator(
    resnet_size: int, num_classes: int,
    data_format: str | None = None, dtype: tf.DType = tf.float32,
    seed: int | None = None) -> Cifar10ResnetV2:
  """Builds a pre-activation ResNet [2] with initial values.

  Args:
    resnet_size: Depth, 6n + 2: 8, 14, 20, ...
    num_classes: Number of logits.
    data_format: 'channels_first', 'channels_last', or None for the faster of
      the two: 'channels_first' on a GPU, 'channels_last' on a CPU.
    dtype: Number type of the convolutions: float32, bfloat16 or float16. The
      variables, batch norm's statistics, the mean over the image and the logits
      are always float32.
    seed: Seed of the initial values; a random one by default.

  Returns:
    The network: `network(inputs, training) -> logits`.

  Raises:
    ValueError: `resnet_size` or `data_format` is not one of these.
  """
  if not is_resnet_size(resnet_size):
    raise ValueError(
        f'resnet_size must be 6n + 2 (8, 14, 20, ...), not {resnet_size}')
  if data_format is None:
    # The original asked whether TensorFlow was built with CUDA. Today's always
    # is, and on a CPU channels_first takes more than twice as long.
    data_format = ('channels_first' if tf.config.list_logical_devices('GPU')
                   else 'channels_last')
  if data_format not in LAYOUTS:
    raise ValueError("data_format must be 'channels_first' or 'channels_last', "
                     f'not {data_format!r}')
  if seed is None:
    seed = np.random.SeedSequence().generate_state(1).item()
  return Cifar10ResnetV2(resnet_size, num_classes, data_format, dtype, seed)


def has_convolutions(data_format: str | None, dtype: tf.DType) -> bool:
  """Returns whether the device can run convolutions of this kind."""
  one = tf.ones([1, 1, 1, 1], dtype)
  try:
    tf.nn.conv2d(one, one, 1, 'SAME', LAYOUTS[data_format or 'channels_last'])
  except tf.errors.OpError:
    return False
  return True


def warn_of_idle_gpu() -> None:
  """Logs what to install if there is a GPU that TensorFlow cannot use."""
  if (tf.config.list_physical_devices('GPU')
      or not tf.test.is_built_with_cuda() or not shutil.which('nvidia-smi')
      or os.environ.get('CUDA_VISIBLE_DEVICES', '0') in ('', '-1')):
    return
  with contextlib.suppress(OSError, subprocess.SubprocessError):
    listed = subprocess.run(['nvidia-smi', '-L'], capture_output=True,
                            check=False, timeout=30).stdout
    if listed.startswith(b'GPU '):
      logging.warning(
          'TensorFlow cannot use the GPU of this machine, its libraries are '
          'missing or do not fit: pip install "tensorflow[and-cuda]" brings '
          'them')


def tf1_name(variable: tf.Variable) -> str:
  """Returns the name that the variable has in a checkpoint."""
  return variable.name.removesuffix(':0')


def size_in_checkpoint(names: Iterable[str]) -> int | None:
  """Returns the depth of the network with these variables, or None."""
  # One convolution for each layer but the last, and three projections.
  kernels = [n for n in names if 'conv2d' in n and n.endswith('/kernel')]
  size = len(kernels) - 2
  return size if is_resnet_size(size) else None


def checkpoint_keys(reader) -> dict[str, str]:
  """Returns the keys of a checkpoint's tensors by the variables' names."""
  # Earlier versions of the port added an ending to the names, and wrote .S for
  # a slash.
  return {key.partition('/.ATTRIBUTES/')[0].replace('.S', '/'): key
          for key in reader.get_variable_to_shape_map()}


def read_checkpoint(path: str) -> dict[str, np.ndarray]:
  """Returns all values of a checkpoint by name, whose checksums this verifies.

  Raises:
    One of READ_ERRORS: It is damaged.
  """
  reader = tf.train.load_checkpoint(path)
  return {name: reader.get_tensor(key)
          for name, key in checkpoint_keys(reader).items()}


def step_inside(path: str, otherwise: int) -> int:
  """Returns the global_step in a checkpoint, or the other one if damaged."""
  try:
    reader = tf.train.load_checkpoint(path)
    return int(reader.get_tensor(checkpoint_keys(reader)['global_step']))
  except (*READ_ERRORS, TypeError):
    return otherwise


class Checkpoints:
  """The checkpoints of a model folder, model.ckpt-STEP, as the original's."""

  def __init__(self, model_dir: str):
    self._model_dir = model_dir
    self._prefix = os.path.join(model_dir, 'model.ckpt')
    self.newest = None  # the path of what was last read or saved

  def steps(self) -> list[int]:
    """Returns the steps of all checkpoints, damaged ones too, newest first."""
    # Not from the list in `checkpoint`: a copied one may name the old place.
    pattern = re.compile(
        re.escape(self._prefix) + r'-(\d+)\.(index|data-\d+-of-\d+)')
    found = map(pattern.fullmatch, glob.glob(glob.escape(self._prefix) + '-*'))
    return sorted({int(match[1]) for match in found if match}, reverse=True)

  def read_newest(self) -> dict[str, np.ndarray]:
    """Returns the values of the newest whole checkpoint, {} in a new folder."""
    # By their contents: a renamed file must not be gone back to for ever.
    steps = sorted(self.steps(), key=lambda step: step_inside(
        f'{self._prefix}-{step}', step))
    while steps:
      path = f'{self._prefix}-{steps.pop()}'
      logging.info('Restoring parameters from %s', path)
      try:
        values = read_checkpoint(path)
        self.newest = path
        return values
      except READ_ERRORS as error:
        logging.warning('%s is damaged (%s)%s', path, reason(error),
                        ': trying the one before' if steps else '')
    if any(self.steps()):  # without the one of step 0, nothing is lost
      raise Cifar10Error(
          f'{self._model_dir} holds no checkpoint that is not damaged: move '
          'model.ckpt-* away to start anew, or name another --model_dir')
    return {}

  def restore(self, state: tf.Module, values: dict[str, np.ndarray]) -> None:
    """Assigns the values just read; changes none if one cannot be used."""
    path, here = self.newest, state.network.resnet_size
    size = size_in_checkpoint(values)
    if size not in (None, here):
      raise Cifar10Error(
          f'{path} is of another network (size {size}, not {here}): use '
          f'--resnet_size={size} or another --model_dir')
    for variable in state.variables:
      name = tf1_name(variable)
      if name in ('seed', 'train_accuracy'):  # the original does not have these
        values.setdefault(name, variable.numpy())
      if name not in values or values[name].shape != variable.shape:
        there = list(values[name].shape) if name in values else 'missing'
        raise Cifar10Error(
            f'{path} is of another network ({name} is {there} there and '
            f'{variable.shape.as_list()} here): use another --model_dir')
      if not np.isfinite(values[name]).all():
        raise Cifar10Error(
            f'{path} is of no use, {name} is not finite there: move it away to '
            'go on from the one before, or name another --model_dir')
    for variable in state.variables:
      variable.assign(values[tf1_name(variable)])
    if not path.endswith(f'-{values["global_step"]}'):
      logging.warning('%s is of step %d', path, values['global_step'])

  def save(self, state: tf.Module) -> None:
    """Saves a checkpoint; afterwards deletes all but this port's newest five.

    Raises:
      Cifar10Error: A variable is not finite, or there is no room.
    """
    values = {tf1_name(v): v.numpy() for v in state.variables}
    step = values['global_step'].item()
    for name, value in values.items():
      # Test the norm: where the squares overflow, weight decay makes the next
      # loss infinite.
      if not np.isfinite(tf.norm(tf.cast(value, tf.float32))):
        raise Cifar10Error(f'{name} is not finite after step {step}, or its '
                           f'norm{WHEN_NOT_FINITE}')
    path = f'{self._prefix}-{step}'
    logging.info('Saving checkpoints for %d into %s.', step, self._prefix)
    try:
      with tf.device('CPU'):
        tf.raw_ops.SaveV2(prefix=path, tensor_names=list(values),
                          shape_and_slices=[''] * len(values),
                          tensors=list(values.values()))
      older = [s for s in self.steps() if s < step]
      self._write_list([*reversed(older[:KEEP_CHECKPOINTS - 1]), step])
    except (tf.errors.OpError, OSError) as error:
      self._delete(path)
      raise Cifar10Error(
          f'Cannot save a checkpoint in {self._model_dir} ({reason(error)}): '
          'make room there and start again, the older checkpoints are whole'
          ) from None
    self.newest = path
    for step in older[KEEP_CHECKPOINTS - 1:]:
      path = f'{self._prefix}-{step}'
      with contextlib.suppress(*READ_ERRORS):
        reader = tf.train.load_checkpoint(path)
        if 'seed' in checkpoint_keys(reader):  # not the original's
          self._delete(path)
    for part in glob.glob(glob.escape(self._prefix) + '-*.tempstate*'):
      os.remove(part)  # of a save that was killed

  def _write_list(self, steps: list[int]) -> None:
    """Writes `checkpoint`, where TensorFlow and the original look them up."""
    listed = os.path.join(self._model_dir, 'checkpoint')
    with open(f'{listed}.tmp', 'w', encoding='ascii') as file:
      print(f'model_checkpoint_path: "model.ckpt-{steps[-1]}"', file=file)
      for step in steps:
        print(f'all_model_checkpoint_paths: "model.ckpt-{step}"', file=file)
    os.replace(f'{listed}.tmp', listed)

  def _delete(self, path: str) -> None:
    # The index last: without it nobody could tell whose the data are.
    for ending in ('.data-00000-of-00001', '.index'):
      with contextlib.suppress(OSError):
        os.remove(path + ending)
