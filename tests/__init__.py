"""The tests; `python -m pytest` runs them."""

import tensorflow as tf

# Recent GPUs otherwise round the numbers in float32 convolutions to TF32.
tf.config.experimental.enable_tensor_float_32_execution(False)
