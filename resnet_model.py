"""Pre-activation ("v2") residual network for the 32x32 images of CIFAR-10.

References:
  [1] Kaiming He, Xiangyu Zhang, Shaoqing Ren, Jian Sun: Deep Residual Learning
      for Image Recognition. arXiv:1512.03385. Section 4.2: depth 6n + 2.
  [2] The same authors: Identity Mappings in Deep Residual Networks.
      arXiv:1603.05027. Batch norm and ReLU come before each convolution.

Variables bear the names that the graph of the 2017 script gave them, so that
its checkpoints restore by name. Numbers in names count layers in order of
creation: another order, and an old checkpoint restores into the wrong layers.
"""

import collections

import tensorflow as tf

BATCH_NORM_DECAY = 0.997
BATCH_NORM_EPSILON = 1e-5
NUM_CHANNELS = 3  # red, green, blue
BLOCK_LAYERS = ((16, 1), (32, 2), (64, 2))  # filters, strides; [1]


class BatchNormRelu(tf.Module):
  """Fused batch normalization, then ReLU."""

  def __init__(self, channels: int, data_format: str, name: str):
    super().__init__()
    self._data_format = data_format
    zeros, ones = tf.zeros([channels]), tf.ones([channels])
    self.gamma = tf.Variable(ones, name=f'{name}/gamma')
    self.beta = tf.Variable(zeros, name=f'{name}/beta')
    # On several devices, each updates its own; all are one again after a step.
    local = {'trainable': False,
             'synchronization': tf.VariableSynchronization.ON_READ,
             'aggregation': tf.VariableAggregation.ONLY_FIRST_REPLICA}
    self.moving_mean = tf.Variable(zeros, name=f'{name}/moving_mean', **local)
    self.moving_variance = tf.Variable(
        ones, name=f'{name}/moving_variance', **local)

  def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    # For training, the operation wants empty moments and returns the batch's.
    # Their variance is Bessel-corrected, and so the moving one becomes. Keras 3
    # leaves out the correction: evaluation would give other numbers.
    outputs, mean, variance, *_ = tf.raw_ops.FusedBatchNormV3(
        x=inputs, scale=self.gamma, offset=self.beta,
        mean=[] if training else self.moving_mean,
        variance=[] if training else self.moving_variance,
        epsilon=BATCH_NORM_EPSILON, data_format=self._data_format,
        is_training=training)
    if training:
      for moving, batch in ((self.moving_mean, mean),
                            (self.moving_variance, variance)):
        moving.assign_sub((moving - batch) * (1 - BATCH_NORM_DECAY))
    return tf.nn.relu(outputs)


class Conv2dFixedPadding(tf.Module):
  """Convolution without bias, padded by its kernel's size alone."""

  def __init__(self, in_channels: int, filters: int, kernel_size: int,
               strides: int, data_format: str, name: str):
    super().__init__()
    self._strides = strides
    self._data_format = data_format
    # Corrects for the truncation, which TensorFlow did not before mid-2018.
    initializer = tf.keras.initializers.VarianceScaling(
        scale=1.0, mode='fan_in', distribution='truncated_normal')
    self.kernel = tf.Variable(
        initializer([kernel_size, kernel_size, in_channels, filters]),
        name=f'{name}/kernel')

  def __call__(self, inputs: tf.Tensor) -> tf.Tensor:
    if self._strides > 1:  # where SAME would depend on the input's size
      inputs = fixed_padding(inputs, self.kernel.shape[0], self._data_format)
    return tf.nn.conv2d(inputs, tf.cast(self.kernel, inputs.dtype),
                        self._strides,
                        'VALID' if self._strides > 1 else 'SAME',
                        self._data_format)


class LayerFactory:
  """Makes layers, named as TensorFlow 1 did: conv2d, conv2d_1, conv2d_2, ..."""

  def __init__(self, data_format: str):
    self._layout = 'NCHW' if data_format == 'channels_first' else 'NHWC'
    self._counts = collections.Counter()

  def batch_norm_relu(self, channels: int) -> BatchNormRelu:
    return BatchNormRelu(
        channels, self._layout, self._next_name('batch_normalization'))

  def conv2d(self, in_channels: int, filters: int, kernel_size: int,
             strides: int) -> Conv2dFixedPadding:
    return Conv2dFixedPadding(in_channels, filters, kernel_size, strides,
                              self._layout, self._next_name('conv2d'))

  def _next_name(self, name):
    count = self._counts[name]
    self._counts[name] += 1
    return f'{name}_{count}' if count else name


class BuildingBlock(tf.Module):
  """Two 3x3 convolutions and a shortcut around them [2].

  The first block of each layer projects its shortcut. In block_layer1 nothing
  would require that, but the original does it and its checkpoints hold it.
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
      shortcut = self.projection(inputs)  # of the normalized inputs
    inputs = self.conv1(inputs)
    inputs = self.batch_norm_relu2(inputs, training)
    return self.conv2(inputs) + shortcut


class Cifar10ResnetV2(tf.Module):
  """The network of cifar10_resnet_v2_generator."""

  def __init__(self, num_blocks: int, num_classes: int, data_format: str,
               dtype: tf.DType):
    super().__init__()
    self.data_format = data_format
    self.dtype = dtype
    make = LayerFactory(data_format)
    channels = BLOCK_LAYERS[0][0]
    self.initial_conv = make.conv2d(NUM_CHANNELS, channels, 3, 1)
    self.blocks = []
    for filters, strides in BLOCK_LAYERS:
      self.blocks += [
          BuildingBlock(make, channels, filters, strides, project=True),
          *(BuildingBlock(make, filters, filters, 1, project=False)
            for _ in range(num_blocks - 1))]
      channels = filters
    self.final_batch_norm_relu = make.batch_norm_relu(channels)
    self.kernel = tf.Variable(
        tf.keras.initializers.GlorotUniform()([channels, num_classes]),
        name='dense/kernel')
    self.bias = tf.Variable(tf.zeros([num_classes]), name='dense/bias')

  def __call__(self, inputs: tf.Tensor, training: bool) -> tf.Tensor:
    """Returns logits, float32 [N, num_classes].

    Args:
      inputs: Standardized images, float32 [N, 32, 32, 3] in any data format.
      training: True normalizes by the moments of the batch and updates the
        moving averages; False normalizes by the moving averages.
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
    return tf.matmul(inputs, self.kernel) + self.bias  # of [N, 64]


def fixed_padding(inputs: tf.Tensor, kernel_size: int,
                  data_format: str) -> tf.Tensor:
  """Pads height and width with kernel_size - 1 zeros in all, half before."""
  before = (kernel_size - 1) // 2
  paddings = [[before, kernel_size - 1 - before]] * 2
  if data_format == 'NCHW':
    return tf.pad(inputs, [[0, 0], [0, 0], *paddings])
  return tf.pad(inputs, [[0, 0], *paddings, [0, 0]])


def is_resnet_size(size: int) -> bool:
  """Tells whether a depth is 6n + 2 with n > 0."""
  return size >= 8 and size % 6 == 2


def cifar10_resnet_v2_generator(
    resnet_size: int, num_classes: int,
    data_format: str | None = None,
    dtype: tf.DType = tf.float32) -> Cifar10ResnetV2:
  """Builds a pre-activation ResNet [2] with initial values.

  Args:
    resnet_size: Depth, 6n + 2: 8, 14, 20, ...
    num_classes: Number of logits.
    data_format: 'channels_first', 'channels_last', or None for the faster one:
      'channels_first' on a GPU, 'channels_last' on a CPU.
    dtype: Of the convolutions, float32, bfloat16 or float16. Variables, batch
      norm's statistics, the mean over the image and the logits stay float32.

  Returns:
    The network: `network(inputs, training) -> logits`.

  Raises:
    ValueError: `resnet_size` or `data_format` is none of the above.
  """
  if not is_resnet_size(resnet_size):
    raise ValueError(
        f'resnet_size must be 6n + 2 (8, 14, 20, ...), not {resnet_size}')
  if data_format is None:
    # The original asked whether TensorFlow was built with CUDA. It always is
    # today, and a CPU takes over twice as long for channels_first.
    data_format = ('channels_first' if tf.config.list_logical_devices('GPU')
                   else 'channels_last')
  if data_format not in ('channels_first', 'channels_last'):
    raise ValueError("data_format must be 'channels_first' or 'channels_last', "
                     f'not {data_format!r}')
  return Cifar10ResnetV2(
      (resnet_size - 2) // 6, num_classes, data_format, dtype)
