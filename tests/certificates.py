"""An authority of the tests' own, and files with what it has issued."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import trustme


@dataclass(frozen=True)
class Certificates:
    """Files in PEM form: the authority, a server's certificate and key, and both in one."""

    ca: Path
    cert: Path
    key: Path
    both: Path


def issue(folder: Path, *names: str) -> Certificates:
    """A certificate for `names`, by default those of this machine, from a new authority."""
    folder.mkdir(parents=True, exist_ok=True)
    authority = trustme.CA()
    issued = authority.issue_cert(*(names or ("127.0.0.1", "localhost")))
    files = Certificates(*(folder / name for name in ("ca.pem", "cert.pem", "key.pem", "both.pem")))
    authority.cert_pem.write_to_path(str(files.ca))
    files.cert.write_bytes(b"".join(blob.bytes() for blob in issued.cert_chain_pems))
    for path, content in (
        (files.key, issued.private_key_pem.bytes()),
        (files.both, issued.private_key_and_cert_chain_pem.bytes()),
    ):
        path.touch(mode=0o600)
        path.write_bytes(content)
    return files
