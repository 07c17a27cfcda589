"""Tests of the command line, its errors, the export and the README."""

import ast
import os
import re
import subprocess
import sys
import threading
import time
from unittest import mock

from absl import flags
import keras
import numpy as np
import pytest
import tensorflow as tf

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error
import cifar10_main
from tests.helpers import (
  NUMBER,
  SCRIPT,
  make_state,
  only_log_and_results,
  restore,
  save,
  small_settings,
    train_command,
)


def run_main(*arguments):
  """Parses flags and runs main; returns what it exits with."""
  flags.FLAGS.unparse_flags()
  try:
    rest = flags.FLAGS([SCRIPT, *arguments])
  except flags.Error as error:
    return str(error)
  with (mock.patch.object(cifar10, 'receive_signals'),
        mock.patch.object(cifar10, 'catch_signals'),
        mock.patch.object(cifar10, 'show_log')):
    try:
      return cifar10_main.main(rest)
    except SystemExit as end:
      return end.code


@pytest.mark.parametrize('flag', [
    '--resnet_size=0', '--resnet_size=33', '--resnet_size=2',
    '--resnet_size=-4', '--resnet_size=x', '--train_steps=0',
    '--train_steps=-1', '--train_steps=1.5', '--steps_per_eval=0',
    '--steps_per_eval=x', '--batch_size=0', '--batch_size=-128',
    '--batch_size=50001', '--data_format=NCHW', '--eval_only=maybe',
    '--dtype=half', '--xla=maybe', '--save_checkpoints_secs=0', '--seed=-1',
    '--num_gpus=-2', '--num_gpus=9999',
    '--model_dir=', '--model_dir=a\tb', '--data_dir=\udcff',
    '--model_dir=a[1]', '--model_dir=a?', '--data_dir=/a*', '--export_dir=a]b',
    '--export_dir=a\\b', '--model_dir=gs://bucket/m', '--data_dir=s3://b/d',
    '--export_dir=hdfs://x', '--model_dir=~nobody-of-this-name/m',
    '--steps_per_eval=12345678901234567890'])
def test_flags_out_of_range(script_flags, flag):
  name = flag.partition('=')[0]
  message = run_main(flag)
  assert name in message
  assert len(message.splitlines()) == 1


def test_paths_may_begin_with_a_tilde(script_flags, monkeypatch):
  monkeypatch.setenv('HOME', '/home/me')
  flags.FLAGS.unparse_flags()
  flags.FLAGS([SCRIPT, '--model_dir=~/m', '--data_dir=~/d', '--export_dir=~/e'])
  settings = cifar10_main.settings_from(flags.FLAGS)
  assert (settings.model_dir, settings.data_dir, flags.FLAGS.export_dir) == (
      '/home/me/m', '/home/me/d', '/home/me/e')


def test_flags_may_be_defined_twice(script_flags):
  """A notebook may run the script twice; flags begin anew."""
  flags.FLAGS.unparse_flags()
  flags.FLAGS([SCRIPT, '--train_steps=7'])
  cifar10_main.define_flags()
  flags.FLAGS([SCRIPT])
  assert flags.FLAGS.train_steps == cifar10_main.Settings.train_steps


def test_settings_of_keras_change_nothing():
  """In a process of its own, since Keras would read them at its import."""
  code = ('import sys, cifar10_main as script\n'
          'print(script.make_state(8, seed=3).network.kernel.numpy().sum())\n'
          'print("keras" in sys.modules)')
  result = subprocess.run(
      [sys.executable, '-c', code], capture_output=True, text=True, check=False,
      cwd=os.path.dirname(SCRIPT),
      env={**os.environ, 'KERAS_BACKEND': 'torch', 'TF_USE_LEGACY_KERAS': '1'})
  assert result.returncode == 0, result.stderr
  total, is_imported = result.stdout.split()
  assert float(total) == pytest.approx(
      make_state(8, seed=3).network.kernel.numpy().sum().item())
  assert is_imported == 'False'


@pytest.mark.parametrize(('text', 'expected'), [
    ('Graph execution error:\n\nDetected at node a/b defined at (most recent '
     'call last):\n<stack traces unavailable>\nOut of range [[{{node x}}]] '
     '[Op:Run]', 'Out of range [[]]'),
    ('{{function_node f}} No such file [Op:SaveV2] name: ', 'No such file'),
    ('\x1b[2Jred', '?[2Jred'), ('', 'ValueError'), ('y' * 999, 'y' * 300)])
def test_reason_is_the_line_that_tells(text, expected):
  assert cifar10.reason(ValueError(text)) == expected


@pytest.mark.parametrize('tool', ['sleep 60', 'exit 9', None])
def test_drivers_tool_that_hangs_or_cannot_be_run(
    script_flags, tmp_path, monkeypatch, log, tool):
  path = tmp_path / 'nvidia-smi'
  path.write_text(f'#!/bin/sh\n{tool}\n' if tool else '#!/no/such/program\n')
  path.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(tf.config, 'list_physical_devices', lambda kind: [])
  monkeypatch.setattr(tf.config, 'set_visible_devices', lambda *_: None)
  monkeypatch.setattr(tf.test, 'is_built_with_cuda', lambda: True)
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', lambda *_: True)
  started = time.monotonic()
  assert run_main() == 0
  assert time.monotonic() - started < 5
  assert not log


def test_too_little_memory_of_the_machine(script_flags, monkeypatch):
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate',
                      mock.Mock(side_effect=MemoryError))
  assert run_main().endswith('too little memory: end other programs, or try a '
                             'smaller --batch_size')


def test_standard_output_that_is_full(data_dir, tmp_path):
  """The checkpoint is there; the same command goes on with its evaluation."""
  with open('/dev/full', 'w') as full:
    process = subprocess.run(
        train_command(tmp_path, '--train_steps=2'), stdout=full,
        stderr=subprocess.PIPE, text=True, check=False)
  assert process.returncode == 1
  assert process.stderr.splitlines()[-1] == (
      'cifar10_main.py: Cannot write to standard output (No space left on '
      'device): nothing is lost, the same command goes on from here')
  assert (tmp_path / 'model.ckpt-2.index').exists()


def test_unknown_flag(script_flags):
  assert 'bach_size' in run_main('--bach_size=3')


@pytest.mark.parametrize('damage', ['folder', 'file', 'cut', 'label', 'empty'])
def test_damaged_data(script_flags, data_dir, tmp_path, damage):
  path = data_dir / cifar10.FOLDER_NAME / 'data_batch_3.bin'
  data = path.read_bytes()
  expected = str(path)
  if damage == 'folder':
    data_dir = tmp_path / 'nothing'
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
  message = run_main(f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model')
  assert re.search(expected, message)
  assert len(message.splitlines()) == 1
  assert not (tmp_path / 'model').exists()


@pytest.mark.parametrize(
    'flag', ['--data_format=channels_first', '--dtype=bf16'])
def test_device_without_such_convolutions(
    script_flags, data_dir, tmp_path, monkeypatch, flag):

  def conv2d(*args, **kwargs):
    raise tf.errors.UnimplementedError(None, None, 'not here')

  monkeypatch.setattr(tf.nn, 'conv2d', conv2d)
  message = run_main(
      f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model', flag)
  assert message.endswith(f': {flag} does not run on this device: leave it out')
  assert not (tmp_path / 'model').exists()


def test_too_little_memory(script_flags, monkeypatch):

  def train_and_evaluate(*args):
    raise tf.errors.ResourceExhaustedError(None, None, 'OOM')

  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', train_and_evaluate)
  assert run_main().endswith('too little memory: try a smaller --batch_size')


@pytest.mark.parametrize(('flag', 'expected'), [
    ('--noeval_only', 1), ('--num_gpus=0', 0)])
def test_warning_about_an_idle_gpu(
    script_flags, tmp_path, monkeypatch, log, flag, expected):
  tool = tmp_path / 'nvidia-smi'
  tool.write_text('#!/bin/sh\necho "GPU 0: one that is idle"\n')
  tool.chmod(0o755)
  monkeypatch.setenv('PATH', str(tmp_path), prepend=os.pathsep)
  monkeypatch.setattr(tf.test, 'is_built_with_cuda', lambda: True)
  monkeypatch.setattr(threading, 'Thread', lambda target, **_: mock.Mock(
      start=target))
  monkeypatch.setattr(cifar10_main, 'train_and_evaluate', lambda *_: True)
  assert run_main(flag) == 0
  assert len(log) == expected
  if expected:
    assert 'cannot use the GPU' in log[0]
    assert 'pip install "tensorflow[and-cuda]"' in log[0]


def test_model_dir_that_cannot_be_written(script_flags, data_dir):
  message = run_main(f'--data_dir={data_dir}', '--model_dir=/dev/null/model',
                     '--resnet_size=8')
  assert message == (f'{os.path.basename(sys.argv[0])}: Cannot write to '
                     '/dev/null/model (Not a directory): name another '
                     '--model_dir')


def test_log_lines_begin_as_in_2017(undisturbed):
  """Each row is a whole line: of the log, or a result."""
  *rows, last = undisturbed.screen.rows
  assert not last
  assert only_log_and_results(rows)
  assert any(re.fullmatch(
      rf'INFO:tensorflow:loss = {NUMBER}, step = 1', row) for row in rows)


def test_stray_argument(script_flags):
  assert "unknown argument 'stray'" in run_main('stray')


def test_bad_flag_ends_the_script(script_flags, capsys):
  flags.FLAGS.unparse_flags()
  with pytest.raises(SystemExit) as exit_info:
    cifar10_main.app.run(
        cifar10_main.main, [SCRIPT, '--batch_size=0', '--eval_only'])
  assert exit_info.value.code == 1
  assert 'flag --batch_size=0' in ''.join(capsys.readouterr())


def test_export(tmp_path, undisturbed):
  """Raw test images give what the evaluation found.

  That is by TensorFlow's own tool, in a process that has only the export.
  """
  assert any(f'Exported {undisturbed.model_dir}/model.ckpt-150 to '
             f'{undisturbed.export_dir}' in row
             for row in undisturbed.screen.rows)
  records = cifar10.synthetic_records('eval')
  images, one_hot = cifar10_main.dataset_parser(records)
  np.save(tmp_path / 'images.npy', images)
  tool = os.path.join(os.path.dirname(sys.executable), 'saved_model_cli')
  subprocess.run(
      [tool, 'run', '--dir', undisturbed.export_dir, '--tag_set', 'serve',
       '--signature_def', 'serving_default', '--outdir', tmp_path,
       '--inputs', f'images={tmp_path}/images.npy'], cwd=tmp_path, check=True)

  classes, names, probabilities = (
      np.load(tmp_path / f'{name}.npy', allow_pickle=True)
      for name in ('classes', 'class_names', 'probabilities'))
  assert classes.dtype == np.int64
  np.testing.assert_array_equal(
      names.astype(str), np.array(cifar10.CLASSES)[classes])
  state = make_state()
  restore(undisturbed.model_dir, state)
  dataset = cifar10_main.input_fn('eval', None, 1000, use_synthetic_data=True)
  features, _ = dataset.get_single_element()
  expected = cifar10_main.cifar10_model_fn(
      features, None, 'infer', state.network)
  np.testing.assert_allclose(
      probabilities, expected['probabilities'], atol=1e-5)
  accuracy = (classes == np.argmax(one_hot, axis=1)).mean()
  assert accuracy == ast.literal_eval(undisturbed.printed[-1])['accuracy']


def test_signature_of_the_export(undisturbed):
  serve = tf.saved_model.load(
      str(undisturbed.export_dir)).signatures['serving_default']
  _, inputs = serve.structured_input_signature
  assert inputs == {'images': tf.TensorSpec([None, 32, 32, 3], tf.uint8,
                                            'images')}
  assert set(serve.structured_outputs) == {
      'classes', 'class_names', 'probabilities'}
  with pytest.raises(tf.errors.InvalidArgumentError):
    serve(images=tf.zeros([32, 32, 3], tf.uint8))
  one = serve(images=np.zeros([1, 32, 32, 3], np.uint8))
  assert one['probabilities'].shape == [1, 10]

  images = np.random.default_rng(0).integers(0, 256, [5, 32, 32, 3], np.uint8)
  standardized = tf.saved_model.load(
      str(undisturbed.export_dir)).signatures['standardized']
  np.testing.assert_allclose(
      standardized(images=tf.image.per_image_standardization(images))[
          'probabilities'], serve(images=images)['probabilities'], atol=1e-6)


def test_export_folder_that_is_there(script_flags, data_dir, tmp_path):
  (tmp_path / 'mine').touch()
  message = run_main(f'--data_dir={data_dir}', f'--model_dir={tmp_path}/model',
                     f'--export_dir={tmp_path}/mine', '--resnet_size=8',
                     '--train_steps=1')
  assert f'--export_dir={tmp_path}/mine is there already' in message
  assert not (tmp_path / 'model').exists()


def test_export_without_room(tmp_path, small_disk):
  folder = small_disk(kilobytes=300)
  save(tmp_path, make_state())
  with pytest.raises(Cifar10Error, match=r'Cannot export to .* make room'):
    cifar10_main.export(
        small_settings(None, tmp_path), f'{folder}/exported')
  assert not (folder / 'exported').exists()


def accuracy_of(classify, images, labels):
  """Returns the accuracy on generated images, one at a time."""
  found = [classify(images=images[i:i + 1])['classes'][0]
           for i in range(len(images))]
  return np.mean(found == labels)


@pytest.mark.filterwarnings('ignore:.*tf.lite.Interpreter is deprecated')
def test_export_for_keras_and_tensorflow_lite(undisturbed):
  """Float, and quantized to int8 by the signature `standardized`."""
  folder = str(undisturbed.export_dir)
  images, one_hot = cifar10_main.dataset_parser(
      cifar10.synthetic_records('eval')[:200])
  labels = np.argmax(one_hot, axis=1)
  standardized = tf.image.per_image_standardization(images).numpy()
  serve = tf.saved_model.load(folder).signatures['serving_default']
  expected = serve(images=images)
  layer = keras.layers.TFSMLayer(folder, call_endpoint='serving_default')
  np.testing.assert_array_equal(layer(images)['classes'], expected['classes'])

  converter = tf.lite.TFLiteConverter.from_saved_model(
      folder, signature_keys=['serving_default'])
  lite = tf.lite.Interpreter(model_content=converter.convert())
  assert accuracy_of(lite.get_signature_runner(), images.numpy(), labels) == (
      np.mean(expected['classes'] == labels))
  converter = tf.lite.TFLiteConverter.from_saved_model(
      folder, signature_keys=['standardized'])
  converter.optimizations = [tf.lite.Optimize.DEFAULT]
  converter.representative_dataset = lambda: (
      {'images': standardized[i:i + 1]} for i in range(50))
  model = converter.convert()
  assert len(model) < 100_000  # bytes, for 78,106 parameters
  lite = tf.lite.Interpreter(model_content=model)
  assert accuracy_of(lite.get_signature_runner(), standardized, labels) == (
      pytest.approx(np.mean(expected['classes'] == labels), abs=0.1))


def readme_code(beginning):
  """Returns the block of Python in the README that holds such a line."""
  path = os.path.join(os.path.dirname(SCRIPT), 'README.md')
  with open(path, encoding='utf-8') as file:
    blocks = re.findall(r'```python\n(.*?)```', file.read(), re.DOTALL)
  code, = (block for block in blocks if beginning in block)
  return code


def test_readme_on_the_quick_start(capsys, undisturbed):
  code = readme_code('should be')
  assert '/tmp/cifar10_synthetic' in code
  exec(code.replace('/tmp/cifar10_synthetic', str(undisturbed.export_dir)), {})
  names = re.findall(r'[a-z]{3,}', capsys.readouterr().out.replace("b'", "'"))
  assert len(names) == 7  # three found, `should`, and three that should be
  assert {*names} <= {*cifar10.CLASSES, 'should'}


def test_readme_on_notebooks(tmp_path):
  """Log and results are shown, and nothing of TensorFlow's."""
  code = readme_code('show_log')
  for now, quick in (('/tmp/cifar10_notebook', str(tmp_path)),
                     ('train_steps=200', 'train_steps=2'),
                     ('steps_per_eval=100', 'steps_per_eval=2')):
    assert now in code
    code = code.replace(now, quick)
  code += ('print(results, confusion_matrix.shape, '
           'cifar10_main.make_state(8).network)')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True, check=True, cwd=os.path.dirname(SCRIPT))
  assert only_log_and_results(result.stderr.splitlines()), result.stderr
  assert 'INFO:tensorflow:loss = ' in result.stderr
  trained, evaluated, *classes, last = result.stdout.splitlines()
  assert trained == evaluated
  assert [line.split()[0] for line in classes] == [*cifar10.CLASSES]
  assert last == (f'{trained} (10, 10) ResNet-8, 78,106 parameters, '
                  'channels_last, float32')


def test_script_run_twice_in_a_notebook(tmp_path):
  """As %run does: in one process, each time with its log."""
  code = (
      'import runpy, sys\n'
      'for steps in (1, 2):\n'
      '  sys.argv = ["cifar10_main.py", "--use_synthetic_data",\n'
      '              "--resnet_size=8", "--batch_size=16",\n'
      f'              f"--train_steps={{steps}}", "--model_dir={tmp_path}"]\n'
      '  try:\n'
      '    runpy.run_path("cifar10_main.py", run_name="__main__")\n'
      '  except SystemExit as end:\n'
      '    assert not end.code\n')
  result = subprocess.run([sys.executable, '-c', code], capture_output=True,
                          text=True, check=True, cwd=os.path.dirname(SCRIPT))
  assert only_log_and_results(result.stderr.splitlines()), result.stderr
  for step in (1, 2):
    assert f'Saving checkpoints for {step} into' in result.stderr
  assert len(result.stdout.splitlines()) == 2


def test_readme_on_pictures(tmp_path, capsys, undisturbed):
  """It prints the likeliest classes of a picture's middle square."""
  image = np.random.default_rng(0).integers(0, 256, [32, 32, 3], np.uint8)
  serve = tf.saved_model.load(
      str(undisturbed.export_dir)).signatures['serving_default']
  probabilities = serve(images=image[None])['probabilities'][0].numpy()
  expected = [f'{cifar10.CLASSES[i]} {probabilities[i]:.1%}'
              for i in np.argsort(-probabilities, kind='stable')[:3]]
  code = readme_code('decode_image')
  for path, ours in (('/tmp/cifar10_export', undisturbed.export_dir),
                     ('picture.jpg', tmp_path / 'picture.png')):
    assert path in code
    code = code.replace(path, str(ours))
  wide = np.pad(image, [[0, 0], [40, 40], [0, 0]], 'wrap')
  for picture in (image, wide, wide.repeat(8, axis=0).repeat(8, axis=1)):
    tf.io.write_file(
        str(tmp_path / 'picture.png'), tf.io.encode_png(picture))
    exec(code, {})
    assert capsys.readouterr().out.splitlines() == expected
