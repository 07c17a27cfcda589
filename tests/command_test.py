"""Tests of the command line, its errors, the export and the README."""

import ast
import errno
import os
import re
import shutil
import signal
import subprocess
import sys
from unittest import mock

from absl import flags, logging
import numpy as np
from PIL import ExifTags, Image, ImageOps
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


@pytest.mark.parametrize('flag', [
    'resnet_size=33', 'resnet_size=2', 'resnet_size=x', 'train_steps=0',
    'train_steps=1.5', 'steps_per_eval=0', 'batch_size=0', 'batch_size=50001',
    'data_format=NCHW', 'dtype=half', 'xla=maybe', 'save_checkpoints_secs=-1',
    'seed=-1', 'seed=4294967296', 'model_dir=', 'model_dir=a\tb',
    'data_dir=\udcff', 'model_dir=a[1]', 'model_dir=a?', 'data_dir=/a*',
    'model_dir=gs://bucket/m', 'model_dir=~nobody-of-this-name/m',
    'steps_per_eval=12345678901234567890', 'use_synthetic_data=maybe'])
def test_settings_out_of_range(main, flag):
  """Neither the command line nor Python takes them."""
  name, value = flag.split('=')
  message = main(f'--{flag}')
  assert name in message
  assert len(message.splitlines()) == 1
  with pytest.raises(ValueError, match=f'--{name}=.*'):
    cifar10_main.Settings(**{name: value})


@pytest.mark.parametrize(('argument', 'expected'), [
    ('--eval_only=maybe', 'eval_only'), ('--num_gpus=-2', 'num_gpus'),
    ('--num_gpus=9999', 'num_gpus=9999 is more than the'),
    ('--export_dir=a]b', 'export_dir'), ('--export_dir=a\\b', 'export_dir'),
    ('--export_dir=hdfs://x', 'export_dir'), ('--bach_size=3', 'bach_size'),
    ('stray', "unknown argument 'stray'"),
    ('--model_dir=/dev/null/model', r'Cannot write to /dev/null/model \(Not a '
     r'directory\): name another --model_dir$'),
    ('--data_dir=/nowhere', '/nowhere/.*/test_batch.bin is missing: run '
     'cifar10_download_and_extract.py first, with the same --data_dir, or try '
     '--use_synthetic_data$'),
    ('--predict=', 'predict=.*: must name pictures'),
    ('--predict=a.png,', 'must name pictures'),
    ('--predict=a.png --export_dir=b', 'use --predict alone'),
    ('--predict=a.png --eval_only', 'use --predict alone'),
    # Nothing is trained for hours to find that then.
    (f'--export_dir={os.curdir}', 'export_dir=. is there already: name a new')])
def test_other_arguments_that_cannot_be(
    small_run, tmp_path, argument, expected):
  message = small_run(*argument.split())
  assert re.search(expected, message)
  assert len(message.splitlines()) == 1
  assert not (tmp_path / 'model').exists()


def test_settings_are_the_flags(main, monkeypatch):
  """Also in a second run in a notebook, whose flags begin anew."""
  train = mock.Mock(return_value=True)
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', train)
  monkeypatch.setenv('HOME', '/home/me')
  given = {
      'data_dir': '~/d', 'model_dir': '~/m', 'resnet_size': 14,
      'train_steps': 7, 'steps_per_eval': 6, 'batch_size': 5,
      'save_checkpoints_secs': 4, 'data_format': 'channels_first',
      'dtype': 'bf16', 'xla': 'on', 'seed': 2**32 - 1,
      'use_synthetic_data': True}
  assert main(*(f'--{name}={value}' for name, value in given.items())) == 0
  expected = {**given, 'data_dir': '/home/me/d', 'model_dir': '/home/me/m'}
  assert vars(train.call_args.args[0]) == expected
  assert vars(cifar10_main.Settings(**given)) == expected
  cifar10_main.define_flags()
  assert main('--use_synthetic_data') == 0
  settings = train.call_args.args[0]
  assert settings == cifar10_main.Settings(use_synthetic_data=True)
  assert settings.model_dir == '/tmp/cifar10_model_synthetic'
  assert settings.resnet_size is settings.seed is None
  assert (settings.train_steps, settings.batch_size) == (100000, 128)
  assert cifar10_main.Settings().model_dir == '/tmp/cifar10_model'


@pytest.mark.parametrize(('argument', 'expected'), [
    ('--help', r'(?s)--data_dir:.*--model_dir:.*--resnet_size: Depth of'),
    ('--bach_size=3', r"(?m)^FATAL Flags .*'bach_size'"),
    ('--batch_size=0', 'flag --batch_size=0: 0 is not an integer in')])
def test_answered_before_tensorflow_is_imported(argument, expected):
  """That takes seconds; here the attempt would be an error."""
  code = ('import runpy, sys\n'
          'sys.modules["tensorflow"] = None\n'
          'runpy.run_path("cifar10_main.py", run_name="__main__")')
  result = subprocess.run([sys.executable, '-c', code, argument], text=True,
                          capture_output=True, check=False, cwd=helpers.ROOT)
  assert result.returncode == 1
  assert re.search(expected, result.stdout + result.stderr)
  assert 'Traceback' not in result.stderr


@pytest.mark.parametrize('command', [
    [f'.{os.sep}cifar10_main.py'],
    pytest.param(['tests/../cifar10_main.py'], marks=pytest.mark.slow),
    pytest.param(['-m', 'cProfile', '-o', os.devnull, 'cifar10_main.py'],
                 marks=pytest.mark.slow)], ids=' '.join)
def test_log_however_the_script_is_started(tmp_path, command):
  """Standard output, to which it prints its results, may be closed."""
  process = helpers.start(
      ['sh', '-c', '"$@" >&-', 'sh', sys.executable, *command,
       '--use_synthetic_data', '--resnet_size=8', '--train_steps=2',
       f'--model_dir={tmp_path}'])
  _, log = helpers.finish(process)
  assert process.returncode == 0
  assert len(log.splitlines()) == 13
  assert (tmp_path / 'model.ckpt-2.index').exists()


@pytest.mark.parametrize(('text', 'expected'), [
    ('Graph execution error:\n\nDetected at node a/b defined at (most recent '
     'call last):\n<stack traces unavailable>\nOut of range [[{{node x}}]] '
     '[Op:Run]', 'Out of range [[]]'),
    ('{{function_node f}} No such file [Op:SaveV2] name: ', 'No such file'),
    ('\x1b[2Jred', '?[2Jred'), ('', 'ValueError'), ('y' * 999, 'y' * 300)])
def test_reason_is_the_line_that_tells(text, expected):
  assert cifar10.reason(ValueError(text)) == expected


@pytest.mark.parametrize(('error', 'expected'), [
    (MemoryError(), 'The machine has too little memory: end other programs, '
     'or try a smaller --batch_size'),
    (tf.errors.ResourceExhaustedError(None, None, 'OOM'),
     'The device has too little memory: try a smaller --batch_size'),
    (tf.errors.UnimplementedError(None, None, 'no such layout'),
     r'This device cannot do that \(no such layout\): .*--data_format.*'),
    (tf.errors.InvalidArgumentError(None, None, 'x only supports NHWC.'),
     r'This device cannot do that \(x only supports NHWC.\): .*')])
def test_device_that_is_not_enough(main, monkeypatch, error, expected):
  monkeypatch.setattr(
      cifar10_main, 'train_and_evaluate', mock.Mock(side_effect=error))
  assert re.fullmatch(f'.*: {expected}', main())


@pytest.mark.parametrize(('arguments', 'visible', 'is_said'), [
    ([], None, True), ([], '0', True), ([], '', False),
    (['--num_gpus=0'], None, False)])
def test_warning_about_an_idle_gpu(
    main, monkeypatch, log, arguments, visible, is_said):
  """The driver's tool is there, but TensorFlow finds no GPU."""
  for owner, name, value in (
      (shutil, 'which', 'nvidia-smi'),
      (tf.config, 'list_physical_devices', []),
      (tf.config, 'set_visible_devices', None),
      (cifar10_main, 'train_and_evaluate', True)):
    monkeypatch.setattr(owner, name, mock.Mock(return_value=value))
  monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
  if visible is not None:
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', visible)
  assert main(*arguments) == 0
  assert ['pip install "tensorflow[and-cuda]"' in line for line in log] == (
      [True] * is_said)


def test_signal_saves_and_ends(
    small_run, usual_signals, tmp_path, monkeypatch, log):
  """At once; the same command goes on. A second signal does what it usually
  does; so do all after the run.
  """
  for step, number, status in (
      (5, signal.SIGTERM, 143), (9, signal.SIGINT, 130),
      (13, signal.SIGHUP, 129), (14, None, 0)):
    del log[:]
    def signal_at(now, values, step=step, number=number):
      if now == step:
        signal.raise_signal(number)
        assert {n: signal.getsignal(n) for n in usual_signals} == usual_signals

    monkeypatch.setattr(cifar10_main, 'log_values', signal_at)
    assert small_run('--train_steps=14') == status
    assert [line for line in log if line.startswith('Stop')] == ([
        'Stopping. A second signal ends at once',
        f'Stopped after step {step}, saved as {tmp_path}/model/model.ckpt-'
        f'{step}: the same command goes on from there'] if number else [])
    assert {n: signal.getsignal(n) for n in usual_signals} == usual_signals


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


def signatures(folder):
  return tf.saved_model.load(str(folder)).signatures


def images_to_evaluate():
  """Returns the generated images to evaluate, and their labels."""
  images, labels = cifar10_main.dataset_parser(
      cifar10.synthetic_records('eval'))
  return images.numpy(), np.argmax(labels, axis=1)


def test_export(undisturbed):
  """Raw test images give what the evaluation found; standardized images give
  the same by a signature of their own.
  """
  assert any(f'Exported step 150 to {undisturbed.export_dir}' in row
             for row in undisturbed.screen.rows)
  found = signatures(undisturbed.export_dir)
  serve = found['serving_default']
  _, inputs = serve.structured_input_signature
  assert inputs == {'images': tf.TensorSpec([None, 32, 32, 3], tf.uint8,
                                            'images')}
  assert set(serve.structured_outputs) == {
      'classes', 'class_names', 'probabilities'}
  images, labels = images_to_evaluate()
  outputs = serve(images=images)
  classes = outputs['classes'].numpy()
  assert classes.dtype == np.int64
  np.testing.assert_array_equal(
      outputs['class_names'].numpy().astype(str),
      np.array(cifar10.CLASSES)[classes])
  state = helpers.make_state()
  helpers.restore(undisturbed.model_dir, state)
  features = tf.image.per_image_standardization(images)
  for expected in (
      cifar10_main.cifar10_model_fn(features, None, 'infer', state),
      found['standardized'](images=features)):
    np.testing.assert_allclose(
        outputs['probabilities'], expected['probabilities'], atol=1e-5)
  accuracy = (classes == labels).mean()
  assert accuracy == ast.literal_eval(undisturbed.printed[-1])['accuracy']

  with pytest.raises(tf.errors.InvalidArgumentError):
    serve(images=tf.zeros([32, 32, 3], tf.uint8))
  one = serve(images=np.zeros([1, 32, 32, 3], np.uint8))
  assert one['probabilities'].shape == [1, 10]


def test_export_of_what_is_evaluated(
    small_run, data_dir, trained, model_dir, tmp_path, capsys, log):
  """--eval_only writes nothing to its folder, and needs no data to train on."""
  before, folder = helpers.contents(model_dir), tmp_path / 'exported'
  for path in (data_dir / cifar10.FOLDER_NAME).glob('data_batch*'):
    path.unlink()
  assert small_run('--eval_only', f'--export_dir={folder}') == 0
  assert helpers.contents(model_dir) == before
  assert f'Exported step 8 to {folder}' in log
  assert {path.name for path in tmp_path.iterdir()} == {
      'data', 'model', 'exported'}
  assert set(signatures(folder)) == {'serving_default', 'standardized'}

  result, *classes = capsys.readouterr().out.splitlines()
  assert result == trained.printed[-1]
  names, accuracies = zip(*(line.split() for line in classes))
  assert names == cifar10.CLASSES
  # Of the 23 images, how many has each class?
  labels = cifar10.read_records(
      data_dir / cifar10.FOLDER_NAME / cifar10.TEST_FILE)[:, 0]
  right = np.bincount(labels, minlength=10) * np.array(accuracies, float)
  accuracy = ast.literal_eval(result)['accuracy']
  np.testing.assert_allclose(sum(right), accuracy * 23, atol=1e-2)


def test_export_is_whole_or_not_there(tmp_path, monkeypatch):
  """Also if the disk is full, or the folder has come into being meanwhile."""
  there, new = tmp_path / 'there', tmp_path / 'new'
  there.write_text('mine')

  def fails(message, function, *arguments):
    with pytest.raises(cifar10.Cifar10Error, match=f'{message}.*--export_dir'):
      function(*arguments)
    assert helpers.contents(tmp_path) == {there: b'mine'}
    assert [*tmp_path.iterdir()] == [there]

  def no_room(network, folder, signatures):
    assert network.data_format == 'channels_last'  # that all devices have
    os.mkdir(folder)
    raise OSError(errno.ENOSPC, 'No space left on device')

  state = helpers.make_state(data_format='channels_first')
  fails('', cifar10_main.export, state, str(there))
  with pytest.raises(ValueError, match='must be a local path'):
    cifar10_main.export(state, str(tmp_path / 'a[1]'))  # could not be loaded
  # It is tried before a training.
  fails('', cifar10_main.folder_beside(str(there / 'new')).__enter__)
  with monkeypatch.context() as patch:
    patch.setattr(tf.saved_model, 'save', no_room)
    fails(rf'^Cannot write to {new} \(.*No space left on device\): ',
          cifar10_main.export, state, str(new))
  monkeypatch.setattr(os, 'rename', mock.Mock(
      side_effect=OSError(errno.ENOTEMPTY, os.strerror(errno.ENOTEMPTY))))
  fails('not empty', cifar10_main.export, state, str(new))


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:.*tf.lite.Interpreter is deprecated')
def test_export_for_keras_and_tensorflow_lite(undisturbed):
  """Float, and quantized to int8 by the signature `standardized`."""
  folder = str(undisturbed.export_dir)
  images, labels = (values[:200] for values in images_to_evaluate())
  standardized = tf.image.per_image_standardization(images).numpy()
  expected = signatures(folder)['serving_default'](images=images)['classes']
  layer = tf.keras.layers.TFSMLayer(folder, call_endpoint='serving_default')
  np.testing.assert_array_equal(layer(images)['classes'], expected)

  def converter(signature):
    return tf.lite.TFLiteConverter.from_saved_model(
        folder, signature_keys=[signature])

  def accuracy(model, images):
    classify = tf.lite.Interpreter(model_content=model).get_signature_runner()
    return np.mean([classify(images=images[i:i + 1])['classes'][0] == labels[i]
                    for i in range(200)])

  rate = np.mean(expected == labels)
  assert accuracy(converter('serving_default').convert(), images) == rate
  quantizing = converter('standardized')
  quantizing.optimizations = [tf.lite.Optimize.DEFAULT]
  quantizing.representative_dataset = lambda: (
      {'images': standardized[i:i + 1]} for i in range(50))
  model = quantizing.convert()
  assert len(model) < 100_000  # bytes, for 78,106 parameters
  assert accuracy(model, standardized) == pytest.approx(rate, abs=0.1)


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


def test_predict(main, tmp_path, monkeypatch, capsys, log, undisturbed):
  """By the middle square, from any of the formats; others are named."""
  image = np.random.default_rng(0).integers(0, 256, [32, 32, 3], np.uint8)
  wide = np.pad(image, [[0, 0], [40, 40], [0, 0]], 'wrap')
  large = wide.repeat(8, axis=0).repeat(8, axis=1)
  clear_below = np.repeat([[255], [0]], 16, axis=0)

  def with_alpha(picture, alpha):
    return np.dstack([picture, np.full(picture.shape[:2], alpha, np.uint8)])

  pictures = {
      'square.png': image.repeat(8, 0).repeat(8, 1), 'wide.png': wide,
      'large.png': large, 'opaque.png': with_alpha(large, 255),
      'wide.bmp': wide, 'wide\x1b.webp': wide,
      'missing\udcff.png': None, 'text.jpg': None,
      'clear.png': with_alpha(wide, clear_below), 'grey.png': wide[:, :, 0],
      'white.png': np.where(clear_below[:, :, None], wide, np.uint8(255)),
      'grey.gif': wide[:, :, 0], 'grey.bmp': wide[:, :, 0]}
  paths = [str(tmp_path / name) for name in pictures]
  for path, picture in zip(paths, pictures.values()):
    if picture is not None:
      Image.fromarray(picture).save(path, lossless=True)
  (tmp_path / 'text.jpg').write_text('no picture')
  assert main(f'--model_dir={undisturbed.model_dir}',
              f'--predict={",".join(paths)}') == 1
  serve = signatures(undisturbed.export_dir)['serving_default']
  found = serve(images=image[None])['probabilities'][0].numpy()
  expected = ', '.join(f'{cifar10.CLASSES[i]} {found[i]:.1%}'
                       for i in np.argsort(-found, kind='stable')[:3])
  paths = [cifar10.printable(path) for path in paths]
  shown = dict(line.split(': ')
               for line in capsys.readouterr().out.splitlines())
  assert [*shown] == paths[:6] + paths[8:-1]
  assert [shown[path] for path in paths[:6]] == [expected] * 6
  # What is transparent is white; grey is grey in any format.
  assert [shown[path] for path in paths[8:10]] == [
      shown[path] for path in paths[10:-1]]
  errors = [line for line in log if 'Cannot read the picture' in line]
  refused = paths[6], paths[7], f'{paths[-1]} (a BMP with a palette: save it as'
  assert [path in line for path, line in zip(refused, errors)] == [True] * 3
  monkeypatch.setenv('HOME', str(tmp_path))
  assert main(f'--model_dir={undisturbed.model_dir}',
              '--predict=~/square.png') == 0
  capsys.readouterr()

  exec(replaced(readme_code('decode_image'), {  # on serving
      '/tmp/cifar10_export': undisturbed.export_dir, 'square.png': paths[0]
      }), {})
  name, share = capsys.readouterr().out.split()
  assert (name, float(share)) == (
      cifar10.CLASSES[found.argmax()], pytest.approx(found.max()))


@pytest.mark.parametrize('endian', '<>')
@pytest.mark.parametrize('orientation', [1, 3, 6, 8])
def test_picture_is_turned_as_the_camera_says(tmp_path, endian, orientation):
  stored = Image.linear_gradient('L').resize([64, 32])
  exif = Image.Exif()
  exif[ExifTags.Base.Make] = 'of the camera'
  exif[ExifTags.Base.Orientation] = orientation
  exif.endian = endian
  stored.save(tmp_path / 'stored.jpg', exif=exif, quality=100)
  with Image.open(tmp_path / 'stored.jpg') as picture:
    ImageOps.exif_transpose(picture).save(tmp_path / 'turned.png')
  stored, turned = (cifar10_main.read_picture(str(tmp_path / name))
                    for name in ('stored.jpg', 'turned.png'))
  np.testing.assert_allclose(stored, turned, atol=8)


TWICE = """
import logging, runpy, sys
logging.getLogger('another').info('not shown')
cifar10_main.logging.info('not shown')
cifar10_main.logging.warning('shown')
assert logging.os.environ['TF_ENABLE_ONEDNN_OPTS'] == '1'  # half as fast else
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
  assert re.fullmatch(
      re.escape(f'{trained} (10, 10) ResNet-14, 175,322 parameters, ') +
      r'channels_\w+, float32 False', last)
  assert "'global_step': 1}" in first
  assert "'global_step': 2}" in second
