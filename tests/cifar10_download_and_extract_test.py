"""Tests of the download, with small archives and a server on this machine."""

import errno
import gzip
import hashlib
import http.server
import io
import os
import random
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time
import tracemalloc
import urllib.response

import numpy as np
import pytest

import cifar10_download_and_extract as cifar10

SCRIPT = os.path.abspath(cifar10.__file__)
Cifar10Error = cifar10.Cifar10Error
MissingError = cifar10.MissingError


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
          for path in data_dir.rglob('*')
          if path.is_file() and path.name != '.lock'}


def visible(data_dir):
  """Returns the names of files that are not marked as work in progress."""
  return {name for name in contents(data_dir) if not name.endswith('.partial')}


def assert_complete(data_dir, files, archive):
  expected = {f'{cifar10.FOLDER_NAME}/{name}': data
              for name, data in files.items()}
  name = archive.name if archive.parent == data_dir else cifar10.ARCHIVE_NAME
  expected[name] = archive.read_bytes()
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


def test_replaces_only_missing_and_damaged_files(data_dir, files, archive):
  run(data_dir, archive)
  folder = data_dir / cifar10.FOLDER_NAME
  (folder / 'data_batch_2.bin').unlink()
  (folder / 'data_batch_3.bin').write_bytes(files['data_batch_3.bin'][:-1])
  untouched = (folder / 'data_batch_1.bin').stat().st_ino
  run(data_dir, archive)
  assert_complete(data_dir, files, archive)
  assert (folder / 'data_batch_1.bin').stat().st_ino == untouched


OWN_DATA = {
    'another image': lambda data: data[:-1] + bytes([data[-1] ^ 1]),
    'fewer records': lambda data: data[:3 * cifar10.RECORD_BYTES],
    'more records': lambda data: 2 * data,
    'more, and cut off': lambda data: (2 * data)[:-1],
    'twenty classes': lambda data: b'\x13' + data[1:],
    'records of CIFAR-100': lambda data: b'\x0f\x63' + 10 * data[1:3074],
    'records of another length': lambda data: (b'\x01' + b'\xf0' * 99) * 70,
    'a text': lambda data: b'a list of what is to be done',
}


@pytest.mark.parametrize('skip_checksums', [False, True])
@pytest.mark.parametrize('kind', OWN_DATA)
def test_own_data_are_left_alone(
    data_dir, files, archive, kind, skip_checksums):
  """The training does not advise to replace them either."""
  if kind == 'another image' and skip_checksums:
    return  # this is what it is for
  folder = data_dir / cifar10.FOLDER_NAME
  folder.mkdir(parents=True)
  own = folder / 'data_batch_4.bin'
  own.write_bytes(OWN_DATA[kind](files[own.name]))
  before = contents(data_dir)
  with pytest.raises(Cifar10Error, match=(
      f'{own} is not (the published file|data of CIFAR-10).*move it away')):
    run(data_dir, archive, skip_checksums=skip_checksums)
  assert contents(data_dir) == before
  if kind not in ('another image', 'fewer records', 'more records'):
    with pytest.raises(Cifar10Error, match='is not data of CIFAR') as error:
      cifar10.read_records(str(own))
    assert 'again' not in str(error.value)


def test_own_file_that_cannot_be_read(data_dir, files, archive):
  (data_dir / cifar10.FOLDER_NAME / 'test_batch.bin').mkdir(parents=True)
  with pytest.raises(Cifar10Error, match=r'Cannot read .*: Is a directory'):
    run(data_dir, archive)


def test_other_archive_needs_the_waiver(data_dir, files, archive):
  other = make_files(seed=1)
  make_archive(archive, other)
  with pytest.raises(Cifar10Error, match='gave another archive than'):
    run(data_dir, archive)
  assert not data_dir.exists()
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


@pytest.mark.parametrize('change', [cut, change_checksum, None])
def test_placed_archive_is_the_users(
    data_dir, files, archive, server, change):
  """What is not the published one is named, and left as it is."""
  data_dir.mkdir()
  placed = data_dir / cifar10.ARCHIVE_NAME
  other = make_files(seed=1)
  make_archive(placed, other)
  if change:
    placed.write_bytes(change(archive.read_bytes()))
  before = contents(data_dir)
  with pytest.raises(Cifar10Error, match=(
      f'{placed} is damaged or not .*: move it away .*--skip_checksums')):
    cifar10.download_and_extract(str(data_dir), server.url)
  assert contents(data_dir) == before
  assert not server.ranges
  if not change:
    run(data_dir, placed, skip_checksums=True)
    assert_complete(data_dir, other, placed)


def test_other_files_of_the_users_are_left_alone(data_dir, files, archive):
  folder = data_dir / cifar10.FOLDER_NAME
  (folder / 'notes').mkdir(parents=True)
  own = {'file.partial': b'a', f'{cifar10.FOLDER_NAME}/notes/test_batch.bin':
         b'b', f'{cifar10.FOLDER_NAME}/data_batch_6.bin': b'c'}
  for name, data in own.items():
    (data_dir / name).write_bytes(data)
  run(data_dir, archive)
  left = contents(data_dir)
  assert {name: left[name] for name in own} == own
  assert len(left) == 10


def test_archive_that_a_browser_unzipped(data_dir, files, archive):
  data_dir.mkdir()
  placed = data_dir / 'cifar-10-binary.tar'
  placed.write_bytes(gzip.decompress(archive.read_bytes()))
  archive.unlink()
  run(data_dir, archive)
  assert_complete(data_dir, files, placed)


def member(name, data=b'', kind=tarfile.REGTYPE, target='', size=None):
  """Returns one entry of an archive, which may lie about its size."""
  info = tarfile.TarInfo(name)
  info.type, info.linkname = kind, target
  info.size = len(data) if size is None else size
  padding = bytes(-len(data) % tarfile.BLOCKSIZE)
  return info.tobuf(tarfile.GNU_FORMAT) + data + padding


FIRST = f'{cifar10.FOLDER_NAME}/data_batch_1.bin'
EVIL = bytes(10 * cifar10.RECORD_BYTES)  # would pass for records
HOSTILE = {
    'absolute path': member('/tmp/evil.bin', EVIL),
    'parent folder': member('../evil.bin', EVIL),
    'parent folder within': member(f'{cifar10.FOLDER_NAME}/../evil.bin', EVIL),
    'other folder': member('evil/data_batch_1.bin', EVIL),
    'extra file': member(f'{cifar10.FOLDER_NAME}/evil.bin', EVIL),
    'symbolic link': member(FIRST, kind=tarfile.SYMTYPE, target='/etc/passwd'),
    'link to a folder': (
        member(cifar10.FOLDER_NAME, kind=tarfile.SYMTYPE, target='..')),
    'hard link': member(FIRST, kind=tarfile.LNKTYPE, target='../evil.bin'),
    'named pipe': member(FIRST, kind=tarfile.FIFOTYPE),
    'device': member(FIRST, kind=tarfile.CHRTYPE),
    'twice, small first': member(FIRST, b'evil'),
    'long names': member('a', b'a', tarfile.GNUTYPE_LONGNAME) * 3000,
}
REFUSED = {
    'larger than it says': member(FIRST, b'evil', size=len(EVIL)),
    'huge by its header': member('evil', size=10**12),
    'huge header': member('evil', kind=tarfile.XHDTYPE, size=10**12),
    'negative': member('evil', size=-512),
    'bomb': bytes(cifar10.MAX_ARCHIVE_BYTES),
}


@pytest.mark.parametrize('kind', [*HOSTILE, *REFUSED])
def test_hostile_archive(data_dir, files, archive, kind):
  """Neither it nor what it holds is written anywhere but to its place."""
  entries = [member(f'{cifar10.FOLDER_NAME}/{name}', data)
             for name, data in files.items()]
  end = bytes(2 * tarfile.BLOCKSIZE)
  entry = {**HOSTILE, **REFUSED}[kind]
  with gzip.open(archive, 'wb', compresslevel=1) as file:
    file.writelines([entry, *entries, *[entry] * (kind in HOSTILE), end])
  if kind in HOSTILE:
    run(data_dir, archive, skip_checksums=True)
    assert_complete(data_dir, files, archive)
  else:
    with pytest.raises(Cifar10Error, match='is damaged or not the published'):
      run(data_dir, archive, skip_checksums=True)
    assert set(contents(data_dir)) == {cifar10.ARCHIVE_NAME}
  assert sorted(p.name for p in data_dir.parent.iterdir()) == ['data', 'mirror']
  assert not os.path.exists('/tmp/evil.bin')


def test_archive_with_a_huge_file(data_dir, files, archive, monkeypatch):
  monkeypatch.setattr(cifar10, 'MAX_ARCHIVE_BYTES', 10**6)
  with gzip.open(archive, 'wb') as file:
    file.write(member('evil', bytes(10**6)))
  with pytest.raises(Cifar10Error, match='it holds a file of 1,000,000 bytes'):
    run(data_dir, archive, skip_checksums=True)


@pytest.mark.parametrize('entries', [
    member('pax', b''.join(b'18 k%06d=abcdefg\n' % i for i in range(6000)),
           tarfile.XGLTYPE) + member('a') * 4000,
    member('name', b'a' * 10**7, tarfile.GNUTYPE_LONGNAME),
    member('a', b'a') * 5000])
def test_small_archive_does_not_fill_the_memory(
    data_dir, files, archive, entries):
  with gzip.open(archive, 'wb', compresslevel=1) as file:
    file.write(entries)
  tracemalloc.start()
  with pytest.raises(Cifar10Error, match='is missing'):
    run(data_dir, archive, skip_checksums=True)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 21


class Server(http.server.ThreadingHTTPServer):
  """Serves one file on the loopback address, in the ways of `behaviours`.

  The first request gets the first, and so on; after the last one, good answers.
  """

  daemon_threads = True
  block_on_close = False

  def __init__(self, data):
    super().__init__(('127.0.0.1', 0), Handler)
    self.data = data
    self.behaviours = []
    self.ranges = []  # that were asked for, None for the whole
    self.url = f'http://127.0.0.1:{self.server_port}/archive.tar.gz'

  def handle_error(self, request, client_address):
    pass  # clients that have seen enough


class Handler(http.server.BaseHTTPRequestHandler):

  def do_GET(self):
    self.server.ranges.append(self.headers['Range'])
    behaviours = self.server.behaviours
    (behaviours.pop(0) if behaviours else good)(self)

  def answer(self, status, **headers):
    self.send_response(status)
    for name, value in headers.items():
      self.send_header(name.replace('_', '-'), value)
    self.end_headers()

  def log_message(self, *args):
    pass


def good(request, share=1):
  """Answers as a file server that knows ranges, with a share of the bytes."""
  data = request.server.data
  start = int((request.headers['Range'] or 'bytes=0-')[len('bytes='):-1])
  if start >= len(data):
    request.answer(416, Content_Range=f'bytes */{len(data)}')
    return
  request.answer(
      206 if start else 200, Content_Length=len(data) - start,
      Content_Range=f'bytes {start}-{len(data) - 1}/{len(data)}')
  request.wfile.write(data[start:][:int(share * (len(data) - start))])


def cut_off(request):
  good(request, share=0.5)


def cut_anywhere(request):
  good(request, share=random.uniform(0.05, 0.4))


def slow(request):
  """Takes half a second."""
  request.answer(200, Content_Length=len(request.server.data))
  for start in range(0, len(request.server.data), 8000):
    request.wfile.write(request.server.data[start:start + 8000])
    time.sleep(0.025)


def without_ranges(request):
  data = request.server.data
  request.answer(200, Content_Length=len(data))
  request.wfile.write(data[:len(data) // 2])


def without_length(request):
  request.answer(200)
  request.wfile.write(request.server.data)


def stalled(request):
  cut_off(request)
  time.sleep(1)


def reset(request):
  cut_off(request)
  request.connection.setsockopt(
      socket.SOL_SOCKET, socket.SO_LINGER, struct.pack('ii', 1, 0))
  request.connection.close()


def silent(request):
  request.connection.shutdown(socket.SHUT_RDWR)


def garbage(request):
  request.wfile.write(b'\0\xffno protocol\r\n\r\n' * 10)


def empty(request):
  request.answer(200, Content_Length=0)


def chunked_and_cut(request):
  request.protocol_version = 'HTTP/1.1'
  request.answer(200, Transfer_Encoding='chunked')
  request.wfile.write(b'ffff\r\n' + request.server.data[:3])


def reason_with_escapes(request):
  request.send_response(403, '\x1b[2J\x1b]0;title\x07' + 'x' * 60000)
  request.end_headers()


def status(code, **headers):
  return lambda request: request.answer(code, **headers)


def to_itself(request):
  request.answer(302, Location=request.server.url)


def elsewhere(request):
  request.answer(301, Location=request.server.url + '?moved')


def endless(request):
  request.answer(200)
  while True:
    request.wfile.write(bytes(1 << 20))


def endless_by_its_header(request):
  request.answer(200, Content_Length=10**15)
  request.wfile.write(b'abc')


def other_bytes(request):
  data = bytes(request.server.data)
  request.answer(200, Content_Length=len(data))
  request.wfile.write(data[:99] + bytes(99) + data[198:])


def other_range(request):
  request.answer(206, Content_Length=9, Content_Range='bytes 5-13/99')
  request.wfile.write(b'123456789')


def length_that_is_none(request):
  request.answer(200, Content_Length='many')
  request.wfile.write(request.server.data)


@pytest.fixture
def server(archive, monkeypatch):
  """A server of the archive; attempts follow at once, stalls end soon."""
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', (0, 0, 0))
  monkeypatch.setattr(cifar10, 'TIMEOUT_SECONDS', 0.3)
  random.seed(0)  # of cut_anywhere
  with Server(archive.read_bytes()) as server:
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize('behaviours', [
    [], [without_length], [length_that_is_none], [elsewhere],
    [cut_anywhere] * 20, [cut_off, status(500), reset, cut_off],
    [stalled, cut_off], [cut_off, silent, garbage], [cut_off, empty],
    [cut_off, status(429), status(408)], [cut_off, without_ranges, cut_off],
    [chunked_and_cut] * 3, [cut_off, status(416)],
    [cut_off, elsewhere, cut_off]])
def test_download_that_succeeds(data_dir, files, archive, server, behaviours):
  server.behaviours = list(behaviours)
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)
  assert not server.behaviours


FOREVER = 99


@pytest.mark.parametrize(('behaviours', 'message', 'attempts'), [
    ([status(404)], 'Error 404', 1),
    ([status(403)], 'Error 403', 1),
    ([status(500)], 'Error 500', 1),
    ([empty], 'only 0 of', 1),
    ([silent], 'closed connection', 1),
    ([garbage], 'no protocol', 1),
    ([without_ranges] * FOREVER, 'only .* came', 4),
    ([stalled] + [status(503)] * FOREVER, 'Error 503', 4),
    ([chunked_and_cut] * FOREVER, 'IncompleteRead', 4),
    ([to_itself] * FOREVER, 'redirect', 5),
    ([status(302, Location='file:///etc/passwd')], 'not allowed', 1),
    ([status(302, Location='data:text/plain,abc')], 'not allowed', 1),
    ([status(302, Location='http://[::1')], 'Invalid IPv6', 1),
    ([endless], 'gives over 200,000,000 bytes', 1),
    ([endless_by_its_header], 'gives over 200,000,000 bytes', 1),
    ([other_bytes], 'its SHA-256 differs', 1),
    ([cut_off, other_range], 'its SHA-256 differs', 2),
    ([reason_with_escapes], r'\(HTTP Error 403: [?].*x\)', 1),
])
def test_download_that_fails(
    data_dir, files, archive, server, capsys, behaviours, message, attempts):
  server.behaviours = list(behaviours)
  with pytest.raises(Cifar10Error, match=message) as error:
    cifar10.download_and_extract(str(data_dir), server.url)
  assert len(server.ranges) == attempts
  assert server.url in str(error.value)
  assert f'{error.value}'.isprintable()
  assert len(str(error.value)) < 1000
  assert '\x1b' not in capsys.readouterr().out
  assert not visible(data_dir)
  # With a server that behaves again, so does the download.
  server.behaviours = []
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)


def test_redirect_to_ftp(data_dir, files, server, monkeypatch):
  """Even if a server for ftp answered, nothing would be taken from it."""
  monkeypatch.setattr(
      cifar10.urllib.request.FTPHandler, 'ftp_open', lambda self, request: (
          urllib.response.addinfourl(
              io.BytesIO(server.data), {}, request.full_url)))
  server.behaviours = [status(302, Location='ftp://127.0.0.1/archive.tar.gz')]
  with pytest.raises(Cifar10Error, match=r'ftp://.* is no https, http or file'):
    cifar10.download_and_extract(str(data_dir), server.url)
  assert not data_dir.exists()


def test_goes_on_where_it_broke_off(data_dir, files, archive, server):
  half, rest = len(server.data) // 2, len(server.data) - len(server.data) // 2
  server.behaviours = [cut_off, cut_off, *[status(500)] * FOREVER]
  with pytest.raises(Cifar10Error, match='Error 500'):
    cifar10.download_and_extract(str(data_dir), server.url)
  server.behaviours = []
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)
  there = half + rest // 2
  assert server.ranges == [
      None, f'bytes={half}-', *[f'bytes={there}-'] * 4]


def test_killed_before_the_last_change_of_name(
    data_dir, files, archive, server):
  """All has been fetched: the server refuses to give what follows."""
  data_dir.mkdir()
  partial = data_dir / f'{cifar10.ARCHIVE_NAME}.partial'
  partial.write_bytes(server.data)
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)
  assert server.ranges == [f'bytes={len(server.data)}-', None]


def test_unverified_rests_are_not_gone_on_with(
    data_dir, files, archive, server):
  server.behaviours = [cut_off, *[status(500)] * FOREVER]
  with pytest.raises(Cifar10Error, match='Error 500'):
    cifar10.download_and_extract(str(data_dir), server.url, True)
  other = make_files(seed=1)
  make_archive(archive, other)
  server.data, server.behaviours = archive.read_bytes(), []
  cifar10.download_and_extract(str(data_dir), server.url, True)
  assert_complete(data_dir, other, archive)


@pytest.mark.parametrize('kilobytes', [80, 200])
def test_full_disk(small_disk, files, archive, server, kilobytes):
  """Of 151 KiB to download and 180 to unpack."""
  data_dir = small_disk(kilobytes) / 'data'
  with pytest.raises(Cifar10Error, match=(
      rf'Cannot write to {data_dir} \(No space left on device\): make room')):
    cifar10.download_and_extract(str(data_dir), server.url)
  assert len(contents(data_dir)) == 1
  small_disk(kilobytes=1000)
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:9/', 'http://127.0.0.1:port/', 'http://[::1/',
    'http://127.0.0.1/a b\n', 'http://\u00e4..b/\u00e4', 'http:///', 'https://',
    'file:///no/such/file', 'file://host/file', 'file:///', 'file', '',
    'http://no.invalid/', 'ftp://127.0.0.1:9/x'])
def test_strange_addresses(data_dir, files, monkeypatch, url):
  """They are not tried again, and leave nothing behind."""
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', (100,))
  with pytest.raises(Cifar10Error, match=r'(?s)Cannot fetch .* place it as'):
    cifar10.download_and_extract(str(data_dir), url)
  assert not data_dir.exists()


def start_script(data_dir, files, archive, url, before=''):
  """Starts the script for the small data set in a process of its own."""
  digests = {name: hashlib.sha256(data).hexdigest()
             for name, data in files.items()}
  constants = {
      'RECORDS_PER_FILE': 10, 'FILE_SHA256': digests,
      'ARCHIVE_SHA256': hashlib.sha256(archive.read_bytes()).hexdigest()}
  return subprocess.Popen(
      [sys.executable, '-c', f'{before}\n'
       'import cifar10_download_and_extract as script\n'
       f'vars(script).update({constants})\n'
       'script.define_flags()\nscript.app.run(script.main)',
       f'--data_dir={data_dir}', f'--data_url={url}'],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      cwd=os.path.dirname(SCRIPT))


@pytest.mark.parametrize('seed', [
    *range(3), *(pytest.param(seed, marks=pytest.mark.slow)
                 for seed in range(3, 20))])
def test_killed_download(data_dir, files, archive, server, seed):
  """The next run goes on or starts anew, without checksums as well."""
  skip_checksums = seed % 2 > 0
  server.behaviours = [slow]
  process = start_script(data_dir, files, archive, server.url)
  while not server.ranges:
    assert process.poll() is None
    time.sleep(0.01)
  time.sleep(random.Random(seed).uniform(0, 0.7))
  process.kill()
  process.communicate()
  server.behaviours = []
  cifar10.download_and_extract(str(data_dir), server.url, skip_checksums)
  assert_complete(data_dir, files, archive)


def test_two_downloads_at_once(data_dir, files, archive, server):
  server.behaviours = [slow]
  process = start_script(data_dir, files, archive, server.url)
  while not server.ranges:
    assert process.poll() is None
    time.sleep(0.01)
  with pytest.raises(Cifar10Error, match=(
      f'{data_dir} is in use by another run: wait .*another --data_dir')):
    cifar10.download_and_extract(str(data_dir), server.url)
  assert process.communicate()[1] == ''
  assert_complete(data_dir, files, archive)


@pytest.mark.parametrize('path', ['data/{}', 'link'])
def test_data_dir_may_be_the_batches_folder(
    tmp_path, data_dir, files, archive, path):
  """Also before it has any file, and behind a link of another name."""
  path = tmp_path / path.format(cifar10.FOLDER_NAME)
  if path.name == 'link':
    (data_dir / cifar10.FOLDER_NAME).mkdir(parents=True)
    path.symlink_to(data_dir / cifar10.FOLDER_NAME)
  run(path, archive)
  assert set(contents(path)) == {*files, cifar10.ARCHIVE_NAME}
  assert cifar10.batches_folder(str(path)) == str(path)
  assert cifar10.batches_folder(str(data_dir)) == str(
      data_dir / cifar10.FOLDER_NAME)


def test_batches_folder_inside_another(data_dir, files, archive):
  outer = data_dir / cifar10.FOLDER_NAME
  inner = outer / cifar10.FOLDER_NAME
  run(outer, archive)
  inner.mkdir()
  for name in files:
    (outer / name).rename(inner / name)
  for path in (data_dir, outer, inner):
    assert cifar10.batches_folder(str(path)) == str(inner)


@pytest.mark.parametrize('name', ['data', f'data/{cifar10.FOLDER_NAME}'])
@pytest.mark.parametrize('target', ['nothing', 'file'])
def test_link_or_file_in_place_of_a_folder(
    tmp_path, data_dir, files, archive, name, target):
  (tmp_path / 'file').write_text('precious')
  link = tmp_path / name
  link.parent.mkdir(exist_ok=True)
  link.symlink_to(tmp_path / target)
  with pytest.raises(Cifar10Error, match=r'File exists.*another --data_dir'):
    run(data_dir, archive)
  assert not (tmp_path / 'nothing').exists()
  assert (tmp_path / 'file').read_text() == 'precious'


@pytest.mark.parametrize('name', ['.lock', f'{cifar10.ARCHIVE_NAME}.partial'])
def test_link_that_somebody_planted(tmp_path, data_dir, files, archive, name):
  """Nothing is written through it."""
  victim = tmp_path / 'victim'
  victim.write_text('precious')
  data_dir.mkdir()
  (data_dir / name).symlink_to(victim)
  run(data_dir, archive)
  assert victim.read_text() == 'precious'
  assert (data_dir / cifar10.ARCHIVE_NAME).read_bytes() == archive.read_bytes()


def test_archive_of_the_folder_packed_from_inside(data_dir, files, archive):
  """As `tar -C D -czf x.tgz .` makes it: its names begin with ./."""
  make_archive(archive, files, folder=f'./{cifar10.FOLDER_NAME}')
  run(data_dir, archive, skip_checksums=True)
  assert_complete(data_dir, files, archive)


def test_complete_folder_may_be_read_only(data_dir, files, archive):
  run(data_dir, archive)
  (data_dir / '.lock').unlink()
  run(data_dir, archive)
  assert not (data_dir / '.lock').exists()


def test_folders_of_others(data_dir, files, archive, monkeypatch):
  """Mounts may refuse a change of mode, and locks; a lock may be another's."""
  data_dir.mkdir()
  (data_dir / '.lock').touch()

  def refuse(*args, **kwargs):
    raise PermissionError(errno.EPERM, 'Operation not permitted')

  real_open = open

  def guarded_open(path, mode='r'):
    return (refuse if str(path).endswith('.lock') and mode != 'r'
            else real_open)(path, mode)

  monkeypatch.setattr(cifar10, 'open', guarded_open, raising=False)
  monkeypatch.setattr(cifar10.os, 'access', lambda path, mode: False)
  for name in ('chmod', 'chown'):
    monkeypatch.setattr(cifar10.os, name, refuse)
  monkeypatch.setattr(cifar10.fcntl, 'flock', refuse)
  run(data_dir, archive)
  assert_complete(data_dir, files, archive)


class FakeOpError(Exception):
  """As TensorFlow's, which have no errno."""


@pytest.mark.parametrize(('error', 'expected'), [
    (OSError(errno.ENOSPC, 'Kein Platz'), r'\(Kein Platz\): make room there'),
    (OSError(errno.EDQUOT, 'Disk quota exceeded'), 'make room there'),
    (FakeOpError('x/y; No space left on device'), 'device.: make room there'),
    (FakeOpError('x/y; Disk quota exceeded'), 'make room there'),
    (OSError(errno.EFBIG, 'File too large'), r'limit on .* \(ulimit -f\)'),
    (FakeOpError('x/y; File too large'), r'limit on .* \(ulimit -f\)'),
    (PermissionError(errno.EACCES, 'Permission denied'), r'denied\): name an'),
    (PermissionError(errno.EPERM, 'Not permitted'), r'permitted\): name an'),
    (OSError(errno.EROFS, 'Read-only file system'), r'system\): name another'),
    (FakeOpError('x/y; Permission denied'), r'denied\): name another'),
    (OSError('strange'), r'\(strange\): name another'),
])
def test_cure_fits_the_error(tmp_path, error, expected):
  with pytest.raises(Cifar10Error, match=(
      f'^Cannot write to /m .*{expected}.*--model_dir$')):
    raise cifar10.cannot_write('/m', error, '--model_dir')
  if isinstance(error, OSError):
    with (pytest.raises(Cifar10Error, match=f'{tmp_path} .*{expected}'),
          cifar10.sole_use(str(tmp_path), '--model_dir')):
      raise error


def test_file_size_limit(data_dir, files, archive):
  process = start_script(data_dir, files, archive, archive.as_uri(),
                         'import resource\nresource.setrlimit('
                         'resource.RLIMIT_FSIZE, (70000, 70000))')
  log = process.communicate()[1]
  assert process.returncode == 1
  assert 'File too large): raise the limit' in log
  assert len(log.splitlines()) == 1


@pytest.mark.parametrize(('was_there', 'content', 'is_kept'), [
    (False, None, False), (True, None, True), (False, 'file', True)])
def test_folder_of_a_run_that_wrote_nothing(
    tmp_path, was_there, content, is_kept):
  folder = tmp_path / 'folder'
  if was_there:
    folder.mkdir()
  with cifar10.sole_use(str(folder), '--model_dir'):
    if content:
      (folder / content).touch()
    with (pytest.raises(Cifar10Error, match='is in use by another run'),
          cifar10.sole_use(str(folder), '--model_dir')):
      pass
    assert (folder / '.lock').exists()
  assert folder.exists() == is_kept


WINDOWS = """
import os, signal, sys
for name in ('fcntl', 'termios', 'pwd', 'grp', 'resource'):
  sys.modules[name] = None
for name in ('geteuid', 'getuid', 'tcgetpgrp', 'getpgrp', 'fork', 'setsid'):
  delattr(os, name)
for name in ('SIGHUP', 'SIGKILL', 'SIGUSR1', 'set_wakeup_fd'):
  delattr(signal, name)
"""


def test_system_that_lacks_what_unix_has(data_dir, files, archive):
  for expected in ('complete: ', 'nothing to do'):
    process = start_script(
        data_dir, files, archive, archive.as_uri(), WINDOWS)
    printed, log = process.communicate()
    assert expected in printed
    assert not log
  assert_complete(data_dir, files, archive)


def test_status_where_nothing_is_known_of_jobs(monkeypatch):
  class Terminal(io.StringIO):

    def isatty(self):
      return True

  for name in ('stdout', 'stderr'):
    monkeypatch.setattr(sys, name, Terminal())
  monkeypatch.delattr(os, 'tcgetpgrp')
  cifar10.show_status('Step 1')
  assert 'Step 1' in sys.stderr.getvalue()


@pytest.mark.parametrize(('sep', 'path', 'is_taken'), [
    ('\\', 'C:\\Users\\me\\m', True), ('/', 'C:\\Users\\me\\m', False),
    ('/', '/m', True), ('\\', '/m[0]', False), ('/', 'run[0.1]', False),
    ('/', 'a*', False), ('/', 'a?', False), ('/', '', False),
    ('/', 'gs://a/b', False), ('/', 'a\nb', False), ('/', '~nobody0/x', False)])
def test_paths(monkeypatch, sep, path, is_taken):
  monkeypatch.setattr(cifar10.os, 'sep', sep)
  if is_taken:
    assert cifar10.PathParser().parse(path) == path
  else:
    with pytest.raises(ValueError, match='must be a local path'):
      cifar10.PathParser().parse(path)


@pytest.mark.parametrize('closed', ['>&- 2>&-', '<&- >&- 2>&-', '2>&-', '<&-'])
def test_closed_standard_streams(tmp_path, closed):
  """No file or socket gets their numbers."""
  path = tmp_path / 'file'
  code = ('import cifar10_download_and_extract as cifar10\n'
          'cifar10.open_standard_streams()\n'
          f'file = open("{path}", "w")\n'
          'file.write(str(file.fileno()))\n')
  subprocess.run(['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable,
                  '-c', code], check=True, cwd=os.path.dirname(SCRIPT))
  assert int(path.read_text()) > 2


def test_download_without_any_output(data_dir):
  process = subprocess.run(
      ['sh', '-c', 'exec "$@" >&- 2>&-', 'sh', sys.executable, SCRIPT,
       f'--data_dir={data_dir}', '--data_url=file:///no/such/file'],
      check=False)
  assert process.returncode == 1
  assert not data_dir.exists()


def test_standard_output_that_nobody_reads(data_dir, files, archive):
  """It is blamed itself, and the folder is not."""
  process = start_script(data_dir, files, archive, archive.as_uri())
  process.stdout.close()
  log = process.stderr.read()
  assert process.wait() == 1
  assert log.splitlines() == [
      '-c: Cannot write to standard output (Broken pipe): nothing is lost, the '
      'same command goes on from here']


def test_read_records(tmp_path):
  path = tmp_path / 'data_batch_1.bin'
  again = 'cifar10_download_and_extract.py'
  with pytest.raises(MissingError, match=f'{path} is missing: run {again}'):
    cifar10.read_records(str(path))
  path.touch()
  with pytest.raises(MissingError, match=f'{path} is damaged: 0 bytes'):
    cifar10.read_records(str(path))
  data = make_files()['data_batch_1.bin']
  path.write_bytes(data[:-1])
  with pytest.raises(MissingError, match='30,729 bytes are not a whole'):
    cifar10.read_records(str(path))
  path.write_bytes(data[:3073] + b'\xff' + data[3074:])
  with pytest.raises(Cifar10Error, match='record 1 has label 255, not 0-9'):
    cifar10.read_records(str(path))
  path.write_bytes(data)
  assert cifar10.read_records(str(path)).tobytes() == data


def run_script(*arguments):
  return subprocess.run([sys.executable, SCRIPT, *arguments], text=True,
                        capture_output=True, check=False)


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--data_url=file:///no/such/file'], 'Cannot fetch file:///no/such/file'),
    (['--data_url=ftp://127.0.0.1:9/x'], 'Cannot fetch ftp://127.0.0.1'),
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
