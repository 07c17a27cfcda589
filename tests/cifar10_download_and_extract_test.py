"""Tests of the download, with small archives and a server on this machine."""

import gzip
import hashlib
import http.server
import io
import os
import socket
import struct
import subprocess
import sys
import tarfile
import threading
import time

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


def visible(data_dir):
  """Returns the names of files that are not marked as work in progress."""
  return {name for name in contents(data_dir) if name[0] != '.'}


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
  assert not visible(data_dir)


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
  assert not visible(data_dir)


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
}
REFUSED = {
    'larger than it says': member(FIRST, b'evil', size=len(EVIL)),
    'huge by its header': member('evil', size=10**12),
    'huge header': member('evil', kind=tarfile.XHDTYPE, size=10**12),
    'negative': member('evil', size=-512),
    'headers without end': member('a', b'a', tarfile.GNUTYPE_LONGNAME) * 3000,
    'bomb': bytes(cifar10.MAX_ARCHIVE_BYTES),
}


@pytest.mark.parametrize('kind', [*HOSTILE, *REFUSED])
def test_hostile_archive(data_dir, files, archive, kind):
  """Neither it nor what it holds is written anywhere but to its place."""
  entries = [member(f'{cifar10.FOLDER_NAME}/{name}', data)
             for name, data in files.items()]
  end = bytes(2 * tarfile.BLOCKSIZE)
  with gzip.open(archive, 'wb', compresslevel=1) as file:
    file.writelines([{**HOSTILE, **REFUSED}[kind], *entries, end])
  if kind in HOSTILE:
    run(data_dir, archive, skip_checksums=True)
    assert_complete(data_dir, files, archive)
  else:
    with pytest.raises(Cifar10Error, match=r'is damaged|lacks a|holds a'):
      run(data_dir, archive, skip_checksums=True)
    assert not (data_dir / cifar10.FOLDER_NAME).exists()
    assert not (data_dir / cifar10.ARCHIVE_NAME).exists()
    make_archive(archive, files)
    run(data_dir, archive, skip_checksums=True)
    assert_complete(data_dir, files, archive)
  assert sorted(p.name for p in data_dir.parent.iterdir()) == ['data', 'mirror']
  assert not os.path.exists('/tmp/evil.bin')


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
  request.wfile.write(b'ffff\r\nabc')


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
  with Server(archive.read_bytes()) as server:
    threading.Thread(target=server.serve_forever, args=[0.01]).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize('behaviours', [
    [], [without_length], [length_that_is_none], [elsewhere], [cut_off] * 20,
    [cut_off, status(500), reset, cut_off], [stalled, cut_off],
    [silent, garbage, empty], [cut_off, status(429), status(408)],
    [cut_off, without_ranges, cut_off], [chunked_and_cut] * 3,
    [cut_off, status(416)], [cut_off, elsewhere, cut_off]])
def test_download_that_succeeds(data_dir, files, archive, server, behaviours):
  server.behaviours = list(behaviours)
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)
  assert not server.behaviours


FOREVER = 99


@pytest.mark.parametrize(('behaviours', 'message'), [
    ([status(404)], 'Error 404'),
    ([status(403)], 'Error 403'),
    ([status(500)] * FOREVER, 'Error 500'),
    ([empty] * FOREVER, 'only 0 of'),
    ([silent] * FOREVER, 'closed connection'),
    ([garbage] * FOREVER, 'no protocol'),
    ([without_ranges] * FOREVER, 'only .* bytes came'),
    ([stalled] + [status(503)] * FOREVER, 'Error 503'),
    ([chunked_and_cut] * FOREVER, 'IncompleteRead'),
    ([to_itself] * FOREVER, 'redirect'),
    ([status(302, Location='file:///etc/passwd')], 'not allowed'),
    ([status(302, Location='http://[::1')], 'Invalid IPv6'),
    ([endless], 'more than any archive'),
    ([endless_by_its_header], 'more than any archive'),
    ([other_bytes], 'its SHA-256 differs'),
    ([cut_off, other_range], 'its SHA-256 differs'),
])
def test_download_that_fails(
    data_dir, files, archive, server, behaviours, message):
  server.behaviours = list(behaviours)
  with pytest.raises(Cifar10Error, match=message) as error:
    cifar10.download_and_extract(str(data_dir), server.url)
  assert server.url in str(error.value)
  assert '\n' not in str(error.value)
  assert not visible(data_dir)
  # With a server that behaves again, so does the download.
  server.behaviours = []
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)


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
  assert not visible(data_dir)
  small_disk(kilobytes=1000)
  cifar10.download_and_extract(str(data_dir), server.url)
  assert_complete(data_dir, files, archive)


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:9/', 'http://127.0.0.1:port/', 'http://[::1/',
    'http://127.0.0.1/a b\n', 'http://\u00e4..b/\u00e4', 'http:///', 'https://',
    'file:///no/such/file', 'file://host/file', 'file:///'])
def test_strange_addresses(data_dir, files, monkeypatch, url):
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', ())
  with pytest.raises(Cifar10Error, match=r'(?s)Cannot fetch .* place it as'):
    cifar10.download_and_extract(str(data_dir), url)


def start_script(data_dir, files, archive, url):
  """Starts the script for the small data set in a process of its own."""
  digests = {name: hashlib.sha256(data).hexdigest()
             for name, data in files.items()}
  constants = {
      'RECORDS_PER_FILE': 10, 'FILE_SHA256': digests,
      'ARCHIVE_SHA256': hashlib.sha256(archive.read_bytes()).hexdigest()}
  return subprocess.Popen(
      [sys.executable, '-c', 'import cifar10_download_and_extract as script\n'
       f'vars(script).update({constants})\n'
       'script.define_flags()\nscript.app.run(script.main)',
       f'--data_dir={data_dir}', f'--data_url={url}'],
      stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
      cwd=os.path.dirname(SCRIPT))


def test_killed_download(data_dir, files, archive, server):
  server.behaviours = [lambda request: stalled(request) or time.sleep(30)]
  process = start_script(data_dir, files, archive, server.url)
  partial = data_dir / '.partial' / cifar10.ARCHIVE_NAME
  while not partial.exists() or not partial.stat().st_size:
    assert process.poll() is None
  process.kill()
  process.communicate()
  process = start_script(data_dir, files, archive, server.url)
  _, log = process.communicate()
  assert (process.returncode, log) == (0, '')
  assert_complete(data_dir, files, archive)
  assert server.ranges == [None, f'bytes={cifar10.CHUNK_BYTES}-']


def test_two_downloads_at_once(data_dir, files, archive, server):
  def slow(request):
    time.sleep(1)
    good(request)

  server.behaviours = [slow]
  processes = [start_script(data_dir, files, archive, server.url)
               for _ in range(3)]
  outputs = [process.communicate() for process in processes]
  assert [process.returncode for process in processes] == [0, 0, 0], outputs
  assert len(server.ranges) == 1
  assert_complete(data_dir, files, archive)
  waited = ['Waiting for another run' in printed for printed, _ in outputs]
  assert sorted(waited) == [False, True, True]


def test_own_data_are_left_alone(data_dir, files, archive):
  """Whole records that are not the published ones, whatever their number."""
  folder = data_dir / cifar10.FOLDER_NAME
  folder.mkdir(parents=True)
  own = folder / 'data_batch_2.bin'
  own.write_bytes(files['data_batch_2.bin'][:3 * cifar10.RECORD_BYTES])
  before = contents(data_dir)
  for skip_checksums in (False, True):
    with pytest.raises(Cifar10Error, match=f'{own} is not the published file'):
      run(data_dir, archive, skip_checksums=skip_checksums)
    assert contents(data_dir) == before


@pytest.mark.parametrize('path', ['data/{}', 'link'])
def test_data_dir_may_be_the_batches_folder(
    tmp_path, data_dir, files, archive, path):
  """Also before it has any file, and behind a link of another name."""
  path = tmp_path / path.format(cifar10.FOLDER_NAME)
  if path.name == 'link':
    (data_dir / cifar10.FOLDER_NAME).mkdir(parents=True)
    path.symlink_to(data_dir / cifar10.FOLDER_NAME)
  run(path, archive)
  assert_complete(data_dir, files, archive)
  assert cifar10.batches_folder(str(path)) == str(path)
  assert cifar10.batches_folder(str(data_dir)) == str(
      data_dir / cifar10.FOLDER_NAME)


@pytest.mark.parametrize('name', ['data', f'data/{cifar10.FOLDER_NAME}'])
def test_link_that_leads_nowhere(tmp_path, data_dir, files, server, name):
  """It is found before anything is fetched."""
  link = tmp_path / name
  link.parent.mkdir(exist_ok=True)
  link.symlink_to(tmp_path / 'nothing')
  with pytest.raises(Cifar10Error, match=f'{link} is a link that leads now'):
    cifar10.download_and_extract(str(data_dir), server.url)
  assert not server.ranges


@pytest.mark.parametrize(
    'name', ['.partial', f'.partial/{cifar10.ARCHIVE_NAME}'])
def test_link_that_somebody_planted(tmp_path, data_dir, files, archive, name):
  """Nothing is written through it."""
  victim = tmp_path / 'victim'
  (data_dir / name).parent.mkdir(parents=True)
  if name == '.partial':
    victim.mkdir()
    (victim / 'file').write_text('precious')
  else:
    victim.write_text('precious')
  (data_dir / name).symlink_to(victim)
  before = contents(tmp_path)
  with pytest.raises(Cifar10Error, match=f'{name} is a link: remove it'):
    run(data_dir, archive)
  assert contents(tmp_path) == before


def test_folder_of_another_user(
    tmp_path, data_dir, files, archive, monkeypatch):
  """Where all users may write, such as in /tmp, another one may have put it."""
  data_dir.mkdir()
  tmp_path.chmod(0o1777)
  owner = data_dir.stat().st_uid
  monkeypatch.setattr(cifar10.os, 'geteuid', lambda: owner + 1)
  real_stat = os.stat
  monkeypatch.setattr(cifar10.os, 'stat', lambda path, **kwargs: (
      os.stat_result([*real_stat(path, **kwargs)[:4], owner + 2,
                      *real_stat(path, **kwargs)[5:]])
      if path == str(tmp_path) else real_stat(path, **kwargs)))
  with pytest.raises(Cifar10Error, match=f'{data_dir} belongs to another user'):
    run(data_dir, archive)
  assert not contents(data_dir)


def test_archive_of_the_folder_packed_from_inside(data_dir, files, archive):
  """As `tar -C D -czf x.tgz .` makes it: its names begin with ./."""
  make_archive(archive, files, folder=f'./{cifar10.FOLDER_NAME}')
  run(data_dir, archive, skip_checksums=True)
  assert_complete(data_dir, files, archive)


def test_refused_archive_is_removed(data_dir, files, archive):
  make_archive(archive, {'test_batch.bin': files['test_batch.bin']})
  data_dir.mkdir()
  placed = data_dir / cifar10.ARCHIVE_NAME
  placed.write_bytes(archive.read_bytes())
  for origin in (placed, archive.as_uri()):
    with pytest.raises(Cifar10Error, match=(
        f'The archive from {origin} is removed, it lacks a whole')):
      run(data_dir, archive, skip_checksums=True)
    assert not contents(data_dir)


def test_placed_archive_is_mentioned(data_dir, files, monkeypatch):
  data_dir.mkdir()
  placed = data_dir / cifar10.ARCHIVE_NAME
  placed.write_bytes(b'not the published one')
  with pytest.raises(Cifar10Error, match=(
      f'Cannot fetch .* place it as {placed}, which is there but not the')):
    cifar10.download_and_extract(str(data_dir), 'file:///no/such/file')
  assert placed.exists()


def reason_with_escapes(request):
  request.send_response(403, '\x1b[2J\x1b]0;title\x07' + 'x' * 60000)
  request.end_headers()


def to_ftp(request):
  request.answer(302, Location='ftp://127.0.0.1/archive.tar.gz')


def drops(request):
  """A byte now and then, for ever."""
  request.answer(200, Content_Length=1000)
  for _ in range(50):
    request.wfile.write(b'x')
    request.wfile.flush()
    time.sleep(0.05)


@pytest.mark.parametrize(('behaviour', 'message', 'attempts'), [
    (reason_with_escapes, r'Cannot fetch .* \(HTTP Error 403: [?].*x\)', 1),
    (to_ftp, r'Cannot fetch .* \(unknown url type: ftp\)', 1),
    (drops, r'Cannot fetch .* \(only \d+ bytes came in', 4),
])
def test_server_that_cannot_be_trusted(
    data_dir, files, server, capsys, behaviour, message, attempts):
  server.behaviours = [behaviour] * 4
  with pytest.raises(Cifar10Error, match=message) as error_info:
    cifar10.download_and_extract(str(data_dir), server.url)
  text = str(error_info.value) + capsys.readouterr().out
  assert '\x1b' not in text
  assert len(text) < 1500
  assert len(server.ranges) == attempts


def test_address_that_does_not_exist(data_dir, files, monkeypatch, capsys):
  """It is final: nothing is tried again."""
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', (100,))
  with pytest.raises(Cifar10Error, match=r'Cannot fetch http://no\.inv'):
    cifar10.download_and_extract(str(data_dir), 'http://no.invalid/')
  assert 'again in' not in capsys.readouterr().out


def test_password_in_the_address(data_dir, files, archive, server, capsys):
  """It is sent to that server, and never printed."""
  seen = []

  def protected(request):
    seen.append(request.headers['Authorization'])
    (good if seen[-1] else status(401))(request)

  server.behaviours = [protected, status(403)]
  url = server.url.replace('http://', 'http://me:secret%21@') + '?key=secret'
  cifar10.download_and_extract(str(data_dir), url)
  assert seen == ['Basic bWU6c2VjcmV0IQ==']
  assert_complete(data_dir, files, archive)
  (data_dir / cifar10.ARCHIVE_NAME).unlink()
  (data_dir / cifar10.FOLDER_NAME / 'test_batch.bin').unlink()
  with pytest.raises(Cifar10Error) as error_info:
    cifar10.download_and_extract(str(data_dir), url)
  result = run_script(f'--data_dir={data_dir}', '--data_url=ftp://me:secret@x/')
  assert result.returncode == 1
  for text in (str(error_info.value), ''.join(capsys.readouterr()),
               result.stdout, result.stderr):
    assert 'secret' not in text


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
    (['--data_url=file:///no/such/file'], 'Cannot fetch file:///no/such/file'),
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
