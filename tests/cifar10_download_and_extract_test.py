"""Tests of the download, with small archives and a server on this machine."""

import errno
import fcntl
import gzip
import hashlib
import io
import os
import random
import shutil
import subprocess
import sys
import tarfile
import time
import tracemalloc
from unittest import mock
import urllib.response

import pytest

import cifar10_download_and_extract as cifar10
from cifar10_download_and_extract import Cifar10Error, MissingError
from tests import helpers
from tests.helpers import answer, make_files, member, moved, pack, part

SCRIPT = os.path.abspath(cifar10.__file__)
ARCHIVE, FOLDER = cifar10.ARCHIVE_NAME, cifar10.FOLDER_NAME
FILES, OTHER_FILES = make_files(0), make_files(1)
DATA, OTHER_DATA = pack(FILES), pack(OTHER_FILES)
CONSTANTS = {  # for which the first of them are the published ones
    'RECORDS_PER_FILE': 10,
    'ARCHIVE_SHA256': hashlib.sha256(DATA).hexdigest(),
    'FILE_SHA256': {name: hashlib.sha256(data).hexdigest()
                    for name, data in FILES.items()}}


class Download:
  """An archive at an address of its own, and a folder to be filled from it."""

  def __init__(self, tmp_path):
    self.folder = tmp_path / 'data'
    self.batches = self.folder / FOLDER
    self.partial = self.folder / f'{ARCHIVE}.partial'
    self.archive = tmp_path / 'mirror' / 'archive.tar.gz'
    self.archive.parent.mkdir()
    self.archive.write_bytes(DATA)
    self.url = self.archive.as_uri()

  def run(self, skip_checksums=False):
    cifar10.download_and_extract(str(self.folder), self.url, skip_checksums)

  def fail(self, message, skip_checksums=False):
    """Runs it and returns the message of its error, which is to match."""
    with pytest.raises(Cifar10Error, match=message) as error:
      self.run(skip_checksums)
    return str(error.value)

  def start(self, before='', server=None):
    """Starts lines and the script; waits until it has asked a given server."""
    process = helpers.start([
        sys.executable, '-c', f'{before}\n'
        'import cifar10_download_and_extract as script\n'
        f'vars(script).update({CONSTANTS})\n'
        'script.define_flags()\nscript.app.run(script.main)',
        f'--data_dir={self.folder}', f'--data_url={self.url}'])
    while server and not server.ranges:
      assert process.poll() is None
      time.sleep(0.01)
    return process

  def contents(self):
    """Returns all files in the folder but locks, as a dict by their paths."""
    return {str(path.relative_to(self.folder)): data
            for path, data in helpers.contents(self.folder).items()}

  def assert_complete(self, files=FILES, data=DATA, name=ARCHIVE, others=()):
    """The folder has the six files, their archive and nothing but others."""
    assert self.contents() == {
        name: data, **{f'{FOLDER}/{name}': files[name] for name in files},
        **dict(others)}


@pytest.fixture
def download(tmp_path, monkeypatch):
  for name, value in CONSTANTS.items():
    monkeypatch.setattr(cifar10, name, value)
  return Download(tmp_path)


def test_is_done_once(download, capsys):
  """A complete folder is left alone then, and may be read-only."""
  download.run()
  download.assert_complete()
  assert f'{len(DATA)} bytes' in capsys.readouterr().out
  for name in (ARCHIVE, '.lock'):
    (download.folder / name).unlink()
  download.archive.unlink()
  before = download.contents()
  download.run()
  assert download.contents() == before
  assert not (download.folder / '.lock').exists()
  assert 'nothing to do' in capsys.readouterr().out


@pytest.mark.parametrize('name', [ARCHIVE, 'cifar-10-binary.tar'])
def test_right_archive_is_not_fetched_again(download, name):
  """Some browsers unzip what they save."""
  download.archive.unlink()
  download.folder.mkdir()
  data = DATA if name == ARCHIVE else gzip.decompress(DATA)
  (download.folder / name).write_bytes(data)
  download.run()
  download.assert_complete(data=data, name=name)


def test_replaces_only_missing_and_damaged_files(download):
  """The training says what to do. All other files are the user's."""
  own = {'file.partial': b'a', f'{FOLDER}/notes/test_batch.bin': b'b',
         f'{FOLDER}/data_batch_6.bin': b'c'}
  (download.batches / 'notes').mkdir(parents=True)
  left = download.batches / 'unpacking.killed' / 'test_batch.bin'
  left.parent.mkdir()
  left.touch()
  for name, data in own.items():
    (download.folder / name).write_bytes(data)
  download.run()
  untouched = (download.batches / 'data_batch_1.bin').stat().st_ino
  for number, size, message in (
      (2, None, 'is missing: run cifar10_download_and_extract.py first, with'),
      (3, 0, 'is damaged: 0 bytes'),
      (4, 30729, 'is damaged: 30,729 bytes are not a whole .*; run .* again')):
    path = download.batches / f'data_batch_{number}.bin'
    path.unlink() if size is None else os.truncate(path, size)
    with pytest.raises(MissingError, match=f'{path} {message}'):
      cifar10.read_records(str(path))
  download.run()
  download.assert_complete(others=own)
  assert (download.batches / 'data_batch_1.bin').stat().st_ino == untouched


OWN_DATA = {  # and what the training says of them, if it cannot use them
    'another image': (lambda data: data[:-1] + bytes([data[-1] ^ 1]), None),
    'fewer records': (lambda data: data[:3 * cifar10.RECORD_BYTES], None),
    'more records': (lambda data: 2 * data, None),
    'more, and cut off': (lambda data: (2 * data)[:-1], '61,459 bytes are not'),
    'eleven classes': (lambda data: data[:3073] + b'\x0a' + data[3074:],
                       'record 1 has label 10, not 0-9'),
    'records of CIFAR-100': (
        lambda data: b'\x0f\x63' + 10 * data[1:3074], '30,732 bytes are not'),
    'records of another length': (
        lambda data: (b'\x01' + b'\xf0' * 99) * 70, '7,000 bytes are not'),
    'a text': (lambda data: b'what is to be done', '18 bytes are not'),
}


@pytest.mark.parametrize('skip_checksums', [False, True])
@pytest.mark.parametrize('kind', OWN_DATA)
def test_own_data_are_left_alone(download, kind, skip_checksums):
  """The training does not advise to replace them either."""
  if kind == 'another image' and skip_checksums:
    return  # this is what it is for
  change, flaw = OWN_DATA[kind]
  download.batches.mkdir(parents=True)
  own = download.batches / 'data_batch_4.bin'
  own.write_bytes(change(FILES[own.name]))
  before = download.contents()
  download.fail(f'{own} is not (the published file|data of CIFAR-10).*move it '
                'away', skip_checksums)
  assert download.contents() == before
  if flaw:
    with pytest.raises(Cifar10Error, match=f'of CIFAR-10: {flaw}') as error:
      cifar10.read_records(str(own))
    assert 'again' not in str(error.value)


def test_own_file_that_cannot_be_read(download):
  (download.batches / 'test_batch.bin').mkdir(parents=True)
  download.fail(r'Cannot read .* \(Is a directory\): .* another --data_dir')


@pytest.mark.parametrize(
    'path', [f'data/{FOLDER}', f'data/{FOLDER}/{FOLDER}', 'link'])
def test_data_dir_may_be_the_batches_folder(tmp_path, download, path):
  """Also before it has any file, and behind a link of another name."""
  if path == 'link':
    download.batches.mkdir(parents=True)
    (tmp_path / path).symlink_to(download.batches)
  download.folder = tmp_path / path
  download.run()
  assert set(download.contents()) == {*FILES, ARCHIVE}
  assert cifar10.batches_folder(f'{tmp_path}/{path}') == f'{tmp_path}/{path}'
  for outer in ('data', f'data/{FOLDER}'):
    found = cifar10.batches_folder(f'{tmp_path}/{outer}')
    assert os.path.samefile(found, download.folder)


@pytest.mark.parametrize(('name', 'target', 'refused'), [
    ('data', 'nothing', True), (f'data/{FOLDER}', 'nothing', True),
    ('data', 'file', True), (f'data/{FOLDER}', 'file', True),
    ('data/.lock', 'file', False), (f'data/{ARCHIVE}.partial', 'file', False)])
def test_link_that_somebody_planted(tmp_path, download, name, target, refused):
  """Nothing is written through it."""
  (tmp_path / 'file').write_text('precious')
  link = tmp_path / name
  link.parent.mkdir(exist_ok=True)
  link.symlink_to(tmp_path / target)
  if refused:
    download.fail(r'File exists.*another --data_dir')
  else:
    download.run()
    assert (download.folder / ARCHIVE).read_bytes() == DATA
  assert not (tmp_path / 'nothing').exists()
  assert (tmp_path / 'file').read_text() == 'precious'


def test_folders_of_others(download, monkeypatch):
  """Mounts may refuse locks; a lock may be another user's."""
  download.folder.mkdir()
  (download.folder / '.lock').touch()

  def refuse(*args, **kwargs):
    raise PermissionError(errno.EPERM, 'Operation not permitted')

  def guarded_open(path, mode='r'):
    return (refuse if str(path).endswith('.lock') and mode != 'r'
            else open)(path, mode)

  monkeypatch.setattr(cifar10, 'open', guarded_open, raising=False)
  monkeypatch.setattr(cifar10.os, 'access', lambda path, mode: False)
  monkeypatch.setattr(fcntl, 'flock', refuse)
  download.run()
  download.assert_complete()


def test_new_folder_is_removed_if_nothing_is_written(tmp_path):
  """Until then nobody else may use it."""
  (tmp_path / 'old').mkdir()
  for folder in (tmp_path / 'new', tmp_path / 'old', tmp_path / 'written'):
    with cifar10.sole_use(str(folder), '--model_dir'):
      if folder.name == 'written':
        (folder / 'file').touch()
      with (pytest.raises(Cifar10Error, match='is in use by another run'),
            cifar10.sole_use(str(folder), '--model_dir')):
        pass
      assert (folder / '.lock').exists()
  assert {path.name for path in tmp_path.iterdir()} == {'old', 'written'}


@pytest.mark.parametrize('error', [errno.EACCES, errno.EROFS])
def test_folder_that_cannot_be_written(tmp_path, monkeypatch, error):
  """An earlier run has left its lock there, which may be read."""
  (tmp_path / '.lock').touch()
  monkeypatch.setattr(cifar10.tempfile, 'TemporaryFile', mock.Mock(
      side_effect=OSError(error, 'Not here')))
  with (pytest.raises(Cifar10Error, match=(
      rf'Cannot write to {tmp_path} \(Not here\): name another --model_dir')),
        cifar10.sole_use(str(tmp_path), '--model_dir')):
    raise AssertionError('it has been entered')


# -------------------------------------------------------------- archives


FIRST, LAST = (f'{FOLDER}/data_batch_{number}.bin' for number in (1, 5))
EVIL = bytes(10 * cifar10.RECORD_BYTES)  # would pass for records
HOSTILE = {  # before and behind the right files
    'paths': b''.join(member(path, EVIL) for path in (
        '/tmp/evil.bin', '../evil.bin', f'{FOLDER}/../evil.bin',
        'evil/data_batch_1.bin', f'{FOLDER}/evil.bin')),
    'links': (member(FIRST, kind=tarfile.SYMTYPE, target='/etc/passwd')
              + member(FIRST, kind=tarfile.LNKTYPE, target='../evil.bin')),
    'link to a folder': member(FOLDER, kind=tarfile.SYMTYPE, target='..'),
    'devices': (member(FIRST, kind=tarfile.FIFOTYPE)
                + member(FIRST, kind=tarfile.CHRTYPE)),
    'small first': member(FIRST, b'evil'),
    # These could fill the memory.
    'long names': member('a', b'a', tarfile.GNUTYPE_LONGNAME) * 1500,
    'a long name': member('name', b'a' * 10**7, tarfile.GNUTYPE_LONGNAME),
    'many files': member('a', b'a') * 2500,
    'PAX headers': member(
        'pax', b''.join(b'18 k%06d=abcdefg\n' % i for i in range(6000)),
        tarfile.XGLTYPE) + member('a') * 2000,
}
FOUR = dict(list(FILES.items())[:4])
REFUSED = {
    'cut off': (DATA[:-5000], 'ended before'),
    'changed': (DATA[:9000] + b'\0\xff' * 500 + DATA[10000:], ''),
    'checksum of gzip': (DATA[:-8] + b'\0\0\0\0' + DATA[-4:], 'CRC'),
    'something else': (b'<html>Moved</html>', 'truncated'),
    'a file missing': (pack(FOUR), 'its data_batch_5.bin is missing'),
    'a label': (pack(FOUR, member(LAST, b'\n' + EVIL[1:])), 'its data_batch_5'),
    'a size': (pack(FOUR, member(LAST, EVIL[:-1])), 'its data_batch_5'),
    'larger than it says': (
        pack(FOUR, member(LAST, b'evil', size=len(EVIL))), 'header|checksum'),
    'huge': (pack(FOUR, member('a', size=2 * 10**8)), 'of 200,000,000 bytes'),
    'huge header': (pack(FOUR, member('a', kind=tarfile.XHDTYPE, size=10**12)),
                    'it holds a file of 1,000,000,000,000 bytes'),
    'negative': (pack(FOUR, member('a', size=-512)), 'a file of -512 bytes'),
    'bomb': (200 * gzip.compress(bytes(10**6)), 'its data_batch_1.bin is mis'),
}


@pytest.mark.parametrize('kind', [*HOSTILE, *REFUSED])
def test_hostile_archive(download, kind):
  """Neither it nor what it holds is written anywhere but to its place."""
  data, message = REFUSED.get(kind) or (
      pack(FILES, HOSTILE[kind], HOSTILE[kind]), None)
  download.archive.write_bytes(data)
  tracemalloc.start()
  if kind in HOSTILE:
    download.run(skip_checksums=True)
    download.assert_complete(data=data)
  else:
    for skip_checksums in (True, False):  # the second time it is the user's
      download.fail(f'{download.folder / ARCHIVE} is damaged or not the '
                    rf'published archive \(.*({message}).*\): move it away .*'
                    '--skip_checksums', skip_checksums)
      assert download.contents() == {ARCHIVE: data}
      download.archive.unlink(missing_ok=True)
  _, peak = tracemalloc.get_traced_memory()
  tracemalloc.stop()
  assert peak < 1 << 21
  assert {path.name for path in download.folder.parent.iterdir()} == {
      'data', 'mirror'}
  assert not os.path.exists('/tmp/evil.bin')


def test_archive_of_the_folder_packed_from_inside(download):
  """As `tar -C D -czf x.tgz .` makes it: its names begin with ./."""
  download.run()
  with tarfile.open(download.archive, 'w:gz') as tar:
    tar.add(download.folder, '.')
  shutil.rmtree(download.folder)
  download.run(skip_checksums=True)
  download.assert_complete(data=download.archive.read_bytes())


def test_other_archive_needs_the_waiver(download, server):
  """It is not fetched again then: the user may have placed it."""
  server.data = OTHER_DATA
  download.fail('gave another archive than .*see --skip_checksums')
  assert not download.folder.exists()
  for _ in range(2):
    download.run(skip_checksums=True)
    download.assert_complete(OTHER_FILES, OTHER_DATA)
    shutil.rmtree(download.batches)
    download.fail(f'{download.folder / ARCHIVE} is damaged or not .*: '
                  'move it away .*--skip_checksums')
    assert download.contents() == {ARCHIVE: OTHER_DATA}
  assert len(server.ranges) == 2


# --------------------------------------------------------------- servers


@pytest.fixture
def server(download, monkeypatch):
  """The server to download from; attempts follow at once, stalls end soon."""
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', (0, 0, 0))
  monkeypatch.setattr(cifar10, 'TIMEOUT_SECONDS', 0.3)
  with helpers.serve(DATA) as server:
    download.url = server.url
    yield server


FOREVER = 99
SIZE = len(DATA)
cut_off, stalled = part(0.5), part(0.5, pause=1)
reset = part(0.5, then=helpers.reset)
slow = answer(200, *(DATA[start:start + 8000] for start in range(
    0, SIZE, 8000)), pause=0.025, Content_Length=SIZE)  # takes half a second
silent, empty = answer(None), answer(200, Content_Length=0)
garbage = answer(None, b'\0\xffno protocol\r\n\r\n' * 10)
without_ranges = answer(200, DATA[:SIZE // 2], Content_Length=SIZE)
chunked_and_cut = answer(
    200, b'ffff\r\n' + DATA[:3], Transfer_Encoding='chunked')
elsewhere = moved('/archive.tar.gz?moved', 301)
endless = answer(200, *[bytes(1 << 20)] * 300)
too_long = answer(200, b'abc', Content_Length=10**15)
other_bytes = answer(
    200, DATA[:99] + bytes(99) + DATA[198:], Content_Length=SIZE)
other_range = answer(
    206, b'123456789', Content_Length=9, Content_Range='bytes 5-13/99')
dripping = answer(None, b'HTTP/1.1 200 OK\r\n', *[b'X: y\r\n'] * 50, pause=0.1)
with_escapes = answer(403, reason='\x1b[2J\x1b]0;title\x07' + 'x' * 60000)
chance = random.Random(0)
SUCCESSES = {
    'right': [], 'moved': [elsewhere], 'no length': [answer(200, DATA)],
    'odd length': [answer(200, DATA, Content_Length='many')],
    '20 cuts': [part(chance.uniform(0.05, 0.4)) for _ in range(20)],
    'stalled': [stalled, cut_off], 'empty': [cut_off, empty],
    'reset': [cut_off, answer(500), reset, cut_off],
    'no protocol': [cut_off, silent, garbage],
    'busy': [cut_off, answer(429), answer(408)],
    'no ranges': [cut_off, without_ranges, cut_off],
    'cut chunks': [chunked_and_cut] * 3,
    'range refused': [cut_off, answer(416)],
    'moved in between': [cut_off, elsewhere, cut_off],
}
FAILURES = {  # and after how many tries
    'not found': ([answer(404)], 'Error 404', 1),
    'server error': ([answer(500)], 'Error 500', 1),
    'endless header': ([dripping], 'no answer in 0.6 s', 1),
    'empty': ([empty], 'only 0 of', 1),
    'silent': ([silent], 'closed connection', 1),
    'no protocol': ([garbage], 'no protocol', 1),
    'no progress': ([without_ranges] * FOREVER, 'only .* came', 4),
    'stalled': ([stalled, *[answer(503)] * FOREVER], 'Error 503', 4),
    'cut chunks': ([chunked_and_cut] * FOREVER, 'IncompleteRead', 4),
    'moved to itself': ([moved('/archive.tar.gz')] * FOREVER, 'redirect', 5),
    'moved to a file': ([moved('file:///etc/passwd')], 'not allowed', 1),
    'moved to data': ([moved('data:text/plain,abc')], 'not allowed', 1),
    'moved nowhere': ([moved('http://[::1')], 'Invalid IPv6', 1),
    'endless': ([endless], 'gives over 200,000,000 bytes', 1),
    'too long': ([too_long], 'gives over 200,000,000 bytes', 1),
    'other bytes': ([other_bytes], 'its SHA-256 differs', 1),
    'other range': ([cut_off, other_range], 'its SHA-256 differs', 2),
    'escape sequences': ([with_escapes], r'\(HTTP Error 403: [?].*x\)', 1),
}


@pytest.mark.parametrize('script', SUCCESSES.values(), ids=SUCCESSES)
def test_download_that_succeeds(download, server, capsys, script):
  server.script = list(script)
  download.run()
  download.assert_complete()
  assert not server.script
  assert ('timed out: try' in capsys.readouterr().out) == (stalled in script)


@pytest.mark.parametrize(
    ('script', 'message', 'tries'), FAILURES.values(), ids=FAILURES)
def test_download_that_fails(download, server, capsys, script, message, tries):
  server.script = list(script)
  error = download.fail(message)
  assert len(server.ranges) == tries
  assert server.url in error
  assert error.isprintable()
  assert len(error) < 1000
  assert '\x1b' not in capsys.readouterr().out
  assert set(download.contents()) <= {download.partial.name}
  # With a server that behaves again, so does the download.
  server.script = []
  download.run()
  download.assert_complete()


def test_redirect_to_ftp(download, server, monkeypatch):
  """Even if a server for ftp answered, nothing would be taken from it."""
  monkeypatch.setattr(
      cifar10.urllib.request.FTPHandler, 'ftp_open', lambda self, request: (
          urllib.response.addinfourl(io.BytesIO(DATA), {}, request.full_url)))
  server.script = [moved('ftp://127.0.0.1/archive.tar.gz')]
  download.fail(r'ftp://.* is no https, http or file')
  assert not download.folder.exists()


@pytest.mark.parametrize('url', [
    'http://127.0.0.1:9/', 'http://127.0.0.1:port/', 'http://[::1/',
    'http://127.0.0.1/a b\n', 'http://\u00e4..b/\u00e4', 'http:///', 'https://',
    'file:///no/such/file', 'file://host/file', 'file:///', 'file', '',
    'http://no.invalid/', 'ftp://127.0.0.1:9/x'])
def test_strange_addresses(download, monkeypatch, url):
  """They are not tried again, and leave nothing behind."""
  monkeypatch.setattr(cifar10, 'RETRY_SECONDS', (100,))
  download.url = url
  download.fail(r'(?s)Cannot fetch .* place it as')
  assert not download.folder.exists()


@pytest.mark.parametrize('skip_checksums', [False, True])
def test_goes_on_where_it_broke_off(download, server, skip_checksums):
  """Unless nothing would show that the rest is of something else."""
  files, data = (OTHER_FILES, OTHER_DATA) if skip_checksums else (FILES, DATA)
  server.script = [cut_off, cut_off, *[answer(500)] * FOREVER]
  download.fail('Error 500', skip_checksums)
  server.data, server.script = data, []
  download.run(skip_checksums)
  download.assert_complete(files, data)
  half = SIZE // 2
  there = half + (SIZE - half) // 2
  assert server.ranges == [None, f'bytes={half}-', *[f'bytes={there}-'] * 3,
                           None if skip_checksums else f'bytes={there}-']


def test_killed_before_the_last_change_of_name(download, server):
  """All has been fetched: the server refuses to give what follows."""
  download.folder.mkdir()
  download.partial.write_bytes(DATA)
  download.run()
  download.assert_complete()
  assert server.ranges == [f'bytes={SIZE}-', None]


# ------------------------------------------------- processes and systems


@pytest.mark.parametrize('seed', [
    *range(3), *(pytest.param(seed, marks=pytest.mark.slow)
                 for seed in range(3, 20))])
def test_killed_download(download, server, seed):
  """The next run goes on or starts anew, without checksums as well."""
  server.script = [slow]
  process = download.start(server=server)
  time.sleep(random.Random(seed).uniform(0, 0.7))
  process.kill()
  process.communicate()
  download.run(skip_checksums=seed % 2 > 0)
  download.assert_complete()


def test_two_downloads_at_once(download, server):
  server.script = [slow]
  process = download.start(server=server)
  download.fail(f'{download.folder} is in use by another run: wait .*another '
                '--data_dir')
  assert process.communicate()[1] == ''
  download.assert_complete()


@pytest.mark.parametrize('kilobytes', [80, 200])
def test_full_disk(small_disk, download, server, kilobytes):
  """Of 180 KiB to download and 180 to unpack."""
  download.folder = small_disk(kilobytes) / 'data'
  download.fail(rf'Cannot write to {download.folder} \(No space left on '
                r'device\): make room')
  assert len(download.contents()) == 1
  small_disk(kilobytes=1000)
  download.run()
  download.assert_complete()


def test_file_size_limit(download):
  process = download.start('import resource\nresource.setrlimit('
                           'resource.RLIMIT_FSIZE, (70000, 70000))')
  log = process.communicate()[1]
  assert process.returncode == 1
  assert 'File too large): raise the limit' in log
  assert len(log.splitlines()) == 1


@pytest.mark.parametrize(('error', 'expected'), [
    (OSError(errno.ENOSPC, 'Kein Platz'), r'\(Kein Platz\): make room there'),
    (OSError(errno.EDQUOT, 'Voll'), 'make room there'),
    (OSError(errno.EFBIG, 'Zu lang'), r'limit on .* \(ulimit -f\)'),
    (PermissionError(errno.EACCES, 'Permission denied'), r'denied\): name an'),
    (OSError('strange'), r'\(strange\): name another'),
    # Errors of TensorFlow have no errno.
    (RuntimeError('x/y; No space left on device'), 'device.: make room there'),
    (RuntimeError('x/y; Disk quota exceeded'), 'make room there'),
    (RuntimeError('x/y; File too large'), r'limit on .* \(ulimit -f\)'),
    (RuntimeError('x/y; Permission denied'), r'denied\): name an')], ids=str)
def test_cure_fits_the_error(error, expected):
  with pytest.raises(Cifar10Error, match=(
      f'^Cannot write to /m .*{expected}.*--model_dir$')):
    raise cifar10.cannot_write('/m', error, '--model_dir')


WINDOWS = """
import os, signal, sys
for name in ('fcntl', 'termios', 'pwd', 'grp', 'resource'):
  sys.modules[name] = None
for name in ('geteuid', 'getuid', 'tcgetpgrp', 'getpgrp', 'fork', 'setsid'):
  delattr(os, name)
for name in ('SIGHUP', 'SIGKILL', 'SIGUSR1', 'set_wakeup_fd'):
  delattr(signal, name)
"""


def test_system_that_lacks_what_unix_has(download):
  for expected in ('complete: ', 'nothing to do'):
    printed, log = download.start(WINDOWS).communicate()
    assert expected in printed
    assert not log
  download.assert_complete()


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
  code = ('import runpy\n'
          f'try:\n  runpy.run_path("{SCRIPT}", run_name="__main__")\n'
          f'finally:\n  with open("{path}", "w") as file:\n'
          '    file.write(str(file.fileno()))\n')
  process = subprocess.run(
      ['sh', '-c', f'exec "$@" {closed}', 'sh', sys.executable, '-c', code,
       f'--data_dir={tmp_path}/data', '--data_url=file:///no/such/file'],
      check=False)
  assert process.returncode == 1
  assert int(path.read_text()) > 2
  assert not (tmp_path / 'data').exists()


def test_standard_output_that_nobody_reads(download):
  """It is blamed itself, and the folder is not."""
  process = download.start()
  process.stdout.close()
  log = process.stderr.read()
  assert process.wait() == 1
  assert log.splitlines() == [
      '-c: Cannot write to standard output (Broken pipe): nothing is lost, the '
      'same command goes on from here']


@pytest.mark.parametrize(('arguments', 'message'), [
    (['--data_url=file:///no/such/file'], 'Cannot fetch file:///no/such/file'),
    (['--no_such_flag'], "Unknown command line flag 'no_such_flag'"),
    (['stray'], "unknown argument 'stray'"),
    (['--data_dir=/dev/null/x'], 'Not a directory')])
def test_bad_input_is_one_clear_line(tmp_path, arguments, message):
  process = helpers.start(  # a flag given twice has its last value
      [sys.executable, '-W', 'error', SCRIPT, f'--data_dir={tmp_path}/data',
       *arguments])
  _, log = helpers.finish(process)  # without a traceback
  assert process.returncode == 1
  assert message in log
  hint = 'Pass --helpshort or --helpfull to see help on flags.'
  assert len(log.replace(hint, '').strip().splitlines()) == 1
