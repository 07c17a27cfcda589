"""Downloads, verifies and unpacks CIFAR-10 in its binary form.

    python cifar10_download_and_extract.py --data_dir=/tmp/cifar10_data

Afterwards the folder contains `cifar-10-binary.tar.gz` and
`cifar-10-batches-bin/`: five files of training records and one of evaluation
records. A record has 3,073 bytes: a label 0-9, then 1,024 red, 1,024 green and
1,024 blue values, row by row [1]. Only verified files get these names, and
complete files are left alone.

What both scripts need stands here too: reading records, errors in one line,
signals, locking a folder, waiting for other machines, log and status line.

References:
  [1] Alex Krizhevsky: Learning Multiple Layers of Features from Tiny Images.
      2009. https://www.cs.toronto.edu/~kriz/cifar.html
"""

import base64
from collections.abc import Callable, Iterator
import contextlib
import gzip
import hashlib
import http.client
import logging as python_logging
import os
import re
import shutil
import signal
import socket
import ssl
import stat
import sys
import tarfile
import tempfile
import threading
import time
import urllib.parse
import urllib.request
import zlib

try:
  import fcntl
except ImportError:  # Windows: nothing keeps two runs out of one folder
  fcntl = None

from absl import app, flags, logging
import numpy as np

DATA_URL = 'https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz'
ARCHIVE_NAME = 'cifar-10-binary.tar.gz'
ARCHIVE_SHA256 = (
    'c4a38c50a1bc5f3a1c5537f2155ab9d68f9f25eb1ed8d9ddda3db29a59bca1dd')
FOLDER_NAME = 'cifar-10-batches-bin'
TRAIN_FILES = tuple(f'data_batch_{i}.bin' for i in range(1, 6))
TEST_FILE = 'test_batch.bin'
FILE_SHA256 = dict(zip((*TRAIN_FILES, TEST_FILE), (
    'cee916563c9f80d84e3cc88e17fdc0941787f1244f00a67874d45b261883ada5',
    'a591ca11fa1708a91ee40f54b3da4784ccd871ecf2137de63f51ada8b3fa57ed',
    'bbe8596564c0f86427f876058170b84dac6670ddf06d79402899d93ceea26f67',
    '014e562d6e23c72197cc727519169a60359f5eccd8945ad5a09d710285ff4e48',
    '755304fc0b379caeae8c14f0dac912fbc7d6cd469eb67a1029a08a39453a9add',
    '8e2eb146ae340b09e24670f29cabc6326dba54da8789dab6768acf480273f65b',
)))
CLASSES = ('airplane', 'automobile', 'bird', 'cat', 'deer',
           'dog', 'frog', 'horse', 'ship', 'truck')
RECORD_BYTES = 1 + 3 * 32 * 32
RECORDS_PER_FILE = 10000

TIMEOUT_SECONDS = 60  # how long to wait for the server's next byte, or chunk
RETRY_SECONDS = (1, 2, 4, 8)  # waits between attempts that bring nothing new
CHUNK_BYTES = 1 << 16
# The published archive has 170 million bytes, 184 million unpacked.
MAX_ARCHIVE_BYTES = 200_000_000

# Unlike urllib's own, without ftp: a redirect may lead to http and https only.
OPENER = urllib.request.OpenerDirector()
for handler in (
    urllib.request.ProxyHandler, urllib.request.UnknownHandler,
    urllib.request.HTTPHandler, urllib.request.HTTPSHandler,
    urllib.request.HTTPDefaultErrorHandler, urllib.request.HTTPErrorProcessor,
    urllib.request.HTTPRedirectHandler, urllib.request.FileHandler):
  OPENER.add_handler(handler())


class Cifar10Error(Exception):
  """An error that the user can fix. Its message is one line that says how."""


class UnfinishedError(ConnectionError):
  """A download broke off; another attempt may continue it."""


def reason(error: Exception) -> str:
  """Returns the line of an error that tells most, fit for a terminal."""
  # TensorFlow puts lines about its graph before it, and names of nodes into it.
  about_the_graph = r'Graph execution error|Detected at node|<stack|\s|$'
  lines = [line for line in str(error).splitlines()
           if not re.match(about_the_graph, line)] or [type(error).__name__]
  line = re.sub(r'\{\{.*?\}\} ?| \[Op:.*', '', lines[0])
  # It may come from a server: no escape sequences, and not without end.
  return ''.join(c if c.isprintable() else '?' for c in line)[:300]


def check_mode(mode: str) -> None:
  """Raises ValueError unless the mode is 'train', 'eval' or 'infer'."""
  if mode not in ('train', 'eval', 'infer'):
    raise ValueError(f"mode must be 'train', 'eval' or 'infer', not {mode!r}")


def read_records(filename: str) -> np.ndarray:
  """Reads the records of a file, uint8 [N, 3073] with N > 0.

  Raises:
    Cifar10Error: The file is missing or cut off, or has a label above 9.
  """
  again = 'cifar10_download_and_extract.py'
  try:
    data = np.fromfile(filename, np.uint8)
  except FileNotFoundError:
    raise Cifar10Error(f'{filename} is missing: run {again} first') from None
  except OSError as error:
    raise Cifar10Error(f'Cannot read {filename}: {error.strerror}') from None
  if not data.size or data.size % RECORD_BYTES:
    raise Cifar10Error(
        f'{filename} is damaged: {data.size:,} bytes are not a whole number of '
        f'{RECORD_BYTES:,}-byte records; run {again} again')
  records = data.reshape(-1, RECORD_BYTES)
  wrong = np.flatnonzero(records[:, 0] >= len(CLASSES))
  if wrong.size:
    raise Cifar10Error(
        f'{filename} is damaged: record {wrong[0]} has label '
        f'{records[wrong[0], 0]}, not 0-9; run {again} again')
  return records


def synthetic_records(mode: str) -> np.ndarray:
  """Generates records, uint8 [N, 3073], whose classes are easy to learn.

  Each class is a pattern of coloured 8x8 squares; an image is the pattern of
  its class plus noise. Every call for the same mode returns the same records.
  """
  patterns = np.random.default_rng(0).integers(
      64, 192, [len(CLASSES), 3, 32 // 8, 32 // 8])
  patterns = patterns.repeat(8, axis=2).repeat(8, axis=3)
  seed, num_records = (1, 5000) if mode == 'train' else (2, 1000)
  generator = np.random.default_rng(seed)
  labels = generator.integers(0, len(CLASSES), num_records)
  images = patterns[labels].reshape(num_records, -1)
  images += generator.integers(-64, 64, images.shape)
  return np.column_stack([labels, images]).astype(np.uint8)


@contextlib.contextmanager
def errors_in_one_line() -> Iterator[None]:
  """Ends the script with status 1 and one line if the block raises an error."""
  try:
    yield
    return
  except Cifar10Error as error:
    message = str(error)
  except MemoryError:
    message = ('The machine has too little memory: end other programs, or try '
               'a smaller --batch_size')
  finally:
    show_status()
  sys.exit(f'{os.path.basename(sys.argv[0])}: {message}')


def say(text: str) -> None:
  """Prints a line on standard output.

  Raises:
    Cifar10Error: Nobody reads it any more, or its disk is full.
  """
  try:
    print(text, flush=True)
  except OSError as error:
    # Python would try once more at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise Cifar10Error(
        f'Cannot write to standard output ({error.strerror}): nothing is lost, '
        'the same command goes on from here') from None


class StopRequest:
  """Tells, when called, whether a signal has asked to stop.

  Until the first call there is nothing to save, so that a signal ends the run
  at once; a second one always does.
  """

  def __init__(self):
    self.signal, self._asked = None, False

  def __call__(self) -> bool:
    self._asked = True
    return self.signal is not None

  def receive(self, number: int, end: Callable[[int], None]) -> None:
    if self.signal or not self._asked:
      show_status()
      end(128 + number)
    self.signal = number
    logging.warning('Stopping. A second signal ends at once')


@contextlib.contextmanager
def stop_button() -> Iterator[StopRequest]:
  """Receives the KeyboardInterrupt of a notebook's stop button."""
  stop, before = StopRequest(), signal.getsignal(signal.SIGINT)

  def interrupt(status):
    raise KeyboardInterrupt

  is_usual = before is signal.default_int_handler and (
      threading.current_thread() is threading.main_thread())
  if is_usual:
    signal.signal(signal.SIGINT, lambda number, frame: stop.receive(
        number, interrupt))
  try:
    yield stop
  finally:
    if is_usual:
      signal.signal(signal.SIGINT, before)


def receive_signals(stop: StopRequest) -> None:
  """Lets signals come to a thread, since the main one is busy in TensorFlow."""
  receiver, sender = socket.socketpair()

  def wait():
    while True:
      stop.receive(receiver.recv(1)[0], os._exit)

  threading.Thread(target=wait, daemon=True).start()
  sender.setblocking(False)
  signal.set_wakeup_fd(sender.detach())
  catch_signals()


def catch_signals() -> None:
  """Catches the signals, but those that nohup or a shell lets be ignored."""
  for name in ('SIGTERM', 'SIGINT', 'SIGHUP'):
    number = getattr(signal, name, None)  # Windows has no SIGHUP
    if number and signal.getsignal(number) != signal.SIG_IGN:
      signal.signal(number, lambda number, frame: None)


def wait_for_machines(addresses: list[str], own: str) -> None:
  """Waits until all machines of a cluster, host:port, have been started.

  TensorFlow would wait too, but without a word and deaf to signals.

  Raises:
    ValueError: An address is none.
    Cifar10Error: The own port is in use.
  """
  for address in addresses:
    if not re.fullmatch(r'.+:\d{1,5}', address):
      raise ValueError(f'{address} is not host:port')
  port = own.rpartition(':')[2]
  try:
    server = socket.create_server(('', int(port)))
  except OSError as error:
    raise Cifar10Error(
        f'Cannot listen on port {port} ({os.strerror(error.errno)}): end what '
        'uses it, or name another in TF_CONFIG') from None
  logging.info('%s waits for %s', own, ', '.join({*addresses} - {own}))
  with server:
    for address in addresses:
      host, _, port = address.rpartition(':')
      while True:
        with contextlib.suppress(OSError):  # it has not been started yet
          socket.create_connection((host.strip('[]'), port), timeout=5).close()
          break
        time.sleep(0.5)


def refuse_arguments(argv: list[str]) -> None:
  """Raises Cifar10Error if the command line has more than flags."""
  if len(argv) > 1:
    raise Cifar10Error(f'unknown argument {argv[1]!r}: flags begin with --')


@contextlib.contextmanager
def sole_use(folder: str, wait: bool = False,
             cure: str = 'name another folder') -> Iterator[None]:
  """Makes a folder and locks other runs out of it until the block ends.

  The lock also ends with the process. A folder that was made here and is still
  empty at the end is removed.

  Args:
    folder: The folder that the block writes.
    wait: Whether to wait for another run that uses it.
    cure: What the user can do when it cannot be written.

  Raises:
    Cifar10Error: Another run uses the folder, another user may have placed it,
      or the block or this function raised an OSError.
  """
  is_new = not os.path.lexists(folder)
  try:
    refuse_planted(folder)
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass  # it can be written
    with contextlib.ExitStack() as stack:
      if fcntl:
        opened = os.open(folder, os.O_RDONLY)
        stack.callback(os.close, opened)
        lock(opened, folder, wait)
      yield
  except OSError as error:
    raise Cifar10Error(f'Cannot write to {folder} ({error.strerror or error}): '
                       f'{cure}') from None
  finally:
    if is_new:
      with contextlib.suppress(OSError):  # it is not empty, or not there
        os.rmdir(folder)


def lock(opened: int, folder: str, wait: bool) -> None:
  """Locks an open folder; see sole_use."""
  try:
    fcntl.flock(opened, fcntl.LOCK_EX | fcntl.LOCK_NB)
  except BlockingIOError:
    if not wait:
      raise Cifar10Error(f'{folder} is in use by another run: wait until it '
                         'ends, or name another folder') from None
    say(f'Waiting for another run that uses {folder}.')
    fcntl.flock(opened, fcntl.LOCK_EX)
  except OSError:
    pass  # some network file systems have no locks


def refuse_planted(path: str, may_be_link: bool = True) -> None:
  """Refuses what another user may have placed for us to write through.

  Raises:
    Cifar10Error: It belongs to another user in a folder that all users may
      write, such as /tmp; or it is a link that must not be, or leads nowhere.
  """
  if not os.path.lexists(path):
    return
  if os.path.islink(path) and not (may_be_link and os.path.exists(path)):
    kind = 'a link that leads nowhere' if may_be_link else 'a link'
    raise Cifar10Error(f'{path} is {kind}: remove it, or name another folder')
  parent = os.stat(os.path.dirname(os.path.abspath(path)))
  if (parent.st_mode & stat.S_IWOTH
      and os.lstat(path).st_uid not in (os.geteuid(), parent.st_uid)):
    raise Cifar10Error(f'{path} belongs to another user: name another folder')


def download_and_extract(data_dir: str, data_url: str = DATA_URL,
                         skip_checksums: bool = False) -> None:
  """Fills `data_dir` as the docstring of this module says.

  Args:
    data_dir: The folder; it is made if it does not exist.
    data_url: https, http or file address of the archive.
    skip_checksums: Whether to accept files other than the published ones, as
      long as their sizes and labels are valid.

  Raises:
    Cifar10Error: The archive cannot be fetched, it or an existing file is
      wrong, or the folder cannot be written.
  """
  folder = batches_folder(data_dir)
  if not unsound_files(folder, skip_checksums):
    say(f'{folder} is complete, nothing to do.')
    return
  if folder == data_dir:
    data_dir = os.path.dirname(os.path.realpath(folder))
  archive = os.path.join(data_dir, ARCHIVE_NAME)
  # Work in a folder beside the final places: the last step is then a rename,
  # which is done completely or not at all.
  partial = os.path.join(data_dir, '.partial')
  fetched = os.path.join(partial, ARCHIVE_NAME)
  with sole_use(data_dir, True, 'make room there, or name another --data_dir'):
    # Look again: another run may have finished while this one waited.
    to_extract = unsound_files(folder, skip_checksums)
    refuse_planted(partial, may_be_link=False)
    os.makedirs(partial, exist_ok=True)
    os.chmod(partial, stat.S_IRWXU)  # nobody else can place anything in it now
    refuse_planted(fetched, may_be_link=False)
    try:
      source = archive
      if not is_right_archive(archive, skip_checksums):
        source = fetched
        fetch_archive(data_url, fetched, archive, skip_checksums)
      with tempfile.TemporaryDirectory(dir=partial) as extracted:
        try:
          extract(source, to_extract, extracted)
          for name in to_extract:
            if not is_sound(os.path.join(extracted, name), skip_checksums):
              raise Cifar10Error(f'it holds a damaged {name}')
        except Cifar10Error as error:
          os.remove(source)
          origin = shown(data_url) if source == fetched else source
          raise Cifar10Error(f'The archive from {origin} is removed, {error}: '
                             'run this again, or name another --data_url'
                             ) from None
        os.replace(source, archive)
        os.makedirs(folder, exist_ok=True)
        for name in to_extract:
          os.replace(os.path.join(extracted, name), os.path.join(folder, name))
    finally:
      if not os.path.exists(fetched):  # else the next run goes on with it
        shutil.rmtree(partial)
  say(f'{folder} is complete: {len(TRAIN_FILES) * RECORDS_PER_FILE:,} training '
      f'and {RECORDS_PER_FILE:,} evaluation records.')


def batches_folder(data_dir: str) -> str:
  """Returns the folder of the six files: `data_dir` itself, or one in it.

  Raises:
    Cifar10Error: It is a link that leads nowhere.
  """
  folder = os.path.join(data_dir, FOLDER_NAME)
  has_files = any(os.path.exists(os.path.join(data_dir, name))
                  for name in FILE_SHA256)
  names = [os.path.basename(path(data_dir))
           for path in (os.path.abspath, os.path.realpath)]
  if not os.path.lexists(folder) and (has_files or FOLDER_NAME in names):
    folder = data_dir
  for path in (data_dir, folder):
    if os.path.islink(path) and not os.path.exists(path):
      raise Cifar10Error(f'{path} is a link that leads nowhere: remove it, or '
                         'name another --data_dir')
  return folder


def unsound_files(folder: str, skip_checksums: bool) -> list[str]:
  """Returns the names of the files that are missing or incomplete."""
  return [name for name in FILE_SHA256
          if not is_sound(os.path.join(folder, name), skip_checksums)]


def is_sound(filename: str, skip_checksums: bool) -> bool:
  """Returns whether one of the six files exists and is complete.

  Raises:
    Cifar10Error: It is complete but not the published file. Then it is
      somebody's own data, which must not be used unasked or overwritten.
  """
  try:
    records = read_records(filename)
  except Cifar10Error:
    return False
  published = FILE_SHA256[os.path.basename(filename)]
  if len(records) == RECORDS_PER_FILE and (
      skip_checksums or hashlib.sha256(records).hexdigest() == published):
    return True
  raise Cifar10Error(
      f'{filename} is not the published file, its SHA-256 differs: it is left '
      'as it is; move it away and run this again')


def is_right_archive(archive: str, skip_checksums: bool) -> bool:
  """Returns whether the archive exists and, if checked, is as published."""
  if not os.path.isfile(archive):
    return False
  if skip_checksums:
    return True
  digest = hashlib.sha256()
  with open(archive, 'rb') as file:
    while chunk := file.read(CHUNK_BYTES):
      digest.update(chunk)
  return digest.hexdigest() == ARCHIVE_SHA256


def fetch_archive(data_url: str, filename: str, archive: str,
                  skip_checksums: bool) -> None:
  """Fetches the archive into a file and, unless told not to, verifies it.

  Raises:
    Cifar10Error: That failed. The message tells the user to fetch the archive
      another way and to place it as `archive`.
  """
  if skip_checksums and os.path.exists(filename):
    # It may be part of another archive, and no checksum would show that.
    os.remove(filename)
  try:
    download(data_url, filename)
  except ConnectionError as error:
    placed = ('which is there but not the published one'
              if os.path.exists(archive) else 'and run this again')
    raise Cifar10Error(
        f'Cannot fetch {shown(data_url)} ({error}): try again, or fetch it '
        f'another way and place it as {archive}, {placed}') from None
  finally:
    show_status()
  if not is_right_archive(filename, skip_checksums):
    os.remove(filename)
    raise Cifar10Error(
        f'{shown(data_url)} gave another archive than the published one, its '
        'SHA-256 differs: try again, or see --skip_checksums')
  say(f'Successfully downloaded {ARCHIVE_NAME} {os.path.getsize(filename)} '
      'bytes.')


def shown(url: str) -> str:
  """Returns an address without the secrets in it: password and query."""
  return re.sub(r'(?<=//)[^/]*@|[?#].*', '', url)


def download(data_url: str, filename: str) -> None:
  """Fetches `data_url` into a file, continuing what an earlier call left there.

  Raises:
    ConnectionError: It cannot be fetched; where trying again may help, that was
      done.
    Cifar10Error: It is too large.
  """
  with open(filename, 'ab') as file:
    largest, waits = file.tell(), list(RETRY_SECONDS)
    while True:
      try:
        for place, data, total in receive(data_url, file.tell()):
          if max(total, place + len(data)) > MAX_ARCHIVE_BYTES:
            file.close()
            os.remove(filename)
            raise Cifar10Error(
                f'{shown(data_url)} gives over {MAX_ARCHIVE_BYTES:,} bytes, '
                'more than any archive of CIFAR-10: name another --data_url')
          file.truncate(file.seek(place))
          file.write(data)
          size = place + len(data)
          share = f'{size / total:.1%}' if total else f'{size >> 20} MiB'
          show_status(f'>> Downloading {ARCHIVE_NAME} {share}')
        return
      except UnfinishedError as error:
        file.flush()
        if file.tell() > largest:  # this brought something: start over
          largest, waits = file.tell(), list(RETRY_SECONDS)
        if not waits:
          raise
        show_status()
        say(f'{error}: trying again in {waits[0]} s')
        time.sleep(waits.pop(0))


def receive(data_url: str, size: int) -> Iterator[tuple[int, bytes, int]]:
  """Yields the contents of an address in pieces: position, bytes, total size.

  Starts at position `size` if the server supports that, else at 0. The total is
  0 if it is unknown.
  """
  wanted = {'Range': f'bytes={size}-'} if size else {}
  try:
    parts = urllib.parse.urlsplit(data_url)
    login, _, host = parts.netloc.rpartition('@')
    request = urllib.request.Request(
        parts._replace(netloc=host).geturl(), headers=wanted)
    if login:
      login = base64.b64encode(urllib.parse.unquote_to_bytes(login)).decode()
      # To no other server, if this one redirects.
      request.add_unredirected_header('Authorization', f'Basic {login}')
    with OPENER.open(request, timeout=TIMEOUT_SECONDS) as response:
      place = size if response.status == http.HTTPStatus.PARTIAL_CONTENT else 0
      length = response.headers.get('Content-Length', '')
      total = place + int(length) if length.isdecimal() else 0
      for data in chunks(response):
        yield place, data, total
        place += len(data)
    if place < max(total, 1):
      raise UnfinishedError(f'only {place:,} of {total:,} bytes came')
  except (OSError, http.client.HTTPException, ValueError) as error:
    code = getattr(error, 'code', None)  # of HTTP
    if size and code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
      yield from receive(data_url, 0)  # what the file has is not part of it
      return
    cause = error if code else getattr(error, 'reason', error)
    lasting = (
        data_url.startswith('file:') or (code and code < 500
                                         and code not in (408, 429))
        or isinstance(cause, (str, ValueError, socket.gaierror,
                              ssl.SSLCertVerificationError)))
    kind = ConnectionError if lasting else UnfinishedError
    raise kind(reason(cause)) from None


def chunks(response: http.client.HTTPResponse) -> Iterator[bytes]:
  """Yields the body of a response; gives up a server that is too slow."""
  data, started = b'', time.monotonic()
  while piece := response.read1(CHUNK_BYTES - len(data)):
    data += piece
    if len(data) == CHUNK_BYTES:
      yield data
      data, started = b'', time.monotonic()
    elif time.monotonic() - started > TIMEOUT_SECONDS:
      raise UnfinishedError(
          f'only {len(data):,} bytes came in {TIMEOUT_SECONDS} s')
  if data:
    yield data


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
  """Silences TensorFlow, which the block imports; its errors are exceptions."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')
  # It prints some notices before it reads that level.
  if not sys.stderr:
    yield
    return
  stderr = os.dup(2)
  with open(os.devnull, 'wb') as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


def show_log() -> None:
  """Shows the log lines, with the prefix they had in 2017, and nothing else."""
  logging.use_absl_handler()
  if not flags.FLAGS.is_parsed():  # in a notebook; absl would complain
    flags.FLAGS.mark_as_parsed()
  if flags.FLAGS['verbosity'].using_default_value:  # app.run sets it just once
    logging.set_verbosity(logging.INFO)
  # The rest of TensorFlow's notices does not help the user.
  python_logging.getLogger('tensorflow').setLevel('ERROR')
  handler = logging.get_absl_handler()
  handler.setFormatter(
      python_logging.Formatter('%(levelname)s:tensorflow:%(message)s'))

  def filter_line(record):
    ours = os.path.dirname(record.pathname) == os.path.dirname(__file__)
    if ours or record.levelname != 'INFO':
      show_status()  # the line takes its place
      return True
    return False

  handler.addFilter(filter_line)


def show_status(text: str = '') -> None:
  """Updates the status line, the last line of the terminal, if there is one.

  Without a text it clears the line, so that the next output can take its place.
  """
  if (all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr))
      and not in_background()):
    columns = shutil.get_terminal_size().columns - 1
    line = text[:columns].ljust(columns)
    with contextlib.suppress(OSError):  # the terminal was closed
      print(f'\r{line}\r', end='', file=sys.stderr, flush=True)


def in_background() -> bool:
  """Returns whether the terminal belongs to another job, as after `&`."""
  try:
    return os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp()
  except (OSError, AttributeError):  # not our terminal; Windows
    return False


def extract(archive: str, names: list[str], folder: str) -> None:
  """Extracts the named files, and nothing else, directly into a folder.

  Paths in the archive do not decide where a file is written.

  Raises:
    Cifar10Error: The archive is damaged or lacks one of the files.
  """
  missing = set(names)
  try:
    with gzip.open(archive) as stream:
      # Read it to the end first: this verifies gzip's checksum, and a size in a
      # header cannot make tarfile read more than is there.
      while stream.read(CHUNK_BYTES):
        if stream.tell() > MAX_ARCHIVE_BYTES:
          raise tarfile.TarError(f'unpacks to over {MAX_ARCHIVE_BYTES:,} bytes')
      stream.seek(0)
      with tarfile.open(None, 'r:', stream) as tar:
        for member in tar:
          place, name = os.path.split(os.path.normpath(member.name))
          if (place == FOLDER_NAME and name in missing and member.isfile()
              and member.size == RECORDS_PER_FILE * RECORD_BYTES):
            with open(os.path.join(folder, name), 'wb') as file:
              shutil.copyfileobj(tar.extractfile(member), file)
            missing.remove(name)
  except (tarfile.TarError, gzip.BadGzipFile, EOFError, zlib.error,
          ValueError, MemoryError, RecursionError) as error:
    raise Cifar10Error(f'it is damaged ({reason(error)})') from None
  if missing:
    raise Cifar10Error(f'it lacks a whole {FOLDER_NAME}/{min(missing)}')


class PathParser(flags.ArgumentParser):
  """Parses the path of a local file or folder, which may begin with ~."""

  def parse(self, argument: str) -> str:
    path = os.path.expanduser(argument)
    # TensorFlow's reader of checkpoints takes [ ] * ? \\ for a pattern.
    if (not path or not path.isprintable() or '://' in path or path[0] == '~'
        or set(path) & set('[]*?\\')):
      raise ValueError('must be a local path of printable characters without '
                       'any of [ ] * ? \\')
    return path


def are_defined(name: str) -> bool:
  """Returns whether flags are defined already; gives all their defaults again.

  They are where a notebook runs a script twice.
  """
  if name in flags.FLAGS:
    flags.FLAGS.unparse_flags()
  return name in flags.FLAGS


def define_data_dir() -> None:
  """Defines --data_dir, which both scripts have."""
  if 'data_dir' in flags.FLAGS:
    return
  flags.DEFINE(PathParser(), 'data_dir', '/tmp/cifar10_data',
               f'Folder that contains {ARCHIVE_NAME} and {FOLDER_NAME}/.')


def define_flags() -> None:
  """Defines the flags of this script."""
  if are_defined('data_url'):
    return
  define_data_dir()
  flags.DEFINE_string(
      'data_url', DATA_URL, 'https, http or file address of the archive.')
  flags.DEFINE_bool(
      'skip_checksums', False,
      'Accept files other than the published ones from another --data_url, as '
      'long as their sizes and labels are valid.')
  flags.register_multi_flags_validator(
      ['data_url', 'skip_checksums'],
      lambda values: (not values['skip_checksums']
                      or values['data_url'] != DATA_URL),
      '--skip_checksums needs another --data_url')


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  with errors_in_one_line():
    refuse_arguments(argv)
    # Not checked by the flag: its error would show a password in the address.
    if not (values.data_url.isprintable()
            and values.data_url.startswith(('https://', 'http://', 'file://'))):
      raise Cifar10Error('--data_url must begin with https://, http:// or '
                         'file://')
    download_and_extract(
        values.data_dir, values.data_url, values.skip_checksums)


if __name__ == '__main__':
  # What has arrived stays for the next run; a traceback would help nobody.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  define_flags()
  app.run(main)
