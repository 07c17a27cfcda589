"""The tests; `python -m pytest` runs them."""

import tensorflow as tf

# Recent GPUs otherwise round the numbers in float32 convolutions to TF32.
tf.config.experimental.enable_tensor_float_32_execution(False)
# Two devices, to train on both.
tf.config.set_logical_device_configuration(
    tf.config.list_physical_devices('CPU')[0],
    [tf.config.LogicalDeviceConfiguration()] * 2)
