"""Tests of the download, with small archives and a server on this machine."""

import functools
import hashlib
import http.server
import io
import os
import subprocess
import sys
import tarfile
import threading

import numpy as np
import pytest

import cifar10_download_and_extract as cifar10

SCRIPT = os.path.abspath(cifar10.__file__)
Cifar10Error = cifar10.Cifar10Error


def make_files(seed=0):
  """Returns the six files, ten records each, as a dict of bytes."""
  rng = np.random.default_rng(seed)
  files = {}
  for name in cifar10.FILE_SHA256:
    records = rng.integers(0, 256, [10, cifar10.RECORD_BYTES], np.uint8)
    records[:, 0] %= 10
    files[name] = records.tobytes()
  return files


def make_archive(path, files, folder=cifar10.FOLDER_NAME):
  with tarfile.open(path, 'w:gz') as tar:
    for name, data in files.items():
      member = tarfile.TarInfo(f'{folder}/{name}')
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))


@pytest.fixture
def files(monkeypatch):
  """The files of a data set that stands in for the published one."""
  files = make_files()
  monkeypatch.setattr(cifar10, 'RECORDS_PER_FILE', 10)
  for name, data in files.items():
    monkeypatch.setitem(
        cifar10.FILE_SHA256, name, hashlib.sha256(data).hexdigest())
  return files


@pytest.fixture
def archive(tmp_path, files, monkeypatch):
  """Its archive, at an address of its own."""
  path = tmp_path / 'mirror' / 'archive.tar.gz'
  path.parent.mkdir()
  make_archive(path, files)
  monkeypatch.setattr(
      cifar10, 'ARCHIVE_SHA256', hashlib.sha256(path.read_bytes()).hexdigest())
  return path


@pytest.fixture
def data_dir(tmp_path):
  return tmp_path / 'data'


def contents(data_dir):
  """Returns all files below a folder, as a dict of bytes by relative path."""
  return {str(path.relative_to(data_dir)): path.read_bytes()
          for path in data_dir.rglob('*') if path.is_file()}


def assert_complete(data_dir, files, archive):
  expected = {f'{cifar10.FOLDER_NAME}/{name}': data
              for name, data in files.items()}
  expected[cifar10.ARCHIVE_NAME] = archive.read_bytes()
  assert contents(data_dir) == expected


def run(data_dir, archive, **kwargs):
  cifar10.download_and_extract(str(data_dir), archive.as_uri(), **kwargs)


def test_fetches_verifies_and_extracts(data_dir, files, archive, capsys):
  run(data_dir, archive)
  assert_complete(data_dir, files, archive)
  assert f'{archive.stat().st_size} bytes' in capsys.readouterr().out


def test_leaves_a_finished_folder_alone(data_dir, files, archive, capsys):
  run(data_dir, archive)
  (data_dir / cifar10.ARCHIVE_NAME).unlink()
  before = contents(data_dir)
  archive.unlink()
  run(data_dir, archive)
  assert contents(data_dir) == before
  assert 'nothing to do' in capsys.readouterr().out


def test_does_not_fetch_a_right_archive_again(data_dir, files, archive):
  data_dir.mkdir()
  placed = data_dir / cifar10.ARCHIVE_NAME
  archive.rename(placed)
  run(data_dir, archive)
  assert_complete(data_dir, files, placed)


def test_replaces_a_cut_off_archive(data_dir, files, archive):
  data_dir.mkdir()
  (data_dir / cifar10.ARCHIVE_NAME).write_bytes(archive.read_bytes()[:1000])
  run(data_dir, archive)
  assert_complete(data_dir, files, archive)


def test_replaces_only_missing_and_damaged_files(data_dir, files, archive):
  run(data_dir, archive)
  folder = data_dir / cifar10.FOLDER_NAME
  (folder / 'data_batch_2.bin').unlink()
  (folder / 'data_batch_3.bin').write_bytes(files['data_batch_3.bin'][:-1])
  untouched = (folder / 'data_batch_1.bin').stat().st_ino
  run(data_dir, archive)
  assert_complete(data_dir, files, archive)
  assert (folder / 'data_batch_1.bin').stat().st_ino == untouched


def test_keeps_the_users_own_data(data_dir, files, archive):
  own = make_files(seed=1)['data_batch_4.bin']
  path = data_dir / cifar10.FOLDER_NAME / 'data_batch_4.bin'
  path.parent.mkdir(parents=True)
  path.write_bytes(own)
  with pytest.raises(Cifar10Error, match=r'data_batch_4\.bin is not the publ'):
    run(data_dir, archive)
  assert contents(data_dir) == {f'{cifar10.FOLDER_NAME}/data_batch_4.bin': own}


def test_other_archive_needs_the_waiver(data_dir, files, archive):
  other = make_files(seed=1)
  make_archive(archive, other)
  with pytest.raises(Cifar10Error, match='gave another archive than'):
    run(data_dir, archive)
  assert contents(data_dir) == {}
  run(data_dir, archive, skip_checksums=True)
  assert_complete(data_dir, other, archive)


@pytest.mark.parametrize('damage', ['label', 'size', 'missing'])
def test_checks_unverified_files_too(data_dir, files, archive, damage):
  name = 'data_batch_5.bin'
  if damage == 'label':
    files[name] = b'\x0a' + files[name][1:]
  elif damage == 'size':
    files[name] = files[name][:-1]
  else:
    del files[name]
  make_archive(archive, files)
  with pytest.raises(Cifar10Error, match=r'data_batch_5\.bin'):
    run(data_dir, archive, skip_checksums=True)
  assert set(contents(data_dir)) == {cifar10.ARCHIVE_NAME}


def cut(data):
  return data[:-5000]


def change_deflated_data(data):
  return data[:9000] + b'\0\xff' * 500 + data[10000:]


def change_checksum(data):
  return data[:-8] + b'\0\0\0\0' + data[-4:]


def be_something_else(data):
  return b'<html>Moved</html>'


@pytest.mark.parametrize('damage', [
    cut, change_deflated_data, change_checksum, be_something_else])
def test_damaged_archive(data_dir, files, archive, damage):
  archive.write_bytes(damage(archive.read_bytes()))
  with pytest.raises(Cifar10Error, match='is damaged'):
    run(data_dir, archive, skip_checksums=True)
  assert set(contents(data_dir)) == {cifar10.ARCHIVE_NAME}


def test_extracts_nothing_but_the_six_files(data_dir, files, archive):
  with tarfile.open(archive, 'w:gz') as tar:
    for name in ('../evil.bin', '/tmp/evil.bin', 'evil/data_batch_1.bin',
                 f'{cifar10.FOLDER_NAME}/extra.bin'):
      member = tarfile.TarInfo(name)
      member.size = len(files['data_batch_2.bin'])
      tar.addfile(member, io.BytesIO(files['data_batch_2.bin']))
    for kind, target in ((tarfile.SYMTYPE, 'data_batch_2.bin'),
                         (tarfile.LNKTYPE, 'data_batch_2.bin'),
                         (tarfile.FIFOTYPE, '')):
      member = tarfile.TarInfo(f'{cifar10.FOLDER_NAME}/data_batch_1.bin')
      member.type = kind
      member.linkname = target
      member.size = len(files['data_batch_2.bin'])
      tar.addfile(member)
    for name, data in files.items():
      member = tarfile.TarInfo(f'{cifar10.FOLDER_NAME}/{name}')
      member.size = len(data)
      tar.addfile(member, io.BytesIO(data))
  run(data_dir, archive, skip_checksums=True)
  assert_complete(data_dir, files, archive)
  assert sorted(p.name for p in data_dir.parent.iterdir()) == ['data', 'mirror']


class CutServer(http.server.BaseHTTPRequestHandler):
  """Announces a thousand bytes and sends ten."""

  def do_GET(self):
    self.send_response(200)
    self.send_header('Content-Length', '1000')
    self.end_headers()
    self.wfile.write(b'0123456789')

  def log_message(self, *args):
    pass


@pytest.fixture
def serve():
  """Starts a server on the loopback address and returns where it listens."""
  servers = []

  def start(handler):
    server = http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler)
    servers.append(server)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return f'http://127.0.0.1:{server.server_port}/'

  yield start
  for server in servers:
    server.shutdown()
    server.server_close()


def test_fetches_over_http(data_dir, files, archive, serve):
  handler = functools.partial(
      http.server.SimpleHTTPRequestHandler, directory=archive.parent)
  url = serve(handler) + archive.name
  cifar10.download_and_extract(str(data_dir), url)
  assert_complete(data_dir, files, archive)


def test_cut_download(data_dir, files, serve):
  with pytest.raises(Cifar10Error, match=r'Cannot fetch .* place it as'):
    cifar10.download_and_extract(
        str(data_dir), serve(CutServer), skip_checksums=True)
  assert contents(data_dir) == {}


def test_missing_address(data_dir, files, archive, serve):
  url = serve(functools.partial(
      http.server.SimpleHTTPRequestHandler, directory=archive.parent))
  with pytest.raises(Cifar10Error, match=r'Not Found|File not found'):
    cifar10.download_and_extract(str(data_dir), url + 'nothing.tar.gz')
  assert contents(data_dir) == {}


def test_read_records(tmp_path):
  path = tmp_path / 'data_batch_1.bin'
  again = 'cifar10_download_and_extract.py'
  with pytest.raises(Cifar10Error, match=f'{path} is missing: run {again}'):
    cifar10.read_records(str(path))
  path.touch()
  with pytest.raises(Cifar10Error, match=f'{path} is damaged: 0 bytes'):
    cifar10.read_records(str(path))
  data = make_files()['data_batch_1.bin']
  path.write_bytes(data[:-1])
  with pytest.raises(Cifar10Error, match='30,729 bytes are not a whole number'):
    cifar10.read_records(str(path))
  path.write_bytes(data[:3073] + b'\xff' + data[3074:])
  with pytest.raises(Cifar10Error, match='record 1 has label 255'):
    cifar10.read_records(str(path))
  path.write_bytes(data)
  assert cifar10.read_records(str(path)).tobytes() == data


def run_script(*arguments):
  return subprocess.run([sys.executable, SCRIPT, *arguments], text=True,
                        capture_output=True, check=False)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--data_url=http://127.0.0.1:9/x'], 'Cannot fetch http://127.0.0.1:9/x'),
    (['--data_url=ftp://127.0.0.1/x'], 'must begin with https://'),
    (['--skip_checksums'], '--skip_checksums needs another --data_url'),
    (['--no_such_flag'], "Unknown command line flag 'no_such_flag'"),
    (['stray'], "unknown argument 'stray'"),
    (['--data_dir=/dev/null/x'], 'Not a directory'),
])
def test_bad_input_is_one_clear_line(tmp_path, arguments, message):
  # A flag given twice has its last value.
  result = run_script(f'--data_dir={tmp_path}/data', *arguments)
  assert result.returncode == 1
  assert message in result.stderr
  assert 'Traceback' not in result.stderr
  hint = 'Pass --helpshort or --helpfull to see help on flags.'
  assert len(result.stderr.replace(hint, '').strip().splitlines()) == 1
