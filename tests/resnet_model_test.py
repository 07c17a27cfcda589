"""Tests of the network, against arithmetic; golden_test has the original's."""

import numpy as np
import pytest
import tensorflow as tf

import resnet_model


def generate(resnet_size=8, data_format='channels_last'):
  return resnet_model.cifar10_resnet_v2_generator(resnet_size, 10, data_format)


def count(variables):
  return sum(v.shape.num_elements() for v in variables)


@pytest.mark.parametrize(
    ('size', 'trained', 'moving'),
    [(8, 78106, 480), (20, 272538, 1376), (32, 466970, 2272),
     (44, 661402, 3168), (56, 855834, 4064), (110, 1730778, 8096)])
def test_number_of_parameters(size, trained, moving):
  """The size can also be read off the names in a checkpoint."""
  network = generate(size)
  assert count(network.trainable_variables) == trained
  assert count(network.variables) == trained + moving
  assert repr(network).startswith(f'ResNet-{size}, {trained:,} parameters, ')
  names = [resnet_model.tf1_name(v) for v in network.variables]
  momentum = [f'{name}/Momentum' for name in names]
  assert resnet_model.size_in_checkpoint(names + momentum) == size
  assert resnet_model.size_in_checkpoint(['dense/kernel']) is None


@pytest.mark.parametrize(('arguments', 'message'), [
    *(((size,), rf'6n \+ 2 .*, not {size}') for size in (-4, 0, 2, 7, 9, 33)),
    ((8, 'NCHW'), "not 'NCHW'")])
def test_refuses_other_sizes_and_data_formats(arguments, message):
  with pytest.raises(ValueError, match=message):
    generate(*arguments)


def test_default_data_format_is_that_of_the_device():
  gpus = tf.config.list_physical_devices('GPU')
  expected = 'channels_first' if gpus else 'channels_last'
  assert generate(data_format=None).data_format == expected


def test_features_are_the_values_before_the_last_layer():
  network = generate()
  images = tf.random.stateless_normal([4, 32, 32, 3], [1, 2])
  features = network.features(images, training=False)
  assert (features.shape, features.dtype) == ([4, 64], tf.float32)
  assert (features.numpy() >= 0).all()  # means of what a ReLU lets pass
  np.testing.assert_array_equal(
      network(images, training=False),
      tf.matmul(features, network.kernel) + network.bias)


@pytest.mark.parametrize(('dtype', 'shape'), [
    (np.uint8, [4, 32, 32, 3]), (np.int32, [4, 32, 32, 3]),
    (np.float32, [32, 32, 3]), (np.float32, [4, 3, 32, 32]),
    (np.float32, [4, 28, 28, 1])])
def test_refuses_images_that_are_not_standardized(dtype, shape):
  """They would give nonsense without a word."""
  images, network = np.ones(shape, dtype), generate()
  for function in (network, network.features):
    with pytest.raises(ValueError, match=(
        'images must be standardized, floats .* not '
        rf'{images.dtype} \({", ".join(map(str, shape))}\)')):
      function(images, training=False)


@pytest.mark.parametrize('data_format', ['channels_first', 'channels_last'])
def test_fixed_padding_pads_height_and_width(data_format):
  images = tf.ones([2, 7, 7, 7])
  padded = resnet_model.fixed_padding(images, 4, data_format).numpy()
  if data_format == 'channels_first':
    padded = padded.transpose(0, 2, 3, 1)
  assert padded.shape == (2, 10, 10, 7)
  assert padded[:, 1:8, 1:8].all()  # one before, two behind
  assert padded.sum() == 2 * 7 ** 3


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('size', [7, 8])
def test_strided_convolution_pads_by_the_kernel_alone(kernel_size, size):
  kernel = tf.reshape(tf.range(1.0, kernel_size ** 2 + 1),
                      [kernel_size, kernel_size, 1, 1])
  conv = resnet_model.Conv2dFixedPadding(kernel, 2, 'channels_last', 'conv')
  image = tf.random.stateless_normal([size, size], [3, 4]).numpy()
  windows = np.lib.stride_tricks.sliding_window_view(
      np.pad(image, kernel_size // 2), (kernel_size, kernel_size))[::2, ::2]
  expected = (windows * kernel.numpy()[:, :, 0, 0]).sum((2, 3))
  actual = conv(image[None, :, :, None])[0, :, :, 0]
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_moments():
  norm = resnet_model.BatchNormRelu(3, 'channels_last', 'norm')
  inputs = np.random.default_rng(5).normal(2, 3, [4, 5, 6, 3])
  inputs = inputs.astype(np.float32)

  def assert_normalized(training, mean, variance):
    np.testing.assert_allclose(
        norm(inputs, training),
        np.maximum((inputs - mean) / np.sqrt(variance + 1e-5), 0),
        rtol=1e-4, atol=1e-5)

  mean, unbiased = inputs.mean((0, 1, 2)), inputs.var((0, 1, 2), ddof=1)
  assert_normalized(True, mean, inputs.var((0, 1, 2)))
  moving = norm.moving_mean.numpy(), norm.moving_variance.numpy()
  np.testing.assert_allclose(moving[0], 0.003 * mean, rtol=1e-5)
  np.testing.assert_allclose(moving[1], 0.997 + 0.003 * unbiased, rtol=1e-6)
  assert_normalized(False, *moving)
  np.testing.assert_array_equal(norm.moving_mean, moving[0])
  np.testing.assert_array_equal(norm.moving_variance, moving[1])


def test_initial_values():
  for variable in generate(32).variables:
    values = variable.numpy()
    name = resnet_model.tf1_name(variable)
    if name.startswith('conv2d'):
      fan_in = np.prod(values.shape[:3])
      # Of a normal cut at two deviations; 0.88 is what the cut leaves.
      assert abs(values).max() <= 2 / 0.8796 / np.sqrt(fan_in) * 1.001
      if values.size > 4000:
        np.testing.assert_allclose(
            values.std(), 1 / np.sqrt(fan_in), rtol=0.05)
    elif name == 'dense/kernel':
      limit = np.sqrt(6 / (64 + 10))
      assert 0.9 * limit < abs(values).max() <= limit
    else:
      ones = name.endswith(('gamma', 'moving_variance'))
      assert (values == (1 if ones else 0)).all()
