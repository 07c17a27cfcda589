"""Downloads, verifies and unpacks CIFAR-10 in its binary form.

    python cifar10_download_and_extract.py --data_dir=/tmp/cifar10_data

Afterwards the folder contains `cifar-10-binary.tar.gz` and
`cifar-10-batches-bin/`: five files of training records and one of evaluation
records. A record has 3,073 bytes: a label 0-9, then 1,024 red, 1,024 green and
1,024 blue values, row by row [1]. What the user has placed there is left alone.
What both scripts say to a user, and how they lock a folder, stands here too.

References:
  [1] Alex Krizhevsky: Learning Multiple Layers of Features from Tiny Images.
      2009. https://www.cs.toronto.edu/~kriz/cifar.html
"""

from collections.abc import Iterator
import contextlib
import errno
import glob
import gzip
import hashlib
import http.client
import multiprocessing.pool
import os
import re
import shutil
import signal
import sys
import tarfile
import tempfile
import time
from typing import BinaryIO
import urllib.request
import zlib

if sys.version_info < (3, 10):  # noqa: UP036
  sys.exit('This needs Python 3.10 to 3.13, not ' + sys.version.split()[0])

from absl import app, flags
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

TIMEOUT_SECONDS = 60  # how long to wait for the server's next byte
RETRY_SECONDS = (1, 2, 4, 8)  # waits between attempts that bring nothing new
CHUNK_BYTES = 1 << 16
# The published archive has 170 million bytes, 184 million unpacked.
MAX_ARCHIVE_BYTES = 200_000_000


class Cifar10Error(Exception):
  """An error that the user can fix. Its message is one line that says how."""


class MissingError(Cifar10Error):
  """A file is missing or cut off, so that the download may replace it."""


def reason(error: Exception) -> str:
  """Returns the line of an error that tells most, fit for a terminal."""
  # TensorFlow puts lines about its graph before it, and names of nodes into it.
  about_the_graph = r'Graph execution error|Detected at node|<stack|\s|$'
  text = getattr(error, 'strerror', None) or str(error)  # without its number
  lines = [line for line in text.splitlines()
           if not re.match(about_the_graph, line)] or [type(error).__name__]
  line = re.sub(r'\{\{.*?\}\} ?| \[Op:.*', '', lines[0])
  # It may come from a server: not without end.
  return printable(line)[:300]


def printable(text: str) -> str:
  """Returns a text without escape sequences and bytes that are no UTF-8."""
  return ''.join(c if c.isprintable() else '?' for c in text)


def read_records(filename: str) -> np.ndarray:
  """Reads the records of a file, uint8 [N, 3073] with N > 0.

  Raises:
    MissingError: The file is missing or cut off.
    Cifar10Error: It cannot be read, or it is not data of CIFAR-10.
  """
  script = 'cifar10_download_and_extract.py'
  try:
    data = np.fromfile(filename, np.uint8)
  except (FileNotFoundError, NotADirectoryError):
    raise MissingError(
        f'{filename} is missing: run {script} first, with the same --data_dir, '
        'or try --use_synthetic_data') from None
  except OSError as error:
    raise Cifar10Error(f'Cannot read {filename} ({error.strerror}): make it '
                       'readable, or name another --data_dir') from None
  labels = data[::RECORD_BYTES]
  wrong = np.flatnonzero(labels >= len(CLASSES))
  is_whole = data.size > 0 and data.size % RECORD_BYTES == 0
  if is_whole and not wrong.size:
    return data.reshape(-1, RECORD_BYTES)
  flaw = (f'record {wrong[0]} has label {labels[wrong[0]]}, not 0-9' if is_whole
          else f'{data.size:,} bytes are not a whole number of '
          f'{RECORD_BYTES:,}-byte records')
  # What is left of a published file has its labels in the right places.
  if not wrong.size and data.size < RECORDS_PER_FILE * RECORD_BYTES:
    raise MissingError(f'{filename} is damaged: {flaw}; run {script} again')
  raise Cifar10Error(f'{filename} is not data of CIFAR-10: {flaw}; move it '
                     f'away, then run {script}')


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
  script = os.path.basename(sys.argv[0])
  try:
    yield
  except Cifar10Error as error:
    sys.exit(f'{script}: {error}')
  except MemoryError:
    sys.exit(f'{script}: The machine has too little memory: end other '
             'programs, or try a smaller --batch_size')
  finally:
    show_status()


def say(text: str) -> None:
  """Prints a line; raises Cifar10Error if standard output takes no more."""
  show_status()  # the line takes its place
  try:
    print(text, flush=True)
  except OSError as error:
    # Python would try once more at its end, and complain.
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    raise Cifar10Error(
        f'Cannot write to standard output ({error.strerror}): nothing is lost, '
        'the same command goes on from here') from None


def open_standard_streams() -> None:
  """Opens closed standard streams on nothing, before other files get there."""
  while (descriptor := os.open(os.devnull, os.O_RDWR)) <= 2:
    pass
  os.close(descriptor)


@contextlib.contextmanager
def quiet_import() -> Iterator[None]:
  """Sets what TensorFlow, which the block imports, reads then; silences it."""
  os.environ.setdefault('TF_CPP_MIN_LOG_LEVEL', '3')  # errors are exceptions
  # GPU memory only as it is needed:
  os.environ.setdefault('TF_FORCE_GPU_ALLOW_GROWTH', 'true')
  # oneDNN's convolutions, which TensorFlow leaves off on a CPU without AVX-512
  # although they are at least 1.5 times as fast there.
  os.environ.setdefault('TF_ENABLE_ONEDNN_OPTS', '1')
  # It prints some notices before it reads the log level.
  stderr = os.dup(2)
  with open(os.devnull, 'wb') as nothing:
    os.dup2(nothing.fileno(), 2)
  try:
    yield
  finally:
    os.dup2(stderr, 2)
    os.close(stderr)


def show_status(text: str = '') -> None:
  """Updates the status line, the last line of the terminal, if there is one.

  Without a text it clears the line, so that the next output can take its place.
  """
  if not all(stream and stream.isatty() for stream in (sys.stdout, sys.stderr)):
    return
  with contextlib.suppress(OSError, AttributeError):  # unknown, as on Windows
    if os.tcgetpgrp(sys.stderr.fileno()) != os.getpgrp():
      return  # in the background: the line is the shell's
  columns = shutil.get_terminal_size().columns - 1
  line = text[:columns].ljust(columns)
  with contextlib.suppress(OSError):  # the terminal was closed
    print(f'\r{line}\r', end='', file=sys.stderr, flush=True)


def refuse_arguments(argv: list[str]) -> None:
  """Raises Cifar10Error if the command line has more than flags."""
  if len(argv) > 1:
    raise Cifar10Error(f'unknown argument {argv[1]!r}: flags begin with --, '
                       'lists have commas and no spaces')


def cannot_write(place: str, error: Exception, flag: str) -> Cifar10Error:
  """Returns what to say of an OSError or OpError, with the cure that fits."""
  text = reason(error)
  code = errno.errorcode.get(getattr(error, 'errno', None), '')
  cure = f'name another {flag}'
  if re.search('ENOSPC|EDQUOT|No space left|quota', code + text):
    cure = f'make room there, or {cure}'
  elif re.search('EFBIG|File too large', code + text):
    cure = f'raise the limit on file sizes (ulimit -f), or {cure}'
  return Cifar10Error(f'Cannot write to {place} ({text}): {cure}')


@contextlib.contextmanager
def sole_use(folder: str, flag: str) -> Iterator[None]:
  """Makes a folder and locks other runs out of it until the block ends.

  The lock also ends with the process. A folder that was made here and is still
  empty at the end is removed. The `flag`, such as --model_dir, names another.

  Raises:
    Cifar10Error: Another run uses the folder, or it cannot be written.
  """
  is_new = not os.path.lexists(folder)
  path = os.path.join(folder, '.lock')
  try:
    os.makedirs(folder, exist_ok=True)
    with tempfile.TemporaryFile(dir=folder):
      pass  # it can be written
    # A user who shares the folder may only read what another one has made. If
    # somebody planted a link, appending leaves the file that it leads to whole.
    is_shared = os.path.exists(path) and not os.access(path, os.W_OK)
    file = open(path, 'r' if is_shared else 'a')  # noqa: SIM115
  except OSError as error:
    raise cannot_write(folder, error, flag) from None
  with file:
    try:
      import fcntl
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
      raise Cifar10Error(f'{folder} is in use by another run: wait until it '
                         f'ends, or name another {flag}') from None
    except (OSError, ImportError):
      pass  # some network file systems have no locks, nor has Windows
    try:
      yield
    finally:
      with contextlib.suppress(OSError):
        if is_new and os.listdir(folder) == ['.lock']:
          shutil.rmtree(folder)


def download_and_extract(data_dir: str, data_url: str = DATA_URL,
                         skip_checksums: bool = False) -> None:
  """Fills `data_dir` as the docstring of this module says.

  Args:
    data_dir: The folder; it is made if it does not exist.
    data_url: https, http or file address of the archive, which is fetched
      unless it has been placed in the folder.
    skip_checksums: Whether to accept files other than the published ones, as
      long as their sizes and labels are valid.

  Raises:
    Cifar10Error: It, or the archive, or a file that is there cannot be used.
  """
  folder = batches_folder(data_dir)
  names = missing_files(folder, skip_checksums)
  if not names:
    say(f'{folder} is complete, nothing to do.')
    return
  archive = os.path.join(data_dir, ARCHIVE_NAME)
  if not os.path.lexists(archive) and os.path.exists(archive[:-len('.gz')]):
    archive = archive[:-len('.gz')]  # as some browsers save it
  with sole_use(data_dir, '--data_dir'):
    try:
      if not os.path.lexists(archive):
        fetch_archive(data_url, archive, skip_checksums)
      write_files(folder, read_archive(archive, names, skip_checksums))
    except OSError as error:
      raise cannot_write(data_dir, error, '--data_dir') from None
  say(f'{folder} is complete: {len(TRAIN_FILES) * RECORDS_PER_FILE:,} training '
      f'and {RECORDS_PER_FILE:,} evaluation records.')


def batches_folder(data_dir: str) -> str:
  """Returns the folder of the six files: `data_dir` itself, or one in it."""
  inside = os.path.join(data_dir, FOLDER_NAME)
  for folder in (inside, os.path.join(inside, FOLDER_NAME), data_dir):
    if any(os.path.lexists(os.path.join(folder, name)) for name in FILE_SHA256):
      return folder
  is_named_so = os.path.basename(os.path.realpath(data_dir)) == FOLDER_NAME
  return data_dir if is_named_so else inside


def missing_files(folder: str, skip_checksums: bool) -> list[str]:
  """Returns which files are missing or cut off; refuses somebody's own data."""
  names = []
  for name in FILE_SHA256:
    path = os.path.join(folder, name)
    try:
      if not is_right(name, read_records(path).tobytes(), skip_checksums):
        raise Cifar10Error(f'{path} is not the published file, its SHA-256 '
                           'differs: move it away and run this again')
    except MissingError:
      names.append(name)
  return names


def is_right(name: str, data: bytes, skip_checksums: bool) -> bool:
  """Returns whether a file has the published contents, or could have them."""
  if skip_checksums:
    return (len(data) == RECORDS_PER_FILE * RECORD_BYTES
            and max(data[::RECORD_BYTES]) < len(CLASSES))
  return hashlib.sha256(data).hexdigest() == FILE_SHA256[name]


def write_files(folder: str, files: dict[str, bytes]) -> None:
  """Puts files into a folder, each of which is whole when it appears there."""
  os.makedirs(folder, exist_ok=True)
  for left in glob.glob(os.path.join(glob.escape(folder), 'unpacking.*')):
    shutil.rmtree(left, ignore_errors=True)  # by a run that was killed
  with tempfile.TemporaryDirectory(prefix='unpacking.', dir=folder) as work:
    for name, data in files.items():
      with open(os.path.join(work, name), 'wb') as file:
        file.write(data)
    for name in files:
      os.replace(os.path.join(work, name), os.path.join(folder, name))


def fetch_archive(data_url: str, archive: str, skip_checksums: bool) -> None:
  """Fetches the archive; goes on with what an earlier run left of it."""
  partial = f'{archive}.partial'
  # Only a checksum shows whether that fits. A link may lead to another's file.
  if os.path.lexists(partial) and (skip_checksums or os.path.islink(partial)):
    os.remove(partial)
  with open(partial, 'ab+') as file:
    # An address that has given nothing yet may be wrong: no waits for it.
    largest, waits = file.tell(), []
    while problem := receive(data_url, file):
      if file.tell() > largest:
        largest, waits = file.tell(), list(RETRY_SECONDS)
      if not waits:
        if not file.tell():
          file.close()
          os.remove(partial)
        raise Cifar10Error(f'Cannot fetch {data_url} ({problem}): try again, '
                           f'or fetch it another way and place it as {archive}')
      say(f'{problem}: trying again in {waits[0]} s')
      time.sleep(waits.pop(0))
    say(f'Successfully downloaded {ARCHIVE_NAME} {file.tell()} bytes.')
    file.seek(0)
    digest = hashlib.sha256(file.read()).hexdigest()
  if not skip_checksums and digest != ARCHIVE_SHA256:
    os.remove(partial)
    raise Cifar10Error(
        f'{data_url} gave another archive than the published one, its SHA-256 '
        'differs: try again, or see --skip_checksums')
  os.replace(partial, archive)


def receive(data_url: str, file: BinaryIO) -> str:
  """Appends to a file what it lacks of an address; returns why it broke off."""
  size = file.tell()
  show_status(f'>> Waiting for {data_url}')
  try:
    request = urllib.request.Request(
        data_url, headers={'Range': f'bytes={size}-'} if size else {})
    # In a thread: a server can send header lines slowly and without end.
    with multiprocessing.pool.ThreadPool(1) as thread:
      response = thread.apply_async(
          urllib.request.urlopen, (request, None, TIMEOUT_SECONDS)
          ).get(2 * TIMEOUT_SECONDS)
    with response:
      # urllib would follow a redirect to ftp.
      if not response.url.startswith(('https://', 'http://', 'file://')):
        return f'{response.url} is no https, http or file address'
      if response.status != http.HTTPStatus.PARTIAL_CONTENT:
        size = file.truncate(file.seek(0))
      length = response.headers.get('Content-Length', '')
      total = size + int(length) if length.isdecimal() else 0
      while data := response.read1(CHUNK_BYTES):
        file.write(data)
        size += len(data)
        if max(total, size) > MAX_ARCHIVE_BYTES:
          file.truncate(file.seek(0))
          raise Cifar10Error(f'{data_url} gives over {MAX_ARCHIVE_BYTES:,} '
                             'bytes: name another --data_url')
        share = f'{size / total:.1%}' if total else f'{size >> 20} MiB'
        show_status(f'>> Downloading {ARCHIVE_NAME} {share}')
  except multiprocessing.TimeoutError:
    return f'no answer in {2 * TIMEOUT_SECONDS} s'
  except (OSError, http.client.HTTPException, ValueError) as error:
    if getattr(error, 'errno', None) in (
        errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise  # it is the file's
    code = getattr(error, 'code', None)  # of HTTP
    if size and code == http.HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE:
      file.truncate(file.seek(0))  # what it has is of something else
      return receive(data_url, file)
    return reason(error if code else getattr(error, 'reason', error))
  return '' if size >= max(total, 1) else f'only {size:,} of {total:,} came'


def read_archive(archive: str, names: list[str],
                 skip_checksums: bool) -> dict[str, bytes]:
  """Returns the contents of the named files, if all of them are right."""
  files = {}
  try:
    with open(archive, 'rb') as file:
      opener = gzip.open if file.read(2) == b'\x1f\x8b' else open
    with opener(archive, 'rb') as stream:
      # TarFile would keep all headers: a small archive could fill the memory.
      while any(block := stream.read(tarfile.BLOCKSIZE)):
        header = tarfile.TarInfo.frombuf(block, 'utf-8', 'surrogateescape')
        size = -(-header.size // tarfile.BLOCKSIZE) * tarfile.BLOCKSIZE
        if not 0 <= size <= MAX_ARCHIVE_BYTES - stream.tell():
          raise tarfile.TarError(f'it holds a file of {header.size:,} bytes')
        place, name = os.path.split(os.path.normpath(header.name))
        if (place == FOLDER_NAME and name in names
            and header.size == RECORDS_PER_FILE * RECORD_BYTES):
          show_status(f'>> Unpacking {name}')
          files[name] = stream.read(size)[:header.size]
        else:
          stream.seek(size, os.SEEK_CUR)
      stream.seek(MAX_ARCHIVE_BYTES)  # at its end, gzip verifies its checksum
    for name in names:
      if not is_right(name, files.get(name, b''), skip_checksums):
        raise tarfile.TarError(f'its {name} is missing, another or damaged')
  except (OSError, EOFError, zlib.error, tarfile.TarError) as error:
    raise Cifar10Error(
        f'{archive} is damaged or not the published archive ({reason(error)}): '
        'move it away and run this again; --skip_checksums accepts other '
        'archives, also from a file:// address') from None
  return files


class PathParser(flags.ArgumentParser):
  """Parses the path of a local file or folder, which may begin with ~."""

  def parse(self, argument: str) -> str:
    path = os.path.expanduser(argument)
    # TensorFlow's reader of checkpoints takes these for a pattern.
    if (not path or not path.isprintable() or '://' in path or path[0] == '~'
        or set(path) & (set('[]*?\\') - {os.sep})):
      raise ValueError('must be a local path of printable characters without '
                       'any of [ ] * ? \\')
    return path


def define_flags() -> None:
  """Defines the flags of this script."""
  if 'data_url' in flags.FLAGS:  # a notebook runs the script once more
    flags.FLAGS.unparse_flags()
    return
  flags.DEFINE(PathParser(), 'data_dir', '/tmp/cifar10_data',
               f'Folder that contains {ARCHIVE_NAME} and {FOLDER_NAME}/.')
  flags.DEFINE_string(
      'data_url', DATA_URL, 'https, http or file address of the archive.')
  flags.register_validator('data_url', str.isprintable, 'must be printable')
  flags.DEFINE_bool(
      'skip_checksums', False,
      'Accept files other than the published ones, as long as their sizes and '
      'labels are valid.')


def main(argv: list[str]) -> None:
  values = flags.FLAGS
  with errors_in_one_line():
    refuse_arguments(argv)
    download_and_extract(
        values.data_dir, values.data_url, values.skip_checksums)


if __name__ == '__main__':
  open_standard_streams()
  # What has arrived stays for the next run; a traceback would help nobody.
  signal.signal(signal.SIGINT, signal.SIG_DFL)
  define_flags()
  app.run(main)
