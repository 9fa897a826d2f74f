"""Which dense checkpoint does an adapter belong to, wherever its files lie now?"""

import hashlib
import json
import os
from pathlib import Path

from sparse_hf.storage.tensor_headers import read_headers


SAMPLE_BYTES = 256


def fingerprint(folder: Path) -> str:
    """A sha256 over names, dtypes, shapes and a few bytes from the middle of every tensor of a checkpoint.

    The same wherever the checkpoint lies and however it is cut into files; models that were fine-tuned from one base
    differ in it, unless all the sampled numbers stayed the same. Cheap: a few hundred small reads.

    Raises:
        FileNotFoundError, ValueError: see `read_headers`.
    """
    digest = hashlib.sha256()
    for name, stored in sorted(read_headers(folder).items()):
        digest.update(json.dumps([name, stored.dtype, stored.shape]).encode())
        with stored.file.open("rb") as file:
            start = max(0, stored.length - SAMPLE_BYTES) // 2
            digest.update(os.pread(file.fileno(), min(SAMPLE_BYTES, stored.length), stored.offset + start))
    return digest.hexdigest()
