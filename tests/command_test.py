"""Tests of the command line, its errors, the export and the README."""

import ast
import os
import re
import shutil
import signal
import struct
import subprocess
import sys
from unittest import mock

from absl import flags, logging
import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
import cifar10_main
from tests import helpers


@pytest.fixture
def main(script_flags, usual_signals, monkeypatch):
  """Parses flags and runs main; returns what it exits with."""
  monkeypatch.setattr(cifar10_main, 'show_log', lambda: logging.set_verbosity(
      logging.INFO))
  monkeypatch.setattr(
      tf.config.experimental, 'enable_op_determinism', mock.Mock())

  def run_main(*arguments):
    flags.FLAGS.unparse_flags()
    try:
      return cifar10_main.main(flags.FLAGS([helpers.SCRIPT, *arguments]))
    except flags.Error as error:
      return str(error)
    except SystemExit as end:
      return end.code
  return run_main


@pytest.fixture
def small_run(main, data_dir, tmp_path):
  """Runs main with eight steps in the folder `model`, as `trained` has them."""
  def run(*arguments):
    return main(f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model',
                '--resnet_size=8', '--batch_size=10', '--train_steps=8',
                '--steps_per_eval=4', '--seed=1', *arguments)
  return run


# ---------------------------------------------------------------- settings


@pytest.mark.parametrize('flag', [
    'resnet_size=0', 'resnet_size=33', 'resnet_size=2', 'resnet_size=-4',
    'resnet_size=x', 'train_steps=0', 'train_steps=-1', 'train_steps=1.5',
    'steps_per_eval=0', 'steps_per_eval=x', 'batch_size=0', 'batch_size=-128',
    'batch_size=50001', 'data_format=NCHW', 'dtype=half', 'xla=maybe',
    'save_checkpoints_secs=-1', 'seed=-1', 'seed=4294967296', 'model_dir=',
    'model_dir=a\tb', 'data_dir=\udcff', 'model_dir=a[1]', 'model_dir=a?',
    'data_dir=/a*', 'model_dir=gs://bucket/m', 'data_dir=s3://b/d',
    'model_dir=~nobody-of-this-name/m', 'steps_per_eval=12345678901234567890',
    'use_synthetic_data=maybe'])
def test_settings_out_of_range(main, flag):
  """Neither the command line nor Python takes them."""
  name, value = flag.split('=')
  message = main(f'--{flag}')
  assert name in message
  assert len(message.splitlines()) == 1
  with pytest.raises(ValueError, match=f'--{name}=.*'):
    cifar10_main.Settings(**{name: value})


@pytest.mark.parametrize('flag', [
    '--eval_only=maybe', '--num_gpus=-2', '--num_gpus=9999', '--export_dir=a]b',
    '--export_dir=a\\b', '--export_dir=hdfs://x', '--bach_size=3'])
def test_other_flags_out_of_range(main, flag):
  message = main(flag)
  assert flag.split('=')[0].strip('-') in message
  assert len(message.splitlines()) == 1


def test_settings(monkeypatch, tmp_path):
  """Paths may begin with ~; the default folder of generated images differs."""
  monkeypatch.setenv('HOME', '/home/me')
  settings = cifar10_main.Settings
  given = settings('~/d', tmp_path, use_synthetic_data=True, seed=2**32 - 1)
  assert given.data_dir == '/home/me/d'
  assert given.model_dir == str(tmp_path)
  assert settings().model_dir == '/tmp/cifar10_model'
  synthetic = settings(use_synthetic_data=True, resnet_size=None)
  assert synthetic.model_dir == '/tmp/cifar10_model_synthetic'
  assert synthetic.resnet_size is synthetic.seed is None
  assert (synthetic.train_steps, synthetic.batch_size) == (100000, 128)


def test_settings_are_the_flags(main, monkeypatch):
  """Also in a second run in a notebook, whose flags begin anew."""
  train = mock.Mock(return_value=True)
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', train)
  monkeypatch.setenv('HOME', '/home/me')
  given = {
      'data_dir': '~/d', 'model_dir': '~/m', 'resnet_size': 14,
      'train_steps': 7, 'steps_per_eval': 6, 'batch_size': 5,
      'save_checkpoints_secs': 4, 'data_format': 'channels_first',
      'dtype': 'bf16', 'xla': 'on', 'seed': 3, 'use_synthetic_data': True}
  assert main(*(f'--{name}={value}' for name, value in given.items())) == 0
  assert vars(train.call_args.args[0]) == {
      **given, 'data_dir': '/home/me/d', 'model_dir': '/home/me/m'}
  tf.config.experimental.enable_op_determinism.assert_called_once_with()
  cifar10_main.define_flags()
  assert main('--use_synthetic_data') == 0
  assert train.call_args.args[0] == cifar10_main.Settings(
      use_synthetic_data=True)
  tf.config.experimental.enable_op_determinism.assert_called_once_with()


@pytest.mark.parametrize(('argument', 'status', 'expected'), [
    ('--help', 1, r'(?s)--data_dir:.*--model_dir:.*--resnet_size: Depth of'),
    ('--bach_size=3', 1, r"(?m)^FATAL Flags .*'bach_size'"),
    ('--batch_size=0', 1, 'flag --batch_size=0: 0 is not an integer in'),
    ('--eval_only=no way', 1, 'flag --eval_only=no way')])
def test_answered_before_tensorflow_is_imported(argument, status, expected):
  """That takes seconds; here the attempt would be an error."""
  code = ('import runpy, sys\n'
          'sys.modules["tensorflow"] = None\n'
          'runpy.run_path("cifar10_main.py", run_name="__main__")')
  result = subprocess.run([sys.executable, '-c', code, argument], text=True,
                          capture_output=True, check=False, cwd=helpers.ROOT)
  assert result.returncode == status
  assert re.search(expected, result.stdout + result.stderr)
  assert 'Traceback' not in result.stderr


# ------------------------------------------------------------------ errors


@pytest.mark.parametrize(('text', 'expected'), [
    ('Graph execution error:\n\nDetected at node a/b defined at (most recent '
     'call last):\n<stack traces unavailable>\nOut of range [[{{node x}}]] '
     '[Op:Run]', 'Out of range [[]]'),
    ('{{function_node f}} No such file [Op:SaveV2] name: ', 'No such file'),
    ('\x1b[2Jred', '?[2Jred'), ('', 'ValueError'), ('y' * 999, 'y' * 300)])
def test_reason_is_the_line_that_tells(text, expected):
  assert cifar10.reason(ValueError(text)) == expected


@pytest.mark.parametrize('damage', ['folder', 'file', 'cut', 'label', 'empty'])
def test_damaged_data(small_run, data_dir, tmp_path, damage):
  path = data_dir / cifar10.FOLDER_NAME / 'data_batch_3.bin'
  data = path.read_bytes()
  expected = str(path)
  if damage == 'folder':
    shutil.rmtree(data_dir)
    expected = f'{data_dir}.*run cifar10_download_and_extract.py first'
  elif damage == 'file':
    path.unlink()
    expected += '.*run cifar10_download_and_extract.py first'
  elif damage == 'cut':
    path.write_bytes(data[:-1])
    expected += '.*not a whole number of 3,073-byte records'
  elif damage == 'label':
    path.write_bytes(data[:3073] + b'\x0a' + data[3074:])
    expected += '.*record 1 has label 10, not 0-9'
  else:
    path.write_bytes(b'')
    expected += '.*0 bytes'
  message = small_run()
  assert re.search(expected, message)
  assert len(message.splitlines()) == 1
  assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize(('error', 'expected'), [
    (MemoryError(), 'The machine has too little memory: end other programs, '
     'or try a smaller --batch_size'),
    (tf.errors.ResourceExhaustedError(None, None, 'OOM'),
     'The device has too little memory: try a smaller --batch_size'),
    (tf.errors.UnimplementedError(None, None, 'no such layout'),
     r'This device cannot do that \(no such layout\): .*--data_format.*')])
def test_device_that_is_not_enough(main, monkeypatch, error, expected):
  monkeypatch.setattr(
      cifar10_main, 'train_and_evaluate', mock.Mock(side_effect=error))
  assert re.fullmatch(f'.*: {expected}', main())


@pytest.mark.parametrize(('arguments', 'visible', 'expected'), [
    ([], None, 1), ([], '0', 1), ([], '', 0), (['--num_gpus=0'], None, 0)])
def test_warning_about_an_idle_gpu(
    main, tmp_path, monkeypatch, log, arguments, visible, expected):
  """The driver's tool is there, but TensorFlow finds no GPU."""
  tool = tmp_path / 'nvidia-smi'
  tool.touch(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
  monkeypatch.setattr(tf.config, 'set_visible_devices', lambda *_: None)
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', lambda *_: True)
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  if visible is not None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  assert main(*arguments) == 0
  assert len(log) == expected
  assert all('pip install "tensorflow[and-cuda]"' in line for line in log)


def test_model_dir_that_cannot_be_written(small_run):
  assert re.fullmatch(
      r'.*: Cannot write to /dev/null/model \(Not a directory\): name another '
      '--model_dir', small_run('--model_dir=/dev/null/model'))


def test_stray_argument(main):
  assert "unknown argument 'stray'" in main('stray')


# ----------------------------------------------------------------- signals


@pytest.mark.parametrize(('number', 'status'), [
    (signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_signal_saves_and_ends(
    small_run, usual_signals, tmp_path, monkeypatch, log, number, status):
  """At once; the same command goes on. Later signals do what they usually do.
  """
  monkeypatch.setattr(cifar10_main, 'log_values', lambda step, values: (
      step == 5 and signal.raise_signal(number)))
  assert small_run() == status
  assert [line for line in log if line.startswith('Stop')] == [
      'Stopping. A second signal ends at once',
      f'Stopped after step 5, saved as {tmp_path}/model/model.ckpt-5: the same '
      'command goes on from there']
  assert {n: signal.getsignal(n) for n in usual_signals} == usual_signals
  assert small_run() == 0
  assert {n: signal.getsignal(n) for n in usual_signals} == usual_signals


def test_second_signal_ends_at_once(
    small_run, tmp_path, monkeypatch, usual_signals, log):
  """As Python's usual handler does, or without one the system."""
  def signal_twice(step, values):
    if step == 1:  # there is nothing to save yet
      return
    signal.raise_signal(signal.SIGINT)
    assert {n: signal.getsignal(n) for n in usual_signals} == usual_signals
    signal.raise_signal(signal.SIGINT)

  monkeypatch.setattr(cifar10_main, 'log_values', signal_twice)
  with pytest.raises(KeyboardInterrupt):
    small_run()
  assert log[-1] == 'Stopping. A second signal ends at once'
  assert not (tmp_path / 'model' / 'model.ckpt-5.index').exists()


def test_signals_before_there_is_something_to_save(usual_signals):
  """They do what they usually do; and nohup's stay ignored for good."""
  stop = cifar10_main.StopRequest('SIGTERM', 'SIGINT', 'SIGHUP', 'SIGNONE')
  signal.signal(signal.SIGHUP, signal.SIG_IGN)
  assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
  with pytest.raises(KeyboardInterrupt):
    signal.raise_signal(signal.SIGINT)
  assert not stop()
  signal.raise_signal(signal.SIGHUP)
  assert not stop()
  signal.raise_signal(signal.SIGTERM)
  assert stop()
  assert stop.signal == signal.SIGTERM


def test_stop_button_of_a_notebook(data_dir, tmp_path, usual_signals):
  """The first KeyboardInterrupt saves, and the call returns False."""
  assert not helpers.run(
      data_dir, tmp_path / 'model', None, train_steps=400, steps_per_eval=400,
      hooks=[lambda step, _: step > 1 and signal.raise_signal(signal.SIGINT)])
  assert tf.train.latest_checkpoint(tmp_path / 'model').endswith('-101')
  assert signal.getsignal(signal.SIGINT) is signal.default_int_handler


# ------------------------------------------------------------------ export


def signatures(folder):
  return tf.saved_model.load(str(folder)).signatures


def test_export(undisturbed, log):
  """Raw test images give what the evaluation found."""
  assert any(f'Exported step 150 to {undisturbed.export_dir}' in row
             for row in undisturbed.screen.rows)
  serve = signatures(undisturbed.export_dir)['serving_default']
  _, inputs = serve.structured_input_signature
  assert inputs == {'images': tf.TensorSpec([None, 32, 32, 3], tf.uint8,
                                            'images')}
  assert set(serve.structured_outputs) == {
      'classes', 'class_names', 'probabilities'}
  records = cifar10.synthetic_records('eval')
  images, one_hot = cifar10_main.dataset_parser(records)
  outputs = serve(images=images)
  classes = outputs['classes'].numpy()
  assert classes.dtype == np.int64
  np.testing.assert_array_equal(
      outputs['class_names'].numpy().astype(str),
      np.array(cifar10.CLASSES)[classes])
  state = helpers.make_state()
  helpers.restore(undisturbed.model_dir, state)
  dataset = helpers.input_fn('eval', batch_size=1000)
  features, _ = dataset.get_single_element()
  expected = cifar10_main.cifar10_model_fn(features, None, 'infer', state)
  np.testing.assert_allclose(
      outputs['probabilities'], expected['probabilities'], atol=1e-5)
  accuracy = (classes == np.argmax(one_hot, axis=1)).mean()
  assert accuracy == ast.literal_eval(undisturbed.printed[-1])['accuracy']

  with pytest.raises(tf.errors.InvalidArgumentError):
    serve(images=tf.zeros([32, 32, 3], tf.uint8))
  one = serve(images=np.zeros([1, 32, 32, 3], np.uint8))
  assert one['probabilities'].shape == [1, 10]


def test_export_of_what_is_evaluated(
    small_run, trained, tmp_path, capsys, log):
  """--eval_only in a folder that must not be written, --export_dir elsewhere;
  standardized images give the same by a signature of their own.
  """
  shutil.copytree(trained.model_dir, tmp_path / 'model')
  before = helpers.contents(tmp_path / 'model')
  folder = tmp_path / 'exported'
  assert small_run('--eval_only', f'--export_dir={folder}') == 0
  assert capsys.readouterr().out.splitlines()[0] == trained.printed[-1]
  assert helpers.contents(tmp_path / 'model') == before
  assert f'Exported step 8 to {folder}' in log
  assert {path.name for path in tmp_path.iterdir()} == {
      'data', 'model', 'exported'}

  images = np.random.default_rng(0).integers(0, 256, [5, 32, 32, 3], np.uint8)
  found = signatures(folder)
  np.testing.assert_allclose(
      *(found[name](images=values)['probabilities'] for name, values in (
          ('serving_default', images),
          ('standardized', tf.image.per_image_standardization(images)))),
      atol=1e-6)


def test_export_folder_that_is_there(small_run, tmp_path):
  """Nothing is trained for hours to find that then."""
  (tmp_path / 'mine').touch()
  message = small_run(f'--export_dir={tmp_path}/mine')
  assert f'--export_dir={tmp_path}/mine is there already' in message
  assert not (tmp_path / 'model').exists()


def test_export_is_whole_or_not_there(tmp_path, monkeypatch):
  """Also if the disk is full, or the folder has come into being meanwhile."""
  def save(network, folder, signatures):
    os.mkdir(folder)
    assert not os.path.samefile(folder, tmp_path / 'exported')
    raise OSError(28, 'No space left on device')

  monkeypatch.setattr(tf.saved_model, 'save', save)
  (tmp_path / 'exported').mkdir()
  (tmp_path / 'exported' / 'mine').touch()
  with pytest.raises(cifar10.Cifar10Error, match='--export_dir'):
    cifar10_main.export(helpers.make_state(), f'{tmp_path}/exported')
  with pytest.raises(cifar10.Cifar10Error, match=(
      r'^Cannot write .*/new \(.*No space left on device\): .*--export_dir')):
    cifar10_main.export(helpers.make_state(), f'{tmp_path}/new')
  assert [*tmp_path.rglob('*')] == [
      tmp_path / 'exported', tmp_path / 'exported' / 'mine']
  monkeypatch.undo()
  with pytest.raises(cifar10.Cifar10Error, match='--export_dir'):
    cifar10_main.export(helpers.make_state(), f'{tmp_path}/exported')
  assert [*tmp_path.rglob('*')] == [
      tmp_path / 'exported', tmp_path / 'exported' / 'mine']


def accuracy_of(classify, images, labels):
  """Returns the accuracy on generated images, one at a time."""
  found = [classify(images=images[i:i + 1])['classes'][0]
           for i in range(len(images))]
  return np.mean(found == labels)


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*tf.lite.Interpreter is deprecated')
def test_export_for_keras_and_tensorflow_lite(undisturbed):
  """Float, and quantized to int8 by the signature `standardized`."""
  folder = str(undisturbed.export_dir)
  images, one_hot = cifar10_main.dataset_parser(
      cifar10.synthetic_records('eval')[:200])
  labels = np.argmax(one_hot, axis=1)
  standardized = tf.image.per_image_standardization(images).numpy()
  expected = signatures(folder)['serving_default'](images=images)['classes']
  layer = tf.keras.layers.TFSMLayer(folder, call_endpoint='serving_default')
  np.testing.assert_array_equal(layer(images)['classes'], expected)

  def convert(signature):
    return tf.lite.TFLiteConverter.from_saved_model(
        folder, signature_keys=[signature])

  lite = tf.lite.Interpreter(model_content=convert('serving_default').convert())
  assert accuracy_of(lite.get_signature_runner(), images.numpy(), labels) == (
      np.mean(expected == labels))
  converter = convert('standardized')
  converter.optimizations = [tf.lite.Optimize.DEFAULT]
  converter.representative_dataset = lambda: (
      {'images': standardized[i:i + 1]} for i in range(50))
  model = converter.convert()
  assert len(model) < 100_000  # bytes, for 78,106 parameters
  lite = tf.lite.Interpreter(model_content=model)
  assert accuracy_of(lite.get_signature_runner(), standardized, labels) == (
      pytest.approx(np.mean(expected == labels), abs=0.1))


# ------------------------------------------------------------------ README


def readme_code(beginning):
  """Returns the block of Python in the README that holds such a line."""
  with open(os.path.join(helpers.ROOT, 'README.md'), encoding='utf-8') as file:
    blocks = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
  code, = (block for block in blocks if beginning in block)
  return code


def replaced(code, replacements):
  for now, then in replacements.items():
    assert now in code
    code = code.replace(now, str(then))
  return code


def write_picture(path, image):
  tf.io.write_file(str(path), tf.io.encode_png(image))


def test_readme_on_serving(tmp_path, capsys, undisturbed):
  image = np.random.default_rng(0).integers(0, 256, [32, 32, 3], np.uint8)
  serve = signatures(undisturbed.export_dir)['serving_default']
  outputs = serve(images=image[None])
  write_picture(tmp_path / 'square.png', image.repeat(8, 0).repeat(8, 1))
  exec(replaced(readme_code('decode_image'), {
      '/tmp/cifar10_export': undisturbed.export_dir,
      'square.png': tmp_path / 'square.png'}), {})
  name, share = capsys.readouterr().out.split()
  assert name == outputs['class_names'][0].numpy().decode()
  assert float(share) == pytest.approx(outputs['probabilities'].numpy().max())


def bitmap(image):
  """Returns the bytes of a BMP file: rows from below, each pixel as B, G, R."""
  height, width, _ = image.shape
  pixels = image[::-1, :, ::-1].tobytes()  # each row is a multiple of 4 bytes
  return b'BM' + struct.pack(
      '<IIIIiiHHIIiiII', 54 + len(pixels), 0, 54, 40, width, height, 1, 24, 0,
      len(pixels), 0, 0, 0, 0) + pixels


def test_predict(main, tmp_path, capsys, log, undisturbed):
  """By the middle square, from any of the formats; others are named."""
  image = np.random.default_rng(0).integers(0, 256, [32, 32, 3], np.uint8)
  wide = np.pad(image, [[0, 0], [40, 40], [0, 0]], 'wrap')
  large = wide.repeat(8, axis=0).repeat(8, axis=1)
  opaque = np.dstack([large, np.full(large.shape[:2], 255, np.uint8)])
  clear = np.dstack([wide, np.zeros(wide.shape[:2], np.uint8)])
  for name, picture in (('small', image), ('wide', wide), ('large', large),
                        ('opaque', opaque), ('clear', clear),
                        ('white', np.full([50, 40, 3], 255, np.uint8)),
                        ('grey', wide[:, :, :1])):
    write_picture(tmp_path / f'{name}.png', picture)
  (tmp_path / 'wide.bmp').write_bytes(bitmap(wide))
  (tmp_path / 'text.jpg').write_text('no picture')
  names = ['small.png', 'wide.png', 'large.png', 'opaque.png', 'wide.bmp',
           'missing.png', 'text.jpg', 'clear.png', 'white.png', 'grey.png']
  paths = [str(tmp_path / name) for name in names]
  assert main(f'--model_dir={undisturbed.model_dir}',
              f'--predict={",".join(paths)}') == 1
  lines = capsys.readouterr().out.splitlines()
  serve = signatures(undisturbed.export_dir)['serving_default']
  found = serve(images=image[None])['probabilities'][0].numpy()
  expected = ', '.join(f'{cifar10.CLASSES[i]} {found[i]:.1%}'
                       for i in np.argsort(-found, kind='stable')[:3])
  assert lines[:5] == [f'{path}: {expected}' for path in paths[:5]]
  shown = dict(line.split(': ') for line in lines)
  assert shown[paths[7]] == shown[paths[8]]  # what is transparent is white
  assert paths[9] in shown
  errors = [line for line in log if 'Cannot read the picture' in line]
  assert [path in line for path, line in zip(paths[5:7], errors)] == [True] * 2
  assert main(f'--model_dir={undisturbed.model_dir}',
              f'--predict={paths[0]}') == 0


TWICE = """
import logging, runpy, sys
logging.getLogger('another').info('not shown')
cifar10_main.logging.info('not shown')
cifar10_main.logging.warning('shown')
print(results, confusion_matrix.shape, cifar10_main.make_state(
    cifar10_main.Settings(resnet_size=14)).network, 'keras' in sys.modules)
for steps in (1, 2):
  sys.argv = ['cifar10_main.py', '--use_synthetic_data', '--resnet_size=8',
              f'--train_steps={steps}', '--model_dir=FOLDER/script']
  try:
    runpy.run_path(sys.argv[0], run_name='__main__')
  except SystemExit as end:
    assert not end.code
"""


def test_readme_on_notebooks(tmp_path):
  """Log and results are shown, and nothing of others. Then the script runs
  twice in the same process, as by %run, each time with its log.
  """
  code = replaced(readme_code('show_log') + TWICE, {
      '/tmp/cifar10_notebook': tmp_path / 'notebook', 'FOLDER': tmp_path,
      'train_steps=800': 'train_steps=2',
      'steps_per_eval=400': 'steps_per_eval=2'})
  # Keras must have no say: the network does without it.
  result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      cwd=helpers.ROOT, env={**os.environ, 'KERAS_BACKEND': 'torch'})
  assert result.returncode == 0, result.stderr
  lines = result.stderr.splitlines()
  assert helpers.only_log_and_results(lines), result.stderr
  assert 'INFO:tensorflow:loss = ' in result.stderr
  assert 'WARNING:tensorflow:shown' in lines
  assert 'not shown' not in result.stderr
  for step in (1, 2):
    assert len(helpers.matches(
        f'INFO:tensorflow:Saving checkpoints for {step} into .*/script/.*',
        lines)) == 1
  trained, evaluated, *classes, last, first, second = (
      result.stdout.splitlines())
  assert trained == evaluated
  assert [line.split()[0] for line in classes] == [*cifar10.CLASSES]
  assert last == (f'{trained} (10, 10) ResNet-14, 175,322 parameters, '
                  'channels_last, float32 False')
  assert "'global_step': 1}" in first
  assert "'global_step': 2}" in second
