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
"""

import collections
from collections.abc import Iterable

import numpy as np
import tensorflow as tf

BATCH_NORM_DECAY = 0.997
BATCH_NORM_EPSILON = 1e-5
TRUNCATED_DEVIATION = 0.87962566103423978  # of a normal cut at two deviations
IMAGE_SHAPE = (32, 32, 3)  # height, width, channels
BLOCK_LAYERS = ((16, 1), (32, 2), (64, 2))  # filters, strides; [1]
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
    self._seed = seed
    self._counts = collections.Counter()

  def batch_norm_relu(self, channels: int) -> BatchNormRelu:
    return BatchNormRelu(
        channels, self._data_format, self._next_name('batch_normalization'))

  def conv2d(self, in_channels: int, filters: int, kernel_size: int,
             strides: int) -> Conv2dFixedPadding:
    # Variance 1 / fan-in, half of [1]'s. A normal cut at two deviations keeps
    # 0.88 of its deviation; TensorFlow has corrected this since mid-2018.
    deviation = (kernel_size**2 * in_channels) ** -0.5 / TRUNCATED_DEVIATION
    kernel = tf.random.stateless_truncated_normal(
        [kernel_size, kernel_size, in_channels, filters], self._next_seed(),
        stddev=deviation)
    return Conv2dFixedPadding(kernel, strides, self._data_format,
                              self._next_name('conv2d'))

  def dense_kernel(self, in_channels: int, units: int) -> tf.Tensor:
    """Returns initial values, Glorot uniform."""
    limit = (6 / (in_channels + units)) ** 0.5
    return tf.random.stateless_uniform(
        [in_channels, units], self._next_seed(), -limit, limit)

  def _next_seed(self):
    return tf.constant([self._seed, self._counts.total()], tf.int64)

  def _next_name(self, name):
    count = self._counts[name]
    self._counts[name] += 1
    return f'{name}_{count}' if count else name


class BuildingBlock(tf.Module):
  """Two 3x3 convolutions and a shortcut around them [2].

  The first block of each block layer projects its shortcut, where [1] pads it
  with zeros. block_layer1 does not need that, but the original does it there
  too, and its checkpoints hold the kernel.
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
    self.initial_conv = make.conv2d(IMAGE_SHAPE[-1], channels, 3, 1)
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

  def __call__(self, images: tf.Tensor, training: bool) -> tf.Tensor:
    """Returns the logits, float32 [N, num_classes], of what features takes."""
    return tf.matmul(self.features(images, training), self.kernel) + self.bias

  def features(self, images: tf.Tensor, training: bool) -> tf.Tensor:
    """Returns the values before the last layer, float32 [N, 64].

    Args:
      images: Standardized images, floats [N, 32, 32, 3] in any data format.
      training: If True, batch norm uses the moments of the batch and updates
        the moving averages; if False, it uses the moving averages.

    Raises:
      ValueError: The images have another shape or type.
    """
    images = tf.convert_to_tensor(images)
    if not (images.dtype.is_floating
            and images.shape.is_compatible_with([None, *IMAGE_SHAPE])):
      raise ValueError(
          'images must be standardized, floats [N, 32, 32, 3], not '
          f'{images.dtype.name} {images.shape}')
    inputs = tf.cast(images, self.dtype)
    channels_first = self.data_format == 'channels_first'
    if channels_first:
      inputs = tf.transpose(inputs, [0, 3, 1, 2])
    inputs = self.initial_conv(inputs)  # [N, 32, 32, 16]
    for block in self.blocks:  # [N, 32, 32, 16], [N, 16, 16, 32], [N, 8, 8, 64]
      inputs = block(inputs, training)
    inputs = self.final_batch_norm_relu(inputs, training)
    inputs = tf.cast(inputs, tf.float32)
    return tf.reduce_mean(inputs, [2, 3] if channels_first else [1, 2])


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
    dtype: Number type of convolutions and activations: float32, bfloat16 or
      float16. The variables, batch norm's statistics, the mean over the image
      and the logits are always float32.
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


def tf1_name(variable: tf.Variable) -> str:
  """Returns the name that the variable has in a checkpoint."""
  return variable.name.removesuffix(':0')


def size_in_checkpoint(names: Iterable[str]) -> int | None:
  """Returns the depth of the network with these variables, or None."""
  # One convolution for each layer but the last, and three projections.
  kernels = [n for n in names if 'conv2d' in n and n.endswith('/kernel')]
  size = len(kernels) - 2
  return size if is_resnet_size(size) else None
