"""Tests of the network, against arithmetic and against the original."""

import numpy as np
import pytest
import tensorflow as tf

import resnet_model


def generate(resnet_size=8, data_format='channels_last'):
  return resnet_model.cifar10_resnet_v2_generator(resnet_size, 10, data_format)


def count(variables):
  return sum(v.shape.num_elements() for v in variables)


@pytest.mark.parametrize(
    ('resnet_size', 'trained', 'moving'),
    [(8, 78106, 480), (20, 272538, 1376), (32, 466970, 2272),
     (44, 661402, 3168), (56, 855834, 4064), (110, 1730778, 8096)])
def test_number_of_parameters(resnet_size, trained, moving):
  network = generate(resnet_size)
  assert count(network.trainable_variables) == trained
  assert count(network.variables) == trained + moving


def test_names_and_shapes_are_the_originals(golden):
  expected = {name.removeprefix('init/'): value.shape
              for name, value in golden.items() if name.startswith('init/')}
  actual = {resnet_model.tf1_name(v): tuple(v.shape)
            for v in generate().variables}
  assert actual == expected


@pytest.mark.parametrize('resnet_size', [-4, 0, 2, 7, 9, 33])
def test_refuses_other_sizes(resnet_size):
  with pytest.raises(ValueError, match=r'6n \+ 2'):
    generate(resnet_size)


def test_refuses_other_data_formats():
  with pytest.raises(ValueError, match='NCHW'):
    generate(data_format='NCHW')


def test_default_data_format_is_that_of_the_device():
  gpus = tf.config.list_physical_devices('GPU')
  expected = 'channels_first' if gpus else 'channels_last'
  assert generate(data_format=None).data_format == expected


@pytest.mark.parametrize('training', [False, True])
def test_both_data_formats_give_the_same(training):
  images = tf.random.stateless_normal([4, 32, 32, 3], [1, 2])
  networks = [generate(data_format=data_format)
              for data_format in ('channels_last', 'channels_first')]
  for ours, theirs in zip(*[network.variables for network in networks]):
    theirs.assign(ours)
  results = []
  for network in networks:
    # By XLA: not every CPU has TensorFlow's own NCHW convolutions.
    @tf.function(jit_compile=True)
    def run(network=network):
      with tf.GradientTape() as tape:
        logits = network(images, training)
        loss = tf.reduce_sum(logits ** 2)
      return logits, tape.gradient(loss, network.trainable_variables)
    results.append(run())
  (logits, gradients), (other_logits, other_gradients) = results
  assert logits.shape == [4, 10]
  np.testing.assert_allclose(logits, other_logits, rtol=1e-4, atol=1e-5)
  for ours, theirs in zip(gradients, other_gradients):
    assert np.linalg.norm(ours - theirs) <= 1e-4 * np.linalg.norm(ours)
  for ours, theirs in zip(*[network.variables for network in networks]):
    np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


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
  shape = [2, 5, 7, 7] if data_format == 'channels_first' else [2, 7, 7, 5]
  padded = resnet_model.fixed_padding(tf.ones(shape), 4, data_format).numpy()
  if data_format == 'channels_first':
    padded = padded.transpose(0, 2, 3, 1)
  assert padded.shape == (2, 10, 10, 5)
  assert padded[:, 1:8, 1:8].all()  # one before, two behind
  assert padded.sum() == 2 * 7 * 7 * 5


@pytest.mark.parametrize('size', [8, 32, 110])
def test_size_in_a_checkpoint(size):
  names = [resnet_model.tf1_name(v) for v in generate(size).variables]
  momentum = [f'{name}/Momentum' for name in names]
  assert resnet_model.size_in_checkpoint(names + momentum) == size
  assert resnet_model.size_in_checkpoint(['dense/kernel']) is None
  network = generate(size)
  assert repr(network).startswith(f'ResNet-{size}, ')


@pytest.mark.parametrize('kernel_size', [1, 3])
@pytest.mark.parametrize('size', [7, 8])
def test_strided_convolution_pads_by_the_kernel_alone(kernel_size, size):
  kernel = tf.reshape(tf.range(1.0, kernel_size ** 2 + 1),
                      [kernel_size, kernel_size, 1, 1])
  conv = resnet_model.Conv2dFixedPadding(kernel, 2, 'channels_last', 'conv')
  image = tf.random.stateless_normal([size, size], [3, 4]).numpy()
  before = (kernel_size - 1) // 2
  padded = np.pad(image, before)
  windows = np.lib.stride_tricks.sliding_window_view(
      padded, (kernel_size, kernel_size))[::2, ::2]
  expected = (windows * conv.kernel.numpy()[:, :, 0, 0]).sum((2, 3))
  actual = conv(image[None, :, :, None])[0, :, :, 0]
  np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5)


def test_batch_norm_moments():
  norm = resnet_model.BatchNormRelu(3, 'channels_last', 'norm')
  inputs = np.random.default_rng(5).normal(2, 3, [4, 5, 6, 3])
  inputs = inputs.astype(np.float32)
  outputs = norm(inputs, training=True)
  mean = inputs.mean((0, 1, 2))
  variance = inputs.var((0, 1, 2))
  np.testing.assert_allclose(
      outputs, np.maximum((inputs - mean) / np.sqrt(variance + 1e-5), 0),
      rtol=1e-4, atol=1e-5)
  unbiased = inputs.var((0, 1, 2), ddof=1)
  np.testing.assert_allclose(norm.moving_mean, 0.003 * mean, rtol=1e-5)
  np.testing.assert_allclose(
      norm.moving_variance, 0.997 + 0.003 * unbiased, rtol=1e-6)
  moving = norm.moving_mean.numpy(), norm.moving_variance.numpy()
  outputs = norm(inputs, training=False)
  np.testing.assert_allclose(
      outputs,
      np.maximum((inputs - moving[0]) / np.sqrt(moving[1] + 1e-5), 0),
      rtol=1e-4, atol=1e-5)
  np.testing.assert_array_equal(norm.moving_mean, moving[0])
  np.testing.assert_array_equal(norm.moving_variance, moving[1])


def test_initial_values():
  network = generate(32)
  for variable in network.variables:
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
